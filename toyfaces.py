"""Drawn faces with the 40 CelebA attributes: the data this project trains on when there is no other.

A face is drawn in three steps, each of which can be read alone:

1. `sample_attributes` decides the 40 labels from a small table of CelebA's frequencies, given sex and age;
2. `describe` turns them, and all that no caption mentions (pose, skin, colours, proportions), into a list of `Shape`s;
3. `paint` turns head and light, rounds the shapes into curves and fills them with Pillow.

Every attribute can be seen. Most are drawn literally; these need a convention:

- Attractive: even features and clear skin; without it, features are lopsided and the skin has blemishes.
- Young: without it, lines on the forehead, beside eyes and mouth, and heavier jowls.
- High_Cheekbones: a highlight on the cheekbone with a shadow below. Pointy_Nose: an angular nose with a sharp tip.
- Pale_Skin: nearly white. No_Beard absent with none of the four beards present: a full beard.
- No hair colour: copper, auburn or dyed. Neither Straight_Hair nor Wavy_Hair: put up (women), cropped (men).

Lengths are in face units: the chin is at y = 1, the top of the skull at y = -1, x = 0 is the middle.

    python toyfaces.py --sheet sheet.png                # every attribute, without and with it
    python toyfaces.py --out faces --count 1000 --size 64
"""
import argparse
import csv
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

ATTRIBUTES = tuple("""5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair
Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones
Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks
Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace Wearing_Necktie
Young""".split())

# ---------------------------------------------------------------- who there is: frequencies close to CelebA's

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


# ---------------------------------------------------------------- what is drawn: shapes, colours, proportions

class Shape(NamedTuple):
    """A filled outline, or a stroke where `width` > 0, in face units and in painting order."""
    part: str
    points: list           # (x, y) control points
    colour: tuple          # r, g, b or r, g, b, opacity
    width: float = 0.0
    smooth: bool = True    # a curve through the points rather than straight lines
    depth: float = 1.0     # 1 lies on the face, more stands out (nose), 0 is in the plane of the ears
    body: bool = False     # does not tilt with the head


def mix(a, b, amount):
    """The colour `amount` of the way from a to b."""
    return tuple(int(x + (y - x) * amount) for x, y in zip(a, b))


def mirror(points):
    """The same outline on the other side of the face."""
    return [(-x, y) for x, y in points]


CIRCLE = [(float(np.cos(t)), float(np.sin(t))) for t in np.arange(8) * np.pi / 4]


def oval(x, y, half_width, half_height):
    return [(x + half_width * c, y + half_height * s) for c, s in CIRCLE]


BLACK, WHITE = (20, 16, 18), (255, 255, 255)
SKINS = ((243, 201, 170), (229, 178, 140), (206, 150, 110), (166, 112, 78), (118, 76, 52))
HAIRS = {"Black_Hair": (36, 30, 36), "Blond_Hair": (234, 196, 106), "Brown_Hair": (112, 68, 40), "Gray_Hair": (176, 178, 184)}
OTHER_HAIRS = ((196, 86, 36), (150, 46, 34), (210, 110, 62), (176, 70, 44), (170, 60, 110), (74, 110, 140))
IRISES = ((82, 52, 32), (58, 104, 150), (74, 120, 74), (120, 84, 40))
CLOTHES = ((52, 84, 136), (176, 64, 70), (64, 122, 104), (232, 196, 120), (96, 80, 130), (60, 64, 74), (222, 132, 120), (226, 226, 220))
BACKDROPS = ((188, 212, 226), (240, 214, 186), (200, 222, 196), (222, 206, 230), (116, 140, 160), (158, 132, 120), (236, 232, 222), (90, 96, 112))
LIPSTICKS = ((200, 30, 58), (216, 62, 110), (156, 24, 66), (224, 70, 60))
SHADOWS = ((110, 70, 150), (60, 110, 160), (150, 80, 50), (50, 130, 120))


