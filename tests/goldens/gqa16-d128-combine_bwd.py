"""combine_bwd, rendered by nsa-gen from templates/combine_bwd.py.jinja. Do not edit: change the template.

problem f7798f357c34: dtype=bfloat16 head_dim_v=128
config  1184ccc0086b: BLOCK_ROWS=32 num_warps=4
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
def branch_bwd(
    do,  # [BLOCK_ROWS, DV] fp32
    do_tail,  # [BLOCK_ROWS, DV_TAIL] fp32, or None
    g,  # [BLOCK_ROWS] fp32
    o_rows,
    do_rows,  # None where the branch's gradient is not wanted
    delta_rows,
    gate_rows,
    dg_rows,  # None where the gate is fp32
    mask,
    D_V: tl.constexpr,
    DV: tl.constexpr,
    DV_TAIL: tl.constexpr,
):
    """One branch's numbers, and its gradient."""
    column = tl.arange(0, DV)[None, :]
    inside = mask[:, None]
    delta = tl.sum(tl.load(o_rows + column, mask=inside, other=0.0).to(tl.float32) * do, 1)
    if do_rows is not None:
        tl.store(do_rows + column, (g[:, None] * do).to(do_rows.dtype.element_ty), mask=inside)
    tl.store(delta_rows, delta, mask=mask)
    tl.store(gate_rows, g, mask=mask)
    if dg_rows is not None:
        tl.store(dg_rows, delta.to(dg_rows.dtype.element_ty), mask=mask)


@triton.jit
def combine_bwd_kernel(
    do_ptr,  # [T, Hq, D_V]
    cmp_ptr,  # [T, Hq, D_V], contiguous
    slc_ptr,  # or None
    swa_ptr,
    g_cmp_ptr,  # [T, Hq]
    g_slc_ptr,
    g_swa_ptr,
    delta_cmp_ptr,  # [T, Hq] fp32, contiguous
    delta_slc_ptr,
    delta_swa_ptr,
    gate_cmp_ptr,  # [T, Hq] fp32, contiguous
    gate_slc_ptr,
    gate_swa_ptr,
    dg_cmp_ptr,  # [T, Hq], contiguous, or None
    dg_slc_ptr,
    dg_swa_ptr,
    do_cmp_ptr,  # [T, Hq, D_V], contiguous, or None
    do_slc_ptr,
    do_swa_ptr,
    rows: tl.int64,  # T * Hq
    heads: tl.int32,
    stride_dot: tl.int64,
    stride_doh: tl.int64,
    g_cmp_stride_t: tl.int64,  # "stride_*" are multiples of 8, these need not be
    g_cmp_stride_h: tl.int64,
    g_slc_stride_t: tl.int64,
    g_slc_stride_h: tl.int64,
    g_swa_stride_t: tl.int64,
    g_swa_stride_h: tl.int64,
    D_V: tl.constexpr,
    DV: tl.constexpr,
    DV_TAIL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GATES: tl.constexpr,
    TYPES: tl.constexpr,
):
    row_first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    # one 64-bit division a program; inside it 32 bits suffice
    token_first = row_first // heads
    row = tl.arange(0, BLOCK_ROWS)
    flat = (row_first - token_first * heads).to(tl.int32) + row
    inside = row < rows - row_first
    t = token_first + flat // heads
    h = flat % heads
    do_rows = do_ptr + (t * stride_dot + h * stride_doh)[:, None]
    place = row_first + row
    rows_of = (place * D_V)[:, None]
    do = tl.load(do_rows + tl.arange(0, DV)[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    do_tail = None
    if cmp_ptr is not None:
        g = gate(g_cmp_ptr, t, h, g_cmp_stride_t, g_cmp_stride_h, inside)
        branch_bwd(
            do, do_tail, g, cmp_ptr + rows_of, None if do_cmp_ptr is None else do_cmp_ptr + rows_of, delta_cmp_ptr + place,
            gate_cmp_ptr + place, None if dg_cmp_ptr is None else dg_cmp_ptr + place, inside, D_V, DV, DV_TAIL,
        )  # fmt: skip
    if slc_ptr is not None:
        g = gate(g_slc_ptr, t, h, g_slc_stride_t, g_slc_stride_h, inside)
        branch_bwd(
            do, do_tail, g, slc_ptr + rows_of, None if do_slc_ptr is None else do_slc_ptr + rows_of, delta_slc_ptr + place,
            gate_slc_ptr + place, None if dg_slc_ptr is None else dg_slc_ptr + place, inside, D_V, DV, DV_TAIL,
        )  # fmt: skip
    if swa_ptr is not None:
        g = gate(g_swa_ptr, t, h, g_swa_stride_t, g_swa_stride_h, inside)
        branch_bwd(
            do, do_tail, g, swa_ptr + rows_of, None if do_swa_ptr is None else do_swa_ptr + rows_of, delta_swa_ptr + place,
            gate_swa_ptr + place, None if dg_swa_ptr is None else dg_swa_ptr + place, inside, D_V, DV, DV_TAIL,
        )  # fmt: skip


def types(*tensors):
    """A constant that tells binaries apart by which tensors are fp32, and which are None."""
    return sum((0 if x is None else 1 if x.dtype == torch.float32 else 2) * 3**i for i, x in enumerate(tensors))


_BLOCK_ROWS = 32
_combine = Launcher(
    combine_bwd_kernel,
    {"D_V": 128, "DV": 128, "DV_TAIL": 0, "BLOCK_ROWS": _BLOCK_ROWS},
    num_warps=4,
)


def combine_bwd(do, o_cmp, o_slc, o_swa, g_cmp, g_slc, g_swa, deltas, gates, dgates, dos):
    """delta = do @ o of each branch, which is also the gradient of its gate, and gate * do (paper eq. 5), in fp32.

    Args:
        do: [T, Hq, D_V], last dim contiguous, strides multiples of 8 elements.
        o_cmp, o_slc, o_swa: [T, Hq, D_V] contiguous; None for a branch to leave out.
        g_cmp, g_slc, g_swa: [T, Hq], each in the outputs' dtype or fp32, any strides.
        deltas, gates: of each branch, [T, Hq] fp32 contiguous, written: do @ o, and the gate.
        dgates: of each branch, [T, Hq] contiguous, written: delta rounded to its dtype; None where not wanted.
        dos: of each branch, [T, Hq, D_V] contiguous, written: its gradient gate * do; None where not wanted.
    """
    rows, heads = do.shape[0] * do.shape[1], do.shape[1]
    gate_strides, code = gate_arguments((g_cmp, g_slc, g_swa))
    _combine(
        (-(-rows // _BLOCK_ROWS),),
        do, o_cmp, o_slc, o_swa, g_cmp, g_slc, g_swa, *deltas, *gates, *dgates, *dos, rows, heads, *do.stride()[:2], *gate_strides,
        GATES=code, TYPES=types(o_slc, o_swa, *dgates, *dos),
    )  # fmt: skip
