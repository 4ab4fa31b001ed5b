"""selected_attention_bwd, rendered by nsa-gen from templates/selected_attention_bwd.py.jinja. Do not edit: change the template.

problem 2ba981019412: dtype=bfloat16 group=16 head_dim_qk=192 head_dim_v=128 selection_block=64 count=16 deterministic=False varlen=True
config  9f74c33d50ca: CHUNK=65536 ENTRIES=128 ROWS=16 dkv_registers=None dkv_stages=1 dkv_warps=4 dq=ds dq_stages=2 dq_warps=1 loads=pointer
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
def dense(block, current, INITIAL: tl.constexpr, LOCAL: tl.constexpr):
    """Whether a chosen block is served elsewhere."""
    return (block < INITIAL) | (block > current - LOCAL)


@triton.jit
def listed(block, current, INITIAL: tl.constexpr, LOCAL: tl.constexpr):
    """Whether a chosen block goes through the lists; padding (-1) and blocks in the future do not."""
    return (block >= 0) & (block <= current) & (dense(block, current, INITIAL, LOCAL) == 0)


@triton.jit
def count_kernel(
    index_ptr,  # [last - first, Hkv, COUNT] int32
    counters_ptr,  # [Hkv, bins, 8] int32, zero: 32 bytes for each, which L2 then counts in as many places
    rank_ptr,  # [Hkv, chunk * COUNT] int32: place of an entry in its list
    cu_seqlens,
    first: tl.int32,
    last: tl.int32,
    heads: tl.int32,
    batch: tl.int32,
    seqlen: tl.int32,
    bins: tl.int32,
    chunk: tl.int32,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Length of every block's list and each entry's place in it."""
    head = tl.program_id(1)
    b, tile = locate(tl.program_id(0), cu_seqlens, batch, seqlen, first, last, 1, TOKENS)
    start = sequence_start(cu_seqlens, b, seqlen)
    end = tl.minimum(sequence_start(cu_seqlens, b + 1, seqlen), last)
    token = tl.maximum(start, first) + tile * TOKENS + tl.arange(0, TOKENS)
    slot = tl.arange(0, SLOTS)
    exists = (token < end)[:, None] & (slot < COUNT)[None, :]
    entry = ((token - first).to(tl.int64) * heads + head)[:, None] * COUNT + slot
    block = tl.load(index_ptr + entry, mask=exists, other=-1)
    current = (token - start) // BLOCK
    keep = exists & listed(block, current[:, None], INITIAL, LOCAL)
    # Blocks of sequence b are bins start // BLOCK + b on: room for each of its blocks, without a sync.
    bin_ = head * bins + start // BLOCK + b + block
    rank = tl.atomic_add(counters_ptr + bin_ * 8, 1, mask=keep, sem="relaxed")
    local = (token - first)[:, None] * COUNT + slot
    tl.store(rank_ptr + head.to(tl.int64) * chunk * COUNT + local, rank, mask=keep)