def choose_colours(has, draw, pick):
    """Every colour of the picture; what captions do not name comes from `draw` and `pick`."""
    skin = mix(*pick(tuple(zip(SKINS, SKINS[1:]))), draw(0, 1))
    hair, shade = pick(OTHER_HAIRS), draw(-0.12, 0.12)
    hair = next((colour for name, colour in HAIRS.items() if name in has), hair)
    hair = HAIRS["Brown_Hair"] if "Bald" in has else hair  # of brows and beard
    hair = mix(hair, WHITE if shade > 0 else BLACK, abs(shade))
    if "Pale_Skin" in has:
        skin = mix(skin, (255, 243, 240), 0.85)
    natural, lipstick = mix(skin, (160, 56, 60), 0.46), pick(LIPSTICKS)
    cloth, backdrop, second = pick(CLOTHES), pick(BACKDROPS), pick(BACKDROPS)
    return dict(
        skin=skin, skin_dark=mix(skin, (96, 40, 40), 0.26), line=mix(skin, (64, 26, 26), 0.55),
        skin_light=mix(skin, WHITE, 0.42), hair=hair, hair_dark=mix(hair, BLACK, 0.36), hair_light=mix(hair, WHITE, 0.22),
        iris=pick(IRISES), lips=lipstick if "Wearing_Lipstick" in has else natural, eye_shadow=pick(SHADOWS),
        cloth=cloth, cloth_dark=mix(cloth, BLACK, 0.25), accent=pick(CLOTHES[:5]),
        metal=pick(((246, 206, 84), (236, 240, 246))), frame=pick(((30, 30, 36), (120, 40, 40), (60, 44, 30))),
        backdrop=[mix(backdrop, second, draw(0, 0.6)) for _ in range(4)])


def choose_proportions(has, draw):
    """Where things are and how large: the attributes set the range, `draw` the person within it."""
    male, oval_face, chubby, young = (name in has for name in ("Male", "Oval_Face", "Chubby", "Young"))
    width = draw(0.73, 0.79) - 0.11 * oval_face + 0.11 * chubby
    jaw = draw(0.58, 0.63) + 0.06 * male - 0.13 * oval_face + 0.15 * chubby + 0.03 * (not young)
    return dict(
        width=width, jaw=jaw, chin=draw(0.24, 0.29) + 0.07 * male - 0.06 * oval_face + 0.10 * chubby,
        eye_x=draw(0.30, 0.34), eye_y=draw(-0.10, -0.04), eye_width=draw(0.16, 0.185),
        eye_height=draw(0.095, 0.115) * (0.42 if "Narrow_Eyes" in has else 1.0), gaze=draw(-0.03, 0.03),
        brow_y=draw(-0.35, -0.30), nose_y=draw(0.27, 0.33), mouth_y=draw(0.60, 0.65), mouth_width=draw(0.22, 0.26),
        volume=draw(0.12, 0.22), parting=draw(-0.3, 0.3), length=draw(0.95, 1.7), hat_height=draw(0.32, 0.5),
        brimmed=draw(0, 1) < 0.5, round_glasses=draw(0, 1) < 0.5,
        skew=draw(0.035, 0.055) * (0 if "Attractive" in has else 1 if draw(0, 1) < 0.5 else -1),
        spots=[(draw(-0.5, 0.5), draw(-0.5, 0.75), draw(0.028, 0.042)) for _ in range(6)],
        light=1 if draw(0, 1) < 0.5 else -1, shading=draw(30, 75),
        turn=draw(-0.35, 0.35), nod=draw(-0.10, 0.10), tilt=draw(-0.13, 0.13),
        scale=draw(0.31, 0.355), centre=(draw(0.46, 0.54), draw(0.47, 0.52)))


def face_outline(look, grow=0.0):
    """The contour of the head, from the top of the skull clockwise."""
    w, jaw, chin = look.width + grow, look.jaw + grow, look.chin + grow / 2
    right = [(w * 0.55, -0.92), (w * 0.93, -0.55), (w, -0.05), (w * 0.96, 0.28), (jaw, 0.60), (chin, 0.93 + grow)]
    return [(0, -1.0), *right, (0, 1.0 + grow), *mirror(right)[::-1]]


# ---------------------------------------------------------------- one function per part, from back to front

