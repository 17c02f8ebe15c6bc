"""Reader of FaceCaption-15M (arXiv 2407.08515, section 3) in img2dataset's tars, and of any other webdataset,
without unpacking them: the caption of key.jpg (or .png, .webp, ...) is in key.json or key.txt beside it."""
import contextlib
import functools
import json
import re
import tarfile
from types import SimpleNamespace

import numpy as np

from common.images import IMAGE_SUFFIXES, TarImage, read_image_size
from common.script import error_context
from readers.index import COLUMNS, Record, collect_errors, split_by_hash


def facecaption_jobs(folder):
    """One job per tar, also in subfolders and compressed, which `tar_members` rejects. A *_stats.json beside
    each tar counts its faces, so that a missing tar is noticed. Raises ValueError if a subfolder is a link:
    links could form loops."""
    paths = sorted(folder.rglob("*"))
    for path in paths:
        if path.is_symlink() and path.is_dir():
            raise ValueError(f"{path}: expected tars, folders, or links to tars, found a link to a folder")
    names = {str(path.relative_to(folder)).replace("_stats.json", ".tar") for path in paths
             if re.search(r"(_stats\.json|\.tgz|\.tar(\.gz|\.bz2|\.xz|\.zst)?)$", path.name)}
    return [functools.partial(read_tar, folder, name) for name in sorted(names)]


def read_tar(folder, name, errors: list):
    """Yield the records of the faces in a tar. Each face counts as a person of its own. Faces from one image
    share its URL, so hashing the URL keeps them in one split; without URL, the key is hashed."""
    tar, faces, downloads = folder / name, {}, []       # faces: {key: {suffix: member}}
    for member in tar_members(tar, errors) if tar.is_file() else ():
        match = re.fullmatch(r"((?:.*/)?[^./]+)(\.[^/]+)", member.name, re.DOTALL)     # webdataset's rule
        suffix = match[2].lower() if match else ""
        if suffix.endswith((*IMAGE_SUFFIXES, ".json", ".txt")):
            if faces.setdefault(match[1], {}).setdefault(suffix, member) is not member:
                errors.append(f"repeated name: {member}")
    required = ".json" if any(".json" in files for files in faces.values()) else ".txt"
    for key, files in faces.items():
        with collect_errors(errors):
            downloads.append((key, *parse_download(f"{tar}: {key}", files, required)))
    padded = has_white_borders(downloads)
    for key, image, record, stored, original in downloads:
        split = split_by_hash(str(record.get("url") or key))
        with collect_errors(errors):
            box = box_in_stored_image(image, stored, original, padded) if image.box else ()
            yield Record(str(image), image._replace(tar=name, box=box), split, captions=record)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):     # img2dataset's count is optional
        count = json.loads(tar.with_name(f"{tar.stem}_stats.json").read_bytes())["successes"]
        errors += [f"missing face: {tar} holds fewer than counted"] * min(count - len(faces), 10**6)


def tar_members(tar, errors: list):
    """Yield each regular file of a tar as a `TarImage`, even if it is not an image. The tarfile module takes
    the first damaged header for the end of the archive; this searches for the next valid one, also after the
    end of an archive, two or more empty blocks. Raises ValueError if the tar is compressed."""
    at = expected = zeros = 0       # offsets where to look for a header and where one is due; empty blocks
    size, block = tar.stat().st_size, tarfile.BLOCKSIZE
    with open(tar, "rb") as file:
        if re.match(rb"\x1f\x8b\x08|BZh[1-9]1AY|\xfd7zXZ|\x28\xb5\x2f\xfd", file.read(block)):
            raise ValueError(f"{tar}: expected no compression; run gunzip, bunzip2, unxz or unzstd on it")
        # what `fromtarfile` needs of a tarfile.TarFile
        archive = SimpleNamespace(fileobj=file, encoding="utf-8", errors="surrogateescape", pax_headers={})
        while at < size:
            file.seek(at)
            try:
                member = tarfile.TarInfo.fromtarfile(archive)   # with GNU's or PAX's headers that precede it
                if member.issparse() or member.size < 0 or not at < archive.offset <= size:
                    raise tarfile.HeaderError("expected a complete file in this tar")
            except Exception:                                   # tarfile raises many types
                file.seek(at)
                zeros += not any(file.read(block))
                at += block
                continue
            if at > expected + zeros * block or zeros == 1:
                errors.append(f"damaged tar: {tar}, bytes {expected} to {at}")
            if member.isreg():
                yield TarImage(tar, member.name, member.offset_data, member.size)
            at, expected, zeros = archive.offset, archive.offset, 0
    if at > expected + zeros * block or zeros < 2:
        errors.append(f"damaged tar: {tar}, bytes {expected} to {size}, or the end is missing")


