"""Spaces of the forward's kernels."""

from __future__ import annotations

from ..config import Config, Problem, Value, overlap_weights
from .space import Knob, Space

SPACES: dict[str, Space] = {}

SPACES["selected_attention_fwd"] = Space(
    knobs=(
        Knob("loop", ("query_outer", "kv_outer")),
        # query_outer: operands "keys" puts keys on the tensor core's rows (wgmma), "rows" the group's heads (mma of 16 rows).
        Knob("operands", ("rows", "keys"), {"loop": ("query_outer",)}),
        Knob("loads", ("pointer", "descriptor"), {"loop": ("query_outer",)}),
        Knob("num_warps", (1, 2, 4), {"loop": ("query_outer",)}),
        Knob("num_stages", (1, 2, 3, 4), {"loop": ("query_outer",)}),
        # kv_outer: tokens a chunk, queries a gather program, rows of its tiles, of the dense kernel's and the merge kernel's.
        Knob("CHUNK", (2048, 4096, 8192, 16384, 32768, 65536), {"loop": ("kv_outer",)}),
        Knob("ENTRIES", (32, 64, 128, 256, 512, 1024), {"loop": ("kv_outer",)}),
        Knob("GATHER_M", (64, 128), {"loop": ("kv_outer",)}),
        Knob("gather_warps", (4, 8), {"loop": ("kv_outer",)}),
        Knob("gather_stages", (1, 2), {"loop": ("kv_outer",)}),
        Knob("gather_registers", (None, 128, 168), {"loop": ("kv_outer",)}),
        Knob("DENSE_M", (64, 128), {"loop": ("kv_outer",)}),
        Knob("dense_warps", (4, 8), {"loop": ("kv_outer",)}),
        Knob("dense_stages", (1, 2, 3), {"loop": ("kv_outer",)}),
        Knob("dense_registers", (None, 128, 168), {"loop": ("kv_outer",)}),
        Knob("MERGE_M", (2, 4, 8, 16), {"loop": ("kv_outer",)}),
        Knob("merge_warps", (1, 2, 4, 8), {"loop": ("kv_outer",)}),
        Knob("merge_registers", (None, 40, 64), {"loop": ("kv_outer",)}),
    ),
    defaults={"": lambda p: _selected_default(p)},
    safe=lambda p: {"loop": "query_outer", "operands": "rows", "loads": "pointer", "num_warps": 4, "num_stages": 1},
    illegal=lambda p, c: _selected_illegal(p, c),
)


def _selected_default(p: Problem) -> dict[str, Value]:
    entries = 1024 if p.group == 1 else 512 if p.group <= 4 else 128
    return {
        "loop": "kv_outer",
        "CHUNK": 8192,
        "ENTRIES": entries,
        "GATHER_M": 64,
        "gather_warps": 4,
        "gather_stages": 1,
        "gather_registers": 128 if max(p.head_dim_qk, p.head_dim_v) <= 128 and p.dtype != "float32" else None,
        "DENSE_M": 64,
        "dense_warps": 4,
        "dense_stages": 1,
        "dense_registers": 168 if max(p.head_dim_qk, p.head_dim_v) <= 128 and p.dtype != "float32" else None,
        "MERGE_M": 2,
        "merge_registers": None,
        "merge_warps": 1,
    }


def _selected_illegal(p: Problem, c: Config) -> str | None:
    if c.loop == "query_outer" and (reason := descriptor_fault(p, c)):
        return reason
    if c.loop == "query_outer" and c.loads == "descriptor" and c.num_stages == 1:
        return "descriptor loads without a pipeline"
    if c.loop == "query_outer" and c.operands == "keys" and c.num_warps * 16 > max(p.selection_block, 16):
        return f"{c.num_warps} warps on a block of {p.selection_block} keys leave warps without rows"
    if c.loop == "query_outer" and c.operands == "keys" and c.num_stages == 1:
        return "keys on the rows without a pipeline: Triton 3.6 makes code for sm_90 that accesses memory illegally"
    if c.loop == "kv_outer" and c.gather_registers is not None and c.gather_warps * 32 * c.gather_registers > 65536:
        return "more registers than a multiprocessor has"
    return None


