"""compressed_attention_bwd, rendered by nsa-gen from templates/compressed_attention_bwd.py.jinja. Do not edit: change the template.

problem 575050a2a3d5: dtype=bfloat16 group=16 head_dim_qk=128 head_dim_v=128 block=32 stride=16 deterministic=False varlen=False
config  b9df01d26d75: KEYS=32 ROWS=32 SPLITS=8 dkv_mask=edges dkv_stages=1 dkv_warps=4 dq=atomic
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
def load_rows(base, offsets, mask, D: tl.constexpr, COLUMN: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """[rows, WIDTH] at base + offsets, columns from COLUMN on; 0 in columns past D and, with MASKED, in rows whose mask is false."""
    column = COLUMN + tl.arange(0, WIDTH)[None, :]
    if COLUMN + WIDTH > D:
        inside = (column < D) & mask[:, None] if MASKED else column < D
        return tl.load(base + offsets[:, None] + column, mask=inside, other=0.0)
    elif MASKED:
        return tl.load(base + offsets[:, None] + column, mask=mask[:, None], other=0.0)
    else:
        return tl.load(base + offsets[:, None] + column)


@triton.jit
def store_rows(
    base, add, offsets, mask, x, D: tl.constexpr, COLUMN: tl.constexpr, WIDTH: tl.constexpr, STREAMED: tl.constexpr = False
):
    """x [rows, WIDTH], plus what is at the same place of add unless that is None, to base + offsets, columns from COLUMN on.

    STREAMED: past the L2, which others need.
    """
    column = COLUMN + tl.arange(0, WIDTH)[None, :]
    place = offsets[:, None] + column
    inside = mask[:, None] & (column < D)
    if add is not None:
        x += tl.load(add + place, mask=inside, other=0.0).to(tl.float32)
    if STREAMED:
        tl.store(base + place, x.to(base.dtype.element_ty), mask=inside, cache_modifier=".cs")
    else:
        tl.store(base + place, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def dq_step(
    q,  # [BLOCK_M, DQ]
    q_tail,  # [BLOCK_M, DQ_TAIL], or None
    do,  # [BLOCK_M, DV]
    do_tail,  # [BLOCK_M, DV_TAIL], or None
    lse,  # [BLOCK_M] log2 domain
    delta,  # [BLOCK_M]
    dq,  # [BLOCK_M, DQ] fp32
    dq_tail,  # [BLOCK_M, DQ_TAIL] fp32; returned as it came without a tail
    k,  # [BLOCK_N, DQ]
    k_tail,
    v,  # [BLOCK_N, DV]
    v_tail,
    seen,  # [BLOCK_M, BLOCK_N], used with MASKED
    second,  # (gate, lse, delta, gate, seen): of this branch, then of a second one; or None
    qk_scale,
    MASKED: tl.constexpr,
):
    """Add some keys' part of dq, but for the factors scale and (without a second branch) gate."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    prob = tl.exp2(scores * qk_scale - lse[:, None])
    if MASKED:
        prob = tl.where(seen, prob, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    ds = prob * (dp - delta[:, None])
    if second is not None:
        other = tl.where(second[4], tl.exp2(scores * qk_scale - second[1][:, None]), 0.0)
        ds = ds * second[0][:, None] + other * (dp - second[2][:, None]) * second[3][:, None]
    ds = ds.to(k.dtype)
    dq = tl.dot(ds, k, dq, input_precision="ieee")
    return dq, dq_tail


@triton.jit
def dkv_step(
    k,  # [BLOCK_N, DQ]
    k_tail,  # [BLOCK_N, DQ_TAIL], or None
    v,  # [BLOCK_N, DV]
    v_tail,  # [BLOCK_N, DV_TAIL], or None
    dk,  # [BLOCK_N, DQ] fp32
    dk_tail,  # tails are returned as they came where there is none
    dv,  # [BLOCK_N, DV] fp32
    dv_tail,
    q,  # [BLOCK_M, DQ]
    q_tail,
    do,  # [BLOCK_M, DV]
    do_tail,
    lse,  # [BLOCK_M] log2 domain
    delta,  # [BLOCK_M]
    gate,  # [BLOCK_M]
    seen,  # [BLOCK_N, BLOCK_M], used with MASKED
    second,  # (lse, delta, gate, seen) of a second branch, or None
    qk_scale,
    MASKED: tl.constexpr,
):
    """Add some rows' part of dk (but for the factor scale) and dv; also returns gate * ds [BLOCK_N, BLOCK_M].

    Keys are the rows of every product: probabilities and ds are then operands as they come out of the registers. lse and delta are where
    the products begin, not taken off afterwards: as vectors they would hold registers that the sums need.
    """
    below = tl.zeros([k.shape[0], q.shape[0]], tl.float32)
    scores = tl.dot(k, tl.trans(q), below - (lse / qk_scale)[None, :], input_precision="ieee")
    prob = tl.exp2(scores * qk_scale) * gate[None, :]
    if MASKED:
        prob = tl.where(seen, prob, 0.0)
    dp = tl.dot(v, tl.trans(do), below - delta[None, :], input_precision="ieee")
    ds = prob * dp
    if second is not None:
        other = tl.exp2(scores * qk_scale + (lse - second[0])[None, :]) * second[2][None, :]
        other = tl.where(second[3], other, 0.0)
        prob += other
        ds += other * (dp + (delta - second[1])[None, :])
    p = prob.to(do.dtype)
    dv = tl.dot(p, do, dv, input_precision="ieee")
    ds = ds.to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision="ieee")
    return dk, dk_tail, dv, dv_tail, ds


