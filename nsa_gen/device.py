"""The frozen ``Device``: what a kernel is built for, which tables serve it, and which may be borrowed.

A device is found by its whole name, never by a part of it: ``NVIDIA H100 PCIe`` is not an ``NVIDIA H100 80GB HBM3``.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

from .errors import TargetError


@dataclass(frozen=True)
class Device:
    """One kind of GPU, or any GPU of an arch.

    Args:
        slug: folder name of its tables, e.g. ``nvidia-h200``; for "any GPU of an arch" the arch itself.
        name: as people write it.
        arch: ``sm_<compute capability>``, ``gfx<number>`` or ``interpreter``.
        sm_count: streaming multiprocessors (NVIDIA) or compute units (AMD).
        shared_bytes: most shared memory (LDS) one block may ask for.
        warp_size: threads a warp (wavefront).
        backend: Triton's word: ``cuda`` or ``hip``; ``cpu`` for the interpreter.
        aliases: names a driver reports for it; compared whole, case ignored.
        fallbacks: slugs whose tables may be borrowed, best first, declared by hand. The lookup tries all devices of its arch before them.
    """

    slug: str
    name: str
    arch: str
    sm_count: int
    shared_bytes: int
    warp_size: int = 32
    backend: str = "cuda"
    aliases: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()

    @property
    def fp8(self) -> bool:
        """Whether kernels can read and write ``float8_e4m3fn``: NVIDIA GPUs from sm_89 on, and the interpreter."""
        return self.backend == "cpu" or (self.backend == "cuda" and int(self.arch[3:]) >= 89)

    @property
    def chains(self) -> bool:
        """Whether a kernel's programs can be there before the kernel before it ends (programmatic dependent launch): from sm_90 on."""
        return self.backend == "cuda" and int(self.arch[3:]) >= 90

    def triton_target(self) -> Any:
        """The ``triton.backends.compiler.GPUTarget`` to compile for: ``("cuda", 90, 32)``, ``("hip", "gfx942", 64)``.

        Raises:
            TargetError: the interpreter, which compiles nothing.
        """
        if self.backend == "cpu":
            raise TargetError(f"{self.slug} runs kernels as Python and compiles nothing; compile for one of: {', '.join(_ARCHES)}")
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, int(self.arch[3:]) if self.backend == "cuda" else self.arch, self.warp_size)


#: Shared memory a block may opt in to, from the CUDA programming guide's table of compute capabilities (LDS on AMD).
_SHARED = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}

#: What may be borrowed, best first: GPUs with the same tensor-core instructions and shared memory before others.
#: A borrowed row that does not fit is passed over, so a larger GPU may stand last. AMD borrows nothing: waves of 64, 64 KiB of LDS.
_FALLBACKS = {
    "sm_80": ("nvidia-l40s", "nvidia-rtx-4090", "nvidia-h200", "nvidia-h100-sxm"),
    "sm_89": ("nvidia-rtx-5090", "nvidia-a100-80gb", "nvidia-a100-40gb", "nvidia-h200"),
    "sm_90": ("nvidia-h200", "nvidia-h100-sxm", "nvidia-b200", "nvidia-a100-80gb"),
    "sm_100": ("nvidia-h200", "nvidia-h100-sxm"),
    "sm_120": ("nvidia-rtx-4090", "nvidia-l40s", "nvidia-a100-80gb", "nvidia-h200"),
    "gfx942": (),
}


def _nvidia(slug: str, name: str, arch: str, sm_count: int, *aliases: str) -> Device:
    fallbacks = tuple(other for other in _FALLBACKS[arch] if other != slug)
    return Device(slug, name, arch, sm_count, _SHARED[arch], aliases=(name, *aliases), fallbacks=fallbacks)


_DEVICES = (
    _nvidia("nvidia-a100-40gb", "NVIDIA A100 40GB", "sm_80", 108, "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "A100-SXM4-40GB"),
    _nvidia("nvidia-a100-80gb", "NVIDIA A100 80GB", "sm_80", 108, "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM-80GB"),
    _nvidia("nvidia-rtx-4090", "NVIDIA GeForce RTX 4090", "sm_89", 128, "RTX 4090"),
    _nvidia("nvidia-l40s", "NVIDIA L40S", "sm_89", 142, "L40S"),
    _nvidia("nvidia-l4", "NVIDIA L4", "sm_89", 58, "L4"),
    _nvidia("nvidia-h100-sxm", "NVIDIA H100 80GB HBM3", "sm_90", 132, "NVIDIA H100 SXM", "H100 SXM"),
    _nvidia("nvidia-h100-pcie", "NVIDIA H100 PCIe", "sm_90", 114, "H100 PCIe"),
    _nvidia("nvidia-h200", "NVIDIA H200", "sm_90", 132, "H200"),
    _nvidia("nvidia-b200", "NVIDIA B200", "sm_100", 148, "B200"),
    _nvidia("nvidia-rtx-5090", "NVIDIA GeForce RTX 5090", "sm_120", 170, "RTX 5090"),
    Device(
        "amd-mi300x", "AMD Instinct MI300X", "gfx942", 304, _SHARED["gfx942"], 64, "hip",
        ("AMD Instinct MI300X", "AMD Instinct MI300X OAM", "AMD Instinct MI300X VF", "MI300X"),
    ),
)  # fmt: skip

#: Any GPU of an arch: what ``--target sm_90`` means. SM counts are those of the arch's best-known GPU and only rank tables.
_SM_COUNTS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}
_ARCHES = {
    arch: Device(arch, f"any {arch} GPU", arch, _SM_COUNTS[arch], shared, fallbacks=_FALLBACKS[arch])
    if arch.startswith("sm_")
    else Device(arch, f"any {arch} GPU", arch, _SM_COUNTS[arch], shared, 64, "hip", fallbacks=_FALLBACKS[arch])
    for arch, shared in _SHARED.items()
}

