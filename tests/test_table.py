"""Rows, table files, merging, linting, the user's entries."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsa_gen import paths, space, table
from nsa_gen.config import Config, Problem, Shape
from nsa_gen.errors import CacheError, TableError
from nsa_gen.row import Row
from nsa_gen.space import Knob, Space
from nsa_gen.table import Table

KERNEL, SLUG = "sliding_attention_fwd", "test-gpu"
FAKE = Space(
    knobs=(Knob("BLOCK_M", (16, 32, 64)), Knob("num_warps", (1, 2, 4))),
    defaults={"": lambda p: {"BLOCK_M": 32, "num_warps": 2}},
    safe=lambda p: {"BLOCK_M": 16, "num_warps": 1},
    illegal=lambda p, c: "64 rows on one warp" if (c.BLOCK_M, c.num_warps) == (64, 1) else None,
)
EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
ENVIRONMENT = {"triton": "3.6.0", "torch": "2.11.0", "driver": "580.1", "device": "Test GPU", "python": "3.12.1"}


def problem(**changes: object) -> Problem:
    fields = {"dtype": "bfloat16", "group": 16, "head_dim_qk": 128, "head_dim_v": 128, "window": 512, "varlen": False}
    return Problem.of(KERNEL, fields | changes)  # type: ignore[arg-type]


def row(seqlen=(4096, 8191), batch_heads=(1, 7), *, block=64, warps=4, date="2025-06-01", low=1.1, **changes) -> Row:
    fields = {
        "problem": problem(),
        "config": Config.of(KERNEL, {"BLOCK_M": block, "num_warps": warps}),
        "perf": {"median_ms": 1.0, "spread": 0.01, "default_ms": 1.2, "speedup": low + 0.1, "speedup_low": low, "speedup_high": low + 0.2,
                 "verdict": "tuned wins"},
        "resources": {"shared": 65536, "registers": 128, "spills": 0},
        "correctness": {"max_rel_err": 1e-3, "reference": "float64", "cases": 4},
        "environment": ENVIRONMENT,
        "source_digest": "0123456789abcdef",
        "date": date,
        "measured_by": "nsa-gen tune",
    }  # fmt: skip
    return Row(seqlen=seqlen, batch_heads=batch_heads, **(fields | changes))


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setitem(space.SPACES, KERNEL, FAKE)
    monkeypatch.setenv("NSA_GEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NSA_GEN_TUNED", str(tmp_path / "tuned"))
    monkeypatch.setattr(table, "_parsed", {})
    monkeypatch.setattr(table, "_warned", set())


@st.composite
def ranges(draw, top=12):
    low, high = sorted((draw(st.integers(1, top)), draw(st.integers(1, top))))
    return low, high


rows = st.builds(
    row,
    ranges(),
    ranges(4),
    block=st.sampled_from((16, 32, 64)),
    warps=st.sampled_from((1, 2, 4)),
    date=st.sampled_from(("2025-06-01", "2025-06-02", "2025-06-02T00:00:00+02:00")),
    low=st.sampled_from((1.05, 1.2, 1.5)),
    problem=st.sampled_from((problem(), problem(varlen=True), problem(dtype="float32", group=4))),
    extra=st.dictionaries(
        st.sampled_from(("note", "trials")), st.none() | st.integers() | st.sampled_from(("", 'é"\n', "\ud800x")), max_size=2
    ),
)
tables = st.lists(rows, max_size=4).map(lambda found: Table(SLUG, KERNEL, tuple(found)))


@EXAMPLES
@given(tables)
def test_round_trip_keeps_every_byte_and_row(found: Table):
    text = found.dumps()
    again = Table.loads(text.encode())
    assert again == found
    assert again.dumps() == text
    assert Table(SLUG, KERNEL, found.rows[::-1]).dumps() == text


def test_file_is_sorted_json_one_row_a_line():
    short, long = row(), row((131072, 262143))
    text = Table(SLUG, KERNEL, (long, short)).dumps()
    data = json.loads(text)
    assert list(data) == sorted(data) == ["device", "kernel", "rows", "schema", "sha256"]
    assert [r["seqlen"] for r in data["rows"]] == [[4096, 8191], [131072, 262143]]
    lines = [line for line in text.splitlines() if '"key"' in line]
    assert len(lines) == 2 and all(list(json.loads(line.rstrip(","))) == sorted(data["rows"][0]) for line in lines)
    assert data["rows"][0]["config"] == {"BLOCK_M": 64, "num_warps": 4}
    assert data["sha256"] == hashlib.sha256(text[: text.index('"sha256"')].encode()).hexdigest()


def test_extra_fields_survive():
    found = Row.from_dict(KERNEL, {**row().to_dict(), "note": {"a": [1, None]}, "trials": 7})
    assert found.extra == {"note": {"a": [1, None]}, "trials": 7}
    assert Table.loads(Table(SLUG, KERNEL, (found,)).dumps().encode()).rows == (found,)


SOUND = Table(SLUG, KERNEL, (row(), row((8192, 16383), block=32))).dumps().encode()


@pytest.mark.parametrize("change", [0x01, 0x20, 0x80, 0xFF])
def test_any_changed_byte_is_an_error(change: int):
    for position in range(len(SOUND)):
        torn = bytearray(SOUND)
        torn[position] ^= change
        with pytest.raises(TableError, match="torn or edited"):
            Table.loads(bytes(torn))


def test_any_truncation_is_an_error():
    for length in range(len(SOUND)):
        with pytest.raises(TableError, match="torn or edited"):
            Table.loads(SOUND[:length])


@EXAMPLES
@given(st.binary(max_size=64))
def test_signed_garbage_is_an_error_too(body: bytes):
    signed = body + b'"sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'
    with pytest.raises(TableError):
        Table.loads(signed)


def signed(content: dict) -> bytes:
    body = json.dumps(content)[:-1].encode() + b",\n"
    return body + b'"sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "schema: got 99, allowed: 1"),
        ({"kernel": "no_such_kernel"}, "row 1: unknown kernel"),
        ({"rows": [7]}, "row 1: a row must be an object"),
        ({"rows": 7}, "not a table"),
        ({"device": None}, "device and kernel must be texts"),
    ],
)
def test_signed_nonsense_is_named(change, message):
    content = {"device": SLUG, "kernel": KERNEL, "rows": [row().to_dict()], "schema": 1}
    assert Table.loads(signed(content)).rows == (row(),)
    with pytest.raises(TableError, match=message):
        Table.loads(signed(content | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seqlen": [0, 5]}, "seqlen must be"),
        ({"seqlen": [6, 5]}, "seqlen must be"),
        ({"seqlen": "ab"}, "seqlen must be"),
        ({"batch_heads": [1, True]}, "batch_heads must be"),
        ({"key": {"dtype": "bfloat16"}}, "key must have exactly the fields"),
        ({"key": {**problem().as_dict(), "window": 1.5}}, "problem: window must be"),
        ({"config": {"BLOCK_M": [1]}}, "config: BLOCK_M must be"),
        ({"config": None}, "key and config must be objects"),
        ({"perf": {**row().perf, "median_ms": 0}}, "perf.median_ms must be a number > 0"),
        ({"perf": {**row().perf, "median_ms": float("nan")}}, "perf.median_ms"),
        ({"perf": {**row().perf, "verdict": "maybe"}}, "perf.verdict must be tuned wins or default wins"),
        ({"perf": {**row().perf, "speedup_low": 9.0}}, "speedup_low <= speedup"),
        ({"resources": {"shared": -1, "registers": 1, "spills": 0}}, "resources.shared"),
        ({"resources": {"shared": 1, "registers": 1}}, "resources.spills .* got 'nothing'"),
        ({"correctness": "fine"}, "correctness must be an object"),
        ({"date": "yesterday"}, "date must be ISO 8601"),
        ({"source_digest": ""}, "source_digest"),
    ],
)
def test_impossible_rows_are_refused(change, message):
    with pytest.raises(TableError, match=message):
        Row.from_dict(KERNEL, row().to_dict() | change)


def test_missing_fields_are_named():
    data = row().to_dict()
    del data["environment"], data["date"]
    with pytest.raises(TableError, match="lacks environment, date"):
        Row.from_dict(KERNEL, data)


# --- merge, diff, lint ---------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(tables, tables, tables)
def test_merge_is_commutative_associative_idempotent(a: Table, b: Table, c: Table):
    merged, _ = a.merge(b)
    assert merged == b.merge(a)[0]
    assert merged.merge(b)[0] == merged == merged.merge(merged)[0]
    assert merged.merge(c)[0] == a.merge(b.merge(c)[0])[0]


@EXAMPLES
@given(tables, tables)
def test_merge_gives_each_shape_its_best_row(a: Table, b: Table):
    merged, report = a.merge(b)
    assert not [fault for fault in merged.lint() if "overlap" in fault]
    for key in {r.problem for r in (*a.rows, *b.rows)}:
        for seqlen in range(1, 13):
            for heads in range(1, 5):
                shape = Shape(seqlen, heads)
                before = [r for r in (*a.rows, *b.rows) if r.problem == key and r.holds(shape)]
                after = [r for r in merged.rows if r.problem == key and r.holds(shape)]
                assert len(after) == bool(before)
                if before:
                    assert after[0].rank == max(r.rank for r in before)
    told = {r.identity for r in (*report.added, *report.replaced, *report.trimmed, *report.kept)}
    assert told == {r.identity for r in (*a.rows, *b.rows)}
    assert {r.identity for r in report.replaced} == told - {r.identity for r in merged.rows}


def test_merge_trims_the_older_row_and_says_so():
    old = Table(SLUG, KERNEL, (row((1024, 16383), date="2025-01-01", low=1.9), row((65536, 131071), date="2025-01-01")))
    new = Table(SLUG, KERNEL, (row((4096, 8191), block=32, date="2025-02-01"),))
    merged, report = old.merge(new)
    assert [(r.seqlen, r.config.BLOCK_M) for r in merged.rows] == [
        ((1024, 4095), 64),
        ((4096, 8191), 32),
        ((8192, 16383), 64),
        ((65536, 131071), 64),
    ]
    assert (len(report.added), len(report.trimmed), len(report.kept), len(report.replaced)) == (1, 1, 1, 0)
    assert "added: sliding_attention_fwd" in str(report) and "trimmed: " in str(report) and "1 kept" in str(report)


def test_same_date_the_surer_speedup_wins_else_the_newer():
    slow, fast = row(low=1.1, date="2025-06-01"), row(low=1.3, block=32, date="2025-06-01")
    newest = row(low=1.05, block=16, date="2025-06-01T12:00:00")
    assert Table(SLUG, KERNEL, (slow,)).merge(Table(SLUG, KERNEL, (fast,)))[0].rows == (fast,)
    merged, report = Table(SLUG, KERNEL, (fast,)).merge(Table(SLUG, KERNEL, (newest,)))
    assert merged.rows == (newest,) and report.replaced == (fast,)


def test_merge_refuses_another_device_or_kernel():
    with pytest.raises(TableError, match="cannot merge other-gpu"):
        Table(SLUG, KERNEL).merge(Table("other-gpu", KERNEL))
    with pytest.raises(TableError, match="a row of sliding_attention_fwd in a table of combine_fwd"):
        Table(SLUG, "combine_fwd", (row(),))


def test_diff_names_what_changed():
    before = Table(SLUG, KERNEL, (row(), row((8192, 16383))))
    after = Table(SLUG, KERNEL, (row(block=32), row((16384, 32767))))
    assert before.diff(before) == []
    changed, gone, new = before.diff(after)
    assert (changed.before, changed.after) == (row(), row(block=32))
    assert 'config {"BLOCK_M": 64, "num_warps": 4} -> {"BLOCK_M": 32, "num_warps": 4}' in str(changed)
    assert (gone.before, gone.after) == (row((8192, 16383)), None) and str(gone).startswith("- ")
    assert (new.before, new.after) == (None, row((16384, 32767))) and str(new).startswith("+ ")


def test_lint_is_silent_on_a_sound_table_and_finds_each_fault():
    sound = Table(SLUG, KERNEL, (row(), row((8192, 16383))))
    assert sound.lint(digest_of=lambda p, c: "0123456789abcdef", shared_bytes=65536) == []
    assert any("overlap" in f for f in Table(SLUG, KERNEL, (row(), row((8000, 16383)))).lint())
    for change, word in (
        ({"warps": 1}, "illegal config"),
        ({"environment": {**ENVIRONMENT, "driver": ""}}, "environment lacks driver"),
        ({"low": 0.95}, "'tuned wins' needs"),
        ({"correctness": {**row().correctness, "cases": 0}}, "no case"),
    ):
        faults = Table(SLUG, KERNEL, (row(**change),)).lint()
        assert len(faults) == 1 and word in faults[0]
    assert "stale" in sound.lint(digest_of=lambda p, c: "f" * 16)[0]
    assert "65536 bytes of shared memory" in sound.lint(shared_bytes=65535)[0]


# --- files at run time ---------------------------------------------------------------------------------------------------------


def shipped_rows() -> tuple[Row, ...]:
    return tuple(r for found in table.shipped_tables(SLUG, KERNEL) for r in found.rows)


def user_rows() -> tuple[Row, ...]:
    return tuple(r for found in table.user_tables(SLUG, KERNEL) for r in found.rows)


def shipped(*found: Row) -> Path:
    path = table.shipped_path(SLUG, KERNEL)
    Table(SLUG, KERNEL, found).save(path)
    return path


def test_read_parses_once_and_again_after_a_change(monkeypatch):
    path = shipped(row())
    assert shipped_rows() == (row(),)
    with monkeypatch.context() as patch:
        patch.setattr(Table, "loads", lambda data: pytest.fail("parsed again"))
        assert shipped_rows() == (row(),)
    Table(SLUG, KERNEL, (row(block=32),)).save(path)
    assert shipped_rows() == (row(block=32),)


@pytest.mark.parametrize("fault", ["torn", "edited", "binary", "empty", "device", "folder"])
def test_bad_file_is_a_miss_with_one_warning(fault, caplog):
    path = shipped(row())
    text = path.read_bytes()
    if fault == "folder":
        path.unlink()
        path.mkdir()
    elif fault == "device":
        Table("other-gpu", KERNEL, (row(),)).save(path)
    else:
        bad = {"torn": text[:-20], "edited": text.replace(b"1.2", b"9.9"), "binary": b"\xff\x00" * 50, "empty": b""}[fault]
        path.write_bytes(bad)
    with caplog.at_level(logging.WARNING, "nsa_gen"):
        for _ in range(3):
            assert shipped_rows() == ()
    assert len(caplog.records) == 1 and str(path) in caplog.text


def test_absent_file_is_a_silent_miss(caplog):
    assert shipped_rows() == () == user_rows()
    assert not caplog.records


def test_user_rows_come_back_one_file_each():
    first, second = table.save_user_row(SLUG, row()), table.save_user_row(SLUG, row(block=32))
    assert first != second and first.parent == second.parent == paths.cache() / "tuned" / SLUG / KERNEL
    assert table.save_user_row(SLUG, row()) == first
    assert set(user_rows()) == {row(), row(block=32)}


def test_torn_user_entry_costs_only_itself(caplog):
    table.save_user_row(SLUG, row()).write_bytes(b"{")
    table.save_user_row(SLUG, row(block=32))
    with caplog.at_level(logging.WARNING, "nsa_gen"):
        assert user_rows() == user_rows() == (row(block=32),)
    assert len(caplog.records) == 1


def test_unwritable_cache_is_an_error_on_writing_only(tmp_path, monkeypatch):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder would be")
    monkeypatch.setenv("NSA_GEN_CACHE", str(blocked))
    assert user_rows() == ()
    with pytest.raises(CacheError, match="set NSA_GEN_CACHE"):
        table.save_user_row(SLUG, row())


def _write_entries(number: int) -> None:
    for i in range(8):
        table.save_user_row(SLUG, row((4096 + i, 8191), measured_by=f"writer {number}"))


def test_concurrent_writers_lose_nothing():
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_entries, args=(n,)) for n in range(4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert all(len(r.source_digest) == 16 for r in user_rows())
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found = user_rows()
    assert len(found) == len(set(found)) == 32
    assert {r.measured_by for r in found} == {f"writer {n}" for n in range(4)}
    assert not list(table.user_folder(SLUG, KERNEL).glob("*.tmp"))


def test_rows_hash_and_replace():
    assert len({row(), row(), replace(row(), measured_by="x")}) == 2