def back_hair(has, look):
    """What hangs behind the head: long for women, unless it is put up because it is neither straight nor wavy."""
    if "Bald" in has or "Male" in has:
        return
    w, top = look.width, -1 - look.volume
    if "Wavy_Hair" in has:
        side = [(w + 0.08 + 0.11 * (i % 2) + 0.02 * i, y) for i, y in enumerate(np.linspace(-0.5, look.length, 8).tolist())]
        side.append((w * 0.6, look.length + 0.1))
        yield Shape("hair", [(0, top), (0.6, top + 0.25), *side, *mirror(side)[::-1], (-0.6, top + 0.25)], look.hair_dark, depth=0)
    elif "Straight_Hair" in has:
        side = [(w * 0.8, -0.6), (w + 0.08, -0.1), (w + 0.15, look.length)]
        yield Shape("hair", [*side, *mirror(side)[::-1]], look.hair_dark, smooth=False, depth=0)
    elif "Wearing_Hat" not in has:
        yield Shape("hair", oval(look.parting / 2, top - 0.06, 0.34, 0.27), look.hair_dark, depth=0)


def neck_and_clothes(has, look):
    male, tie = "Male" in has, "Wearing_Necktie" in has
    neck, shoulder = (0.44, 1.42) if male else (0.33, 1.2)
    neck += 0.1 * ("Chubby" in has)
    yield Shape("neck", [(-neck, 0.5), (neck, 0.5), (neck + 0.04, 1.3), (0, 1.75), (-neck - 0.04, 1.3)], look.skin, smooth=False, body=True)
    yield Shape("neck", [(x, y + 0.16) for x, y in face_outline(look, -0.1)], look.skin_dark, depth=0.4)
    side = [(neck + 0.02, 1.16), (shoulder * 0.8, 1.32), (shoulder, 1.5), (shoulder + 0.15, 2.2)]
    dip = 1.32 if male else 1.5
    front = (40, 44, 58) if tie else look.cloth
    yield Shape("clothes", [(0, dip), *side, *mirror(side)[::-1]], front, smooth=False, body=True)
    collar = [(neck + 0.03, 1.12), (0.02, dip + 0.06), (0.26, dip + 0.2), (neck + 0.16, 1.22)]
    for points in (collar, mirror(collar)):
        yield Shape("clothes", points, WHITE if tie else look.cloth_dark, smooth=False, body=True)
    if tie:
        yield Shape("tie", [(-0.5, 1.2), (0.5, 1.2), (0.3, 2.2), (-0.3, 2.2)], (244, 244, 246), smooth=False, body=True)
        yield Shape("tie", [(-0.13, 1.2), (0.13, 1.2), (0.09, 1.36), (0.2, 2.2), (-0.2, 2.2), (-0.09, 1.36)], look.accent, smooth=False, body=True)
    if "Wearing_Necklace" in has:
        yield Shape("necklace", [(-neck - 0.03, 1.08), (-0.22, 1.28), (0, 1.35), (0.22, 1.28), (neck + 0.03, 1.08)], look.metal, 0.06, body=True)
        yield Shape("necklace", oval(0, 1.42, 0.09, 0.11), look.metal, body=True)


def ears(has, look):
    for side in (-1, 1):
        yield Shape("ear", oval(side * look.width, 0.02, 0.11, 0.19), mix(look.skin, look.skin_dark, 0.4), depth=0)
        yield Shape("ear", oval(side * (look.width + 0.03), 0.02, 0.05, 0.10), look.skin_dark, depth=0)


def head(has, look):
    outline = face_outline(look)
    if "Double_Chin" in has:
        yield Shape("chin", oval(0, 0.9, look.chin + 0.2, 0.38), mix(look.skin, look.skin_dark, 0.35), depth=0.6)
        yield Shape("chin", [(-0.36, 1.16), (0, 1.28), (0.36, 1.16)], look.line, 0.045, depth=0.6)
    yield Shape("face", outline, look.skin)
    half = [(-look.light * x, y) for x, y in outline[1:8]]
    inner = [(x * 0.74, y * 0.96) for x, y in half[:-1]]
    yield Shape("shade", half + inner[::-1], (*look.skin_dark, int(look.shading)))
    if "Double_Chin" in has:
        yield Shape("chin", [(-0.3, 0.93), (0, 1.0), (0.3, 0.93)], look.line, 0.045)


