"""The parts of the GPU bench that need no GPU, and one small run of it where there is one."""

from __future__ import annotations

import numpy as np
import pytest

from expertmesh.bench import kernel_gpu
from expertmesh.errors import ConfigError
from expertmesh.kernels.formats import FORMATS
from tests.kernels import interpreter
from tests.kernels.interpreter import DEVICE, somewhere


def test_all_sides_of_the_bench_compute_the_same():
    with somewhere() as call:
        y = call(interpreter.bench_sides)
    products = {name: rows for name, rows in y.items() if name.endswith("products")}
    whole = {name: rows for name, rows in y.items() if name not in products}
    assert len(products) == 3
    assert len(whole) == 3
    for rows in products.values():
        np.testing.assert_allclose(rows, products["expertmesh products"], rtol=2e-5, atol=2e-5)
    for rows in whole.values():
        np.testing.assert_allclose(rows, whole["expertmesh"], rtol=2e-5, atol=2e-5)


def test_a_quantized_side_is_alone_and_its_weights_are_of_the_usual_size():
    with somewhere() as call:
        assert list(call(interpreter.bench_sides, "int4_g32")) == ["expertmesh", "expertmesh products"]
        for weight_format in FORMATS:
            assert call(interpreter.bench_fill, weight_format) == pytest.approx((1, 1), rel=0.1)


def test_the_bench_reads_its_arguments(monkeypatch):
    asked = []
    monkeypatch.setattr(kernel_gpu, "run", lambda **options: asked.append(options) or {})
    monkeypatch.setattr("sys.argv", ["kernel_gpu", "--shapes", "mixtral", "--tokens", "8", "--format", "int4_g128"])
    kernel_gpu.main()
    assert asked[0]["weight_format"] == "int4_g128"
    assert asked[0]["token_counts"] == [8]


def test_figures_count_active_experts_only():
    shape = kernel_gpu.Shape(num_experts=8, top_k=2, hidden=64, intermediate=32)
    spec = shape.spec("bfloat16")
    routing = kernel_gpu.random_routing(shape, 1, "bfloat16", "cpu", seed=0)
    assert routing.num_active == 2
    found = kernel_gpu.figures(1e-6, [routing], spec, {"dense_tflops": 1.0, "copy_gbps": 100.0})
    expert_bytes = 3 * 64 * 32 * 2
    assert found["active_gbps"] == pytest.approx(2 * expert_bytes / 1e-6 / 1e9)
    assert found["tflops"] == pytest.approx(2 * expert_bytes / 1e-6 / 1e12)  # 2 bytes a weight, and 2 operations
    assert found["share_of_roofline"] == pytest.approx(2 * expert_bytes / 100e9 / 1e-6)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_the_bench_says_that_it_needs_a_gpu():
    with pytest.raises(ConfigError, match="needs a GPU"):
        kernel_gpu.run()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_the_bench_runs(monkeypatch):
    small = kernel_gpu.Shape(num_experts=8, top_k=2, hidden=256, intermediate=128)
    monkeypatch.setitem(kernel_gpu.SHAPES, "small", small)
    report = kernel_gpu.run(shapes=["small"], token_counts=[1, 64], rounds=2)["shapes"]["small"]
    assert report["rows_are_bit_equal"]
    assert report["tokens"][64]["sides"]["expertmesh"]["in_graph"]
