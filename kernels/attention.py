"""The function `attention` of attention.py in Triton, for NVIDIA GPUs, without padding or copies.

For one head and one pair of sequences, with queries q (m, d), keys k and values v (n, d), scores s and
weights w, where * multiplies element by element:

    s = q k^T / sqrt(d)      w = softmax(s) = exp(s - lse)      o = (w * r) v
    r: the dropout factor of each weight, 0 or 1 / (1 - dropout); 1 without dropout

The kernels never store s or w (FlashAttention, arXiv 2205.14135 and 2307.08691). They stream over blocks of
keys, and each query keeps the largest score so far (row_max), the sum of weights (row_sum) and the weighted
sum of values (acc). For the backward pass only the inputs, o and lse, the log-sum-exp of each row of s, are
saved; w is recomputed block by block. (In the code, s and lse are in units of log 2, because GPUs have exp2
but not exp.) With do, the gradient of the loss with respect to o:

    dv = (w * r)^T do        dw = r * (do v^T)
    ds = w * (dw - delta)    delta_i = do_i o_i, which equals sum_j w_ij dw_ij
    dq = ds k / sqrt(d)      dk = ds^T q / sqrt(d)

Two backward kernels: one program per query block accumulates dq; one per key block accumulates dk and dv.
No two programs add to one sum, so there are no atomics, and runs are bit-identical.

197 tokens are three blocks of 64 and a remainder of 5. Full blocks need no mask; the remainder is processed
in blocks of TAIL_BLOCK = 16, so 208 columns are computed instead of 256.

The grid is (sequences, blocks of the longest sequence, heads). Each program loops over blocks of BLOCK_N keys
for its BLOCK_M queries, but in bwd_dkdv over BLOCK_N queries for its BLOCK_M keys. Arguments declared
tl.constexpr are compile-time constants, also in the functions that a kernel calls.
"""
import torch

from kernels import tl, triton, triton_supports

LOG2_E = tl.constexpr(1.4426950408889634)       # s and lse include this factor
TAIL_BLOCK = tl.constexpr(16)                   # the smallest block that tl.dot accepts


# ---- shared by the kernels -----------------------------------------------------------------------
@triton.jit
def token_range(offsets):
    """Index of the first token of this program's sequence, and of the first one after it."""
    return tl.load(offsets + tl.program_id(0)), tl.load(offsets + tl.program_id(0) + 1)


@triton.jit
def load(tensor, start, end, ROWS, d, BLOCK_D, MASKED):
    """Load tokens start to start + ROWS of one head of a tensor (N, H, d): (ROWS, BLOCK_D), zeros beyond
    channel d and, if MASKED, from token `end` on. lse and delta are (N, H), so their d is 1."""
    stride = tl.num_programs(2) * d             # between tokens: H d
    first = tensor + start * stride.to(tl.int64) + tl.program_id(2) * d     # start * stride may exceed int32
    rows, channels = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = channels < d
    if MASKED:
        mask = mask & (start + rows < end)
    return tl.load(first + rows * stride + channels, mask=mask, other=0.0)


