"""``NSAttention``: Native Sparse Attention as a layer (arXiv 2502.11089): projections, gates, φ's weights and the place for RoPE."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from . import ops, reference
from .branches._inputs import SpecLike, Tokens, tokens_of
from .errors import InputError, allowed
from .rope import positions_of, positions_of_blocks, rotary
from .spec import Spec, load

IMPLEMENTATIONS = ("kernels", "reference")
PHI_KEYS = ("rotated", "unrotated")
#: ``(x [T,H,D], positions [T]) -> [T,H,D]``.
Rope = Callable[[Tensor, Tensor], Tensor]


class NSAttention(nn.Module):
    """Causal self-attention by Native Sparse Attention, with all its parameters (paper eqs. 5-12, section 3.3).

    ::

        layer = nsa_gen.NSAttention(4096, "gqa16-d128", rope=500000.0, device="cuda", dtype=torch.bfloat16)
        y = layer(x, cu_seqlens=cu_seqlens, max_seqlen=longest)     # x [T,4096] packed, or [B,S,4096] batched

    Parameters, with ``Hq``, ``Hkv``, ``Dqk``, ``Dv`` and ``l`` of the spec:

    * ``q_proj`` hidden → ``Hq*Dqk``; ``k_proj``, ``v_proj`` hidden → ``Hkv*Dqk``, ``Hkv*Dv``, of three times that with K and V per branch
      (section 3.3.3), laid out ``[Hkv,3,D]`` with the branches compressed, selected, sliding; ``o_proj`` ``Hq*Dv`` → hidden.
    * ``gate_proj`` hidden → ``Hq*3``, laid out ``[Hq,3]``, then a sigmoid: the gates of eq. 5. It has a bias in any case.
    * ``phi_k``, ``phi_v``: weights of φ (eq. 7), as :func:`nsa_gen.compress` takes them; none for ``mean``.

    Heads come first in every layout, so that splitting a projection's rows by head is a plain slice.

    **RoPE and φ.** q is shared by the branches, so rotated queries meet compressed keys, which must be rotated too. ``phi_keys`` says how:

    * ``rotated``: φ reads rotated keys. Sums over a block with one factor a token (``mean``, ``weighted``) commute with what RoPE does to a
      logit: the compressed logit is the mean (weighted sum) of the block's token logits, and depends on distances alone. Their default.
    * ``unrotated``: φ reads keys as projected, and its result is rotated at the position of token ``l // 2`` of the block. ``linear`` and
      ``mlp`` mix a head's dimensions, which does not commute with RoPE: on rotated keys their logits would depend on where in the
      sequence a block lies. Their default. (Which token of a block gives the position does not limit them: they can learn any other.)

    Args:
        hidden_size: width of the layer's input and output.
        spec: a name in ``specs/``, a path, or a ``Spec``. Its ``dtype`` does not bind the layer.
        bias: whether q, k, v and output projections have one.
        rope: a number, the base θ of a rotary embedding over the whole head dim, halves rotated against each other (as in Llama);
            or ``rope(x [T,H,Dqk], positions int64 [T]) -> [T,H,Dqk]``, called for queries and keys; or None.
        per_branch_kv: three K and V, or one for all branches; None: as ``spec.kv`` says.
        phi_keys: ``rotated``, ``unrotated`` or None: see above. Without ``rope`` it says nothing.
        implementation: ``kernels``, or ``reference``: plain PyTorch on any device, slow, with a synchronisation a call; to debug with.
        device, dtype: of the parameters. Activations have the parameters' dtype, or autocast's; φ's weights are cast to it for a call.

    Raises:
        InputError: a wrong argument. SpecError: no such spec, or a broken one.

    ``state_dict`` has an ``_extra_state`` beside the parameters: which geometry they were trained in, as text in a uint8 tensor.
    ``load_state_dict`` refuses another geometry, and takes state without it.
    """

    _version = 1

    def __init__(
        self,
        hidden_size: int,
        spec: SpecLike,
        *,
        bias: bool = False,
        rope: Rope | float | None = None,
        per_branch_kv: bool | None = None,
        phi_keys: str | None = None,
        implementation: str = "kernels",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.spec = spec_of(spec)
        check_implementation(implementation)
        if isinstance(hidden_size, bool) or not isinstance(hidden_size, int) or hidden_size < 1:
            raise InputError(f"hidden_size must be a whole number from 1, got {hidden_size!r}")
        if rope is not None and not callable(rope) and not _is_theta(rope):
            raise InputError(f"rope must be a number above 0 (the base θ), a function of (x, positions), or None, got {rope!r}")
        if phi_keys is not None and phi_keys not in PHI_KEYS:
            raise InputError(f"phi_keys: {allowed(phi_keys, (*PHI_KEYS, None))}")
        if not isinstance(per_branch_kv, bool | None):
            raise InputError(f"per_branch_kv: {allowed(per_branch_kv, (True, False, None))}")
        heads, dim, pooling = self.spec.heads, self.spec.head_dim, self.spec.compression.pooling
        self.hidden_size, self.rope, self.implementation = hidden_size, rope, implementation
        self.per_branch_kv = self.spec.kv == "per_branch" if per_branch_kv is None else per_branch_kv
        self.phi_keys = phi_keys or ("rotated" if pooling in ("mean", "weighted") else "unrotated")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        branches = 3 if self.per_branch_kv else 1
        self.q_proj = nn.Linear(hidden_size, heads.query * dim.qk, bias=bias, **made)
        self.k_proj = nn.Linear(hidden_size, branches * heads.kv * dim.qk, bias=bias, **made)
        self.v_proj = nn.Linear(hidden_size, branches * heads.kv * dim.v, bias=bias, **made)
        self.gate_proj = nn.Linear(hidden_size, heads.query * 3, **made)
        self.phi_k = Phi(self.spec, heads.kv, dim.qk, **made)
        self.phi_v = Phi(self.spec, heads.kv, dim.v, **made)
        self.o_proj = nn.Linear(heads.query * dim.v, hidden_size, bias=bias, **made)
        reset_gates(self.gate_proj)

    def reset_parameters(self) -> None:
        """All parameters as at the start: projections as ``torch.nn.Linear``'s, gates as :func:`reset_gates` and φ as :class:`Phi` say."""
        for part in (self.q_proj, self.k_proj, self.v_proj, self.phi_k, self.phi_v, self.o_proj):
            part.reset_parameters()
        reset_gates(self.gate_proj)

    def forward(
        self,
        hidden: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The layer's output for packed or batched sequences.

        Args:
            hidden: ``[T,hidden]``, or ``[B,S,hidden]`` for sequences of one length; bfloat16, float16 or float32.
            cu_seqlens: int32 ``[B+1]`` on the same device, where the packed sequences begin and end; without it one sequence.
            max_seqlen: tokens of the longest sequence (an upper bound will do), with ``cu_seqlens`` only.
            position_ids: ``[T]`` or ``[B,S]``, integers: positions for ``rope``, which alone uses them; without it each sequence counts
                from 0. What a token attends to follows its place in the sequence, not this.

        Returns:
            Like ``hidden``, in the activations' dtype.

        Raises:
            InputError: a wrong argument. NotTuned: ``NSA_GEN_STRICT=1`` and no exact tuned row.
        """
        tokens = self._check(hidden, cu_seqlens, max_seqlen, position_ids)
        q = self.q_proj(hidden).unflatten(-1, (self.spec.heads.query, self.spec.head_dim.qk))
        k, v = self._branches(self.k_proj(hidden), self.spec.head_dim.qk), self._branches(self.v_proj(hidden), self.spec.head_dim.v)
        gates = gates_of(self.gate_proj(hidden))
        phi_k, phi_v = self.phi_k(q.dtype), self.phi_v(q.dtype)
        if self.rope is None:
            o = attend(self.implementation, self.spec, tokens, q, k, v, gates, phi_k, phi_v)
            return self.o_proj(o.flatten(-2))
        positions = positions_of(tokens, hidden.device) if position_ids is None else position_ids.long().flatten()
        q = self._rotated(q, positions, tokens)
        compressed = None
        if self.phi_keys == "unrotated":
            k_cmp = compress(self.implementation, self.spec, tokens, k[0], phi_k, "k")
            v_cmp = compress(self.implementation, self.spec, tokens, v[0], phi_v, "v")
            middles = positions_of_blocks(tokens, self.spec, hidden.device, position_ids)
            compressed, phi_k, phi_v = (self._rope(k_cmp, middles), v_cmp), (), ()
        k = tuple(self._rotated(x, positions, tokens) for x in k)
        o = attend(self.implementation, self.spec, tokens, q, k, v, gates, phi_k, phi_v, compressed=compressed)
        return self.o_proj(o.flatten(-2))

    def extra_repr(self) -> str:
        rope = self.rope if self.rope is None or _is_theta(self.rope) else "function"
        kv = "per_branch" if self.per_branch_kv else "shared"
        return f"{self.hidden_size}, spec={self.spec.name!r}, kv={kv}, rope={rope}, phi_keys={self.phi_keys}, {self.implementation}"

    # --- parts of the forward ----------------------------------------------------------------------------------------------------

    def _check(self, hidden: Any, cu_seqlens: Any, max_seqlen: Any, position_ids: Any) -> Tokens:
        if not isinstance(hidden, Tensor):
            raise InputError(f"hidden must be a tensor, got {type(hidden).__name__}")
        if hidden.dim() not in (2, 3) or hidden.shape[-1] != self.hidden_size:
            raise InputError(f"hidden must be [T, {self.hidden_size}] or [B, S, {self.hidden_size}], got {list(hidden.shape)}")
        tokens = tokens_of("hidden", hidden, cu_seqlens, max_seqlen, rank=2)
        weight = getattr(self.q_proj, "weight", hidden)  # a quantised or wrapped projection answers for itself
        mixed = weight.is_floating_point() and weight.dtype != hidden.dtype
        if mixed and not torch.is_autocast_enabled(hidden.device.type):
            raise InputError(f"hidden.dtype: {allowed(hidden.dtype, (weight.dtype,))} (the parameters'), or any under torch.autocast")
        if position_ids is not None:
            if not isinstance(position_ids, Tensor) or position_ids.is_floating_point() or position_ids.dtype == torch.bool:
                given = position_ids.dtype if isinstance(position_ids, Tensor) else type(position_ids).__name__
                raise InputError(f"position_ids must be a tensor of integers, got {given}")
            if position_ids.shape != hidden.shape[:-1] or position_ids.device != hidden.device:
                raise InputError(
                    f"position_ids must be {list(hidden.shape[:-1])} on {hidden.device}, "
                    f"got {list(position_ids.shape)} on {position_ids.device}"
                )
        return tokens

    def _branches(self, x: Tensor, dim: int) -> tuple[Tensor, ...]:
        """A K or V projection as ``[...,Hkv,D]``, once or for each branch."""
        heads = self.spec.heads.kv
        return x.unflatten(-1, (heads, 3, dim)).unbind(-2) if self.per_branch_kv else (x.unflatten(-1, (heads, dim)),)

    def _rotated(self, x: Tensor, positions: Tensor, tokens: Tokens) -> Tensor:
        return tokens.unpack(self._rope(tokens.pack(x), positions))

    def _rope(self, x: Tensor, positions: Tensor) -> Tensor:
        if not callable(self.rope):
            return rotary(x, positions, float(self.rope))
        found = self.rope(x, positions)
        if not isinstance(found, Tensor) or found.shape != x.shape:
            given = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"rope must return a tensor of its argument's shape {list(x.shape)}, got {given}")
        return found.to(x.dtype)

    # --- state -------------------------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What the parameters mean nothing without. RoPE is not in it: its base is changed on purpose to lengthen contexts."""
        kv = "per_branch" if self.per_branch_kv else "shared"
        return {"geometry": self.spec.key, "kv": kv, "phi_keys": self.phi_keys}

    def get_extra_state(self) -> Tensor:
        """Version and geometry as JSON in a uint8 tensor, which safetensors and ``torch.load(weights_only=True)`` take."""
        text = json.dumps({"version": self._version, **self._identity()}, sort_keys=True)
        return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Nothing to set: :meth:`_load_from_state_dict` has held it to this layer."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, missing_keys: list[str], *rest: Any
    ) -> None:
        key = f"{prefix}_extra_state"
        found = _read_state(state_dict[key], key) if key in state_dict else {}
        version = found.get("version", local_metadata.get("version", 1))
        if version > self._version:
            raise InputError(f"{key}: state of version {version}, this nsa-gen reads versions up to {self._version}: take a newer one")
        for name, own in self._identity().items():
            if found.get(name, own) != own:
                raise InputError(
                    f"{key}: trained with {name} {found[name]!r}, this layer has {own!r}: build it with the spec and options of the "
                    f"checkpoint, or delete {key!r} from the state to load the parameters all the same"
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        if key in missing_keys:  # parameters of other origin, which come without it
            missing_keys.remove(key)


def reset_gates(projection: nn.Linear) -> None:
    """Weight 0 and bias -ln 2: gates of 1/3 at first, so that the first output is the mean of the branches, as large as one of them."""
    nn.init.zeros_(projection.weight)
    nn.init.constant_(projection.bias, -math.log(2))


def gates_of(projected: Tensor) -> tuple[Tensor, ...]:
    """A gate projection's ``[...,Hq*3]`` → ``g_cmp, g_slc, g_swa [...,Hq]`` (paper eq. 5)."""
    return projected.unflatten(-1, (-1, 3)).sigmoid().unbind(-1)


class Phi(nn.Module):
    """Weights of φ, which makes one token of a block of keys or values (paper eq. 7), per KV head.

    ============  ====================================================================  ===============================================
    pooling       parameters                                                            at the start
    ============  ====================================================================  ===============================================
    ``mean``      none
    ``weighted``  ``weight [Hkv,l]``                                                    the mean: 1/l
    ``linear``    ``weight [Hkv,l*D,D]``                                                the mean: identity/l for each token
    ``mlp``       ``w1 [Hkv,l*D,h] b1 [Hkv,h] w2 [Hkv,h,D] b2 [Hkv,D] pos [Hkv,l,D]``   w1, w2 normal with variance 1/fan-in, pos normal
                                                                                        with deviation 0.02, b1 and b2 zero
    ============  ====================================================================  ===============================================
    """

    def __init__(self, spec: Spec, heads: int, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        c = spec.compression
        self.pooling, self.block, self.dim = c.pooling, c.block, dim
        hidden = c.hidden or dim
        shapes: dict[str, tuple[int, ...]] = {
            "mean": {},
            "weighted": {"weight": (heads, c.block)},
            "linear": {"weight": (heads, c.block * dim, dim)},
            "mlp": {
                "w1": (heads, c.block * dim, hidden), "b1": (heads, hidden), "w2": (heads, hidden, dim), "b2": (heads, dim),
                "pos": (heads, c.block, dim),
            },
        }[c.pooling]  # fmt: skip
        self.names = tuple(shapes)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.pooling == "weighted":
            nn.init.constant_(self.weight, 1 / self.block)
        elif self.pooling == "linear":
            with torch.no_grad():
                eye = torch.eye(self.dim, device=self.weight.device, dtype=self.weight.dtype) / self.block
                self.weight.copy_(eye.repeat(self.block, 1))
        elif self.pooling == "mlp":
            for weight in (self.w1, self.w2):
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            nn.init.normal_(self.pos, std=0.02)
            nn.init.zeros_(self.b1)
            nn.init.zeros_(self.b2)

    def forward(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The weights in the activations' dtype, as :func:`nsa_gen.compress` takes them."""
        return tuple(getattr(self, name).to(dtype) for name in self.names)

    def extra_repr(self) -> str:
        return self.pooling


# --- kernels or reference ----------------------------------------------------------------------------------------------------------


def attend(
    implementation: str, spec: Spec, tokens: Tokens, q: Tensor, k: Sequence[Tensor], v: Sequence[Tensor], gates: Sequence[Tensor],
    phi_k: tuple[Tensor, ...], phi_v: tuple[Tensor, ...], *, scale: float | None = None, compressed: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """:func:`nsa_gen.nsa_attention` by ``implementation``, of ``k`` and ``v`` one or three, packed or batched as ``tokens`` says."""
    one_k, one_v = (x[0] if len(x) == 1 else tuple(x) for x in (k, v))
    if implementation == "kernels":
        k_cmp, v_cmp = compressed or (None, None)
        max_seqlen = None if tokens.cu_seqlens is None else tokens.max_seqlen
        return ops.nsa_attention(
            q, one_k, one_v, *gates, spec=spec, cu_seqlens=tokens.cu_seqlens, max_seqlen=max_seqlen, scale=scale, phi_k=phi_k, phi_v=phi_v,
            k_cmp=k_cmp, v_cmp=v_cmp,
        )  # fmt: skip

    def pack(x: Any) -> Any:
        return tokens.pack(x) if isinstance(x, Tensor) else tuple(map(tokens.pack, x))

    with torch.autocast(q.device.type, enabled=False):
        o = reference.nsa_attention(
            pack(q), pack(one_k), pack(one_v), *map(pack, gates), spec, phi_k, phi_v, scale=scale, cu_seqlens=_bounds(tokens),
            compressed=compressed, dtype=torch.promote_types(q.dtype, torch.float32),
        )  # fmt: skip
    return tokens.unpack(o.to(q.dtype))


def compress(implementation: str, spec: Spec, tokens: Tokens, x: Tensor, weights: tuple[Tensor, ...], which: str) -> Tensor:
    """:func:`nsa_gen.compress` by ``implementation``."""
    if implementation == "kernels":
        max_seqlen = None if tokens.cu_seqlens is None else tokens.max_seqlen
        return ops.compress(x, weights, spec=spec, which=which, cu_seqlens=tokens.cu_seqlens, max_seqlen=max_seqlen)
    c = spec.compression
    with torch.autocast(x.device.type, enabled=False):
        return reference.compress(
            tokens.pack(x), c.pooling, weights, c.block, c.stride, _bounds(tokens), torch.promote_types(x.dtype, torch.float32)
        ).to(x.dtype)


def _bounds(tokens: Tokens) -> Tensor | list[int]:
    """``cu_seqlens`` also of batched tokens, for the reference."""
    return [b * tokens.max_seqlen for b in range(tokens.batch + 1)] if tokens.cu_seqlens is None else tokens.cu_seqlens


# --- checks ------------------------------------------------------------------------------------------------------------------------


def spec_of(spec: Any) -> Spec:
    """The spec of a name, path or Spec.

    Raises:
        InputError: none of these. SpecError: no such spec, or a broken one.
    """
    if not isinstance(spec, Spec | str | PathLike):
        raise InputError(f"spec must be a name, a path or a Spec, got {type(spec).__name__}")
    return load(spec)


def check_implementation(implementation: Any) -> None:
    """Hold ``implementation`` to what there is.

    Raises:
        InputError: it is something else.
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(f"implementation: {allowed(implementation, IMPLEMENTATIONS)}")


def _is_theta(rope: Any) -> bool:
    return isinstance(rope, int | float) and not isinstance(rope, bool) and 0 < rope < math.inf


def _read_state(state: Any, key: str) -> dict[str, Any]:
    """What :meth:`NSAttention.get_extra_state` wrote; also from a tensor cast with the parameters, as floats hold bytes exactly."""
    try:
        found = json.loads(bytes(state.to(device="cpu", dtype=torch.uint8).tolist()))
        if not isinstance(found, dict) or not isinstance(found.get("version", 1), int):
            raise ValueError
    except (AttributeError, ValueError) as error:
        raise InputError(f"{key} is not what nsa-gen wrote there: delete it to load the parameters all the same") from error
    return found
