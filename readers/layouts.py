"""Readers of the supported data set layouts: each maps a path to `Record`s (see index.py)."""
import io
import json
import operator
import os
import pickle
import re
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from captions import ATTRIBUTES
from common.images import IMAGE_SUFFIXES, open_image
from common.script import naming
from readers.index import COLUMNS, SPLITS, Record, TarImage, files_of, split_by_hash, stable_hash


def load_json(path: Path, kind):
    """Contents of a JSON file, which must be of a kind: list or dict."""
    with naming(path):
        contents = json.loads(path.read_bytes())
        if not isinstance(contents, kind):
            raise ValueError(f"expected a JSON {kind.__name__}, found {contents!r:.100}")
        return contents


def hold_out_validation(records: list, fraction: float):
    """Move the last `fraction` of the training records, at least one, to the validation split."""
    training = [i for i, record in enumerate(records) if record.split == "train"]
    for i in training[-max(1, round(fraction * len(training))):]:
        records[i] = records[i]._replace(split="val")
    return records


# ---- faces with attributes -----------------------------------------------------------------------
def read_table(folder: Path, stem: str):
    """Yield (where, fields) for each line of stem.csv, if it exists, or of the space-separated stem.txt."""
    separator = "," if (folder / f"{stem}.csv").is_file() else None
    name = f"{stem}.csv" if separator else f"{stem}.txt"
    lines = (folder / name).read_text(encoding="utf-8-sig", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{name} line {number}", [*map(str.strip, line.replace('"', " ").split(separator))]


def read_attributes(folder: Path, stem: str):
    """Yield (where, image, values in CelebA's order) for each line of a table. Its header names the 40
    attributes, in any order and case, with spaces or underscores."""
    rows = read_table(folder, stem)
    where, header = next(rows, (stem, []))
    if len(header) == 1:                    # CelebA's .txt begins with the number of images
        where, header = next(rows, (where, []))
    names = [name.replace(" ", "_").lower() for name in header[-len(ATTRIBUTES):]]
    ordered = [name.lower() for name in ATTRIBUTES]
    if sorted(names) != sorted(ordered):
        raise ValueError(f"{where}: expected CelebA's 40 attribute names, found {' '.join(header):.200}")
    in_order = operator.itemgetter(*map(names.index, ordered))
    for where, (image, *values) in rows:
        if len(values) != len(names):
            raise ValueError(f"{where}: expected {len(names)} values, found {len(values)} ({image:.200})")
        yield where, image.replace("\\", "/"), in_order(values)


def read_celeba(folder: Path):
    """CelebA as distributed, or Kaggle's copy. Its identities are not used: each image is its own person."""
    splits = defaultdict(list)
    for _, (image, *numbers) in read_table(folder, "list_eval_partition"):
        splits[image] += numbers
    splits.pop("image_id", None)            # Kaggle's header
    for where, image, values in read_attributes(folder, "list_attr_celeba"):
        numbers = splits.pop(image, [])     # normally one
        if numbers in (["0"], ["1"], ["2"]):
            yield Record(where, image, SPLITS[int(numbers[0])], attributes=values)
        else:
            yield ValueError(f"{where} ({image}): expected 0, 1 or 2 in list_eval_partition, found {numbers}")
    if splits:
        raise ValueError(f"list_eval_partition: {len(splits)} images are missing from list_attr_celeba, "
                         f"the first is {next(iter(splits)):.200}")


def read_lfwa(folder: Path):
    """LFWA from csv files; an image's folder is the person. Images of the test list are dropped from the
    other one, which contains them in the official file. Without a test list, half of the persons are for
    testing, which is LFWA's own ratio. 5 % of the training persons are for validation."""
    rows = [*read_attributes(folder, "list_attr_lfwa")]
    has_test = (folder / "list_attr_lfwa_test.csv").is_file()
    test = [*read_attributes(folder, "list_attr_lfwa_test")] if has_test else []
    in_test = {image for _, image, _ in test}
    for where, image, values in [*test, *(row for row in rows if row[1] not in in_test)]:
        person_id = Path(image).parent.name
        number = stable_hash(person_id)
        is_test = image in in_test if has_test else number % 2 == 0
        split = "test" if is_test else "val" if number // 2 % 20 == 0 else "train"
        yield Record(where, image, split, person_id, values)


# ---- faces with captions -------------------------------------------------------------------------
def read_caption_lists(path: Path):
    """JSON lists in the format of BLIP and the official code: train.json, val.json and test.json of a folder,
    or its only list, or a given one, which is split by person, with at least one in the validation split.
    Equal ids mean the same person; an image without an id is a person of its own."""
    files = [path / f"{split}.json" for split in SPLITS]
    if not files[0].is_file():
        files = [path] if path.is_file() else sorted(path.glob("*.json"))
        if len(files) > 1:
            raise ValueError(f"{path}: expected train.json or one list, found {len(files)}; give one by name")
        if path.is_dir() and files[0].stem in SPLITS:       # val.json alone is not to be trained on
            raise ValueError(f"{path}: found {files[0].name}, but no train.json")
    records = []
    for file in filter(Path.is_file, files):
        for number, item in enumerate(load_json(file, list)):
            item = item if isinstance(item, dict) else {}
            image = item.get("image", item.get("photo"))
            person_id = item.get("image_id")
            image = os.path.normpath(image) if isinstance(image, str) else None
            is_missing = person_id is None or person_id != person_id        # NaN
            person_id = str(image if is_missing else person_id)
            split = split_by_hash(person_id) if len(files) == 1 else file.stem
            where = f"{file.name} record {number} (counted from 0)"
            records.append(Record(where, image, split, person_id, captions=item))
    if len(files) == 1 and records and "val" not in {record.split for record in records}:
        held_out = records[-1].person_id
        records = [record._replace(split="val") if record.person_id == held_out else record
                   for record in records]
    return records


class NamesOnly(pickle.Unpickler):
    """Unpickler for lists, texts and numbers only: importing anything else could run arbitrary code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"import of {module}.{name} refused")


def assign_celeba_hq_splits(folder: Path, captions: dict):
    """Records of {image number: texts}. Splits come from train/ and test/filenames.pickle or, if
    neither exists, from the image number; the last 5 % of the training split become "val"."""
    pickles = [folder / split / "filenames.pickle" for split in ("train", "test")]
    numbered = [(number, "train" if number < 24_000 else "test") for number in captions]
    if any(map(Path.exists, pickles)):
        numbered = []
        for path in pickles:
            with naming(path):
                names = NamesOnly(io.BytesIO(path.read_bytes())).load()
            for name in names:              # "1.jpg", b"1.jpg" or 1; of others, image -1 does not exist
                numbered.append((int(re.sub("[^0-9]", "", str(name)) or -1), path.parent.name))
    return hold_out_validation([
        Record(f"face {number}", f"{number}.jpg", split, captions={"caption": captions.get(number)})
        for number, split in sorted(numbered)], 0.05)


def read_mm_celeba(folder: Path):
    """MM-CelebA-HQ: images/N.jpg and text/celeba-caption/N.txt, one caption per line."""
    captions = defaultdict(list)
    for path in folder.glob("text/celeba-caption/*.txt"):
        if path.stem.isdecimal():           # 3.txt and 003.txt are the same face
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            captions[int(path.stem)] += map(str.strip, lines)
    return assign_celeba_hq_splits(folder, captions)


def read_celeba_dialog(folder: Path):
    """CelebA-Dialog: captions_hq.json and N.jpg in images/, image/ or the folder itself. The caption is the
    overall one or, if that is empty, the attribute-wise ones joined."""
    captions = {}
    for name, entry in load_json(folder / "captions_hq.json", dict).items():
        try:
            phrases = " ".join(entry.get("attribute_wise_captions", {}).values())
            captions[int(Path(name).stem)] = entry["overall_caption"].strip() or phrases.strip()
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            yield ValueError(f"captions_hq.json: {name!r:.100}: {error!r}")
    captions.pop(5380, None)                # its image was never distributed
    yield from assign_celeba_hq_splits(folder, captions)


# ---- photos with sketches ------------------------------------------------------------------------
def images_by_name(folder: Path):
    """{name: path}; photo1/image0110.jpg is "photo1_image0110" and, if that is unique, "image0110"."""
    paths = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            parts = path.relative_to(folder).with_suffix("").parts
            for first in range(len(parts)):
                paths["_".join(parts[first:])].append(path)
    return {name: matches[0] for name, matches in paths.items() if len(matches) == 1}


def read_fs2k(folder: Path):
    """FS2K: photo/photo1/image0110.jpg and its finished sketch, sketch/sketch1/sketch0110.*, as listed in
    anno_train.json and anno_test.json."""
    photos = images_by_name(folder / "photo")
    sketches = images_by_name(folder / "sketch")
    records = []
    for split in ("train", "test"):
        for item in load_json(folder / f"anno_{split}.json", list):
            image_name = item.get("image_name") if isinstance(item, dict) else item
            name = str(image_name).replace("/", "_")
            sketch = sketches.get(name.replace("photo", "sketch").replace("image", "sketch"))
            if sketch and name in photos:
                records.append(Record(f"anno_{split}.json", photos[name], split, sketches=[sketch]))
            else:
                yield ValueError(f"anno_{split}.json: no photo or no sketch is named {image_name!r:.100}")
    yield from with_captions(records, folder, photos)


def read_fs2k_sde(folder: Path):
    """FS2K-SDE: sketches sketch/{train,test}/<photo>_<step>.*, photos anywhere below photo/. <photo> is the
    file name without suffix or, if several folders have it, "photo1_image0110"."""
    photos = images_by_name(folder / "photo")
    records = []
    for split in ("train", "test"):
        drawn = defaultdict(dict)           # {photo: {step: sketch}}
        for sketch in sorted((folder / "sketch" / split).iterdir()):
            name, _, step = sketch.stem.rpartition("_")
            if name in photos and step.isdecimal():
                drawn[photos[name]][int(step)] = sketch
            else:
                yield ValueError(f"{sketch}: expected <photo>_<step>, found no such photo or no step")
        usual = Counter(map(frozenset, drawn.values())).most_common(1)
        for photo, steps in drawn.items():
            if steps.keys() == usual[0][0]:
                sketches = [steps[step] for step in sorted(steps)]
                records.append(Record(f"sketch/{split}", photo, split, sketches=sketches))
            else:
                yield ValueError(f"sketch/{split}: {photo} has other steps than most photos: {sorted(steps)}")
    yield from with_captions(records, folder, photos)


def with_captions(records: list, folder: Path, photos: dict):
    """The records sorted by photo, the last tenth of the training split as "val". A split has captions if
    train.json, test.json or captions.json, a list beside photo/, has any of its photos."""
    captions = defaultdict(lambda: defaultdict(list))
    for path in (folder / f"{name}.json" for name in ("train", "test", "captions")):
        for record in read_caption_lists(path) if path.is_file() else ():
            name = re.sub("^(.*/)?photo/", "", str(record.image)).replace("/", "_")
            photo = photos.get(name.rpartition(".")[0])     # None: of another split or data set
            for column in COLUMNS:
                texts = record.captions.get(column, [])
                captions[photo][column] += texts if isinstance(texts, list) else [texts]
    captioned = {record.split for record in records if record.image in captions}
    return hold_out_validation([
        record._replace(captions=captions.get(record.image, {}) if record.split in captioned else None)
        for record in sorted(records, key=operator.attrgetter("image"))], 0.1)


# ---- webdatasets ---------------------------------------------------------------------------------
TARS = "**/*.tar **/[0-9]*_stats.json"      # img2dataset counts the faces of each tar in a file beside it


def find_tars(folder: Path):
    """Paths of all tars, each by the shortest of its names (links may form loops), and of those that are gone
    but have left a *_stats.json."""
    for path in files_of(folder, "**/*.tgz **/*.tar.gz **/*.tar.bz2 **/*.tar.xz **/*.tar.zst"):
        raise ValueError(f"{path}: expected no compression; run gunzip, bunzip2, unxz or unzstd on it")
    names = {str(path).replace("_stats.json", ".tar") for path in files_of(folder, TARS)}
    names = sorted(names, key=lambda name: (len(name), name), reverse=True)
    return sorted({os.path.realpath(name): Path(name) for name in names}.values())


def read_tar(path: Path):
    """Yield the records of the faces in a tar of img2dataset or another webdataset, without unpacking it: the
    caption of key.jpg (or .png, ...) is in key.json or key.txt. Each face is a person of its own. A damaged
    or missing tar is printed, and what it lost is counted as far as img2dataset's *_stats.json tells."""
    samples = defaultdict(dict)
    num_faces = 0
    stats = path.with_name(f"{path.stem}_stats.json")
    members, is_whole = tar_members(path) if path.is_file() else ([], False)
    for member in members:
        folder, base = os.path.split(member.name)
        key, _, suffix = base.partition(".")                # webdataset's rule
        suffix = f".{suffix.lower()}"
        if key and suffix.endswith((*IMAGE_SUFFIXES, ".json", ".txt")):
            if samples[os.path.join(folder, key)].setdefault(suffix, member) is not member:
                yield ValueError(f"{path}: {member.name!r} occurs again")
    required = ".json" if any(".json" in files for files in samples.values()) else ".txt"
    for key, files in samples.items():
        try:
            yield read_sample(key, files, required)
            num_faces += 1
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            yield ValueError(f"{path}: {key!r}: {error}")
    counted = load_json(stats, dict).get("successes") if stats.is_file() else None
    lost = (max(1, len(samples)) if counted is None else counted) - len(samples)
    if lost or not is_whole:
        message = (f"{path} is damaged, cut off, compressed or missing: found {num_faces} faces, "
                   f"{stats.name} counts {counted}")
        print(message, flush=True)
        yield from [ValueError(message)] * max(1, lost)


def tar_members(path: Path):
    """(`TarImage`s of all files in a tar, images or not; whether it is undamaged). tarfile skips a damaged
    header and ends at a cut without a word. Hence every member must begin where the one before it ends, or
    after empty blocks, and such blocks must follow the last one."""
    members = []
    end = 0
    is_whole = True
    with open(path, "rb") as file:
        def is_empty(start, stop):
            file.seek(start)
            blocks = file.read(stop - start)
            return not blocks.strip(b"\0") or blocks[156:157] == b"g"      # PAX's header of the whole tar

        size = os.fstat(file.fileno()).st_size
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
    """The record of a face from its `files` {suffix: `TarImage`}. Faces of one image share its URL, so
    hashing that keeps them in one split. Raises ValueError, TypeError or AttributeError if it is invalid."""
    image = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)
    if not (image and required in files):
        raise ValueError(f"no {required if image else 'image'}")
    item = json.loads(files[".json"].content().read()) if ".json" in files else {}
    if ".txt" in files and not any(map(item.get, COLUMNS)):
        item["caption"] = files[".txt"].content().read().decode("utf-8-sig").strip()
    box, *original = map(item.get, ("box", "original_width", "original_height"))
    with open_image(image.content(), image) as opened:
        stored = opened.size
    if box is not None:
        box = json.loads(box) if isinstance(box, str) else box
        box = box_in_stored_image(box, stored, original if all(original) else stored)
    split = split_by_hash(str(item.get("url") or key))
    return Record(str(image), image._replace(box=box or ()), split, captions=item)


