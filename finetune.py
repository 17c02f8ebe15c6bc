"""Three tasks on a frozen FLIP (FLIP paper, section 5 and figure 2, panels b to d).

    python finetune.py retrieval  --checkpoint out/flip.pt      find the face for a sentence and the sentence for a face
    python finetune.py attributes --checkpoint out/flip.pt      name the 40 attributes of a face
    python finetune.py sketch     --checkpoint out/flip.pt      find the photo from a sketch that is still being drawn

Without --data they run on drawn faces (black-and-white ones for retrieval), in a few minutes on two CPU cores; with it, on
your own (see data.py). The encoders are frozen: evaluation mode, no gradient, no optimiser state. What they make of a picture
is therefore computed once, before the first epoch, and only a small head is trained on it: the projections, the matching head
and the temperature that FLIP has already (retrieval, sketch), or a linear layer on pooled tokens (attributes).

A task is a row of TASKS: what is computed once, what is trained, its loss, its metrics. Several checkpoints can be given;
each is tuned in the same way, a frozen encoder of random weights as well, and the table puts them side by side. The best
evaluation on the validation part decides what is kept; the test part is read once per encoder, at the end.

Departures from the official code: it chooses the best epoch on the test part, trains LFWA's head on the test part, leaves
dropout on inside the "frozen" encoders, trains the attribute head by plain gradient descent, and keeps a momentum encoder and
a queue, though behind frozen encoders all keys of a batch are fresh.

Into --out/<task> go log.jsonl, table.md, pictures, and what was tuned on the first checkpoint: for attributes the head, head.pt;
for retrieval and sketch a whole flip.pt, which --checkpoint takes again.

Shapes: N pictures, L image tokens, D width, E feature size, B samples of a batch, V vectors pooled per picture, A attributes,
T captions (retrieval) or steps of a sketch (sketch).
"""
import argparse
import copy
import dataclasses
import itertools
import math
import shutil
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
from flip import FLIP, contact_sheet, read_checkpoint, write_whole
from kernels.contrastive import contrastive_loss
from train import (PRECISION, Log, Validation, add_flags, autocast, flag, given_flags, initialise_small, ramp, recalls,
                   retrieval_sheet, validation_texts)
from vit import to_tensor


