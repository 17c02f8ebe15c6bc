"""Readers of the supported data set layouts. Each maps a path to `Record`s (see index.py) and, in
place of invalid records, ValueErrors. Errors that concern the whole data set are raised."""
import io
import json
import os
import pickle
import re
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from captions import ATTRIBUTES
from common.images import IMAGE_SUFFIXES, open_image
from common.script import naming
from readers.index import COLUMNS, SPLITS, Record, TarImage, files_of, split_by_hash, stable_hash


def load_json(path: Path, kind):
    """Contents of a JSON file. Raises ValueError if they are not of this kind, list or dict."""
    with naming(path):
        contents = json.loads(path.read_bytes())
        if not isinstance(contents, kind):
            raise ValueError(f"expected a JSON {kind.__name__}, found {contents!r:.100}")
        return contents


def hold_out_validation(records: list, fraction: float):
    """Move the last `fraction` of the training records, at least one, to the validation split."""
    training = [record for record in records if record.split == "train"]
    for record in training[-max(1, round(fraction * len(training))):]:
        record.split = "val"
    return records


# ---- faces with attributes -----------------------------------------------------------------------
def read_table(folder: Path, stem: str):
    """Yield (where, fields) for each line of stem.csv or, if that does not exist, of stem.txt,
    whose fields are separated by spaces."""
    path = folder / f"{stem}.csv"
    separator = ","
    if not path.is_file():
        path = folder / f"{stem}.txt"
        separator = None
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip():
            fields = line.replace('"', " ").split(separator)
            yield f"{path.name} line {number}", [field.strip() for field in fields]


def read_attributes(folder: Path, stem: str):
    """Yield (where, image, values in CelebA's order) for each line of a table. Its header names the
    40 attributes, in any order and case, with spaces or underscores. Raises ValueError if names or
    values are missing."""
    rows = read_table(folder, stem)
    where, header = next(rows, (stem, []))
    if len(header) == 1:                    # CelebA's .txt begins with the number of images
        where, header = next(rows, (where, []))
    names = [name.replace(" ", "_").lower() for name in header[-len(ATTRIBUTES):]]
    ordered = [name.lower() for name in ATTRIBUTES]
    if sorted(names) != sorted(ordered):
        raise ValueError(f"{where}: expected CelebA's 40 attribute names, "
                         f"found {' '.join(header):.200}")

    column_of = [names.index(name) for name in ordered]
    for where, (image, *values) in rows:
        if len(values) != len(names):
            raise ValueError(f"{where}: expected {len(names)} values, "
                             f"found {len(values)} ({image:.200})")
        yield where, image.replace("\\", "/"), tuple(values[column] for column in column_of)


def read_celeba(folder: Path):
    """CelebA as distributed, or Kaggle's copy. Its identities are not used: each image is a person
    of its own."""
    splits = defaultdict(list)              # {image: its numbers, normally one}
    for _, (image, *numbers) in read_table(folder, "list_eval_partition"):
        splits[image] += numbers
    splits.pop("image_id", None)            # Kaggle's header
    for where, image, values in read_attributes(folder, "list_attr_celeba"):
        numbers = splits.pop(image, [])
        if numbers in (["0"], ["1"], ["2"]):
            yield Record(where, image, SPLITS[int(numbers[0])], attributes=values)
        else:
            yield ValueError(f"{where} ({image}): expected 0, 1 or 2 in list_eval_partition, "
                             f"found {numbers}")
    if splits:
        raise ValueError(f"list_eval_partition: {len(splits)} images are missing from "
                         f"list_attr_celeba, the first is {next(iter(splits)):.200}")


def read_lfwa(folder: Path):
    """LFWA from csv files; the name of an image's folder is the person. The official list_attr_lfwa
    also contains the images of the test list, which are left out here. Without a test list, half of
    the persons are the test split, as in LFWA itself. 5 % of the others are the validation
    split."""
    test = []
    if (folder / "list_attr_lfwa_test.csv").is_file():
        test = [*read_attributes(folder, "list_attr_lfwa_test")]
    in_test = {image for _, image, _ in test}
    rest = [row for row in read_attributes(folder, "list_attr_lfwa") if row[1] not in in_test]
    for where, image, values in test + rest:
        person_id = Path(image).parent.name
        number = stable_hash(person_id)
        is_test = image in in_test if test else number % 2 == 0
        if is_test:
            split = "test"
        elif number // 2 % 20 == 0:
            split = "val"
        else:
            split = "train"
        yield Record(where, image, split, person_id, values)


