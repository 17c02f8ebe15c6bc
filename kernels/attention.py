"""The function `attention` of attention.py in Triton, for NVIDIA GPUs, without padding or copies.

For one head and one pair of sequences, with queries q (m, d), keys k and values v (n, d), scores s
and weights w, where * multiplies element by element:

    s = q k^T / sqrt(d)      w = softmax(s) = exp(s - lse)      o = (w * r) v
    lse: the log-sum-exp of each row of s
    r: the dropout factor of each weight, 0 or 1 / (1 - dropout); 1 without dropout

In the code, s and lse are in units of log 2 (multiplied by LOG2_E), so w = exp2(s - lse): GPUs have
exp2 but not exp.

The kernels never store s or w (FlashAttention, arXiv 2205.14135 and 2307.08691). They stream over
blocks of keys, and each query keeps the largest score so far (row_max), the sum of weights
(row_sum) and the weighted sum of values (acc). For the backward pass only the inputs, o and lse are
saved, and w is recomputed block by block. With do, the gradient of the loss with respect to o:

    dv = (w * r)^T do        dw = r * (do v^T)
    ds = w * (dw - delta)    delta_i = do_i o_i, which equals sum_j w_ij dw_ij
    dq = ds k / sqrt(d)      dk = ds^T q / sqrt(d)

There are two backward kernels: in the first, one program per block of queries accumulates dq; in
the second, one program per block of keys accumulates dk and dv. No two programs add to the same
sum, so there are no atomics, and runs are bit-identical.

197 tokens are three blocks of 64 and a remainder of 5. Full blocks need no mask. The remainder is
processed in blocks of TAIL_BLOCK = 16, so 208 columns are computed instead of 256.

The grid is (sequences, blocks of the longest sequence, heads). BLOCK_M is a number of queries and
BLOCK_N a number of keys. In fwd_kernel and bwd_dq_kernel, a program has BLOCK_M queries and loops
over blocks of BLOCK_N keys; in bwd_dkdv_kernel, it has BLOCK_N keys and loops over blocks of
BLOCK_M queries. Arguments declared tl.constexpr are compile-time constants, also in the functions
that a kernel calls.

Names: query, key, value, out, grad, lse, delta and seed are pointers to whole tensors; q, k, v, o,
do, row_lse, row_delta and seed_value are what a program has loaded from them.
"""
import torch

from kernels import tl, triton, triton_supports

LOG2_E = tl.constexpr(1.4426950408889634)       # log2(e), a factor of s and lse
TAIL_BLOCK = tl.constexpr(16)                   # the smallest block that tl.dot accepts


# ---- shared by the kernels -----------------------------------------------------------------------
@triton.jit
def token_range(offsets):
    """Index of the first token of this program's sequence, and of the first token after it."""
    return tl.load(offsets + tl.program_id(0)), tl.load(offsets + tl.program_id(0) + 1)


@triton.jit
def load(tensor, start, end, ROWS, d, BLOCK_D, MASKED):
    """Load tokens start to start + ROWS of one head of a tensor (N, H, d). Returns (ROWS, BLOCK_D),
    with zeros from channel d on and, if MASKED, from token `end` on. lse and delta are (N, H), so
    their d is 1."""
    stride = tl.num_programs(2) * d             # between tokens: H d
    # start * stride may exceed int32
    first = tensor + start * stride.to(tl.int64) + tl.program_id(2) * d
    rows = tl.arange(0, ROWS)[:, None]
    channels = tl.arange(0, BLOCK_D)[None, :]
    mask = channels < d
    if MASKED:
        mask = mask & (start + rows < end)
    return tl.load(first + rows * stride + channels, mask=mask, other=0.0)


