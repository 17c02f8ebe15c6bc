"""Sketches of toy faces: from `Shape`s to pen strokes (`stroke_points`) to stages (`rasterize_strokes`)."""
import numpy as np
from PIL import Image, ImageDraw

from drawing.portrait import project_outlines

DRAWING_ORDER = (  # without light, shade, make-up and parts too small for a pen
    ("face",), ("chin",), ("hair", "bangs"), ("eye", "pupil", "lash"), ("brow",), ("nose",),
    ("lips", "mouth"), ("ear",), ("neck", "clothes"), ("glasses",), ("beard", "moustache"),
    ("wrinkle", "eye bag"), ("hat",), ("earring", "necklace", "tie"), ("blemish",))
ORDER_OF_PART = {part: turn for turn, parts in enumerate(DRAWING_ORDER) for part in parts}
PIECE_LENGTH = 1 / 400  # in image widths: maximum length of a stroke piece, and pixel size in `visible`


def stroke_points(look, shapes: list) -> tuple[np.ndarray, np.ndarray]:
    """Pen positions (m, 2) in image widths, in DRAWING_ORDER, then in painting order, and the stroke length
    that each represents (m,). Only visible edges are drawn: colours only determine where one area ends and
    the next begins. Transparent shapes have no outline."""
    shapes = [shape for shape in shapes if shape.part in ORDER_OF_PART and len(shape.colour) == 3]
    lines = project_outlines(look, shapes, 1, 6)
    points, direction, shape_index = split_lines(lines)
    shown = np.flatnonzero(visible(shapes, lines, points, direction, shape_index))
    rank = np.array([ORDER_OF_PART[shape.part] for shape in shapes])
    order = shown[np.argsort(rank[shape_index[shown]], kind="stable")]
    return points[order], np.hypot(*direction[order].T)


def split_lines(lines):
    """Split lines into m pieces of at most PIECE_LENGTH: midpoints, vectors (m, 2), line indices (m,)."""
    start = np.concatenate([line[:-1] for line in lines])
    direction = np.concatenate([np.diff(line, axis=0) for line in lines])
    shape_index = np.repeat(np.arange(len(lines)), [len(line) - 1 for line in lines])
    count = np.ceil(np.hypot(*direction.T) / PIECE_LENGTH).astype(int)
    segment = np.repeat(np.arange(len(count)), count)  # of each piece
    nth = np.arange(len(segment)) - (np.cumsum(count) - count)[segment]  # within its segment
    direction = direction[segment] / count[segment, None]
    return start[segment] + direction * (nth[:, None] + 0.5), direction, shape_index[segment]


def visible(shapes, lines, points, direction, shape_index):
    """Which pieces are visible in the image, bool (m,): not painted over, and at an edge between surfaces."""
    canvas = round(1 / PIECE_LENGTH)
    image = Image.new("I", (canvas, canvas), -1)
    pen = ImageDraw.Draw(image)
    for index, (shape, line) in enumerate(zip(shapes, lines)):
        if not shape.width and shape.part != "beard":  # a beard does not hide the outline of the face
            pen.polygon((line * canvas).ravel().tolist(), index)
    uppermost = np.asarray(image)  # index of the shape visible at each pixel, -1 for none

    def seen(points):
        column, row = (points * canvas).clip(0, canvas - 1).astype(int).T
        return uppermost[row, column]

    stroke = np.array([shape.width > 0 for shape in shapes])[shape_index]
    area = np.array([(line[:-1] * line[1:, ::-1] @ (1, -1)).sum() for line in lines])  # > 0: clockwise
    outwards = (np.stack([direction[:, 1], -direction[:, 0]], 1)
                * np.where(stroke, 0, np.sign(area[shape_index]))[:, None])
    outwards *= 1.5 * PIECE_LENGTH / np.hypot(*direction.T)[:, None]
    inside, outside = seen(points - outwards), seen(points + outwards)

    # all hair is one surface, and so are areas with the same place in the drawing order and colour
    surfaces = [(ORDER_OF_PART[shape.part], shape.part in ("hair", "bangs") or shape.colour)
                for shape in shapes]
    surface = np.array([*(surfaces.index(each) for each in surfaces), -1])  # last: the background
    edge = surface[outside] != surface[shape_index]
    shown = np.where(stroke, inside <= shape_index,
                     edge & ((inside <= shape_index) | (surface[inside] == surface[shape_index])))
    return shown & ((points > 0) & (points < 1)).all(1)


def rasterize_strokes(points: np.ndarray, step: np.ndarray, steps: int, size: int) -> np.ndarray:
    """Rasterise pen positions `points` (m, 2), reached at `step` (m,), ascending: uint8 (steps, size,
    size). Each pixel of an oversampled canvas stores the first step at which the round pen covers it. The
    brightness of an output pixel is the fraction of its canvas pixels covered so far."""
    oversampling = 4 if size < 128 else 2
    canvas, radius = size * oversampling, size * oversampling / 120
    margin = int(np.ceil(radius))
    edge = canvas + 2 * margin
    y, x = np.mgrid[-margin:margin + 1, -margin:margin + 1]
    disc = (y * edge + x)[x**2 + y**2 <= radius**2]
    column, row = (points * canvas).astype(int).T + margin
    first = np.full(edge * edge, steps)
    first[(row * edge + column)[::-1, None] + disc] = step[::-1, None]  # in reverse: the first step wins
    first = first.reshape(edge, edge)[margin:-margin, margin:-margin]

    pixel = np.arange(size * size).reshape(size, 1, size, 1)
    bins = first.reshape(size, oversampling, size, oversampling) * size * size + pixel  # (step, pixel)
    covered = np.bincount(bins.ravel(), minlength=(steps + 1) * size * size)
    covered = covered.reshape(-1, size, size)[:steps].astype(np.uint16)
    for previous, current in zip(covered, covered[1:]):  # running sum, faster than cumsum over axis 0
        current += previous
    return (covered * 255 // oversampling**2).astype(np.uint8)
