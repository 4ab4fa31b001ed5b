"""combine_fwd, rendered by nsa-gen from templates/combine_fwd.py.jinja. Do not edit: change the template.

problem f31e5a2257b0: dtype=bfloat16 head_dim_v=128
config  23b3f5625452: BLOCK_ROWS=32 num_warps=4
command: python -m nsa_gen generate SPEC --target TARGET -o DIR
"""

import torch
import triton
import triton.language as tl

from nsa_gen.launch import Launcher


@triton.jit
def gate(pointer, query, head, stride_token, stride_head, mask):
    """One branch's gate of some rows, in fp32."""
    return tl.load(pointer + query.to(tl.int64) * stride_token + head * stride_head, mask=mask, other=0.0).to(tl.float32)


def gate_arguments(gates):
    """Strides of the gates, and a constant above 0 that tells binaries apart by the gates' dtypes."""
    fp32 = sum((gate.dtype == torch.float32) << i for i, gate in enumerate(gates))
    return [stride for gate in gates for stride in gate.stride()], 8 + fp32


@triton.jit
def combine_fwd_kernel(
    cmp_ptr,  # [T, Hq, D_V]
    slc_ptr,  # [T, Hq, D_V]
    swa_ptr,  # [T, Hq, D_V]
    g_cmp_ptr,  # [T, Hq]
    g_slc_ptr,  # [T, Hq]
    g_swa_ptr,  # [T, Hq]
    o_ptr,  # [T, Hq, D_V], contiguous
    rows: tl.int64,  # T * Hq
    heads: tl.int32,
    stride_cmp_t: tl.int64,
    stride_cmp_h: tl.int64,
    stride_slc_t: tl.int64,
    stride_slc_h: tl.int64,
    stride_swa_t: tl.int64,
    stride_swa_h: tl.int64,
    g_cmp_stride_t: tl.int64,  # "stride_*" are multiples of 8, these need not be
    g_cmp_stride_h: tl.int64,
    g_slc_stride_t: tl.int64,
    g_slc_stride_h: tl.int64,
    g_swa_stride_t: tl.int64,
    g_swa_stride_h: tl.int64,
    D_V: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GATES: tl.constexpr,
):
    row_first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    # one 64-bit division a program; inside it 32 bits suffice
    token_first = row_first // heads
    row = tl.arange(0, BLOCK_ROWS)
    flat = (row_first - token_first * heads).to(tl.int32) + row
    inside = row < rows - row_first
    t = token_first + flat // heads
    h = flat % heads

    g_cmp = gate(g_cmp_ptr, t, h, g_cmp_stride_t, g_cmp_stride_h, inside)
    g_slc = gate(g_slc_ptr, t, h, g_slc_stride_t, g_slc_stride_h, inside)
    g_swa = gate(g_swa_ptr, t, h, g_swa_stride_t, g_swa_stride_h, inside)
    cmp_rows = cmp_ptr + (t * tl.multiple_of(stride_cmp_t, 8) + h * tl.multiple_of(stride_cmp_h, 8))[:, None]
    slc_rows = slc_ptr + (t * tl.multiple_of(stride_slc_t, 8) + h * tl.multiple_of(stride_slc_h, 8))[:, None]
    swa_rows = swa_ptr + (t * tl.multiple_of(stride_swa_t, 8) + h * tl.multiple_of(stride_swa_h, 8))[:, None]
    o_rows = o_ptr + ((row_first + row) * D_V)[:, None]
    column = 0 + tl.arange(0, 128)[None, :]
    mask = inside[:, None] & (column < D_V)
    o_cmp = tl.load(cmp_rows + column, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    o_slc = tl.load(slc_rows + column, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    o_swa = tl.load(swa_rows + column, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    o = g_cmp[:, None] * o_cmp + g_slc[:, None] * o_slc + g_swa[:, None] * o_swa
    tl.store(o_rows + column, o.to(o_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


BLOCK_ROWS = 32

_combine = Launcher(
    combine_fwd_kernel,
    {"D_V": 128, "BLOCK_ROWS": BLOCK_ROWS},
    num_warps=4,
)


def combine_fwd(o_cmp, o_slc, o_swa, g_cmp, g_slc, g_swa, o):
    """o = g_cmp * o_cmp + g_slc * o_slc + g_swa * o_swa, in fp32 (paper eq. 5).

    Args:
        o_cmp, o_slc, o_swa: [T, Hq, D_V], last dim contiguous, strides multiples of 8 elements.
        g_cmp, g_slc, g_swa: [T, Hq], each in the outputs' dtype or fp32, any strides. NaN passes through.
        o: [T, Hq, D_V] contiguous, written.
    """
    rows, heads = o.shape[0] * o.shape[1], o.shape[1]
    strides = (stride for x in (o_cmp, o_slc, o_swa) for stride in x.stride()[:2])
    gate_strides, code = gate_arguments((g_cmp, g_slc, g_swa))
    grid = (-(-rows // BLOCK_ROWS),)
    _combine(grid, o_cmp, o_slc, o_swa, g_cmp, g_slc, g_swa, o, rows, heads, *strides, *gate_strides, GATES=code)