@triton.jit
def plan_kernel(
    counters_ptr,  # [Hkv, bins, 8] int32
    counts_ptr,  # [Hkv, bins] int32: entries of a bin's list
    offsets_ptr,  # [Hkv, bins] int32: where it starts
    records_ptr,  # [Hkv, max_records, 2] int32: bin, first entry in the bin's list
    totals_ptr,  # [Hkv] int32: records of a head
    bins: tl.int32,
    max_records: tl.int32,
    ENTRIES: tl.constexpr,
    BINS: tl.constexpr,
):
    """Where each list of one head starts, and one record per ENTRIES entries of a list.

    Entries come nearly in token order, so records go piece by piece: first every list's first piece, then every second one. Programs that
    run at the same time then share their queries' q in L2. The programs of a head take pieces in turn.
    """
    head = tl.program_id(0)
    offset = 0
    most = 0
    records = 0
    for base in range(0, bins, BINS):
        bin_ = base + tl.arange(0, BINS)
        count = tl.load(counters_ptr + (head * bins + bin_) * 8, mask=bin_ < bins, other=0)
        if tl.program_id(1) == 0:
            tl.store(counts_ptr + head * bins + bin_, count, mask=bin_ < bins)
            tl.store(offsets_ptr + head * bins + bin_, offset + tl.cumsum(count, 0) - count, mask=bin_ < bins)
        offset += tl.sum(count, 0)
        most = tl.maximum(most, tl.max(count, 0))
        records += tl.sum((count + ENTRIES - 1) // ENTRIES, 0)
    if tl.program_id(1) == 0:
        tl.store(totals_ptr + head, records)
    for piece in range(tl.program_id(1), (most + ENTRIES - 1) // ENTRIES, tl.num_programs(1)):
        record = 0  # of earlier pieces
        for base in range(0, bins, BINS):
            bin_ = base + tl.arange(0, BINS)
            count = tl.load(counters_ptr + (head * bins + bin_) * 8, mask=bin_ < bins, other=0)
            record += tl.sum(tl.minimum((count + ENTRIES - 1) // ENTRIES, piece), 0)
        for base in range(0, bins, BINS):
            bin_ = base + tl.arange(0, BINS)
            longer = tl.load(counters_ptr + (head * bins + bin_) * 8, mask=bin_ < bins, other=0) > piece * ENTRIES
            place = record + tl.cumsum(longer.to(tl.int32), 0) - 1
            target = records_ptr + (head.to(tl.int64) * max_records + place) * 2
            tl.store(target, bin_, mask=longer)
            tl.store(target + 1, tl.zeros_like(bin_) + piece * ENTRIES, mask=longer)
            record += tl.sum(longer.to(tl.int32), 0)


@triton.jit
def scatter_kernel(
    index_ptr,  # [last - first, Hkv, COUNT] int32
    rank_ptr,  # [Hkv, chunk * COUNT] int32
    offsets_ptr,  # [Hkv, bins] int32
    list_ptr,  # [Hkv, chunk * COUNT] int32: token (inside the chunk) * COUNT + slot
    cu_seqlens,
    first: tl.int32,
    last: tl.int32,
    heads: tl.int32,
    batch: tl.int32,
    seqlen: tl.int32,
    bins: tl.int32,
    chunk: tl.int32,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    head = tl.program_id(1)
    b, tile = locate(tl.program_id(0), cu_seqlens, batch, seqlen, first, last, 1, TOKENS)
    start = sequence_start(cu_seqlens, b, seqlen)
    end = tl.minimum(sequence_start(cu_seqlens, b + 1, seqlen), last)
    token = tl.maximum(start, first) + tile * TOKENS + tl.arange(0, TOKENS)
    slot = tl.arange(0, SLOTS)
    exists = (token < end)[:, None] & (slot < COUNT)[None, :]
    entry = ((token - first).to(tl.int64) * heads + head)[:, None] * COUNT + slot
    block = tl.load(index_ptr + entry, mask=exists, other=-1)
    current = (token - start) // BLOCK
    keep = exists & listed(block, current[:, None], INITIAL, LOCAL)
    local = (token - first)[:, None] * COUNT + slot
    lists = head.to(tl.int64) * chunk * COUNT
    rank = tl.load(rank_ptr + lists + local, mask=keep, other=0)
    offset = tl.load(offsets_ptr + head * bins + start // BLOCK + b + block, mask=keep, other=0)
    tl.store(list_ptr + lists + offset + rank, local, mask=keep)


@triton.jit
def find_bin(bin_, cu_seqlens, batch, seqlen, BLOCK: tl.constexpr):
    """The sequence whose blocks include a bin."""
    low = 0
    high = batch - 1
    while low < high:
        middle = (low + high + 1) // 2
        if sequence_start(cu_seqlens, middle, seqlen) // BLOCK + middle <= bin_:
            low = middle
        else:
            high = middle - 1
    return low


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
    scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision="ieee")
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
    dq_tail = tl.dot(ds, k_tail, dq_tail, input_precision="ieee")
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
    scores = tl.dot(k_tail, tl.trans(q_tail), scores, input_precision="ieee")
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
    dk_tail = tl.dot(ds, q_tail, dk_tail, input_precision="ieee")
    return dk, dk_tail, dv, dv_tail, ds


@triton.jit
def load_numbers(lse_ptr, delta_ptr, gate_ptr, place, mask):
    """lse (in the log2 domain), delta and gate of some rows; rows whose mask is false get 0, and add nothing."""
    lse = tl.load(lse_ptr + place, mask=mask, other=0.0) * 1.4426950408889634
    return lse, tl.load(delta_ptr + place, mask=mask, other=0.0), tl.load(gate_ptr + place, mask=mask, other=0.0)


@triton.jit
def selected_attention_bwd_dkv_kernel(
    q_ptr,  # [last - first, Hq, D_QK]
    k_ptr,  # [T, Hkv, D_QK]
    v_ptr,  # [T, Hkv, D_V]
    do_ptr,  # [last - first, Hq, D_V]
    lse_ptr,  # [last - first, Hq] fp32, natural log
    delta_ptr,  # [last - first, Hq] fp32
    gate_ptr,  # [last - first, Hq] fp32
    counts_ptr,  # [Hkv, bins] int32
    offsets_ptr,  # [Hkv, bins] int32
    records_ptr,  # [Hkv, max_records, 2] int32
    totals_ptr,  # [Hkv] int32
    list_ptr,  # [Hkv, chunk * COUNT] int32
    part_ptr,  # [Hkv, COUNT, chunk, BLOCK, G]: gate * ds
    dk_ptr,  # [T, Hkv, D_QK] fp32
    dv_ptr,  # [T, Hkv, D_V] fp32
    cu_seqlens,
    scale: tl.float32,
    first: tl.int32,
    heads: tl.int32,
    batch: tl.int32,
    seqlen: tl.int32,
    bins: tl.int32,
    chunk: tl.int32,
    max_records: tl.int32,
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
    COUNT: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LOCAL: tl.constexpr,
):
    """One record: up to ENTRIES queries that chose one block, and their part of its dk and dv."""
    head = tl.program_id(1)
    if tl.program_id(0) >= tl.load(totals_ptr + head):
        return
    record = head.to(tl.int64) * max_records + tl.program_id(0)
    bin_ = tl.load(records_ptr + record * 2)
    entry0 = tl.load(records_ptr + record * 2 + 1)
    entries = tl.minimum(tl.load(counts_ptr + head * bins + bin_) - entry0, ENTRIES)
    entry_list = list_ptr + head.to(tl.int64) * chunk * COUNT + tl.load(offsets_ptr + head * bins + bin_) + entry0
    b = find_bin(bin_, cu_seqlens, batch, seqlen, BLOCK)
    start = sequence_start(cu_seqlens, b, seqlen)
    end = sequence_start(cu_seqlens, b + 1, seqlen)
    column = tl.arange(0, BLOCK)
    key = start + (bin_ - (start // BLOCK + b)) * BLOCK + column  # packed token
    held = key < end
    k_head = k_ptr + head * stride_kh
    v_head = v_ptr + head * stride_vh
    k_rows = key.to(tl.int64) * stride_kt
    v_rows = key.to(tl.int64) * stride_vt
    k = load_rows(k_head, k_rows, held, D_QK, 0, DQ, True)
    v = load_rows(v_head, v_rows, held, D_V, 0, DV, True)
    dk = tl.zeros([BLOCK, DQ], tl.float32)
    dv = tl.zeros([BLOCK, DV], tl.float32)
    k_tail = load_rows(k_head, k_rows, held, D_QK, DQ, DQ_TAIL, True)
    dk_tail = tl.zeros([BLOCK, DQ_TAIL], tl.float32)
    v_tail = None
    dv_tail = tl.zeros([BLOCK], tl.float32)
    qk_scale = scale * 1.4426950408889634

    # 64-bit bases, 32-bit offsets: the host keeps a chunk's rows and a head's slots below 2^31 elements.
    q_head = q_ptr + head * G * stride_qh
    do_head = do_ptr + head * G * stride_doh
    q_step = tl.multiple_of(stride_qt.to(tl.int32), 8)
    q_member = tl.multiple_of(stride_qh.to(tl.int32), 8)
    do_step = tl.multiple_of(stride_dot.to(tl.int32), 8)
    do_member = tl.multiple_of(stride_doh.to(tl.int32), 8)
    part_head = part_ptr + head.to(tl.int64) * COUNT * chunk * G * BLOCK
    for row0 in tl.range(0, entries * G, BLOCK_M):
        row = row0 + tl.arange(0, BLOCK_M)
        valid = row < entries * G
        entry = tl.load(entry_list + row // G, mask=valid, other=0)
        token = entry // COUNT
        member = row % G
        q_rows = token * q_step + member * q_member
        do_rows = token * do_step + member * do_member
        q = load_rows(q_head, q_rows, valid, D_QK, 0, DQ, True)
        do = load_rows(do_head, do_rows, valid, D_V, 0, DV, True)
        q_tail = load_rows(q_head, q_rows, valid, D_QK, DQ, DQ_TAIL, True)
        do_tail = None
        lse, delta, gate = load_numbers(lse_ptr, delta_ptr, gate_ptr, token * (heads * G) + head * G + member, valid)
        seen = (key[:, None] <= (first + token)[None, :]) & valid[None, :]
        dk, dk_tail, dv, dv_tail, ds = dkv_step(
            k, k_tail, v, v_tail, dk, dk_tail, dv, dv_tail, q, q_tail, do, do_tail, lse, delta, gate, seen, None, qk_scale, LOCAL == 0
        )  # fmt: skip
        place = (entry % COUNT * chunk + token) * (BLOCK * G) + member
        tl.store(part_head + place[None, :] + column[:, None] * G, ds, mask=valid[None, :], cache_modifier=".cs")
    out = key.to(tl.int64) * heads + head
    place = (out * D_QK)[:, None] + tl.arange(0, DQ)
    tl.atomic_add(dk_ptr + place, dk * scale, mask=held[:, None], sem="relaxed")
    column = DQ + tl.arange(0, DQ_TAIL)
    place = (out * D_QK)[:, None] + column
    tl.atomic_add(dk_ptr + place, dk_tail * scale, mask=held[:, None] & (column < D_QK), sem="relaxed")
    place = (out * D_V)[:, None] + tl.arange(0, DV)
    tl.atomic_add(dv_ptr + place, dv, mask=held[:, None], sem="relaxed")


@triton.jit
def selected_attention_bwd_dq_kernel(
    part_ptr,  # [Hkv, COUNT, chunk, BLOCK, G]: gate * ds
    k_ptr,  # [T, Hkv, D_QK], or its descriptor
    index_ptr,  # [last - first, Hkv, COUNT] int32, ascending, -1 last
    dq_ptr,  # [last - first, Hq, D_QK], contiguous
    dq_add_ptr,  # as dq, or None
    cu_seqlens,
    scale: tl.float32,
    first: tl.int32,
    last: tl.int32,
    heads: tl.int32,
    batch: tl.int32,
    seqlen: tl.int32,
    chunk: tl.int32,
    stride_kt: tl.int64,
    stride_kh: tl.int64,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D_QK: tl.constexpr,
    DQ: tl.constexpr,
    DQ_TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    SLOTS: tl.constexpr,
    LOCAL: tl.constexpr,
    TYPES: tl.constexpr,
):
    """dq of one token and KV head: its blocks' ds, times their K, which comes from L2."""
    head = tl.program_id(1)
    local = last - first - 1 - tl.program_id(0)  # late queries have the most blocks: they go first
    b = find_sequence(first + local, cu_seqlens, batch, seqlen)
    start = sequence_start(cu_seqlens, b, seqlen)
    length = sequence_start(cu_seqlens, b + 1, seqlen) - start
    member = tl.arange(0, G_PAD)
    valid = member < G
    slots = tl.arange(0, SLOTS)
    indices = tl.load(index_ptr + (local.to(tl.int64) * heads + head) * COUNT + slots, mask=slots < COUNT, other=-1)
    column = tl.arange(0, BLOCK)
    part = part_ptr + (head.to(tl.int64) * COUNT * chunk + local) * (BLOCK * G)
    places = column[:, None] * G + member[None, :]
    slot_size = (chunk * (BLOCK * G)).to(tl.int64)
    k_head = k_ptr + start.to(tl.int64) * stride_kt + head * stride_kh
    k_rows = column * tl.multiple_of(stride_kt.to(tl.int32), 8)
    dq = tl.zeros([DQ, G_PAD], tl.float32)  # the head dim fills the tensor core's rows
    dq_tail = tl.zeros([DQ_TAIL, G_PAD], tl.float32)
    for slot in range(0, tl.sum((indices >= 0).to(tl.int32), 0) - LOCAL):  # local blocks come last
        block = tl.sum(tl.where(slots == slot, indices, 0), 0)
        inside = block * BLOCK + column < length
        k = load_rows(k_head + block * BLOCK * stride_kt, k_rows, inside, D_QK, 0, DQ, LOCAL == 0)
        ds = tl.load(part + slot * slot_size + places, mask=valid[None, :], other=0.0)
        dq = tl.dot(tl.trans(k), ds, dq, input_precision="ieee")
        k_tail = load_rows(k_head + block * BLOCK * stride_kt, k_rows, inside, D_QK, DQ, DQ_TAIL, LOCAL == 0)
        dq_tail = tl.dot(tl.trans(k_tail), ds, dq_tail, input_precision="ieee")
    place = local.to(tl.int64) * (heads * G) + head * G + member
    store_rows(dq_ptr, dq_add_ptr, place * D_QK, valid, tl.trans(dq) * scale, D_QK, 0, DQ)
    store_rows(dq_ptr, dq_add_ptr, place * D_QK, valid, tl.trans(dq_tail) * scale, D_QK, DQ, DQ_TAIL)


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
_D_QK = 192
_D_V = 128
_BLOCK = 64
_COUNT = 16
_ENTRIES = 128
_TOKENS = 64  # tokens a program of the list kernels: small, they are bound by memory latency
_qk_dims = {"D_QK": _D_QK, "DQ": 128, "DQ_TAIL": 64}
_dims = {"G": _GROUP, **_qk_dims, "D_V": _D_V, "DV": 128, "DV_TAIL": 0}
_blocks = {"BLOCK": _BLOCK, "COUNT": _COUNT}
# Initial blocks go through the lists like any other: records keep them from being one program's.
_lists = {**_blocks, "INITIAL": 0, "SLOTS": 16, "TOKENS": _TOKENS}
_count = Launcher(count_kernel, _lists, num_warps=4)
_plan = Launcher(plan_kernel, {"ENTRIES": _ENTRIES, "BINS": 1024}, num_warps=8)
_scatter = Launcher(scatter_kernel, _lists, num_warps=4)
_dkv = Launcher(
    selected_attention_bwd_dkv_kernel,
    {**_dims, **_blocks, "ENTRIES": _ENTRIES, "BLOCK_M": 16},
    num_warps=4,
    num_stages=1,
    maxnreg=None,
)
_dq_dims = {"G": _GROUP, **_qk_dims}
_dq = Launcher(
    selected_attention_bwd_dq_kernel,
    {**_dq_dims, "G_PAD": 16, **_blocks, "SLOTS": 16},
    num_warps=1,
    num_stages=2,
)


def _bins(tokens, batch):
    """Lists of a head: one for each block of each sequence, and a few so that slices stay 16-byte aligned."""
    return (tokens // _BLOCK + batch + 3) // 4 * 4


def selected_attention_bwd(
    q, k, v, block_indices, do, lse, delta, gate, dq, dk, dv, dq_add, scale, workspace_bytes, cu_seqlens, batch, max_seqlen, local=0
):
    """Gradients of gate * attention over chosen blocks (paper eq. 12), given those of that product.

    Queries go in chunks whose scratch stays below workspace_bytes, or of 64 where even those do not fit.

    Args:
        q, k, v, block_indices: as for the forward.
        do: [T, Hq, D_V], last dim contiguous, strides multiples of 8 elements.
        lse, delta: [T, Hq] fp32 contiguous: the forward's lse (natural log), and do @ o less the gradient of lse, without the gate.
        gate: [T, Hq] fp32 contiguous.
        dq: [T, Hq, D_QK] contiguous, written: the gradient plus dq_add.
        dk, dv: [T, Hkv, D_QK], [T, Hkv, D_V] contiguous, written. They are summed up in fp32: of another dtype, in scratch memory.
        dq_add: None, or contiguous as dq; may be dq itself.
        local: how many blocks of a query, its own the last, are left out: of indices as ``select_topk`` makes them.
    """
    queries, heads, device = q.shape[0], k.shape[1], q.device
    keys = k
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *do.stride()[:2])
    out = dk, dv
    if dk.dtype != torch.float32:
        dk, dv = (torch.empty(x.shape, dtype=torch.float32, device=device) for x in out)
    dk.zero_()
    dv.zero_()
    # Scratch of a query: two list entries (for "slots" also its partial results), its share of the records.
    bins = _bins(k.shape[0], batch)
    slot_elements = _COUNT * _GROUP * _BLOCK
    slot_bytes = slot_elements * q.element_size()
    query_bytes = heads * (slot_bytes + _COUNT * 8 + -(-_COUNT * 8 // _ENTRIES))
    fixed = heads * bins * 48
    query_elements = max(q.stride(0), do.stride(0), slot_elements, _COUNT)
    most = min((workspace_bytes - fixed) // query_bytes, (2**31 - 1) // query_elements, 65536)
    most = max(most // _TOKENS, 1) * _TOKENS
    chunks = -(-max(queries, 1) // most)
    chunk = -(-max(queries, 1) // (chunks * _TOKENS)) * _TOKENS
    max_records = (chunk * _COUNT // _ENTRIES + bins + 1) // 2 * 2
    # Whole multiples of 16 bytes: rank and place of list entries [heads, chunk * count], counters of lists [heads, bins, 8], length
    # and begin of lists [heads, bins], records [heads, max_records, 2], and how many [heads].
    sizes = [heads * n for n in (chunk * _COUNT, chunk * _COUNT, bins * 8, bins, bins, max_records * 2, 1)]
    scratch = torch.empty((sum(sizes),), dtype=torch.int32, device=device)
    rank, entries, counters, counts, offsets, records, totals = scratch.split(sizes)
    part = torch.empty((heads, chunk, slot_elements), dtype=q.dtype, device=device)
    rows_of = (q, do, lse, delta, gate, block_indices, dq, dq_add)
    for begin in range(0, queries, chunk):
        end = min(begin + chunk, queries)
        if end - begin < queries:
            q, do, lse, delta, gate, block_indices, dq, dq_add = (None if x is None else x[begin:end] for x in rows_of)
        where = (cu_seqlens, begin, end, heads, batch, max_seqlen)
        list_grid = ((end - begin) // _TOKENS + batch, heads)
        counters.zero_()
        _count(list_grid, block_indices, counters, rank, *where, bins, chunk, LOCAL=local)
        _plan((heads, 16), counters, counts, offsets, records, totals, bins, max_records)
        _scatter(list_grid, block_indices, rank, offsets, entries, *where, bins, chunk, LOCAL=local)
        _dkv(
            (max_records, heads),
            q, k, v, do, lse, delta, gate, counts, offsets, records, totals, entries, part, dk, dv, cu_seqlens,
            scale, begin, heads, batch, max_seqlen, bins, chunk, max_records, *strides, LOCAL=local,
        )  # fmt: skip
        _dq(
            (end - begin, heads),
            part, keys, block_indices, dq, dq_add, cu_seqlens, scale, begin, end, heads, batch, max_seqlen, chunk, *k.stride()[:2],
            LOCAL=local, TYPES=types(dq_add),
        )  # fmt: skip
    if dk is not out[0]:
        add_up(dk, 1, None, out[0])
        add_up(dv, 1, None, out[1])
