"""Multi-head attention over packed sequences: all attention of this project, on CPUs and GPUs.

Captions differ in length, so tokens are packed: one tensor stores all sequences contiguously,
without padding, and `Sequences` says where each begins. Linear layers and norms waste no
computation on padding. `attention` lets the tokens of query sequence i attend to the tokens of key
sequence i. It serves three uses:

    self-attention of images       queries = keys = image tokens, all sequences equally long
    self-attention of captions     queries = keys = text tokens, lengths differ
    cross-attention                queries = the tokens of all captions that attend to image i, as
                                   one sequence, since queries do not interact; keys = the tokens of
                                   image i (the matching loss pairs an image with several captions)

`padded_attention`, in plain PyTorch, pads all sequences to the longest, computes softmax(q k^T /
sqrt(d)) v and removes the padding. On NVIDIA A100 and newer GPUs, kernels/attention.py computes
the same without padding.

Capital letters denote sizes:

    B  items of a batch on one process; in this file, sequences of any kind
    N  tokens of all sequences         L  tokens of an image: 1 + patches
    D  width of a token                H  heads, each of d = D / H channels
    S  pixels on a side of an image    P  captions; in ITM, one per image-caption pair
    E  dimension of the features       I, T  images and texts in one call or in one split
    Q  entries of the queue            K  keys of the contrastive loss
    A  pairs of all processes together: B x number of processes

Run `python bench.py attention` to check and time attention.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import TritonAttention, supports_attention


# ---- packed sequences ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Sequences:
    """Layout of B sequences packed into one tensor of N tokens: tokens[offsets[i]:offsets[i + 1]]
    is sequence i."""
    lengths: Tensor     # (B,) int64, always on the CPU: sizes are known without waiting for a GPU
    offsets: Tensor     # (B + 1,) int32, on the tokens' device
    max_length: int     # L_max
    num_tokens: int     # N

    @staticmethod
    def from_lengths(lengths: Tensor | list[int], device="cpu") -> "Sequences":
        lengths = torch.as_tensor(lengths, dtype=torch.int64)
        offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        max_length = int(lengths.max())
        tokens = int(lengths.sum())
        return Sequences(lengths, offsets.to(device, non_blocking=True), max_length, tokens)

    @staticmethod
    def uniform(count: int, length: int, device="cpu") -> "Sequences":
        offsets = torch.arange(count + 1, dtype=torch.int32, device=device) * length
        return Sequences(torch.full((count,), length), offsets, length, count * length)

    @torch.compiler.disable     # because sizes depend on the contents of counts
    def merge_groups(self, counts: Tensor) -> "Sequences":
        """Merge consecutive sequences, such as the captions of one image: the first counts[0], the
        next counts[1], ... (int64, on the CPU). Lengths [3, 2, 4] and counts [2, 1] give the
        lengths [5, 4]."""
        offsets = F.pad(self.lengths.cumsum(0), (1, 0))                 # [0, 3, 5, 9]
        group_offsets = offsets[F.pad(counts.cumsum(0), (1, 0))]        # [0, 5, 9]
        return Sequences.from_lengths(group_offsets.diff(), self.offsets.device)

    def to(self, device):
        return replace(self, offsets=self.offsets.to(device, non_blocking=True))

    def __len__(self):
        return len(self.lengths)

    @property
    def is_uniform(self):
        return self.max_length * len(self) == self.num_tokens

    @property
    def first_token_indices(self):
        """Index of the first token of each sequence, (B,) int32."""
        return self.offsets[:-1]

    @property
    def sequence_ids(self):
        """Index of the sequence each token belongs to, (N,) int64."""
        tokens = torch.arange(self.num_tokens, device=self.offsets.device)
        return torch.searchsorted(self.offsets, tokens, right=True) - 1

    @property
    def position_ids(self):
        """Position of each token in its sequence, (N,) int64: 0, 1, 2, ..., restarting at every
        sequence."""
        tokens = torch.arange(self.num_tokens, device=self.offsets.device)
        return tokens - self.offsets[self.sequence_ids]

    @property
    def token_mask(self):
        """True where the padded layout (B, L_max) holds a token, False for padding."""
        positions = torch.arange(self.max_length, device=self.offsets.device)
        return positions < self.offsets.diff()[:, None]


def pad(tokens, sequences):
    """Packed (N, H, d) -> padded with zeros (B, H, L_max, d)."""
    B = len(sequences)
    L_max = sequences.max_length
    if sequences.is_uniform:
        return tokens.unflatten(0, (B, L_max)).transpose(1, 2)
    padded = tokens.new_zeros(B, L_max, *tokens.shape[1:])
    padded[sequences.sequence_ids, sequences.position_ids] = tokens
    return padded.transpose(1, 2)


def unpad(padded, sequences):
    """Padded (B, H, L_max, d) -> packed (N, H, d)."""
    padded = padded.transpose(1, 2)                                     # (B, L_max, H, d)
    if sequences.is_uniform:
        return padded.flatten(0, 1)
    return padded[sequences.sequence_ids, sequences.position_ids]


# ---- attention -----------------------------------------------------------------------------------
def padded_attention(query, key, value, query_sequences, key_sequences, dropout=0.0):
    """`attention` in plain PyTorch, on sequences padded to one length."""
    # Lq and Lk: the lengths of the longest sequence of queries and of keys
    query = pad(query * query.shape[-1] ** -0.5, query_sequences)       # (B, H, Lq, d)
    key = pad(key, key_sequences)                                       # (B, H, Lk, d)
    value = pad(value, key_sequences)
    # in the dtype of the query: autocast would compute the softmax in float32, which takes longer
    with torch.autocast(query.device.type, enabled=False):
        logits = query @ key.mT                                         # (B, H, Lq, Lk)
        if not key_sequences.is_uniform:
            padding = ~key_sequences.token_mask[:, None, None]          # (B, 1, 1, Lk)
            logits = logits.masked_fill_(padding, torch.finfo(logits.dtype).min)
        weights = logits.softmax(-1)
        if dropout > 0:
            weights = weights * dropout_mask(weights, dropout)
            value = value / (1 - dropout)
        return unpad(weights @ value, query_sequences)                  # (N, H, d)


def attention(query: Tensor, key: Tensor, value: Tensor, query_sequences: Sequences,
              key_sequences: Sequences, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head; query sequence i attends to key sequence i.

    query: (N, H, d), packed as `query_sequences`; key, value: likewise, packed as `key_sequences`;
    dropout: the probability of dropping an attention weight. Returns a tensor of query's shape;
    under autocast, it has autocast's dtype."""
    assert len(query) == query_sequences.num_tokens, "query_sequences does not match query"
    assert len(key) == key_sequences.num_tokens, "key_sequences does not match key"
    assert len(query_sequences) == len(key_sequences), "queries and keys of different sequences"
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query = query.to(dtype)
        key = key.to(dtype)
        value = value.to(dtype)
    if not supports_attention(query):
        return padded_attention(query, key, value, query_sequences, key_sequences, dropout)
    key_offsets = key_sequences.offsets[:]      # a view: torch.compile takes no tensor twice
    return TritonAttention.apply(
        query, key, value, query_sequences.offsets, key_offsets,
        query_sequences.max_length, key_sequences.max_length, dropout)


