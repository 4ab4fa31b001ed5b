"""What a paged cache must do, without pages of memory: each sequence's K and V in one piece, and the names of the pages that it would hold.

It is written anew from what ``PagedKVCache`` promises: copies are made of shared pages that are written to; where K and V are per branch,
rows that nothing reads any more are given up, whole pages of them, once the tokens that ``rewind`` lets come back do not need them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count

from torch import Tensor

from nsa_gen import Spec, reference
from nsa_gen.config import MOST_TOKENS

#: Rows a page, and tokens that can be taken back.
PAGE, REWIND = 32, 12


@dataclass
class Held:
    """A sequence of the model: K and V by branch, ``[n,Hkv,D]``, and by stream the names of its pages, None for those given up."""

    k: list[Tensor]
    v: list[Tensor]
    pages: dict[str, list[int | None]]

    @property
    def tokens(self) -> int:
        return len(self.k[0])


_Pages = dict[int, dict[str, list[int | None]]]


class Model:
    """Sequences as they would be without pages, and which pages they hold. A page has a name that no other ever has; nothing is counted."""

    def __init__(self, spec: Spec):
        self.compression, self.window = spec.compression, spec.window
        self.branches = ("pooled", "selected", "sliding") if spec.kv == "per_branch" else ("tokens",)
        self.streams = (*self.branches, "compressed")
        #: Rows before the next one that are still read, in streams that give rows up.
        self.keep = {"pooled": spec.compression.block - 1, "sliding": spec.window + MOST_TOKENS - 2}
        self.held: dict[int, Held] = {}
        self.names = count()

    def rows(self, stream: str, tokens: int) -> int:
        c = self.compression
        return reference.compressed_count(tokens, c.block, c.stride) if stream == "compressed" else tokens

    def in_use(self) -> int:
        """Pages that somebody holds."""
        return len({page for held in self.held.values() for pages in held.pages.values() for page in pages if page is not None})

    def plan(self, more: Mapping[int, int]) -> tuple[_Pages, int]:
        """All pages once some sequences have so many more tokens, and how many of them are taken: new ones and copies of shared ones."""
        found = {s: {stream: list(pages) for stream, pages in held.pages.items()} for s, held in self.held.items()}
        first = next(self.names)
        for s, n in more.items():
            tokens = self.held[s].tokens
            for stream, pages in found[s].items():
                before, after = self.rows(stream, tokens), self.rows(stream, tokens + n)
                if after > before and before % PAGE and sum(pages[-1] in other[stream] for other in found.values()) > 1:
                    pages[-1] = next(self.names)
                while len(pages) * PAGE < after:
                    pages.append(next(self.names))
        taken = next(self.names) - first - 1
        for s in more:
            for stream in self.keep.keys() & found[s].keys():
                gone = max(self.held[s].tokens - REWIND, 0) - self.keep[stream]
                found[s][stream][: max(gone, 0) // PAGE] = [None] * (max(gone, 0) // PAGE)
        return found, taken

    def kept(self, s: int, tokens: int) -> bool:
        """Whether what follows a sequence's first ``tokens`` could still read all that it must."""
        for stream, pages in self.held[s].pages.items():
            rows = self.rows(stream, tokens)
            first = max(rows - self.keep[stream], 0) if stream in self.keep else 0
            if None in pages[first // PAGE : -(-rows // PAGE)]:
                return False
        return True

    def cut(self, s: int, tokens: int) -> Held:
        """The first ``tokens`` of a sequence."""
        held = self.held[s]
        pages = {stream: pages[: -(-self.rows(stream, tokens) // PAGE)] for stream, pages in held.pages.items()}
        return Held([x[:tokens] for x in held.k], [x[:tokens] for x in held.v], pages)

    def newest(self, s: int) -> int:
        """How many of a sequence's last tokens have all of their windows."""
        held = self.held[s]
        gone = held.pages.get("sliding", []).count(None) * PAGE
        return max(held.tokens - self.window + 1 - gone, 0) if gone else held.tokens
