"""compress_fwd, rendered by nsa-gen from templates/compress_fwd.py.jinja. Do not edit: change the template.

problem 5f20bb0862ff: dtype=bfloat16 head_dim=128 block=32 stride=16 pooling=mean hidden=0 varlen=False
config  cdc22d0edfc2: BLOCK_J=16 body=stream num_warps=4
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
    b = tl.minimum((row * STRIDE + (STRIDE - 1)) // tl.maximum(seqlen, 1), batch - 1)
    start = b * seqlen
    length = seqlen
    offset = (row - start // STRIDE) * STRIDE
    return start + offset, offset + BLOCK <= length


@triton.jit
def compress_fwd_kernel(
    x_ptr,  # [T, Hkv, D]
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
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(1) // (D // BLOCK_D)
    column = tl.program_id(1) % (D // BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    start, whole = block_start(row, cu_seqlens, batch, seqlen, steps, BLOCK, STRIDE)
    mask = (whole & (row < rows))[:, None]
    stride_t = tl.multiple_of(stride_t, 8)
    x = x_ptr + head * tl.multiple_of(stride_h, 8) + start[:, None] * stride_t + column[None, :]
    acc = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    for position in tl.range(0, BLOCK, loop_unroll_factor=4):
        token = tl.load(x + position * stride_t, mask=mask, other=0.0).to(tl.float32)
        acc += token
    acc *= 1.0 / BLOCK
    out = out_ptr + (row.to(tl.int64) * heads + head)[:, None] * D + column[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None])  # gap rows: zeros


D = 128
BLOCK_J = 16
BLOCK_D = D & -D  # the largest power of two that divides D
_compress = Launcher(
    compress_fwd_kernel,
    {
        "D": D,
        "BLOCK": 32,
        "STRIDE": 16,
        "BLOCK_J": BLOCK_J,
        "BLOCK_D": BLOCK_D,
    },
    num_warps=4,
)


def compress_fwd(x, weights, out, cu_seqlens, batch, max_seqlen):
    """Compressed tokens phi(x[j*stride : j*stride + block]) of every sequence (paper eq. 7), pooling mean.

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
    grid = (-(-rows // BLOCK_J), heads * (D // BLOCK_D))
    steps = (batch - 1).bit_length()
    _compress(grid, x, *weights, out, cu_seqlens, rows, heads, batch, max_seqlen, steps, *x.stride()[:2])
