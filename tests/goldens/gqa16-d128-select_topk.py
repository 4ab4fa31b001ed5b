"""select_topk, rendered by nsa-gen from templates/select_topk.py.jinja. Do not edit: change the template.

problem e3236beab644: selection_block=64 count=16 initial=1 local=2 varlen=False
config  852ffd4b9ee0: BLOCK_ROWS=4 WIDTH=16384 maxnreg=64 num_warps=1
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
def order(score):
    """int32 keys in the order of fp32 scores. Negative floats order backwards as integers, hence the flip; its own inverse on bits."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def score_of(key):
    """The fp32 score of a key of `order`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def midpoint(low, high):
    """Without overflow; `low` itself once the interval is one key wide."""
    return (low >> 1) + (high >> 1) + (low & high & 1)


@triton.jit
def columns_of(base, ROUNDS: tl.constexpr, SPAN: tl.constexpr):
    """Columns [ROUNDS, SPAN] of the tile that begins at `base`. Neighbours lie in different lanes: real scores cluster."""
    return base + tl.arange(0, ROUNDS)[:, None] * SPAN + tl.arange(0, SPAN)[None, :]


@triton.jit
def up_to(last, base, ROUNDS: tl.constexpr, SPAN: tl.constexpr):
    """Whether a tile's columns are <= last: one comparison each, and no sum."""
    return tl.arange(0, SPAN)[None, :] <= (last - base - tl.arange(0, ROUNDS) * SPAN)[:, None]


@triton.jit
def load_tile(row, base, last, INITIAL: tl.constexpr, ROUNDS: tl.constexpr, SPAN: tl.constexpr):
    """fp32 scores of a tile, NaN (which no comparison counts) outside of the searched columns, [INITIAL, last]."""
    searched = up_to(last, base, ROUNDS, SPAN) & ~up_to(INITIAL - 1, base, ROUNDS, SPAN)
    return tl.load(row + columns_of(base, ROUNDS, SPAN), mask=searched, other=float("nan"))


@triton.jit
def best_of_tile(score):
    """Order keys of the largest score of each set of columns SPAN apart, [SPAN]. NaN counts as -inf, -0 as 0."""
    best = tl.max(score, 0)
    best = tl.where(best == best, best, -float("inf"))
    return order(tl.where(best == 0.0, 0.0, best))


@triton.jit
def mark(score, threshold, BITS: tl.constexpr):
    """Field r of a word [SPAN] is 1 where round r's score is >= threshold, and 0 elsewhere."""
    one = tl.full([1, 1], 1, tl.uint32) << (BITS * tl.arange(0, score.shape[0])).to(tl.uint32)[:, None]
    return tl.sum(tl.where(score >= threshold, one, 0), 0)


