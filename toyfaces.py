"""Render toy faces with CelebA's 40 attributes: the default training data of this project.

1. `sample_attributes` samples the 40 labels from small tables of CelebA's frequencies.
2. `build_shapes` turns them, with pose, colours and proportions that no caption mentions, into
   `Shape`s.
3. `render` rotates the head, smooths the outlines and fills them with Pillow (both functions are in
   drawing/portrait.py). `sketch` draws the visible outlines in pen strokes instead, stage by stage
   (drawing/sketch.py).

Every attribute is visible. Most are drawn literally; these follow a convention:

- Attractive: even features and clear skin; if absent, lopsided features and skin with blemishes.
- Young: if absent, lines on the forehead and beside eyes and mouth, and heavier jowls.
- High_Cheekbones: a highlight on the cheekbone with a shadow below.
- Pointy_Nose: an angular, sharp tip.
- Pale_Skin: nearly white.
- No_Beard: if absent, and so are stubble, goatee, mustache and sideburns, a full beard.
- No hair colour: copper, auburn or dyed hair.
- Straight_Hair, Wavy_Hair: loose hair, to the nape for men; if both are absent, hair is put up
  (women) or cropped (men).

    python toyfaces.py --out DIR --count 1000           # a data set for train.py --data DIR
"""
import argparse
import functools
import hashlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from captions import ATTRIBUTES
from common.distributed import parallel_map
from common.script import atomic_write, naming, run_script
from common.seeds import random_stream
from drawing.portrait import build_shapes, render
from drawing.sketch import rasterize_strokes, stroke_points

# ---- attribute probabilities, close to CelebA's frequencies --------------------------------------
P_MALE = 0.42
P_YOUNG = {False: 0.87, True: 0.64}  # P(Young | Male)
P_INDEPENDENT = {  # for young women, older women, young men, older men
    "Arched_Eyebrows":   (.43, .36, .06, .06),
    "Attractive":        (.74, .28, .38, .07),
    "Bags_Under_Eyes":   (.07, .28, .27, .49),
    "Big_Lips":          (.30, .19, .20, .13),
    "Big_Nose":          (.08, .24, .36, .54),
    "Blurry":            (.05, .05, .05, .05),
    "Bushy_Eyebrows":    (.08, .03, .27, .19),
    "Chubby":            (.012, .08, .06, .19),
    "Eyeglasses":        (.015, .08, .08, .19),
    "Narrow_Eyes":       (.10, .13, .12, .15),
    "No_Beard":          (1., 1., .61, .58),
    "Oval_Face":         (.36, .23, .20, .17),
    "Pale_Skin":         (.058, .04, .03, .02),
    "Pointy_Nose":       (.38, .26, .17, .14),
    "Smiling":           (.54, .56, .39, .42),
    "Wearing_Earrings":  (.29, .40, .03, .015),
    "Wearing_Lipstick":  (.83, .68, .005, .005),
}
P_EXCLUSIVE = (  # at most one attribute of each block
    {"Black_Hair":        (.22, .12, .36, .20),
     "Blond_Hair":        (.24, .26, .03, .02),
     "Brown_Hair":        (.26, .20, .20, .09),
     "Gray_Hair":         (.001, .10, .005, .22)},
    {"Straight_Hair":     (.20, .16, .28, .19),
     "Wavy_Hair":         (.48, .40, .15, .10)},
    {"Bald":              (0., 0., .022, .11),
     "Receding_Hairline": (.03, .08, .085, .23),
     "Bangs":             (.21, .17, .09, .05),
     "Wearing_Hat":       (.035, .03, .08, .06)},
    {"Wearing_Necklace":  (.20, .21, .01, .005),
     "Wearing_Necktie":   (.002, .002, .11, .28)},
)
P_CONDITIONAL = {  # attribute: (condition, probability if the condition holds, if not)
    "Mouth_Slightly_Open": ("Smiling", .76, .22),
    "High_Cheekbones":     ("Smiling", .80, .13),
    "Heavy_Makeup":        ("Wearing_Lipstick", .80, .01),
    "Rosy_Cheeks":         ("Heavy_Makeup", .155, .01),
    "Double_Chin":         ("Chubby", .45, .022),
    "5_o_Clock_Shadow":    ("No_Beard", 0., .66),
    "Goatee":              ("No_Beard", 0., .37),
    "Mustache":            ("No_Beard", 0., .25),
    "Sideburns":           ("No_Beard", 0., .34),
}
HAIR = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair", "Straight_Hair", "Wavy_Hair")


def sample_attributes(rng: np.random.Generator) -> np.ndarray:
    """Sample the attributes of one person, bool (40,), from the tables above in their order."""
    uniform = dict(zip(ATTRIBUTES, rng.random(len(ATTRIBUTES)).tolist()))
    male = uniform["Male"] < P_MALE
    young = uniform["Young"] < P_YOUNG[male]
    group = 2 * male + (not young)
    has = {"Male": male, "Young": young}
    for name, probability in P_INDEPENDENT.items():
        has[name] = uniform[name] < probability[group]
    for block in P_EXCLUSIVE:       # one number per block; each attribute has an interval of it
        remainder = uniform[next(iter(block))]
        for name, probability in block.items():
            has[name] = 0 <= remainder < probability[group]
            remainder -= probability[group]
    for name, (condition, if_true, if_false) in P_CONDITIONAL.items():
        probability = if_true if has[condition] else if_false
        has[name] = uniform[name] < probability
    if has["Bald"]:
        for name in HAIR:
            has[name] = False
    return np.array([has[name] for name in ATTRIBUTES])


