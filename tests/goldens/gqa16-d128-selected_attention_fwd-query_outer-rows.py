"""selected_attention_fwd, rendered by nsa-gen from templates/selected_attention_fwd.py.jinja. Do not edit: change the template.

problem 5ab03fb1aa74: dtype=bfloat16 group=16 head_dim_qk=128 head_dim_v=128 selection_block=64 count=16 initial=1 local=2 varlen=False
config  5d7d4e7103d6: loop=query_outer num_stages=1 num_warps=4 operands=rows
command: python -m nsa_gen generate SPEC --target TARGET -o DIR
"""

import torch
import triton
import triton.language as tl

from nsa_gen.launch import Launcher


@triton.jit
def sequence_start(cu_seqlens, b, seqlen):
    """First packed token of sequence b; sequence b ends where b + 1 starts."""
    return b * seqlen


@triton.jit
def locate(tile, cu_seqlens, batch, seqlen, first, last, G: tl.constexpr, ROWS: tl.constexpr):
    """Sequence of a tile and the tile's number inside it, for tiles of ROWS flat rows (token * G + group member).

    Sequence b owns tile numbers from start[b]*G // ROWS + b on, where start is clamped to the chunk [first, last) of packed
    tokens and counted from its begin. Returns (b, local tile). The caller exits when the local tile is past its sequence's rows.
    """
    low = 0
    high = batch - 1
    while low < high:
        middle = (low + high + 1) // 2
        start = tl.minimum(tl.maximum(sequence_start(cu_seqlens, middle, seqlen), first), last) - first
        if (start * G) // ROWS + middle <= tile:
            low = middle
        else:
            high = middle - 1
    start = tl.minimum(tl.maximum(sequence_start(cu_seqlens, low, seqlen), first), last) - first
    return low, tile - ((start * G) // ROWS + low)


@triton.jit
def find_sequence(token, cu_seqlens, batch, seqlen):
    """The sequence that holds a packed token (empty sequences hold none)."""
    return token // seqlen


@triton.jit
def gate(pointer, query, head, stride_token, stride_head, mask):
    """One branch's gate of some rows, in fp32."""
    return tl.load(pointer + query.to(tl.int64) * stride_token + head * stride_head, mask=mask, other=0.0).to(tl.float32)


def gate_arguments(gates):
    """Strides of the gates, and a constant above 0 that tells binaries apart by the gates' dtypes."""
    fp32 = sum((gate.dtype == torch.float32) << i for i, gate in enumerate(gates))
    return [stride for gate in gates for stride in gate.stride()], 8 + fp32


@triton.jit
def write(o_ptr, o_cmp_ptr, o_swa_ptr, offset, value, g_cmp, g_slc, g_swa, mask, GATED: tl.constexpr):
    """Store the branch's output, or (GATED) its gated sum with the other two branches (paper eq. 5) in its place."""
    if GATED:
        o_cmp = tl.load(o_cmp_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        o_swa = tl.load(o_swa_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        value = g_cmp * o_cmp + g_slc * value + g_swa * o_swa
    tl.store(o_ptr + offset, value.to(o_ptr.dtype.element_ty), mask=mask)


@triton.jit
def selected_attention_fwd_kernel(
    q_ptr,  # [R, Hq, D_QK]
    k_ptr,  # [T, Hkv, D_QK]
    v_ptr,  # [T, Hkv, D_V]
    index_ptr,  # [R, Hkv, COUNT] int32, ascending, -1 last
    o_ptr,  # [R, Hq, D_V], contiguous
    lse_ptr,  # [R, Hq] fp32, contiguous
    o_cmp_ptr,  # [R, Hq, D_V], contiguous; None unless GATED, as what follows
    o_swa_ptr,  # [R, Hq, D_V], contiguous
    g_cmp_ptr,  # [R, Hq], activations' dtype or fp32, any strides
    g_slc_ptr,
    g_swa_ptr,
    cu_seqlens,  # [B + 1] int32, or None
    scale: tl.float32,
    first: tl.int32,
    queries: tl.int32,
    heads: tl.int32,
    batch: tl.int32,
    seqlen: tl.int32,
    stride_qt: tl.int64,
    stride_qh: tl.int64,
    stride_kt: tl.int64,
    stride_kh: tl.int64,
    stride_vt: tl.int64,
    stride_vh: tl.int64,
    g_cmp_stride_t: tl.int64,
    g_cmp_stride_h: tl.int64,
    g_slc_stride_t: tl.int64,
    g_slc_stride_h: tl.int64,
    g_swa_stride_t: tl.int64,
    g_swa_stride_h: tl.int64,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D_QK: tl.constexpr,
    DQ: tl.constexpr,
    DQ_TAIL: tl.constexpr,
    D_V: tl.constexpr,
    DV: tl.constexpr,
    DV_TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    SLOTS: tl.constexpr,
    GATED: tl.constexpr,
):
    head = tl.program_id(1)
    query = queries - 1 - tl.program_id(0)  # late queries have the most blocks: they go first
    token = first + query
    b = find_sequence(token, cu_seqlens, batch, seqlen)
    start = sequence_start(cu_seqlens, b, seqlen)
    position = token - start
    length = sequence_start(cu_seqlens, b + 1, seqlen) - start

    member = tl.arange(0, G_PAD)
    column = tl.arange(0, BLOCK)
    dq = tl.arange(0, DQ)
    dv = tl.arange(0, DV)
    q_rows = q_ptr + query.to(tl.int64) * stride_qt + (head * G + member[:, None]) * stride_qh
    k_head = k_ptr + start.to(tl.int64) * stride_kt + head * stride_kh
    v_head = v_ptr + start.to(tl.int64) * stride_vt + head * stride_vh
    q = tl.load(q_rows + dq, mask=member[:, None] < G, other=0.0)  # [G_PAD, DQ]
    qk_scale = scale * 1.4426950408889634  # exp2 domain
    top = tl.full([G_PAD], -float("inf"), tl.float32)
    total = tl.zeros([G_PAD], tl.float32)
    acc = tl.zeros([G_PAD, DV], tl.float32)
    # All indices at once: a load of one inside the loop would keep K and V loads from being pipelined.
    slots = tl.arange(0, SLOTS)
    indices = tl.load(index_ptr + (query.to(tl.int64) * heads + head) * COUNT + slots, mask=slots < COUNT, other=-1)
    for slot in range(COUNT):
        block = tl.sum(tl.where(slots == slot, indices, 0), 0)
        seen = (block >= 0) & (block * BLOCK <= position)
        key = tl.where(seen, block, 0) * BLOCK + column
        inside = (key < length)[:, None]
        k_rows = k_head + key[:, None] * stride_kt
        v_rows = v_head + key[:, None] * stride_vt
        k = tl.load(k_rows + dq, mask=inside, other=0.0)  # [BLOCK, DQ]
        v = tl.load(v_rows + dv, mask=inside, other=0.0)  # [BLOCK, DV]
        visible = (key <= position) & seen
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [G_PAD, BLOCK]
        scores = tl.where(visible[None, :], scores * qk_scale, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
        prob = tl.exp2(scores - safe_top[:, None])
        rescale = tl.exp2(top - safe_top)
        total = total * rescale + tl.sum(prob, 1)
        acc = tl.dot(prob.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        top = new_top

    row = query.to(tl.int64) * (heads * G) + head * G + member
    written = member < G
    inverse = tl.where(total > 0, 1.0 / total, 0.0)
    g_cmp = 0.0
    g_slc = 1.0
    g_swa = 0.0
    if GATED:
        g_cmp = gate(g_cmp_ptr, query, head * G + member, g_cmp_stride_t, g_cmp_stride_h, written)
        g_slc = gate(g_slc_ptr, query, head * G + member, g_slc_stride_t, g_slc_stride_h, written)
        g_swa = gate(g_swa_ptr, query, head * G + member, g_swa_stride_t, g_swa_stride_h, written)
    value = acc * inverse[:, None]
    if GATED:
        g_cmp = g_cmp[:, None]
        g_slc = g_slc[:, None]
        g_swa = g_swa[:, None]
    write(o_ptr, o_cmp_ptr, o_swa_ptr, row[:, None] * D_V + dv, value, g_cmp, g_slc, g_swa, written[:, None], GATED)
    tl.store(lse_ptr + row, tl.where(total > 0, (top + tl.log2(total)) * 0.6931471805599453, -float("inf")), mask=written)


_attend = Launcher(
    selected_attention_fwd_kernel,
    {
        "G": 16,
        "G_PAD": 16,
        "D_QK": 128,
        "DQ": 128,
        "DQ_TAIL": 0,
        "D_V": 128,
        "DV": 128,
        "DV_TAIL": 0,
        "BLOCK": 64,
        "COUNT": 16,
        "SLOTS": 16,
    },
    num_warps=4,
    num_stages=1,
)


def workspace(heads, element_size, tokens, batch, rest=False):
    """Scratch of a call: bytes whatever the number of queries, bytes a query of a chunk, most queries of a chunk.

    Nothing without ``rest``; with it, what ``rest.branches()`` allocates: one branch's output.
    """
    return 0, heads * 2048 * element_size if rest else 0, 2**31 - 1


def selected_attention_fwd(
    q, k, v, block_indices, o, lse, scale, workspace_bytes, token_start, cu_seqlens, batch, max_seqlen, rest=None
):
    """Attention of the queries [token_start, token_start + R) over their chosen blocks. Needs no workspace.

    q [R,Hq,Dqk], k [T,Hkv,Dqk], v [T,Hkv,Dv], block_indices int32 [R,Hkv,n] contiguous → o [R,Hq,Dv], lse [R,Hq] (contiguous).
    With ``rest``, o is instead the gated sum of this branch and the others: ``rest.branches()`` gives o_cmp, o_swa [R,Hq,Dv] contiguous
    (o may be o_cmp) and g_cmp, g_slc, g_swa [R,Hq].
    """
    others, gate_strides, code = (None,) * 5, (0,) * 6, 0
    if rest is not None:
        others = rest.branches()
        gate_strides, code = gate_arguments(others[2:])
    queries, heads = q.shape[0], k.shape[1]
    _attend(
        (queries, heads),
        q, k, v, block_indices, o, lse, *others, cu_seqlens, scale, token_start, queries, heads, batch, max_seqlen,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *gate_strides, GATED=code,
    )  # fmt: skip
