"""Index of a data set on disk: records are validated once, and every process memory-maps the result.

    line of an annotation file -> `Record`            a reader in layouts.py, such as `read_celeba`
    -> valid record of an existing image              `index_records`
    -> row of index-*.npy, line of index-*.jsonl      `write_index`
    -> fields of `Faces`, parsed on access            `open_split`, `Column`
    -> image, caption and identity                    `FaceDataset.__getitem__`
    -> row of a `Batch`                               `FaceDataset.collate`
"""
import bisect
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.distributed import parallel_map, rank_and_world_size
from common.images import load_image
from common.script import atomic_write

SPLITS = ("train", "val", "test")
COLUMNS = ("caption", "face_caption", "pcfg", "laion_caption")      # text columns of FaceCaption-15M
PRESENT = {"1": 1, "0": 0, "-1": 0}         # by the value of an attribute in an annotation file
NONE = -1                                   # in a row: the face has no attributes
# split: its number; start, length: place of the JSON line in bytes; person: hash of the person's id; content:
# hash of the line and of the size of the image's file
ROW = np.dtype([("split", "i4"), ("attributes", "i1", 40), ("length", "i4"), ("start", "i8"),
                ("person", "i8"), ("content", "i8")])


class TarImage(NamedTuple):
    """A face in an image in a tar, read and cropped each time it is opened."""
    tar: Path
    name: str           # of the image in the tar
    offset: int         # of its content in the tar, in bytes
    length: int         # of its content, in bytes
    box: tuple = ()     # x1, y1, x2, y2 in stored pixels; (): the whole image

    def __str__(self):
        return f"{self.tar}: {self.name}"

    def content(self) -> io.BytesIO:
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.length))

    def open(self, size=None) -> Image.Image:
        """The face as a PIL RGB image, size x size if given. Raises ValueError if the image is damaged."""
        return load_image(self.content(), self, self.box, size)


class Record(NamedTuple):
    """One face as annotated on disk, not yet validated. For another layout, add a row of `LAYOUTS` and a
    reader that yields the records of all splits, and a ValueError instead of one that it cannot make."""
    where: str                      # location for error messages: "list_attr_celeba.txt line 7"
    image: object                   # file name below the layout's image folder, Path or `TarImage`
    split: str                      # one of SPLITS
    person_id: str = ""             # equal for images of one person; "": no other image shows this person
    attributes: tuple | None = None     # values of CelebA's 40 attributes in its order, as written: "-1"
    captions: dict | None = None    # {column: text or list of texts}; other keys are ignored
    sketches: list | None = None    # Paths, in drawing order


def files_of(folder: Path, patterns: str):
    """Paths of the files and folders that match; `**` follows links, unlike that of `Path.glob`."""
    return [folder / name for pattern in patterns.split()
            for name in glob.glob(pattern, root_dir=folder, recursive=True)]


def open_split(path: str | Path, split: str, layouts, cache: str | Path, columns: tuple):
    """Fields of `data.Faces` for one split of a data set, given as a folder or a JSON annotation file. The
    first call writes an index of all splits to `cache`, which is written anew if it is damaged or if a file
    or folder that it was made from has changed. Captions come from all `columns` of a record. Raises
    ValueError if no layout matches or several do, annotations are inconsistent, over 1 % of a split's records
    are invalid, or the split is empty."""
    path = Path(os.path.abspath(path))
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder or file")
    folder = path if path.is_dir() else path.parent
    layout = find_layout(path, layouts)
    index = Path(cache).absolute() / f"index-{stable_hash(repr((str(path), columns))):014x}.npy"
    index.parent.mkdir(parents=True, exist_ok=True)         # first: `folder` may be the one that changes
    files = files_of(folder, layout.reads)
    sources = {folder, *files, *(file.parent for file in files), *Path(__file__).parent.glob("*.py")}
    # st_ctime: a copy may keep the time of modification
    statuses = map(os.stat, sources - {index.parent})
    changed = max(max(status.st_mtime, status.st_ctime) for status in statuses)
    contents = None
    if index.exists() and index.stat().st_mtime > changed:
        contents = read_index(index)
    if contents is None:
        write_index(index, layout, path, functools.partial(
            index_records, layout.reader, layout.image_folders, folder, columns))
        contents = read_index(index)

    rows, text = contents
    number = SPLITS.index(split)
    name = f"{layout.title} {split}"
    first, end = (bisect.bisect_left(rows["split"], each) for each in (number, number + 1))
    rows = rows[first:end]
    if not len(rows):
        raise ValueError(f"{name}: expected at least one face in this split of {path}, found none")
    fields = {field: Column(text, rows, field, folder) for field in Column(text, rows, None, folder)[0]}
    if rows["attributes"][0, 0] != NONE:
        fields["attributes"] = rows["attributes"].view(bool)
    digest = hashlib.sha256(rows.view(np.uint8)).hexdigest()
    return {"name": name, "identity": rows["person"], "digest": digest} | fields


