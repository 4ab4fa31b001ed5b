"""compress_bwd, rendered by nsa-gen from templates/compress_bwd.py.jinja. Do not edit: change the template.

problem 90cb4b074640: dtype=bfloat16 head_dim=128 block=32 stride=16 pooling=mean hidden=0 varlen=False
config  55a99b752ffc: BLOCK_T=32 body=stream num_warps=4
command: python -m nsa_gen generate SPEC --target TARGET -o DIR
"""

import torch
import triton
import triton.language as tl

from nsa_gen.launch import Launcher


@triton.jit
def sequence_start(cu_seqlens, b, seqlen):
    """First packed token of sequence b; sequence b ends where b + 1 starts."""
    return b * seqlen


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
    return token // seqlen


@triton.jit
def compress_bwd_dx_kernel(
    dout_ptr,  # [rows, Hkv, D], contiguous
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
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TYPES: tl.constexpr,
):
    head = tl.program_id(1) // (D // BLOCK_D)
    column = tl.program_id(1) % (D // BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    b, tile = locate(tl.program_id(0), cu_seqlens, batch, seqlen, 0, tokens, 1, BLOCK_T)
    start = sequence_start(cu_seqlens, b, seqlen)
    length = sequence_start(cu_seqlens, b + 1, seqlen) - start
    if tile * BLOCK_T >= length:
        return
    count = tl.maximum(length - BLOCK + STRIDE, 0) // STRIDE  # rows of the sequence
    position = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    m = position // STRIDE
    dout = dout_ptr + ((start // STRIDE + m).to(tl.int64) * heads + head)[:, None] * D + column[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for i in tl.range(0, BLOCK // STRIDE, loop_unroll_factor=2):
        mask = (position < length) & (m >= i) & (m - i < count)
        row_grad = tl.load(dout - i * (heads * D), mask=mask[:, None], other=0.0).to(tl.float32)
        acc += row_grad
    acc *= 1.0 / BLOCK
    place = ((start + position).to(tl.int64) * heads + head)[:, None] * D + column[None, :]
    inside = (position < length)[:, None]
    if add_ptr is not None:
        acc += tl.load(add_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + place, acc.to(dx_ptr.dtype.element_ty), mask=inside)


D = 128
BLOCK = 32
STRIDE = 16
BLOCK_D = D & -D  # the largest power of two that divides D
BLOCK_T = 32
_dx = Launcher(
    compress_bwd_dx_kernel,
    {"D": D, "BLOCK": BLOCK, "STRIDE": STRIDE, "BLOCK_T": BLOCK_T, "BLOCK_D": BLOCK_D},
    num_warps=4,
)


def types(*tensors):
    """A constant that tells binaries apart by which tensors are fp32, and which are None."""
    return sum((0 if x is None else 1 if x.dtype == torch.float32 else 2) * 3**i for i, x in enumerate(tensors))


def compress_bwd(x, weights, dout, dx, dweights, dx_add, cu_seqlens, batch, max_seqlen):
    """Gradients of the compressed tokens phi(x[j*stride : j*stride + block]) (paper eq. 7), pooling mean.

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
    tokens, heads = x.shape[0], x.shape[1]
    grid = (tokens // BLOCK_T + batch, heads * (D // BLOCK_D))
    _dx(grid, dout, *weights, dx_add, dx, cu_seqlens, tokens, heads, batch, max_seqlen, TYPES=types(dx_add, dx))
