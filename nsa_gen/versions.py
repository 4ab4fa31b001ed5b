"""The oldest torch and triton that the kernels are tested with."""

from __future__ import annotations

from .errors import UnsupportedVersion

LEAST = {"torch": (2, 11), "triton": (3, 6)}


def parsed(version: str) -> tuple[int, int]:
    """Major and minor number of ``2.11.0+cu130``, ``3.6.0rc1``, ``2.12.0a0+git``."""
    numbers = [int("".join(c for c in part if c.isdigit()) or 0) for part in version.split("+")[0].split(".")[:2]]
    return numbers[0], numbers[1] if len(numbers) > 1 else 0


def require(**found: str) -> None:
    """Hold versions, by package name, to ``LEAST``.

    Raises:
        UnsupportedVersion: one is older; the message names both and the command that mends it.
    """
    for name, version in found.items():
        if parsed(version) < LEAST[name]:
            raise UnsupportedVersion(f"{name} {version} is older than {wanted(name)}, which the kernels need: {mend(name)}")


def wanted(name: str) -> str:
    return ".".join(map(str, LEAST[name]))


def mend(name: str) -> str:
    return f"pip install -U '{name}>={wanted(name)}'"
