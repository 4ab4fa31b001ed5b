"""``PagedKVCache``: keys and values of many sequences for serving, in pages of one pool, with their compressed tokens.

Rows of K and V lie in pages ``[layers,pages,Hkv,page_size,D]``: a page is the same place in every layer, so that tables, lengths and what
the host knows serve all of them. Every sequence has *streams* of rows, each with a table of pages:

* shared K and V: ``tokens`` and ``compressed``;
* K and V per branch (paper section 3.3.3): ``pooled`` (what φ has yet to read), ``selected``, ``sliding`` and ``compressed``. Of ``pooled``
  and ``sliding`` only the rows that are still read are kept.

Which page is whose is decided on the host (:mod:`nsa_gen.pages`), which knows all lengths and never asks the device; tables and lengths are
copied there for the kernels. Row ``r`` of stream ``s`` of a sequence in slot ``i`` is row ``r % page_size`` of page
``tables[s,i,r // page_size]``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops
from .branches import decode
from .branches._inputs import DTYPES, SpecLike, geometry_of, on_device_of
from .config import COUNTERS, MOST_TOKENS
from .errors import InputError, allowed
from .pages import Change, Pages, Stream
from .replay import Repeats, replayed
from .rows import FP8, Places, Rows
from .spec import load

__all__ = ["PagedKVCache"]

_append = replayed(decode.append)
_repeats = Repeats()
_serials = itertools.count()

Branches = Tensor | tuple[Tensor, Tensor, Tensor]


class PagedKVCache:
    """Keys and values of many sequences, and their compressed tokens, in pages.

    With one layer, :meth:`append` does all. With several, :meth:`reserve` makes room once a step, and :meth:`fill` (or :meth:`write`, in a
    CUDA graph) brings each layer's rows.

    Args:
        spec: a name in ``specs/``, a path, or a ``Spec``: heads, head dims, blocks, and whether K and V are per branch.
        pages: how many there are. One holds rows of tokens, or of compressed tokens, of which a sequence has 1/stride as many.
        page_size: rows a page: a multiple of the spec's selection block, so that a block never lies in two.
        layers: of a model, which share tables.
        max_sequences: that exist at a time.
        max_seqlen: tokens of a sequence.
        dtype: of K and V as given and as read; default the spec's.
        storage: dtype of what is stored: ``dtype`` (default), or ``torch.float8_e4m3fn`` (of NVIDIA GPUs from sm_89 on).
        k_scale, v_scale: with fp8, what stored numbers are multiplied by: a number, ``[Hkv]``, ``[streams,Hkv]`` in the order of
            ``streams``, or ``[layers,streams,Hkv]``. Numbers past 448 times that are clipped.
        phi_k, phi_v: weights of φ, see :func:`nsa_gen.compress`; with several layers a list of these for each.
        rewind: tokens that can be taken back at a time where rows are given up (per branch): speculation that was wrong.
        heads_kv: KV heads; default the spec's, another number for a tensor-parallel shard.
        device: of pages and tables.

    Attributes:
        streams: names of the tables, in order.
        k_pages, v_pages: ``[layers,pages,Hkv,page_size,Dqk]`` and ``[…,Dv]``.
        tables: int32 ``[streams,max_sequences,max_pages]``.
        lengths: int32 ``[max_sequences]``, tokens by slot.

    Raises:
        InputError: an argument is impossible; the message names it and what is allowed.
        SpecError: no such spec, or a broken one.
    """

    def __init__(
        self,
        spec: SpecLike,
        pages: int,
        *,
        page_size: int = 64,
        layers: int = 1,
        max_sequences: int = 256,
        max_seqlen: int = 131072,
        dtype: torch.dtype | None = None,
        storage: torch.dtype | None = None,
        k_scale: float | Tensor = 1.0,
        v_scale: float | Tensor = 1.0,
        phi_k: Sequence[Tensor] | Sequence[Sequence[Tensor]] = (),
        phi_v: Sequence[Tensor] | Sequence[Sequence[Tensor]] = (),
        rewind: int = 16,
        heads_kv: int | None = None,
        device: str | torch.device = "cuda",
    ):
        loaded = load(spec)
        g = self.geometry = geometry_of(loaded)
        self.spec, self.per_branch = loaded, loaded.kv == "per_branch"
        self.dtype = dtype or getattr(torch, loaded.dtype)
        self.storage = storage or self.dtype
        least_of = {"pages": (pages, 0), "layers": (layers, 1), "max_sequences": (max_sequences, 1), "max_seqlen": (max_seqlen, 1)}
        for name, (value, least) in (least_of | {"rewind": (rewind, 0)}).items():
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number from {least}, got {value!r}")
        if not isinstance(page_size, int) or page_size < 1 or page_size % g.selection_block:
            raise InputError(f"page_size must be a multiple of the selection block, {g.selection_block}, got {page_size!r}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype: {allowed(self.dtype, DTYPES)}")
        if self.storage not in (self.dtype, FP8):
            raise InputError(f"storage: {allowed(self.storage, (self.dtype, FP8))}")
        heads = self.heads_kv = g.kv if heads_kv is None else heads_kv
        self.device, self.page_size = torch.device(device), page_size

        def compressed(tokens: int) -> int:
            return max(0, (tokens - g.block) // g.stride + 1)

        def all_of(tokens: int) -> int:
            return tokens

        streams = {"tokens": Stream(all_of)} if not self.per_branch else {
            "pooled": Stream(all_of, keep=g.block - 1), "selected": Stream(all_of),
            "sliding": Stream(all_of, keep=g.window + MOST_TOKENS - 2),  # the window of the first of as many as are decoded at a time
        }  # fmt: skip
        streams["compressed"] = Stream(compressed)
        self.streams = tuple(streams)
        self._pages = Pages(pages, page_size, tuple(streams.values()), max_sequences, max_seqlen, rewind)
        self._rows = Rows(
            g, self.streams, layers=layers, pages=pages, heads=heads, page_size=page_size, dtype=self.dtype, storage=self.storage,
            k_scale=k_scale, v_scale=v_scale, phi_k=phi_k, phi_v=phi_v, device=self.device,
        )  # fmt: skip
        self.layers, self.max_seqlen = layers, max_seqlen
        self.serial = next(_serials)  # no other cache has it, nor will one, but for copies
        self.k_pages, self.v_pages, self.phi, self.scales = self._rows.k_pages, self._rows.v_pages, self._rows.phi, self._rows.scales
        self.device = self.k_pages.device  # with its index
        made = {"dtype": torch.int32, "device": self.device}
        self.tables = torch.zeros(len(streams), max_sequences, -(-max_seqlen // page_size), **made)
        self.lengths = torch.zeros(max_sequences, **made)
        #: What the device was told of sequences, for the other layers: slots, and places of rows. Until sequences change.
        self._told: dict[Any, Any] = {}
        self.arrived = torch.zeros(COUNTERS * max_sequences * heads * MOST_TOKENS, **made)

    # --- sequences -----------------------------------------------------------------------------------------------------------------

    def create(self) -> int:
        """A new sequence without tokens: its id, which no other sequence of any cache ever has.

        Raises:
            OutOfPages: ``max_sequences`` exist.
        """
        made = self._pages.create()
        self._set_lengths([made])
        return made

    def fork(self, sequence: int, tokens: int | None = None) -> int:
        """A sequence that begins as another's first ``tokens`` (default all). Pages are shared until one of them writes into its last.

        Raises:
            UnknownSequence: freed already, or of another cache.
            OutOfPages: ``max_sequences`` exist.
            InputError: more tokens than there are, or rows of theirs were given up.
        """
        made, change = self._pages.fork(sequence, tokens)
        self._apply(change)
        self._set_lengths([made])
        return made

    def truncate(self, sequence: int, tokens: int) -> None:
        """Take back all but a sequence's first ``tokens``.

        Raises:
            UnknownSequence, InputError: as for :meth:`fork`.
        """
        self._pages.truncate(sequence, tokens)
        self._told.clear()
        self._set_lengths([sequence])

    def free(self, *sequences: int) -> None:
        """Forget sequences; pages that nobody else holds are free again.

        Raises:
            UnknownSequence: one is not in this cache, or given twice; none is freed then.
        """
        slots = [self._pages.find(sequence).slot for sequence in sequences]
        self._pages.drop(sequences)
        self._told.clear()
        self.lengths[torch.tensor(slots, dtype=torch.long, device=self.device)] = 0  # where a graph still has the slot, it writes nothing

    def length(self, sequence: int) -> int:
        """Tokens of a sequence. Raises ``UnknownSequence``."""
        return self._pages.find(sequence).tokens

    def slots(self, sequences: Sequence[int]) -> Tensor:
        """Where sequences are in ``tables`` and ``lengths``, int32 on the device. Raises ``UnknownSequence``."""
        return self._int32([self._pages.find(sequence).slot for sequence in sequences])

    # --- pages -------------------------------------------------------------------------------------------------------------------

    @property
    def pages_free(self) -> int:
        """Pages that nobody holds."""
        return self._pages.free

    @property
    def pages_total(self) -> int:
        """All pages."""
        return self._pages.total

    def pages_needed(self, tokens: Mapping[int, int]) -> int:
        """Pages that :meth:`append` would take for so many more tokens of each sequence. Raises ``UnknownSequence``, ``InputError``."""
        return self._pages.needed(tokens)

    # --- rows --------------------------------------------------------------------------------------------------------------------

    def append(self, sequences: Sequence[int], k: Branches, v: Branches, tokens: Sequence[int] | None = None) -> None:
        """Add tokens to sequences of a cache of one layer, and the compressed tokens that are complete with them.

        Args:
            sequences: each once.
            k, v: ``[T,Hkv,Dqk]``, ``[T,Hkv,Dv]``, the sequences' tokens one after the other; where K and V are per branch three of each,
                for the compressed, selected and sliding branch.
            tokens: of each sequence, T in all; default as many of each. Numbers on the host: reading them from the device would stall it.

        Raises:
            UnknownSequence: one is not in this cache.
            OutOfPages: not enough are free.
            InputError: another shape, dtype, device or number of tokens, a sequence longer than ``max_seqlen``, or several layers. In all
                three cases the cache is as before.
        """
        if self.layers > 1:
            raise InputError(f"append is for caches of one layer, this one has {self.layers}: reserve, then fill each of them")
        given = self._given(k, v)
        more = self.counts(sequences, given[0][0].shape[0], tokens)
        self._extend(more)
        self._fill(given, more, 0)

    def reserve(self, sequences: Sequence[int], tokens: int | Sequence[int] = 1) -> None:
        """Make room for so many more tokens of each sequence and count them as there; :meth:`fill` or :meth:`write` bring each layer's.

        Raises:
            UnknownSequence, OutOfPages, InputError: as for :meth:`append`; the cache is then as before.
        """
        each = [tokens] * len(sequences) if isinstance(tokens, int) else list(tokens)
        self._extend(self.counts(sequences, sum(each), each))

    def fill(self, sequences: Sequence[int], k: Branches, v: Branches, tokens: Sequence[int] | None = None, layer: int = 0) -> None:
        """Write the last tokens of sequences in one layer, for which there is room since :meth:`reserve`, and what they complete.

        Args:
            sequences, k, v, tokens: as for :meth:`append`. Where K and V are per branch, the tokens must be those of the last ``reserve``.

        Raises:
            UnknownSequence, InputError: as for :meth:`append`; or a sequence has not so many tokens, or there is no such layer, or a CUDA
                graph is being captured.
        """
        self.layer(layer)
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise InputError("fill cannot be captured in a CUDA graph: the host says where its rows go; write can")
        given = self._given(k, v)
        more = self.counts(sequences, given[0][0].shape[0], tokens)
        for sequence, count in more.items():
            fresh = self._pages.find(sequence).fresh
            if fresh < count:
                raise InputError(f"{count} tokens for sequence {sequence}: the last reserve made room for {fresh}")
        self._fill(given, more, layer)

    def write(self, k: Branches, v: Branches, slots: Tensor, layer: int = 0) -> None:
        """Write the last tokens of sequences, for which there is room since :meth:`reserve`, and what they complete: one kernel.

        Where they go the device knows: captured in a CUDA graph it serves any later step, each after a :meth:`reserve`.

        Args:
            k, v: ``[S*n,Hkv,D]``, n tokens of each of S sequences, 1 to 8; three of each where K and V are per branch.
            slots: int32 ``[S]``, as :meth:`slots` gives them.

        Raises:
            InputError: another shape, dtype, device, or number of tokens, or no such layer.
        """
        several = self.per_branch and type(k) is type(v) is tuple and len(k) == len(v) == 3
        new = (slots, *k, *v) if several else (slots, k, v)
        key, record = _repeats.find(new, self.serial, layer)
        if record is not None:
            held = *self.layer(layer), self.tables, *self._rows.stored_scales[layer], self.lengths, *itertools.chain(*self.phi[layer])
            if record(*new, *held) is not None:
                return
        self.layer(layer)
        given, count = self._given(k, v), self.check_slots(slots)
        total = given[0][0].shape[0]
        if not count or total % count or not 1 <= total // count <= MOST_TOKENS:
            raise InputError(f"{total} tokens for {count} sequences: allowed are 1 to {MOST_TOKENS} of each")
        self._fill_few(given, slots, layer, key)

    def read(self, sequence: int, stream: str = "tokens", layer: int = 0) -> tuple[Tensor, Tensor]:
        """K and V of a stream, ``[rows,Hkv,Dqk]`` and ``[rows,Hkv,Dv]`` in ``dtype``, in one piece.

        Raises:
            UnknownSequence: not in this cache.
            InputError: no such stream or layer, or rows of it were given up.
        """
        self.layer(layer)
        held = self._pages.find(sequence)
        if stream not in self.streams:
            raise InputError(f"stream: {allowed(stream, self.streams)}")
        number = self.streams.index(stream)
        if None in held.pages[number]:
            raise InputError(f"stream {stream!r} of sequence {sequence} has given its first rows up")
        return self.gather(number, [(sequence, 0, self.rows(sequence, number))], layer)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """``k_pages`` and ``v_pages`` of a layer. Raises ``InputError`` where there is none."""
        return self._rows.layer(layer)

    def rows(self, sequence: int, stream: int) -> int:
        """Rows of a stream (by number). Raises ``UnknownSequence``."""
        return self._pages.streams[stream].rows(self.length(sequence))

    # --- parts -------------------------------------------------------------------------------------------------------------------

    def _extend(self, more: Mapping[int, int]) -> None:
        self._told.clear()
        self._apply(self._pages.extend(more))
        self._set_lengths(list(more))

    def _fill(self, given: list[tuple[Tensor, Tensor]], more: Mapping[int, int], layer: int) -> None:
        """Store the last tokens of sequences, so many of each, and what they complete."""
        if len(set(more.values())) == 1 and 1 <= next(iter(more.values())) <= MOST_TOKENS:
            if tuple(more) not in self._told:
                self._told[tuple(more)] = self.slots(list(more))
            self._fill_few(given, self._told[tuple(more)], layer)
            return
        before = {sequence: self.length(sequence) - count for sequence, count in more.items()}
        for stream, (x, y) in enumerate(given):
            self._write(stream, [(s, before[s], before[s] + n) for s, n in more.items()], x, y, layer)
        self._compress(more, before, layer)

    def _fill_few(self, given: list[tuple[Tensor, Tensor]], slots: Tensor, layer: int, key: Any = None) -> None:
        args = (
            slots, *zip(*given, strict=True), *self.layer(layer), self.tables, self._rows.stored_scales[layer], self.lengths,
            *self.phi[layer], self.geometry.key, self.max_seqlen,
        )  # fmt: skip
        with on_device_of(self.lengths) or nullcontext():
            _append(*args)
        _repeats.note(key, _append, *args)

    def _given(self, k: Branches, v: Branches) -> list[tuple[Tensor, Tensor]]:
        """K and V of each stream that takes tokens, checked."""
        g, found = self.geometry, []
        wanted = 3 if self.per_branch else 1
        for name, x, dim in (("k", k, g.qk), ("v", v, g.v)):
            several = list(x) if isinstance(x, tuple | list) else [x]
            if len(several) != wanted or isinstance(x, tuple | list) != self.per_branch:
                need = "three tensors, for the compressed, selected and sliding branch" if self.per_branch else "one tensor"
                raise InputError(f"{name} must be {need} (kv: {self.spec.kv}), got {len(several)}")
            for y in several:
                if not isinstance(y, Tensor) or y.dim() != 3 or y.shape[1:] != (self.heads_kv, dim):
                    shape = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
                    raise InputError(f"{name} must be [T, Hkv, D] = [T, {self.heads_kv}, {dim}], got {shape}")
                if y.dtype != self.dtype or y.device != self.device:
                    raise InputError(f"{name} must be {self.dtype} on {self.device}, got {y.dtype} on {y.device}")
            found.append(several)
        total = found[0][0].shape[0]
        if any(y.shape[0] != total for several in found for y in several):
            raise InputError(f"k and v must have the same tokens, got {[y.shape[0] for several in found for y in several]}")
        return list(zip(*found, strict=True))

    def counts(self, sequences: Sequence[int], total: int, tokens: Sequence[int] | None) -> dict[int, int]:
        """How many of ``total`` tokens each sequence has: as ``tokens`` says, or all as many. Raises ``InputError`` if that cannot be."""
        if len(set(sequences)) != len(sequences):
            raise InputError(f"sequences: each once, got {list(sequences)}")
        if tokens is None:
            if total % max(len(sequences), 1) or (total and not sequences):
                raise InputError(f"{total} tokens for {len(sequences)} sequences: say with tokens= how many each has")
            tokens = [total // len(sequences)] * len(sequences) if sequences else []
        if len(tokens) != len(sequences) or sum(tokens) != total or any(not isinstance(n, int) or n < 0 for n in tokens):
            raise InputError(f"tokens must be {len(sequences)} numbers from 0 that add up to {total}, got {list(tokens)}")
        return dict(zip(sequences, tokens, strict=True))

    def check_slots(self, slots: Any) -> int:
        """How many there are. Raises ``InputError`` unless they are what :meth:`slots` gives."""
        if isinstance(slots, Tensor) and slots.dtype is torch.int32 and slots.dim() == 1 and slots.device == self.device:
            if slots.is_contiguous():
                return slots.shape[0]
            raise InputError(f"slots must be contiguous, got strides {slots.stride()}: a graph keeps the tensor that it was given")
        given = f"{slots.dtype} {list(slots.shape)} on {slots.device}" if isinstance(slots, Tensor) else type(slots).__name__
        raise InputError(f"slots must be int32 [S] on {self.device}, got {given}")

    def _compress(self, more: Mapping[int, int], before: Mapping[int, int], layer: int) -> None:
        """Write the compressed tokens that ``more`` has completed. φ reads what is stored, so it matters not how tokens came in."""
        g, number = self.geometry, len(self.streams) - 1
        rows = self._pages.streams[number].rows
        new = [(s, rows(before[s]), rows(before[s] + n)) for s, n in more.items()]
        new = [(s, first, last) for s, first, last in new if last > first]
        if not new:
            return
        reach = [(s, first * g.stride, (last - 1) * g.stride + g.block) for s, first, last in new]
        limits = [0, *itertools.accumulate(end - begin for _, begin, end in reach)]
        where: dict[str, Any] = {"spec": self.spec, "cu_seqlens": self._int32(limits), "max_seqlen": max(e - b for _, b, e in reach)}
        rows_of = [np.arange(last - first) + limit // g.stride for (_, first, last), limit in zip(new, limits[:-1], strict=True)]
        index = torch.from_numpy(np.concatenate(rows_of)).to(self.device)
        with torch.no_grad():
            x, y = self.gather(0, reach, layer)
            phi_k, phi_v = self.phi[layer]
            made = (ops.compress(x, phi_k, which="k", **where), ops.compress(y, phi_v, which="v", **where))
        self._write(number, new, *(x[index] for x in made), layer)

    def _places(self, stream: int, spans: Sequence[tuple[int, int, int]]) -> Places:
        """Page and row in it of rows ``first`` to ``last`` of some sequences, one after the other; the same for every layer."""
        spans = tuple(spans)
        known: Places | None = self._told.get((stream, spans))
        if known is not None:
            return known
        pages, offsets = [], []
        for sequence, first, last in spans:
            row = np.arange(first, last)
            index = row // self.page_size
            held = self._pages.find(sequence).pages[stream]
            low = first // self.page_size
            of_rows = held[low : -(-last // self.page_size)] or [0]
            if None in of_rows:
                raise InputError(f"rows {first} to {last} of sequence {sequence}, stream {self.streams[stream]!r}: some were given up")
            pages.append(np.array(of_rows, dtype=np.int64)[index - low])
            offsets.append(row % self.page_size)
        made = torch.from_numpy(np.stack([np.concatenate(pages), np.concatenate(offsets)])).to(self.device)
        found = self._told[stream, spans] = made[0], made[1]
        return found

    def _write(self, stream: int, spans: Sequence[tuple[int, int, int]], k: Tensor, v: Tensor, layer: int) -> None:
        if not spans:
            return
        self._rows.put(layer, stream, self._places(stream, spans), k, v)

    def gather(self, stream: int, spans: Sequence[tuple[int, int, int]], layer: int = 0) -> tuple[Tensor, Tensor]:
        """K and V ``[rows,Hkv,D]`` in ``dtype``: of each ``(sequence, first, last)`` these rows of a stream (by number), which are kept."""
        return self._rows.take(layer, stream, self._places(stream, spans))

    def _apply(self, change: Change) -> None:
        self._rows.copy(change.copies)
        if change.entries:
            stream, slot, index, page = torch.tensor(change.entries, device=self.device).T
            self.tables[stream, slot, index] = page.to(torch.int32)

    def _set_lengths(self, sequences: Sequence[int]) -> None:
        held = [self._pages.find(sequence) for sequence in sequences]
        slots, tokens = torch.tensor([[x.slot for x in held], [x.tokens for x in held]], dtype=torch.int64, device=self.device)
        self.lengths[slots] = tokens.to(torch.int32)

    def _int32(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)