#: Triton's interpreter: runs kernels as Python on the CPU, so nothing is too large for it.
INTERPRETER = Device("interpreter", "Triton interpreter", "interpreter", 1, 2**31 - 1, 1, "cpu")

_NAMES = {text.casefold(): device for device in (*_DEVICES, *_ARCHES.values(), INTERPRETER) for text in (device.slug, *device.aliases)}


def devices() -> tuple[Device, ...]:
    """Every GPU known by name, in a fixed order (neither arches nor the interpreter)."""
    return _DEVICES


def arches() -> tuple[str, ...]:
    """Every arch that can be named as a target."""
    return tuple(_ARCHES)


def from_name(text: str) -> Device:
    """The device called ``text``: a slug, a driver's name for it, an arch, or ``interpreter``.

    The whole string is compared, case and outer blanks ignored.

    Raises:
        TargetError: there is none; the message lists the slugs and arches, and the nearest.
    """
    found = _NAMES.get(text.strip().casefold()) if isinstance(text, str) else None
    if found is not None:
        return found
    names = [*(device.slug for device in _DEVICES), *_ARCHES, INTERPRETER.slug]
    near = difflib.get_close_matches(text.strip().casefold(), _NAMES, n=1, cutoff=0.5) if isinstance(text, str) else []
    hint = f"; did you mean {_NAMES[near[0]].slug}?" if near else ""
    raise TargetError(f"unknown target: got {text!r}, allowed: {', '.join(names)}{hint}")


def same_arch(device: Device) -> tuple[Device, ...]:
    """The other known devices of ``device``'s arch, nearest SM count first, ties by slug."""
    alike = [o for o in _DEVICES if (o.arch, o.backend) == (device.arch, device.backend) and o.slug != device.slug]
    return tuple(sorted(alike, key=lambda other: (abs(other.sm_count - device.sm_count), other.slug)))


def current(index: int | None = None) -> Device:
    """The GPU torch sees at ``index`` (default: torch's current device).

    A GPU that is not known by name becomes a Device with a slug made from its name and what the driver reports of it.

    Raises:
        TargetError: no GPU, no such index, or one that is too old for the kernels (below ``sm_80``).
    """
    import torch

    if not torch.cuda.is_available():
        raise TargetError(
            "no GPU is visible to torch: install a torch build for your GPU and check CUDA_VISIBLE_DEVICES, "
            f"name a target instead (one of: {', '.join(_ARCHES)}), or set TRITON_INTERPRET=1 to run kernels on the CPU"
        )
    count = torch.cuda.device_count()
    if index is not None and not 0 <= index < count:
        raise TargetError(f"no GPU {index}: got {index}, allowed: {', '.join(map(str, range(count)))}")
    return from_properties(torch.cuda.get_device_properties(index if index is not None else torch.cuda.current_device()))


def from_properties(properties: Any) -> Device:
    """The Device of what ``torch.cuda.get_device_properties`` returns.

    A known name counts only with the SM count known for it: a slice of a GPU (MIG) gets a slug of its own, and borrows.

    Raises:
        TargetError: compute capability below 8.0.
    """
    hip = str(getattr(properties, "gcnArchName", "")).startswith("gfx")
    arch = properties.gcnArchName.split(":")[0] if hip else f"sm_{properties.major}{properties.minor}"
    name, sm_count = properties.name, properties.multi_processor_count
    if not hip and properties.major < 8:
        raise TargetError(f"{name} is {arch}: kernels need sm_80 or newer (bfloat16 tensor cores and asynchronous copies)")
    known = _NAMES.get(name.strip().casefold())
    if known is not None and (known.arch, known.sm_count) == (arch, sm_count):
        return known
    kin = _ARCHES.get(arch) or _kin(arch)
    shared = getattr(properties, "shared_memory_per_block" if hip else "shared_memory_per_block_optin", 0)
    return Device(
        slug=f"{known.slug}-{sm_count}sm" if known is not None and known.arch == arch else _slug(name) or arch,
        name=name,
        arch=arch,
        sm_count=sm_count,
        shared_bytes=shared or (kin.shared_bytes if kin else 49152),
        warp_size=getattr(properties, "warp_size", 0) or (64 if hip else 32),
        backend="hip" if hip else "cuda",
        aliases=(name,),
        fallbacks=_borrowable(kin, arch),
    )


def _kin(arch: str) -> Device | None:
    """For an arch without a name here (sm_86, sm_103): the newest named one it descends from, i.e. of its major version."""
    older = [named for named in _ARCHES if named.startswith("sm_") and arch.startswith(named[:-1])]
    older = [named for named in older if len(named) == len(arch) and named <= arch]
    return _ARCHES[max(older)] if older else None


def _borrowable(kin: Device | None, arch: str) -> tuple[str, ...]:
    """Fallbacks of a device that is not known: those of its arch, after the devices of the arch it descends from."""
    if kin is None:
        return ()
    own = () if kin.arch == arch else tuple(other.slug for other in same_arch(kin))
    return tuple(dict.fromkeys((*own, *kin.fallbacks)))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
