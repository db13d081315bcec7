"""The Triton kernels, run on a GPU or in Triton's interpreter, against the reference."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.errors import ConfigError
from expertmesh.kernels.blocks import cut
from expertmesh.kernels.formats import FORMATS
from expertmesh.kernels.reference import ReferenceKernel
from expertmesh.kernels.spec import Activation
from expertmesh.kernels.triton_kernel import TritonKernel, chip_of
from expertmesh.kernels.triton_tiles import tilings
from tests.kernels import interpreter
from tests.kernels.cases import (
    GATED_ACTIVATIONS,
    NUM_ROWS,
    NUM_SLOTS,
    QUANTIZED,
    TOLERANCE,
    UNGATED_ACTIVATIONS,
    filled,
    make_spec,
    random_pairs,
    random_rows,
)
from tests.kernels.interpreter import DEVICE, RUNNABLE_DTYPES, somewhere

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")]


@pytest.fixture(scope="module")
def call():
    with somewhere() as call:
        yield call


@pytest.fixture(scope="module")
def run(call):
    return functools.partial(call, interpreter.compute)


def assert_matches_reference(run, spec, num_pairs, *, way="run"):
    row_P, slot_P = random_pairs(num_pairs)
    if way == "run_on_device":  # which takes pairs in any order
        order = torch.randperm(num_pairs, generator=torch.Generator().manual_seed(0))
        row_P, slot_P = row_P[order], slot_P[order]
    y = torch.from_numpy(run(spec, row_P.tolist(), slot_P.tolist(), way=way))
    expected = filled(ReferenceKernel(spec, NUM_SLOTS)).run(random_rows(spec), row_P, slot_P).float()
    tolerance = TOLERANCE[spec.dtype]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", RUNNABLE_DTYPES)
@pytest.mark.parametrize(
    ("hidden", "intermediate"), [(1, 1), (7, 1), (1, 37), (37, 7), (64, 64), (100, 192), (192, 96)]
)
def test_it_computes_what_the_reference_does(run, hidden, intermediate, dtype):
    spec = make_spec(hidden, intermediate, dtype=dtype, bias=hidden % 2 == 1)
    for num_pairs in (1, 3, 16, 33, 70):
        assert_matches_reference(run, spec, num_pairs)


@pytest.mark.parametrize("way", ["plain", "run_on_device"])
@pytest.mark.parametrize(("dtype", "gated"), [("float16", True), ("float32", False)])
def test_every_way_through_it_computes_the_same(run, way, dtype, gated):
    spec = make_spec(72, 136, dtype=dtype, gated=gated, bias=gated)
    for num_pairs in (1, 21, 70, 300):
        assert_matches_reference(run, spec, num_pairs, way=way)


@pytest.mark.parametrize("weight_format", QUANTIZED)
@pytest.mark.parametrize(
    ("hidden", "intermediate", "dtype"),
    [(1, 1, "float32"), (37, 7, "float16"), (64, 272, "float32"), (272, 130, "float16"), (192, 96, "float32")],
)
def test_quantized_weights_compute_what_they_stand_for(run, hidden, intermediate, dtype, weight_format):
    spec = make_spec(hidden, intermediate, dtype=dtype, bias=hidden % 2 == 1, weight_format=weight_format)
    for num_pairs, way in ((1, "run"), (21, "plain"), (70, "run"), (70, "run_on_device")):
        assert_matches_reference(run, spec, num_pairs, way=way)


@pytest.mark.parametrize("weight_format", QUANTIZED)
def test_an_ungated_expert_may_be_quantized(run, weight_format):
    activation = Activation(name="relu2")
    spec = make_spec(100, 272, gated=False, bias=True, activation=activation, weight_format=weight_format)
    assert_matches_reference(run, spec, 33)


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS, ids=lambda activation: activation.name)
def test_it_knows_every_gated_activation(run, activation):
    assert_matches_reference(run, make_spec(40, 37, activation=activation), 16)


@pytest.mark.parametrize("activation", UNGATED_ACTIVATIONS, ids=lambda activation: activation.name)
@pytest.mark.parametrize("bias", [False, True])
def test_it_knows_every_ungated_activation(run, activation, bias):
    assert_matches_reference(run, make_spec(40, 37, gated=False, bias=bias, activation=activation), 16)


def test_a_row_that_is_not_a_number_harms_no_other(run):
    spec = make_spec(37, 70, bias=True)
    row_P = list(range(NUM_ROWS)) * 2
    slot_P = [0] * NUM_ROWS + [1] * NUM_ROWS
    healthy_PH = run(spec, row_P, slot_P)
    for poisoned in (0, 5, NUM_ROWS - 1):
        y_PH = run(spec, row_P, slot_P, poisoned=poisoned)
        others = np.array(row_P) != poisoned
        assert np.array_equal(y_PH[others], healthy_PH[others])
        assert np.isnan(y_PH[~others]).all()


@pytest.mark.parametrize("sizes", [[1], [16], [17, 1], [0, 3, 0, 40, 16, 15], [100], [1] * 70, [33, 31, 32]])
@pytest.mark.parametrize("rows", [16, 64])
def test_blocks_cut_on_the_device_are_those_cut_on_the_host(call, sizes, rows):
    slot_P = np.repeat(np.arange(len(sizes)), sizes)
    block = call(interpreter.cut_on_device, slot_P.tolist(), rows)
    firsts = [block.first for block in cut(slot_P, rows)]
    expected = [len(firsts), *firsts, len(slot_P)]
    assert block[: len(expected)] == expected
    assert set(block[len(expected) :]) <= {-1}, "it wrote beyond the index"


# In the interpreter numpy multiplies, whose bits do depend on a row's place.
class TestOnAGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("dtype", RUNNABLE_DTYPES)
    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_a_pairs_bits_are_the_same_in_any_company(self, run, dtype, data):
        spec = make_spec(300, 170, dtype=dtype, bias=True)
        row_P = list(range(NUM_ROWS)) * NUM_SLOTS
        slot_P = sorted(list(range(NUM_SLOTS)) * NUM_ROWS)
        whole_PH = run(spec, row_P, slot_P)
        chosen = sorted(data.draw(st.lists(st.integers(0, len(row_P) - 1), min_size=1, max_size=50)))
        way = data.draw(st.sampled_from(["run", "run_on_device", "plain"]))
        some_PH = run(spec, [row_P[pair] for pair in chosen], [slot_P[pair] for pair in chosen], way=way)
        assert np.array_equal(some_PH, whole_PH[chosen])

    @pytest.mark.parametrize("dtype", RUNNABLE_DTYPES)
    @pytest.mark.parametrize("weight_format", FORMATS)
    @pytest.mark.parametrize(("hidden", "intermediate"), [(2048, 768), (2880, 2880), (1000, 520)])
    def test_all_tilings_agree_to_the_last_bit(self, dtype, hidden, intermediate, weight_format):
        spec = make_spec(hidden, intermediate, dtype=dtype, weight_format=weight_format)
        kernel = TritonKernel(spec, 1, DEVICE)
        begun = tilings(spec, chip_of(kernel.device))
        assert kernel.agreeing(begun) == begun

    @pytest.mark.parametrize("num_pairs", [1, 8, 40, 300, 3000])
    def test_a_cuda_graph_can_hold_a_call_whatever_the_pairs(self, num_pairs):
        spec = make_spec(256, 128, dtype="bfloat16")
        kernel = filled(TritonKernel(spec, NUM_SLOTS, DEVICE))
        x_TH = random_rows(spec).to(DEVICE)
        row_P, slot_P = (torch.zeros(num_pairs, dtype=torch.int64, device=DEVICE) for _ in range(2))
        kernel.run_on_device(x_TH, row_P, slot_P)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y_PH = kernel.run_on_device(x_TH, row_P, slot_P)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            row, slot = (torch.randint(most, (num_pairs,), generator=generator) for most in (NUM_ROWS, NUM_SLOTS))
            row_P.copy_(row)
            slot_P.copy_(slot)
            graph.replay()
            order = slot.argsort(stable=True)
            expected = kernel.run(random_rows(spec), row[order], slot[order])
            assert torch.equal(y_PH.cpu()[order], expected)


def test_no_pairs_give_no_rows():
    empty = torch.empty(0, dtype=torch.int64)
    spec = make_spec(16, 8)
    assert TritonKernel(spec, 1, DEVICE).run(random_rows(spec), empty, empty).shape == (0, 16)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_so():
    with pytest.raises(ConfigError, match="finds no GPU"):
        TritonKernel(make_spec(16, 8), 1, "cuda:0")
