"""The image encoder: a Vision Transformer, as CLIP has it (ViT-B/16; FLIP paper, section 4.1).

    image -> patches -> one linear map each -> [class token; patches] + positions -> LayerNorm
          -> `depth` blocks of (attention, MLP), each normalised before and added after
          -> LayerNorm of all tokens

The class token is what the contrastive loss sees; all tokens are what the text encoder reads in
image-grounded mode. CLIP's particulars, kept so that its weights load: a LayerNorm before the first
block, the activation x * sigmoid(1.702 x), a patch convolution without bias. The last LayerNorm is
where readers differ: CLIP in Hugging Face applies it to the class token alone, all that it pools;
FLIP's official code applies it to all tokens, because captions read them all, and so do we. (A
misspelt name makes the official code lose CLIP's weights for it; here they load.)

Capital letters are sizes, the same in every file of this project:
    B samples in a batch      S pixels on a side       L tokens of an image (1 + its patches)
    D width of a token        H heads of d = D / H     N tokens of many sequences in one list
    E size of a feature       Q entries in the queue   K keys of the contrastive loss
    P captions, each of which may read an image        I images and T texts of a set or gallery
Files beyond this one add at most a letter or two, and say so.

Inside the encoders tokens are packed: those of a batch lie in one list (N, D), beside `Sequences`,
which say where each sequence begins (its `firsts`) and of which sequence, at which of its `places`,
a token is; `Sequences.uniform(B, L)` are B images of L tokens. Tokens of sequence i look at
sequence i, of the same list or of another one with as many sequences. All this is
kernels/attention.py, which may be read later.

Run `python vit.py photo.jpg` to see what an image becomes.
"""
import argparse
import contextlib
import ctypes
import os
import textwrap
import warnings
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from kernels.attention import Sequences, attention


