"""The two loops over pairs that every exchange runs, as machine code: many small calls of numpy cost ten times as much.

After each wait for a host a router's caches are cold, and what counts is how much code it passes through, not how much
it computes. Knows nothing of placements or hosts but what its callers tell it in arrays of int64. Its invariant: it
reads and writes only where they say, and the number of an expert, which comes from a model, is checked.

Names: n pairs, E experts, M the most replicas of one, B buckets, H hosts. A bucket is a replica; buckets are numbered
host by host, and within a host expert by expert.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from llvmlite import ir

from expertmesh.kernels.cpu_ir import I8, I16, I32, I64, POINTER, compiled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

_ZERO, _ONE = I64(0), I64(1)


class Loops(NamedTuple):
    """The machine code. Addresses are those of contiguous arrays, of int64 but for rows."""

    group: Callable[..., int]
    """`group(n, pairs, experts, K, E, M, counts_EM, bucket_EM, host_B, B, H, out)` groups pairs by bucket.

    `pairs` are ascending; `experts[pair]` is the expert of each, and pair // K its token. bucket_EM is -1 for none. The
    first counts_EM[e, 0] of an expert's pairs go to its first replica, and so on; the counts are used up. With M of 1
    that address may be 0. Returns the number of runs (of one expert's pairs on one host), or -1 - i when there is no
    replica for, or no expert of the number of, the i-th pair. See `group_size` for `out`.
    """
    keep_16: Callable[..., int]
    """`keep_16(n, H, special, rows, pairs, y)` copies rows of H numbers of 16 bits: rows[i] to y[pairs[i]]. Returns 0
    if in none of the numbers all bits of `special` are set, as they are in infinities and NaNs."""
    keep_32: Callable[..., int]
    """The same for numbers of 32 bits."""


def group_size(num_pairs: int, num_buckets: int, num_hosts: int) -> int:
    """How many int64 `group` writes: for each pair in the order of buckets, its number; the tokens of each host, those
    of the first host first; for each pair, its token's position among its host's (as int32, in the first half of its
    n words); for each host that gets any, in order, (host, and where its pairs, its tokens and its runs end); for each
    run, (its bucket, its pairs); the rest is of no use. Hosts' room ends after 4 * H words."""
    return 5 * num_pairs + 2 * min(num_pairs, num_buckets) + num_buckets + 6 * num_hosts


def address(array: NDArray[Any]) -> int:
    """Where a contiguous array begins."""
    begin: int = array.__array_interface__["data"][0]
    return begin


@functools.cache
def loops() -> Loops:
    """Compiled once per process, in about 0.1 s."""
    source = ir.Module("loops")
    _group(source)
    _keep(source, "keep_16", I16)
    _keep(source, "keep_32", I32)
    engine = compiled(source, optimized=True)

    def function(name: str) -> Callable[..., int]:
        kinds = [ctypes.c_int64] * (1 + len(source.globals[name].args))
        # Of the kind that keeps the interpreter's lock: another thread would take it for milliseconds.
        return ctypes.PYFUNCTYPE(*kinds)(engine.get_function_address(name))

    return Loops(*map(function, Loops._fields))


class _Builder:
    """Builds one function of int64s."""

    def __init__(self, module: ir.Module, name: str, num_arguments: int) -> None:
        function = ir.Function(module, ir.FunctionType(I64, [I64] * num_arguments), name)
        self.b = ir.IRBuilder(function.append_basic_block())
        self.arguments = function.args

    def words(self, address: ir.Value) -> _Words:
        return _Words(self.b, address)

    def variable(self, value: ir.Value) -> _Variable:
        return _Variable(self.b, value)

    @contextlib.contextmanager
    def each(self, end: ir.Value) -> Iterator[ir.Value]:
        """A loop: from 0 to below `end`."""
        b = self.b
        before, head, body, after = b.block, *(b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        i.add_incoming(_ZERO, before)
        b.cbranch(b.icmp_signed("<", i, end), body, after)
        b.position_at_end(body)
        yield i
        i.add_incoming(b.add(i, _ONE), b.block)
        b.branch(head)
        b.position_at_end(after)


class _Variable:
    """An int64 that changes, or an integer of another kind."""

    def __init__(self, b: ir.IRBuilder, value: ir.Value) -> None:
        self._b = b
        self._kind = value.type
        with b.goto_entry_block():
            self._at = b.alloca(self._kind)
        self.value = value

    @property
    def value(self) -> ir.Value:
        return self._b.load(self._at, typ=self._kind)

    @value.setter
    def value(self, value: ir.Value) -> None:
        self._b.store(value, self._at)

    def add(self, value: ir.Value) -> ir.Value:
        """What it was before."""
        before = self.value
        self.value = self._b.add(before, value)
        return before


class _Words:
    """Memory as an array of int64."""

    def __init__(self, b: ir.IRBuilder, address: ir.Value) -> None:
        self._b = b
        self.address = address

    def _at(self, i: ir.Value, kind: ir.Type = I64) -> ir.Value:
        return self._b.gep(self._b.inttoptr(self.address, POINTER), [i], source_etype=kind)

    def __getitem__(self, i: ir.Value) -> ir.Value:
        return self._b.load(self._at(i), typ=I64)

    def __setitem__(self, i: ir.Value, value: ir.Value) -> None:
        self._b.store(value, self._at(i))

    def set_half(self, i: ir.Value, value: ir.Value) -> None:
        """The i-th int32."""
        self._b.store(self._b.trunc(value, I32), self._at(i, I32))

    def from_(self, i: ir.Value) -> _Words:
        return _Words(self._b, self._b.ptrtoint(self._at(i), I64))

    def add(self, i: ir.Value, value: ir.Value) -> ir.Value:
        """Add to a word: what it was before."""
        before = self[i]
        self[i] = self._b.add(before, value)
        return before


def _group(module: ir.Module) -> None:
    f = _Builder(module, "group", 12)
    b = f.b
    (
        n,
        pairs_at,
        experts_at,
        num_choices,
        num_experts,
        most,
        counts_at,
        buckets_at,
        hosts_at,
        num_buckets,
        num_hosts,
        out,
    ) = f.arguments
    pairs, experts, counts, buckets, hosts = map(f.words, (pairs_at, experts_at, counts_at, buckets_at, hosts_at))
    num_runs_most = b.select(b.icmp_signed("<", n, num_buckets), n, num_buckets)
    out_pairs = f.words(out)
    out_tokens = out_pairs.from_(n)
    out_rows = out_tokens.from_(n)
    out_parts = out_rows.from_(n)
    out_runs = out_parts.from_(b.mul(num_hosts, I64(4)))
    bucket_n = out_runs.from_(b.mul(num_runs_most, I64(2)))
    row_n = bucket_n.from_(n)
    next_B = row_n.from_(n)
    token_H = next_B.from_(num_buckets)
    rows_H = token_H.from_(num_hosts)

    with f.each(num_buckets) as i:
        next_B[i] = _ZERO
    with f.each(num_hosts) as h:
        token_H[h] = I64(-1)
        rows_H[h] = _ZERO

    # Which bucket each pair is for, and which of its host's rows its token's is.
    with f.each(n) as i:
        pair = pairs[i]
        expert = experts[pair]
        with b.if_then(b.icmp_unsigned(">=", expert, num_experts), likely=False):
            b.ret(b.sub(I64(-1), i))
        replica = f.variable(b.mul(expert, most))
        with b.if_then(b.icmp_signed(">", most, _ONE)):
            looking, found = b.append_basic_block(), b.append_basic_block()
            b.branch(looking)
            b.position_at_end(looking)
            here = replica.value
            left = counts[here]
            replica.value = b.select(b.icmp_signed(">", left, _ZERO), here, b.add(here, _ONE))
            b.cbranch(b.icmp_signed(">", left, _ZERO), found, looking)
            b.position_at_end(found)
            counts.add(replica.value, I64(-1))
        bucket = buckets[replica.value]
        with b.if_then(b.icmp_signed("<", bucket, _ZERO), likely=False):
            b.ret(b.sub(I64(-1), i))
        bucket_n[i] = bucket
        next_B.add(bucket, _ONE)
        host, token = hosts[bucket], b.udiv(pair, num_choices)
        with b.if_then(b.icmp_signed("!=", token_H[host], token)):
            token_H[host] = token
            rows_H.add(host, _ONE)
        row_n[i] = b.sub(rows_H[host], _ONE)

    # Where each bucket begins; what each host gets.
    num_parts, num_runs, num_pairs, num_tokens = (f.variable(_ZERO) for _ in range(4))
    last_host = f.variable(I64(-1))
    with f.each(num_buckets) as bucket:
        size = next_B[bucket]
        next_B[bucket] = num_pairs.value
        with b.if_then(b.icmp_signed(">", size, _ZERO)):
            host = hosts[bucket]
            with b.if_then(b.icmp_signed("!=", last_host.value, host)):
                last_host.value = host
                num_parts.add(_ONE)
                token_H[host] = num_tokens.add(rows_H[host])
            run = b.mul(num_runs.add(_ONE), I64(2))
            out_runs[run] = bucket
            out_runs[b.add(run, _ONE)] = size
            num_pairs.add(size)
            part = out_parts.from_(b.mul(b.sub(num_parts.value, _ONE), I64(4)))
            for at, value in enumerate((host, num_pairs.value, num_tokens.value, num_runs.value)):
                part[I64(at)] = value

    with f.each(n) as i:
        bucket, pair, row = bucket_n[i], pairs[i], row_n[i]
        at = next_B.add(bucket, _ONE)
        out_pairs[at] = pair
        out_rows.set_half(at, row)
        out_tokens[b.add(token_H[hosts[bucket]], row)] = b.udiv(pair, num_choices)
    b.ret(num_runs.value)


def _keep(module: ir.Module, name: str, kind: ir.IntType) -> None:
    f = _Builder(module, name, 6)
    b = f.b
    n, hidden, special_word, rows_at, pairs_at, y_at = f.arguments
    special = b.trunc(special_word, kind)
    row_bytes = b.mul(hidden, I64(kind.width // 8))
    has_special = f.variable(I8(0))
    pairs = f.words(pairs_at)
    with f.each(n) as i:
        source = b.inttoptr(b.add(rows_at, b.mul(i, row_bytes)), POINTER)
        target = b.inttoptr(b.add(y_at, b.mul(pairs[i], row_bytes)), POINTER)
        with f.each(hidden) as k:
            number = b.load(b.gep(source, [k], source_etype=kind), typ=kind, align=1)
            b.store(number, b.gep(target, [k], source_etype=kind), align=1)
            is_special = b.zext(b.icmp_unsigned("==", b.and_(number, special), special), I8)
            has_special.value = b.or_(has_special.value, is_special)
    b.ret(b.zext(has_special.value, I64))
