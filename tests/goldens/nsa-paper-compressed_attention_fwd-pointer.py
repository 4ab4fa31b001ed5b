"""compressed_attention_fwd, rendered by nsa-gen from templates/compressed_attention_fwd.py.jinja. Do not edit: change the template.

problem d1d7e0d8cd4a: dtype=bfloat16 group=16 head_dim_qk=192 head_dim_v=128 block=32 stride=16 varlen=True
config  88a283d8261d: BLOCK_M=128 BLOCK_N=32 loads=pointer maxnreg=None num_stages=2 num_warps=8
command: python -m nsa_gen generate SPEC --target TARGET -o DIR
"""

import triton
import triton.language as tl

from nsa_gen.launch import Launcher


@triton.jit
def sequence_start(cu_seqlens, b, seqlen):
    """First packed token of sequence b; sequence b ends where b + 1 starts."""
    return tl.load(cu_seqlens + b)


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
    low = 0
    high = batch - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(cu_seqlens + middle) <= token:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def locate_rows(tile, cu_seqlens, batch, seqlen, first, last, G: tl.constexpr, ROWS: tl.constexpr):
    """Where a tile of a call on the tokens [first, last) lies: (first token of its sequence, the tile's first row in the sequence, rows
    [low, high) of the sequence that belong to the call, all rows of the sequence). The caller exits when low >= high or the tile begins at
    high or later. Tiles are numbered as if the call began up to a tile earlier: the chunk may begin inside a tile.
    """
    early = tl.maximum(first - (ROWS + G - 2) // G, 0)
    b, local = locate(tile, cu_seqlens, batch, seqlen, early, last, G, ROWS)
    start = sequence_start(cu_seqlens, b, seqlen)
    end = sequence_start(cu_seqlens, b + 1, seqlen)
    low = (tl.maximum(start, first) - start) * G
    high = (tl.minimum(end, last) - start) * G
    return start, (low // ROWS + local) * ROWS, low, high, (end - start) * G


@triton.jit
def visible_keys(position, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """Number of compressed tokens a query sees: those with j * STRIDE + BLOCK - 1 <= position (paper eq. 8)."""
    return tl.maximum(position + 1 - BLOCK + STRIDE, 0) // STRIDE


@triton.jit
def attend(
    q,  # [BLOCK_M, DQ]
    q_tail,  # [BLOCK_M, DQ_TAIL], or None
    acc,  # [BLOCK_M, DV] fp32
    acc_tail,  # [BLOCK_M, DV_TAIL] fp32; returned as it came without a tail
    top,  # [BLOCK_M] fp32: largest score so far, log2 domain
    total,  # [BLOCK_M] fp32
    visible,  # [BLOCK_M] int32: compressed keys a row sees
    k_ptr,
    v_ptr,
    start_row,
    head,
    low,
    high,
    qk_scale,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    D_QK: tl.constexpr,
    DQ: tl.constexpr,
    DQ_TAIL: tl.constexpr,
    D_V: tl.constexpr,
    DV: tl.constexpr,
    DV_TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add the compressed keys [low, high) to a tile's softmax. Without MASKED every row sees them all and whole key tiles are read."""
    # A 64-bit base that moves, and offsets inside a tile that stay.
    k_step = tl.multiple_of(stride_kt.to(tl.int32), 8)
    v_step = tl.multiple_of(stride_vt.to(tl.int32), 8)
    k_tile = tl.arange(0, BLOCK_N)[:, None] * k_step
    v_tile = tl.arange(0, BLOCK_N)[:, None] * v_step
    for key0 in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        key = key0 + tl.arange(0, BLOCK_N)
        # Rows from `high` on may belong to the next sequence or to no token at all: never let them reach a product.
        inside = (key < high)[:, None] | (not MASKED)
        row = (start_row + key0).to(tl.int64)
        k_rows = k_ptr + row * stride_kt + head * stride_kh + k_tile
        v_rows = v_ptr + row * stride_vt + head * stride_vh + v_tile
        k = tl.load(k_rows + tl.arange(0, DQ), mask=inside, other=0.0)  # [BLOCK_N, DQ]
        v = tl.load(v_rows + tl.arange(0, DV), mask=inside, other=0.0)  # [BLOCK_N, DV]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        dq_tail = DQ + tl.arange(0, DQ_TAIL)
        k_tail = tl.load(k_rows + dq_tail, mask=inside & (dq_tail < D_QK), other=0.0)
        scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision="ieee")
        scores = tl.where((key < visible[:, None]) | (not MASKED), scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * qk_scale)
        safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
        prob = tl.exp2(scores * qk_scale - safe_top[:, None])
        rescale = tl.exp2(top - safe_top)
        total = total * rescale + tl.sum(prob, 1)
        acc = tl.dot(prob.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        top = new_top
    return acc, acc_tail, top, total


@triton.jit
def compressed_attention_fwd_kernel(
    q_ptr,  # [last - first, Hq, D_QK]
    k_ptr,  # [rows, Hkv, D_QK], or its descriptor: sequence b starts at row cu_seqlens[b] // STRIDE
    v_ptr,  # [rows, Hkv, D_V], or its descriptor
    o_ptr,  # [last - first, Hq, D_V], contiguous
    lse_ptr,  # [last - first, Hq] fp32, contiguous
    cu_seqlens,  # [B + 1] int32, or None
    scale: tl.float32,
    tiles: tl.int32,
    heads: tl.int32,
    batch: tl.int32,
    seqlen: tl.int32,
    first: tl.int32,
    last: tl.int32,
    stride_qt: tl.int64,
    stride_qh: tl.int64,
    stride_kt: tl.int64,
    stride_kh: tl.int64,
    stride_vt: tl.int64,
    stride_vh: tl.int64,
    G: tl.constexpr,
    D_QK: tl.constexpr,
    DQ: tl.constexpr,
    DQ_TAIL: tl.constexpr,
    D_V: tl.constexpr,
    DV: tl.constexpr,
    DV_TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    head = tl.program_id(0) % heads
    # Late tiles see the most keys: they go first, so that the light ones fill the end of the run.
    tile = tiles - 1 - tl.program_id(0) // heads
    start, row0, low, high, rows = locate_rows(tile, cu_seqlens, batch, seqlen, first, last, G, BLOCK_M)
    if (low >= high) | (row0 >= high):
        return
    row = row0 + tl.arange(0, BLOCK_M)  # token * G + group member
    valid = (row >= low) & (row < high)
    position = tl.minimum(row, rows - 1) // G
    member = row % G
    visible = visible_keys(position, BLOCK, STRIDE)
    # Keys that all rows see, in whole key tiles, and keys that the last row sees.
    common = visible_keys(row0 // G, BLOCK, STRIDE) // BLOCK_N * BLOCK_N
    most = visible_keys((tl.minimum(row0 + BLOCK_M, rows) - 1) // G, BLOCK, STRIDE)

    token = start + position - first  # row of q, o and lse
    q_rows = q_ptr + (token.to(tl.int64) * stride_qt + (head * G + member) * stride_qh)[:, None]
    q = tl.load(q_rows + tl.arange(0, DQ), mask=valid[:, None], other=0.0)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    dq_tail = DQ + tl.arange(0, DQ_TAIL)
    q_tail = tl.load(q_rows + dq_tail, mask=valid[:, None] & (dq_tail < D_QK), other=0.0)
    acc_tail = total  # there is no tail (a jit function cannot return None in Triton 3.6)
    qk_scale = scale * 1.4426950408889634
    start_row = start // STRIDE
    acc, acc_tail, top, total = attend(
        q, q_tail, acc, acc_tail, top, total, visible, k_ptr, v_ptr, start_row, head, 0, common, qk_scale,
        stride_kt, stride_kh, stride_vt, stride_vh, D_QK, DQ, DQ_TAIL, D_V, DV, DV_TAIL, BLOCK_N, False, NUM_STAGES,
    )  # fmt: skip
    acc, acc_tail, top, total = attend(
        q, q_tail, acc, acc_tail, top, total, visible, k_ptr, v_ptr, start_row, head, common, most, qk_scale,
        stride_kt, stride_kh, stride_vt, stride_vh, D_QK, DQ, DQ_TAIL, D_V, DV, DV_TAIL, BLOCK_N, True, 1,
    )  # fmt: skip

    out = (token.to(tl.int64) * heads + head) * G + member
    inverse = tl.where(total > 0, 1.0 / total, 0.0)  # a query that sees nothing: output 0, lse -inf
    o_rows = o_ptr + out[:, None] * D_V
    tl.store(o_rows + tl.arange(0, DV), (acc * inverse[:, None]).to(o_ptr.dtype.element_ty), mask=valid[:, None])
    tl.store(lse_ptr + out, tl.where(total > 0, (top + tl.log2(total)) * 0.6931471805599453, -float("inf")), mask=valid)


_GROUP = 16
_BLOCK_M = 128
_BLOCK_N = 32
_HALO = (_BLOCK_M + _GROUP - 2) // _GROUP  # tokens of a chunk's first tile that may lie before the chunk
_attend = Launcher(
    compressed_attention_fwd_kernel,
    {
        "G": _GROUP,
        "D_QK": 192,
        "DQ": 128,
        "DQ_TAIL": 64,
        "D_V": 128,
        "DV": 128,
        "DV_TAIL": 0,
        "BLOCK": 32,
        "STRIDE": 16,
        "BLOCK_M": _BLOCK_M,
        "BLOCK_N": _BLOCK_N,
        "NUM_STAGES": 2,
    },
    num_warps=8,
    num_stages=2,
    maxnreg=None,
)


def compressed_attention_fwd(q, k_cmp, v_cmp, o, lse, scale, token_start, cu_seqlens, batch, max_seqlen):
    """Attention of the queries [token_start, token_start + R) over the compressed tokens they see (paper eq. 8).

    q [R,Hq,Dqk], k_cmp [max(T//d,1),Hkv,Dqk], v_cmp [max(T//d,1),Hkv,Dv] → o [R,Hq,Dv], lse [R,Hq] fp32, natural log (both contiguous).
    A query that sees none gets o = 0, lse = -inf. Compressed rows that belong to no sequence are never used.
    """
    queries, heads = q.shape[0], k_cmp.shape[1]
    tiles = (queries + min(token_start, _HALO)) * _GROUP // _BLOCK_M + batch
    k, v = k_cmp, v_cmp
    _attend(
        (tiles * heads,),
        q, k, v, o, lse, cu_seqlens, scale, tiles, heads, batch, max_seqlen, token_start, token_start + queries,
        *q.stride()[:2], *k_cmp.stride()[:2], *v_cmp.stride()[:2],
    )  # fmt: skip
