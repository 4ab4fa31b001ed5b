"""sliding_merge_fwd, rendered by nsa-gen from templates/sliding_merge_fwd.py.jinja. Do not edit: change the template.

problem 11f340a65520: dtype=bfloat16 group=16 head_dim_qk=128 head_dim_v=128 selection_block=64 count=16 initial=1 local=2 parts=13
    window=512 varlen=False
config  18e39dc0a76f: BLOCK_M=32 BLOCK_N=16 dense_stages=1 loads=descriptor mask=edges maxnreg=None merge=unrolled num_stages=2 num_warps=4
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
    k = load_tile(k_tile, key_first - key, stride_kt, 0, DQ, D_QK, KEYS, EDGE) if EDGE else k_desc.load([row0 + key, k_column])
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, KEYS]
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
    v = load_tile(v_tile, key_first - key, stride_vt, 0, DV, D_V, KEYS, EDGE) if EDGE else v_desc.load([row0 + key, v_column])
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
def gate(pointer, query, head, stride_token, stride_head, mask):
    """One branch's gate of some rows, in fp32."""
    return tl.load(pointer + query.to(tl.int64) * stride_token + head * stride_head, mask=mask, other=0.0).to(tl.float32)


def gate_arguments(gates):
    """Strides of the gates, and a constant above 0 that tells binaries apart by the gates' dtypes."""
    fp32 = sum((gate.dtype == torch.float32) << i for i, gate in enumerate(gates))
    return [stride for gate in gates for stride in gate.stride()], 8 + fp32


