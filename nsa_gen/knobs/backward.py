"""Spaces of the backward's kernels."""

from __future__ import annotations

from ..config import Config, Problem, Value
from .forward import descriptor_fault
from .space import Knob, Space

SPACES: dict[str, Space] = {}

# dq by tiles of DQ_M rows over DQ_N keys at a time, dk and dv by tiles of KEYS keys over ROWS rows at a time.
_SEPARATE = {"dq": ("separate",)}


def _dq_knobs(when: dict[str, tuple[Value, ...]]) -> tuple[Knob, ...]:
    return (
        Knob("loads", ("pointer", "descriptor"), when),  # of K and V, but for masked tiles
        # "edges": only tiles that some row sees in part are masked; "all": one loop, masked throughout.
        Knob("dq_mask", ("edges", "all"), when),
        Knob("DQ_M", (16, 32, 64, 128), when),
        Knob("DQ_N", (16, 32, 64, 128), when),
        Knob("dq_warps", (4, 8), when),
        Knob("dq_stages", (1, 2, 3, 4), when),
    )


_DKV_KNOBS = (
    Knob("dkv_mask", ("edges", "all")),
    Knob("KEYS", (16, 32, 64, 128)),
    Knob("ROWS", (16, 32, 64, 128)),
    Knob("dkv_warps", (4, 8)),
    Knob("dkv_stages", (1, 2, 3)),
)
SPACES["compressed_attention_bwd"] = Space(
    knobs=(
        Knob("dq", ("separate", "atomic")),  # "atomic": dq is summed in memory as keys are walked, in no fixed order
        *_dq_knobs(_SEPARATE),
        *_DKV_KNOBS,
        # Programs that share a key tile's queries: their sums of dk and dv are added up afterwards.
        Knob("SPLITS", (1, 4, 8, 16, 32, 64)),
    ),
    defaults={
        "": lambda p: {"dq": "separate", "SPLITS": 32, **_tiles(p, wgmma=False)},
        "sm_90": lambda p: {"dq": "separate", "SPLITS": 32, **_tiles(p, wgmma=True)},
        "sm_100": lambda p: {"dq": "separate", "SPLITS": 32, **_tiles(p, wgmma=True)},
    },
    safe=lambda p: {"dq": "separate", "SPLITS": 8, **_small(p)},
    illegal=lambda p, c: "atomic additions come in another order each time" if p.deterministic and c.dq == "atomic" else _tile_fault(p, c),
)
SPACES["sliding_attention_bwd"] = Space(
    knobs=(*_dq_knobs({}), *_DKV_KNOBS),
    defaults={
        "": lambda p: _tiles(p, wgmma=False),
        "sm_90": lambda p: _tiles(p, wgmma=True, small=32),
        "sm_100": lambda p: _tiles(p, wgmma=True, small=32),
    },
    safe=lambda p: _small(p),
    illegal=lambda p, c: _tile_fault(p, c),
)


def _wide(p: Problem) -> bool:
    return max(p.head_dim_qk, p.head_dim_v) > 128


def _small(p: Problem) -> dict[str, Value]:
    tile = 16 if p.dtype == "float32" or _wide(p) else 32
    rows = {"loads": "pointer", "dq_mask": "edges", "DQ_M": tile, "DQ_N": tile, "dq_warps": 4, "dq_stages": 1}
    return rows | {"dkv_mask": "edges", "KEYS": tile, "ROWS": tile, "dkv_warps": 4, "dkv_stages": 1}


