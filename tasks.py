"""The three tasks."""
import dataclasses
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import ImageOps
from tqdm import tqdm

from bert import Captions
from captions import ATTRIBUTES
from common.distributed import autocast
from common.images import contact_sheet, iterate_images
from common.weights import write_checkpoint
from data import Faces, drop, load_toy_faces, open_faces
from evaluation import Validation, new_figure, plot_retrieval, rerank_metrics
from flip import project
from kernels.contrastive import contrastive_loss


@dataclass
class EncodedSplit:
    """What the encoders say of `count` pictures; each task fills what it needs."""
    count: int = 0
    faces: Faces | None = None
    vectors: torch.Tensor | None = None         # attributes: (I, V, D), and labels (I, labels)
    labels: torch.Tensor | None = None
    tokens: torch.Tensor | None = None          # retrieval: (I, L, D), T captions, their class tokens (T, D)
    captions: Captions | None = None
    cls_tokens: torch.Tensor | None = None
    image_of_text: torch.Tensor | None = None   # (T,)
    identity: torch.Tensor | None = None        # (I,)
    photos: torch.Tensor | None = None          # sketch: (I, D)
    sketches: torch.Tensor | None = None        # (I, steps, D)
    captioned: "EncodedSplit | None" = None     # what retrieval asks of the photos, to train on


class Task:
    """What the three tasks share. Each adds the metric on the validation part that decides
    (select), the titles of its table, and open, encode, learner, loss, metrics, draw, save."""
    recipe, toy_recipe, steps = {}, {}, 0       # steps: of the sketches to draw
    fractions = [1.0]                           # of the training part, each a run of its own
    baseline_name, has_own_head = "chance", False  # who has learned nothing; is the learner a new module?

    def __init__(self, config):
        self.config = config

    def open(self, split, model):
        """A part to train, choose or test on. Drawn faces are none that train.py draws, in the size
        that the model sees."""
        config, size = self.config, model.config.vit.image_size
        if config.data:
            faces = open_faces(config.data, split, config.cache, max_errors=config.max_errors)
            return faces.subset(range(min(config.validation, len(faces)))) if split == "val" else faces
        parts = {"train": (config.faces, 10), "val": (config.validation, 11), "test": (config.test, 12)}
        count, seed = parts[split]
        return load_toy_faces(count, size, seed, config.cache, self.steps)

    def encode_faces(self, compute, faces, model):
        """compute(pixels (B, 3, S, S)) of the faces' pictures, and the faces; those whose pictures
        turn out damaged are left out of both."""
        errors, title = {}, f"encoding {faces.name}"
        values = self.encode_pictures(compute, faces.picture, len(faces), model, title, errors)
        return values, drop(faces, errors, self.config.max_errors)

    @torch.no_grad()
    def encode_pictures(self, compute, read, count, model, title, errors=None):
        """compute(pixels (B, 3, S, S)) of the pictures that `iterate_images` reads, in `storage`."""
        out, done, device = None, 0, model.temperature.device
        with autocast(self.config, device):
            for numbers, pixels in iterate_images(read, count, model.config.vit.image_size, title, errors=errors):
                values = compute(pixels.to(device)).cpu()
                out = temporary_memmap((count, *values.shape[1:]), self.config.out) if out is None else out
                out[done:done + len(numbers)] = values.to(out.dtype)
                done += len(numbers)
        return out[:done] if done else torch.empty(0)


