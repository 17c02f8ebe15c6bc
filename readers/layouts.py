"""One reader for each layout of a set."""
import io
import operator
import pickle
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from captions import ATTRIBUTES
from common.images import PICTURES
from common.script import expecting
from readers.index import COLUMNS, LOWER_CASE, Record, digest, part_by_digest, read_json
from readers.tars import facecaption


# ---- what the readers share ----------------------------------------------------------------------
def hold_out(records, share):
    """The last `share` of the records for training, one at least, are for validation instead."""
    training = [i for i, record in enumerate(records) if record.part == "train"]
    for i in training[-max(1, round(share * len(training))):]:
        records[i] = records[i]._replace(part="val")
    return records


def json_records(path):
    with expecting("a json list", path):
        records = read_json(path.read_bytes())
        if not isinstance(records, list):
            raise ValueError(f"found a {type(records).__name__}")
    for number, record in enumerate(records):
        yield f"{path.name} record {number} (counted from 0)", record


# ---- faces with attributes -----------------------------------------------------------------------
def table(folder, stem):
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
    for found, (where, (picture, *values)) in enumerate(rows, 1):
        if len(values) != len(names):
            raise ValueError(f"{where} has {len(values)} values, expected {len(names)} ({picture})")
        yield Record(where, picture.replace("\\", "/"), "", values=in_order(values))
    if count not in (None, str(found)):
        raise ValueError(f"{where}: the list announces {count} pictures, but {found} follow")


def celeba(folder):
    """CelebA as it is distributed, or Kaggle's copy of it; every picture is a person of its own."""
    parts = {}                              # {picture: the numbers in its line, which should be one}
    for _, (picture, *numbers) in table(folder, "list_eval_partition"):
        number = " and ".join(numbers)
        parts[picture] = f"{parts[picture]} and {number}" if picture in parts else number
    parts.pop("image_id", None)             # Kaggle's header
    for record in attribute_records(table(folder, "list_attr_celeba")):
        number = parts.pop(record.picture, "none")
        part = {"0": "train", "1": "val", "2": "test"}.get(number, f"{number} of list_eval_partition")
        yield record._replace(part=part)
    if parts:
        raise ValueError(f"list_eval_partition names {len(parts)} pictures that list_attr_celeba does not "
                         f"have, the first is {next(iter(parts))}")


def lfwa(train, test):
    """LFWA's records with their parts and persons. The person is the folder of the picture.

    Five percent of the persons for training are "val". The training list may hold the test's
    pictures too, as the official one does: they are left out of it. Without a list for the test,
    half of the persons are kept for it, which is LFWA's own proportion.
    """
    tested = {record.picture for record in test}
    for record in [*test, *(record for record in train if record.picture not in tested)]:
        person = Path(record.picture).parent.name
        number = digest(person)
        if record.picture in tested or (not test and number % 2 == 0):
            part = "test"
        else:
            part = "val" if number // 2 % 20 == 0 else "train"
        yield record._replace(part=part, person=person)


def lfwa_lists(folder):
    test = []
    if (folder / "list_attr_lfwa_test.csv").is_file():
        test = list(attribute_records(table(folder, "list_attr_lfwa_test")))
    return lfwa(attribute_records(table(folder, "list_attr_lfwa")), test)


def lfwa_matlab(folder):
    """LFWA from its authors' MATLAB 7.3 files: the faces in one, the numbers of each part's in the
    other. They are HDF5, which only h5py reads: nothing else here needs that package. HDF5 has a
    matrix's axes the other way round, and for a text a reference to its character codes."""
    import h5py
    faces, parts = folder / "lfw_att_40.mat", folder / "indices_train_test.mat"
    kind = "a complete MATLAB 7.3 file (HDF5, which MATLAB writes with -v7.3)"
    with expecting(f"{kind} with name, AttrName and label", faces):
        file = h5py.File(faces)
        names, header = (["".join(map(chr, file[text][()].flat)) for text in file[variable][()].flat]
                         for variable in ("name", "AttrName"))
        labels = file["label"][()].T
        labels = labels if len(labels) == len(names) else labels.T
        rows = [(f"{faces.name} row {n} (counted from 1)", [name, *(f"{value:g}" for value in row)])
                for n, (name, row) in enumerate(zip(names, labels, strict=True), 1)]
    records = dict(enumerate(attribute_records(iter([(f"{faces.name} AttrName", header), *rows])), 1))
    with expecting(f"{kind} with indices_img_train and indices_img_test, from 1 to {len(names)}", parts):
        file = h5py.File(parts)
        train, test = ([records[int(n)] for n in file[variable][()].flat]
                       for variable in ("indices_img_train", "indices_img_test"))
    return lfwa(train, test)


