"""Index of a data set on disk: records are validated once; every process memory-maps the result.

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
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.distributed import parallel_map, rank_and_world_size
from common.images import load_image
from common.script import atomic_write, naming

SPLITS = ("train", "val", "test")
COLUMNS = ("caption", "face_caption", "pcfg", "laion_caption")  # text columns of FaceCaption-15M
NONE = -1                               # in a row: the face has no attributes
PRESENT = {"1": 1, "0": 0, "-1": 0, None: NONE}     # {attribute's value in a `Record`: in a row}
ROW = np.dtype([
    ("split", "i4"),            # its index in SPLITS
    ("attributes", "i1", 40),
    ("length", "i4"),           # of the JSON line, in bytes
    ("start", "i8"),            # of the JSON line in the .jsonl file, in bytes
    ("person", "i8"),           # hash of the person's id
    ("content", "i8")])         # hash of the line and of the image's size in bytes


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
        """The face as a PIL RGB image, size x size pixels if a size is given. Raises ValueError if
        the image is damaged."""
        return load_image(self.content(), self, self.box, size)


@dataclass
class Record:
    """One face as annotated on disk, not yet validated. To support another layout, add a row to
    `LAYOUTS` and a reader. The reader yields the records of all splits and, in place of a record
    that is invalid, a ValueError."""
    where: str                      # location for error messages: "list_attr_celeba.txt line 7"
    image: object                   # file name below the layout's image folder, Path or `TarImage`
    split: str                      # one of SPLITS
    person_id: str = ""             # equal for images of one person; "": only this image shows them
    attributes: tuple = (None,) * 40    # CelebA's in its order, as written: "-1"; None: has none
    captions: dict | None = None    # {column: text or list of texts}; other keys are ignored
    sketches: list | None = None    # Paths, in drawing order


# ---- opening -------------------------------------------------------------------------------------
def open_split(path: str | Path, split: str, layouts, cache: str | Path, columns: tuple):
    """Open one split of a data set, given as a folder or a JSON annotation file. Returns the fields
    of `data.Faces`. Captions come from all `columns` of a record.

    The first call writes an index of all splits to `cache`. It is written again if one of its
    source files or their folders has changed. Raises ValueError if no layout matches or several do,
    if annotations are inconsistent, if over 1 % of a split's records are invalid, or if the split
    is empty."""
    path = Path(os.path.abspath(path))
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder or file")
    folder = path if path.is_dir() else path.parent
    layout = find_layout(path, layouts)
    rows, text = open_index(path, folder, layout, cache, columns)

    name = f"{layout.title} {split}"
    number = SPLITS.index(split)
    first = bisect.bisect_left(rows["split"], number)
    end = bisect.bisect_right(rows["split"], number)
    if first == end:
        raise ValueError(f"{name}: expected at least one face in this split of {path}, found none")
    rows = rows[first:end]

    digest = hashlib.sha256(rows.view(np.uint8)).hexdigest()
    fields = {"name": name, "identity": rows["person"], "digest": digest}
    for field in parse_line(text, rows[0]):     # all records of a split have the same fields
        fields[field] = Column(text, rows, field, folder)
    if rows["attributes"][0, 0] != NONE:
        fields["attributes"] = rows["attributes"].view(bool)
    return fields


def find_layout(path: Path, layouts):
    """The layout of a data set, recognised by its files. Raises ValueError if no layout matches, or
    if there are files of a second layout that the first one does not read."""
    matching = [layout for layout in layouts if files_of(path, layout.reads.split()[0])]
    if path.suffix == ".json":
        matching = matching or [layouts[-1]]
    if not matching:
        known = ", ".join(layout.reads.split()[0] for layout in layouts)
        raise ValueError(f"{path}: expected one of {known} (not compressed; FaceCaption-15M's "
                         ".parquet files hold only URLs, which img2dataset downloads)")

    layout, *others = matching
    for other in others:
        unread = {*files_of(path, other.reads.split()[0])} - {*files_of(path, layout.reads)}
        if unread and not other.may_be_beside:
            raise ValueError(f"{path}: found files of both {layout.title} and {other.title} "
                             f"({min(unread).name}); leave only the files of one of them")
    return layout


def files_of(folder: Path, patterns: str):
    """Paths of the files and folders that match; `**` follows links, unlike that of `Path.glob`."""
    paths = []
    for pattern in patterns.split():
        paths += [folder / name for name in glob.glob(pattern, root_dir=folder, recursive=True)]
    return paths


def open_index(path: Path, folder: Path, layout, cache: str | Path, columns: tuple):
    """Rows and text of a data set's index, both memory-mapped. The index is first written if it is
    missing or older than the data set. A damaged one is an error that names it; it can be
    deleted."""
    key = stable_hash(repr((str(path), columns)))
    index = Path(cache).absolute() / f"index-{key:014x}.npy"
    index.parent.mkdir(parents=True, exist_ok=True)     # first, because it may be in `folder`

    files = files_of(folder, layout.reads)
    code = Path(__file__).parent.glob("*.py")
    sources = {folder, *files, *(file.parent for file in files), *code}
    changed = 0
    for source in sources - {index.parent}:
        status = os.stat(source)
        changed = max(changed, status.st_mtime, status.st_ctime)    # a copy may keep its st_mtime
    if not index.exists() or index.stat().st_mtime <= changed:
        index_job = functools.partial(index_records, layout.reader, layout.image_folders, folder,
                                      columns)
        write_index(index, layout, path, index_job)

    with naming(index):
        rows = np.load(index, mmap_mode="r")
        text = np.memmap(index.with_suffix(".jsonl"), mode="r")
        if rows["length"].sum() != len(text):
            raise ValueError("expected a JSON line for each row; delete this index")
    return rows, text


def parse_line(text: np.ndarray, row):
    """The contents of a row's JSON line."""
    start = row["start"]
    return json.loads(text[start:start + row["length"]].tobytes())


