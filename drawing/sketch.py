"""From shapes to a sketch that grows."""
import numpy as np
from PIL import Image, ImageDraw

from drawing.portrait import project_outlines

DRAWING_ORDER = (  # in the order of drawing; missing are light, shade, make-up, and what is too small for a pen
    ("face",), ("chin",), ("hair", "bangs"), ("eye", "pupil", "lash"), ("brow",), ("nose",),
    ("lips", "mouth"), ("ear",), ("neck", "clothes"), ("glasses",), ("beard", "moustache"),
    ("wrinkle", "eye bag"), ("hat",), ("earring", "necklace", "tie"), ("blemish",))
ORDER_OF_PART = {part: turn for turn, parts in enumerate(DRAWING_ORDER) for part in parts}
PIECE_LENGTH = 1 / 400  # of the picture's width: the pieces of an outline, and the pixels of `visible`


def stroke_points(look, shapes):
    """Places of the pen (m, 2), in widths of the picture, and how much line each stands for (m,).

    Only what the picture shows, in the order of `PORTRAIT`, within a turn in that of painting.
    Colour does no more than say where one thing ends and the next begins, and what is transparent
    has no outline.
    """
    shapes = [shape for shape in shapes if shape.part in ORDER_OF_PART and len(shape.colour) == 3]
    lines = project_outlines(look, shapes, 1, 6)
    points, direction, shape_index = split_lines(lines)
    kept = np.flatnonzero(visible(shapes, lines, points, direction, shape_index))
    turn = np.array([ORDER_OF_PART[shape.part] for shape in shapes])
    order = kept[np.argsort(turn[shape_index[kept]], kind="stable")]
    return points[order], np.hypot(*direction[order].T)


def split_lines(lines):
    """All lines in m pieces of at most `SPACING`: their middles (m, 2), the way from end to end
    (m, 2), and the number of the line (m,)."""
    start = np.concatenate([line[:-1] for line in lines])
    direction = np.concatenate([np.diff(line, axis=0) for line in lines])
    shape_index = np.repeat(np.arange(len(lines)), [len(line) - 1 for line in lines])
    count = np.ceil(np.hypot(*direction.T) / PIECE_LENGTH).astype(int)
    segment = np.repeat(np.arange(len(count)), count)  # of each piece
    nth = np.arange(len(segment)) - (np.cumsum(count) - count)[segment]
    direction = direction[segment] / count[segment, None]
    return start[segment] + direction * (nth[:, None] + 0.5), direction, shape_index[segment]


def visible(shapes, lines, points, direction, shape_index):
    """(m,) bool: the pieces that the picture shows: not painted over, and something else beside."""
    canvas = round(1 / PIECE_LENGTH)
    image = Image.new("I", (canvas, canvas), -1)
    pen = ImageDraw.Draw(image)
    for number, (shape, line) in enumerate(zip(shapes, lines)):
        if not shape.width and shape.part != "beard":  # one draws the whole head before the beard on it
            pen.polygon((line * canvas).ravel().tolist(), number)
    uppermost = np.asarray(image)  # the number of the shape that each pixel shows, -1 for none

    def seen(points):
        column, row = (points * canvas).clip(0, canvas - 1).astype(int).T
        return uppermost[row, column]

    stroke = np.array([shape.width > 0 for shape in shapes])[shape_index]
    area = np.array([(line[:-1] * line[1:, ::-1] @ (1, -1)).sum() for line in lines])  # > 0: clockwise
    outwards = np.stack([direction[:, 1], -direction[:, 0]], 1) * np.where(stroke, 0, np.sign(area[shape_index]))[:, None]
    outwards *= 1.5 * PIECE_LENGTH / np.hypot(*direction.T)[:, None]
    inside, outside = seen(points - outwards), seen(points + outwards)

    # No edge shows between hair and hair, nor between things of one turn and colour.
    surfaces = [(ORDER_OF_PART[shape.part], shape.part in ("hair", "bangs") or shape.colour) for shape in shapes]
    surface = np.array([*(surfaces.index(each) for each in surfaces), -1])  # the last: nothing painted
    edge = surface[outside] != surface[shape_index]
    shown = np.where(stroke, inside <= shape_index, edge & ((inside <= shape_index) | (surface[inside] == surface[shape_index])))
    return shown & ((points > 0) & (points < 1)).all(1)


def rasterize_strokes(points, step, steps, size):
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
    column, row = (points * canvas).astype(int).T + margin
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