# ---- faces with captions -------------------------------------------------------------------------
def caption_list(path, part=None):
    """A json list of {"image": path, "image_id": id, "caption": text or list of texts}, as BLIP and
    the official code have it. Equal ids mean the same person; without an id every picture is a
    person of its own. A list that is of no part is split by a digest of the person."""
    for where, record in json_records(path):
        with expecting('{"image": path, "image_id": id, "caption": text or list of texts}', where):
            picture = record.get("image", record.get("photo"))          # "photo": FS2K-SDE's lists
            identity = record.get("image_id")
        person = str(picture if identity is None else identity)
        yield Record(where, picture, part or part_by_digest(person), person, captions=record)


def caption_lists(path):
    """train.json, val.json and test.json, or the only list there is, or the one that was given."""
    if (path / "train.json").is_file():
        for part in ("train", "val", "test"):
            if (path / f"{part}.json").is_file():
                yield from caption_list(path / f"{part}.json", part)
    else:
        lists = [path] if path.is_file() else sorted(path.glob("*.json"))
        if len(lists) > 1:
            raise ValueError(f"{len(lists)} json lists, of which none is train.json; give one by its name")
        yield from caption_list(lists[0])


class NamesOnly(pickle.Unpickler):
    """Reads lists, texts and numbers. Anything else in a pickle names code to be run: refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}")


def celeba_hq(folder, captions):
    """Records of {number: captions}. train/filenames.pickle and test/filenames.pickle tell the
    parts or, where both are absent, the number; the last 5 % of the training part are "val"."""
    lists, listed = {part: folder / part / "filenames.pickle" for part in ("train", "test")}, []
    if any(path.exists() for path in lists.values()):
        for part, path in lists.items():
            with expecting("a plain pickled list, of names such as '123.jpg', in each of both folders", path):
                for name in NamesOnly(io.BytesIO(path.read_bytes())).load():
                    text = name.decode() if isinstance(name, bytes) else str(name)
                    listed.append((int(Path(text).stem), part))
    else:
        listed = [(number, "train" if number < 24_000 else "test") for number in captions]
    return hold_out([Record(f"face {n}", f"{n}.jpg", part, captions={"caption": captions.get(n, [])})
                     for n, part in sorted(listed)], 0.05)


def mm_celeba(folder):
    """MM-CelebA-HQ: images/N.jpg and text/celeba-caption/N.txt, a caption a line."""
    captions = {}
    for path in folder.glob("text/celeba-caption/*.txt"):
        if path.stem.isdecimal():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            own = captions.setdefault(int(path.stem), [])       # 3.txt and 003.txt are of one face
            own += [line.strip() for line in lines if line.strip()]
    return celeba_hq(folder, captions)


def celeba_dialog(folder):
    """CelebA-Dialog: captions_hq.json and N.jpg in images/, in image/ or beside it. A face has one
    caption: the overall one, or, where that is empty, the attribute-wise ones joined."""
    path, captions = folder / "captions_hq.json", {}
    with expecting("a json dictionary", path):
        records = read_json(path.read_bytes()).items()
    for name, record in records:
        where = f"{path.name} record {name!r}"
        with expecting('"0.jpg": {"overall_caption": text, "attribute_wise_captions": texts}', where):
            overall, parts = record.get("overall_caption") or "", record.get("attribute_wise_captions") or {}
            own = captions.setdefault(int(Path(name).stem), [])
            own.append(overall.strip() or " ".join(parts.values()).strip())
    if not any((folder / place / "5380.jpg").is_file() for place in ("images", "image", ".")):
        captions.pop(5380, None)            # it has captions, but was never part of the pictures
    return celeba_hq(folder, captions)


# ---- photos with sketches ------------------------------------------------------------------------
def pictures_below(folder):
    """(path, its parts below the folder, the last without ending) of every picture, by name."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICTURES:
            yield path, path.relative_to(folder).with_suffix("").parts


class ByName(dict):
    def __missing__(self, name):
        raise ValueError(f"{name} is the name of no picture, or of several: then name the folder, too, as in "
                         f"photo1_image0110")


def pictures_by_name(folder):
    """{name: path}: photo1/image0110.jpg answers to "photo1_image0110" and, if no other picture
    does, to "image0110"."""
    paths = {}
    for path, parts in pictures_below(folder):
        for first in range(len(parts)):
            paths.setdefault("_".join(parts[first:]), []).append(path)
    return ByName({name: found[0] for name, found in paths.items() if len(found) == 1})