def box_in_stored_image(box, stored, original):
    """Box [x1, y1, x2, y2] of a face in pixels of the stored image; sizes are (width, height). Boxes refer to
    the image as img2dataset decodes it, ignoring EXIF orientation. It may have scaled the image
    (--resize_mode keep_ratio) and padded it with white to a square (border, its default). Raises ValueError
    if less than half of the box or a pixel of its side is inside."""
    scale, margin = [after / before for after, before in zip(stored, original)], [0, 0]     # of x and y
    if stored[0] == stored[1] and abs(scale[0] - scale[1]) * max(original) > 1:     # not only rounded
        scale = [min(scale)] * 2
        margin = [int((after - round(before * scale[0])) / 2) for after, before in zip(stored, original)]
    x1, y1, x2, y2 = (edge * factor + shift for edge, factor, shift in zip(box, scale * 2, margin * 2))
    inside = [min(max(edge, 0), limit) for edge, limit in zip((x1, y1, x2, y2), stored * 2)]
    width = inside[2] - inside[0]
    height = inside[3] - inside[1]
    if not (min(width, height) > 1 and width * height >= (x2 - x1) * (y2 - y1) / 2):
        raise ValueError(f"expected half of the box {box} inside the image of {original}, stored as {stored}")
    return [round(edge, 2) for edge in inside]