@dataclass(frozen=True)
class ViTConfig:
    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12

    def __post_init__(self):
        check_sizes(self, image_size=10_000, patch_size=10_000, width=20_000, depth=200, heads=1000)
        if self.image_size % self.patch_size:
            raise ValueError(f"ViT: image size {self.image_size} is not a multiple of the patch size "
                             f"{self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"ViT: width {self.width} is not a multiple of the {self.heads} heads")

    @property
    def patches(self):
        return (self.image_size // self.patch_size) ** 2


# CLIP's statistics of an RGB image in [0, 1]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
SCALE, OFFSET = 1 / (255 * STD), MEAN / STD     # one multiplication and one subtraction a pixel


def to_pixels(image, size):
    """A PIL image -> uint8 (S, S, 3), resized without cropping (section 4.2)."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image.convert("RGB"))


def to_tensor(pixels):
    """Pixels of B images, each uint8 (S, S, 3) -> float32 (B, 3, S, S), normalised."""
    return torch.from_numpy(np.stack(pixels)).float().mul_(SCALE).sub_(OFFSET).permute(0, 3, 1, 2)


# ---- the encoder -------------------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head attention with its four projections; also BERT's, whose cross-attention has keys
    of another width."""

    def __init__(self, width, heads, key_width=None, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(key_width or width, width)
        self.value = nn.Linear(key_width or width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x, x_sequences, context, context_sequences):
        """Tokens x (Nx, D) look at the tokens of `context` (Nc, Dc), sequence i at sequence i."""
        query = self.query(x).unflatten(-1, (self.heads, -1))               # (Nx, H, d)
        key = self.key(context).unflatten(-1, (self.heads, -1))             # (Nc, H, d)
        value = self.value(context).unflatten(-1, (self.heads, -1))
        dropout = self.dropout if self.training else 0.0
        mixed = attention(query, key, value, x_sequences, context_sequences, dropout)
        return self.out(mixed.flatten(1))                                   # (Nx, D)


def quick_gelu(x):
    """x * sigmoid(1.702 x), so written that torch computes it at once: silu(y) = y sigmoid(y)."""
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
        """x (B L, D) packed -> the same; with first_only -> (B, D), computed for the first token of
        each image alone (it still looks at the whole image). That is for the last block, when what
        follows reads no other token."""
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
        """images (B, 3, S, S) -> tokens (B, L, D), the class token first.

        first_only: the class tokens (B, D), for which the last block computes nothing else.
        return_hidden: also a list with the tokens after each block, before the final LayerNorm.
        """
        size = self.config.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"ViT: expected images (B, 3, {size}, {size}), found {tuple(images.shape)}")
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)                         # (B, L - 1, D)
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
        """CLIP's initial values as Hugging Face has them: a block's contribution shrinks with
        depth, so that the sum of all keeps its scale."""
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


# ==== A first reading may stop here: running, files, pictures, foreign weights ===================
def spare_the_cpu():
    """Two things on which a CPU wastes its time. Numbers below 1e-38, which attention that has learned
    to look at few tokens gives to all others, cost it far more than others do; in a long run steps came
    to take nearly twice the time, so they are taken for 0 (in threads, too, if said before there are
    any). And large tensors, whose memory glibc returns to the system as soon as they are freed; to fetch
    and clear it anew costs several percent. It may keep up to 32 MB a tensor, the most one can ask."""
    torch.set_flush_denormal(True)
    with contextlib.suppress(OSError, AttributeError, TypeError):       # there is no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 * 2 ** 20)           # M_MMAP_THRESHOLD: smaller ones come from the heap
        mallopt(-1, 2 ** 31 - 1)            # M_TRIM_THRESHOLD: how much of the heap may lie unused


def run_script(main):
    """Run a script: what its user can mend ends in a sentence, not in a traceback."""
    spare_the_cpu()
    warnings.formatwarning = lambda message, *_: f"{message}\n"
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {printable(error)}")
    except KeyboardInterrupt:
        raise SystemExit("interrupted")


def printable(text):
    """A file's name, for example, whose odd characters cannot steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def first_line(error):
    """An error's text, as far as it fits into a sentence."""
    return (str(error) or type(error).__name__).splitlines()[0]


def check_sizes(config, **most):
    """Sizes are read from files, too: better a sentence than all the memory there is."""
    for name, bound in most.items():
        size = getattr(config, name)
        if not (isinstance(size, int) and 1 <= size <= bound):
            raise ValueError(f"{type(config).__name__}: {name} is {size!r}, expected a whole number from 1 "
                             f"to {bound}")


@contextlib.contextmanager
def whole_file(path):
    """A name to write to; the file appears at `path` whole, or, after an error, not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.urandom(4).hex()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def find_file(source, filenames):
    """The path of a file that is given by its own path, by a folder with one of `filenames`, or by
    a hub name ("openai/clip-vit-base-patch16"), whose file is then downloaded, once."""
    path, name = Path(source), str(source)
    found = [path, *(path / filename for filename in filenames)]
    for candidate in found:
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise FileNotFoundError(f"{path}: expected {' or '.join(filenames)} in this folder")
    if name.count("/") > 1 or path.suffix in (".bin", ".pt", ".pth", ".safetensors", ".txt", ".json"):
        raise FileNotFoundError(f"{name}: no such file or folder (and not a hub name, which looks like "
                                f"'owner/model')")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    for filename in filenames:
        try:
            return Path(hf_hub_download(name, filename))
        except LocalEntryNotFoundError as error:    # a kind of EntryNotFoundError that says something else
            raise FileNotFoundError(f"{name}: no such file or folder, and the hub cannot be reached; "
                                    f"download it where there is a network and give its folder") from error
        except EntryNotFoundError:
            continue
        except Exception as error:
            raise FileNotFoundError(f"{name}: no such file or folder, and the hub did not give it: "
                                    f"{first_line(error)}") from error
    raise FileNotFoundError(f"{name}: the hub repository holds none of {', '.join(filenames)}")


# ---- pictures and tables -----------------------------------------------------------------------
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Not all that Pillow knows: for PostScript, for example, it starts another program, whatever the
# file's name says.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


MOST_PIXELS = 2 ** 26       # larger pictures are refused: some are made to fill the memory


@contextlib.contextmanager
def opening(file, name):
    """A picture of which only the header has been read; ValueError with a sentence when the file is
    none, or turns out damaged. (Of a PIL image, which may be given, too, a copy.)"""
    try:
        with file.copy() if isinstance(file, Image.Image) else Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MOST_PIXELS:,}")
            if image.mode in ("I", "F") or image.mode.startswith("I;"):     # conversion would clip to white
                raise ValueError(f"its pixels are of kind {image.mode}; save it with 8 bits per channel")
            yield image
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture") from None
    except Exception as error:                      # Pillow raises OSError, SyntaxError and others
        raise ValueError(f"{name} cannot be read completely: {error}") from None


def picture_size(file, name=None):
    """Width and height as stored, from the header alone."""
    with opening(file, name or file) as image:
        return image.size


def open_picture(file, name=None, box=None, size=None):
    """An RGB image: the whole, upright as its camera noted, or what is in the box (x1, y1, x2, y2) of
    the pixels as they are stored.

    With a size, it is resized to size x size pixels (of which the outermost take a little from
    beyond the box). A JPEG that has at least twice as many each way is then decoded at a half, a
    quarter or an eighth, which its blocks of frequencies allow: several times as fast.
    """
    with opening(file, name or file) as image:
        before = image.width
        if size:
            x1, y1, x2, y2 = box or (0, 0, *image.size)
            spare = max(1, int(min(x2 - x1, y2 - y1) / size))
            image.draft(None, (image.width // spare, image.height // spare))
        reduced = round(before / image.width)                                               # 1, 2, 4 or 8
        if not box:
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode != "RGB":
            image = image.convert("RGB")
        if size:
            box = [min(edge / reduced, most) for edge, most in zip(box, image.size * 2)] if box else None
            return image.resize((size, size), Image.Resampling.BICUBIC, box)
        return image.crop([round(edge) for edge in box or (0, 0, *image.size)])


def read_batches(read, count, size, title, batch_size=128, show=True, lost=None):
    """Yield (numbers, pixels (B, 3, S, S)) of the pictures read(0, size), ..., read(count - 1, size),
    which are read on all cores while the batch before is used. With `lost`, a picture that cannot be
    read becomes an entry of it, {number: why}, and is left out."""
    def pixels_of(i):
        try:
            return to_pixels(read(i, size), size)
        except ValueError as error:
            if lost is None:
                raise
            lost[i] = str(error)

    with ThreadPool() as pool:
        batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
        reading = [pool.map_async(pixels_of, numbers) for numbers in batches[:1]]
        bar = tqdm(batches, title, leave=False, disable=not show)
        for numbers, following in zip(bar, [*batches[1:], ()]):
            found = reading.pop().get()
            reading.append(pool.map_async(pixels_of, following))
            kept = [i for i, pixels in zip(numbers, found) if pixels is not None]
            if kept:
                yield kept, to_tensor([pixels for pixels in found if pixels is not None])


def contact_sheet(rows, tile=128, legend=""):
    """A picture of rows (title, [(image, label, framed)]): the title above, a label below each
    image, as long as it fits, a green frame around the framed ones, and below all the legend."""
    margin, font = 8, ImageFont.load_default(max(11, tile // 9))
    line, width = font.size + 4, margin + max(len(tiles) for _, tiles in rows) * (tile + margin)
    letters = int((width - 2 * margin) / font.getlength("n"))                   # in a line of a title
    titles, legend = [textwrap.wrap(title, letters) for title, _ in rows], textwrap.wrap(legend, letters)
    heights = [len(lines) * line + tile + line + 2 * margin for lines in titles]
    sheet = Image.new("RGB", (width, sum(heights) + margin + line * len(legend)), "white")
    pen, bottom = ImageDraw.Draw(sheet), 0
    for lines, height, (_, tiles) in zip(titles, heights, rows):
        pen.text((margin, bottom + margin), "\n".join(lines), fill="black", font=font, spacing=4)
        bottom += height
        y = bottom - tile - line                            # where the images of this row begin
        for column, (image, label, framed) in enumerate(tiles):
            x = margin + column * (tile + margin)
            if framed:
                pen.rectangle((x - 4, y - 4, x + tile + 3, y + tile + 3), fill=(40, 160, 70))
                pen.rectangle((x, y, x + tile - 1, y + tile - 1), fill="white")
            image = ImageOps.contain(image.convert("RGB"), (tile, tile), Image.Resampling.LANCZOS)
            sheet.paste(image, (x + (tile - image.width) // 2, y + (tile - image.height) // 2))
            while font.getlength(label) > tile + margin:
                label = label[:-2] + "…"
            pen.text((x, y + tile + 4), label, fill=(90, 90, 90), font=font)
    pen.text((margin, bottom), "\n".join(legend), fill=(40, 160, 70), font=font, spacing=4)
    return sheet


def markdown(header, rows):
    """A table of texts."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# ---- weights from elsewhere --------------------------------------------------------------------
# Our name -> CLIP's name on Hugging Face, whose own spelling is pre_layrnorm (and FLIP's official
# code has post_layrnorm, too); replaced in this order (a longer name before one that it contains).
CLIP_NAMES = [
    ("class_token", "embeddings.class_embedding"), ("patch_embedding", "embeddings.patch_embedding"),
    ("positions", "embeddings.position_embedding.weight"), ("norm_before", "pre_layrnorm"),
    ("norm_after", "post_layernorm"), ("blocks.", "encoder.layers."),
    ("norm_attention", "layer_norm1"), ("norm_mlp", "layer_norm2"),
    (".attention.query", ".self_attn.q_proj"), (".attention.key", ".self_attn.k_proj"),
    (".attention.value", ".self_attn.v_proj"), (".attention.out", ".self_attn.out_proj"),
    (".up.", ".mlp.fc1."), (".down.", ".mlp.fc2.")]


def rename(name, table):
    for ours, theirs in table:
        name = name.replace(ours, theirs)
    return name


def read_weights(source):
    """{name: tensor} from a .safetensors, .bin, .pt or .pth file, a folder that holds a model, or a
    hub name. No code from the file is run."""
    path = find_file(source, ("model.safetensors", "pytorch_model.bin"))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: damaged, or not a file of weights ({type(error).__name__})") from error
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise ValueError(f"{path}: expected a dictionary of named tensors, found {type(weights).__name__}")
    return weights


def check_weights(module, weights, name_of, origin):
    """ValueError with what the module's state lacks in weights[name_of(entry)], what has another
    shape there or would be left over."""
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


@torch.no_grad()
def copy_weights(module, weights, name_of, origin):
    """Fill every entry of module's state with weights[name_of(entry)], or change nothing and say
    why."""
    check_weights(module, weights, name_of, origin)
    for ours, target in module.state_dict().items():
        target.copy_(weights[name_of(ours)])


def resize_positions(positions, patches):
    """Position table (1 + n, D) of a square grid of n patches -> (1 + patches, D), bicubic; the
    class token's row stays."""
    old, new = round((len(positions) - 1) ** 0.5), round(patches ** 0.5)
    if positions.ndim != 2 or old * old + 1 != len(positions):
        raise ValueError(f"a position table of shape {tuple(positions.shape)} is not that of a square grid "
                         f"and a class token")
    if old == new:
        return positions
    grid = positions[1:].T.reshape(1, -1, old, old)                                         # (1, D, old, old)
    grid = F.interpolate(grid.float(), size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid.flatten(2)[0].T.to(positions.dtype)])             # (1 + patches, D)


