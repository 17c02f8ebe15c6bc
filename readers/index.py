"""Index of a data set on disk: records are validated once, and every process memory-maps the result.

How does a line of a new layout become a row of a batch?

    line of an annotation file -> `Record`        a reader in layouts.py or tars.py, such as `read_celeba`
    -> valid record, encoded                      `validate_record`, called by `index_records`
    -> row of index-*.npy, line of index-*.txt    `write_index`
    -> `IndexColumn`s, the fields of `Faces`      `open_split`, called by `data.open_faces`
    -> image, caption and identity                `FaceDataset.__getitem__`
    -> row of a `Batch`                           `FaceDataset.collate`
"""
import bisect
import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from bert import clean_caption
from captions import ATTRIBUTES
from common.images import TarImage
from common.script import atomic_write, error_context

SPLITS = ("train", "val", "test")
COLUMNS = ("caption", "face_caption", "pcfg", "laion_caption")      # text columns of FaceCaption-15M


class Record(NamedTuple):
    """One face as annotated on disk, not yet validated. A reader maps a folder to the records of all splits
    (or, for a data set of many files, to one function per file, which yields records and appends errors to
    the list it is given). To support another layout, add a reader and a row of `LAYOUTS`."""
    where: str                      # location for error messages: "list_attr_celeba.txt line 7"
    image: object                   # file name below the layout's image folder, Path or `TarImage`
    split: str                      # one of SPLITS
    person_id: str = ""             # equal for images of one person; "": no other image shows this person
    attribute_values: tuple | None = None   # of CelebA's 40 attributes in its order, as written: "-1"
    captions: dict | None = None    # {column: text or list of texts}; other keys are ignored
    sketches: list | None = None    # Paths, in drawing order


