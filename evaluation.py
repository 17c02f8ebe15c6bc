"""How well faces are found."""
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from captions import reference_recall, sample_caption
from common.distributed import autocast, rank_and_world_size
from common.images import contact_sheet, iterate_images
from common.script import markdown_table
from data import Faces
from flip import eval_mode, rerank


# ---- retrieval metrics ---------------------------------------------------------------------------
def first_match_rank(scores, is_match):
    """Rank (0 = first) of each row's best-ranked match; scores, is_match (rows, gallery) ->
    (rows,).

    Ties count against us, and so does what is not a number: whatever does not score below the match
    ranks above it.
    """
    best = scores.masked_fill(~is_match, -torch.inf).amax(1, keepdim=True)
    return (~(scores < best) & ~is_match).sum(1)


def retrieval_metrics(image_to_text, text_to_image, image_of_text):
    """Recall at 1, 5 and 10 both ways in percent, and their means, by the official names: `txt_` is
    finding the text for an image, `img_` finding the image for a text.

    image_to_text (I, T) scores of every text for an image, text_to_image (T, I); image_of_text
    (T,): which image each caption belongs to (an image may have several: its rank is the best of
    them). """
    images = torch.arange(len(image_to_text), device=image_of_text.device)
    is_match = image_of_text[None, :] == images[:, None]                                    # (I, T)
    ranks_of = {"txt": first_match_rank(image_to_text, is_match), "img": first_match_rank(text_to_image, is_match.T)}
    metrics = {}
    for way, ranks in ranks_of.items():
        rerank_metrics = {f"{way}_r{k}": 100 * (ranks < k).double().mean().item() for k in (1, 5, 10)}
        metrics |= rerank_metrics | {f"{way}_r_mean": sum(rerank_metrics.values()) / 3}
    return metrics | {"r_mean": (metrics["txt_r_mean"] + metrics["img_r_mean"]) / 2}


# ---- eval_mode a model --------------------------------------------------------------------------
class Validation(NamedTuple):
    """Faces never trained on, one caption of the grammar each, or all captions that came with
    them."""
    faces: Faces
    texts: list                     # T captions
    image_of_text: torch.Tensor     # (T,)
    references: dict                # for the table: recalls of who knows every attribute, or {}

    @staticmethod
    def of(faces):
        images = torch.arange(len(faces))
        if faces.captions is not None:
            counts = torch.tensor([len(captions) for captions in faces.captions])
            texts = [text for captions in faces.captions for text in captions]
            return Validation(faces, texts, images.repeat_interleave(counts), {})
        texts, stated = zip(*(sample_caption(attributes, np.random.default_rng((1, i)))  # the same every time
                              for i, attributes in enumerate(faces.attributes)))
        references = {}
        for name, ways in reference_recall(np.stack(stated), faces.attributes).items():
            both = ways["text_to_image"], ways["image_to_text"]
            references[name] = [100 * way[k] for way in both for k in (1, 5, 10)]
        return Validation(faces, list(texts), images, references)


def evaluate(model, validation, config):
    """What `recalls` says of the validation faces."""
    device, size, faces = model.temperature.device, model.config.vit.image_size, validation.faces
    show, image_tokens, image_features = rank_and_world_size()[0] == 0, [], []
    captions = model.tokenizer(validation.texts).to(device)
    with eval_mode(model):
        with autocast(config, device):
            for _, pixels in iterate_images(faces.picture, len(faces), size, "encoding faces", show=show):
                tokens, features = model.student.image_tokens_and_features(pixels.to(device))
                image_tokens.append(tokens.cpu())
                image_features.append(features)
            text_features = model.student.text_features_chunked(captions)
        similarity = torch.cat(image_features) @ text_features.T                    # (I, T), in float32
        return rerank_metrics(model, torch.cat(image_tokens), captions, similarity, validation.image_of_text, config)