def skin_marks(has, look):
    """Cheeks, age and blemishes: all that lies flat on the skin."""
    if "Attractive" not in has:
        for x, y, radius in look.spots:
            yield Shape("blemish", oval(x, y, radius, radius), mix(look.skin, (150, 40, 40), 0.5))
    for side in (-1, 1):
        if "Rosy_Cheeks" in has:
            yield Shape("cheek", oval(side * 0.45, 0.26, 0.19, 0.15), (236, 60, 84, 70))
            yield Shape("cheek", oval(side * 0.45, 0.26, 0.13, 0.10), (236, 60, 84, 90))
        if "High_Cheekbones" in has:
            yield Shape("cheek", [(side * x, y) for x, y in ((0.34, 0.42), (0.5, 0.29), (0.68, 0.1), (0.66, 0.3), (0.55, 0.46))], (*look.skin_dark, 150))
            yield Shape("cheek", [(side * x, y) for x, y in ((0.3, 0.2), (0.45, 0.1), (0.62, 0.01), (0.58, 0.13), (0.43, 0.23))], (*look.skin_light, 150))
        if "Young" not in has:
            yield Shape("wrinkle", [(side * 0.2, 0.34), (side * 0.34, 0.46), (side * 0.37, 0.62)], look.line, 0.03)
            for y in (-0.04, 0.04):
                yield Shape("wrinkle", [(side * 0.53, look.eye_y - y / 2), (side * 0.64, look.eye_y + 2 * y)], look.line, 0.025)
    if "Young" not in has:
        for y in (-0.58, -0.48):
            yield Shape("wrinkle", [(-0.28, y), (0, y - 0.03), (0.28, y)], look.line, 0.025)


def eyes(has, look):
    makeup = "Heavy_Makeup" in has
    for side in (-1, 1):
        x, y, w, h = side * look.eye_x, look.eye_y + side * look.skew, look.eye_width, look.eye_height
        lid = [(x - side * w, y + 0.02), (x - side * w * 0.5, y - h * 0.8), (x + side * w * 0.2, y - h), (x + side * w, y - 0.02)]
        lower = [(x + side * w * 0.45, y + h * 0.8), (x - side * w * 0.35, y + h * 0.85)]
        if makeup:
            yield Shape("makeup", [(x - side * w, y), (x - side * w * 0.5, y - h - 0.1), (x + side * w * 0.5, y - h - 0.13), (x + side * w * 1.5, y - 0.14), (x + side * w, y)], (*look.eye_shadow, 210))
        if "Bags_Under_Eyes" in has:
            yield Shape("eye bag", [(x - w, y + h), (x, y + h + 0.05), (x + w, y + h), (x + w * 0.6, y + h + 0.13), (x, y + h + 0.17), (x - w * 0.6, y + h + 0.13)], mix(look.skin, (86, 44, 92), 0.42))
        yield Shape("eye", lid + lower, (252, 250, 248))
        iris = [(px, min(max(py, y - h * 0.95), y + h * 0.8)) for px, py in oval(x + look.gaze, y, 0.092, 0.1)]
        yield Shape("iris", iris, look.iris)
        yield Shape("iris", oval(x + look.gaze, y, 0.045, min(0.05, h * 0.8)), BLACK)
        yield Shape("iris", oval(x + look.gaze + 0.035 * look.light, y - h * 0.35, 0.024, 0.024), WHITE)
        yield Shape("lid", lid, BLACK if makeup else mix(look.line, BLACK, 0.5), 0.075 if makeup else 0.04)
        if "Male" not in has:
            tip = 0.14 if makeup else 0.06
            yield Shape("lash", [(x + side * w * 0.8, y - 0.03), (x + side * (w + tip), y - 0.03 - tip * 0.7)], BLACK, 0.06 if makeup else 0.03)


