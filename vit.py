"""The image encoder: CLIP's Vision Transformer (ViT-B/16; FLIP paper, section 4.1).

    image -> patches -> linear projection -> [class token; patches] + positions -> LayerNorm
          -> `depth` pre-norm blocks of (attention, MLP) with residual connections
          -> LayerNorm of all tokens

The contrastive loss uses the class token; in image-grounded mode the text encoder attends to all
tokens. Three details follow CLIP so that its weights can be loaded: a LayerNorm before the first
block, the activation x * sigmoid(1.702 x), and a patch convolution without bias. Implementations
differ in the final LayerNorm: Hugging Face's CLIP applies it only to the pooled class token; the
official FLIP, and this code, apply it to all tokens, because cross-attention reads them.

Inside `forward`, the tokens of a batch of images are packed: one tensor (B L, D), and a `Sequences`
with the offset of each image. The letters of the shapes are listed in attention.py.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import Attention, Sequences


@dataclass(frozen=True)
class ViTConfig:
    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"ViT: image size {self.image_size} is not a multiple of the patch "
                             f"size {self.patch_size}")

    @property
    def num_patches(self):
        return (self.image_size // self.patch_size) ** 2


def quick_gelu(x):
    """x * sigmoid(1.702 x), using torch's fused silu(y) = y * sigmoid(y)."""
    return F.silu(1.702 * x) / 1.702


class ViTBlock(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.heads)
        self.norm_mlp = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x, sequences, first_token_only=False):
        """x (B L, D) packed -> (B L, D); with first_token_only -> (B, D): computes only the class
        tokens, which still attend to the whole image. Used for the last block when no other token
        is needed."""
        y = self.norm_attention(x)
        query = y
        query_sequences = sequences
        if first_token_only:
            first = sequences.first_token_indices                         # (B,)
            x = x.index_select(0, first)                                # (B, D)
            query = y.index_select(0, first)
            query_sequences = Sequences.uniform(len(x), 1, x.device)
        x = x + self.attention(query, query_sequences, y, sequences)
        return x + self.down(quick_gelu(self.up(self.norm_mlp(x))))


class ViT(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        D = config.width
        patch = config.patch_size
        self.patch_embedding = nn.Conv2d(3, D, patch, stride=patch, bias=False)
        self.class_token = nn.Parameter(torch.empty(D))
        self.positions = nn.Parameter(torch.empty(config.num_patches + 1, D))
        self.norm_before = nn.LayerNorm(D)
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.depth))
        self.norm_after = nn.LayerNorm(D)
        self.init_weights()

    def forward(self, images, first_token_only=False, return_hidden=False):
        """images (B, 3, S, S), normalised -> tokens (B, L, D), the class token first.

        first_token_only: return the class tokens (B, D) and skip all others in the last block.
        return_hidden: also return the list of all tokens after each block, before the final
        LayerNorm. The two flags are mutually exclusive."""
        assert not (first_token_only and return_hidden), "the hidden tokens would be incomplete"
        size = self.config.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"ViT: expected images (B, 3, {size}, {size}), found "
                             f"{tuple(images.shape)}")
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)       # (B, L - 1, D)
        B = len(patches)
        class_token = self.class_token.to(patches.dtype).expand(B, 1, -1)
        x = torch.cat([class_token, patches], dim=1)                            # (B, L, D)
        x = self.norm_before(x + self.positions)

        L = x.shape[1]
        sequences = Sequences.uniform(B, L, x.device)
        x = x.flatten(0, 1)                                                     # (B L, D)
        hidden = []
        for block in self.blocks:
            is_last = block is self.blocks[-1]
            x = block(x, sequences, first_token_only and is_last)
            if return_hidden:
                hidden.append(x.unflatten(0, (B, L)))

        if first_token_only:
            return self.norm_after(x)                                           # (B, D)
        tokens = self.norm_after(x.unflatten(0, (B, L)))                        # (B, L, D)
        if return_hidden:
            return tokens, hidden
        return tokens

    @torch.no_grad()
    def init_weights(self):
        """Random initial values. Position embeddings start on the scale of the patch embeddings, so
        that an eyebrow can be told from a mustache."""
        nn.init.normal_(self.class_token, std=0.02)
        nn.init.normal_(self.positions, std=0.5)
        nn.init.normal_(self.patch_embedding.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
