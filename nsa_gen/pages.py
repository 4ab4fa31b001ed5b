"""Which pages hold the rows of which sequence: reference counts, sharing between forks, copy on write. Numbers only, no tensors.

A page holds ``page_size`` rows of K and V for all KV heads, whatever they are rows of: a sequence has several *streams* (its tokens, its
compressed tokens, …), each a list of pages that its rows fill in order. Pages are counted: a fork holds the pages of what it shares, and
whoever writes a row into a page that another holds as well gets a copy of its own first.

:meth:`Pages.extend` plans before it changes anything, so a plan that does not fit leaves all as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from .errors import InputError, OutOfPages, UnknownSequence

#: Ids of sequences, of all caches: none is given twice, so a freed or foreign one is known as such.
_ids = count(1)


@dataclass(frozen=True)
class Stream:
    """One of the row lists that every sequence has.

    Args:
        rows: how many rows a sequence of so many tokens has.
        keep: how many of the last rows are still read when more tokens come; None for all. Pages before them are given up then.
    """

    rows: Callable[[int], int]
    keep: int | None = None


@dataclass
class Held:
    """What a sequence has: its place in the tables, its tokens, how many of them the last extension added and nothing took back since,
    and by stream its pages (None where given up)."""

    slot: int
    tokens: int = 0
    fresh: int = 0
    pages: list[list[int | None]] = field(default_factory=list)


@dataclass(frozen=True)
class Change:
    """What an extension did: table entries ``(stream, slot, index, page)`` to write, and pages to copy ``(from, to)`` before that."""

    entries: list[tuple[int, int, int, int]]
    copies: list[tuple[int, int]]


class Pages:
    """The pages of a cache, and the sequences that hold them.

    Args:
        total: pages there are.
        page_size: rows a page.
        streams: of every sequence, in the order of its tables.
        slots: sequences that may exist at a time.
        max_tokens: of a sequence.
        rewind: tokens that may be taken back from a sequence's end: so many rows more are kept in streams that give rows up.
    """

    def __init__(self, total: int, page_size: int, streams: Sequence[Stream], slots: int, max_tokens: int, rewind: int):
        self.total, self.page_size, self.streams, self.max_tokens, self.rewind = total, page_size, tuple(streams), max_tokens, rewind
        self.holders = [0] * total
        self._free = list(range(total - 1, -1, -1))
        self._slots = list(range(slots - 1, -1, -1))
        self.sequences: dict[int, Held] = {}

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def find(self, sequence: int) -> Held:
        """The sequence with this id.

        Raises:
            UnknownSequence: freed already, or of another cache.
        """
        found = self.sequences.get(sequence)
        if found is None:
            raise UnknownSequence(f"sequence {sequence!r} is not in this cache: it was freed, or belongs to another cache")
        return found

    # --- sequences ---------------------------------------------------------------------------------------------------------------

    def create(self) -> int:
        """A new sequence without tokens.

        Raises:
            OutOfPages: as many sequences as there may be exist.
        """
        made = next(_ids)
        self.sequences[made] = Held(self._take_slot(), pages=[[] for _ in self.streams])
        return made

    def fork(self, sequence: int, tokens: int | None = None) -> tuple[int, Change]:
        """A sequence that begins as the first ``tokens`` (default all) of another and shares their pages.

        Raises:
            UnknownSequence, OutOfPages: as for :meth:`find`, :meth:`create`.
            InputError: more tokens than there are, or fewer than can still be read.
        """
        parent = self.find(sequence)
        tokens = parent.tokens if tokens is None else tokens
        self._check_prefix(parent, tokens)
        child = Held(self._take_slot(), tokens, 0)
        entries = []
        for i, (stream, pages) in enumerate(zip(self.streams, parent.pages, strict=True)):
            shared = pages[: self._page_count(stream.rows(tokens))]
            child.pages.append(shared)
            for index, page in enumerate(shared):
                if page is not None:
                    self.holders[page] += 1
                    entries.append((i, child.slot, index, page))
        parent.fresh = 0  # rows are shared from here on
        made = next(_ids)
        self.sequences[made] = child
        return made, Change(entries, [])

    def drop(self, sequences: Iterable[int]) -> None:
        """Forget sequences; pages that only they held are free again.

        Raises:
            UnknownSequence: one is unknown, or named twice; none is dropped then.
        """
        given = list(sequences)
        for i, sequence in enumerate(given):
            self.find(sequence)
            if sequence in given[:i]:
                raise UnknownSequence(f"sequence {sequence!r} is to be freed twice")
        for sequence in given:
            found = self.sequences.pop(sequence)
            for pages in found.pages:
                self._release(pages)
            self._slots.append(found.slot)

    def truncate(self, sequence: int, tokens: int) -> None:
        """Take back a sequence's last tokens.

        Raises:
            UnknownSequence: as for :meth:`find`.
            InputError: more tokens than there are, or fewer than can still be read.
        """
        found = self.find(sequence)
        self._check_prefix(found, tokens)
        for stream, pages in zip(self.streams, found.pages, strict=True):
            kept = self._page_count(stream.rows(tokens))
            self._release(pages[kept:])
            del pages[kept:]
        found.fresh = max(0, found.fresh - (found.tokens - tokens))
        found.tokens = tokens

    # --- rows --------------------------------------------------------------------------------------------------------------------

    def needed(self, more: Mapping[int, int]) -> int:
        """Pages that :meth:`extend` would take for so many more tokens of each sequence, copies included."""
        return sum(len(new) + len(copied) for _, plan in self._plans(more) for new, copied in plan)

    def extend(self, more: Mapping[int, int]) -> Change:
        """Make room for so many more tokens of each sequence, and count them as there.

        Raises:
            UnknownSequence: as for :meth:`find`.
            InputError: a sequence would be longer than ``max_tokens``.
            OutOfPages: there are not enough; nothing has changed then.
        """
        plans = self._plans(more)
        wanted = sum(len(new) + len(copied) for _, plan in plans for new, copied in plan)
        if wanted > self.free:
            raise OutOfPages(f"{wanted} pages are needed for {sum(more.values())} more tokens, {self.free} of {self.total} are free")
        change = Change([], [])
        for sequence, plan in plans:
            found = self.sequences[sequence]
            for i, (new, copied) in enumerate(plan):
                pages = found.pages[i]
                for index in copied:
                    old, page = pages[index], self._take()
                    assert old is not None  # a page that is written to is one that is kept
                    self._release([old])
                    change.copies.append((old, page))
                    pages[index] = page
                    change.entries.append((i, found.slot, index, page))
                for index in new:
                    pages.append(self._take())
                    change.entries.append((i, found.slot, index, pages[index]))  # type: ignore[arg-type]
            self._give_up(found)
            found.tokens += more[sequence]
            found.fresh = more[sequence]
        return change

    # --- parts -------------------------------------------------------------------------------------------------------------------

    def _plans(self, more: Mapping[int, int]) -> list[tuple[int, list[tuple[range, list[int]]]]]:
        """For each sequence, by stream: indices of pages to add, and of pages to copy as another sequence holds them too."""
        found = []
        taken: dict[int, int] = {}  # holders that other sequences of this call will have left, by page
        for sequence, tokens in more.items():
            here = self.find(sequence)
            if tokens < 0:
                raise InputError(f"sequence {sequence!r}: {tokens} more tokens")
            if here.tokens + tokens > self.max_tokens:
                raise InputError(f"sequence {sequence!r} would have {here.tokens + tokens} tokens, allowed are {self.max_tokens}")
            plan = []
            for stream, pages in zip(self.streams, here.pages, strict=True):
                before, after = stream.rows(here.tokens), stream.rows(here.tokens + tokens)
                copied = []
                if after > before:
                    for index in range(before // self.page_size, len(pages)):
                        page = pages[index]
                        if page is not None and self.holders[page] - taken.get(page, 0) > 1:
                            taken[page] = taken.get(page, 0) + 1
                            copied.append(index)
                plan.append((range(len(pages), self._page_count(after)), copied))
            found.append((sequence, plan))
        return found

    def _page_count(self, rows: int) -> int:
        return -(-rows // self.page_size)

    def _check_prefix(self, found: Held, tokens: int) -> None:
        if not 0 <= tokens <= found.tokens:
            raise InputError(f"{tokens} tokens of a sequence that has {found.tokens}")
        for stream, pages in zip(self.streams, found.pages, strict=True):
            rows = stream.rows(tokens)
            first = 0 if stream.keep is None else max(rows - stream.keep, 0)
            if None in pages[first // self.page_size : self._page_count(rows)]:
                raise InputError(
                    f"the first {tokens} of {found.tokens} tokens cannot be read any more: at most {self.rewind} can be taken back"
                )

    def _give_up(self, found: Held) -> None:
        """Let go of pages that tokens from here on do not read."""
        for stream, pages in zip(self.streams, found.pages, strict=True):
            if stream.keep is None:
                continue
            first = stream.rows(max(found.tokens - self.rewind, 0)) - stream.keep
            for index in range(max(first, 0) // self.page_size - 1, -1, -1):
                if pages[index] is None:
                    break
                self._release([pages[index]])
                pages[index] = None

    def _take(self) -> int:
        page = self._free.pop()
        self.holders[page] = 1
        return page

    def _take_slot(self) -> int:
        if not self._slots:
            raise OutOfPages(f"{len(self.sequences)} sequences exist, as many as max_sequences allows: free one")
        return self._slots.pop()

    def _release(self, pages: Iterable[int | None]) -> None:
        for page in pages:
            if page is not None:
                self.holders[page] -= 1
                if not self.holders[page]:
                    self._free.append(page)
