"""Attention over packed sequences: the only attention of this project.

Sentences differ in length, so instead of a padded (sequences, longest) rectangle all tokens lie in one long list and
`Sequences` says where each sequence starts. One function serves three uses:

    images attending to themselves        queries = keys = image tokens, every sequence equally long
    captions attending to themselves      queries = keys = text tokens, lengths differ
    captions attending to images          `kv_of[p]` names the image that query sequence p looks at, so the keys and
                                          values of an image are projected once, however many captions read it

The caller never sees padding. Here, in plain PyTorch, sequences of different length are padded for the one call to
`scaled_dot_product_attention` and unpadded again; everything around it (projections, MLPs: almost all the work) runs on
real tokens only.

Shapes: S sequences, N tokens in all, H heads, d channels per head, L the longest sequence; where queries and keys differ,
P query sequences of up to Lq tokens look at S key sequences of up to Lk.
"""
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Sequences:
    """Where each of S sequences lies in one long list of N tokens: sequence s is tokens[starts[s]:starts[s + 1]]."""
    lengths: torch.Tensor   # (S,) int64, always on the CPU, so that sizes are known without waiting for the GPU
    starts: torch.Tensor    # (S + 1,) int32, on the device of the tokens

    @staticmethod
    def of(lengths, device="cpu"):
        lengths = torch.as_tensor(lengths, dtype=torch.int64)
        starts = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return Sequences(lengths, starts.to(device, non_blocking=True))

    @staticmethod
    def uniform(count, length, device="cpu"):
        return Sequences(torch.full((count,), length), torch.arange(count + 1, dtype=torch.int32, device=device) * length)

    def to(self, device):
        return Sequences(self.lengths, self.starts.to(device, non_blocking=True))

    def __len__(self):
        return len(self.lengths)

    @property
    def firsts(self):
        """Index of the first token of each sequence, (S,) int32, on the device of the tokens."""
        return self.starts[:-1]

    # What follows is asked for in every layer, and computed once.
    @cached_property
    def longest(self):
        return int(self.lengths.max())

    @cached_property
    def is_uniform(self):
        return self.longest * len(self) == int(self.lengths.sum())

    @cached_property
    def places(self):
        """0, 1, 2, ... anew for each sequence: every token's place in its own, (N,) int64, on the CPU."""
        offsets = self.lengths.cumsum(0) - self.lengths
        return torch.arange(int(self.lengths.sum())) - offsets.repeat_interleave(self.lengths)

    @cached_property
    def slots(self):
        """Every token's place in the padded (S * longest) layout, (N,) int64, on the device of the tokens."""
        rows = torch.arange(len(self)).repeat_interleave(self.lengths)
        return (rows * self.longest + self.places).to(self.starts.device, non_blocking=True)

    @cached_property
    def mask(self):
        """Which places of the padded (S, longest) layout hold a token, bool, on the device of the tokens."""
        real = torch.arange(self.longest) < self.lengths[:, None]
        return real.to(self.starts.device, non_blocking=True)


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


def attention(query, key, value, query_sequences, key_sequences, kv_of=None, dropout=0.0):
    """softmax(q k^T / sqrt(d)) v inside sequences, for every head.

    query: (Nq, H, d) packed as query_sequences says; key, value: (Nk, H, d) packed as key_sequences says.
    kv_of: (P,) which key sequence each query sequence looks at; None: sequence p looks at sequence p.
    dropout: the probability with which an attention weight is dropped. Returns (Nq, H, d).
    """
    query = pad(query, query_sequences)                                             # (P, H, Lq, d)
    key, value = pad(key, key_sequences), pad(value, key_sequences)                 # (S, H, Lk, d)
    mask = None if key_sequences.is_uniform else key_sequences.mask[:, None, None]  # (S, 1, 1, Lk)
    if kv_of is not None:
        key, value = key.index_select(0, kv_of), value.index_select(0, kv_of)       # (P, H, Lk, d)
        mask = None if mask is None else mask.index_select(0, kv_of)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return unpad(out, query_sequences)
