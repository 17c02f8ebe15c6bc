"""Attention over packed sequences: the only attention of this project.

Sentences differ in length, so instead of a padded (sequences, longest) rectangle all tokens lie in one long list and
`Sequences` says where each sequence starts. One function serves three uses:

    images attending to themselves        queries = keys = image tokens, every sequence equally long
    captions attending to themselves      queries = keys = text tokens, lengths differ
    captions attending to images          `kv_of[p]` names the image that query sequence p looks at, so the keys and
                                          values of an image are projected once, however many captions read it

For one head and one pair of sequences, with queries Q (Lq, d), keys K and values V (Lk, d), scores A and weights W:

    A = Q K^T / sqrt(d)      W = softmax(A) = exp(A - lse)      O = (W D) V
    D: what dropout leaves, 0 or rescale = 1 / (1 - its probability); 1 without dropout

The kernel never writes A or W (FlashAttention, arXiv 2205.14135 and 2307.08691): blocks of keys stream by while each query
keeps the largest score so far, the sum of weights and the weighted sum of values. For the backward pass only O and lse, the
logarithm of the sum of exp(A), one number a row, are kept beside the inputs; W comes back block by block as exp(A - lse):

    dV = (W D)^T dO          dA = W (D dO V^T - delta)          delta_i = dO_i O_i, which equals sum_j W_ij D_ij (dO V^T)_ij
    dQ = dA K / sqrt(d)      dK = dA^T Q / sqrt(d)

Two backward kernels: one program per block of queries gathers dQ; one per block of keys gathers dK and dV from every query
sequence that reads them. Nobody adds to anyone else's sum, so there are no atomics and equal runs give equal bits.

197 tokens are three blocks of 64 and 5 left over. The full blocks need no mask; what is left over is done in steps of 16,
so 208 columns are computed instead of 256.

Dropout is not stored but computed anew where it is needed: Philox (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3") is a hash of (seed; key, query, head), the query by its number in the whole list of tokens, so that the same weight
is dropped in forward and backward and on every device.

Shapes: S sequences, N tokens in all, H heads, d channels per head, L the longest sequence; where queries and keys differ,
P query sequences of up to Lq tokens look at S key sequences of up to Lk.
Run `python kernels/attention.py` to compare and time it.
"""
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__":
    raise SystemExit(subprocess.call([sys.executable, "-m", "kernels.bench", "attention", *sys.argv[1:]],
                                     cwd=Path(__file__).parents[1]))

from kernels import takes_kernels, tl, triton


# ---- packed sequences ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sequences:
    """Where each of S sequences lies in one long list of N tokens: sequence s is tokens[starts[s]:starts[s + 1]]."""
    lengths: Tensor     # (S,) int64, always on the CPU, so that sizes are known without waiting for the GPU
    starts: Tensor      # (S + 1,) int32, on the device of the tokens
    longest: int
    tokens: int         # N

    # What is computed from these lies on the device of the tokens.

    @staticmethod
    def of(lengths, device="cpu"):
        lengths = torch.as_tensor(lengths, dtype=torch.int64)
        starts = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return Sequences(lengths, starts.to(device, non_blocking=True), int(lengths.max()), int(lengths.sum()))

    @staticmethod
    def uniform(count, length, device="cpu"):
        starts = torch.arange(count + 1, dtype=torch.int32, device=device) * length
        return Sequences(torch.full((count,), length), starts, length, count * length)

    def to(self, device):
        return Sequences(self.lengths, self.starts.to(device, non_blocking=True), self.longest, self.tokens)

    def __len__(self):
        return len(self.lengths)

    @property
    def is_uniform(self):
        return self.longest * len(self) == self.tokens

    @property
    def firsts(self):
        """Index of the first token of each sequence, (S,) int32."""
        return self.starts[:-1]

    @property
    def sequence_of(self):
        """Which sequence each token belongs to, (N,) int64."""
        return torch.searchsorted(self.starts, torch.arange(self.tokens, device=self.starts.device), right=True) - 1

    @property
    def places(self):
        """0, 1, 2, ... anew for each sequence: every token's place in its own, (N,) int64."""
        return torch.arange(self.tokens, device=self.starts.device) - self.starts[self.sequence_of]

    @property
    def slots(self):
        """Every token's place in the padded (S * longest) layout, (N,) int64."""
        return self.sequence_of * self.longest + self.places

    @property
    def mask(self):
        """Which places of the padded (S, longest) layout hold a token, bool."""
        return torch.arange(self.longest, device=self.starts.device) < self.starts.diff()[:, None]