# ---- faces and sketches --------------------------------------------------------------------------
def draw(attributes: np.ndarray, rng: np.random.Generator, size=64) -> Image.Image:
    """Render one face, size x size pixels; `rng` determines only what no attribute describes."""
    look, shapes = build_shapes(attributes, rng)
    oversampling = 3 if size < 128 else 2
    image = render(look, shapes, size * oversampling).reduce(oversampling)
    if look.Blurry:
        image = image.filter(ImageFilter.GaussianBlur(size / 26))
    return image


def face(index: int, seed=0, size=64) -> tuple[Image.Image, np.ndarray]:
    """(image, attributes) of face `index` of data set `seed`. The same person is drawn at any
    size."""
    rng = random_stream("face", seed, index)
    attributes = sample_attributes(rng)
    return draw(attributes, rng, size), attributes


def sketch(index: int, seed=0, size=64, stages=70) -> np.ndarray:
    """Stages of the sketch of face `index` of data set `seed`, white on black, uint8 (stages, size,
    size). Every stage adds the same stroke length; the last is the complete sketch."""
    rng = random_stream("face", seed, index)            # the same face as in `face`
    attributes = sample_attributes(rng)
    look, shapes = build_shapes(attributes, rng)
    points, lengths = stroke_points(look, shapes)
    drawn = np.cumsum(lengths)
    stage = np.ceil(drawn / drawn[-1] * stages).astype(int) - 1
    return rasterize_strokes(points, stage, stages, size)


def draw_cached(count: int, size: int, seed: int, folder: str, stages: int):
    """The first `count` faces of data set `seed`, drawn on all cores or read from `folder`.

    Returns a memory-mapped structured array with the fields attributes (40,), picture (size, size,
    3) and sketches (stages, size, size), and the name of its file, which differs for other
    faces. A damaged file is an error that names it; it can be deleted."""
    path = Path(folder) / f"faces-{count}x{size}-{stages}stages-seed{seed}-{code_version()}.npy"
    if not path.exists():
        dtype = [
            ("attributes", bool, len(ATTRIBUTES)),
            ("picture", np.uint8, (size, size, 3)),
            ("sketches", np.uint8, (stages, size, size))]
        draw_one = functools.partial(face_and_sketch, seed=seed, size=size, stages=stages)
        with (atomic_write(path) as partial,
              parallel_map(draw_one, range(count), "drawing faces", chunk_size=16) as rows):
            drawn = np.lib.format.open_memmap(partial, "w+", dtype, (count,))
            for i, row in enumerate(rows):
                drawn[i] = row
    with naming(path):
        return np.load(path, mmap_mode="r"), path.name


def code_version() -> str:
    """A hash of the drawing code, so that faces drawn by other code are never reused."""
    here = Path(__file__).parent
    code = [Path(__file__), here / "captions.py", here / "common/seeds.py",
            *sorted(here.glob("drawing/*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest()[:8]


def face_and_sketch(index, seed, size, stages):
    """Attributes (40,), picture (size, size, 3) and sketch (stages, size, size) of a face."""
    image, attributes = face(index, seed, size)
    frames = sketch(index, seed, size, stages) if stages else np.empty((0, size, size))
    return attributes, np.asarray(image), frames


# ---- a data set on disk --------------------------------------------------------------------------
def write_faces(folder: Path, count, size, seed):
    """Write a data set in CelebA's layout, as Kaggle distributes it. Image n is face n - 1. The
    last 20 % of the faces are the validation and the test split, 10 % each. Raises ValueError if
    the folder contains files."""
    images = folder / "img_align_celeba"
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--out {folder}: expected a new or an empty folder, found files")
    images.mkdir(parents=True)
    held_out = max(count // 10, int(count >= 3))        # number of faces of the other splits
    split = np.repeat([0, 1, 2], [count - 2 * held_out, held_out, held_out])    # train, val, test
    labels = [("image_id", *ATTRIBUTES)]
    partition = [("image_id", "partition")]
    for index in tqdm(range(count), desc="faces"):
        image, attributes = face(index, seed, size)
        name = f"{index + 1:06}.png"
        image.save(images / name)
        labels.append((name, *np.where(attributes, 1, -1)))
        partition.append((name, split[index]))
    np.savetxt(folder / "list_attr_celeba.csv", labels, "%s", ",")
    np.savetxt(folder / "list_eval_partition.csv", partition, "%s", ",")


def main():
    parser = argparse.ArgumentParser(description="Render toy faces with CelebA's 40 attributes.")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for a data set in CelebA's layout")
    add("--count", type=int, default=1000, help="number of faces (default %(default)s)")
    add("--size", type=int, default=64, help="image size in pixels (default %(default)s)")
    add("--seed", type=int, default=0, help="seed of the data set (default %(default)s)")
    args = parser.parse_args()
    write_faces(args.out, args.count, args.size, args.seed)
    print(f"written: {args.out}")


if __name__ == "__main__":
    run_script(main)
