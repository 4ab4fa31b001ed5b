"""compress_bwd, rendered by nsa-gen from templates/compress_bwd.py.jinja. Do not edit: change the template.

problem 9d0d5b856938: dtype=bfloat16 head_dim=192 block=32 stride=16 pooling=mlp hidden=192 varlen=True
config  e9829d1772fa: BLOCK_C=128 BLOCK_J=64 BLOCK_K=64 BLOCK_N=128 BLOCK_R=64 SPLITS=2 body=mlp dw_warps=8 hidden_warps=4 num_stages=3
    num_warps=4
command: python -m nsa_gen generate SPEC --target TARGET -o DIR
"""

import torch
import triton
import triton.language as tl

from nsa_gen.launch import Launcher


@triton.jit
def sequence_start(cu_seqlens, b, seqlen):
    """First packed token of sequence b; sequence b ends where b + 1 starts."""
    return tl.load(cu_seqlens + b)


@triton.jit
def locate(tile, cu_seqlens, batch, seqlen, first, last, G: tl.constexpr, ROWS: tl.constexpr):
    """Sequence of a tile and the tile's number inside it, for tiles of ROWS flat rows (token * G + group member).

    Sequence b owns tile numbers from start[b]*G // ROWS + b on, where start is clamped to the chunk [first, last) of packed
    tokens and counted from its begin. Returns (b, local tile). The caller exits when the local tile is past its sequence's rows.
    """
    low = 0
    high = batch - 1
    while low < high:
        middle = (low + high + 1) // 2
        start = tl.minimum(tl.maximum(sequence_start(cu_seqlens, middle, seqlen), first), last) - first
        if (start * G) // ROWS + middle <= tile:
            low = middle
        else:
            high = middle - 1
    start = tl.minimum(tl.maximum(sequence_start(cu_seqlens, low, seqlen), first), last) - first
    return low, tile - ((start * G) // ROWS + low)


@triton.jit
def find_sequence(token, cu_seqlens, batch, seqlen):
    """The sequence that holds a packed token (empty sequences hold none)."""
    low = 0
    high = batch - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(cu_seqlens + middle) <= token:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def block_start(row, cu_seqlens, batch, seqlen, steps, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """(first packed token of each row's block, whether the row has one).

    Sequence b's rows begin at its first token // STRIDE; the owner of a row is the last sequence that begins at or before it,
    and a row past its owner's last block lies in a gap between sequences.
    """
    b = tl.zeros_like(row)
    high = b + (batch - 1)
    for _ in range(steps):
        middle = (b + high + 1) // 2
        begun = tl.load(cu_seqlens + middle) // STRIDE <= row
        b = tl.where(begun, middle, b)
        high = tl.where(begun, high, middle - 1)
    start = tl.load(cu_seqlens + b)
    length = tl.load(cu_seqlens + b + 1) - start
    offset = (row - start // STRIDE) * STRIDE
    return start + offset, offset + BLOCK <= length


@triton.jit
def starts_kernel(
    starts_ptr,  # [rows] int32
    cu_seqlens,  # [B + 1] int32, or None
    rows: tl.int32,
    batch: tl.int32,
    seqlen: tl.int32,
    steps: tl.int32,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """First packed token of each row's block, -1 for rows in gaps: found once, the loops over rows load it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start, whole = block_start(row, cu_seqlens, batch, seqlen, steps, BLOCK, STRIDE)
    tl.store(starts_ptr + row, tl.where(whole, start, -1), mask=row < rows)


@triton.jit
def add_rows(x, rows, step, mask, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[WIDTH] fp32: the sum over x, x + step, … of the given number of rows."""
    row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros([WIDTH], tl.float32)
    for first in range(0, rows, ROWS):
        at = first + row
        total += tl.sum(tl.load(x[None, :] + at.to(tl.int64) * step, mask=(at < rows) & mask[None, :], other=0.0), 0)
    return total


@triton.jit
def sum_kernel(
    part_ptr,  # [splits, elements] fp32
    dw_ptr,  # [elements]
    splits: tl.int32,
    elements: tl.int64,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TYPES: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    total = add_rows(part_ptr + place, splits, elements, place < elements, ROWS, WIDTH)
    tl.store(dw_ptr + place, total.to(dw_ptr.dtype.element_ty), mask=place < elements)


@triton.jit
def project(
    x,  # [BLOCK_J, 1] pointers to each block's first token
    mask,  # [BLOCK_J, 1] rows that have a block
    stride_t,
    w,  # [BLOCK * D, N] of this head
    pos,  # [BLOCK, D] of this head
    column,  # [BLOCK_N] columns of w, those from N on give 0
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_J, BLOCK_N] fp32: flattened blocks times columns of w. BLOCK_K divides D: a step stays inside one token."""
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_J, BLOCK_N], tl.float32)
    for first in tl.range(0, BLOCK * D, BLOCK_K):
        position = first // D
        x_tile = tl.load(x + position * stride_t + (first - position * D + k)[None, :], mask=mask, other=0.0)
        x_tile = (x_tile.to(tl.float32) + tl.load(pos + first + k).to(tl.float32)[None, :]).to(x_tile.dtype)
        w_tile = tl.load(w + (first + k)[:, None] * N + column[None, :], mask=(column < N)[None, :], other=0.0)
        acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def compress_bwd_hidden_kernel(
    x_ptr,  # [T, Hkv, D]
    w1_ptr,  # [Hkv, BLOCK * D, HIDDEN]
    b1_ptr,  # [Hkv, HIDDEN]
    w2_ptr,  # [Hkv, HIDDEN, D]
    pos_ptr,  # [Hkv, BLOCK, D]
    dout_ptr,  # [rows, Hkv, D], contiguous
    starts_ptr,  # [rows] int32
    h_ptr,  # [rows, Hkv, HIDDEN]
    dpre_ptr,  # [rows, Hkv, HIDDEN]
    sums_ptr,  # [row tiles, Hkv, HIDDEN + D] fp32
    rows: tl.int32,
    heads: tl.int32,
    stride_t: tl.int64,
    stride_h: tl.int64,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Hidden units again, the gradient before their GELU, and each tile's sums over rows of that and of dout."""
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    unit = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(starts_ptr + row, mask=row < rows, other=-1)
    mask = (start >= 0)[:, None]
    k = tl.arange(0, BLOCK_K)
    dout = dout_ptr + (row.to(tl.int64) * heads + head)[:, None] * D + k[None, :]
    sums = sums_ptr + (tl.program_id(0).to(tl.int64) * heads + head) * (HIDDEN + D)
    if tl.program_id(2) == 0:
        for first in range(0, D, BLOCK_K):
            tl.store(sums + HIDDEN + first + k, tl.sum(tl.load(dout + first, mask=mask, other=0.0).to(tl.float32), 0))
    stride_t = tl.multiple_of(stride_t, 8)
    x = x_ptr + head * tl.multiple_of(stride_h, 8) + start[:, None] * stride_t
    w1 = w1_ptr + head.to(tl.int64) * (BLOCK * D * HIDDEN)
    pre = project(x, mask, stride_t, w1, pos_ptr + head * (BLOCK * D), unit, D, BLOCK, HIDDEN, BLOCK_J, BLOCK_N, BLOCK_K)
    pre += tl.load(b1_ptr + head * HIDDEN + unit, mask=unit < HIDDEN, other=0.0).to(tl.float32)[None, :]
    w2 = w2_ptr + head * (HIDDEN * D) + unit[:, None] * D + k[None, :]
    dh = tl.zeros([BLOCK_J, BLOCK_N], tl.float32)
    for first in tl.range(0, D, BLOCK_K, num_stages=1):  # few steps: a pipeline would cost more registers than it saves time
        dout_tile = tl.load(dout + first, mask=mask, other=0.0)
        w2_tile = tl.load(w2 + first, mask=(unit < HIDDEN)[:, None], other=0.0)
        dh = tl.dot(dout_tile, tl.trans(w2_tile), dh, input_precision="ieee")
    share = 0.5 * (1.0 + tl.erf(pre * 0.7071067811865476))  # of pre that GELU lets through
    dpre = (dh * (share + pre * tl.exp(-0.5 * pre * pre) * 0.3989422804014327)).to(dpre_ptr.dtype.element_ty)
    base = (tl.program_id(0).to(tl.int64) * (BLOCK_J * heads) + head) * HIDDEN
    place = tl.arange(0, BLOCK_J)[:, None] * (heads * HIDDEN) + unit[None, :]
    inside = (row < rows)[:, None] & (unit < HIDDEN)[None, :]
    tl.store(h_ptr + base + place, (pre * share).to(h_ptr.dtype.element_ty), mask=inside)
    tl.store(dpre_ptr + base + place, dpre, mask=inside)
    # of the rounded ones: where pos cancels x, what both were multiplied by must be the same
    tl.store(sums + unit, tl.sum(dpre.to(tl.float32), 0), mask=unit < HIDDEN)


@triton.jit
def compress_bwd_bias_kernel(
    w1_ptr,  # [Hkv, BLOCK * D, HIDDEN]
    sums_ptr,  # [row tiles, Hkv, HIDDEN + D] fp32
    db1_ptr,  # [Hkv, HIDDEN]
    db2_ptr,  # [Hkv, D]
    dpos_ptr,  # [Hkv, BLOCK, D]
    total_ptr,  # [Hkv, HIDDEN] fp32: db1 unrounded
    tiles: tl.int32,
    heads: tl.int32,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TYPES: tl.constexpr,
):
    """The sums of all tiles: db1, db2; and dpos = w1 db1. Every program adds db1 up for itself, the first of a head stores it."""
    head = tl.program_id(1)
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    step = heads * (HIDDEN + D)
    sums = sums_ptr + head * (HIDDEN + D)
    w1 = w1_ptr + head.to(tl.int64) * (BLOCK * D * HIDDEN) + k[:, None] * HIDDEN
    dpos = tl.zeros([ROWS], tl.float32)
    for first in range(0, HIDDEN, WIDTH):
        unit = first + tl.arange(0, WIDTH)
        total = add_rows(sums + unit, tiles, step, unit < HIDDEN, 32, WIDTH)
        if tl.program_id(0) == 0:
            tl.store(db1_ptr + head * HIDDEN + unit, total.to(db1_ptr.dtype.element_ty), mask=unit < HIDDEN)
            tl.store(total_ptr + head * HIDDEN + unit, total, mask=unit < HIDDEN)
        w1_tile = tl.load(w1 + unit[None, :], mask=(k < BLOCK * D)[:, None] & (unit < HIDDEN)[None, :], other=0.0)
        dpos += tl.sum(w1_tile.to(tl.float32) * total[None, :], 1)
    tl.store(dpos_ptr + head * (BLOCK * D) + k, dpos.to(dpos_ptr.dtype.element_ty), mask=k < BLOCK * D)
    if tl.program_id(0) == 0:
        for first in range(0, D, WIDTH):
            column = first + tl.arange(0, WIDTH)
            total = add_rows(sums + HIDDEN + column, tiles, step, column < D, 32, WIDTH)
            tl.store(db2_ptr + head * D + column, total.to(db2_ptr.dtype.element_ty), mask=column < D)


@triton.jit
def compress_bwd_dx_kernel(
    dpre_ptr,  # [rows, Hkv, N], contiguous: the gradient at w's output
    w_ptr,  # [Hkv, BLOCK * D, N]
    add_ptr,  # [T, Hkv, D] contiguous, or None
    dx_ptr,  # [T, Hkv, D], contiguous
    cu_seqlens,  # [B + 1] int32, or None
    tokens: tl.int32,
    heads: tl.int32,
    batch: tl.int32,
    seqlen: tl.int32,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_U: tl.constexpr,
    TYPES: tl.constexpr,
):
    """A tile's rows are m, STRIDE tokens each; its columns are the elements (r, d) of these tokens, which is how w's rows lie too."""
    TILES: tl.constexpr = (STRIDE * D + BLOCK_C - 1) // BLOCK_C
    UNITS: tl.constexpr = (N + BLOCK_U - 1) // BLOCK_U
    head = tl.program_id(1)
    b, tile = locate(tl.program_id(0) // TILES, cu_seqlens, batch, seqlen, 0, tokens, 1, BLOCK_J * STRIDE)
    start = sequence_start(cu_seqlens, b, seqlen)
    length = sequence_start(cu_seqlens, b + 1, seqlen) - start
    if tile * BLOCK_J * STRIDE >= length:
        return
    count = tl.maximum(length - BLOCK + STRIDE, 0) // STRIDE  # rows of the sequence
    m = tile * BLOCK_J + tl.arange(0, BLOCK_J)
    column = tl.program_id(0) % TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    unit = tl.arange(0, BLOCK_U)
    dpre = dpre_ptr + ((start // STRIDE + m).to(tl.int64) * heads + head)[:, None] * N + unit[None, :]
    w = w_ptr + head.to(tl.int64) * (BLOCK * D * N) + column[:, None] * N + unit[None, :]
    acc = tl.zeros([BLOCK_J, BLOCK_C], tl.float32)
    for step in tl.range(0, BLOCK // STRIDE * UNITS):
        i = step // UNITS
        first = step % UNITS * BLOCK_U
        mask = (m >= i) & (m - i < count)
        inside = (first + unit < N)[None, :]
        dpre_tile = tl.load(dpre + (first - i * (heads * N)), mask=mask[:, None] & inside, other=0.0)
        w_tile = tl.load(w + (first + i * (STRIDE * D * N)), mask=(column < STRIDE * D)[:, None] & inside, other=0.0)
        acc = tl.dot(dpre_tile, tl.trans(w_tile), acc, input_precision="ieee")
    place = ((start + m * STRIDE).to(tl.int64) * heads + head)[:, None] * D + (column // D * (heads * D) + column % D)[None, :]
    inside = (m[:, None] * STRIDE + (column // D)[None, :] < length) & (column < STRIDE * D)[None, :]
    if add_ptr is not None:
        acc += tl.load(add_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + place, acc.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def outer_products(
    a,  # [1, BLOCK_M] pointers
    a_step,  # from one row to the next; with GATHER from one token to the next
    a_mask,
    b,  # [1, BLOCK_N] pointers
    b_step,
    b_mask,
    addend,  # [1, BLOCK_M], added to every row of a; or None
    starts_ptr,  # [rows] int32
    begin,
    end,
    GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] fp32: a.T @ b over the rows from begin to end that have a block; with GATHER a's row is at the block's start."""
    row = begin + tl.arange(0, BLOCK_R)
    start = tl.load(starts_ptr + row, mask=row < end, other=-1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in tl.range(begin, end, BLOCK_R):
        mask = (start >= 0)[:, None]
        if GATHER:
            a_tile = tl.load(a + start[:, None] * a_step, mask=mask & a_mask, other=0.0)
        else:
            a_tile = tl.load(a + row[:, None] * a_step, mask=mask & a_mask, other=0.0)
        b_tile = tl.load(b + row[:, None] * b_step, mask=mask & b_mask, other=0.0)
        if addend is not None:
            a_tile += addend
        row += BLOCK_R
        start = tl.load(starts_ptr + row, mask=row < end, other=-1)  # a step ahead: a's address waits for it
        acc = tl.dot(tl.trans(a_tile), b_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def compress_bwd_dw_kernel(
    x_ptr,  # [T, Hkv, D]
    dpre_ptr,  # [rows, Hkv, N], contiguous: the gradient at w's output
    starts_ptr,  # [rows] int32
    dw_ptr,  # [splits, Hkv, BLOCK * D, N]
    pos_ptr,  # [Hkv, BLOCK, D]
    total_ptr,  # [Hkv, N] fp32: the sum of dpre over the rows
    h_ptr,  # [rows, Hkv, N], contiguous
    dout_ptr,  # [rows, Hkv, D], contiguous
    dw2_ptr,  # [splits, Hkv, N, D]
    rows: tl.int32,
    heads: tl.int32,
    share: tl.int32,  # rows a split
    stride_t: tl.int64,
    stride_h: tl.int64,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TYPES: tl.constexpr,
):
    """One split's part of a tile of dw = blocks.T @ dpre; in mlp the programs past those do dw2 = h.T @ dout."""
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    split = tl.program_id(1)
    head = tl.program_id(2)
    begin = split * share
    end = tl.minimum(rows, begin + share)
    step = heads.to(tl.int64) * N
    result = split.to(tl.int64) * heads + head
    TILES: tl.constexpr = (BLOCK * D + BLOCK_M - 1) // BLOCK_M * COLUMNS
    if tile >= TILES:
        WIDTHS: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
        m2 = (tile - TILES) // WIDTHS * BLOCK_M + tl.arange(0, BLOCK_M)
        n2 = (tile - TILES) % WIDTHS * BLOCK_N + tl.arange(0, BLOCK_N)
        h = h_ptr + head * N + m2[None, :]
        dout = dout_ptr + head * D + n2[None, :]
        dout_step = heads.to(tl.int64) * D
        acc2 = outer_products(
            h, step, (m2 < N)[None, :], dout, dout_step, (n2 < D)[None, :], None, starts_ptr, begin, end, False, BLOCK_M, BLOCK_N, BLOCK_R
        )
        dw2 = dw2_ptr + result * (N * D) + m2[:, None] * D + n2[None, :]
        tl.store(dw2, acc2.to(dw2_ptr.dtype.element_ty), mask=(m2 < N)[:, None] & (n2 < D)[None, :])
        return
    m = tile // COLUMNS * BLOCK_M + tl.arange(0, BLOCK_M)  # element of the flattened block
    n = tile % COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
    stride_t = tl.multiple_of(stride_t, 8)
    x = x_ptr + head * tl.multiple_of(stride_h, 8) + (m // D * stride_t + m % D)[None, :]
    dpre = dpre_ptr + head * N + n[None, :]
    m_mask = m < BLOCK * D
    addend = None
    acc = outer_products(
        x, stride_t, m_mask[None, :], dpre, step, (n < N)[None, :], addend, starts_ptr, begin, end, True, BLOCK_M, BLOCK_N, BLOCK_R
    )
    # Added to x in the loop, pos would take tiles through registers. It is the same in every block, so its part is pos times the sum of
    # dpre, the first split's to add; fp32 accumulators hold what is left where pos cancels x, of 16-bit values.
    pos = tl.load(pos_ptr + head * (BLOCK * D) + m, mask=m_mask & (split == 0), other=0.0).to(tl.float32)
    acc += pos[:, None] * tl.load(total_ptr + head * N + n, mask=n < N, other=0.0)[None, :]
    dw = dw_ptr + result * (BLOCK * D * N) + m[:, None] * N + n[None, :]
    tl.store(dw, acc.to(dw_ptr.dtype.element_ty), mask=m_mask[:, None] & (n < N)[None, :])


D = 192
BLOCK = 32
STRIDE = 16
N = 192  # columns of the matrix
BLOCK_J = 64
BLOCK_C = 128
BLOCK_N = 128
BLOCK_R = 64
SPLITS = 2
WIDTH = 1024  # weights that a program adds the splits of
LEAST = 4 * BLOCK_R  # rows a split
_starts = Launcher(starts_kernel, {"BLOCK": BLOCK, "STRIDE": STRIDE, "ROWS": 128}, num_warps=4)
_sum = Launcher(sum_kernel, {"ROWS": min(SPLITS, 32), "WIDTH": WIDTH}, num_warps=4)
_hidden = Launcher(
    compress_bwd_hidden_kernel,
    {"D": D, "BLOCK": BLOCK, "HIDDEN": N, "BLOCK_J": BLOCK_J, "BLOCK_N": BLOCK_N, "BLOCK_K": 64},
    num_warps=4,
    num_stages=3,
)
_bias = Launcher(compress_bwd_bias_kernel, {"D": D, "BLOCK": BLOCK, "HIDDEN": N, "ROWS": 64, "WIDTH": 32}, num_warps=4)
_dx = Launcher(
    compress_bwd_dx_kernel,
    {
        "D": D,
        "BLOCK": BLOCK,
        "STRIDE": STRIDE,
        "N": N,
        "BLOCK_J": BLOCK_J,
        "BLOCK_C": BLOCK_C,
        "BLOCK_U": BLOCK_R,
    },
    num_warps=4,
    num_stages=3,
)
_dw = Launcher(
    compress_bwd_dw_kernel,
    {"D": D, "BLOCK": BLOCK, "N": N, "BLOCK_M": BLOCK_C, "BLOCK_N": BLOCK_N, "BLOCK_R": BLOCK_R},
    num_warps=8,
    num_stages=3,
)


def types(*tensors):
    """A constant that tells binaries apart by which tensors are fp32, and which are None."""
    return sum((0 if x is None else 1 if x.dtype == torch.float32 else 2) * 3**i for i, x in enumerate(tensors))


def _add_up(part, dw):
    """dw = the sum of its splits."""
    _sum((-(-dw.numel() // WIDTH),), part, dw, part.shape[0], dw.numel(), TYPES=types(dw))


def compress_bwd(x, weights, dout, dx, dweights, dx_add, cu_seqlens, batch, max_seqlen):
    """Gradients of the compressed tokens phi(x[j*stride : j*stride + block]) (paper eq. 7), pooling mlp.

    Sums and products are accumulated in fp32, the same bits each time. In mlp the hidden units are computed again; they and the gradient
    before their GELU are rounded to the dtype before their products.

    Args:
        x: [T, Hkv, D], last dim contiguous, strides multiples of 8 elements.
        weights: per KV head, contiguous, in x's dtype. mean (), weighted (weight [Hkv, block],), linear (weight [Hkv, block * D, D],),
            mlp (w1 [Hkv, block * D, hidden], b1 [Hkv, hidden], w2 [Hkv, hidden, D], b2 [Hkv, D], pos [Hkv, block, D]).
        dout: [max(T // stride, 1), Hkv, D] contiguous, in x's dtype; rows of no sequence are not read.
        dx: [T, Hkv, D] contiguous, in x's dtype or fp32; written whole: dx_add + the gradient of x.
        dweights: as weights, each in x's dtype or fp32; written whole.
        dx_add: [T, Hkv, D] contiguous, in x's dtype or fp32; may be dx. None for 0.
        cu_seqlens: [B + 1] int32 on the device, or None where all sequences have max_seqlen tokens.
        batch: B.
        max_seqlen: tokens of the longest sequence.
    """
    tokens, rows, heads = x.shape[0], dout.shape[0], x.shape[1]
    strides = x.stride()[:2]
    starts = x.new_empty((rows,), dtype=torch.int32)
    _starts((-(-rows // 128),), starts, cu_seqlens, rows, batch, max_seqlen, (batch - 1).bit_length())
    w, b1, w2, _, pos = weights
    dw, db1, dw2, db2, dpos = dweights
    tiles = -(-rows // BLOCK_J)
    h = x.new_empty((rows, heads, N))
    dpre = torch.empty_like(h)
    sums = x.new_empty((tiles, heads, N + D), dtype=torch.float32)
    total = x.new_empty((heads, N), dtype=torch.float32)
    _hidden((tiles, heads, -(-N // BLOCK_N)), x, w, b1, w2, pos, dout, starts, h, dpre, sums, rows, heads, *strides)
    _bias((-(-BLOCK * D // 64), heads), w, sums, db1, db2, dpos, total, tiles, heads, TYPES=types(db1, db2, dpos))
    grid = ((tokens // (BLOCK_J * STRIDE) + batch) * -(-STRIDE * D // BLOCK_C), heads)
    _dx(grid, dpre, w, dx_add, dx, cu_seqlens, tokens, heads, batch, max_seqlen, TYPES=types(dx_add, dx))
    splits = max(min(SPLITS, rows // LEAST), 1)
    share = -(-rows // (splits * BLOCK_R)) * BLOCK_R
    splits = -(-rows // share)
    part, part2 = (grad if splits == 1 else x.new_empty((splits, *grad.shape), dtype=torch.float32) for grad in (dw, dw2))
    grid = (-(-BLOCK * D // BLOCK_C) * -(-N // BLOCK_N) + -(-N // BLOCK_C) * -(-D // BLOCK_N), splits, heads)
    given = (x, dpre, starts, part, pos, total, h, dout, part2)
    _dw(grid, *given, rows, heads, share, *strides, TYPES=types(part, part2))
    if splits > 1:
        _add_up(part, dw)
        _add_up(part2, dw2)
