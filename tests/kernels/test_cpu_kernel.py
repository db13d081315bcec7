"""The CPU kernel against the reference, and against itself on other splits of the same pairs: to the last bit."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from expertmesh.errors import ConfigError
from expertmesh.kernels import cpu, slot_bytes
from expertmesh.kernels.blocks import MAX_PAIRS
from expertmesh.kernels.cpu import BY_FOURS, MAX_ROWS, ONE_ROW, CpuKernel, choose_arithmetic, plain
from expertmesh.kernels.reference import ReferenceKernel
from expertmesh.kernels.selfcheck import fingerprint
from expertmesh.kernels.spec import DTYPES, Activation, ExpertWeights
from tests.kernels.cases import (
    GATED_ACTIVATIONS,
    NUM_ROWS,
    NUM_SLOTS,
    QUANTIZED,
    TOLERANCE,
    UNGATED_ACTIVATIONS,
    filled,
    make_spec,
    random_expert,
    random_pairs,
    random_rows,
)

UGLY_SIZES = [(1, 1), (7, 1), (1, 37), (37, 7), (64, 64), (37, 100), (192, 96), (100, 192), (300, 130)]

PLAIN_BFLOAT16 = plain("plain bfloat16", torch.bfloat16)
"""Stands in for oneDNN's bfloat16 where the processor has none: h and a are rounded too."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def kernel_of(spec, num_threads=1, arithmetic=None) -> CpuKernel:
    assert torch.get_num_threads() == num_threads
    return filled(CpuKernel(spec, NUM_SLOTS, arithmetic))


def assert_matches_reference(kernel, num_pairs):
    x = random_rows(kernel.spec)
    pairs = random_pairs(num_pairs)
    y = kernel.run(x, *pairs)
    expected = filled(ReferenceKernel(kernel.spec, NUM_SLOTS)).run(x, *pairs)
    assert y.dtype == expected.dtype
    tolerance = TOLERANCE[kernel.spec.dtype]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "intermediate"), UGLY_SIZES)
def test_it_computes_what_the_reference_does(hidden, intermediate, dtype):
    kernel = kernel_of(make_spec(hidden, intermediate, dtype=dtype, bias=hidden % 2 == 1))
    for num_pairs in (0, 1, 2, 3, 5, 16, 33):
        assert_matches_reference(kernel, num_pairs)


@pytest.mark.parametrize("weight_format", QUANTIZED)
@pytest.mark.parametrize(
    ("hidden", "intermediate", "dtype"), [(1, 1, "float32"), (37, 7, "float16"), (300, 130, "bfloat16")]
)
def test_quantized_weights_compute_what_they_stand_for(hidden, intermediate, dtype, weight_format):
    kernel = kernel_of(make_spec(hidden, intermediate, dtype=dtype, bias=True, weight_format=weight_format))
    for num_pairs in (1, 5, 33):
        assert_matches_reference(kernel, num_pairs)


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
def test_codes_take_a_byte_of_a_slot(weight_format):
    dense = make_spec(320, 128, dtype="bfloat16")
    quantized = make_spec(320, 128, dtype="bfloat16", weight_format=weight_format)
    assert kernel_of(quantized).arithmetic.name == f"panels of {weight_format}"
    assert slot_bytes(quantized) == pytest.approx(slot_bytes(dense) / 2, rel=0.05)


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS, ids=lambda activation: activation.name)
def test_it_knows_every_gated_activation(activation):
    assert_matches_reference(kernel_of(make_spec(40, 37, activation=activation)), 16)


@pytest.mark.parametrize("activation", UNGATED_ACTIVATIONS, ids=lambda activation: activation.name)
def test_it_knows_every_ungated_activation(activation):
    assert_matches_reference(kernel_of(make_spec(40, 37, gated=False, activation=activation)), 16)


