"""Sketches of toy faces, from `Shape`s to pen strokes (`stroke_points`) to stages
(`rasterize_strokes`)."""
import numpy as np
from PIL import Image, ImageDraw

from drawing.portrait import project_outlines

DRAWING_ORDER = (  # without light, shade, make-up and parts too small for a pen
    "face", "chin", "hair", "eye", "brow", "nose", "lips", "mouth", "ear", "neck", "clothes", "glasses",
    "beard", "moustache", "wrinkle", "eye bag", "hat", "tie", "necklace", "earring", "blemish")
CANVAS = 400    # pixels per image width in which lines are split and `visible` looks


def stroke_points(look, shapes: list) -> tuple[np.ndarray, np.ndarray]:
    """Pen positions x + iy (m,), and the stroke length (m,) that each represents, in image widths.

    They are in DRAWING_ORDER and, within a part, in painting order. Only visible edges are drawn,
    where areas of different colours meet. Transparent shapes have no outline."""
    shapes = [shape for shape in shapes if shape.part in DRAWING_ORDER and len(shape.colour) == 3]
    lines = project_outlines(look, shapes, CANVAS, 6)
    points, direction, shape_index = split_lines(lines)
    shown = np.flatnonzero(visible(shapes, lines, points, direction, shape_index))
    rank = np.array([DRAWING_ORDER.index(shape.part) for shape in shapes])
    order = shown[np.argsort(rank[shape_index[shown]], kind="stable")]
    return points[order] / CANVAS, np.abs(direction[order]) / CANVAS


def split_lines(lines):
    """Split lines, complex (n,), into m pieces of at most one pixel. Returns their midpoints and
    vectors, and the index of their line, (m,) each."""
    corners = np.concatenate(lines)
    line_index = np.repeat(np.arange(len(lines)), [len(line) for line in lines])
    direction = np.diff(corners)
    count = np.ceil(np.abs(direction)) * (np.diff(line_index) == 0)     # no piece between lines
    segment = np.repeat(np.arange(len(count)), count.astype(int))       # of each piece
    middle = np.arange(len(segment)) + 0.5
    points = np.interp(middle, np.append(0, np.cumsum(count)), corners)
    return points, direction[segment] / count[segment], line_index[segment]


def coordinates(points):
    """x and y of complex points (m,): an array (2, m)."""
    return np.array([points.real, points.imag])


def visible(shapes, lines, points, direction, shape_index):
    """Which pieces are visible in the image, bool (m,): those at an edge between two surfaces that
    are not painted over."""
    image = Image.new("I", (CANVAS, CANVAS), -1)
    pen = ImageDraw.Draw(image)
    surfaces = []
    for index, (shape, line) in enumerate(zip(shapes, lines)):
        if not shape.width and shape.part != "beard":  # a beard does not hide the face's outline
            pen.polygon(line.view(float).tolist(), index)
        # all hair is one surface, and so are areas of one colour in other parts
        colour = None if shape.part == "hair" else shape.colour
        surfaces.append((shape.part, colour))
    uppermost = np.asarray(image).T  # index of the shape visible at each pixel, -1 for none
    surface = np.array([*map(surfaces.index, surfaces), -1])    # last: the background

    def shape_at(points):
        return uppermost[*coordinates(points).clip(0, CANVAS - 1).astype(int)]

    stroke = np.array([shape.width > 0 for shape in shapes])[shape_index]
    area = np.array([np.vdot(line[:-1], line[1:]).imag for line in lines])  # > 0: clockwise
    outwards = -1.5j * direction / np.abs(direction) * np.sign(area[shape_index]) * ~stroke
    inside = shape_at(points - outwards)
    outside = shape_at(points + outwards)
    is_edge = surface[outside] != surface[shape_index]
    is_on_top = inside <= shape_index
    is_own_surface = surface[inside] == surface[shape_index]
    shown = np.where(stroke, is_on_top, is_edge & (is_on_top | is_own_surface))
    xy = coordinates(points)
    return shown & ((xy > 0) & (xy < CANVAS)).all(0)


def rasterize_strokes(points: np.ndarray, stage: np.ndarray, stages: int, size: int) -> np.ndarray:
    """Rasterise pen positions `points`, complex (m,) in image widths, reached at `stage` (m,).
    Returns the sketch at each stage, white on black, uint8 (stages, size, size).

    Each pixel of an oversampled canvas stores the first stage at which the round pen covers it. The
    brightness of an output pixel is the fraction of its canvas pixels that are covered so far."""
    oversampling = 4 if size < 128 else 2
    canvas = size * oversampling
    radius = canvas / 120
    margin = int(np.ceil(radius))
    edge = canvas + 2 * margin
    y, x = np.mgrid[-margin:margin + 1, -margin:margin + 1]
    disc = (y * edge + x)[x**2 + y**2 <= radius**2]     # offsets of the pixels that the pen covers
    column, row = (coordinates(points) * canvas).astype(int) + margin
    pen = (row * edge + column)[:, None] + disc         # (m, pixels of the disc)
    first = np.full(edge * edge, stages)
    np.minimum.at(first, pen, stage[:, None])
    first = first.reshape(edge, edge)[margin:-margin, margin:-margin]

    # (oversampling, oversampling, size, size); the copy is contiguous, which halves the time
    first = first.reshape(size, oversampling, size, oversampling).transpose(1, 3, 0, 2).copy()
    covered = np.array([(first <= t).sum((0, 1)) for t in range(stages)])
    return (255 * covered // oversampling**2).astype(np.uint8)