def brows(has, look):
    bushy = "Bushy_Eyebrows" in has
    thick = (0.13 if bushy else 0.05) + 0.02 * ("Male" in has)
    colour = mix(look.hair_dark, BLACK, 0.35)
    for side in (-1, 1):
        y = look.brow_y - 1.2 * side * look.skew - thick / 2
        rise = 0.16 if "Arched_Eyebrows" in has else 0.03
        top = [(0.14, y - 0.01), (0.26, y - rise * 0.75), (0.40, y - rise), (0.50, y - rise * 0.5), (0.57, y + 0.09)]
        under = [(0.48, y - rise * 0.5 + thick), (0.39, y - rise + thick), (0.26, y - rise * 0.75 + thick), (0.14, y - 0.01 + thick)]
        yield Shape("brow", [(side * px, py) for px, py in top + under], colour)


def nose(has, look):
    y, width, x = look.nose_y, 0.125, look.skew
    if "Big_Nose" in has:
        y, width = y + 0.06, 0.21
    shadow = mix(look.skin, look.skin_dark, 0.75)
    if "Pointy_Nose" in has:
        width *= 0.85
        yield Shape("nose", [(-0.04 * look.light, -0.1), (-width * look.light, y - 0.02), (x, y + 0.08)], shadow, smooth=False, depth=1.25)
        yield Shape("nose", [(-0.02 * look.light, -0.1), (x, y + 0.08), (width * look.light, y - 0.02)], look.line, 0.035, False, 1.25)
    else:
        yield Shape("nose", oval(x, y - 0.05, width * 0.95, width * 0.75), shadow, depth=1.2)
        yield Shape("nose", oval(x + 0.02 * look.light, y - 0.08, width * 0.62, width * 0.62), look.skin, depth=1.25)
        yield Shape("nose", [(x - width, y - 0.05), (x - width * 0.5, y + 0.03), (x, y + 0.015), (x + width * 0.5, y + 0.03), (x + width, y - 0.05)], look.line, 0.035, depth=1.2)


def mouth(has, look):
    smile, gap = "Smiling" in has, 0.085 if "Mouth_Slightly_Open" in has else 0.0
    w, y, lip = look.mouth_width + 0.08 * smile, look.mouth_y, 0.125 if "Big_Lips" in has else 0.05
    lift, sag = (-0.12, 0.06) if smile else (-0.015, 0.0)
    left, right = (-w, y + lift - look.skew), (w, y + lift + look.skew)
    middle = y + sag
    yield Shape("lips", [left, (-0.09, middle - gap - lip), (0, middle - gap - lip * 0.7), (0.09, middle - gap - lip), right,
                         (w * 0.5, middle + gap + lip), (0, middle + gap + lip * 1.35), (-w * 0.5, middle + gap + lip)], look.lips)
    if gap:
        inside = 0.86
        opening = [(left[0] * inside, left[1] * 1.0), (0, middle - gap * 0.75), (right[0] * inside, right[1]), (w * 0.45, middle + gap * 0.9), (-w * 0.45, middle + gap * 0.9)]
        yield Shape("mouth", opening, (88, 22, 30))
        yield Shape("teeth", [(-w * 0.6, y + lift * 0.45), (0, middle - gap * 0.7), (w * 0.6, y + lift * 0.45), (w * 0.35, middle + gap * 0.15), (-w * 0.35, middle + gap * 0.15)], WHITE)
    else:
        yield Shape("mouth", [left, (-w * 0.5, middle - lift * 0.1), (0, middle + 0.01), (w * 0.5, middle - lift * 0.1), right], mix(look.lips, BLACK, 0.55), 0.035)


def jaw_region(look, top, reach):
    """The cheeks below `top`, the chin and the upper lip; `reach` 1 ends at the contour of the face."""
    right = [(look.width * 0.95 * reach, top), (look.jaw * reach, 0.60), (look.chin * reach, 0.93 * reach)]
    inner = [(look.width * 0.82, top + 0.02), (look.jaw * 0.72, 0.45), (0.1, 0.45)]
    return [*right, (0, reach), *mirror(right)[::-1], *mirror(inner), *inner[::-1]]


