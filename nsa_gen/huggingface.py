"""Native Sparse Attention in models of Hugging Face transformers (arXiv 2502.11089).

::

    from transformers import AutoModelForCausalLM
    from nsa_gen import huggingface

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
    huggingface.prepare(model, spec)              # gates and φ for every attention layer, and attn_implementation="nsa"
    ...                                           # train as ever; save_pretrained writes the new parameters with the others

    model = AutoModelForCausalLM.from_pretrained(trained)        # warns of unexpected keys: those of the next line
    huggingface.prepare(model, checkpoint=trained)               # the spec is in the config

transformers calls an attention function with q, k and v alone. So :func:`prepare` gives each attention module a submodule ``nsa`` with
what else the maths needs, and a hook that computes the gates from the hidden states the module was called with; the function that
:func:`register` registers finds them. It is for causal decoders whose attention follows ``AttentionInterface`` (Llama, Qwen and most
others), on whole sequences: training, and forwards without a filled KV cache. The branches share K and V, and φ reads keys as the model
rotated them, which suits ``mean`` and ``weighted`` (see :class:`nsa_gen.NSAttention`; ``linear`` and ``mlp`` then see absolute positions).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .branches._inputs import SpecLike, Tokens
from .errors import InputError
from .module import Phi, attend, check_implementation, gates_of, reset_gates, spec_of
from .spec import Spec

__all__ = ["NSAParameters", "prepare", "register"]

#: Names under which :func:`register` made the implementation known.
_registered: set[str] = set()


def register(name: str = "nsa") -> None:
    """Make ``attn_implementation=name`` known to transformers; :func:`prepare` does it too. A model that uses it must be prepared.

    Raises:
        InputError: another implementation has that name. ImportError: no transformers, or one without ``AttentionMaskInterface``.
    """
    attentions, masks = _interfaces()
    if not isinstance(name, str) or not name:
        raise InputError(f"name must be a text, got {name!r}")
    if name in _registered:
        return
    taken = ("eager", *attentions().valid_keys())
    if name in taken:
        raise InputError(f"name: {name!r} is an attention implementation of transformers, allowed: any but {', '.join(taken)}")
    attentions.register(name, attention)
    masks.register(name, padding_of)
    _registered.add(name)


def prepare(
    model: Any,
    spec: SpecLike | None = None,
    *,
    name: str = "nsa",
    implementation: str = "kernels",
    detect_packing: bool = True,
    checkpoint: str | PathLike[str] | None = None,
) -> Any:
    """Give a model's attention modules what Native Sparse Attention needs, and switch the model to it.

    Each gets ``nsa``: ``gate_proj`` and φ's weights (:class:`NSAParameters`), in the model's dtype, on the module's device. Do this before
    an optimiser is made. ``model.config.nsa_spec`` keeps the spec, and ``save_pretrained`` and ``state_dict`` have the parameters.

    Args:
        model: a ``PreTrainedModel``; of one with several parts, the causal text decoder.
        spec: a name in ``specs/``, a path, or a ``Spec`` with the model's heads and head dim and ``kv: shared``; without it
            ``model.config.nsa_spec``.
        name: of the implementation, see :func:`register`.
        implementation: ``kernels``, or ``reference``: plain PyTorch on any device, slow.
        detect_packing: whether ``position_ids`` that start anew begin another sequence, for which each forward waits for the device once.
            Without it sequences come in rows, or packed with ``cu_seq_lens_q`` and ``max_length_q``.
        checkpoint: a folder that ``save_pretrained`` wrote of a prepared model: gates and φ are read from its safetensors files.

    Returns:
        ``model``.

    Raises:
        InputError: no attention modules, or some that cannot work so; other heads than the spec's; prepared already; an incomplete
            checkpoint. SpecError: no such spec, or a broken one. ImportError: see :func:`register`.
    """
    check_implementation(implementation)
    if spec is None:
        kept = getattr(model.config, "nsa_spec", None)
        if kept is None:
            raise InputError("spec: got None, and model.config has no nsa_spec: give the spec")
        spec = Spec.from_dict(kept)
    spec = spec_of(spec)
    modules = {path: module for path, module in model.named_modules() if _is_attention(module)}
    if not modules:
        raise InputError(f"{type(model).__name__} has no attention modules of transformers (config, layer_idx, head_dim, o_proj)")
    for path, module in modules.items():
        _check_module(path, module, spec)
    register(name)
    added = {}
    for path, module in modules.items():
        made = {"device": next(module.parameters()).device, "dtype": model.dtype}
        added[path] = NSAParameters(module.config.hidden_size, spec, implementation, detect_packing, **made)
    if checkpoint is not None:
        _read(added, Path(checkpoint))
    model.set_attn_implementation(name)
    for path, module in modules.items():
        if module.config._attn_implementation != name:
            raise InputError(f"{path}: {type(module).__name__} does not follow AttentionInterface of transformers")
    for path, module in modules.items():
        module.nsa = added[path]
        module.register_forward_pre_hook(_add_gates, with_kwargs=True)
    model.config.nsa_spec = spec.to_dict()
    return model


class NSAParameters(nn.Module):
    """What :func:`prepare` adds to an attention module: ``gate_proj`` hidden → ``Hq*3``, ``phi_k``, ``phi_v``.

    At the start the gates are 1/3 each; φ as :class:`nsa_gen.module.Phi` says.
    """

    def __init__(self, hidden_size: int, spec: Spec, implementation: str, detect_packing: bool, **made: Any):
        super().__init__()
        self.spec, self.implementation, self.detect_packing = spec, implementation, detect_packing
        self.gate_proj = nn.Linear(hidden_size, spec.heads.query * 3, **made)
        self.phi_k = Phi(spec, spec.heads.kv, spec.head_dim.qk, **made)
        self.phi_v = Phi(spec, spec.heads.kv, spec.head_dim.v, **made)
        reset_gates(self.gate_proj)

    def reset_parameters(self) -> None:
        """All as at the start."""
        reset_gates(self.gate_proj)
        self.phi_k.reset_parameters()
        self.phi_v.reset_parameters()

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """``hidden [B,S,hidden]`` → ``g_cmp, g_slc, g_swa [B,S,Hq]``."""
        return gates_of(self.gate_proj(hidden))

    def extra_repr(self) -> str:
        return f"spec={self.spec.name!r}, {self.implementation}"


# --- what transformers calls ---------------------------------------------------------------------------------------------------------


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    nsa_gates: tuple[Tensor, ...] | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: ``query [B,Hq,S,D]``, ``key``, ``value [B,Hkv,S,D]`` → ``[B,S,Hq,D]`` and no weights.

    Sequences are rows of the batch; or what ``attention_mask [B,S]`` leaves of them; or packed in one row, with ``cu_seq_lens_q`` int32 and
    ``max_length_q``, or ``position_ids`` that start anew. Query and key may be of higher precision than value, as RoPE leaves them under
    autocast: they are cast to its.

    Raises:
        InputError: a module that is not prepared, or something asked for that does not exist here.
    """
    added = getattr(module, "nsa", None)
    if not isinstance(added, NSAParameters) or nsa_gates is None:
        raise InputError(f"{type(module).__name__} has no gates for NSA: call nsa_gen.huggingface.prepare(model, spec) before the forward")
    if dropout:
        raise InputError(f"attention dropout: got {dropout}, allowed: 0 (set config.attention_dropout to 0)")
    for name in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise InputError(f"{name}: got {kwargs[name]!r}, NSA has none of it, allowed: None")
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise InputError("is_causal: got False, NSA is causal, allowed: True")
    batch, _, seqlen, _ = query.shape
    if key.shape[2] != seqlen:
        raise InputError(
            f"{seqlen} queries for {key.shape[2]} keys: this works on whole sequences, not beside a filled KV cache; "
            f"train and score as usual, generate with use_cache=False"
        )
    tokens, index = _layout(added, query, attention_mask, position_ids, cu_seq_lens_q, max_length_q)

    def packed(x: Tensor) -> Tensor:
        """``[B,S,…]`` as the tokens lie."""
        if tokens.form is not None:
            return x
        return x.flatten(0, 1) if index is None else x.flatten(0, 1)[index]

    dtype = value.dtype
    q, k, v = (packed(x.transpose(1, 2).to(dtype)) for x in (query, key, value))
    gates = [packed(gate) if gate.dtype == torch.float32 else packed(gate).to(dtype) for gate in nsa_gates]
    phi_k, phi_v = added.phi_k(dtype), added.phi_v(dtype)
    o = attend(added.implementation, added.spec, tokens, q, (k,), (v,), gates, phi_k, phi_v, scale=scaling)
    if index is not None:
        o = o.new_zeros(batch * seqlen, *o.shape[1:]).index_copy(0, index, o)
    return o.reshape(batch, seqlen, *o.shape[-2:]), None


