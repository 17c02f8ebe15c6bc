"""Three tasks on a frozen FLIP (FLIP paper, section 5 and figure 2, panels b to d).

    python finetune.py retrieval  --checkpoint out/flip.pt      find the face for a sentence and the sentence for a face
    python finetune.py attributes --checkpoint out/flip.pt      name the 40 attributes of a face
    python finetune.py sketch     --checkpoint out/flip.pt      find the photo from a sketch that is still being drawn

Without --data they run on drawn faces, in a few minutes on two CPU cores; with it, on your own (see data.py). The encoders
are frozen: evaluation mode, no gradient, no optimiser state. What they make of a picture is therefore computed once, before
the first epoch, and only a small head is trained on it: the projections, the matching head and the temperature that FLIP
has already (retrieval, sketch), or a linear layer on pooled tokens (attributes).

A task is a row of TASKS: what is computed once, what is trained, its loss, its metrics. Several checkpoints can be given;
each is tuned in the same way, a frozen encoder of random weights as well, and the table puts them side by side. The best
evaluation on the validation part decides what is kept; the test part is read once, at the end.

Departures from the official code: it chooses the best epoch on the test part, trains LFWA's head on the test part, and
leaves dropout on inside the "frozen" encoders.

Into --out go log.jsonl, table.md, the tuned heads and the pictures of the task.

Shapes: N pictures, L image tokens, D width, E feature size, B samples of a batch, V vectors pooled per picture, A attributes,
T captions (retrieval) or steps of a sketch (sketch).
"""
import argparse
import copy
import dataclasses
import math
import time
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

import data
from bert import Captions, Tokenizer
from data import ATTRIBUTES
from flip import FLIP, contact_sheet, read_checkpoint, rerank, write_whole
from kernels.contrastive import contrastive_loss
from losses import retrieval_metrics
from train import Log, Validation, add_flags, flag, given_flags, initialise_small, ramp, retrieval_sheet
from vit import to_tensor


# ---- configuration -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    """Every field is a flag. The defaults are the paper's for retrieval; RECIPES says what other tasks, and drawn faces, change."""
    task: str = ""
    checkpoint: tuple[str, ...] = flag(("out/flip.pt",), "one or more: made by train.py, or the official FLIP-base.pth")
    vocabulary: str = flag("", "vocab.txt, tokenizer.json, folder or hub name; the official checkpoint does not hold one")
    data: str = flag("", "folder with your own faces; without it faces are drawn and kept in --cache")
    out: str = flag("out", "results go into a folder below it, named after the task")
    cache: str = flag("cache", "folder for the drawn faces")
    faces: int = flag(4000, "how many faces to draw for training")
    test_faces: int = flag(1000, "how many to draw for the test part; half as many for validation")
    seed: int = flag(0, "of the random encoder, new weights, order, captions, negatives")
    epochs: int = flag(50, "passes over the training part")
    batch_size: int = flag(64, "samples per step")
    lr: float = flag(3e-5, "highest learning rate; it falls to 0 along a cosine")
    warmup: int = flag(2000, "steps in which the learning rate rises")
    weight_decay: float = flag(0.05, "of AdamW")
    itm_every: int = flag(1, "train the matching head at each n-th step")
    hardness: float = flag(1.0, "of the negatives that the matching head sees: 1 draws them by similarity, 0 evenly")
    views: int = flag(1, "versions of each training picture to encode: the first as it is, others as the augmentation shows it")
    fractions: tuple[float, ...] = flag((0.01, 0.1, 1.0), "attributes: shares of the training part, each a run of its own")
    columns: tuple[str, ...] = flag((), "attributes: names of the attributes to learn, where others are not known (default: all)")
    evaluations: int = flag(5, "how often to look at the validation part; the best look decides")
    k_test: int = flag(256, "candidates per query that the matching head scores again")
    memory: float = flag(4.0, "GB that the image tokens of a part may take in memory; larger ones go into a file in --out")

    def __post_init__(self):
        for name, least in dict(faces=2, test_faces=4, epochs=1, batch_size=2, itm_every=1, views=1, evaluations=1, k_test=1).items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: expected at least {least}")
        for name in ("seed", "lr", "warmup", "weight_decay", "hardness", "memory"):
            if not 0 <= getattr(self, name) < 2 ** 62:
                raise ValueError(f"--{name} {getattr(self, name)}: expected a number that is not negative")
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError(f"--fractions {self.fractions}: expected shares above 0 and at most 1")
        unknown = [name for name in self.columns if name not in ATTRIBUTES]
        if unknown:
            raise ValueError(f"--columns: there is no attribute {', '.join(unknown)}; expected some of {' '.join(ATTRIBUTES)}")
        if self.task == "sketch" and self.views > 1:
            raise ValueError("--views: a sketch and its photo must show the same; the augmentation would move only the photo")


