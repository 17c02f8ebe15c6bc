"""The score of a perfect model on generated captions: recall of two rankings by the true
attributes, and the lowest possible contrastive loss. Both follow from the probabilities with which
captions.py states facts.

Shapes: I images (faces) with 40 attributes, T captions, N faces of the population. `stated` is that
of `sample_caption`: which of the 43 facts a caption states."""
import numpy as np

from captions import MIN_FACTS, PROBABILITIES, facts_of


def satisfies(stated: np.ndarray, attributes: np.ndarray) -> np.ndarray:
    """Which faces satisfy all stated facts: bool (T, 43), bool (I, 40) -> bool (T, I)."""
    num_false = stated.astype(float) @ ~facts_of(attributes).T                      # (T, I)
    return num_false == 0


def log_likelihood(stated: np.ndarray, attributes: np.ndarray) -> np.ndarray:
    """ln P(caption states exactly these facts | face): bool (T, 43), bool (I, 40) -> float (T, I).

    Let `facts` be the facts of the face and p their probabilities. A caption states the set
    `stated` with probability
        prod_{i in stated} p_i * prod_{i in facts - stated} (1 - p_i)
            / P(at least MIN_FACTS are stated)
    or 0 if `stated` is not a subset of `facts`. Unlike in `satisfies`, unstated facts count against
    a face.
    """
    facts = facts_of(attributes)
    log_odds = np.log(PROBABILITIES) - np.log1p(-PROBABILITIES)                     # (43,)
    of_caption = stated @ log_odds                                                  # (T,)
    none_stated = facts @ np.log1p(-PROBABILITIES)                                  # (I,)
    log_p = of_caption[:, None] + none_stated - np.log(prob_min_facts(facts))       # (T, I)
    return np.where(satisfies(stated, attributes), log_p, -np.inf)


def prob_min_facts(facts):
    """P(a single sample states at least MIN_FACTS facts): bool (I, 43) -> float (I,)."""
    exactly = np.zeros((MIN_FACTS, len(facts)))     # P(exactly k stated so far), k < MIN_FACTS
    exactly[0] = 1
    for p in (facts * PROBABILITIES).T:             # p (I,) of one fact, 0 for faces without it
        one_more = exactly[:-1] * p
        exactly *= 1 - p
        exactly[1:] += one_more
    return 1 - exactly.sum(0)


def expected_recall(scores: np.ndarray, k: tuple[int, ...] = (1, 5, 10)) -> list[float]:
    """Expected recall at each n in k, in percent, of scores (I, I), queries x candidates, with
    matches on the diagonal. Ties are broken at random: with `better` candidates above the match and
    `tied` candidates equal to it (including itself), the match is in the top n with probability
    (n - better) / tied, clipped to [0, 1]."""
    true = np.diag(scores)[:, None]
    better = (scores > true + 1e-9).sum(1)          # tolerance: tied scores may differ by rounding
    tied = (scores >= true - 1e-9).sum(1) - better
    recalls = []
    for n in k:
        in_top = np.clip((n - better) / tied, 0, 1)
        recalls.append(100 * float(in_top.mean()))
    return recalls


def reference_recall(stated: np.ndarray, attributes: np.ndarray) -> dict:
    """Recall in percent of two rankings by the true attributes, {reference: [text to image at 1, 5
    and 10, image to text at 1, 5 and 10]}. Caption i was sampled for face i; stated bool (I, 43),
    attributes bool (I, 40).

    "attribute match": all candidates that satisfy the stated facts tie. "Bayes optimum": the
    Bayes-optimal ranking under the grammar. Text to image, with a uniform prior over faces, it
    ranks faces by P(stated | face). Image to text, it ranks captions by the posterior of this face
    in the gallery, P(stated | face) / sum over faces of P(stated | face). So a long caption that
    fits only this face, with a tiny likelihood, ranks above a short one that fits all faces. (Each
    pair is scored on its own, as by a model: the rankings do not use that each face has exactly one
    caption.)"""
    fits = satisfies(stated, attributes)
    log_p = log_likelihood(stated, attributes)
    posterior = log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True)
    return {"attribute match": expected_recall(fits) + expected_recall(fits.T),
            "Bayes optimum": expected_recall(log_p) + expected_recall(posterior.T)}


def ideal_contrastive_loss(stated, attributes, population, batch_size: int) -> float:
    """Expected ITC loss in nats, mean of both directions, of the best possible score of a pair: log
    P(stated | face) - log P(stated) (arXiv 1807.03748, section 2.3). No model's expected loss on
    new faces is lower.

    stated bool (I, 43) and attributes bool (I, 40) are divided into batches of `batch_size` <= I
    pairs; an incomplete last batch is dropped. P(stated) is a mean over the faces of the batch and
    of `population`, bool (N, 40)."""
    losses = []
    for start in range(0, len(stated) - batch_size + 1, batch_size):
        batch = slice(start, start + batch_size)
        faces = np.concatenate([attributes[batch], population])
        log_p = log_likelihood(stated[batch], faces)                                # (B, B + N)
        log_sum = np.logaddexp.reduce(log_p, axis=1, keepdims=True)                 # (B, 1)
        log_prior = log_sum - np.log(len(faces))
        scores = log_p[:, :batch_size] - log_prior                                  # (B, B)
        for axis in (0, 1):
            losses.append(np.logaddexp.reduce(scores, axis) - np.diag(scores))
    return float(np.mean(losses))
