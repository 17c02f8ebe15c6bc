"""Retrieval evaluation (FLIP paper, section 5.1): recall by ITC alone and after re-ranking with
the matching head, and the final table with its reference rows (optimum.py)."""
import math
from typing import NamedTuple

import numpy as np
import torch

from captions import sample_caption
from common.distributed import autocast, choose_precision, rank_and_world_size
from common.images import iterate_images
from common.script import markdown_table
from common.seeds import random_stream
from flip import FLIP, rerank
from optimum import ideal_contrastive_loss, reference_recall


# ---- retrieval metrics ---------------------------------------------------------------------------
def match_ranks(scores, image_of_row, image_of_column):
    """Rank, 1 is best, of the best-ranked match in each row: scores (rows, columns), the image of
    each row and of each column -> (rows,).

    Ties and NaN count against the match: an item ranks below it only if its score is strictly
    lower."""
    ranks = []
    for chunk, image in zip(scores.split(1000), image_of_row.split(1000)):
        is_match = image[:, None] == image_of_column
        best = chunk.masked_fill(~is_match, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + (~(chunk < best) & ~is_match).sum(1))
    return torch.cat(ranks)


def retrieval_metrics(image_to_text, text_to_image, image_of_text):
    """Recall at 1, 5 and 10 in percent and their means, under the official names: `txt_` is image
    to text, `img_` text to image.

    image_to_text (I, T) and text_to_image (T, I): scores; image_of_text (T,): the image of each
    caption, its only match (not other images of the same person). For an image with several
    captions the best-ranked one counts."""
    images = torch.arange(len(image_to_text), device=image_of_text.device)
    ranks = {"txt": match_ranks(image_to_text, images, image_of_text),
             "img": match_ranks(text_to_image, image_of_text, images)}
    metrics = {}
    for direction, rank in ranks.items():
        recalls = []
        for k in (1, 5, 10):
            recall = 100 * (rank <= k).cpu().double().mean().item()
            metrics[f"{direction}_r{k}"] = recall
            recalls.append(recall)
        metrics[f"{direction}_r_mean"] = sum(recalls) / 3
    metrics["r_mean"] = (metrics["txt_r_mean"] + metrics["img_r_mean"]) / 2
    return metrics


# ---- evaluating a model --------------------------------------------------------------------------
class EvaluationSet(NamedTuple):
    """Faces of a split with fixed captions: the data set's own, or one generated per face."""
    faces: object                   # data.Faces
    texts: list[str]                # T captions
    image_of_text: torch.Tensor     # (T,)
    # only for generated captions, if training faces are given:
    references: dict = {}           # {row of the table: six recalls}, `optimum.reference_recall`
    ideal_itc: float | None = None  # `optimum.ideal_contrastive_loss`

    @staticmethod
    def from_faces(faces, training=None, batch_size: int = 0) -> "EvaluationSet":
        """The faces with captions. The references, and the ideal loss for batches of `batch_size`
        pairs (of all processes), are added if these captions and those of `training`, the faces to
        train on, are generated."""
        images = torch.arange(len(faces))
        texts = []
        if faces.captions is not None:
            counts = []
            for captions in faces.captions:
                texts += captions
                counts.append(len(captions))
            return EvaluationSet(faces, texts, images.repeat_interleave(torch.tensor(counts)))

        stated = []
        for i, attributes in enumerate(faces.attributes):
            rng = random_stream(f"captions to evaluate on, {faces.name}", i)
            text, facts = sample_caption(attributes, rng)
            texts.append(text)
            stated.append(facts)
        if training is None or training.captions is not None:
            return EvaluationSet(faces, texts, images)

        stated = np.stack(stated)
        ideal_itc = None
        if batch_size <= len(faces):
            population = training.attributes[:20_000]
            ideal_itc = ideal_contrastive_loss(stated, faces.attributes, population, batch_size)
        references = reference_recall(stated, faces.attributes)
        return EvaluationSet(faces, texts, images, references, ideal_itc)


