"""A small pre-norm decoder whose attention is NSA or full, with the same projections, rotary embedding and initial weights.

Before attention each token gets a learnt share of the one before it (``TokenShift``), so that the key of a value can hold what it is the
value of. Attention alone can learn that too, but finds it out much later; compared here is what it remembers. Both attentions have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import nsa_gen
from nsa_gen.rope import rotary

ATTENTIONS = ("nsa", "full")
#: Fused kernels of torch; the first that works for a model's shapes is used. On a CPU torch chooses.
SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Size:
    """What a model is built from.

    ``inputs`` and ``outputs`` are numbers of tokens, or of features a step and of logits; ``rotated`` is the share of the head dim that
    RoPE turns by base ``theta``; ``shift`` says whether there is a ``TokenShift``.
    """

    inputs: int
    outputs: int
    width: int = 256
    layers: int = 4
    hidden: int = 1024
    theta: float = 500_000.0
    rotated: float = 0.5
    shift: bool = True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rope(theta: float, share: float) -> nsa_gen.module.Rope:
    """A rotary embedding over the first ``share`` of the head dim; the rest matches contents at any distance (arXiv 2204.06745, 2.1)."""

    def turned(x: Tensor, positions: Tensor) -> Tensor:
        dim = 2 * round(x.shape[-1] * share / 2)
        return torch.cat([rotary(x[..., :dim], positions, theta), x[..., dim:]], -1)

    return turned


class FullAttention(nn.Module):
    """Causal full attention on ``[B,S,hidden]`` with the heads of ``spec``: ``NSAttention`` less gates and φ, and K and V once."""

    def __init__(self, hidden_size: int, spec: nsa_gen.Spec, *, rope: nsa_gen.module.Rope, backend: str | None = None):
        super().__init__()
        heads, dim = spec.heads, spec.head_dim
        self.spec, self.rope, self.backend = spec, rope, backend
        self.q_proj = nn.Linear(hidden_size, heads.query * dim.qk, bias=False)
        self.k_proj = nn.Linear(hidden_size, heads.kv * dim.qk, bias=False)
        self.v_proj = nn.Linear(hidden_size, heads.kv * dim.v, bias=False)
        self.o_proj = nn.Linear(heads.query * dim.v, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, seqlen, _ = hidden.shape
        heads, dim = self.spec.heads, self.spec.head_dim
        positions = torch.arange(seqlen, device=hidden.device).repeat(batch)
        q, k = self.q_proj(hidden).view(-1, heads.query, dim.qk), self.k_proj(hidden).view(-1, heads.kv, dim.qk)
        q, k = (self.rope(x, positions).view(batch, seqlen, -1, dim.qk).transpose(1, 2) for x in (q, k))
        v = self.v_proj(hidden).view(batch, seqlen, heads.kv, dim.v).transpose(1, 2)
        with sdpa_kernel(SDPA[self.backend]) if self.backend else nullcontext():
            o = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads.query != heads.kv)
        return self.o_proj(o.transpose(1, 2).flatten(-2))


class TokenShift(nn.Module):
    """``x[t] + weight * x[t-1]`` on ``[B,S,width]``: a causal convolution two tokens wide."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight * functional.pad(x, (0, 0, 1, 0))[:, :-1]


class Block(nn.Module):
    """``x + attention(shift(norm(x)))``, then ``x + mlp(norm(x))``; another ``attention`` than the block's own may be given."""

    def __init__(self, size: Size, attention: nn.Module):
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(size.width), attention
        self.shift = TokenShift(size.width) if size.shift else nn.Identity()
        self.mlp_norm = nn.RMSNorm(size.width)
        self.up, self.down = nn.Linear(size.width, size.hidden, bias=False), nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor, attention: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        x = x + (attention or self.attention)(self.shift(self.attention_norm(x)))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x))))


class Decoder(nn.Module):
    """``layers`` blocks between an embedding and a head.

    Args:
        size: widths and numbers of inputs and outputs.
        spec: heads and, for NSA, the geometry.
        attention: ``nsa`` or ``full``.
        tokens: whether inputs are tokens ``[B,S]``; else features ``[B,S,inputs]``.
        implementation: of NSA: ``kernels`` or ``reference``.
        backend: of full attention: a name in ``SDPA``, or None for torch's choice.
        seed: of the initial weights. Weights that both attentions have are the same for the same seed.
    """

    def __init__(
        self, size: Size, spec: nsa_gen.Spec, attention: str, *, tokens: bool, implementation: str = "kernels",
        backend: str | None = None, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        turned = rope(size.theta, size.rotated)

        def made() -> nn.Module:
            if attention == "full":
                return FullAttention(size.width, spec, rope=turned, backend=backend)
            return nsa_gen.NSAttention(size.width, spec, rope=turned, implementation=implementation)

        self.embedding = nn.Embedding(size.inputs, size.width) if tokens else nn.Linear(size.inputs, size.width)
        self.blocks = nn.ModuleList(Block(size, made()) for _ in range(size.layers))
        self.norm, self.head = nn.RMSNorm(size.width), nn.Linear(size.width, size.outputs, bias=False)
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Normal weights of variance 1/fan-in; those that write into the residual stream less, for ``2*layers`` of them add up.

        Tokens start small (0.1), so that training soon outgrows them. Features have a bias, the one thing all steps share, from which
        queries and keys can learn distances. Gates and φ stay as ``NSAAttention`` makes them: the mean of the branches and of a block.
        """
        generator = torch.Generator(self.head.weight.device).manual_seed(seed)
        for name, part in self.named_modules():
            if isinstance(part, TokenShift):
                part.weight.normal_(0, 0.5, generator=generator)
            elif isinstance(part, nn.Embedding):
                part.weight.normal_(0, 0.1, generator=generator)
            elif isinstance(part, nn.Linear) and not name.endswith("gate_proj"):
                writes = name.endswith(("o_proj", "down"))
                part.weight.normal_(0, (part.in_features * (2 * len(self.blocks) if writes else 1)) ** -0.5, generator=generator)
                if part.bias is not None:
                    part.bias.normal_(0, 1, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """What the head reads, ``[B,S,width]``, of tokens or features."""
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def logits(self, x: Tensor, at: Tensor) -> Tensor:
        """Float32 logits ``[B,A,outputs]`` at positions ``at [B,A]`` of ``x``, what :meth:`forward` returned."""
        return self.head(x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))).float()


def parameters(model: nn.Module) -> dict[str, int]:
    """How many parameters there are: ``all``, and of these ``gates`` and ``phi``, which full attention has none of."""
    count = {"all": 0, "gates": 0, "phi": 0}
    for name, parameter in model.named_parameters():
        count["all"] += parameter.numel()
        count["gates"] += parameter.numel() * ("gate_proj" in name)
        count["phi"] += parameter.numel() * ("phi_" in name)
    return count


def working_backend(spec: nsa_gen.Spec, seqlen: int, names: Sequence[str] = tuple(SDPA)) -> str:
    """The first fused attention of ``names`` that runs forward and backward on this GPU with the heads of ``spec``.

    Raises:
        RuntimeError: none does.
    """
    heads, dim = spec.heads, spec.head_dim
    made: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    errors = []
    for name in names:
        q = torch.randn(1, heads.query, seqlen, dim.qk, **made)
        k, v = (torch.randn(1, heads.kv, seqlen, d, **made) for d in (dim.qk, dim.v))
        try:
            with sdpa_kernel(SDPA[name]):
                functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sum().backward()
            torch.cuda.synchronize()
            return name
        except RuntimeError as error:
            errors.append(f"{name}: {error}")
    raise RuntimeError("; ".join(errors))