def padding_of(kv_length: int, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs: Any) -> Tensor | None:
    """The mask function: the 2-D mask where it leaves tokens out, else None; causality and packing are the attention function's.

    Raises:
        InputError: a model that adds to the causal mask.
    """
    if use_vmap:
        raise InputError("the model adds its own rule to the causal mask: NSA takes causal attention with padding or packing only")
    if attention_mask is None:
        return None
    attention_mask = attention_mask[:, -kv_length:]
    return None if attention_mask.all() else attention_mask


# --- where sequences lie -------------------------------------------------------------------------------------------------------------


class _Lengths(NamedTuple):
    """Sequences found in a tensor: ``cu_seqlens``, the longest, and which tokens of ``[B*S]`` they hold (None: all)."""

    cu_seqlens: Tensor
    max_seqlen: int
    index: Tensor | None


def _layout(
    added: NSAParameters, query: Tensor, mask: Tensor | None, position_ids: Tensor | None, cu_seqlens: Tensor | None, longest: int | None
) -> tuple[Tokens, Tensor | None]:
    batch, _, seqlen, _ = query.shape
    found = None
    if mask is not None:
        if mask.dim() != 2 or mask.shape != (batch, seqlen):
            raise InputError(f"attention_mask must be [B, S] = [{batch}, {seqlen}] (padding), got {list(mask.shape)}")
        found = _once(_unpadded, mask, batch)
    elif cu_seqlens is not None:
        if batch != 1:
            raise InputError(f"cu_seq_lens_q: sequences are packed in one row, got a batch of {batch}")
        found = _Lengths(cu_seqlens, seqlen if longest is None else int(longest), None)
    elif position_ids is not None and added.detect_packing:
        if position_ids.dim() != 2:
            raise InputError(f"position_ids must be [B, S], got {list(position_ids.shape)}")
        found = _once(_restarts, position_ids, batch)
    if found is None:
        return Tokens(batch * seqlen, batch, seqlen, None, (batch, seqlen)), None
    total = batch * seqlen if found.index is None else found.index.shape[0]
    return Tokens(total, found.cu_seqlens.shape[0] - 1, found.max_seqlen, found.cu_seqlens, None), found.index