# ---- faces with captions -------------------------------------------------------------------------
def read_caption_splits(folder: Path):
    """The JSON lists train.json, val.json and test.json, see `read_caption_list`."""
    for split in SPLITS:
        file = folder / f"{split}.json"
        if file.is_file():
            yield from read_caption_list(file, split)


def read_single_caption_list(path: Path):
    """A folder's only JSON list, or a list given by name, see `read_caption_list`. It is split by
    person, with at least one person in the validation split. Raises ValueError if it is unclear
    which list to use."""
    files = [path] if path.is_file() else sorted(path.glob("*.json"))
    if len(files) > 1:
        raise ValueError(f"{path}: expected train.json or one list, found {len(files)}; "
                         "give one by name")
    [file] = files
    if path.is_dir() and file.stem in SPLITS:       # val.json alone is not to be trained on
        raise ValueError(f"{path}: found {file.name}, but no train.json")
    records = read_caption_list(file)
    if "val" not in {record.split for record in records}:
        for record in records:
            if record.person_id == records[-1].person_id:
                record.split = "val"
    return records


def read_caption_list(file: Path, split: str | None = None) -> list[Record]:
    """Records of a JSON list in the format of BLIP and the official code, all of one split, or by
    default split by person. Equal ids mean the same person; an image without an id is a person of
    its own."""
    records = []
    for number, item in enumerate(load_json(file, list)):
        item = item if isinstance(item, dict) else {}
        image = item.get("image", item.get("photo"))
        image = os.path.normpath(image) if isinstance(image, str) else None
        person_id = item.get("image_id")
        if person_id is None or person_id != person_id:         # NaN
            person_id = image
        person_id = str(person_id)
        where = f"{file.name} record {number} (counted from 0)"
        records.append(Record(where, image, split or split_by_hash(person_id), person_id,
                              captions=item))
    return records