@dataclass(eq=False)
class Column:
    """A field of the faces in `rows` as a sequence. An item is parsed from its line on access."""
    text: np.ndarray
    rows: np.ndarray
    field: str
    folder: Path

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if np.ndim(i):
            return Column(self.text, self.rows[i], self.field, self.folder)
        item = parse_line(self.text, self.rows[i])[self.field]
        if self.field == "captions":
            return item
        if self.field == "sketches":
            return [self.folder / path for path in item]
        if isinstance(item, str):           # an image in a file
            return self.folder / item
        tar, *place = item
        return TarImage(self.folder / tar, *place)


# ---- invalid records -----------------------------------------------------------------------------
def require_few(num_invalid: int, count: int, example: str):
    """Raise a ValueError that begins with `example` if over 1 % of `count` items are invalid."""
    if num_invalid > count / 100:
        raise ValueError(f"{example} ({num_invalid:,} of {count:,} are invalid, more than 1 %)")


def check_invalid(messages, count: int, name: str, shown: int | None = 1):
    """Print how many of `count` records are invalid, and the first `shown` messages about them
    (None: all). Raises ValueError if over 1 % are invalid."""
    if not messages:
        return
    require_few(len(messages), count, f"{name}: {messages[0]}")
    if rank_and_world_size()[0] == 0:
        print(f"{name}: {len(messages):,} of {count:,} are invalid and left out:")
        print(*messages[:shown], sep="\n")


# ---- writing -------------------------------------------------------------------------------------
def write_index(index: Path, layout, path: Path, index_job):
    """Write a row and a JSON line for every valid record of a data set, the rows sorted by split.
    index_job: `index_records` of one of the layout's jobs. Raises ValueError if over 1 % of a
    split's records are invalid."""
    begin = time.time()
    parts = []
    invalid = []
    size = 0
    with (atomic_write(index.with_suffix(".jsonl")) as partial, open(partial, "wb") as text,
          parallel_map(index_job, layout.jobs(path), "indexing files") as results):
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

    _, images_per_person = np.unique(rows["person"], return_counts=True)
    largest = images_per_person.max()
    if largest > max(1, len(rows) / 2):
        print(f"{layout.title}: {largest:,} of {len(rows):,} faces have the same image_id, which "
              "means the same person; leave out the ids if they do not identify persons")

    with atomic_write(index) as partial:
        with open(partial, "wb") as file:
            np.save(file, rows[rows["split"].argsort(kind="stable")])
        os.utime(partial, (begin, begin))       # older than files that changed while they were read