# The paper's settings of each task, then what drawn faces and a tiny model need to be done within minutes. The official
# learning rate of the attribute head is 0.3 on CelebA and 0.003 on LFWA, for plain gradient descent.
RECIPES = {"retrieval": {}, "attributes": dict(epochs=100, batch_size=256, lr=1e-3, warmup=0, weight_decay=0.0),
           "sketch": dict(epochs=100, lr=1e-4, warmup=200)}
DRAWN = {"retrieval": dict(epochs=30, batch_size=256, lr=3e-3, warmup=20, itm_every=5, k_test=16, faces=2000),
         "attributes": dict(epochs=60, lr=3e-3),
         "sketch": dict(epochs=150, batch_size=128, lr=1e-2, warmup=20, itm_every=10, faces=800, test_faces=200)}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tuple(RECIPES))
    drawn = {f"{task} on drawn faces": RECIPES[task] | DRAWN[task] for task in RECIPES}
    add_flags(parser, Config, RECIPES | drawn)
    given = given_flags(parser, argv)
    recipe = RECIPES[given["task"]] | ({} if given.get("data") else DRAWN[given["task"]])
    return Config(**recipe | given)


# ---- what the frozen encoders have to say, once --------------------------------------------------------------------
def freeze(model):
    """Evaluation mode, no gradients: nothing that is done with the encoders from here on can change them."""
    return model.eval().requires_grad_(False)


def storage(shape, dtype, config):
    """An empty tensor: in memory, or, where it is larger than --memory, float16 in a file that is gone when the run ends."""
    size = math.prod(shape)
    if size * dtype.itemsize <= config.memory * 1e9:
        return torch.empty(shape, dtype=dtype)
    path = Path(config.out) / f"tokens-{time.time_ns()}.f16"
    path.parent.mkdir(parents=True, exist_ok=True)
    tensor = torch.from_file(str(path), shared=True, size=size, dtype=torch.float16).view(shape)
    path.unlink()                                           # the mapping lives on; the name need not
    return tensor


@torch.no_grad()
def encode(compute, read, count, size, config, device, what, batch_size=128):
    """compute(pixels (n, 3, size, size)) for pictures read(0) to read(count - 1), on the CPU: (count, ...)."""
    out = None
    with ThreadPool() as pool, torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for start in tqdm(range(0, count, batch_size), what, leave=False):
            stop = min(start + batch_size, count)
            pixels = torch.stack(pool.map(lambda i: to_tensor(read(i), size), range(start, stop)))
            values = compute(pixels.to(device)).float().cpu()
            if out is None:
                out = storage((count, *values.shape[1:]), values.dtype, config)
            out[start:stop] = values
    return out


def view_of(faces, view, size, seed):
    """Reader of picture i in one of its views: as it is (0), or as the augmentation of pre-training would show it."""
    def read(i):
        if view == 0:
            return faces.picture(i)
        picture = faces.picture(i).resize((size, size), Image.Resampling.BICUBIC)
        return data.augment(picture, np.random.default_rng((seed, view, i)))
    return read


def encode_views(compute, faces, views, model, config):
    """compute() of every picture in every view, (views, N, ...)."""
    size, device = model.config.vit.image_size, model.temperature.device
    return [encode(compute, view_of(faces, view, size, config.seed), len(faces), size, config, device,
                   f"encoding {faces.name}" + f", view {view + 1}" * (views > 1)) for view in range(views)]


# ---- attributes: pooled tokens of four depths, LayerNorm, weighted sum, linear -------------------------------------
def pooled(vit, images):
    """Images (B, 3, S, S) -> (B, V, D): after a third, half and two thirds of the blocks (4, 6 and 8 of 12), before any final
    norm, and at the end, after it: the class token, and mean and maximum of the patch tokens."""
    tokens, hidden = vit(images, return_hidden=True)
    depths = sorted({round(vit.config.depth * share) for share in (1 / 3, 1 / 2, 2 / 3)})
    vectors = [vector for x in (*(hidden[depth - 1] for depth in depths), tokens)
               for vector in (x[:, 0], x[:, 1:].mean(1), x[:, 1:].amax(1))]
    return torch.stack(vectors, dim=1)


class AttributeHead(nn.Module):
    """Pooled vectors (B, V, D) -> logits (B, A): one LayerNorm for all, a learned weighted sum of the V, a linear layer."""

    def __init__(self, vectors, width, labels):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.weights = nn.Parameter(torch.full((vectors,), 1 / vectors))
        self.linear = nn.Linear(width, labels)

    def forward(self, x):
        return self.linear(torch.einsum("v,bvd->bd", self.weights, self.norm(x)))


