"""Report on a data set of faces: sizes, copies and captions, beside FLIP's (arXiv 2407.08515, section 3);
or on what a model has learned about each attribute.

    python report.py --data DIR                 # without --data: drawn faces
    python report.py --checkpoint out/flip.pt   # for each attribute, pairs of drawn faces that differ in it:
                                                # in how many does its sentence fit the right one?
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
from readers.index import COLUMNS
from toyfaces import draw, sample_attributes


# ---- a data set ----------------------------------------------------------------------------------
def report_data(splits: dict, path):
    """Print statistics of {split: Faces}, with FLIP's (section 3) in brackets, and save a page with these,
    histograms and some faces. All but the numbers of faces describe a sample of the first split."""
    faces = next(iter(splits.values()))
    rng = random_stream("report")
    sizes = []
    hashes = set()
    rows = []
    order = rng.permutation(len(faces))
    for i in tqdm(order[:2000].tolist(), "reading images", leave=False):
        try:
            image = faces.picture(i)
        except ValueError as error:
            tqdm.write(f"unreadable: {error}")
            continue
        sizes.append(image.size)
        grey = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BILINEAR))
        hashes.add((grey[:, 1:] > grey[:, :-1]).tobytes())      # dHash: equal for copies of other sizes
        if len(rows) < 4:
            augmented = [(augment(image, rng), "augmented", False) for _ in range(3)]
            title = faces.caption(i, rng) if faces.has_text else ""
            rows.append((title, [(image, "original", False), *augmented]))
    lines = [f"{split}: {len(each):,} faces" for split, each in splits.items()]
    width, height = np.mean(sizes, axis=0)
    lines += [f"{len(sizes):,} images, {len(order[:2000]) - len(sizes):,} unreadable, "
              f"{len(sizes) - len(hashes):,} copies, mean size {width:.0f} x {height:.0f} pixels (285 x 285)"]
    figure, (faces_axis, sizes_axis, words_axis) = new_figure(13, 8, columns=3)
    faces_axis.imshow(contact_sheet(rows))
    faces_axis.axis("off")
    sizes_axis.hist(np.prod(sizes, axis=1) ** 0.5, 40)
    sizes_axis.set(title="sqrt(width x height) in pixels (285)")
    if faces.has_text:
        texts = [faces.caption(i, rng).split() for i in order[:10_000].tolist()]
        lengths = np.array([len(words) for words in texts])
        grams = {gram for words in texts for gram in zip(words, words[1:], words[2:], words[3:])}
        lines += [f"{len(texts):,} captions: {len(texts) - len({*map(tuple, texts)})} equal to another, "
                  f"{len(grams):,} distinct 4-grams", f"words per caption: mean {lengths.mean():.1f} (30), "
                  f"mode {np.bincount(lengths).argmax()} (20 to 22), {lengths.min()} to {lengths.max()} "
                  f"(10 to 75)"]
        words_axis.hist(lengths, np.arange(80))
        words_axis.set(title="words per caption (mode 20 to 22)")
    figure.suptitle("\n".join([faces.name, *lines]))
    figure.savefig(path, dpi=90)
    print("\n  ".join([faces.name, *lines]))


# ---- a model -------------------------------------------------------------------------------------
def counterfactual_pairs(attribute: int, count: int, size: int):
    """`count` pairs [absent, present] of PIL images, size x size pixels: a drawn face without and with the
    attribute of this number."""
    pairs = []
    for number in itertools.count():
        present = sample_attributes(random_stream("attributes of a pair", attribute, number))
        if present[attribute]:
            absent = present & (np.arange(len(ATTRIBUTES)) != attribute)
            pairs.append([draw(has, random_stream("look of a pair", attribute, number), size)
                          for has in (absent, present)])
        if len(pairs) == count:
            return pairs


def report_counterfactuals(model: FLIP, path, count=50):
    """Print, for each attribute, in what percentage of `count` pairs (chance: 50) a sentence that states it
    scores higher for the face that has it: by cosine (ITC) and by `FLIP.rerank_score` (ITC and ITM). Save the
    first pair of each attribute to `path`."""
    percent = {}
    tiles = []
    for attribute, name in enumerate(tqdm(ATTRIBUTES, "comparing", leave=False)):
        pairs = counterfactual_pairs(attribute, count, model.config.vit.image_size)
        sentence = verbalize([attribute], random.Random(derive_seed("sentence", attribute)))
        logits, cosines = model.match_logits([image for pair in pairs for image in pair], [sentence])
        percent[name] = [100 * (score[1::2] > score[::2]).double().mean().item()
                         for score in (cosines, model.rerank_score(logits, cosines))]
        tiles += [(pairs[0][0], name, False), (pairs[0][1], "{:.0f}, {:.0f} %".format(*percent[name]), True)]
    percent["mean"] = np.mean(list(percent.values()), axis=0)
    print(markdown_table(["correct pairs, %", "ITC", "ITC and ITM"],
                         [[name, *(f"{value:.0f}" for value in values)] for name, values in percent.items()]))
    legend = "green frame: has the attribute; below it: correct pairs by ITC, and by ITC and ITM"
    rows = [("", tiles[start:start + 10]) for start in range(0, len(tiles), 10)]
    contact_sheet(rows, 96, legend).save(path)


def main():
    parser = argparse.ArgumentParser(description="Statistics of a data set of faces, on one page, or of what "
                                                 "a model has learned about each attribute.")
    subject = parser.add_mutually_exclusive_group()
    subject.add_argument("--data", help="folder or JSON annotation file of faces (default: drawn faces)")
    subject.add_argument("--checkpoint", help="a model, to test on pairs of drawn faces")
    parser.add_argument("--vocabulary", help="for the official checkpoint: bert-base-uncased, or its folder")
    parser.add_argument("--out", default="report.png", help="output image (%(default)s)")
    parser.add_argument("--cache", default="cache", help="folder for drawn faces or the index (%(default)s)")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=("caption", "face_caption"),
                        help="caption columns of FaceCaption-15M (caption, face_caption)")
    args = parser.parse_args()
    splits = {}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test") if args.data else ():
        try:
            splits[split] = open_faces(args.data, split, args.cache, tuple(args.columns))
        except ValueError as error:             # an empty split, for example
            print(f"left out: {error}")
    if args.checkpoint:
        report_counterfactuals(FLIP.from_pretrained(args.checkpoint, vocabulary=args.vocabulary), args.out)
    elif splits or not args.data:
        report_data(splits or {"train": load_toy_faces(1000, 192, seed=0, folder=args.cache)}, args.out)
    else:
        raise ValueError(f"{args.data}: no split can be opened")
    print(f"written: {args.out}")


if __name__ == "__main__":
    run_script(main)
