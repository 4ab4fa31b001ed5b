"""Append-only trial log: one JSON object a line, each with its own checksum, each on disk before the next trial starts.

A line is ``{…, "sha": "<16 hex digits>"}`` where the digits are of the sha256 over all bytes before ``, "sha"``. A process killed at any
byte leaves at most one torn line, which readers skip; the next append ends it with a newline first, so nothing already written moves.
Several processes may append to one file: appends hold an advisory lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CacheError

_MARK = b', "sha": "'


def encode(record: dict[str, Any]) -> bytes:
    """The line of a record, newline included. Numbers must be finite."""
    body = json.dumps(record, sort_keys=True, allow_nan=False).encode()[:-1]
    return body + _MARK + _digest(body) + b'"}\n'


def decode(line: bytes) -> dict[str, Any] | None:
    """The record of a line without its newline; None for a line that is torn, edited or no record."""
    body, mark, tail = line.rpartition(_MARK)
    if not mark or tail != _digest(body) + b'"}':
        return None
    record = json.loads(body + b"}")
    return record if isinstance(record, dict) else None


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:16].encode()


@dataclass(frozen=True)
class Reading:
    """Sound records in file order, and how many lines were skipped as torn or edited."""

    records: tuple[dict[str, Any], ...]
    skipped: int


class TrialLog:
    """The log at ``path``; the file and its folder are made on the first append."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def read(self) -> Reading:
        """All sound records; a file that is not there reads as empty."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return Reading((), 0)
        except OSError as error:
            raise CacheError(f"cannot read the trial log {self.path}: {error.strerror or error}") from error
        records, skipped = [], 0
        for line in data.split(b"\n"):
            if not line.strip():
                continue
            record = decode(line)
            if record is None:
                skipped += 1
            else:
                records.append(record)
        return Reading(tuple(records), skipped)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record and wait until it is on disk.

        Raises:
            CacheError: the file cannot be written.
        """
        line = encode(record)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                size = os.fstat(fd).st_size
                if size and os.pread(fd, 1, size - 1) != b"\n":
                    line = b"\n" + line
                view = memoryview(line)
                while view:
                    view = view[os.write(fd, view) :]
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise CacheError(f"cannot append to the trial log {self.path}: {error.strerror or error}") from error
