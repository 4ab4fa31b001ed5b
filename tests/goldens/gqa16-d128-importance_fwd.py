"""importance_fwd, rendered by nsa-gen from templates/importance_fwd.py.jinja. Do not edit: change the template.

problem 251817cec5a0: dtype=bfloat16 group=16 head_dim_qk=128 block=32 stride=16 selection_block=64 mapping=overlap varlen=False
config  34eca6cad6f9: BLOCK_K=128 BLOCK_T=64 num_stages=2 num_warps=4
command: python -m nsa_gen generate SPEC --target TARGET -o DIR
"""

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
def visible_keys(position, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """Number of compressed tokens a query sees: those with j * STRIDE + BLOCK - 1 <= position (paper eq. 8)."""
    return tl.maximum(position + 1 - BLOCK + STRIDE, 0) // STRIDE


@triton.jit
def weight(unit, PER_BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """How often the compressed token that starts `unit` strides after a selection block's first token counts for it (eq. 9)."""
    # The stride units of [unit, unit + SPAN) inside the block, [0, PER_BLOCK).
    return tl.maximum(tl.minimum(unit + SPAN, PER_BLOCK) - tl.maximum(unit, 0), 0)


@triton.jit
def importance_fwd_kernel(
    q_ptr,  # [T, Hq, D_QK]
    k_ptr,  # [rows, Hkv, D_QK]: sequence b starts at row cu_seqlens[b] // STRIDE
    lse_ptr,  # [T, Hq] fp32, contiguous, natural log
    scores_ptr,  # [last - first, Hkv, blocks] fp32, contiguous
    cu_seqlens,  # [B + 1] int32, or None
    scale: tl.float32,
    first: tl.int32,
    last: tl.int32,
    heads: tl.int32,
    blocks: tl.int32,
    key_tiles: tl.int32,
    batch: tl.int32,
    seqlen: tl.int32,
    stride_qt: tl.int64,
    stride_qh: tl.int64,
    stride_kt: tl.int64,
    stride_kh: tl.int64,
    G: tl.constexpr,
    D_QK: tl.constexpr,
    DQ: tl.constexpr,
    DQ_TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    SELECTION_BLOCK: tl.constexpr,
    HALO: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    PER_BLOCK: tl.constexpr = SELECTION_BLOCK // STRIDE
    SPAN: tl.constexpr = BLOCK // STRIDE
    TILE_BLOCKS: tl.constexpr = BLOCK_K // PER_BLOCK
    head = tl.program_id(1)
    # Key tiles of one token tile run together: its q stays in L2.
    key_tile = tl.program_id(0) % key_tiles
    b, tile = locate(tl.program_id(0) // key_tiles, cu_seqlens, batch, seqlen, first, last, 1, BLOCK_T)
    start = sequence_start(cu_seqlens, b, seqlen)
    end = tl.minimum(sequence_start(cu_seqlens, b + 1, seqlen), last)
    token0 = tl.maximum(start, first) + tile * BLOCK_T
    newest = tl.minimum(token0 + BLOCK_T, end) - 1 - start  # position of the tile's last query
    # The key tile begins HALO blocks early: their keys count for its own blocks, which no other program writes.
    block0 = key_tile * (TILE_BLOCKS - HALO) - HALO
    if (token0 >= end) | ((block0 + HALO) * SELECTION_BLOCK > newest):
        return
    token = tl.minimum(token0 + tl.arange(0, BLOCK_T), end - 1)
    position = token - start
    most = visible_keys(newest, BLOCK, STRIDE)
    key = block0 * PER_BLOCK + tl.arange(0, BLOCK_K)
    inside = ((key >= 0) & (key < most))[:, None]
    k_rows = k_ptr + (start // STRIDE + key).to(tl.int64)[:, None] * stride_kt + head * stride_kh
    k = tl.load(k_rows + tl.arange(0, DQ), mask=inside, other=0.0)  # [BLOCK_K, DQ]
    q_rows = q_ptr + token.to(tl.int64)[:, None] * stride_qt + head * G * stride_qh
    qk_scale = scale * 1.4426950408889634
    lse_rows = lse_ptr + (token.to(tl.int64) * heads + head) * G
    acc = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    members = tl.where(tl.maximum(block0, 0) * PER_BLOCK < most, G, 0)
    for member in range(0, members):
        q = tl.load(q_rows + member * stride_qh + tl.arange(0, DQ))  # [BLOCK_T, DQ]
        lse = tl.load(lse_rows + member)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_T, BLOCK_K]
        lse = tl.where(lse == -float("inf"), float("inf"), lse * 1.4426950408889634)  # sees nothing: contributes 0
        acc += tl.exp2(scores * qk_scale - lse[:, None])
    seen = (key >= 0)[None, :] & (key[None, :] < visible_keys(position, BLOCK, STRIDE)[:, None])
    acc = tl.where(seen, acc, 0.0)

    # Keys to selection blocks: block i takes weight(j - i * PER_BLOCK) of key j, found in tile blocks i - HALO .. i.
    parts = tl.reshape(acc, [BLOCK_T, TILE_BLOCKS, PER_BLOCK])
    unit = tl.arange(0, PER_BLOCK)[None, None, :]
    column = tl.arange(0, TILE_BLOCKS)
    score = tl.sum(parts * weight(unit, PER_BLOCK, SPAN), 2)  # [BLOCK_T, TILE_BLOCKS]
    for lag in tl.static_range(1, HALO + 1):
        earlier = tl.sum(parts * weight(unit - lag * PER_BLOCK, PER_BLOCK, SPAN), 2)
        source = tl.broadcast_to(tl.maximum(column - lag, 0)[None, :], [BLOCK_T, TILE_BLOCKS])
        score += tl.gather(earlier, source, 1)
    block = (block0 + column)[None, :]
    written = (token0 + tl.arange(0, BLOCK_T) < end)[:, None] & (column >= HALO)[None, :] & (block * SELECTION_BLOCK <= position[:, None])
    out = ((token - first).to(tl.int64) * heads + head)[:, None] * blocks + block
    tl.store(scores_ptr + out, score, mask=written)


_BLOCK_T = 64
_SELECTION_BLOCK = 64
_HALO = 1
_KEY_TILE_BLOCKS = 31  # selection blocks whose score one program writes
_importance = Launcher(
    importance_fwd_kernel,
    {
        "G": 16,
        "D_QK": 128,
        "DQ": 128,
        "DQ_TAIL": 0,
        "BLOCK": 32,
        "STRIDE": 16,
        "SELECTION_BLOCK": _SELECTION_BLOCK,
        "HALO": _HALO,
        "BLOCK_T": _BLOCK_T,
        "BLOCK_K": 128,
    },
    num_warps=4,
    num_stages=2,
)


def importance_fwd(q, k_cmp, lse, scores, scale, token_start, token_stop, cu_seqlens, batch, max_seqlen):
    """Importance of every selection block for the queries [token_start, token_stop), summed over the group (paper eqs. 9-10).

    q [T,Hq,Dqk], k_cmp [max(T//d,1),Hkv,Dqk], lse [T,Hq] fp32 of the compressed branch (contiguous)
    → scores fp32 [token_stop-token_start, Hkv, NB], contiguous, NB >= cdiv(max_seqlen, l'). Only columns i <= t // l' are written.
    """
    heads = k_cmp.shape[1]
    key_tiles = triton.cdiv(triton.cdiv(max_seqlen, _SELECTION_BLOCK), _KEY_TILE_BLOCKS)
    tiles = (token_stop - token_start) // _BLOCK_T + batch
    _importance(
        (tiles * key_tiles, heads),
        q, k_cmp, lse, scores, cu_seqlens,
        scale, token_start, token_stop, heads, scores.shape[2], key_tiles, batch, max_seqlen,
        q.stride(0), q.stride(1), k_cmp.stride(0), k_cmp.stride(1),
    )  # fmt: skip