class Unpad(torch.autograd.Function):
    """(S * longest, ...) -> (N, ...) packed tokens. Its gradient is written, not added: autograd's own backward of an
    indexed read adds row by row, in case two rows coincide; here they never do."""

    @staticmethod
    def forward(ctx, padded, slots):
        ctx.save_for_backward(slots)
        ctx.size = len(padded)
        return padded.index_select(0, slots)

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, *ctx.saved_tensors, grad), None


def pad(tokens, sequences):
    """Packed (N, H, d) -> (S, H, longest, d), zeros where there is no token."""
    S, L = len(sequences), sequences.longest
    if not sequences.is_uniform:
        tokens = tokens.new_zeros(S * L, *tokens.shape[1:]).index_copy(0, sequences.slots, tokens)
    return tokens.unflatten(0, (S, L)).transpose(1, 2)


def unpad(padded, sequences):
    """(S, H, longest, d) -> packed (N, H, d)."""
    tokens = padded.transpose(1, 2).flatten(0, 1)
    return tokens if sequences.is_uniform else Unpad.apply(tokens, sequences.slots)


# ---- the mathematics, sequence by sequence: also what runs where there is dropout and no GPU -------------------------
def pairs_of_sequences(query_starts, key_starts, kv_of):
    """(queries, keys) as slices of the two lists, for each query sequence."""
    queries, keys = query_starts.tolist(), key_starts.tolist()
    return [(slice(queries[p], queries[p + 1]), slice(keys[s], keys[s + 1])) for p, s in enumerate(kv_of.tolist())]


def reference_forward(query, key, value, query_starts, key_starts, kv_of, dropout, seed):
    """O (Nq, H, d) and lse (Nq, H), in float32 or wider: the formulas of the docstring, which the kernels are held against."""
    dtype, (query, key, value) = query.dtype, map(widen, (query, key, value))
    out, lse = torch.zeros_like(query), query.new_zeros(query.shape[:2])
    for q, k in pairs_of_sequences(query_starts, key_starts, kv_of):
        scores = torch.einsum("qhd,khd->hqk", query[q], key[k]) * query.shape[-1] ** -0.5
        weights = scores.softmax(-1) * dropout_factor(scores, q.start, dropout, seed)
        out[q], lse[q] = torch.einsum("hqk,khd->qhd", weights, value[k]), scores.logsumexp(-1).T
    return out.to(dtype), lse


def reference_backward(grad, query, key, value, out, lse, query_starts, key_starts, kv_of, dropout, seed):
    """dQ, dK, dV for the gradient dO (Nq, H, d)."""
    dtype, (grad, query, key, value, out) = query.dtype, map(widen, (grad, query, key, value, out))
    by_query, by_key, by_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    scale = query.shape[-1] ** -0.5
    for q, k in pairs_of_sequences(query_starts, key_starts, kv_of):
        scores = torch.einsum("qhd,khd->hqk", query[q], key[k]) * scale
        weights, factor = (scores - lse[q].T[..., None]).exp(), dropout_factor(scores, q.start, dropout, seed)
        delta = (grad[q] * out[q]).sum(-1).T[..., None]                                      # (H, Lq, 1)
        by_scores = weights * (factor * torch.einsum("qhd,khd->hqk", grad[q], value[k]) - delta) * scale
        by_query[q] = torch.einsum("hqk,khd->qhd", by_scores, key[k])
        by_key[k] += torch.einsum("hqk,qhd->khd", by_scores, query[q])
        by_value[k] += torch.einsum("hqk,qhd->khd", weights * factor, grad[q])
    return by_query.to(dtype), by_key.to(dtype), by_value.to(dtype)