@triton.jit
def store(tensor, start, end, x, d):
    """Store x (ROWS, BLOCK_D) as tokens start to start + ROWS of one head, omitting those from `end` on."""
    stride = tl.num_programs(2) * d
    first = tensor + start * stride.to(tl.int64) + tl.program_id(2) * d
    rows, channels = tl.arange(0, x.shape[0])[:, None], tl.arange(0, x.shape[1])[None, :]
    mask = (channels < d) & (start + rows < end)
    tl.store(first + rows * stride + channels, x.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b):
    """Matrix product accumulated in float32; "tf32x3": three passes give nearly float32 precision."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def apply_dropout(x, seed, key, query, dropout):
    """r * x for these keys and queries (indices of packed tokens). r is recomputed, not stored: Philox
    (Salmon et al. 2011) hashes (seed; key, query, head), so forward and backward drop the same weights."""
    if dropout > 0:
        zero = (key + query) * 0                # broadcasts all hashed values to one shape
        random, _, _, _ = tl.philox(seed, key + zero, query + zero, tl.program_id(2) + zero, zero)
        x = tl.where(random >= int(dropout * 2 ** 32), x * (1 / (1 - dropout)), 0.0)
    return x


# ---- forward -------------------------------------------------------------------------------------
@triton.jit
def fwd_block(q, i, row_max, row_sum, acc, key, value, start, end, seed,
              d, dropout, BLOCK_D, BLOCK_N, MASKED):
    """Add keys start to start + BLOCK_N to the sums of queries i; a larger score rescales earlier sums."""
    j = start + tl.arange(0, BLOCK_N)
    k = load(key, start, end, BLOCK_N, d, BLOCK_D, MASKED)
    v = load(value, start, end, BLOCK_N, d, BLOCK_D, MASKED)
    s = dot(q, tl.trans(k)) * (LOG2_E * d ** -0.5)                              # s = q k^T / sqrt(d)
    if MASKED:
        s = tl.where((j < end)[None, :], s, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(s, 1))
    w = tl.exp2(s - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(w, 1)
    w = apply_dropout(w, seed, j[None, :], i[:, None], dropout)
    acc = acc * rescale[:, None] + dot(w.to(v.dtype), v)                        # o = (w * r) v, times row_sum
    return new_max, row_sum, acc


@triton.jit
def fwd_kernel(query, key, value, out, lse, query_offsets, key_offsets, seed, d: tl.constexpr,
               dropout: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program: o and lse of BLOCK_M queries of one sequence and head."""
    first_query, end_query = token_range(query_offsets)
    first_key, end_key = token_range(key_offsets)
    begin = first_query + tl.program_id(1) * BLOCK_M
    if begin >= end_query:              # a sequence shorter than the longest has fewer blocks
        return
    seed = tl.load(seed) if dropout > 0 else 0
    i = begin + tl.arange(0, BLOCK_M)
    q = load(query, begin, end_query, BLOCK_M, d, BLOCK_D, True)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    tail_start = end_key - (end_key - first_key) % BLOCK_N
    for start in range(first_key, tail_start, BLOCK_N):
        row_max, row_sum, acc = fwd_block(q, i, row_max, row_sum, acc, key, value, start, end_key, seed,
                                          d, dropout, BLOCK_D, BLOCK_N, False)
    for start in range(tail_start, end_key, TAIL_BLOCK):
        row_max, row_sum, acc = fwd_block(q, i, row_max, row_sum, acc, key, value, start, end_key, seed,
                                          d, dropout, BLOCK_D, TAIL_BLOCK, True)
    row_sum = tl.where(row_sum > 0, row_sum, 1.0)           # an empty key sequence gives zeros
    store(lse, begin, end_query, (row_max + tl.log2(row_sum))[:, None], 1)
    store(out, begin, end_query, acc / row_sum[:, None], d)


# ---- backward ------------------------------------------------------------------------------------
@triton.jit
def dq_block(q, do, i, lse, delta, dq, key, value, start, end, seed, d, dropout, BLOCK_D, BLOCK_N, MASKED):
    """Add keys start to start + BLOCK_N to dq of queries i."""
    j = start + tl.arange(0, BLOCK_N)
    k = load(key, start, end, BLOCK_N, d, BLOCK_D, MASKED)
    v = load(value, start, end, BLOCK_N, d, BLOCK_D, MASKED)
    s = dot(q, tl.trans(k)) * (LOG2_E * d ** -0.5)                              # s = q k^T / sqrt(d)
    if MASKED:
        s = tl.where((j < end)[None, :], s, float("-inf"))
    w = tl.exp2(s - lse)                                                        # w = exp(s - lse)
    dw = apply_dropout(dot(do, tl.trans(v)), seed, j[None, :], i[:, None], dropout)  # dw = r * (do v^T)
    ds = w * (dw - delta)                                                       # ds = w * (dw - delta)
    return dq + dot(ds.to(k.dtype), k)                                          # dq sqrt(d) = ds k


