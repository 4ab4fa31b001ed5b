"""selected_attention_fwd, rendered by nsa-gen from templates/selected_attention_fwd.py.jinja. Do not edit: change the template.

problem e49ae9e4641a: dtype=bfloat16 group=16 head_dim_qk=192 head_dim_v=128 selection_block=64 count=16 initial=1 local=2 varlen=True
config  f56c0f5a9551: loads=pointer loop=query_outer num_stages=1 num_warps=4 operands=rows
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
def selected_attention_fwd_kernel(
    q_ptr,  # [R, Hq, D_QK]
    k_ptr,  # [T, Hkv, D_QK], or its descriptor
    v_ptr,  # [T, Hkv, D_V], or its descriptor
    index_ptr,  # [R, Hkv, COUNT] int32, ascending, -1 last
    o_ptr,  # [R, Hq, D_V], contiguous; LISTED: [Hkv, 1, R, G, D_V]
    lse_ptr,  # [R, Hq] fp32, contiguous, natural log; LISTED: [Hkv, 1, R, G], log2 domain
    cu_seqlens,  # [B + 1] int32, or None
    scale: tl.float32,
    first: tl.int32,
    queries: tl.int32,
    heads: tl.int32,
    batch: tl.int32,
    seqlen: tl.int32,
    stride_qt: tl.int64,
    stride_qh: tl.int64,
    stride_kt: tl.int64,
    stride_kh: tl.int64,
    stride_vt: tl.int64,
    stride_vh: tl.int64,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D_QK: tl.constexpr,
    DQ: tl.constexpr,
    DQ_TAIL: tl.constexpr,
    D_V: tl.constexpr,
    DV: tl.constexpr,
    DV_TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    SLOTS: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Attention to all blocks of a query, or (LISTED) to those that are neither initial nor local, whose places in its row are known."""
    head = tl.program_id(1)
    query = queries - 1 - tl.program_id(0)  # late queries have the most blocks: they go first
    token = first + query
    b = find_sequence(token, cu_seqlens, batch, seqlen)
    start = sequence_start(cu_seqlens, b, seqlen)
    position = token - start
    length = sequence_start(cu_seqlens, b + 1, seqlen) - start

    member = tl.arange(0, G_PAD)
    column = tl.arange(0, BLOCK)
    dq = tl.arange(0, DQ)
    dv = tl.arange(0, DV)
    q_rows = q_ptr + query.to(tl.int64) * stride_qt + (head * G + member[:, None]) * stride_qh
    k_head = k_ptr + start.to(tl.int64) * stride_kt + head * stride_kh
    v_head = v_ptr + start.to(tl.int64) * stride_vt + head * stride_vh
    q = tl.load(q_rows + dq, mask=member[:, None] < G, other=0.0)  # [G_PAD, DQ]
    dq_tail = DQ + tl.arange(0, DQ_TAIL)
    q_tail = tl.load(q_rows + dq_tail, mask=(member[:, None] < G) & (dq_tail < D_QK), other=0.0)
    qk_scale = scale * 1.4426950408889634  # exp2 domain
    top = tl.full([G_PAD], -float("inf"), tl.float32)
    total = tl.zeros([G_PAD], tl.float32)
    acc = tl.zeros([G_PAD, DV], tl.float32)
    # All indices at once: a load of one inside the loop would keep K and V loads from being pipelined.
    slots = tl.arange(0, SLOTS)
    indices = tl.load(index_ptr + (query.to(tl.int64) * heads + head) * COUNT + slots, mask=slots < COUNT, other=-1)
    first_slot = 0
    last_slot = COUNT
    if LISTED:
        first_slot = INITIAL
        last_slot = tl.minimum(position // BLOCK + 1, COUNT) - LOCAL
    # Listed blocks lie before the query's own block when there are local blocks: whole and visible, no masks.
    WHOLE: tl.constexpr = LISTED and LOCAL > 0
    for slot in range(first_slot, last_slot):
        block = tl.sum(tl.where(slots == slot, indices, 0), 0)
        seen = (block >= 0) & (block * BLOCK <= position)
        key0 = tl.where(seen, block, 0) * BLOCK
        key = key0 + column
        inside = (key < length)[:, None] | WHOLE
        k_rows = k_head + key[:, None] * stride_kt
        v_rows = v_head + key[:, None] * stride_vt
        k = tl.load(k_rows + dq, mask=inside, other=0.0)  # [BLOCK, DQ]
        v = tl.load(v_rows + dv, mask=inside, other=0.0)  # [BLOCK, DV]
        visible = ((key <= position) & seen) | WHOLE
        k_tail = tl.load(k_rows + dq_tail, mask=inside & (dq_tail < D_QK), other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [G_PAD, BLOCK]
        scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision="ieee")
        scores = tl.where(visible[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * qk_scale)
        safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
        prob = tl.exp2(scores * qk_scale - safe_top[:, None])
        rescale = tl.exp2(top - safe_top)
        total = total * rescale + tl.sum(prob, 1)
        acc = tl.dot(prob.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        top = new_top

    if LISTED:
        row = (head.to(tl.int64) * queries + query) * G + member
        lse = top + tl.log2(total)
    else:
        row = query.to(tl.int64) * (heads * G) + head * G + member
        lse = tl.where(total > 0, (top + tl.log2(total)) * 0.6931471805599453, -float("inf"))
    written = member < G
    inverse = tl.where(total > 0, 1.0 / total, 0.0)
    o_rows = o_ptr + row[:, None] * D_V
    out = acc * inverse[:, None]
    tl.store(o_rows + dv, out.to(o_ptr.dtype.element_ty), mask=written[:, None])
    tl.store(lse_ptr + row, lse, mask=written)


_attend = Launcher(
    selected_attention_fwd_kernel,
    {
        "G": 16,
        "G_PAD": 16,
        "D_QK": 192,
        "DQ": 128,
        "DQ_TAIL": 64,
        "D_V": 128,
        "DV": 128,
        "DV_TAIL": 0,
        "BLOCK": 64,
        "COUNT": 16,
        "SLOTS": 16,
        "INITIAL": 1,
        "LOCAL": 2,
    },
    num_warps=4,
    num_stages=1,
)


_PARTS = 1  # partial results of a query, with rest


def workspace(heads, element_size, tokens, batch, rest=False):
    """Scratch of a call: bytes whatever the number of queries, bytes a query of a chunk, most queries of a chunk.

    Args:
        heads: KV heads.
        element_size: bytes of an element of o.
        tokens: packed tokens of k and v.
        batch: sequences.
        rest: whether the call is given one: then there is one partial result a query, else nothing.
    """
    return 0, heads * _PARTS * 16 * (128 * element_size + 4) if rest else 0, 2**31 - 1


def selected_attention_fwd(
    q, k, v, block_indices, o, lse, scale, workspace_bytes, token_start, cu_seqlens, batch, max_seqlen, rest=None
):
    """Attention of the queries [token_start, token_start + R) over their chosen blocks. Needs no workspace without ``rest``.

    q [R,Hq,Dqk], k [T,Hkv,Dqk], v [T,Hkv,Dv], block_indices int32 [R,Hkv,n] contiguous → o [R,Hq,Dv], lse [R,Hq] (contiguous).

    With ``rest``, block_indices must be as ``select_topk`` makes them. Then this writes neither o nor lse: ``rest.merge(0, R, part,
    part_lse)`` gets one partial result a query, over all its blocks that are neither initial nor local (see ``sliding_merge_fwd``).
    """
    queries, heads = q.shape[0], k.shape[1]
    if rest is not None:
        o = torch.empty((heads, _PARTS, queries, 16, 128), dtype=o.dtype, device=q.device)
        lse = torch.empty((heads, _PARTS, queries, 16), dtype=torch.float32, device=q.device)
    keys, values = k, v
    _attend(
        (queries, heads) if rest is None or _PARTS else (0, 0),
        q, keys, values, block_indices, o, lse, cu_seqlens, scale, token_start, queries, heads, batch, max_seqlen,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], LISTED=rest is not None,
    )  # fmt: skip
    if rest is not None:
        rest.merge(0, queries, o, lse)
