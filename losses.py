"""The two pre-training losses as pure functions (FLIP paper, section 4.2).

    ITC  image-text contrastive loss: an image's feature should be closer to its caption's feature
         than to any other's. Cross-entropy between softmax(cosines / temperature) and a target
         distribution over the keys (`soft_targets`). With momentum encoder and queue,
         `contrastive_loss_reference` is its definition; training calls `contrastive_loss`, which
         computes the same in chunks of keys and stores no logits. Within the batch, it is CLIP's
         loss, `clip_loss`.
    ITM  image-text matching: binary classification of image-caption pairs, true ones and hard
         negatives: wrong pairs, sampled with a probability that grows with their cosine.

ITC compares features of the *student*, the model that is trained, with *keys*, features of the
other modality. In complete FLIP, the *momentum encoder*, a moving average of the student, computes
the keys of the batch; those of earlier batches are kept in a *queue*; and keys have no gradient.
flip.py explains why. In CLIP's loss, the keys are the student's own features of the batch, and have
a gradient. ITM classifies pairs; only the sampling of its negatives compares features.

Departures from the official code: pairs with the same identity count as positives, in batch and
queue (the official code has a branch for this but never reaches it); positives are masked out
*before* the softmax that gives the negatives' probabilities, so that rounding cannot leave a row
without a candidate.

Shapes: see attention.py. Run `python losses.py` for a numerical example.
"""
import torch
import torch.nn.functional as F

from kernels.contrastive import supports_contrastive, triton_average_keys


# ---- image-text contrastive ----------------------------------------------------------------------
@torch.no_grad()
def soft_targets(momentum_feature, keys, identity, key_identity, temperature, alpha: float):
    """ITC's targets y (B, K), rows sum to 1: alpha x the momentum encoder's softmax over the keys
    (soft) + (1 - alpha) x a uniform distribution over the keys of the row's own identity
    (positives). The arguments are those of `contrastive_loss_reference`."""
    soft = (momentum_feature @ keys.T / temperature).softmax(1)
    return alpha * soft + (1 - alpha) * positive_targets(identity, key_identity, soft.dtype)


def positive_targets(identity, key_identity, dtype):
    """A uniform distribution over the keys of each row's own identity, (B, K)."""
    same = (identity[:, None] == key_identity[None, :]).to(dtype)
    return same / same.sum(1, keepdim=True)


def contrastive_loss_reference(feature, momentum_feature, keys, identity, key_identity, temperature,
                               alpha):
    """One direction of ITC, mean over the batch, a scalar tensor: the definition, with all logits
    in memory.

    feature (B, E): the student's, of one modality; momentum_feature (B, E): the momentum encoder's,
    of the same inputs; keys (K, E): momentum features of the other modality, from batch and queue.
    All have unit norm. Equal numbers in identity (B,) and key_identity (K,) mean the same person;
    every row needs a key of its own identity. temperature: a scalar tensor."""
    logits = feature @ keys.T / temperature                             # (B, K)
    y = soft_targets(momentum_feature, keys, identity, key_identity, temperature, alpha)
    return -(y * logits.log_softmax(1)).sum(1).mean()


def clip_loss(image, text, image_keys, text_keys, identity, key_identity, temperature):
    """ITC within the batch, both directions, a scalar tensor: CLIP's loss (arXiv 2103.00020, figure
    3), except that equal identities are positives. Gradients flow into all features.

    image and text (B, E): the student's features of this process, of unit norm; image_keys and
    text_keys (A, E): those of all processes, with gradient; identity (B,), key_identity (A,).
    Features are float32 or float64, and so is all of the computation, even under autocast."""
    targets = positive_targets(identity, key_identity, image.dtype)
    with torch.autocast(image.device.type, enabled=False):
        image_to_text = F.cross_entropy(image @ text_keys.T / temperature, targets)
        text_to_image = F.cross_entropy(text @ image_keys.T / temperature, targets)
    return (image_to_text + text_to_image) / 2


# ---- image-text matching -------------------------------------------------------------------------
def hard_negative_probabilities(similarity, identity, temperature):
    """Probabilities (A, A), for the A pairs of the global batch, that column j is sampled as the
    negative of row i.

    softmax(similarity / temperature) over the columns of *other* identities: similar pairs are
    sampled more often. similarity (A, A): cosines of student features. Every row needs at least one
    column of another identity."""
    logits = similarity / temperature
    return logits.masked_fill(identity[:, None] == identity[None, :], -torch.inf).softmax(1)


def matching_loss(logits, is_match, denominator: int):
    """ITM: two-way cross-entropy of logits (P, 2), class 1 = match; is_match (P,) of 0 and 1.

    With one process, `denominator` is P and the result is the mean. With several, P varies, because
    each process scores the pairs of its own images. Dividing each sum by the average P makes the
    average over processes, which DistributedDataParallel takes, equal the mean over all pairs."""
    return F.cross_entropy(logits, is_match, reduction="sum") / denominator


# ---- ITC without its logits ----------------------------------------------------------------------
# For one row, let q be the student's feature, m the momentum encoder's, k_j the keys and y the
# target (ALBEF, arXiv 2107.07651, eq. 1, 2 and 6):
#
#     s_j = q k_j / tau      t_j = m k_j / tau      y = alpha softmax(t) + (1 - alpha) e
#     loss = -sum_j y_j log softmax(s)_j
#
# where e is uniform over the positives, the keys of the row's own identity, and sums to 1; no
# gradient flows into y. The logits of 80 rows and 62,080 keys (8 x 80, and the queue) take 20 MB,
# written and read several times. But y sums to 1, and s is linear in k:
#
#     loss = log sum_j exp(s_j) - q k* / tau    k* = sum_j y_j k_j, the average key under the target
#     dq   = (k' - k*) / tau                    k' = sum_j softmax(s)_j k_j, under the student
#     dtau = -q dq / tau
#
# So each row needs only three average keys, under softmax(s), softmax(t) and e, and one
# log-sum-exp; and an average under a softmax is *attention with the keys as values*. It is computed
# as in FlashAttention: the keys are processed in chunks, and each row keeps the largest logit so
# far, the sum of weights and the weighted sum of keys. One pass over the keys gives the loss and
# both gradients; the backward pass only scales them. In the code:
#
#     q   feature                s_j, t_j   the two rows of `logits`
#     m   momentum_feature       k'         student_mean, the average under softmax(s)
#     k*  target_mean            alpha momentum_mean + (1 - alpha) positive_mean


