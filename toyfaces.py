"""Drawn faces with the 40 CelebA attributes: the data this project trains on if there is no other.

A face is drawn in three steps, each of which can be read alone:

1. `sample_attributes` decides the 40 labels from a small table of CelebA's frequencies;
2. `describe` turns them, and what no caption mentions (pose, colours, proportions), into `Shape`s;
3. `paint` turns the head, rounds the shapes into curves and fills them with Pillow.

Every attribute can be seen. Most are drawn literally; these need a convention:

- Attractive: even features and clear skin; without it, features are lopsided and the skin has
  blemishes. Young: without it, lines on the forehead, beside eyes and mouth, and heavier jowls.
- High_Cheekbones: a highlight on the cheekbone with a shadow below. Pointy_Nose: an angular nose
  with a sharp tip.
- Pale_Skin: nearly white. No_Beard absent with none of the four beards present: a full beard.
- No hair colour: copper, auburn or dyed. Straight_Hair and Wavy_Hair hang loose, to the nape for
  men; with neither, hair is put up (women) or cropped (men).

`sketch` draws the same face as a person with a pen would, stroke by stroke: what one has while a
sketch is still being drawn. It is made of the outlines of the same shapes, as far as the picture
shows them, and knows no colour.

    python toyfaces.py --sheet sheet.png                # every attribute, without and with it
    python toyfaces.py --sketch sketch.png              # some faces, and sketches of them that grow
    python toyfaces.py --out faces --count 1000 --size 64
    python toyfaces.py --tars tars --count 2000         # with captions, as a download of FaceCaption-15M
"""
import argparse
import csv
import functools
import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from vit import PICTURES, contact_sheet, run_script

ATTRIBUTES = tuple("""
5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair
Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones
Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline
Rosy_Cheeks Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick
Wearing_Necklace Wearing_Necktie Young
""".split())