def find_layout(path: Path, layouts):
    """The layout of a data set, recognised by its files. Raises ValueError if no layout matches, or if there
    are files of another one that this one does not read."""
    matching = [layout for layout in layouts if files_of(path, layout.reads.split()[0])]
    if path.suffix == ".json":
        matching = matching or [layouts[-1]]
    if not matching:
        known = ", ".join(layout.reads.split()[0] for layout in layouts)
        raise ValueError(f"{path}: expected one of {known} (not compressed; FaceCaption-15M's .parquet files "
                         f"hold only URLs, which img2dataset downloads)")
    layout, *others = matching
    for other in others:
        unread = {*files_of(path, other.reads.split()[0])} - {*files_of(path, layout.reads)}
        if unread and not other.may_be_beside:
            raise ValueError(f"{path}: found files of both {layout.title} and {other.title} "
                             f"({min(unread).name}); leave only those of one in this folder")
    return layout


def read_index(index: Path):
    """Rows and text of an index, both memory-mapped, or None if it is damaged."""
    try:
        rows = np.asarray(np.load(index, mmap_mode="r"))
        text = np.asarray(np.memmap(index.with_suffix(".jsonl"), mode="r"))
        if rows.dtype == ROW and rows["length"].sum() == len(text):
            return rows, text
    except (ValueError, OSError, EOFError):
        pass
    print(f"{index} is damaged: indexing the data set again")
    return None


def require_few(num_invalid: int, count: int, example: str):
    """Raise a ValueError with an example if over 1 % of `count` are invalid."""
    if num_invalid > count / 100:
        raise ValueError(f"{example} ({num_invalid:,} of {count:,} are invalid, more than 1 %)")


def check_invalid(messages, count: int, name: str, shown: int | None = 1):
    """Print the first messages about invalid ones of `count` records. Raises ValueError if over 1 % are."""
    if not messages:
        return
    require_few(len(messages), count, f"{name}: {messages[0]}")
    if rank_and_world_size()[0] == 0:
        print(f"{name}: {len(messages):,} of {count:,} are invalid and left out:")
        print(*itertools.islice(messages, shown), sep="\n")


class Column:
    """A field of the faces in `rows` as a sequence: an item is parsed from its line of `text` on access."""

    def __init__(self, text: np.ndarray, rows: np.ndarray, field: str | None, folder: Path):
        self.text = text
        self.rows = rows
        self.field = field
        self.folder = folder

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if np.ndim(i):
            return Column(self.text, self.rows[i], self.field, self.folder)
        start = self.rows["start"][i]
        length = self.rows["length"][i]
        item = json.loads(self.text[start:start + length].tobytes())
        item = item[self.field] if self.field else item
        if self.field == "images":
            return self.folder / item if isinstance(item, str) else TarImage(self.folder / item[0], *item[1:])
        return [self.folder / path for path in item] if self.field == "sketches" else item


