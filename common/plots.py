"""Pictures of a run: its losses and recalls, and the top-ranked faces for some captions."""
from pathlib import Path

import numpy as np

from common.images import contact_sheet


def new_figure(width, height, columns=1):
    from matplotlib.figure import Figure  # without pyplot: no window, nothing to close
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def plot_retrieval(validation, text_to_image, path: Path, queries=6, top=5):
    """Save the top-ranked faces for some captions, with scores; the caption's own face is framed."""
    rows = []
    for t in np.linspace(0, len(validation.texts) - 1, queries).astype(int):
        own, scores = validation.image_of_text[t], text_to_image[t]
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