# Sliding attention, and the same with the merge of selected attention behind it.
_SLIDING_KNOBS = (
    Knob("loads", ("pointer", "descriptor")),  # of K and V, but for tiles that begin before their sequence
    # "edges": only the tiles on the window's two ends are masked; "all": one loop, masked throughout.
    Knob("mask", ("edges", "all")),
    Knob("BLOCK_M", (32, 64, 128, 256)),
    Knob("BLOCK_N", (16, 32, 64, 128)),
    Knob("num_warps", (4, 8)),
    Knob("num_stages", (1, 2, 3, 4)),
    Knob("maxnreg", (None, 128, 168)),
)
SPACES["sliding_attention_fwd"] = Space(
    knobs=_SLIDING_KNOBS,
    defaults={
        "": lambda p: _sliding_default(p, keys=32, stages=2),
        "sm_90": lambda p: _sliding_default(p, keys=64, stages=3, wgmma=True),
        "sm_100": lambda p: _sliding_default(p, keys=64, stages=3, wgmma=True),
        "gfx942": lambda p: _sliding_default(p, keys=64, stages=2),
    },
    safe=lambda p: _sliding_safe(),
    illegal=lambda p, c: _sliding_illegal(p, c),
)
SPACES["sliding_merge_fwd"] = Space(
    knobs=(
        # The loop over partial results: loads in flight in registers, or by the pipeline in shared memory.
        Knob("merge", ("unrolled", "pipelined")),
        Knob("dense_stages", (1, 2, 3)),  # of the loop over initial and local blocks
        *_SLIDING_KNOBS,
    ),
    defaults={
        "": lambda p: _merge_default(p, wgmma=False),
        "sm_90": lambda p: _merge_default(p, wgmma=True),
        "sm_100": lambda p: _merge_default(p, wgmma=True),
    },
    safe=lambda p: {"merge": "pipelined", "dense_stages": 1, **_sliding_safe()},
    illegal=lambda p, c: _sliding_illegal(p, c),
)