def load_clip(vit, source):
    """Fill `vit` with the image half of a CLIP from Hugging Face (file, folder or hub name)."""
    others = ("text_model.", "text_projection", "visual_projection", "logit_scale")
    weights = {name.removeprefix("vision_model."): tensor for name, tensor in read_weights(source).items()
               if not name.startswith(others) and not name.endswith("position_ids")}
    table = "embeddings.position_embedding.weight"
    if table in weights:
        weights[table] = resize_positions(weights[table], vit.config.patches)
    copy_weights(vit, weights, lambda name: rename(name, CLIP_NAMES), origin=str(source))


def main():
    parser = argparse.ArgumentParser(description="Show what the image encoder makes of one photograph.")
    parser.add_argument("image", nargs="?", help="an image file (default: a grey square)")
    parser.add_argument("--clip", help="weights: file, folder or hub name (openai/clip-vit-base-patch16)")
    args = parser.parse_args()
    config = ViTConfig()
    image = open_picture(args.image) if args.image else Image.new("RGB", (178, 218), "grey")
    vit = ViT(config).eval()
    if args.clip:
        load_clip(vit, args.clip)
    pixels = to_tensor([to_pixels(image, config.image_size)])
    with torch.no_grad():
        tokens, hidden = vit(pixels, return_hidden=True)
    print(f"image        {image.size[0]} x {image.size[1]} {image.mode}")
    print(f"pixels       {tuple(pixels.shape)}   normalised, {pixels.min():.2f} to {pixels.max():.2f}")
    for index, tokens_after in enumerate(hidden, start=1):
        length = tokens_after.norm(dim=-1).mean()
        print(f"block {index:2}     {tuple(tokens_after.shape)}   mean length of a token {length:.2f}")
    print(f"tokens       {tuple(tokens.shape)}   class token first, then {config.patches} patches")
    print(f"parameters   {sum(p.numel() for p in vit.parameters()):,}")


if __name__ == "__main__":
    run_script(main)
