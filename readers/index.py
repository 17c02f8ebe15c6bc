"""Sets on disk: records are checked once and kept in a mapped index."""
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
COLUMNS = ("caption", "face_caption", "pcfg", "laion_caption")      # that FaceCaption-15M has for texts


class Record(NamedTuple):
    """One face as the lists of a set tell of it; nothing of this has been checked.

    A reader is a function from a folder to the records of all parts of the set in it (or, of a set
    in many files, to a function for each, which gives some of the records and adds what it lost to
    the list that it is handed). For a set that lies otherwise, write one more, and a row of LAYOUTS.
    """
    where: str                      # for errors: "list_attr_celeba.txt line 7"
    image: object                   # its file's name below the set's pictures; or its Path, or a Crop
    split: str                      # one of SPLITS
    person_id: str = ""             # equal: the same person; "": nobody that another picture shows
    attribute_values: tuple | None = None  # of the 40 attributes in CelebA's order, as written: "-1"
    captions: dict | None = None    # {column: a text or a list of texts}, and other columns
    sketches: list | None = None    # Paths, as it grows


def open_split(path, split, layouts, cache, columns, max_errors):
    """The fields of `data.Faces` for a part of a set in a folder, by what is found there, or in a json
    list.

    All that the set's lists say is read and checked once, and kept in the folder `cache` as an
    index which every process maps instead of having its own: index-*.npy has a row for each face,
    part after part, index-*.txt a line, which the row points to. A record with which something is
    wrong is left out, and listed in index-*.lost; more than max_lost percent of these are an error,
    and so is what makes a list doubtful as a whole. Captions are taken from all `columns` that a
    record has.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such folder or file")
    path = Path(path).absolute()
    found = [layout for layout in layouts if any(path.glob(layout.pattern))]
    if path.is_file() and path.suffix == ".json":
        found = layouts[-1:]
    if not found:
        known = ", ".join(f"{layout.pattern} ({layout.title})" for layout in layouts)
        raise ValueError(f"{path}: found none of {known}. (FaceCaption-15M's .parquet has the addresses of "
                         f"its pictures only: fetch them with img2dataset)")
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
            raise ValueError(f"no faces, expected at least one in this part; found {found}")
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{name}: {error}") from error
    rows, text = rows[begin:end], np.memmap(index.with_suffix(".txt"), np.uint8, "r")
    first = IndexColumn(text, rows, folder)._record(0)
    return dict(name=name, identity=rows["identity"],
                attributes=rows["attributes"] if rows["attributes"].size else None,
                **{field: IndexColumn(text, rows, folder, field) for field in first})


class IndexColumn:
    """What the lines of an index say of one field, as a list that takes no memory."""

    def __init__(self, text, rows, folder, field=""):
        self.text, self.rows, self.folder, self.field = text, rows, folder, field

    def __len__(self):
        return len(self.rows)

    def _record(self, i):
        begin, length = self.rows["start"][i], self.rows["length"][i]
        return json.loads(self.text[begin:begin + length].tobytes())

    def __getitem__(self, i):
        if np.ndim(i):
            return IndexColumn(self.text, self.rows[i], self.folder, self.field)
        found = self._record(i)[self.field]
        if self.field == "sketches":
            return [self.folder / path for path in found]
        if self.field == "images":
            return self.folder / found if isinstance(found, str) else TarImage(self.folder / found[0], *found[1:])
        return found


def fingerprint(folder, path, columns, cache):
    """A digest of what an index depends on: what is asked for, this code, and of all files in the
    folder, but for a cache in it, the names, sizes and times; of pictures the names only."""
    code = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    state = hashlib.sha256(code + repr((path, columns)).encode())
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if Path(root, name).resolve() != cache)
        for name in sorted(name for name in names if not name.startswith("index-")):
            file = os.path.join(root, name)
            state.update(os.fsencode(file))
            if name.lower().endswith((".tar", ".json", ".txt", ".csv", ".mat", ".pickle")):
                state.update(repr((os.stat(file).st_size, os.stat(file).st_mtime_ns)).encode())
    return state.hexdigest()[:16]


def write_index(index, layout, path, folder, columns):
    """Read and check a whole set. The files appear when all are complete, the rows last."""
    rows, size, kinds = [], 0, Counter()
    with (atomic_write(index) as to_rows, atomic_write(index.with_suffix(".txt")) as to_text,
          atomic_write(index.with_suffix(".errors")) as to_errors):
        with open(to_text, "wb") as text, open(to_errors, "w", encoding="utf-8", errors="replace") as left_out:
            for some, lines, errors in index_jobs(layout.reader(path), layout, folder, columns):
                some["start"] += size
                size += text.write(lines)
                rows.append(some)
                left_out.writelines(" ".join(sentence.split()) + "\n" for sentence in errors)
                kinds.update(sentence.split(":")[0] for sentence in errors)
        rows = np.concatenate(rows)
        with open(to_rows, "wb") as file:
            np.save(file, rows[rows["split"].argsort(kind="stable")])
    if kinds:
        found = ", ".join(f"{count:,} x {kind}" for kind, count in kinds.most_common())
        print(f"{path}: {len(rows):,} faces; left out, and listed in {index.with_suffix('.errors')}: {found}")


def index_jobs(found, layout, folder, columns):
    """What `examine` makes of a reader's records, or, on all cores, of functions that give some."""
    if layout.one_job_per_file:
        with multiprocessing.Pool(None, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            work = pool.imap(functools.partial(index_records, columns=columns), found)
            yield from tqdm(work, "reading the set", len(found))
    else:
        records = tqdm(found, "reading the set", leave=False)
        yield index_records(functools.partial(validate_files, records, layout, folder), columns)


def index_records(read, columns):
    """Check the records that read(lost) gives -> (rows, lines, lost), as they are to be written."""
    kept, errors = [], []
    for record in read(errors):
        with collect_errors(errors):
            kept.append(validate_record(record, columns))
    parts, people, attributes, lines = zip(*kept) if kept else ((), (), (b"",), ())
    rows = np.zeros(len(kept), np.dtype([
        ("identity", np.int64), ("start", np.int64), ("length", np.int32), ("split", np.uint8),
        ("attributes", bool, len(attributes[0]))], align=True))
    rows["identity"], rows["split"], rows["length"] = people, parts, [len(line) for line in lines]
    rows["start"] = rows["length"].cumsum(dtype=np.int64) - rows["length"]
    rows["attributes"] = np.frombuffer(b"".join(attributes), bool).reshape(rows["attributes"].shape)
    return rows, b"".join(lines), errors


@contextlib.contextmanager
def collect_errors(errors):
    """What is wrong inside becomes an entry of `lost`, "kind: a sentence", and is passed over."""
    try:
        yield
    except ValueError as error:
        errors.append(str(error))


def validate_files(records, layout, folder, errors):
    """Records with what one alone does not tell: whether another has the same picture, and whether
    that is there, below the first place that has one of the first of them."""
    records, part_of, inside = iter(records), {}, os.path.join(folder, "")
    first = list(itertools.islice(records, 10))
    has_some = [place for place in layout.image_folders
                if any(os.path.isfile(os.path.join(folder, place, str(record.image))) for record in first)]
    place = [*has_some, *layout.image_folders, ""][0]
    below = lambda path: os.path.join(place, str(path).removeprefix(inside))
    names_in = functools.cache(lambda at: set(os.listdir(folder / at) if os.path.isdir(folder / at) else ()))
    for record in itertools.chain(first, records):
        with collect_errors(errors):
            if not isinstance(record.image, (str, Path)):
                raise ValueError(f"no name: {record.where} names no picture")
            picture, before = below(record.image), part_of.get(record.image)
            if before and (before != record.split or not layout.allow_duplicates):
                raise ValueError(f"listed twice: {record.where} lists {picture} a second time, in one part "
                                 f"or two")
            part_of[record.image] = record.split
            directory, name = os.path.split(picture)
            if name not in names_in(directory):
                raise ValueError(f"no file: {record.where} lists {folder / picture}, which is not there")
            sketches = record.sketches and [below(path) for path in record.sketches]
            yield record._replace(image=picture, sketches=sketches)


def validate_record(record, columns):
    """(part, person, attributes, line) of a record in which nothing is wrong."""
    line, where = {"images": record.image}, f"{record.where} ({record.image})"
    if record.split not in SPLITS:
        raise ValueError(f"part: {where} is in part {record.split!r}, expected train, val or test")
    attributes = b""
    if record.attribute_values is not None:
        with error_context("1, 0 or -1 for every attribute", f"attributes: {where}"):
            attributes = bytes(map(ATTRIBUTE_VALUES.__getitem__, record.attribute_values))
    if record.captions is not None:
        with error_context("captions that are text and not empty", f"captions: {where}"):
            line["captions"] = valid_captions(record.captions, columns)
    if record.sketches is not None:
        line["sketches"] = record.sketches
    person_id = stable_hash(record.person_id or str(record.image))
    return SPLITS.index(record.split), person_id, attributes, json.dumps(line).encode() + b"\n"


LOWER_CASE = [name.lower() for name in ATTRIBUTES]
ATTRIBUTE_VALUES = {"1": True, "0": False, "-1": False}


def valid_captions(record, columns):
    """The texts in these columns. Binary ones are refused, and half characters, which json can write
    and no tokenizer reads."""
    found = [record[column] for column in columns if record.get(column)]
    found = [text for some in found for text in (some if isinstance(some, list) else [some])]
    for text in found or [""]:
        if re.search("[\0\ud800-\udfff]", text) or not clean_caption(text):
            raise ValueError(f"found {ascii(text)[:100]}")
    return found


def check_error_rate(errors, count, max_errors):
    """ValueError where more than max_lost percent of `count` are lost, of which `lost` has a sentence
    each."""
    if len(errors) > count * max_errors / 100:
        raise ValueError(f"{errors[0]} ({len(errors):,} of {count:,} are lost, which is more than --max_errors "
                         f"{max_errors:g} percent)")


def read_json(content):
    """json whose records name everything once: in a damaged list two of them may have become
    one."""
    def record_of(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"a record has a name twice: {str(pairs)[:100]}")
        return dict(pairs)
    return json.loads(content, object_pairs_hook=record_of)


def stable_hash(text):
    """A text -> a number of 56 bits, the same in every process and every file."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:7], "big")


def split_by_hash(text):
    """90, 5 and 5 percent, where a set has no parts of its own."""
    percent = stable_hash(text) % 100
    if percent < 90:
        return "train"
    return "val" if percent < 95 else "test"
