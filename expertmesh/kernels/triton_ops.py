# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
"""The Triton kernels of the expert FFN: one grouped product, used twice, and the index of blocks that it walks.

Knows nothing of torch, launches or devices: `triton_tiles` chooses tiles, `triton_kernel` launches. Its invariant:
an element of a product depends on nothing but its row and its expert's weights. K is walked in one order, never
split, and nothing is added atomically.

**The weights stand on the left.** A tile computes w @ x.T, so that the rows of the call lie along the short side of
the matrix instruction. Then 8 rows fill an instruction that would want 64 on its other side, and a tile for 8 rows and
one for 128 use instructions of one kind that differ only in their width. The left side may also come from registers,
where quantized weights are widened to the dtype of the rows, which holds every code exactly: so a product's only
rounding is that of its sums, and its scales. One scale for a row is applied to its sum; groups of columns are summed
each on their own, in steps of one size whatever the tile.

Shapes: S slots, T token rows, P pairs, B blocks. Inside kernels: M rows of the call, N rows of a weight, K columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=["x_row_ptr", "slot_ptr", "block_ptr", "y_row_ptr"])
def product_kernel(
    x_ptr,  # [T, K] if GATHER, else [P, K]
    x_row_ptr,  # [P] int32: the row of x of each pair; read if GATHER
    slot_ptr,  # [P] int32, equal ones together
    block_ptr,  # [B + 2] int32: the number of blocks, the first pair of each, P
    w_ptr,  # [S * RN, W], a tensor map of blocks [BLOCK_N, BLOCK_K] if TENSOR_MAP; RN = 2N if GATED, else N
    s_ptr,  # [S, G, RN]: the scales of G groups of columns; read unless CODE is "dense"
    b_ptr,  # [S, RN]; read if BIASED
    y_ptr,  # [P, N]
    y_row_ptr,  # [P] int32: the row of y of each pair; read if SCATTER
    N: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,  # elements of a stored row of weights: K, or less if each holds the codes of two columns
    CODE: tl.constexpr,  # as `WeightFormat.code`
    GROUP: tl.constexpr,  # elements of W that share a scale, a multiple of BLOCK_K; 0: all of a row
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    TENSOR_MAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    """y[p] = activation(x[p] @ w[slot].T + b[slot]), gate rows of w first, then up rows.

    Each program takes every `num_programs`-th tile, so the grid need not know how many there are.
    """
    rows_in: tl.constexpr = N * 2 if GATED else N
    num_blocks = tl.load(block_ptr)
    num_columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    num_groups: tl.constexpr = (W + GROUP - 1) // GROUP if GROUP > 0 else 1
    k_K = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), num_blocks * num_columns, tl.num_programs(0)):
        block, column = _place(tile, num_blocks, num_columns, BAND)
        first = tl.load(block_ptr + 1 + block)
        stop = tl.load(block_ptr + 2 + block)
        slot = tl.load(slot_ptr + first)
        m_M = first + tl.arange(0, BLOCK_M)
        n_N = column * BLOCK_N + tl.arange(0, BLOCK_N)
        # Beyond its end a block repeats its last pair and a weight its last row: that needs no masks in the loop.
        pair_M = tl.minimum(m_M, stop - 1)
        row_N = slot.to(tl.int64) * rows_in + tl.minimum(n_N, N - 1)
        x_row_M = (tl.load(x_row_ptr + pair_M) if GATHER else pair_M).to(tl.int64)

        x_KM = x_ptr + x_row_M[None, :] * K + k_K[:, None]
        gate_NM = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        up_NM = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        if TENSOR_MAP:
            w_row = slot * rows_in + column * BLOCK_N
        else:
            w_NK = w_ptr + row_N[:, None] * W + k_K[None, :]
        if CODE == "dense":
            s_N = n_N  # never read
        else:
            s_N = s_ptr + (slot.to(tl.int64) * num_groups * rows_in + tl.minimum(n_N, N - 1))
        for k in range(0, W, BLOCK_K):
            if CODE == "int4":
                # Of the bytes, a group has GROUP; of columns, twice as many.
                k_x = 2 * k if GROUP == BLOCK_K else 2 * k - k % GROUP
                x = _load(x_KM + k_x, (k_K < K - k_x)[:, None], K % (2 * GROUP) != 0)
                x_above = _load(x_KM + (k_x + GROUP), (k_K < K - k_x - GROUP)[:, None], K % (2 * GROUP) != 0)
            else:
                x = _load(x_KM + k, (k_K < K - k)[:, None], K % BLOCK_K != 0)
                x_above = x
            group = s_N + (k // GROUP * rows_in if GROUP > 0 else 0)
            if TENSOR_MAP:
                w = w_ptr.load([w_row, k])
            else:
                w = _load(w_NK + k, (k_K < W - k)[None, :], W % BLOCK_K != 0)
            gate_NM = _multiply(w, x, x_above, gate_NM, group, CODE, GROUP)
            if GATED:
                if TENSOR_MAP:
                    w = w_ptr.load([w_row + N, k])
                else:
                    w = _load(w_NK + (N * W + k), (k_K < W - k)[None, :], W % BLOCK_K != 0)
                up_NM = _multiply(w, x, x_above, up_NM, group + N, CODE, GROUP)

        if CODE != "dense" and GROUP == 0:
            gate_NM *= tl.load(s_N)[:, None]
            if GATED:
                up_NM *= tl.load(s_N + N)[:, None]
        if BIASED:
            gate_NM += tl.load(b_ptr + row_N).to(tl.float32)[:, None]
            if GATED:
                up_NM += tl.load(b_ptr + row_N + N).to(tl.float32)[:, None]
        y_NM = _activate(gate_NM, up_NM, ACTIVATION, LIMIT, ALPHA, GATED)
        y_row_M = (tl.load(y_row_ptr + pair_M) if SCATTER else pair_M).to(tl.int64)
        y = y_ptr + y_row_M[None, :] * N + n_N[:, None]
        tl.store(y, y_NM.to(y_ptr.dtype.element_ty), mask=(m_M < stop)[None, :] & (n_N < N)[:, None])


@triton.jit
def _load(pointers, inside, MASKED: tl.constexpr):
    if MASKED:
        values = tl.load(pointers, mask=inside, other=0)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def _multiply(w, x, x_above, sum_NM, s_N, CODE: tl.constexpr, GROUP: tl.constexpr):
    """sum_NM and the product of a block of stored weights with the rows' columns, scaled if groups have scales."""
    if GROUP == 0:
        sum_NM = tl.dot(_widen(w, CODE, x.dtype), x, sum_NM, input_precision="ieee")
    else:
        part_NM = tl.zeros_like(sum_NM)
        if CODE == "int4":
            part_NM = tl.dot(_widen(w & 15, CODE, x.dtype), x, part_NM, input_precision="ieee")
            part_NM = tl.dot(_widen(w >> 4, CODE, x.dtype), x_above, part_NM, input_precision="ieee")
        else:
            part_NM = tl.dot(_widen(w, CODE, x.dtype), x, part_NM, input_precision="ieee")
        sum_NM = tl.fma(part_NM, tl.load(s_N).to(tl.float32)[:, None].broadcast_to(part_NM.shape), sum_NM)
    return sum_NM


