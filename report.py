"""Report on a data set of faces: sizes, copies and captions, beside FLIP's (arXiv 2407.08515, section 3);
or on what a model has learned about each attribute.

    python report.py --data DIR                 # without --data: drawn faces
    python report.py --checkpoint out/flip.pt   # for each attribute, pairs of drawn faces that differ in it:
                                                # in how many does its sentence fit the right one?
"""
import argparse
import functools
import itertools
import random
import re
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from captions import ATTRIBUTES, FACE_PARTS, FACTS, NEGATABLE, PHRASES, verbalize
from common.images import contact_sheet
from common.script import markdown_table, run_script
from data import augment, load_toy_faces, open_faces
from flip import FLIP
from toyfaces import draw, sample_attributes

GROUPS = {      # groups of attributes, and their percentage of FLIP's labels (section 3)
    "facial features": (34.0, ""),          # all attributes that are in no other group
    "elementary": (26.5, "Male Young Attractive Smiling Chubby Pale_Skin"),
    "beard": (14.8, "5_o_Clock_Shadow Goatee Mustache No_Beard Sideburns"),
    "hairstyle": (14.0, "Bald Bangs Black_Hair Blond_Hair Brown_Hair Gray_Hair Receding_Hairline "
                        "Straight_Hair Wavy_Hair"),
    "accessories": (10.6, "Eyeglasses Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace "
                          "Wearing_Necktie"),
}


@functools.cache
def fact_patterns():
    """A regular expression per fact that matches its phrases: the inverse of the grammar."""
    words_of, patterns = {}, []             # {kind of phrase: all words of that kind}
    for kind, words in itertools.chain(*PHRASES):
        words_of.setdefault(kind, []).append(words)
    for fact, phrases in zip(FACTS, PHRASES):
        alternatives = {"Male": ["he", "his"], "not Male": ["she", "her"]}.get(fact, [])
        for kind, words in phrases:
            words, others = words.replace("{his}", "(?:his|her|their)"), "|".join(words_of[kind])
            alternatives += [words] if kind not in FACE_PARTS else [
                rf"{words},? (?:(?:{others}),? )*{kind}", rf"{kind} (?:is|are) (?:(?:{others}) and )*{words}"]
        patterns.append(re.compile(rf"\b(?:{'|'.join(alternatives)})\b"))
    return patterns


def find_facts(text: str):
    """Facts that a text states in the grammar's wording, bool (43,); other wordings are missed."""
    return np.array([pattern.search(text.lower()) is not None for pattern in fact_patterns()])


# ---- a data set ----------------------------------------------------------------------------------
def report_data(splits: dict, path):
    """Print statistics of {split: Faces}, with FLIP's (section 3) in brackets, and save a page with these,
    histograms and some faces. All but the numbers of faces describe a sample of the first split."""
    from matplotlib.figure import Figure
    faces, rng, sizes, hashes, rows = next(iter(splits.values())), np.random.default_rng(0), [], set(), []
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
    figure = Figure(figsize=(15, 8), layout="constrained")
    faces_axis, sizes_axis, *axes = figure.subplots(1, 4, width_ratios=(1.6, 1, 1, 1))
    faces_axis.imshow(contact_sheet(rows))
    faces_axis.axis("off")
    sizes_axis.hist(np.prod(sizes, axis=1) ** 0.5, 40)
    sizes_axis.set(title="sqrt(width x height) in pixels (285)")
    if faces.has_text:
        lines += caption_stats([faces.caption(i, rng) for i in order[:10_000].tolist()], *axes)
    figure.suptitle("\n".join([faces.name, *lines]))
    figure.savefig(path, dpi=90)
    print("\n  ".join([faces.name, *lines]))


def caption_stats(texts: list[str], words_axis, groups_axis):
    """Lines of text about captions; draws histograms of their words and of the labels they state."""
    words, ticks = [text.split() for text in texts], np.arange(len(GROUPS))
    lengths = np.array([len(text) for text in words])
    grams = {gram for text in words for gram in zip(text, text[1:], text[2:], text[3:])}
    stated = np.mean([find_facts(text) for text in tqdm(texts, "finding facts", leave=False)], axis=0)
    stated[NEGATABLE] += stated[len(ATTRIBUTES):]       # a negation states the label, too
    total = stated[:len(ATTRIBUTES)].sum()
    shares = [stated[np.isin(FACTS, names.split())].sum() / max(total, 1e-9) for _, names in GROUPS.values()]
    shares[0] = 1 - sum(shares)
    words_axis.hist(lengths, np.arange(80))
    words_axis.set(title="words per caption (mode 20 to 22)")
    groups_axis.barh(ticks + 0.2, 100 * np.array(shares), 0.4, label="this data set")
    groups_axis.barh(ticks - 0.2, [share for share, _ in GROUPS.values()], 0.4, color="grey", label="FLIP")
    groups_axis.set(yticks=ticks, yticklabels=GROUPS, title="% of the labels stated in captions")
    groups_axis.legend()
    return [f"{len(texts):,} captions: {len(texts) - len(set(texts))} equal to another, {len(grams):,} "
            f"distinct 4-grams; {total:.1f} labels stated per caption, in the grammar's wording",
            f"words per caption: mean {lengths.mean():.1f} (30), mode {np.bincount(lengths).argmax()} "
            f"(20 to 22), {lengths.min()} to {lengths.max()} (10 to 75)"]


# ---- a model -------------------------------------------------------------------------------------
def counterfactual_pairs(attribute: int, count: int, size: int):
    """`count` pairs [absent, present] of PIL images, size x size pixels: a drawn face without and with the
    attribute of this number."""
    rng, pairs = np.random.default_rng((attribute, 99)), []
    while len(pairs) < count:
        present, look = sample_attributes(rng), int(rng.integers(2 ** 62))
        if present[attribute]:
            absent = present & (np.arange(len(ATTRIBUTES)) != attribute)
            pairs.append([draw(has, np.random.default_rng(look), size) for has in (absent, present)])
    return pairs


def report_counterfactuals(model: FLIP, path, count=50):
    """Print, for each attribute, in what percentage of `count` pairs (chance: 50) a sentence that states it
    scores higher for the face that has it: by cosine (ITC) and by `FLIP.rerank_score` (ITC and ITM). Save the
    first pair of each attribute to `path`."""
    percent, tiles = {}, []
    for attribute, name in enumerate(tqdm(ATTRIBUTES, "comparing", leave=False)):
        pairs = counterfactual_pairs(attribute, count, model.config.vit.image_size)
        sentence = verbalize([attribute], random.Random(0))
        logits, cosines = model.match([image for pair in pairs for image in pair], [sentence])
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
    parser.add_argument("--columns", nargs="+", default=("caption", "face_caption"),
                        help="caption columns of FaceCaption-15M (caption, face_caption)")
    parser.add_argument("--outside", action="store_true", help="accept images outside --data")
    args, splits = parser.parse_args(), {}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test") if args.data else ():
        try:
            splits[split] = open_faces(args.data, split, args.cache, tuple(args.columns),
                                       outside=args.outside)
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
