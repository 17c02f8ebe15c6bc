"""From shapes to a sketch that grows."""
import numpy as np
from PIL import Image, ImageDraw

from drawing.portrait import outlines

PORTRAIT = (  # in the order of drawing; missing are light, shade, make-up, and what is too small for a pen
    ("face",), ("chin",), ("hair", "bangs"), ("eye", "pupil", "lash"), ("brow",), ("nose",),
    ("lips", "mouth"), ("ear",), ("neck", "clothes"), ("glasses",), ("beard", "moustache"),
    ("wrinkle", "eye bag"), ("hat",), ("earring", "necklace", "tie"), ("blemish",))
TURN = {part: turn for turn, parts in enumerate(PORTRAIT) for part in parts}
SPACING = 1 / 400  # of the picture's width: the pieces of an outline, and the pixels of `visible`


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
