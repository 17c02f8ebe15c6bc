"""One reader for each layout of a set."""
import io
import operator
import pickle
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from captions import ATTRIBUTES
from common.images import IMAGE_SUFFIXES
from common.script import error_context
from readers.index import COLUMNS, LOWER_CASE, Record, read_json, split_by_hash, stable_hash
from readers.tars import read_facecaption


# ---- what the readers share ----------------------------------------------------------------------
def hold_out_validation(records, share):
    """The last `share` of the records for training, one at least, are for validation instead."""
    training = [i for i, record in enumerate(records) if record.split == "train"]
    for i in training[-max(1, round(share * len(training))):]:
        records[i] = records[i]._replace(split="val")
    return records


def json_records(path):
    with error_context("a json list", path):
        records = read_json(path.read_bytes())
        if not isinstance(records, list):
            raise ValueError(f"found a {type(records).__name__}")
    for number, record in enumerate(records):
        yield f"{path.name} record {number} (counted from 0)", record


# ---- faces with attributes -----------------------------------------------------------------------
def read_table(folder, stem):
    """(where, fields) of the lines of stem.txt (fields between spaces) or stem.csv (commas)."""
    path, separator = folder / f"{stem}.txt", None
    if (folder / f"{stem}.csv").is_file():
        path, separator = folder / f"{stem}.csv", ","
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip():
            fields = line.replace('"', " ").split(separator)
            yield f"{path.name} line {number}", [field.strip() for field in fields] if separator else fields


def attribute_records(rows):
    """Records, still without a part, from rows (where, [picture, value, value ...]). The header
    above them names the columns in any order, with spaces or underscores, in any case."""
    found, count, (where, header) = 0, None, next(rows, ("the list", []))
    if len(header) == 1:                    # CelebA's .txt begins with the number of pictures
        count, (where, header) = header[0], next(rows, (where, []))
    names = [name.strip().replace(" ", "_").lower() for name in header[-len(ATTRIBUTES):]]
    if sorted(names) != sorted(LOWER_CASE):
        raise ValueError(f"{where} should name the 40 attributes of CelebA, found {' '.join(header)[:1000]}")
    in_order = operator.itemgetter(*(names.index(name) for name in LOWER_CASE))
    for found, (where, (picture, *attribute_values)) in enumerate(rows, 1):
        if len(attribute_values) != len(names):
            raise ValueError(f"{where} has {len(attribute_values)} values, expected {len(names)} ({picture})")
        yield Record(where, picture.replace("\\", "/"), "", attribute_values=in_order(attribute_values))
    if count not in (None, str(found)):
        raise ValueError(f"{where}: the list announces {count} pictures, but {found} follow")


def read_celeba(folder):
    """CelebA as it is distributed, or Kaggle's copy of it; every picture is a person of its own."""
    parts = {}                              # {picture: the numbers in its line, which should be one}
    for _, (picture, *numbers) in read_table(folder, "list_eval_partition"):
        number = " and ".join(numbers)
        parts[picture] = f"{parts[picture]} and {number}" if picture in parts else number
    parts.pop("image_id", None)             # Kaggle's header
    for record in attribute_records(read_table(folder, "list_attr_celeba")):
        number = parts.pop(record.image, "none")
        split = {"0": "train", "1": "val", "2": "test"}.get(number, f"{number} of list_eval_partition")
        yield record._replace(split=split)
    if parts:
        raise ValueError(f"list_eval_partition names {len(parts)} pictures that list_attr_celeba does not "
                         f"have, the first is {next(iter(parts))}")


def assign_lfwa_splits(train, test):
    """LFWA's records with their parts and persons. The person is the folder of the picture.

    Five percent of the persons for training are "val". The training list may hold the test's
    pictures too, as the official one does: they are left out of it. Without a list for the test,
    half of the persons are kept for it, which is LFWA's own proportion.
    """
    tested = {record.image for record in test}
    for record in [*test, *(record for record in train if record.image not in tested)]:
        person_id = Path(record.image).parent.name
        number = stable_hash(person_id)
        if record.image in tested or (not test and number % 2 == 0):
            split = "test"
        else:
            split = "val" if number // 2 % 20 == 0 else "train"
        yield record._replace(split=split, person_id=person_id)