def open_split(path: str | Path, split: str, layouts, cache: str | Path, columns: tuple, max_errors: float):
    """Fields of `data.Faces` for one split of a data set, given as a folder or a JSON annotation file. The
    first call validates all splits and writes an index to `cache`: index-*.npy has a row per face, sorted by
    split, which points to a line of index-*.txt; index-*.errors lists the invalid records, which are skipped.
    Captions come from all `columns` of a record. Raises ValueError if no layout matches, annotations are
    inconsistent, over `max_errors` percent of the records are invalid, or the split is empty."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such folder or file")
    path = Path(path).absolute()
    found = [layout for layout in layouts if any(path.glob(layout.pattern))]
    if path.is_file() and path.suffix == ".json":
        found = layouts[-1:]
    if not found:
        known = ", ".join(f"{layout.pattern} ({layout.title})" for layout in layouts)
        raise ValueError(f"{path}: expected one of {known}, found none (FaceCaption-15M's .parquet files "
                         f"hold only image URLs: download the images with img2dataset)")
    layout, name, folder = found[0], f"{found[0].title} {split}", path if path.is_dir() else path.parent
    index = Path(cache) / f"index-{fingerprint(folder, path, columns, Path(cache).resolve())}.npy"
    try:
        if not index.exists():
            write_index(index, layout, path, folder, columns)
        rows = np.load(index, mmap_mode="r")
        errors = index.with_suffix(".errors").read_text(encoding="utf-8").splitlines()
        check_error_rate(errors, len(rows) + len(errors), max_errors)
        begin, end = (bisect.bisect_left(rows["split"], SPLITS.index(split) + n) for n in (0, 1))
        if begin == end:
            found = dict(zip(SPLITS, np.bincount(rows["split"], minlength=len(SPLITS)).tolist()))
            raise ValueError(f"expected at least one face in this split, found {found}")
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{name}: {error}") from error
    rows, text = rows[begin:end], np.memmap(index.with_suffix(".txt"), np.uint8, "r")
    first = IndexColumn(text, rows, folder)._record(0)
    return dict(name=name, identity=rows["identity"],
                attributes=rows["attributes"] if rows["attributes"].size else None,
                **{field: IndexColumn(text, rows, folder, field) for field in first})


class IndexColumn:
    """One field of an index as a lazy sequence: an item is parsed from its line of `text` on access."""

    def __init__(self, text: np.ndarray, rows: np.ndarray, folder: Path, field=""):
        self.text, self.rows, self.folder, self.field = text, rows, folder, field

    def __len__(self):
        return len(self.rows)

    def _record(self, i):
        begin, length = self.rows["start"][i], self.rows["length"][i]
        return json.loads(self.text[begin:begin + length].tobytes())

    def __getitem__(self, i):
        if np.ndim(i):
            return IndexColumn(self.text, self.rows[i], self.folder, self.field)
        item = self._record(i)[self.field]
        if self.field == "sketches":
            return [self.folder / path for path in item]
        if self.field == "images":
            return self.folder / item if isinstance(item, str) else TarImage(self.folder / item[0], *item[1:])
        return item


def fingerprint(folder: Path, path: Path, columns: tuple, cache: Path):
    """Hash of everything an index depends on: the arguments, the code in readers/, and all file names in
    `folder` outside `cache`, with sizes and modification times for annotation files and tars."""
    code = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    digest = hashlib.sha256(code + repr((path, columns)).encode())
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if Path(root, name).resolve() != cache)
        for name in sorted(name for name in names if not name.startswith("index-")):
            file = os.path.join(root, name)
            digest.update(os.fsencode(file))
            if name.lower().endswith((".tar", ".json", ".txt", ".csv", ".mat", ".pickle")):
                digest.update(repr((os.stat(file).st_size, os.stat(file).st_mtime_ns)).encode())
    return digest.hexdigest()[:16]


def write_index(index: Path, layout, path: Path, folder: Path, columns: tuple):
    """Validate all records of a data set and write its index atomically, index-*.npy last."""
    rows, size, kinds = [], 0, Counter()
    with (atomic_write(index) as to_rows, atomic_write(index.with_suffix(".txt")) as to_text,
          atomic_write(index.with_suffix(".errors")) as to_errors):
        with open(to_text, "wb") as text, open(to_errors, "w", encoding="utf-8", errors="replace") as skipped:
            for chunk, lines, errors in index_jobs(layout.reader(path), layout, folder, columns):
                chunk["start"] += size
                size += text.write(lines)
                rows.append(chunk)
                skipped.writelines(" ".join(message.split()) + "\n" for message in errors)
                kinds.update(message.split(":")[0] for message in errors)
        rows = np.concatenate(rows)
        with open(to_rows, "wb") as file:
            np.save(file, rows[rows["split"].argsort(kind="stable")])
    if kinds:
        counts = ", ".join(f"{count:,} x {kind}" for kind, count in kinds.most_common())
        print(f"{path}: {len(rows):,} faces; skipped (see {index.with_suffix('.errors')}): {counts}")


def index_jobs(source, layout, folder: Path, columns: tuple):
    """Yield the result of `index_records` for a reader's records or, on all cores, for each of its jobs."""
    if layout.one_job_per_file:
        with multiprocessing.Pool(None, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            results = pool.imap(functools.partial(index_records, columns=columns), source)
            yield from tqdm(results, "indexing files", len(source))
    else:
        records = tqdm(source, "indexing records", leave=False)
        yield index_records(functools.partial(validate_files, records, layout, folder), columns)


def index_records(read, columns: tuple):
    """Validate the records that `read(errors)` yields -> (rows, bytes of their lines, errors)."""
    valid, errors = [], []
    for record in read(errors):
        with collect_errors(errors):
            valid.append(validate_record(record, columns))
    splits, people, attributes, lines = zip(*valid) if valid else ((), (), (b"",), ())
    rows = np.zeros(len(valid), np.dtype([
        ("identity", np.int64), ("start", np.int64), ("length", np.int32), ("split", np.uint8),
        ("attributes", bool, len(attributes[0]))], align=True))
    rows["identity"], rows["split"], rows["length"] = people, splits, [len(line) for line in lines]
    rows["start"] = rows["length"].cumsum(dtype=np.int64) - rows["length"]
    rows["attributes"] = np.frombuffer(b"".join(attributes), bool).reshape(rows["attributes"].shape)
    return rows, b"".join(lines), errors


@contextlib.contextmanager
def collect_errors(errors: list):
    """Catch a ValueError and append its message, "kind: where: ...", to `errors`."""
    try:
        yield
    except ValueError as error:
        errors.append(str(error))


def validate_files(records, layout, folder: Path, errors: list):
    """Yield the records whose image exists and is no duplicate, with paths relative to `folder`. Images are
    looked up in the first of the layout's `image_folders` that contains one of the first ten."""
    records, split_of, prefix = iter(records), {}, os.path.join(folder, "")
    first = list(itertools.islice(records, 10))
    matching = [base for base in layout.image_folders
                if any(os.path.isfile(os.path.join(folder, base, str(record.image))) for record in first)]
    base = [*matching, *layout.image_folders, ""][0]
    relative = lambda path: os.path.join(base, str(path).removeprefix(prefix))
    names_in = functools.cache(lambda at: set(os.listdir(folder / at) if os.path.isdir(folder / at) else ()))
    for record in itertools.chain(first, records):
        with collect_errors(errors):
            if not isinstance(record.image, (str, Path)):
                raise ValueError(f"no image name: {record.where} names no image")
            image, earlier = relative(record.image), split_of.get(record.image)
            if earlier and (earlier != record.split or not layout.allow_duplicates):
                raise ValueError(f"duplicate: {record.where}: {image} is already listed in split {earlier}")
            split_of[record.image] = record.split
            directory, name = os.path.split(image)
            if name not in names_in(directory):
                raise ValueError(f"no file: {record.where}: {folder / image} does not exist")
            sketches = record.sketches and [relative(path) for path in record.sketches]
            yield record._replace(image=image, sketches=sketches)


def validate_record(record: Record, columns: tuple):
    """(split number, person hash, 0 or 40 attribute bytes, JSON line); ValueError if a field is invalid."""
    line, where = {"images": record.image}, f"{record.where} ({record.image})"
    if record.split not in SPLITS:
        raise ValueError(f"split: {where}: expected train, val or test, found {record.split!r}")
    attributes = b""
    if record.attribute_values is not None:
        with error_context("1, 0 or -1 for every attribute", f"attributes: {where}"):
            attributes = bytes(map(ATTRIBUTE_VALUES.__getitem__, record.attribute_values))
    if record.captions is not None:
        with error_context("non-empty text captions", f"captions: {where}"):
            line["captions"] = valid_captions(record.captions, columns)
    if record.sketches is not None:
        line["sketches"] = record.sketches
    person_id = stable_hash(record.person_id or str(record.image))
    return SPLITS.index(record.split), person_id, attributes, json.dumps(line).encode() + b"\n"


LOWER_CASE = [name.lower() for name in ATTRIBUTES]
ATTRIBUTE_VALUES = {"1": True, "0": False, "-1": False}


def valid_captions(captions: dict, columns: tuple):
    """List of the texts in `columns`. Raises ValueError if there is none, or if one is empty, contains NUL
    or a lone surrogate (JSON allows these, tokenizers do not)."""
    texts = [captions[column] for column in columns if captions.get(column)]
    texts = [text for value in texts for text in (value if isinstance(value, list) else [value])]
    for text in texts or [""]:
        if re.search("[\0\ud800-\udfff]", text) or not clean_caption(text):
            raise ValueError(f"found {ascii(text)[:100]}")
    return texts


def check_error_rate(errors: list, count: int, max_errors: float):
    """Raise ValueError with the first error if `errors` exceed `max_errors` percent of `count` records."""
    if len(errors) > count * max_errors / 100:
        raise ValueError(f"{errors[0]} ({len(errors):,} of {count:,} are invalid, more than --max_errors "
                         f"{max_errors:g} percent)")


def read_json(content: bytes):
    """Parse JSON. Raises ValueError for repeated keys: damage can merge two records into one."""
    def record_of(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"repeated key in {str(pairs)[:100]}")
        return dict(pairs)
    return json.loads(content, object_pairs_hook=record_of)


def stable_hash(text: str):
    """56-bit hash of a text, the same in every process (unlike Python's `hash`)."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:7], "big")


def split_by_hash(text: str):
    """Split for a data set without splits of its own: 90 % train, 5 % val, 5 % test."""
    percent = stable_hash(text) % 100
    if percent < 90:
        return "train"
    return "val" if percent < 95 else "test"