@triton.jit
def _widen(w, CODE: tl.constexpr, TO: tl.constexpr):
    """Codes as numbers of another type, which has them all. Float8 goes by integers, as not every chip knows it: its
    bits are those of a float16 whose exponent is biased by 8 more."""
    if CODE == "dense":
        values = w
    elif CODE == "int8":
        values = w.to(TO)
    elif CODE == "int4":
        values = (w.to(tl.int8) - 8).to(TO)
    else:
        tl.static_assert(CODE == "fp8", "unknown code")
        bits = w.to(tl.uint16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        values = (bits.to(tl.float16, bitcast=True) * 256.0).to(TO)
    return values


@triton.jit
def _place(tile, num_blocks, num_columns, BAND: tl.constexpr):
    """The block and column of a tile. Programs that run together share weights and rows through the L2 cache: tiles
    go down the blocks of a band, which for a busy expert are all its own, and then one column on."""
    first = tile // (num_columns * BAND) * BAND
    height = tl.minimum(num_blocks - first, BAND)
    inside = tile % (num_columns * BAND)
    return first + inside % height, inside // height


@triton.jit(do_not_specialize=["num_pairs"], do_not_specialize_on_alignment=["slot_ptr", "block_ptr"])
def block_kernel(
    slot_ptr,  # [P] int32, equal ones together
    block_ptr,  # [B + 2] int32, as `product_kernel` reads it
    num_pairs,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Cut the pairs of each slot into blocks of BLOCK_M: the index of `product_kernel`, built where it is read.

    One program walks the pairs and carries two numbers: where the current slot's pairs began, and the blocks so far.
    """
    i_C = tl.arange(0, CHUNK)
    began = 0
    num_blocks = 0
    for start in range(0, num_pairs, CHUNK):
        pair_C = start + i_C
        here = pair_C < num_pairs
        slot_C = tl.load(slot_ptr + pair_C, mask=here, other=-1)
        before_C = tl.load(slot_ptr + pair_C - 1, mask=here & (pair_C > 0), other=-1)
        began_C = tl.maximum(tl.associative_scan(tl.where(slot_C != before_C, pair_C, 0), 0, _larger), began)
        opens = here & ((pair_C - began_C) % BLOCK_M == 0)
        nth_C = num_blocks + tl.cumsum(opens.to(tl.int32), 0)
        tl.store(block_ptr + nth_C, pair_C, mask=opens)
        began = tl.max(tl.where(here, began_C, 0), 0)
        num_blocks = tl.max(nth_C, 0)
    tl.store(block_ptr, num_blocks)
    tl.store(block_ptr + 1 + num_blocks, num_pairs)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _activate(gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, GATED: tl.constexpr):
    """As `activation.activate`, whose table of formulas is the one to read. `up` is ignored without a gate."""
    if ACTIVATION == "swiglu_clamped":
        gate = tl.minimum(gate, LIMIT)
        a = gate * tl.sigmoid(gate) * tl.clamp(up, -LIMIT, LIMIT)
    elif ACTIVATION == "swiglu_bounded":
        a = tl.minimum(gate * tl.sigmoid(gate), LIMIT) * tl.clamp(up, -LIMIT, LIMIT)
    elif ACTIVATION == "swiglu_oai":
        gate = tl.minimum(gate, LIMIT)
        a = gate * tl.sigmoid(gate * ALPHA) * (tl.clamp(up, -LIMIT, LIMIT) + 1.0)
    elif ACTIVATION == "swiglu_softcapped":
        a = _tanh(gate / ALPHA) * ALPHA * tl.sigmoid(gate) * (_tanh(up / LIMIT) * LIMIT)
    else:
        a = _pointwise(gate, ACTIVATION)
        if GATED:
            a *= up
    return a


@triton.jit
def _pointwise(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        a = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        a = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_pytorch_tanh":
        a = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "quick_gelu":
        a = x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "relu":
        a = tl.maximum(x, 0.0)
    elif ACTIVATION == "relu2":
        a = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif ACTIVATION == "sigmoid":
        a = tl.sigmoid(x)
    elif ACTIVATION == "tanh":
        a = _tanh(x)
    else:
        tl.static_assert(ACTIVATION == "linear", "unknown activation")
        a = x
    return a


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0
