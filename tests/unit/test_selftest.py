"""What the test of a fresh replica lets through, and what it does not."""

from __future__ import annotations

import pytest
import torch

from expertmesh.errors import CheckpointError
from expertmesh.hosts import selftest
from expertmesh.kernels.cpu import CpuKernel
from expertmesh.kernels.formats import FORMATS
from expertmesh.kernels.reference import ReferenceKernel, compute_row
from expertmesh.kernels.spec import DTYPES, Activation, ExpertSpec, ExpertWeights
from expertmesh.testing.experts import random_weights


def make_spec(dtype: str, hidden: int = 48, *, gated: bool = True, weight_format: str = "dense") -> ExpertSpec:
    return ExpertSpec(
        hidden=hidden,
        intermediate=40,
        gated=gated,
        bias=True,
        activation=Activation(name="silu"),
        dtype=dtype,
        weight_format=weight_format,
    )


def answer(spec: ExpertSpec, weights: ExpertWeights) -> torch.Tensor:
    kernel = CpuKernel(spec, 1)
    kernel.write(0, weights)
    rows = torch.arange(selftest.NUM_ROWS)
    return kernel.run(selftest.known_rows(spec), rows, torch.zeros_like(rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_a_sound_replica_passes_in_every_dtype(dtype: str, seed: int) -> None:
    spec = make_spec(dtype)
    weights = random_weights(spec, seed)
    selftest.check(answer(spec, weights), selftest.expect(weights, spec))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_quantized_replica_is_held_against_what_its_codes_stand_for(weight_format: str) -> None:
    spec = make_spec("float32", weight_format=weight_format)
    weights = random_weights(spec, 1)
    expected = selftest.expect(weights, spec)
    selftest.check(answer(spec, weights), expected)
    if not spec.format.is_dense:
        assert weights.s_out is not None
        scales = weights.s_out.clone()
        scales[0, 3] *= 1.5
        other = weights._replace(s_out=scales)
        assert selftest.expect(other, spec).weights != expected.weights
        with pytest.raises(CheckpointError, match="off by"):
            selftest.check(answer(spec, other), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_replica_of_other_weights_does_not(dtype: str) -> None:
    spec = make_spec(dtype)
    expected = selftest.expect(random_weights(spec, 1), spec)
    with pytest.raises(CheckpointError, match="off by"):
        selftest.check(answer(spec, random_weights(spec, 2)), expected)


def test_one_row_of_weights_in_the_wrong_place_is_found() -> None:
    spec = make_spec("float32")
    weights = random_weights(spec, 1)
    expected = selftest.expect(weights, spec)
    swapped = weights.w_out.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    with pytest.raises(CheckpointError, match="off by"):
        selftest.check(answer(spec, weights._replace(w_out=swapped)), expected)


def test_an_answer_that_is_not_finite_is_found() -> None:
    spec = make_spec("float32")
    weights = random_weights(spec, 1)
    y_RH = answer(spec, weights)
    y_RH[1, 5] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        selftest.check(y_RH, selftest.expect(weights, spec))


def test_weights_that_overflow_ordinary_rows_are_named_as_the_cause() -> None:
    spec = make_spec("float16")
    weights = random_weights(spec, 1)
    with pytest.raises(CheckpointError, match="infinite"):
        selftest.check(answer(spec, weights), selftest.expect(weights._replace(w_out=weights.w_out * 30000), spec))


def test_what_is_expected_is_what_the_reference_computes() -> None:
    spec = make_spec("bfloat16", gated=False)
    weights = random_weights(spec, 1)
    kernel = ReferenceKernel(spec, 1)
    kernel.write(0, weights)
    rows = torch.arange(selftest.NUM_ROWS)
    y_RH = kernel.run(selftest.known_rows(spec), rows, torch.zeros_like(rows))
    assert torch.equal(selftest.expect(weights, spec).y_RH.to(torch.bfloat16), y_RH)


def test_the_reference_need_not_upcast_all_weights_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec("bfloat16")
    weights = random_weights(spec, 1)
    x_H = selftest.known_rows(spec)[0].float()
    whole = compute_row(spec, weights, x_H)
    monkeypatch.setattr("expertmesh.kernels.reference.MAX_ROWS", 7)
    torch.testing.assert_close(compute_row(spec, weights, x_H), whole)


def test_known_rows_are_the_same_on_every_machine_and_far_from_zero() -> None:
    x_RH = selftest.known_rows(make_spec("float32", hidden=4096))
    assert selftest.digest_of(x_RH).hex() == "b6711fca977fbf6346ee51e1b30f75a8"
    assert 0.5 < float(x_RH.std()) < 2
    assert not torch.equal(x_RH[0], x_RH[1])


def test_a_single_bit_of_any_tensor_changes_the_digest_of_the_weights() -> None:
    spec = make_spec("bfloat16")
    weights = random_weights(spec, 1)
    digests = {selftest.expect(weights, spec).weights}
    for name in spec.stored:
        tensor = getattr(weights, name).clone()
        tensor.view(torch.int16).view(-1)[-1] ^= 1
        digests.add(selftest.expect(weights._replace(**{name: tensor}), spec).weights)
    assert len(digests) == 5
    assert selftest.expect(weights, spec).weights in digests
    assert {len(digest) for digest in digests} == {selftest.DIGEST_BYTES}
