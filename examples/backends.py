"""The attentions of a serving engine, each with the cache it reads: NSA over paged caches, and full attention.

Both are a pool of pages for the scheduler (``examples/scheduler.py``) and take new tokens of many sequences, layer by layer:

* ``prefill(layer, q, k, v, gates, sequences, counts)``: ``counts[i]`` new tokens of each sequence, packed one sequence after the other;
* ``reserve(sequences)``, once for all layers, then ``decode(layer, q, k, v, gates, slots, positions)``: one new token of each. ``decode``
  is device work alone and reads from tensors where tokens are, so that a CUDA graph can hold it.

Shapes: q ``[T,Hq,Dqk]``, k ``[T,Hkv,Dqk]``, v ``[T,Hkv,Dv]``, three gates ``[T,Hq]``, slots int32 ``[S]``, positions int64 ``[S]``; what
comes back is ``[T,Hq,Dv]``. Where ``joint`` is set, ``prefill`` does everything: plain PyTorch, for a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import nsa_gen
from examples.model import Decoder
from examples.scheduler import PagePool
from nsa_gen import reference


class NSA:
    """NSA's kernels over a ``PagedKVCache`` of all layers."""

    joint = False

    def __init__(self, model: Decoder, *, pages: int, page_size: int, sequences: int, max_seqlen: int):
        weight, layers = model.head.weight, [block.attention for block in model.blocks]
        self.spec = layers[0].spec
        if self.spec.kv != "shared" or layers[0].phi_keys != "rotated":
            raise ValueError(
                f"spec {self.spec.name!r}: kv must be shared, as full attention has it, and pooling mean or weighted, whose φ reads keys "
                f"as the cache has them; got kv {self.spec.kv}, pooling {self.spec.compression.pooling}"
            )
        each = [[phi(weight.dtype) for phi in of_layers] for of_layers in zip(*((x.phi_k, x.phi_v) for x in layers), strict=True)]
        phi_k, phi_v = (weights if len(layers) > 1 else weights[0] for weights in each)
        self.cache = nsa_gen.PagedKVCache(
            self.spec, pages, page_size=page_size, layers=len(layers), max_sequences=sequences, max_seqlen=max_seqlen, dtype=weight.dtype,
            phi_k=phi_k, phi_v=phi_v, device=weight.device,
        )  # fmt: skip

    # --- sequences ---------------------------------------------------------------------------------------------------------------

    @property
    def pages_free(self) -> int:
        return self.cache.pages_free

    @property
    def pages_total(self) -> int:
        return self.cache.pages_total

    def pages_needed(self, tokens: Mapping[int, int]) -> int:
        return self.cache.pages_needed(tokens)

    def create(self) -> int:
        return self.cache.create()

    def fork(self, sequence: int, tokens: int) -> int:
        return self.cache.fork(sequence, tokens)

    def free(self, *sequences: int) -> None:
        self.cache.free(*sequences)

    def length(self, sequence: int) -> int:
        return self.cache.length(sequence)

    def slots(self, sequences: Sequence[int]) -> Tensor:
        return self.cache.slots(sequences)

    # --- a pass ------------------------------------------------------------------------------------------------------------------

    def prefill(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, gates: Sequence[Tensor], sequences: Sequence[int], counts: Sequence[int]
    ) -> Tensor:
        if layer == 0:
            self.cache.reserve(sequences, counts)
        self.cache.fill(sequences, k, v, counts, layer)
        return nsa_gen.nsa_prefill(q, *gates, cache=self.cache, sequences=sequences, tokens=counts, layer=layer)

    def reserve(self, sequences: Sequence[int]) -> None:
        self.cache.reserve(sequences)

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, gates: Sequence[Tensor], slots: Tensor, positions: Tensor) -> Tensor:
        self.cache.write(k, v, slots, layer)
        return nsa_gen.nsa_decode(q, *gates, cache=self.cache, slots=slots, layer=layer)


