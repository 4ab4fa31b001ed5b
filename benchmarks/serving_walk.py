"""A long random walk over one ``PagedKVCache`` beside a plain model of it: nothing leaks, nothing diverges, and who finds no room changes
nothing.

Steps create, append to, fork, truncate and free sequences, and attend from their last tokens; pages are few, so that many steps find too
few. The model has each sequence in one piece, as the cache stores it, and says what a step takes and whether it may be taken at all.

* After every step the free pages and those of the model are all pages, lengths are the model's on host and device, and a stream of some
  sequence reads as the model's rows, to the bit. Compressed tokens are within a rounding of float64 ones of these rows.
* ``nsa_decode`` and ``nsa_prefill`` are held to the float64 reference on the model's rows by the rule of :mod:`nsa_gen.acceptance`.
  Compressed tokens are the cache's there, once they are checked: a rounding of theirs would choose other blocks. Queries whose choice of
  blocks is a tie within rounding are left out (``undecided``).
* A refused step leaves pages, tables, lengths and counters as they were, to the bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from benchmarks.serving_model import PAGE, REWIND, Held, Model
from nsa_gen import PagedKVCache, Spec, acceptance, nsa_decode, nsa_prefill, reference
from nsa_gen.errors import InputError, NSAError, OutOfPages

SPEC = {
    "schema": 1, "name": "walked", "heads": {"query": 6, "kv": 2}, "head_dim": {"qk": 16, "v": 32},
    "compression": {"block": 8, "stride": 4, "pooling": "mean"}, "selection": {"block": 16, "count": 6, "initial": 1, "local": 2},
    "window": 40,
}  # fmt: skip
FP8, FP8_MAX = "float8_e4m3fn", 448.0


@dataclass(frozen=True)
class Size:
    """How much a walk has to do.

    Args:
        pages, sequences, max_seqlen: of the cache. Where K and V are per branch it has half as many pages more.
        prompt: most tokens that one step adds to a sequence.
        step: most tokens that come at a time through the step kernel, and that decoding attends from.
        prefill: most tokens of a sequence that prefill attends from, ``held`` of them to the reference, over all sequences.
        together: most sequences of a step.
        weights: how often each step is taken.
    """

    pages: int
    sequences: int
    max_seqlen: int
    prompt: int
    step: int
    prefill: int
    held: int
    together: int
    weights: Mapping[str, int]


LARGE = Size(
    pages=140, sequences=16, max_seqlen=2048, prompt=1500, step=8, prefill=2048, held=96, together=6,
    weights={"create": 8, "append": 22, "prompt": 14, "reserve": 10, "fork": 10, "truncate": 8, "free": 3, "decode": 18, "prefill": 7},
)  # fmt: skip
#: For Triton's interpreter, which takes half a second for a call of nsa_decode and more for one of nsa_prefill.
SMALL = Size(
    pages=10, sequences=5, max_seqlen=140, prompt=60, step=3, prefill=8, held=8, together=2,
    weights={"create": 8, "append": 16, "prompt": 14, "reserve": 8, "fork": 12, "truncate": 10, "free": 5, "decode": 4, "prefill": 1},
)  # fmt: skip


class Walk:
    """The cache, its model, and what was found so far. Arguments as of :func:`walk`."""

    def __init__(self, kv: str, storage: str, seed: int, device: str | torch.device):
        dtype = "bfloat16" if storage == FP8 else storage
        self.spec, self.device = Spec.from_dict(SPEC | {"kv": kv, "dtype": dtype}), torch.device(device)
        self.dtype, self.storage = getattr(torch, dtype), getattr(torch, storage)
        self.size = SMALL if self.device.type == "cpu" else LARGE
        self.model, self.random = Model(self.spec), random.Random(seed)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        # Powers of two: what is stored, times these, is a number of dtype, so that rows are exact. The smallest clip a few numbers.
        shape = 2, len(self.model.streams), self.spec.heads.kv
        scales = torch.tensor([2.0**-8, 2.0**-7, 2.0**-6, 2.0**-5] if storage == FP8 else [1.0], device=self.device)
        self.scales = scales[torch.randint(len(scales), shape, device=self.device, generator=self.generator)]
        pages = self.size.pages * (3 if kv == "per_branch" else 2) // 2
        self.cache = PagedKVCache(
            self.spec, pages, page_size=PAGE, max_sequences=self.size.sequences, max_seqlen=self.size.max_seqlen, storage=self.storage,
            k_scale=self.scales[0], v_scale=self.scales[1], rewind=REWIND, device=self.device,
        )  # fmt: skip
        self.found: dict[str, Any] = dict.fromkeys(("decodes", "prefills", "out_of_pages", "queries", "undecided", "longest"), 0)
        self.found["worst"] = 0.0

    def choice(self) -> str:
        """The name of a step to take."""
        weights = self.size.weights
        return self.random.choices(list(weights), list(weights.values()))[0] if self.model.held else "create"

    # --- steps -------------------------------------------------------------------------------------------------------------------

    def create(self) -> None:
        if len(self.model.held) == self.size.sequences:
            return self.refused(self.cache.create, OutOfPages)
        k, v = self.values(0)
        self.model.held[self.cache.create()] = Held(k, v, {stream: [] for stream in self.model.streams})

    def append(self) -> None:
        """A few tokens, as many of each sequence: one kernel."""
        who, n = self.some(), self.random.randint(1, self.size.step)
        self.extend(dict.fromkeys(who, n), lambda k, v: self.cache.append(who, k, v))

    def prompt(self) -> None:
        """Of each sequence another number of tokens, of all orders of magnitude."""
        more = {s: int(self.size.prompt ** self.random.random()) - self.random.randint(0, 1) for s in self.some()}
        self.extend(more, lambda k, v: self.cache.append(list(more), k, v, list(more.values())))

    def reserve(self) -> None:
        """Room, and then what fills it, as where a CUDA graph has the latter."""
        who, n = self.some(), self.random.randint(1, self.size.step)

        def both(k: Any, v: Any) -> None:
            self.cache.reserve(who, n)
            self.cache.write(k, v, self.cache.slots(who))

        self.extend(dict.fromkeys(who, n), both)

    def fork(self) -> None:
        s = self.random.choice(list(self.model.held))
        tokens = self.model.held[s].tokens
        prefix = self.random.choice([tokens, max(tokens - self.random.randint(0, REWIND), 0), self.random.randint(0, tokens)])
        if not self.model.kept(s, prefix):
            return self.refused(lambda: self.cache.fork(s, prefix), InputError)
        if len(self.model.held) == self.size.sequences:
            return self.refused(lambda: self.cache.fork(s, prefix), OutOfPages)
        made = self.cache.fork(s, None if prefix == tokens else prefix)
        self.model.held[made] = self.model.cut(s, prefix)

    def truncate(self) -> None:
        s = self.random.choice(list(self.model.held))
        left = max(self.model.held[s].tokens - self.random.randint(0, REWIND), 0)
        if not self.model.kept(s, left):
            return self.refused(lambda: self.cache.truncate(s, left), InputError)
        self.cache.truncate(s, left)
        self.model.held[s] = self.model.cut(s, left)

    def free(self) -> None:
        who = self.some(most=2)
        self.cache.free(*who)
        for s in who:
            del self.model.held[s]

    def decode(self) -> None:
        n = self.random.randint(1, self.size.step)
        able = [s for s in self.model.held if self.model.newest(s) >= n]
        if able:
            who = self.some(of=able)
            q, gates = self.queries(len(who) * n)
            shaped = [x if n == 1 else x.unflatten(0, (len(who), n)) for x in (q, *gates)]
            how = self.random.choice([{"sequences": who}, {"slots": self.cache.slots(who)}])
            o = nsa_decode(*shaped, cache=self.cache, **how)
            self.held_to_reference(dict.fromkeys(who, n), q, gates, o if n == 1 else o.flatten(0, 1))
            self.found["decodes"] += 1

    def prefill(self) -> None:
        most = {s: min(self.model.newest(s), self.size.prefill) for s in self.model.held}
        able = [s for s, n in most.items() if n]
        if able:
            counts = {s: self.random.choice([most[s], self.random.randint(1, most[s])]) for s in self.some(of=able)}
            q, gates = self.queries(sum(counts.values()))
            o = nsa_prefill(q, *gates, cache=self.cache, sequences=list(counts), tokens=list(counts.values()))
            self.held_to_reference(counts, q, gates, o)
            self.found["prefills"] += 1

    # --- what steps are made of --------------------------------------------------------------------------------------------------

    def some(self, most: int | None = None, of: Sequence[int] | None = None) -> list[int]:
        """A few sequences, in any order."""
        there = list(self.model.held if of is None else of)
        return self.random.sample(there, self.random.randint(1, min(len(there), most or self.size.together)))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator).to(self.dtype)

    def values(self, n: int) -> tuple[list[Tensor], list[Tensor]]:
        """K and V of n new tokens, by branch."""
        dims = self.spec.head_dim.qk, self.spec.head_dim.v
        k, v = ([self.normal(n, self.spec.heads.kv, dim) for _ in self.model.branches] for dim in dims)
        return k, v

    def queries(self, n: int) -> tuple[Tensor, list[Tensor]]:
        heads = self.spec.heads.query
        return self.normal(n, heads, self.spec.head_dim.qk), [self.normal(n, heads).sigmoid() for _ in range(3)]

    def extend(self, more: dict[int, int], call: Callable[[Any, Any], None]) -> None:
        """Have ``call`` add new K and V to some sequences, or refuse to as the model says it must."""
        held, cache = self.model.held, self.cache
        k, v = self.values(sum(more.values()))
        given = [tuple(x) if len(x) > 1 else x[0] for x in (k, v)]
        if any(held[s].tokens + n > self.size.max_seqlen for s, n in more.items()):
            return self.refused(lambda: call(*given), InputError)
        pages, taken = self.model.plan(more)
        assert cache.pages_needed(more) == taken, f"pages_needed says {cache.pages_needed(more)} for {more}, the model {taken}"
        if taken > cache.pages_free:
            self.refused(lambda: call(*given), OutOfPages)
            self.found["out_of_pages"] += 1
            if self.random.random() < 0.3:  # as an engine does, which then goes on
                self.free()
            return
        call(*given)
        for which, new in enumerate((k, v)):
            for branch, x in enumerate(new):
                stored = self.stored(x, self.scales[which, branch]).split(list(more.values()))
                for s, rows in zip(more, stored, strict=True):
                    mine = held[s].v if which else held[s].k
                    mine[branch] = torch.cat([mine[branch], rows])
        for s, its in pages.items():
            held[s].pages = its

    def stored(self, x: Tensor, scale: Tensor) -> Tensor:
        """Rows as a cache gives them back."""
        if self.storage is self.dtype:
            return x
        scale = scale[:, None]
        return ((x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(self.storage).float() * scale).to(self.dtype)

    def refused(self, call: Callable[[], object], error: type[NSAError]) -> None:
        before, free = [x.clone() for x in self.bits()], self.cache.pages_free
        try:
            call()
        except error:
            pass
        else:
            raise AssertionError(f"{error.__name__} was due")
        same = free == self.cache.pages_free and all(map(torch.equal, before, self.bits()))
        assert same, f"{error.__name__} was raised, and something has changed"

    def bits(self) -> Iterator[Tensor]:
        c = self.cache
        for x in (c.k_pages, c.v_pages, c.tables, c.lengths, c.arrived):
            yield x.view(torch.uint8)

    # --- what is asserted --------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """After a step: no page is lost, lengths agree, and some sequence reads as it should."""
        cache, held = self.cache, self.model.held
        used = self.model.in_use()
        assert cache.pages_free + used == cache.pages_total, f"{cache.pages_free} pages are free, {used} of {cache.pages_total} in use"
        wanted = [one.tokens for one in held.values()]
        assert [cache.length(s) for s in held] == wanted, "lengths on the host"
        assert cache.lengths[cache.slots(list(held))].tolist() == wanted, "lengths on the device"
        self.found["longest"] = max(self.found["longest"], *wanted, 0)
        if held:
            self.read(self.random.choice(list(held)), self.random.choice(self.model.streams))

    def read(self, s: int, stream: str) -> tuple[Tensor, Tensor] | None:
        """A stream of a sequence, which is as the model has it; or nothing, where the model has given rows up too."""
        held = self.model.held[s]
        if None in held.pages[stream]:
            self.refused(lambda: self.cache.read(s, stream), InputError)
            return None
        found = self.cache.read(s, stream)
        if stream != "compressed":
            branch = self.model.branches.index(stream)
            for name, x, wanted in zip("KV", found, (held.k[branch], held.v[branch]), strict=True):
                same = x.shape == wanted.shape and bool(torch.equal(x, wanted))
                assert same, f"{name} of stream {stream}, {len(wanted)} rows: {self.difference(x, wanted)}"
            return found
        c = self.spec.compression
        step = 0.0 if self.storage is self.dtype else 2.0**-4  # half of one of fp8's, relative
        for name, x, rows, scale in zip("KV", found, (held.k[0], held.v[0]), self.scales[:, -1], strict=True):
            exact = reference.compress(rows, c.pooling, (), c.block, c.stride, dtype=torch.float64)[: self.model.rows(stream, held.tokens)]
            smallest = scale.double()[:, None] * 2.0**-10 if step else 0.0
            limit = FP8_MAX * scale.double()[:, None] if step else torch.inf
            granted = (step + acceptance.FLOOR[self.dtype]) * exact.abs() + smallest + 1e-6
            close = x.shape == exact.shape and bool(((x.double() - exact.clamp(-limit, limit)).abs() <= granted).all())
            assert close, f"{name} of stream {stream}, {len(exact)} rows: {self.difference(x, exact)}"
        return found

    def difference(self, x: Tensor, wanted: Tensor) -> str:
        if x.shape != wanted.shape:
            return f"{list(x.shape)} instead of {list(wanted.shape)}"
        off = (x.double() - wanted.double()).abs().amax((1, 2))
        return f"first differs in row {int((off > 0).int().argmax())}, by {float(off.max()):.1e} at most"

    def held_to_reference(self, counts: Mapping[int, int], q: Tensor, gates: list[Tensor], o: Tensor) -> None:
        """Assert that ``o [R,Hq,Dv]`` is attention from the last tokens of some sequences, ``counts`` of each, in rows taken at random."""
        spec, c, chosen = self.spec, self.spec.compression, self.spec.selection
        held = [self.model.held[s] for s in counts]
        lengths = [one.tokens for one in held]
        limits = [0, *accumulate(lengths)]
        total = limits[-1]
        k, v = (tuple(torch.cat(several) for several in zip(*x, strict=True)) for x in ([h.k for h in held], [h.v for h in held]))
        compressed = tuple(x[0].new_zeros(reference.compressed_rows(total, c.stride), *x[0].shape[1:]) for x in (k, v))
        for s, start in zip(counts, limits, strict=False):
            rows = self.read(s, "compressed")
            assert rows is not None
            for whole, part in zip(compressed, rows, strict=True):
                whole[start // c.stride : start // c.stride + len(part)] = part
        position = torch.cat([torch.arange(n - new, n) for n, new in zip(lengths, counts.values(), strict=True)]).to(self.device)
        starts = torch.tensor(limits[:-1], device=self.device)
        at = position + starts.repeat_interleave(torch.tensor(list(counts.values()), device=self.device))
        picked = torch.tensor(sorted(self.random.sample(range(len(q)), min(len(q), self.size.held))), device=self.device)
        queries, position = at[picked], position[picked]

        def spread(x: Tensor, where: Tensor = at) -> Tensor:
            return x.new_zeros(total, *x.shape[1:]).index_copy(0, where, x)

        q, gates = spread(q), [spread(g) for g in gates]
        how: dict[str, Any] = {"cu_seqlens": limits, "queries": queries}
        exactly = {"dtype": torch.float64, **how}
        _, lse = reference.compressed_attention(q, *compressed, c.block, c.stride, **exactly)
        scores = reference.importance(q, compressed[0], spread(lse, queries), c.block, c.stride, chosen.block, chosen.mapping, **exactly)
        blocks = reference.select_at(scores, position, chosen.block, chosen.count, chosen.initial, chosen.local)
        decided = self.decided(scores, blocks, position, lse)
        how |= {"compressed": compressed, "block_indices": spread(blocks, queries)}
        several = (k, v) if len(k) > 1 else (k[0], v[0])
        exact, eager = (reference.nsa_attention(q, *several, *gates, spec, dtype=d, **how) for d in (torch.float64, self.dtype))
        found = acceptance.check_floats({"o": exact[decided]}, {"o": eager[decided]}, {"o": o}, picked[decided])
        assert found.ok, f"{dict(zip(lengths, counts.values(), strict=False))} new tokens by length: {found.message}"
        assert not self.cache.arrived.any(), "arrived is not 0 again"
        self.found["queries"] += len(picked)
        self.found["undecided"] += len(picked) - int(decided.sum())
        self.found["worst"] = max(self.found["worst"], found.errors["o"]["rel_fro"])

    def decided(self, scores: Tensor, blocks: Tensor, position: Tensor, lse: Tensor) -> Tensor:
        """Which queries ``[S]`` would choose the same ``blocks`` if scores were a little off, by twice what a kernel's may be."""
        chosen, columns = self.spec.selection, torch.arange(scores.shape[2], device=self.device)
        current = (position // chosen.block)[:, None]
        forced = (columns < chosen.initial) | (columns > current - chosen.local)
        taken = (blocks[..., None] == columns).any(2)
        worst = torch.where(taken & ~forced[:, None], scores, torch.inf).amin(2)
        best = torch.where(~taken & (columns <= current)[:, None], scores, -torch.inf).amax(2)
        seen = lse[lse.isfinite()]
        rtol = 2e-4 + 3.2e-5 * (float(seen.abs().max()) if len(seen) else 0.0)
        return (best < worst * (1 - rtol)).all(1)

    def end(self) -> None:
        """Everything is read once more; freed, it leaves nothing."""
        for s in self.model.held:
            for stream in self.model.streams:
                self.read(s, stream)
        self.cache.free(*self.model.held)
        assert self.cache.pages_free == self.cache.pages_total, f"{self.cache.pages_free} pages are free at last"
        assert not self.cache.arrived.any(), "arrived is not 0 at last"


def walk(kv: str, storage: str, steps: int, seed: int, device: str | torch.device) -> dict[str, Any]:
    """Walk; small on a CPU (Triton's interpreter, which does not store fp8 right), lengths to 2048 on a GPU.

    Args:
        kv: ``shared`` or ``per_branch`` K and V.
        storage: dtype of what the cache holds: that of K and V, or ``float8_e4m3fn`` of bfloat16 K and V.
        steps: how many.
        seed: of steps and values.

    Returns:
        ``steps``; ``decodes`` and ``prefills`` compared; times ``out_of_pages``; ``queries`` compared, and the
        ``undecided`` among them; the ``longest`` sequence; the ``worst`` relative error of a call (norms).

    Raises:
        AssertionError: something is wrong; the message names the step.
    """
    made = Walk(kv, storage, seed, device)
    for number in range(steps):
        name = made.choice()
        try:
            getattr(made, name)()
            made.check()
        except Exception as error:
            what = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            raise AssertionError(f"{kv}, {storage}, seed {seed}: step {number}, {name}: {what}{error}") from error
    made.end()
    return {"steps": steps, **made.found}
