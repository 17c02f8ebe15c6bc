"""The image encoder: a Vision Transformer, as CLIP has it (ViT-B/16; FLIP paper, section 4.1).

    image -> patches -> one linear map each -> [class token; patches] + positions -> LayerNorm
          -> `depth` blocks of (attention, MLP), each normalised before and added after -> LayerNorm of all tokens

The class token is what the contrastive loss sees; all tokens are what the text encoder reads in image-grounded mode.
CLIP's particulars, kept so that its weights load: a LayerNorm before the first block, the activation
x * sigmoid(1.702 x), a patch convolution without bias.
Departure from the official code: a misspelt name makes it lose CLIP's final LayerNorm; here it loads.

Shapes: B images of S x S pixels, N patches, L = N + 1 tokens, D width, H heads, d = D / H.
Run `python vit.py photo.jpg` to see what an image becomes.
"""
import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from kernels.attention import Sequences, attention


@dataclass(frozen=True)
class ViTConfig:
    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"ViT: image size {self.image_size} is not a multiple of the patch size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"ViT: width {self.width} is not a multiple of the number of heads, {self.heads}")

    @property
    def patches(self):
        return (self.image_size // self.patch_size) ** 2


# ---- what goes in -------------------------------------------------------------------------------------------------
# CLIP's statistics of an RGB image in [0, 1]
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
SCALE, OFFSET = 1 / (255 * STD), MEAN / STD     # one multiplication and one subtraction a pixel


# Not all that Pillow knows: for PostScript, for example, it starts another program, whatever the file's name says.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def open_picture(path):
    """A complete RGB image, upright as its camera noted; ValueError with a sentence when the file is damaged or none."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;"):         # converting them would clip to white
                raise ValueError(f"its pixels are of kind {image.mode}; save it with 8 bits per channel")
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture") from None
    except Exception as error:                      # Pillow raises OSError, SyntaxError and others for damaged files
        raise ValueError(f"{path} cannot be read completely: {error}") from None


def to_tensor(image, size):
    """A PIL image -> float32 (3, size, size): resized without cropping (section 4.2), then CLIP's normalisation."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) * SCALE - OFFSET
    return torch.from_numpy(pixels).permute(2, 0, 1)


# ---- the encoder --------------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head attention with its four projections; also BERT's, whose cross-attention has keys of another width."""

    def __init__(self, width, heads, key_width=None, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(key_width or width, width)
        self.value = nn.Linear(key_width or width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x, x_sequences, context, context_sequences, kv_of=None):
        """Tokens x (Nx, D) look at the tokens of `context` (Nc, Dc); see kernels/attention.py for the packing."""
        query = self.query(x).unflatten(-1, (self.heads, -1))               # (Nx, H, d)
        key = self.key(context).unflatten(-1, (self.heads, -1))             # (Nc, H, d)
        value = self.value(context).unflatten(-1, (self.heads, -1))
        dropout = self.dropout if self.training else 0.0
        mixed = attention(query, key, value, x_sequences, context_sequences, kv_of, dropout)
        return self.out(mixed.flatten(1))                                   # (Nx, D)


def quick_gelu(x):
    """x * sigmoid(1.702 x), written so that torch computes it in one pass (silu(y) = y * sigmoid(y))."""
    return F.silu(1.702 * x) / 1.702


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.heads)
        self.norm_mlp = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x, sequences, first_only=False):
        """x (B L, D) packed -> the same; with first_only -> (B, D), computed for the first token of each image alone (it
        still looks at the whole image)."""
        y = self.norm_attention(x)
        query, query_sequences = y, sequences
        if first_only:
            x, query = x.index_select(0, sequences.firsts), y.index_select(0, sequences.firsts)     # (B, D)
            query_sequences = Sequences.uniform(len(x), 1, x.device)
        x = x + self.attention(query, query_sequences, y, sequences)
        return x + self.down(quick_gelu(self.up(self.norm_mlp(x))))