@dataclass(frozen=True)
class Labelled:
    vectors: list           # one (N, V, D) for each view
    labels: torch.Tensor    # (N, A) float, 0 or 1
    names: tuple            # of the A attributes

    def __len__(self):
        return len(self.labels)

    def part(self, indices):
        return Labelled([view[indices] for view in self.vectors], self.labels[indices], self.names)


def encode_attributes(model, faces, config, training):
    if faces.attributes is None:
        raise ValueError(f"{faces.name}: attributes are to be learned, but these faces have none")
    names = config.columns or ATTRIBUTES
    labels = torch.from_numpy(faces.attributes[:, [ATTRIBUTES.index(name) for name in names]]).float()
    vectors = encode_views(lambda images: pooled(model.student.image, images), faces, config.views if training else 1, model, config)
    return Labelled(vectors, labels, names)


def attribute_loss(head, samples, indices, rng, step):
    """Binary cross-entropy, mean over samples and labels."""
    vectors = samples.vectors[rng.integers(len(samples.vectors))][indices].float()
    device = head.weights.device
    return F.binary_cross_entropy_with_logits(head(vectors.to(device)), samples.labels[indices].to(device))


def average_precision(scores, labels):
    """Mean precision at the rank of each positive (scores and labels (N,)); ties in the order of the samples."""
    hits = labels[scores.argsort(descending=True, stable=True)].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return (precision * hits).sum() / hits.sum()


@torch.no_grad()
def attribute_metrics(head, samples):
    """In percent. Accuracy counts a rare attribute as nearly solved by who never names it; balanced accuracy, the mean of the
    rates at which the present and the absent are recognised, and average precision do not. Means over the labels; an attribute
    that everyone or nobody has counts in accuracy only."""
    logits = torch.cat([head(part.float().to(head.weights.device)).cpu() for part in samples.vectors[0].split(1024)])
    truth, said = samples.labels.bool(), logits > 0
    accuracy = (said == truth).double().mean(0)                                             # (A,)
    present = (said & truth).sum(0) / truth.sum(0)
    absent = (~said & ~truth).sum(0) / (~truth).sum(0)
    balanced = (present.double() + absent.double()) / 2                                     # nan without one of the two
    precision = torch.stack([average_precision(logits[:, a], truth[:, a]) for a in range(truth.shape[1])])
    precision[balanced.isnan()] = torch.nan
    majority = torch.maximum(truth.double().mean(0), 1 - truth.double().mean(0))
    per_label = {name: [100 * x[a].item() for x in (accuracy, balanced, precision, majority)] for a, name in enumerate(samples.names)}
    return {"accuracy": 100 * accuracy.mean().item(), "balanced": 100 * balanced.nanmean().item(),
            "precision": 100 * precision.nanmean().item(), "majority": 100 * majority.mean().item(), "per_label": per_label}


# ---- retrieval: FLIP's own projections, matching head and temperature ----------------------------------------------
class Heads(nn.Module):
    """The small parts of a FLIP, to be trained further; `model` as a whole is what they belong to."""

    def __init__(self, model):
        super().__init__()
        self.image_projection, self.text_projection = model.student.image_projection, model.student.text_projection
        self.matching_head, self.temperature = model.matching_head, model.temperature
        self.belongs_to = [model]                           # in a list, so that its encoders do not become parts of this

    @property
    def model(self):
        return self.belongs_to[0]

    def image_features(self, first):
        """Class tokens (B, D) -> features (B, E) of length 1; a sketch's like a photo's."""
        return F.normalize(self.image_projection(first.float().to(self.temperature.device)), dim=-1)

    def text_features(self, first):
        return F.normalize(self.text_projection(first.float().to(self.temperature.device)), dim=-1)


@dataclass(frozen=True)
class Paired:
    """Faces with captions, as the frozen encoders see them."""
    tokens: list                    # (N, L, D) for each view
    captions: Captions              # T of them
    text: torch.Tensor              # (T, D) their [CLS] tokens
    image_of_text: torch.Tensor     # (T,)
    identity: torch.Tensor          # (N,)
    config: Config

    def __len__(self):
        return len(self.identity)


def texts_of(faces, count):
    """(texts, image_of_text): all captions that came with the faces, or `count` of the grammar for each."""
    given = faces.captions or [[faces.caption(i, np.random.default_rng((2, i, n))) for n in range(count)] for i in range(len(faces))]
    return [text for texts in given for text in texts], torch.arange(len(faces)).repeat_interleave(torch.tensor(list(map(len, given))))