def parse_download(where: str, files: dict, required: str):
    """(image with its box in original pixels, if any, JSON record, stored size, original size) of a face.
    Raises ValueError if a file is missing or invalid."""
    image = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)
    if not (image and required in files):
        raise ValueError(f"incomplete face: {where} has no {required if image else 'image'}")
    with error_context("UTF-8 text or JSON, with a box [x1, y1, x2, y2] or none", f"annotation: {where}"):
        record = json.loads(files[".json"].content().read()) if ".json" in files else {}
        box, *original = map(record.get, ("box", "original_width", "original_height"))
        box = json.loads(box) if isinstance(box, str) else box
        x1, y1, x2, y2 = (0, 0, 1, 1) if box is None else box
        width, height = (1 if side is None else side for side in original)
        if not (all(type(x) in (int, float) and abs(x) < 2**31 for x in (x1, y1, x2, y2, width, height))
                and x1 < x2 and y1 < y2 and min(width, height) >= 1):
            raise ValueError(f"found box {box} and original size {original}"[:200])
        if ".txt" in files and not any(map(record.get, COLUMNS)):
            record["caption"] = files[".txt"].content().read().decode("utf-8-sig").strip()
    stored = read_image_size(image.content(), f"image: {image}")
    return image._replace(box=tuple(box or ())), record, stored, original if all(original) else stored


def box_in_stored_image(image: TarImage, stored, original, padded: bool):
    """Box [x1, y1, x2, y2] of a face in pixels of the stored image; sizes are (width, height). Boxes refer to
    the image as img2dataset decodes it, ignoring EXIF orientation. It may have scaled the image
    (--resize_mode keep_ratio), padded it with white to a square (border, its default) or cropped the central
    square (center_crop). Raises ValueError if less than half of the box or a pixel of its side is inside."""
    scale, margin, box = np.divide(stored, original), 0, np.reshape(image.box, (2, 2))      # (corner, x or y)
    if abs(scale[0] - scale[1]) * max(original) > 1:            # more than rounding: made square
        scale = scale.min() if padded else scale.max()
        margin = np.fix((stored - np.round(np.multiply(original, scale))) / 2)
    box = box * scale + margin
    inside, sides = box.clip(0, stored), np.diff(box.clip(0, stored), axis=0)
    if not (sides.min() > 1 and sides.prod() >= np.prod(box[1] - box[0]) / 2):
        raise ValueError(f"box: {image}: expected half of {image.box}, over a pixel, inside the image, found "
                         f"less (original size {original}, stored {stored})")
    return inside.ravel().round(2).tolist()


def has_white_borders(downloads: list):
    """Whether images were padded with white to squares: majority vote of up to 32 that were not square."""
    votes = []
    for _, image, _, stored, original in downloads:
        scale = min(np.divide(stored, original))
        x, y = ((after - round(scale * before)) // 2 for after, before in zip(stored, original))
        if max(x, y) >= 4 and len(votes) < 32:
            with contextlib.suppress(ValueError):
                pixels = np.asarray(image._replace(box=()).open())
                votes.append((pixels[:y - 1] if y > x else pixels[:, :x - 1]).mean() > 250)
    return 2 * sum(votes) >= len(votes)