# ---- table of layouts ----------------------------------------------------------------------------
class Layout(NamedTuple):
    reads: str              # patterns of files and image folders that it reads; the first identifies it
    title: str              # name of the data set
    reader: object          # function: path -> iterator of `Record`s, and of ValueErrors for invalid ones
    image_folders: tuple = ("",)            # that may hold the images
    jobs: object = lambda path: [path]      # function: data set -> paths, which are read in parallel
    may_be_beside: bool = False             # its files may be beside those of an earlier row, which applies


LAYOUTS = (             # the first match applies; a JSON file given by name: the last row
    Layout("sketch/train sketch/test photo photo/*/ *.json", "FS2K-SDE", read_fs2k_sde),
    Layout("anno_*.json sketch sketch/*/ photo photo/*/ t*.json captions.json", "FS2K", read_fs2k),
    Layout("list_attr_celeba.* list_eval_partition.* img_align_celeba img_align_celeba/*/", "CelebA",
           read_celeba, ("img_align_celeba", "img_align_celeba/img_align_celeba")),          # Kaggle nests it
    Layout("list_attr_lfwa.csv list_attr_lfwa_test.csv lfw/*/", "LFWA", read_lfwa, ("lfw", "")),
    Layout("captions_hq.json images image", "CelebA-Dialog", read_celeba_dialog, ("images", "image", "")),
    Layout("text/celeba-caption/*.txt t*/*.pickle images", "MM-CelebA-HQ", read_mm_celeba, ("images",)),
    Layout("train.json val.json test.json **/", "JSON annotations", read_caption_lists, ("", "images")),
    Layout(TARS, "webdataset", read_tar, jobs=find_tars, may_be_beside=True),
    Layout("*.json **/", "JSON annotations", read_caption_lists, ("", "images"), may_be_beside=True),
)