def temporary_memmap(shape, folder):
    """An empty float16 tensor in a file without a name, which is gone when the run ends: what the
    encoders say of a large set does not fit into memory."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    size, free = 2 * math.prod(shape), shutil.disk_usage(folder).free
    if size > free:             # the file has holes at first: nothing else would complain in time
        raise ValueError(f"{folder} has {free / 1e9:.0f} GB free, but {size / 1e9:.0f} GB go there for what "
                         f"the encoders say; choose another --out")
    return torch.from_numpy(np.memmap(tempfile.TemporaryFile(dir=folder), np.float16, "w+", shape=shape))


# ---- attributes: pooled tokens of four depths, LayerNorm, weighted sum, linear -------------------
def pool_tokens(vit, images):
    """Images (B, 3, S, S) -> (B, V, D): after a third, half and two thirds of the blocks (4, 6 and
    8 of 12), before any final norm, and at the end, after it: the class token, and mean and maximum
    of the patch tokens."""
    tokens, hidden = vit(images, return_hidden=True)            # (B, L, D), and the same after each block
    first, last = max(1, vit.config.depth // 3), math.ceil(2 * vit.config.depth / 3)
    depths = sorted({first, math.ceil((first + last) / 2), last})       # three, where there are so many
    vectors = [vector for x in (*(hidden[depth - 1] for depth in depths), tokens)
               for vector in (x[:, 0], x[:, 1:].mean(1), x[:, 1:].amax(1))]
    return torch.stack(vectors, dim=1)


class AttributeHead(nn.Module):
    """Pooled vectors (B, V, D) -> logits (B, labels): one LayerNorm for all, a learned weighted sum
    of the V, a linear layer."""

    def __init__(self, vectors, width, labels):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.weights = nn.Parameter(torch.full((vectors,), 1 / vectors))
        self.linear = nn.Linear(width, labels)

    def forward(self, x):
        return self.linear(torch.einsum("v,bvd->bd", self.weights, self.norm(x)))


class Attributes(Task):
    """Which of the 40 does a face have? Learned from shares of the training part."""
    # The official learning rate is 0.3 on CelebA and 0.003 on LFWA, for plain gradient descent.
    recipe = dict(epochs=100, batch_size=256, lr=1e-3, warmup=0, weight_decay=0.0)
    toy_recipe = dict(epochs=60, lr=3e-3, validation=500)
    selection_metric = "accuracy"
    columns = {"accuracy": "accuracy", "balanced": "balanced accuracy",
               "average_precision": "average precision"}
    baseline_name, has_own_head = "always the majority", True

    def __init__(self, config):
        super().__init__(config)
        self.names, self.fractions = config.labels or ATTRIBUTES, sorted(config.fractions)

    def open(self, split, model):
        faces = super().open(split, model)
        if faces.attributes is None:
            raise ValueError(f"{faces.name}: attributes are to be learned, but these faces have none")
        return faces

    def encode(self, model, faces, for_training):
        """vectors (I, V, D), labels (I, labels) float, 0 or 1"""
        compute = lambda images: pool_tokens(model.student.image, images)
        vectors, faces = self.encode_faces(compute, faces, model)
        labels = faces.attributes[:, [ATTRIBUTES.index(name) for name in self.names]]
        labels = torch.from_numpy(labels).float()
        return EncodedSplit(count=len(faces), faces=faces, vectors=vectors, labels=labels)

    def trainable_module(self, model, samples):
        _, vectors, width = samples.vectors.shape
        return AttributeHead(vectors, width, len(self.names)).to(model.temperature.device)

    def loss(self, head, samples, indices, rng, step):
        """Binary cross-entropy, mean over samples and labels."""
        device = head.weights.device
        logits = head(samples.vectors[indices].to(device).float())
        return F.binary_cross_entropy_with_logits(logits, samples.labels[indices].to(device))

    @torch.no_grad()
    def metrics(self, head, samples):
        """In percent. Who never names a rare attribute is nearly always right, so accuracy
        flatters; balanced accuracy, the mean of the rates at which the present and the absent are
        recognised, and average precision do not. Means over the labels; an attribute that everyone
        or nobody has counts in accuracy only. The majority is that of these samples."""
        device = head.weights.device
        logits = torch.cat([head(some.to(device).float()).cpu() for some in samples.vectors.split(1024)])
        truth, said = samples.labels.bool(), logits > 0                                 # (I, labels)
        accuracy = (said == truth).double().mean(0)                                     # (labels,)
        present = (said & truth).sum(0).double() / truth.sum(0)
        absent = (~said & ~truth).sum(0).double() / (~truth).sum(0)
        balanced = (present + absent) / 2                                               # nan without one
        precision = torch.stack([average_precision(*pair) for pair in zip(logits.T, truth.T)])
        precision[balanced.isnan()] = torch.nan
        frequency = truth.double().mean(0)
        columns = {"accuracy": accuracy, "balanced": balanced, "average_precision": precision,
                   "majority": torch.maximum(frequency, 1 - frequency)}
        per_label = {name: {column: 100 * values[n].item() for column, values in columns.items()}
                     for n, name in enumerate(self.names)}
        means = {column: 100 * values.nanmean().item() for column, values in columns.items()}
        positives = truth.sum(0)[~balanced.isnan()].double()
        baseline = {"accuracy": means["majority"], "balanced": 50.0,
                    "average_precision": 100 * chance_precision(positives, len(truth)).mean().item()}
        return means | {"per_label": per_label, "baseline": baseline}

    def draw(self, results, faces, folder):
        """Accuracy for each attribute, from the largest share of the training part, beside who
        always says the more frequent answer."""
        per_label = results[0].final["per_label"]
        names = sorted(per_label, key=lambda name: per_label[name]["accuracy"] - per_label[name]["majority"])
        figure, axes = new_figure(9, 1.5 + 0.28 * len(names))
        places = np.arange(len(names))
        for column, shift, label, color in (("accuracy", 0.2, results[0].name, "tab:blue"),
                                            ("majority", -0.2, "always the majority", "lightgrey")):
            values = [per_label[name][column] for name in names]
            axes.barh(places + shift, values, 0.4, label=label, color=color)
        axes.set(yticks=places, yticklabels=[name.replace("_", " ") for name in names], xlim=(50, 100),
                 ylim=(-1, len(names)), xlabel="accuracy on the test part, %")
        figure.legend(loc="outside upper right", ncols=2)
        figure.savefig(folder / "attributes.png", dpi=110)

    def save(self, model, head, folder):
        write_checkpoint({"model": head.state_dict(), "attributes": list(self.names)}, folder / "head.pt")


def average_precision(scores, labels):
    """Mean precision at the rank of each positive; scores, labels (I,); ties in the samples'
    order."""
    hits = labels[scores.argsort(descending=True, stable=True)].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return (precision * hits).sum() / hits.sum()


def chance_precision(positives, count):
    """The average precision expected of an order by chance. At the rank n of a positive, it is a
    hit itself, and each of the n - 1 before it with probability (positives - 1) / (count - 1); the
    mean over all n has a harmonic number in it."""
    harmonic = (1 / torch.arange(1, count + 1).double()).sum()
    return (harmonic + (positives - 1) / (count - 1) * (count - harmonic)) / count


# ---- retrieval: FLIP's own projections, matching head and temperature ----------------------------
class Retrieval(Task):
    """The face for a sentence and the sentence for a face."""
    toy_recipe = dict(epochs=30, batch_size=256, lr=3e-3, itm_every=5, num_evaluations=3, k_test=16, faces=2000,
                      validation=300, captions=8)
    selection_metric = "r_mean"
    columns = {"img_r5": "T→I R@5", "img_r10": "T→I R@10", "txt_r5": "I→T R@5", "txt_r10": "I→T R@10"}
    columns = columns | {f"itc_{name}": f"{title}, not re-ranked" for name, title in columns.items()}

    def open(self, split, model):
        """Drawn faces become black-and-white photographs: what train.py learned fits the coloured
        ones already, which leaves nothing to tune."""
        faces = super().open(split, model)
        faces.require_text()
        model.require_tokenizer()
        if split == "train" and (faces.identity == faces.identity[0]).all():
            raise ValueError(f"{faces.name} shows one person only, so nothing in it is a wrong answer; "
                             f"train on more people")
        if self.config.data:
            return faces
        grey = np.asarray(faces.images) @ np.array([0.299, 0.587, 0.114])                   # (I, S, S)
        images = np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=-1)
        return dataclasses.replace(faces, name=f"{faces.name}, black and white", images=images)

    def encode(self, model, faces, for_training):
        """tokens (I, L, D) of the pictures, captions (T of them), cls_tokens (T, D) of these,
        image_of_text (T,), identity (I,). To train on, the grammar writes several captions for each
        face; to evaluate, those of pre-training."""
        tokens, faces = self.encode_faces(model.student.image, faces, model)
        if for_training and faces.captions is None:
            image_of_text = torch.arange(len(faces)).repeat_interleave(self.config.captions)
            texts = [faces.caption(i, np.random.default_rng((2, i, n % self.config.captions)))
                     for n, i in enumerate(tqdm(image_of_text.tolist(), "writing captions", leave=False))]
        else:
            shown = Validation.of(faces)
            texts, image_of_text = shown.texts, shown.image_of_text
        captions = model.tokenizer(texts)
        return EncodedSplit(count=len(faces), faces=faces, tokens=tokens, captions=captions,
                            image_of_text=image_of_text, cls_tokens=self.encode_captions(model, captions),
                            identity=torch.tensor(faces.identity))

    @torch.no_grad()
    def encode_captions(self, model, captions):
        """The [CLS] token of each caption, (T, D)."""
        device, parts = model.temperature.device, torch.arange(len(captions)).split(500)
        with autocast(self.config, device):
            return torch.cat([
                model.student.text(captions.select(some).to(device), first_token_only=True).float().cpu()
                for some in tqdm(parts, "encoding captions", leave=False)])

    def trainable_module(self, model, samples):
        """The model itself, of which these parts are trained on, shared by all that follows."""
        for part in (model.student.image_projection, model.student.text_projection, model.matching_head):
            part.requires_grad_(True)
        model.temperature.requires_grad_(True)
        return model

    def loss(self, model, samples, indices, rng, step):
        """ITC + ITM of the pictures `indices` (B,), each with one of its captions; see losses.py
        and flip.py. ITC trains the projections and the temperature, ITM the matching head alone; so
        ITM, which costs a pass of the text encoder, can be left out of most steps without changing
        ITC."""
        chosen = sample_caption_index(samples.image_of_text, indices, rng)                  # (B,)
        image = project(samples.tokens[indices, 0], model.student.image_projection)
        text = project(samples.cls_tokens[chosen], model.student.text_projection)
        identity = samples.identity[indices].to(image.device)
        itc = in_batch_contrastive_loss(image, text, identity, model.temperature)
        if step % self.config.itm_every:
            return itc
        generator = torch.Generator().manual_seed(int(rng.integers(2 ** 62)))
        hardness = 1.0 if model.config.hardness is None else model.config.hardness
        negatives = model.sample_negatives(image.detach(), text.detach(), identity, hardness, generator)
        captions = samples.captions.select(chosen).to(image.device)
        tokens = samples.tokens[indices].to(image.device).float()
        return itc + model.itm_loss(tokens, captions, *negatives)

    @torch.no_grad()
    def metrics(self, model, samples):
        """Recalls in percent by the official names, by cosine alone ("itc_...") and re-ranked."""
        image = project(samples.tokens[:, 0], model.student.image_projection)
        similarity = image @ project(samples.cls_tokens, model.student.text_projection).T     # (I, T)
        metrics, scores = rerank_metrics(model, samples.tokens, samples.captions, similarity,
                                         samples.image_of_text, self.config)
        return metrics | {"scores": scores, "baseline": chance_recalls(samples.image_of_text)}

    def draw(self, results, faces, folder):
        """For some captions of the test part the five faces that the first checkpoint ranks
        best."""
        plot_retrieval(Validation.of(faces), results[0].final["scores"], folder / "retrieval.png")

    def save(self, model, head, folder):
        """A checkpoint like any other; its momentum encoder and queue are still those of
        pre-training."""
        write_checkpoint(model.checkpoint(), folder / "flip.pt")


def sample_caption_index(image_of_text, indices, rng):
    """One of the captions of each picture, by chance: numbers (B,)."""
    begin = torch.searchsorted(image_of_text, indices)
    count = torch.searchsorted(image_of_text, indices, right=True) - begin
    return begin + (torch.from_numpy(rng.random(len(indices))) * count).long()


def in_batch_contrastive_loss(one, other, identity, temperature):
    """The contrastive loss both ways within a batch, features (B, E) each. As in pre-training, keys
    carry no gradient. No queue and no momentum encoder: behind frozen encoders all keys of a batch
    are as fresh as can be."""
    def one_way(rows, keys):        # at alpha 0 the momentum features, here the rows again, do not count
        return contrastive_loss(rows, rows, [keys.detach()], identity, [identity], temperature, alpha=0.0)
    return (one_way(one, other) + one_way(other, one)) / 2


def chance_recalls(image_of_text):
    """Recalls in percent of an order by chance: for an image, that one of its captions is among the
    first k."""
    T, counts, recall = len(image_of_text), image_of_text.bincount().tolist(), {}
    for k in (5, 10):
        first = min(k, T)
        misses = [math.comb(T - n, first) / math.comb(T, first) for n in counts]    # all its n come later
        recall[f"img_r{k}"] = 100 * min(1, k / len(counts))
        recall[f"txt_r{k}"] = 100 * (1 - float(np.mean(misses)))
    return recall | {f"itc_{name}": value for name, value in recall.items()}


# ---- sketch: photos and growing sketches through the same encoder and projection -----------------
class Sketch(Retrieval):
    """The photo for a sketch that is still being drawn."""
    recipe = dict(epochs=100, lr=1e-4, warmup=200)
    toy_recipe = dict(epochs=600, batch_size=128, lr=1e-2, itm_every=40, faces=800, validation=100, test=200,
                      captions=8)
    steps = 70
    selection_metric = "m@B"
    columns = {name: name for name in ("m@A", "m@B", "w@A", "w@B")} | {"finished": "A, sketch finished"}

    def open(self, split, model):
        faces = Task.open(self, split, model)
        if faces.sketches is None:
            raise ValueError(f"{faces.name}: photos are to be found from sketches, but these have none")
        if split == "train" and faces.has_text:
            model.require_tokenizer()
        return faces

    def encode(self, model, faces, for_training):
        """Class tokens: photos (I, D) and sketches (I, steps, D), from the first stroke on;
        identity (I,); paired: for training, what retrieval asks of photos that have captions, else
        None."""
        captioned = None
        class_token = lambda images: model.student.image(images, first_token_only=True)
        if for_training and faces.has_text:
            captioned = super().encode(model, faces, for_training)
            photos, faces = captioned.tokens[:, 0].float(), captioned.faces
        else:
            photos, faces = self.encode_faces(class_token, faces, model)
        # A sketch is white on black; an encoder of photographs tells more of dark lines on a light
        # ground.
        count, steps = len(faces), faces.sketch_steps
        read = lambda n, size: ImageOps.invert(faces.sketch(n // steps, n % steps))
        sketches = self.encode_pictures(class_token, read, count * steps, model,
                                        f"encoding the sketches of {faces.name}").unflatten(0, (count, steps))
        return EncodedSplit(count=count, faces=faces, photos=photos, sketches=sketches, captioned=captioned,
                            identity=torch.tensor(faces.identity))

    def loss(self, model, samples, indices, rng, step):
        """IIC, the contrastive loss between a step of the sketch and its photo, plus ITC + ITM of
        the photo where it has captions."""
        steps = torch.from_numpy(rng.integers(samples.sketches.shape[1], size=len(indices)))
        sketch = project(samples.sketches[indices, steps], model.student.image_projection)
        photo = project(samples.photos[indices], model.student.image_projection)
        iic = in_batch_contrastive_loss(sketch, photo, samples.identity[indices].to(sketch.device), model.temperature)
        if samples.captioned is None:
            return iic
        return iic + super().loss(model, samples.captioned, indices, rng, step)

    @torch.no_grad()
    def metrics(self, model, samples):
        photos = project(samples.photos, model.student.image_projection)                      # (I, E)
        similarity = project(samples.sketches, model.student.image_projection) @ photos.T     # (I, steps, I)
        metrics = early_retrieval(sketch_ranks(similarity), len(photos))
        each_rank = torch.arange(1, len(photos) + 1)[:, None].expand(-1, similarity.shape[1])
        baseline = early_retrieval(each_rank, len(photos)) | {"finished": 50.0}
        metrics |= {"finished": metrics["percentile"][-1]}
        return metrics | {"scores": similarity.cpu(), "baseline": baseline}

    def draw(self, results, faces, folder, stages=6, top=5):
        """One sketch as it grows, with the best photos at each stage; and how early photos are
        found, for all encoders."""
        similarity, steps = results[0].final["scores"], faces.sketch_steps                         # (I, steps, I)
        ranks = sketch_ranks(similarity)
        n = int((1 / ranks.double()).mean(1).argsort()[len(ranks) // 2])            # as hard as the median
        rows = []
        for t in sorted({max(0, steps * stage // stages - 1) for stage in range(1, stages + 1)}):
            best = similarity[n, t].argsort(descending=True)[:top].tolist()
            tiles = [(faces.picture(i), f"{similarity[n, t, i]:.2f}", i == n) for i in best]
            rows.append((f"step {t + 1} of {steps}: the true photo has rank {ranks[n, t]} of {len(ranks)}",
                         [(faces.sketch(n, t), "", False), *tiles]))
        contact_sheet(rows, tile=112, legend="green: the true photo").save(folder / "sketch.png")
        figure, sides = new_figure(11, 4.2, columns=2)
        percent = 100 * np.arange(1, steps + 1) / steps
        columns = {"percentile": "mean rank percentile", "inverse": "mean of 1 / rank"}
        for axes, (curve, title) in zip(sides, columns.items()):
            for result in results:
                axes.plot(percent, result.final[curve], label=result.name, marker="o" if steps < 10 else None)
            axes.set(xlabel="% of the sketch drawn", ylabel="%", xlim=(0, 100), ylim=(0, 100), title=title)
        sides[0].legend(loc="lower right", fontsize="small")
        figure.savefig(folder / "curves.png", dpi=110)


def sketch_ranks(similarity):
    """Similarity (I sketches, steps, I photos), photo i belonging to sketch i -> ranks (I, steps),
    the best is 1; a photo that is as similar as the true one ranks before it."""
    true = similarity.diagonal(dim1=0, dim2=2).T                                            # (I, steps)
    return (~(similarity < true[..., None])).sum(-1)


def early_retrieval(ranks, photos):
    """Ranks (I, steps) among `photos` photos -> m@A (mean rank percentile) and m@B (mean of 1 /
    rank), in percent over all steps; w@A and w@B weigh step t of n by exp(-t / n) and do not divide
    by the weights' sum, so that their highest is about 63 for many steps; and the curves of both
    over the steps."""
    steps = ranks.shape[1]
    percentile, inverse = 100 * (photos - ranks.double()) / (photos - 1), 100 / ranks.double()
    weight = torch.exp(-torch.arange(1, steps + 1, dtype=torch.float64, device=ranks.device) / steps)
    return {"m@A": percentile.mean().item(), "m@B": inverse.mean().item(),
            "w@A": (weight * percentile).mean().item(), "w@B": (weight * inverse).mean().item(),
            "percentile": percentile.mean(0).tolist(), "inverse": inverse.mean(0).tolist()}


TASKS = {"retrieval": Retrieval, "attributes": Attributes, "sketch": Sketch}
