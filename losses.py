"""What pre-training minimises, and what it is judged by, as pure functions (FLIP paper, section
4.2).

    ITC  image-text contrastive: an image's feature should be closer to its own caption's than to
         any other's. Cross-entropy of softmax(cosines / temperature) with a target: an even share
         for the captions of the same person, mixed with what the momentum encoder thinks. Written
         down in kernels/contrastive.py, as `reference`, and computed there without ever holding
         all its logits at once
    ITM  image-text matching: shown an image and a caption together, say whether they belong
         together; asked about true pairs and about wrong ones, drawn more often the more similar
         ITC finds them. It stands here

Departures from the official code: pairs of the same identity count as positives in batch and queue
(there the code for it exists and is never reached); negatives are masked *before* the softmax, so a
row cannot lose all its mass to rounding.

Shapes: see vit.py. Run `python losses.py` to see what three faces and three captions become.
"""
import argparse

import torch
import torch.nn.functional as F

from kernels import contrastive
from vit import run_script


# ---- image-text matching -----------------------------------------------------------------------
def negative_probabilities(similarity, identity, temperature, hardness=1.0):
    """For each row, the probability with which each column is drawn as its negative, (B, B); pair i
    is row i and column i.

    softmax(hardness * similarity / temperature) over the columns of *other* identities: hardness 1
    is the paper's rule (similar pairs are drawn more often), 0 draws evenly. Every row must have a
    column of another identity.
    """
    logits = hardness * similarity / temperature
    return logits.masked_fill(identity[:, None] == identity[None, :], -torch.inf).softmax(1)


def matching_cross_entropy(logits, is_match, pairs):
    """Two-way cross-entropy of ITM logits (P, 2), class 1 = match; is_match (P,) of 0 and 1.

    On one process P equals `pairs`, and this is the mean. Several processes share the pairs out
    unevenly: each divides its own sum by their average number, `pairs`, so that the average over
    the processes, which is what DistributedDataParallel takes, is the mean over all pairs. """
    return F.cross_entropy(logits, is_match, reduction="sum") / pairs


# ---- retrieval metrics -------------------------------------------------------------------------
def best_ranks(scores, is_match):
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
    ranks_of = {"txt": best_ranks(image_to_text, is_match), "img": best_ranks(text_to_image, is_match.T)}
    metrics = {}
    for way, ranks in ranks_of.items():
        recalls = {f"{way}_r{k}": 100 * (ranks < k).double().mean().item() for k in (1, 5, 10)}
        metrics |= recalls | {f"{way}_r_mean": sum(recalls.values()) / 3}
    return metrics | {"r_mean": (metrics["txt_r_mean"] + metrics["img_r_mean"]) / 2}


# ==== A first reading may stop here: an example worked by hand ====================================
def main():
    parser = argparse.ArgumentParser(description="Both losses of three faces and captions, step by step.")
    parser.add_argument("--temperature", type=float, default=0.07, help="divides cosines (%(default)s)")
    parser.add_argument("--alpha", type=float, default=0.4, help="share of the soft targets (%(default)s)")
    parser.add_argument("--hardness", type=float, default=1.0, help="of the negatives (%(default)s)")
    args = parser.parse_args()
    if not (args.temperature > 0 and 0 <= args.alpha <= 1 and args.hardness >= 0):
        raise ValueError("expected --temperature above 0, --alpha from 0 to 1, --hardness not below 0")
    identity, temperature = torch.tensor([7, 8, 7]), torch.tensor(args.temperature)
    student = torch.tensor([[0.50, 0.30, 0.40], [0.20, 0.60, 0.25], [0.45, 0.10, 0.50]])
    momentum = torch.tensor([[0.48, 0.35, 0.38], [0.20, 0.55, 0.30], [0.40, 0.12, 0.52]])
    keys = torch.eye(3)         # one-hot: the rows above, taken for features, times these are the cosines
    targets = contrastive.targets(momentum, keys, identity, identity, temperature, args.alpha)
    itc = contrastive.reference(student, momentum, keys, identity, identity, temperature, args.alpha)
    negatives = negative_probabilities(student, identity, temperature, args.hardness)
    logits = torch.tensor([[-1.0, 1.5], [-2.0, 1.0], [0.2, 0.1],            # of the three pairs
                           [1.0, -1.0], [2.0, -1.5], [0.5, 0.3],            # captions with a negative image
                           [0.8, -0.9], [1.1, -1.0], [0.1, 0.6]])           # images with a negative caption
    is_match = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 0])
    for title, shown in (
            ("Three photos (rows) and their captions (columns); the first and third show one person. "
             "Cosines of\nthe student:", student), ("of the momentum encoder:", momentum),
            (f"ITC: what a row should find, {1 - args.alpha:g} x an even share for its person's captions + "
             f"{args.alpha:g} x softmax(\nmomentum encoder's cosines / temperature):", targets),
            ("and its cross-entropy with softmax(student's cosines / temperature) (chance: ln 3):", itc),
            ("ITM: how likely a caption is drawn as the row's negative, the same person's never:", negatives),
            ("P(match) that a head may give to the pairs, to captions with a negative image and to images\n"
             "with a negative caption:", logits.softmax(1)[:, 1].unflatten(0, (3, 3))),
            ("and the cross-entropy (0.6365 without looking):", matching_cross_entropy(logits, is_match, 9))):
        print(f"{title}\n{shown.numpy().round(3) if shown.ndim else round(shown.item(), 3)}\n")


if __name__ == "__main__":
    run_script(main)