def beard(has, look):
    """All facial hair but the moustache, which lies over the lips."""
    styles = has & {"5_o_Clock_Shadow", "Goatee", "Mustache", "Sideburns"}
    if "No_Beard" not in has and not styles:
        yield Shape("beard", jaw_region(look, 0.05, 1.04), look.hair_dark)
    if "5_o_Clock_Shadow" in has:
        yield Shape("beard", jaw_region(look, 0.28, 0.97), (48, 50, 64, 90))
    if "Goatee" in has:
        side = [(0.10, 0.76), (0.22, 0.72), (0.24, 0.92), (0.12, 1.08)]
        yield Shape("beard", [*side, (0, 1.14), *mirror(side)[::-1]], look.hair_dark)
    if "Sideburns" in has:
        w = look.width
        for side in (-1, 1):
            points = [(w + 0.02, -0.3), (w + 0.02, 0.25), (look.jaw + 0.02, 0.56), (w - 0.2, 0.42), (w - 0.13, 0.0), (w - 0.1, -0.3)]
            yield Shape("beard", [(side * x, y) for x, y in points], look.hair_dark)


def moustache(has, look):
    if "Mustache" in has:
        y = look.mouth_y
        side = [(0.08, y - 0.2), (0.24, y - 0.12), (0.32, y + 0.04), (0.14, y - 0.04)]
        yield Shape("moustache", [(0, y - 0.17), *side, (0, y - 0.05), *mirror(side)[::-1]], look.hair_dark)


def front_hair(has, look):
    """The cap of hair: an outer arc over the skull, and the hairline as its inner edge."""
    if "Bald" in has:
        yield Shape("shine", oval(look.light * 0.3, -0.75, 0.16, 0.09), (*look.skin_light, 170))
        return
    wavy, receding, w = "Wavy_Hair" in has, "Receding_Hairline" in has, look.width
    angles = np.linspace(np.pi, 2 * np.pi, 14 if wavy else 8).tolist()
    bump = [1 + (0.06 * (-1) ** i if wavy else 0) for i in range(len(angles))]
    rise = 0.76 + (0.06 if receding else look.volume)
    outer = [(b * (w + 0.08) * float(np.cos(t)), -0.25 + b * rise * float(np.sin(t))) for t, b in zip(angles, bump)]
    temple, part = (0.02 if "Male" in has else 0.25), look.parting
    if receding:
        line = [(w - 0.03, -0.1), (w - 0.06, -0.5), (0.42, -0.97), (0.2, -0.88), (0, -0.82), (-0.2, -0.88), (-0.42, -0.97), (-w + 0.06, -0.5), (-w + 0.03, -0.1)]
    else:
        line = [(w - 0.05, temple), (w - 0.1, -0.3), (0.45, -0.6), (part, -0.76), (-0.45, -0.6), (-w + 0.1, -0.3), (-w + 0.05, temple)]
    yield Shape("hair", [(-w - 0.06, temple), *outer, (w + 0.06, temple), *line], look.hair)
    if not receding:
        yield from strands(has, look)
    if "Bangs" in has:
        teeth = [(x, -0.3 - 0.07 * (i % 2)) for i, x in enumerate(np.linspace(w * 0.86, -w * 0.86, 9).tolist())]
        yield Shape("bangs", [(-w * 0.9, -0.55), (-0.4, -0.95), (0.4, -0.95), (w * 0.9, -0.55), *teeth], look.hair, smooth=False)
        for x, y in teeth[2:-1:2]:
            yield Shape("bangs", [(x * 0.7, -0.9), (x, y - 0.06)], look.hair_dark, 0.03)


def strands(has, look):
    """Lines that show how the hair falls, and long locks beside a woman's face."""
    w, part, top = look.width, look.parting, -0.97 - look.volume * 0.6
    waves = "Wavy_Hair" in has
    if not waves and "Straight_Hair" not in has:
        yield Shape("hair", [(look.light * x, y) for x, y in ((0.15, top + 0.03), (0.4, top + 0.14), (0.58, top + 0.36))], look.hair_light, 0.05)
        return
    if "Male" not in has:
        for side in (-1, 1):
            ys = np.linspace(-0.3, look.length - 0.1, 7).tolist()
            edge = [(side * (w - 0.02 + (0.08 * (i % 2) if waves else 0) + 0.008 * i), y) for i, y in enumerate(ys)]
            yield Shape("hair", [(x + side * 0.09, y) for x, y in edge] + [(x - side * 0.06, y) for x, y in edge[::-1]], look.hair, smooth=waves, depth=0)
    for side in (-1, 1):
        for k, colour in ((0.3, look.hair_light), (0.62, look.hair_dark)):
            start, end = (part + side * 0.08, top + 0.12 * k), (side * (w - 0.02), -0.75 + 0.6 * k)
            path = [(start[0] + (end[0] - start[0]) * t, start[1] + (end[1] - start[1]) * t ** 2 + (0.06 * np.sin(11 * t) if waves else 0)) for t in (0, 0.2, 0.4, 0.6, 0.8, 1)]
            yield Shape("hair", path, colour, 0.035)