def _unpadded(mask: Tensor, batch: int) -> _Lengths:
    lengths = mask.bool().sum(-1, dtype=torch.int32)
    cu_seqlens = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return _Lengths(cu_seqlens, int(lengths.max()), mask.flatten().nonzero().squeeze(1))


def _restarts(position_ids: Tensor, batch: int) -> _Lengths | None:
    """A sequence begins at each row, and where positions do not go on by one; None if only at rows."""
    seqlen = position_ids.shape[1]
    begins = torch.diff(position_ids, prepend=position_ids[:, :1], dim=1) != 1  # every row's first is 0
    starts = begins.expand(batch, -1).flatten().nonzero().squeeze(1)
    if len(starts) == batch:
        return None
    cu_seqlens = nn.functional.pad(starts, (0, 1), value=batch * seqlen)
    return _Lengths(cu_seqlens.int(), int(cu_seqlens.diff().max()), None)


#: What was found last, and for which tensor in which version: all layers of a forward are called with one, and each look is a sync.
_last: tuple[Callable[..., Any], weakref.ref[Tensor], int, int, Any] | None = None


def _once(find: Callable[[Tensor, int], Any], x: Tensor, batch: int) -> Any:
    global _last
    version = -1 if x.is_inference() else x._version  # inference tensors do not count their changes
    last = _last
    if last is not None and last[0] is find and last[1]() is x and last[2:4] == (version, batch) and version >= 0:
        return last[4]
    found = find(x, batch)
    _last = (find, weakref.ref(x), version, batch, found)
    return found


# --- parts of prepare ----------------------------------------------------------------------------------------------------------------


def _interfaces() -> tuple[Any, Any]:
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError("nsa_gen.huggingface needs transformers >= 4.57: pip install 'nsa-gen[huggingface]'") from error
    return AttentionInterface, AttentionMaskInterface


def _is_attention(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("config", "layer_idx", "head_dim", "o_proj"))


def _check_module(path: str, module: nn.Module, spec: Spec) -> None:
    if hasattr(module, "nsa"):
        raise InputError(f"{path} is prepared already")
    forward = inspect.signature(module.forward).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in forward):
        raise InputError(f"{path}: {type(module).__name__}.forward takes no **kwargs to pass gates on, as AttentionInterface wants")
    if spec.kv != "shared":
        raise InputError(f"spec.kv: got {spec.kv!r}, {type(module).__name__} has one K and V, allowed: shared")
    config, dim = module.config, module.head_dim
    query = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or query
    wanted = (spec.heads.query, spec.heads.kv, spec.head_dim.qk, spec.head_dim.v)
    if wanted != (query, kv, dim, dim):
        raise InputError(
            f"{path} has {query} query and {kv} KV heads of {dim} elements; spec {spec.name!r} has {wanted[0]} and {wanted[1]} of "
            f"{wanted[2]} (K) and {wanted[3]} (V): take one with heads {{query: {query}, kv: {kv}}}, head_dim {{qk: {dim}, v: {dim}}}"
        )


def _add_gates(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before an attention module's forward, which hands ``nsa_gates`` on to the attention function with its other keywords."""
    if module.config._attn_implementation not in _registered:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    return args, {**kwargs, "nsa_gates": module.nsa(hidden)}


def _read(added: dict[str, NSAParameters], folder: Path) -> None:
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"checkpoint: no *.safetensors files in {str(folder)!r}")
    wanted = {f"{path}.nsa.{name}": parameter for path, part in added.items() for name, parameter in part.named_parameters()}
    found: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in set(file.keys()) & set(wanted)}
    for name, parameter in wanted.items():
        if name not in found or found[name].shape != parameter.shape:
            given = list(found[name].shape) if name in found else "nothing"
            raise InputError(f"checkpoint: {name} must be {list(parameter.shape)}, {str(folder)!r} has {given}: not of this spec")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])