# ---- configuration -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    """Every field but the task is a flag. The defaults are the paper's for retrieval; RECIPES says what other tasks change, DRAWN
    what drawn faces change."""
    task: str = ""
    checkpoint: tuple[str, ...] = flag(("out/flip.pt",), "one or more: made by train.py, or the official FLIP-base.pth")
    vocabulary: str = flag("", "vocab.txt, tokenizer.json, folder or hub name, for checkpoints that hold none, as the official")
    random: bool = flag(True, "tune on a frozen encoder of random weights as well, for comparison")
    data: str = flag("", "folder with your own faces; without it faces are drawn and kept in --cache")
    out: str = flag("out", "results go into a folder below it, named after the task")
    cache: str = flag("cache", "folder for the drawn faces")
    faces: int = flag(4000, "how many faces to draw for training")
    validation: int = flag(1000, "how many faces to draw for validation; of your own, how many to use at most")
    test: int = flag(1000, "how many faces to draw for the test part")
    captions: int = flag(2, "sentences that the grammar writes for each training face that came without any")
    views: int = flag(1, "versions of each training picture to encode: the first as it is, others as the augmentation shows it")
    seed: int = flag(0, "of the random encoder, new weights, order, captions, negatives")
    epochs: int = flag(50, "passes over the training part; over a share of it so many more that as many samples are seen")
    batch_size: int = flag(64, "samples per step")
    lr: float = flag(3e-5, "highest learning rate; it falls to 0 along a cosine")
    warmup: int = flag(2000, "steps in which the learning rate rises; at most a tenth of all")
    weight_decay: float = flag(0.05, "of AdamW, on matrices only")
    itm_every: int = flag(1, "train the matching head at each n-th step")
    fractions: tuple[float, ...] = flag((0.01, 0.1, 1.0), "attributes: shares of the training part, each a run of its own")
    columns: tuple[str, ...] = flag((), "attributes: which ones to learn (default: all)")
    evaluations: int = flag(5, "how often to look at the validation part; the best look decides")
    k_test: int = flag(256, "candidates per query that the matching head scores again")
    precision: str = flag("auto", "float32, bf16 (autocast), or auto: bf16 on CUDA")
    memory: float = flag(4.0, "GB of memory for what the encoders say of one part in one view; what is larger is kept as float16 "
                              "in an unnamed file in --out")

    def __post_init__(self):
        least = dict(faces=2, validation=2, test=2, batch_size=2)
        least |= dict.fromkeys(("captions", "views", "epochs", "itm_every", "evaluations", "k_test"), 1)
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"--{name} {getattr(self, name)}: expected at least {bound}")
        for name in ("seed", "lr", "warmup", "weight_decay", "memory"):
            if not 0 <= getattr(self, name) < 2 ** 62:
                raise ValueError(f"--{name} {getattr(self, name)}: expected a number that is not negative")
        if self.precision not in PRECISION:
            raise ValueError(f"--precision {self.precision}: expected one of {', '.join(PRECISION)}")
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError(f"--fractions {self.fractions}: expected shares above 0 and at most 1")
        if len(set(self.fractions)) < len(self.fractions):
            raise ValueError(f"--fractions {self.fractions}: expected every share once")
        if self.task != "attributes" and (self.columns or self.fractions != Config.fractions):
            raise ValueError(f"--columns and --fractions are for attributes, not for {self.task}")
        unknown = [name for name in self.columns if name not in ATTRIBUTES]
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"--columns {' '.join(self.columns)}: expected every attribute once")
        if unknown:
            raise ValueError(f"--columns: there is no attribute {', '.join(unknown)}; expected some of {' '.join(ATTRIBUTES)}")
        if self.task == "sketch" and self.views > 1:
            raise ValueError("--views: a sketch and its photo must show the same; the augmentation would move only the photo")


# The paper's settings of each task, then what drawn faces and a tiny model need to be done within minutes. The official
# learning rate of the attribute head is 0.3 on CelebA and 0.003 on LFWA, for plain gradient descent.
RECIPES = {"retrieval": {}, "attributes": dict(epochs=100, batch_size=256, lr=1e-3, warmup=0, weight_decay=0.0),
           "sketch": dict(epochs=100, lr=1e-4, warmup=200)}
DRAWN = {"retrieval": dict(epochs=30, batch_size=256, lr=3e-3, itm_every=5, evaluations=3, k_test=16, faces=2000, validation=300,
                           captions=8),
         "attributes": dict(epochs=60, lr=3e-3, validation=500),
         "sketch": dict(epochs=150, batch_size=128, lr=1e-2, itm_every=10, faces=800, validation=100, test=200, captions=8)}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tuple(RECIPES))
    drawn = {f"{task} on drawn faces": RECIPES[task] | DRAWN[task] for task in RECIPES}
    add_flags(parser, Config, RECIPES | drawn)
    given = given_flags(parser, argv)
    recipe = RECIPES[given["task"]] | ({} if given.get("data") else DRAWN[given["task"]])
    return Config(**recipe | given)


# ---- a task --------------------------------------------------------------------------------------------------------
class Task(NamedTuple):
    """What sets a task apart; the rows are TASKS, below the functions that fill them."""
    open: Callable          # (config, split, size) -> Faces or Episodes
    encode: Callable        # (model, faces, config, for_training) -> samples: all that the frozen encoders have to say about them
    head: Callable          # (model, samples) -> the module that is trained
    loss: Callable          # (head, samples, indices (B,), rng, step) -> a scalar tensor
    after_step: Callable    # (head): what changes beside the optimiser's step
    metrics: Callable       # (head, samples) -> {name: number}; "baseline": the same of who has learned nothing; "scores",
                            # "per_label", "A", "B": what the pictures show
    select: str             # the metric on the validation part that decides what is kept
    columns: dict           # of the table: metric -> title
    reads_text: Callable    # (training part) -> whether its captions are tokenized
    draw: Callable          # (results, test part, folder)
    save: Callable          # (head, its metrics, the Encoder's origin with this task added, folder)


# ---- what the frozen encoders have to say, once --------------------------------------------------------------------
def freeze(model):
    """Evaluation mode, no gradients. A task may thaw the projections, the matching head and the temperature again, which are
    no part of the encoders."""
    return model.eval().requires_grad_(False)


def storage(shape, config):
    """An empty float32 tensor in memory, or, where it is larger than --memory, float16 in a file that is gone when the run
    ends."""
    size = math.prod(shape)
    if 4 * size <= config.memory * 1e9:
        return torch.empty(shape)
    path = Path(config.out) / f"tokens-{time.time_ns()}.f16"
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if 2 * size > free:                                     # the file has holes at first: nothing else would complain in time
        raise ValueError(f"{path.parent} has {free / 1e9:.0f} GB free, but {2 * size / 1e9:.0f} GB of image tokens go there; "
                         "choose another --out or fewer --views")
    tensor = torch.from_file(str(path), shared=True, size=size, dtype=torch.float16).view(shape)
    path.unlink()                                           # the mapping lives on; the name need not
    return tensor


@torch.no_grad()
def encode_pictures(compute, read, count, model, config, title, batch_size=128):
    """compute(pixels (n, 3, S, S)) for the pictures read(0) to read(count - 1), on the CPU: (count, ...)."""
    out, size, device = None, model.config.vit.image_size, model.temperature.device
    with ThreadPool() as pool, autocast(config, device):
        for start in tqdm(range(0, count, batch_size), title, leave=False):
            stop = min(start + batch_size, count)
            pixels = torch.stack(pool.map(lambda i: to_tensor(read(i), size), range(start, stop)))
            values = compute(pixels.to(device)).float().cpu()
            if out is None:
                out = storage((count, *values.shape[1:]), config)
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
    """compute() of every picture in every view: a list of (N, ...), one for each view."""
    return [encode_pictures(compute, view_of(faces, view, model.config.vit.image_size, config.seed), len(faces), model, config,
                            f"encoding {faces.name}" + f", view {view + 1}" * (views > 1)) for view in range(views)]


# ---- attributes: pooled tokens of four depths, LayerNorm, weighted sum, linear -------------------------------------
def pooled(vit, images):
    """Images (B, 3, S, S) -> (B, V, D): after a third, half and two thirds of the blocks (4, 6 and 8 of 12), before any final
    norm, and at the end, after it: the class token, and mean and maximum of the patch tokens."""
    tokens, hidden = vit(images, return_hidden=True)                                        # (B, L, D) and after each block
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
        x = torch.einsum("v,bvd->bd", self.weights, self.norm(x))
        return self.linear(x)


@dataclass(frozen=True)
class Labelled:
    vectors: list           # one (N, V, D) for each view
    labels: torch.Tensor    # (N, A) float, 0 or 1
    names: tuple            # of the A attributes

    def __len__(self):
        return len(self.labels)

    def subset(self, indices):
        return Labelled([view[indices] for view in self.vectors], self.labels[indices], self.names)


def encode_attributes(model, faces, config, for_training):
    names = config.columns or ATTRIBUTES
    labels = torch.from_numpy(faces.attributes[:, [ATTRIBUTES.index(name) for name in names]]).float()
    compute = lambda images: pooled(model.student.image, images)
    return Labelled(encode_views(compute, faces, config.views if for_training else 1, model, config), labels, names)


def attribute_head(model, samples):
    _, vectors, width = samples.vectors[0].shape
    return AttributeHead(vectors, width, len(samples.names)).to(model.temperature.device)


def attribute_loss(head, samples, indices, rng, step):
    """Binary cross-entropy, mean over samples and labels."""
    vectors, device = samples.vectors[rng.integers(len(samples.vectors))][indices], head.weights.device
    return F.binary_cross_entropy_with_logits(head(vectors.to(device).float()), samples.labels[indices].to(device))


def average_precision(scores, labels):
    """Mean precision at the rank of each positive (scores and labels (N,)); ties in the order of the samples."""
    hits = labels[scores.argsort(descending=True, stable=True)].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return (precision * hits).sum() / hits.sum()


def chance_precision(positives, count):
    """The average precision expected of an order by chance. At the rank n of a positive, it is a hit itself, and each of the
    n - 1 before it with probability (positives - 1) / (count - 1); the mean over all n has a harmonic number in it."""
    harmonic = (1 / torch.arange(1, count + 1).double()).sum()
    return (harmonic + (positives - 1) / (count - 1) * (count - harmonic)) / count


@torch.no_grad()
def attribute_metrics(head, samples):
    """In percent. Who never names a rare attribute is nearly always right, so accuracy flatters; balanced accuracy, the mean of
    the rates at which the present and the absent are recognised, and average precision do not. Means over the labels; an
    attribute that everyone or nobody has counts in accuracy only. The majority is that of these samples."""
    device = head.weights.device
    logits = torch.cat([head(some.to(device).float()).cpu() for some in samples.vectors[0].split(1024)])    # (N, A)
    truth, said = samples.labels.bool(), logits > 0
    accuracy = (said == truth).double().mean(0)                                                             # (A,)
    present = (said & truth).sum(0).double() / truth.sum(0)
    absent = (~said & ~truth).sum(0).double() / (~truth).sum(0)
    balanced = (present + absent) / 2                                                                       # nan without one
    precision = torch.stack([average_precision(logits[:, a], truth[:, a]) for a in range(truth.shape[1])])
    precision[balanced.isnan()] = torch.nan
    frequency = truth.double().mean(0)
    columns = {"accuracy": accuracy, "balanced": balanced, "average_precision": precision,
               "majority": torch.maximum(frequency, 1 - frequency)}
    per_label = {name: {column: 100 * values[a].item() for column, values in columns.items()}
                 for a, name in enumerate(samples.names)}
    metrics = {column: 100 * values.nanmean().item() for column, values in columns.items()}
    known = truth.sum(0)[~balanced.isnan()].double()        # positives of each label
    baseline = {"accuracy": metrics["majority"], "balanced": 50.0,
                "average_precision": 100 * chance_precision(known, len(truth)).mean().item()}
    return metrics | {"per_label": per_label, "baseline": baseline}


def save_attribute_head(head, metrics, origin, folder):
    write_whole({"model": head.state_dict(), "attributes": list(metrics["per_label"]), "tuned": origin}, folder / "head.pt")


# ---- retrieval: FLIP's own projections, matching head and temperature ----------------------------------------------
class FLIPHead(nn.Module):
    """The parts of a FLIP that are tuned further: shared with `model`, not copied."""

    def __init__(self, model):
        super().__init__()
        self.image_projection, self.text_projection = model.student.image_projection, model.student.text_projection
        self.matching_head, self.temperature = model.matching_head, model.temperature
        self.belongs_to = [model]                           # in a list, so that the encoders do not become parts of the head

    @property
    def model(self):
        return self.belongs_to[0]

    def image_features(self, class_tokens):
        """(B, D) -> features (B, E) of length 1; a sketch's like a photo's."""
        return F.normalize(self.image_projection(class_tokens.to(self.temperature.device).float()).float(), dim=-1)

    def text_features(self, cls_tokens):
        return F.normalize(self.text_projection(cls_tokens.to(self.temperature.device).float()).float(), dim=-1)


def flip_head(model, samples):
    return FLIPHead(model).requires_grad_(True)


@dataclass(frozen=True)
class Paired:
    """Faces with captions, as the frozen encoders see them."""
    image_tokens: list              # one (N, L, D) for each view
    captions: Captions              # T of them
    cls_tokens: torch.Tensor        # (T, D) of the captions
    image_of_text: torch.Tensor     # (T,)
    identity: torch.Tensor          # (N,)
    config: Config

    def __len__(self):
        return len(self.identity)


def training_texts(faces, count):
    """(texts, image_of_text): all captions that came with the faces, or `count` of the grammar for each."""
    if faces.captions is not None:
        return validation_texts(faces)
    image_of_text = torch.arange(len(faces)).repeat_interleave(count)
    return [faces.caption(i, np.random.default_rng((2, i, n % count)))
            for n, i in enumerate(tqdm(image_of_text.tolist(), "writing captions", leave=False))], image_of_text


def encode_pairs(model, faces, config, for_training):
    """Image tokens of all pictures and [CLS] of all captions; for evaluation the captions are those of pre-training."""
    texts, image_of_text = training_texts(faces, config.captions) if for_training else validation_texts(faces)
    image_tokens = encode_views(model.student.image, faces, config.views if for_training else 1, model, config)
    captions = model.tokenizer(texts)
    return Paired(image_tokens, captions, encode_captions(model, captions, config), image_of_text,
                  torch.from_numpy(faces.identity), config)


@torch.no_grad()
def encode_captions(model, captions, config, batch_size=500):
    """The [CLS] token of each caption, (T, D)."""
    device = model.temperature.device
    with autocast(config, device):
        return torch.cat([model.student.text(captions.select(some).to(device), first_only=True).float().cpu()
                          for some in tqdm(torch.arange(len(captions)).split(batch_size), "encoding captions", leave=False)])


def contrast(one, other, identity, temperature):
    """The contrastive loss both ways within a batch, features (B, E) each. As in pre-training, keys carry no gradient. No queue
    and no momentum encoder: behind frozen encoders all keys of a batch are as fresh as can be."""
    def one_way(rows, keys):
        return contrastive_loss(rows, momentum_feature=rows, keys=[keys.detach()], identity=identity, key_identity=[identity],
                                temperature=temperature, alpha=0.0)       # alpha 0: the momentum feature does not count
    return (one_way(one, other) + one_way(other, one)) / 2


def pair_loss(head, samples, indices, rng, step):
    """ITC + ITM of the pictures `indices` (B,), each with one of its captions; see losses.py and flip.py. ITC trains the
    projections and the temperature, ITM the matching head alone; so ITM, which costs a pass of the text encoder, can be left
    out of most steps without changing ITC."""
    model, config, identity = head.model, samples.config, samples.identity[indices]
    if (identity == identity[0]).all():
        raise ValueError(f"a batch of {len(identity)} shows one person only, so nothing in it is a wrong answer; train on more "
                         "people, or with a larger --batch_size")
    image_tokens = samples.image_tokens[rng.integers(len(samples.image_tokens))]            # (N, L, D) of one view
    chosen = caption_of(samples, indices, rng)                                              # (B,)
    image, text = head.image_features(image_tokens[indices, 0]), head.text_features(samples.cls_tokens[chosen])
    identity = identity.to(image.device)
    itc = contrast(image, text, identity, model.temperature)
    if step % config.itm_every:
        return itc
    generator = torch.Generator().manual_seed(int(rng.integers(2 ** 62)))
    negatives = model.draw_negatives(image.detach(), text.detach(), identity, 1.0, generator)
    captions = samples.captions.select(chosen).to(image.device)
    return itc + model.matching(image_tokens[indices].to(image.device).float(), captions, *negatives)


def caption_of(samples, indices, rng):
    """One of the captions of each picture, by chance: numbers (B,)."""
    begin = torch.searchsorted(samples.image_of_text, indices)
    count = torch.searchsorted(samples.image_of_text, indices, right=True) - begin
    return begin + (torch.from_numpy(rng.random(len(indices))) * count).long()


@torch.no_grad()
def pair_metrics(head, samples):
    """Recalls in percent by the official names, by cosine alone ("itc_...") and re-ranked; scores (T, N) for the sheet."""
    image_tokens = samples.image_tokens[0]
    similarity = head.image_features(image_tokens[:, 0]) @ head.text_features(samples.cls_tokens).T         # (N, T)
    metrics, scores = recalls(head.model, image_tokens, samples.captions, similarity, samples.image_of_text, samples.config)
    return metrics | {"scores": scores, "baseline": chance_recalls(len(samples), samples.image_of_text)}


def chance_recalls(images, image_of_text):
    """Recalls in percent of an order by chance: for an image, that one of its captions is among the first k."""
    T, counts = len(image_of_text), image_of_text.bincount().tolist()
    recall = {}
    for k in (5, 10):
        recall[f"img_r{k}"] = 100 * min(1, k / images)
        among = min(k, T)
        recall[f"txt_r{k}"] = 100 * float(np.mean([1 - math.comb(T - count, among) / math.comb(T, among) for count in counts]))
    return recall | {f"itc_{name}": value for name, value in recall.items()}


def save_flip(head, metrics, origin, folder):
    """A checkpoint like any other; its momentum encoders and queues are still those of pre-training."""
    write_whole(head.model.checkpoint() | {"tuned": origin}, folder / "flip.pt")


# ---- sketch: photos and growing sketches through the same encoder and projection ------------------------------------
@dataclass(frozen=True)
class Sketched:
    photos: torch.Tensor            # (N, D) their class tokens
    sketches: torch.Tensor          # (N, T, D) class tokens of the sketches, from the first stroke to the last
    identity: torch.Tensor          # (N,)
    paired: Paired | None           # the photos with their captions, for training, where they have any

    def __len__(self):
        return len(self.photos)


def encode_sketches(model, episodes, config, for_training):
    """Class tokens of all steps of all sketches, and of the photos; for training all tokens of photos that have captions."""
    faces, T = episodes.photos, episodes.steps
    class_token = lambda images: model.student.image(images, first_only=True)
    if for_training and faces.has_text:
        paired = encode_pairs(model, faces, config, for_training)
        photos = paired.image_tokens[0][:, 0].float()
    else:
        paired, photos = None, encode_views(class_token, faces, 1, model, config)[0]
    # An episode is white on black; an encoder of photographs tells more of dark lines on a light ground.
    read = lambda n: ImageOps.invert(episodes.sketch(n // T, n % T))
    sketches = encode_pictures(class_token, read, len(faces) * T, model, config, f"encoding the sketches of {faces.name}")
    return Sketched(photos, sketches.unflatten(0, (len(faces), T)), torch.from_numpy(faces.identity), paired)


def sketch_loss(head, samples, indices, rng, step):
    """IIC, the contrastive loss between a step of the sketch and its photo, plus ITC + ITM of the photo where it has captions."""
    steps = torch.from_numpy(rng.integers(samples.sketches.shape[1], size=len(indices)))
    sketch, photo = head.image_features(samples.sketches[indices, steps]), head.image_features(samples.photos[indices])
    iic = contrast(sketch, photo, samples.identity[indices].to(sketch.device), head.temperature)
    if samples.paired is None:
        return iic
    return iic + pair_loss(head, samples.paired, indices, rng, step)


def sketch_ranks(similarity):
    """Similarity (N sketches, T steps, N photos), photo n belonging to sketch n -> ranks (N, T), the best is 1; a photo that is
    as similar as the true one ranks before it."""
    true = similarity.diagonal(dim1=0, dim2=2).T                                            # (N, T)
    return (~(similarity < true[..., None])).sum(-1)


def early_retrieval(ranks, photos):
    """Ranks (N, T) among `photos` photos -> m@A (mean rank percentile) and m@B (mean of 1 / rank), in percent over all steps;
    w@A and w@B weigh step t = 1..T by exp(-t / T) and do not divide by the weights' sum, so that their highest is about 63
    for many steps; and the two curves over the steps, (T,)."""
    T = ranks.shape[1]
    percentile, inverse = 100 * (photos - ranks.double()) / (photos - 1), 100 / ranks.double()
    weight = torch.exp(-torch.arange(1, T + 1, dtype=torch.float64, device=ranks.device) / T)
    return {"m@A": percentile.mean().item(), "m@B": inverse.mean().item(), "w@A": (weight * percentile).mean().item(),
            "w@B": (weight * inverse).mean().item(), "A": percentile.mean(0).tolist(), "B": inverse.mean(0).tolist()}


@torch.no_grad()
def sketch_metrics(head, samples):
    photos = head.image_features(samples.photos)                                            # (N, E)
    similarity = head.image_features(samples.sketches) @ photos.T                           # (N, T, N)
    metrics = early_retrieval(sketch_ranks(similarity), len(photos))
    ranks = torch.arange(1, len(photos) + 1)[:, None].expand(-1, similarity.shape[1])       # one sketch at each rank
    chance = early_retrieval(ranks, len(photos)) | {"finished": 50.0}
    return metrics | {"finished": metrics["A"][-1], "scores": similarity.cpu(), "baseline": chance}


# ---- pictures ------------------------------------------------------------------------------------------------------
def draw_retrieval(results, faces, folder):
    """For some captions of the test part the five faces that the first checkpoint ranks best."""
    retrieval_sheet(Validation(faces, *validation_texts(faces), {}), results[0].final["scores"], folder / "retrieval.png")


def draw_attributes(results, faces, folder):
    """Accuracy for each attribute, from the largest share of the training part, beside who always says the more frequent
    answer."""
    per_label = results[0].final["per_label"]
    names = sorted(per_label, key=lambda name: per_label[name]["accuracy"] - per_label[name]["majority"])
    figure, axes = figure_of(9, 1.5 + 0.28 * len(names))
    places = np.arange(len(names))
    for column, shift, label, color in (("accuracy", 0.2, results[0].name, "tab:blue"),
                                        ("majority", -0.2, "always the majority", "lightgrey")):
        axes.barh(places + shift, [per_label[name][column] for name in names], 0.4, label=label, color=color)
    axes.set(yticks=places, yticklabels=[name.replace("_", " ") for name in names], xlim=(50, 100), ylim=(-1, len(names)),
             xlabel="accuracy on the test part, %")
    figure.legend(loc="outside upper right", ncols=2)
    figure.savefig(folder / "attributes.png", dpi=110)


def draw_sketch(results, episodes, folder, stages=6, top=5):
    """One sketch as it grows, with the best photos at each stage; and how early photos are found, for all encoders."""
    similarity = results[0].final["scores"]                                                 # (N, T, N)
    ranks = sketch_ranks(similarity)
    n = int((1 / ranks.double()).mean(1).argsort()[len(ranks) // 2])                        # as hard as the median
    rows = []
    for t in sorted({max(0, episodes.steps * stage // stages - 1) for stage in range(1, stages + 1)}):
        best = similarity[n, t].argsort(descending=True)[:top].tolist()
        tiles = [(episodes.photos.picture(i), f"{similarity[n, t, i]:.2f}", i == n) for i in best]
        rows.append((f"step {t + 1} of {episodes.steps}: the true photo has rank {ranks[n, t]} of {len(ranks)}",
                     [(episodes.sketch(n, t), "", False), *tiles]))
    contact_sheet(rows, tile=112).save(folder / "sketch.png")
    figure, sides = figure_of(11, 4.2, columns=2)
    for curve, axes, title in zip("AB", sides, ("mean rank percentile", "mean of 1 / rank")):
        for result in results:
            percent = 100 * np.arange(1, episodes.steps + 1) / episodes.steps
            axes.plot(percent, result.final[curve], label=result.name, marker="o" if episodes.steps < 10 else None)
        axes.set(xlabel="% of the sketch drawn", ylabel="%", xlim=(0, 100), ylim=(0, 100), title=title)
    sides[0].legend(loc="lower right", fontsize="small")
    figure.savefig(folder / "curves.png", dpi=110)


def figure_of(width, height, columns=1):
    from matplotlib.figure import Figure                    # without pyplot: no window, nothing to close
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


# ---- the tasks -----------------------------------------------------------------------------------------------------
def open_part(config, split, size, own=data.open_faces, drawn=data.drawn_faces):
    """A part to train, choose or test on. Drawn faces are none that train.py draws, at `size`, which the first model sees."""
    if config.data:
        part = own(config.data, split)
        return part.subset(range(min(config.validation, len(part)))) if split == "val" else part
    count, seed = {"train": (config.faces, 10), "val": (config.validation, 11), "test": (config.test, 12)}[split]
    return drawn(count, size, seed, config.cache)


def open_labelled_part(config, split, size):
    faces = open_part(config, split, size)
    if faces.attributes is None:
        raise ValueError(f"{faces.name}: attributes are to be learned, but these faces have none")
    return faces


def open_captioned_part(config, split, size):
    """Drawn faces become black-and-white photographs: what train.py learned fits the coloured ones already, which leaves nothing
    to tune."""
    faces = open_part(config, split, size)
    faces.check_text()
    if split == "train" and (faces.identity == faces.identity[0]).all():
        raise ValueError(f"{faces.name} shows one person only, so nothing in it is a wrong answer; train on more people")
    if config.data:
        return faces
    grey = np.asarray(faces.pictures) @ np.array([0.299, 0.587, 0.114])                     # (N, S, S)
    pictures = np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=-1)
    return dataclasses.replace(faces, name=f"{faces.name}, black and white", pictures=pictures)


def open_episodes(config, split, size):
    return open_part(config, split, size, data.open_episodes, data.drawn_episodes)


def clamp_temperature(head):
    head.model.clamp_temperature()


RECALLS = {f"{way}_r{k}": f"{title} R@{k}" for way, title in (("img", "T→I"), ("txt", "I→T")) for k in (5, 10)}
TASKS = {
    "retrieval": Task(
        open=open_captioned_part, encode=encode_pairs, head=flip_head, loss=pair_loss, after_step=clamp_temperature,
        metrics=pair_metrics, select="r_mean",
        columns=RECALLS | {f"itc_{name}": f"{title}, not re-ranked" for name, title in RECALLS.items()},
        reads_text=lambda faces: True, draw=draw_retrieval, save=save_flip),
    "attributes": Task(
        open=open_labelled_part, encode=encode_attributes, head=attribute_head, loss=attribute_loss, after_step=lambda head: None,
        metrics=attribute_metrics, select="accuracy",
        columns={"accuracy": "accuracy", "balanced": "balanced accuracy", "average_precision": "average precision"},
        reads_text=lambda faces: False, draw=draw_attributes, save=save_attribute_head),
    "sketch": Task(
        open=open_episodes, encode=encode_sketches, head=flip_head, loss=sketch_loss, after_step=clamp_temperature,
        metrics=sketch_metrics, select="m@B",
        columns={"m@A": "m@A", "m@B": "m@B", "w@A": "w@A", "w@B": "w@B", "finished": "A, sketch finished"},
        reads_text=lambda episodes: episodes.photos.has_text, draw=draw_sketch, save=save_flip)}

# What the papers publish (FLIP, tables 3 to 5): the first columns of ours, on the data named. FLIP*: captions by grammar
# alone, FLIP†: text from LAION-Face. Attributes: by the share of the training part. FLIP's LFWA saw the test part in training.
PUBLISHED = {
    "retrieval": {
        "CelebA-Caption": {
            "ALIGN": (6.99, 11.09, 5.08, 8.65), "BLIP": (24.56, 34.09, 24.35, 34.15), "CLIP": (21.42, 30.3, 26.52, 37.22),
            "FLIP*": (38.62, 48.28, 38.14, 48.9), "FLIP†": (13.24, 20.96, 10.76, 17.08), "FLIP": (50.04, 62.04, 50.96, 62.98)},
        "MM-CelebA": {
            "ALIGN": (8.1, 12.61, 6.6, 10.53), "BLIP": (21.56, 31.25, 23.83, 33.38), "CLIP": (13.63, 21.06, 14.41, 22.48),
            "FLIP*": (23.81, 33.48, 23.7, 32.83), "FLIP†": (9.75, 15.7, 7.48, 12.25), "FLIP": (26.1, 35.75, 27.05, 37.23)}},
    "attributes": {
        "CelebA": {
            "ViT": {0.01: 89.20, 0.1: 90.21, 1: 90.77}, "CLIP": {0.01: 89.09, 0.1: 90.47, 1: 90.86},
            "FaRL": {0.01: 89.66, 0.02: 90.26, 1: 91.39}, "FLIP†": {0.01: 88.05, 0.1: 90.74, 1: 91.32},
            "FLIP": {0.01: 91.52, 0.1: 91.74, 1: 92.27}},
        "LFWA": {
            "ViT": {0.1: 79.58, 0.5: 85.19, 1: 84.16}, "CLIP": {0.1: 80.20, 0.5: 85.48, 1: 84.48},
            "FaRL": {0.1: 82.42, 0.5: 85.38, 1: 85.94}, "FLIP†": {0.1: 79.89, 0.5: 85.62, 1: 84.34},
            "FLIP": {0.1: 82.60, 0.5: 89.87, 1: 98.04}}},
    "sketch": {
        "FS2K-SDE1": {
            "SLFIR": (96.22, 45.48), "BLIP": (97.64, 46.72), "CLIP": (98.01, 57.27),
            "FLIP†": (98.14, 56.70), "FLIP": (99.49, 71.10)},
        "FS2K-SDE2": {
            "SLFIR": (90.22, 41.55), "BLIP": (97.10, 64.06), "CLIP": (96.02, 57.32),
            "FLIP†": (95.41, 59.40), "FLIP": (97.55, 64.80)},
        "User-SDE": {
            "SLFIR": (93.27, 38.91), "BLIP": (94.68, 48.99), "CLIP": (95.57, 58.38),
            "FLIP†": (89.69, 38.89), "FLIP": (97.34, 62.52)}}}


# ---- tuning --------------------------------------------------------------------------------------------------------
def tune(task, head, training, validation, config, log):
    """Train the head. Returns its weights as they came in, and as they were when the validation part liked them best, which
    may be the same."""
    matrices = [p for p in head.parameters() if p.ndim > 1]
    others = [p for p in head.parameters() if p.ndim <= 1]                                  # are not decayed
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    device, per_epoch, step = others[0].device, math.ceil(len(training) / config.batch_size), 0
    looks = {round(config.epochs * (n + 1) / config.evaluations) for n in range(config.evaluations)}
    untuned = best = copy.deepcopy(head.state_dict())
    highest = task.metrics(head, validation)[task.select]
    for epoch in tqdm(range(1, config.epochs + 1), "tuning", leave=False):
        rng = np.random.default_rng((config.seed, epoch))
        order, losses = torch.from_numpy(rng.permutation(len(training))), []
        for indices in order.tensor_split(per_epoch):       # nearly equal batches
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.epochs * per_epoch, config)
            with autocast(config, device):
                loss = task.loss(head, training, indices, rng, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            task.after_step(head)
            losses.append(loss.detach())
            step += 1
        if epoch in looks:
            found = task.metrics(head, validation)
            log.write(epoch=epoch, loss=torch.stack(losses).mean().item(),
                      **{f"val_{column}": found[column] for column in task.columns})
            if found[task.select] > highest:
                highest, best = found[task.select], copy.deepcopy(head.state_dict())
    return untuned, best


def learning_rate(step, steps, config):
    """A straight line to `lr` over the warm-up, at most a tenth of the run, times a cosine that ends at 0."""
    warmup = min(config.warmup, steps // 10)
    return config.lr * min(1.0, (step + 1) / max(1, warmup)) * (1 + math.cos(math.pi * ramp(step, warmup, steps))) / 2


class Result(NamedTuple):
    """What came of one encoder, on the test part; share: of the training part that the head has seen."""
    name: str
    before: dict            # {share: {column: metric}} of the head that tuning began with
    tuned: dict             # {share: metrics} after it

    @property
    def final(self):
        """From the largest share."""
        return self.tuned[max(self.tuned)]


def evaluate_encoder(name, model, parts, config, log):
    """Tune on one frozen encoder, for attributes with each share of the training part; then test. Returns the result and the
    head of the largest share."""
    task, shares = TASKS[config.task], sorted(config.fractions) if config.task == "attributes" else [1.0]
    training, validation = (task.encode(model, parts[split], config, split == "train") for split in ("train", "val"))
    heads = {}
    for share in shares:
        torch.manual_seed(config.seed)
        head = task.head(model, training)
        log.write(encoder=name, share=share)
        longer = dataclasses.replace(config, epochs=round(config.epochs / share))           # so that shares differ in data only
        heads[share] = head, *tune(task, head, share_of(training, share, config.seed), validation, longer, log)
    del training, validation                                # may be large
    testing = task.encode(model, parts["test"], config, False)         # not looked at before
    result = Result(name, {}, {})
    for share, (head, untuned, best) in heads.items():
        head.load_state_dict(untuned)
        metrics = task.metrics(head, testing)
        result.before[share] = {column: metrics[column] for column in task.columns}
        head.load_state_dict(best)
        result.tuned[share] = task.metrics(head, testing)
    log.write(encoder=name, **{f"test_{column}": result.final[column] for column in task.columns})
    return result, heads[max(heads)][0]


def share_of(samples, share, seed):
    """A share of the samples, by the seed; a smaller share is part of a larger one."""
    if share == 1:
        return samples
    chosen = np.random.default_rng(seed).permutation(len(samples))[:max(1, round(share * len(samples)))]
    return samples.subset(torch.from_numpy(chosen))


# ---- encoders to compare -------------------------------------------------------------------------------------------
class Encoder(NamedTuple):
    name: str
    model: FLIP
    checkpoint: str         # "" for random weights
    origin: dict            # tasks: those that it was tuned for before, checkpoint: what the first of these began with,
                            # settings: the flags of the train.py that made that, {} if another program did


def open_encoders(config):
    """The checkpoints, then random weights."""
    encoders = [load(path, config) for path in config.checkpoint]
    names = [encoder.name for encoder in encoders]
    encoders = [encoder._replace(name=f"{encoder.name} ({encoder.checkpoint})") if names.count(encoder.name) > 1 else encoder
                for encoder in encoders]
    if config.random:
        model = random_encoder(encoders[0].model, encoders[0].origin["settings"].get("small_init"), config.seed)
        encoders.append(Encoder("random frozen encoder", model, "", {}))
    return encoders


def load(path, config):
    saved = read_checkpoint(path)
    if "attributes" in saved:
        raise ValueError(f"--checkpoint {path} is the head of the task attributes; give the checkpoint it was tuned on")
    model = FLIP.from_pretrained(path)
    if not all(weights.isfinite().all() for weights in model.parameters()):
        raise ValueError(f"--checkpoint {path}: some weights are not finite numbers; its training had diverged")
    if model.tokenizer is None and config.vocabulary:
        model.use(Tokenizer.load(config.vocabulary))
    origin = saved.get("tuned") or {"tasks": [], "checkpoint": path, "settings": saved.get("training", {}).get("settings", {})}
    return Encoder(name_of(**origin), model, path, origin)


def random_encoder(like, small_init, seed):
    """A model like another with new weights, initialised as train.py would."""
    torch.manual_seed(seed)
    model = FLIP(like.config, like.tokenizer)
    if small_init:
        initialise_small(model)
    return model


def name_of(tasks, checkpoint, settings):
    """What to call an encoder in the table."""
    name = Path(checkpoint).stem
    if settings:
        kind = "ITC alone" if settings["itm_from"] >= 1 else "FLIP"
        faces = Path(settings["data"]).resolve().name if settings["data"] else "drawn faces"
        name = f"{kind}, pre-trained on {faces}"
    return ", ".join([name, *(f"tuned for {task}" for task in tasks)])


# ---- the run -------------------------------------------------------------------------------------------------------
def finetune(config):
    """The whole run; returns the results, the first checkpoint's first. What is done lies in --out before the next begins."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task, folder = TASKS[config.task], Path(config.out) / config.task
    if (folder / "table.md").exists():
        raise ValueError(f"{folder} holds the results of an earlier run; take it away, or choose another --out")
    encoders = open_encoders(config)
    parts = open_parts(config, encoders)
    log, results = Log(folder / "log.jsonl", config, start=0, writes=True), []
    for name, model, _, origin in encoders:
        print(f"{name} ...", flush=True)
        result, head = evaluate_encoder(name, freeze(model.to(device)), parts, config, log)
        results.append(result)
        (folder / "table.md").write_text(table(results, config) + "\n", encoding="utf-8")
        if len(results) == 1:
            task.save(head, result.final, origin | {"tasks": [*origin["tasks"], config.task]}, folder)
        else:
            result.final.pop("scores", None)                # may be large; the pictures show the first encoder's
        task.draw(results, parts["test"], folder)
        model.cpu()
    print(f"\n{table(results, config)}\n\n{folder}: log.jsonl, table.md, the tuned head, pictures")
    return results


