"""Figures: contact sheets, the losses and recalls of a run, and the results of the tasks."""
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

GREEN = (40, 160, 70)
GREY = (90, 90, 90)
MARGIN = 8                  # in pixels, between images and around them


def contact_sheet(rows, tile=128, legend="") -> Image.Image:
    """An image of rows (title, [(image, label, framed)]), with images of tile x tile pixels. A
    title is above its row, a label below each image, shortened to fit, and the legend at the
    bottom. Framed images have green frames."""
    font = ImageFont.load_default(max(11, tile // 10))
    line_height = font.size + 4
    width = MARGIN + max(len(tiles) for _, tiles in rows) * (tile + MARGIN)

    def strip(text, colour, height):
        """The wrapped lines of a text, above an area of this height."""
        lines = textwrap.wrap(text, int((width - 2 * MARGIN) / font.getlength("n")))
        image = Image.new("RGB", (width, len(lines) * line_height + MARGIN + height), "white")
        text = "\n".join(lines)
        ImageDraw.Draw(image).text((MARGIN, 0), text, fill=colour, font=font, spacing=4)
        return image

    strips = [Image.new("RGB", (width, MARGIN), "white")]
    for title, tiles in rows:
        row = strip(title, "black", tile + line_height + MARGIN)
        draw = ImageDraw.Draw(row)
        x = MARGIN
        y = row.height - tile - line_height - MARGIN                    # top edge of the images
        for image, label, framed in tiles:
            if framed:
                draw.rectangle((x - 4, y - 4, x + tile + 3, y + tile + 3), fill=GREEN)
            image = ImageOps.pad(image, (tile, tile), Image.Resampling.LANCZOS, color="white")
            row.paste(image, (x, y))
            while font.getlength(label) > tile:
                label = label[:-2] + "…"
            draw.text((x, y + tile + 4), label, fill=GREY, font=font)
            x += tile + MARGIN
        strips.append(row)
    strips.append(strip(legend, GREEN, 0))
    return Image.fromarray(np.concatenate(strips))


def new_figure(width, height, columns=1):
    """A Matplotlib figure, width x height inches, and its axes."""
    from matplotlib.figure import Figure  # without pyplot: no window, nothing to close
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def plot_retrieval(validation, text_to_image, path: Path, queries=3, top=5):
    """Save the top-ranked faces for some captions, with scores; the caption's own face is
    framed."""
    rows = []
    for t in np.linspace(0, len(validation.texts) - 1, queries).astype(int):
        scores = text_to_image[t]
        tiles = []
        for i in scores.argsort(descending=True)[:top].tolist():
            is_own = i == validation.image_of_text[t]
            tiles.append((validation.faces.picture(i), f"score {scores[i]:.1f}", is_own))
        rows.append((validation.texts[t], tiles))
    legend = f"green: the face the caption was written for (no green: not among these {top})"
    contact_sheet(rows, 104, legend).save(path)


def column(lines: list[dict], name: str) -> list:
    return [line[name] for line in lines]


def plot_curves(log: list[dict], validation, path: Path):
    """Plot losses and recalls over steps, with the references as dotted and dashed lines."""
    figure, (left, right) = new_figure(12, 4.5, columns=2)
    for name in ("itc", "itm"):
        lines = [line for line in log if line.get(name) is not None]
        left.plot(column(lines, "step"), column(lines, name), label=name.upper())
    last_step = {line["phase"]: line["step"] for line in log if "phase" in line}
    if 1 in last_step and validation.ideal_itc:
        left.plot([0, last_step[1]], [validation.ideal_itc] * 2, "--", color="tab:blue",
                  label="ideal ITC")
    if len(last_step) == 2:                     # more keys, soft targets: ITC jumps
        left.axvline(last_step[1], color="grey", linestyle=":", linewidth=0.8)
        left.annotate("complete FLIP", (last_step[1], 0.98), color="grey",
                      xycoords=("data", "axes fraction"), va="top", rotation=90)
    left.set(xlabel="step", title="training losses")
    left.legend()

    evaluations = [line for line in log if "img_r10" in line]
    for i, k in enumerate((1, 5, 10)):
        steps = column(evaluations, "step")
        right.plot(steps, column(evaluations, f"img_r{k}"), "o-", label=f"R@{k}")
        for recalls, style in zip(validation.references.values(), (":", "--")):
            right.axhline(recalls[i], color=f"C{i}", linestyle=style, linewidth=0.8)
    title = "recall, text to image, re-ranked in phase 2"
    if validation.references:
        title += "\n(dotted: attribute match, dashed: Bayes optimum)"
    right.set(xlabel="step", ylabel="%", ylim=(0, 100), xlim=(0, None), title=title)
    right.legend()
    figure.savefig(path, dpi=110)


def plot_accuracies(attributes: list[str], accuracy, majority, title: str, path: Path):
    """Plot the accuracy for each attribute, (40,) in percent, beside that of the majority class,
    sorted by their difference."""
    order = (accuracy - majority).argsort()
    ticks = np.arange(len(order))
    names = [attributes[n].replace("_", " ") for n in order]
    figure, axes = new_figure(9, 1.5 + 0.28 * len(order))
    axes.barh(ticks, accuracy[order].numpy(), label="trained head", color="lightblue")
    axes.plot(majority[order].numpy(), ticks, "k|", label="majority class")
    axes.set(yticks=ticks, yticklabels=names, xlim=(50, 100), ylim=(-1, len(ticks)),
             xlabel="accuracy in % (from 50)", title=title)
    figure.legend(loc="outside lower right", ncols=2)
    figure.savefig(path, dpi=110)


def plot_sketch(faces, sketch: int, similarity, ranks, path: Path):
    """Save a sketch at six stages, each beside its top-ranked photos; its own photo is framed.

    faces: the photos and their sketches; sketch: an index; similarity (stages, photos) and ranks
    (stages,) of the true photo: those of this sketch."""
    stages = len(similarity)
    rows = []
    for t in sorted({max(0, stages * n // 6 - 1) for n in range(1, 7)}):
        tiles = [(faces.sketch(sketch, t), "", False)]
        for i in similarity[t].argsort(descending=True)[:5].tolist():
            tiles.append((faces.picture(i), f"{similarity[t, i]:.2f}", i == sketch))
        title = f"stage {t + 1} of {stages}: its own image ranks {ranks[t]} of {len(faces)}"
        rows.append((title, tiles))
    contact_sheet(rows, tile=112, legend="green frame: the sketch's own image").save(path)
