"""importance_fwd, rendered by nsa-gen from templates/importance_fwd.py.jinja. Do not edit: change the template.

problem c9839a81868f: dtype=bfloat16 group=16 head_dim_qk=192 block=32 stride=16 selection_block=64 mapping=overlap varlen=True
config  eb7bd53f68f6: BLOCK_K=128 BLOCK_T=64 TILES=4 loads=pointer maxnreg=None num_stages=2 num_warps=4
command: python -m nsa_gen generate SPEC --target TARGET -o DIR
"""

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
def visible_keys(position, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """Number of compressed tokens a query sees: those with j * STRIDE + BLOCK - 1 <= position (paper eq. 8)."""
    return tl.maximum(position + 1 - BLOCK + STRIDE, 0) // STRIDE


@triton.jit
def weight(unit, PER_BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """How often the compressed token that starts `unit` strides after a selection block's first token counts for it (eq. 9)."""
    # The stride units of [unit, unit + SPAN) inside the block, [0, PER_BLOCK).
    return tl.maximum(tl.minimum(unit + SPAN, PER_BLOCK) - tl.maximum(unit, 0), 0)


@triton.jit
def key_order(column, BLOCK_K: tl.constexpr, SEGMENTS: tl.constexpr):
    """The key in a column of a score tile: every SEGMENTS-th pair of columns belongs to one segment of consecutive keys.

    On NVIDIA's tensor cores 4 lanes share a row of a result and take its pairs of columns in turn. So each lane has a segment,
    and sums over the keys of a selection block stay inside a thread.
    """
    return column % (2 * SEGMENTS) // 2 * (BLOCK_K // SEGMENTS) + column // (2 * SEGMENTS) * 2 + column % 2


@triton.jit
def pool(
    acc,  # [BLOCK_T, BLOCK_K], columns in key_order
    visible,  # [BLOCK_T] int32: compressed keys a query sees
    key0,
    masked,
    PER_BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    HALO: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Probabilities of compressed keys to selection blocks [BLOCK_T, TILE_BLOCKS]; ``masked``: some query does not see some key."""
    BLOCK_T: tl.constexpr = acc.shape[0]
    SEGMENT: tl.constexpr = acc.shape[1] // SEGMENTS
    TILE_BLOCKS: tl.constexpr = acc.shape[1] // PER_BLOCK
    prob = tl.reshape(acc, [BLOCK_T, SEGMENT // 2, SEGMENTS, 2])
    prob = tl.reshape(tl.permute(prob, 0, 2, 1, 3), [BLOCK_T, SEGMENTS, SEGMENT])
    if masked:
        segment0 = key0 + tl.arange(0, SEGMENTS) * SEGMENT
        key = tl.arange(0, SEGMENT)  # inside its segment: constants of a thread, where whole key numbers would take registers
        seen = key[None, None, :] < (visible[:, None] - segment0[None, :])[:, :, None]
        prob = tl.where(seen & (key[None, :] >= -segment0[:, None])[None, :, :], prob, 0.0)
    # Block i takes weight(j - i * PER_BLOCK) of key j, found in tile blocks i - HALO .. i.
    prob = tl.reshape(prob, [BLOCK_T, TILE_BLOCKS, PER_BLOCK])
    unit = tl.arange(0, PER_BLOCK)[None, None, :]
    score = tl.sum(prob * weight(unit, PER_BLOCK, SPAN), 2)
    for lag in tl.static_range(1, HALO + 1):
        count = weight(unit - lag * PER_BLOCK, PER_BLOCK, SPAN)
        earlier = tl.sum(tl.where(count > 0, prob * count, 0.0), 2)
        source = tl.maximum(tl.arange(0, TILE_BLOCKS) - lag, 0)[None, :]
        score += tl.gather(earlier, tl.broadcast_to(source, [BLOCK_T, TILE_BLOCKS]), 1)
    return score


@triton.jit
def importance_fwd_kernel(
    q_ptr,  # [last - first, Hq, D_QK], or its descriptor
    k_ptr,  # [rows, Hkv, D_QK]: sequence b starts at row cu_seqlens[b] // STRIDE
    lse_ptr,  # [last - first, Hq] fp32, contiguous, natural log
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
    TILES: tl.constexpr,
):
    PER_BLOCK: tl.constexpr = SELECTION_BLOCK // STRIDE
    SPAN: tl.constexpr = BLOCK // STRIDE
    TILE_BLOCKS: tl.constexpr = BLOCK_K // PER_BLOCK
    SEGMENTS: tl.constexpr = 4
    head = tl.program_id(1)
    # Key tiles of the same tokens run together: their q stays in L2.
    key_tile = tl.program_id(0) % key_tiles
    b, walk = locate(tl.program_id(0) // key_tiles, cu_seqlens, batch, seqlen, first, last, 1, TILES * BLOCK_T)
    start = sequence_start(cu_seqlens, b, seqlen)
    end = tl.minimum(sequence_start(cu_seqlens, b + 1, seqlen), last)
    token0 = tl.maximum(start, first) + walk * (TILES * BLOCK_T)
    stop = tl.minimum(token0 + TILES * BLOCK_T, end)
    # The key tile begins HALO blocks early: their keys count for its own blocks, which no other program writes.
    block0 = key_tile * (TILE_BLOCKS - HALO) - HALO
    key0 = block0 * PER_BLOCK
    # The walk begins with the token tile that holds the first query of the key tile's own blocks.
    token0 += tl.maximum((block0 + HALO) * SELECTION_BLOCK - (token0 - start), 0) // BLOCK_T * BLOCK_T
    if token0 >= stop:
        return
    key = key0 + key_order(tl.arange(0, BLOCK_K), BLOCK_K, SEGMENTS)
    inside = ((key >= 0) & (key < visible_keys(stop - 1 - start, BLOCK, STRIDE)))[:, None]
    k_rows = k_ptr + (start // STRIDE + key).to(tl.int64)[:, None] * stride_kt + head * stride_kh
    k = tl.load(k_rows + tl.arange(0, DQ), mask=inside, other=0.0)  # [BLOCK_K, DQ]
    dq_tail = DQ + tl.arange(0, DQ_TAIL)
    k_tail = tl.load(k_rows + dq_tail, mask=inside & (dq_tail < D_QK), other=0.0)
    row = tl.arange(0, BLOCK_T)
    # A 64-bit base that moves, and offsets inside a tile that stay.
    q_tile = row[:, None] * tl.multiple_of(stride_qt.to(tl.int32), 8)
    qk_scale = scale * 1.4426950408889634
    lse_rows = lse_ptr + ((token0 - first + row).to(tl.int64) * heads + head) * G
    lse = tl.load(lse_rows, mask=row < stop - token0, other=0.0)
    acc = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    # Token tiles and the group's heads in one loop: the q of the next tile is on its way while this tile's scores are written.
    for step in range(0, tl.cdiv(stop - token0, BLOCK_T) * G):
        member = step % G
        tile0 = token0 + step // G * BLOCK_T
        q_rows = q_ptr + (tile0 - first).to(tl.int64) * stride_qt + (head * G + member) * stride_qh + q_tile
        there = (row < stop - tile0)[:, None]
        q = tl.load(q_rows + tl.arange(0, DQ), mask=there, other=0.0)  # [BLOCK_T, DQ]
        # Asked for a step ahead: a late lse would hold up the products.
        ahead = (step + 1) // G * BLOCK_T
        next_lse = tl.load(lse_rows + ahead * heads * G + (step + 1) % G, mask=row < stop - token0 - ahead, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_T, BLOCK_K]
        q_tail = tl.load(q_rows + dq_tail, mask=there & (dq_tail < D_QK), other=0.0)
        scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision="ieee")
        lse = tl.where(lse == -float("inf"), float("inf"), lse * 1.4426950408889634)  # sees nothing: contributes 0
        prob = tl.exp2(scores * qk_scale - lse[:, None])
        acc = prob if G == 1 else acc + prob
        lse = next_lse
        if member == G - 1:
            visible = visible_keys(tile0 - start + row, BLOCK, STRIDE)
            masked = (key0 < 0) | (key0 + BLOCK_K > visible_keys(tile0 - start, BLOCK, STRIDE))
            score = pool(acc, visible, key0, masked, PER_BLOCK, SPAN, HALO, SEGMENTS)  # [BLOCK_T, TILE_BLOCKS]
            column = tl.arange(0, TILE_BLOCKS)
            oldest = tl.where(column < HALO, BLOCK_T, (block0 + column) * SELECTION_BLOCK - (tile0 - start))
            written = (row < stop - tile0)[:, None] & (row[:, None] >= oldest[None, :])
            # Unsigned, one wide product a row; of the tile's own row numbers, or the products wait in registers all through the loop.
            out = (tile0 - first + row).to(tl.uint32).to(tl.uint64) * (heads * blocks).to(tl.uint32).to(tl.uint64)
            tl.store(scores_ptr + head * blocks + block0 + out[:, None] + column, score, mask=written)
            acc = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)


_BLOCK_T = 64
_TILES = 4  # token tiles one program walks with its keys
_SELECTION_BLOCK = 64
_HALO = 1
_KEY_TILE_BLOCKS = 31  # selection blocks whose score one program writes
_importance = Launcher(
    importance_fwd_kernel,
    {
        "G": 16,
        "D_QK": 192,
        "DQ": 128,
        "DQ_TAIL": 64,
        "BLOCK": 32,
        "STRIDE": 16,
        "SELECTION_BLOCK": _SELECTION_BLOCK,
        "HALO": _HALO,
        "BLOCK_T": _BLOCK_T,
        "BLOCK_K": 128,
        "TILES": _TILES,
    },
    num_warps=4,
    num_stages=2,
    maxnreg=None,
)


def importance_fwd(q, k_cmp, lse, scores, scale, token_start, cu_seqlens, batch, max_seqlen):
    """Importance of every selection block for the queries [token_start, token_start + R), summed over the group (paper eqs. 9-10).

    q [R,Hq,Dqk], k_cmp [max(T//d,1),Hkv,Dqk], lse [R,Hq] fp32 of the compressed branch (contiguous)
    → scores fp32 [R,Hkv,NB], contiguous, NB >= cdiv(max_seqlen, l'). Only columns i <= t // l' are written.
    """
    if not q.shape[0]:
        return
    queries, heads = q.shape[0], k_cmp.shape[1]
    blocks = -(-max_seqlen // _SELECTION_BLOCK)
    key_tiles = -(-blocks // _KEY_TILE_BLOCKS)
    walks = queries // (_TILES * _BLOCK_T) + batch
    if q.stride(0) * _BLOCK_T >= 2**31:
        q = q.new_empty(q.shape).copy_(q)  # offsets inside a tile are 32-bit
    rows = q
    _importance(
        (walks * key_tiles, heads),
        rows, k_cmp, lse, scores, cu_seqlens,
        scale, token_start, token_start + queries, heads, scores.shape[2], key_tiles, batch, max_seqlen,
        *q.stride()[:2], *k_cmp.stride()[:2],
    )  # fmt: skip
