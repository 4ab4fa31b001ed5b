"""Rows of K and V in pages, as a cache stores them: by layer, in the model's dtype or in fp8, with what they are multiplied by.

Which page a row is in is the caller's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .branches import compression, decode
from .branches._inputs import Geometry
from .errors import InputError

#: What K and V may be stored in besides their own dtype, and the largest number it holds.
FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
#: The page and the place in it of some rows, int64 each.
Places = tuple[Tensor, Tensor]


class Rows:
    """Pages ``k_pages [layers,pages,Hkv,page_size,Dqk]`` and ``v_pages […,Dv]``, zero at first.

    Args:
        geometry: head dims, and the pooling that ``phi_k``, ``phi_v`` must fit.
        streams: names of what rows are of; scales belong to them.
        layers, pages, heads, page_size: sizes.
        dtype, storage: of K and V as given, and as stored.
        k_scale, v_scale, phi_k, phi_v: as ``PagedKVCache`` takes them.
        device: of all tensors.

    Raises:
        InputError: scales or weights of another shape, or scales that are not positive and finite.
    """

    def __init__(
        self, geometry: Geometry, streams: Sequence[str], *, layers: int, pages: int, heads: int, page_size: int, dtype: torch.dtype,
        storage: torch.dtype, k_scale: float | Tensor, v_scale: float | Tensor, phi_k: Sequence[Any], phi_v: Sequence[Any],
        device: torch.device,
    ):  # fmt: skip
        g, self.layers, self.dtype, self.storage, self.device = geometry, layers, dtype, storage, device
        shape = layers, pages, heads, page_size
        self.k_pages, self.v_pages = (torch.zeros(*shape, dim, dtype=storage, device=device) for dim in (g.qk, g.v))
        self._layers = [(self.k_pages[i], self.v_pages[i]) for i in range(layers)]
        self.k_scale, self.v_scale = (
            _scale(name, scale, (layers, len(streams), heads), streams, device)
            for name, scale in (("k_scale", k_scale), ("v_scale", v_scale))
        )
        #: By layer, φ's weights for K and for V.
        self.phi: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = list(
            zip(self._phi("phi_k", phi_k, heads, g, g.qk), self._phi("phi_v", phi_v, heads, g, g.v), strict=True)
        )
        selected, sliding, compressed = decode.STREAMS[len(streams)]
        #: What stored K and V are multiplied by, by layer; nothing where nothing is scaled.
        self.stored_scales: list[tuple[Tensor, ...]] = [
            () if storage is dtype else (self.k_scale[layer].clone(), self.v_scale[layer].clone()) for layer in range(layers)
        ]
        #: What decoding multiplies by, by layer: K and V, of the compressed, selected and sliding branch; nothing where nothing is scaled.
        order = [compressed, selected, sliding]
        self.scales: list[tuple[Tensor, ...]] = [
            () if storage is dtype else (self.k_scale[layer, order], self.v_scale[layer, order]) for layer in range(layers)
        ]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """``k_pages`` and ``v_pages`` of a layer. Raises ``InputError`` where there is none."""
        if not isinstance(layer, int) or not 0 <= layer < self.layers:
            raise InputError(f"layer must be 0 to {self.layers - 1}, got {layer!r}")
        return self._layers[layer]

    @torch.no_grad()
    def put(self, layer: int, stream: int, places: Places, k: Tensor, v: Tensor) -> None:
        """Store rows ``[rows,Hkv,D]``."""
        page, row = places
        for pages, x, scale in zip(self.layer(layer), (k, v), (self.k_scale, self.v_scale), strict=True):
            if self.storage is FP8:
                x = (x.float() / scale[layer, stream, :, None]).clamp(-_FP8_MAX, _FP8_MAX).to(FP8)
            _bits(pages)[page, :, row] = _bits(x)

    def take(self, layer: int, stream: int, places: Places) -> tuple[Tensor, Tensor]:
        """Rows of K and V, ``[rows,Hkv,D]`` in ``dtype``."""
        page, row = places
        k, v = (_bits(pages)[page, :, row].view(self.storage) for pages in self.layer(layer))
        if self.storage is FP8:
            pairs = (k, self.k_scale), (v, self.v_scale)
            k, v = ((x.float() * scale[layer, stream, :, None]).to(self.dtype) for x, scale in pairs)
        return k, v

    def copy(self, pages: Sequence[tuple[int, int]]) -> None:
        """Pages ``(from, to)``, in all layers."""
        if pages:
            source, target = torch.tensor(pages, device=self.device).T
            for x in (self.k_pages, self.v_pages):
                _bits(x)[:, target] = _bits(x)[:, source]

    def _phi(self, name: str, given: Sequence[Any], heads: int, g: Geometry, dim: int) -> list[tuple[Tensor, ...]]:
        each = [tuple(given)] if self.layers == 1 else [tuple(weights) for weights in given] or [()] * self.layers
        if len(each) != self.layers:
            raise InputError(f"{name} must have weights for each of {self.layers} layers, got {len(each)}")
        for weights in each:
            compression.check_weights(name, weights, torch.empty(0, heads, dim, dtype=self.dtype, device=self.device), g)
        return each


def _scale(name: str, scale: float | Tensor, shape: tuple[int, int, int], streams: Sequence[str], device: torch.device) -> Tensor:
    if isinstance(scale, Tensor) and scale.shape not in (shape[2:], shape[1:], shape):
        allowed = f"a number, [{shape[2]}], {list(shape[1:])} ({', '.join(streams)}) or {list(shape)}"
        raise InputError(f"{name} must be {allowed}, got {list(scale.shape)}")
    made = torch.as_tensor(scale, dtype=torch.float32).to(device).expand(shape).contiguous()
    if device.type != "meta" and not bool((made > 0).all() & made.isfinite().all()):
        raise InputError(f"{name} must be positive and finite, got {scale!r}")
    return made


def _bits(x: Tensor) -> Tensor:
    """fp8 as bytes: torch does not index fp8 tensors."""
    return x.view(torch.uint8) if x.dtype is FP8 else x