def open_parts(config, encoders):
    """{split: Faces or Episodes}. All pictures are looked at first: a damaged one in the test part would be met after hours."""
    task, size = TASKS[config.task], encoders[0].model.config.vit.image_size
    parts = {split: task.open(config, split, size) for split in ("train", "val", "test")}
    for split, part in parts.items():
        if len(part) < 2:
            raise ValueError(f"{config.data}: the part \"{split}\" has {len(part)} pictures, expected at least 2")
    for encoder in encoders:
        if encoder.model.tokenizer is None and task.reads_text(parts["train"]):
            raise ValueError(f"{encoder.checkpoint} holds no vocabulary; give one with --vocabulary bert-base-uncased or a file")
    if config.data:
        for part in parts.values():
            data.check_pictures(part)
    return parts


def table(results, config):
    """Markdown: who has learned nothing, the encoders side by side, the last first, then what is published on other data."""
    columns, baseline, shares = TASKS[config.task].columns, results[0].final["baseline"], list(results[0].tuned)
    cells = list(itertools.product(columns, shares))
    if config.task == "attributes":
        header = [f"{columns[column]}, {100 * share:g} %" for column, share in cells]
        rows = [("always the majority", [baseline[column] for column, _ in cells])]
        rows += [(result.name, [result.tuned[share][column] for column, share in cells]) for result in results[::-1]]
    else:
        header, rows = list(columns.values()), [("chance", [baseline[column] for column in columns])]
        rows += [(f"{result.name}, {when}", [metrics[column] for column in columns]) for result in results[::-1]
                 for when, metrics in (("before tuning", result.before[1.0]), ("tuned", result.final))]
    rows = [(name, [f"{value:.1f}" for value in values]) for name, values in rows]
    for where, published in PUBLISHED[config.task].items():
        for name, values in published.items():
            if config.task == "attributes":
                values = [values.get(share, "") for share in shares]
            if any(values):
                rows.append((f"{name}, published on {where}", [str(value) for value in values]))
    lines = ["| " + " | ".join(["%", *header]) + " |", "|---" * (len(header) + 1) + "|"]
    for name, values in rows:
        lines.append("| " + " | ".join([name, *values, *[""] * (len(header) - len(values))]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        finetune(parse_arguments())
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")
    except KeyboardInterrupt:
        raise SystemExit("interrupted")
