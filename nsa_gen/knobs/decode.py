"""Spaces of the serving kernels."""

from __future__ import annotations

from ..config import FP8, Config, Problem, Value
from ..render import next_power_of_two
from .space import Knob, Space

SPACES: dict[str, Space] = {}

_STAGES = (1, 2, 3, 4, 5, 6, 7)  # a pipeline of n stages holds n - 1 tiles of K and V
_PROGRAMS = (64, 128, 256, 384, 512, 1024, 2048)
SPACES["decode_fwd"] = Space(
    knobs=(
        # Programs that share compressed tokens, of all sequences and KV heads together (half for windows), and the fewest tiles of one.
        Knob("PROGRAMS", _PROGRAMS),
        Knob("LEAST", (1, 2, 4, 8)),
        Knob("TOGETHER", (0, 16, 64)),  # most sequences times KV heads of which programs wait for each other, to choose together
        Knob("block_stages", (1, 2, 3, 4)),  # of the loop in which importance is put together, BLOCK_B blocks at a time
        Knob("keep_sums", (False, True)),  # in L2, before keys and values, until importance is put together
        Knob("CHOSEN_PROGRAMS", _PROGRAMS),  # that share chosen blocks, of all new tokens and KV heads together
        Knob("chosen_stages", _STAGES),  # of the loop over chosen blocks
        Knob("sum_stages", (1, 2, 3, 5)),  # partial results under way, when they are put together
        Knob("chain", (False, True)),  # programs are there before the kernel before theirs ends (NVIDIA GPUs from sm_90 on)
        Knob("num_stages", _STAGES),
        Knob("maxnreg", (None, 96, 128, 168)),  # of the first kernel
        # What is legal depends on the rest: last, so that a list of all legal configs begins at once.
        Knob("CHOSEN_LEAST", (1, 2, 4)),  # the fewest chosen blocks of a program
        Knob("chosen_blocks", (1, 2, 4)),  # of a tile
        Knob("chosen_warps", (1, 2, 4, 8)),
        Knob("asm", (False, True)),  # inline assembly (of NVIDIA GPUs)
        Knob("num_warps", (1, 2, 4, 8)),
        Knob("BLOCK_B", (16, 32, 64, 128, 256, 512)),
        Knob("BLOCK_N", (16, 32, 64, 128)),  # compressed tokens, or tokens of the window, a tile
    ),
    defaults={
        "": lambda p: _decode(p, 32),
        "gfx942": lambda p: _decode(p, 32, room=32768),
        **dict.fromkeys(("sm_90", "sm_100"), lambda p: _decode(p, 64, room=98304) | {"chain": True, "asm": True, "TOGETHER": 16}),
    },
    safe=lambda p: _decode(p, 16) | {"num_stages": 1, "chosen_blocks": 1, "chosen_stages": 1, "sum_stages": 1},
    illegal=lambda p, c: _decode_fault(p, c),
)


