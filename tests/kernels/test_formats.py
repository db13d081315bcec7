"""Weight formats: what is kept of weights, in how many bytes, and whose numbers they are."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from expertmesh.kernels.formats import FORMATS
from expertmesh.kernels.quantization import decode, dequantize, dequantize_matrix, quantize, quantize_matrix
from expertmesh.kernels.spec import ExpertWeights
from tests.kernels.cases import QUANTIZED, make_spec, random_expert


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_by_one(w_NK, name, parts=1):
    """Scales and numbers by the definition, with a loop over every weight."""
    form = FORMATS[name]
    num_rows, columns = w_NK.shape
    group = form.group or columns
    height = num_rows // parts
    out = torch.empty(num_rows, columns)
    for n in range(num_rows):
        for start in range(0, columns, group):
            top = n - n % height % form.scale_rows
            rows = range(top, min(top + form.scale_rows, (n // height + 1) * height))
            block = torch.stack([w_NK[row, start : start + group] for row in rows])
            peak = block.flatten()[block.abs().argmax()]
            if form.code == "int4":
                scale = (peak / -8).bfloat16().float()
            else:
                scale = peak.abs() / {"int8": 127, "fp8": 448}[form.code]
            for k in range(start, min(start + group, columns)):
                q = w_NK[n, k] / scale
                if form.code == "fp8":
                    q = q.to(torch.float8_e4m3fn).float()
                else:
                    q = q.round().clamp(-127 if form.code == "int8" else -8, 127 if form.code == "int8" else 7)
                out[n, k] = q * scale
    return out


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize(("rows", "columns", "parts"), [(1, 1, 1), (6, 37, 2), (3, 300, 1), (262, 5, 2)])
def test_weights_come_back_as_the_definition_says(name, rows, columns, parts):
    if rows > 100 and name != "fp8_block":
        pytest.skip("only blocks of rows need that many")
    w_NK = normal(rows, columns)
    codes, s_GN = quantize_matrix(w_NK, FORMATS[name], parts)
    assert torch.equal(dequantize_matrix(codes, s_GN, FORMATS[name], columns), one_by_one(w_NK, name, parts))


@pytest.mark.parametrize(
    ("name", "most"),
    [("int8", 0.012), ("int4_g32", 0.1), ("int4_g64", 0.11), ("int4_g128", 0.125), ("fp8", 0.03), ("fp8_block", 0.03)],
)
def test_the_error_of_normal_weights_is_what_the_bits_allow(name, most):
    w_NK = normal(128, 1024)
    back = dequantize_matrix(*quantize_matrix(w_NK, FORMATS[name]), FORMATS[name], 1024)
    error = float((back - w_NK).norm() / w_NK.norm())
    assert most / 2 < error < most


@pytest.mark.parametrize("name", QUANTIZED)
def test_codes_are_exact_in_every_dtype_that_rows_have(name):
    form = FORMATS[name]
    codes, _ = quantize_matrix(normal(40, 300) * 10.0 ** normal(40, 300, seed=1), form)
    values = decode(codes, form)
    assert len(values.unique()) > 2**3
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(values.to(dtype).float(), values)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-20, 1e38])
def test_extreme_weights_keep_finite_scales(name, scale):
    w_NK = normal(5, 70).clamp(-3, 3) * scale
    w_NK[2] = 0
    codes, s_GN = quantize_matrix(w_NK, FORMATS[name])
    assert s_GN.isfinite().all()
    assert (s_GN != 0).all()
    back = dequantize_matrix(codes, s_GN, FORMATS[name], 70)
    assert (back[2] == 0).all()
    if scale >= 1e-20:
        torch.testing.assert_close(back, w_NK, rtol=0, atol=0.4 * scale)
    else:
        assert (back.abs() <= 4 * scale).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gated", [False, True])
def test_an_expert_takes_the_bytes_that_its_spec_says(name, dtype, gated):
    spec = make_spec(100, 37, dtype=dtype, gated=gated, bias=True, weight_format=name)
    weights = random_expert(spec, 0)
    weights.check(spec)
    assert sum(tensor.nbytes for tensor in weights if tensor is not None) == spec.num_bytes
    plain = dequantize(weights, spec)
    dense = random_expert(spec.dense, 0)
    assert plain.w_in.shape == dense.w_in.shape
    assert plain.w_out.shape == dense.w_out.shape
    assert plain.b_in is weights.b_in


@pytest.mark.parametrize(
    ("name", "bits"),
    [("dense", 16), ("int8", 8), ("int4_g32", 4.5), ("int4_g64", 4.25), ("int4_g128", 4.125), ("fp8", 8)],
)
def test_bits_per_weight_of_a_large_expert(name, bits):
    spec = make_spec(4096, 2048, dtype="bfloat16", weight_format=name)
    assert 8 * spec.num_bytes / spec.num_parameters == pytest.approx(bits, rel=2e-3)


def test_blocks_of_gate_and_up_begin_anew():
    spec = make_spec(130, 140, weight_format="fp8_block")
    dense = random_expert(spec.dense, 0)
    w_in = dense.w_in.clone()
    w_in[140:] *= 1000  # up: a block that held rows of both would drown the gate's
    quantized = quantize(ExpertWeights(w_in, dense.w_out), spec)
    assert quantized.s_in is not None
    assert [len(quantized.s_in[0, rows].unique()) for rows in (slice(0, 128), slice(128, 140))] == [1, 1]
    back = dequantize(quantized, spec).w_in
    assert float((back[:140] - w_in[:140]).norm() / w_in[:140].norm()) < 0.03


def test_a_dense_expert_is_passed_on():
    spec = make_spec(8, 8)
    weights = random_expert(spec, 0)
    assert quantize(weights, spec) is weights
    assert dequantize(weights, spec) is weights


def test_quantized_bytes_are_the_same_on_every_machine():
    """Integers as weights, which every generator and every processor has alike."""
    w_NK = (torch.arange(64 * 160).mul(7919).remainder(4001) - 2000).view(64, 160).float() / math.pi
    digests = {}
    for name in QUANTIZED:
        codes, s_GN = quantize_matrix(w_NK, FORMATS[name])
        data = codes.numpy().tobytes() + s_GN.float().numpy().tobytes()
        digests[name] = hashlib.sha256(data).hexdigest()[:12]
    assert digests == {
        "int8": "4859cd3c2c80",
        "int4_g32": "5c326c3d22e2",
        "int4_g64": "d88a83949e94",
        "int4_g128": "70128a711f36",
        "fp8": "b69c352880ce",
        "fp8_block": "8954de7fda67",
    }
