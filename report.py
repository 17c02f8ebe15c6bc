"""Report on a data set of faces: sizes, copies and captions, beside FLIP's (arXiv 2407.08515, section 3);
or on what a model has learned about each attribute.

    python report.py --data DIR                 # without --data: drawn faces
    python report.py --checkpoint out/flip.pt   # for each attribute, pairs of drawn faces that differ in it:
                                                # in how many does its sentence fit the right one?
"""
import argparse
import functools
import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from captions import ATTRIBUTES, FACE_PARTS, FACTS, NEGATABLE, PHRASES, verbalize
from common.images import contact_sheet, prepare_image_file
from common.script import markdown_table, run_script
from data import augment, load_toy_faces, open_faces
from flip import FLIP
from readers.index import COLUMNS, SPLITS, collect_errors
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


def compute_stats(splits: dict, count: int, rng: np.random.Generator):
    """Statistics of {split: Faces}, ready for JSON. All but the numbers of faces describe a sample of `count`
    faces of the first split, of which at most 2,000 images are read."""
    faces = next(iter(splits.values()))
    chosen = rng.choice(len(faces), min(count, len(faces)), replace=False).tolist()
    valid, sizes, hashes, errors = [], [], set(), []
    for i in tqdm(sorted(chosen[:2000]), "reading images", leave=False):
        with collect_errors(errors):
            image = faces.picture(i)
            valid.append(i)
            sizes.append(image.size)
            grey = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BILINEAR))
            hashes.add((grey[:, 1:] > grey[:, :-1]).tobytes())      # dHash: equal for copies of other sizes
    stats = {"set": faces.name, "faces": {split: len(split_faces) for split, split_faces in splits.items()},
             "captions looked at": len(chosen) * faces.has_text, "pictures looked at": len(sizes),
             "unreadable": len(errors), "like another": len(sizes) - len(hashes),
             "shown": valid[::len(valid) // 4 + 1], "sizes": sizes}
    if not faces.has_text:
        return stats
    texts = [faces.caption(i, rng) for i in tqdm(chosen, "sampling captions", leave=False)]
    words, grams, four_grams = [text.split() for text in texts], set(), []
    for chunk in np.array_split(np.arange(len(words)), 10):
        grams.update(gram for n in chunk for gram in zip(words[n], words[n][1:], words[n][2:], words[n][3:]))
        four_grams.append(len(grams))
    stated = np.mean([find_facts(text) for text in tqdm(texts, "finding facts", leave=False)], axis=0)
    stated[NEGATABLE] += stated[len(ATTRIBUTES):]       # a negation states the label, too
    labels = dict(zip(ATTRIBUTES, stated.tolist()))
    total = max(sum(labels.values()), 1e-9)
    shares = {group: 100 * sum(labels[name] for name in names.split()) / total
              for group, (_, names) in GROUPS.items()}
    shares["facial features"] = 100 - sum(shares.values())
    return stats | {"equal captions": len(texts) - len(set(texts)), "words": [len(text) for text in words],
                    "four-grams": four_grams, "labels in a caption": total, "shares of groups": shares,
                    "labels": labels}


def format_stats(stats: dict):
    """Lines of text that summarise the statistics; FLIP's figures (section 3) in brackets."""
    lines = [f"{split}: {count:,} faces" for split, count in stats["faces"].items()]
    lines += [f"{stats['pictures looked at']:,} images: {stats['like another']} copies, "
              f"{stats['unreadable']} unreadable"]
    if stats["sizes"]:
        width, height = np.mean(stats["sizes"], axis=0)
        lines += [f"mean size {width:.0f} x {height:.0f} pixels (285 x 285)"]
    if stats["captions looked at"]:
        words = np.array(stats["words"])
        lines += [f"{stats['captions looked at']:,} captions: {stats['equal captions']} equal to another",
                  f"words per caption: mean {words.mean():.1f} (30), mode {np.bincount(words).argmax()} "
                  f"(20 to 22), {words.min()} to {words.max()} (10 to 75)",
                  f"{stats['four-grams'][-1]:,} distinct 4-grams",
                  f"{stats['labels in a caption']:.1f} labels stated per caption, in the grammar's wording"]
    return lines


def plot_stats(stats: dict, faces, path):
    """Save a page with the summary, histograms and some faces."""
    from matplotlib.figure import Figure
    figure, rows = Figure(figsize=(15, 9), layout="constrained"), []
    for i in stats["shown"]:
        rng, image = np.random.default_rng(i), faces.picture(i, 128)
        rows.append((faces.caption(i, rng) if faces.has_text else "", [(image, "original", False), *(
            (augment(image, rng), "augmented", False) for _ in range(3))]))
    axes = figure.subplot_mosaic([["faces", "text", "words"], ["faces", "sizes", "grams"],
                                  ["faces", "sizes", "groups"]], width_ratios=(1.3, 1, 1))
    if rows:
        axes["faces"].imshow(contact_sheet(rows))
        axes["sizes"].hist(np.prod(stats["sizes"], axis=1) ** 0.5, 40)
    axes["sizes"].set(title="sqrt(width x height) in pixels (285)")
    axes["text"].text(0, 1, "\n".join(format_stats(stats)), va="top", fontsize=9)
    if stats["captions looked at"]:
        axes["words"].hist(stats["words"], np.arange(80))
        axes["words"].set(title="words per caption (mode 20 to 22)")
        axes["grams"].plot(range(10, 101, 10), stats["four-grams"], "o-")
        axes["grams"].set(title="distinct 4-grams by % of captions", ylim=0)
        ticks = np.arange(len(GROUPS))
        axes["groups"].barh(ticks + 0.2, stats["shares of groups"].values(), 0.4, label="this data set")
        axes["groups"].barh(ticks - 0.2, [share for share, _ in GROUPS.values()], 0.4, label="FLIP",
                            color="lightgrey")
        axes["groups"].set(yticks=ticks, yticklabels=list(GROUPS), title="% of the labels stated in captions")
        axes["groups"].legend()
    axes["faces"].axis("off")
    axes["text"].axis("off")
    figure.suptitle(stats["set"])
    figure.savefig(path, dpi=90)


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


def report_counterfactuals(model: FLIP, path: str, count=50):
    """Print, for each attribute, the percentage of `count` pairs in which a sentence of the grammar that
    states it scores higher for the face that has it (chance: 50): by cosine (ITC), by log-odds (ITM) and by
    `FLIP.rerank_score` (both). ITM alone was trained to tell apart what ITC finds similar, so it may rank
    other pairs wrongly. Save the first pair of each attribute to `path`."""
    percent, tiles = {}, []
    for attribute, name in enumerate(tqdm(ATTRIBUTES, "comparing", leave=False)):
        pairs = counterfactual_pairs(attribute, count, model.config.vit.image_size)
        sentence = verbalize([attribute], random.Random(0))
        logits, cosines = model.match([image for pair in pairs for image in pair], sentence)
        scores = cosines, logits[..., 1] - logits[..., 0], model.rerank_score(logits, cosines)
        itc, itm, both = percent[name] = [
            100 * (score[1::2] > score[::2]).double().mean().item() for score in scores]
        tiles += [(pairs[0][0], name, False), (pairs[0][1], f"{itc:.0f}, {both:.0f} %", True)]
    percent["mean"] = np.mean(list(percent.values()), axis=0)
    print(markdown_table(["correct pairs, %", "ITC", "ITM", "both"],
                         [[name, *(f"{value:.0f}" for value in values)] for name, values in percent.items()]))
    legend = "green frame: has the attribute; below it: correct pairs by ITC, and by both"
    rows = [("", tiles[start:start + 10]) for start in range(0, len(tiles), 10)]
    contact_sheet(rows, 96, legend).save(path)
    print(f"written: {path}")


def main():
    parser = argparse.ArgumentParser(description="Statistics of a data set of faces, on one page, or of what "
                                                 "a model has learned about each attribute.")
    parser.add_argument("--checkpoint", help="test this model on pairs of drawn faces; omit --data")
    parser.add_argument("--data", help="folder or JSON annotation file of faces (default: drawn faces)")
    parser.add_argument("--vocabulary", help="for the official checkpoint: bert-base-uncased, or its folder")
    parser.add_argument("--out", help="output image (report.png and .json, or counterfactuals.png)")
    parser.add_argument("--sample", type=int, default=10_000, help="captions to sample (%(default)s)")
    parser.add_argument("--cache", default="cache", help="folder for drawn faces or the index (%(default)s)")
    parser.add_argument("--columns", nargs="+", default=COLUMNS[:2], choices=COLUMNS,
                        help="caption columns of FaceCaption-15M (caption, face_caption)")
    parser.add_argument("--outside", action="store_true", help="accept images outside --data")
    args = parser.parse_args()
    if args.sample < 10:
        raise ValueError(f"--sample {args.sample}: expected at least 10")
    args.out = args.out or ("counterfactuals.png" if args.checkpoint else "report.png")
    prepare_image_file(args.out)
    if args.checkpoint:
        if args.data:
            raise ValueError("--checkpoint is tested on drawn faces; omit --data")
        model = FLIP.from_pretrained(args.checkpoint, vocabulary=args.vocabulary)
        return report_counterfactuals(model, args.out)
    stats_file = Path(args.out).with_suffix(".json").resolve()
    if args.data and Path(args.data).resolve() in (stats_file, *stats_file.parents):
        raise ValueError(f"--out {args.out}: expected a file outside --data, as it comes with a .json file")
    splits, errors = {}, []
    for split in SPLITS if args.data else ():
        with collect_errors(errors):
            splits[split] = open_faces(args.data, split, args.cache, tuple(args.columns), max_errors=100,
                                       outside=args.outside)
    if errors and not splits:
        raise ValueError(errors[0])
    splits = splits or {"train": load_toy_faces(1000, 192, seed=0, folder=args.cache)}
    stats = compute_stats(splits, args.sample, np.random.default_rng(0))
    plot_stats(stats, next(iter(splits.values())), args.out)
    stats_file.write_text(json.dumps(stats, indent=1))
    print("\n".join([stats["set"], *(f"  {line}" for line in format_stats(stats)), *errors]))
    print(f"written: {args.out}, with FLIP's figures for comparison")


if __name__ == "__main__":
    run_script(main)
