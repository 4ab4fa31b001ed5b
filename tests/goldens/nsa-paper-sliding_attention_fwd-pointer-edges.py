"""sliding_attention_fwd, rendered by nsa-gen from templates/sliding_attention_fwd.py.jinja. Do not edit: change the template.

problem 8d02bb42b15e: dtype=bfloat16 group=16 head_dim_qk=192 head_dim_v=128 window=512 varlen=True
config  b8c3750ed602: BLOCK_M=128 BLOCK_N=32 loads=pointer mask=edges maxnreg=None num_stages=2 num_warps=8
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
def locate_rows(tile, cu_seqlens, batch, seqlen, first, last, G: tl.constexpr, ROWS: tl.constexpr):
    """Where a tile of a call on the tokens [first, last) lies: (first token of its sequence, the tile's first row in the sequence, rows
    [low, high) of the sequence that belong to the call, all rows of the sequence). The caller exits when low >= high or the tile begins at
    high or later. Tiles are numbered as if the call began up to a tile earlier: the chunk may begin inside a tile.
    """
    early = tl.maximum(first - (ROWS + G - 2) // G, 0)
    b, local = locate(tile, cu_seqlens, batch, seqlen, early, last, G, ROWS)
    start = sequence_start(cu_seqlens, b, seqlen)
    end = sequence_start(cu_seqlens, b + 1, seqlen)
    low = (tl.maximum(start, first) - start) * G
    high = (tl.minimum(end, last) - start) * G
    return start, (low // ROWS + local) * ROWS, low, high, (end - start) * G


@triton.jit
def load_tile(base, first, stride, COLUMN: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, EDGE: tl.constexpr):
    """[ROWS, WIDTH] from base, columns from COLUMN on; 0 in columns past D and, with EDGE, in rows before first (never read)."""
    row = tl.arange(0, ROWS)
    column = COLUMN + tl.arange(0, WIDTH)
    pointers = base + (row[:, None] * tl.multiple_of(stride.to(tl.int32), 8) + column[None, :])
    if EDGE:
        return tl.load(pointers, mask=(row[:, None] >= first) & (column[None, :] < D), other=0.0)
    elif COLUMN + WIDTH > D:
        return tl.load(pointers, mask=column[None, :] < D, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def attend(
    q,  # [BLOCK_M, DQ]
    q_tail,  # [BLOCK_M, DQ_TAIL], or None
    top,  # [BLOCK_M] running maximum of the scaled scores, log2 domain
    total,  # [BLOCK_M] running sum
    acc,  # [BLOCK_M, DV]
    acc_tail,  # [BLOCK_M, DV_TAIL]; returned as it came without a tail
    k_ptr,  # token 0 of the sequence, this head
    v_ptr,
    stride_kt,
    stride_vt,
    k_desc,  # descriptors of whole K and V, or None; the sequence's first row and the head's first column in them
    v_desc,
    row0,
    k_column,
    v_column,
    newest,  # [BLOCK_M] the last key that a row sees
    width,  # how many keys it sees: a number, or [BLOCK_M, 1]
    key,  # first key of the tile
    key_first,
    qk_scale,
    D_QK: tl.constexpr,
    DQ: tl.constexpr,
    DQ_TAIL: tl.constexpr,
    D_V: tl.constexpr,
    DV: tl.constexpr,
    DV_TAIL: tl.constexpr,
    KEYS: tl.constexpr,
    MASK: tl.constexpr,
    EDGE: tl.constexpr,
):
    """One online-softmax step over keys key .. key+KEYS-1. MASK: only newest - width < s <= newest. EDGE: nor any before key_first."""
    k_tile = k_ptr + key * tl.multiple_of(stride_kt, 8)
    v_tile = v_ptr + key * tl.multiple_of(stride_vt, 8)
    k = load_tile(k_tile, key_first - key, stride_kt, 0, DQ, D_QK, KEYS, EDGE)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, KEYS]
    k_tail = load_tile(k_tile, key_first - key, stride_kt, DQ, DQ_TAIL, D_QK, KEYS, EDGE)
    scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision="ieee")
    if MASK:
        s = key + tl.arange(0, KEYS)
        # unsigned, a key past the newest is a huge distance: one comparison is both ends of the window
        seen = (newest[:, None] - s[None, :]).to(tl.uint32, bitcast=True) < width
        if EDGE:
            seen = seen & (s[None, :] >= key_first)
        scores = tl.where(seen, scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * qk_scale)
    prob = tl.exp2(scores * qk_scale - new_top[:, None])
    rescale = tl.exp2(top - new_top)
    total = total * rescale + tl.sum(prob, 1)
    v = load_tile(v_tile, key_first - key, stride_vt, 0, DV, D_V, KEYS, EDGE)
    acc = tl.dot(prob.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return new_top, total, acc, acc_tail


@triton.jit
def fresh(BLOCK_M: tl.constexpr, DV: tl.constexpr, DV_TAIL: tl.constexpr):
    """A tile's softmax before any key: (top, total, acc, acc_tail)."""
    # finite: after a tile a row does not see, exp2(-inf - top) is 0, not NaN
    top = tl.full([BLOCK_M], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    acc_tail = total  # there is no tail (a jit function cannot return None in Triton 3.6)
    return top, total, acc, acc_tail


@triton.jit
def attend_window(
    q,  # [BLOCK_M, DQ]
    q_tail,  # [BLOCK_M, DQ_TAIL], or None
    k_head,  # token 0 of the sequence, this head
    v_head,
    stride_kt,
    stride_vt,
    k_desc,  # as for attend
    v_desc,
    row0,
    k_column,
    v_column,
    t,  # [BLOCK_M] positions of the rows
    t_first,
    t_last,
    qk_scale,
    D_QK: tl.constexpr,
    DQ: tl.constexpr,
    DQ_TAIL: tl.constexpr,
    D_V: tl.constexpr,
    DV: tl.constexpr,
    DV_TAIL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_EDGE: tl.constexpr,
):
    """Softmax of a tile over the windows of its rows: (top, total, acc, acc_tail), not normalised."""
    top, total, acc, acc_tail = fresh(q.shape[0], DV, DV_TAIL)
    # Tiles of BLOCK_N keys end at the tile's last token and go back as long as they lie in its window. What earlier tokens
    # of the tile see before that is few keys: tiles of BLOCK_EDGE.
    key_end = t_last + 1
    key_first = tl.maximum(t_first + 1 - WINDOW, 0)
    key_full = key_end - tl.minimum(key_end, WINDOW) // BLOCK_N * BLOCK_N
    key_diagonal = key_full + tl.maximum(t_first + 1 - key_full, 0) // BLOCK_N * BLOCK_N
    edge_tiles = (key_full - key_first + BLOCK_EDGE - 1) // BLOCK_EDGE
    # The pipelined loop comes first, the masked ones are not pipelined: in any other order ptxas (13.0) serialises every wgmma.
    for key in tl.range(key_full, key_diagonal, BLOCK_N):
        top, total, acc, acc_tail = attend(
            q, q_tail, top, total, acc, acc_tail, k_head, v_head, stride_kt, stride_vt, k_desc, v_desc, row0, k_column, v_column,
            t, WINDOW, key, key_first, qk_scale, D_QK, DQ, DQ_TAIL, D_V, DV, DV_TAIL, BLOCK_N, False, False,
        )  # fmt: skip
    for key in tl.range(key_diagonal, key_end, BLOCK_N, num_stages=1):
        top, total, acc, acc_tail = attend(
            q, q_tail, top, total, acc, acc_tail, k_head, v_head, stride_kt, stride_vt, k_desc, v_desc, row0, k_column, v_column,
            t, WINDOW, key, key_first, qk_scale, D_QK, DQ, DQ_TAIL, D_V, DV, DV_TAIL, BLOCK_N, True, False,
        )  # fmt: skip
    for key in tl.range(key_full - edge_tiles * BLOCK_EDGE, key_full, BLOCK_EDGE, num_stages=1):
        top, total, acc, acc_tail = attend(
            q, q_tail, top, total, acc, acc_tail, k_head, v_head, stride_kt, stride_vt, k_desc, v_desc, row0, k_column, v_column,
            t, WINDOW, key, key_first, qk_scale, D_QK, DQ, DQ_TAIL, D_V, DV, DV_TAIL, BLOCK_EDGE, True, True,
        )  # fmt: skip
    return top, total, acc, acc_tail


@triton.jit
def sliding_attention_fwd_kernel(
    q_ptr,  # [last - first, Hq, D_QK]
    k_ptr,  # [T, Hkv, D_QK]
    v_ptr,  # [T, Hkv, D_V]
    o_ptr,  # [last - first, Hq, D_V], contiguous
    lse_ptr,  # [last - first, Hq] fp32, contiguous
    k_desc,  # descriptors of k and v, or None
    v_desc,
    cu_seqlens,  # [B + 1] int32, or None
    scale: tl.float32,
    first: tl.int32,
    last: tl.int32,
    batch: tl.int32,
    seqlen: tl.int32,
    stride_qt: tl.int64,
    stride_qh: tl.int64,
    stride_kt: tl.int64,
    stride_kh: tl.int64,
    stride_vt: tl.int64,
    stride_vh: tl.int64,
    G: tl.constexpr,
    D_QK: tl.constexpr,
    DQ: tl.constexpr,
    DQ_TAIL: tl.constexpr,
    D_V: tl.constexpr,
    DV: tl.constexpr,
    DV_TAIL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_EDGE: tl.constexpr,
):
    head = tl.program_id(1)
    heads = tl.num_programs(1) * G
    start, row0, low, high, rows = locate_rows(tl.program_id(0), cu_seqlens, batch, seqlen, first, last, G, BLOCK_M)
    if (low >= high) | (row0 >= high):
        return
    row = row0 + tl.arange(0, BLOCK_M)
    written = (row >= low) & (row < high)
    inside = written[:, None]
    t = row // G
    t_first = row0 // G
    t_last = (tl.minimum(row0 + BLOCK_M, rows) - 1) // G

    stride_qt = tl.multiple_of(stride_qt, 8)
    stride_qh = tl.multiple_of(stride_qh, 8)
    q_rows = q_ptr + (start - first + t[:, None]) * stride_qt + (head * G + (row % G)[:, None]) * stride_qh
    k_head = k_ptr + start * tl.multiple_of(stride_kt, 8) + head * tl.multiple_of(stride_kh, 8)
    v_head = v_ptr + start * tl.multiple_of(stride_vt, 8) + head * tl.multiple_of(stride_vh, 8)
    dq = tl.arange(0, DQ)[None, :]
    q = tl.load(q_rows + dq, mask=inside, other=0.0)  # [BLOCK_M, DQ]
    dq_tail = DQ + tl.arange(0, DQ_TAIL)[None, :]
    q_tail = tl.load(q_rows + dq_tail, mask=inside & (dq_tail < D_QK), other=0.0)
    qk_scale = scale * 1.4426950408889634  # exp2 domain
    attended = attend_window(
        q, q_tail, k_head, v_head, stride_kt, stride_vt, k_desc, v_desc,
        start, (head * stride_kh).to(tl.int32), (head * stride_vh).to(tl.int32), t, t_first, t_last, qk_scale,
        D_QK, DQ, DQ_TAIL, D_V, DV, DV_TAIL, WINDOW, BLOCK_N, BLOCK_EDGE,
    )  # fmt: skip

    top = attended[0]
    total = tl.where(row < rows, attended[1], 1.0)
    token_row = (start - first + t).to(tl.int64) * heads + head * G + row % G
    inverse = 1.0 / total
    o = (attended[2] * inverse[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + token_row[:, None] * D_V + tl.arange(0, DV)[None, :], o, mask=inside)
    tl.store(lse_ptr + token_row, (top + tl.log2(total)) * 0.6931471805599453, mask=written)


G = 16
BLOCK_M = 128
BLOCK_N = 32
WINDOW = 512
TILE_TOKENS = (BLOCK_M + G - 2) // G + 1 if BLOCK_M % G else BLOCK_M // G  # most tokens a tile touches
HALO = (BLOCK_M + G - 2) // G  # tokens of a chunk's first tile that may lie before the chunk
EDGE_KEYS = TILE_TOKENS - 1 + WINDOW % BLOCK_N  # keys before the BLOCK_N tiles, away from a sequence's start

_sliding = Launcher(
    sliding_attention_fwd_kernel,
    {
        "G": G,
        "D_QK": 192,
        "DQ": 128,
        "DQ_TAIL": 64,
        "D_V": 128,
        "DV": 128,
        "DV_TAIL": 0,
        "WINDOW": WINDOW,
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "BLOCK_EDGE": min(max(16, triton.next_power_of_2(EDGE_KEYS)), BLOCK_N),
    },
    num_warps=8,
    num_stages=2,
    maxnreg=None,
)


def sliding_attention_fwd(q, k, v, o, lse, scale, token_start, cu_seqlens, batch, max_seqlen):
    """Causal attention of query t to keys t - window < s <= t of its own sequence (paper section 3.3.3).

    Args:
        q: [R, Hq, D_QK], last dim contiguous, strides multiples of 8 elements: the queries [token_start, token_start + R).
        k, v: [T, Hkv, D_QK] and [T, Hkv, D_V], the same.
        o: [R, Hq, D_V] contiguous, written.
        lse: [R, Hq] fp32 contiguous, written: natural log of the softmax denominator.
        scale: factor on q·k, > 0.
        token_start: packed token of the first query.
        cu_seqlens: [B + 1] int32 on the device, or None where all sequences have max_seqlen tokens.
        batch: B.
        max_seqlen: tokens of the longest sequence.
    """
    queries, heads_kv = q.shape[0], k.shape[1]
    tiles = None, None
    grid = ((queries + min(token_start, HALO)) * G // BLOCK_M + batch, heads_kv)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    _sliding(grid, q, k, v, o, lse, *tiles, cu_seqlens, scale, token_start, token_start + queries, batch, max_seqlen, *strides)