def hat(has, look):
    if "Wearing_Hat" in has:
        w, top = look.width + 0.1, -0.95 - look.hat_height
        yield Shape("hat", [(-w, -0.5), (-w, -0.8), (-w * 0.6, top + 0.06), (0, top), (w * 0.6, top + 0.06), (w, -0.8), (w, -0.5)], look.accent, depth=0.3)
        brim = w + 0.35 if look.brimmed else w + 0.02
        yield Shape("hat", [(-brim, -0.5), (-w, -0.66), (0, -0.7), (w, -0.66), (brim, -0.5), (w * 0.8, -0.42), (0, -0.38), (-w * 0.8, -0.42)], mix(look.accent, BLACK, 0.3), depth=0.3)


def glasses(has, look):
    if "Eyeglasses" in has:
        y, rx, ry = look.eye_y + 0.03, 0.25, 0.23 if look.round_glasses else 0.17
        for side in (-1, 1):
            lens = oval(side * look.eye_x, y, rx, ry)
            if not look.round_glasses:
                lens = [(side * look.eye_x + rx * px, y + ry * py) for px, py in ((-1, -1), (1, -1), (0.9, 1), (-0.9, 1))]
            yield Shape("glasses", lens, (225, 240, 250, 60), smooth=look.round_glasses)
            yield Shape("glasses", lens + lens[:1], look.frame, 0.06, look.round_glasses)
            yield Shape("glasses", [(side * (look.eye_x + rx), y - 0.06), (side * look.width, y - 0.08)], look.frame, 0.06)
        yield Shape("glasses", [(rx - look.eye_x, y - 0.04), (0, y - 0.08), (look.eye_x - rx, y - 0.04)], look.frame, 0.06)


def earrings(has, look):
    if "Wearing_Earrings" in has:
        for side in (-1, 1):
            yield Shape("earring", oval(side * (look.width + 0.04), 0.34, 0.075, 0.11), look.metal, depth=0)


PARTS = (back_hair, neck_and_clothes, ears, head, skin_marks, beard, nose, eyes, mouth, moustache, brows, front_hair, hat, glasses, earrings)


# ---------------------------------------------------------------- from attributes to pixels

def describe(attributes, rng):
    """(look, shapes): the person behind the labels, and all that is to be painted, from back to front.

    All random numbers are taken at once, whatever the attributes, so one `rng` state is one person: change a label and
    only that changes in the picture.
    """
    has = {name for name, value in zip(ATTRIBUTES, attributes) if value}
    numbers = iter(rng.random(80).tolist())
    draw = lambda low, high: low + (high - low) * next(numbers)
    pick = lambda options: options[int(next(numbers) * len(options))]
    look = SimpleNamespace(**choose_colours(has, draw, pick), **choose_proportions(has, draw))
    return look, [shape for part in PARTS for shape in part(has, look)]


@functools.lru_cache(maxsize=None)
def spline(count, closed, steps):
    """(count * steps, count): the matrix that takes control points to a Catmull-Rom curve through them."""
    weights = np.zeros((count * steps if closed else (count - 1) * steps + 1, count))
    for row in range(len(weights)):
        i, t = divmod(row, steps)
        t = t / steps
        basis = ((-t + 2 * t**2 - t**3) / 2, (2 - 5 * t**2 + 3 * t**3) / 2, (t + 4 * t**2 - 3 * t**3) / 2, (t**3 - t**2) / 2)
        for offset, weight in zip((-1, 0, 1, 2), basis):
            at = (i + offset) % count if closed else min(max(i + offset, 0), count - 1)
            weights[row, at] += weight
    return weights


