"""Report on a data set of faces: sizes, copies and captions, beside FLIP's (arXiv 2407.08515,
section 3). Or report what a model has learned about each attribute, measured on pairs of drawn
faces that differ only in it.

    python report.py --data DIR                 # without --data: drawn faces
    python report.py --checkpoint out/flip.pt
"""
import argparse
import itertools
import random
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from captions import ATTRIBUTES, verbalize
from common.pictures import contact_sheet, new_figure
from common.script import markdown_table, run_script
from common.seeds import derive_seed, random_stream
from data import augment, load_toy_faces, open_faces
from flip import FLIP
from readers.index import COLUMNS, SPLITS
from toyfaces import draw, sample_attributes


# ---- a data set ----------------------------------------------------------------------------------
def report_data(splits: dict, path):
    """Print statistics of {split: Faces}, with FLIP's (section 3) in brackets, and save a page with
    these, a histogram of the captions' lengths and some faces. Everything but the numbers of faces
    describes a sample of the first split."""
    faces = next(iter(splits.values()))
    rng = random_stream("report")
    order = rng.permutation(len(faces)).tolist()
    sizes, num_copies, rows = read_sample(faces, order[:2000], rng)
    lines = [f"{split}: {len(each):,} faces" for split, each in splits.items()]
    width, height = np.mean(sizes, axis=0)
    num_unreadable = len(order[:2000]) - len(sizes)
    lines.append(f"{len(sizes):,} images, {num_unreadable:,} unreadable, {num_copies:,} copies, "
                 f"mean size {width:.0f} x {height:.0f} pixels (285 x 285)")

    figure, (faces_axis, words_axis) = new_figure(11, 7.5, columns=2)
    faces_axis.imshow(contact_sheet(rows))
    faces_axis.axis("off")
    if faces.has_text:
        texts = [faces.caption(i, rng).split() for i in order[:10_000]]
        lengths = np.array([len(words) for words in texts])
        lines += caption_statistics(texts, lengths)
        words_axis.hist(lengths, np.arange(80))
        words_axis.set(title="words per caption")
    figure.suptitle("\n".join([f"{faces.name} (in brackets: FaceCaption-15M)", *lines]))
    figure.savefig(path, dpi=90)
    print("\n  ".join([faces.name, *lines]))


def read_sample(faces, indices, rng):
    """Sizes (width, height) of the images that can be read, the number of copies among them, and
    rows of `contact_sheet` with some images and their augmentations."""
    sizes = []
    hashes = set()
    rows = []
    for i in tqdm(indices, "reading images", leave=False):
        try:
            image = faces.picture(i)
        except ValueError as error:
            tqdm.write(f"unreadable: {error}")
            continue
        sizes.append(image.size)
        grey = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BILINEAR))
        hashes.add((grey[:, 1:] > grey[:, :-1]).tobytes())      # dHash: equal for resized copies
        if len(rows) < 4:
            augmented = [(augment(image, rng), "augmented", False) for _ in range(3)]
            title = faces.caption(i, rng) if faces.has_text else ""
            rows.append((title, [(image, "original", False), *augmented]))
    return sizes, len(sizes) - len(hashes), rows


def caption_statistics(texts: list[list[str]], lengths: np.ndarray) -> list[str]:
    """Lines about captions, given as lists of words, and their lengths in words."""
    num_different = len({tuple(words) for words in texts})
    grams = set()
    for words in texts:
        grams.update(zip(words, words[1:], words[2:], words[3:]))
    mode = np.bincount(lengths).argmax()
    return [f"{len(texts):,} captions, {num_different:,} of them different, with {len(grams):,} "
            "different 4-grams; a model learns only what its captions tell apart",
            f"words per caption: mean {lengths.mean():.1f} (30), mode {mode} (20 to 22), "
            f"{lengths.min()} to {lengths.max()} (10 to 75)"]


