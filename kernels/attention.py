"""Attention over packed sequences: the only attention of this project.

Sentences differ in length, so tokens travel packed: instead of a rectangle (sentences, longest),
filled up with padding, all tokens lie in one long list, and `Sequences` says where each sequence
starts. Linear layers and norms then spend nothing on padding. One function serves three uses:

    images attending to themselves      queries = keys = image tokens, every sequence equally long
    captions attending to themselves    queries = keys = text tokens, lengths differ
    captions attending to images        query sequence i: all captions that read image i, one after
                                        the other, since it does not matter to a token who else
                                        looks at the image; its keys and values are there once

Two paths compute the same. On a GPU the Triton kernels, in the second half of this file, read the
packed tokens where they lie. Elsewhere it is softmax(q k^T / sqrt(d)) v as it stands, on rectangles:
`padded_attention` pads what comes in and takes the padding out of the result.

Capital letters are sizes, here as in the whole project: B sequences, the samples of a batch, have
N tokens in all and up to L each; H heads of d = D / H channels share the width D. Where queries and
keys differ, query sequences have up to Lq tokens and key sequences up to Lk.
Run `python bench.py attention` to compare and time it.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import tl, triton, triton_supports


# ---- packed sequences ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Sequences:
    """Where each of B sequences lies in one long list of N tokens: sequence s is
    tokens[starts[s]:starts[s + 1]]. What is computed from this lies on the tokens' device."""
    lengths: Tensor     # (B,) int64, always on the CPU, so that sizes are known without waiting for the GPU
    offsets: Tensor     # (B + 1,) int32, on the device of the tokens
    max_length: int     # L
    num_tokens: int        # N

    @staticmethod
    def from_lengths(lengths, device="cpu"):
        lengths = torch.as_tensor(lengths, dtype=torch.int64)
        offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        max_length, tokens = int(lengths.max()), int(lengths.sum())
        return Sequences(lengths, offsets.to(device, non_blocking=True), max_length, tokens)

    @staticmethod
    def uniform(count, length, device="cpu"):
        offsets = torch.arange(count + 1, dtype=torch.int32, device=device) * length
        return Sequences(torch.full((count,), length), offsets, length, count * length)

    def merge_groups(self, counts):
        """Neighbours made one: the first counts[0] sequences, the next counts[1], and so on; counts:
        int64, on the CPU."""
        ends = F.pad(self.lengths.cumsum(0), (1, 0))[F.pad(counts.cumsum(0), (1, 0))]
        return Sequences.from_lengths(ends.diff(), self.offsets.device)

    def to(self, device):
        return Sequences(self.lengths, self.offsets.to(device, non_blocking=True), self.max_length, self.num_tokens)

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
        """Which sequence each token belongs to, (N,) int64."""
        tokens = torch.arange(self.num_tokens, device=self.offsets.device)
        return torch.searchsorted(self.offsets, tokens, right=True) - 1

    @property
    def position_ids(self):
        """0, 1, 2, ... anew for each sequence: every token's place in its own, (N,) int64."""
        return torch.arange(self.num_tokens, device=self.offsets.device) - self.offsets[self.sequence_ids]

    @property
    def padded_index(self):
        """Every token's place in the padded (B * L) layout, (N,) int64."""
        return self.sequence_ids * self.max_length + self.position_ids

    @property
    def token_mask(self):
        """Which places of the padded (B, L) layout hold a token, bool."""
        return torch.arange(self.max_length, device=self.offsets.device) < self.offsets.diff()[:, None]


def pad(tokens, sequences):
    """Packed (N, H, d) -> (B, H, L, d), zeros where there is no token."""
    B, L = len(sequences), sequences.max_length
    if not sequences.is_uniform:
        tokens = tokens.new_zeros(B * L, *tokens.shape[1:]).index_copy(0, sequences.padded_index, tokens)
    return tokens.unflatten(0, (B, L)).transpose(1, 2)


def unpad(padded, sequences):
    """(B, H, L, d) -> packed (N, H, d)."""
    tokens = padded.transpose(1, 2).flatten(0, 1)
    return tokens if sequences.is_uniform else tokens.index_select(0, sequences.padded_index)


