"""What our machine code for CPU cores is written with: LLVM's builder, loops, addresses, and work that threads share.

Knows nothing of what is computed. Its invariant: code does what IEEE rules say in the order that is written; LLVM is
never allowed to reorder arithmetic or to contract it.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from llvmlite import binding, ir

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
POINTER = ir.PointerType()
LANES = 8
"""Of a vector of float32, where nothing else is said."""
LINE_BYTES = 64
"""What one prefetch brings."""


class Work(ctypes.Structure):
    """Numbered turns, as the code reads them. Threads that run the code on one of these share its turns."""

    _fields_ = (
        ("next", ctypes.c_int64),  # the first that no thread has taken
        ("end", ctypes.c_int64),
        ("chunk", ctypes.c_int64),  # turns that a thread takes at a time
    )


def worker(module: ir.Module, name: str, turn: Callable[[ir.IRBuilder, ir.Value, ir.Value], None]) -> None:
    """`void name(Work *)`: takes chunks of turns until there are none, and does `turn(b, work, number)` for each."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name)
    entry, take, taken, done = (function.append_basic_block(name) for name in ("entry", "take", "taken", "done"))
    (work,) = function.args
    b = ir.IRBuilder(entry)
    b.branch(take)

    b.position_at_end(take)
    chunk = field(b, work, Work, "chunk")
    first = b.atomic_rmw("add", work, chunk, "monotonic")
    count = b.sub(minimum(b, b.add(first, chunk), field(b, work, Work, "end")), first)
    b.cbranch(b.icmp_signed(">", count, I64(0)), taken, done)

    b.position_at_end(taken)

    def step(k: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
        turn(b, work, b.add(first, k))
        return []

    loop(b, count, [], step)
    b.branch(take)

    b.position_at_end(done)
    b.ret_void()


def compiled(
    module: ir.Module, needs: frozenset[str] = frozenset(), *, optimized: bool = False
) -> binding.ExecutionEngine:
    """Its functions, as machine code for this processor, which lives as long as the process.

    What is written with vectors, and in the order that is best, needs no optimisation but the selection of
    instructions; loops over single numbers do. Raises RuntimeError on an x86 processor that lacks a feature of `needs`.
    """
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features()
    target = binding.Target.from_default_triple()
    if target.name.startswith("x86") and (missing := needs - {name for name in features if features[name]}):
        raise RuntimeError(f"this processor lacks {', '.join(sorted(missing))}")
    machine = target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features.flatten(), opt=2)
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    if optimized:
        options = binding.create_pipeline_tuning_options(speed_level=3)
        options.loop_vectorization = True
        passes = binding.create_pass_builder(machine, options)
        passes.getModulePassManager().run(parsed, passes)
    engine = binding.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    _engines.append(engine)
    return engine


_engines: list[binding.ExecutionEngine] = []


def loop(
    b: ir.IRBuilder,
    times: ir.Value,
    values: Sequence[ir.Value],
    step: Callable[[ir.Value, Sequence[ir.Value]], Sequence[ir.Value]],
) -> Sequence[ir.Value]:
    """`for k in range(times): values = step(k, values)`: the last values."""
    before, body, after = b.block, b.append_basic_block("body"), b.append_basic_block("after")
    b.cbranch(b.icmp_signed(">", times, I64(0)), body, after)
    b.position_at_end(body)
    k, *carried = [b.phi(value.type) for value in (times, *values)]
    stepped = step(k, carried)
    next_k = b.add(k, I64(1))
    for phi, first, later in zip((k, *carried), (I64(0), *values), (next_k, *stepped), strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, b.block)
    end_of_body = b.block
    b.cbranch(b.icmp_signed("<", next_k, times), body, after)
    b.position_at_end(after)
    last = [b.phi(value.type) for value in values]
    for phi, first, later in zip(last, values, stepped, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, end_of_body)
    return last


def field(b: ir.IRBuilder, base: ir.Value, of: type[ctypes.Structure], name: str, kind: ir.Type = I64) -> ir.Value:
    """What a structure at `base` has under that name."""
    return b.load(at(b, base, getattr(of, name).offset), typ=kind)


def at(b: ir.IRBuilder, base: ir.Value, offset: ir.Value | int) -> ir.Value:
    """The address that many bytes on."""
    return b.gep(base, [I64(offset) if isinstance(offset, int) else offset], source_etype=I8)


def intrinsic(b: ir.IRBuilder, name: str, kinds: Sequence[ir.Type], result: ir.Type) -> ir.Function:
    """LLVM's own function of that name."""
    known = b.module.globals.get(name)
    return known if known is not None else ir.Function(b.module, ir.FunctionType(result, kinds), name)


def prefetch(b: ir.IRBuilder, address: ir.Value, num_bytes: int, *, near: bool) -> None:
    """Fetch what will be read: soon and once, past all caches but the first, where it drives nothing out; or to the
    second."""
    function = intrinsic(b, "llvm.prefetch.p0", [POINTER, I32, I32, I32], ir.VoidType())
    how = [I32(0), I32(0 if near else 2), I32(1)]  # to read, to keep how near, data
    for offset in range(0, num_bytes, LINE_BYTES):
        b.call(function, [at(b, address, offset), *how])


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z, rounded once: of float32, or of vectors of them."""
    name = f"llvm.fma.v{x.type.count}f32" if isinstance(x.type, ir.VectorType) else "llvm.fma.f32"
    return b.call(intrinsic(b, name, [x.type] * 3, x.type), [x, y, z])


def repeated(b: ir.IRBuilder, value: ir.Value, kind: ir.VectorType) -> ir.Value:
    """A vector of one number."""
    undefined = ir.Constant(kind, ir.Undefined)
    first = ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count)
    return b.shuffle_vector(b.insert_element(undefined, value, I32(0)), undefined, first)


def folded(b: ir.IRBuilder, vector: ir.Value, both: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """One number out of a vector's: its halves, and theirs, and so on."""
    size = vector.type.count
    while size > 1:
        size //= 2
        undefined = ir.Constant(vector.type, ir.Undefined)
        lower, upper = (
            b.shuffle_vector(vector, undefined, ir.Constant(ir.VectorType(I32, size), list(range(start, start + size))))
            for start in (0, size)
        )
        vector = both(lower, upper)
    return b.extract_element(vector, I32(0))


def scratch(b: ir.IRBuilder, size: int) -> ir.Value:
    """The address of as many float32 on the stack, for the whole function."""
    with b.goto_entry_block():  # once: within a loop, each turn would take more of the stack
        memory = b.alloca(ir.ArrayType(F32, size))
    memory.align = 32
    memory.type = POINTER  # llvmlite still gives it the old type
    return memory


def minimum(b: ir.IRBuilder, left: ir.Value, right: ir.Value) -> ir.Value:
    return b.select(b.icmp_signed("<", left, right), left, right)


def divide_up(b: ir.IRBuilder, value: ir.Value, by: ir.Value) -> ir.Value:
    return b.udiv(b.add(value, b.sub(by, I64(1))), by)