class PlainNSA(NSA):
    """The same pages, in plain PyTorch: rows are written by index and read in one piece; compressed tokens are made anew each time."""

    joint = True

    def prefill(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, gates: Sequence[Tensor], sequences: Sequence[int], counts: Sequence[int]
    ) -> Tensor:
        cache = self.cache
        tables, size, pages = cache.tables[cache.streams.index("tokens")], cache.page_size, cache.layer(layer)
        if layer == 0:
            cache.reserve(sequences, counts)
        slots = cache.slots(sequences).tolist()
        for sequence, slot, *given in zip(sequences, slots, k.split(list(counts)), v.split(list(counts)), strict=True):
            length = cache.length(sequence)
            row = torch.arange(length - len(given[0]), length, device=q.device)
            page = tables[slot, row // size].long()
            for held, new in zip(pages, given, strict=True):
                held[page, :, row % size] = new
        held = [cache.read(sequence, layer=layer) for sequence in sequences]
        limits = [0, *accumulate(len(x) for x, _ in held)]
        at = torch.cat([torch.arange(end - n, end, device=q.device) for end, n in zip(limits[1:], counts, strict=True)])

        def spread(x: Tensor) -> Tensor:
            return x.new_zeros(limits[-1], *x.shape[1:]).index_copy(0, at, x)

        return reference.nsa_attention(
            spread(q), torch.cat([x for x, _ in held]), torch.cat([y for _, y in held]), *map(spread, gates), self.spec, *cache.phi[layer],
            cu_seqlens=limits, queries=at,
        )  # fmt: skip


class Full(PagePool):
    """Full attention by PyTorch's FlashAttention. K and V of a sequence are in one piece, ``[layers,sequences,max_seqlen,Hkv,D]``.

    It counts pages as if it had them, ``ceil(n / page_size)``, so that the scheduler has as much room as with NSA. A fork copies rows.
    """

    joint = False

    def __init__(self, model: Decoder, *, pages: int, page_size: int, sequences: int, max_seqlen: int):
        super().__init__(pages, page_size, sequences, max_seqlen)
        heads, dim, weight = model.blocks[0].attention.spec.heads, model.blocks[0].attention.spec.head_dim, model.head.weight
        places = (len(model.blocks), sequences, max_seqlen, heads.kv)
        self.k, self.v = (torch.zeros(*places, d, dtype=weight.dtype, device=weight.device) for d in (dim.qk, dim.v))
        self.max_seqlen, self.scale = max_seqlen, dim.qk**-0.5
        if not self.joint and dim.qk != dim.v:
            raise ValueError(f"FlashAttention needs K and V of one head dim, got {dim.qk} and {dim.v}")

    def fork(self, sequence: int, tokens: int) -> int:
        made = super().fork(sequence, tokens)
        for x in (self.k, self.v):
            x[:, self.slot(made), :tokens] = x[:, self.slot(sequence), :tokens]
        return made

    def slots(self, sequences: Sequence[int]) -> Tensor:
        return torch.tensor([self.slot(sequence) for sequence in sequences], dtype=torch.int32, device=self.k.device)

    # --- a pass ------------------------------------------------------------------------------------------------------------------

    def prefill(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, gates: Sequence[Tensor], sequences: Sequence[int], counts: Sequence[int]
    ) -> Tensor:
        if layer == 0:  # one account for all layers, and all put their tokens in the same places
            self.extend(dict(zip(sequences, counts, strict=True)))
            self._lengths, self._slots = [self.length(s) for s in sequences], [self.slot(s) for s in sequences]
            pairs = list(zip(self._slots, self._lengths, counts, strict=True))
            places = [slot * self.max_seqlen + row for slot, length, n in pairs for row in range(length - n, length)]
            self._places = torch.tensor(places, device=q.device)
            self._counts = list(counts)
            self._limits = self._int32([0, *accumulate(counts)])
            self._starts, self._used = self._int32([slot * self.max_seqlen for slot in (*self._slots, 0)]), self._int32(self._lengths)
        for x, new in ((self.k[layer], k), (self.v[layer], v)):
            x.flatten(0, 1)[self._places] = new
        return self._attend(layer, q)

    def _attend(self, layer: int, q: Tensor) -> Tensor:
        return self._flash(layer, q, self._limits, self._starts, self._used, max(self._counts), max(self._lengths))

    def reserve(self, sequences: Sequence[int]) -> None:
        self.extend(dict.fromkeys(sequences, 1))

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, gates: Sequence[Tensor], slots: Tensor, positions: Tensor) -> Tensor:
        starts = slots * self.max_seqlen
        for x, new in ((self.k[layer], k), (self.v[layer], v)):
            x.flatten(0, 1)[starts + positions] = new
        limits = torch.arange(len(slots) + 1, dtype=torch.int32, device=q.device)
        return self._flash(layer, q, limits, functional.pad(starts, (0, 1)), (positions + 1).int(), 1, self.max_seqlen)

    def _flash(self, layer: int, q: Tensor, limits: Tensor, starts: Tensor, used: Tensor, most: int, longest: int) -> Tensor:
        """``used[i]`` keys from row ``starts[i]`` on for queries ``limits[i]`` to ``limits[i+1]``, the last of which sees all of them.

        With one query a sequence FlashAttention takes a group's heads as rows of one tile and splits the keys. This is the operator under
        ``torch.nn.attention.varlen.varlen_attn``, whose arguments differ between the versions of torch.
        """
        k, v = self.k[layer].flatten(0, 1), self.v[layer].flatten(0, 1)
        flash = torch.ops.aten._flash_attention_forward
        return flash(q, k, v, limits, starts, most, longest, 0.0, True, False, scale=self.scale, seqused_k=used)[0]

    def _int32(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.k.device)


class PlainFull(Full):
    """The same in plain PyTorch, one sequence after the other."""

    joint = True

    def _attend(self, layer: int, q: Tensor) -> Tensor:
        found = []
        for x, slot, length in zip(q.split(self._counts), self._slots, self._lengths, strict=True):
            k, v = (y[layer, slot, :length].transpose(0, 1) for y in (self.k, self.v))
            seen = torch.ones(len(x), length, dtype=torch.bool, device=q.device).tril(length - len(x))
            o = functional.scaled_dot_product_attention(x.transpose(0, 1), k, v, attn_mask=seen, enable_gqa=True)
            found.append(o.transpose(0, 1))
        return torch.cat(found)


def backend_of(model: Decoder, **sizes: Any) -> NSA | Full:
    """The attention of ``model`` with a cache where its weights are: on a GPU by kernels, elsewhere in plain PyTorch.

    Args:
        sizes: ``pages`` and ``page_size``; ``sequences`` that exist at a time; ``max_seqlen``, of each.

    Raises:
        ValueError: an attention that cannot be served, or not by these kernels.
    """
    gpu = model.head.weight.is_cuda
    if isinstance(model.blocks[0].attention, nsa_gen.NSAttention):
        return (NSA if gpu else PlainNSA)(model, **sizes)
    return (Full if gpu else PlainFull)(model, **sizes)