@pytest.mark.parametrize(
    ("dtype", "weight_format", "bits"),
    [
        ("float32", "dense", "513d64e3d2f91f22"),
        ("bfloat16", "dense", "9ab91052d93430fc"),
        ("float16", "dense", "5af23d1dfbaa0c8e"),
        ("bfloat16", "int8", "e335a174c0df0f2e"),
        ("bfloat16", "fp8", "c7f2d81547766320"),
        ("bfloat16", "int4_g32", "9ba9721fead352fe"),
    ],
)
def test_a_portable_expert_has_these_bits_on_every_processor(dtype, weight_format, bits):
    """Written down on a Zen 4. Wherever this runs, it must come to the same."""
    pytest.importorskip("llvmlite")
    spec = make_spec(300, 130, dtype=dtype, bias=True, weight_format=weight_format)
    assert fingerprint(CpuKernel(replace(spec, portable=True), 1)) == bits


def test_what_is_not_portable_is_refused():
    spec = replace(make_spec(40, 37, activation=Activation(name="gelu")), portable=True)
    with pytest.raises(ConfigError, match=r"experts\.portable: gelu is not computed alike everywhere"):
        CpuKernel(spec, 1)


def without_panels(spec):
    """The arithmetics of a machine that has no llvmlite."""
    return [one for one in cpu._preferred(spec) if not one.in_pool]


PREPACKED = without_panels(make_spec(300, 300))[0]


WIDENED = cpu._panels("bfloat16")
"""What a processor without products of bfloat16 pairs takes."""


@pytest.mark.parametrize(
    "arithmetic", [WIDENED, PREPACKED, BY_FOURS, ONE_ROW, PLAIN_BFLOAT16], ids=lambda arithmetic: arithmetic.name
)
def test_every_arithmetic_computes_what_the_reference_does(arithmetic):
    kernel = kernel_of(make_spec(100, 37, dtype="bfloat16", bias=True), arithmetic=arithmetic)
    assert_matches_reference(kernel, 33)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    "spec",
    [
        make_spec(37, 37),
        make_spec(192, 96),
        make_spec(300, 200, bias=True),
        make_spec(300, 200, dtype="bfloat16"),
        make_spec(100, 7, dtype="float16", gated=False),
        make_spec(300, 200, dtype="bfloat16", weight_format="int8"),
        make_spec(100, 70, dtype="bfloat16", bias=True, weight_format="fp8"),
        make_spec(100, 70, dtype="bfloat16", weight_format="int4_g32"),
    ],
    ids=lambda spec: f"{spec.hidden}x{spec.intermediate} {spec.dtype} {spec.weight_format}",
)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_pairs_bits_are_the_same_in_any_company(spec, num_threads, data):
    torch.set_num_threads(num_threads)
    kernel = kernel_of(spec, num_threads)
    x = random_rows(spec)
    row_P = torch.arange(NUM_ROWS).repeat(NUM_SLOTS)
    slot_P = torch.arange(NUM_SLOTS).repeat_interleave(NUM_ROWS)
    whole_PH = kernel.run(x, row_P, slot_P)

    chosen = data.draw(st.lists(st.integers(0, len(row_P) - 1), min_size=1, max_size=60))
    chosen = torch.tensor(sorted(chosen, key=lambda pair: int(slot_P[pair])))
    assert torch.equal(kernel.run(x, row_P[chosen], slot_P[chosen]), whole_PH[chosen])


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pairs_bits_are_the_same_alone_and_among_more_than_a_call_takes_at_once(dtype, num_threads):
    torch.set_num_threads(num_threads)
    spec = make_spec(64, 37, dtype=dtype)
    kernel = kernel_of(spec, num_threads)
    num_rows = MAX_PAIRS + MAX_ROWS + 5
    x = random_rows(spec, num_rows)
    slot_P = torch.cat([torch.zeros(3, dtype=torch.int64), torch.ones(num_rows - 3, dtype=torch.int64)])
    whole_PH = kernel.run(x, torch.arange(num_rows), slot_P)
    for row in (0, 2, 3, MAX_ROWS + 2, MAX_ROWS + 3, MAX_PAIRS - 1, MAX_PAIRS, num_rows - 1):
        assert torch.equal(kernel.run(x, torch.tensor([row]), slot_P[row : row + 1])[0], whole_PH[row])