def encode_pairs(model, faces, config, training):
    """Image tokens of all pictures and [CLS] of all captions; for evaluation one caption a face, as in pre-training."""
    if training:
        texts, image_of_text = texts_of(faces, 8)
    else:
        _, texts, image_of_text, _ = Validation.of(faces)
    tokens = encode_views(model.student.image, faces, config.views if training else 1, model, config)
    captions = model.tokenizer(texts)
    return Paired(tokens, captions, encode_captions(model, captions), image_of_text, torch.from_numpy(faces.identity), config)


@torch.no_grad()
def encode_captions(model, captions, batch_size=500):
    """The [CLS] token of each caption, (T, D)."""
    device = model.temperature.device
    parts = torch.arange(len(captions)).split(batch_size)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return torch.cat([model.student.text(captions.select(part).to(device), first_only=True).float().cpu()
                          for part in tqdm(parts, "encoding captions", leave=False)])


def contrast(rows, keys, identity, temperature):
    """The contrastive loss both ways within a batch, features (B, E) each. No queue and no momentum encoder: behind frozen
    encoders all keys of a batch are as fresh as can be."""
    def one_way(a, b):
        return contrastive_loss(a, a, [b.detach()], identity, [identity], temperature, alpha=0.0)
    return (one_way(rows, keys) + one_way(keys, rows)) / 2


def pair_loss(heads, samples, indices, rng, step):
    """ITC + ITM of the pictures `indices` (B,), each with one of its captions; see losses.py and flip.py. The features and the
    matching head have no weight in common, so ITM, which costs a pass of the text encoder, need not be asked at every step."""
    model, config, captions = heads.model, samples.config, caption_of(samples, indices, rng)
    tokens = samples.tokens[rng.integers(len(samples.tokens))]                              # of one view
    image, text = heads.image_features(tokens[indices, 0]), heads.text_features(samples.text[captions])
    identity = samples.identity[indices].to(image.device)
    itc = contrast(image, text, identity, model.temperature)
    if step % config.itm_every:
        return itc
    generator = torch.Generator().manual_seed(int(rng.integers(2 ** 62)))
    negatives = model.draw_negatives(image.detach(), text.detach(), identity, config.hardness, generator)
    packed = samples.captions.select(captions).to(image.device)
    return itc + model.matching(tokens[indices].float().to(image.device), packed, *negatives)


def caption_of(samples, indices, rng):
    """One of the captions of each picture, by chance: numbers (B,)."""
    first = torch.searchsorted(samples.image_of_text, indices)
    count = torch.searchsorted(samples.image_of_text, indices, right=True) - first
    return first + (torch.from_numpy(rng.random(len(indices))) * count).long()


@torch.no_grad()
def pair_metrics(heads, samples):
    """Recalls in percent by the official names, by cosine alone ("itc_...") and re-ranked; scores (T, N) for the picture."""
    device = heads.temperature.device
    similarity = heads.image_features(samples.tokens[0][:, 0]) @ heads.text_features(samples.text).T                # (N, T)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        scores = rerank(heads.model, samples.tokens[0], samples.captions.to(device), similarity, samples.config.k_test, progress=True)
    image_of_text = samples.image_of_text.to(device)
    itc = retrieval_metrics(similarity, similarity.T, image_of_text)
    return {f"itc_{name}": value for name, value in itc.items()} | retrieval_metrics(*scores, image_of_text) | {"scores": scores[1].cpu()}


# ---- sketch: photos and growing sketches through the same encoder and projection ------------------------------------
@dataclass(frozen=True)
class Sketched:
    photos: Paired | None           # with captions, or
    first: torch.Tensor             # (N, D) class tokens of the photos alone
    sketches: torch.Tensor          # (N, T, D) class tokens of the sketches, from the first stroke to the last
    identity: torch.Tensor          # (N,)

    def __len__(self):
        return len(self.first)


