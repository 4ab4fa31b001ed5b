"""cache_append, rendered by nsa-gen from templates/cache_append.py.jinja. Do not edit: change the template.

problem 121b39c7dc95: dtype=bfloat16 storage=bfloat16 head_dim_qk=128 head_dim_v=128 block=32 stride=16 pooling=mean hidden=0 hidden_v=0
    branches=1 page_size=64 tokens=1
config  e5260f643e66: body=stream chain=True num_warps=1
command: python -m nsa_gen generate SPEC --target TARGET -o DIR
"""

import triton
import triton.language as tl

from nsa_gen.launch import Launcher


@triton.jit
def row_of(table_ptr, row, head, heads, PAGE: tl.constexpr, D: tl.constexpr):
    """Where a row of a stream begins."""
    page = tl.load(table_ptr + row // PAGE).to(tl.int64)
    return ((page * heads + head) * PAGE + row % PAGE) * D


@triton.jit
def store_row(pages_ptr, place, column, x, scale, D: tl.constexpr):
    tl.store(pages_ptr + place + column, x.to(pages_ptr.dtype.element_ty), mask=column < D)


@triton.jit
def store_new(
    x_ptr, pages_ptr, table_ptr, scale_ptr, length, head, heads, stride_t, TOKENS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr,
):  # fmt: skip
    """A sequence's new rows of one head."""
    column = tl.arange(0, D_PAD)
    scale = 1.0 if scale_ptr is None else tl.load(scale_ptr + head)
    for token in range(TOKENS):
        row = length - TOKENS + token
        if row >= 0:
            x = tl.load(x_ptr + token * stride_t + column, mask=column < D, other=0.0)
            store_row(pages_ptr, row_of(table_ptr, row, head, heads, PAGE, D), column, x, scale, D)


@triton.jit
def load_held(pointers, inside, scale, dtype: tl.constexpr):
    """Numbers that the cache holds."""
    x = tl.load(pointers, mask=inside, other=0.0)
    return x


@triton.jit
def load_new(x_ptr, offsets, inside, scale, storage: tl.constexpr):
    """New numbers, rounded as the cache will hold them."""
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    return x


@triton.jit
def load_token(
    x_ptr, pages_ptr, table_ptr, scale, position, old, column, head, heads, stride_t, PAGE: tl.constexpr, D: tl.constexpr
):
    """Some columns of a token, which is new from position `old` on."""
    if position >= old:
        x = load_new(x_ptr, (position - old) * stride_t + column, column < D, scale, pages_ptr.dtype.element_ty)
    else:
        x = load_held(pages_ptr + row_of(table_ptr, position, head, heads, PAGE, D) + column, column < D, scale, x_ptr.dtype.element_ty)
    return x


@triton.jit
def compress_row(
    x_ptr,  # [TOKENS, Hkv, D] of this sequence and head: new tokens
    pages_ptr,
    tokens_ptr,  # table of the tokens that are pooled
    rows_ptr,  # table of compressed tokens
    scale_ptr,  # [Hkv] of those tokens, or None
    cmp_scale_ptr,  # [Hkv] of compressed tokens, or None
    w0_ptr,  # weights of phi: as many as the pooling has, else None
    w1_ptr,
    w2_ptr,
    w3_ptr,
    w4_ptr,
    row,
    old,  # position of the first new token
    head,
    heads,
    stride_t,
    TOKENS: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    STRETCH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """One compressed token of one head."""
    scale = 1.0 if scale_ptr is None else tl.load(scale_ptr + head)
    cmp_scale = 1.0 if cmp_scale_ptr is None else tl.load(cmp_scale_ptr + head)
    column = tl.arange(0, D_PAD)
    first = row * STRIDE
    acc = tl.zeros([D_PAD], tl.float32)
    # In the order of compress_fwd, and a stretch that is held loaded at once: one after the other the tokens would each wait for memory.
    RUN: tl.constexpr = STRIDE if STRIDE < STRETCH else STRETCH  # rows in one page: it holds a multiple of STRIDE
    for begin in range(0, BLOCK, STRETCH):
        for i in tl.static_range(STRETCH):
            position = first + begin + i
            if i % RUN == 0:
                held = pages_ptr + row_of(tokens_ptr, position, head, heads, PAGE, D) + column
            inside = (column < D) & (position < old)
            x = load_held(held + i % RUN * D, inside, scale, x_ptr.dtype.element_ty)
            if i >= STRETCH - TOKENS:  # a block that is completed ends in at most TOKENS new ones
                inside = (column < D) & (position >= old)
                new = load_new(x_ptr, (position - old) * stride_t + column, inside, scale, pages_ptr.dtype.element_ty)
                x = tl.where(position < old, x, new)
            x = x.to(tl.float32)
            acc += x
    acc *= 1.0 / BLOCK
    x = acc.to(x_ptr.dtype.element_ty)
    store_row(pages_ptr, row_of(rows_ptr, row, head, heads, PAGE, D), column, x, cmp_scale, D)


@triton.jit
def cache_append_kernel(
    k_ptr,  # [S * TOKENS, Hkv, D_QK]: shared, or the compressed branch's
    v_ptr,  # [S * TOKENS, Hkv, D_V]
    k_slc_ptr,  # the same of the selected and the sliding branch, or None
    v_slc_ptr,
    k_swa_ptr,
    v_swa_ptr,
    k_pages_ptr,  # [pages, Hkv, PAGE, D_QK]
    v_pages_ptr,  # [pages, Hkv, PAGE, D_V]
    table_ptr,  # [STREAMS, slots, max_pages] int32; the last stream is that of compressed tokens
    k_scale_ptr,  # [STREAMS, Hkv] fp32, what stored numbers are multiplied by; None where they are stored as they are
    v_scale_ptr,
    slot_ptr,  # [S] int32
    length_ptr,  # [slots] int32: tokens, the new ones included
    wk0_ptr,  # weights of phi for K: as many as the pooling has, else None
    wk1_ptr,
    wk2_ptr,
    wk3_ptr,
    wk4_ptr,
    wv0_ptr,
    wv1_ptr,
    wv2_ptr,
    wv3_ptr,
    wv4_ptr,
    heads: tl.int32,
    slots: tl.int32,
    max_pages: tl.int32,
    stride_kt: tl.int64,
    stride_kh: tl.int64,
    stride_vt: tl.int64,
    stride_vh: tl.int64,
    TOKENS: tl.constexpr,
    STREAMS: tl.constexpr,
    PAGE: tl.constexpr,
    D_QK: tl.constexpr,
    DQ: tl.constexpr,
    D_V: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    STRETCH: tl.constexpr,
    HIDDEN_K: tl.constexpr,
    HIDDEN_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """One job of a sequence and head: a stream's new rows, or a compressed token of K, or of V."""
    tl.extra.cuda.gdc_launch_dependents()  # the next kernel's programs may start, and wait for the results
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    job = tl.program_id(2)
    slot = tl.load(slot_ptr + sequence)
    length = tl.load(length_ptr + slot)
    tables = table_ptr + slot.to(tl.int64) * max_pages
    size = slots.to(tl.int64) * max_pages
    k_rows = sequence.to(tl.int64) * TOKENS * stride_kt + head * stride_kh
    v_rows = sequence.to(tl.int64) * TOKENS * stride_vt + head * stride_vh
    k_scale = k_scale_ptr
    v_scale = v_scale_ptr
    if job == 0:
        store_new(k_ptr + k_rows, k_pages_ptr, tables, k_scale, length, head, heads, stride_kt, TOKENS, PAGE, D_QK, DQ)
        store_new(v_ptr + v_rows, v_pages_ptr, tables, v_scale, length, head, heads, stride_vt, TOKENS, PAGE, D_V, DV)
    elif job < STREAMS - 1:
        if k_slc_ptr is not None:
            if k_scale_ptr is not None:
                k_scale = k_scale_ptr + job * heads
                v_scale = v_scale_ptr + job * heads
            k_new = tl.where(job == 1, k_slc_ptr, k_swa_ptr) + k_rows
            v_new = tl.where(job == 1, v_slc_ptr, v_swa_ptr) + v_rows
            store_new(k_new, k_pages_ptr, tables + job * size, k_scale, length, head, heads, stride_kt, TOKENS, PAGE, D_QK, DQ)
            store_new(v_new, v_pages_ptr, tables + job * size, v_scale, length, head, heads, stride_vt, TOKENS, PAGE, D_V, DV)
    else:
        # Compressed tokens that the new ones complete: those of the last `complete` rows that were not complete before.
        old = tl.maximum(length - TOKENS, 0)
        before = tl.maximum(old - BLOCK + STRIDE, 0) // STRIDE
        row = before + (job - (STREAMS - 1)) // 2
        rows = tables + (STREAMS - 1) * size
        if row < tl.maximum(length - BLOCK + STRIDE, 0) // STRIDE:
            cmp_k_scale = k_scale_ptr
            cmp_v_scale = v_scale_ptr
            if k_scale_ptr is not None:
                cmp_k_scale = k_scale_ptr + (STREAMS - 1) * heads
                cmp_v_scale = v_scale_ptr + (STREAMS - 1) * heads
            if (job - (STREAMS - 1)) % 2 == 0:
                compress_row(
                    k_ptr + k_rows, k_pages_ptr, tables, rows, k_scale, cmp_k_scale, wk0_ptr, wk1_ptr, wk2_ptr, wk3_ptr, wk4_ptr, row, old,
                    head, heads, stride_kt, TOKENS, PAGE, D_QK, DQ, BLOCK, STRIDE, STRETCH, HIDDEN_K, BLOCK_K, BLOCK_U,
                )  # fmt: skip
            else:
                compress_row(
                    v_ptr + v_rows, v_pages_ptr, tables, rows, v_scale, cmp_v_scale, wv0_ptr, wv1_ptr, wv2_ptr, wv3_ptr, wv4_ptr, row, old,
                    head, heads, stride_vt, TOKENS, PAGE, D_V, DV, BLOCK, STRIDE, STRETCH, HIDDEN_V, BLOCK_K, BLOCK_U,
                )  # fmt: skip


_TOKENS = 1
_STREAMS = 2
_append = Launcher(
    cache_append_kernel,
    {
        "TOKENS": _TOKENS,
        "STREAMS": _STREAMS,
        "PAGE": 64,
        "D_QK": 128,
        "DQ": 128,
        "D_V": 128,
        "DV": 128,
        "BLOCK": 32,
        "STRIDE": 16,
        "STRETCH": 32,
        "HIDDEN_K": 0,
        "HIDDEN_V": 0,
        "BLOCK_K": 16,
        "BLOCK_U": 16,
    },
    num_warps=1,
)


def cache_append(k, v, k_pages, v_pages, tables, k_scale, v_scale, slots, lengths, phi_k, phi_v):
    """Store the last 1 tokens of some sequences, and the compressed tokens that they complete (paper eq. 7).

    Args:
        k, v: 1 each: [S * 1, Hkv, D], last dim contiguous, strides multiples of 8 elements and the same for all k, all v.
        k_pages, v_pages: [pages, Hkv, 64, D] contiguous, written to.
        tables: [streams, slots, max_pages] int32 contiguous, the last of compressed tokens.
        k_scale, v_scale: [streams, Hkv] fp32, or None.
        slots: [S] int32.
        lengths: [slots] int32: tokens of each, the new ones included.
        phi_k, phi_v: weights of phi, contiguous, in k's dtype.
    """
    heads = k_pages.shape[1]
    jobs = _STREAMS - 1 + 2 * ((_TOKENS + 16 - 1) // 16)
    rest = [x for pair in zip(k[1:], v[1:], strict=True) for x in pair] or [None] * 4
    weights = [*phi_k, *[None] * (5 - len(phi_k)), *phi_v, *[None] * (5 - len(phi_v))]
    _append(
        (slots.shape[0], heads, jobs),
        k[0], v[0], *rest, k_pages, v_pages, tables, k_scale, v_scale, slots, lengths, *weights, heads, *tables.shape[1:],
        *k[0].stride()[:2], *v[0].stride()[:2],
    )  # fmt: skip
