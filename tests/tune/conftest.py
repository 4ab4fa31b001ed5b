from __future__ import annotations

import machine
import pytest

from nsa_gen import space


@pytest.fixture(autouse=True)
def fake_space(monkeypatch):
    """The space of ``machine``: 33 legal configs, one conditional knob."""
    monkeypatch.setitem(space.SPACES, machine.KERNEL, machine.SPACE)