@triton.jit
def bwd_dq_kernel(grad, query, key, value, out, lse, dq_out, delta_out, query_offsets, key_offsets, seed,
                  d: tl.constexpr, dropout: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr):
    """One program: dq and delta of BLOCK_M queries of one sequence and head."""
    first_query, end_query = token_range(query_offsets)
    first_key, end_key = token_range(key_offsets)
    begin = first_query + tl.program_id(1) * BLOCK_M
    if begin >= end_query:
        return
    seed = tl.load(seed) if dropout > 0 else 0
    i = begin + tl.arange(0, BLOCK_M)
    q = load(query, begin, end_query, BLOCK_M, d, BLOCK_D, True)
    o = load(out, begin, end_query, BLOCK_M, d, BLOCK_D, True).to(tl.float32)
    do = load(grad, begin, end_query, BLOCK_M, d, BLOCK_D, True)
    lse = load(lse, begin, end_query, BLOCK_M, 1, 1, True)
    delta = tl.sum(do.to(tl.float32) * o, 1)[:, None]
    store(delta_out, begin, end_query, delta, 1)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    tail_start = end_key - (end_key - first_key) % BLOCK_N
    for start in range(first_key, tail_start, BLOCK_N):
        dq = dq_block(q, do, i, lse, delta, dq, key, value, start, end_key, seed,
                      d, dropout, BLOCK_D, BLOCK_N, False)
    for start in range(tail_start, end_key, TAIL_BLOCK):
        dq = dq_block(q, do, i, lse, delta, dq, key, value, start, end_key, seed,
                      d, dropout, BLOCK_D, TAIL_BLOCK, True)
    store(dq_out, begin, end_query, dq * d ** -0.5, d)


@triton.jit
def dkdv_block(k, v, j, dk, dv, grad, query, lse, delta, start, end, seed,
               d, dropout, BLOCK_D, BLOCK_N, MASKED):
    """Add queries start to start + BLOCK_N to dk and dv of keys j; s, w, r, dw, ds are (keys, queries).
    Queries from `end` on are loaded as zeros: their w is exp(0) = 1, but their do and delta are 0, and so
    is what they add to dv and, as ds is 0, to dk. Hence s needs no mask."""
    i = start + tl.arange(0, BLOCK_N)
    q = load(query, start, end, BLOCK_N, d, BLOCK_D, MASKED)
    do = load(grad, start, end, BLOCK_N, d, BLOCK_D, MASKED)
    lse = tl.trans(load(lse, start, end, BLOCK_N, 1, 1, MASKED))
    delta = tl.trans(load(delta, start, end, BLOCK_N, 1, 1, MASKED))
    s = dot(k, tl.trans(q)) * (LOG2_E * d ** -0.5)                              # s = q k^T / sqrt(d)
    w = tl.exp2(s - lse)                                                        # w = exp(s - lse)
    dw = apply_dropout(dot(v, tl.trans(do)), seed, j[:, None], i[None, :], dropout)  # dw = r * (do v^T)
    ds = w * (dw - delta)                                                       # ds = w * (dw - delta)
    w = apply_dropout(w, seed, j[:, None], i[None, :], dropout)
    dv += dot(w.to(do.dtype), do)                                               # dv = (w * r)^T do
    dk += dot(ds.to(q.dtype), q)                                                # dk sqrt(d) = ds^T q
    return dk, dv


