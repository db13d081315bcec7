import sys, time, tempfile, pathlib, triton
from tests.kernels.test_triton_targets import *
from tests.kernels.test_triton_targets import _target

names = sys.argv[1].split(",")
chips = sys.argv[2].split(",")
which = sys.argv[3] if len(sys.argv) > 3 else "ends"
triton.knobs.cache.dir = tempfile.mkdtemp()
folder = pathlib.Path(tempfile.mkdtemp())
for fmt in names:
    for chip_name in chips:
        spec = make_spec(2048, 768, dtype="float16" if chip_name == "sm_75" else "bfloat16", weight_format=fmt)
        chip = CHIPS[chip_name]
        begun = tilings(spec, chip)
        for tiling in begun if which == "all" else (begun[0], begun[-1]):
            for product, tile in (("in", tiling.into), ("out", tiling.out)):
                t = time.thread_time()
                try:
                    c = compile_product(spec, chip_name, tile, product)
                except Exception as e:
                    print(fmt, chip_name, product, tile, "ERR", str(e)[:300])
                    continue
                ok = c.metadata.shared <= min(chip.shared_bytes, shared_bytes(tile, spec, chip))
                print(
                    fmt,
                    chip_name,
                    product,
                    f"r{tile.rows} w{tile.weights} d{tile.depth} s{tile.stages}",
                    "shared",
                    c.metadata.shared,
                    shared_bytes(tile, spec, chip),
                    "OK" if ok else "OVER",
                    "spill",
                    spilled(c, folder),
                    instructions(c),
                    f"{time.thread_time() - t:.1f}s",
                    flush=True,
                )
