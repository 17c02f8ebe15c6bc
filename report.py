"""What is in a set of faces."""
import argparse
import functools
import itertools
import json
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from bert import Tokenizer
from captions import ATTRIBUTES, FACE_PARTS, FACTS, NEGATABLE, PHRASES, reference_recall, sample_caption
from common.images import TarImage, contact_sheet, resize_to_array
from common.script import run_script
from data import FaceDataset, augment, load_toy_faces, open_faces
from readers.index import COLUMNS, SPLITS, collect_errors

GROUPS = {      # of attributes, and the share of FLIP's labels that they have, in percent (section 3)
    "facial features": (34.0, ""),          # all that no other group has
    "elementary": (26.5, "Male Young Attractive Smiling Chubby Pale_Skin"),
    "beard": (14.8, "5_o_Clock_Shadow Goatee Mustache No_Beard Sideburns"),
    "hairstyle": (14.0, "Bald Bangs Black_Hair Blond_Hair Brown_Hair Gray_Hair Receding_Hairline "
                        "Straight_Hair Wavy_Hair"),
    "accessories": (10.6, "Eyeglasses Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace "
                          "Wearing_Necktie"),
}


@functools.cache
def fact_patterns():
    """For each fact a pattern of the ways to say it: the grammar read backwards."""
    said_of, stats = {}, []                 # {part of the face: what can be said of it}
    for kind, words in itertools.chain(*PHRASES):
        said_of.setdefault(kind, []).append(words)
    for fact, phrases in zip(FACTS, PHRASES):
        ways = {"Male": ["he", "his"], "not Male": ["she", "her"]}.get(fact, [])
        for kind, words in phrases:
            words, others = words.replace("{his}", "(?:his|her|their)"), "|".join(said_of[kind])
            ways += [words] if kind not in FACE_PARTS else [rf"{words},? (?:(?:{others}),? )*{kind}",
                                                            rf"{kind} (?:is|are) (?:(?:{others}) and )*{words}"]
        stats.append(re.compile(rf"\b(?:{'|'.join(ways)})\b"))
    return stats


def find_facts(text):
    """The facts that a text states in the grammar's words, bool (42,); what is said otherwise goes
    unseen."""
    return np.array([pattern.search(text.lower()) is not None for pattern in fact_patterns()])


def sharpness(picture):
    """How much a face of 128 x 128 pixels differs from its neighbouring pixels, relative to its
    contrast: low for what is blurred or was enlarged. It needs no download, and is worth as much:
    noise counts as sharp, and nothing is said of the light or the pose."""
    grey = np.asarray(picture.convert("L").resize((128, 128), Image.Resampling.BICUBIC), float)
    steps = np.concatenate([np.diff(grey, axis=0).ravel(), np.diff(grey, axis=1).ravel()])
    return steps.std() / max(grey.std(), 1.0)


def difference_hash(picture):
    """256 bits: is a pixel of 17 x 16 lighter than the one to its left? Mostly equal for copies of
    one picture, also at another size or quality."""
    grey = np.asarray(picture.convert("L").resize((17, 16), Image.Resampling.BILINEAR))
    return np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes()