def fs2k(folder):
    """FS2K: photo/photo1/image0110.jpg and its finished sketch, sketch/sketch1/sketch0110.*, by
    anno_train.json and anno_test.json."""
    photos, sketches = pictures_by_name(folder / "photo"), pictures_by_name(folder / "sketch")
    records = []
    for part in ("train", "test"):
        for where, record in json_records(folder / f"anno_{part}.json"):
            with expecting('"image_name" such as "photo1/image0110", of a photo and a sketch', where):
                name = record["image_name"].replace("/", "_")
                sketch = sketches[name.replace("photo", "sketch").replace("image", "sketch")]
                records.append(Record(where, photos[name], part, sketches=[sketch]))
    return with_captions(records, folder, photos)


def fs2k_sde(folder):
    """FS2K-SDE: sketches sketch/{train,test}/<photo>_<step>.*, the photos anywhere below photo/.

    <photo> is the photo's file name without its ending, or, where several folders have that name,
    "photo1_image0110" or "photo1/image0110".
    """
    photos, records = pictures_by_name(folder / "photo"), []
    for part in ("train", "test"):
        growing = {}                        # {photo: {step: sketch}}
        for sketch, parts in pictures_below(folder / "sketch" / part):
            with expecting("a name such as image0110_7.png, of one photo and ending with a step", sketch):
                photo, step = "_".join(parts).rsplit("_", 1)
                steps = growing.setdefault(photos[photo], {})
                if steps.setdefault(int(step), sketch) != sketch:
                    raise ValueError(f"{steps[int(step)]} is the same step")
        records += in_steps(growing, part)
    return with_captions(records, folder, photos)


def in_steps(growing, part):
    """{photo: {step: sketch}} -> records with the sketches in the order of the steps, of which all
    photos of a part have the same."""
    counts = Counter(step for steps in growing.values() for step in steps)
    usual = {step for step, count in counts.items() if 2 * count > len(growing)}
    for photo, steps in growing.items():
        for step in sorted(usual ^ steps.keys()):
            raise ValueError(f"{photo} has {'no' if step in usual else 'a'} step {step}, unlike most")
        yield Record(f"sketch/{part}", photo, part, sketches=[steps[step] for step in sorted(steps)])


def with_captions(records, folder, photos):
    """The records, the last tenth of those for training, by name, now for validation; with captions
    where lists beside photo/ have them: train.json (for both) and test.json, or captions.json."""
    lists = [folder / f"{name}.json" for name in ("train", "test", "captions")]
    captions = {path.stem: photo_captions(path, photos) for path in lists if path.is_file()}
    for record in hold_out(sorted(records, key=lambda record: record.picture), 0.1):
        known = captions.get("test" if record.part == "test" else "train", captions.get("captions"))
        if known is not None:
            where = f"{record.where} and the captions beside photo/"
            record = record._replace(where=where, captions={"caption": known.get(record.picture, [])})
        yield record


def photo_captions(path, photos):
    """{photo: its captions}. A record's "image" may be in any folder: its name tells the photo."""
    captions, meant = {}, {}
    for record in caption_list(path):
        parts = Path(str(record.picture)).with_suffix("").parts
        photo = photos.get("_".join(parts[-2:]), photos.get(parts[-1]))
        if photo is None:
            continue                        # of another part or set
        if meant.setdefault(photo, record.picture) != record.picture:
            raise ValueError(f"{record.where}: {meant[photo]} and {record.picture} may both mean {photo}; "
                             f"keep the folders photo1, photo2, ...")
        for column in COLUMNS[:2]:
            found = record.captions.get(column, [])
            captions.setdefault(photo, []).extend(found if isinstance(found, list) else [found])
    return captions


# ---- which one -----------------------------------------------------------------------------------
class Layout(NamedTuple):
    sign: str               # what tells it
    title: str              # of the set
    reader: object          # folder -> records of all its parts
    places: tuple = ()      # where the pictures may be; (): the reader gives whole paths, or Crops
    repeats: bool = False   # may a picture be listed several times in a part?
    apart: bool = False     # does the reader give a function for each file?


LAYOUTS = (
    Layout("sketch/train", "FS2K-SDE", fs2k_sde),
    Layout("anno_*.json", "FS2K", fs2k),
    Layout("list_attr_celeba.*", "CelebA", celeba,
           ("img_align_celeba", "img_align_celeba/img_align_celeba")),      # Kaggle has it twice
    Layout("list_attr_lfwa.csv", "LFWA", lfwa_lists, ("lfw", ".")),
    Layout("lfw_att_40.mat", "LFWA", lfwa_matlab, ("lfw", ".")),
    Layout("captions_hq.json", "CelebA-Dialog", celeba_dialog, ("images", "image", ".")),
    Layout("text/celeba-caption", "MM-CelebA-HQ", mm_celeba, ("images",)),
    Layout("train.json", "json lists", caption_lists, (".", "images"), repeats=True),
    Layout("*.tar", "FaceCaption", facecaption, apart=True),
    Layout("*.json", "json list", caption_lists, (".", "images"), repeats=True),
)
