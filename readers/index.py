"""Index of a data set on disk: records are validated once, and every process memory-maps the result.

How does a line of a new layout become a row of a batch?

    line of an annotation file -> `Record`        a reader in layouts.py or tars.py, such as `read_celeba`
    -> record of an existing image                `validate_files` (not for images in tars)
    -> valid record, encoded                      `validate_record`, called by `index_records`
    -> row of index-*.npy, line of index-*.txt    `write_index`
    -> `IndexColumn`s, the fields of `Faces`      `open_split`
    -> image, caption and identity                `FaceDataset.__getitem__`
    -> row of a `Batch`                           `FaceDataset.collate`
"""
import bisect
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from bert import clean_caption
from common.images import TarImage
from common.script import atomic_write, error_context

SPLITS = ("train", "val", "test")
COLUMNS = ("caption", "face_caption", "pcfg", "laion_caption")      # text columns of FaceCaption-15M
ATTRIBUTE_VALUES = {"1": True, "0": False, "-1": False}             # as annotation files write them


class Record(NamedTuple):
    """One face as annotated on disk, not yet validated. A reader maps a path to the records of all splits; to
    support another layout, add a reader and a row of `LAYOUTS`."""
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
            write_index(index, layout.jobs(path), path, columns)
        rows = np.load(index, mmap_mode="r")
        errors = index.with_suffix(".errors").read_text(encoding="utf-8").splitlines()
        check_error_rate(errors, len(rows) + len(errors), max_errors)
        begin, end = (bisect.bisect_left(rows["split"], SPLITS.index(split) + n) for n in (0, 1))
        if begin == end:
            counts = dict(zip(SPLITS, np.bincount(rows["split"], minlength=len(SPLITS)).tolist()))
            raise ValueError(f"expected at least one face in this split, found {counts}")
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


def write_index(index: Path, jobs: list, path: Path, columns: tuple):
    """Validate the records of all jobs (see `Layout`) and write their index atomically, index-*.npy last."""
    rows, size, skipped = [], 0, 0
    with (atomic_write(index) as to_rows, atomic_write(index.with_suffix(".txt")) as to_text,
          atomic_write(index.with_suffix(".errors")) as to_errors, open(to_rows, "wb") as table,
          open(to_text, "wb") as text, open(to_errors, "w", encoding="utf-8", errors="replace") as invalid):
        for chunk, lines, errors in parallel_map(functools.partial(index_records, columns=columns), jobs):
            chunk["start"] += size
            size += text.write(lines)
            rows.append(chunk)
            invalid.writelines(" ".join(message.split()) + "\n" for message in errors)
            skipped += len(errors)
        rows = np.concatenate(rows)
        np.save(table, rows[rows["split"].argsort(kind="stable")])
    if skipped:
        print(f"{path}: {len(rows):,} faces; invalid records skipped: {skipped:,}, listed in "
              f"{index.with_suffix('.errors')}")


def parallel_map(function, jobs: list):
    """Yield function(job) for each job: several run on all cores, a single one in this process."""
    if len(jobs) == 1:
        yield function(jobs[0])
    else:
        with multiprocessing.Pool(None, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            yield from tqdm(pool.imap(function, jobs), "indexing files", len(jobs))


def index_records(job, columns: tuple):
    """Validate the records that `job(errors)` yields -> (rows, bytes of their lines, errors)."""
    rows, lines, errors, start = [], [], [], 0
    for record in job(errors):
        with collect_errors(errors):
            person, split, attributes, line = validate_record(record, columns)
            rows.append((person, start, len(line), split, attributes))
            lines.append(line)
            start += len(line)
    dtype = np.dtype([("identity", np.int64), ("start", np.int64), ("length", np.int32), ("split", np.uint8),
                      ("attributes", bool, len(rows[0][-1]) if rows else 0)], align=True)
    return np.array(rows, dtype), b"".join(lines), errors


@contextlib.contextmanager
def collect_errors(errors: list):
    """Catch a ValueError and append its message, "kind: where: ...", to `errors`."""
    try:
        yield
    except ValueError as error:
        errors.append(str(error))


def validate_files(reader, image_folders: tuple, allow_duplicates: bool, path: Path, errors: list):
    """Yield the records whose image exists and is listed once, or with `allow_duplicates` in one split, with
    paths relative to the folder."""
    folder, split_of = path if path.is_dir() else path.parent, {}
    inside = os.path.join(folder, "")
    names_in = functools.cache(lambda base: set(os.listdir(base)) if os.path.isdir(base) else ())
    for record in tqdm(reader(path), "indexing records", leave=False):
        with collect_errors(errors):
            if not isinstance(record.image, (str, Path)):
                raise ValueError(f"no image name: {record.where} names no image")
            earlier = split_of.get(record.image)
            if earlier and (earlier != record.split or not allow_duplicates):
                raise ValueError(f"duplicate: {record.where}: {record.image} is already in split {earlier}")
            split_of[record.image] = record.split
            for base in image_folders:
                image = os.path.join(base, str(record.image).removeprefix(inside))
                directory, name = os.path.split(os.path.join(folder, image))
                if name in names_in(directory):
                    break
            else:
                raise ValueError(f"no file: {record.where}: {directory}/{name} does not exist")
            sketches = record.sketches and [str(sketch).removeprefix(inside) for sketch in record.sketches]
            yield record._replace(image=image, sketches=sketches)


def validate_record(record: Record, columns: tuple):
    """(person hash, split number, 0 or 40 attributes, JSON line); raises ValueError if a field is invalid."""
    line, where, attributes = {"images": record.image}, f"{record.where} ({record.image})", ()
    if record.split not in SPLITS:
        raise ValueError(f"split: {where}: expected train, val or test, found {record.split!r}")
    if record.attribute_values is not None:
        with error_context("1, 0 or -1 for every attribute", f"attributes: {where}"):
            attributes = tuple(map(ATTRIBUTE_VALUES.__getitem__, record.attribute_values))
    if record.captions is not None:
        with error_context("non-empty text captions", f"captions: {where}"):
            line["captions"] = valid_captions(record.captions, columns)
    if record.sketches is not None:
        line["sketches"] = record.sketches
    person = stable_hash(record.person_id or str(record.image))
    return person, SPLITS.index(record.split), attributes, json.dumps(line).encode() + b"\n"


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


def stable_hash(text: str):
    """56-bit hash of a text, the same in every process (unlike Python's `hash`)."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:7], "big")


def split_by_hash(text: str):
    """Split for a data set without splits of its own: 90 % train, 5 % val, 5 % test."""
    percent = stable_hash(text) % 100
    if percent < 90:
        return "train"
    return "val" if percent < 95 else "test"