@triton.jit
def attend_dense(
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
    BLOCK: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Softmax of a tile over its rows' initial and local blocks: (top, total, acc, acc_tail), not normalised."""
    top, total, acc, acc_tail = fresh(q.shape[0], DV, DV_TAIL)
    local_first = tl.maximum(t // BLOCK - LOCAL + 1, 0) * BLOCK  # first key of a row's local blocks
    local_width = tl.maximum(t + 1 - local_first, 0).to(tl.uint32, bitcast=True)
    initial_newest = tl.minimum(t, tl.minimum(local_first, INITIAL * BLOCK) - 1)  # below 0: local blocks hold all
    # Both stretches in tiles of BLOCK_N keys from their end back, so that no key past a sequence's end is ever read. A tile that begins
    # before the sequence comes last.
    local_end = t_last + 1
    local_keys = local_end - tl.maximum(t_first // BLOCK - LOCAL + 1, 0) * BLOCK
    initial_end = tl.minimum(tl.minimum(tl.maximum(t_last // BLOCK - LOCAL + 1, 0), INITIAL) * BLOCK, local_end)
    local_tiles = (tl.maximum(local_keys, 0) + BLOCK_N - 1) // BLOCK_N
    initial_tiles = (initial_end + BLOCK_N - 1) // BLOCK_N
    local_inside = tl.minimum(local_tiles, local_end // BLOCK_N)
    initial_inside = initial_end // BLOCK_N
    everything = tl.full([q.shape[0]], 0x7FFFFFFF, tl.uint32)
    for tile in tl.range(0, local_inside + initial_inside, num_stages=1):
        is_local = tile < local_inside
        local_tile = tile
        initial_tile = tile - local_inside
        key = tl.where(is_local, local_end - (local_tile + 1) * BLOCK_N, initial_end - (initial_tile + 1) * BLOCK_N)
        newest = tl.where(is_local, t, initial_newest)
        width = tl.where(is_local, local_width, everything)[:, None]
        top, total, acc, acc_tail = attend(
            q, q_tail, top, total, acc, acc_tail, k_head, v_head, stride_kt, stride_vt, k_desc, v_desc, row0, k_column, v_column,
            newest, width, key, 0, qk_scale, D_QK, DQ, DQ_TAIL, D_V, DV, DV_TAIL, BLOCK_N, True, False,
        )  # fmt: skip
    for tile in tl.range(0, local_tiles - local_inside + initial_tiles - initial_inside, num_stages=1):
        is_local = tile < local_tiles - local_inside
        local_tile = tile + local_inside
        initial_tile = tile - (local_tiles - local_inside) + initial_inside
        key = tl.where(is_local, local_end - (local_tile + 1) * BLOCK_N, initial_end - (initial_tile + 1) * BLOCK_N)
        newest = tl.where(is_local, t, initial_newest)
        width = tl.where(is_local, local_width, everything)[:, None]
        top, total, acc, acc_tail = attend(
            q, q_tail, top, total, acc, acc_tail, k_head, v_head, stride_kt, stride_vt, k_desc, v_desc, row0, k_column, v_column,
            newest, width, key, 0, qk_scale, D_QK, DQ, DQ_TAIL, D_V, DV, DV_TAIL, BLOCK_N, True, True,
        )  # fmt: skip
    return top, total, acc, acc_tail


@triton.jit
def sliding_merge_fwd_kernel(
    q_ptr,  # [last - first, Hq, D_QK]
    k_slc_ptr,  # [T, Hkv, D_QK]
    v_slc_ptr,  # [T, Hkv, D_V]
    k_swa_ptr,  # [T, Hkv, D_QK]
    v_swa_ptr,  # [T, Hkv, D_V]
    part_ptr,  # [Hkv, PARTS, chunk, G, D_V]: normalised partial outputs of the blocks that are neither initial nor local
    part_lse_ptr,  # [Hkv, PARTS, chunk, G] fp32: log2 domain
    o_cmp_ptr,  # [last - first, Hq, D_V], contiguous
    g_cmp_ptr,  # [last - first, Hq], activations' dtype or fp32, any strides
    g_slc_ptr,
    g_swa_ptr,
    o_ptr,  # [last - first, Hq, D_V], contiguous; may be o_cmp
    o_slc_ptr,  # the branches' outputs and LSEs (fp32, natural log), shaped as o and [last - first, Hq]; or all None
    o_swa_ptr,
    lse_slc_ptr,
    lse_swa_ptr,
    k_slc_desc,  # descriptors of K and V, or None
    v_slc_desc,
    k_swa_desc,
    v_swa_desc,
    cu_seqlens,  # [B + 1] int32, or None
    scale: tl.float32,
    first: tl.int32,
    last: tl.int32,
    batch: tl.int32,
    seqlen: tl.int32,
    chunk: tl.int32,
    stride_qt: tl.int64,
    stride_qh: tl.int64,
    stride_k_slc_t: tl.int64,
    stride_k_slc_h: tl.int64,
    stride_v_slc_t: tl.int64,
    stride_v_slc_h: tl.int64,
    stride_k_swa_t: tl.int64,
    stride_k_swa_h: tl.int64,
    stride_v_swa_t: tl.int64,
    stride_v_swa_h: tl.int64,
    g_cmp_stride_t: tl.int64,
    g_cmp_stride_h: tl.int64,
    g_slc_stride_t: tl.int64,
    g_slc_stride_h: tl.int64,
    g_swa_stride_t: tl.int64,
    g_swa_stride_h: tl.int64,
    G: tl.constexpr,
    D_QK: tl.constexpr,
    DQ: tl.constexpr,
    DQ_TAIL: tl.constexpr,
    D_V: tl.constexpr,
    DV: tl.constexpr,
    DV_TAIL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_EDGE: tl.constexpr,
    GATES: tl.constexpr,
    KEEP: tl.constexpr,
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
    query = start - first + t  # row of q, o and gates
    member = head * G + row % G

    q_rows = q_ptr + query.to(tl.int64)[:, None] * stride_qt + member[:, None] * stride_qh
    q = tl.load(q_rows + tl.arange(0, DQ)[None, :], mask=inside, other=0.0)  # [BLOCK_M, DQ]
    q_tail = None
    qk_scale = scale * 1.4426950408889634  # exp2 domain

    k_swa = k_swa_ptr + start * tl.multiple_of(stride_k_swa_t, 8) + head * tl.multiple_of(stride_k_swa_h, 8)
    v_swa = v_swa_ptr + start * tl.multiple_of(stride_v_swa_t, 8) + head * tl.multiple_of(stride_v_swa_h, 8)
    window = attend_window(
        q, q_tail, k_swa, v_swa, stride_k_swa_t, stride_v_swa_t, k_swa_desc, v_swa_desc,
        start, (head * stride_k_swa_h).to(tl.int32), (head * stride_v_swa_h).to(tl.int32), t, t_first, t_last, qk_scale,
        D_QK, DQ, DQ_TAIL, D_V, DV, DV_TAIL, WINDOW, BLOCK_N, BLOCK_EDGE,
    )  # fmt: skip
    g_cmp = gate(g_cmp_ptr, query, member, g_cmp_stride_t, g_cmp_stride_h, written)
    g_swa = gate(g_swa_ptr, query, member, g_swa_stride_t, g_swa_stride_h, written)
    window_total = tl.where(row < rows, window[1], 1.0)
    weight = g_swa / window_total
    # Between its steps the sum rests in o, in the activations' precision as the branches' outputs where they are computed apart: registers
    # for a second accumulator would cost a program on each multiprocessor.
    dv = tl.arange(0, DV)[None, :]
    out_rows = (query.to(tl.int64) * heads + member)[:, None] * D_V
    out = window[2] * weight[:, None] + g_cmp[:, None] * tl.load(o_cmp_ptr + out_rows + dv, mask=inside, other=0.0)
    tl.store(o_ptr + out_rows + dv, out.to(o_ptr.dtype.element_ty), mask=inside)
    if KEEP:
        o_swa = (window[2] * (1.0 / window_total)[:, None]).to(o_ptr.dtype.element_ty)
        tl.store(o_swa_ptr + out_rows + dv, o_swa, mask=inside)
        lse = (window[0] + tl.log2(window_total)) * 0.6931471805599453
        tl.store(lse_swa_ptr + query.to(tl.int64) * heads + member, lse, mask=written)
    tl.debug_barrier()

    k_slc = k_slc_ptr + start * tl.multiple_of(stride_k_slc_t, 8) + head * tl.multiple_of(stride_k_slc_h, 8)
    v_slc = v_slc_ptr + start * tl.multiple_of(stride_v_slc_t, 8) + head * tl.multiple_of(stride_v_slc_h, 8)
    dense = attend_dense(
        q, q_tail, k_slc, v_slc, stride_k_slc_t, stride_v_slc_t, k_slc_desc, v_slc_desc,
        start, (head * stride_k_slc_h).to(tl.int32), (head * stride_v_slc_h).to(tl.int32), t, t_first, t_last, qk_scale,
        D_QK, DQ, DQ_TAIL, D_V, DV, DV_TAIL, BLOCK, INITIAL, LOCAL, BLOCK_N,
    )  # fmt: skip
    total = dense[1]
    dense_lse = tl.where(total > 0, dense[0] + tl.log2(total), -float("inf"))

    # Weights of selected attention's parts, from the row's own maximum: safe at any logit.
    top = dense_lse
    # A query's blocks ascend: initial, those with partial results, local.
    filled = tl.minimum(tl.minimum(t // BLOCK + 1, COUNT) - (INITIAL + LOCAL), PARTS)
    place = head.to(tl.int64) * PARTS * chunk * G + query * G + row % G
    slot = tl.arange(0, PARTS_PAD)[None, :]
    exists = inside & (slot < filled[:, None])
    part_lse = tl.load(part_lse_ptr + place[:, None] + slot.to(tl.int64) * chunk * G, mask=exists, other=-float("inf"))
    top = tl.maximum(top, tl.max(part_lse, 1))
    top = tl.where(top == -float("inf"), 0.0, top)
    sum_ = tl.exp2(dense_lse - top)
    dense_weight = sum_ / tl.where(total > 0, total, 1.0)
    sum_ += tl.sum(tl.exp2(part_lse - top[:, None]), 1)
    g_slc = gate(g_slc_ptr, query, member, g_slc_stride_t, g_slc_stride_h, written)
    # What is kept of the selected branch grows in its own memory, without the gate.
    if KEEP:
        inverse = tl.where(sum_ > 0, 1.0 / sum_, 0.0)
        lse = tl.where(sum_ > 0, (top + tl.log2(sum_)) * 0.6931471805599453, -float("inf"))
        tl.store(lse_slc_ptr + query.to(tl.int64) * heads + member, lse, mask=written)
        rest = o_slc_ptr
    else:
        inverse = tl.where(sum_ > 0, g_slc / sum_, 0.0)
        rest = o_ptr
    weight = dense_weight * inverse
    out = dense[2] * weight[:, None]
    if not KEEP:
        out += tl.load(o_ptr + out_rows + dv, mask=inside, other=0.0)
    tl.store(rest + out_rows + dv, out.to(o_ptr.dtype.element_ty), mask=inside)
    # Nothing but memory from here on. A gather takes its result's layout from nowhere else: that of the tensor cores would spread from
    # these weights to all slots, with a conversion each.
    tl.debug_barrier()
    all_rows = tl.arange(0, BLOCK_M)
    top = tl.gather(top, all_rows, 0)
    inverse = tl.gather(inverse, all_rows, 0)
    out = tl.load(rest + out_rows + dv, mask=inside, other=0.0).to(tl.float32)
    for s in tl.static_range(PARTS):
        slot_place = place + s * (chunk * G).to(tl.int64)
        used = written & (s < filled)
        weight = tl.exp2(tl.load(part_lse_ptr + slot_place, mask=used, other=-float("inf")) - top) * inverse
        part_rows = part_ptr + slot_place[:, None] * D_V
        out += weight[:, None] * tl.load(part_rows + dv, mask=used[:, None], other=0.0)
    tl.store(rest + out_rows + dv, out.to(o_ptr.dtype.element_ty), mask=inside)
    if KEEP:
        tl.debug_barrier()
        g_slc = gate(g_slc_ptr, query, member, g_slc_stride_t, g_slc_stride_h, written)[:, None]
        out = tl.load(o_ptr + out_rows + dv, mask=inside, other=0.0).to(tl.float32)
        out += g_slc * tl.load(o_slc_ptr + out_rows + dv, mask=inside, other=0.0)
        tl.store(o_ptr + out_rows + dv, out.to(o_ptr.dtype.element_ty), mask=inside)


_GROUP = 16
_BLOCK_M = 32
_BLOCK_N = 16
_WINDOW = 512
_TILE_TOKENS = (_BLOCK_M + _GROUP - 2) // _GROUP + 1 if _BLOCK_M % _GROUP else _BLOCK_M // _GROUP  # most tokens a tile touches
_HALO = (_BLOCK_M + _GROUP - 2) // _GROUP  # tokens of a chunk's first tile that may lie before the chunk
_EDGE_KEYS = _TILE_TOKENS - 1 + _WINDOW % _BLOCK_N  # keys before the BLOCK_N tiles, away from a sequence's start

_finish = Launcher(
    sliding_merge_fwd_kernel,
    {
        "G": _GROUP,
        "D_QK": 128,
        "DQ": 128,
        "DQ_TAIL": 0,
        "D_V": 128,
        "DV": 128,
        "DV_TAIL": 0,
        "WINDOW": _WINDOW,
        "BLOCK": 64,
        "COUNT": 16,
        "INITIAL": 1,
        "LOCAL": 2,
        "PARTS": 13,
        "PARTS_PAD": 16,
        "BLOCK_M": _BLOCK_M,
        "BLOCK_N": _BLOCK_N,
        "BLOCK_EDGE": min(max(16, triton.next_power_of_2(_EDGE_KEYS)), _BLOCK_N),
    },
    num_warps=4,
    num_stages=2,
    maxnreg=None,
)


def sliding_merge_fwd(
    q, k_slc, v_slc, k_swa, v_swa, part, part_lse, o_cmp, g_cmp, g_slc, g_swa, o, scale, token_start, cu_seqlens, batch, max_seqlen,
    keep=None,
):
    """Sliding attention, what selected attention has left to do, and the gated sum of all branches (paper eq. 5).

    Args:
        q: [R, Hq, D_QK], last dim contiguous, strides multiples of 8 elements: the queries [token_start, token_start + R).
        k_slc, k_swa, v_slc, v_swa: [T, Hkv, D_QK] and [T, Hkv, D_V], the same.
        part: [Hkv, 13, C, G, D_V] contiguous, C >= R: normalised attention of each query over its blocks that are neither initial
            nor local, each for itself or all in one; what it has no block for is never read.
        part_lse: [Hkv, 13, C, G] fp32: log2 of the softmax denominators, scores in the exp2 domain.
        o_cmp: [R, Hq, D_V] contiguous.
        g_cmp, g_slc, g_swa: [R, Hq].
        o: [R, Hq, D_V] contiguous, written; may be o_cmp.
        scale: factor on q·k, > 0.
        token_start: packed token of the first query.
        cu_seqlens: [B + 1] int32 on the device, or None where all sequences have max_seqlen tokens.
        batch: B.
        max_seqlen: tokens of the longest sequence.
        keep: None, or (o_slc, o_swa, lse_slc, lse_swa) [R, Hq, D_V] and [R, Hq] fp32 contiguous, written too; then o must not be o_cmp.
    """
    queries, heads_kv = q.shape[0], k_slc.shape[1]
    k_slc, v_slc, k_swa, v_swa = map(Launcher.in_rows, (k_slc, v_slc, k_swa, v_swa))
    tiles = [Launcher.rows(x, _BLOCK_N) for x in (k_slc, v_slc, k_swa, v_swa)]
    grid = ((queries + min(token_start, _HALO)) * _GROUP // _BLOCK_M + batch, heads_kv)
    strides = [stride for x in (q, k_slc, v_slc, k_swa, v_swa) for stride in x.stride()[:2]]
    gate_strides, code = gate_arguments((g_cmp, g_slc, g_swa))
    _finish(
        grid,
        q, k_slc, v_slc, k_swa, v_swa, part, part_lse, o_cmp, g_cmp, g_slc, g_swa, o, *(keep or (None,) * 4), *tiles, cu_seqlens, scale,
        token_start, token_start + queries, batch, max_seqlen, part.shape[2], *strides, *gate_strides, GATES=code, KEEP=keep is not None,
    )  # fmt: skip
