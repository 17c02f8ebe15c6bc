"""Multi-head attention over packed sequences: all attention of this project, on CPUs and GPUs.

Captions differ in length, so tokens are packed: one tensor stores all sequences contiguously, without
padding, and `Sequences` says where each begins. Linear layers and norms waste no computation on padding.
`attention` lets the tokens of query sequence i attend to the tokens of key sequence i. It serves three uses:

    self-attention of images       queries = keys = image tokens, all sequences equally long
    self-attention of captions     queries = keys = text tokens, lengths differ
    cross-attention                queries = the tokens of all captions that attend to image i (the matching
                                   loss pairs it with several), as one sequence, since queries do not
                                   interact; keys = the tokens of image i

On a CPU `padded_attention`, in plain PyTorch, pads all sequences to the longest, computes
softmax(q k^T / sqrt(d)) v and removes the padding. On a GPU the Triton kernels below need no padding.

Capital letters are sizes: B sequences, one for each item of a batch on one process, have N tokens in all
and up to L_max each (L for images, Lq for queries, Lk for keys); H heads of d = D / H channels share the
width D. Run `python bench.py attention` to check and time it.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import tl, triton, triton_supports


# ---- packed sequences ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Sequences:
    """Layout of B sequences packed into one tensor of N tokens: tokens[offsets[i]:offsets[i + 1]] is
    sequence i. All tensors but `lengths`, including the properties, are on the tokens' device."""
    lengths: Tensor     # (B,) int64, always on the CPU, so that sizes are known without waiting for the GPU
    offsets: Tensor     # (B + 1,) int32
    max_length: int     # L_max
    num_tokens: int     # N

    @staticmethod
    def from_lengths(lengths: Tensor | list[int], device="cpu") -> "Sequences":
        lengths = torch.as_tensor(lengths, dtype=torch.int64)
        offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        max_length, tokens = int(lengths.max()), int(lengths.sum())
        return Sequences(lengths, offsets.to(device, non_blocking=True), max_length, tokens)

    @staticmethod
    def uniform(count: int, length: int, device="cpu") -> "Sequences":
        offsets = torch.arange(count + 1, dtype=torch.int32, device=device) * length
        return Sequences(torch.full((count,), length), offsets, length, count * length)

    def merge_groups(self, counts: Tensor) -> "Sequences":
        """Merge consecutive sequences, such as the captions of one image: the first counts[0],
        the next counts[1], ... (int64, on the CPU)."""
        ends = F.pad(self.lengths.cumsum(0), (1, 0))[F.pad(counts.cumsum(0), (1, 0))]
        return Sequences.from_lengths(ends.diff(), self.offsets.device)

    def to(self, device):
        return replace(self, offsets=self.offsets.to(device, non_blocking=True))

    def __len__(self):
        return len(self.lengths)

    @property
    def is_uniform(self):
        return self.max_length * len(self) == self.num_tokens

    @property
    def first_index(self):
        """Index of the first token of each sequence, (B,) int32."""
        return self.offsets[:-1]

    @property
    def sequence_ids(self):
        """Index of the sequence each token belongs to, (N,) int64."""
        tokens = torch.arange(self.num_tokens, device=self.offsets.device)
        return torch.searchsorted(self.offsets, tokens, right=True) - 1

    @property
    def position_ids(self):
        """Position of each token in its sequence, (N,) int64: 0, 1, 2, ..., restarting at every sequence."""
        return torch.arange(self.num_tokens, device=self.offsets.device) - self.offsets[self.sequence_ids]

    @property
    def token_mask(self):
        """True where the padded layout (B, L_max) holds a token, False for padding."""
        return torch.arange(self.max_length, device=self.offsets.device) < self.offsets.diff()[:, None]


def pad(tokens, sequences):
    """Packed (N, H, d) -> padded with zeros (B, H, L_max, d)."""
    B, L_max = len(sequences), sequences.max_length
    if sequences.is_uniform:
        return tokens.unflatten(0, (B, L_max)).transpose(1, 2)
    padded = tokens.new_zeros(B, L_max, *tokens.shape[1:])
    padded[sequences.sequence_ids, sequences.position_ids] = tokens
    return padded.transpose(1, 2)


def unpad(padded, sequences):
    """Padded (B, H, L_max, d) -> packed (N, H, d)."""
    padded = padded.transpose(1, 2)                                                 # (B, L_max, H, d)
    if sequences.is_uniform:
        return padded.flatten(0, 1)
    return padded[sequences.sequence_ids, sequences.position_ids]