def read_lfwa_lists(folder):
    test = []
    if (folder / "list_attr_lfwa_test.csv").is_file():
        test = list(attribute_records(read_table(folder, "list_attr_lfwa_test")))
    return assign_lfwa_splits(attribute_records(read_table(folder, "list_attr_lfwa")), test)


def read_lfwa_matlab(folder):
    """LFWA from its authors' MATLAB 7.3 files: the faces in one, the numbers of each part's in the
    other. They are HDF5, which only h5py reads: nothing else here needs that package. HDF5 has a
    matrix's axes the other way round, and for a text a reference to its character codes."""
    import h5py
    faces, parts = folder / "lfw_att_40.mat", folder / "indices_train_test.mat"
    kind = "a complete MATLAB 7.3 file (HDF5, which MATLAB writes with -v7.3)"
    with error_context(f"{kind} with name, AttrName and label", faces):
        file = h5py.File(faces)
        names, header = (["".join(map(chr, file[text][()].flat)) for text in file[variable][()].flat]
                         for variable in ("name", "AttrName"))
        labels = file["label"][()].T
        labels = labels if len(labels) == len(names) else labels.T
        rows = [(f"{faces.name} row {n} (counted from 1)", [name, *(f"{value:g}" for value in row)])
                for n, (name, row) in enumerate(zip(names, labels, strict=True), 1)]
    records = dict(enumerate(attribute_records(iter([(f"{faces.name} AttrName", header), *rows])), 1))
    with error_context(f"{kind} with indices_img_train and indices_img_test, from 1 to {len(names)}", parts):
        file = h5py.File(parts)
        train, test = ([records[int(n)] for n in file[variable][()].flat]
                       for variable in ("indices_img_train", "indices_img_test"))
    return assign_lfwa_splits(train, test)


# ---- faces with captions -------------------------------------------------------------------------
def read_caption_list(path, split=None):
    """A json list of {"image": path, "image_id": id, "caption": text or list of texts}, as BLIP and
    the official code have it. Equal ids mean the same person; without an id every picture is a
    person of its own. A list that is of no part is split by a digest of the person."""
    for where, record in json_records(path):
        with error_context('{"image": path, "image_id": id, "caption": text or list of texts}', where):
            picture = record.get("image", record.get("photo"))          # "photo": FS2K-SDE's lists
            identity = record.get("image_id")
        person_id = str(picture if identity is None else identity)
        yield Record(where, picture, split or split_by_hash(person_id), person_id, captions=record)


def read_caption_lists(path):
    """train.json, val.json and test.json, or the only list there is, or the one that was given."""
    if (path / "train.json").is_file():
        for split in ("train", "val", "test"):
            if (path / f"{split}.json").is_file():
                yield from read_caption_list(path / f"{split}.json", split)
    else:
        lists = [path] if path.is_file() else sorted(path.glob("*.json"))
        if len(lists) > 1:
            raise ValueError(f"{len(lists)} json lists, of which none is train.json; give one by its name")
        yield from read_caption_list(lists[0])