class ViT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        D, patch = config.width, config.patch_size
        self.patch_embedding = nn.Conv2d(3, D, patch, stride=patch, bias=False)
        self.class_token = nn.Parameter(torch.empty(D))
        self.positions = nn.Parameter(torch.empty(config.patches + 1, D))
        self.norm_before = nn.LayerNorm(D)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm_after = nn.LayerNorm(D)
        self.initialise()

    def forward(self, images, first_only=False, return_hidden=False):
        """images (B, 3, S, S) -> tokens (B, L, D), the class token first; with first_only -> the class tokens (B, D), for
        which the last block computes nothing else. return_hidden: also a list with the tokens after each block, before the
        final LayerNorm."""
        size = self.config.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"ViT: expected images (B, 3, {size}, {size}), found {tuple(images.shape)}")
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)                         # (B, N, D)
        x = torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)       # (B, L, D)
        x = self.norm_before(x + self.positions)
        B, L, _ = x.shape
        sequences, x = Sequences.uniform(B, L, x.device), x.flatten(0, 1)                   # (B L, D)
        hidden = []
        for block in self.blocks[:-1]:
            x = block(x, sequences)
            hidden.append(x.unflatten(0, (B, L)))
        x = self.blocks[-1](x, sequences, first_only)
        if first_only:
            return self.norm_after(x)                                                       # (B, D)
        hidden.append(x.unflatten(0, (B, L)))
        tokens = self.norm_after(hidden[-1])                                                # (B, L, D)
        return (tokens, hidden) if return_hidden else tokens

    @torch.no_grad()
    def initialise(self):
        """CLIP's initial values as Hugging Face has them: a block's contribution shrinks with depth, so that the sum of all
        keeps its scale."""
        D, depth = self.config.width, self.config.depth
        nn.init.normal_(self.class_token, std=D ** -0.5)
        nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.patch_embedding.weight, std=0.02)
        for block in self.blocks:
            for linear in (block.attention.query, block.attention.key, block.attention.value, block.down):
                nn.init.normal_(linear.weight, std=D ** -0.5 * (2 * depth) ** -0.5)
            nn.init.normal_(block.attention.out.weight, std=D ** -0.5)
            nn.init.normal_(block.up.weight, std=(2 * D) ** -0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)


# ---- weights from elsewhere ---------------------------------------------------------------------------------------
# Our name -> CLIP's name on Hugging Face; replaced in this order (a longer name before one that it contains).
CLIP_NAMES = [("class_token", "embeddings.class_embedding"), ("patch_embedding", "embeddings.patch_embedding"),
              ("positions", "embeddings.position_embedding.weight"), ("norm_before", "pre_layrnorm"),
              ("norm_after", "post_layernorm"), ("blocks.", "encoder.layers."), ("norm_attention", "layer_norm1"),
              ("norm_mlp", "layer_norm2"), (".attention.query", ".self_attn.q_proj"),
              (".attention.key", ".self_attn.k_proj"), (".attention.value", ".self_attn.v_proj"),
              (".attention.out", ".self_attn.out_proj"), (".up.", ".mlp.fc1."), (".down.", ".mlp.fc2.")]


def rename(name, table):
    for ours, theirs in table:
        name = name.replace(ours, theirs)
    return name


def first_line(error):
    """An error's text, as far as it fits into a sentence."""
    return (str(error) or type(error).__name__).splitlines()[0]


def read_weights(source):
    """{name: tensor} from a .safetensors, .bin, .pt or .pth file, a folder that holds a model, or a hub name.

    A hub name ("openai/clip-vit-base-patch16") is downloaded once into the Hugging Face cache. Files are read without
    running code from them.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"{path}: expected model.safetensors or pytorch_model.bin in this folder")
        path = found[0]
    elif not path.exists():
        path = Path(download(str(source), ("model.safetensors", "pytorch_model.bin")))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: damaged, or not a file of weights ({type(error).__name__})") from error
    if not isinstance(weights, dict) or not all(isinstance(name, str) and torch.is_tensor(t) for name, t in weights.items()):
        raise ValueError(f"{path}: expected a dictionary of named tensors, found {type(weights).__name__}")
    return weights


def download(name, filenames):
    """Fetch the first of `filenames` that hub repository `name` has; returns its local path."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    if name.count("/") > 1 or Path(name).suffix in (".bin", ".pt", ".pth", ".safetensors", ".txt", ".json"):
        raise FileNotFoundError(f"{name}: no such file or folder (and not a hub name, which looks like 'owner/model')")
    for filename in filenames:
        try:
            return hf_hub_download(name, filename)
        except LocalEntryNotFoundError as error:            # a kind of EntryNotFoundError, but says something else
            raise FileNotFoundError(f"{name}: no such file or folder, and the hub cannot be reached; download it where "
                                    f"there is a network and give its folder") from error
        except EntryNotFoundError:
            continue
        except Exception as error:
            raise FileNotFoundError(f"{name}: no such file or folder, and the hub did not give it: "
                                    f"{first_line(error)}") from error
    raise FileNotFoundError(f"{name}: the hub repository holds none of {', '.join(filenames)}")


