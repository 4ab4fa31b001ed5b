"""Devices: found by whole names, real figures, what may be borrowed, what the driver reports."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_gen import device
from nsa_gen.device import INTERPRETER, Device, arches, devices, from_name, from_properties, same_arch
from nsa_gen.errors import TargetError

KIB = 1024


def properties(name="NVIDIA H200", major=9, minor=0, sms=132, shared=232448, **more):
    known = dict(name=name, major=major, minor=minor, multi_processor_count=sms, shared_memory_per_block_optin=shared, warp_size=32)
    return SimpleNamespace(**known | more)


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ("nvidia-h200", "nvidia-h200"),
        ("NVIDIA H200", "nvidia-h200"),
        (" nvidia h200 ", "nvidia-h200"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-sxm"),
        ("NVIDIA H100 PCIe", "nvidia-h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "nvidia-a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "nvidia-a100-80gb"),
        ("NVIDIA GeForce RTX 4090", "nvidia-rtx-4090"),
        ("NVIDIA L4", "nvidia-l4"),
        ("NVIDIA L40S", "nvidia-l40s"),
        ("AMD Instinct MI300X", "amd-mi300x"),
        ("sm_90", "sm_90"),
        ("gfx942", "gfx942"),
        ("interpreter", "interpreter"),
    ],
)
def test_from_name(text, slug):
    assert from_name(text).slug == slug


@pytest.mark.parametrize("text", ["NVIDIA H200 NVL", "NVIDIA H20", "H2", "NVIDIA L40", "nvidia", "90", "sm_9", "sm_75", "", " ", None, 90])
def test_never_by_a_part_of_the_name(text):
    with pytest.raises(TargetError) as caught:
        from_name(text)
    assert repr(text) in str(caught.value)
    for name in ("nvidia-h200", "amd-mi300x", *arches(), "interpreter"):
        assert name in str(caught.value)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(TargetError, match=r"did you mean nvidia-h200\?"):
        from_name("nvidia_h200")
    with pytest.raises(TargetError, match=r"did you mean sm_90\?"):
        from_name("sm90")


@given(st.text(max_size=30))
def test_any_text_finds_a_device_or_raises_target_error(text):
    try:
        assert text.strip().casefold() in {t.casefold() for t in (from_name(text).slug, *from_name(text).aliases)}
    except TargetError as error:
        assert repr(text) in str(error)


def test_names_are_unique():
    texts = [
        t.casefold()
        for d in (*devices(), *map(from_name, arches()), INTERPRETER)
        for t in {d.slug.casefold(), *map(str.casefold, d.aliases)}
    ]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize(
    ("slug", "arch", "sms", "shared"),
    [
        ("nvidia-a100-40gb", "sm_80", 108, 163 * KIB),
        ("nvidia-a100-80gb", "sm_80", 108, 163 * KIB),
        ("nvidia-rtx-4090", "sm_89", 128, 99 * KIB),
        ("nvidia-l40s", "sm_89", 142, 99 * KIB),
        ("nvidia-l4", "sm_89", 58, 99 * KIB),
        ("nvidia-h100-sxm", "sm_90", 132, 227 * KIB),
        ("nvidia-h100-pcie", "sm_90", 114, 227 * KIB),
        ("nvidia-h200", "sm_90", 132, 227 * KIB),
        ("nvidia-b200", "sm_100", 148, 227 * KIB),
        ("nvidia-rtx-5090", "sm_120", 170, 99 * KIB),
        ("amd-mi300x", "gfx942", 304, 64 * KIB),
    ],
)
def test_figures(slug, arch, sms, shared):
    found = from_name(slug)
    assert (found.arch, found.sm_count, found.shared_bytes) == (arch, sms, shared)
    assert (found.backend, found.warp_size) == (("hip", 64) if arch.startswith("gfx") else ("cuda", 32))
    assert found.aliases and found.name in found.aliases


def test_arches_are_targets_of_their_own():
    assert set(arches()) == {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"} == {d.arch for d in devices()}
    for arch in arches():
        found, kin = from_name(arch), [d for d in devices() if d.arch == arch]
        assert found.slug == found.arch == arch and found not in devices()
        assert found.shared_bytes == min(d.shared_bytes for d in kin)  # what is built for the arch runs on every GPU of it
        assert {(found.backend, found.warp_size)} == {(d.backend, d.warp_size) for d in kin}


def test_who_reads_fp8():
    assert {arch for arch in arches() if from_name(arch).fp8} == {"sm_89", "sm_90", "sm_100", "sm_120"} and INTERPRETER.fp8


def test_fallbacks_are_known_and_never_cross_vendors():
    slugs = {d.slug: d for d in devices()}
    for found in (*devices(), *map(from_name, arches())):
        assert found.slug not in found.fallbacks and len(set(found.fallbacks)) == len(found.fallbacks)
        assert all(slugs[other].backend == found.backend for other in found.fallbacks)
    assert "nvidia-h200" in from_name("nvidia-h100-sxm").fallbacks
    assert from_name("nvidia-b200").fallbacks[0] == "nvidia-h200"
    assert INTERPRETER.fallbacks == ()


def test_same_arch_is_by_nearest_sm_count():
    assert [d.slug for d in same_arch(from_name("nvidia-h200"))] == ["nvidia-h100-sxm", "nvidia-h100-pcie"]
    assert [d.slug for d in same_arch(from_name("nvidia-l40s"))] == ["nvidia-rtx-4090", "nvidia-l4"]
    few = from_properties(properties("NVIDIA H20", sms=78))
    assert [d.slug for d in same_arch(few)] == ["nvidia-h100-pcie", "nvidia-h100-sxm", "nvidia-h200"]
    assert same_arch(INTERPRETER) == ()


def test_triton_targets():
    pytest.importorskip("triton")
    target = from_name("nvidia-h200").triton_target()
    assert (target.backend, target.arch, target.warp_size) == ("cuda", 90, 32)
    target = from_name("sm_120").triton_target()
    assert (target.backend, target.arch, target.warp_size) == ("cuda", 120, 32)
    target = from_name("gfx942").triton_target()
    assert (target.backend, target.arch, target.warp_size) == ("hip", "gfx942", 64)
    with pytest.raises(TargetError, match="compiles nothing"):
        INTERPRETER.triton_target()


def test_known_gpu_from_the_driver():
    assert from_properties(properties()) is from_name("nvidia-h200")
    amd = properties("AMD Instinct MI300X", 9, 4, 304, gcnArchName="gfx942:sramecc+:xnack-", shared_memory_per_block=65536)
    assert from_properties(amd) is from_name("amd-mi300x")
    assert from_properties(properties(gcnArchName="NVIDIA H200")) is from_name("nvidia-h200")  # CUDA builds put the name there


def test_unknown_gpu_of_a_known_arch():
    found = from_properties(properties("NVIDIA H20", sms=78))
    assert found == Device("nvidia-h20", "NVIDIA H20", "sm_90", 78, 232448, 32, "cuda", ("NVIDIA H20",), from_name("sm_90").fallbacks)


def test_slice_of_a_gpu_is_not_the_gpu():
    mig = from_properties(properties("NVIDIA H200 MIG 3g.71gb", sms=60))
    assert (mig.slug, mig.sm_count) == ("nvidia-h200-mig-3g-71gb", 60)
    same_name = from_properties(properties(sms=60))
    assert (same_name.slug, same_name.arch, same_name.sm_count) == ("nvidia-h200-60sm", "sm_90", 60)


@pytest.mark.parametrize(("major", "minor", "kin"), [(8, 6, "sm_80"), (8, 7, "sm_80"), (10, 3, "sm_100"), (12, 1, "sm_120"), (11, 0, None)])
def test_arch_without_a_name_keeps_its_own_and_borrows_from_its_kin(major, minor, kin):
    found = from_properties(properties("NVIDIA New", major, minor, 80, 101376))
    assert (found.slug, found.arch, found.shared_bytes) == ("nvidia-new", f"sm_{major}{minor}", 101376)
    assert found.triton_target().arch == major * 10 + minor
    if kin is None:
        assert found.fallbacks == ()
    else:
        assert [from_name(slug).arch for slug in found.fallbacks].index(kin) == 0


def test_unknown_amd_gpu():
    found = from_properties(properties("", 9, 5, 256, gcnArchName="gfx950:sramecc+", shared_memory_per_block=163840, warp_size=64))
    assert (found.slug, found.arch, found.backend, found.warp_size, found.shared_bytes) == ("gfx950", "gfx950", "hip", 64, 163840)
    assert found.fallbacks == ()


def test_old_gpus_are_refused():
    with pytest.raises(TargetError, match=r"Tesla V100.*sm_70.*sm_80 or newer"):
        from_properties(properties("Tesla V100-SXM2-16GB", 7, 0, 80))


def test_current_without_a_gpu_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TargetError, match=r"CUDA_VISIBLE_DEVICES.*sm_90.*TRITON_INTERPRET=1"):
        device.current()


def test_current_asks_torch(monkeypatch):
    gpus = [properties(), properties("NVIDIA L4", 8, 9, 58, 101376)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
    assert (device.current().slug, device.current(0).slug, device.current(1).slug) == ("nvidia-l4", "nvidia-h200", "nvidia-l4")
    with pytest.raises(TargetError, match="got 2, allowed: 0, 1"):
        device.current(2)


@pytest.mark.gpu
def test_current_is_what_the_driver_reports():
    found, real = device.current(), torch.cuda.get_device_properties(torch.cuda.current_device())
    assert (found.sm_count, found.backend) == (real.multi_processor_count, "hip" if torch.version.hip else "cuda")
    if not torch.version.hip:
        assert found.arch == f"sm_{real.major}{real.minor}"
        assert found.shared_bytes == real.shared_memory_per_block_optin