@triton.jit
def store(tensor, start, end, x, d):
    """Store x (ROWS, BLOCK_D) as tokens start to start + ROWS of one head, without those from token
    `end` and channel d on."""
    stride = tl.num_programs(2) * d
    first = tensor + start * stride.to(tl.int64) + tl.program_id(2) * d
    rows = tl.arange(0, x.shape[0])[:, None]
    channels = tl.arange(0, x.shape[1])[None, :]
    mask = (channels < d) & (start + rows < end)
    tl.store(first + rows * stride + channels, x.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b):
    """Matrix product accumulated in float32. "tf32x3": three passes give nearly float32
    precision."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def apply_dropout(x, seed_value, j, i, dropout):
    """r * x for keys j and queries i (indices of packed tokens). r is recomputed, not stored:
    Philox (Salmon et al. 2011) hashes (seed; key, query, head), so forward and backward drop the
    same weights."""
    if dropout > 0:
        zero = (j + i) * 0                      # broadcasts all hashed values to one shape
        head = tl.program_id(2) + zero
        random, _, _, _ = tl.philox(seed_value, j + zero, i + zero, head, zero)
        x = tl.where(random >= int(dropout * 2 ** 32), x * (1 / (1 - dropout)), 0.0)
    return x


# ---- forward -------------------------------------------------------------------------------------
@triton.jit
def fwd_block(q, i, row_max, row_sum, acc, key, value, start, end, seed_value,
              d, dropout, BLOCK_D, BLOCK_N, MASKED):
    """Add keys start to start + BLOCK_N to the sums of queries i. A larger score rescales earlier
    sums."""
    j = start + tl.arange(0, BLOCK_N)
    k = load(key, start, end, BLOCK_N, d, BLOCK_D, MASKED)
    v = load(value, start, end, BLOCK_N, d, BLOCK_D, MASKED)
    s = dot(q, tl.trans(k)) * (LOG2_E * d ** -0.5)              # q k^T / sqrt(d), in units of log 2
    if MASKED:
        s = tl.where((j < end)[None, :], s, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(s, 1))
    w = tl.exp2(s - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(w, 1)
    w = apply_dropout(w, seed_value, j[None, :], i[:, None], dropout)
    acc = acc * rescale[:, None] + dot(w.to(v.dtype), v)        # o = (w * r) v, times row_sum
    return new_max, row_sum, acc


@triton.jit
def fwd_kernel(query, key, value, out, lse, query_offsets, key_offsets, seed,
               d: tl.constexpr, dropout: tl.constexpr,
               BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program: o and lse of BLOCK_M queries of one sequence and head."""
    first_query, end_query = token_range(query_offsets)
    first_key, end_key = token_range(key_offsets)
    begin = first_query + tl.program_id(1) * BLOCK_M
    if begin >= end_query:              # a sequence shorter than the longest has fewer blocks
        return
    seed_value = tl.load(seed) if dropout > 0 else 0
    i = begin + tl.arange(0, BLOCK_M)
    q = load(query, begin, end_query, BLOCK_M, d, BLOCK_D, True)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    tail_start = end_key - (end_key - first_key) % BLOCK_N
    for start in range(first_key, tail_start, BLOCK_N):
        row_max, row_sum, acc = fwd_block(q, i, row_max, row_sum, acc, key, value, start, end_key,
                                          seed_value, d, dropout, BLOCK_D, BLOCK_N, False)
    for start in range(tail_start, end_key, TAIL_BLOCK):
        row_max, row_sum, acc = fwd_block(q, i, row_max, row_sum, acc, key, value, start, end_key,
                                          seed_value, d, dropout, BLOCK_D, TAIL_BLOCK, True)
    row_sum = tl.where(row_sum > 0, row_sum, 1.0)           # an empty key sequence gives zeros
    store(lse, begin, end_query, (row_max + tl.log2(row_sum))[:, None], 1)
    store(out, begin, end_query, acc / row_sum[:, None], d)


# ---- backward ------------------------------------------------------------------------------------
@triton.jit
def dq_block(q, do, i, row_lse, row_delta, dq, key, value, start, end, seed_value,
             d, dropout, BLOCK_D, BLOCK_N, MASKED):
    """Add keys start to start + BLOCK_N to dq of queries i."""
    j = start + tl.arange(0, BLOCK_N)
    k = load(key, start, end, BLOCK_N, d, BLOCK_D, MASKED)
    v = load(value, start, end, BLOCK_N, d, BLOCK_D, MASKED)
    s = dot(q, tl.trans(k)) * (LOG2_E * d ** -0.5)              # q k^T / sqrt(d), in units of log 2
    if MASKED:
        s = tl.where((j < end)[None, :], s, float("-inf"))
    w = tl.exp2(s - row_lse)                                    # w = exp(s - lse)
    dw = dot(do, tl.trans(v))                                   # dw = r * (do v^T)
    dw = apply_dropout(dw, seed_value, j[None, :], i[:, None], dropout)
    ds = w * (dw - row_delta)                                   # ds = w * (dw - delta)
    return dq + dot(ds.to(k.dtype), k)                          # dq sqrt(d) = ds k