@triton.jit
def ones(marks, BITS: tl.constexpr):
    """How many fields are 1, four words added up at a time: no field overflows."""
    fields = tl.sum(tl.reshape(marks, [4, marks.shape[0] // 4]), 0)
    if BITS == 4:
        fields = (fields & 0x0F0F0F0F) + ((fields >> 4) & 0x0F0F0F0F)
    fields = (fields & 0xFFFF) + (fields >> 16) if BITS == 16 else (fields * 0x01010101) >> 24
    return tl.sum(fields.to(tl.int32), 0)


@triton.jit
def count(
    row, held, threshold, last,
    INITIAL: tl.constexpr, BITS: tl.constexpr, ROUNDS: tl.constexpr, SPAN: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Which of the held scores are >= threshold, as by `mark`, and how many of the row's are."""
    marks = mark(held, threshold, BITS)
    total = ones(marks, BITS)
    if not RESIDENT:
        for base in range(ROUNDS * SPAN, last + 1, ROUNDS * SPAN):
            total += ones(mark(load_tile(row, base, last, INITIAL, ROUNDS, SPAN), threshold, BITS), BITS)
    return marks, total


@triton.jit
def tied(score, base, threshold, last, INITIAL: tl.constexpr, ROUNDS: tl.constexpr, SPAN: tl.constexpr):
    """Which columns up to `last` tie at the threshold. NaN counts as -inf."""
    column = columns_of(base, ROUNDS, SPAN)
    clean = tl.where(score == score, score, -float("inf"))
    return (clean == threshold) & (column >= INITIAL) & (column <= last)


@triton.jit
def count_tied(
    row, held, threshold, cut, last,
    INITIAL: tl.constexpr, ROUNDS: tl.constexpr, SPAN: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """How many columns up to `cut` tie at the threshold."""
    tie = tied(held, 0, threshold, cut, INITIAL, ROUNDS, SPAN)
    total = tl.sum(tie.to(tl.int32))
    if not RESIDENT:
        for base in range(ROUNDS * SPAN, cut + 1, ROUNDS * SPAN):
            score = load_tile(row, base, last, INITIAL, ROUNDS, SPAN)
            total += tl.sum(tied(score, base, threshold, cut, INITIAL, ROUNDS, SPAN).to(tl.int32))
    return total


@triton.jit
def settle(score, base, threshold, cut, last, INITIAL: tl.constexpr, ROUNDS: tl.constexpr, SPAN: tl.constexpr):
    """Scores of which exactly the chosen are >= threshold: ties past column `cut` are not."""
    tie = tied(score, base, threshold, last, INITIAL, ROUNDS, SPAN)
    kept = tl.where(columns_of(base, ROUNDS, SPAN) <= cut, threshold, float("nan"))
    return tl.where(tie, kept, score)


@triton.jit
def emit(out, marks, base, taken, BITS: tl.constexpr):
    """Store the marked columns in order behind the `taken` stored before; returns how many are stored then.

    A running sum over a round's columns counts every round in a field of its own; a product adds the earlier rounds'. Fields hold FREE.
    """
    SPAN: tl.constexpr = marks.shape[0]
    position = base + tl.arange(0, SPAN)
    total = tl.sum(marks, 0)
    rank = tl.cumsum(marks, 0) + total * (0x11111110 if BITS == 4 else 0x01010100 if BITS == 8 else 0x00010000)
    while tl.max(marks, 0) != 0:  # few positions are marked in two rounds
        rest = marks & (marks - 1)
        lowest = marks ^ rest
        marks = rest
        # The number of the lowest bit, by the exponent of its value as a float: less 127, which is 1 modulo 32.
        shift = (lowest.to(tl.int32).to(tl.float32).to(tl.uint32, bitcast=True) >> 23) + 1 & 31
        slot = taken - 1 + ((rank >> shift) & ((1 << BITS) - 1)).to(tl.int32)
        tl.store(out + slot, position + (shift // BITS).to(tl.int32) * SPAN, mask=lowest != 0)
    every = total * (0x11111111 if BITS == 4 else 0x01010101 if BITS == 8 else 0x00010001)
    return taken + (every >> (32 - BITS)).to(tl.int32)


@triton.jit
def pick(
    row, out, last,
    FREE: tl.constexpr, INITIAL: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    LEAST: tl.constexpr, WIDTH: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Store the FREE best of columns [INITIAL, last], more than FREE, ascending. Resident: there are at most WIDTH, kept in registers."""
    ROUNDS: tl.constexpr = WIDTH // LEAST if WIDTH // LEAST < 32 // BITS else 32 // BITS
    SPAN: tl.constexpr = WIDTH // ROUNDS
    held = load_tile(row, 0, last, INITIAL, ROUNDS, SPAN)
    best = best_of_tile(held)
    if not RESIDENT:
        for base in range(WIDTH, last + 1, WIDTH):
            best = tl.maximum(best, best_of_tile(load_tile(row, base, last, INITIAL, ROUNDS, SPAN)))
    # At least FREE scores are >= low, none is >= high: each of GROUPS >= FREE sets of columns holds one >= the least of their maxima.
    of_group = tl.max(tl.reshape(best, [SPAN // GROUPS, GROUPS]), 0)
    low = tl.min(of_group, 0)
    top = tl.max(of_group, 0) + 1
    high = top
    found = FREE + 1
    while (found != FREE) & (low + 1 < high):  # the FREE-th largest of the maxima is the better bound
        middle = midpoint(low, high)
        found = tl.sum((best >= middle).to(tl.int32), 0)
        low = tl.where(found >= FREE, middle, low)
        high = tl.where(found >= FREE, high, middle)
    marks, found = count(row, held, score_of(low), last, INITIAL, BITS, ROUNDS, SPAN, RESIDENT)
    middle = tl.where(high < top, high, midpoint(low, high))  # seldom do FREE scores reach what fewer maxima do: the other bound
    high = top
    while (found > FREE) & (low + 1 < high):
        fewer, at_least = count(row, held, score_of(middle), last, INITIAL, BITS, ROUNDS, SPAN, RESIDENT)
        enough = at_least >= FREE
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        found = tl.where(enough, at_least, found)
        marks = tl.where(enough, fewer, marks)
        middle = midpoint(low, high)
    threshold = score_of(low)
    cut = last
    if found != FREE:  # ties (or a threshold of -inf, where NaN ties too): the smaller columns are taken
        _, above = count(row, held, score_of(low + 1), last, INITIAL, BITS, ROUNDS, SPAN, RESIDENT)
        short = INITIAL - 1
        while short + 1 < cut:
            middle = (short + cut) >> 1
            ties = count_tied(row, held, threshold, middle, last, INITIAL, ROUNDS, SPAN, RESIDENT)
            short = tl.where(above + ties >= FREE, short, middle)
            cut = tl.where(above + ties >= FREE, middle, cut)
        marks = mark(settle(held, 0, threshold, cut, last, INITIAL, ROUNDS, SPAN), threshold, BITS)
    taken = emit(out, marks, 0, INITIAL, BITS)
    if not RESIDENT:
        for base in range(WIDTH, last + 1, WIDTH):
            score = load_tile(row, base, last, INITIAL, ROUNDS, SPAN)
            if found != FREE:
                score = settle(score, base, threshold, cut, last, INITIAL, ROUNDS, SPAN)
            taken = emit(out, mark(score, threshold, BITS), base, taken, BITS)


@triton.jit
def choose(
    row, out, current,
    COUNT: tl.constexpr, SLOTS: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    LEAST: tl.constexpr, WIDTH: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Store the COUNT blocks of a query whose own block is `current`, by the scores in `row`: ascending, -1 last."""
    FREE: tl.constexpr = COUNT - INITIAL - LOCAL
    slot = tl.arange(0, SLOTS)
    # All candidates, padded with -1, where they are no more than the slots; else those chosen whatever their score.
    few = current < COUNT
    local = tl.where(slot < INITIAL, slot, current - (COUNT - 1) + slot)
    always = (slot < INITIAL) | (slot >= COUNT - LOCAL)
    index = tl.where(few, tl.where(slot <= current, slot, -1), local)
    tl.store(out + slot, index, mask=(slot < COUNT) & (few | always))
    if FREE > 0:
        last = current - LOCAL
        if current < COUNT:
            pass
        elif RESIDENT:
            # Early queries have few candidates: they do not pay for the width of the last ones.
            HALVINGS: tl.constexpr = 2 if WIDTH >= 4 * LEAST else 1 if WIDTH >= 2 * LEAST else 0
            for i in tl.static_range(HALVINGS + 1):
                if (last < (WIDTH >> i)) & ((i == HALVINGS) | (last >= (WIDTH >> i) // 2)):
                    pick(row, out, last, FREE, INITIAL, GROUPS, BITS, LEAST, WIDTH >> i, True)
        else:
            pick(row, out, last, FREE, INITIAL, GROUPS, BITS, LEAST, WIDTH, False)


@triton.jit
def select_topk_kernel(
    scores_ptr,  # [rows, Hkv, blocks] fp32, contiguous; defined for columns <= position // BLOCK
    index_ptr,  # [rows, Hkv, COUNT] int32, contiguous
    cu_seqlens,  # [B + 1] int32, or None
    first: tl.int32,  # packed token of row 0
    rows: tl.int32,
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
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    LEAST: tl.constexpr,
    WIDTH: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    head = tl.program_id(1)
    b, tile = locate(tl.program_id(0), cu_seqlens, batch, seqlen, first, first + rows, 1, ROWS)
    start = sequence_start(cu_seqlens, b, seqlen)
    end = tl.minimum(sequence_start(cu_seqlens, b + 1, seqlen), first + rows)
    token0 = tl.maximum(start, first) + tile * ROWS
    for token in range(token0, tl.minimum(token0 + ROWS, end)):
        current = (token - start) // BLOCK  # the query's own block: its last candidate
        flat = (token - first).to(tl.int64) * heads + head
        row = scores_ptr + flat * blocks
        out = index_ptr + flat * COUNT
        choose(row, out, current, COUNT, SLOTS, INITIAL, LOCAL, GROUPS, BITS, LEAST, WIDTH, RESIDENT)


_BLOCK = 64
_ROWS = 4
_GROUPS = 32
_CONSTANTS = {
    "BLOCK": _BLOCK,
    "COUNT": 16,
    "SLOTS": 16,
    "INITIAL": 1,
    "LOCAL": 2,
    "GROUPS": _GROUPS,
    "BITS": 4,
    "ROWS": _ROWS,
}
_WARPS = 1
_WIDEST = 16384
# Wider rows take more warps: a thread holds 32 scores at most.
_launchers = {
    warps: Launcher(select_topk_kernel, {**_CONSTANTS, "LEAST": max(128 * warps, _GROUPS)}, num_warps=warps, maxnreg=64)
    for warps in (1, 2, 4, 8, 16)
}


def select_topk(scores, block_indices, token_start, cu_seqlens, batch, max_seqlen):
    """The blocks of the queries from packed token `token_start` on: forced ones, then by score, ties to the smaller index (paper eq. 11).

    scores fp32 [R,Hkv,NB] contiguous, NB >= cdiv(max_seqlen, l'); row r is token token_start + r
    → block_indices int32 [R,Hkv,n] contiguous: ascending, distinct, -1 last.
    """
    rows, heads, blocks = scores.shape
    # Rows past _WIDEST columns do not fit in registers: they are read again at every step, a part at a time.
    width = min(1 << (-(-max_seqlen // _BLOCK) - 1).bit_length(), _WIDEST)  # a power of two
    resident = width * _BLOCK >= max_seqlen
    warps = max(_WARPS, width // 1024) if resident else max(_WARPS, 4)
    width = max(width, 128 * warps, _GROUPS)
    _launchers[warps](
        (rows // _ROWS + batch, heads), scores, block_indices, cu_seqlens,
        token_start, rows, heads, blocks, batch, max_seqlen,
        WIDTH=width if resident else max(2048, _GROUPS), RESIDENT=resident,
    )  # fmt: skip