# ---- attention -----------------------------------------------------------------------------------
def dropout_mask(weights, dropout):
    """A mask like `weights`: 0 with probability `dropout`, else 1. Uses 16 random bits per weight: on a CPU,
    drawing a full random number for each would take longer than the rest of attention."""
    count = weights.numel()
    random = torch.randint(-2 ** 63, 2 ** 63 - 1, (-(-count // 4),), device=weights.device)     # 64 bits each
    bits = random.view(torch.int16)[:count].view(weights.shape)
    return (bits >= round(dropout * 2 ** 16) - 2 ** 15).to(weights.dtype)


def padded_attention(query, key, value, query_sequences, key_sequences, dropout=0.0):
    """`attention` in plain PyTorch, on sequences padded to one length."""
    query = pad(query * query.shape[-1] ** -0.5, query_sequences)                   # (B, H, Lq, d)
    key, value = pad(key, key_sequences), pad(value, key_sequences)                 # (B, H, Lk, d)
    with torch.autocast(query.device.type, enabled=False):      # autocast would run the softmax in float32
        logits = query @ key.mT                                                     # (B, H, Lq, Lk)
        if not key_sequences.is_uniform:
            padding = ~key_sequences.token_mask[:, None, None]                      # (B, 1, 1, Lk)
            logits = logits.masked_fill_(padding, torch.finfo(logits.dtype).min)
        weights = logits.softmax(-1)
        if dropout > 0:
            weights, value = weights * dropout_mask(weights, dropout), value / (1 - dropout)
        return unpad(weights @ value, query_sequences)                              # (N, H, d)


def attention(query: Tensor, key: Tensor, value: Tensor, query_sequences: Sequences,
              key_sequences: Sequences, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head; query sequence i attends to key sequence i.

    query: (N, H, d), packed as `query_sequences`; key, value: likewise, packed as `key_sequences`; dropout:
    the probability of dropping an attention weight. Returns a tensor of query's shape, under autocast in
    autocast's dtype. Raises ValueError if tensors and sequences do not match."""
    sizes = len(query), len(key), len(key_sequences)
    if (query_sequences.num_tokens, key_sequences.num_tokens, len(query_sequences)) != sizes:
        raise ValueError(
            f"attention: expected one query and one key per token, and equally many sequences of both, found "
            f"{len(query)} queries for {len(query_sequences)} sequences of {query_sequences.num_tokens} "
            f"tokens, {len(key)} keys for {len(key_sequences)} of {key_sequences.num_tokens}")
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if not uses_triton(query):              # Triton: NVIDIA GPUs from A100 on; the kernels are below
        return padded_attention(query, key, value, query_sequences, key_sequences, dropout)
    seed = torch.randint(2 ** 62, ())       # on the CPU, so that reading it does not wait for the GPU
    return attention_forward(query.contiguous(), key.contiguous(), value.contiguous(),
                             query_sequences.offsets, key_sequences.offsets,
                             query_sequences.max_length, key_sequences.max_length, dropout, seed)[0]


# ==== The rest is Triton; a first reading can stop here ====
#
# The same without padding or copies. For one head and one pair of sequences, with queries q (m, d), keys k
# and values v (n, d), scores s and weights w, where * multiplies element by element:
#
#     s = q k^T / sqrt(d)      w = softmax(s) = exp(s - lse)      o = (w * r) v
#     r: the dropout factor of each weight, 0 or 1 / (1 - dropout); 1 without dropout
#
# The kernels never store s or w (FlashAttention, arXiv 2205.14135 and 2307.08691). They stream over blocks
# of keys, and each query keeps the largest score so far (row_max), the sum of weights (row_sum) and the
# weighted sum of values (acc). For the backward pass only the inputs, o and lse, the log-sum-exp of each row
# of s, are saved; w is recomputed block by block. With do, the gradient of the loss with respect to o:
#
#     dv = (w * r)^T do        dw = r * (do v^T)
#     ds = w * (dw - delta)    delta_i = do_i o_i, which equals sum_j w_ij dw_ij
#     dq = ds k / sqrt(d)      dk = ds^T q / sqrt(d)
#
# Two backward kernels: one program per query block accumulates dq; one per key block accumulates dk and dv.
# No two programs add to one sum, so there are no atomics, and runs are bit-identical.
#
# 197 tokens are three blocks of 64 and a remainder of 5. Full blocks need no mask; the remainder is processed
# in blocks of TAIL = 16, so 208 columns are computed instead of 256.
#
# The grid is (sequences, blocks of the longest sequence, heads). Each program loops over blocks of BLOCK_N
# keys for its BLOCK_M queries, but in bwd_dkdv over BLOCK_N queries for its BLOCK_M keys. Arguments declared
# tl.constexpr are compile-time constants, also in the functions that a kernel calls.

# ---- shared by the kernels -----------------------------------------------------------------------
LOG2_E = tl.constexpr(1.4426950408889634)       # GPUs have exp2, not exp: s and lse include this factor


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


@triton.jit(do_not_specialize=["seed"])
def fwd_kernel(query, key, value, out, lse, query_offsets, key_offsets, seed,
               d: tl.constexpr, dropout: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr, TAIL: tl.constexpr):
    """One program: o and lse of BLOCK_M queries of one sequence and head."""
    sequence = tl.program_id(0)
    first_query, end_query = tl.load(query_offsets + sequence), tl.load(query_offsets + sequence + 1)
    first_key, end_key = tl.load(key_offsets + sequence), tl.load(key_offsets + sequence + 1)
    begin = first_query + tl.program_id(1) * BLOCK_M
    if begin >= end_query:              # a sequence shorter than the longest has fewer blocks
        return
    i = begin + tl.arange(0, BLOCK_M)
    q = load(query, begin, end_query, BLOCK_M, d, BLOCK_D, True)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    tail = end_key - (end_key - first_key) % BLOCK_N
    for start in range(first_key, tail, BLOCK_N):
        row_max, row_sum, acc = fwd_block(q, i, row_max, row_sum, acc, key, value, start, end_key, seed,
                                          d, dropout, BLOCK_D, BLOCK_N, False)
    for start in range(tail, end_key, TAIL):
        row_max, row_sum, acc = fwd_block(q, i, row_max, row_sum, acc, key, value, start, end_key, seed,
                                          d, dropout, BLOCK_D, TAIL, True)
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


@triton.jit(do_not_specialize=["seed"])
def bwd_dq_kernel(grad, query, key, value, out, lse, dq_out, delta_out, query_offsets, key_offsets, seed,
                  d: tl.constexpr, dropout: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr, TAIL: tl.constexpr):
    """One program: dq and delta of BLOCK_M queries of one sequence and head."""
    sequence = tl.program_id(0)
    first_query, end_query = tl.load(query_offsets + sequence), tl.load(query_offsets + sequence + 1)
    first_key, end_key = tl.load(key_offsets + sequence), tl.load(key_offsets + sequence + 1)
    begin = first_query + tl.program_id(1) * BLOCK_M
    if begin >= end_query:
        return
    i = begin + tl.arange(0, BLOCK_M)
    q = load(query, begin, end_query, BLOCK_M, d, BLOCK_D, True)
    o = load(out, begin, end_query, BLOCK_M, d, BLOCK_D, True).to(tl.float32)
    do = load(grad, begin, end_query, BLOCK_M, d, BLOCK_D, True)
    lse = load(lse, begin, end_query, BLOCK_M, 1, 1, True)
    delta = tl.sum(do.to(tl.float32) * o, 1)[:, None]
    store(delta_out, begin, end_query, delta, 1)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    tail = end_key - (end_key - first_key) % BLOCK_N
    for start in range(first_key, tail, BLOCK_N):
        dq = dq_block(q, do, i, lse, delta, dq, key, value, start, end_key, seed,
                      d, dropout, BLOCK_D, BLOCK_N, False)
    for start in range(tail, end_key, TAIL):
        dq = dq_block(q, do, i, lse, delta, dq, key, value, start, end_key, seed,
                      d, dropout, BLOCK_D, TAIL, True)
    store(dq_out, begin, end_query, dq * d ** -0.5, d)


@triton.jit
def dkdv_block(k, v, j, dk, dv, grad, query, lse, delta, start, end, seed,
               d, dropout, BLOCK_D, BLOCK_N, MASKED):
    """Add queries start to start + BLOCK_N to dk and dv of keys j; s, w, r, dw, ds are (keys, queries)."""
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


@triton.jit(do_not_specialize=["seed"])
def bwd_dkdv_kernel(grad, query, key, value, lse, delta, dk_out, dv_out, query_offsets, key_offsets, seed,
                    d: tl.constexpr, dropout: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, TAIL: tl.constexpr):
    """One program: dk and dv of BLOCK_M keys of one sequence and head."""
    sequence = tl.program_id(0)
    first_query, end_query = tl.load(query_offsets + sequence), tl.load(query_offsets + sequence + 1)
    first_key, end_key = tl.load(key_offsets + sequence), tl.load(key_offsets + sequence + 1)
    begin = first_key + tl.program_id(1) * BLOCK_M
    if begin >= end_key:
        return
    j = begin + tl.arange(0, BLOCK_M)
    k = load(key, begin, end_key, BLOCK_M, d, BLOCK_D, True)
    v = load(value, begin, end_key, BLOCK_M, d, BLOCK_D, True)
    dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    tail = end_query - (end_query - first_query) % BLOCK_N
    for start in range(first_query, tail, BLOCK_N):
        dk, dv = dkdv_block(k, v, j, dk, dv, grad, query, lse, delta, start, end_query, seed,
                            d, dropout, BLOCK_D, BLOCK_N, False)
    for start in range(tail, end_query, TAIL):
        dk, dv = dkdv_block(k, v, j, dk, dv, grad, query, lse, delta, start, end_query, seed,
                            d, dropout, BLOCK_D, TAIL, True)
    store(dk_out, begin, end_key, dk * d ** -0.5, d)
    store(dv_out, begin, end_key, dv, d)


# ---- launching -----------------------------------------------------------------------------------
TAIL = 16       # the smallest block that tl.dot accepts
MAX_D = 128
# (kernel, bytes per element): rows of (largest d, BLOCK_M, BLOCK_N, warps, stages), not tuned on a GPU yet.
# None spills registers on compute capability 8.0 or 9.0, with Triton 3.6 to 3.9 (`pytest -k shipped_kernel`).
LAUNCH_CONFIGS = {("fwd", 2): [(64, 64, 64, 4, 2), (128, 64, 64, 8, 2)],
                  ("fwd", 4): [(64, 32, 32, 8, 1), (128, 16, 32, 4, 1)],
                  ("bwd_dq", 2): [(64, 64, 64, 4, 2), (128, 64, 32, 8, 2)],
                  ("bwd_dq", 4): [(64, 32, 16, 8, 1), (128, 16, 32, 4, 1)],
                  ("bwd_dkdv", 2): [(32, 64, 16, 4, 1), (64, 64, 32, 4, 1), (128, 64, 32, 8, 2)],
                  ("bwd_dkdv", 4): [(32, 16, 32, 4, 1), (128, 16, 16, 4, 1)]}


def uses_triton(query):
    return triton_supports(query) and query.shape[-1] <= MAX_D and query.element_size() <= 4


def launch_config(kernel, d, itemsize):
    """Compile-time arguments and launch options of a kernel, for d channels per head."""
    _, BLOCK_M, BLOCK_N, warps, stages = next(row for row in LAUNCH_CONFIGS[kernel, itemsize] if d <= row[0])
    return dict(d=d, BLOCK_D=max(16, triton.next_power_of_2(d)), BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, TAIL=TAIL,
                num_warps=warps, num_stages=stages)


# Two custom operators: torch.compile treats each as one node; the second is the first's backward pass.
@torch.library.custom_op("flip::attention", mutates_args=())
def attention_forward(query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, key_offsets: Tensor,
                      max_query_length: int, max_key_length: int, dropout: float,
                      seed: Tensor) -> tuple[Tensor, Tensor]:
    """o (N, H, d) and lse (N, H)."""
    _, H, d = query.shape
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
    meta = launch_config("fwd", d, query.element_size())
    fwd_kernel[len(key_offsets) - 1, triton.cdiv(max_query_length, meta["BLOCK_M"]), H](
        query, key, value, out, lse, query_offsets, key_offsets, int(seed), dropout=dropout, **meta)
    return out, lse


@torch.library.custom_op("flip::attention_backward", mutates_args=())
def attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
                       query_offsets: Tensor, key_offsets: Tensor, max_query_length: int, max_key_length: int,
                       dropout: float, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, in the shapes of query, key and value."""
    (_, H, d), B = query.shape, len(key_offsets) - 1
    dq, dk, dv, delta = map(torch.empty_like, (query, key, value, lse))
    meta = launch_config("bwd_dq", d, query.element_size())
    bwd_dq_kernel[B, triton.cdiv(max_query_length, meta["BLOCK_M"]), H](
        grad, query, key, value, out, lse, dq, delta, query_offsets, key_offsets, int(seed),
        dropout=dropout, **meta)
    meta = launch_config("bwd_dkdv", d, query.element_size())
    bwd_dkdv_kernel[B, triton.cdiv(max_key_length, meta["BLOCK_M"]), H](
        grad, query, key, value, lse, delta, dk, dv, query_offsets, key_offsets, int(seed),
        dropout=dropout, **meta)
    return dq, dk, dv


@attention_forward.register_fake
def _(query, *_):
    return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)


@attention_backward.register_fake
def _(grad, query, key, value, *_):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def save(ctx, inputs, output):
    *tensors, max_query_length, max_key_length, dropout, seed = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:], seed)        # in attention_backward's order
    ctx.numbers = max_query_length, max_key_length, dropout


def backward(ctx, grad, _):
    *tensors, seed = ctx.saved_tensors
    dq, dk, dv = attention_backward(grad.contiguous(), *tensors, *ctx.numbers, seed)
    return dq, dk, dv, None, None, None, None, None, None


attention_forward.register_autograd(backward, setup_context=save)
