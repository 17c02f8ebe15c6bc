"""FaceCaption-15M as img2dataset downloads it."""
import contextlib
import functools
import json
import os
import tarfile

import numpy as np

from common.images import IMAGE_SUFFIXES, TarImage, read_image_size
from common.script import error_context
from readers.index import Record, collect_errors, read_json, split_by_hash


def read_facecaption(folder):
    """Tars of N.jpg and N.json, read in place: nothing is unpacked. Beside each lies a file that
    tells how many faces it should have, also where the tar itself is missing."""
    found = [*folder.glob("*.tar"), *folder.glob("*_stats.json")]
    stems = sorted({path.stem.removesuffix("_stats") for path in found})
    return [functools.partial(read_tar, folder / f"{stem}.tar") for stem in stems]


def read_tar(tar, errors):
    """Records of the faces in a tar. Every one is a face of its own, though several may be in one
    picture, from one address: the split goes by the address."""
    pictures, jsons, downloads = {}, {}, []
    for member in tar_members(tar, errors) if tar.exists() else ():
        stem, suffix = os.path.splitext(member.name)
        of_its_kind = pictures if suffix.lower() in IMAGE_SUFFIXES else jsons if suffix == ".json" else {}
        if of_its_kind.setdefault(stem, member) is not member:
            errors.append(f"named twice: {member}")
    for stem in pictures | jsons:
        with collect_errors(errors):
            downloads.append(parse_download(f"{tar}: {stem}", pictures.get(stem), jsons.get(stem)))
    padded = has_white_borders(downloads)
    for crop, record, stored, original in downloads:
        with collect_errors(errors):
            box = box_in_stored_image(crop, stored, original, padded)
            yield Record(str(crop), crop._replace(tar=tar.name, box=box), split_by_hash(str(record["url"])),
                         captions=record)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):     # what img2dataset counted
        count = json.loads(tar.with_name(f"{tar.stem}_stats.json").read_bytes())["successes"]
        errors += [f"missing: a face of {tar}"] * min(count - len(pictures | jsons), 10**6)


def tar_members(tar, errors):
    """The files in a tar, as Crops. (tarfile alone takes the first damaged header for the end; here
    the next good one is looked for.)"""
    at = expected = 0                           # where to look for a header, and where one should be
    size, block = tar.stat().st_size, tarfile.BLOCKSIZE
    with open(tar, "rb") as file:
        while at + block <= size:
            file.seek(at)
            try:
                member = tarfile.TarInfo.frombuf(file.read(block), "utf-8", "surrogateescape")
                end = at + block + -(-member.size // block) * block
                if not at < end <= size:
                    raise tarfile.TruncatedHeaderError("more than there is")
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
    if any(rest) or not 2 * block <= len(rest) < 2 * tarfile.RECORDSIZE:    # two empty ones are its end
        errors.append(f"damaged tar: {tar}, bytes {expected} to {size}, or the end is missing")


def parse_download(where, picture, text):
    """(crop, record, stored, original) of one face, from its picture and its json: the crop with a
    box in pixels of the original, and the sizes of the picture as it is and as it was before."""
    if not (picture and text):
        raise ValueError(f"half a face: {where} has no {'json' if picture else 'picture'}")
    with error_context("img2dataset's json, with the columns box, caption and url kept", f"json: {text}"):
        record = read_json(text.content().read())
        if record["status"] != "success":
            raise ValueError(f"the status is {record['status']}")
        box = json.loads(record["box"]) if isinstance(record["box"], str) else record["box"]
        x1, y1, x2, y2 = box = tuple(map(float, box))
        if not (x1 < x2 and y1 < y2 and record["url"]):
            raise ValueError(f"the box is {box} and the url {record['url']!r}")
        original = [int(record.get(f"original_{side}") or 0) for side in ("width", "height")]
    try:
        stored = read_image_size(picture.content(2**13))        # most headers are short
    except ValueError:
        stored = read_image_size(picture.content(), f"picture: {picture}")
    return picture._replace(box=box), record, stored, original if all(original) else stored


def box_in_stored_image(crop, stored, original, padded):
    """The box of a download in pixels of the picture as it is stored; ValueError where less than half
    of it is left.

    Boxes are of pictures as img2dataset reads them, not turned as the camera noted. It may have
    resized the picture as it was (--resize_mode keep_ratio), or to a square: all of it, with white
    on both sides (border, its default), or the middle (center_crop)."""
    scale, margin, box = np.divide(stored, original), 0, np.reshape(crop.box, (2, 2))   # (corner, x or y)
    if abs(scale[0] - scale[1]) * max(original) > 1:            # more than rounding: a square was made
        scale = scale.min() if padded else scale.max()
        margin = np.fix((stored - np.round(np.multiply(original, scale))) / 2)
    box = box * scale + margin
    inside = box.clip(0, stored)
    if not np.prod(inside[1] - inside[0]) >= np.prod(box[1] - box[0]) / 2:
        raise ValueError(f"box: {crop} had {original} pixels and has {stored}; of the box {crop.box} less "
                         f"than half is inside")
    return inside.ravel().round(2).tolist()


def has_white_borders(downloads):
    """Do white margins make squares of these pictures? A vote of some that were none."""
    votes = []
    for crop, _, stored, original in downloads:
        scale = min(np.divide(stored, original))
        x, y = ((have - round(scale * had)) // 2 for have, had in zip(stored, original))
        if max(x, y) >= 4 and len(votes) < 32:
            with contextlib.suppress(ValueError):
                pixels = np.asarray(crop._replace(box=()).open())
                votes.append((pixels[:y - 1] if y > x else pixels[:, :x - 1]).mean() > 250)
    return 2 * sum(votes) >= len(votes)
