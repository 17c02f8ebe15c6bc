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
from common.images import Crop
from common.script import expecting, whole_file

SPLITS = ("train", "val", "test")
COLUMNS = ("caption", "face_caption", "pcfg", "laion_caption")      # that FaceCaption-15M has for texts


class Record(NamedTuple):
    """One face as the lists of a set tell of it; nothing of this has been checked.

    A reader is a function from a folder to the records of all parts of the set in it (or, of a set
    in many files, to a function for each, which gives some of the records and adds what it lost to
    the list that it is handed). For a set that lies otherwise, write one more, and a row of LAYOUTS.
    """
    where: str                      # for errors: "list_attr_celeba.txt line 7"
    picture: object                 # its file's name below the set's pictures; or its Path, or a Crop
    part: str                       # one of SPLITS
    person: str = ""                # equal: the same person; "": nobody that another picture shows
    values: tuple | None = None     # of the 40 attributes in CelebA's order, as written: "-1"
    captions: dict | None = None    # {column: a text or a list of texts}, and other columns
    sketches: list | None = None    # Paths, as it grows


def open_split(path, split, layouts, cache, columns, max_lost):
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
    found = [layout for layout in layouts if any(path.glob(layout.sign))]
    if path.is_file() and path.suffix == ".json":
        found = layouts[-1:]
    if not found:
        known = ", ".join(f"{layout.sign} ({layout.title})" for layout in layouts)
        raise ValueError(f"{path}: found none of {known}. (FaceCaption-15M's .parquet has the addresses of "
                         f"its pictures only: fetch them with img2dataset)")
    layout, name, folder = found[0], f"{found[0].title} {split}", path if path.is_dir() else path.parent
    index = Path(cache) / f"index-{state_of(folder, path, columns, Path(cache).resolve())}.npy"
    try:
        if not index.exists():
            write_index(index, layout, path, folder, columns)
        rows = np.load(index, mmap_mode="r")
        lost = index.with_suffix(".lost").read_text(encoding="utf-8").splitlines()
        check_lost(lost, len(rows) + len(lost), max_lost)
        begin, end = (bisect.bisect_left(rows["part"], SPLITS.index(split) + n) for n in (0, 1))
        if begin == end:
            found = dict(zip(SPLITS, np.bincount(rows["part"], minlength=len(SPLITS)).tolist()))
            raise ValueError(f"no faces, expected at least one in this part; found {found}")
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{name}: {error}") from error
    rows, text = rows[begin:end], np.memmap(index.with_suffix(".txt"), np.uint8, "r")
    first = Lines(text, rows, folder).line(0)
    return dict(name=name, identity=rows["identity"],
                attributes=rows["attributes"] if rows["attributes"].size else None,
                **{field: Lines(text, rows, folder, field) for field in first})


class Lines:
    """What the lines of an index say of one field, as a list that takes no memory."""

    def __init__(self, text, rows, folder, field=""):
        self.text, self.rows, self.folder, self.field = text, rows, folder, field

    def __len__(self):
        return len(self.rows)

    def line(self, i):
        begin, length = self.rows["start"][i], self.rows["length"][i]
        return json.loads(self.text[begin:begin + length].tobytes())

    def __getitem__(self, i):
        if np.ndim(i):
            return Lines(self.text, self.rows[i], self.folder, self.field)
        found = self.line(i)[self.field]
        if self.field == "sketches":
            return [self.folder / path for path in found]
        if self.field == "pictures":
            return self.folder / found if isinstance(found, str) else Crop(self.folder / found[0], *found[1:])
        return found


def state_of(folder, path, columns, cache):
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
    with (whole_file(index) as to_rows, whole_file(index.with_suffix(".txt")) as to_text,
          whole_file(index.with_suffix(".lost")) as to_lost):
        with open(to_text, "wb") as text, open(to_lost, "w", encoding="utf-8", errors="replace") as left_out:
            for some, lines, lost in examined(layout.reader(path), layout, folder, columns):
                some["start"] += size
                size += text.write(lines)
                rows.append(some)
                left_out.writelines(" ".join(sentence.split()) + "\n" for sentence in lost)
                kinds.update(sentence.split(":")[0] for sentence in lost)
        rows = np.concatenate(rows)
        with open(to_rows, "wb") as file:
            np.save(file, rows[rows["part"].argsort(kind="stable")])
    if kinds:
        found = ", ".join(f"{count:,} x {kind}" for kind, count in kinds.most_common())
        print(f"{path}: {len(rows):,} faces; left out, and listed in {index.with_suffix('.lost')}: {found}")