def _tiles(p: Problem, wgmma: bool, small: int = 64) -> dict[str, Value]:
    """``small``: the shorter side of tiles. Sliding attention serves a second branch besides, whose numbers take registers."""
    if p.dtype == "float32" or (_wide(p) and not wgmma):
        return _small(p)
    if not wgmma:  # operands wait in registers, and there is little shared memory
        rows = {"loads": "pointer", "dq_mask": "edges", "DQ_M": 64, "DQ_N": 32, "dq_warps": 4, "dq_stages": 1}
        return rows | {"dkv_mask": "edges", "KEYS": 64, "ROWS": 32, "dkv_warps": 4, "dkv_stages": 1}
    whole = not any(dim & (dim - 1) for dim in (p.head_dim_qk, p.head_dim_v))
    rows = {"loads": "descriptor" if whole else "pointer", "dq_mask": "edges", "DQ_M": 64}
    if _wide(p):
        rows |= {"DQ_N": 32, "dq_warps": 8, "dq_stages": 2}
        return rows | {"dkv_mask": "all", "KEYS": 64, "ROWS": 32, "dkv_warps": 8, "dkv_stages": 2}
    # Many keys a tile: q and do come from L2 once for each.
    rows |= {"DQ_N": small, "dq_warps": 4, "dq_stages": 2 if small == 64 else 3}
    return rows | {"dkv_mask": "all", "KEYS": 128, "ROWS": small, "dkv_warps": 8, "dkv_stages": 3}


def _tile_fault(p: Problem, c: Config) -> str | None:
    chosen = c.as_dict()
    if "loads" in chosen:
        if reason := descriptor_fault(p, c):
            return reason
        if c.loads == "descriptor" and c.dq_stages == 1:
            return "descriptor loads without a pipeline"
        if c.loads == "descriptor" and c.dq_mask == "all":
            return "masked tiles are not loaded by descriptor"
        if reason := _rows_fault(p, "DQ_M", c.DQ_M, "DQ_N", c.DQ_N, c.dq_warps, 1):
            return reason
    return _rows_fault(p, "KEYS", c.KEYS, "ROWS", c.ROWS, c.dkv_warps, 2)


def _rows_fault(p: Problem, name: str, rows: int, other_name: str, columns: int, warps: int, sums: int) -> str | None:
    """What is wrong with a tile of ``rows`` by ``columns``, and ``sums`` accumulators of ``rows`` by the head dim."""
    if warps == 8 and rows < (64 if _wide(p) else 128):
        return f"8 warps on {name} {rows} leave warps without rows"
    registers = (sums * rows * max(p.head_dim_qk, p.head_dim_v) + 2 * rows * columns) // (32 * warps)
    if registers > 300:
        return f"{name} {rows} by {other_name} {columns} need {registers} registers a thread and more on {warps} warps"
    if min(rows, columns) < 32 and not (_wide(p) or p.dtype == "float32"):
        return f"tiles of {rows} x {columns} are for float32 and head dims past 128"
    return None


_QUERY_OUTER = {"dq": ("query_outer",)}
_WALKS = {"dq": ("ds", "query_outer")}  # a query's blocks, one after the other
SPACES["selected_attention_bwd"] = Space(
    knobs=(
        # "slots": each block's part of dq is stored and a query's parts are added up; "ds": gradients of scores are stored, and multiplied
        # with a query's blocks; "query_outer": these are made anew.
        Knob("dq", ("slots", "ds", "query_outer")),
        Knob("operands", ("rows", "keys"), _QUERY_OUTER),
        Knob("loads", ("pointer", "descriptor"), _WALKS),
        Knob("dq_warps", (1, 2, 4), _WALKS),
        Knob("dq_stages", (1, 2, 3, 4), _WALKS),
        Knob("ADD_M", (1, 2, 4, 8), {"dq": ("slots",)}),
        Knob("add_warps", (1, 2, 4), {"dq": ("slots",)}),
        # Tokens a chunk, queries a program, rows of its tiles.
        Knob("CHUNK", (2048, 4096, 8192, 16384, 32768, 65536, 262144)),
        Knob("ENTRIES", (32, 64, 128, 256, 512, 1024, 2048)),
        Knob("ROWS", (16, 32, 64, 128)),
        Knob("dkv_warps", (4, 8)),
        Knob("dkv_stages", (1, 2, 3, 5, 7)),  # rows wait for their entry: a pipeline of n stages holds (n - 1) / 2 tiles
        Knob("dkv_registers", (None, 168)),
    ),
    defaults={"": lambda p: _selected_default(p, wgmma=False), "sm_90": lambda p: _selected_default(p, wgmma=True)},
    safe=lambda p: _selected_config(p, 16 if p.dtype == "float32" or _wide(p) else 32, 1),
    illegal=lambda p, c: _selected_fault(p, c),
)


