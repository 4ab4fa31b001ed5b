"""select_topk, rendered by nsa-gen from templates/select_topk.py.jinja. Do not edit: change the template.

problem e3236beab644: selection_block=64 count=16 initial=1 local=2 varlen=False
config  79e9eb27f075: BLOCK_ROWS=1 maxnreg=None method=resident num_warps=1
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
def chosen_always(column, current, INITIAL: tl.constexpr, LOCAL: tl.constexpr):
    """Whether a block is chosen whatever its score: the first INITIAL and the LOCAL ending with the query's own."""
    return (column <= current) & ((column < INITIAL) | (column > current - LOCAL))


@triton.jit
def load_keys(rows, column, current, INITIAL: tl.constexpr, LOCAL: tl.constexpr):
    """int32 keys in the order of the fp32 scores, -2**31 (below every score's) where there is nothing to search.

    Negative floats order backwards as integers, hence the flip. -0 equals 0; NaN counts as -inf.
    """
    searched = (column <= current) & (column >= INITIAL) & (column <= current - LOCAL)
    score = tl.load(rows + column, mask=searched, other=0.0)
    score = tl.where(score == score, score, -float("inf"))
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(searched, bits ^ ((bits >> 31) & 0x7FFFFFFF), -2147483648)


@triton.jit
def best_of_groups(key, GROUPS: tl.constexpr):
    """Largest key in each of GROUPS disjoint sets of columns, [ROWS, GROUPS]."""
    return tl.max(tl.reshape(key, [key.shape[0], key.shape[1] // GROUPS, GROUPS]), 1)


@triton.jit
def interval(best, current, FREE: tl.constexpr, COUNT: tl.constexpr):
    """First interval [low, high) of the threshold: at least FREE keys are >= low, fewer are >= high.

    GROUPS >= FREE sets hold a key >= the least of their maxima. Rows with no more blocks than slots take all: nothing to halve.
    """
    low = tl.maximum(tl.min(best, 1), -2147483647)
    high = tl.max(best, 1) + 1
    everything = current < COUNT
    return tl.where(everything, -2147483647, low), tl.where(everything, -2147483646, high)


@triton.jit
def midpoint(low, high):
    """Without overflow; `low` itself once the interval is one key wide."""
    return (low >> 1) + (high >> 1) + (low & high & 1)


@triton.jit
def halve(low, high, above, middle, at_least, FREE: tl.constexpr):
    """The half that holds the threshold, given how many keys are >= middle. `above` counts the keys >= high while halving."""
    enough = at_least >= FREE
    above = tl.where(enough, above, at_least)
    low = tl.where(enough, middle, low)
    high = tl.where(enough, high, middle)
    high = tl.where(at_least == FREE, low + 1, high)  # exactly FREE: which of them tie no longer matters
    return low, high, above


@triton.jit
def emit(
    out, key, column, current, low, above, carry, valid,
    INITIAL: tl.constexpr, LOCAL: tl.constexpr, FREE: tl.constexpr,
):  # fmt: skip
    """Store the chosen columns at their rank. Keys equal to the threshold fill what is left, smaller columns first.

    One running sum counts both: chosen for certain in the upper 16 bits, ties in the lower. `carry` [ROWS] continues it.
    """
    certain = chosen_always(column, current, INITIAL, LOCAL) | (key > low)
    tie = key == low
    marks = (certain.to(tl.int32) << 16) | tie.to(tl.int32)
    sums = tl.cumsum(marks, 1) + carry
    ties = sums & 0xFFFF
    left = FREE - above
    rank = (sums >> 16) + tl.minimum(ties, left) - 1
    tl.store(out + rank, tl.zeros_like(rank) + column, mask=valid & (certain | (tie & (ties <= left))))
    return tl.sum(marks, 1)


@triton.jit
def pick_resident(
    rows, out, current, valid,
    COUNT: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Choose among at most WIDTH columns; their keys stay in registers."""
    FREE: tl.constexpr = COUNT - INITIAL - LOCAL
    column = tl.arange(0, WIDTH)[None, :]
    key = load_keys(rows, column, current[:, None], INITIAL, LOCAL)
    low, high = interval(best_of_groups(key, GROUPS), current, FREE, COUNT)
    above = tl.zeros_like(low)
    while tl.max((low + 1 < high).to(tl.int32), 0) > 0:
        middle = midpoint(low, high)
        at_least = tl.sum((key >= middle[:, None]).to(tl.int32), 1)
        low, high, above = halve(low, high, above, middle, at_least, FREE)
    emit(out, key, column, current[:, None], low[:, None], above[:, None], 0, valid, INITIAL, LOCAL, FREE)


@triton.jit
def pick_streamed(
    rows, out, current, valid,
    COUNT: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, GROUPS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Choose among any number of columns, SEGMENT at a time: every step reads the row again (from L1 or L2)."""
    FREE: tl.constexpr = COUNT - INITIAL - LOCAL
    columns = tl.max(current, 0) + 1
    best = tl.full([current.shape[0], GROUPS], -2147483648, tl.int32)
    for base in range(0, columns, SEGMENT):
        column = base + tl.arange(0, SEGMENT)[None, :]
        best = tl.maximum(best, best_of_groups(load_keys(rows, column, current[:, None], INITIAL, LOCAL), GROUPS))
    low, high = interval(best, current, FREE, COUNT)
    above = tl.zeros_like(low)
    while tl.max((low + 1 < high).to(tl.int32), 0) > 0:
        middle = midpoint(low, high)
        at_least = tl.zeros_like(low)
        for base in range(0, columns, SEGMENT):
            column = base + tl.arange(0, SEGMENT)[None, :]
            key = load_keys(rows, column, current[:, None], INITIAL, LOCAL)
            at_least += tl.sum((key >= middle[:, None]).to(tl.int32), 1)
        low, high, above = halve(low, high, above, middle, at_least, FREE)
    carry = tl.zeros_like(low)
    for base in range(0, columns, SEGMENT):
        column = base + tl.arange(0, SEGMENT)[None, :]
        key = load_keys(rows, column, current[:, None], INITIAL, LOCAL)
        carry += emit(out, key, column, current[:, None], low[:, None], above[:, None], carry[:, None], valid, INITIAL, LOCAL, FREE)
        # Ties past what a row can take do not count: the lower half never overflows into the upper.
        carry = (carry & 0x7FFF0000) | tl.minimum(carry & 0xFFFF, 0x7FFF)


@triton.jit
def select_topk_kernel(
    scores_ptr,  # [last - first, Hkv, blocks] fp32, contiguous; defined for columns <= position // BLOCK
    index_ptr,  # [T, Hkv, COUNT] int32, contiguous
    cu_seqlens,  # [B + 1] int32, or None
    first: tl.int32,
    last: tl.int32,
    heads: tl.int32,
    blocks: tl.int32,
    batch: tl.int32,
    seqlen: tl.int32,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    SLOTS: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    head = tl.program_id(1)
    b, tile = locate(tl.program_id(0), cu_seqlens, batch, seqlen, first, last, 1, ROWS)
    start = sequence_start(cu_seqlens, b, seqlen)
    end = tl.minimum(sequence_start(cu_seqlens, b + 1, seqlen), last)
    token0 = tl.maximum(start, first) + tile * ROWS
    if token0 >= end:
        return
    valid = (token0 + tl.arange(0, ROWS) < end)[:, None]
    token = tl.minimum(token0 + tl.arange(0, ROWS), end - 1)
    current = (token - start) // BLOCK  # the query's own block: its last candidate
    rows = scores_ptr + ((token - first).to(tl.int64) * heads + head)[:, None] * blocks
    out = index_ptr + (token.to(tl.int64) * heads + head)[:, None] * COUNT
    slot = tl.arange(0, SLOTS)[None, :]
    tl.store(out + slot, tl.full([ROWS, SLOTS], -1, tl.int32), mask=valid & (slot > current[:, None]) & (slot < COUNT))
    if RESIDENT:
        # Early queries have few candidates: they do not pay for the width of the last ones.
        newest = tl.max(current, 0)
        if newest < WIDTH // 4:
            pick_resident(rows, out, current, valid, COUNT, INITIAL, LOCAL, GROUPS, WIDTH // 4)
        elif newest < WIDTH // 2:
            pick_resident(rows, out, current, valid, COUNT, INITIAL, LOCAL, GROUPS, WIDTH // 2)
        else:
            pick_resident(rows, out, current, valid, COUNT, INITIAL, LOCAL, GROUPS, WIDTH)
    else:
        pick_streamed(rows, out, current, valid, COUNT, INITIAL, LOCAL, GROUPS, WIDTH)


_BLOCK = 64
_ROWS = 1
_GROUPS = 16
_CONSTANTS = {
    "BLOCK": _BLOCK,
    "COUNT": 16,
    "SLOTS": 16,
    "INITIAL": 1,
    "LOCAL": 2,
    "GROUPS": _GROUPS,
    "ROWS": _ROWS,
}
_SEGMENT = max(2048, _GROUPS)
_stream = Launcher(select_topk_kernel, {**_CONSTANTS, "WIDTH": _SEGMENT, "RESIDENT": False}, num_warps=4)
_WARPS = 1
# Wider rows take more warps: a thread holds 32 keys at most.
_resident = {
    warps: Launcher(select_topk_kernel, {**_CONSTANTS, "RESIDENT": True}, num_warps=warps, maxnreg=None)
    for warps in (1, 2, 4, 8, 16)
}


def select_topk(scores, block_indices, token_start, token_stop, cu_seqlens, batch, max_seqlen):
    """The blocks of every query in [token_start, token_stop): forced ones, then by score, ties to the smaller index (paper eq. 11).

    scores fp32 [token_stop-token_start, Hkv, NB] contiguous, NB >= cdiv(max_seqlen, l')
    → block_indices int32 [T,Hkv,n] contiguous: ascending, distinct, -1 last; rows outside the range of tokens stay as they are.
    """
    heads = scores.shape[1]
    args = (scores, block_indices, cu_seqlens, token_start, token_stop, heads, scores.shape[2], batch, max_seqlen)
    grid = ((token_stop - token_start) // _ROWS + batch, heads)
    width = max(triton.next_power_of_2(triton.cdiv(max_seqlen, _BLOCK)), 4 * _GROUPS, 128)
    warps = max(_WARPS, _ROWS * width // 1024)
    if warps <= 16:
        _resident[warps](grid, *args, WIDTH=width)
        return
    _stream(grid, *args)