@torch.no_grad()
def copy_weights(module, weights, name_of, origin):
    """Fill every entry of module's state with weights[name_of(entry)].

    Raises ValueError, before anything is copied, with what is missing, has another shape or would be left over.
    """
    state, unused, wrong = module.state_dict(), set(weights), []
    for ours, target in state.items():
        theirs = name_of(ours)
        if theirs not in weights:
            wrong.append(f"{theirs} is missing")
        elif weights[theirs].shape != target.shape:
            wrong.append(f"{theirs} has shape {tuple(weights[theirs].shape)}, expected {tuple(target.shape)}")
        unused.discard(theirs)
    wrong += [f"{theirs} has no place in it" for theirs in sorted(unused)]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(f"{origin} does not fit this model: {'; '.join(wrong[:3])}{more}")
    for ours, target in state.items():
        target.copy_(weights[name_of(ours)])


def resize_positions(positions, patches):
    """Position table (1 + n, D) of a square grid of n patches -> (1 + patches, D), bicubic; the class token's row stays."""
    old, new = round((len(positions) - 1) ** 0.5), round(patches ** 0.5)
    if positions.ndim != 2 or old * old + 1 != len(positions):
        raise ValueError(f"a position table of shape {tuple(positions.shape)} is not that of a square grid and a class token")
    if old == new:
        return positions
    grid = positions[1:].T.reshape(1, -1, old, old)                                         # (1, D, old, old)
    grid = F.interpolate(grid.float(), size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid.flatten(2)[0].T.to(positions.dtype)])             # (1 + new * new, D)


def load_clip(vit, source):
    """Fill `vit` with the image half of a CLIP model from Hugging Face (a file, a folder or a hub name)."""
    weights = {name.removeprefix("vision_model."): tensor for name, tensor in read_weights(source).items()
               if not name.startswith(("text_model.", "text_projection", "visual_projection", "logit_scale"))
               and not name.endswith("position_ids")}
    table = "embeddings.position_embedding.weight"
    if table in weights:
        weights[table] = resize_positions(weights[table], vit.config.patches)
    copy_weights(vit, weights, lambda name: rename(name, CLIP_NAMES), origin=str(source))


def main():
    parser = argparse.ArgumentParser(description="Show what the image encoder makes of one photograph.")
    parser.add_argument("image", nargs="?", help="an image file (default: a grey square)")
    parser.add_argument("--clip", help="weights: a file, a folder or a hub name such as openai/clip-vit-base-patch16")
    args = parser.parse_args()
    config = ViTConfig()
    vit = ViT(config).eval()
    if args.clip:
        load_clip(vit, args.clip)
    image = open_picture(args.image) if args.image else Image.new("RGB", (178, 218), "grey")
    pixels = to_tensor(image, config.image_size)[None]
    with torch.no_grad():
        tokens, hidden = vit(pixels, return_hidden=True)
    print(f"image        {image.size[0]} x {image.size[1]} {image.mode}")
    print(f"pixels       {tuple(pixels.shape)}   normalised, {pixels.min():.2f} to {pixels.max():.2f}")
    for index, tokens_after in enumerate(hidden, start=1):
        print(f"block {index:2}     {tuple(tokens_after.shape)}   token length {tokens_after.norm(dim=-1).mean():.2f}")
    print(f"tokens       {tuple(tokens.shape)}   class token first, then {config.patches} patches")
    print(f"parameters   {sum(p.numel() for p in vit.parameters()):,}")


if __name__ == "__main__":
    main()