def encode_sketches(model, episodes, config, training):
    """Class tokens of all steps of all sketches; of the photos all tokens where there are captions to match them with."""
    photos, T, size = episodes.photos, episodes.steps, model.config.vit.image_size
    has_text = photos.captions is not None or photos.attributes is not None
    paired = encode_pairs(model, photos, config, training) if has_text and training else None
    device = model.temperature.device
    class_token = lambda images: model.student.image(images, first_only=True)
    first = paired.tokens[0][:, 0].float() if paired else encode_views(class_token, photos, 1, model, config)[0]
    # Encoders that have seen photographs only are more at home with dark lines on a light ground.
    sketches = encode(class_token, lambda n: ImageOps.invert(episodes.sketch(n // T, n % T)), len(photos) * T, size, config, device,
                      f"encoding the sketches of {photos.name}")
    return Sketched(paired, first, sketches.unflatten(0, (len(photos), T)), torch.from_numpy(photos.identity))


def sketch_loss(heads, samples, indices, rng, step):
    """IIC, the contrastive loss between a step of the sketch and its photo, plus ITC + ITM of the photo where it has captions."""
    steps = torch.from_numpy(rng.integers(samples.sketches.shape[1], size=len(indices)))
    sketch, photo = heads.image_features(samples.sketches[indices, steps]), heads.image_features(samples.first[indices])
    iic = contrast(sketch, photo, samples.identity[indices].to(sketch.device), heads.temperature)
    return iic + pair_loss(heads, samples.photos, indices, rng, step) if samples.photos else iic


def sketch_ranks(similarity):
    """Similarity (N sketches, T steps, N photos), photo n belonging to sketch n -> ranks (N, T), the best is 1; a photo that is
    as similar as the true one ranks before it."""
    true = similarity.diagonal(dim1=0, dim2=2).T                                            # (N, T)
    return (~(similarity < true[..., None])).sum(-1)


def early_retrieval(ranks, photos):
    """Ranks (N, T) among `photos` photos -> m@A (mean rank percentile), m@B (mean of 1 / rank), both in percent over all steps;
    w@A and w@B weigh step t = 1..T by exp(-t / T); and the two curves over the steps, (T,)."""
    T = ranks.shape[1]
    percentile, inverse = 100 * (photos - ranks.double()) / (photos - 1), 100 / ranks.double()
    weight = torch.exp(-torch.arange(1, T + 1, dtype=torch.float64, device=ranks.device) / T)
    return {"m@A": percentile.mean().item(), "m@B": inverse.mean().item(), "w@A": (weight * percentile).mean().item(),
            "w@B": (weight * inverse).mean().item(), "A": percentile.mean(0).tolist(), "B": inverse.mean(0).tolist()}


@torch.no_grad()
def sketch_metrics(heads, samples):
    photos = heads.image_features(samples.first)                                            # (N, E)
    similarity = heads.image_features(samples.sketches) @ photos.T                          # (N, T, N)
    metrics = early_retrieval(sketch_ranks(similarity), len(photos))
    return metrics | {"whole": metrics["A"][-1], "similarity": similarity.cpu()}


# ---- pictures ------------------------------------------------------------------------------------------------------
def draw_retrieval(results, faces, folder):
    """For some captions of the test part the five faces that the first checkpoint ranks best."""
    retrieval_sheet(Validation.of(faces), results[FIRST].final["scores"], folder / "retrieval.png")


def draw_attributes(results, faces, folder):
    """Accuracy for each attribute, from the whole training part, beside who always says the more frequent answer."""
    per_label = results[FIRST].final["per_label"]
    names = sorted(per_label, key=lambda name: per_label[name][0] - per_label[name][3])
    figure, axes = figure_of(9, 1.5 + 0.28 * len(names))
    places = np.arange(len(names))
    axes.barh(places + 0.2, [per_label[name][0] for name in names], 0.4, label=results[FIRST].name, color="tab:blue")
    axes.barh(places - 0.2, [per_label[name][3] for name in names], 0.4, label="always the majority", color="lightgrey")
    axes.set(yticks=places, yticklabels=[name.replace("_", " ") for name in names], xlim=(50, 100), ylim=(-1, len(names)),
             xlabel="accuracy on the test part, %")
    axes.legend(loc="lower left")
    figure.savefig(folder / "attributes.png", dpi=110)


def draw_sketch(results, episodes, folder, stages=6, top=5):
    """One sketch as it grows, with the best photos at each stage; and how early photos are found, for all encoders."""
    similarity = results[FIRST].final["similarity"]                                          # (N, T, N)
    ranks = sketch_ranks(similarity)
    n = int((1 / ranks.double()).mean(1).argsort()[len(ranks) // 2])                        # as easy as half of the others
    rows = []
    for t in (torch.arange(1, stages + 1) * episodes.steps // stages - 1).clamp(min=0).tolist():
        best = similarity[n, t].argsort(descending=True)[:top].tolist()
        tiles = [(episodes.sketch(n, t), "", False)] + [(episodes.photos.picture(i), f"{similarity[n, t, i]:.2f}", i == n) for i in best]
        rows.append((f"step {t + 1} of {episodes.steps}: the true photo has rank {ranks[n, t]} of {len(ranks)}", tiles))
    contact_sheet(rows, tile=112).save(folder / "sketch.png")
    figure, axes = figure_of(11, 4.2, columns=2)
    for curve, side, title in (("A", axes[0], "mean rank percentile"), ("B", axes[1], "mean of 1 / rank")):
        for row in results:
            values = row.final[curve]
            side.plot([100 * (t + 1) / len(values) for t in range(len(values))], values, label=row.name)
        side.set(xlabel="% of the sketch drawn", ylabel="%", xlim=(0, 100), ylim=(0, 100), title=title)
    axes[0].legend(loc="lower right", fontsize="small")
    figure.savefig(folder / "curves.png", dpi=110)


def figure_of(width, height, columns=1):
    from matplotlib.figure import Figure                    # without pyplot: no window, nothing to close
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


# ---- the tasks -----------------------------------------------------------------------------------------------------
class Task(NamedTuple):
    open: Callable          # (config, split, size) -> Faces or Episodes
    encode: Callable        # (model, faces, config, training) -> samples: all that the frozen encoders have to say about them
    head: Callable          # (model, samples) -> the module that is trained
    loss: Callable          # (head, samples, indices (B,), rng, step) -> ()
    metrics: Callable       # (head, samples) -> {name: number, and what the pictures need}
    select: str             # the metric on the validation part that decides what is kept
    columns: dict           # of the table: metric -> title
    draw: Callable          # (results, test part, folder)


def open_part(config, split, size):
    """Faces to train, choose or test on; drawn ones are none that train.py draws."""
    if config.data:
        return data.open_faces(config.data, split)
    return data.drawn_faces(count_of(config, split), size, {"train": 10, "val": 11, "test": 12}[split], config.cache)


def count_of(config, split):
    return {"train": config.faces, "val": config.test_faces // 2, "test": config.test_faces}[split]


def open_captioned_part(config, split, size):
    """For drawn faces, an archive of black-and-white photographs: in a collection like the one that train.py learns from, its
    projections are as good as they can be, and there is nothing to tune."""
    faces = open_part(config, split, size)
    if config.data:
        return faces
    grey = np.asarray(faces.pictures) @ np.array([0.299, 0.587, 0.114])                     # (N, S, S)
    pictures = np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=-1)
    return dataclasses.replace(faces, name=f"{faces.name}, black and white", pictures=pictures)


def open_episode_part(config, split, size):
    if config.data:
        return data.open_episodes(config.data, split)
    return data.drawn_episodes(count_of(config, split), size, {"train": 20, "val": 21, "test": 22}[split], config.cache)


def attribute_head(model, samples):
    _, vectors, width = samples.vectors[0].shape
    return AttributeHead(vectors, width, len(samples.names)).to(model.temperature.device)


def flip_heads(model, samples):
    return Heads(model).requires_grad_(True)


RECALLS = {f"{way}_r{k}": f"{title} R@{k}" for way, title in (("img", "T→I"), ("txt", "I→T")) for k in (5, 10)}
TASKS = {
    "retrieval": Task(
        open_captioned_part, encode_pairs, flip_heads, pair_loss, pair_metrics, "r_mean",
        RECALLS | {f"itc_{name}": f"{title}, ITC alone" for name, title in RECALLS.items()}, draw_retrieval),
    "attributes": Task(
        open_part, encode_attributes, attribute_head, attribute_loss, attribute_metrics, "accuracy",
        {"accuracy": "accuracy", "balanced": "balanced accuracy", "precision": "average precision"}, draw_attributes),
    "sketch": Task(
        open_episode_part, encode_sketches, flip_heads, sketch_loss, sketch_metrics, "m@B",
        {"m@A": "m@A", "m@B": "m@B", "w@A": "w@A", "w@B": "w@B", "whole": "A of whole sketches"}, draw_sketch)}

# What the papers publish (FLIP, tables 3 to 5): the first columns of ours, on the data named. FLIP*: captions by grammar
# alone, FLIP†: text from LAION-Face. Attributes: by the shares of the training part. Their LFWA was trained on the test part.
PUBLISHED = {
    "retrieval": {
        "CelebA-Caption": {"ALIGN": (6.99, 11.09, 5.08, 8.65), "BLIP": (24.56, 34.09, 24.35, 34.15), "CLIP": (21.42, 30.3, 26.52, 37.22),
                           "FLIP*": (38.62, 48.28, 38.14, 48.9), "FLIP†": (13.24, 20.96, 10.76, 17.08), "FLIP": (50.04, 62.04, 50.96, 62.98)},
        "MM-CelebA": {"ALIGN": (8.1, 12.61, 6.6, 10.53), "BLIP": (21.56, 31.25, 23.83, 33.38), "CLIP": (13.63, 21.06, 14.41, 22.48),
                      "FLIP*": (23.81, 33.48, 23.7, 32.83), "FLIP†": (9.75, 15.7, 7.48, 12.25), "FLIP": (26.1, 35.75, 27.05, 37.23)}},
    "attributes": {
        "CelebA": {"ViT": {0.01: 89.20, 0.1: 90.21, 1: 90.77}, "CLIP": {0.01: 89.09, 0.1: 90.47, 1: 90.86},
                   "FaRL": {0.01: 89.66, 0.02: 90.26, 1: 91.39}, "FLIP†": {0.01: 88.05, 0.1: 90.74, 1: 91.32},
                   "FLIP": {0.01: 91.52, 0.1: 91.74, 1: 92.27}},
        "LFWA": {"ViT": {0.1: 79.58, 0.5: 85.19, 1: 84.16}, "CLIP": {0.1: 80.20, 0.5: 85.48, 1: 84.48},
                 "FaRL": {0.1: 82.42, 0.5: 85.38, 1: 85.94}, "FLIP†": {0.1: 79.89, 0.5: 85.62, 1: 84.34},
                 "FLIP": {0.1: 82.60, 0.5: 89.87, 1: 98.04}}},
    "sketch": {
        "FS2K-SDE1": {"SLFIR": (96.22, 45.48), "BLIP": (97.64, 46.72), "CLIP": (98.01, 57.27), "FLIP†": (98.14, 56.70), "FLIP": (99.49, 71.10)},
        "FS2K-SDE2": {"SLFIR": (90.22, 41.55), "BLIP": (97.10, 64.06), "CLIP": (96.02, 57.32), "FLIP†": (95.41, 59.40), "FLIP": (97.55, 64.80)}}}
FIRST = 1       # row of the first checkpoint in the results; row 0 is the random encoder


# ---- tuning --------------------------------------------------------------------------------------------------------
def tune(task, head, training, validation, config, log):
    """Train the head; leave it in the state that was best on the validation part, which may be the one it came in."""
    matrices = [p for p in head.parameters() if p.ndim > 1]
    others = [p for p in head.parameters() if p.ndim <= 1]                                  # are not decayed
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], weight_decay=config.weight_decay)
    per_epoch, step = max(1, len(training) // config.batch_size), 0
    looks = {round(config.epochs * (n + 1) / config.evaluations) for n in range(config.evaluations)}
    best, kept = task.metrics(head, validation)[task.select], copy.deepcopy(head.state_dict())
    for epoch in tqdm(range(1, config.epochs + 1), "tuning", leave=False):
        rng = np.random.default_rng((config.seed, epoch))
        order, losses = torch.from_numpy(rng.permutation(len(training))), []
        for indices in order[:per_epoch * config.batch_size].split(config.batch_size):
            done = ramp(step, config.warmup, config.epochs * per_epoch)
            rate = config.lr * min(1, (step + 1) / max(1, config.warmup)) * (1 + math.cos(math.pi * done)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = task.loss(head, training, indices, rng, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if isinstance(head, Heads):
                head.model.clamp_temperature()
            losses.append(loss.item())
            step += 1
        if epoch in looks:
            found = task.metrics(head, validation)
            log.write(epoch=epoch, loss=sum(losses) / len(losses), **{f"val_{name}": found[name] for name in task.columns})
            if found[task.select] > best:
                best, kept = found[task.select], copy.deepcopy(head.state_dict())
    head.load_state_dict(kept)


class Result(NamedTuple):
    name: str
    before: dict | None     # metrics of the test part before tuning, where the head existed already
    tuned: dict             # and after it: {share of the training part: metrics}
    head: nn.Module         # from all of the training part
    model: FLIP

    @property
    def final(self):
        return self.tuned[max(self.tuned)]


def evaluate_encoder(name, model, parts, config, log):
    """Tune on one frozen encoder, for attributes with each share of the training part; then test."""
    task, fractions = TASKS[config.task], sorted(config.fractions) if config.task == "attributes" else [1.0]
    training, validation = (task.encode(model, parts[split], config, split == "train") for split in ("train", "val"))
    heads = []
    for fraction in fractions:
        torch.manual_seed(config.seed)
        heads.append(task.head(model, training))
        untuned = copy.deepcopy(heads[-1].state_dict())
        log.write(encoder=name, fraction=fraction)
        tune(task, heads[-1], share_of(training, fraction, config.seed), validation, config, log)
    testing = task.encode(model, parts["test"], config, False)         # not looked at before
    tuned, before = {fraction: task.metrics(head, testing) for fraction, head in zip(fractions, heads)}, None
    if isinstance(heads[-1], Heads):
        kept = copy.deepcopy(heads[-1].state_dict())
        heads[-1].load_state_dict(untuned)
        before = task.metrics(heads[-1], testing)
        heads[-1].load_state_dict(kept)
    log.write(encoder=name, **{f"test_{column}": tuned[fractions[-1]][column] for column in task.columns})
    return Result(name, before, tuned, heads[-1], model)


def share_of(samples, fraction, seed):
    """A share of the samples, by the seed; a smaller share is part of a larger one."""
    if fraction == 1:
        return samples
    chosen = np.random.default_rng(seed).permutation(len(samples))[:max(1, round(fraction * len(samples)))]
    return samples.part(torch.from_numpy(chosen))


# ---- encoders to compare -------------------------------------------------------------------------------------------
def open_encoders(config):
    """[(name, model)]: random weights first, then the checkpoints."""
    models = [load(path, config) for path in config.checkpoint]
    names = [name_of(path) for path in config.checkpoint]
    names = [f"{name} ({path})" if names.count(name) > 1 else name for name, path in zip(names, config.checkpoint)]
    return [("random frozen encoder", random_encoder(config, models[0])), *zip(names, models)]


def load(path, config):
    model = FLIP.from_pretrained(path)
    if config.vocabulary:
        model.use(Tokenizer.load(config.vocabulary))
    if model.tokenizer is None:
        raise ValueError(f"{path} holds no vocabulary; give one with --vocabulary bert-base-uncased or a vocab.txt")
    return model


def random_encoder(config, like):
    """The first checkpoint's model with new weights, initialised as train.py would."""
    torch.manual_seed(config.seed)
    model = FLIP(like.config, like.tokenizer)
    if settings_of(config.checkpoint[0]).get("small_init"):
        initialise_small(model)
    return model


def settings_of(path):
    """The flags of the run that made a checkpoint; {} for one that train.py did not make."""
    return read_checkpoint(path).get("training", {}).get("settings", {})


def name_of(path):
    """What to call a checkpoint in the table."""
    settings = settings_of(path)
    if not settings:
        return Path(path).stem
    return f"{'ITC alone' if settings['itm_from'] >= 1 else 'FLIP'}, pre-trained on {Path(settings['data']).name or 'drawn faces'}"


# ---- the run -------------------------------------------------------------------------------------------------------
def finetune(config):
    """The whole run; returns the results, the random encoder's first."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task, folder, encoders = TASKS[config.task], Path(config.out) / config.task, open_encoders(config)
    size = encoders[FIRST][1].config.vit.image_size                                         # at which faces are drawn
    parts = {split: task.open(config, split, size) for split in ("train", "val", "test")}
    if config.data:
        for part in parts.values():
            data.check_pictures(part)                       # a damaged one in the test part would be met after hours
    log = Log(folder / "log.jsonl", config, start=0, writes=True)
    results = []
    for name, model in encoders:
        print(f"{name} ...", flush=True)
        results.append(evaluate_encoder(name, freeze(model.to(device)), parts, config, log))
    text = table(results, config)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    save(results[FIRST], folder)
    task.draw(results, parts["test"], folder)
    print(f"\n{text}\n\n{folder}: log.jsonl, table.md, the tuned head, pictures")
    return results


def table(results, config):
    """Markdown: the encoders side by side, then what is published about other data."""
    header, rows = attribute_rows(results) if config.task == "attributes" else ranking_rows(results, TASKS[config.task].columns)
    for where, values in PUBLISHED[config.task].items():
        for name, published in values.items():
            if config.task == "attributes":
                published = [published.get(fraction) for fraction in results[0].tuned]
            if None not in published:
                rows.append((f"{name}, published on {where}", published))
    lines = ["| " + " | ".join(["%", *header]) + " |", "|---" * (len(header) + 1) + "|"]
    for name, values in rows:
        lines.append("| " + " | ".join([name, *(f"{value:.1f}" for value in values), *[""] * (len(header) - len(values))]) + " |")
    return "\n".join(lines)


def ranking_rows(results, columns):
    """(titles of the columns, [(name, values)]): each encoder before and after tuning."""
    return list(columns.values()), [(f"{result.name}, {when}", [metrics[column] for column in columns]) for result in results
                                    for when, metrics in (("before tuning", result.before), ("tuned", result.final))]


def attribute_rows(results):
    """The same for attributes: each metric for each share of the training part."""
    columns, shares = TASKS["attributes"].columns, results[0].tuned
    rows = [(result.name, [metrics[column] for column in columns for metrics in result.tuned.values()]) for result in results]
    majority = [value for value in (results[0].final["majority"], 50.0) for _ in shares]
    return [f"{title}, {100 * share:g} %" for title in columns.values() for share in shares], [*rows, ("always the majority", majority)]


def save(result, folder):
    """The first checkpoint's tuned head: a whole FLIP, for flip.py to search with, or the attribute head with its labels."""
    if isinstance(result.head, Heads):
        write_whole(result.model.checkpoint(), folder / "flip.pt")
    else:
        write_whole({"model": result.head.state_dict(), "attributes": list(result.final["per_label"])}, folder / "head.pt")


if __name__ == "__main__":
    try:
        finetune(parse_arguments())
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")
    except KeyboardInterrupt:
        raise SystemExit("interrupted")