def project(shapes, look, canvas):
    """One (n, 2) array of pixels per shape: the head turned, nodding, tilted about the neck, and put in the picture."""
    counts = [len(shape.points) for shape in shapes]
    points = np.array([point for shape in shapes for point in shape.points])
    depth = np.repeat([0.0 if shape.body else shape.depth for shape in shapes], counts)
    tilt = np.repeat([0.0 if shape.body else look.tilt for shape in shapes], counts)
    x, y = points.T
    z = 0.8 * depth * np.maximum(0, 1 - (x / look.width) ** 2 - (y / 1.15) ** 2)
    x, y = x + z * look.turn, y + z * look.nod - 1.0
    x, y = x * np.cos(tilt) - y * np.sin(tilt), x * np.sin(tilt) + y * np.cos(tilt) + 1.0
    pixels = (np.stack([x, y], 1) * look.scale + look.centre) * canvas
    return np.split(pixels, np.cumsum(counts)[:-1])


def paint(look, shapes, canvas):
    corners = Image.frombytes("RGB", (2, 2), bytes(value for colour in look.backdrop for value in colour))
    image = corners.resize((canvas, canvas), Image.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))
    pen = ImageDraw.Draw(image, "RGBA")
    steps = 3 + canvas // 100
    for shape, pixels in zip(shapes, project(shapes, look, canvas)):
        if shape.smooth:
            pixels = spline(len(pixels), shape.width == 0, steps) @ pixels
        if shape.width:
            pen.line(pixels.ravel().tolist(), shape.colour, max(1, round(shape.width * look.scale * canvas)))
        else:
            pen.polygon(pixels.ravel().tolist(), shape.colour)
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
    """(picture, attributes) of face `index` of the set `seed`: the same in every process, order and size."""
    rng = np.random.default_rng((seed, index))
    attributes = sample_attributes(rng)
    return draw(attributes, rng, size), attributes


# ---------------------------------------------------------------- the command

def with_attribute(has, name, present):
    """The set of names `has` with one attribute present or absent, and what contradicts it removed."""
    has = has - {name}
    if not present:
        return has
    for block in EXCLUSIVE:
        if name in block:
            has = has - set(block)
    if GIVEN.get(name, ("",))[0] == "No_Beard":
        has = has - {"No_Beard"}
    if name == "Bald":
        has = has - set(HAIR)
    return has | {name}


MEN_ON_SHEET = {"5_o_Clock_Shadow", "Bald", "Goatee", "Mustache", "Sideburns", "No_Beard", "Receding_Hairline", "Wearing_Necktie",
                "Bushy_Eyebrows", "Double_Chin", "Gray_Hair", "Chubby"}


def contact_sheet(size=96, columns=5):
    """Each attribute as a pair: the same person without it and with it."""
    cell_width, cell_height = 2 * size + 12, size + 24
    rows = -(-len(ATTRIBUTES) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, name in enumerate(ATTRIBUTES):
        x, y = i % columns * cell_width + 5, i // columns * cell_height + 2
        base = {"Young", "Attractive", "No_Beard", "Brown_Hair"} | ({"Male"} if name in MEN_ON_SHEET else set())
        for side, present in enumerate((False, True)):
            has = with_attribute(base, name, present)
            attributes = np.array([other in has for other in ATTRIBUTES])
            sheet.paste(draw(attributes, np.random.default_rng(i), size), (x + side * size + side, y + 18))
        pen.text((x, y), name, "black", font)
    return sheet


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


def main():
    parser = argparse.ArgumentParser(description="Draw faces with the 40 CelebA attributes.")
    parser.add_argument("--out", type=Path, help="folder for pictures and attributes.csv")
    parser.add_argument("--count", type=int, default=1000, help="how many faces (default %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="pixels on a side (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which set of faces (default %(default)s)")
    parser.add_argument("--sheet", type=Path, help="also draw every attribute, without and with it, into this file")
    arguments = parser.parse_args()
    if arguments.sheet:
        contact_sheet().save(arguments.sheet)
    if arguments.out:
        write_faces(arguments.out, arguments.count, arguments.size, arguments.seed)
    if not (arguments.sheet or arguments.out):
        parser.error("nothing to do: give --out, --sheet or both")


if __name__ == "__main__":
    main()