@torch.no_grad()
def evaluate(model: FLIP, validation: EvaluationSet, config, reranks=True):
    """Evaluate retrieval. Every process encodes the whole validation set; the pairs to re-rank are
    divided among them. Returns `retrieval_metrics` after re-ranking and by cosine alone
    ("itc_..."), and the re-ranked text-to-image scores (T, I). reranks: False if the matching head
    is not trained yet; then all scores are cosines. config: precision and k_test. The caller puts
    the model into evaluation mode."""
    device = model.device
    captions = model.tokenizer(validation.texts).to(device)
    image_of_text = validation.image_of_text.to(device)
    with autocast(config.precision, device):
        image_tokens, image_features = encode_faces(model, validation.faces, config.precision)
        text_features = model.student.text_features(captions)
    similarity = image_features @ text_features.T                       # (I, T), in float32
    image_to_text = similarity
    text_to_image = similarity.T
    if reranks:
        with autocast(config.precision, device):
            image_to_text, text_to_image = rerank(model, image_tokens, captions, similarity,
                                                  config.k_test)

    metrics = retrieval_metrics(image_to_text, text_to_image, image_of_text)
    for name, value in retrieval_metrics(similarity, similarity.T, image_of_text).items():
        metrics[f"itc_{name}"] = value
    return metrics, text_to_image.cpu()


def encode_faces(model: FLIP, faces, precision):
    """Tokens (I, L, D), on the CPU, and features (I, E) of all faces."""
    vit = model.config.vit
    dtype = torch.float32
    if choose_precision(precision, model.device) == "bf16":
        dtype = torch.bfloat16      # cross-attention casts to it anyway; this halves the memory
    tokens = torch.empty(len(faces), vit.num_patches + 1, vit.width, dtype=dtype)
    features = []
    rank, _ = rank_and_world_size()
    batches = iterate_images(faces.picture, len(faces), vit.image_size, "encoding faces",
                             show=rank == 0)
    for indices, pixels in batches:
        encoded = model.student.image_tokens_and_features(pixels.to(model.device))
        tokens[indices.start:indices.stop] = encoded[0]
        features.append(encoded[1])
    return tokens, torch.cat(features)


# ---- the table -----------------------------------------------------------------------------------
def chance_recalls(image_of_text):
    """Expected recalls, in percent, of a random ranking. It misses all n captions of an image in
    its top k with probability C(T - n, k) / C(T, k)."""
    T = len(image_of_text)
    counts = image_of_text.bincount().tolist()      # captions of each image
    I = len(counts)
    recalls = {f"img_r{k}": 100 * min(1.0, k / I) for k in (1, 5, 10)}
    for k in (1, 5, 10):
        subsets = math.comb(T, min(k, T))
        missed = [math.comb(T - n, min(k, T)) / subsets for n in counts]
        recalls[f"txt_r{k}"] = 100 * (1 - sum(missed) / I)
    return recalls


def recall_table(metrics: dict, validation: EvaluationSet, initial: dict | None = None) -> str:
    """The final Markdown table: recalls in percent in both directions, beside chance, the
    references and, if given, the metrics of the model of --init."""
    def recalls(values, prefix=""):
        names = ("img_r1", "img_r5", "img_r10", "txt_r1", "txt_r5", "txt_r10")
        return [values[prefix + name] for name in names]

    rows = {"chance": recalls(chance_recalls(validation.image_of_text))}
    rows |= validation.references
    if initial:
        rows["model of --init, re-ranked"] = recalls(initial)
    rows["this model, ITC alone"] = recalls(metrics, "itc_")
    rows["this model, re-ranked"] = recalls(metrics)

    header = ["recall in %", "text to image R@1", "R@5", "R@10", "image to text R@1", "R@5", "R@10"]
    table = markdown_table(header, [[name, *row] for name, row in rows.items()])
    if validation.ideal_itc:
        table += ("\nideal ITC loss, without queue and soft targets: "
                  f"{validation.ideal_itc:.2f}")
    return table