# ---- who there is: frequencies close to CelebA's -----------------------------------------------
MALE = 0.42
YOUNG = {False: 0.87, True: 0.64}  # given Male
POPULATION = {  # young woman, older woman, young man, older man
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
EXCLUSIVE = (  # at most one of each block
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
GIVEN = {  # attribute: another one, probability with it, probability without it
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
BEARDS = ("5_o_Clock_Shadow", "Goatee", "Mustache", "Sideburns")
HAIR = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair", "Straight_Hair", "Wavy_Hair")


def sample_attributes(rng):
    """The labels of one person: the tables above, read from top to bottom."""
    chance = dict(zip(ATTRIBUTES, rng.random(len(ATTRIBUTES)).tolist()))
    male = chance["Male"] < MALE
    young = chance["Young"] < YOUNG[male]
    group = 2 * male + (not young)
    has = {"Male": male, "Young": young}
    for name, probability in POPULATION.items():
        has[name] = chance[name] < probability[group]
    for block in EXCLUSIVE:
        left = chance[next(iter(block))]  # one draw for the block; each name owns an interval of it
        for name, probability in block.items():
            has[name] = 0 <= left < probability[group]
            left -= probability[group]
    for name, (other, with_it, without_it) in GIVEN.items():
        has[name] = chance[name] < (with_it if has[other] else without_it)
    if has["Bald"]:
        has.update(dict.fromkeys(HAIR, False))
    return np.array([has[name] for name in ATTRIBUTES])


# ---- from attributes to pixels -----------------------------------------------------------------
class Shape(NamedTuple):
    """A filled outline, or a stroke where `width` > 0. Lengths are in face units: the chin is at
    y = 1, the top of the skull at y = -1, x = 0 is the middle."""
    part: str
    points: list           # (x, y) control points
    colour: tuple          # r, g, b or r, g, b, opacity
    width: float = 0.0
    smooth: bool = True    # a curve through the points rather than straight lines
    depth: float = 1.0     # 1 lies on the face, more stands out (nose), 0 is in the plane of the ears


BODY = {"neck", "clothes", "tie", "necklace"}  # the parts that do not move with the head


def describe(attributes, rng):
    """(look, shapes): the person behind the labels, and all that is to be painted, back to front.

    All random numbers are taken at once, whatever the attributes, so one `rng` state is one person:
    change a label and only that changes in the picture.
    """
    has = {name for name, value in zip(ATTRIBUTES, attributes) if value}
    numbers = iter(rng.random(80).tolist())
    between = lambda low, high: low + (high - low) * next(numbers)
    pick = lambda options: options[int(next(numbers) * len(options))]
    look = SimpleNamespace(**choose_colours(has, between, pick), **choose_proportions(has, between, pick))
    return look, [shape for part in PARTS for shape in part(has, look)]


@functools.lru_cache(maxsize=None)
def spline(count, closed, steps):
    """The matrix that takes `count` points to a Catmull-Rom curve through them: `steps` straight
    lines from each to the next; steps = 1 gives the points themselves. A closed curve returns."""
    t = np.arange(steps) / steps
    basis = np.stack([-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2], 1)
    corners = np.arange(count + closed)
    around = corners[:, None] + (-1, 0, 1, 2)  # the points that shape the curve up to the next corner
    around = around % count if closed else around.clip(0, count - 1)
    curve = (basis / 2) @ np.eye(count)[around]  # (corners, steps, count)
    return curve.reshape(-1, count)[:steps * (len(corners) - 1) + 1]


def outlines(look, shapes, canvas, steps):
    """One (n, 2) array of pixels per shape: the head turned, nodding, tilted about the neck, and
    put in the picture, with `steps` straight lines from point to point of a curve."""
    counts = [len(shape.points) for shape in shapes]
    x, y = np.array([point for shape in shapes for point in shape.points]).T
    depth = np.repeat([shape.depth * (shape.part not in BODY) for shape in shapes], counts)
    tilt = np.repeat([look.tilt * (shape.part not in BODY) for shape in shapes], counts)
    z = 0.74 * depth * np.maximum(0, 1 - (x / look.width) ** 2 - (y / 1.15) ** 2)
    x, y = x + z * look.turn, y + z * look.nod - 1.0
    x, y = x * np.cos(tilt) - y * np.sin(tilt), x * np.sin(tilt) + y * np.cos(tilt) + 1.0
    pixels = (np.stack([x, y], 1) * look.scale + look.centre) * canvas
    return [spline(len(points), shape.width == 0, steps if shape.smooth else 1) @ points
            for shape, points in zip(shapes, np.split(pixels, np.cumsum(counts)[:-1]))]


def paint(look, shapes, canvas):
    """The picture, canvas x canvas: a background between four colours, then shape over shape."""
    corners = Image.frombytes("RGB", (2, 2), bytes(value for colour in look.backdrop for value in colour))
    image = corners.resize((canvas, canvas), Image.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))
    pen = ImageDraw.Draw(image, "RGBA")
    for shape, line in zip(shapes, outlines(look, shapes, canvas, 3 + canvas // 100)):
        if shape.width:
            pen.line(line.ravel().tolist(), shape.colour, max(1, round(shape.width * look.scale * canvas)))
        else:
            pen.polygon(line.ravel().tolist(), shape.colour)
    return image


def draw(attributes, rng, size=64):
    """One face, size x size; `rng` decides only what no attribute mentions."""
    look, shapes = describe(attributes, rng)
    oversampling = 3 if size < 128 else 2
    image = paint(look, shapes, size * oversampling).reduce(oversampling)
    if attributes[ATTRIBUTES.index("Blurry")]:
        image = image.filter(ImageFilter.GaussianBlur(size / 26))
    return image


def face(index, seed=0, size=64):
    """(picture, attributes) of face `index` of set `seed`: the same in any process, order, size."""
    rng = np.random.default_rng((seed, index))
    attributes = sample_attributes(rng)
    return draw(attributes, rng, size), attributes


# ==== A first reading may stop here: colours, proportions, and one function per part ==============
CIRCLE = [(float(np.cos(angle)), float(np.sin(angle))) for angle in np.arange(8) * np.pi / 4]


def oval(x, y, half_width, half_height):
    return [(x + half_width * c, y + half_height * s) for c, s in CIRCLE]


def mix(a, b, amount):
    """The colour `amount` of the way from a to b."""
    return tuple(int(x + (y - x) * amount) for x, y in zip(a, b))


def at(side, *points):
    """Points given for the right half (x > 0), put on `side`: 1 as they are, -1 mirrored."""
    return [(side * x, y) for x, y in points]


def symmetric(right):
    """The closed outline whose right half is given; points with x = 0 are not doubled."""
    return [*right, *((-x, y) for x, y in right[::-1] if x)]


BLACK, WHITE = (20, 16, 18), (255, 255, 255)
SKINS = ((248, 212, 184), (236, 188, 152), (212, 158, 118), (170, 116, 82), (120, 78, 54))
HAIRS = {"Bald": (112, 68, 40), "Black_Hair": (36, 30, 36), "Blond_Hair": (234, 196, 106),
         "Gray_Hair": (176, 178, 184), "Brown_Hair": (112, 68, 40)}  # the first counts; of the bald: brows
OTHER_HAIRS = ((196, 86, 36), (150, 46, 34), (210, 110, 62), (176, 70, 44), (170, 60, 110), (74, 110, 140))
IRISES = ((82, 52, 32), (58, 104, 150), (74, 120, 74), (120, 84, 40))
LIPSTICKS = ((200, 30, 58), (216, 62, 110), (156, 24, 66), (224, 70, 60))
EYE_SHADOWS = ((110, 70, 150), (60, 110, 160), (150, 80, 50), (50, 130, 120))
CLOTHES = ((52, 84, 136), (176, 64, 70), (64, 122, 104), (232, 196, 120), (96, 80, 130), (60, 64, 74),
           (222, 132, 120), (226, 226, 220))
BACKDROPS = ((188, 212, 226), (240, 214, 186), (200, 222, 196), (222, 206, 230), (116, 140, 160),
             (158, 132, 120), (236, 232, 222), (90, 96, 112))
METALS = ((246, 206, 84), (236, 240, 246))
FRAMES = ((30, 30, 36), (120, 40, 40), (60, 44, 30))


def choose_colours(has, between, pick):
    """Every colour of the picture; what captions do not name comes from `between` and `pick`."""
    skin = mix(*pick(tuple(zip(SKINS, SKINS[1:]))), between(0, 1))
    if "Pale_Skin" in has:
        skin = mix(skin, (255, 242, 238), 0.84)
    hair = next((colour for name, colour in HAIRS.items() if name in has), pick(OTHER_HAIRS))
    shade = between(-0.12, 0.12)
    hair = mix(hair, WHITE if shade > 0 else BLACK, abs(shade))
    lipstick, cloth, backdrop, second = pick(LIPSTICKS), pick(CLOTHES), pick(BACKDROPS), pick(BACKDROPS)
    return dict(
        skin=skin, skin_dark=mix(skin, (76, 24, 28), 0.28), skin_light=mix(skin, WHITE, 0.42),
        hair=hair, hair_dark=mix(hair, BLACK, 0.36), hair_light=mix(hair, WHITE, 0.22),
        lips=lipstick if "Wearing_Lipstick" in has else mix(skin, (160, 56, 60), 0.46),
        cloth=cloth, cloth_dark=mix(cloth, BLACK, 0.25), line=mix(skin, (40, 10, 14), 0.58),
        iris=pick(IRISES), eye_shadow=pick(EYE_SHADOWS), metal=pick(METALS), frame=pick(FRAMES),
        accent=pick(CLOTHES[:5]), backdrop=[mix(backdrop, second, between(0, 0.6)) for _ in range(4)])


def choose_proportions(has, between, pick):
    """Where things are and how large: attributes set the range, `between` the person within it."""
    male, oval_face, chubby, young = (name in has for name in ("Male", "Oval_Face", "Chubby", "Young"))
    return dict(
        skew=pick((-1, 1)) * between(0.05, 0.075) * ("Attractive" not in has),
        width=between(0.73, 0.79) - 0.11 * oval_face + 0.13 * chubby,
        jaw=between(0.58, 0.63) + 0.06 * male - 0.13 * oval_face + 0.18 * chubby + 0.03 * (not young),
        chin=between(0.24, 0.29) + 0.07 * male - 0.06 * oval_face + 0.10 * chubby,
        eye_x=between(0.32, 0.35), eye_y=between(-0.10, -0.04), eye_width=between(0.19, 0.215),
        eye_height=between(0.125, 0.145) * (0.36 if "Narrow_Eyes" in has else 1), gaze=between(-0.03, 0.03),
        brow_y=between(-0.35, -0.30), nose_y=between(0.27, 0.33),
        mouth_y=between(0.60, 0.65), mouth_width=between(0.22, 0.26), neck=0.33 + 0.11 * male + 0.10 * chubby,
        volume=between(0.12, 0.22), parting=between(-0.2, 0.2), length=between(0.95, 1.7),
        hat_height=between(0.32, 0.5), brimmed=pick((False, True)), round_glasses=pick((False, True)),
        spots=[(between(-0.5, 0.5), between(-0.5, 0.75), between(0.034, 0.05)) for _ in range(6)],
        light=pick((-1, 1)), shading=int(between(30, 75)),
        turn=between(-0.28, 0.28), nod=between(-0.10, 0.10), tilt=between(-0.10, 0.10),
        scale=between(0.33, 0.36), centre=(between(0.475, 0.525), between(0.465, 0.495)))


def face_outline(look, grow=0.0):
    """The contour of the head, from the top of the skull clockwise."""
    w, jaw, chin = look.width + grow, look.jaw + grow, look.chin + grow / 2
    return symmetric([(0, -1.0), (w * 0.55, -0.92), (w * 0.93, -0.55), (w, -0.05), (w * 0.96, 0.28),
                      (jaw, 0.60), (chin, 0.93 + grow), (0, 1.0 + grow)])


def back_hair(has, look):
    """What hangs behind the head, to the nape for men; a woman's other hair is put up."""
    w, top, end = look.width, -1 - look.volume, 0.42 if "Male" in has else look.length
    if "Wavy_Hair" in has:
        heights = np.linspace(-0.5, end, 8).tolist()
        side = [(w + 0.09 + 0.11 * (i % 2) + 0.06 * (y + 0.5), y) for i, y in enumerate(heights)]
        outline = symmetric([(0, top), (0.6, top + 0.25), *side, (w * 0.6, end + 0.1)])
        yield Shape("hair", outline, look.hair_dark, depth=0)
    elif "Straight_Hair" in has:
        outline = symmetric([(w * 0.8, -0.6), (w + 0.08, -0.1), (w + 0.15, end)])
        yield Shape("hair", outline, look.hair_dark, smooth=False, depth=0)
    elif not has & {"Bald", "Wearing_Hat", "Male"}:
        yield Shape("hair", oval(look.parting / 2, top - 0.06, 0.34, 0.27), look.hair_dark, depth=0)


def bust(has, look):
    """Neck, shoulders and collar, with a necktie a dark jacket over a white shirt; a necklace."""
    tie, w = "Wearing_Necktie" in has, look.neck
    yield Shape("neck", symmetric([(w, 0.5), (w + 0.04, 1.3), (0, 1.75)]), look.skin, smooth=False)
    shadow = [(x, y + 0.16) for x, y in face_outline(look, -0.1)]
    yield Shape("shade", shadow, look.skin_dark, depth=0.4)
    shoulder, dip = (1.42, 1.32) if "Male" in has else (1.2, 1.5)
    outline = symmetric([(0, dip), (w + 0.02, 1.16), (shoulder * 0.8, 1.32),
                         (shoulder, 1.5), (shoulder + 0.15, 2.2)])
    yield Shape("clothes", outline, (40, 44, 58) if tie else look.cloth, smooth=False)
    for side in (-1, 1):
        collar = at(side, (w + 0.03, 1.12), (0.02, dip + 0.06), (0.26, dip + 0.2), (w + 0.16, 1.22))
        yield Shape("clothes", collar, WHITE if tie else look.cloth_dark, smooth=False)
    if tie:
        yield Shape("tie", symmetric([(0.5, 1.2), (0.3, 2.2)]), (244, 244, 246), smooth=False)
        yield Shape("tie", symmetric([(0.13, 1.2), (0.09, 1.36), (0.2, 2.2)]), look.accent, smooth=False)
    if "Wearing_Necklace" in has:
        chain = [(-w - 0.03, 1.08), (-0.22, 1.28), (0, 1.35), (0.22, 1.28), (w + 0.03, 1.08)]
        yield Shape("necklace", chain, look.metal, 0.075)
        yield Shape("necklace", oval(0, 1.40, 0.11, 0.12), look.metal)


def head(has, look):
    """Ears, the face, its side away from the light, and a second chin below the first."""
    for x in (-look.width, look.width):
        yield Shape("ear", oval(x, 0.02, 0.11, 0.19), mix(look.skin, look.skin_dark, 0.4), depth=0)
        yield Shape("ear", oval(x * 1.04, 0.02, 0.05, 0.10), look.skin_dark, depth=0)
    if "Double_Chin" in has:
        below = oval(0, 0.9, look.chin + 0.2, 0.38)
        yield Shape("chin", below, mix(look.skin, look.skin_dark, 0.35), depth=0.6)
        yield Shape("chin", [(-0.36, 1.16), (0, 1.28), (0.36, 1.16)], look.line, 0.045, depth=0.6)
    outline = face_outline(look)
    yield Shape("face", outline, look.skin)
    edge = at(-look.light, *outline[1:8])
    inner = [(x * 0.74, y * 0.96) for x, y in edge[:-1]]
    yield Shape("shade", edge + inner[::-1], (*look.skin_dark, look.shading))
    if "Double_Chin" in has:
        yield Shape("chin", [(-0.3, 0.93), (0, 1.0), (0.3, 0.93)], look.line, 0.045)


def skin(has, look):
    """High or rosy cheeks, blemishes, and lines of age on the forehead, beside mouth and eyes."""
    for side in (-1, 1):
        if "High_Cheekbones" in has:
            hollow = at(side, (0.34, 0.42), (0.5, 0.29), (0.68, 0.1), (0.66, 0.3), (0.55, 0.46))
            bone = at(side, (0.3, 0.22), (0.42, 0.1), (0.6, 0.0), (0.65, 0.08), (0.5, 0.23))
            yield Shape("cheek", hollow, (*look.skin_dark, 180))
            yield Shape("cheek", bone, (*look.skin_light, 150))
        if "Rosy_Cheeks" in has:
            yield Shape("cheek", oval(side * 0.45, 0.26, 0.19, 0.15), (236, 60, 84, 70))
            yield Shape("cheek", oval(side * 0.45, 0.26, 0.13, 0.10), (236, 60, 84, 90))
    if "Attractive" not in has:
        for x, y, radius in look.spots:
            yield Shape("blemish", oval(x, y, radius, radius), mix(look.skin, (150, 40, 40), 0.5))
    if "Young" not in has:
        for y in (-0.58, -0.48):
            yield Shape("wrinkle", [(-0.28, y), (0, y - 0.03), (0.28, y)], look.line, 0.035)
        for side in (-1, 1):
            yield Shape("wrinkle", at(side, (0.2, 0.34), (0.34, 0.46), (0.37, 0.62)), look.line, 0.04)
            for fan in (-0.04, 0.04):
                crow_foot = at(side, (0.53, look.eye_y - fan / 2), (0.64, look.eye_y + 2 * fan))
                yield Shape("wrinkle", crow_foot, look.line, 0.035)


def beard(has, look):
    """All facial hair but the moustache, which lies over the lips."""
    full = not has & {"No_Beard", *BEARDS}
    if full or "5_o_Clock_Shadow" in has:  # the cheeks below `top`, the chin and the upper lip
        top, reach, colour = (0.05, 1.04, look.hair_dark) if full else (0.28, 0.97, (48, 50, 64, 90))
        edge = [(look.width * 0.95 * reach, top), (look.jaw * reach, 0.60), (look.chin * reach, 0.93 * reach)]
        inner = [(look.width * 0.82, top + 0.02), (look.jaw * 0.72, 0.45), (0.1, 0.45)]
        outline = [*symmetric([*edge, (0, reach)]), *at(-1, *inner), *inner[::-1]]
        yield Shape("beard", outline, colour)
    if "Goatee" in has:
        outline = symmetric([(0.10, 0.76), (0.22, 0.72), (0.24, 0.92), (0.12, 1.08), (0, 1.14)])
        yield Shape("beard", outline, look.hair_dark)
    if "Sideburns" in has:
        w = look.width
        for side in (-1, 1):
            outline = at(side, (w + 0.02, -0.3), (w + 0.02, 0.25), (look.jaw + 0.02, 0.56), (w - 0.2, 0.42),
                         (w - 0.13, 0.0), (w - 0.1, -0.3))
            yield Shape("beard", outline, look.hair_dark)


def nose(has, look):
    x, y, w, light = look.skew, look.nose_y, 0.13, look.light
    if "Big_Nose" in has:
        y, w = y + 0.06, 0.26
    if "Pointy_Nose" in has:
        tip, wing, shadow = (x, y + 0.08), w * 0.85 * light, mix(look.skin_dark, look.line, 0.3)
        yield Shape("nose", [(-0.04 * light, -0.1), (-wing, y - 0.02), tip], shadow, smooth=False, depth=1.25)
        yield Shape("nose", [(-0.02 * light, -0.1), tip, (wing, y - 0.02)], look.line, 0.06, False, 1.25)
    else:
        base = [(x - w, y - 0.05), (x - w / 2, y + 0.03), (x, y + 0.015), (x + w / 2, y + 0.03),
                (x + w, y - 0.05)]
        yield Shape("shade", oval(x, y - 0.05, w * 0.95, w * 0.75), look.skin_dark, depth=1.2)
        yield Shape("shade", oval(x + 0.02 * light, y - 0.08, w * 0.62, w * 0.62), look.skin, depth=1.25)
        yield Shape("nose", base, look.line, 0.035, depth=1.2)


def eyes(has, look):
    makeup, w, h = "Heavy_Makeup" in has, look.eye_width, look.eye_height
    for side in (-1, 1):
        x, y = side * look.eye_x, look.eye_y + side * look.skew
        # A point of the eye: x from the inner (-1) to the outer (1) corner, y in eye heights.
        place = lambda *points: [(x + side * w * px, y + h * py) for px, py in points]
        if makeup:
            above = y - h - 0.12
            shadow = [*place((-1, 0)), (x - side * w / 2, above), (x + side * w / 2, above),
                      *place((1.5, -1.3), (1, 0))]
            yield Shape("makeup", shadow, (*look.eye_shadow, 210))
        if "Bags_Under_Eyes" in has:
            bag = symmetric([(0, 0.05), (w, 0), (w * 0.6, 0.13), (0, 0.17)])
            bag = [(x + px, y + h + py) for px, py in bag]
            yield Shape("eye bag", bag, mix(look.skin, (52, 14, 64), 0.4))
        lid = place((-1, 0.2), (-0.5, -0.8), (0.2, -1), (1, -0.2))
        yield Shape("eye", lid + place((0.45, 0.8), (-0.35, 0.85)), (252, 250, 248))
        centre = x + look.gaze
        iris = [(px, min(max(py, y - h * 0.95), y + h * 0.8)) for px, py in oval(centre, y, 0.105, 0.115)]
        yield Shape("iris", iris, look.iris)
        yield Shape("pupil", oval(centre, y, 0.045, min(0.05, h * 0.8)), BLACK)
        yield Shape("glint", oval(centre + 0.035 * look.light, y - h * 0.35, 0.024, 0.024), WHITE)
        yield Shape("lid", lid, BLACK if makeup else mix(look.line, BLACK, 0.5), 0.075 if makeup else 0.04)
        if "Male" not in has:
            reach, thick = (0.14, 0.06) if makeup else (0.06, 0.03)
            lash = [(x + side * w * 0.8, y - 0.03), (x + side * (w + reach), y - 0.03 - reach * 0.7)]
            yield Shape("lash", lash, BLACK, thick)


def brows(has, look):
    thick = (0.17 if "Bushy_Eyebrows" in has else 0.05) + 0.02 * ("Male" in has)
    rise = 0.16 if "Arched_Eyebrows" in has else 0.03
    for side in (-1, 1):
        y = look.brow_y - 1.2 * side * look.skew - thick / 2
        upper = [(0.14, y - 0.01), (0.26, y - rise * 0.75), (0.40, y - rise), (0.50, y - rise * 0.5)]
        lower = [(px, py + thick) for px, py in upper[::-1]]
        yield Shape("brow", at(side, *upper, (0.57, y + 0.09), *lower), mix(look.hair_dark, BLACK, 0.35))


def mouth(has, look):
    """Lips, teeth and moustache. A smile raises the corners and lowers the middle."""
    smile, gap = "Smiling" in has, 0.085 if "Mouth_Slightly_Open" in has else 0.0
    lip = 0.125 if "Big_Lips" in has else 0.05
    w, rise = look.mouth_width + 0.08 * smile, 0.12 if smile else 0.015
    middle, corner = look.mouth_y + 0.06 * smile, look.mouth_y - rise
    left, right = (-w, corner - look.skew), (w, corner + look.skew)
    top, bottom = middle - gap, middle + gap
    yield Shape("lips", [left, (-0.09, top - lip), (0, top - lip * 0.7), (0.09, top - lip), right,
                         (w / 2, bottom + lip), (0, bottom + lip * 1.35), (-w / 2, bottom + lip)], look.lips)
    if gap:
        inside = [(-w * 0.86, left[1]), (0, middle - gap * 0.75), (w * 0.86, right[1])]
        floor, bite = middle + gap * 0.9, middle + gap * 0.15
        yield Shape("mouth", inside + [(w * 0.45, floor), (-w * 0.45, floor)], (88, 22, 30))
        ends = look.mouth_y - rise * 0.45
        yield Shape("teeth", symmetric([(0, middle - gap * 0.7), (w * 0.6, ends), (w * 0.35, bite)]), WHITE)
    else:
        y = middle + rise * 0.1
        line = [left, (-w / 2, y), (0, middle + 0.01), (w / 2, y), right]
        yield Shape("mouth", line, mix(look.lips, BLACK, 0.55), 0.035)
    if "Mustache" in has:
        y = look.mouth_y
        right = [(0, y - 0.17), (0.08, y - 0.2), (0.24, y - 0.12), (0.32, y + 0.04), (0.14, y - 0.04),
                 (0, y - 0.05)]
        yield Shape("moustache", symmetric(right), look.hair_dark)


def top_hair(has, look):
    """The cap of hair: an outer arc over the skull, and the hairline as its inner edge."""
    if "Bald" in has:
        yield Shape("shine", oval(look.light * 0.3, -0.75, 0.16, 0.09), (*look.skin_light, 170))
        return
    w, wavy, receding = look.width, "Wavy_Hair" in has, "Receding_Hairline" in has
    rise = 0.76 + (0.06 if receding else look.volume)
    angles = np.linspace(np.pi, 2 * np.pi, 14 if wavy else 8)
    bumps = 1 + 0.06 * wavy * (-1.0) ** np.arange(len(angles))
    outer = np.stack([bumps * (w + 0.08) * np.cos(angles), bumps * rise * np.sin(angles) - 0.25], 1).tolist()
    temple = -0.1 if receding else 0.02 if "Male" in has else 0.25
    if receding:
        right, middle = [(w - 0.03, temple), (w - 0.06, -0.5), (0.42, -0.97), (0.2, -0.88)], (0, -0.82)
    else:
        right, middle = [(w - 0.05, temple), (w - 0.1, -0.3), (0.45, -0.6)], (look.parting, -0.76)
    line = [*right, middle, *at(-1, *right)[::-1]]
    yield Shape("hair", [(-w - 0.06, temple), *outer, (w + 0.06, temple), *line], look.hair)


def strands(has, look):
    """How loose hair falls from the parting; a sheen on hair that is neither straight nor wavy."""
    if has & {"Bald", "Receding_Hairline", "Wearing_Hat"}:
        return
    top = -0.97 - look.volume * 0.6
    if not has & {"Straight_Hair", "Wavy_Hair"}:
        sheen = at(look.light, (0.15, top + 0.03), (0.4, top + 0.14), (0.58, top + 0.36))
        yield Shape("hair", sheen, look.hair_light, 0.05)
        return
    t = np.linspace(0, 1, 6)
    ripple = 0.06 * np.sin(11 * t) * ("Wavy_Hair" in has)
    for side in (-1, 1):
        for low, colour in ((0.3, look.hair_light), (0.62, look.hair_dark)):
            start, end = look.parting + side * 0.08, side * (look.width - 0.02)
            drop = (0.48 * low - 0.75 - top) * t**2
            path = np.stack([start + (end - start) * t, top + 0.12 * low + drop + ripple], 1).tolist()
            yield Shape("hair", path, colour, 0.035)


def locks(has, look):
    """A woman's loose hair, in front of her shoulders."""
    if "Male" not in has and has & {"Straight_Hair", "Wavy_Hair"}:
        wavy = "Wavy_Hair" in has
        heights = np.linspace(-0.3, look.length - 0.1, 7).tolist()
        middle = [(look.width - 0.01 + 0.08 * wavy * (i % 2) + 0.008 * i, y) for i, y in enumerate(heights)]
        outline = [(x + 0.08, y) for x, y in middle] + [(x - 0.07, y) for x, y in middle[::-1]]
        for side in (-1, 1):
            yield Shape("hair", at(side, *outline), look.hair, smooth=wavy, depth=0)


def bangs(has, look):
    if "Bangs" in has:
        w = look.width * 0.88
        fringe = [(x, -0.35 - 0.07 * (i % 2)) for i, x in enumerate(np.linspace(w, -w, 9).tolist())]
        outline = [(-w, -0.55), (-0.4, -0.95), (0.4, -0.95), (w, -0.55), *fringe]
        yield Shape("bangs", outline, look.hair, smooth=False)
        for x, y in fringe[2:-1:2]:
            yield Shape("bangs", [(x * 0.7, -0.9), (x, y - 0.06)], look.hair_dark, 0.03)


def worn(has, look):
    """Hat, glasses, earrings."""
    if "Wearing_Hat" in has:
        w, top = look.width + 0.1, -1.05 - look.hat_height
        crown = symmetric([(0, top), (w * 0.6, top + 0.06), (w, -0.85), (w, -0.62)])
        edge = w + (0.35 if look.brimmed else 0.02)
        brim = symmetric([(0, -0.8), (w, -0.76), (edge, -0.6), (w * 0.8, -0.52), (0, -0.48)])
        yield Shape("hat", crown, look.accent, depth=0.3)
        yield Shape("hat", brim, mix(look.accent, BLACK, 0.3), depth=0.3)
    if "Eyeglasses" in has:
        x, y, w, h = look.eye_x, look.eye_y + 0.03, 0.25, 0.23 if look.round_glasses else 0.17
        lens = oval(x, y, w, h) if look.round_glasses else [
            (x - w, y - h), (x + w, y - h), (x + w * 0.9, y + h), (x - w * 0.9, y + h)]
        for side in (-1, 1):
            outline = at(side, *lens)
            yield Shape("glasses", outline, (225, 240, 250, 60), smooth=look.round_glasses)
            yield Shape("glasses", outline + outline[:1], look.frame, 0.06, look.round_glasses)
            yield Shape("glasses", at(side, (x + w, y - 0.06), (look.width, y - 0.08)), look.frame, 0.06)
        yield Shape("glasses", [(w - x, y - 0.04), (0, y - 0.08), (x - w, y - 0.04)], look.frame, 0.06)
    if "Wearing_Earrings" in has:
        for side in (-1, 1):
            yield Shape("earring", oval(side * (look.width + 0.04), 0.34, 0.075, 0.11), look.metal, depth=0)


PARTS = (back_hair, bust, head, skin, beard, nose, eyes, mouth, top_hair, strands, locks, bangs, brows, worn)


# ---- from shapes to a sketch that grows --------------------------------------------------------
PORTRAIT = (  # in the order of drawing; missing are light, shade, make-up, and what is too small for a pen
    ("face",), ("chin",), ("hair", "bangs"), ("eye", "pupil", "lash"), ("brow",), ("nose",),
    ("lips", "mouth"), ("ear",), ("neck", "clothes"), ("glasses",), ("beard", "moustache"),
    ("wrinkle", "eye bag"), ("hat",), ("earring", "necklace", "tie"), ("blemish",))
TURN = {part: turn for turn, parts in enumerate(PORTRAIT) for part in parts}
SPACING = 1 / 400  # of the picture's width: the pieces of an outline, and the pixels of `visible`


def sketch(index, seed=0, size=64, steps=70):
    """(steps, size, size) uint8: face `index` of the set `seed` while it is drawn, white on black,
    in the end complete. Every step adds the same length of line."""
    rng = np.random.default_rng((seed, index))
    places, lengths = pen_path(*describe(sample_attributes(rng), rng))
    drawn = np.cumsum(lengths)
    step = np.ceil(drawn / drawn[-1] * steps).astype(int) - 1
    return ink(places, step, steps, size)


def pen_path(look, shapes):
    """Places of the pen (m, 2), in widths of the picture, and how much line each stands for (m,).

    Only what the picture shows, in the order of `PORTRAIT`, within a turn in that of painting.
    Colour does no more than say where one thing ends and the next begins, and what is transparent
    has no outline.
    """
    shapes = [shape for shape in shapes if shape.part in TURN and len(shape.colour) == 3]
    lines = outlines(look, shapes, 1, 6)
    places, way, owner = cut(lines)
    kept = np.flatnonzero(visible(shapes, lines, places, way, owner))
    turn = np.array([TURN[shape.part] for shape in shapes])
    order = kept[np.argsort(turn[owner[kept]], kind="stable")]
    return places[order], np.hypot(*way[order].T)


def cut(lines):
    """All lines in m pieces of at most `SPACING`: their middles (m, 2), the way from end to end
    (m, 2), and the number of the line (m,)."""
    start = np.concatenate([line[:-1] for line in lines])
    way = np.concatenate([np.diff(line, axis=0) for line in lines])
    owner = np.repeat(np.arange(len(lines)), [len(line) - 1 for line in lines])
    count = np.ceil(np.hypot(*way.T) / SPACING).astype(int)
    segment = np.repeat(np.arange(len(count)), count)  # of each piece
    nth = np.arange(len(segment)) - (np.cumsum(count) - count)[segment]
    way = way[segment] / count[segment, None]
    return start[segment] + way * (nth[:, None] + 0.5), way, owner[segment]


def visible(shapes, lines, places, way, owner):
    """(m,) bool: the pieces that the picture shows: not painted over, and something else beside."""
    canvas = round(1 / SPACING)
    image = Image.new("I", (canvas, canvas), -1)
    pen = ImageDraw.Draw(image)
    for number, (shape, line) in enumerate(zip(shapes, lines)):
        if not shape.width and shape.part != "beard":  # one draws the whole head before the beard on it
            pen.polygon((line * canvas).ravel().tolist(), number)
    uppermost = np.asarray(image)  # the number of the shape that each pixel shows, -1 for none

    def seen(points):
        column, row = (points * canvas).clip(0, canvas - 1).astype(int).T
        return uppermost[row, column]

    stroke = np.array([shape.width > 0 for shape in shapes])[owner]
    area = np.array([(line[:-1] * line[1:, ::-1] @ (1, -1)).sum() for line in lines])  # > 0: clockwise
    outwards = np.stack([way[:, 1], -way[:, 0]], 1) * np.where(stroke, 0, np.sign(area[owner]))[:, None]
    outwards *= 1.5 * SPACING / np.hypot(*way.T)[:, None]
    inside, outside = seen(places - outwards), seen(places + outwards)

    # No edge shows between hair and hair, nor between things of one turn and colour.
    looks = [(TURN[shape.part], shape.part in ("hair", "bangs") or shape.colour) for shape in shapes]
    look = np.array([*(looks.index(each) for each in looks), -1])  # the last: nothing painted
    edge = look[outside] != look[owner]
    shown = np.where(stroke, inside <= owner, edge & ((inside <= owner) | (look[inside] == look[owner])))
    return shown & ((places > 0) & (places < 1)).all(1)


def ink(places, step, steps, size):
    """(steps, size, size) uint8: a round pen was at `places` (m, 2), in `step` (m,) for the first
    time, `step` ascending.

    Each pixel of a larger canvas gets the step in which the pen first covers it. How many of those
    that make up a pixel of the sketch are covered is its brightness.
    """
    oversampling = 4 if size < 128 else 2
    canvas, radius = size * oversampling, size * oversampling / 120
    margin = int(np.ceil(radius))
    edge = canvas + 2 * margin
    y, x = np.mgrid[-margin:margin + 1, -margin:margin + 1]
    disc = (y * edge + x)[x**2 + y**2 <= radius**2]
    column, row = (places * canvas).astype(int).T + margin
    first = np.full(edge * edge, steps)
    first[(row * edge + column)[::-1, None] + disc] = step[::-1, None]  # backwards: what is first, stays
    first = first.reshape(edge, edge)[margin:-margin, margin:-margin]

    pixel = np.arange(size * size).reshape(size, 1, size, 1)
    place = first.reshape(size, oversampling, size, oversampling) * size * size + pixel  # in `covered`
    covered = np.bincount(place.ravel(), minlength=(steps + 1) * size * size)
    covered = covered.reshape(-1, size, size)[:steps].astype(np.uint16)
    for before, now in zip(covered, covered[1:]):  # a running sum, faster than cumsum along the first axis
        now += before
    return (covered * 255 // oversampling**2).astype(np.uint8)


# ---- sheets, and the command -------------------------------------------------------------------
def attribute_rows(size, pairs=5):
    """For `contact_sheet`: a person without and, framed, with each attribute, else the same."""
    men = {*BEARDS, "No_Beard", "Bald", "Receding_Hairline", "Bushy_Eyebrows", "Gray_Hair", "Wearing_Necktie"}
    tiles = []
    for i, name in enumerate(ATTRIBUTES):
        others = {"Young", "Attractive", "No_Beard", "Brown_Hair", *["Male"] * (name in men)}
        for has, label in ((others - {name}, name), (others | {name}, "")):
            image = draw(np.isin(ATTRIBUTES, list(has)), np.random.default_rng(i), size)
            tiles.append((image, label, name in has))
    return [("", tiles[start:start + 2 * pairs]) for start in range(0, len(tiles), 2 * pairs)]


def sketch_rows(seed, size, count=6, stages=(10, 25, 40, 60, 80, 100)):
    """For `contact_sheet`: a face, and its sketch when so many percent of it are drawn."""
    for index in range(count):
        frames = sketch(index, seed, size, steps=100)
        yield "", [(face(index, seed, size)[0], "", False),
                   *((Image.fromarray(frames[stage - 1]), f"{stage} %", False) for stage in stages)]


def write_faces(folder, count, size, seed):
    """DIR/000000.png ... and DIR/attributes.csv: name, then the 40 labels as 1 or -1."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "attributes.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["name", *ATTRIBUTES])
        for index in tqdm(range(count), desc="faces"):
            image, attributes = face(index, seed, size)
            image.save(folder / f"{index:06}.png")
            table.writerow([f"{index:06}.png", *np.where(attributes, 1, -1)])


def write_tars(folder, count, size, seed, per_tar=1000):
    """DIR/00000.tar ..., as img2dataset leaves FaceCaption-15M: for each face N.jpg, somewhere on
    which it is, N.txt and N.json, which says where, with two captions; and 00000_stats.json."""
    import data                                         # for its grammar; else data.py imports this file
    folder.mkdir(parents=True, exist_ok=True)
    for first in tqdm(range(0, count, per_tar), desc="tars"):
        name, numbers = f"{first // per_tar:05}", range(first, min(first + per_tar, count))
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for index in numbers:
                image, attributes = face(index, seed, size)
                rng = np.random.default_rng((seed, index, 1))
                edge, (x, y) = size + size // 2, rng.integers(0, size // 2 + 1, 2).tolist()
                ground = tuple(rng.integers(256, size=3).tolist())
                photo, jpeg = Image.new("RGB", (edge, edge), ground), io.BytesIO()
                photo.paste(image, (x, y))
                photo.save(jpeg, "jpeg", quality=95)
                captions = [data.caption(attributes, rng)[0] for _ in range(2)]
                record = {"status": "success", "url": f"drawn://{seed}/{index}", "caption": captions,
                          "box": str([x, y, x + size, y + size]), "width": edge, "height": edge,
                          "original_width": edge, "original_height": edge}
                for suffix, content in ((".jpg", jpeg.getvalue()), (".txt", captions[0].encode()),
                                        (".json", json.dumps(record).encode())):
                    member = tarfile.TarInfo(f"{index:09}{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        (folder / f"{name}_stats.json").write_text(json.dumps({"successes": len(numbers)}))


def main():
    parser = argparse.ArgumentParser(description="Draw faces with the 40 CelebA attributes.")
    parser.add_argument("--out", type=Path, help="folder for pictures and attributes.csv")
    parser.add_argument("--tars", type=Path, help="folder for tars with captions, as img2dataset leaves them")
    parser.add_argument("--count", type=int, default=1000, help="how many faces (default %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="pixels on a side (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which set of faces (default %(default)s)")
    parser.add_argument("--sheet", type=Path, help="a file for every attribute, without and with it")
    parser.add_argument("--sketch", type=Path, help="a file for some faces and their growing sketches")
    args = parser.parse_args()
    if not (args.out or args.tars or args.sheet or args.sketch):
        parser.error("nothing to do: give --out, --tars, --sheet, --sketch or several of them")
    for flag, value, low in (("count", args.count, 1), ("size", args.size, 8), ("seed", args.seed, 0)):
        if value < low:
            raise ValueError(f"--{flag} {value}: expected at least {low}")
    for path in (args.sheet, args.sketch):
        if path and path.suffix.lower() not in PICTURES:
            raise ValueError(f"{path}: expected a picture's name, one that ends in {', '.join(PICTURES)}")
    if args.sheet:
        contact_sheet(attribute_rows(96), tile=96).save(args.sheet)
    if args.sketch:
        contact_sheet(list(sketch_rows(args.seed, 160)), tile=160).save(args.sketch)
    if args.tars:
        write_tars(args.tars, args.count, args.size, args.seed)
    if args.out:
        write_faces(args.out, args.count, args.size, args.seed)
    print("written:", *filter(None, (args.sheet, args.sketch, args.tars, args.out)))


if __name__ == "__main__":
    run_script(main)
