from __future__ import annotations

import json
import multiprocessing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_gen.errors import CacheError
from nsa_gen.tune.log import TrialLog, decode, encode

RECORDS = [{"event": "trial", "number": n, "text": 'a "quoted", "sha": "line"\n', "nested": {"ms": n / 3}} for n in range(4)]

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda name: name != "sha"), values, min_size=1, max_size=4))
def test_a_line_is_json_and_gives_its_record_back(record):
    line = encode(record)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert decode(line[:-1]) == record
    assert {k: v for k, v in json.loads(line).items() if k != "sha"} == record


@given(st.integers(0), st.integers(1, 255))
def test_a_changed_byte_is_no_record(position, flip):
    line = bytearray(encode(RECORDS[1])[:-1])
    line[position % len(line)] ^= flip
    assert decode(bytes(line)) is None


def test_a_log_cut_at_any_byte_reads_and_goes_on(tmp_path):
    whole = b"".join(encode(record) for record in RECORDS)
    ends = [len(b"".join(encode(r) for r in RECORDS[: n + 1])) for n in range(len(RECORDS))]
    path = tmp_path / "log"
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        log = TrialLog(path)
        kept = sum(cut >= end - 1 for end in ends)  # a line is whole without its newline
        assert list(log.read().records) == RECORDS[:kept]
        log.append({"event": "after"})
        reading = log.read()
        assert list(reading.records) == [*RECORDS[:kept], {"event": "after"}]
        torn = cut not in (0, *ends, *(end - 1 for end in ends))
        assert reading.skipped == torn
        assert path.read_bytes().startswith(whole[:cut])  # nothing written is ever taken back


def test_no_file_is_an_empty_log(tmp_path):
    assert TrialLog(tmp_path / "none" / "log").read().records == ()


def test_a_log_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="trial log"):
        TrialLog(tmp_path / "file" / "log").append({"event": "x"})
    with pytest.raises(CacheError, match="cannot read the trial log"):
        TrialLog(tmp_path).read()


def test_numbers_must_be_finite():
    with pytest.raises(ValueError):
        encode({"ms": float("nan")})


def _write(path, writer):
    for n in range(20):
        TrialLog(path).append({"writer": writer, "number": n})


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, w)) for w in range(3)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(60)
        assert process.exitcode == 0
    reading = TrialLog(path).read()
    assert reading.skipped == 0
    assert sorted((r["writer"], r["number"]) for r in reading.records) == [(w, n) for w in range(3) for n in range(20)]
