"""The text encoder: BERT, which doubles as an image-grounded encoder (FLIP paper, section 4.1; the
design is BLIP's).

    caption -> word pieces -> word + position embeddings -> LayerNorm -> `depth` layers of
        self-attention       each caption attends to itself
        [cross-attention]    in image-grounded mode: the caption attends to one image's tokens
        MLP
    Each sublayer has a residual connection followed by LayerNorm (post-norm; the ViT is pre-norm).

Image-grounded mode is used if image tokens are passed. Both modes share all weights except those of
cross-attention; the first token tells the model which of the two modes it is in. The contrastive
loss trains [CLS] to summarise the caption; the matching loss trains [ENC] to tell whether the
caption fits the image. The two inputs differ only in the embedding of this first token, and only
the output at its position is used.

Unlike the official code, we pack captions (attention.py) instead of padding them to 65 tokens; and
in each layer we project an image's keys and values once rather than once per caption: the captions
that attend to an image are stored contiguously and form one long query sequence. BERT's token-type
embedding is constant here (type 0); pretrained.py adds it to the position embeddings, whereas the
official code drops it.

Shapes: see attention.py; N tokens of P captions, which attend to I images of L tokens.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import Attention, Dropout, Sequences
from tokenizer import Captions


@dataclass(frozen=True)
class BertConfig:
    vocab_size: int = 30524     # bert-base-uncased's 30,522 word pieces, then [DEC], then [ENC]
    width: int = 768
    depth: int = 12
    heads: int = 12
    positions: int = 512        # max_position_embeddings
    dropout: float = 0.1


class BertLayer(nn.Module):
    """Self-attention, cross-attention if there are images, and MLP, post-norm."""

    def __init__(self, config: BertConfig, image_width: int):
        super().__init__()
        D = config.width
        self.attention = Attention(D, config.heads, dropout=config.dropout)
        self.norm_attention = nn.LayerNorm(D, eps=1e-12)
        self.cross_attention = Attention(D, config.heads, image_width, dropout=config.dropout)
        self.norm_cross_attention = nn.LayerNorm(D, eps=1e-12)
        self.up = nn.Linear(D, 4 * D)
        self.down = nn.Linear(4 * D, D)
        self.norm_mlp = nn.LayerNorm(D, eps=1e-12)
        self.dropout = Dropout(config.dropout)

    def forward(self, tokens, sequences, image_context=None, first_token_only=False):
        """tokens (N, D) packed -> (N, D); with first_token_only -> (P, D): computes only the first
        token of each caption, which still attends to all others. image_context: (packed image
        tokens, their Sequences, captions_per_image)."""
        x = tokens
        x_sequences = sequences
        if first_token_only:
            x = tokens.index_select(0, sequences.first_token_indices)     # (P, D)
            x_sequences = Sequences.uniform(len(x), 1, x.device)
        mixed = self.attention(x, x_sequences, tokens, sequences)
        x = self.norm_attention(x + self.dropout(mixed))
        if image_context is not None:
            image_tokens, image_sequences, captions_per_image = image_context
            grouped = x_sequences       # one query sequence: the captions that attend to one image
            if captions_per_image is not None:
                grouped = x_sequences.merge_groups(captions_per_image)
            cross = self.cross_attention(x, grouped, image_tokens, image_sequences)
            x = self.norm_cross_attention(x + self.dropout(cross))
        hidden = self.down(F.gelu(self.up(x)))
        return self.norm_mlp(x + self.dropout(hidden))


class Bert(nn.Module):
    def __init__(self, config: BertConfig, image_width: int = 768):
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.empty(config.positions, config.width))
        self.norm = nn.LayerNorm(config.width, eps=1e-12)
        self.dropout = Dropout(config.dropout)
        layers = [BertLayer(config, image_width) for _ in range(config.depth)]
        self.layers = nn.ModuleList(layers)
        self.init_weights()

    def forward(self, captions: Captions, image_tokens=None, captions_per_image=None,
                first_token_only=False):
        """Packed captions -> packed tokens (N, D); with first_token_only, the first token of each
        caption (P, D), and the last layer skips all others.

        image_tokens (I, L, image_width) select image-grounded mode: the first captions_per_image[0]
        captions attend to image 0, the next captions_per_image[1] to image 1, and so on;
        captions_per_image (I,) is a CPU tensor; None means one caption per image."""
        sequences = captions.sequences
        if sequences.max_length > self.config.positions:
            raise ValueError(f"BERT: expected captions of at most {self.config.positions} tokens, "
                             f"found one of {sequences.max_length}")
        image_context = None
        if image_tokens is not None:
            I, L, _ = image_tokens.shape
            image_sequences = Sequences.uniform(I, L, image_tokens.device)
            image_context = image_tokens.flatten(0, 1), image_sequences, captions_per_image

        x = self.words(captions.ids) + self.positions[sequences.position_ids]  # (N, D)
        x = self.dropout(self.norm(x))
        for layer in self.layers[:-1]:
            x = layer(x, sequences, image_context)
        return self.layers[-1](x, sequences, image_context, first_token_only)

    @property
    def enc_id(self):
        """Id of [ENC], the last embedding. ([DEC], the one before, is for BLIP's caption
        decoder.)"""
        return self.config.vocab_size - 1

    @torch.no_grad()
    def init_weights(self):
        """Random initial values. Those of words and linear layers are larger than BERT's: with std
        0.02 and width 128, [CLS] would barely depend on the caption. Word embeddings are larger
        than positions, so that captions differ from the first step on. (With --bert, `load_bert`
        loads BERT's weights, and redraws with std 0.02 what BERT lacks.)"""
        nn.init.normal_(self.words.weight, std=0.1)
        nn.init.normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
