"""Decode, crop and resize images, and load them in batches of pixels."""
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
SCALE = 1 / (255 * STD)
OFFSET = MEAN / STD         # (x / 255 - MEAN) / STD = x * SCALE - OFFSET


def normalize_batch(images) -> torch.Tensor:
    """B RGB images, arrays uint8 (S, S, 3) or PIL images -> float32 (B, 3, S, S), normalised with
    CLIP's statistics."""
    pixels = torch.from_numpy(np.stack(images)).float()
    return pixels.mul_(SCALE).sub_(OFFSET).permute(0, 3, 1, 2)


def pixel_batches(images, size: int, batch_size: int = 128):
    """Yield normalised pixels (B, 3, S, S), at most batch_size at a time, of an image or a list of
    images (paths, PIL images or uint8 arrays (H, W, 3)). Pixels, (3, S, S) or (I, 3, S, S), or a
    list of these, are only divided into batches. Raises ValueError if they are integers."""
    if isinstance(images, (str, Path, Image.Image, np.ndarray)):
        images = [images]
    if len(images) and torch.is_tensor(images[0]):
        pixels = images if torch.is_tensor(images) else torch.stack(list(images))
        if not pixels.is_floating_point():
            raise ValueError(f"expected normalised pixels, found {pixels.dtype}; pass images as"
                             " paths, PIL images or arrays")
        if pixels.ndim == 3:
            pixels = pixels[None]
        yield from pixels.split(batch_size)
        return
    for start in range(0, len(images), batch_size):
        batch = [load_image(image, size=size) for image in images[start:start + batch_size]]
        yield normalize_batch(batch)


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".avif", ".heic")


@contextlib.contextmanager
def open_image(file, name):
    """Open an image, reading only its header, or copy a PIL image or uint8 array (H, W, 3), and
    yield it. Raises a ValueError that begins with `name` if the file is not an image, or if Pillow
    fails inside the block."""
    try:
        if isinstance(file, np.ndarray):
            file = Image.fromarray(file)
        with file.copy() if isinstance(file, Image.Image) else Image.open(file) as image:
            if image.mode[0] in "IF":       # 16 or 32 bits, which convert("RGB") would clip
                raise ValueError("expected 8 bits per channel, found Pillow's mode "
                                 f"{image.mode}; convert it")
            yield image
    except UnidentifiedImageError:
        hints = {".heic": "; convert HEIC to JPEG", ".avif": "; AVIF needs Pillow 11.3 or later"}
        hint = hints.get(Path(str(name)).suffix.lower(), "")
        raise ValueError(f"{name} is not an image{hint}") from None
    except Exception as error:              # Pillow raises many types
        reason = getattr(error, "strerror", None) or error      # an OSError's text repeats the name
        raise ValueError(f"{name} cannot be read: {reason}") from error


def load_image(file, name=None, box=None, size=None) -> Image.Image:
    """Load an RGB image from a path, binary file or PIL image: all of it, rotated by its EXIF
    orientation, or the box (x1, y1, x2, y2) in stored pixels. Raises ValueError if it is not an
    image or is damaged.

    If a size is given, the image is resized to size x size pixels, without cropping (FLIP paper,
    section 4.2); pixels just outside the box blend into the outermost ones. A JPEG at least twice
    as large is decoded at 1/2, 1/4 or 1/8 of its scale in the DCT domain, which is several times as
    fast."""
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
    image = image.convert("RGB")
    if box:
        box = [min(edge / scale, limit) for edge, limit in zip(box, image.size * 2)]
    if size:
        return image.resize((size, size), Image.Resampling.BICUBIC, box or None)
    if box:
        return image.crop([round(edge) for edge in box])
    return image


def iterate_images(read, count, size, title, batch_size=128, show=True):
    """Yield (indices, pixels (B, 3, S, S)) of the images read(0, size), ..., read(count - 1, size),
    in batches. Threads on all cores load the next batch while the caller uses this one."""
    def load_one(i):
        return load_image(read(i, size), size=size)

    indices = range(count)
    hide = None if show else True           # None: only shown on a terminal
    with ThreadPool() as pool:
        loading = pool.map_async(load_one, indices[:batch_size])
        for start in tqdm(indices[::batch_size], title, leave=False, disable=hide):
            images = loading.get()
            end = start + batch_size
            loading = pool.map_async(load_one, indices[end:end + batch_size])       # may be empty
            yield indices[start:end], normalize_batch(images)