def average_keys(feature, momentum_feature, keys, identity, key_identity, temperature, chunk=2048):
    """Each row's log-sum-exp of s, (B,), and its average keys under softmax(s), softmax(t) and e,
    (B, E)."""
    queries = torch.stack([feature, momentum_feature]) / temperature    # (2, B, E)
    max_logit = queries.new_full(queries.shape[:2], -torch.inf)         # (2, B)
    weight_sum = torch.zeros_like(max_logit)                            # (2, B)
    key_sum = torch.zeros_like(queries)                                 # (2, B, E)
    num_positives = torch.zeros_like(max_logit[0])                      # (B,)
    positive_sum = torch.zeros_like(feature)                            # (B, E)
    keys = keys.to(feature.dtype)
    for k, k_identity in zip(keys.split(chunk), key_identity.split(chunk)):
        logits = queries @ k.T                                          # (2, B, chunk)
        new_max = torch.maximum(max_logit, logits.amax(-1))
        rescale = (max_logit - new_max).exp()   # all weights are relative to exp(max_logit)
        weights = logits.sub_(new_max[..., None]).exp_()
        weight_sum = rescale * weight_sum + weights.sum(-1)
        key_sum = rescale[..., None] * key_sum + weights @ k
        max_logit = new_max
        same = identity[:, None] == k_identity[None, :]                 # (B, chunk)
        if same.any():                              # most chunks have no positives
            num_positives += same.sum(-1)
            positive_sum += same.to(k.dtype) @ k
    student_mean, momentum_mean = key_sum / weight_sum[..., None]
    positive_mean = positive_sum / num_positives[:, None]
    return max_logit[0] + weight_sum[0].log(), student_mean, momentum_mean, positive_mean


class ContrastiveLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, feature, momentum_feature, keys, identity, key_identity, temperature, alpha):
        average = average_keys
        if supports_contrastive(feature):
            average = triton_average_keys
        with torch.autocast(feature.device.type, enabled=False):
            log_sum_exp, student_mean, momentum_mean, positive_mean = average(
                feature, momentum_feature, keys, identity, key_identity, temperature)
        target_mean = alpha * momentum_mean + (1 - alpha) * positive_mean       # (B, E)
        loss = log_sum_exp - (feature * target_mean).sum(1) / temperature       # (B,)
        d_feature = (student_mean - target_mean) / temperature
        d_temperature = -(feature * d_feature).sum(1) / temperature
        ctx.save_for_backward(d_feature / len(feature), d_temperature.mean())
        return loss.mean()

    @staticmethod
    def backward(ctx, grad_loss):
        d_feature, d_temperature = ctx.saved_tensors
        return grad_loss * d_feature, None, None, None, None, grad_loss * d_temperature, None


def contrastive_loss(feature, momentum_feature, keys, identity, key_identity, temperature,
                     alpha):
    """`contrastive_loss_reference` in chunks of keys; gradients flow into feature and temperature
    only.

    Computed in float32 (or float64), even under autocast: half-precision cosines are too coarse to
    be divided by a temperature of 0.01."""
    dtype = torch.promote_types(feature.dtype, torch.float32)
    return ContrastiveLoss.apply(feature.to(dtype), momentum_feature.to(dtype), keys, identity,
                                 key_identity, temperature.to(dtype), alpha)


# ---- a numerical example -------------------------------------------------------------------------
def main():
    """Print both losses of three images and their captions. The first and the last image show the
    same person."""
    torch.set_printoptions(precision=3)
    identity = torch.tensor([7, 8, 7])
    temperature = torch.tensor(0.07)
    alpha = 0.4
    student = torch.tensor([[0.50, 0.30, 0.40], [0.20, 0.60, 0.25], [0.45, 0.10, 0.50]])
    momentum = torch.tensor([[0.48, 0.35, 0.38], [0.20, 0.55, 0.30], [0.40, 0.12, 0.52]])
    keys = torch.eye(3)         # so the products with the keys are the rows above (which, for
                                # readability, are not of unit norm)

    def show(title, value):
        print(f"{title}\n{value}\n")

    show("Cosines of the student, images x captions:", student)
    show("Cosines of the momentum encoder:", momentum)
    shared = identity, identity, temperature, alpha
    show("ITC targets: 0.6 over the person's captions + 0.4 x the momentum encoder's softmax:",
         soft_targets(momentum, keys, *shared))
    show("ITC loss, their cross-entropy with the student's softmax:",
         contrastive_loss_reference(student, momentum, keys, *shared))

    show("ITM: probability of sampling a caption as an image's negative, never the same person's:",
         hard_negative_probabilities(student, identity, temperature))
    logits = torch.tensor([[-1.0, 1.5], [2.0, -1.5], [0.1, 0.6]])
    show("ITM: P(match) of a true pair and two wrong ones:", logits.softmax(1)[:, 1])
    show("ITM loss, their cross-entropy (0.6365 for always predicting P(match) = 1/3):",
         matching_loss(logits, torch.tensor([1, 0, 0]), denominator=3))


if __name__ == "__main__":
    main()