@triton.jit
def bwd_dkdv_kernel(grad, query, key, value, lse, delta, dk_out, dv_out, query_offsets, key_offsets, seed,
                    d: tl.constexpr, dropout: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr):
    """One program: dk and dv of BLOCK_M keys of one sequence and head."""
    first_query, end_query = token_range(query_offsets)
    first_key, end_key = token_range(key_offsets)
    begin = first_key + tl.program_id(1) * BLOCK_M
    if begin >= end_key:
        return
    seed = tl.load(seed) if dropout > 0 else 0
    j = begin + tl.arange(0, BLOCK_M)
    k = load(key, begin, end_key, BLOCK_M, d, BLOCK_D, True)
    v = load(value, begin, end_key, BLOCK_M, d, BLOCK_D, True)
    dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    tail_start = end_query - (end_query - first_query) % BLOCK_N
    for start in range(first_query, tail_start, BLOCK_N):
        dk, dv = dkdv_block(k, v, j, dk, dv, grad, query, lse, delta, start, end_query, seed,
                            d, dropout, BLOCK_D, BLOCK_N, False)
    for start in range(tail_start, end_query, TAIL_BLOCK):
        dk, dv = dkdv_block(k, v, j, dk, dv, grad, query, lse, delta, start, end_query, seed,
                            d, dropout, BLOCK_D, TAIL_BLOCK, True)
    store(dk_out, begin, end_key, dk * d ** -0.5, d)
    store(dv_out, begin, end_key, dv, d)


# ---- launching -----------------------------------------------------------------------------------
MAX_D = 64
# For each kernel and number of bytes per element; not tuned on a GPU yet. None spills registers on compute
# capability 8.0 or 9.0, with Triton 3.6, 3.7 and 3.9 (`pytest -k shipped_kernel`).
LAUNCH_CONFIGS = {("fwd", 2): dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2),
                  ("fwd", 4): dict(BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=1),
                  ("bwd_dq", 2): dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2),
                  ("bwd_dq", 4): dict(BLOCK_M=32, BLOCK_N=16, num_warps=8, num_stages=1),
                  ("bwd_dkdv", 2): dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=1),
                  ("bwd_dkdv", 4): dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)}


def supports_attention(query):
    return triton_supports(query) and query.shape[-1] <= MAX_D and query.element_size() <= 4


def launch_config(kernel, d, itemsize):
    """Compile-time arguments and launch options of a kernel, for d channels per head."""
    return dict(d=d, BLOCK_D=max(16, triton.next_power_of_2(d)), **LAUNCH_CONFIGS[kernel, itemsize])


def grid(offsets, max_length, H):
    return lambda config: (len(offsets) - 1, triton.cdiv(max_length, config["BLOCK_M"]), H)


class TritonAttention(torch.autograd.Function):
    """`attention`; its `Sequences` are passed as their offsets and longest lengths."""

    @staticmethod
    def forward(ctx, query, key, value, query_offsets, key_offsets, max_query_length, max_key_length,
                dropout):
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        _, H, d = query.shape
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
        # sampled on the GPU and read by the kernels, so that the CPU never waits for it
        seed = torch.randint(2 ** 62, (1,), device=query.device) if dropout > 0 else None
        with torch.cuda.device_of(query):       # Triton launches on the current device
            fwd_kernel[grid(query_offsets, max_query_length, H)](
                query, key, value, out, lse, query_offsets, key_offsets, seed,
                dropout=dropout, **launch_config("fwd", d, query.element_size()))
        ctx.save_for_backward(query, key, value, out, lse, query_offsets, key_offsets, seed)
        ctx.max_query_length, ctx.max_key_length, ctx.dropout = max_query_length, max_key_length, dropout
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out, lse, query_offsets, key_offsets, seed = ctx.saved_tensors
        _, H, d = query.shape
        dq, dk, dv, delta = map(torch.empty_like, (query, key, value, lse))
        grad = grad.contiguous()
        with torch.cuda.device_of(query):
            bwd_dq_kernel[grid(query_offsets, ctx.max_query_length, H)](
                grad, query, key, value, out, lse, dq, delta, query_offsets, key_offsets, seed,
                dropout=ctx.dropout, **launch_config("bwd_dq", d, query.element_size()))
            bwd_dkdv_kernel[grid(key_offsets, ctx.max_key_length, H)](
                grad, query, key, value, lse, delta, dk, dv, query_offsets, key_offsets, seed,
                dropout=ctx.dropout, **launch_config("bwd_dkdv", d, query.element_size()))
        return dq, dk, dv, None, None, None, None, None
