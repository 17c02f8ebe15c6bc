"""Pictures: opened safely, decoded, cut out, read in batches, put on a sheet."""
import contextlib
import io
import textwrap
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from tqdm import tqdm

# CLIP's statistics of an RGB image in [0, 1]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
SCALE, OFFSET = 1 / (255 * STD), MEAN / STD     # one multiplication and one subtraction a pixel


def resize_to_array(image, size):
    """A PIL image -> uint8 (S, S, 3), resized without cropping (section 4.2)."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image.convert("RGB"))


def normalize_batch(pixels):
    """Pixels of B images, each uint8 (S, S, 3) -> float32 (B, 3, S, S), normalised."""
    return torch.from_numpy(np.stack(pixels)).float().mul_(SCALE).sub_(OFFSET).permute(0, 3, 1, 2)


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Not all that Pillow knows: for PostScript, for example, it starts another program, whatever the
# file's name says.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 2 ** 26        # larger pictures are refused: some are made to fill the memory


@contextlib.contextmanager
def checked_open(file, name):
    """A picture of which only the header has been read; ValueError with a sentence when the file is
    none, or turns out damaged. (Of a PIL image, which may be given, too, a copy.)"""
    try:
        with file.copy() if isinstance(file, Image.Image) else Image.open(file, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            if image.mode in ("I", "F") or image.mode.startswith("I;"):     # conversion would clip to white
                raise ValueError(f"its pixels are of kind {image.mode}; save it with 8 bits per channel")
            yield image
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture") from None
    except Exception as error:                      # Pillow raises OSError, SyntaxError and others
        raise ValueError(f"{name} cannot be read completely: {error}") from None


def read_image_size(file, name=None):
    """Width and height as stored, from the header alone."""
    with checked_open(file, name or file) as image:
        return image.size


def load_image(file, name=None, box=None, size=None):
    """An RGB image: the whole, upright as its camera noted, or what is in the box (x1, y1, x2, y2) of
    the pixels as they are stored.

    With a size, it is resized to size x size pixels (of which the outermost take a little from
    beyond the box). A JPEG that has at least twice as many each way is then decoded at a half, a
    quarter or an eighth, which its blocks of frequencies allow: several times as fast.
    """
    with checked_open(file, name or file) as image:
        full_width = image.width
        if size:
            x1, y1, x2, y2 = box or (0, 0, *image.size)
            reduction = max(1, int(min(x2 - x1, y2 - y1) / size))
            image.draft(None, (image.width // reduction, image.height // reduction))
        scale = round(full_width / image.width)                                             # 1, 2, 4 or 8
        if not box:
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode != "RGB":
            image = image.convert("RGB")
        if size:
            box = [min(edge / scale, most) for edge, most in zip(box, image.size * 2)] if box else None
            return image.resize((size, size), Image.Resampling.BICUBIC, box)
        return image.crop([round(edge) for edge in box or (0, 0, *image.size)])


class TarImage(NamedTuple):
    """A face in a picture in a tar; read from there, and cut out, whenever it is opened."""
    tar: Path
    name: str           # of the picture in the tar
    offset: int         # in bytes, where its file begins there
    length: int         # in bytes
    box: tuple = ()     # x1, y1, x2, y2 in pixels of the picture; (): all of it

    def __str__(self):
        return f"{self.tar}: {self.name}"

    def content(self, most=2**27):              # no photograph of a face has 128 MB
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(min(self.length, most)))

    def open(self, size=None):
        """The face as a PIL RGB image, whole or size x size; ValueError if the picture is damaged."""
        return load_image(self.content(), self, self.box, size)


def iterate_images(read, count, size, title, batch_size=128, show=True, errors=None):
    """Yield (numbers, pixels (B, 3, S, S)) of the pictures read(0, size), ..., read(count - 1, size),
    which are read on all cores while the batch before is used. With `lost`, a picture that cannot be
    read becomes an entry of it, {number: why}, and is left out."""
    def pixels_of(i):
        try:
            return resize_to_array(read(i, size), size)
        except ValueError as error:
            if errors is None:
                raise
            errors[i] = str(error)

    with ThreadPool() as pool:
        batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
        reading = [pool.map_async(pixels_of, numbers) for numbers in batches[:1]]
        bar = tqdm(batches, title, leave=False, disable=not show)
        for numbers, following in zip(bar, [*batches[1:], ()]):
            found = reading.pop().get()
            reading.append(pool.map_async(pixels_of, following))
            kept = [i for i, pixels in zip(numbers, found) if pixels is not None]
            if kept:
                yield kept, normalize_batch([pixels for pixels in found if pixels is not None])


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
