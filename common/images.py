"""Images: decode, crop, load in batches."""
import contextlib
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

# CLIP's statistics of an RGB image in [0, 1]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
SCALE, OFFSET = 1 / (255 * STD), MEAN / STD     # (x / 255 - MEAN) / STD = x * SCALE - OFFSET


def resize_to_array(image: Image.Image, size):
    """A PIL image -> uint8 (S, S, 3), resized to a square without cropping (FLIP paper, section 4.2)."""
    if image.size != (size, size):                          # else PIL would copy the image
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def normalize_batch(pixels) -> torch.Tensor:
    """B arrays uint8 (S, S, 3) -> float32 (B, 3, S, S), normalised with CLIP's statistics."""
    return torch.from_numpy(np.stack(pixels)).float().mul_(SCALE).sub_(OFFSET).permute(0, 3, 1, 2)


def pixel_batches(images, size: int, batch_size: int = 128):
    """Yield pixels (B, 3, S, S) of a tensor of them, of a list of paths or PIL images, or of one image."""
    if isinstance(images, (str, Path, Image.Image)) or torch.is_tensor(images) and images.ndim == 3:
        images = images[None] if torch.is_tensor(images) else [images]
    for start in range(0, len(images), batch_size):
        batch = images[start:start + batch_size]
        yield batch if torch.is_tensor(batch) else normalize_batch(
            [resize_to_array(load_image(image, size=size), size) for image in batch])


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".avif", ".heic")


@contextlib.contextmanager
def open_image(file, name):
    """Open an image, reading only the header (a PIL image is copied), and yield it. Raises a ValueError that
    begins with `name` if the file is not an image, or if Pillow fails inside the block."""
    try:
        with file.copy() if isinstance(file, Image.Image) else Image.open(file) as image:
            if image.mode[0] in "IF":       # 16 or 32 bits, which convert("RGB") would clip to white
                raise ValueError(f"expected 8 bits per channel, found Pillow's mode {image.mode}; convert it")
            yield image
    except UnidentifiedImageError:
        hints = {".heic": "; convert HEIC to JPEG", ".avif": "; AVIF needs Pillow 11.3 or later"}
        hint = hints.get(Path(str(name)).suffix.lower(), "")
        raise ValueError(f"{name} is not an image{hint}") from None
    except Exception as error:          # Pillow raises many types; an OSError's text repeats the file's name
        raise ValueError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def load_image(file, name=None, box=None, size=None) -> Image.Image:
    """Load an RGB image from a path, binary file or PIL image: all of it, rotated by its EXIF orientation, or
    the box (x1, y1, x2, y2) in stored pixels. Raises ValueError if it is not an image or is damaged.

    With a size, resize to size x size (the outermost pixels blend in a little from outside the box). A JPEG
    at least twice that large is decoded at 1/2, 1/4 or 1/8 scale in the DCT domain, several times as fast."""
    with open_image(file, name or file) as image:
        full_width = image.width
        if size:
            x1, y1, x2, y2 = box or (0, 0, *image.size)
            reduction = max(1, int(min(x2 - x1, y2 - y1) / size))
            image.draft(None, (image.width // reduction, image.height // reduction))
        scale = round(full_width / image.width)     # 1, 2, 4 or 8
        if not box:
            ImageOps.exif_transpose(image, in_place=True)
        image.load()
    if image.has_transparency_data:                 # shown on white, not with its hidden colours
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if size:
        box = [min(edge / scale, limit) for edge, limit in zip(box, image.size * 2)] if box else None
        return image.resize((size, size), Image.Resampling.BICUBIC, box)
    return image.crop([round(edge) for edge in box]) if box else image


def iterate_images(read, count, size, title, batch_size=128, show=True):
    """Yield (indices, pixels (B, 3, S, S)) of the images read(0, size), ..., read(count - 1, size). Threads
    on all cores load the next batch while the caller uses this one."""
    with ThreadPool() as pool:
        load = lambda indices: pool.map_async(lambda i: resize_to_array(read(i, size), size), indices)
        batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
        pending = [load(indices) for indices in batches[:1]]
        bar = tqdm(batches, title, leave=False, disable=None if show else True)     # None: only on a terminal
        for indices, next_indices in zip(bar, [*batches[1:], ()]):
            pixels = pending.pop().get()
            pending.append(load(next_indices))
            yield indices, normalize_batch(pixels)
