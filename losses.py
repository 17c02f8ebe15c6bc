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

from common.script import run_script


# ---- image-text contrastive ----------------------------------------------------------------------
@torch.no_grad()
def soft_targets(momentum_feature, keys, identity, key_identity, temperature, alpha):
    """y (B, K): how much of a row's mass of 1 each key deserves."""
    same = (identity[:, None] == key_identity[None, :]).to(momentum_feature.dtype)
    soft = (momentum_feature @ keys.T / temperature).softmax(1)
    return alpha * soft + (1 - alpha) * same / same.sum(1, keepdim=True)


def contrastive_loss_reference(feature, momentum_feature, keys, identity, key_identity, temperature, alpha):
    """The loss as the papers write it, with its logits: the rest of this file does without them."""
    logits = feature @ keys.T / temperature                                         # (B, K)
    y = soft_targets(momentum_feature, keys, identity, key_identity, temperature, alpha)
    return -(y * logits.log_softmax(1)).sum(1).mean()


# ---- image-text matching -------------------------------------------------------------------------
def hard_negative_probabilities(similarity, identity, temperature, hardness=1.0):
    """For each row, the probability with which each column is drawn as its negative, (B, B); pair i
    is row i and column i.

    softmax(hardness * similarity / temperature) over the columns of *other* identities: hardness 1
    is the paper's rule (similar pairs are drawn more often), 0 draws evenly. Every row must have a
    column of another identity.
    """
    logits = hardness * similarity / temperature
    return logits.masked_fill(identity[:, None] == identity[None, :], -torch.inf).softmax(1)


def matching_loss(logits, is_match, denominator):
    """Two-way cross-entropy of ITM logits (P, 2), class 1 = match; is_match (P,) of 0 and 1.

    On one process P equals `denominator`, and this is the mean. Several processes share the pairs out
    unevenly: each divides its own sum by their average number, `denominator`, so that the average over
    the processes, which is what DistributedDataParallel takes, is the mean over all pairs. """
    return F.cross_entropy(logits, is_match, reduction="sum") / denominator


# ---- an example worked by hand -------------------------------------------------------------------
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
    wanted = soft_targets(momentum, keys, identity, identity, temperature, args.alpha)
    itc = contrastive_loss_reference(student, momentum, keys, identity, identity, temperature, args.alpha)
    negatives = hard_negative_probabilities(student, identity, temperature, args.hardness)
    logits = torch.tensor([[-1.0, 1.5], [-2.0, 1.0], [0.2, 0.1],            # of the three pairs
                           [1.0, -1.0], [2.0, -1.5], [0.5, 0.3],            # captions with a negative image
                           [0.8, -0.9], [1.1, -1.0], [0.1, 0.6]])           # images with a negative caption
    is_match = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 0])
    for title, shown in (
            ("Three photos (rows) and their captions (columns); the first and third show one person. "
             "Cosines of\nthe student:", student), ("of the momentum encoder:", momentum),
            (f"ITC: what a row should find, {1 - args.alpha:g} x an even share for its person's captions + "
             f"{args.alpha:g} x softmax(\nmomentum encoder's cosines / temperature):", wanted),
            ("and its cross-entropy with softmax(student's cosines / temperature) (chance: ln 3):", itc),
            ("ITM: how likely a caption is drawn as the row's negative, the same person's never:", negatives),
            ("P(match) that a head may give to the pairs, to captions with a negative image and to images\n"
             "with a negative caption:", logits.softmax(1)[:, 1].unflatten(0, (3, 3))),
            ("and the cross-entropy (0.6365 without looking):", matching_loss(logits, is_match, 9))):
        print(f"{title}\n{shown.numpy().round(3) if shown.ndim else round(shown.item(), 3)}\n")


if __name__ == "__main__":
    run_script(main)
