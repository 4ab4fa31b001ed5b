from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import nsa_gen
from nsa_gen import ops

SURFACE = {
    "InputError", "NSAError", "NSAttention", "NotTuned", "PagedKVCache", "Resolution", "Spec", "SpecError", "__version__", "combine",
    "compress", "compressed_attention", "nsa_attention", "nsa_decode", "nsa_prefill", "override", "resolve", "select_blocks",
    "selected_attention", "sliding_attention",
}  # fmt: skip


def test_the_surface_is_what_it_was():
    assert set(nsa_gen.__all__) == SURFACE
    assert set(nsa_gen.__all__) <= set(dir(nsa_gen))
    for name in SURFACE:
        assert getattr(nsa_gen, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nsa_gen.nothing


@pytest.mark.parametrize("name", ops.__all__)
def test_operators_have_keyword_only_options_and_say_what_they_take(name):
    operator = getattr(nsa_gen, name)
    assert operator is getattr(ops, name)
    for part in ("Args:", "Returns:", "Raises:", "eq", "[T,H"):
        if name == "sliding_attention" and part == "eq":
            continue  # the paper gives the window no equation
        assert part in operator.__doc__, part
    for option in inspect.signature(operator).parameters.values():
        if option.name in ("spec", "cu_seqlens", "max_seqlen", "scale", "which"):
            assert option.kind is option.KEYWORD_ONLY


def test_the_layer_has_keyword_only_options_and_says_what_it_takes():
    layer = nsa_gen.NSAttention
    for part in ("Args:", "Raises:", "eq", "[T,"):
        assert part in layer.__doc__ + layer.forward.__doc__, part
    for function, positional in ((layer.__init__, {"self", "hidden_size", "spec"}), (layer.forward, {"self", "hidden"})):
        parameters = inspect.signature(function).parameters.values()
        assert {p.name for p in parameters if p.kind is not p.KEYWORD_ONLY} == positional


def test_importing_the_package_is_light():
    code = (
        "import sys, nsa_gen; from nsa_gen import InputError, Spec; import nsa_gen.errors;"
        "bad = {'torch', 'triton', 'jinja2', 'yaml', 'optuna'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(ops.__file__).parents[1])
    assert found.returncode == 0, found.stderr
