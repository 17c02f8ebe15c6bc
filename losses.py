"""The pre-training losses and the retrieval metrics, as pure functions of tensors (FLIP paper, section 4.2).

    ITC  image-text contrastive: an image's feature should be closer to its own caption's than to any other's. It has a file
         of its own, kernels/contrastive.py, whose `reference` is the loss in eight lines
    ITM  image-text matching: shown an image and a caption together, say whether they belong together; asked about the
         pairs that ITC finds hardest to tell apart

Departures from the official code: pairs of the same identity count as positives in batch and queue (there the code for it
exists and is never reached); negatives are masked *before* the softmax, so a row cannot lose all its mass to rounding.

Shapes: B pairs in the batch, K keys (batch and queue), E feature size, P pairs judged, I images and T texts of a gallery,
tau temperature.
"""
import torch
import torch.nn.functional as F


# ---- image-text matching loss --------------------------------------------------------------------------------------
def negative_probabilities(similarity, identity, temperature, hardness=1.0):
    """For each row, the probability with which each column is drawn as its negative, (B, B); pair i is row and column i.

    softmax(hardness * similarity / tau) over the columns of *other* identities: hardness 1 is the paper's rule (similar
    pairs are drawn more often), 0 draws evenly. Every row must have a column of another identity.
    """
    logits = hardness * similarity / temperature
    return logits.masked_fill(identity[:, None] == identity[None, :], -torch.inf).softmax(1)


def matching_loss(logits, is_match, pairs):
    """Two-way cross-entropy of ITM logits (P, 2), class 1 = match; is_match (P,) of 0 and 1. The sum over these pairs as
    a share of the mean over `pairs`, of which other processes may judge the rest."""
    return F.cross_entropy(logits, is_match, reduction="sum") / pairs


# ---- retrieval metrics ---------------------------------------------------------------------------------------------
def best_ranks(scores, is_match):
    """Rank (0 = first) of each row's best-ranked match; scores, is_match (queries, gallery) -> (queries,).

    Ties count against us, and so does what is not a number: whatever does not score below the match ranks above it.
    """
    best = scores.masked_fill(~is_match, -torch.inf).amax(1, keepdim=True)
    return (~(scores < best) & ~is_match).sum(1)


def retrieval_metrics(image_to_text, text_to_image, image_of_text):
    """Recall at 1, 5 and 10 both ways in percent, and their means, by the official names: `txt_` is finding the text for
    an image, `img_` finding the image for a text.

    image_to_text (I, T) scores of every text for an image, text_to_image (T, I); image_of_text (T,): which image each
    caption belongs to (an image may have several: its rank is the best of them).
    """
    is_match = image_of_text[None, :] == torch.arange(len(image_to_text), device=image_of_text.device)[:, None]
    metrics = {}
    for way, ranks in (("txt", best_ranks(image_to_text, is_match)), ("img", best_ranks(text_to_image, is_match.T))):
        recalls = {f"{way}_r{k}": 100 * (ranks < k).double().mean().item() for k in (1, 5, 10)}
        metrics |= recalls | {f"{way}_r_mean": sum(recalls.values()) / 3}
    return metrics | {"r_mean": (metrics["txt_r_mean"] + metrics["img_r_mean"]) / 2}