class NamesOnly(pickle.Unpickler):
    """Unpickler for lists, texts and numbers. Other types need imports, which could run any
    code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"import of {module}.{name} refused")


def assign_celeba_hq_splits(folder: Path, captions: dict):
    """Records of {image number: texts}. Splits come from train/ and test/filenames.pickle or, if
    neither exists, from the image number. The last 5 % of the training split become "val"."""
    numbered = []
    pickles = [folder / split / "filenames.pickle" for split in ("train", "test")]
    if any(path.exists() for path in pickles):
        for path in pickles:
            with naming(path):
                names = NamesOnly(io.BytesIO(path.read_bytes())).load()
            for name in names:              # "1.jpg", b"1.jpg" or 1
                digits = re.sub("[^0-9]", "", str(name))
                numbered.append((int(digits or -1), path.parent.name))      # no image has number -1
    else:
        for number in captions:
            numbered.append((number, "train" if number < 24_000 else "test"))
    records = []
    for number, split in sorted(numbered):
        texts = {"caption": captions.get(number)}
        records.append(Record(f"face {number}", f"{number}.jpg", split, captions=texts))
    return hold_out_validation(records, 0.05)


def read_mm_celeba(folder: Path):
    """MM-CelebA-HQ: image N is images/N.jpg, its captions the lines of
    text/celeba-caption/N.txt."""
    captions = defaultdict(list)
    for path in folder.glob("text/celeba-caption/*.txt"):
        if path.stem.isdecimal():           # 3.txt and 003.txt are the same face
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            captions[int(path.stem)] += [line.strip() for line in lines]
    return assign_celeba_hq_splits(folder, captions)


def read_celeba_dialog(folder: Path):
    """CelebA-Dialog: captions_hq.json, and N.jpg in images/, image/ or the folder itself. The
    caption is the overall one or, if that is empty, the attribute-wise captions joined."""
    captions = {}
    for name, entry in load_json(folder / "captions_hq.json", dict).items():
        try:
            phrases = " ".join(entry.get("attribute_wise_captions", {}).values())
            caption = entry["overall_caption"].strip() or phrases.strip()
            captions[int(Path(name).stem)] = caption
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            yield ValueError(f"captions_hq.json: {name!r:.100}: {error!r}")
    captions.pop(5380, None)                # its image was never distributed
    yield from assign_celeba_hq_splits(folder, captions)


# ---- photos with sketches ------------------------------------------------------------------------
def images_by_name(folder: Path):
    """{name: path} of the images below a folder: photo1/image0110.jpg is named "photo1_image0110"
    and, if no other file has this name, "image0110"."""
    paths = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            parts = path.relative_to(folder).with_suffix("").parts
            for first in range(len(parts)):
                paths["_".join(parts[first:])].append(path)
    return {name: matches[0] for name, matches in paths.items() if len(matches) == 1}


def read_fs2k(folder: Path):
    """FS2K: photos such as photo/photo1/image0110.jpg and one sketch each,
    sketch/sketch1/sketch0110.*, as listed in anno_train.json and anno_test.json."""
    photos = images_by_name(folder / "photo")
    sketches = images_by_name(folder / "sketch")
    records = []
    for split in ("train", "test"):
        for item in load_json(folder / f"anno_{split}.json", list):
            image_name = item.get("image_name") if isinstance(item, dict) else item
            name = str(image_name).replace("/", "_")
            sketch = sketches.get(name.replace("photo", "sketch").replace("image", "sketch"))
            where = f"anno_{split}.json"
            if sketch and name in photos:
                records.append(Record(where, photos[name], split, sketches=[sketch]))
            else:
                yield ValueError(f"{where}: no photo or no sketch is named {image_name!r:.100}")
    yield from with_captions(records, folder, photos)


def read_fs2k_sde(folder: Path):
    """FS2K-SDE: sketches sketch/{train,test}/<photo>_<stage>.*, photos anywhere below photo/, named
    as by `images_by_name`. Every photo needs the stages that most photos have."""
    photos = images_by_name(folder / "photo")
    records = []
    for split in ("train", "test"):
        drawn = defaultdict(dict)           # {photo: {stage: sketch}}
        for sketch in sorted((folder / "sketch" / split).iterdir()):
            name, _, stage = sketch.stem.rpartition("_")
            if name in photos and stage.isdecimal():
                drawn[photos[name]][int(stage)] = sketch
            else:
                yield ValueError(f"{sketch}: expected <photo>_<stage>, "
                                 "found no such photo or no stage")
        counts = Counter(frozenset(stages) for stages in drawn.values())
        usual = max(counts, key=counts.get, default=None)
        for photo, stages in drawn.items():
            where = f"sketch/{split}"
            numbers = sorted(stages)
            if stages.keys() == usual:
                sketches = [stages[number] for number in numbers]
                records.append(Record(where, photo, split, sketches=sketches))
            else:
                yield ValueError(f"{where}: {photo} has other stages than most photos: {numbers}")
    yield from with_captions(records, folder, photos)


def with_captions(records: list, folder: Path, photos: dict):
    """The records sorted by photo, the last 10 % of the training split as "val". Captions come from
    the lists train.json, test.json and captions.json beside photo/. If a photo of a split has
    captions, all its photos need them."""
    captions = defaultdict(lambda: defaultdict(list))       # {photo: {column: texts}}
    for path in files_of(folder, "train.json test.json captions.json"):
        for record in read_caption_list(path):
            name = re.sub("^(.*/)?photo/", "", str(record.image)).replace("/", "_")
            photo = photos.get(name.rpartition(".")[0])     # None: of another split or data set
            for column in COLUMNS:
                texts = record.captions.get(column, [])
                captions[photo][column] += texts if isinstance(texts, list) else [texts]

    records = sorted(records, key=lambda record: record.image)
    captioned = {record.split for record in records if record.image in captions}
    for record in records:
        if record.split in captioned:
            record.captions = captions[record.image]
    return hold_out_validation(records, 0.1)


# ---- webdatasets ---------------------------------------------------------------------------------
TARS = "**/*.tar **/[0-9]*_stats.json"      # img2dataset counts the faces of N.tar in N_stats.json


def find_tars(folder: Path):
    """Paths of all tars, and of missing tars that have a *_stats.json. Links may form loops, so
    each tar is returned once, by the shortest of its paths. Raises ValueError if a tar is
    compressed."""
    compressed = files_of(folder, "**/*.tgz **/*.tar.gz **/*.tar.bz2 **/*.tar.xz **/*.tar.zst")
    if compressed:
        raise ValueError(f"{compressed[0]}: expected no compression; run gunzip, bunzip2, unxz or "
                         "unzstd on it")
    names = {str(path).replace("_stats.json", ".tar") for path in files_of(folder, TARS)}
    shortest = {}
    for name in sorted(names, key=lambda name: (len(name), name)):
        shortest.setdefault(os.path.realpath(name), Path(name))
    return sorted(shortest.values())


def read_tar(path: Path):
    """Yield the records of the faces in a tar of img2dataset or another webdataset, without
    unpacking it: the caption of key.jpg (or .png, ...) is in key.json or key.txt. Each face is a
    person of its own. A damaged or missing tar is named, and a ValueError is yielded for each face
    that it lost: those that img2dataset's *_stats.json counts, or at least one."""
    members = []
    is_whole = False
    if path.is_file():
        members, is_whole = tar_members(path)
    samples, repeated = group_by_key(members)
    for member in repeated:
        yield ValueError(f"{path}: {member.name!r} occurs again")

    has_json = any(".json" in files for files in samples.values())
    required = ".json" if has_json else ".txt"
    num_faces = 0
    for key, files in samples.items():
        try:
            yield read_sample(key, files, required)
            num_faces += 1
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            yield ValueError(f"{path}: {key!r}: {error}")

    stats = path.with_name(f"{path.stem}_stats.json")
    counted = load_json(stats, dict).get("successes") if stats.is_file() else None
    expected = max(1, len(samples)) if counted is None else counted
    lost = expected - len(samples)
    if lost or not is_whole:
        message = (f"{path} is damaged, cut off, compressed or missing: found {num_faces} faces, "
                   f"{stats.name} counts {counted}")
        print(message, flush=True)
        yield from [ValueError(message)] * max(1, lost)