def test_a_slot_is_replaced_and_cleared():
    spec = make_spec(37, 7)
    kernel = filled(CpuKernel(spec, 2))
    x = random_rows(spec)
    pair = (torch.tensor([1]), torch.tensor([0]))
    before = kernel.run(x, *pair)
    kernel.write(0, random_expert(spec, 1))
    assert torch.equal(kernel.run(x, *pair), kernel.run(x, torch.tensor([1]), torch.tensor([1])))
    kernel.write(0, random_expert(spec, 0))
    assert torch.equal(kernel.run(x, *pair), before)
    kernel.clear(0)
    with pytest.raises(AssertionError, match="slot 0 was never written"):
        kernel.run(x, *pair)


@pytest.mark.parametrize(("hidden", "intermediate"), [(16, 8), (1, 37), (300, 200)])
def test_a_written_slot_does_not_share_the_callers_memory(hidden, intermediate):
    spec = make_spec(hidden, intermediate, bias=True)
    weights = ExpertWeights(*(None if tensor is None else tensor.clone() for tensor in random_expert(spec, 5)))
    kernel = CpuKernel(spec, 1)
    kernel.write(0, weights)
    x, zero = random_rows(spec), torch.tensor([0])
    before = kernel.run(x, zero, zero)
    for tensor in weights:
        if tensor is not None:
            tensor.fill_(9.0)
    assert torch.equal(kernel.run(x, zero, zero), before)


MEASURE_SLOTS = """
import sys
import psutil, torch
from expertmesh.kernels import slot_bytes
from expertmesh.kernels.cpu import CpuKernel
from tests.kernels.cases import make_spec, random_expert

def resident():
    return psutil.Process().memory_info().rss

torch.set_num_threads(1)
if sys.argv[1] == "without llvmlite":
    sys.modules["llvmlite"] = None
for dtype in ("float32", "bfloat16"):
    spec = make_spec(2880, 250, dtype=dtype)
    kernel = CpuKernel(spec, 60)
    for slot in range(60):
        kernel.write(slot, random_expert(spec, 0))
        if slot == 19:  # what the allocator had free is used up
            before = resident()
    print((resident() - before) / 40 / slot_bytes(spec), slot_bytes(spec) / spec.num_bytes)
"""


@pytest.mark.parametrize("machine", ["with llvmlite", "without llvmlite"])
def test_a_slot_takes_the_memory_that_is_said(machine):
    # The odd width is one that oneDNN pads. The threshold keeps the allocator from leaving holes between experts.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "524288"}
    lines = subprocess.run(
        [sys.executable, "-c", MEASURE_SLOTS, machine], env=environment, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    for line in lines:
        taken_to_said, said_to_bare = map(float, line.split())
        assert taken_to_said == pytest.approx(1.0, abs=0.03)
        assert said_to_bare >= 1.0
    assert len(lines) == 2


def noisy(x, w, b):
    """A product whose last bits depend on the number of rows, as a library's may."""
    return F.linear(x, w, b) * (1 + 1e-6 * (len(x) % 2))


def refuse(x, w, b):
    raise RuntimeError("could not create a primitive descriptor")


NOISY = plain("noisy", linear=noisy)
REFUSING = plain("refusing", linear=refuse)


def test_an_arithmetic_that_is_not_invariant_is_passed_over(monkeypatch):
    monkeypatch.setattr(cpu, "_preferred", lambda spec: [NOISY, REFUSING, ONE_ROW])
    spec = make_spec(37, 7, activation=Activation(name="gelu"))
    chosen, num_bytes = choose_arithmetic.__wrapped__(spec, torch.get_num_threads())
    assert chosen is ONE_ROW
    assert num_bytes == spec.num_bytes


def test_a_machine_without_an_invariant_arithmetic_is_refused(monkeypatch):
    monkeypatch.setattr(cpu, "_preferred", lambda spec: [NOISY])
    with pytest.raises(ConfigError, match="independently"):
        choose_arithmetic.__wrapped__(make_spec(37, 7), torch.get_num_threads())