def rerank_metrics(model, image_tokens, captions, similarity, image_of_text, config):
    """Recalls both ways, by cosine alone ("itc_...") and re-ranked, and the re-ranked text-to-image
    scores (T, I); from image tokens (I, L, D), T captions and the cosines (I, T) of their
    features."""
    device, show = similarity.device, rank_and_world_size()[0] == 0
    with autocast(config, device):
        scores = rerank(model, image_tokens, captions.to(device), similarity, config.k_test, progress=show)
    itc = retrieval_metrics(similarity, similarity.T, image_of_text.to(device))
    reranked = retrieval_metrics(*scores, image_of_text.to(device))
    return reranked | {f"itc_{name}": value for name, value in itc.items()}, scores[1].cpu()


# ---- table and pictures --------------------------------------------------------------------------
def recall_table(metrics, validation):
    """The final table: recalls in percent, both ways, beside chance and the references. A share
    above 100 % means more than that reference finds, which takes all captions that fit a face for
    equal."""
    chance = [100 * min(1, k / len(validation.faces)) for k in (1, 5, 10)] * 2
    rows = {"chance": chance} | validation.references
    for name, prefix in (("this model, ITC alone", "itc_"), ("this model, re-ranked", "")):
        rows[name] = [metrics[f"{prefix}{way}_r{k}"] for way in ("img", "txt") for k in (1, 5, 10)]
    ours = rows["this model, re-ranked"]
    for name in validation.references:
        rows[f"share of {name}"] = [100 * a / b for a, b in zip(ours, validation.references[name])]
    header = ["recall in %", "text to image R@1", "R@5", "R@10", "image to text R@1", "R@5", "R@10"]
    return markdown_table(header, [[name, *(f"{value:.1f}" for value in row)] for name, row in rows.items()])


def plot_retrieval(validation, text_to_image, path, queries=6, top=5):
    """For some captions the best faces with their scores; the caption's own face is framed."""
    rows = []
    for t in np.linspace(0, len(validation.texts) - 1, queries).astype(int):
        own, scores = validation.image_of_text[t], text_to_image[t]
        rows.append((validation.texts[t], [(validation.faces.picture(i), f"score {scores[i]:.1f}", i == own)
                                           for i in scores.argsort(descending=True)[:top].tolist()]))
    contact_sheet(rows, legend="green: the face that the sentence was written for").save(path)


def new_figure(width, height, columns=1):
    from matplotlib.figure import Figure  # without pyplot: no window, nothing to close
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def plot_curves(log, validation, path):
    """Losses and recalls over steps, with the references as dotted and dashed lines."""
    figure, (left, right) = new_figure(12, 4.5, columns=2)
    for name in ("itc", "itm"):
        shown = [(line["step"], line[name]) for line in log if line.get(name) is not None]
        left.plot(*zip(*shown) if shown else ([], []), label=name.upper())
    left.set(xlabel="step", title="training losses")
    evaluations = [line for line in log if "img_r10" in line]
    for column, k, colour in ((0, 1, "tab:blue"), (1, 5, "tab:orange"), (2, 10, "tab:green")):
        steps, recall = zip(*((line["step"], line[f"img_r{k}"]) for line in evaluations))
        right.plot(steps, recall, "o-", color=colour, label=f"R@{k}")
        for name, style in zip(validation.references, (":", "--")):
            right.axhline(validation.references[name][column], color=colour, linestyle=style, linewidth=0.8)
    right.set(xlabel="step", ylabel="%", ylim=(0, 100), xlim=(0, None),
              title="recall, text to image, re-ranked\n(dotted: consistency, dashed: ceiling)")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=110)


def evaluate_and_draw(run, step):
    """Recalls on the validation faces, into the log and the two pictures."""
    metrics, text_to_image = evaluate(run.model, run.validation, run.config)
    run.log.write(step=step, **metrics)
    if rank_and_world_size()[0] == 0:
        plot_curves(run.log.lines, run.validation, Path(run.config.out) / "curves.png")
        plot_retrieval(run.validation, text_to_image, Path(run.config.out) / "retrieval.png")
    return metrics
