"""Readers of the supported data set layouts: each maps a folder to `Record`s (see index.py)."""
import functools
import io
import json
import operator
import os
import pickle
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from captions import ATTRIBUTES
from common.images import IMAGE_SUFFIXES
from common.script import error_context
from readers.index import COLUMNS, SPLITS, Record, split_by_hash, stable_hash, validate_files
from readers.tars import facecaption_jobs


# ---- shared by the readers -----------------------------------------------------------------------
def hold_out_validation(records: list, fraction: float):
    """Move the last `fraction` of the training records, at least one, to the validation split."""
    training = [i for i, record in enumerate(records) if record.split == "train"]
    for i in training[-max(1, round(fraction * len(training))):]:
        records[i] = records[i]._replace(split="val")
    return records


def json_records(path: Path):
    """Yield (where, item) for each item of a JSON list."""
    with error_context("a JSON list", path):
        records = json.loads(path.read_bytes())
        if not isinstance(records, list):
            raise ValueError(f"found a {type(records).__name__}")
    for number, record in enumerate(records):
        yield f"{path.name} record {number} (counted from 0)", record


# ---- faces with attributes -----------------------------------------------------------------------
def read_table(folder: Path, stem: str):
    """Yield (where, fields) for each line of stem.csv, if it exists, or of the space-separated stem.txt."""
    separator = "," if (folder / f"{stem}.csv").is_file() else None
    name = f"{stem}.csv" if separator else f"{stem}.txt"
    lines = (folder / name).read_text(encoding="utf-8-sig", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{name} line {number}", [*map(str.strip, line.replace('"', " ").split(separator))]


def attribute_records(rows, split_of=lambda image: ""):
    """Yield records from an iterator of (where, [image, value, value, ...]). The first row is the header: the
    40 attribute names in any order and case, with spaces or underscores."""
    num_images, expected, (where, header) = 0, None, next(rows, ("the annotation file", []))
    if len(header) == 1:                    # CelebA's .txt begins with the number of images
        expected, (where, header) = header[0], next(rows, (where, []))
    names = [name.strip().replace(" ", "_").lower() for name in header[-len(ATTRIBUTES):]]
    ordered = [name.lower() for name in ATTRIBUTES]
    if sorted(names) != sorted(ordered):
        raise ValueError(f"{where}: expected CelebA's 40 attribute names, found {' '.join(header):.200}")
    in_order = operator.itemgetter(*(names.index(name) for name in ordered))
    for num_images, (where, (image, *values)) in enumerate(rows, 1):
        if len(values) != len(names):
            raise ValueError(f"{where}: expected {len(names)} values, found {len(values)} ({image:.200})")
        image = image.replace("\\", "/")
        yield Record(where, image, split_of(image), attribute_values=in_order(values))
    if expected not in (None, str(num_images)):
        raise ValueError(f"{where}: expected {expected:.200} images, as line 1 says, found {num_images}")


def read_celeba(folder: Path):
    """CelebA as distributed, or Kaggle's copy. Its identities are not used: each image is its own person."""
    names, splits = dict(zip("012", SPLITS)), {}
    for _, (image, *numbers) in read_table(folder, "list_eval_partition"):
        numbers = [splits[image], *numbers] if image in splits else numbers     # normally one
        splits[image] = " and ".join(numbers)
    splits.pop("image_id", None)            # Kaggle's header
    yield from attribute_records(read_table(folder, "list_attr_celeba"), lambda image: names.get(
        number := splits.pop(image, "none")) or f"{number:.200} in list_eval_partition")
    if splits:
        raise ValueError(f"list_eval_partition: {len(splits)} images are missing from list_attr_celeba, "
                         f"the first is {next(iter(splits)):.200}")


def assign_lfwa_splits(train, test):
    """Yield LFWA's records with splits and persons (the image's folder). 5 % of the training persons become
    "val". Test images are dropped from `train`, which contains them in the official file. If `test` is empty,
    half of the persons become the test split, which is LFWA's own ratio."""
    test_images = {record.image for record in test}
    for record in [*test, *(record for record in train if record.image not in test_images)]:
        person_id = Path(record.image).parent.name
        number = stable_hash(person_id)
        is_test = record.image in test_images or (not test and number % 2 == 0)
        split = "test" if is_test else "val" if number // 2 % 20 == 0 else "train"
        yield record._replace(split=split, person_id=person_id)


def read_lfwa_lists(folder: Path):
    """LFWA from csv files, with or without one for the test split."""
    has_test = (folder / "list_attr_lfwa_test.csv").is_file()
    test = [*attribute_records(read_table(folder, "list_attr_lfwa_test"))] if has_test else []
    return assign_lfwa_splits(attribute_records(read_table(folder, "list_attr_lfwa")), test)


def read_lfwa_matlab(folder: Path):
    """LFWA from its authors' MATLAB 7.3 files: one with all faces, one with the face numbers of both splits.
    These are HDF5 files, the only ones that need h5py. HDF5 reverses a matrix's axes and stores a text as a
    reference to its character codes."""
    import h5py
    faces, splits = folder / "lfw_att_40.mat", folder / "indices_train_test.mat"
    kind = "a complete MATLAB 7.3 file (HDF5, saved with -v7.3)"
    with error_context(f"{kind} with name, AttrName and label", faces):
        file = h5py.File(faces)
        names, header = (["".join(map(chr, file[text][()].flat)) for text in file[variable][()].flat]
                         for variable in ("name", "AttrName"))
        labels = file["label"][()].T
        labels = labels if len(labels) == len(names) else labels.T
        rows = [(f"{faces.name} row {n} (counted from 1)", [name, *(f"{value:g}" for value in row)])
                for n, (name, row) in enumerate(zip(names, labels, strict=True), 1)]
    records = dict(enumerate(attribute_records(iter([(f"{faces.name} AttrName", header), *rows])), 1))
    with error_context(f"{kind} with indices_img_train and indices_img_test, from 1 to {len(names)}", splits):
        file = h5py.File(splits)
        train, test = ([records[int(n)] for n in file[variable][()].flat]
                       for variable in ("indices_img_train", "indices_img_test"))
    return assign_lfwa_splits(train, test)


# ---- faces with captions -------------------------------------------------------------------------
def read_caption_list(path: Path, split=None):
    """Yield the records of a JSON list in the format of BLIP and the official code. Equal ids are the same
    person; an image without an id is a person of its own. Without `split`, persons are split by hash."""
    for where, record in json_records(path):
        with error_context('{"image": path, "image_id": id, "caption": text or list of texts}', where):
            image = record.get("image", record.get("photo"))            # "photo": FS2K-SDE
            image = os.path.normpath(image) if isinstance(image, str) else image
            person_id = str(image if record.get("image_id") is None else record["image_id"])
        yield Record(where, image, split or split_by_hash(person_id), person_id, captions=record)


def read_caption_lists(path: Path):
    """train.json, val.json and test.json of a folder, or its only JSON file, or the given file."""
    if (path / "train.json").is_file():
        for split in SPLITS:
            if (path / f"{split}.json").is_file():
                yield from read_caption_list(path / f"{split}.json", split)
    else:
        files = [path] if path.is_file() else sorted(path.glob("*.json"))
        if len(files) > 1:
            raise ValueError(f"expected train.json or one JSON file, found {len(files)}; give one by name")
        yield from read_caption_list(files[0])


class NamesOnly(pickle.Unpickler):
    """Unpickler for lists, texts and numbers only: importing anything else could run arbitrary code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"import of {module}.{name} refused")


def assign_celeba_hq_splits(folder: Path, captions: dict):
    """Records of {image number: captions}. Splits come from train/ and test/filenames.pickle or, if neither
    exists, from the image number; the last 5 % of the training split become "val"."""
    pickles, numbered = {split: folder / split / "filenames.pickle" for split in ("train", "test")}, []
    if any(path.exists() for path in pickles.values()):
        for split, path in pickles.items():
            with error_context("a pickled list of names such as '123.jpg' in train/ and in test/", path):
                for name in NamesOnly(io.BytesIO(path.read_bytes())).load():
                    text = name.decode() if isinstance(name, bytes) else str(name)
                    numbered.append((int(Path(text).stem), split))
    else:
        numbered = [(number, "train" if number < 24_000 else "test") for number in captions]
    return hold_out_validation([
        Record(f"face {n!s:.200}", f"{n}.jpg", split, captions={"caption": captions.get(n, [])})
        for n, split in sorted(numbered)], 0.05)


def read_mm_celeba(folder: Path):
    """MM-CelebA-HQ: images/N.jpg and text/celeba-caption/N.txt, one caption per line."""
    captions = {}
    for path in folder.glob("text/celeba-caption/*.txt"):
        if path.stem.isdecimal():
            texts = captions.setdefault(int(path.stem), [])     # 3.txt and 003.txt are the same face
            texts += map(str.strip, path.read_text(encoding="utf-8", errors="replace").splitlines())
    return assign_celeba_hq_splits(folder, captions)


def read_celeba_dialog(folder: Path):
    """CelebA-Dialog: captions_hq.json and N.jpg in images/, image/ or the folder itself (5380.jpg was never
    distributed). The caption is the overall one or, if that is empty, the attribute-wise ones joined."""
    path, captions = folder / "captions_hq.json", {}
    with error_context("a JSON dictionary", path):
        records = json.loads(path.read_bytes()).items()
    for name, entry in records:
        where = f"{path.name} record {name!r:.200}"
        with error_context('"0.jpg": {"overall_caption": text, "attribute_wise_captions": texts}', where):
            overall, phrases = entry.get("overall_caption") or "", entry.get("attribute_wise_captions") or {}
            texts = captions.setdefault(int(Path(name).stem), [])
            texts.append(overall.strip() or " ".join(phrases.values()).strip())
    if not any((folder / subfolder / "5380.jpg").is_file() for subfolder in ("images", "image", ".")):
        captions.pop(5380, None)            # its image was never distributed
    return assign_celeba_hq_splits(folder, captions)


# ---- photos with sketches ------------------------------------------------------------------------
def images_below(folder: Path):
    """Yield (path, path components below `folder`, without suffix) of every image, in sorted order."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            yield path, path.relative_to(folder).with_suffix("").parts


def images_by_name(folder: Path):
    """{name: path}; photo1/image0110.jpg is "photo1_image0110" and, if that is unique, "image0110"."""
    paths = {}
    for path, parts in images_below(folder):
        for first in range(len(parts)):
            paths.setdefault("_".join(parts[first:]), []).append(path)
    return {name: matches[0] for name, matches in paths.items() if len(matches) == 1}


def read_fs2k(folder: Path):
    """FS2K: photo/photo1/image0110.jpg and its finished sketch, sketch/sketch1/sketch0110.*, as listed in
    anno_train.json and anno_test.json."""
    photos, sketches = images_by_name(folder / "photo"), images_by_name(folder / "sketch")
    records = []
    for split in ("train", "test"):
        for where, record in json_records(folder / f"anno_{split}.json"):
            with error_context('"image_name" of one photo and sketch, such as "photo1/image0110"', where):
                name = record["image_name"].replace("/", "_")
                sketch = sketches[name.replace("photo", "sketch").replace("image", "sketch")]
                records.append(Record(where, photos[name], split, sketches=[sketch]))
    return with_captions(records, folder, photos)


def read_fs2k_sde(folder: Path):
    """FS2K-SDE: sketches sketch/{train,test}/<photo>_<step>.*, photos anywhere below photo/. <photo> is the
    file name without suffix or, if several folders have it, "photo1_image0110" or "photo1/image0110"."""
    photos, records = images_by_name(folder / "photo"), []
    for split in ("train", "test"):
        sketch_steps = defaultdict(dict)    # {photo: {step: sketch}}
        for sketch, parts in images_below(folder / "sketch" / split):
            with error_context("image0110_7.png or, if not unique, photo1_image0110_7.png, of a photo and a "
                               "step", sketch):
                photo, step = "_".join(parts).rsplit("_", 1)
                steps = sketch_steps[photos[photo]]
                if steps.setdefault(int(step), sketch) != sketch:
                    raise ValueError(f"{steps[int(step)]} has the same step")
        counts = Counter(step for steps in sketch_steps.values() for step in steps)
        usual = {step for step, count in counts.items() if 2 * count > len(sketch_steps)}
        for photo, steps in sketch_steps.items():
            for step in sorted(usual ^ steps.keys()):
                raise ValueError(f"{photo} has {'no' if step in usual else 'a'} step {step}, unlike most")
            sketches = [steps[step] for step in sorted(steps)]
            records.append(Record(f"sketch/{split}", photo, split, sketches=sketches))
    return with_captions(records, folder, photos)


def with_captions(records: list, folder: Path, photos: dict):
    """Yield the records sorted by photo, the last tenth of the training split as "val". Captions come from
    train.json (train and val) and test.json beside photo/, or from captions.json, where these exist."""
    files = [folder / f"{name}.json" for name in ("train", "test", "captions")]
    captions = {path.stem: photo_captions(path, photos) for path in files if path.is_file()}
    for record in hold_out_validation(sorted(records, key=lambda record: record.image), 0.1):
        by_photo = captions.get("test" if record.split == "test" else "train", captions.get("captions"))
        if by_photo is not None:
            where = f"{record.where} and the captions beside photo/"
            record = record._replace(where=where, captions={"caption": by_photo.get(record.image, [])})
        yield record


def photo_captions(path: Path, photos: dict):
    """{photo: its captions}. The name of a record's "image", in any folder, identifies the photo."""
    captions, image_of = {}, {}
    for record in read_caption_list(path):
        parts = Path(str(record.image)).with_suffix("").parts
        photo = photos.get("_".join(parts[-2:]), photos.get(parts[-1]))
        if photo is None:
            continue                        # of another split or data set
        if image_of.setdefault(photo, record.image) != record.image:
            raise ValueError(f"{record.where}: {image_of[photo]:.200} and {record.image:.200} both match "
                             f"{photo}; keep the folder names photo1, photo2, ...")
        for column in COLUMNS[:2]:
            texts = record.captions.get(column, [])
            captions.setdefault(photo, []).extend(texts if isinstance(texts, list) else [texts])
    return captions


# ---- table of layouts ----------------------------------------------------------------------------
class Layout(NamedTuple):
    reads: str          # patterns of what it reads, files and image folders; the first identifies the layout
    title: str          # name of the data set
    jobs: object        # function: path -> list of jobs, functions that map a list for errors to `Record`s


def one_job(reader, *image_folders, allow_duplicates=False):
    """`Layout.jobs` of a reader of a whole data set, which names images in `image_folders` or full paths."""
    return lambda path: [functools.partial(
        validate_files, reader, image_folders or ("",), allow_duplicates, path)]


json_job = one_job(read_caption_lists, ".", "images", allow_duplicates=True)
LAYOUTS = (             # the first match applies; a JSON file given by name: the last row
    Layout("sketch/train sketch photo t*.json captions.json", "FS2K-SDE", one_job(read_fs2k_sde)),
    Layout("anno_*.json sketch photo t*.json captions.json", "FS2K", one_job(read_fs2k)),
    Layout("list_attr_celeba.* list_eval_partition.* img_align_celeba", "CelebA",       # Kaggle nests it
           one_job(read_celeba, "img_align_celeba", "img_align_celeba/img_align_celeba")),
    Layout("list_attr_lfwa.csv list_attr_lfwa_test.csv .", "LFWA", one_job(read_lfwa_lists, "lfw", ".")),
    Layout("lfw_att_40.mat indices_train_test.mat .", "LFWA", one_job(read_lfwa_matlab, "lfw", ".")),
    Layout("captions_hq.json .", "CelebA-Dialog", one_job(read_celeba_dialog, "images", "image", ".")),
    Layout("text/celeba-caption/*.txt t*/*.pickle images", "MM-CelebA-HQ", one_job(read_mm_celeba, "images")),
    Layout("train.json val.json test.json .", "JSON annotations", json_job),
    Layout("**/*.tar **/*.tar.* **/*.tgz **/*_stats.json", "webdataset", facecaption_jobs),
    Layout("*.json .", "JSON annotations", json_job),
)
