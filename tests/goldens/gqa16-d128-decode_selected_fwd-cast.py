"""decode_selected_fwd, rendered by nsa-gen from templates/decode_selected_fwd.py.jinja. Do not edit: change the template.

problem e17dcbb7854e: dtype=bfloat16 storage=bfloat16 group=16 head_dim_qk=128 head_dim_v=128 selection_block=64 count=16 page_size=64
    tokens=1
config  e58b0b06db2c: LEAST=2 PROGRAMS=256 maxnreg=None num_stages=4 num_warps=4 sum_stages=3 unpack=cast
command: python -m nsa_gen generate SPEC --target TARGET -o DIR
"""

import torch
import triton
import triton.language as tl

from nsa_gen.launch import Launcher


@triton.jit
def load_rows(pages_ptr, row0, count, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """[ROWS, D_PAD] from row0 on, counted over the rows of all pages and heads, which are D long; in one page. 0 from `count` rows on, and
    past column D."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, D_PAD)[None, :]
    inside = (row < count) & (column < D) if D_PAD > D else row < count
    return tl.load(pages_ptr + row0 * D + row * D + column, mask=inside, other=0.0)


@triton.jit
def attend(products, seen, top, totals, qk_scale, dtype: tl.constexpr):
    """A tile's products of queries and keys into a running softmax: (top [M] log2 domain, totals [M, N] yet to be added up, the weights of
    the tile's values [M, N] and of what was added up before [M], probabilities of the tile's own top [M, N], that top). A row that has seen
    nothing has top -inf. Totals stay apart because warps share the keys of a tile: to add them up, they would wait for each other."""
    scores = tl.where(seen, products * qk_scale, -float("inf"))
    tile_top = tl.max(scores, 1)
    prob = tl.exp2(scores - tl.where(tile_top == -float("inf"), 0.0, tile_top)[:, None])
    new_top = tl.maximum(top, tile_top)
    safe = tl.where(new_top == -float("inf"), 0.0, new_top)
    old, new = tl.exp2(top - safe), tl.exp2(tile_top - safe)
    weights = prob * new[:, None]
    return new_top, totals * old[:, None] + weights, weights.to(dtype), old, prob, tile_top


@triton.jit
def softmax_of(stat_ptr, count, rows, size):
    """Top and total of `count` partial softmaxes of `size` rows each, for some rows; 0 and 1 where nothing was seen. Sixteen are loaded at
    once: one after the other they would each wait for memory."""
    top = tl.full([rows.shape[0]], -float("inf"), tl.float32)
    total = tl.zeros([rows.shape[0]], tl.float32)
    for first in range(0, count, 16):
        part = first + tl.arange(0, 16)
        there = (part < count)[:, None]
        stats = stat_ptr + (part * (2 * size))[:, None] + rows[None, :]
        tops = tl.load(stats, mask=there, other=-float("inf"))
        totals = tl.load(stats + size, mask=there, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, 0))
        safe = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights, old = tl.exp2(tops - safe[None, :]), tl.exp2(top - safe)
        total = total * old + tl.sum(totals * weights, 0)
        top = new_top
    return tl.where(top == -float("inf"), 0.0, top), tl.where(total > 0, total, 1.0)


@triton.jit
def last_to_arrive(arrived_ptr, programs):
    """Whether the other programs that count at arrived_ptr are all done: what they have stored can be read. The count is then 0 again."""
    tl.debug_barrier()
    last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(arrived_ptr, 0)
    tl.debug_barrier()
    return last


@triton.jit
def decode_selected_fwd_kernel(
    q_ptr,  # [S, TOKENS, Hq, D_QK]
    k_ptr,  # [pages, Hkv, PAGE, D_QK]
    v_ptr,  # [pages, Hkv, PAGE, D_V]
    k_scale_ptr,  # [Hkv] fp32, what stored keys are multiplied by; None where numbers are stored as they are
    v_scale_ptr,  # [3, Hkv] fp32, of compressed V, the selected and the sliding branch's
    table_ptr,  # [slots, max_pages] int32: pages of the selected branch
    slot_ptr,  # [S] int32
    length_ptr,  # [slots] int32: tokens, the new ones included
    index_ptr,  # [S, TOKENS, Hkv, COUNT] int32
    dense_part_ptr,  # [S, Hkv, parts, M, D_V] fp32: of compressed tokens, splits of them, then of the window
    dense_stat_ptr,  # [S, Hkv, parts, 2, M] fp32
    g_cmp_ptr,  # [S, TOKENS, Hq]
    g_slc_ptr,
    g_swa_ptr,
    part_ptr,  # [S, TOKENS, Hkv, pieces, 2, G_PAD, D_V] fp32: of chosen blocks, not divided by the total, and of the other branches
    stat_ptr,  # [S, TOKENS, Hkv, pieces, 2, G_PAD] fp32
    arrived_ptr,  # [S, TOKENS, Hkv] int32, 0
    o_ptr,  # [S, TOKENS, Hq, D_V], contiguous
    scale: tl.float32,
    heads: tl.int32,
    max_pages: tl.int32,
    splits: tl.int32,
    parts: tl.int32,
    stride_qs: tl.int64,
    stride_qt: tl.int64,
    stride_qh: tl.int64,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
    M: tl.constexpr,
    D_QK: tl.constexpr,
    DQ: tl.constexpr,
    D_V: tl.constexpr,
    DV: tl.constexpr,
    PAGE: tl.constexpr,
    SELECTED: tl.constexpr,
    COUNT: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
    TYPES: tl.constexpr,
):
    head = tl.program_id(0) % heads
    token = tl.program_id(0) // heads
    sequence = tl.program_id(1)
    piece = tl.program_id(2)
    pieces = tl.num_programs(2)
    slot = tl.load(slot_ptr + sequence)
    length = tl.load(length_ptr + slot)
    position = length - TOKENS + token
    member = tl.arange(0, G_PAD)
    valid = member < G
    column = tl.arange(0, DQ)
    q_rows = sequence.to(tl.int64) * stride_qs + token * stride_qt + (head * G + member) * stride_qh
    q = tl.load(q_ptr + q_rows[:, None] + column[None, :], mask=valid[:, None] & (column < D_QK)[None, :], other=0.0)
    qk_scale = scale * 1.4426950408889634
    if k_scale_ptr is not None:
        qk_scale *= tl.load(k_scale_ptr + head)
    top = tl.full([G_PAD], -float("inf"), tl.float32)
    totals = tl.zeros([G_PAD, SELECTED], tl.float32)
    o = tl.zeros([G_PAD, DV], tl.float32)
    here = (sequence.to(tl.int64) * TOKENS + token) * heads + head
    inner = tl.arange(0, SELECTED)
    table = table_ptr + slot.to(tl.int64) * max_pages
    slots = tl.arange(0, SLOTS)
    indices = tl.load(index_ptr + here * COUNT + slots, mask=slots < COUNT, other=-1)
    # All pages looked up at once: a pipeline that did so block by block would wait for the rows before each.
    page = tl.load(table + indices * SELECTED // PAGE, mask=indices >= 0, other=0)
    row_of = (page.to(tl.int64) * heads + head) * PAGE + indices * SELECTED % PAGE
    chosen = tl.sum((indices >= 0).to(tl.int32), 0)
    each = (chosen + pieces - 1) // pieces
    for i in tl.range(piece * each, tl.minimum((piece + 1) * each, chosen), num_stages=STAGES):
        key0 = tl.sum(tl.where(slots == i, indices, 0), 0) * SELECTED
        row0 = tl.sum(tl.where(slots == i, row_of, 0), 0)
        k = load_rows(k_ptr, row0, length - key0, SELECTED, D_QK, DQ)
        v = load_rows(v_ptr, row0, length - key0, SELECTED, D_V, DV)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        seen = key0 + inner <= position
        top, totals, weights, old, _, _ = attend(products, seen[None, :], top, totals, qk_scale, q.dtype)
        o = tl.dot(weights, v, o * old[:, None], input_precision="ieee")
    column = tl.arange(0, DV)
    inside = valid[:, None] & (column < D_V)[None, :]
    place = (sequence.to(tl.int64) * TOKENS + token) * (heads * G) + head * G + member
    first = (sequence.to(tl.int64) * heads + head) * parts
    rows = tl.minimum(token * G + member, M - 1)
    stats = dense_stat_ptr + first * (2 * M)
    cmp_top, cmp_total = softmax_of(stats, splits, rows, M)
    swa_top, swa_total = softmax_of(stats + splits * (2 * M), parts - splits, rows, M)
    cmp_factor = tl.load(g_cmp_ptr + place, mask=valid, other=0.0).to(tl.float32) / cmp_total
    swa_factor = tl.load(g_swa_ptr + place, mask=valid, other=0.0).to(tl.float32) / swa_total
    if v_scale_ptr is not None:
        cmp_factor *= tl.load(v_scale_ptr + head)
        swa_factor *= tl.load(v_scale_ptr + 2 * heads + head)
    others = tl.zeros([G_PAD, DV], tl.float32)
    for i in tl.range(piece, parts, pieces, num_stages=3):
        given = tl.load(dense_part_ptr + ((first + i) * M + rows)[:, None] * D_V + column[None, :], mask=inside, other=0.0)
        weight = tl.exp2(tl.load(stats + i * (2 * M) + rows) - tl.where(i < splits, cmp_top, swa_top))
        others += given * (weight * tl.where(i < splits, cmp_factor, swa_factor))[:, None]

    total = tl.sum(totals, 1)
    last = pieces == 1
    if pieces > 1:
        of_piece = part_ptr + (here * pieces + piece) * (2 * G_PAD * D_V) + member[:, None] * D_V + column[None, :]
        tl.store(of_piece, o, mask=inside)
        tl.store(of_piece + G_PAD * D_V, others, mask=inside)
        stats = stat_ptr + here * pieces * (2 * G_PAD)
        tl.store(stats + piece * (2 * G_PAD) + member, top)
        tl.store(stats + piece * (2 * G_PAD) + G_PAD + member, total)
        last = last_to_arrive(arrived_ptr + here, pieces)
        if last:
            top, total = softmax_of(stats, pieces, member, G_PAD)
            o = tl.zeros([G_PAD, DV], tl.float32)
            others = tl.zeros([G_PAD, DV], tl.float32)
            for i in tl.range(0, pieces, num_stages=3):
                of_piece = part_ptr + (here * pieces + i) * (2 * G_PAD * D_V) + member[:, None] * D_V + column[None, :]
                weight = tl.exp2(tl.load(stats + i * (2 * G_PAD) + member) - top)
                o += tl.load(of_piece, mask=inside, other=0.0) * weight[:, None]
                others += tl.load(of_piece + G_PAD * D_V, mask=inside, other=0.0)
    if last:
        factor = tl.load(g_slc_ptr + place, mask=valid, other=0.0).to(tl.float32) / tl.where(total > 0, total, 1.0)  # o is 0 where total is
        if v_scale_ptr is not None:
            factor *= tl.load(v_scale_ptr + heads + head)
        tl.store(o_ptr + place[:, None] * D_V + column[None, :], (others + o * factor[:, None]).to(o_ptr.dtype.element_ty), mask=inside)


def types(*tensors):
    """A constant that tells binaries apart by which tensors are fp32, and which are None."""
    return sum((0 if x is None else 1 if x.dtype == torch.float32 else 2) * 3**i for i, x in enumerate(tensors))


_TOKENS = 1
_M = 16
_G_PAD = 16
_select = Launcher(
    decode_selected_fwd_kernel,
    {
        "G": 16,
        "G_PAD": _G_PAD,
        "TOKENS": _TOKENS,
        "M": _M,
        "D_QK": 128,
        "DQ": 128,
        "D_V": 128,
        "DV": 128,
        "PAGE": 64,
        "SELECTED": 64,
        "COUNT": 16,
        "SLOTS": 16,
        "STAGES": 4,
    },
    num_warps=4,
    num_stages=4,
    maxnreg=None,
)


def decode_selected_fwd(
    q, k_pages, v_pages, k_scale, v_scale, table, slots, lengths, block_indices, dense_part, dense_stat, splits, g_cmp, g_slc, g_swa,
    arrived, o, scale,
):  # fmt: skip
    """Attention of a few new tokens to their chosen blocks (paper eq. 12), added up with that of the other branches (eq. 5).

    Args:
        q: [S, 1, Hq, D_QK], last dim contiguous, strides multiples of 8 elements.
        k_pages, v_pages: [pages, Hkv, 64, D] contiguous.
        k_scale: [Hkv] fp32, what stored keys are multiplied by, or None.
        v_scale: [3, Hkv] fp32 of compressed V, the selected and the sliding branch's, or None.
        table: [slots, max_pages] int32 contiguous: pages of the selected branch's tokens.
        slots: [S] int32.
        lengths: [slots] int32: tokens of each, the new ones included.
        block_indices, dense_part, dense_stat, splits: as decode_dense_fwd gives them.
        g_cmp, g_slc, g_swa: [S, tokens, Hq] contiguous, of one dtype.
        arrived: [at least S * tokens * Hkv] int32, 0; left so.
        o: [S, tokens, Hq, D_V] contiguous, written.
    """
    sequences, heads, device = q.shape[0], k_pages.shape[1], q.device
    pieces = max(min(256 // max(sequences * _TOKENS * heads, 1), 16 // 2), 1)
    part = torch.empty((sequences, _TOKENS, heads, pieces, 2, _G_PAD, v_pages.shape[3]), dtype=torch.float32, device=device)
    stat = torch.empty((sequences, _TOKENS, heads, pieces, 2, _G_PAD), dtype=torch.float32, device=device)
    _select(
        (_TOKENS * heads, sequences, pieces),
        q, k_pages, v_pages, k_scale, v_scale, table, slots, lengths, block_indices, dense_part, dense_stat, g_cmp, g_slc, g_swa,
        part, stat, arrived, o, scale, heads, table.shape[1], splits, dense_part.shape[2], *q.stride()[:3],
        TYPES=types(g_cmp),
    )  # fmt: skip