def examined(found, layout, folder, columns):
    """What `examine` makes of a reader's records, or, on all cores, of functions that give some."""
    if layout.apart:
        with multiprocessing.Pool(None, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            work = pool.imap(functools.partial(examine, columns=columns), found)
            yield from tqdm(work, "reading the set", len(found))
    else:
        records = tqdm(found, "reading the set", leave=False)
        yield examine(functools.partial(whole_set, records, layout, folder), columns)


def examine(read, columns):
    """Check the records that read(lost) gives -> (rows, lines, lost), as they are to be written."""
    kept, lost = [], []
    for record in read(lost):
        with noting(lost):
            kept.append(checked(record, columns))
    parts, people, attributes, lines = zip(*kept) if kept else ((), (), (b"",), ())
    rows = np.zeros(len(kept), np.dtype([
        ("identity", np.int64), ("start", np.int64), ("length", np.int32), ("part", np.uint8),
        ("attributes", bool, len(attributes[0]))], align=True))
    rows["identity"], rows["part"], rows["length"] = people, parts, [len(line) for line in lines]
    rows["start"] = rows["length"].cumsum(dtype=np.int64) - rows["length"]
    rows["attributes"] = np.frombuffer(b"".join(attributes), bool).reshape(rows["attributes"].shape)
    return rows, b"".join(lines), lost


@contextlib.contextmanager
def noting(lost):
    """What is wrong inside becomes an entry of `lost`, "kind: a sentence", and is passed over."""
    try:
        yield
    except ValueError as error:
        lost.append(str(error))


def whole_set(records, layout, folder, lost):
    """Records with what one alone does not tell: whether another has the same picture, and whether
    that is there, below the first place that has one of the first of them."""
    records, part_of, inside = iter(records), {}, os.path.join(folder, "")
    first = list(itertools.islice(records, 10))
    has_some = [place for place in layout.places
                if any(os.path.isfile(os.path.join(folder, place, str(record.picture))) for record in first)]
    place = [*has_some, *layout.places, ""][0]
    below = lambda path: os.path.join(place, str(path).removeprefix(inside))
    names_in = functools.cache(lambda at: set(os.listdir(folder / at) if os.path.isdir(folder / at) else ()))
    for record in itertools.chain(first, records):
        with noting(lost):
            if not isinstance(record.picture, (str, Path)):
                raise ValueError(f"no name: {record.where} names no picture")
            picture, before = below(record.picture), part_of.get(record.picture)
            if before and (before != record.part or not layout.repeats):
                raise ValueError(f"listed twice: {record.where} lists {picture} a second time, in one part "
                                 f"or two")
            part_of[record.picture] = record.part
            directory, name = os.path.split(picture)
            if name not in names_in(directory):
                raise ValueError(f"no file: {record.where} lists {folder / picture}, which is not there")
            sketches = record.sketches and [below(path) for path in record.sketches]
            yield record._replace(picture=picture, sketches=sketches)


def checked(record, columns):
    """(part, person, attributes, line) of a record in which nothing is wrong."""
    line, where = {"pictures": record.picture}, f"{record.where} ({record.picture})"
    if record.part not in SPLITS:
        raise ValueError(f"part: {where} is in part {record.part!r}, expected train, val or test")
    attributes = b""
    if record.values is not None:
        with expecting("1, 0 or -1 for every attribute", f"attributes: {where}"):
            attributes = bytes(map(TRUTH.__getitem__, record.values))
    if record.captions is not None:
        with expecting("captions that are text and not empty", f"captions: {where}"):
            line["captions"] = captions_in(record.captions, columns)
    if record.sketches is not None:
        line["sketches"] = record.sketches
    person = digest(record.person or str(record.picture))
    return SPLITS.index(record.part), person, attributes, json.dumps(line).encode() + b"\n"


LOWER_CASE = [name.lower() for name in ATTRIBUTES]
TRUTH = {"1": True, "0": False, "-1": False}


def captions_in(record, columns):
    """The texts in these columns. Binary ones are refused, and half characters, which json can write
    and no tokenizer reads."""
    found = [record[column] for column in columns if record.get(column)]
    found = [text for some in found for text in (some if isinstance(some, list) else [some])]
    for text in found or [""]:
        if re.search("[\0\ud800-\udfff]", text) or not clean_caption(text):
            raise ValueError(f"found {ascii(text)[:100]}")
    return found


def check_lost(lost, count, max_lost):
    """ValueError where more than max_lost percent of `count` are lost, of which `lost` has a sentence
    each."""
    if len(lost) > count * max_lost / 100:
        raise ValueError(f"{lost[0]} ({len(lost):,} of {count:,} are lost, which is more than --max_lost "
                         f"{max_lost:g} percent)")


def read_json(content):
    """json whose records name everything once: in a damaged list two of them may have become
    one."""
    def record_of(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"a record has a name twice: {str(pairs)[:100]}")
        return dict(pairs)
    return json.loads(content, object_pairs_hook=record_of)


def digest(text):
    """A text -> a number of 56 bits, the same in every process and every file."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:7], "big")


def part_by_digest(text):
    """90, 5 and 5 percent, where a set has no parts of its own."""
    percent = digest(text) % 100
    if percent < 90:
        return "train"
    return "val" if percent < 95 else "test"
