"""How tiles are chosen, tuned and kept: all but the timing of real launches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from expertmesh.errors import ConfigError
from expertmesh.kernels import tuning
from expertmesh.kernels.triton_kernel import INTERPRETED, TritonKernel
from expertmesh.kernels.triton_tiles import (
    Chip,
    Tiling,
    candidates,
    choose,
    company,
    fit,
    num_programs,
    shared_bytes,
    tilings,
)
from tests.kernels import interpreter
from tests.kernels.cases import make_spec
from tests.kernels.interpreter import DEVICE, somewhere

SPEC = make_spec(2048, 768, dtype="bfloat16")


def test_company_is_what_a_pair_meets_and_not_what_a_slot_does():
    assert company(np.array([3])) == 1
    assert company(np.array([0, 0, 1, 1])) == 2
    assert company(np.array([0] * 9 + [1])) == (9 * 9 + 1) / 10


def test_more_company_takes_larger_tiles():
    begun = tilings(SPEC, INTERPRETED)
    assert [choose(begun, pairs).rows for pairs in (1, 16, 17, 33, 65, 100_000)] == [16, 16, 32, 64, 128, 128]


@pytest.mark.parametrize("kib", [64, 99, 163, 227])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tile_fits_and_keeps_to_wide_instructions(kib, dtype):
    spec = dataclasses.replace(SPEC, dtype=dtype)
    chip = Chip(backend="cuda", capability=90, shared_bytes=kib * 1024, num_processors=132)
    for tile in (*(tiling.into for tiling in tilings(spec, chip)), *candidates(spec, chip)):
        assert shared_bytes(tile, spec, chip) <= chip.shared_bytes
        assert fit(tile, spec, chip) == tile
        assert num_programs(tile, spec, chip, 10**6) in (132, 264)
        assert num_programs(tile, spec, chip, 7) == 7
        if dtype == "bfloat16" and kib > 64:
            assert tile.rows >= 16
            assert tile.columns(gated=True) >= 64


def test_what_the_tuner_tries_includes_what_it_would_replace():
    assert {tiling.into for tiling in tilings(SPEC, INTERPRETED)} <= set(candidates(SPEC, INTERPRETED))


def test_the_tuner_takes_the_fastest_of_those_that_agree():
    loads = [[1, 0, 0, 1], [20, 0, 0, 30]]
    with somewhere() as call:
        tiles, tuned, agrees = call(interpreter.tune, make_spec(64, 24), loads)
    assert agrees
    (both,) = tuned
    assert both.company == company(np.repeat([0, 3], [20, 30]))
    if DEVICE == "cpu":  # numpy multiplies, and the fastest tile, whose depth differs, sums in another order
        assert tiles[-1].depth != tiles[0].depth
        assert both.into == both.out == tiles[-2]


def test_tilings_come_back_from_the_file_as_they_were_kept(tmp_path):
    file = tmp_path / "made" / "tilings.json"
    assert tuning.stored(SPEC, "a GPU", file) is None
    begun = tilings(SPEC, INTERPRETED)
    tuning.store(SPEC, "a GPU", begun, file)
    tuning.store(SPEC, "another GPU", begun[:1], file)
    assert tuning.stored(SPEC, "a GPU", file) == begun
    assert tuning.stored(SPEC, "another GPU", file) == begun[:1]
    assert tuning.stored(make_spec(64, 64), "a GPU", file) is None


@pytest.mark.parametrize("text", ["{", '{"a GPU": {"2048x768 bfloat16 gated": [{"company": 1}]}}', "[]"])
def test_a_damaged_file_is_named(tmp_path, text):
    file = tmp_path / "tilings.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"tilings\.json"):
        tuning.stored(SPEC, "a GPU", file)


def test_uniform_loads_give_every_token_its_experts():
    one, many = tuning.uniform_loads(num_experts=16, top_k=4, token_counts=[1, 500])
    assert sorted(one) == [0] * 12 + [1] * 4
    assert sum(many) == 2000
    assert max(many) < 200


def test_both_products_of_a_tiling_walk_the_same_blocks():
    small, large = (tiling.into for tiling in (tilings(SPEC, INTERPRETED)[0], tilings(SPEC, INTERPRETED)[-1]))
    with pytest.raises(AssertionError):
        Tiling(company=1.0, into=small, out=large)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_tuned_kernel_gives_the_bits_of_an_untuned_one(tmp_path, monkeypatch):
    import torch

    monkeypatch.setenv(tuning.FILE_VARIABLE, str(tmp_path / "tilings.json"))
    spec = make_spec(512, 256, dtype="bfloat16")
    kernel = TritonKernel(spec, 8, DEVICE)
    tuned = tuning.tune(kernel, tuning.uniform_loads(8, 2, [1, 64, 1024]))
    tuning.store(spec, torch.cuda.get_device_name(), tuned)
    assert TritonKernel(spec, 8, DEVICE).tilings == tuned
    assert kernel.agreeing(tuned, like=kernel.tilings[0]) == tuned
