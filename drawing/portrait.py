"""Portraits of toy faces: from attributes to `Shape`s (`build_shapes`) to pixels (`render`)."""
import functools
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from PIL.ImageColor import getrgb as rgb

from captions import ATTRIBUTES


# ---- shapes, curves and rendering ----------------------------------------------------------------
class Shape(NamedTuple):
    """A filled outline, or a stroke if `width` > 0. The face is centred at (0, 0), its half height
    is 1."""
    part: str
    points: list           # (x, y) control points; y = -1: top of the skull, y = 1: chin
    colour: tuple          # r, g, b or r, g, b, opacity
    width: float = 0.0
    smooth: bool = True    # a curve through the points instead of straight lines
    depth: float = 1.0     # 1: on the face; larger: in front of it (nose); 0: at the ears


BODY = {"neck", "clothes", "tie", "necklace"}  # parts that do not move with the head
CATMULL_ROM = np.array([(-1, 3, -3, 1), (2, -5, 4, -1), (-1, 0, 1, 0), (0, 2, 0, 0)]) / 2


def build_shapes(attributes: np.ndarray, rng: np.random.Generator):
    """Return (look, shapes) of a person with CelebA's attributes, bool (40,): `look` contains the
    attributes, colours and proportions by name; the shapes are to be painted back to front.

    The random numbers do not depend on the attributes, so adding or removing an attribute changes
    nothing else in the image."""
    def pick(options):
        return options[int(rng.uniform(0, len(options)))]

    has = SimpleNamespace(**dict(zip(ATTRIBUTES, attributes.tolist())))
    colours = choose_colours(has, rng.uniform, pick)
    proportions = choose_proportions(has, rng.uniform, pick)
    look = SimpleNamespace(**vars(has), **colours, **proportions)
    shapes = []
    for part_shapes in PART_FUNCTIONS:
        shapes += part_shapes(look)
    return look, shapes


@functools.cache
def spline(count, closed, segments):
    """Matrix (n, count) that maps control points (count,) to a Catmull-Rom curve through them, with
    `segments` straight lines between neighbours (1: only the control points). A closed curve ends
    at its first point."""
    basis = np.vander(np.arange(segments) / segments, 4) @ CATMULL_ROM
    corners = np.arange(count + closed)
    neighbours = corners[:, None] + (-1, 0, 1, 2)  # that shape the curve up to the next corner
    mode = "wrap" if closed else "clip"
    curve = basis @ np.eye(count).take(neighbours, 0, mode=mode)  # (corners, segments, count)
    return curve.reshape(-1, count)[:segments * (len(corners) - 1) + 1]


def project_outlines(look, shapes: list[Shape], canvas, segments):
    """Outlines in pixels, a complex array x + iy per shape, after yaw, pitch and roll of the head
    about the neck. Curves have `segments` straight lines between neighbouring control points."""
    counts = [len(shape.points) for shape in shapes]
    x, y = np.concatenate([shape.points for shape in shapes]).T
    of_shapes = [(shape.depth, shape.part not in BODY) for shape in shapes]
    depth, turns = np.repeat(of_shapes, counts, axis=0).T
    z = 0.74 * depth * turns * np.maximum(0, 1 - (x / look.width) ** 2 - (y / 1.15) ** 2)
    points = x + z * look.yaw + 1j * (y + z * look.pitch - 1)
    points = points * np.exp(1j * look.roll * turns) + 1j
    pixels = (points * look.scale + look.centre) * canvas
    outlines = []
    for shape, own in zip(shapes, np.split(pixels, np.cumsum(counts))):
        detail = segments if shape.smooth else 1
        outlines.append(spline(len(own), shape.width == 0, detail) @ own)
    return outlines