def index_records(reader, image_folders: tuple, folder: Path, columns: tuple, job):
    """Validate the records that `reader(job)` yields. Returns the rows (of dtype ROW) and JSON
    lines (bytes) of the valid records, and (index of the split, message) of each invalid one."""
    rows = []
    lines = []
    invalid = []
    split_of = {}           # {image: its split}; in one split, captioned images may be repeated
    for record in reader(job):
        number = 0
        try:
            if isinstance(record, ValueError):
                raise record
            number = SPLITS.index(record.split)
            image, size = find_image(record, image_folders, folder)
            name = str(image)
            if name in split_of and (split_of[name] != record.split or record.captions is None):
                raise ValueError(f"{record.where}: {name!r} is already in split {split_of[name]}")
            split_of[name] = record.split
            attributes = attribute_values(record)
            line = {"images": image}
            if record.captions is not None:
                line["captions"] = valid_captions(record.captions, columns, record.where)
            if record.sketches is not None:
                line["sketches"] = [relative(path, folder) for path in record.sketches]
        except ValueError as error:
            printable = str(error).encode(errors="backslashreplace").decode()
            invalid.append((number, printable))
            continue
        encoded = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        person = stable_hash(record.person_id or name)
        content = stable_hash(f"{line} {size}")
        lines.append(encoded)
        rows.append((number, attributes, len(encoded), 0, person, content))
    return np.array(rows, ROW), b"".join(lines), invalid


def relative(path, folder: Path) -> str:
    """A path relative to the folder, without ".."; unchanged if it is outside the folder."""
    return os.path.normpath(path).removeprefix(os.path.join(folder, ""))


def find_image(record: Record, image_folders: tuple, folder: Path):
    """The record's image, a path relative to `folder` or a `TarImage`, and its size in bytes.
    Raises ValueError if the image does not exist."""
    image = record.image
    if isinstance(image, TarImage):
        return image._replace(tar=relative(image.tar, folder)), image.length
    for base in image_folders:
        path = os.path.join(folder, base, image or "")
        if os.path.isfile(path):
            return relative(path, folder), os.path.getsize(path)
    raise ValueError(f"{record.where}: the image {image!r} does not exist")


def attribute_values(record: Record) -> tuple:
    """A row's 40 values of the record's attributes. Raises ValueError if one is not 1, 0 or -1."""
    values = set(record.attributes)
    if not values <= PRESENT.keys():
        raise ValueError(f"{record.where}: expected 1, 0 or -1 for every attribute, found {values}")
    return tuple(PRESENT[value] for value in record.attributes)


def valid_captions(captions: dict, columns: tuple, where: str) -> list[str]:
    """The texts in `columns`, without empty ones. Raises ValueError if there are none, or if one is
    not a text or contains NUL or a lone surrogate (JSON allows these, tokenizers do not)."""
    values = [captions[column] for column in columns if captions.get(column)]
    texts = []
    for value in values:
        texts += value if isinstance(value, list) else [value]
    texts = [text for text in texts if text]
    is_text = all(isinstance(text, str) and not re.search("[\0\ud800-\udfff]", text)
                  for text in texts)
    valid = [text for text in texts if re.search(r"\w", text)] if is_text else []
    if not valid:
        raise ValueError(f"{where}: expected text in {' or '.join(columns)}, "
                         f"found {ascii(values):.200}")
    return valid


# ---- hashes --------------------------------------------------------------------------------------
def stable_hash(text: str) -> int:
    """56-bit hash of a text, the same in every process (unlike Python's `hash`)."""
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big")


def split_by_hash(text: str) -> str:
    """Split for a data set without splits of its own: 90 % train, 5 % val, 5 % test."""
    return SPLITS[bisect.bisect((90, 95), stable_hash(text) % 100)]
