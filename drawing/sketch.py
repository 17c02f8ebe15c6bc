"""Sketches of toy faces, from `Shape`s to pen strokes (`stroke_points`) to stages
(`rasterize_strokes`)."""
import numpy as np
from PIL import Image, ImageDraw

from drawing.portrait import project_outlines

DRAWING_ORDER = (  # without light, shade, make-up and parts too small for a pen
    ("face",), ("chin",), ("hair", "bangs"), ("eye", "pupil", "lash"), ("brow",), ("nose",),
    ("lips", "mouth"), ("ear",), ("neck", "clothes"), ("glasses",), ("beard", "moustache"),
    ("wrinkle", "eye bag"), ("hat",), ("earring", "necklace", "tie"), ("blemish",))
ORDER_OF_PART = {part: turn for turn, parts in enumerate(DRAWING_ORDER) for part in parts}
PIECE_LENGTH = 1 / 400  # maximum length of a piece, and pixel size in `visible`, in image widths


def stroke_points(look, shapes: list) -> tuple[np.ndarray, np.ndarray]:
    """Pen positions (m, 2) in image widths, and the stroke length (m,) that each represents.

    They are in DRAWING_ORDER and, within a turn, in painting order. Only visible edges are drawn,
    where areas of different colours meet. Transparent shapes have no outline."""
    shapes = [shape for shape in shapes if shape.part in ORDER_OF_PART and len(shape.colour) == 3]
    lines = project_outlines(look, shapes, 1, 6)
    points, direction, shape_index = split_lines(lines)
    shown = np.flatnonzero(visible(shapes, lines, points, direction, shape_index))
    rank = np.array([ORDER_OF_PART[shape.part] for shape in shapes])
    order = shown[np.argsort(rank[shape_index[shown]], kind="stable")]
    return points[order], np.hypot(*direction[order].T)


def split_lines(lines):
    """Split lines (n, 2) into m pieces of at most PIECE_LENGTH. Returns their midpoints and
    vectors, (m, 2) each, and the index of their line, (m,)."""
    start = np.concatenate([line[:-1] for line in lines])
    direction = np.concatenate([np.diff(line, axis=0) for line in lines])
    shape_index = np.repeat(np.arange(len(lines)), [len(line) - 1 for line in lines])
    count = np.ceil(np.hypot(*direction.T) / PIECE_LENGTH).astype(int)
    segment = np.repeat(np.arange(len(count)), count)  # of each piece
    nth = np.arange(len(segment)) - (np.cumsum(count) - count)[segment]  # within its segment
    direction = direction[segment] / count[segment, None]
    return start[segment] + direction * (nth[:, None] + 0.5), direction, shape_index[segment]


def visible(shapes, lines, points, direction, shape_index):
    """Which pieces are visible in the image, bool (m,): those at an edge between two surfaces that
    are not painted over."""
    canvas = round(1 / PIECE_LENGTH)
    image = Image.new("I", (canvas, canvas), -1)
    pen = ImageDraw.Draw(image)
    for index, (shape, line) in enumerate(zip(shapes, lines)):
        if not shape.width and shape.part != "beard":  # a beard does not hide the face's outline
            pen.polygon((line * canvas).ravel().tolist(), index)
    uppermost = np.asarray(image)  # index of the shape visible at each pixel, -1 for none

    def shape_at(points):
        column, row = (points * canvas).clip(0, canvas - 1).astype(int).T
        return uppermost[row, column]

    stroke = np.array([shape.width > 0 for shape in shapes])[shape_index]
    area = np.array([(line[:-1] * line[1:, ::-1] @ (1, -1)).sum() for line in lines])  # > 0: clockwise
    outwards = (np.stack([direction[:, 1], -direction[:, 0]], 1)
                * np.where(stroke, 0, np.sign(area[shape_index]))[:, None])
    outwards *= 1.5 * PIECE_LENGTH / np.hypot(*direction.T)[:, None]
    inside = shape_at(points - outwards)
    outside = shape_at(points + outwards)

    # all hair is one surface, and so are areas of one colour in one turn of the drawing order
    surfaces = []
    for shape in shapes:
        colour = "hair" if shape.part in ("hair", "bangs") else shape.colour
        surfaces.append((ORDER_OF_PART[shape.part], colour))
    surface = np.array([*map(surfaces.index, surfaces), -1])    # last: the background
    is_edge = surface[outside] != surface[shape_index]
    is_on_top = inside <= shape_index
    is_own_surface = surface[inside] == surface[shape_index]
    shown = np.where(stroke, is_on_top, is_edge & (is_on_top | is_own_surface))
    is_in_image = ((points > 0) & (points < 1)).all(1)
    return shown & is_in_image


def rasterize_strokes(points: np.ndarray, stage: np.ndarray, stages: int, size: int) -> np.ndarray:
    """Rasterise pen positions `points` (m, 2), reached at `stage` (m,), in ascending order. Returns
    the sketch at each stage, white on black, uint8 (stages, size, size).

    Each pixel of an oversampled canvas stores the first stage at which the round pen covers it. The
    brightness of an output pixel is the fraction of its canvas pixels that are covered so far."""
    oversampling = 4 if size < 128 else 2
    canvas = size * oversampling
    radius = canvas / 120
    margin = int(np.ceil(radius))
    edge = canvas + 2 * margin
    y, x = np.mgrid[-margin:margin + 1, -margin:margin + 1]
    disc = (y * edge + x)[x**2 + y**2 <= radius**2]     # offsets of the pixels that the pen covers
    column, row = (points * canvas).astype(int).T + margin
    # in reverse, so that the first stage remains; contiguous, else NumPy assigns in another order
    pen = (row * edge + column)[::-1, None] + disc      # (m, pixels of the disc)
    first = np.full(edge * edge, stages)
    first[pen] = stage[::-1, None]
    first = first.reshape(edge, edge)[margin:-margin, margin:-margin]

    pixel = np.arange(size * size).reshape(size, 1, size, 1)
    stage_of_pixel = first.reshape(size, oversampling, size, oversampling)
    bins = stage_of_pixel * size * size + pixel         # a number for each (stage, pixel)
    covered = np.bincount(bins.ravel(), minlength=(stages + 1) * size * size)
    covered = covered.reshape(-1, size, size)[:stages].astype(np.uint16)
    for previous, current in zip(covered, covered[1:]):  # faster than cumsum over axis 0
        current += previous
    return (covered * 255 // oversampling**2).astype(np.uint8)
