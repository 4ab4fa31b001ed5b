"""What kernels a spec needs: the problem of each kernel, and the kernels it needs more than once."""

from __future__ import annotations

import pytest
from hypothesis import given
from test_spec import specs

from nsa_gen import config
from nsa_gen.config import FP8, KERNELS, SERVING, Cached
from nsa_gen.errors import ConfigError
from nsa_gen.spec import load

PAPER = load("nsa-paper")


def selecting(count: int, initial: int, local: int):
    return PAPER.replace(selection={"count": count, "initial": initial, "local": local})


PARTS = {
    (16, 1, 2): (13, 1),
    (4, 1, 1): (2, 1),
    (5, 0, 0): (5, 1),
    (4, 1, 2): (1,),
    (1, 0, 0): (1,),
    (3, 1, 2): (0,),
}


@pytest.mark.parametrize(("blocks", "parts"), PARTS.items())
def test_partial_results_that_the_fused_end_may_get(blocks, parts):
    """One for each block that is neither initial nor local, or one over them all."""
    spec = selecting(*blocks)
    assert config.variants("sliding_merge_fwd", spec) == parts
    found = [p for p in config.problems(spec) if p.kernel == "sliding_merge_fwd"]
    assert [p.parts for p in found] == list(parts)
    assert len({p.digest for p in found}) == len(parts)


def test_k_and_v_of_unequal_head_dims_pool_apart():
    assert config.variants("compress_fwd", PAPER) == ("k", "v")
    assert [p.head_dim for p in config.problems(PAPER) if p.kernel == "compress_fwd"] == [192, 128]
    square = PAPER.replace(head_dim={"qk": 128, "v": 128})
    assert [p.head_dim for p in config.problems(square) if p.kernel == "compress_fwd"] == [128]


VARIED = ("compress_fwd", "compress_bwd", "sliding_merge_fwd", "compressed_attention_bwd", "selected_attention_bwd")


@pytest.mark.parametrize("varlen", [False, True])
def test_problem_is_the_first_variant_unless_said(varlen):
    for kernel in KERNELS:
        first, *others = (config.problem(kernel, PAPER, varlen=varlen, which=which) for which in config.variants(kernel, PAPER))
        assert config.problem(kernel, PAPER, varlen=varlen) == first
        assert first not in others and bool(others) == (kernel in VARIED)


def test_variants_of_the_fused_end_differ_by_their_parts_alone():
    listed, one = (config.problem("sliding_merge_fwd", PAPER, which=which).as_dict() for which in (13, 1))
    assert one == listed | {"parts": 1}


@pytest.mark.parametrize(
    ("kernel", "which"), [("compress_fwd", "q"), ("sliding_merge_fwd", "k"), ("sliding_merge_fwd", 2), ("combine_fwd", "k")]
)
def test_no_such_variant(kernel, which):
    with pytest.raises(ConfigError, match=rf"{kernel}: which: .*{which}"):
        config.problem(kernel, PAPER, which=which)


@given(specs())
def test_problems_are_the_variants_of_every_kernel(spec):
    found = config.problems(spec, varlen=True)
    assert {p.kernel for p in found} == set(KERNELS)
    for kernel in KERNELS:
        for which in config.variants(kernel, spec):
            assert config.problem(kernel, spec, varlen=True, which=which) in found
    listed = spec.selection.count - spec.selection.initial - spec.selection.local
    assert all(p.parts in (1, listed) and p.parts <= listed for p in found if p.kernel == "sliding_merge_fwd")


def test_the_cache_of_a_spec():
    assert config.cache_of(PAPER) == Cached("bfloat16", 64, 1, 3)
    assert config.cache_of(load("tiny"), FP8, 48, 8) == Cached(FP8, 48, 8, 1)
    assert config.cache_of(PAPER.replace(selection={"block": 128})).page_size == 128
    for arguments, why in (
        (("float16",), "storage of a cache: got 'float16', allowed: bfloat16, float8_e4m3fn"),
        ((None, 96), "page size: got 96, allowed: multiples of the selection block, 64"),
        ((None, 0), "page size: got 0"),
        ((None, None, 0), "got 0, allowed: 1 to 8"),
        ((None, None, 9), "got 9, allowed: 1 to 8"),
    ):
        with pytest.raises(ConfigError, match=why):
            config.cache_of(PAPER, *arguments)


@given(specs())
def test_problems_of_a_cache_are_those_that_serve(spec):
    """A page holds whole blocks; nothing but the cache tells the problems of two from one another."""
    one, other = config.cache_of(spec), config.cache_of(spec, FP8, tokens=3)
    assert one.page_size >= 64 and one.page_size % spec.selection.block == 0
    assert [p.kernel for p in config.problems(spec, cached=one)] == list(SERVING)
    for kernel, p, q in zip(SERVING, config.problems(spec, cached=one), config.problems(spec, cached=other), strict=True):
        assert p == config.problem(kernel, spec) == config.problem(kernel, spec, which=config.variants(kernel, spec)[0])
        assert q == config.problem(kernel, spec, which=other)
        assert {name for name, value in p.values if q[name] != value} == {"storage", "tokens"}
    with pytest.raises(ConfigError, match="cache_append"):
        config.key_fields("cache_appends")
