"""Native Sparse Attention from generated, tuned Triton kernels (arXiv 2502.11089).

::

    o = nsa_gen.nsa_attention(q, k, v, g_cmp, g_slc, g_swa, spec="gqa16-d128", cu_seqlens=cu_seqlens, max_seqlen=longest)

Names are imported when they are first used, so that importing the package, and its command line, need neither torch nor triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import PagedKVCache
    from .errors import InputError, NotTuned, NSAError, SpecError
    from .kernels import override, resolve
    from .lookup import Resolution
    from .module import NSAttention
    from .ops import (
        combine,
        compress,
        compressed_attention,
        nsa_attention,
        select_blocks,
        selected_attention,
        sliding_attention,
    )
    from .serving import nsa_decode, nsa_prefill
    from .spec import Spec

__version__ = "0.1.0"

_HOME = {
    "InputError": "errors",
    "NSAttention": "module",
    "NSAError": "errors",
    "NotTuned": "errors",
    "PagedKVCache": "cache",
    "Resolution": "lookup",
    "Spec": "spec",
    "SpecError": "errors",
    "combine": "ops",
    "compress": "ops",
    "compressed_attention": "ops",
    "nsa_attention": "ops",
    "nsa_decode": "serving",
    "nsa_prefill": "serving",
    "override": "kernels",
    "resolve": "kernels",
    "select_blocks": "ops",
    "selected_attention": "ops",
    "sliding_attention": "ops",
}

__all__ = [
    "InputError", "NSAError", "NSAttention", "NotTuned", "PagedKVCache", "Resolution", "Spec", "SpecError", "__version__", "combine",
    "compress", "compressed_attention", "nsa_attention", "nsa_decode", "nsa_prefill", "override", "resolve", "select_blocks",
    "selected_attention", "sliding_attention",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    elif name == "errors":
        return import_module(".errors", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