@triton.jit
def bwd_dq_kernel(grad, query, key, value, out, lse, dq_out, delta_out, query_offsets, key_offsets,
                  seed, d: tl.constexpr, dropout: tl.constexpr,
                  BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program: dq and delta of BLOCK_M queries of one sequence and head."""
    first_query, end_query = token_range(query_offsets)
    first_key, end_key = token_range(key_offsets)
    begin = first_query + tl.program_id(1) * BLOCK_M
    if begin >= end_query:
        return
    seed_value = tl.load(seed) if dropout > 0 else 0
    i = begin + tl.arange(0, BLOCK_M)
    q = load(query, begin, end_query, BLOCK_M, d, BLOCK_D, True)
    o = load(out, begin, end_query, BLOCK_M, d, BLOCK_D, True).to(tl.float32)
    do = load(grad, begin, end_query, BLOCK_M, d, BLOCK_D, True)
    row_lse = load(lse, begin, end_query, BLOCK_M, 1, 1, True)
    row_delta = tl.sum(do.to(tl.float32) * o, 1)[:, None]
    store(delta_out, begin, end_query, row_delta, 1)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    tail_start = end_key - (end_key - first_key) % BLOCK_N
    for start in range(first_key, tail_start, BLOCK_N):
        dq = dq_block(q, do, i, row_lse, row_delta, dq, key, value, start, end_key, seed_value,
                      d, dropout, BLOCK_D, BLOCK_N, False)
    for start in range(tail_start, end_key, TAIL_BLOCK):
        dq = dq_block(q, do, i, row_lse, row_delta, dq, key, value, start, end_key, seed_value,
                      d, dropout, BLOCK_D, TAIL_BLOCK, True)
    store(dq_out, begin, end_query, dq * d ** -0.5, d)


@triton.jit
def dkdv_block(k, v, j, dk, dv, grad, query, lse, delta, start, end, seed_value,
               d, dropout, BLOCK_D, BLOCK_M, MASKED):
    """Add queries start to start + BLOCK_M to dk and dv of keys j; s, w, r, dw and ds are (keys,
    queries).

    s needs no mask: queries from `end` on are loaded as zeros, so their w is exp(0) = 1, but their
    do and delta are 0, and with them their ds and what they add to dv and dk."""
    i = start + tl.arange(0, BLOCK_M)
    q = load(query, start, end, BLOCK_M, d, BLOCK_D, MASKED)
    do = load(grad, start, end, BLOCK_M, d, BLOCK_D, MASKED)
    row_lse = tl.trans(load(lse, start, end, BLOCK_M, 1, 1, MASKED))
    row_delta = tl.trans(load(delta, start, end, BLOCK_M, 1, 1, MASKED))
    s = dot(k, tl.trans(q)) * (LOG2_E * d ** -0.5)              # q k^T / sqrt(d), in units of log 2
    w = tl.exp2(s - row_lse)                                    # w = exp(s - lse)
    dw = dot(v, tl.trans(do))                                   # dw = r * (do v^T)
    dw = apply_dropout(dw, seed_value, j[:, None], i[None, :], dropout)
    ds = w * (dw - row_delta)                                   # ds = w * (dw - delta)
    w = apply_dropout(w, seed_value, j[:, None], i[None, :], dropout)
    dv += dot(w.to(do.dtype), do)                               # dv = (w * r)^T do
    dk += dot(ds.to(q.dtype), q)                                # dk sqrt(d) = ds^T q
    return dk, dv


@triton.jit
def bwd_dkdv_kernel(grad, query, key, value, lse, delta, dk_out, dv_out, query_offsets, key_offsets,
                    seed, d: tl.constexpr, dropout: tl.constexpr,
                    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program: dk and dv of BLOCK_N keys of one sequence and head."""
    first_query, end_query = token_range(query_offsets)
    first_key, end_key = token_range(key_offsets)
    begin = first_key + tl.program_id(1) * BLOCK_N
    if begin >= end_key:
        return
    seed_value = tl.load(seed) if dropout > 0 else 0
    j = begin + tl.arange(0, BLOCK_N)
    k = load(key, begin, end_key, BLOCK_N, d, BLOCK_D, True)
    v = load(value, begin, end_key, BLOCK_N, d, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    tail_start = end_query - (end_query - first_query) % BLOCK_M
    for start in range(first_query, tail_start, BLOCK_M):
        dk, dv = dkdv_block(k, v, j, dk, dv, grad, query, lse, delta, start, end_query, seed_value,
                            d, dropout, BLOCK_D, BLOCK_M, False)
    for start in range(tail_start, end_query, TAIL_BLOCK):
        dk, dv = dkdv_block(k, v, j, dk, dv, grad, query, lse, delta, start, end_query, seed_value,
                            d, dropout, BLOCK_D, TAIL_BLOCK, True)
    store(dk_out, begin, end_key, dk * d ** -0.5, d)
    store(dv_out, begin, end_key, dv, d)


# ---- launching -----------------------------------------------------------------------------------
MAX_D = 64
# For each kernel and number of bytes per element; not tuned on a GPU yet. No kernel spills
# registers on compute capability 8.0 or 9.0, with Triton 3.6, 3.7 and 3.9
# (`pytest -k shipped_kernel`).
LAUNCH_CONFIGS = {
    ("fwd", 2): dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2),
    ("fwd", 4): dict(BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=1),
    ("bwd_dq", 2): dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2),
    ("bwd_dq", 4): dict(BLOCK_M=32, BLOCK_N=16, num_warps=8, num_stages=1),
    ("bwd_dkdv", 2): dict(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=1),
    ("bwd_dkdv", 4): dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)}


