"""Pictures: rows of images on a contact sheet, the losses and recalls of a run, the top-ranked faces."""
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps


def contact_sheet(rows, tile=128, legend="") -> Image.Image:
    """An image of rows (title, [(image, label, framed)]): the title above its row, a label below each image,
    shortened to fit, green frames around the framed images, and the legend at the bottom."""
    margin = 8
    font = ImageFont.load_default(max(11, tile // 9))
    line_height = font.size + 4
    width = margin + max(len(tiles) for _, tiles in rows) * (tile + margin)
    chars = int((width - 2 * margin) / font.getlength("n"))                     # characters per line of text
    titles = [textwrap.wrap(title, chars) for title, _ in rows]
    legend = textwrap.wrap(legend, chars)
    heights = [len(lines) * line_height + tile + line_height + 2 * margin for lines in titles]
    sheet = Image.new("RGB", (width, sum(heights) + margin + line_height * len(legend)), "white")
    draw = ImageDraw.Draw(sheet)
    bottom = 0
    for lines, height, (_, tiles) in zip(titles, heights, rows):
        draw.text((margin, bottom + margin), "\n".join(lines), fill="black", font=font, spacing=4)
        bottom += height
        y = bottom - tile - line_height                         # top edge of this row's images
        for column, (image, label, framed) in enumerate(tiles):
            x = margin + column * (tile + margin)
            if framed:
                draw.rectangle((x - 4, y - 4, x + tile + 3, y + tile + 3), fill=(40, 160, 70))
            image = image.convert("RGB")
            sheet.paste(ImageOps.pad(image, (tile, tile), Image.Resampling.LANCZOS, color="white"), (x, y))
            while font.getlength(label) > tile + margin:
                label = label[:-2] + "…"
            draw.text((x, y + tile + 4), label, fill=(90, 90, 90), font=font)
    draw.text((margin, bottom), "\n".join(legend), fill=(40, 160, 70), font=font, spacing=4)
    return sheet


def new_figure(width, height, columns=1):
    from matplotlib.figure import Figure  # without pyplot: no window, nothing to close
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def plot_retrieval(validation, text_to_image, path: Path, queries=6, top=5):
    """Save the top-ranked faces for some captions, with scores; the caption's own face is framed."""
    rows = []
    for t in np.linspace(0, len(validation.texts) - 1, queries).astype(int):
        own = validation.image_of_text[t]
        scores = text_to_image[t]
        rows.append((validation.texts[t], [(validation.faces.picture(i), f"score {scores[i]:.1f}", i == own)
                                           for i in scores.argsort(descending=True)[:top].tolist()]))
    contact_sheet(rows, legend="green frame: the face the caption was written for").save(path)


def plot_curves(log: list[dict], validation, path: Path):
    """Plot losses and recalls over steps, with the references as dotted and dashed lines."""
    figure, (left, right) = new_figure(12, 4.5, columns=2)
    for name in ("itc", "itm"):
        points = [(line["step"], line[name]) for line in log if line.get(name) is not None]
        left.plot([step for step, _ in points], [loss for _, loss in points], label=name.upper())
    config = log[0]["config"]
    # from here on ITC has more keys or softer targets, and rises
    until = config["steps"] * min(config["queue_from"], config["alpha_ramp"][0] if config["alpha"] else 1.0)
    if validation.ideal_itc and until > 0:
        left.plot([0, until], [validation.ideal_itc] * 2, "--", color="tab:blue", label="ideal ITC")
    left.set(xlabel="step", title="training losses")
    evaluations = [line for line in log if "img_r10" in line]
    for column, k, colour in ((0, 1, "tab:blue"), (1, 5, "tab:orange"), (2, 10, "tab:green")):
        steps, recall = zip(*((line["step"], line[f"img_r{k}"]) for line in evaluations))
        right.plot(steps, recall, "o-", color=colour, label=f"R@{k}")
        for name, style in zip(validation.references, (":", "--")):
            right.axhline(validation.references[name][column], color=colour, linestyle=style, linewidth=0.8)
    lines = "\n(dotted: attribute match, dashed: Bayes optimum)" if validation.references else ""
    right.set(xlabel="step", ylabel="%", ylim=(0, 100), xlim=(0, None),
              title=f"recall, text to image, re-ranked{lines}")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=110)