def _selected_config(p: Problem, rows: int, stages: int) -> dict[str, Value]:
    entries = 1024 if p.group == 1 else 512 if p.group <= 4 else 128
    lists = {"CHUNK": 65536, "ENTRIES": entries, "ROWS": rows, "dkv_warps": 4, "dkv_stages": stages, "dkv_registers": None}
    return {"dq": "slots", "ADD_M": 2, "add_warps": 1, **lists}


def _selected_default(p: Problem, wgmma: bool) -> dict[str, Value]:
    if p.dtype == "float32":
        return _selected_config(p, 16, 1)
    if _wide(p):
        return _selected_config(p, 32 if wgmma else 16, 1) | {"dkv_warps": 8 if p.selection_block >= 64 else 4}
    return _selected_config(p, 64 if wgmma else 32, 1)


def _selected_fault(p: Problem, c: Config) -> str | None:
    if c.dq != "slots":
        if reason := descriptor_fault(p, c):
            return reason
        if c.dq_stages == 1 and (c.loads == "descriptor" or c.dq == "ds" or c.operands == "keys"):
            return "without a pipeline Triton 3.6 makes code for sm_90 that accesses memory illegally"
    if c.dq == "query_outer" and c.operands == "keys" and c.dq_warps * 16 > max(p.selection_block, 16):
        return f"{c.dq_warps} warps on a block of {p.selection_block} keys leave warps without rows"
    if c.dkv_warps == 8 and p.selection_block < 64:
        return f"8 warps on a block of {p.selection_block} keys leave warps without rows"
    if c.ROWS < 32 and c.dq != "ds" and not (_wide(p) or p.dtype == "float32"):
        return f"tiles of {c.ROWS} rows are for float32, head dims past 128, and where dq is made elsewhere"
    registers = (2 * p.selection_block * max(p.head_dim_qk, p.head_dim_v) + 2 * p.selection_block * c.ROWS) // (32 * c.dkv_warps)
    if registers > 300:
        return f"blocks of {p.selection_block} by {c.ROWS} rows need {registers} registers a thread and more on {c.dkv_warps} warps"
    return None


SPACES["combine_bwd"] = Space(
    knobs=(Knob("BLOCK_ROWS", (4, 8, 16, 32, 64, 128)), Knob("num_warps", (1, 2, 4, 8))),
    defaults={"": lambda p: {"BLOCK_ROWS": 16 if p.head_dim_v > 128 else 32, "num_warps": 4}},
    safe=lambda p: {"BLOCK_ROWS": 8, "num_warps": 1},
    illegal=lambda p, c: (
        "more than 64 elements of each input a thread spill" if c.BLOCK_ROWS * p.head_dim_v > 64 * 32 * c.num_warps
        else "fewer than 4 elements a thread" if c.BLOCK_ROWS * p.head_dim_v < 4 * 32 * c.num_warps and c.num_warps > 1
        else None
    ),
)  # fmt: skip