class NamesOnly(pickle.Unpickler):
    """Reads lists, texts and numbers. Anything else in a pickle names code to be run: refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}")


def assign_celeba_hq_splits(folder, captions):
    """Records of {number: captions}. train/filenames.pickle and test/filenames.pickle tell the
    parts or, where both are absent, the number; the last 5 % of the training part are "val"."""
    lists, listed = {split: folder / split / "filenames.pickle" for split in ("train", "test")}, []
    if any(path.exists() for path in lists.values()):
        for split, path in lists.items():
            with error_context("a plain pickled list, of names such as '123.jpg', in each of both folders", path):
                for name in NamesOnly(io.BytesIO(path.read_bytes())).load():
                    text = name.decode() if isinstance(name, bytes) else str(name)
                    listed.append((int(Path(text).stem), split))
    else:
        listed = [(number, "train" if number < 24_000 else "test") for number in captions]
    return hold_out_validation([Record(f"face {n}", f"{n}.jpg", split, captions={"caption": captions.get(n, [])})
                                for n, split in sorted(listed)], 0.05)


def read_mm_celeba(folder):
    """MM-CelebA-HQ: images/N.jpg and text/celeba-caption/N.txt, a caption a line."""
    captions = {}
    for path in folder.glob("text/celeba-caption/*.txt"):
        if path.stem.isdecimal():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            own = captions.setdefault(int(path.stem), [])       # 3.txt and 003.txt are of one face
            own += [line.strip() for line in lines if line.strip()]
    return assign_celeba_hq_splits(folder, captions)


def read_celeba_dialog(folder):
    """CelebA-Dialog: captions_hq.json and N.jpg in images/, in image/ or beside it. A face has one
    caption: the overall one, or, where that is empty, the attribute-wise ones joined."""
    path, captions = folder / "captions_hq.json", {}
    with error_context("a json dictionary", path):
        records = read_json(path.read_bytes()).items()
    for name, record in records:
        where = f"{path.name} record {name!r}"
        with error_context('"0.jpg": {"overall_caption": text, "attribute_wise_captions": texts}', where):
            overall, parts = record.get("overall_caption") or "", record.get("attribute_wise_captions") or {}
            own = captions.setdefault(int(Path(name).stem), [])
            own.append(overall.strip() or " ".join(parts.values()).strip())
    if not any((folder / place / "5380.jpg").is_file() for place in ("images", "image", ".")):
        captions.pop(5380, None)            # it has captions, but was never part of the pictures
    return assign_celeba_hq_splits(folder, captions)


# ---- photos with sketches ------------------------------------------------------------------------
def images_below(folder):
    """(path, its parts below the folder, the last without ending) of every picture, by name."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            yield path, path.relative_to(folder).with_suffix("").parts


class UniqueNames(dict):
    def __missing__(self, name):
        raise ValueError(f"{name} is the name of no picture, or of several: then name the folder, too, as in "
                         f"photo1_image0110")


def images_by_name(folder):
    """{name: path}: photo1/image0110.jpg answers to "photo1_image0110" and, if no other picture
    does, to "image0110"."""
    paths = {}
    for path, parts in images_below(folder):
        for first in range(len(parts)):
            paths.setdefault("_".join(parts[first:]), []).append(path)
    return UniqueNames({name: found[0] for name, found in paths.items() if len(found) == 1})


def read_fs2k(folder):
    """FS2K: photo/photo1/image0110.jpg and its finished sketch, sketch/sketch1/sketch0110.*, by
    anno_train.json and anno_test.json."""
    photos, sketches = images_by_name(folder / "photo"), images_by_name(folder / "sketch")
    records = []
    for split in ("train", "test"):
        for where, record in json_records(folder / f"anno_{split}.json"):
            with error_context('"image_name" such as "photo1/image0110", of a photo and a sketch', where):
                name = record["image_name"].replace("/", "_")
                sketch = sketches[name.replace("photo", "sketch").replace("image", "sketch")]
                records.append(Record(where, photos[name], split, sketches=[sketch]))
    return with_captions(records, folder, photos)


def read_fs2k_sde(folder):
    """FS2K-SDE: sketches sketch/{train,test}/<photo>_<step>.*, the photos anywhere below photo/.

    <photo> is the photo's file name without its ending, or, where several folders have that name,
    "photo1_image0110" or "photo1/image0110".
    """
    photos, records = images_by_name(folder / "photo"), []
    for split in ("train", "test"):
        growing = {}                        # {photo: {step: sketch}}
        for sketch, parts in images_below(folder / "sketch" / split):
            with error_context("a name such as image0110_7.png, of one photo and ending with a step", sketch):
                photo, step = "_".join(parts).rsplit("_", 1)
                steps = growing.setdefault(photos[photo], {})
                if steps.setdefault(int(step), sketch) != sketch:
                    raise ValueError(f"{steps[int(step)]} is the same step")
        records += ordered_steps(growing, split)
    return with_captions(records, folder, photos)