def group_by_key(members: list[TarImage]):
    """The files of each sample, {key: {suffix: `TarImage`}}, and the files whose name occurs again.
    Files of other types are ignored."""
    samples = defaultdict(dict)
    repeated = []
    for member in members:
        folder, base = os.path.split(member.name)
        key, _, suffix = base.partition(".")                # webdataset's rule
        suffix = f".{suffix.lower()}"
        if not key or not suffix.endswith((*IMAGE_SUFFIXES, ".json", ".txt")):
            continue
        files = samples[os.path.join(folder, key)]
        if suffix in files:
            repeated.append(member)
        else:
            files[suffix] = member
    return samples, repeated


def tar_members(path: Path):
    """`TarImage`s of all files in a tar, images or not, and whether the tar is undamaged.

    tarfile skips damaged headers, and ends at a cut, without an error. So every member must begin
    where the previous one ends, or after empty blocks, and empty blocks must follow the last
    member."""
    members = []
    end = 0                         # of the last member, in bytes
    is_whole = True
    size = path.stat().st_size
    with open(path, "rb") as file:
        def is_empty(start, stop):
            file.seek(start)
            blocks = file.read(stop - start)
            is_global_header = blocks[156:157] == b"g"      # PAX's header of the whole tar
            return is_global_header or not blocks.strip(b"\0")

        try:
            archive = tarfile.open(fileobj=file, mode="r:", ignore_zeros=True)
            while member := archive.next():
                is_whole &= is_empty(end, member.offset)
                end = archive.offset
                if member.isreg() and end <= size:
                    members.append(TarImage(path, member.name, member.offset_data, member.size))
        except tarfile.TarError:
            is_whole = False
        return members, is_whole and end < size and is_empty(end, size)