_MATRICES = {"body": ("linear", "mlp")}
SPACES["compress_bwd"] = Space(
    knobs=(
        # The pooling decides the body: mean and weighted add up, linear and mlp multiply matrices.
        Knob("body", ("stream", "linear", "mlp")),
        Knob("BLOCK_T", (8, 16, 32, 64, 128), {"body": ("stream",)}),  # tokens
        # Tiles: BLOCK_J rows of hidden units and of dx, BLOCK_C elements of tokens, BLOCK_N columns of the matrix.
        Knob("BLOCK_J", (16, 32, 64, 128), _MATRICES),
        Knob("BLOCK_C", (32, 64, 128, 256), _MATRICES),
        Knob("BLOCK_N", (32, 64, 128, 256), _MATRICES),
        # Steps: BLOCK_K elements of a token for hidden units; BLOCK_R rows for dw, and columns of the matrix for dx.
        Knob("BLOCK_K", (16, 32, 64, 128), {"body": ("mlp",)}),
        Knob("BLOCK_R", (16, 32, 64, 128), _MATRICES),
        # Programs that share the rows of a tile of dw: their sums are added up afterwards.
        Knob("SPLITS", (1, 2, 4, 8), _MATRICES),
        Knob("num_warps", (2, 4, 8)),
        Knob("hidden_warps", (4, 8), {"body": ("mlp",)}),
        Knob("dw_warps", (4, 8), _MATRICES),
        Knob("num_stages", (1, 2, 3, 4), _MATRICES),
    ),
    defaults={
        "": lambda p: _compress_default(p, wgmma=False),
        "sm_90": lambda p: _compress_default(p, wgmma=True),
        "sm_100": lambda p: _compress_default(p, wgmma=True),
    },
    safe=lambda p: _compress_safe(p),
    illegal=lambda p, c: _compress_illegal(p, c),
)


def _compress_body(p: Problem) -> str:
    return "stream" if p.pooling in ("mean", "weighted") else p.pooling


def _compress_safe(p: Problem) -> dict[str, Value]:
    if _compress_body(p) == "stream":
        return {"body": "stream", "BLOCK_T": 32, "num_warps": 4}
    return _compress_tiles(p, BLOCK_J=16, BLOCK_C=32, BLOCK_N=32, BLOCK_R=16, step=16, warps=4, num_stages=1)


def _compress_default(p: Problem, wgmma: bool) -> dict[str, Value]:
    if _compress_body(p) == "stream" or p.dtype == "float32":
        return _compress_safe(p)
    columns = next(n for n in (32, 64, 128) if n >= _columns(p) or n == 128)
    rows, warps = (64, 4) if wgmma else (32, 8)  # without wgmma operands wait in registers too
    return _compress_tiles(p, BLOCK_J=64, BLOCK_C=128, BLOCK_N=columns, BLOCK_R=rows, step=64, warps=warps, num_stages=3)


def _compress_tiles(p: Problem, step: int, warps: int, **tiles: Value) -> dict[str, Value]:
    dw_warps = 8 if tiles["BLOCK_C"] * tiles["BLOCK_N"] >= 128 * 128 else 4
    known = {"body": p.pooling, **tiles, "SPLITS": 2, "num_warps": warps, "dw_warps": dw_warps}
    return known | ({"BLOCK_K": min(p.head_dim & -p.head_dim, step), "hidden_warps": warps} if p.pooling == "mlp" else {})


def _columns(p: Problem) -> int:
    return p.hidden if p.pooling == "mlp" else p.head_dim


def _compress_illegal(p: Problem, c: Config) -> str | None:
    body = _compress_body(p)
    if c.body != body:
        return f"pooling {p.pooling} is computed by body {body}"
    if body == "stream":
        return None
    if body == "mlp" and p.head_dim % c.BLOCK_K:
        return f"BLOCK_K {c.BLOCK_K} does not divide head dim {p.head_dim}"
    if c.BLOCK_N > 32 and 2 * _columns(p) <= c.BLOCK_N:
        return f"BLOCK_N {c.BLOCK_N} is at least twice the {_columns(p)} columns"
    tiles = [("dx", c.BLOCK_J * c.BLOCK_C, c.num_warps), ("dw", c.BLOCK_C * c.BLOCK_N, c.dw_warps)]
    if body == "mlp":
        tiles.append(("hidden units", 2 * c.BLOCK_J * c.BLOCK_N, c.hidden_warps))
    for name, elements, warps in tiles:
        if elements > 4096 * warps:
            return f"accumulators of {elements} elements for {name} need more registers than {warps} warps have"
    return None
