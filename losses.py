"""The two pre-training losses as pure functions (FLIP paper, section 4.2).

    ITC  image-text contrastive loss: an image's feature should be closer to its caption's feature than
         to any other's. Cross-entropy between softmax(cosines / temperature) and a target
         distribution over the keys (`soft_targets`). `contrastive_loss_reference` is its definition;
         training calls kernels.contrastive.contrastive_loss, which computes the same in chunks of
         keys and keeps no logits, on CPUs as well
    ITM  image-text matching: binary classification of image-caption pairs, true ones and hard
         negatives: wrong pairs, sampled with a probability that grows with their cosine

ITC compares features of the *student*, the model that is trained, with *keys*: features of the other
modality computed by the *momentum encoder*, a moving average of the student. The keys are those of
the batch and those of earlier batches, kept in a *queue*. flip.py explains why. ITM uses the student.

Departures from the official code: pairs with the same identity count as positives, in batch and queue
(the official code has a branch for this but never reaches it); positives are masked out *before* the
softmax that gives the negatives' probabilities, so rounding cannot leave a row without mass.

Shapes: see vit.py. Run `python losses.py` for a numerical example.
"""
import torch
import torch.nn.functional as F

from common.script import run_script


# ---- image-text contrastive ----------------------------------------------------------------------
@torch.no_grad()
def soft_targets(momentum_feature, keys, identity, key_identity, temperature, alpha: float):
    """ITC's targets y (B, K), rows sum to 1: alpha x the momentum encoder's softmax over the keys (soft)
    + (1 - alpha) x a uniform distribution over the keys of the row's own identity (positives).

    momentum_feature (B, E), keys (K, E), identity (B,), key_identity (K,); see `contrastive_loss_reference`.
    """
    same = (identity[:, None] == key_identity[None, :]).to(momentum_feature.dtype)
    soft = (momentum_feature @ keys.T / temperature).softmax(1)
    return alpha * soft + (1 - alpha) * same / same.sum(1, keepdim=True)


def contrastive_loss_reference(feature, momentum_feature, keys, identity, key_identity, temperature, alpha):
    """One direction of ITC, mean over the batch, a tensor (): the definition, with all logits in memory.

    feature (B, E): the student's, of one modality; momentum_feature (B, E): the momentum encoder's, of
    the same inputs; keys (K, E): momentum features of the other modality, from batch and queue. All
    have unit norm. Equal numbers in identity (B,) and key_identity (K,) mean the same person."""
    logits = feature @ keys.T / temperature                                         # (B, K)
    y = soft_targets(momentum_feature, keys, identity, key_identity, temperature, alpha)
    return -(y * logits.log_softmax(1)).sum(1).mean()


# ---- image-text matching -------------------------------------------------------------------------
def hard_negative_probabilities(similarity, identity, temperature, hardness=1.0):
    """Probabilities (A, A) for A pairs, the global batch: entry (i, j) that of sampling j as i's negative.

    softmax(hardness * similarity / temperature) over the columns of *other* identities; similarity (A, A)
    are cosines of student features. Hardness 1 is the paper's rule: similar pairs are sampled more often.
    Hardness 0 samples uniformly. Every row needs at least one column of another identity."""
    logits = hardness * similarity / temperature
    return logits.masked_fill(identity[:, None] == identity[None, :], -torch.inf).softmax(1)


def matching_loss(logits, is_match, denominator: int):
    """ITM: two-way cross-entropy of logits (P, 2), class 1 = match; is_match (P,) of 0 and 1.

    With one process P equals `denominator`, and this is the mean. With several, each scores the pairs of
    its own images, so P differs: each divides its sum by the average P, `denominator`, so that the
    average over processes that DistributedDataParallel takes is the mean over all pairs."""
    return F.cross_entropy(logits, is_match, reduction="sum") / denominator


# ---- a numerical example -------------------------------------------------------------------------
def main():
    identity, temperature, alpha = torch.tensor([7, 8, 7]), torch.tensor(0.07), 0.4
    student = torch.tensor([[0.50, 0.30, 0.40], [0.20, 0.60, 0.25], [0.45, 0.10, 0.50]])
    momentum = torch.tensor([[0.48, 0.35, 0.38], [0.20, 0.55, 0.30], [0.40, 0.12, 0.52]])
    keys = torch.eye(3)         # one-hot: with the rows above as features, these products are the cosines
    targets = soft_targets(momentum, keys, identity, identity, temperature, alpha)
    itc = contrastive_loss_reference(student, momentum, keys, identity, identity, temperature, alpha)
    negatives = hard_negative_probabilities(student, identity, temperature)
    logits = torch.tensor([[-1.0, 1.5], [-2.0, 1.0], [0.2, 0.1],            # of the three pairs
                           [1.0, -1.0], [2.0, -1.5], [0.5, 0.3],            # captions with a negative image
                           [0.8, -0.9], [1.1, -1.0], [0.1, 0.6]])           # images with a negative caption
    is_match = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 0])
    for title, shown in (
            ("Three images (rows) and their captions (columns); images 1 and 3 show the same person.\n"
             "Cosines of the student:", student), ("Cosines of the momentum encoder:", momentum),
            (f"ITC targets (`soft_targets`): {1 - alpha:g} x uniform over the same person's captions + "
             f"{alpha:g} x\nsoftmax(momentum encoder's cosines / temperature):", targets),
            ("ITC loss: cross-entropy between these targets and softmax(student's cosines / temperature):",
             itc),
            ("ITM: probability of sampling each caption as the row's negative, never the same person's:",
             negatives),
            ("P(match) that a matching head might output for the pairs, for captions with a negative image\n"
             "and for images with a negative caption:", logits.softmax(1)[:, 1].unflatten(0, (3, 3))),
            ("ITM loss: cross-entropy of these predictions (0.6365 for always predicting P(match) = 1/3):",
             matching_loss(logits, is_match, 9))):
        print(f"{title}\n{shown.numpy().round(3) if shown.ndim else round(shown.item(), 3)}\n")


if __name__ == "__main__":
    run_script(main)