def supports_attention(query):
    return triton_supports(query) and query.shape[-1] <= MAX_D and query.element_size() <= 4


def launch_config(kernel, d, itemsize):
    """Compile-time arguments and launch options of a kernel, for d channels per head."""
    BLOCK_D = max(16, triton.next_power_of_2(d))
    return dict(d=d, BLOCK_D=BLOCK_D, **LAUNCH_CONFIGS[kernel, itemsize])


def grid(offsets, max_length, H, block):
    """Grid of a kernel whose programs have config[block] tokens each; block: "BLOCK_M" or
    "BLOCK_N"."""
    return lambda config: (len(offsets) - 1, triton.cdiv(max_length, config[block]), H)


class TritonAttention(torch.autograd.Function):
    """`attention`; its `Sequences` are passed as their offsets and longest lengths."""

    @staticmethod
    def forward(ctx, query, key, value, query_offsets, key_offsets,
                max_query_length, max_key_length, dropout):
        query = query.contiguous()
        key = key.contiguous()
        value = value.contiguous()
        _, H, d = query.shape
        out = torch.empty_like(query)                                           # (N, H, d)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)             # (N, H)
        seed = None
        if dropout > 0:         # sampled on the GPU, where it is used: the CPU does not wait
            seed = torch.randint(2 ** 62, (1,), device=query.device)
        with torch.cuda.device_of(query):       # Triton launches on the current device
            fwd_kernel[grid(query_offsets, max_query_length, H, "BLOCK_M")](
                query, key, value, out, lse, query_offsets, key_offsets, seed,
                dropout=dropout, **launch_config("fwd", d, query.element_size()))
        ctx.save_for_backward(query, key, value, out, lse, query_offsets, key_offsets, seed)
        ctx.max_query_length = max_query_length
        ctx.max_key_length = max_key_length
        ctx.dropout = dropout
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out, lse, query_offsets, key_offsets, seed = ctx.saved_tensors
        _, H, d = query.shape
        dq, dk, dv, delta = map(torch.empty_like, (query, key, value, lse))
        grad = grad.contiguous()
        with torch.cuda.device_of(query):
            bwd_dq_kernel[grid(query_offsets, ctx.max_query_length, H, "BLOCK_M")](
                grad, query, key, value, out, lse, dq, delta, query_offsets, key_offsets, seed,
                dropout=ctx.dropout, **launch_config("bwd_dq", d, query.element_size()))
            bwd_dkdv_kernel[grid(key_offsets, ctx.max_key_length, H, "BLOCK_N")](
                grad, query, key, value, lse, delta, dk, dv, query_offsets, key_offsets, seed,
                dropout=ctx.dropout, **launch_config("bwd_dkdv", d, query.element_size()))
        return dq, dk, dv, None, None, None, None, None
