"""decode_fwd, rendered by nsa-gen from templates/decode_fwd.py.jinja. Do not edit: change the template.

problem 901645d869fd: dtype=bfloat16 storage=bfloat16 group=16 head_dim_qk=128 head_dim_v=128 block=32 stride=16 selection_block=64 count=16
    initial=1 local=2 mapping=overlap window=512 branches=1 page_size=64 tokens=1
config  551c44760027: BLOCK_B=256 BLOCK_N=64 CHOSEN_LEAST=2 CHOSEN_PROGRAMS=128 LEAST=4 PROGRAMS=256 TOGETHER=16 asm=True block_stages=1
    chain=True chosen_blocks=1 chosen_stages=4 chosen_warps=4 keep_sums=True maxnreg=None num_stages=4 num_warps=4 sum_stages=3
command: python -m nsa_gen generate SPEC --target TARGET -o DIR
"""

import torch
import triton
import triton.language as tl

from nsa_gen.launch import Launcher


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
def weight(unit, PER_BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """How often the compressed token that starts `unit` strides after a selection block's first token counts for it (eq. 9)."""
    # The stride units of [unit, unit + SPAN) inside the block, [0, PER_BLOCK).
    return tl.maximum(tl.minimum(unit + SPAN, PER_BLOCK) - tl.maximum(unit, 0), 0)


@triton.jit
def load_rows(pages_ptr, row0, row, count, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows row0 + row, counted over the rows of all pages and heads, which are D long; in one page: [rows, D_PAD]. 0 past column D, and
    where `row` is `count` or more; with `count` None these hold anything."""
    row = row[:, None]
    column = tl.arange(0, D_PAD)[None, :]
    x_ptr = pages_ptr + row0 * D + (row * D + column)
    if count is not None:
        x = tl.load(x_ptr, mask=(row < count) & (column < D) if D_PAD > D else row < count, other=0.0)
    elif D_PAD > D:
        x = tl.load(x_ptr, mask=column < D, other=0.0)
    else:
        x = tl.load(x_ptr)
    return x


@triton.jit
def apart(x):
    """[M, D] as products take it: even and odd columns where `load_halves` gives those of keys and values, else one whole."""
    return (x,)


@triton.jit
def whole(x):
    """The inverse of `apart`."""
    return x[0]


@triton.jit
def attend(
    q, o, top, totals, k_ptr, v_ptr, row0, row, count, seen, qk_scale,
    D_QK: tl.constexpr, DQ: tl.constexpr, D_V: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """A tile of keys, rows row0 + row, `count` of them values (of all rows, or each row's own [rows, 1]), into a running softmax:
    (o [M, DV], not divided by the total; top [M], log2 domain; totals [M, rows] yet to be added up; the tile's probabilities [M, rows] for
    that top). q and o are `apart`. A row that has seen nothing has top -inf. Totals stay apart because warps share the keys of a tile: to
    add them up, they would wait for each other."""
    k = load_rows(k_ptr, row0, row, None, D_QK, DQ)
    v = load_rows(v_ptr, row0, row, count, D_V, DV)
    scores = tl.dot(q[0], tl.trans(k), input_precision="ieee") * qk_scale
    scores = tl.where(seen, scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(new_top == -float("inf"), 0.0, new_top)
    old = tl.exp2(top - safe)
    prob = tl.exp2(scores - safe[:, None])
    totals = totals * old[:, None] + prob
    weights = prob.to(q[0].dtype)
    o = (tl.dot(weights, v, o[0] * old[:, None], input_precision="ieee"),)
    return o, new_top, totals, prob


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
def wait_for(arrived_ptr, count):
    """Until `count` is in the lower half of arrived_ptr: what was stored before can be read. Gives all of it. Only for programs that have
    begun: others may wait for this one to end."""
    found = tl.atomic_add(arrived_ptr, 0, sem="acquire")
    while found & 65535 < count:
        found = tl.atomic_add(arrived_ptr, 0, sem="acquire")
    return found


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
def weigh_tiles(tops_ptr, factors_ptr, stat_ptr, splits, begin, end, row, M: tl.constexpr):
    """What the sums of tiles [begin, end) are multiplied by, [tiles, M], by their tops: once for all blocks of a tile."""
    tile = begin + tl.arange(0, 1024 // M)
    place = tile[:, None] * M + row[None, :]
    tops = tl.load(tops_ptr + place, mask=(tile < end)[:, None], other=-float("inf"))  # before what it does not wait for
    top, total = softmax_of(stat_ptr, splits, row, M)
    factor = 1.0 / total
    for first in range(0, end - begin, 1024 // M):
        tl.store(factors_ptr + place + first * M, tl.exp2(tops - top[None, :]) * factor[None, :], mask=(first + tile < end)[:, None])
        following = first + 1024 // M
        tops = tl.load(tops_ptr + place + following * M, mask=(following + tile < end)[:, None], other=-float("inf"))
    tl.debug_barrier()  # who reads them is another thread


@triton.jit
def put(pointers, x, mask, policy):
    """Stores fp32 x from where it is. The compiler would change its layout first, in which warps wait for each other."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred wanted;
        setp.ne.s32 wanted, $3, 0;
        @wanted st.global.L2::cache_hint.b32 [$1], $2, $4;
        mov.b32 $0, 0;
        }""",
        "=r,l,f,r,l", [pointers.to(tl.int64), x, mask.to(tl.int32), policy], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def decode_fwd_kernel(
    q_ptr,  # [S, TOKENS, Hq, D_QK]
    k_ptr,  # [pages, Hkv, PAGE, D_QK]
    v_ptr,  # [pages, Hkv, PAGE, D_V]
    k_scale_ptr,  # [3, Hkv] fp32, what stored keys are multiplied by, compressed, selected, sliding; None where they are stored as they are
    compressed_ptr,  # [slots, max_pages] int32: pages of compressed tokens
    sliding_ptr,  # the same of the sliding branch
    slot_ptr,  # [S] int32
    length_ptr,  # [slots] int32: tokens, the new ones included
    part_ptr,  # [S, Hkv, parts, M, D_V] fp32: a program's o for its own top, not divided by its total
    stat_ptr,  # [S, Hkv, parts, 2, M] fp32: top (log2 domain), total
    sums_ptr,  # [S, Hkv, LAGS, blocks, M] fp32: what a block gets from the UNITS tokens that start lag blocks before, for their tile's top
    tops_ptr,  # [S, Hkv, tiles, M] fp32: tops that tiles' probabilities are for
    factors_ptr,  # [S, Hkv, tiles, M] fp32: what their sums are multiplied by
    scores_ptr,  # [S, TOKENS, Hkv, blocks] fp32
    index_ptr,  # [S, TOKENS, Hkv, COUNT] int32
    # [6, S, TOKENS, Hkv] int32, 0: splits done; results that are there, all splits' as one; choices; pieces done; splits begun; shares done
    arrived_ptr,
    scale: tl.float32,
    splits: tl.int32,  # programs that share compressed tokens; the others share the window
    max_pages: tl.int32,
    blocks: tl.int32,
    tiles: tl.int32,
    stride_qs: tl.int64,
    stride_qt: tl.int64,
    stride_qh: tl.int64,
    G: tl.constexpr,
    TOKENS: tl.constexpr,
    M: tl.constexpr,
    D_QK: tl.constexpr,
    DQ: tl.constexpr,
    D_V: tl.constexpr,
    DV: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    SELECTED: tl.constexpr,
    UNITS: tl.constexpr,
    LAGS: tl.constexpr,
    PLANES: tl.constexpr,
    COUNT: tl.constexpr,
    SLOTS: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    LEAST: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPREAD: tl.constexpr,
    STAGES: tl.constexpr,
    WIDTH: tl.constexpr,
    RESIDENT: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    tl.extra.cuda.gdc_wait()  # for what the kernel before has written: programs may be there earlier
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    part = tl.program_id(2)  # programs of the window start last
    heads = tl.num_programs(0)
    parts = tl.num_programs(2)
    sliding = part >= splits
    slot = tl.load(slot_ptr + sequence)
    length = tl.load(length_ptr + slot)
    table = tl.where(sliding, sliding_ptr, compressed_ptr) + slot.to(tl.int64) * max_pages
    row = tl.arange(0, M)
    valid = row < TOKENS * G
    position = length - TOKENS + row // G
    # The keys [oldest, newest] that a row sees: compressed tokens, or tokens.
    newest = tl.where(sliding, position, tl.maximum(position + 1 - BLOCK + STRIDE, 0) // STRIDE - 1)
    oldest = tl.where(sliding, position - WINDOW + 1, 0)
    keys = tl.where(sliding, length, tl.maximum(length - BLOCK + STRIDE, 0) // STRIDE)
    first_key = tl.where(sliding, tl.maximum(length - TOKENS - WINDOW + 1, 0), 0)
    end_key = keys
    sharing = splits
    number = part
    local = tl.maximum(position // SELECTED - LOCAL + 1, 0) * SELECTED  # where a row's local blocks begin
    if sliding:
        if part == parts - 1:
            oldest = local
            first_key = tl.maximum((length - TOKENS) // SELECTED - LOCAL + 1, 0) * SELECTED
            sharing = 1
            number = 0
        else:
            newest = local - 1
            end_key = tl.maximum((length - 1) // SELECTED - LOCAL + 1, 0) * SELECTED
            sharing = parts - splits - 1
            number = part - splits
    newest = tl.where(valid, newest, -1)
    here = sequence.to(tl.int64) * heads + head
    counters = tl.num_programs(1) * TOKENS * heads
    done_ptr = arrived_ptr + here
    begun_ptr = done_ptr + 4 * counters
    if part < (splits if TOGETHER else 0):
        tl.atomic_add(begun_ptr, 1, sem="relaxed")

    column = tl.arange(0, DQ)
    q_rows = sequence.to(tl.int64) * stride_qs + row // G * stride_qt + (head * G + row % G) * stride_qh
    q = tl.load(q_ptr + q_rows[:, None] + column[None, :], mask=valid[:, None] & (column < D_QK)[None, :], other=0.0)
    qk_scale = scale * 1.4426950408889634
    if k_scale_ptr is not None:
        qk_scale *= tl.load(k_scale_ptr + tl.where(sliding, 2 * heads, 0) + head)
    top = tl.full([M], -float("inf"), tl.float32)
    totals = tl.zeros([M, BLOCK_N], tl.float32)
    q = apart(q)
    o = apart(tl.zeros([M, DV], tl.float32))
    first = first_key // BLOCK_N
    used = (end_key + BLOCK_N - 1) // BLOCK_N
    each = tl.maximum(used - first + sharing - 1, 0) // sharing
    begin = first + number * each
    group = tl.arange(0, BLOCK_N // UNITS)[:, None]
    lag = tl.arange(0, PLANES)[None, :]
    count = weight(tl.arange(0, UNITS)[None, :] - tl.arange(0, PLANES)[:, None] * UNITS, UNITS, BLOCK // STRIDE)
    sums = sums_ptr + here * (LAGS * M) * blocks
    tops = tops_ptr + here * M * tiles
    end = tl.minimum(begin + each, used)
    # The second kernel's programs are let in once all of these have begun and compressed tokens are read. They wait for what they need.
    if sliding:
        tl.extra.cuda.gdc_launch_dependents()
    # Of a row of scores, tensor cores hand a thread two neighbours, and two more from further on in a tile: a block's units go there.
    inner = tl.arange(0, BLOCK_N)
    if SPREAD:
        inner = tl.reshape(tl.permute(tl.reshape(inner, [BLOCK_N // (4 * UNITS), 4, UNITS // 2, 2]), [2, 0, 1, 3]), [BLOCK_N])
    policy = tl.inline_asm_elementwise(
        "createpolicy.fractional.L2::evict_last.b64 $0, 1.0;",
        "=l,r", [0], dtype=tl.int64, is_pure=True, pack=1,
    )  # fmt: skip
    # A tile's page is looked up one tile ahead: a pipeline that did so would wait for the rows before it each time.
    page = tl.load(table + begin * BLOCK_N // PAGE, mask=begin < end, other=0)
    for tile in tl.range(begin, end, num_stages=STAGES):
        key0 = tile * BLOCK_N
        row0 = (page.to(tl.int64) * heads + head) * PAGE + key0 % PAGE
        page = tl.load(table + (key0 + BLOCK_N) // PAGE, mask=tile + 1 < end, other=0)
        key = (key0 + inner)[None, :]
        seen = (key <= newest[:, None]) & (key >= oldest[:, None])
        o, top, totals, prob = attend(q, o, top, totals, k_ptr, v_ptr, row0, inner, keys - key0, seen, qk_scale, D_QK, DQ, D_V, DV)
        if SPREAD:
            prob = tl.permute(tl.reshape(prob, [M, UNITS // 2, BLOCK_N // (4 * UNITS), 4, 2]), [0, 2, 3, 1, 4])
        given = tl.sum(tl.reshape(prob, [M, BLOCK_N // UNITS, 1, UNITS]) * count, 3)
        to = tile * (BLOCK_N // UNITS) + group + lag
        fits = (lag < LAGS) & (to < blocks) & (part < splits)
        place = sums + ((lag * blocks + to) * M)[None] + row[:, None, None]
        put(place, given, fits[None], policy)
        put(tops + tile * M + row, top, part < splits, policy)
    column = tl.arange(0, DV)
    place = here * parts + part
    tl.store(part_ptr + (place * M + row)[:, None] * D_V + column[None, :], whole(o), mask=valid[:, None] & (column < D_V)[None, :])
    tl.store(stat_ptr + place * (2 * M) + row, top)
    tl.store(stat_ptr + place * (2 * M) + M + row, tl.sum(totals, 1))
    of_tokens = arrived_ptr + counters + sequence * TOKENS * heads + head
    if sliding:
        tl.debug_barrier()  # of the stores of all threads
        for token in tl.static_range(TOKENS):
            tl.atomic_add(of_tokens + token * heads, 1, sem="release")
        return
    tl.extra.cuda.gdc_launch_dependents()
    # Importance is put together by the last split to be done; TOGETHER, by all that are still there by then. A split stays if all others
    # have begun, so the last one to begin does. How many stay is counted in the upper half.
    if TOGETHER:
        stays = tl.atomic_add(begun_ptr, 0, sem="relaxed") == splits
        tl.debug_barrier()
        rank = tl.atomic_add(done_ptr, tl.where(stays, 65537, 1), sem="acq_rel") >> 16
    else:
        stays = last_to_arrive(done_ptr, splits)
        rank = 0
    if stays:
        sharers = 1
        if TOGETHER:
            sharers = wait_for(done_ptr, splits) >> 16
        if rank == 0:
            for token in tl.static_range(TOKENS):
                tl.atomic_add(of_tokens + token * heads, 1, sem="release")
        last = (length - 1) // SELECTED
        each = last // sharers + 1
        begin = rank * each
        end = tl.minimum(begin + each, last + 1)
        factors = factors_ptr + here * M * tiles
        first_tile = tl.maximum(begin - LAGS + 1, 0) * UNITS // BLOCK_N
        end_tile = tl.minimum((end - 1) * UNITS // BLOCK_N + 1, used)
        weigh_tiles(tops, factors, stat_ptr + here * parts * (2 * M), splits, first_tile, end_tile, row, M)
        # Each block's probability, summed over the group (eq. 10), token by token.
        for block0 in tl.range(begin, end, 256, num_stages=1):
            block = block0 + tl.arange(0, 256)
            importance = tl.zeros([256, M], tl.float32)
            for back in tl.static_range(LAGS):
                # All in one layout, factors loaded block by block: nothing but memory is waited for, and once for all lags.
                exists = ((block >= back) & (block < end) & (block - back < used * (BLOCK_N // UNITS)))[:, None]
                given = tl.load(sums + (back * blocks + block)[:, None] * M + row[None, :], mask=exists, other=0.0)
                of_tile = factors + (block - back) * UNITS // BLOCK_N * M
                importance += given * tl.load(of_tile[:, None] + row[None, :], mask=exists, other=0.0)
            for token in tl.static_range(TOKENS):
                of_token = tl.sum(tl.where((row // G == token)[None, :], importance, 0.0), 1)
                target = scores_ptr + ((sequence.to(tl.int64) * TOKENS + token) * heads + head) * blocks
                tl.store(target + block, of_token, mask=block < end)
        if TOGETHER:
            chooses = last_to_arrive(done_ptr + 5 * counters, sharers)
            if chooses:
                tl.store(done_ptr, 0)
                tl.store(begun_ptr, 0)
        else:
            chooses = True
            tl.debug_barrier()  # the whole row is read by every thread
        if chooses:
            for token in range(TOKENS):
                at = (sequence.to(tl.int64) * TOKENS + token) * heads + head
                current = tl.maximum(length - TOKENS + token, 0) // SELECTED
                row_of, chosen = scores_ptr + at * blocks, index_ptr + at * COUNT
                choose(row_of, chosen, current, COUNT, SLOTS, INITIAL, LOCAL, GROUPS, BITS, LEAST, WIDTH, RESIDENT)
                tl.debug_barrier()
                tl.atomic_xchg(of_tokens + (counters + token * heads), 1, sem="release")


@triton.jit
def load_gate(gate_ptr, place, valid, v_scale_ptr, which):
    """A branch's gates of one token's rows, [G_PAD] fp32, times what stored values are multiplied by, if they are."""
    gate = tl.load(gate_ptr + place, mask=valid, other=0.0).to(tl.float32)
    if v_scale_ptr is not None:
        gate *= tl.load(v_scale_ptr + which)
    return gate


@triton.jit
def decode_chosen_fwd_kernel(
    q_ptr,  # all as above, but for:
    k_ptr,
    v_ptr,
    selected_ptr,  # [slots, max_pages] int32: pages of the selected branch
    k_scale_ptr,
    v_scale_ptr,  # as k_scale
    slot_ptr,
    length_ptr,
    index_ptr,
    dense_part_ptr,
    dense_stat_ptr,
    g_cmp_ptr,  # [S, TOKENS, Hq]
    g_slc_ptr,
    g_swa_ptr,
    part_ptr,  # [S, TOKENS, Hkv, pieces, 2, G_PAD, D_V] fp32: of chosen blocks, not divided by the total, and of the other branches
    stat_ptr,  # [S, TOKENS, Hkv, pieces, 2, G_PAD] fp32
    arrived_ptr,
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
    TILE: tl.constexpr,
    COUNT: tl.constexpr,
    SLOTS: tl.constexpr,
    LOCAL: tl.constexpr,
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
        qk_scale *= tl.load(k_scale_ptr + heads + head)
    column = tl.arange(0, DV)
    inside = valid[:, None] & (column < D_V)[None, :]
    here = (sequence.to(tl.int64) * TOKENS + token) * heads + head
    place = here * G + member
    counters = tl.num_programs(1) * TOKENS * heads
    arrived = arrived_ptr + here
    g_cmp = load_gate(g_cmp_ptr, place, valid, v_scale_ptr, head)
    g_slc = load_gate(g_slc_ptr, place, valid, v_scale_ptr, heads + head)
    g_swa = load_gate(g_swa_ptr, place, valid, v_scale_ptr, 2 * heads + head)
    # All programs of the first kernel have begun when one of this one does.
    wait_for(arrived + counters, parts - splits + 1)
    # Partial results of compressed attention (the first `splits`) and the window, while blocks are chosen if this kernel is there by then.
    of_head = (sequence.to(tl.int64) * heads + head) * parts
    rows = tl.minimum(token * G + member, M - 1)
    dense = dense_part_ptr + (of_head * M + rows)[:, None] * D_V + column[None, :]
    stats = dense_stat_ptr + of_head * (2 * M)
    inner = tl.arange(0, TILE)
    # The last chosen blocks are local: what was added up for them, the last part, is where the first piece begins.
    begun = stats + (parts - 1) * (2 * M) + rows
    first = valid & (piece == 0)
    o = tl.load(dense + (parts - 1) * (M * D_V), mask=inside & first[:, None], other=0.0)
    top = tl.load(begun, mask=first, other=-float("inf"))
    totals = tl.where(inner[None, :] == 0, tl.load(begun + M, mask=first, other=0.0)[:, None], 0.0)
    cmp_top, cmp_total = softmax_of(stats, splits, rows, M)
    swa_top, swa_total = softmax_of(stats + splits * (2 * M), parts - splits, rows, M)
    cmp_factor, swa_factor = g_cmp / cmp_total, g_swa / swa_total
    others = tl.zeros([G_PAD, DV], tl.float32)
    for i in tl.range(piece, parts, pieces, num_stages=3):
        given = tl.load(dense + i * (M * D_V), mask=inside, other=0.0)
        weight = tl.exp2(tl.load(stats + i * (2 * M) + rows) - tl.where(i < splits, cmp_top, swa_top))
        others += given * (weight * tl.where(i < splits, cmp_factor, swa_factor))[:, None]
    wait_for(arrived + 2 * counters, 1)
    slots = tl.arange(0, SLOTS)
    indices = tl.load(index_ptr + here * COUNT + slots, mask=slots < COUNT, other=-1)
    # All pages looked up at once: a pipeline that did so block by block would wait for the rows before each.
    page = tl.load(selected_ptr + slot.to(tl.int64) * max_pages + indices * SELECTED // PAGE, mask=indices >= 0, other=0)
    row_of = (page.to(tl.int64) * heads + head) * PAGE + indices * SELECTED % PAGE
    chosen = tl.sum((indices >= 0).to(tl.int32), 0)
    chosen -= tl.minimum(LOCAL, position // SELECTED + 1)
    q = apart(q)
    o = apart(o)
    each = (chosen + pieces - 1) // pieces
    end = tl.minimum((piece + 1) * each, chosen)
    for i in tl.range(piece * each, end, TILE // SELECTED, num_stages=4):
        key0 = tl.sum(tl.where(slots == i, indices, 0), 0) * SELECTED
        row0 = tl.sum(tl.where(slots == i, row_of, 0), 0)
        seen = key0 + inner <= position
        values = length - key0
        o, top, totals, _ = attend(q, o, top, totals, k_ptr, v_ptr, row0, inner, values, seen[None, :], qk_scale, D_QK, DQ, D_V, DV)
    o = whole(o)

    total = tl.sum(totals, 1)
    last = pieces == 1
    if pieces > 1:
        of_piece = part_ptr + (here * pieces + piece) * (2 * G_PAD * D_V) + member[:, None] * D_V + column[None, :]
        tl.store(of_piece, o, mask=inside)
        tl.store(of_piece + G_PAD * D_V, others, mask=inside)
        stats = stat_ptr + here * pieces * (2 * G_PAD)
        tl.store(stats + piece * (2 * G_PAD) + member, top)
        tl.store(stats + piece * (2 * G_PAD) + G_PAD + member, total)
        last = last_to_arrive(arrived + 3 * counters, pieces)
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
        tl.store(arrived + counters, 0)
        tl.store(arrived + 2 * counters, 0)
        factor = g_slc / tl.where(total > 0, total, 1.0)  # o is 0 where total is
        tl.store(o_ptr + place[:, None] * D_V + column[None, :], (others + o * factor[:, None]).to(o_ptr.dtype.element_ty), mask=inside)
    tl.extra.cuda.gdc_wait()  # who waits for this kernel waits for the first one too


def types(*tensors):
    """A constant that tells binaries apart by which tensors are fp32, and which are None."""
    return sum((0 if x is None else 1 if x.dtype == torch.float32 else 2) * 3**i for i, x in enumerate(tensors))


_TOKENS = 1
_M = 16
_G_PAD = 16
_BLOCK = 64
_BLOCK_N = 64
_LAGS = 2
_WARPS = 4
_LEAST = max(128 * _WARPS, 32)
_COMMON = {
    "G": 16,
    "TOKENS": _TOKENS,
    "M": _M,
    "D_QK": 128,
    "DQ": 128,
    "D_V": 128,
    "DV": 128,
    "PAGE": 64,
    "SELECTED": _BLOCK,
    "COUNT": 16,
    "SLOTS": 16,
    "LOCAL": 2,
}
_decode = Launcher(
    decode_fwd_kernel,
    {
        **_COMMON,
        "BLOCK": 32,
        "STRIDE": 16,
        "UNITS": 4,
        "LAGS": _LAGS,
        "PLANES": 2,
        "INITIAL": 1,
        "GROUPS": 32,
        "BITS": 4,
        "LEAST": _LEAST,
        "WINDOW": 512,
        "BLOCK_N": _BLOCK_N,
        "SPREAD": True,
        "STAGES": 4,
    },
    num_warps=_WARPS,
    num_stages=4,
    maxnreg=None,
    launch_pdl=True,
)
_decode_chosen = Launcher(
    decode_chosen_fwd_kernel,
    {
        **_COMMON,
        "G_PAD": _G_PAD,
        "TILE": _BLOCK * 1,
    },
    num_warps=4,
    num_stages=4,
    launch_pdl=True,
)


def decode_fwd(
    q, k_pages, v_pages, k_scale, v_scale, compressed, selected, sliding, slots, lengths, arrived, g_cmp, g_slc, g_swa, block_indices, o,
    max_seqlen, scale,
):  # fmt: skip
    """Native Sparse Attention of a few new tokens of each sequence, from pages (paper eqs. 5-12, but for the compression).

    Args:
        q: [S, 1, Hq, D_QK], last dim contiguous, strides multiples of 8 elements.
        k_pages, v_pages: [pages, Hkv, 64, D] contiguous.
        k_scale, v_scale: [3, Hkv] fp32, what stored keys and values are multiplied by, compressed, selected and sliding; or both None.
        compressed, selected, sliding: [slots, max_pages] int32 contiguous: pages of compressed tokens and of the branches' tokens.
        slots: [S] int32.
        lengths: [slots] int32: tokens of each, the new ones included.
        arrived: [at least 6 * S * tokens * Hkv] int32, 0; left so.
        g_cmp, g_slc, g_swa: [S, tokens, Hq] contiguous, of one dtype.
        block_indices: [S, tokens, Hkv, n] int32 contiguous, written: ascending, distinct, -1 last.
        o: [S, tokens, Hq, D_V] contiguous, written.
        max_seqlen: no sequence is longer.
    """
    sequences, heads, device = q.shape[0], k_pages.shape[1], q.device
    blocks = -(-max_seqlen // _BLOCK) + 3 & ~3
    tiles = -(-(max_seqlen // 16) // _BLOCK_N) + 1
    pairs = sequences * heads
    share = 256 // max(pairs, 1)
    splits = max(min(share, tiles // 4), 1)
    parts = splits + max(min(share // 2, (385 // _BLOCK_N + 1) // 4), 1) + 1

    def made(*shape):
        return torch.empty((sequences, *shape), dtype=torch.float32, device=device)

    part = made(heads, parts, _M, v_pages.shape[3])
    stat = made(heads, parts, 2, _M)
    width = max(1 << (-(-max_seqlen // _BLOCK) - 1).bit_length(), _LEAST)
    resident = width <= 1024 * _WARPS
    pieces = max(min(128 // max(_TOKENS * pairs, 1), 14 // 2), 1)
    chosen = (
        q, k_pages, v_pages, selected, k_scale, v_scale, slots, lengths, block_indices, part, stat, g_cmp, g_slc, g_swa,
        made(_TOKENS, heads, pieces, 2, _G_PAD, v_pages.shape[3]), made(_TOKENS, heads, pieces, 2, _G_PAD), arrived, o,
        scale, heads, compressed.shape[1], splits, parts, *q.stride()[:3],
    )  # fmt: skip
    # The second kernel's memory is allocated before the first one is launched: later it may be scratch memory of that one, and both run.
    # It is loaded before as well: without it `arrived` does not become 0 again.
    _decode_chosen.load(*chosen, TYPES=types(g_cmp))
    _decode(
        (heads, sequences, parts),
        q, k_pages, v_pages, k_scale, compressed, sliding, slots, lengths, part, stat, made(heads, _LAGS, blocks, _M),
        made(heads, tiles, _M), made(heads, tiles, _M), made(_TOKENS, heads, blocks), block_indices, arrived,
        scale, splits, compressed.shape[1], blocks, tiles, *q.stride()[:3],
        WIDTH=width if resident else max(2048, _LEAST), RESIDENT=resident,
        TOGETHER=splits > 1 and pairs <= 16,
    )  # fmt: skip
    _decode_chosen((_TOKENS * heads, sequences, pieces), *chosen, TYPES=types(g_cmp))
