"""Pages: whatever is created, extended, forked, taken back and freed, each row is where a plain model says, and no page is lost."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, precondition, rule

from nsa_gen.errors import InputError, OutOfPages, UnknownSequence
from nsa_gen.pages import Pages, Stream

STREAMS = (
    Stream(lambda tokens: tokens),
    Stream(lambda tokens: max(0, (tokens - 4) // 2 + 1)),  # compressed: blocks of 4, stride 2
    Stream(lambda tokens: tokens, keep=5),
)


def pages(total=12, page_size=4, streams=STREAMS, slots=4, max_tokens=40, rewind=3) -> Pages:
    return Pages(total, page_size, streams, slots, max_tokens, rewind)


class Memory:
    """What a device would hold: the writer of each row, through tables that only changes write to."""

    def __init__(self, made: Pages):
        self.pages, self.rows, self.tables = made, {}, {}

    def apply(self, change) -> None:
        for source, target in change.copies:
            for row in range(self.pages.page_size):
                self.rows[target, row] = self.rows.get((source, row))
        for stream, slot, index, page in change.entries:
            self.tables[stream, slot, index] = page

    def place(self, stream: int, slot: int, row: int) -> tuple[int, int]:
        index, offset = divmod(row, self.pages.page_size)
        return self.tables[stream, slot, index], offset


class Walk(RuleBasedStateMachine):
    """The model: for each sequence the writer of each of its tokens. A row of a stream is written by the last token that it needs."""

    sequences = Bundle("sequences")

    @initialize(total=st.integers(0, 30), page_size=st.sampled_from((1, 2, 4, 8)), rewind=st.integers(0, 6))
    def begin(self, total, page_size, rewind):
        self.pages = pages(total, page_size, rewind=rewind)
        self.memory, self.model, self.readable, self.written = Memory(self.pages), {}, {}, 0

    def state(self):
        held = {key: (x.slot, x.tokens, [list(p) for p in x.pages]) for key, x in self.pages.sequences.items()}
        return held, list(self.pages.holders), self.pages.free

    @rule(target=sequences)
    def create(self):
        before = self.state()
        try:
            made = self.pages.create()
        except OutOfPages:
            assert len(self.model) == 4 and self.state() == before
            return multiple()
        self.model[made], self.readable[made] = [], 0
        return made

    @rule(some=st.dictionaries(sequences, st.integers(0, 12), max_size=3))
    def extend(self, some):
        before, wanted = self.state(), None
        too_long = any(len(self.model[s]) + n > 40 for s, n in some.items())
        try:
            if not too_long:
                wanted = self.pages.needed(some)
            change = self.pages.extend(some)
        except InputError:
            assert too_long and self.state() == before
            return
        except OutOfPages:
            assert wanted > self.pages.free and self.state() == before
            return
        assert not too_long
        assert len(change.entries) == wanted
        self.memory.apply(change)
        for sequence, tokens in some.items():
            held, old = self.pages.find(sequence), len(self.model[sequence])
            self.readable[sequence] = max(self.readable[sequence], old - self.pages.rewind)
            self.model[sequence] += range(self.written, self.written + tokens)
            self.written += tokens
            for i, stream in enumerate(STREAMS):
                for row in range(stream.rows(old), stream.rows(old + tokens)):
                    place = self.memory.place(i, held.slot, row)
                    assert self.pages.holders[place[0]] == 1, "a shared page is written to"
                    self.memory.rows[place] = self.writer(i, sequence, row)

    def writer(self, i, sequence, row):
        return self.model[sequence][(row, 2 * row + 3, row)[i]]

    @rule(target=sequences, parent=sequences, tokens=st.one_of(st.none(), st.integers(-1, 41)))
    def fork(self, parent, tokens):
        before, length = self.state(), len(self.model[parent])
        try:
            made, change = self.pages.fork(parent, tokens)
        except OutOfPages:
            assert len(self.model) == 4 and self.state() == before
            return multiple()
        except InputError:
            assert not 0 <= tokens <= length or tokens < self.readable[parent]
            assert self.state() == before
            return multiple()
        assert not change.copies
        self.memory.apply(change)
        self.model[made] = self.model[parent][:tokens]
        self.readable[made] = self.readable[parent]
        return made

    @rule(sequence=sequences, tokens=st.integers(-1, 41))
    def truncate(self, sequence, tokens):
        before, length = self.state(), len(self.model[sequence])
        try:
            self.pages.truncate(sequence, tokens)
        except InputError:
            assert not 0 <= tokens <= length or tokens < self.readable[sequence]
            assert self.state() == before
            return
        assert 0 <= tokens <= length
        del self.model[sequence][tokens:]

    @rule(sequence=consumes(sequences))
    def drop(self, sequence):
        self.pages.drop([sequence])
        del self.model[sequence], self.readable[sequence]
        before = self.state()
        for again in (lambda: self.pages.drop([sequence]), lambda: self.pages.extend({sequence: 1}), lambda: self.pages.fork(sequence)):
            with pytest.raises(UnknownSequence, match="freed"):
                again()
        assert self.state() == before

    @precondition(lambda self: len(self.model) > 1)
    @rule(data=st.data())
    def drop_with_a_fault(self, data):
        before, (first, second, *_) = self.state(), list(self.model)
        for given in ([first, second, first], [first, -1]):
            with pytest.raises(UnknownSequence):
                self.pages.drop(given)
        assert self.state() == before

    @invariant()
    def every_row_is_where_it_was_written(self):
        if not hasattr(self, "pages"):
            return
        for sequence, tokens in self.model.items():
            held = self.pages.find(sequence)
            assert held.tokens == len(tokens)
            for i, stream in enumerate(STREAMS):
                rows = stream.rows(len(tokens))
                first = 0 if stream.keep is None else max(stream.rows(max(self.readable[sequence], 0)) - stream.keep, 0)
                for row in range(first, rows):
                    assert self.memory.rows[self.memory.place(i, held.slot, row)] == self.writer(i, sequence, row)

    @invariant()
    def pages_are_counted(self):
        if not hasattr(self, "pages"):
            return
        held = Counter(p for x in self.pages.sequences.values() for stream in x.pages for p in stream if p is not None)
        assert [held[page] for page in range(self.pages.total)] == self.pages.holders
        assert self.pages.free == self.pages.holders.count(0) == len(set(self.pages._free))
        assert len({x.slot for x in self.pages.sequences.values()}) == len(self.pages.sequences)


TestWalk = Walk.TestCase


def test_a_window_gives_its_pages_up():
    made = pages(total=100, streams=(Stream(lambda n: n, keep=5),), max_tokens=400)
    sequence = made.create()
    for _ in range(300):
        made.extend({sequence: 1})
        assert made.total - made.free <= 4  # 5 kept, 3 that may be taken back, and their pages' edges
    with pytest.raises(InputError, match="at most 3 can be taken back"):
        made.truncate(sequence, 200)
    made.truncate(sequence, 297)
    made.drop([sequence])
    assert made.free == 100


def test_forks_share_until_they_write():
    made = pages(total=4, streams=(Stream(lambda n: n),))
    sequence = made.create()
    made.extend({sequence: 6})
    one, _ = made.fork(sequence)
    two, _ = made.fork(sequence, 4)
    assert made.free == 2
    assert made.needed({sequence: 1, one: 1}) == 1, "the last of those who share a page writes in place"
    change = made.extend({sequence: 1, one: 1, two: 0})
    assert len(change.copies) == 1 and made.free == 1
    with pytest.raises(OutOfPages, match="3 pages are needed for 9 more tokens, 1 of 4 are free"):
        made.extend({two: 9})
    made.extend({two: 1})
    assert made.free == 0
    made.drop([sequence, one, two])
    assert made.free == 4


def test_ids_of_another_cache_are_unknown():
    mine, other = pages(), pages()
    mine.create()
    with pytest.raises(UnknownSequence, match="another cache"):
        mine.extend({other.create(): 1})
    with pytest.raises(OutOfPages, match="4 sequences exist"):
        [mine.create() for _ in range(4)]