# ---- a model -------------------------------------------------------------------------------------
def counterfactual_pairs(attribute: int, count: int, size: int):
    """`count` pairs [absent, present] of PIL images, size x size pixels: a drawn face without and
    with one attribute, an index into ATTRIBUTES."""
    pairs = []
    for number in itertools.count():
        present = sample_attributes(random_stream("attributes of a pair", attribute, number))
        if present[attribute]:
            absent = present.copy()
            absent[attribute] = False
            pair = []
            for attributes in (absent, present):
                rng = random_stream("look of a pair", attribute, number)
                pair.append(draw(attributes, rng, size))
            pairs.append(pair)
        if len(pairs) == count:
            return pairs


def report_counterfactuals(model: FLIP, path, count=50):
    """Print, for each attribute, the percentage of `count` pairs (chance: 50) in which a sentence
    that states it scores higher for the face that has it: by cosine (ITC) and by
    `FLIP.rerank_score` (ITC and ITM). Save the first pair of each attribute to `path`."""
    percent = {}                                            # {attribute: [by ITC, by both]}
    tiles = []
    for attribute, name in enumerate(tqdm(ATTRIBUTES, "comparing", leave=False)):
        pairs = counterfactual_pairs(attribute, count, model.config.vit.image_size)
        sentence = verbalize([name], random.Random(derive_seed("sentence", attribute)))
        logits, cosines = model.match_logits([*itertools.chain(*pairs)], [sentence])
        percent[name] = []
        for scores in (cosines, model.rerank_score(logits, cosines)):
            is_correct = scores[1::2] > scores[::2]         # present > absent
            percent[name].append(100 * is_correct.double().mean().item())
        absent, present = pairs[0]
        itc, both = percent[name]
        tiles += [(absent, name.replace("_", " "), False),
                  (present, f"{itc:.0f}, {both:.0f} %", False)]

    percent["mean"] = np.mean(list(percent.values()), axis=0)
    table = [[name, *values] for name, values in percent.items()]
    print("The faces of a pair differ in nothing else: to find a combination of attributes among "
          "many faces (search.py) is harder.")
    print(markdown_table(["correct pairs, %", "ITC", "ITC and ITM"], table, digits=0))
    legend = ("left: without the attribute; right: with it; below: correct pairs by ITC, and by "
              "ITC and ITM")
    rows = [("", tiles[start:start + 10]) for start in range(0, len(tiles), 10)]
    contact_sheet(rows, 116, legend).save(path)


def main():
    parser = argparse.ArgumentParser(
        description="Statistics of a data set of faces, on one page, or of what a model has "
                    "learned about each attribute.")
    subject = parser.add_mutually_exclusive_group()
    subject.add_argument("--data", help="folder or JSON annotation file (default: drawn faces)")
    subject.add_argument("--checkpoint", help="a model, to test on pairs of drawn faces")
    add = parser.add_argument
    add("--vocabulary", help="for the official checkpoint: bert-base-uncased, or its folder")
    add("--out", default="report.png", help="output image (%(default)s)")
    add("--cache", default="cache", help="folder for drawn faces or the index (%(default)s)")
    add("--columns", nargs="+", choices=COLUMNS, default=("caption", "face_caption"),
        help="caption columns of FaceCaption-15M (caption, face_caption)")
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    if args.checkpoint:
        model = FLIP.from_pretrained(args.checkpoint, vocabulary=args.vocabulary)
        report_counterfactuals(model, args.out)
    elif args.data:
        report_data(open_splits(args.data, args.cache, tuple(args.columns)), args.out)
    else:
        faces = load_toy_faces(1000, 192, seed=0, folder=args.cache)
        report_data({"train": faces}, args.out)
    print(f"written: {args.out}")


def open_splits(data: str, cache: str, columns: tuple) -> dict:
    """{split: Faces} of a data set. Splits that cannot be opened are named. Raises the ValueError
    of the first one if none can be opened."""
    splits = {}
    errors = []
    for split in SPLITS:
        try:
            splits[split] = open_faces(data, split, cache, columns)
        except ValueError as error:             # an empty split, for example
            errors.append(error)
    if not splits:
        raise errors[0]
    for error in errors:
        print(f"left out: {error}")
    return splits


if __name__ == "__main__":
    run_script(main)
