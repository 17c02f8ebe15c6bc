"""Reader of FaceCaption-15M (arXiv 2407.08515, section 3) in img2dataset's tars, without unpacking them."""
import contextlib
import functools
import json
import os
import tarfile

import numpy as np

from common.images import IMAGE_SUFFIXES, TarImage, read_image_size
from common.script import error_context
from readers.index import Record, collect_errors, split_by_hash


def facecaption_jobs(folder):
    """One job per tar. A *_stats.json beside each tar counts its faces, so that a missing tar is noticed."""
    files = [*folder.glob("*.tar"), *folder.glob("*_stats.json")]
    stems = sorted({path.stem.removesuffix("_stats") for path in files})
    return [functools.partial(read_tar, folder / f"{stem}.tar") for stem in stems]


def read_tar(tar, errors: list):
    """Yield the records of the faces (N.jpg and N.json) in a tar. Each face counts as a person of its own.
    Faces from one image share its URL, so hashing the URL keeps them in one split."""
    images, jsons, downloads = {}, {}, []
    for member in tar_members(tar, errors) if tar.exists() else ():
        stem, suffix = os.path.splitext(member.name)
        by_stem = images if suffix.lower() in IMAGE_SUFFIXES else jsons if suffix == ".json" else {}
        if by_stem.setdefault(stem, member) is not member:
            errors.append(f"repeated name: {member}")
    for stem in images | jsons:
        with collect_errors(errors):
            downloads.append(parse_download(f"{tar}: {stem}", images.get(stem), jsons.get(stem)))
    padded = has_white_borders(downloads)
    for image, record, stored, original in downloads:
        with collect_errors(errors):
            box = box_in_stored_image(image, stored, original, padded)
            yield Record(str(image), image._replace(tar=tar.name, box=box), split_by_hash(str(record["url"])),
                         captions=record)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):     # img2dataset's count is optional
        count = json.loads(tar.with_name(f"{tar.stem}_stats.json").read_bytes())["successes"]
        errors += [f"missing face: {tar} holds fewer than counted"] * min(count - len(images | jsons), 10**6)


def tar_members(tar, errors: list):
    """Yield each regular file of a tar as a `TarImage`, even if it is not an image. The tarfile module takes
    the first damaged header for the end of the archive; this searches for the next valid one."""
    at = expected = 0                           # offsets: where to look for a header, where one is due
    size, block = tar.stat().st_size, tarfile.BLOCKSIZE
    with open(tar, "rb") as file:
        while at + block <= size:
            file.seek(at)
            try:
                member = tarfile.TarInfo.frombuf(file.read(block), "utf-8", "surrogateescape")
                end = at + block + -(-member.size // block) * block
                if not at < end <= size:
                    raise tarfile.TruncatedHeaderError("the file ends beyond the archive")
            except tarfile.HeaderError:
                at += block
                continue
            if at > expected:
                errors.append(f"damaged tar: {tar}, bytes {expected} to {at}")
            if member.isreg():
                yield TarImage(tar, member.name, at + block, member.size)
            at = expected = end
        file.seek(expected)
        rest = file.read(2 * tarfile.RECORDSIZE)
    if any(rest) or not 2 * block <= len(rest) < 2 * tarfile.RECORDSIZE:    # a tar ends with two empty blocks
        errors.append(f"damaged tar: {tar}, bytes {expected} to {size}, or the end is missing")


def parse_download(where: str, image: TarImage | None, text: TarImage | None):
    """(image with its box in original pixels, JSON record, stored size, original size) of a face. Raises
    ValueError if a file is missing or invalid."""
    if not (image and text):
        raise ValueError(f"incomplete face: {where} has no {'json' if image else 'image'}")
    with error_context("img2dataset's JSON with the columns box, caption and url", f"json: {text}"):
        record = json.loads(text.content().read())
        box = json.loads(record["box"]) if isinstance(record["box"], str) else record["box"]
        x1, y1, x2, y2 = box = tuple(map(float, box))
        if not (x1 < x2 and y1 < y2 and record["url"]):
            raise ValueError(f"found box {box} and url {record['url']!r}")
        original = [int(record.get(f"original_{side}") or 0) for side in ("width", "height")]
    stored = read_image_size(image.content(), f"image: {image}")
    return image._replace(box=box), record, stored, original if all(original) else stored


def box_in_stored_image(image: TarImage, stored, original, padded: bool):
    """Box [x1, y1, x2, y2] of a face in pixels of the stored image; sizes are (width, height). Boxes refer to
    the image as img2dataset decodes it, ignoring EXIF orientation. It may have scaled the image
    (--resize_mode keep_ratio), padded it with white to a square (border, its default) or cropped the central
    square (center_crop). Raises ValueError if less than half of the box is inside."""
    scale, margin, box = np.divide(stored, original), 0, np.reshape(image.box, (2, 2))      # (corner, x or y)
    if abs(scale[0] - scale[1]) * max(original) > 1:            # more than rounding: made square
        scale = scale.min() if padded else scale.max()
        margin = np.fix((stored - np.round(np.multiply(original, scale))) / 2)
    box = box * scale + margin
    inside = box.clip(0, stored)
    if not np.prod(inside[1] - inside[0]) >= np.prod(box[1] - box[0]) / 2:
        raise ValueError(f"box: {image}: expected at least half of {image.box} inside the image, found less "
                         f"(original size {original}, stored {stored})")
    return inside.ravel().round(2).tolist()


def has_white_borders(downloads: list):
    """Whether images were padded with white to squares: majority vote of up to 32 that were not square."""
    votes = []
    for image, _, stored, original in downloads:
        scale = min(np.divide(stored, original))
        x, y = ((after - round(scale * before)) // 2 for after, before in zip(stored, original))
        if max(x, y) >= 4 and len(votes) < 32:
            with contextlib.suppress(ValueError):
                pixels = np.asarray(image._replace(box=()).open())
                votes.append((pixels[:y - 1] if y > x else pixels[:, :x - 1]).mean() > 250)
    return 2 * sum(votes) >= len(votes)
