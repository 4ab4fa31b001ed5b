"""compress_fwd, rendered by nsa-gen from templates/compress_fwd.py.jinja. Do not edit: change the template.

problem 9ef21b6427dd: dtype=bfloat16 head_dim=128 block=32 stride=16 pooling=mlp hidden=128 varlen=True
config  30734dda7559: BLOCK_J=64 BLOCK_K=64 BLOCK_N=128 body=gemm num_stages=3 num_warps=4
command: python -m nsa_gen generate SPEC --target TARGET -o DIR
"""

import triton
import triton.language as tl

from nsa_gen.launch import Launcher


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
def compress_fwd_kernel(
    x_ptr,  # [T, Hkv, D]
    w1_ptr,  # [Hkv, BLOCK * D, HIDDEN]
    b1_ptr,  # [Hkv, HIDDEN]
    w2_ptr,  # [Hkv, HIDDEN, D]
    b2_ptr,  # [Hkv, D]
    pos_ptr,  # [Hkv, BLOCK, D]
    out_ptr,  # [rows, Hkv, D], contiguous
    cu_seqlens,  # [B + 1] int32, or None
    rows: tl.int32,
    heads: tl.int32,
    batch: tl.int32,
    seqlen: tl.int32,
    steps: tl.int32,
    stride_t: tl.int64,
    stride_h: tl.int64,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    HIDDEN: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    start, whole = block_start(row, cu_seqlens, batch, seqlen, steps, BLOCK, STRIDE)
    mask = (whole & (row < rows))[:, None]
    stride_t = tl.multiple_of(stride_t, 8)
    x = x_ptr + head * tl.multiple_of(stride_h, 8) + start[:, None] * stride_t
    column = tl.arange(0, D_PAD)
    w1 = w1_ptr + head.to(tl.int64) * (BLOCK * D * HIDDEN)
    w2 = w2_ptr + head * (HIDDEN * D)
    acc = tl.zeros([BLOCK_J, D_PAD], tl.float32) + tl.load(b2_ptr + head * D + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    for first in range(0, HIDDEN, BLOCK_N):
        unit = first + tl.arange(0, BLOCK_N)
        h = project(x, mask, stride_t, w1, pos_ptr + head * (BLOCK * D), unit, D, BLOCK, HIDDEN, BLOCK_J, BLOCK_N, BLOCK_K)
        h += tl.load(b1_ptr + head * HIDDEN + unit, mask=unit < HIDDEN, other=0.0).to(tl.float32)[None, :]
        h = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
        w2_mask = (unit < HIDDEN)[:, None] & (column < D)[None, :]
        w2_tile = tl.load(w2 + unit[:, None] * D + column[None, :], mask=w2_mask, other=0.0)
        acc = tl.dot(h.to(w2_tile.dtype), w2_tile, acc, input_precision="ieee")
    acc = tl.where(mask, acc, 0.0)  # gap rows: zeros
    out = out_ptr + (row.to(tl.int64) * heads + head)[:, None] * D + column[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < D)[None, :])


D = 128
BLOCK_J = 64
BLOCK_N = min(128, triton.next_power_of_2(128))
_compress = Launcher(
    compress_fwd_kernel,
    {
        "D": D,
        "BLOCK": 32,
        "STRIDE": 16,
        "BLOCK_J": BLOCK_J,
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": 64,
        "HIDDEN": 128,
        "D_PAD": triton.next_power_of_2(D),
    },
    num_warps=4,
    num_stages=3,
)


def compress_fwd(x, weights, out, cu_seqlens, batch, max_seqlen):
    """Compressed tokens phi(x[j*stride : j*stride + block]) of every sequence (paper eq. 7), pooling mlp.

    Sums and products are accumulated in fp32. In mlp, x + pos and the hidden units are rounded to the dtype before their product.

    Args:
        x: [T, Hkv, D], last dim contiguous, strides multiples of 8 elements.
        weights: per KV head, contiguous, in x's dtype. mean (), weighted (weight [Hkv, block],), linear (weight [Hkv, block * D, D],),
            mlp (w1 [Hkv, block * D, hidden], b1 [Hkv, hidden], w2 [Hkv, hidden, D], b2 [Hkv, D], pos [Hkv, block, D]).
        out: [max(T // stride, 1), Hkv, D] contiguous, written whole: sequence b from row cu_seqlens[b] // stride on, zeros elsewhere.
        cu_seqlens: [B + 1] int32 on the device, or None where all sequences have max_seqlen tokens.
        batch: B.
        max_seqlen: tokens of the longest sequence.
    """
    rows, heads = out.shape[0], out.shape[1]
    grid = (-(-rows // BLOCK_J), heads)
    steps = (batch - 1).bit_length()
    _compress(grid, x, *weights, out, cu_seqlens, rows, heads, batch, max_seqlen, steps, *x.stride()[:2])