def widen(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def dropout_factor(scores, first_query, dropout, seed):
    """D for scores (H, Lq, Lk) of queries first_query, first_query + 1, ...: the kernel's random numbers in PyTorch."""
    if dropout == 0:
        return 1.0
    H, Lq, Lk = scores.shape
    heads, queries, keys = (torch.arange(n, device=scores.device) for n in (H, Lq, Lk))
    random = philox(int(seed), keys, first_query + queries[:, None], heads[:, None, None])
    return (random >= threshold(dropout)).to(scores.dtype) / (1 - dropout)


def philox(seed, c0, c1, c2):
    """Philox 4x32-10: 32 random bits for each counter (c0, c1, c2, 0), as int64. Ten rounds of a multiplication, whose upper
    half goes into the neighbour and whose lower half is swapped."""
    def multiply(constant, x):
        return (constant * x >> 32) & 0xFFFFFFFF, constant * x & 0xFFFFFFFF
    c3, key0, key1 = torch.zeros_like(c0), seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        (high0, low0), (high1, low1) = multiply(0xD2511F53, c0), multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0


def threshold(dropout):
    """A weight is kept where its 32 random bits are at least this."""
    return int(dropout * 2 ** 32)


# ---- what the kernels share ------------------------------------------------------------------------------------------
# They work with exp2, which is what the hardware has; so scores and lse are multiplied by log2(e) inside them.
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load(first, places, length, stride, d: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """One head of the tokens at these places of a sequence, (places, BLOCK_D); zeros beyond its length and beyond d.

    first: pointer to the sequence's first token, at this head; stride: from one token to the next."""
    channels = tl.arange(0, BLOCK_D)
    pointers = first + places[:, None] * stride + channels[None, :]
    if MASKED:
        x = tl.load(pointers, mask=(places < length)[:, None] & (channels < d)[None, :], other=0.0)
    elif BLOCK_D > d:
        x = tl.load(pointers, mask=(channels < d)[None, :], other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def store(first, places, length, stride, x, d: tl.constexpr, BLOCK_D: tl.constexpr):
    channels = tl.arange(0, BLOCK_D)
    pointers = first + places[:, None] * stride + channels[None, :]
    tl.store(pointers, x.to(first.dtype.element_ty), mask=(places < length)[:, None] & (channels < d)[None, :])


@triton.jit
def ends(query_starts, p, key_starts, s):
    """First tokens of query sequence p and key sequence s (int64, for what is multiplied with them is large); lengths."""
    first_query, first_key = tl.load(query_starts + p), tl.load(key_starts + s)
    return (first_query.to(tl.int64), first_key.to(tl.int64), tl.load(query_starts + p + 1) - first_query,
            tl.load(key_starts + s + 1) - first_key)


@triton.jit
def dot(a, b):
    """Matrix product, accumulated in float32; float32 inputs are multiplied nearly as exactly as that, on tensor cores."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def keep(seed, key, query, head, threshold):
    """Which weights dropout leaves, for places of keys, queries (as numbered in the whole list) and a head, broadcast."""
    zero = (key + query) * 0
    random, _, _, _ = tl.philox(seed, key + zero, query + zero, head + zero, zero)
    return random >= threshold.to(tl.uint32)


# ---- forward -----------------------------------------------------------------------------------------------------------
@triton.jit
def attend(q, peak, mass, mixed, key, value, start, Lk, stride, scale, seed, query_number, head, threshold,
           d: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr):
    """A block of queries looks at keys start to start + WIDTH; what it has seen so far shrinks when a larger score turns up."""
    j = start + tl.arange(0, WIDTH)
    k, v = load(key, j, Lk, stride, d, BLOCK_D, MASKED), load(value, j, Lk, stride, d, BLOCK_D, MASKED)
    scores = dot(q, tl.trans(k)) * scale                                                     # A = Q K^T / sqrt(d)
    if MASKED:
        scores = tl.where((j < Lk)[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    mass = mass * shrink + tl.sum(weights, 1)
    if DROPOUT:
        weights = tl.where(keep(seed, j[None, :], query_number[:, None], head, threshold), weights, 0.0)
    mixed = mixed * shrink[:, None] + dot(weights.to(v.dtype), v)                            # O = (W D) V, not yet scaled
    return new_peak, mass, mixed


@triton.jit(do_not_specialize=["seed"])
def forward_kernel(query, key, value, out, lse, query_starts, key_starts, kv_of, blocks, H, scale, seed, threshold, rescale,
                   d: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr,
                   DROPOUT: tl.constexpr):
    """One program: BLOCK queries of sequence p, one head."""
    p, head = tl.program_id(0) // blocks, tl.program_id(1)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first_query, first_key, Lq, Lk = ends(query_starts, p, key_starts, tl.load(kv_of + p))
    at_query, at_key = (first_query * H + head) * d, (first_key * H + head) * d
    key, value = key + at_key, value + at_key
    Lk = tl.where(tl.program_id(0) % blocks * BLOCK < Lq, Lk, 0)                             # nobody looks from beyond the end
    q = load(query + at_query, i, Lq, H * d, d, BLOCK_D, True)
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    query_number = first_query.to(tl.int32) + i
    whole = Lk // WIDTH * WIDTH
    for start in range(0, whole, WIDTH):
        peak, mass, mixed = attend(q, peak, mass, mixed, key, value, start, Lk, H * d, scale * LOG2_E, seed, query_number, head,
                                   threshold, d, BLOCK_D, WIDTH, False, DROPOUT)
    for start in range(whole, Lk, TAIL):
        peak, mass, mixed = attend(q, peak, mass, mixed, key, value, start, Lk, H * d, scale * LOG2_E, seed, query_number, head,
                                   threshold, d, BLOCK_D, TAIL, True, DROPOUT)
    mass = tl.where(mass > 0, mass, 1.0)                    # who looks at an empty sequence sees zeros
    store(out + at_query, i, Lq, H * d, mixed * (rescale / mass)[:, None], d, BLOCK_D)
    tl.store(lse + (first_query + i) * H + head, (peak + tl.log2(mass)) / LOG2_E, mask=i < Lq)


# ---- backward ----------------------------------------------------------------------------------------------------------
@triton.jit
def gather_for_queries(q, grad, lse, delta, by_query, key, value, start, Lk, stride, scale, seed, query_number, head, threshold,
                       rescale, d: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
                       DROPOUT: tl.constexpr):
    """What keys start to start + WIDTH add to dQ of a block of queries."""
    j = start + tl.arange(0, WIDTH)
    k, v = load(key, j, Lk, stride, d, BLOCK_D, MASKED), load(value, j, Lk, stride, d, BLOCK_D, MASKED)
    scores = dot(q, tl.trans(k)) * scale
    if MASKED:
        scores = tl.where((j < Lk)[None, :], scores, float("-inf"))
    weights = tl.exp2(scores - lse[:, None])                                                 # W = exp(A - lse)
    by_weights = dot(grad, tl.trans(v))                                                      # dO V^T
    if DROPOUT:
        kept = keep(seed, j[None, :], query_number[:, None], head, threshold)
        by_weights = tl.where(kept, by_weights * rescale, 0.0)                               # D dO V^T
    by_scores = weights * (by_weights - delta[:, None])                                      # dS
    return by_query + dot(by_scores.to(k.dtype), k)                                          # dQ = dA K, but for sqrt(d)


@triton.jit(do_not_specialize=["seed"])
def query_kernel(grad, query, key, value, out, lse, by_query, delta_out, query_starts, key_starts, kv_of, blocks, H, scale, seed,
                 threshold, rescale, d: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
                 TAIL: tl.constexpr, DROPOUT: tl.constexpr):
    """One program: dQ and delta of BLOCK queries of sequence p, one head."""
    p, head = tl.program_id(0) // blocks, tl.program_id(1)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first_query, first_key, Lq, Lk = ends(query_starts, p, key_starts, tl.load(kv_of + p))
    at_query, at_key = (first_query * H + head) * d, (first_key * H + head) * d
    key, value = key + at_key, value + at_key
    Lk = tl.where(tl.program_id(0) % blocks * BLOCK < Lq, Lk, 0)
    q, g = load(query + at_query, i, Lq, H * d, d, BLOCK_D, True), load(grad + at_query, i, Lq, H * d, d, BLOCK_D, True)
    o = load(out + at_query, i, Lq, H * d, d, BLOCK_D, True)
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    row = (first_query + i) * H + head
    tl.store(delta_out + row, delta, mask=i < Lq)
    row_lse = tl.load(lse + row, mask=i < Lq, other=0.0) * LOG2_E
    total = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    query_number = first_query.to(tl.int32) + i
    whole = Lk // WIDTH * WIDTH
    for start in range(0, whole, WIDTH):
        total = gather_for_queries(q, g, row_lse, delta, total, key, value, start, Lk, H * d, scale * LOG2_E, seed, query_number,
                                   head, threshold, rescale, d, BLOCK_D, WIDTH, False, DROPOUT)
    for start in range(whole, Lk, TAIL):
        total = gather_for_queries(q, g, row_lse, delta, total, key, value, start, Lk, H * d, scale * LOG2_E, seed, query_number,
                                   head, threshold, rescale, d, BLOCK_D, TAIL, True, DROPOUT)
    store(by_query + at_query, i, Lq, H * d, total * scale, d, BLOCK_D)


@triton.jit
def gather_for_keys(k, v, by_key, by_value, query, grad, lse, delta, start, Lq, H, scale, seed, first_query, j, head, threshold,
                    rescale, d: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
                    DROPOUT: tl.constexpr):
    """What queries start to start + WIDTH add to dK and dV of a block of keys; scores lie transposed, (keys, queries)."""
    i = start + tl.arange(0, WIDTH)
    q, g = load(query, i, Lq, H * d, d, BLOCK_D, MASKED), load(grad, i, Lq, H * d, d, BLOCK_D, MASKED)
    row_lse = tl.load(lse + i * H, mask=i < Lq, other=float("inf")) * LOG2_E                 # beyond the end: weight 0
    row_delta = tl.load(delta + i * H, mask=i < Lq, other=0.0)
    weights = tl.exp2(dot(k, tl.trans(q)) * scale - row_lse[None, :])                        # W^T
    by_weights = dot(v, tl.trans(g))                                                         # V dO^T
    kept_weights = weights
    if DROPOUT:
        kept = keep(seed, j[:, None], (first_query + i)[None, :], head, threshold)
        kept_weights = tl.where(kept, weights * rescale, 0.0)
        by_weights = tl.where(kept, by_weights * rescale, 0.0)
    by_value += dot(kept_weights.to(g.dtype), g)                                             # dV = (W D)^T dO
    by_scores = weights * (by_weights - row_delta[None, :])                                  # dA^T
    by_key += dot(by_scores.to(q.dtype), q)                                                  # dK = dA^T Q, but for sqrt(d)
    return by_key, by_value


@triton.jit(do_not_specialize=["seed"])
def key_kernel(grad, query, key, value, lse, delta, by_key, by_value, query_starts, key_starts, readers, reader_starts, blocks, H,
               scale, seed, threshold, rescale, d: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
               TAIL: tl.constexpr, DROPOUT: tl.constexpr):
    """One program: dK and dV of BLOCK keys of sequence s, one head, from all query sequences that read s:
    readers[reader_starts[s]:reader_starts[s + 1]]."""
    s, head = tl.program_id(0) // blocks, tl.program_id(1)
    j = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first_key = tl.load(key_starts + s).to(tl.int64)
    Lk = tl.load(key_starts + s + 1) - tl.load(key_starts + s)
    at_key = (first_key * H + head) * d
    k, v = load(key + at_key, j, Lk, H * d, d, BLOCK_D, True), load(value + at_key, j, Lk, H * d, d, BLOCK_D, True)
    total_key, total_value = tl.zeros((BLOCK, BLOCK_D), tl.float32), tl.zeros((BLOCK, BLOCK_D), tl.float32)
    first_reader, end = tl.load(reader_starts + s), tl.load(reader_starts + s + 1)
    end = tl.where(tl.program_id(0) % blocks * BLOCK < Lk, end, first_reader)
    for reader in range(first_reader, end):
        first_query, _, Lq, _ = ends(query_starts, tl.load(readers + reader), key_starts, s)
        row = first_query * H + head
        number = first_query.to(tl.int32)
        whole = Lq // WIDTH * WIDTH
        for start in range(0, whole, WIDTH):
            total_key, total_value = gather_for_keys(k, v, total_key, total_value, query + row * d, grad + row * d, lse + row,
                                                     delta + row, start, Lq, H, scale * LOG2_E, seed, number, j, head, threshold,
                                                     rescale, d, BLOCK_D, WIDTH, False, DROPOUT)
        for start in range(whole, Lq, TAIL):
            total_key, total_value = gather_for_keys(k, v, total_key, total_value, query + row * d, grad + row * d, lse + row,
                                                     delta + row, start, Lq, H, scale * LOG2_E, seed, number, j, head, threshold,
                                                     rescale, d, BLOCK_D, TAIL, True, DROPOUT)
    store(by_key + at_key, j, Lk, H * d, total_key * scale, d, BLOCK_D)
    store(by_value + at_key, j, Lk, H * d, total_value, d, BLOCK_D)


# ---- launching -----------------------------------------------------------------------------------------------------------
TAIL = 16       # the narrowest block that a matrix product takes
# (kernel, bytes per number): rows of (largest head dimension, BLOCK, WIDTH, warps, stages). With Triton 3.6 to 3.9
# they compile for compute capability 8.0 and 9.0 without spilling registers (`python -m kernels.bench --compile-only`); none has
# been tuned on a card yet.
TILES = {("forward", 2): [(64, 64, 64, 4, 2), (128, 64, 64, 8, 2)], ("forward", 4): [(64, 32, 32, 8, 1), (128, 16, 32, 4, 1)],
         ("query", 2): [(64, 64, 64, 4, 2), (128, 64, 32, 8, 2)], ("query", 4): [(64, 32, 16, 8, 1), (128, 16, 32, 4, 1)],
         ("key", 2): [(64, 64, 32, 4, 1), (128, 32, 64, 8, 2)], ("key", 4): [(16, 16, 32, 4, 1), (128, 16, 16, 4, 1)]}
MAX_D = 128


def runs_kernel(query):
    return takes_kernels(query) and query.shape[-1] <= MAX_D and query.element_size() <= 4


def tiles(kernel, d, itemsize):
    """What a kernel is compiled with for head dimension d."""
    _, BLOCK, WIDTH, warps, stages = next(row for row in TILES[kernel, itemsize] if d <= row[0])
    return dict(d=d, BLOCK_D=max(16, triton.next_power_of_2(d)), BLOCK=BLOCK, WIDTH=WIDTH, TAIL=TAIL, num_warps=warps,
                num_stages=stages)


def launch_forward(query, key, value, query_starts, key_starts, kv_of, longest_query, longest_key, dropout, seed):
    _, H, d = query.shape
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
    meta = tiles("forward", d, query.element_size())
    blocks = triton.cdiv(longest_query, meta["BLOCK"])
    forward_kernel[blocks * len(kv_of), H](query, key, value, out, lse, query_starts, key_starts, kv_of, blocks, H, d ** -0.5,
                                           int(seed), threshold(dropout), 1 / (1 - dropout), DROPOUT=dropout > 0, **meta)
    return out, lse


def launch_backward(grad, query, key, value, out, lse, query_starts, key_starts, kv_of, longest_query, longest_key, dropout, seed):
    (_, H, d), S = query.shape, len(key_starts) - 1
    by_query, by_key, by_value, delta = map(torch.empty_like, (query, key, value, lse))
    numbers = H, d ** -0.5, int(seed), threshold(dropout), 1 / (1 - dropout)
    meta = tiles("query", d, query.element_size())
    blocks = triton.cdiv(longest_query, meta["BLOCK"])
    query_kernel[blocks * len(kv_of), H](grad, query, key, value, out, lse, by_query, delta, query_starts, key_starts, kv_of,
                                         blocks, *numbers, DROPOUT=dropout > 0, **meta)
    # Query sequences in the order of the key sequence that they read: kv_of [1, 0, 1] -> readers [1, 0, 2], starts [0, 1, 3].
    readers = kv_of.argsort(stable=True).int()
    reader_starts = torch.searchsorted(kv_of[readers], torch.arange(S + 1, device=kv_of.device, dtype=torch.int32)).int()
    meta = tiles("key", d, query.element_size())
    blocks = triton.cdiv(longest_key, meta["BLOCK"])
    key_kernel[blocks * S, H](grad, query, key, value, lse, delta, by_key, by_value, query_starts, key_starts, readers,
                              reader_starts, blocks, *numbers, DROPOUT=dropout > 0, **meta)
    return by_query, by_key, by_value


# ---- what the model calls ------------------------------------------------------------------------------------------------
@torch.library.custom_op("flip::attention", mutates_args=())
def fused(query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, key_starts: Tensor, kv_of: Tensor,
          longest_query: int, longest_key: int, dropout: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    """O and lse."""
    if runs_kernel(query):
        return launch_forward(query, key, value, query_starts, key_starts, kv_of, longest_query, longest_key, dropout, seed)
    with torch.autocast(query.device.type, enabled=False):
        return reference_forward(query, key, value, query_starts, key_starts, kv_of, dropout, seed)


@torch.library.custom_op("flip::attention_backward", mutates_args=())
def fused_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, query_starts: Tensor,
                   key_starts: Tensor, kv_of: Tensor, longest_query: int, longest_key: int, dropout: float,
                   seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if runs_kernel(query):
        return launch_backward(grad, query, key, value, out, lse, query_starts, key_starts, kv_of, longest_query, longest_key,
                               dropout, seed)
    with torch.autocast(query.device.type, enabled=False):
        return reference_backward(grad, query, key, value, out, lse, query_starts, key_starts, kv_of, dropout, seed)


@fused.register_fake
def _(query, key, value, query_starts, key_starts, kv_of, longest_query, longest_key, dropout, seed):
    return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))


@fused_backward.register_fake
def _(grad, query, key, value, *_):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def save(ctx, inputs, output):
    query, key, value, query_starts, key_starts, kv_of, ctx.longest_query, ctx.longest_key, ctx.dropout, seed = inputs
    ctx.save_for_backward(query, key, value, *output, query_starts, key_starts, kv_of, seed)


def backward(ctx, grad, _):
    *tensors, seed = ctx.saved_tensors
    gradients = fused_backward(grad.contiguous(), *tensors, ctx.longest_query, ctx.longest_key, ctx.dropout, seed)
    return *gradients, None, None, None, None, None, None, None


fused.register_autograd(backward, setup_context=save)


def attention(query, key, value, query_sequences, key_sequences, kv_of=None, dropout=0.0):
    """softmax(q k^T / sqrt(d)) v inside sequences, for every head.

    query: (Nq, H, d) packed as query_sequences says; key, value: (Nk, H, d) packed as key_sequences says.
    kv_of: (P,) which key sequence each query sequence looks at; None: sequence p looks at sequence p.
    dropout: the probability with which an attention weight is dropped. Returns (Nq, H, d). Under autocast it computes in
    autocast's type.
    """
    pairs = len(key_sequences if kv_of is None else kv_of)
    if (query_sequences.tokens, key_sequences.tokens, len(query_sequences)) != (len(query), len(key), pairs):
        raise ValueError(f"attention: {len(query)} queries, {len(key)} keys and {pairs} pairs of sequences, but the sequences say "
                         f"{query_sequences.tokens}, {key_sequences.tokens} and {len(query_sequences)}")
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    # Three ways to the same: the kernels; without them PyTorch's own attention, which is faster on a CPU than anything written out
    # here; and with dropout the formulas above, which keep the kernels' memory of nothing but a seed, on every device.
    if runs_kernel(query) or dropout > 0:
        if kv_of is None:
            kv_of = torch.arange(len(query_sequences), dtype=torch.int32, device=query.device)
        seed = torch.randint(2 ** 62, ())                   # on the CPU: the host need not wait for the GPU to read it
        return fused(query.contiguous(), key.contiguous(), value.contiguous(), query_sequences.starts, key_sequences.starts,
                     kv_of.int(), query_sequences.longest, key_sequences.longest, dropout, seed)[0]
    return padded_attention(query, key, value, query_sequences, key_sequences, kv_of)


def padded_attention(query, key, value, query_sequences, key_sequences, kv_of):
    """The same by PyTorch's own attention, for which sequences of different length are padded."""
    query = pad(query, query_sequences)                                             # (P, H, Lq, d)
    key, value = pad(key, key_sequences), pad(value, key_sequences)                 # (S, H, Lk, d)
    mask = None if key_sequences.is_uniform else key_sequences.mask[:, None, None]  # (S, 1, 1, Lk)
    if kv_of is not None:
        key, value = key.index_select(0, kv_of), value.index_select(0, kv_of)       # (P, H, Lk, d)
        mask = None if mask is None else mask.index_select(0, kv_of)
    return unpad(F.scaled_dot_product_attention(query, key, value, attn_mask=mask), query_sequences)