def read_sample(key: str, files: dict, required: str):
    """The record of a face from its files, {suffix: `TarImage`}. The faces of one image are in one
    split, because the split is a hash of its URL. Raises ValueError, TypeError or AttributeError if
    the face is invalid."""
    images = [files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files]
    if not images:
        raise ValueError("no image")
    if required not in files:
        raise ValueError(f"no {required}")
    image = images[0]
    item = {}
    if ".json" in files:
        item = json.loads(files[".json"].content().read())
    if ".txt" in files and not any(item.get(column) for column in COLUMNS):
        item["caption"] = files[".txt"].content().read().decode("utf-8-sig").strip()

    with open_image(image.content(), image) as opened:
        stored = opened.size
    box = item.get("box")
    if box is not None:
        if isinstance(box, str):
            box = json.loads(box)
        original = (item.get("original_width"), item.get("original_height"))
        if not all(original):
            original = stored
        image = image._replace(box=box_in_stored_image(box, stored, original))
    split = split_by_hash(str(item.get("url") or key))
    return Record(str(image), image, split, captions=item)


def box_in_stored_image(box, stored, original):
    """Convert the box [x1, y1, x2, y2] of a face from pixels of the original image to pixels of the
    stored one; sizes are (width, height). img2dataset ignores EXIF orientation. It may have scaled
    the image (--resize_mode keep_ratio) and padded it with white to a square (border, its default).
    Raises ValueError if less than half of the box, or at most one row or column of pixels, is
    inside."""
    scales = np.divide(stored, original)                            # of x and y
    margins = 0
    differs = abs(scales[0] - scales[1]) * max(original) > 1        # by more than rounding
    if stored[0] == stored[1] and differs:                          # padded
        scales = scales.min()
        margins = (stored[0] - np.round(np.multiply(original, scales))) // 2

    corners = np.reshape(box, (2, 2)) * scales + margins            # x1, y1; x2, y2
    inside = np.clip(corners, 0, stored)
    whole_size = corners[1] - corners[0]
    size = inside[1] - inside[0]
    is_inside = size.min() > 1 and size.prod() >= whole_size.prod() / 2
    if not is_inside:
        raise ValueError(f"expected half of the box {box} inside the image of {original}, "
                         f"stored as {stored}")
    return [round(edge, 2) for edge in inside.ravel().tolist()]


# ---- table of layouts ----------------------------------------------------------------------------
class Layout(NamedTuple):
    reads: str              # patterns of its files and image folders; the first one identifies it
    title: str              # name of the data set
    reader: object          # function: path -> iterator of `Record`s and ValueErrors
    image_folders: tuple = ("",)            # that may hold the images
    jobs: object = lambda path: [path]      # function: data set -> paths to read in parallel
    may_be_beside: bool = False             # its files may be beside those of an earlier row


LAYOUTS = (             # the first match applies, and the last row to a JSON file given by name
    Layout("sketch/train sketch/test photo photo/*/ *.json",
           "FS2K-SDE", read_fs2k_sde),
    Layout("anno_*.json sketch sketch/*/ photo photo/*/ t*.json captions.json",
           "FS2K", read_fs2k),
    Layout("list_attr_celeba.* list_eval_partition.* img_align_celeba img_align_celeba/*/",
           "CelebA", read_celeba, ("img_align_celeba", "img_align_celeba/img_align_celeba")),
    Layout("list_attr_lfwa.csv list_attr_lfwa_test.csv lfw/*/",
           "LFWA", read_lfwa, ("lfw", "")),
    Layout("captions_hq.json images image",
           "CelebA-Dialog", read_celeba_dialog, ("images", "image", "")),
    Layout("text/celeba-caption/*.txt t*/*.pickle images",
           "MM-CelebA-HQ", read_mm_celeba, ("images",)),
    Layout("train.json val.json test.json **/",
           "JSON annotations", read_caption_splits, ("", "images")),
    Layout(TARS,
           "webdataset", read_tar, jobs=find_tars, may_be_beside=True),
    Layout("*.json **/",
           "JSON annotations", read_single_caption_list, ("", "images"), may_be_beside=True),
)