def _stages(p: Problem, rows: int, room: int) -> int:
    """As many as ``room`` bytes of shared memory have tiles of ``rows`` keys for. Where memory is large there are two in any case that has
    room for them: then one comes while one is worked on. None is kept there that leaves no room for anything else."""
    tile = rows * 2 * _padded(p) * (1 if p.storage == FP8 else 4 if p.dtype == "float32" else 2)
    if 2 * tile > 3 * room:
        return 1
    return min(max(room // tile, 2 if room > 65536 and tile <= 98304 else 1), 6) + 1


_PROJECT = {"body": ("project",)}
SPACES["cache_append"] = Space(
    knobs=(
        # The pooling decides the body: mean and weighted add tokens up, linear and mlp go through a matrix, BLOCK_K elements of a token at
        # a time, and BLOCK_U hidden units.
        Knob("body", ("stream", "project")),
        Knob("BLOCK_K", (16, 32, 64), _PROJECT),
        Knob("BLOCK_U", (16, 32, 64), _PROJECT),
        Knob("chain", (False, True)),  # a kernel that waits for what this one writes may start with it (NVIDIA GPUs from sm_90 on)
        Knob("num_warps", (1, 2, 4, 8)),
    ),
    defaults={"": lambda p: _append(p, 32)} | dict.fromkeys(("sm_90", "sm_100"), lambda p: _append(p, 32) | {"chain": True}),
    safe=lambda p: _append(p, 16),
    illegal=lambda p, c: (
        f"pooling {p.pooling} is computed by body {_append_body(p)}" if c.body != _append_body(p)
        else f"tiles of {c.BLOCK_K} x {_padded(p)} need more registers than {c.num_warps} warps have"
        if c.body == "project" and max(c.BLOCK_K, c.BLOCK_U) * max(_padded(p), c.BLOCK_U) > 64 * 32 * c.num_warps
        else None
    ),
)  # fmt: skip


def _append_body(p: Problem) -> str:
    return "stream" if p.pooling in ("mean", "weighted") else "project"


def _append(p: Problem, step: int) -> dict[str, Value]:
    if _append_body(p) == "stream":
        return {"body": "stream", "chain": False, "num_warps": 1}
    return {"body": "project", "BLOCK_K": step, "BLOCK_U": step, "chain": False, "num_warps": 8}


def _rows(p: Problem) -> int:
    """Rows of a program: the group of every new token."""
    return next_power_of_two(p.group * p.tokens, 16)


def _padded(p: Problem) -> int:
    """The wider head dim, as tiles hold it."""
    return next_power_of_two(max(p.head_dim_qk, p.head_dim_v))


def _members(p: Problem) -> int:
    """Rows of a program of the second kernel: the group of one token."""
    return next_power_of_two(p.group, 16)


def _chosen_bytes(p: Problem) -> int:
    """Of K or V of a block, as products read them."""
    return p.selection_block * _padded(p) * (4 if p.dtype == "float32" else 2)


def _decode(p: Problem, tile: int, room: int = 65536) -> dict[str, Value]:
    units = p.selection_block // p.stride
    rows = _rows(p)
    if p.dtype == "float32" or _padded(p) > 128:
        tile = min(tile, 32)
    tile = max(min(tile, p.page_size & -p.page_size), units, 16)  # tiles fill pages, which need not be powers of two
    warps = 8 if rows > 32 or _padded(p) > 128 else 4
    blocks = max((1024 if _padded(p) > 128 else 2048 if p.storage == FP8 else 4096) // rows, 16)
    chosen, scores = _members(p) * next_power_of_two(p.head_dim_v), _members(p) * p.selection_block
    at_once = 2 if p.storage == FP8 and p.count > 1 and _chosen_bytes(p) <= 16384 and scores <= 1024 else 1  # bytes are few, waits are not
    return {
        "BLOCK_N": tile, "PROGRAMS": 512 if p.storage == FP8 else 256, "LEAST": 4, "TOGETHER": 0,
        "BLOCK_B": blocks, "block_stages": 1, "keep_sums": True,
        "CHOSEN_PROGRAMS": 128, "CHOSEN_LEAST": min(2, p.count), "chosen_blocks": at_once,
        "chosen_warps": 8 if _chosen_bytes(p) > 16384 or max(chosen, scores) >= 8192 else 4,
        "chosen_stages": min(_stages(p, at_once * p.selection_block, room), 5 - at_once),
        "sum_stages": min(3, 1 + room // (8 * chosen)), "chain": False,
        "num_warps": warps, "num_stages": min(_stages(p, tile, room), 3 if p.storage == FP8 else 4), "maxnreg": None, "asm": False,
    }  # fmt: skip


def _decode_fault(p: Problem, c: Config) -> str | None:
    units, rows = p.selection_block // p.stride, _rows(p)
    if p.page_size % c.BLOCK_N:
        return f"tiles of {c.BLOCK_N} rows do not fill pages of {p.page_size}"
    if c.BLOCK_N % units:
        return f"tiles of {c.BLOCK_N} compressed tokens hold no whole number of blocks, {units} each"
    if rows * (_padded(p) + 2 * c.BLOCK_N) > 256 * 32 * c.num_warps:
        return f"{rows} rows by {c.BLOCK_N} keys and head dim {_padded(p)} need more registers than {c.num_warps} warps have"
    if rows * c.BLOCK_B > 64 * 32 * c.num_warps:
        return f"{rows} rows by {c.BLOCK_B} blocks need more registers than {c.num_warps} warps have"
    if p.count < c.CHOSEN_LEAST:
        return f"{c.CHOSEN_LEAST} of {p.count} blocks"
    held, keys = _chosen_bytes(p), c.chosen_blocks * p.selection_block
    wide = c.chosen_blocks * held > 512 * 32 * c.chosen_warps or _members(p) * keys > 64 * 32 * c.chosen_warps
    if (c.chosen_warps < 4 and held > 16384) or (c.chosen_blocks > 1 and wide):
        return f"tiles of {keys} keys on {c.chosen_warps} warps need too many registers"
    if c.chosen_blocks > p.count:
        return f"tiles of {c.chosen_blocks} of {p.count} blocks"
    return None