# ---- attention -----------------------------------------------------------------------------------
def dropout_mask(weights, dropout):
    """1 for the weights that dropout leaves, 0 for the others. 16 random bits decide about each, since
    drawing a number for every weight takes a CPU longer than all the rest of attention."""
    count = weights.numel()
    random = torch.randint(-2 ** 63, 2 ** 63 - 1, (-(-count // 4),), device=weights.device)     # 64 bits each
    lots = random.view(torch.int16)[:count].view(weights.shape)
    return (lots >= round(dropout * 2 ** 16) - 2 ** 15).to(weights.dtype)


def padded_attention(query, key, value, query_sequences, key_sequences, dropout=0.0):
    """The formula as it stands, on sequences that are padded to one length."""
    query = pad(query * query.shape[-1] ** -0.5, query_sequences)                   # (B, H, Lq, d)
    key, value = pad(key, key_sequences), pad(value, key_sequences)                 # (B, H, Lk, d)
    with torch.autocast(query.device.type, enabled=False):      # it would make the softmax float32
        logits = query @ key.mT                                                     # (B, H, Lq, Lk)
        if not key_sequences.is_uniform:
            nothing = ~key_sequences.token_mask[:, None, None]
            logits = logits.masked_fill(nothing, torch.finfo(logits.dtype).min)
        weights = logits.softmax(-1)
        if dropout > 0:
            weights, value = weights * dropout_mask(weights, dropout), value / (1 - dropout)
        return unpad(weights @ value, query_sequences)                              # (N, H, d)


def attention(query, key, value, query_sequences, key_sequences, dropout=0.0):
    """softmax(q k^T / sqrt(d)) v for every head, where query sequence i looks at key sequence i.

    query: (N, H, d), packed as query_sequences says; key, value: the same, as key_sequences says.
    dropout: the probability with which an attention weight is dropped. Returns the shape of query.
    Under autocast it computes in autocast's type.
    """
    found = len(query), len(key), len(key_sequences)
    if (query_sequences.num_tokens, key_sequences.num_tokens, len(query_sequences)) != found:
        raise ValueError(
            f"attention: {len(query)} queries for {len(query_sequences)} sequences of "
            f"{query_sequences.num_tokens} tokens, {len(key)} keys for {len(key_sequences)} of "
            f"{key_sequences.num_tokens}: expected one for each token, and as many sequences of both")
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if not uses_triton(query):
        return padded_attention(query, key, value, query_sequences, key_sequences, dropout)
    seed = torch.randint(2 ** 62, ())       # on the CPU: the host need not wait for the GPU to read it
    out, _ = attention_forward(query.contiguous(), key.contiguous(), value.contiguous(), query_sequences.offsets,
                               key_sequences.offsets, query_sequences.max_length, key_sequences.max_length, dropout,
                               seed)
    return out


# ==== A first reading may stop here: the same without padding and copies, as Triton kernels ====
#
# For one head and one pair of sequences, with queries q (Lq, d), keys k and values v (Lk, d),
# scores s and weights w, where * multiplies element by element:
#
#     s = q k^T / sqrt(d)      w = softmax(s) = exp(s - lse)      o = (w * r) v
#     r: what dropout leaves, 0 or 1 / (1 - dropout); 1 without dropout
#
# The kernels never write s or w (FlashAttention, arXiv 2205.14135 and 2307.08691): blocks of keys
# stream by while each query keeps the largest score so far, the sum of weights and the weighted sum
# of values. For the backward pass only o and lse, the logarithm of the sum of exp(s), one number a
# row, are kept beside the inputs; w comes back block by block as exp(s - lse). From do, the
# gradient of the loss by o, follow the others:
#
#     dv = (w * r)^T do        dw = r * (do v^T)
#     ds = w * (dw - delta)    delta_i = do_i o_i, which equals sum_j w_ij dw_ij
#     dq = ds k / sqrt(d)      dk = ds^T q / sqrt(d)
#
# Two backward kernels: one program per block of queries gathers dq; one per block of keys gathers
# dk and dv from every query that reads them. Nobody adds to anyone else's sum, so there
# are no atomics, and equal runs give equal bits.
#
# 197 tokens are three blocks of 64 and 5 left over. The full blocks need no mask; what is left over
# is done in steps of TAIL = 16, so 208 columns are computed instead of 256.
#
# Programs run in a grid (sequences, blocks of the longest, heads). What a kernel declares
# tl.constexpr is known when it is compiled, and so it is in the functions that it calls.

# ---- what the kernels share ----------------------------------------------------------------------
LOG2_E = tl.constexpr(1.4426950408889634)       # the hardware has exp2, not exp: s and lse carry this factor


@triton.jit
def load(tensor, start, end, ROWS, d, BLOCK_D, MASKED):
    """One head of the tokens start to start + ROWS of a tensor (N, H, d): (ROWS, BLOCK_D), zeros
    beyond d and, if MASKED, from token `end` on. lse and delta are (N, H), so they have d = 1."""
    stride = tl.num_programs(2) * d             # from token to token: H d
    first = tensor + start * stride.to(tl.int64) + tl.program_id(2) * d     # start * stride may exceed int32
    rows, channels = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = channels < d
    if MASKED:
        mask = mask & (start + rows < end)
    return tl.load(first + rows * stride + channels, mask=mask, other=0.0)


@triton.jit
def store(tensor, start, end, x, d):
    """The reverse: x (ROWS, BLOCK_D) becomes tokens start to start + ROWS, none from `end` on."""
    stride = tl.num_programs(2) * d
    first = tensor + start * stride.to(tl.int64) + tl.program_id(2) * d
    rows, channels = tl.arange(0, x.shape[0])[:, None], tl.arange(0, x.shape[1])[None, :]
    mask = (channels < d) & (start + rows < end)
    tl.store(first + rows * stride + channels, x.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b):
    """Matrix product, summed in float32; float32 inputs are multiplied nearly as exactly."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def apply_dropout(x, seed, key, query, dropout):
    """r * x, for x that belongs to these keys and queries.

    r is not stored but computed anew where it is needed: Philox (Salmon et al. 2011, "Parallel
    random numbers: as easy as 1, 2, 3") is a hash of (seed; key, query, head), a key and a query by
    their number in the list of all tokens. So forward and backward drop the same weights."""
    if dropout > 0:
        zero = (key + query) * 0                # brings all that is hashed to one shape, (queries, keys)
        random, _, _, _ = tl.philox(seed, key + zero, query + zero, tl.program_id(2) + zero, zero)
        x = tl.where(random >= int(dropout * 2 ** 32), x * (1 / (1 - dropout)), 0.0)
    return x


# ---- forward -------------------------------------------------------------------------------------
@triton.jit
def fwd_block(q, i, row_max, row_sum, acc, key, value, start, end, seed, d, dropout, BLOCK_D, BLOCK_N, MASKED):
    """Queries i look at keys start to start + WIDTH; what they have seen so far shrinks when a
    larger score turns up."""
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
    acc = acc * rescale[:, None] + dot(w.to(v.dtype), v)                        # o = (w * r) v, times mass
    return new_max, row_sum, acc


@triton.jit(do_not_specialize=["seed"])
def fwd_kernel(query, key, value, out, lse, query_offsets, key_offsets, seed,
               d: tl.constexpr, dropout: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr, TAIL: tl.constexpr):
    """One program: BLOCK queries of a sequence, one head."""
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
    row_sum = tl.where(row_sum > 0, row_sum, 1.0)           # who looks at an empty sequence sees zeros
    store(lse, begin, end_query, (row_max + tl.log2(row_sum))[:, None], 1)
    store(out, begin, end_query, acc / row_sum[:, None], d)


# ---- backward ------------------------------------------------------------------------------------
@triton.jit
def dq_block(q, do, i, lse, delta, dq, key, value, start, end, seed,
             d, dropout, BLOCK_D, BLOCK_N, MASKED):
    """What keys start to start + WIDTH add to dq of queries i."""
    j = start + tl.arange(0, BLOCK_N)
    k = load(key, start, end, BLOCK_N, d, BLOCK_D, MASKED)
    v = load(value, start, end, BLOCK_N, d, BLOCK_D, MASKED)
    s = dot(q, tl.trans(k)) * (LOG2_E * d ** -0.5)                              # s = q k^T / sqrt(d)
    if MASKED:
        s = tl.where((j < end)[None, :], s, float("-inf"))
    w = tl.exp2(s - lse)                                                        # w = exp(s - lse)
    dw = apply_dropout(dot(do, tl.trans(v)), seed, j[None, :], i[:, None], dropout)  # dw = r * (do v^T)
    ds = w * (dw - delta)                                                       # ds = w * (dw - delta)
    return dq + dot(ds.to(k.dtype), k)                                          # dq = ds k / sqrt(d), later


@triton.jit(do_not_specialize=["seed"])
def bwd_dq_kernel(grad, query, key, value, out, lse, dq_out, delta_out, query_offsets, key_offsets, seed,
                  d: tl.constexpr, dropout: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr, TAIL: tl.constexpr):
    """One program: dq and delta of BLOCK queries of a sequence, one head."""
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
    """What queries start to start + WIDTH add to dk and dv of keys j. Here s, w, r, dw and ds lie
    transposed, (keys, queries)."""
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
    dk += dot(ds.to(q.dtype), q)                                                # dk = ds^T q / sqrt(d), later
    return dk, dv


@triton.jit(do_not_specialize=["seed"])
def bwd_dkdv_kernel(grad, query, key, value, lse, delta, dk_out, dv_out, query_offsets, key_offsets, seed,
                    d: tl.constexpr, dropout: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, TAIL: tl.constexpr):
    """One program: dk and dv of BLOCK keys of a sequence, one head."""
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
TAIL = 16       # the narrowest block that a matrix product takes
MAX_D = 128
# (kernel, bytes per number): rows of (largest d, BLOCK, WIDTH, warps, stages). With Triton 3.6 to
# 3.9 they compile for compute capability 8.0 and 9.0 without spilling registers, which
# `python bench.py --compile-only` shows; none has been tuned on a card yet.
LAUNCH_CONFIGS = {("fwd", 2): [(64, 64, 64, 4, 2), (128, 64, 64, 8, 2)],
                  ("fwd", 4): [(64, 32, 32, 8, 1), (128, 16, 32, 4, 1)],
                  ("bwd_dq", 2): [(64, 64, 64, 4, 2), (128, 64, 32, 8, 2)],
                  ("bwd_dq", 4): [(64, 32, 16, 8, 1), (128, 16, 32, 4, 1)],
                  ("bwd_dkdv", 2): [(32, 64, 16, 4, 1), (64, 64, 32, 4, 1), (128, 64, 32, 8, 2)],
                  ("bwd_dkdv", 4): [(32, 16, 32, 4, 1), (128, 16, 16, 4, 1)]}


def uses_triton(query):
    return triton_supports(query) and query.shape[-1] <= MAX_D and query.element_size() <= 4


def launch_config(kernel, d, itemsize):
    """What a kernel is compiled with for d channels per head."""
    _, BLOCK_M, BLOCK_N, warps, stages = next(row for row in LAUNCH_CONFIGS[kernel, itemsize] if d <= row[0])
    return dict(d=d, BLOCK_D=max(16, triton.next_power_of_2(d)), BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, TAIL=TAIL,
                num_warps=warps, num_stages=stages)


# Two operators that PyTorch knows: torch.compile takes each as one step, autograd finds the second.
@torch.library.custom_op("flip::attention", mutates_args=())
def attention_forward(query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, key_offsets: Tensor,
                      max_query_length: int, max_key_length: int, dropout: float,
                      seed: Tensor) -> tuple[Tensor, Tensor]:
    """o and lse."""
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
    """dq, dk, dv."""
    (_, H, d), B = query.shape, len(key_offsets) - 1
    dq, dk, dv, delta = map(torch.empty_like, (query, key, value, lse))
    meta = launch_config("bwd_dq", d, query.element_size())
    bwd_dq_kernel[B, triton.cdiv(max_query_length, meta["BLOCK_M"]), H](
        grad, query, key, value, out, lse, dq, delta, query_offsets, key_offsets, int(seed), dropout=dropout,
        **meta)
    meta = launch_config("bwd_dkdv", d, query.element_size())
    bwd_dkdv_kernel[B, triton.cdiv(max_key_length, meta["BLOCK_M"]), H](
        grad, query, key, value, lse, delta, dk, dv, query_offsets, key_offsets, int(seed), dropout=dropout,
        **meta)
    return dq, dk, dv


@attention_forward.register_fake
def _(query, *_):
    return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)


@attention_backward.register_fake
def _(grad, query, key, value, *_):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def save(ctx, inputs, output):
    *tensors, max_query_length, max_key_length, dropout, seed = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:], seed)        # as attention_backward takes them
    ctx.numbers = max_query_length, max_key_length, dropout


def backward(ctx, grad, _):
    *tensors, seed = ctx.saved_tensors
    dq, dk, dv = attention_backward(grad.contiguous(), *tensors, *ctx.numbers, seed)
    return dq, dk, dv, None, None, None, None, None, None


attention_forward.register_autograd(backward, setup_context=save)
