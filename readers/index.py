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
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from bert import clean_caption
from common.distributed import parallel_map
from common.images import IMAGE_SUFFIXES, TarImage
from common.script import atomic_write, error_context, escape_control_chars

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


def open_split(path: str | Path, split: str, layouts, cache: str | Path, columns: tuple, max_errors: float,
               outside: bool):
    """Fields of `data.Faces` for one split of a data set, given as a folder or a JSON annotation file. The
    first call validates all splits and writes an index to `cache`: index-*.npy has a row per face, sorted by
    split, which points to a line of index-*.txt; index-*.errors lists the invalid records, which are skipped.
    Captions come from all `columns` of a record. Images outside the folder are invalid, unless `outside`.
    Raises ValueError if no layout matches, annotations are inconsistent, over `max_errors` percent of the
    records are invalid, or the split is empty."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such folder or file")
    path = Path(os.path.abspath(path))
    layout = next((layout for layout in layouts if any(path.glob(layout.reads.split()[0]))), None)
    if path.is_file() and path.suffix == ".json":
        layout = layouts[-1]
    if not layout:
        known = ", ".join(f"{layout.reads.split()[0]} ({layout.title})" for layout in layouts)
        raise ValueError(f"{path}: expected one of {known}, found none (FaceCaption-15M's .parquet "
                         f"files hold only URLs: download with img2dataset; unpack .tar.gz files to .tar)")
    folder = path if path.is_dir() else path.parent
    try:
        index = Path(cache) / f"index-{fingerprint(layout.reads, path, folder, columns, outside)}.npy"
        try:
            fields, counts, errors = load_index(index, split, folder)
        except Exception:                   # missing, damaged, or not an index
            validate = functools.partial(index_records, columns=columns, outside=outside)
            write_index(index, validate, layout.jobs(path), path)
            fields, counts, errors = load_index(index, split, folder)
        own = [error for error in errors if error.endswith(f"[{split}]")]
        check_error_rate(errors, sum(counts.values()) + len(errors), max_errors)
        check_error_rate(own, counts[split] + len(own), max_errors)
        if not fields:
            hint = f"; list them in {split}.json" if "train.json" in layout.reads else ""
            hint += f"; first invalid record: {errors[0]}" if errors else ""
            raise ValueError(f"{split}: expected at least one face in this split, found {counts}{hint}")
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{layout.title}: {error}") from error
    return {"name": f"{layout.title} {split}"} | fields


def load_index(index: Path, split: str, folder: Path):
    """(fields of `data.Faces` for one split, {split: its number of faces}, errors). Raises an error of any
    type if a file is missing or damaged."""
    rows, errors = np.load(index, mmap_mode="r"), index.with_suffix(".errors").read_text(encoding="utf-8")
    ends = [bisect.bisect_left(rows["split"], n) for n in range(len(SPLITS) + 1)]
    counts, n, fields = dict(zip(SPLITS, np.diff(ends).tolist())), SPLITS.index(split), {}
    if counts[split]:
        text, rows = np.memmap(index.with_suffix(".txt"), np.uint8, "r"), rows[ends[n]:ends[n + 1]]
        first, _ = (IndexColumn(text, rows, folder)._record(i) for i in (0, -1))    # also checks the text
        if not first.keys() <= {"images", "captions", "sketches"}:
            raise ValueError(f"{index}: found the fields {list(first)}")
        attributes = rows["attributes"] if rows["attributes"].size else None
        fields = dict(identity=rows["identity"], attributes=attributes,
                      **{field: IndexColumn(text, rows, folder, field) for field in first})
    return fields, counts, errors.splitlines()


class IndexColumn:
    """One field of an index as a lazy sequence: an item is parsed from its line of `text` on access."""

    def __init__(self, text: np.ndarray, rows: np.ndarray, folder: Path, field=""):
        self.text, self.rows, self.folder, self.field = text, rows, folder, field

    def __len__(self):
        return len(self.rows)

    def _record(self, i):
        begin, length = self.rows["start"][i], self.rows["length"][i]
        with error_context("a complete index; delete this file and it will be rebuilt", self.text.filename):
            record = json.loads(self.text[begin:begin + length].tobytes())
            return record[self.field] if self.field else record

    def __getitem__(self, i):
        if np.ndim(i):
            return IndexColumn(self.text, self.rows[i], self.folder, self.field)
        item = self._record(i)
        if self.field == "sketches":
            return [self.folder / path for path in item]
        if self.field == "images":
            return self.folder / item if isinstance(item, str) else TarImage(self.folder / item[0], *item[1:])
        return item


def fingerprint(reads: str, path: Path, folder: Path, *arguments):
    """Two hashes: of the arguments, and of all else an index depends on: the code in readers/ and what the
    layout `reads`, annotation files by name, size and modification time, images in folders by name."""
    digest, seen, files = hashlib.sha256(), set(), sorted(Path(__file__).parent.glob("*.py"))
    for pattern in reads.split() if path == folder else [".", path.name]:
        files += sorted(folder.glob(pattern)) if "*" in pattern else [folder / pattern]
    for file in files:
        for root, folders, names in os.walk(file, followlinks=True):
            if os.path.realpath(root) in seen or "log.jsonl" in names:  # a loop of links; a run's output
                names = folders[:] = []
            folders.sort()
            seen.add(os.path.realpath(root))
            images = sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES))
            digest.update(os.fsencode("\n".join([root, *images] if images else [])))
        if file.is_file():
            digest.update(repr((file, file.stat().st_size, file.stat().st_mtime_ns)).encode())
    return f"{stable_hash(repr((path, arguments))):014x}-{digest.hexdigest()[:16]}"


def write_index(index: Path, validate, jobs: list, path: Path):
    """Validate the records of all jobs (see `Layout`) and write their index atomically, index-*.npy last."""
    rows, size, skipped = [], 0, 0
    with (atomic_write(index) as to_rows, atomic_write(index.with_suffix(".txt")) as to_text,
          atomic_write(index.with_suffix(".errors")) as to_errors, open(to_rows, "wb") as table,
          open(to_text, "wb") as text, open(to_errors, "w", encoding="utf-8", errors="replace") as invalid,
          parallel_map(validate, jobs, "indexing files") as chunks):
        for chunk, lines, errors in chunks:
            chunk["start"] += size
            size += text.write(lines)
            rows.append(chunk)
            invalid.writelines(" ".join(message.split()) + "\n" for message in errors)
            skipped += len(errors)
        rows = np.concatenate(rows)
        np.save(table, rows[rows["split"].argsort(kind="stable")])
    for old in index.parent.glob(f"{index.stem.rpartition('-')[0]}-*"):     # earlier index of this data set
        if old.suffix != ".partial" and old.stem != index.stem:
            old.unlink(missing_ok=True)
    if skipped:
        print(escape_control_chars(f"{path}: {len(rows):,} faces; invalid records skipped: {skipped:,}, "
                                   f"listed in {index.with_suffix('.errors')}"))


def index_records(job, columns: tuple, outside=False):
    """Validate the records that `job(errors)` yields -> (rows, bytes of their lines, errors)."""
    rows, lines, errors, start = [], [], [], 0
    for record in job(errors):
        with collect_errors(errors, record.split):
            person, split, attributes, line = validate_record(record, columns, outside)
            rows.append((person, start, len(line), split, attributes))
            lines.append(line)
            start += len(line)
    names, count = ["identity", "start", "length", "split", "attributes"], len(attributes) if rows else 0
    as_bytes, as_bools = (np.dtype(dict(names=names, formats=["i8", "i8", "i4", "u1", values]), align=True)
                          for values in (f"V{count}", f"({count},)?"))
    return np.array(rows, as_bytes).view(as_bools), b"".join(lines), errors


@contextlib.contextmanager
def collect_errors(errors: list, split=""):
    """Catch a ValueError and append its message, "kind: where: ... [split]", to `errors`."""
    try:
        yield
    except ValueError as error:
        errors.append(f"{error} [{split}]" if split else str(error))


def validate_files(reader, image_folders: tuple, allow_duplicates: bool, path: Path, errors: list):
    """Yield the records whose image exists and is listed once, or with `allow_duplicates` in one split, with
    paths relative to the folder."""
    folder, split_of = path if path.is_dir() else path.parent, {}
    inside = os.path.join(folder, "")
    names_in = functools.cache(lambda at: {*os.listdir(folder / at)} if os.path.isdir(folder / at) else ())
    for record in tqdm(reader(path), "indexing records", leave=False):
        with collect_errors(errors, record.split):
            if not isinstance(record.image, (str, Path)):
                raise ValueError(f"no image name: {record.where} names no image")
            for base in image_folders:
                image = os.path.normpath(os.path.join(base, record.image)).removeprefix(inside)
                parent, name = os.path.split(image)
                if name in names_in(parent):
                    break
            if name not in names_in(parent):
                raise ValueError(f"no file: {record.where}: {inside}{image:.200} does not exist")
            earlier = split_of.get(image)
            if earlier and (earlier != record.split or not allow_duplicates):
                raise ValueError(f"duplicate: {record.where}: {image:.200} is already in split {earlier}")
            split_of[image] = record.split
            sketches = record.sketches and [str(sketch).removeprefix(inside) for sketch in record.sketches]
            yield Record(record.where, image, *record[2:6], sketches)       # half the time of _replace


def validate_record(record: Record, columns: tuple, outside: bool):
    """(person hash, split number, 0 or 40 attributes, JSON line); raises ValueError if a field is invalid."""
    line, where, attributes = {"images": record.image}, f"{record.where} ({record.image!s:.200})", b""
    if record.split not in SPLITS:
        raise ValueError(f"split: {where}: expected train, val or test, found {record.split!r}")
    if not outside and str(record.image).startswith(("/", "../")):
        raise ValueError(f"outside: {where}: the image is outside the data set; --outside accepts this")
    if record.attribute_values is not None:
        values = record.attribute_values
        attributes = bytes(map(ATTRIBUTE_VALUES.get, values, [2] * len(values)))        # 2: another value
        if 2 in attributes:
            raise ValueError(f"attributes: {where}: expected 1, 0 or -1 for every attribute, found others")
    if record.captions is not None:
        with error_context("non-empty text captions", f"captions: {where}"):
            line["captions"] = valid_captions(record.captions, columns)
    if record.sketches is not None:
        line["sketches"] = record.sketches
    person = stable_hash(record.person_id or str(record.image))
    return person, SPLITS.index(record.split), attributes, json.dumps(line).encode() + b"\n"


def valid_captions(captions: dict, columns: tuple):
    """List of the texts in `columns`, without empty ones. Raises ValueError if none is left, or if one
    contains NUL or a lone surrogate (JSON allows these, tokenizers do not)."""
    texts = [captions[column] for column in columns if captions.get(column)]
    texts = [text for value in texts for text in (value if isinstance(value, list) else [value])]
    valid = [text for text in texts if text is not None and clean_caption(text)]
    for text in valid or texts[:1] or [""]:
        if not valid or re.search("[\0\ud800-\udfff]", text):
            raise ValueError(f"found {ascii(text)[:100]}")
    return valid


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
    return SPLITS[bisect.bisect((90, 95), stable_hash(text) % 100)]
