"""selected_attention_fwd, rendered by nsa-gen from templates/selected_attention_fwd.py.jinja. Do not edit: change the template.

problem 5ab03fb1aa74: dtype=bfloat16 group=16 head_dim_qk=128 head_dim_v=128 selection_block=64 count=16 initial=1 local=2 varlen=False
config  f74abceb0e1e: CHUNK=8192 DENSE_M=64 ENTRIES=128 GATHER_M=64 MERGE_M=2 dense_registers=168 dense_stages=1 dense_warps=4
    gather_registers=128 gather_stages=1 gather_warps=4 loop=kv_outer merge_registers=None merge_warps=1
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
def gather_kernel(
    q_ptr,  # [last - first, Hq, D_QK]
    k_ptr,  # [T, Hkv, D_QK]
    v_ptr,  # [T, Hkv, D_V]
    counts_ptr,  # [Hkv, bins] int32
    offsets_ptr,  # [Hkv, bins] int32
    records_ptr,  # [Hkv, max_records, 2] int32
    totals_ptr,  # [Hkv] int32
    list_ptr,  # [Hkv, chunk * COUNT] int32
    part_ptr,  # [Hkv, slots, chunk, G, D_V]: normalised partial outputs
    part_lse_ptr,  # [Hkv, slots, chunk, G] fp32: log2 domain
    cu_seqlens,
    scale: tl.float32,
    first: tl.int32,
    batch: tl.int32,
    seqlen: tl.int32,
    bins: tl.int32,
    chunk: tl.int32,
    max_records: tl.int32,
    slots: tl.int32,
    slot0: tl.int32,  # the place in block_indices of the first slot
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
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One record: up to ENTRIES queries that chose one block, their partial output and lse over it."""
    head = tl.program_id(1)
    if tl.program_id(0) >= tl.load(totals_ptr + head):
        return
    record = records_ptr + (head.to(tl.int64) * max_records + tl.program_id(0)) * 2
    bin_ = tl.load(record)
    entry0 = tl.load(record + 1)
    entries = tl.minimum(tl.load(counts_ptr + head * bins + bin_) - entry0, ENTRIES)
    entry_list = list_ptr + head.to(tl.int64) * chunk * COUNT + tl.load(offsets_ptr + head * bins + bin_) + entry0
    b = find_bin(bin_, cu_seqlens, batch, seqlen, BLOCK)
    start = sequence_start(cu_seqlens, b, seqlen)
    block = bin_ - (start // BLOCK + b)
    key = block * BLOCK + tl.arange(0, BLOCK)
    dq = tl.arange(0, DQ)
    dv = tl.arange(0, DV)
    k_rows = k_ptr + (start + key).to(tl.int64)[:, None] * stride_kt + head * stride_kh
    v_rows = v_ptr + (start + key).to(tl.int64)[:, None] * stride_vt + head * stride_vh

    k = tl.load(k_rows + dq)  # [BLOCK, DQ]
    v = tl.load(v_rows + dv)  # [BLOCK, DV]
    qk_scale = scale * 1.4426950408889634

    # 64-bit bases, 32-bit offsets: the host keeps a chunk's q and a head's partial outputs below 2^31 elements.
    q_head = q_ptr + head * G * stride_qh
    part_head = part_ptr + head.to(tl.int64) * slots * chunk * G * D_V
    part_lse_head = part_lse_ptr + head.to(tl.int64) * slots * chunk * G
    q_step = tl.multiple_of(stride_qt.to(tl.int32), 8)
    q_member = tl.multiple_of(stride_qh.to(tl.int32), 8)
    row = tl.arange(0, BLOCK_M)
    entry = tl.load(entry_list + row // G, mask=row < entries * G, other=0)
    for row0 in range(0, entries * G, BLOCK_M):
        row = row0 + tl.arange(0, BLOCK_M)
        member = row % G
        valid = row < entries * G
        next_row = row + BLOCK_M  # loaded a tile ahead: q's address waits for it
        next_entry = tl.load(entry_list + next_row // G, mask=next_row < entries * G, other=0)
        token = entry // COUNT
        q_rows = q_head + (token * q_step + member * q_member)[:, None]
        q = tl.load(q_rows + dq, mask=valid[:, None], other=0.0)  # [BLOCK_M, DQ]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK]
        top = tl.max(scores, 1) * qk_scale  # finite: every listed query sees the block's first key
        prob = tl.exp2(scores * qk_scale - top[:, None])
        total = tl.sum(prob, 1)
        place = ((entry % COUNT - slot0) * chunk + token) * G + member
        inverse = (1.0 / total)[:, None]  # a division an element would cost more than the dots
        out = tl.dot(prob.to(v.dtype), v, input_precision="ieee") * inverse
        tl.store(part_head + place[:, None] * D_V + dv, out.to(part_ptr.dtype.element_ty), mask=valid[:, None], cache_modifier=".cs")
        tl.store(part_lse_head + place, top + tl.log2(total), mask=valid)
        entry = next_entry


@triton.jit
def dense_kernel(
    q_ptr,  # [last - first, Hq, D_QK]
    k_ptr,  # [T, Hkv, D_QK]
    v_ptr,  # [T, Hkv, D_V]
    index_ptr,  # [last - first, Hkv, COUNT] int32
    part_ptr,  # [Hkv, COUNT + 1, chunk, G, D_V]
    part_lse_ptr,  # [Hkv, COUNT + 1, chunk, G] fp32
    cu_seqlens,
    scale: tl.float32,
    first: tl.int32,
    last: tl.int32,
    heads: tl.int32,
    batch: tl.int32,
    seqlen: tl.int32,
    chunk: tl.int32,
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
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    SLOTS: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Attend to the dense blocks; the result is one more partial output, in slot COUNT. Slots that no list fills get no weight."""
    head = tl.program_id(1)
    b, tile = locate(tl.program_id(0), cu_seqlens, batch, seqlen, first, last, G, BLOCK_M)
    start = sequence_start(cu_seqlens, b, seqlen)
    end = sequence_start(cu_seqlens, b + 1, seqlen)
    tile_first = tl.maximum(start, first)
    rows = (tl.minimum(end, last) - tile_first) * G
    if tile * BLOCK_M >= rows:
        return
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < rows
    token = tile_first + tl.minimum(row, rows - 1) // G
    member = row % G
    position = token - start
    current = position // BLOCK
    length = end - start
    dq = tl.arange(0, DQ)
    dv = tl.arange(0, DV)
    q_rows = q_ptr + ((token - first).to(tl.int64) * stride_qt + (head * G + member) * stride_qh)[:, None]
    q = tl.load(q_rows + dq, mask=valid[:, None], other=0.0)
    slot = tl.arange(0, SLOTS)
    indices = index_ptr + ((token - first).to(tl.int64) * heads + head) * COUNT
    chosen = tl.load(indices[:, None] + slot, mask=valid[:, None] & (slot < COUNT), other=-1)  # [BLOCK_M, SLOTS]

    qk_scale = scale * 1.4426950408889634
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    k_head = k_ptr + start.to(tl.int64) * stride_kt + head * stride_kh
    v_head = v_ptr + start.to(tl.int64) * stride_vt + head * stride_vh
    # The tile's dense blocks: the initial ones, then from the first row's first local block to the last row's own.
    newest = tl.max(current, 0)
    oldest = tl.maximum(tl.min(current, 0) - LOCAL + 1, 0)
    initial = tl.minimum(oldest, INITIAL)
    for step in range(0, initial + newest + 1 - oldest):
        block = tl.where(step < initial, step, oldest + step - initial)
        is_chosen = tl.max((chosen == block).to(tl.int32), 1) > 0
        attended = is_chosen & (block <= current) & dense(block, current, INITIAL, LOCAL)
        key = block * BLOCK + tl.arange(0, BLOCK)
        inside = (key < length)[:, None]
        k_rows = k_head + key[:, None] * stride_kt
        v_rows = v_head + key[:, None] * stride_vt
        k = tl.load(k_rows + dq, mask=inside, other=0.0)
        v = tl.load(v_rows + dv, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        visible = attended[:, None] & (key[None, :] <= position[:, None])
        scores = tl.where(visible, scores * qk_scale, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
        prob = tl.exp2(scores - safe_top[:, None])
        rescale = tl.exp2(top - safe_top)
        total = total * rescale + tl.sum(prob, 1)
        acc = tl.dot(prob.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        top = new_top

    slots = head.to(tl.int64) * (COUNT + 1) * chunk * G + (token - first) * G + member
    unfilled = valid[:, None] & (slot < COUNT) & (listed(chosen, current[:, None], INITIAL, LOCAL) == 0)
    tl.store(part_lse_ptr + slots[:, None] + slot.to(tl.int64) * chunk * G, -float("inf"), mask=unfilled)
    place = slots + COUNT * (chunk * G).to(tl.int64)
    inverse = tl.where(total > 0, 1.0 / total, 0.0)
    out = (acc * inverse[:, None]).to(part_ptr.dtype.element_ty)
    tl.store(part_ptr + place[:, None] * D_V + dv, out, mask=valid[:, None])
    tl.store(part_lse_ptr + place, tl.where(total > 0, top + tl.log2(total), -float("inf")), mask=valid)


@triton.jit
def merge_kernel(
    part_ptr,  # [Hkv, COUNT + 1, chunk, G, D_V]
    part_lse_ptr,  # [Hkv, COUNT + 1, chunk, G] fp32
    o_ptr,  # [rows // G, Hq, D_V], contiguous
    lse_ptr,  # [rows // G, Hq] fp32, contiguous
    rows: tl.int32,
    heads: tl.int32,
    chunk: tl.int32,
    G: tl.constexpr,
    D_V: tl.constexpr,
    DV: tl.constexpr,
    DV_TAIL: tl.constexpr,
    COUNT: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Add the partial outputs, each weighted from the row's own maximum: safe at any logit."""
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < rows
    slot = tl.arange(0, SLOTS)
    slot_size = chunk * G
    part_head = part_ptr + head.to(tl.int64) * (COUNT + 1) * slot_size * D_V
    part_lse_head = part_lse_ptr + head.to(tl.int64) * (COUNT + 1) * slot_size
    exists = valid[:, None] & (slot <= COUNT)
    part_lse = tl.load(part_lse_head + row[:, None] + slot * slot_size, mask=exists, other=-float("inf"))  # [BLOCK_M, SLOTS]
    top = tl.max(part_lse, 1)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp2(part_lse - top[:, None]), 1)
    inverse = tl.where(total > 0, 1.0 / total, 0.0)

    dv = tl.arange(0, DV)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    for s in tl.static_range(COUNT + 1):  # unrolled: all loads in flight
        part = row + s * slot_size
        weight = tl.exp2(tl.load(part_lse_head + part, mask=valid, other=-float("inf")) - top) * inverse
        used = (weight > 0)[:, None]  # what has no weight was never written
        acc += weight[:, None] * tl.load(part_head + part[:, None] * D_V + dv, mask=used, other=0.0)
    token = row // G
    member = row % G
    out = (token.to(tl.int64) * heads + head) * G + member
    o_rows = o_ptr + out[:, None] * D_V
    tl.store(o_rows + dv, acc.to(o_ptr.dtype.element_ty), mask=valid[:, None])
    tl.store(lse_ptr + out, tl.where(total > 0, (top + tl.log2(total)) * 0.6931471805599453, -float("inf")), mask=valid)


_DIMS = {
    "G": 16,
    "D_QK": 128,
    "DQ": 128,
    "DQ_TAIL": 0,
    "D_V": 128,
    "DV": 128,
    "DV_TAIL": 0,
}
_BLOCKS = {"BLOCK": 64, "COUNT": 16}
_FORCED = {"INITIAL": 1, "LOCAL": 2}
_LISTED = 13  # blocks of a query that select_topk chooses by importance
_TOKENS = 64  # tokens a program of the list kernels: small, they are bound by memory latency
_ENTRIES = 128
_DENSE_M = 64
_MERGE_M = 2
_lists = {**_BLOCKS, **_FORCED, "SLOTS": 16}
_count = Launcher(count_kernel, {**_lists, "TOKENS": _TOKENS}, num_warps=4)
_plan = Launcher(plan_kernel, {"ENTRIES": _ENTRIES, "BINS": 1024}, num_warps=8)
_scatter = Launcher(scatter_kernel, {**_lists, "TOKENS": _TOKENS}, num_warps=4)
_gather = Launcher(
    gather_kernel,
    {**_DIMS, **_BLOCKS, "ENTRIES": _ENTRIES, "BLOCK_M": 64},
    num_warps=4,
    num_stages=1,
    maxnreg=128,
)
_dense = Launcher(
    dense_kernel,
    {**_DIMS, **_lists, "BLOCK_M": _DENSE_M},
    num_warps=4,
    num_stages=1,
    maxnreg=168,
)
_merge = Launcher(
    merge_kernel,
    {
        "COUNT": 16,
        "SLOTS": 32,
        "G": 16,
        "D_V": 128,
        "DV": 128,
        "DV_TAIL": 0,
        "BLOCK_M": _MERGE_M,
    },
    num_warps=1,
    maxnreg=None,
)


def workspace(heads, element_size, tokens, batch, rest=False):
    """Scratch of a call: bytes whatever the number of queries, bytes a query of a chunk, most queries of a chunk.

    Args:
        heads: KV heads.
        element_size: bytes of an element of o.
        tokens: packed tokens of k and v.
        batch: sequences.
        rest: whether the call is given one.
    """
    count = _BLOCKS["COUNT"]
    parts = _DIMS["G"] * (_LISTED if rest else count + 1) * (_DIMS["D_V"] * element_size + 4)
    each = heads * (parts + count * 8 + -(-count * 8 // _ENTRIES))
    return heads * _bins(tokens, batch) * 48 + 4096, each, 8192


def _bins(tokens, batch):
    """Lists of a head: one for each block of each sequence, and a few so that slices stay 16-byte aligned."""
    return (tokens // _BLOCKS["BLOCK"] + batch + 3) // 4 * 4


def selected_attention_fwd(
    q, k, v, block_indices, o, lse, scale, workspace_bytes, token_start, cu_seqlens, batch, max_seqlen, rest=None
):
    """Attention of the queries [token_start, token_start + R) over their chosen blocks, through lists of queries per block.

    q [R,Hq,Dqk], k [T,Hkv,Dqk], v [T,Hkv,Dv], block_indices int32 [R,Hkv,n] contiguous → o [R,Hq,Dv], lse [R,Hq] (contiguous).
    Queries go in chunks of at most 8192 whose scratch stays below workspace_bytes, or of 64 where even those do not fit.

    With ``rest``, block_indices must be as ``select_topk`` makes them. Then this writes neither o nor lse: ``rest.merge(begin, end, part,
    part_lse)`` gets each chunk's partial results (see ``sliding_merge_fwd``) and is to make of them what the caller wants.
    """
    queries, heads = q.shape[0], k.shape[1]
    group, count, device = _DIMS["G"], _BLOCKS["COUNT"], q.device
    # Rows that select_topk made begin with the initial blocks and end with the local ones. Of others, any place may list a block, and one
    # more slot is the dense blocks'.
    slots, slot0 = (_LISTED, _FORCED["INITIAL"]) if rest is not None else (count + 1, 0)
    fixed, query_bytes, most = workspace(heads, o.element_size(), k.shape[0], batch, rest is not None)
    query_elements = max(q.stride(0), slots * group * _DIMS["D_V"])  # kernels address a chunk with 32 bits
    most = max(min(most, (workspace_bytes - fixed) // query_bytes, (2**31 - 1) // query_elements) // _TOKENS, 1) * _TOKENS
    chunks = -(-max(queries, 1) // most)
    chunk = -(-max(queries, 1) // (chunks * _TOKENS)) * _TOKENS
    bins = _bins(k.shape[0], batch)
    max_records = (chunk * count // _ENTRIES + bins + 1) // 2 * 2
    part = torch.empty((heads, slots, chunk, group, _DIMS["D_V"]), dtype=o.dtype, device=device)
    part_lse = torch.empty((heads, slots, chunk, group), dtype=torch.float32, device=device)
    # Whole multiples of 16 bytes: rank and place of list entries [heads, chunk * count], counters of lists [heads, bins, 8], length
    # and begin of lists [heads, bins], records [heads, max_records, 2], and how many [heads].
    sizes = [heads * n for n in (chunk * count, chunk * count, bins * 8, bins, bins, max_records * 2, 1)]
    scratch = torch.empty((sum(sizes),), dtype=torch.int32, device=device)
    rank, entries, counters, counts, offsets, records, totals = scratch.split(sizes)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    per_query = (q, block_indices, o, lse)
    for begin in range(0, queries, chunk):
        end = min(begin + chunk, queries)
        first, last = token_start + begin, token_start + end
        if end - begin < queries:
            q, block_indices, o, lse = (x[begin:end] for x in per_query)
        list_grid = ((end - begin) // _TOKENS + batch, heads)
        where = (cu_seqlens, first, last, heads, batch, max_seqlen)
        rows = (end - begin) * group
        counters.zero_()
        _count(list_grid, block_indices, counters, rank, *where, bins, chunk)
        _plan((heads, 16), counters, counts, offsets, records, totals, bins, max_records)
        _scatter(list_grid, block_indices, rank, offsets, entries, *where, bins, chunk)
        _gather(
            (max_records, heads),
            q, k, v, counts, offsets, records, totals, entries, part, part_lse, cu_seqlens,
            scale, first, batch, max_seqlen, bins, chunk, max_records, slots, slot0, *strides,
        )  # fmt: skip
        if rest is not None:
            rest.merge(begin, end, part, part_lse)
            continue
        _dense(
            (rows // _DENSE_M + batch, heads),
            q, k, v, block_indices, part, part_lse, cu_seqlens,
            scale, first, last, heads, batch, max_seqlen, chunk, *strides,
        )  # fmt: skip
        _merge((-(-rows // _MERGE_M), heads), part, part_lse, o, lse, rows, heads, chunk)