def compute_stats(parts, count, rng):
    """Figures of a set {split: Faces}, ready for json; all but its size are of `count` faces of the
    first part, of whose pictures at most 2,000 are looked at."""
    faces = next(iter(parts.values()))
    chosen = rng.choice(len(faces), min(count, len(faces)), replace=False).tolist()
    seen, sizes, sharp, outlines, errors = [], [], [], Counter(), []
    for i in tqdm(sorted(chosen[:2000]), "looking at pictures", leave=False):
        with collect_errors(errors):
            picture = faces.picture(i)
            seen.append(i)
            sizes.append(picture.size)
            sharp.append(sharpness(picture))
            outlines[difference_hash(picture)] += 1
    stats = {"set": faces.name, "faces": {split: len(part) for split, part in parts.items()},
             "captions looked at": len(chosen) * faces.has_text, "pictures looked at": len(sizes),
             "unreadable": len(errors), "like another": len(sizes) - len(outlines),
             "shown": seen[::len(seen) // 4 + 1], "sizes": sizes, "sharpness": np.round(sharp, 3).tolist()}
    if not faces.has_text:
        return stats
    texts = [faces.caption(i, rng) for i in tqdm(chosen, "reading captions", leave=False)]
    words, grams, four_grams = [text.split() for text in texts], set(), []
    for tenth in np.array_split(np.arange(len(words)), 10):
        grams.update(gram for n in tenth for gram in zip(words[n], words[n][1:], words[n][2:], words[n][3:]))
        four_grams.append(len(grams))
    stated = np.mean([find_facts(text) for text in tqdm(texts, "reading facts", leave=False)], axis=0)
    stated[NEGATABLE] += stated[len(ATTRIBUTES):]       # a label is stated where it is said not to hold, too
    labels = dict(zip(ATTRIBUTES, stated.tolist()))
    total = max(sum(labels.values()), 1e-9)
    shares = {group: 100 * sum(labels[name] for name in names.split()) / total
              for group, (_, names) in GROUPS.items()}
    shares["facial features"] = 100 - sum(shares.values())
    own = len(faces.captions[chosen[0]]) if faces.captions is not None else "by the grammar"
    return stats | {"captions of the first face": own, "equal captions": len(texts) - len(set(texts)),
                    "words": [len(text) for text in words], "four-grams": four_grams,
                    "labels in a caption": total, "shares of groups": shares, "labels": labels}


def format_stats(stats):
    """What a report says, in lines; FLIP's figures (section 3) in brackets."""
    lines = [f"{split}: {count:,} faces" for split, count in stats["faces"].items()]
    lines += [f"{stats['pictures looked at']:,} pictures seen: {stats['like another']} look like another; "
              f"{stats['unreadable']} unreadable"]
    if stats["sizes"]:
        width, height = np.mean(stats["sizes"], axis=0)
        lines += [f"size {width:.0f} x {height:.0f} in the mean (285 x 285)",
                  f"sharpness {np.median(stats['sharpness']):.2f} in the median"]
    if stats["captions looked at"]:
        words = np.array(stats["words"])
        lines += [f"{stats['captions looked at']:,} captions read: {stats['equal captions']} equal another",
                  f"captions of the first face: {stats['captions of the first face']}",
                  f"words: mean {words.mean():.1f} (30), mode {np.bincount(words).argmax()} (20 to 22), "
                  f"{words.min()} to {words.max()} (10 to 75)",
                  f"{stats['four-grams'][-1]:,} distinct 4-grams",
                  f"{stats['labels in a caption']:.1f} labels in a caption, in the grammar's words"]
    return lines


def plot_stats(stats, faces, path):
    """The summary, histograms and some faces on a page."""
    from matplotlib.figure import Figure
    page, rows = Figure(figsize=(15, 9), layout="constrained"), []
    for i in stats["shown"]:
        rng, picture = np.random.default_rng(i), faces.picture(i, 128)
        rows.append((faces.caption(i, rng) if faces.has_text else "", [(picture, "as it is", False), *(
            (augment(picture, rng), "augmented", False) for _ in range(3))]))
    plots = page.subplot_mosaic([["faces", "text", "words"], ["faces", "sizes", "grams"],
                                 ["faces", "sharp", "groups"]], width_ratios=(1.3, 1, 1))
    if rows:
        plots["faces"].imshow(contact_sheet(rows))
        plots["sizes"].hist(np.prod(stats["sizes"], axis=1) ** 0.5, 40)
        plots["sharp"].hist(stats["sharpness"], 40)
    plots["sizes"].set(title="pixels of a face, root of width x height (285)")
    plots["sharp"].set(title="sharpness (noise counts as sharp)")
    plots["text"].text(0, 1, "\n".join(format_stats(stats)), va="top", fontsize=9)
    if stats["captions looked at"]:
        plots["words"].hist(stats["words"], np.arange(80))
        plots["words"].set(title="words in a caption (mode 20 to 22)")
        plots["grams"].plot(range(10, 101, 10), stats["four-grams"], "o-")
        plots["grams"].set(title="distinct 4-grams over % of the captions", ylim=0)
        places = np.arange(len(GROUPS))
        plots["groups"].barh(places + 0.2, stats["shares of groups"].values(), 0.4, label="here")
        plots["groups"].barh(places - 0.2, [share for share, _ in GROUPS.values()], 0.4, label="FLIP",
                             color="lightgrey")
        plots["groups"].set(yticks=places, yticklabels=list(GROUPS), title="% of the labels stated")
        plots["groups"].legend()
    plots["faces"].axis("off")
    plots["text"].axis("off")
    page.suptitle(stats["set"])
    page.savefig(path, dpi=90)


def print_references(attributes):
    """How well an ideal reader finds one face, or caption, among these."""
    rng = np.random.default_rng(0)
    stated = np.stack([sample_caption(row, rng)[1] for row in attributes])
    print(f"recall at 1 / 5 / 10 among {len(attributes)} in %, for a reader who knows all attributes:")
    for name, recalls in reference_recall(stated, attributes).items():
        for direction, recall in recalls.items():
            numbers = " / ".join(f"{100 * share:.1f}" for share in recall.values())
            print(f"  {name:<11} {direction.replace('_', ' '):<13} {numbers}")


def print_times(faces, tokenizer, size=224, count=300):
    """Milliseconds that a picture takes on one core, stage by stage. Decoding reads the file again,
    by then from memory."""
    clock, samples = Counter(), FaceDataset(faces, tokenizer, size, 0, True)

    def timed(stage, work):
        begin = time.perf_counter()
        result = work()
        clock[stage] += 1000 * (time.perf_counter() - begin)
        return result

    for n in tqdm(range(count), "timing", leave=False):
        i, rng = n * len(faces) // count, np.random.default_rng(n)
        stored = faces.images[i]
        with collect_errors([]):
            if not isinstance(stored, np.ndarray):
                timed("read the file", stored.content if isinstance(stored, TarImage) else stored.read_bytes)
            image = timed("decode, cut, resize", lambda: faces.picture(i, size))
            timed("augment", lambda: augment(image, rng))
            text = timed("choose or write a caption", lambda: faces.caption(i, rng))
            timed("batch", lambda: samples.collate([(resize_to_array(image, size), text, 0, {})]))
    for stage, total in clock.items():
        print(f"  {stage:<26} {total / count:6.2f} ms")
    print(f"  {1000 * count / sum(clock.values()):.0f} pictures of {size} x {size} a second on one core")


def main():
    parser = argparse.ArgumentParser(description="What is in a set of faces: figures, a page of histograms.")
    parser.add_argument("--data", help="a folder of faces, or a json list of them (default: drawn faces)")
    parser.add_argument("--out", default="report.png", help="the page; the figures go beside it as .json "
                                                            "(%(default)s)")
    parser.add_argument("--sample", type=int, default=10_000, help="how many captions to read (%(default)s)")
    parser.add_argument("--cache", default="cache", help="folder for drawn faces, or the index (%(default)s)")
    parser.add_argument("--columns", nargs="+", default=COLUMNS[:2], choices=COLUMNS,
                        help="FaceCaption-15M's columns that the captions are from (caption, face_caption)")
    parser.add_argument("--time", action="store_true", help="time reading a picture, stage by stage, instead")
    args = parser.parse_args()
    if args.sample < 10:
        raise ValueError(f"--sample {args.sample}: expected 10 or more faces")
    parts, missing = {}, ""
    for split in SPLITS if args.data else ():
        try:
            parts[split] = open_faces(args.data, split, args.cache, tuple(args.columns), max_errors=100)
        except ValueError as error:
            missing = error
    if missing and not parts:
        raise missing
    parts = parts or {"train": load_toy_faces(1000, 192, seed=0, folder=args.cache)}
    faces = next(iter(parts.values()))
    if args.time:
        captions = [faces.caption(i, np.random.default_rng(i)) for i in range(min(100, len(faces)))]
        return print_times(faces, Tokenizer.train(captions))
    stats = compute_stats(parts, args.sample, np.random.default_rng(0))
    plot_stats(stats, faces, args.out)
    Path(args.out).with_suffix(".json").write_text(json.dumps(stats, indent=1))
    print("\n".join([stats["set"], *(f"  {line}" for line in format_stats(stats))]))
    if faces.attributes is not None and faces.captions is None:
        print_references(np.array(faces.attributes[:1000]))
    print(f"{args.out}: these figures beside FLIP's, and some faces")


if __name__ == "__main__":
    run_script(main)