@triton.jit
def load_numbers(lse_ptr, delta_ptr, gate_ptr, place, mask):
    """lse (in the log2 domain), delta and gate of some rows; rows whose mask is false get 0, and add nothing."""
    lse = tl.load(lse_ptr + place, mask=mask, other=0.0) * 1.4426950408889634
    return lse, tl.load(delta_ptr + place, mask=mask, other=0.0), tl.load(gate_ptr + place, mask=mask, other=0.0)


@triton.jit
def newest_key(position, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """The last key that a token sees; -1 or less where it sees none."""
    return tl.maximum(position + 1 - BLOCK + STRIDE, 0) // STRIDE - 1


@triton.jit
def sees_local(position, key, SELECTED: tl.constexpr, LOCAL: tl.constexpr):
    """Whether `key` is no later than `position`, and in one of the LOCAL blocks of SELECTED tokens that end with that token's."""
    return ((position // SELECTED - key // SELECTED) < LOCAL) & (key <= position)


@triton.jit
def sees(newest, key, width):
    """Whether a row whose last key is `newest` sees `key`: unsigned, a later key is a huge distance, so one comparison is both ends."""
    return (newest - key).to(tl.uint32, bitcast=True) < width


@triton.jit
def dkv_loop(
    k,  # [BLOCK_N, DQ]
    k_tail,
    v,  # [BLOCK_N, DV]
    v_tail,
    key,  # [BLOCK_N]
    dk,  # [BLOCK_N, DQ] fp32
    dk_tail,
    dv,  # [BLOCK_N, DV] fp32
    dv_tail,
    q_ptr,  # the sequence's first token, the first query head of this KV head
    do_ptr,
    lse_ptr,
    delta_ptr,
    gate_ptr,
    second,  # these three of a second branch, which sees local blocks, or None
    dq_ptr,  # fp32, contiguous, zero; None where dq is made elsewhere
    stride_qt,
    stride_qh,
    stride_dot,
    stride_doh,
    heads,  # int64: query heads
    begin,  # flat rows (token * G + group member); a multiple of G
    end,
    last,  # rows from here on are never read
    width,
    qk_scale,
    scale,
    G: tl.constexpr,
    D_QK: tl.constexpr,
    DQ: tl.constexpr,
    DQ_TAIL: tl.constexpr,
    D_V: tl.constexpr,
    DV: tl.constexpr,
    DV_TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    SELECTED: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add what the rows of [begin, end) give to dk and dv. Without MASKED they see every key and whole tiles are read."""
    step_q = tl.multiple_of(stride_qt.to(tl.int32), 8)
    step_do = tl.multiple_of(stride_dot.to(tl.int32), 8)
    member_q = tl.multiple_of(stride_qh.to(tl.int32), 8)
    member_do = tl.multiple_of(stride_doh.to(tl.int32), 8)
    for row0 in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        # A 64-bit base that moves; offsets inside a tile stay the same where it holds whole tokens.
        row = tl.arange(0, BLOCK_M)
        if BLOCK_M % G:
            row += row0 % G
        first = row0 // G
        valid = tl.arange(0, BLOCK_M) < last - row0
        q_rows = row // G * step_q + row % G * member_q
        do_rows = row // G * step_do + row % G * member_do
        q = load_rows(q_ptr + first * stride_qt, q_rows, valid, D_QK, 0, DQ, MASKED)
        do = load_rows(do_ptr + first * stride_dot, do_rows, valid, D_V, 0, DV, MASKED)
        q_tail = None
        do_tail = None
        place = first * heads + (row // G * heads + row % G)
        lse, delta, gate = load_numbers(lse_ptr, delta_ptr, gate_ptr, place, valid)
        seen = sees(newest_key(row0 // G + row // G, BLOCK, STRIDE)[None, :], key[:, None], width) & valid[None, :]
        if second is not None:
            numbers = load_numbers(second[0], second[1], second[2], place, valid)
            other = sees_local((row0 // G + row // G)[None, :], key[:, None], SELECTED, LOCAL) & valid[None, :]
            both = (numbers[0], numbers[1], numbers[2], other)
        else:
            both = None
        dk, dk_tail, dv, dv_tail, ds = dkv_step(
            k, k_tail, v, v_tail, dk, dk_tail, dv, dv_tail, q, q_tail, do, do_tail, lse, delta, gate, seen, both, qk_scale, MASKED
        )  # fmt: skip
        if dq_ptr is not None:
            dq = tl.dot(tl.trans(ds), k, input_precision="ieee") * scale
            dq_rows = dq_ptr + (place * D_QK)[:, None]
            tl.atomic_add(dq_rows + tl.arange(0, DQ), dq, mask=valid[:, None], sem="relaxed")
    return dk, dk_tail, dv, dv_tail


@triton.jit
def compressed_attention_bwd_dkv_kernel(
    q_ptr,  # [T, Hq, D_QK]
    k_ptr,  # [rows, Hkv, D_QK]
    v_ptr,  # [rows, Hkv, D_V]
    do_ptr,  # [T, Hq, D_V]
    lse_ptr,  # [T, Hq] fp32, natural log
    delta_ptr,  # [T, Hq] fp32
    gate_ptr,  # [T, Hq] fp32
    dk_ptr,  # [splits, rows, Hkv, D_QK] fp32, zero
    dv_ptr,  # [splits, rows, Hkv, D_V] fp32, zero
    dq_ptr,  # [last - first, Hq, D_QK] fp32, zero
    cu_seqlens,
    scale: tl.float32,
    heads: tl.int32,
    batch: tl.int32,
    seqlen: tl.int32,
    first: tl.int32,
    last: tl.int32,
    total: tl.int32,
    split: tl.int32,  # tokens of a split
    key_rows: tl.int32,
    stride_qt: tl.int64,
    stride_qh: tl.int64,
    stride_kt: tl.int64,
    stride_kh: tl.int64,
    stride_vt: tl.int64,
    stride_vh: tl.int64,
    stride_dot: tl.int64,
    stride_doh: tl.int64,
    G: tl.constexpr,
    D_QK: tl.constexpr,
    DQ: tl.constexpr,
    DQ_TAIL: tl.constexpr,
    D_V: tl.constexpr,
    DV: tl.constexpr,
    DV_TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dk and dv of a tile of keys, over one split of the queries that see them; of the call's queries [first, last)."""
    head = tl.program_id(1)
    # A tile of BLOCK_N compressed tokens stands for BLOCK_N * STRIDE tokens. Early ones are seen by the most queries and go first.
    b, tile = locate(tl.program_id(0), cu_seqlens, batch, seqlen, 0, total, 1, BLOCK_N * STRIDE)
    start = sequence_start(cu_seqlens, b, seqlen)
    length = sequence_start(cu_seqlens, b + 1, seqlen) - start
    key0 = tile * BLOCK_N
    keys = newest_key(length - 1, BLOCK, STRIDE) + 1
    # Tokens of the split, from the first that sees a key of the tile on.
    seen_from = key0 * STRIDE + BLOCK - 1
    low = tl.maximum(tl.maximum(seen_from, tl.program_id(2) * split), first - start)
    high = tl.minimum(tl.minimum(length, (tl.program_id(2) + 1) * split), last - start)
    if (key0 >= keys) | (low >= high):
        return
    key = key0 + tl.arange(0, BLOCK_N)
    held = key < keys
    start_row = start // STRIDE
    k_head = k_ptr + start_row.to(tl.int64) * stride_kt + head * stride_kh
    v_head = v_ptr + start_row.to(tl.int64) * stride_vt + head * stride_vh
    k = load_rows(k_head, key * stride_kt, held, D_QK, 0, DQ, True)
    v = load_rows(v_head, key * stride_vt, held, D_V, 0, DV, True)
    dk = tl.zeros([BLOCK_N, DQ], tl.float32)
    dv = tl.zeros([BLOCK_N, DV], tl.float32)
    k_tail = None
    dk_tail = tl.zeros([BLOCK_N], tl.float32)  # there is no tail
    v_tail = None
    dv_tail = tl.zeros([BLOCK_N], tl.float32)
    qk_scale = scale * 1.4426950408889634
    end = high * G
    # Rows that do not see every key of the tile come first, masked; from `clear` on, row tiles are whole and see all.
    clear = tl.minimum(tl.maximum((seen_from + (BLOCK_N - 1) * STRIDE) * G, low * G), end)
    clear = low * G + (clear - low * G + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    whole = clear + tl.maximum(end - clear, 0) // BLOCK_M * BLOCK_M
    row_start = start.to(tl.int64) * (heads * G) + head * G
    dq_rows = dq_ptr + row_start * D_QK - first.to(tl.int64) * (heads * G * D_QK)
    # The pipelined loop comes first: in any other order ptxas serialises wgmma.
    dk, dk_tail, dv, dv_tail = dkv_loop(
        k, k_tail, v, v_tail, key, dk, dk_tail, dv, dv_tail, q_ptr + start.to(tl.int64) * stride_qt + head * G * stride_qh,
        do_ptr + start.to(tl.int64) * stride_dot + head * G * stride_doh, lse_ptr + row_start, delta_ptr + row_start, gate_ptr + row_start,
        None, dq_rows, stride_qt, stride_qh, stride_dot, stride_doh, (heads * G).to(tl.int64),
        clear, whole, end, 2**31 - 1, qk_scale, scale,
        G, D_QK, DQ, DQ_TAIL, D_V, DV, DV_TAIL, BLOCK, STRIDE, 1, 0, BLOCK_M, False, STAGES,
    )  # fmt: skip
    dk, dk_tail, dv, dv_tail = dkv_loop(
        k, k_tail, v, v_tail, key, dk, dk_tail, dv, dv_tail, q_ptr + start.to(tl.int64) * stride_qt + head * G * stride_qh,
        do_ptr + start.to(tl.int64) * stride_dot + head * G * stride_doh, lse_ptr + row_start, delta_ptr + row_start, gate_ptr + row_start,
        None, dq_rows, stride_qt, stride_qh, stride_dot, stride_doh, (heads * G).to(tl.int64),
        low * G, tl.minimum(clear, end), end, 2**31 - 1, qk_scale, scale,
        G, D_QK, DQ, DQ_TAIL, D_V, DV, DV_TAIL, BLOCK, STRIDE, 1, 0, BLOCK_M, True, 1,
    )  # fmt: skip
    dk, dk_tail, dv, dv_tail = dkv_loop(
        k, k_tail, v, v_tail, key, dk, dk_tail, dv, dv_tail, q_ptr + start.to(tl.int64) * stride_qt + head * G * stride_qh,
        do_ptr + start.to(tl.int64) * stride_dot + head * G * stride_doh, lse_ptr + row_start, delta_ptr + row_start, gate_ptr + row_start,
        None, dq_rows, stride_qt, stride_qh, stride_dot, stride_doh, (heads * G).to(tl.int64),
        whole, end, end, 2**31 - 1, qk_scale, scale,
        G, D_QK, DQ, DQ_TAIL, D_V, DV, DV_TAIL, BLOCK, STRIDE, 1, 0, BLOCK_M, True, 1,
    )  # fmt: skip
    out = (tl.program_id(2).to(tl.int64) * key_rows + start_row + key) * heads + head
    store_rows(dk_ptr, dk_ptr, out * D_QK, held, dk * scale, D_QK, 0, DQ)
    store_rows(dv_ptr, dv_ptr, out * D_V, held, dv, D_V, 0, DV)


def types(*tensors):
    """A constant that tells binaries apart by which tensors are fp32, and which are None."""
    return sum((0 if x is None else 1 if x.dtype == torch.float32 else 2) * 3**i for i, x in enumerate(tensors))


@triton.jit
def add_up_kernel(
    parts_ptr,  # [parts, elements] fp32
    add_ptr,  # [elements], or None
    out_ptr,  # [elements]
    elements: tl.int64,
    parts: tl.int32,
    ELEMENTS: tl.constexpr,
    TYPES: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = place < elements
    total = tl.zeros([ELEMENTS], tl.float32)
    for part in tl.range(0, parts):
        total += tl.load(parts_ptr + part * elements + place, mask=inside, other=0.0)
    if add_ptr is not None:
        total += tl.load(add_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)


_add_up = Launcher(add_up_kernel, {"ELEMENTS": 2048}, num_warps=4)


def add_up(parts, count, add, out):
    """out = add + the sum of ``count`` parts, all contiguous."""
    _add_up((-(-out.numel() // 2048),), parts, add, out, out.numel(), count, TYPES=types(add, out))


_GROUP = 16
_BLOCK_N = 32
_SPLITS = 8
_known = {
    "G": _GROUP,
    "D_QK": 128,
    "DQ": 128,
    "DQ_TAIL": 0,
    "D_V": 128,
    "DV": 128,
    "DV_TAIL": 0,
    "BLOCK": 32,
    "STRIDE": 16,
}
_dkv = Launcher(
    compressed_attention_bwd_dkv_kernel,
    {**_known, "BLOCK_M": 32, "BLOCK_N": _BLOCK_N, "STAGES": 1},
    num_warps=4,
    num_stages=1,
)


def compressed_attention_bwd(
    q, k_cmp, v_cmp, do, lse, delta, gate, dq, dk_cmp, dv_cmp, dq_add, scale, workspace_bytes, cu_seqlens, batch, max_seqlen
):
    """Gradients of gate * attention over the compressed tokens (paper eq. 8), given those of that product. Deterministic but for dq.

    Args:
        q, k_cmp, v_cmp: as for the forward.
        do: [T, Hq, D_V], last dim contiguous, strides multiples of 8 elements.
        lse, delta: [T, Hq] fp32 contiguous: the forward's lse (natural log), and do @ o less the gradient of lse, without the gate.
        gate: [T, Hq] fp32 contiguous.
        dq: [T, Hq, D_QK] contiguous, written: the gradient plus dq_add.
        dk_cmp, dv_cmp: as k_cmp, v_cmp, contiguous, written whole: zeros in rows that belong to no sequence.
        dq_add: None, or contiguous as dq; may be dq itself.
        workspace_bytes: bound on scratch; what one sum of dk and dv in fp32 takes is used even where that is more.
    """
    queries, heads = q.shape[0], k_cmp.shape[1]
    rows, device = k_cmp.shape[0], q.device
    strides = (*q.stride()[:2], *k_cmp.stride()[:2], *v_cmp.stride()[:2], *do.stride()[:2])
    given = (q, k_cmp, v_cmp, do, lse, delta, gate)
    sums = k_cmp.numel() + v_cmp.numel()
    splits = max(min(_SPLITS, -(-max_seqlen // 32), workspace_bytes // (8 * max(sums, 1))), 1)
    split = -(-max_seqlen // splits)
    dk = torch.empty((splits, *k_cmp.shape), dtype=torch.float32, device=device)
    dv = torch.empty((splits, *v_cmp.shape), dtype=torch.float32, device=device)
    dk.zero_()
    dv.zero_()
    key_tiles = queries // (_BLOCK_N * 16) + batch
    grid = (key_tiles, heads, splits)
    chunk = max((workspace_bytes - 4 * splits * sums) // (q.shape[1] * q.shape[2] * 4), 64)
    chunk = -(-queries // -(-queries // chunk)) if queries else 1
    dq32 = torch.empty((min(chunk, queries), *q.shape[1:]), dtype=torch.float32, device=device)
    for first in range(0, queries, chunk):
        last = min(first + chunk, queries)
        dq32.zero_()
        _dkv(grid, *given, dk, dv, dq32, cu_seqlens, scale, heads, batch, max_seqlen, first, last, queries, split, rows, *strides)
        add_up(dq32[: last - first], 1, None if dq_add is None else dq_add[first:last], dq[first:last])
    add_up(dk, splits, None, dk_cmp)
    add_up(dv, splits, None, dv_cmp)
