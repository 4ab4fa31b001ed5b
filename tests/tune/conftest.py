from __future__ import annotations

import machine
import pytest

from nsa_gen import space


@pytest.fixture(autouse=True)
def fake_space(request, monkeypatch):
    """The space of ``machine``: 27 legal configs, one conditional knob. The real backend's tests have the real one."""
    if request.module.__name__ != "test_backend":
        monkeypatch.setitem(space.SPACES, machine.KERNEL, machine.SPACE)