def ordered_steps(growing, split):
    """{photo: {step: sketch}} -> records with the sketches in the order of the steps, of which all
    photos of a part have the same."""
    counts = Counter(step for steps in growing.values() for step in steps)
    usual = {step for step, count in counts.items() if 2 * count > len(growing)}
    for photo, steps in growing.items():
        for step in sorted(usual ^ steps.keys()):
            raise ValueError(f"{photo} has {'no' if step in usual else 'a'} step {step}, unlike most")
        yield Record(f"sketch/{split}", photo, split, sketches=[steps[step] for step in sorted(steps)])


def with_captions(records, folder, photos):
    """The records, the last tenth of those for training, by name, now for validation; with captions
    where lists beside photo/ have them: train.json (for both) and test.json, or captions.json."""
    lists = [folder / f"{name}.json" for name in ("train", "test", "captions")]
    captions = {path.stem: photo_captions(path, photos) for path in lists if path.is_file()}
    for record in hold_out_validation(sorted(records, key=lambda record: record.image), 0.1):
        known = captions.get("test" if record.split == "test" else "train", captions.get("captions"))
        if known is not None:
            where = f"{record.where} and the captions beside photo/"
            record = record._replace(where=where, captions={"caption": known.get(record.image, [])})
        yield record


def photo_captions(path, photos):
    """{photo: its captions}. A record's "image" may be in any folder: its name tells the photo."""
    captions, meant = {}, {}
    for record in read_caption_list(path):
        parts = Path(str(record.image)).with_suffix("").parts
        photo = photos.get("_".join(parts[-2:]), photos.get(parts[-1]))
        if photo is None:
            continue                        # of another part or set
        if meant.setdefault(photo, record.image) != record.image:
            raise ValueError(f"{record.where}: {meant[photo]} and {record.image} may both mean {photo}; "
                             f"keep the folders photo1, photo2, ...")
        for column in COLUMNS[:2]:
            found = record.captions.get(column, [])
            captions.setdefault(photo, []).extend(found if isinstance(found, list) else [found])
    return captions


# ---- which one -----------------------------------------------------------------------------------
class Layout(NamedTuple):
    pattern: str            # what tells it
    title: str              # of the set
    reader: object          # folder -> records of all its parts
    image_folders: tuple = ()  # where the pictures may be; (): the reader gives whole paths, or Crops
    allow_duplicates: bool = False  # may a picture be listed several times in a part?
    one_job_per_file: bool = False  # does the reader give a function for each file?


LAYOUTS = (
    Layout("sketch/train", "FS2K-SDE", read_fs2k_sde),
    Layout("anno_*.json", "FS2K", read_fs2k),
    Layout("list_attr_celeba.*", "CelebA", read_celeba,
           ("img_align_celeba", "img_align_celeba/img_align_celeba")),      # Kaggle has it twice
    Layout("list_attr_lfwa.csv", "LFWA", read_lfwa_lists, ("lfw", ".")),
    Layout("lfw_att_40.mat", "LFWA", read_lfwa_matlab, ("lfw", ".")),
    Layout("captions_hq.json", "CelebA-Dialog", read_celeba_dialog, ("images", "image", ".")),
    Layout("text/celeba-caption", "MM-CelebA-HQ", read_mm_celeba, ("images",)),
    Layout("train.json", "json lists", read_caption_lists, (".", "images"), allow_duplicates=True),
    Layout("*.tar", "FaceCaption", read_facecaption, one_job_per_file=True),
    Layout("*.json", "json list", read_caption_lists, (".", "images"), allow_duplicates=True),
)