class Attention(nn.Module):
    """Multi-head attention with its four projections. key_width: input width of keys and values, if
    it differs from width."""

    def __init__(self, width, heads, key_width=None, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(key_width or width, width)
        self.value = nn.Linear(key_width or width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x, x_sequences: Sequences, context, context_sequences: Sequences):
        """Tokens x (Nx, D) attend to the tokens `context` (Nc, Dc), sequence i to sequence i."""
        query = self.query(x).unflatten(-1, (self.heads, -1))           # (Nx, H, d)
        key = self.key(context).unflatten(-1, (self.heads, -1))         # (Nc, H, d)
        value = self.value(context).unflatten(-1, (self.heads, -1))
        dropout = self.dropout if self.training else 0.0
        mixed = attention(query, key, value, x_sequences, context_sequences, dropout)
        return self.out(mixed.flatten(1))                               # (Nx, D)


# ---- dropout -------------------------------------------------------------------------------------
def dropout_mask(weights, dropout):
    """A mask like `weights`: 0 with probability `dropout`, else 1.

    It uses 16 random bits per weight, four from each random 64-bit integer. On a CPU, drawing a
    float for each weight would take longer than the rest of attention."""
    count = weights.numel()
    words = torch.randint(-2 ** 63, 2 ** 63 - 1, ((count + 3) // 4,), device=weights.device)
    random = words.view(torch.int16)[:count].view(weights.shape)    # uniform from -2^15 to 2^15 - 1
    threshold = round(dropout * 2 ** 16) - 2 ** 15
    return (random >= threshold).to(weights.dtype)


class Dropout(nn.Dropout):
    """nn.Dropout that uses `dropout_mask` on a CPU, which makes a step of the base model 2 to 4 %
    faster."""

    def forward(self, x):
        if x.is_cuda or not self.training or self.p == 0:
            return super().forward(x)
        scale = dropout_mask(x, self.p).div_(1 - self.p)
        return x * scale