def render(look, shapes: list[Shape], canvas: int) -> Image.Image:
    """Paint the shapes in order over a gradient between four corner colours. Returns an image of
    canvas x canvas pixels."""
    corners = Image.new("RGB", (2, 2))
    corners.putdata(look.backdrop)
    image = corners.resize((canvas, canvas), Image.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))
    pen = ImageDraw.Draw(image, "RGBA")
    lines = project_outlines(look, shapes, canvas, 3 + canvas // 100)
    for shape, line in zip(shapes, lines):
        points = line.view(float).tolist()
        if shape.width:
            pen.line(points, shape.colour, round(shape.width * look.scale * canvas))
        else:
            pen.polygon(points, shape.colour)
    return image


# ---- colours, proportions, and one function per part of the portrait -----------------------------
CIRCLE = [(np.cos(angle), np.sin(angle)) for angle in np.arange(8) * np.pi / 4]
SIDES = (-1, 1)     # signs of x in the left and the right half of the image


def oval(x, y, half_width, half_height):
    return [(x + half_width * c, y + half_height * s) for c, s in CIRCLE]


def mix(a, b, amount):
    """The colour a fraction `amount` of the way from a to b."""
    return tuple(int(x + (y - x) * amount) for x, y in zip(a, b))


def mirrored(side, *points):
    """Points of the right half (x > 0), mirrored to the left if `side` is -1."""
    return [(side * x, y) for x, y in points]


def symmetric(right):
    """A closed outline from its right half, whose points with x = 0 are not repeated."""
    return [*right, *((-x, y) for x, y in right[::-1] if x)]


def palette(colours: str) -> list[tuple]:
    return [rgb(colour) for colour in colours.split()]


BLACK, WHITE = palette("#141012 #ffffff")
SKINS = palette("#f8d4b8 #ecbc98 #d49e76 #aa7452 #784e36")
HAIRS = {"Bald": rgb("#704428"), "Black_Hair": rgb("#241e24"), "Blond_Hair": rgb("#eac46a"),
         "Gray_Hair": rgb("#b0b2b8"), "Brown_Hair": rgb("#704428")}  # first match wins; Bald: for the brows
OTHER_HAIRS = palette("#c45624 #962e22 #d26e3e #b0462c #aa3c6e #4a6e8c")
IRISES = palette("#523420 #3a6896 #4a784a #785428")
LIPSTICKS = palette("#c81e3a #d83e6e #9c1842 #e0463c")
EYE_SHADOWS = palette("#6e4696 #3c6ea0 #965032 #328278")
CLOTHES = palette("#345488 #b04046 #407a68 #e8c478 #605082 #3c404a #de8478 #e2e2dc")
BACKDROPS = palette("#bcd4e2 #f0d6ba #c8dec4 #decee6 #748ca0 #9e8478 #ece8de #5a6070")
METALS = palette("#f6ce54 #ecf0f6")
FRAMES = palette("#1e1e24 #782828 #3c2c1e")


def choose_colours(has, uniform, pick):
    """All colours of an image. Colours that no attribute determines are random."""
    skin = mix(*pick(tuple(zip(SKINS, SKINS[1:]))), uniform(0, 1))
    if has.Pale_Skin:
        skin = mix(skin, rgb("#fff2ee"), 0.84)
    hair = next((colour for name, colour in HAIRS.items() if getattr(has, name)), pick(OTHER_HAIRS))
    shade = uniform(-0.12, 0.12)
    hair = mix(hair, WHITE if shade > 0 else BLACK, abs(shade))
    lipstick, cloth, backdrop, second = pick(LIPSTICKS), pick(CLOTHES), pick(BACKDROPS), pick(BACKDROPS)
    return dict(
        skin=skin, skin_dark=mix(skin, rgb("#4c181c"), 0.28), skin_light=mix(skin, WHITE, 0.42),
        hair=hair, hair_dark=mix(hair, BLACK, 0.36), hair_light=mix(hair, WHITE, 0.22),
        lips=lipstick if has.Wearing_Lipstick else mix(skin, rgb("#a0383c"), 0.46),
        cloth=cloth, cloth_dark=mix(cloth, BLACK, 0.25), line=mix(skin, rgb("#280a0e"), 0.58),
        iris=pick(IRISES), eye_shadow=pick(EYE_SHADOWS), metal=pick(METALS), frame=pick(FRAMES),
        accent=pick(CLOTHES[:5]), backdrop=[mix(backdrop, second, uniform(0, 0.6)) for _ in range(4)])


def choose_proportions(has, uniform, pick):
    """Positions and sizes: attributes set the ranges, from which `uniform` samples."""
    return dict(
        skew=pick(SIDES) * uniform(0.05, 0.075) * (not has.Attractive),
        width=uniform(0.73, 0.79) - 0.11 * has.Oval_Face + 0.13 * has.Chubby,
        jaw=(uniform(0.58, 0.63) + 0.06 * has.Male - 0.13 * has.Oval_Face + 0.18 * has.Chubby
             + 0.03 * (not has.Young)),
        chin=uniform(0.24, 0.29) + 0.07 * has.Male - 0.06 * has.Oval_Face + 0.10 * has.Chubby,
        eye_x=uniform(0.32, 0.35), eye_y=uniform(-0.10, -0.04), eye_width=uniform(0.19, 0.215),
        eye_height=uniform(0.125, 0.145) * (0.36 if has.Narrow_Eyes else 1), gaze=uniform(-0.03, 0.03),
        brow_y=uniform(-0.35, -0.30), nose_y=uniform(0.27, 0.33),
        mouth_y=uniform(0.60, 0.65), mouth_width=uniform(0.22, 0.26),
        neck=0.33 + 0.11 * has.Male + 0.10 * has.Chubby,
        volume=uniform(0.12, 0.22), parting=uniform(-0.2, 0.2), length=uniform(0.95, 1.7),
        hat_height=uniform(0.32, 0.5), brimmed=pick((False, True)), round_glasses=pick((False, True)),
        spots=[(uniform(-0.5, 0.5), uniform(-0.5, 0.75), uniform(0.034, 0.05)) for _ in range(6)],
        light=pick(SIDES), shading=int(uniform(30, 75)),
        yaw=uniform(-0.28, 0.28), pitch=uniform(-0.10, 0.10), roll=uniform(-0.10, 0.10),
        scale=uniform(0.33, 0.36), centre=uniform(0.475, 0.525) + 1j * uniform(0.465, 0.495))


def face_outline(look, grow=0.0):
    """Contour of the head, clockwise from the top of the skull."""
    w, jaw, chin = look.width + grow, look.jaw + grow, look.chin + grow / 2
    return symmetric([(0, -1.0), (w * 0.55, -0.92), (w * 0.93, -0.55), (w, -0.05), (w * 0.96, 0.28),
                      (jaw, 0.60), (chin, 0.93 + grow), (0, 1.0 + grow)])


def back_hair(look):
    """Hair behind the head, to the nape for men. Women's hair is put up if it is neither straight
    nor wavy."""
    w, top = look.width, -1 - look.volume
    end = 0.42 if look.Male else look.length
    if look.Wavy_Hair:
        heights = np.linspace(-0.5, end, 8)
        side = [(w + 0.09 + 0.11 * (i % 2) + 0.06 * (y + 0.5), y) for i, y in enumerate(heights)]
        outline = symmetric([(0, top), (0.6, top + 0.25), *side, (w * 0.6, end + 0.1)])
        yield Shape("hair", outline, look.hair_dark, depth=0)
    elif look.Straight_Hair:
        outline = symmetric([(w * 0.8, -0.6), (w + 0.08, -0.1), (w + 0.15, end)])
        yield Shape("hair", outline, look.hair_dark, smooth=False, depth=0)
    elif not (look.Bald or look.Wearing_Hat or look.Male):
        yield Shape("hair", oval(look.parting / 2, top - 0.06, 0.34, 0.27), look.hair_dark, depth=0)


def bust(look):
    """Neck, shoulders, collar and necklace; with a necktie, a dark jacket over a white shirt."""
    w = look.neck
    yield Shape("neck", symmetric([(w, 0.5), (w + 0.04, 1.3), (0, 1.75)]), look.skin, smooth=False)
    shadow = [(x, y + 0.16) for x, y in face_outline(look, -0.1)]
    yield Shape("shade", shadow, look.skin_dark, depth=0.4)
    shoulder, dip = (1.42, 1.32) if look.Male else (1.2, 1.5)
    outline = symmetric([(0, dip), (w + 0.02, 1.16), (shoulder * 0.8, 1.32),
                         (shoulder, 1.5), (shoulder + 0.15, 2.2)])
    yield Shape("clothes", outline, rgb("#282c3a") if look.Wearing_Necktie else look.cloth, smooth=False)
    for side in SIDES:
        collar = mirrored(side, (w + 0.03, 1.12), (0.02, dip + 0.06), (0.26, dip + 0.2), (w + 0.16, 1.22))
        yield Shape("clothes", collar, WHITE if look.Wearing_Necktie else look.cloth_dark, smooth=False)
    if look.Wearing_Necktie:
        yield Shape("tie", symmetric([(0.5, 1.2), (0.3, 2.2)]), rgb("#f4f4f6"), smooth=False)
        yield Shape("tie", symmetric([(0.13, 1.2), (0.09, 1.36), (0.2, 2.2)]), look.accent, smooth=False)
    if look.Wearing_Necklace:
        chain = [(-w - 0.03, 1.08), (-0.22, 1.28), (0, 1.35), (0.22, 1.28), (w + 0.03, 1.08)]
        yield Shape("necklace", chain, look.metal, 0.075)
        yield Shape("necklace", oval(0, 1.40, 0.11, 0.12), look.metal)


def head(look):
    """Ears, face, shading of the side away from the light, and a double chin."""
    for x in (-look.width, look.width):
        yield Shape("ear", oval(x, 0.02, 0.11, 0.19), mix(look.skin, look.skin_dark, 0.4), depth=0)
        yield Shape("ear", oval(x * 1.04, 0.02, 0.05, 0.10), look.skin_dark, depth=0)
    if look.Double_Chin:
        below = oval(0, 0.9, look.chin + 0.25, 0.46)
        yield Shape("chin", below, mix(look.skin, look.skin_dark, 0.7), depth=0.6)
        yield Shape("chin", [(-0.4, 1.2), (0, 1.34), (0.4, 1.2)], look.line, 0.08, depth=0.6)
    outline = face_outline(look)
    yield Shape("face", outline, look.skin)
    edge = mirrored(-look.light, *outline[1:8])
    inner = [(x * 0.74, y * 0.96) for x, y in edge[:-1]]
    yield Shape("shade", edge + inner[::-1], (*look.skin_dark, look.shading))
    if look.Double_Chin:
        yield Shape("chin", [(-0.3, 0.93), (0, 1.0), (0.3, 0.93)], look.line, 0.08)


def skin(look):
    """High cheekbones, rosy cheeks, blemishes, and wrinkles on the forehead and beside mouth and
    eyes."""
    for side in SIDES:
        if look.High_Cheekbones:
            hollow = mirrored(side, (0.34, 0.42), (0.5, 0.29), (0.68, 0.1), (0.66, 0.3), (0.55, 0.46))
            bone = mirrored(side, (0.3, 0.22), (0.42, 0.1), (0.6, 0.0), (0.65, 0.08), (0.5, 0.23))
            yield Shape("cheek", hollow, (*look.skin_dark, 180))
            yield Shape("cheek", bone, (*look.skin_light, 150))
        if look.Rosy_Cheeks:
            yield Shape("cheek", oval(side * 0.45, 0.26, 0.19, 0.15), rgb("#ec3c5446"))
            yield Shape("cheek", oval(side * 0.45, 0.26, 0.13, 0.10), rgb("#ec3c545a"))
    if not look.Attractive:
        for x, y, radius in look.spots:
            yield Shape("blemish", oval(x, y, radius, radius), mix(look.skin, rgb("#962828"), 0.5))
    if not look.Young:
        for y in (-0.58, -0.48):
            yield Shape("wrinkle", [(-0.28, y), (0, y - 0.03), (0.28, y)], look.line, 0.035)
        for side in SIDES:
            yield Shape("wrinkle", mirrored(side, (0.2, 0.34), (0.34, 0.46), (0.37, 0.62)), look.line, 0.04)
            for fan in (-0.04, 0.04):
                crow_foot = mirrored(side, (0.53, look.eye_y - fan / 2), (0.64, look.eye_y + 2 * fan))
                yield Shape("wrinkle", crow_foot, look.line, 0.035)


def beard(look):
    """All facial hair except the moustache, which is painted over the lips (see `mouth`)."""
    stubble = getattr(look, "5_o_Clock_Shadow")     # the name is not an identifier
    full = not (look.No_Beard or stubble or look.Goatee or look.Mustache or look.Sideburns)
    if full or stubble:  # cheeks below `top`, chin and upper lip
        top, reach, colour = (0.05, 1.04, look.hair_dark) if full else (0.28, 0.97, rgb("#3032405a"))
        edge = [(look.width * 0.95 * reach, top), (look.jaw * reach, 0.60), (look.chin * reach, 0.93 * reach)]
        inner = [(look.width * 0.82, top + 0.02), (look.jaw * 0.72, 0.45), (0.1, 0.45)]
        outline = [*symmetric([*edge, (0, reach)]), *mirrored(-1, *inner), *inner[::-1]]
        yield Shape("beard", outline, colour)
    if look.Goatee:
        outline = symmetric([(0.10, 0.76), (0.22, 0.72), (0.24, 0.92), (0.12, 1.08), (0, 1.14)])
        yield Shape("beard", outline, look.hair_dark)
    if look.Sideburns:
        w = look.width
        for side in SIDES:
            outline = mirrored(side, (w + 0.02, -0.3), (w + 0.02, 0.25), (look.jaw + 0.02, 0.56),
                               (w - 0.2, 0.42), (w - 0.13, 0.0), (w - 0.1, -0.3))
            yield Shape("beard", outline, look.hair_dark)


def nose(look):
    light = look.light
    x, y, w = look.skew, look.nose_y + 0.06 * look.Big_Nose, 0.26 if look.Big_Nose else 0.13
    if look.Pointy_Nose:
        tip, wing, shadow = (x, y + 0.08), w * 0.85 * light, mix(look.skin_dark, look.line, 0.3)
        yield Shape("nose", [(-0.04 * light, -0.1), (-wing, y - 0.02), tip], shadow, smooth=False, depth=1.25)
        yield Shape("nose", [(-0.02 * light, -0.1), tip, (wing, y - 0.02)], look.line, 0.06, False, 1.25)
    else:
        base = [(x - w, y - 0.05), (x - w / 2, y + 0.03), (x, y + 0.015), (x + w / 2, y + 0.03),
                (x + w, y - 0.05)]
        yield Shape("shade", oval(x, y - 0.05, w * 0.95, w * 0.75), look.skin_dark, depth=1.2)
        yield Shape("shade", oval(x + 0.02 * light, y - 0.08, w * 0.62, w * 0.62), look.skin, depth=1.25)
        yield Shape("nose", base, look.line, 0.035, depth=1.2)


def eyes(look):
    makeup = look.Heavy_Makeup
    w, h = look.eye_width, look.eye_height
    for side in SIDES:
        x, y = side * look.eye_x, look.eye_y + side * look.skew

        def place(*points):
            """Points of the eye: x from the inner (-1) to the outer corner (1), y in eye heights."""
            return [(x + side * w * px, y + h * py) for px, py in points]

        if makeup:
            above = y - h - 0.12
            shadow = [*place((-1, 0)), (x - side * w / 2, above), (x + side * w / 2, above),
                      *place((1.5, -1.3), (1, 0))]
            yield Shape("makeup", shadow, (*look.eye_shadow, 210))
        if look.Bags_Under_Eyes:
            bag = symmetric([(0, 0.05), (w, 0), (w * 0.6, 0.13), (0, 0.17)])
            bag = [(x + px, y + h + py) for px, py in bag]
            yield Shape("eye bag", bag, mix(look.skin, rgb("#340e40"), 0.4))
        lid = place((-1, 0.2), (-0.5, -0.8), (0.2, -1), (1, -0.2))
        yield Shape("eye", lid + place((0.45, 0.8), (-0.35, 0.85)), rgb("#fcfaf8"))
        centre = x + look.gaze
        iris = [(px, min(max(py, y - h * 0.95), y + h * 0.8)) for px, py in oval(centre, y, 0.105, 0.115)]
        yield Shape("iris", iris, look.iris)
        yield Shape("eye", oval(centre, y, 0.045, min(0.05, h * 0.8)), BLACK)
        yield Shape("glint", oval(centre + 0.035 * look.light, y - h * 0.35, 0.024, 0.024), WHITE)
        yield Shape("lid", lid, BLACK if makeup else mix(look.line, BLACK, 0.5), 0.075 if makeup else 0.04)
        if not look.Male:
            reach, thick = (0.14, 0.06) if makeup else (0.06, 0.03)
            lash = [(x + side * w * 0.8, y - 0.03), (x + side * (w + reach), y - 0.03 - reach * 0.7)]
            yield Shape("eye", lash, BLACK, thick)


def brows(look):
    thick = (0.17 if look.Bushy_Eyebrows else 0.05) + 0.02 * look.Male
    rise = 0.16 if look.Arched_Eyebrows else 0.03
    for side in SIDES:
        y = look.brow_y - 1.2 * side * look.skew - thick / 2
        upper = [(0.14, y - 0.01), (0.26, y - rise * 0.75), (0.40, y - rise), (0.50, y - rise * 0.5)]
        lower = [(px, py + thick) for px, py in upper[::-1]]
        yield Shape("brow", mirrored(side, *upper, (0.57, y + 0.09), *lower),
                    mix(look.hair_dark, BLACK, 0.35))


def mouth(look):
    """Lips, teeth and moustache. A smile raises the corners and lowers the middle."""
    gap = 0.085 if look.Mouth_Slightly_Open else 0.0
    lip = 0.125 if look.Big_Lips else 0.05
    w = look.mouth_width + 0.08 * look.Smiling
    rise = 0.12 if look.Smiling else 0.015
    middle, corner = look.mouth_y + 0.06 * look.Smiling, look.mouth_y - rise
    left, right = (-w, corner - look.skew), (w, corner + look.skew)
    top, bottom = middle - gap, middle + gap
    yield Shape("lips", [left, (-0.09, top - lip), (0, top - lip * 0.7), (0.09, top - lip), right,
                         (w / 2, bottom + lip), (0, bottom + lip * 1.35), (-w / 2, bottom + lip)], look.lips)
    if gap:
        inside = [(-w * 0.86, left[1]), (0, middle - gap * 0.75), (w * 0.86, right[1])]
        floor, bite = middle + gap * 0.9, middle + gap * 0.15
        yield Shape("mouth", inside + [(w * 0.45, floor), (-w * 0.45, floor)], rgb("#58161e"))
        ends = look.mouth_y - rise * 0.45
        yield Shape("teeth", symmetric([(0, middle - gap * 0.7), (w * 0.6, ends), (w * 0.35, bite)]), WHITE)
    else:
        y = middle + rise * 0.1
        line = [left, (-w / 2, y), (0, middle + 0.01), (w / 2, y), right]
        yield Shape("mouth", line, mix(look.lips, BLACK, 0.55), 0.035)
    if look.Mustache:
        y = look.mouth_y
        right = [(0, y - 0.17), (0.08, y - 0.2), (0.24, y - 0.12), (0.32, y + 0.04), (0.14, y - 0.04),
                 (0, y - 0.05)]
        yield Shape("moustache", symmetric(right), look.hair_dark)


def top_hair(look):
    """Hair on top of the head: an outer arc over the skull, with the hairline as inner edge."""
    if look.Bald:
        yield Shape("shine", oval(look.light * 0.3, -0.75, 0.16, 0.09), (*look.skin_light, 170))
        return
    w = look.width
    wavy = look.Wavy_Hair
    receding = look.Receding_Hairline
    rise = 0.76 + (0.06 if receding else look.volume)
    angles = np.linspace(np.pi, 2 * np.pi, 14 if wavy else 8)
    bumps = 1 + 0.06 * wavy * (-1.0) ** np.arange(len(angles))
    outer = np.stack([bumps * (w + 0.08) * np.cos(angles), bumps * rise * np.sin(angles) - 0.25], 1)
    temple = -0.1 if receding else 0.02 if look.Male else 0.25
    if receding:
        right, middle = [(w - 0.03, temple), (w - 0.06, -0.5), (0.42, -0.97), (0.2, -0.88)], (0, -0.82)
    else:
        right, middle = [(w - 0.05, temple), (w - 0.1, -0.3), (0.45, -0.6)], (look.parting, -0.76)
    line = [*right, middle, *mirrored(-1, *right)[::-1]]
    yield Shape("hair", [(-w - 0.06, temple), *outer, (w + 0.06, temple), *line], look.hair)


def strands(look):
    """Strands of loose hair from the parting down; a sheen on hair that is neither straight nor
    wavy."""
    if look.Bald or look.Receding_Hairline or look.Wearing_Hat:
        return
    top = -0.97 - look.volume * 0.6
    if not (look.Straight_Hair or look.Wavy_Hair):
        sheen = mirrored(look.light, (0.15, top + 0.03), (0.4, top + 0.14), (0.58, top + 0.36))
        yield Shape("hair", sheen, look.hair_light, 0.05)
        return
    t = np.linspace(0, 1, 6)
    ripple = 0.06 * np.sin(11 * t) * look.Wavy_Hair
    for side in SIDES:
        for low, colour in ((0.3, look.hair_light), (0.62, look.hair_dark)):
            start, end = look.parting + side * 0.08, side * (look.width - 0.02)
            drop = (0.48 * low - 0.75 - top) * t**2
            path = np.stack([start + (end - start) * t, top + 0.12 * low + drop + ripple], 1)
            yield Shape("hair", path, colour, 0.035)


def locks(look):
    """A woman's loose hair, in front of her shoulders."""
    if not look.Male and (look.Straight_Hair or look.Wavy_Hair):
        wavy = look.Wavy_Hair
        heights = np.linspace(-0.3, look.length - 0.1, 7)
        middle = [(look.width - 0.01 + 0.08 * wavy * (i % 2) + 0.008 * i, y) for i, y in enumerate(heights)]
        outline = [(x + 0.08, y) for x, y in middle] + [(x - 0.07, y) for x, y in middle[::-1]]
        for side in SIDES:
            yield Shape("hair", mirrored(side, *outline), look.hair, smooth=wavy, depth=0)


def bangs(look):
    if look.Bangs:
        w = look.width * 0.88
        fringe = [(x, -0.35 - 0.07 * (i % 2)) for i, x in enumerate(np.linspace(w, -w, 9))]
        outline = [(-w, -0.55), (-0.4, -0.95), (0.4, -0.95), (w, -0.55), *fringe]
        yield Shape("hair", outline, look.hair, smooth=False)
        for x, y in fringe[2:-1:2]:
            yield Shape("hair", [(x * 0.7, -0.9), (x, y - 0.06)], look.hair_dark, 0.03)


def accessories(look):
    """Hat, glasses, earrings."""
    if look.Wearing_Hat:
        w, top = look.width + 0.1, -1.05 - look.hat_height
        crown = symmetric([(0, top), (w * 0.6, top + 0.06), (w, -0.85), (w, -0.62)])
        edge = w + (0.35 if look.brimmed else 0.02)
        brim = symmetric([(0, -0.8), (w, -0.76), (edge, -0.6), (w * 0.8, -0.52), (0, -0.48)])
        yield Shape("hat", crown, look.accent, depth=0.3)
        yield Shape("hat", brim, mix(look.accent, BLACK, 0.3), depth=0.3)
    if look.Eyeglasses:
        x, y, w, h = look.eye_x, look.eye_y + 0.03, 0.25, 0.23 if look.round_glasses else 0.17
        lens = oval(x, y, w, h) if look.round_glasses else [
            (x - w, y - h), (x + w, y - h), (x + w * 0.9, y + h), (x - w * 0.9, y + h)]
        for side in SIDES:
            outline = mirrored(side, *lens)
            yield Shape("glasses", outline, rgb("#e1f0fa3c"), smooth=look.round_glasses)
            yield Shape("glasses", outline + outline[:1], look.frame, 0.06, look.round_glasses)
            yield Shape("glasses", mirrored(side, (x + w, y - 0.06), (look.width, y - 0.08)),
                        look.frame, 0.06)
        yield Shape("glasses", [(w - x, y - 0.04), (0, y - 0.08), (x - w, y - 0.04)], look.frame, 0.06)
    if look.Wearing_Earrings:
        for side in SIDES:
            yield Shape("earring", oval(side * (look.width + 0.04), 0.34, 0.075, 0.11), look.metal, depth=0)


PART_FUNCTIONS = (  # in painting order
    back_hair, bust, head, skin, beard, nose, eyes, mouth, top_hair, strands, locks, bangs, brows,
    accessories)