def write_index(index: Path, layout, path: Path, index_records):
    """Write a row and a JSON line for every valid record of a data set, the rows sorted by split. Prints the
    number of invalid records. Raises ValueError if these are over 1 % of a split."""
    begin = time.time()
    parts = []
    invalid = []
    size = 0
    with (atomic_write(index.with_suffix(".jsonl")) as partial, open(partial, "wb") as text,
          parallel_map(index_records, layout.jobs(path), "indexing files") as results):
        for rows, lines, errors in results:
            rows["start"] = size + rows["length"].cumsum() - rows["length"]
            size += text.write(lines)
            parts.append(rows)
            invalid += errors
        rows = np.concatenate(parts)
        for number, split in enumerate(SPLITS):
            messages = [message for of_split, message in invalid if of_split == number]
            count = len(messages) + int((rows["split"] == number).sum())
            check_invalid(messages, count, f"{layout.title} {split}")
        if not size:
            raise ValueError(f"{path}: expected records of {layout.title}, found none")
    largest = np.unique(rows["person"], return_counts=True)[1].max()
    if largest > max(1, len(rows) / 2):
        print(f"{layout.title}: {largest:,} of {len(rows):,} faces have the same image_id, which means the "
              "same person; leave out the ids if they do not identify persons")
    with atomic_write(index) as partial:
        with open(partial, "wb") as file:
            np.save(file, rows[rows["split"].argsort(kind="stable")])
        os.utime(partial, (begin, begin))       # what changed while it was read is newer


def index_records(reader, image_folders: tuple, folder: Path, columns: tuple, job):
    """Validate the records that `reader(job)` yields -> rows (of `ROW`) and JSON lines (bytes) of the valid
    ones, and (number of the split, message) of each invalid one."""
    rows = []
    lines = []
    invalid = []
    split_of = {}
    inside = os.path.join(folder, "")
    to_json = json.JSONEncoder(separators=(",", ":")).encode
    relative = lambda path: os.path.normpath(path).removeprefix(inside)
    for record in reader(job):
        number = 0
        attributes = (NONE,) * 40
        try:
            if isinstance(record, ValueError):
                raise record
            where, image, split, person_id, values, captions, sketches = record
            number = SPLITS.index(split)
            if isinstance(image, TarImage):
                size = image.length
                image = image._replace(tar=relative(image.tar))
            else:
                paths = [os.path.join(folder, base, image) for base in image_folders if image]
                image = next(map(relative, filter(os.path.isfile, paths)), None)
                if image is None:
                    raise ValueError(f"{where}: the image {record.image!r} does not exist")
                size = os.path.getsize(os.path.join(folder, image))
                # only captions may be a reason to list an image again
                if image in split_of and (split_of[image] != split or captions is None):
                    raise ValueError(f"{where}: {image!r} is already in split {split_of[image]}")
                split_of[image] = split
            line = {"images": image}
            if values is not None:
                if not PRESENT.keys() >= {*values}:
                    raise ValueError(f"{where}: expected 1, 0 or -1 for every attribute, found {set(values)}")
                attributes = tuple(map(PRESENT.get, values))
            if captions is not None:
                line["captions"] = valid_captions(captions, columns, where)
            if sketches is not None:
                line["sketches"] = [*map(relative, sketches)]
        except ValueError as error:
            message = str(error).encode(errors="backslashreplace").decode()         # can be printed
            invalid.append((number, message))
            continue
        lines.append(to_json(line).encode() + b"\n")
        person = stable_hash(person_id or str(image))
        content = stable_hash(f"{line} {size}")
        rows.append((number, attributes, len(lines[-1]), 0, person, content))
    return np.array(rows, ROW), b"".join(lines), invalid


def valid_captions(captions: dict, columns: tuple, where: str):
    """List of the texts in `columns`, without empty ones. Raises ValueError if none is left, or if one is no
    text or contains NUL or a lone surrogate (JSON allows these, tokenizers do not)."""
    values = [captions[column] for column in columns if captions.get(column)]
    texts = [text for value in values for text in (value if isinstance(value, list) else [value]) if text]
    is_text = all(isinstance(text, str) and not re.search("[\0\ud800-\udfff]", text) for text in texts)
    valid = [text for text in texts if re.search(r"\w", text)] if is_text else []
    if not valid:
        raise ValueError(f"{where}: expected text in {' or '.join(columns)}, found {ascii(values):.200}")
    return valid


def stable_hash(text: str):
    """56-bit hash of a text, the same in every process (unlike Python's `hash`)."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:7], "big")


def split_by_hash(text: str):
    """Split for a data set without splits of its own: 90 % train, 5 % val, 5 % test."""
    return SPLITS[bisect.bisect((90, 95), stable_hash(text) % 100)]