def _sliding_safe() -> dict[str, Value]:
    return {"loads": "pointer", "mask": "edges", "BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1, "maxnreg": None}


def _sliding_default(p: Problem, keys: int, stages: int, wgmma: bool = False) -> dict[str, Value]:
    if p.dtype == "float32":
        return _sliding_safe()
    dims = p.head_dim_qk, p.head_dim_v
    tiles = {"mask": "edges", "maxnreg": None, "num_stages": stages}
    if wgmma and p.window >= 64 and max(dims) <= 128 and not any(dim & (dim - 1) for dim in dims):
        return {"loads": "descriptor", "BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, **tiles}  # registers for three programs
    rows = 64 if max(dims) > 192 and stages < 3 else 128  # little shared memory there
    if max(dims) > 128 or p.window < 64:
        keys, tiles["num_stages"] = 32, 2
    return {"loads": "pointer", "BLOCK_M": rows, "BLOCK_N": keys, "num_warps": rows // 16, **tiles}


def _merge_default(p: Problem, wgmma: bool) -> dict[str, Value]:
    if p.dtype == "float32":
        return {"merge": "pipelined", "dense_stages": 1, **_sliding_safe()}
    wide = max(p.head_dim_qk, p.head_dim_v) > 128
    rows = 64 if wgmma else 32  # without wgmma q is in registers too
    keys = 64 if wgmma and not wide else 32
    tiles = {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": 4, "num_stages": (3 if wgmma else 2) - wide, "maxnreg": None}
    return {"merge": "pipelined", "dense_stages": 2, "loads": "pointer", "mask": "edges", **tiles}


def descriptor_fault(p: Problem, c: Config) -> str | None:
    """Why K and V of a problem cannot be loaded by descriptor, or None."""
    dims = p.head_dim_qk, p.head_dim_v
    if c.loads == "descriptor" and any(dim & (dim - 1) for dim in dims):
        return f"a descriptor's tile has power-of-two sides, head dims are {dims[0]} and {dims[1]}"
    return None


def _sliding_illegal(p: Problem, c: Config) -> str | None:
    if reason := descriptor_fault(p, c):
        return reason
    if c.loads == "descriptor" and c.num_stages == 1:
        return "descriptor loads without a pipeline"
    if c.num_warps == 8 and c.BLOCK_M < 128:
        return f"8 warps on {c.BLOCK_M} rows leave warps without rows"
    if c.num_warps == 4 and c.BLOCK_M > 128:
        return f"{c.BLOCK_M} rows need more registers than 4 warps have"
    if c.maxnreg is not None and 16 * c.num_warps < c.BLOCK_M:
        return f"{c.BLOCK_M} rows on {c.num_warps} warps spill at {c.maxnreg} registers"
    return None


SPACES["compressed_attention_fwd"] = Space(
    knobs=(
        Knob("loads", ("pointer", "descriptor")),
        Knob("BLOCK_M", (16, 32, 64, 128)),
        Knob("BLOCK_N", (16, 32, 64, 128)),
        Knob("num_warps", (4, 8)),
        Knob("num_stages", (1, 2, 3, 4)),
        Knob("maxnreg", (None, 168)),
    ),
    defaults={
        "": lambda p: _compressed_default(p, wgmma=False),
        "sm_90": lambda p: _compressed_default(p, wgmma=True),
        "sm_100": lambda p: _compressed_default(p, wgmma=True),
    },
    safe=lambda p: {"loads": "pointer", **_compressed_tile(p), "num_warps": 4, "num_stages": 1, "maxnreg": None},
    illegal=lambda p, c: _compressed_illegal(p, c),
)


def _wide(p: Problem) -> bool:
    """Rows so wide that only small tiles fit the shared memory and registers of every device."""
    key = p.as_dict()
    return p.dtype == "float32" or max(p.head_dim_qk, key.get("head_dim_v") or 0) > 128


def _compressed_tile(p: Problem) -> dict[str, Value]:
    return {"BLOCK_M": 32, "BLOCK_N": 16} if _wide(p) else {"BLOCK_M": 64, "BLOCK_N": 32}


def _compressed_default(p: Problem, wgmma: bool) -> dict[str, Value]:
    if p.dtype == "float32" or (_wide(p) and not wgmma):  # float32 products run on the plain cores: tiles as small as the registers
        return {"loads": "pointer", **_compressed_tile(p), "num_warps": 4, "num_stages": 1, "maxnreg": None}
    if _wide(p):
        return {"loads": "pointer", "BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2, "maxnreg": None}
    if wgmma:
        tiles = "descriptor" if all(dim & (dim - 1) == 0 for dim in (p.head_dim_qk, p.head_dim_v)) else "pointer"
        return {"loads": tiles, "BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3, "maxnreg": None}
    # Without wgmma q lives in registers: more warps, fewer keys a step.
    return {"loads": "pointer", "BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2, "maxnreg": None}


def _compressed_illegal(p: Problem, c: Config) -> str | None:
    if reason := descriptor_fault(p, c):
        return reason
    if c.maxnreg is not None and (c.num_warps == 8 or c.BLOCK_M > 64):
        return f"{c.maxnreg} registers let no further program of {c.num_warps} warps on a multiprocessor"
    if c.num_warps == 8 and c.BLOCK_M <= 64:
        return f"8 warps on {c.BLOCK_M} rows leave warps without rows"
    if min(c.BLOCK_M // 2, c.BLOCK_N) < 32 and not _wide(p):
        return f"tiles of {c.BLOCK_M} x {c.BLOCK_N} are for float32 and head dims past 128"
    return None


SPACES["importance_fwd"] = Space(
    knobs=(
        Knob("loads", ("pointer", "descriptor")),
        Knob("BLOCK_T", (16, 32, 64, 128)),
        Knob("BLOCK_K", (32, 64, 128, 256)),
        # Token tiles that one program walks with its key tile.
        Knob("TILES", (1, 2, 4, 8)),
        Knob("num_warps", (4, 8)),
        Knob("num_stages", (1, 2, 3)),
        Knob("maxnreg", (None, 168)),
    ),
    defaults={
        "": lambda p: _importance_default(p, num_warps=8),
        "sm_90": lambda p: _importance_default(p, wgmma=True, loads="descriptor", maxnreg=168),  # three programs a multiprocessor
        "sm_100": lambda p: _importance_default(p, loads="descriptor"),
    },
    safe=lambda p: _importance_config(p, 16 if _wide(p) else 32, _key_tile(p, 32 if _wide(p) else 64), num_stages=1),
    illegal=lambda p, c: _importance_illegal(p, c),
)


def _key_tile(p: Problem, least: int) -> int:
    """The smallest key tile of at least ``least`` keys that yields whole selection blocks beside its halo."""
    lags = len(overlap_weights(p.block, p.stride, p.selection_block, p.mapping))
    return next((size for size in (32, 64, 128, 256) if size >= max(least, lags * (p.selection_block // p.stride))), 256)


def _importance_config(p: Problem, rows: int, keys: int, **others: Value) -> dict[str, Value]:
    # A short group takes little time with a token tile: more tiles share a program's keys.
    known = {"loads": "pointer", "TILES": 4 if p.group > 4 else 8, "num_warps": 4, "num_stages": 2, "maxnreg": None}
    return known | {"BLOCK_T": rows, "BLOCK_K": keys} | others


def _importance_default(p: Problem, wgmma: bool = False, **others: Value) -> dict[str, Value]:
    if p.dtype == "float32":
        return _importance_config(p, 16, _key_tile(p, 32), num_stages=1)
    keys, whole = _key_tile(p, 128), not p.head_dim_qk & (p.head_dim_qk - 1)
    if p.head_dim_qk > 128 and wgmma and keys == 128:
        return _importance_config(p, 128, keys, num_warps=8, **others) if whole else _importance_config(p, 64, keys)
    if p.head_dim_qk > 128:
        return _importance_config(p, 32, _key_tile(p, 64), num_stages=1)
    if keys > 128:
        return _importance_config(p, 64, keys, num_warps=8)
    if not whole and others.get("loads") == "descriptor":
        return _importance_config(p, 64, keys)
    return _importance_config(p, 64, keys, **others)


def _importance_illegal(p: Problem, c: Config) -> str | None:
    if _key_tile(p, 32) > c.BLOCK_K:
        return f"a tile of {c.BLOCK_K} compressed keys holds no selection block of {p.selection_block} tokens beside its halo"
    if c.loads == "descriptor" and p.head_dim_qk & (p.head_dim_qk - 1):
        return f"a descriptor's tile has power-of-two sides, the head dim is {p.head_dim_qk}"
    if c.loads == "descriptor" and c.num_stages == 1:
        return "descriptor loads without a pipeline"
    if c.BLOCK_T * c.BLOCK_K // c.num_warps > 64 * 128 // 4:
        return "two score tiles need more registers than the warps have"
    if c.num_warps == 8 and c.BLOCK_T * c.BLOCK_K <= 32 * 64:
        return f"8 warps on a tile of {c.BLOCK_T} x {c.BLOCK_K} leave warps without work"
    if (c.BLOCK_T < 32 or c.BLOCK_K < 64) and not _wide(p):
        return f"tiles of {c.BLOCK_T} x {c.BLOCK_K} are for float32 and head dims past 128"
    return None


SPACES["select_topk"] = Space(
    knobs=(
        # The widest row (in selection blocks) whose scores stay in registers; of wider ones, parts are read again at every step.
        Knob("WIDTH", (1024, 4096, 16384)),
        Knob("BLOCK_ROWS", (1, 2, 4, 8, 16)),
        Knob("num_warps", (1, 2, 4)),
        Knob("maxnreg", (None, 48, 64, 80)),
    ),
    defaults={
        "": lambda p: _select_default(None),
        **dict.fromkeys(("sm_80", "sm_89", "sm_90"), lambda p: _select_default(64)),
    },
    safe=lambda p: {"WIDTH": 1024, "BLOCK_ROWS": 1, "num_warps": 4, "maxnreg": None},
)


def _select_default(registers: int | None) -> dict[str, Value]:
    # One warp a row: no shared memory, no barriers. 64 registers let as many programs on a multiprocessor as it takes, 32.
    return {"WIDTH": 16384, "BLOCK_ROWS": 4, "num_warps": 1, "maxnreg": registers}


SPACES["combine_fwd"] = Space(
    knobs=(Knob("BLOCK_ROWS", (4, 8, 16, 32, 64, 128)), Knob("num_warps", (1, 2, 4, 8))),
    defaults={"": lambda p: {"BLOCK_ROWS": 16 if p.head_dim_v > 128 else 32, "num_warps": 4}},
    safe=lambda p: {"BLOCK_ROWS": 8, "num_warps": 1},
    illegal=lambda p, c: (
        "more than 64 elements of each input a thread spill" if c.BLOCK_ROWS * p.head_dim_v > 64 * 32 * c.num_warps
        else "fewer than 4 elements a thread" if c.BLOCK_ROWS * p.head_dim_v < 4 * 32 * c.num_warps and c.num_warps > 1
        else None
    ),
)  # fmt: skip

SPACES["compress_fwd"] = Space(
    knobs=(
        # The pooling decides the body: mean and weighted add tokens up, linear and mlp multiply matrices.
        Knob("body", ("stream", "gemm")),
        Knob("BLOCK_J", (4, 8, 16, 32, 64, 128)),
        Knob("BLOCK_N", (32, 64, 128, 256), {"body": ("gemm",)}),
        Knob("BLOCK_K", (16, 32, 64, 128), {"body": ("gemm",)}),
        Knob("num_warps", (2, 4, 8)),
        Knob("num_stages", (1, 2, 3, 4), {"body": ("gemm",)}),
    ),
    defaults={"": lambda p: _compress_default(p, warps=4), "sm_100": lambda p: _compress_default(p, warps=8)},
    safe=lambda p: _compress_safe(p),
    illegal=lambda p, c: _compress_illegal(p, c),
)


def _compress_default(p: Problem, warps: int) -> dict[str, Value]:
    if p.pooling in ("mean", "weighted") or p.dtype == "float32":
        return _compress_safe(p)
    step = min(p.head_dim & -p.head_dim, 64)
    width = p.hidden if p.pooling == "mlp" else p.head_dim
    columns = next(n for n in (32, 64, 128) if n >= width or n == 128)
    return {"body": "gemm", "BLOCK_J": 64, "BLOCK_N": columns, "BLOCK_K": step, "num_warps": warps, "num_stages": 3}


def _compress_safe(p: Problem) -> dict[str, Value]:
    if p.pooling in ("mean", "weighted"):
        return {"body": "stream", "BLOCK_J": 16, "num_warps": 4}
    return {"body": "gemm", "BLOCK_J": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}


def _compress_illegal(p: Problem, c: Config) -> str | None:
    body = "stream" if p.pooling in ("mean", "weighted") else "gemm"
    if c.body != body:
        return f"pooling {p.pooling} is computed by body {body}"
    if body == "stream":
        return None
    if c.BLOCK_J < 16:
        return f"a tensor-core tile has at least 16 rows, not {c.BLOCK_J}"
    if p.head_dim % c.BLOCK_K:
        return f"BLOCK_K {c.BLOCK_K} does not divide head dim {p.head_dim}"
    width = p.hidden if p.pooling == "mlp" else p.head_dim
    if c.BLOCK_N > 32 and 2 * width <= c.BLOCK_N:
        return f"BLOCK_N {c.BLOCK_N} is at least twice the {width} columns"
    if 4096 * c.num_warps < c.BLOCK_J * c.BLOCK_N:
        return f"an accumulator of {c.BLOCK_J} x {c.BLOCK_N} needs more registers than {c.num_warps} warps have"
    return None
