"""The three tasks on frozen encoders, a class each (FLIP paper, section 5 and figure 2, panels b to d):
what is encoded once, what is trained, its loss, its metrics.

    Retrieval     find the face for a caption, and the caption for a face
    Attributes    predict the 40 attributes of a face
    Sketch        find the photo for a sketch that is still being drawn

The encoders are frozen, so an image is encoded once, before the first epoch. (ITM and re-ranking
still run the text encoder, on captions and image tokens.) The attributes task trains a new linear
head; retrieval and sketch train FLIP's own projections, matching head and temperature. (Sketch
without captions trains the image projection and the temperature.) finetune.py calls the methods.

Shapes: see vit.py; I images, T captions, V pooled vectors per image.
"""
import dataclasses
import math
from dataclasses import dataclass

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
from common.script import temporary_memmap
from common.weights import write_checkpoint
from data import Faces, drop, load_toy_faces, open_faces
from evaluation import EvaluationSet, new_figure, plot_retrieval, retrieval_metrics, warn_of_chance
from flip import FLIP, project, rerank
from kernels.contrastive import contrastive_loss


@dataclass
class EncodedSplit:
    """A split of `count` samples, encoded by the frozen encoders; each task fills the fields it needs."""
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
    captioned: "EncodedSplit | None" = None     # sketch, training: the photos with captions, as for retrieval


class Task:
    """What the tasks share. finetune.py calls `open` for each split; then, for each encoder, `encode` for
    each split, `trainable_module`, `loss` in each step, `metrics` in each evaluation, and `draw`; `save`
    after the first. config: finetune.Config. A task names its `selection_metric` (on the validation split)
    and its columns, {metric: (title of the table, header)}; an empty header shows the fraction."""
    recipe, toy_recipe = {}, {}             # overrides of the flags' defaults: always, and for drawn faces
    steps = 0                               # steps of the sketches to draw
    fractions = [1.0]                       # of the training split; each is trained on separately
    baseline_name = "chance"                # first row of the table
    note = toy_note = ""                    # printed below the table: always, and for drawn faces
    has_own_head = False                    # False: trains parts of FLIP itself

    def __init__(self, config):
        self.config = config

    def open(self, split: str, model: FLIP) -> Faces:
        """A split of --data, or drawn faces that train.py never uses. Raises ValueError if the task cannot
        use them."""
        config, size = self.config, model.config.vit.image_size
        if config.data:
            faces = open_faces(config.data, split, config.cache, max_errors=config.max_errors,
                               outside=config.outside)
            return faces.subset(range(min(config.validation, len(faces)))) if split == "val" else faces
        sizes = {"train": (config.faces, 10), "val": (config.validation, 11), "test": (config.test, 12)}
        count, seed = sizes[split]
        return load_toy_faces(count, size, seed, config.cache, self.steps)

    def encode_faces(self, compute, faces, model):
        """compute(pixels (B, 3, S, S)) for all faces, and the faces; both without the faces whose images
        cannot be read."""
        errors, title = {}, f"encoding {faces.name}"
        values = self.encode_pictures(compute, faces.picture, len(faces), model, title, errors)
        return values, drop(faces, errors, self.config.max_errors)

    @torch.no_grad()
    def encode_pictures(self, compute, read, count, model, title, errors=None):
        """compute(pixels (B, 3, S, S)) for the images of `iterate_images`, in a `temporary_memmap`."""
        out, done, device = None, 0, model.device
        with autocast(self.config.precision, device):
            size = model.config.vit.image_size
            for indices, pixels in iterate_images(read, count, size, title, errors=errors):
                values = compute(pixels.to(device)).cpu()
                out = temporary_memmap((count, *values.shape[1:]), self.config.out) if out is None else out
                out[done:done + len(indices)] = values.to(out.dtype)                    # float16
                done += len(indices)
        return out[:done] if done else torch.empty(0)


# ---- attributes: pooled tokens of four depths, LayerNorm, weighted sum, linear -------------------
def pool_tokens(vit, images):
    """Images (B, 3, S, S) -> V pooled vectors (B, V, D): class token, mean and maximum of the patch tokens,
    each after 1/3, 1/2 and 2/3 of the blocks (4, 6 and 8 of 12) and after the final norm."""
    tokens, hidden = vit(images, return_hidden=True)            # (B, L, D), and that after each block
    first, last = max(1, vit.config.depth // 3), math.ceil(2 * vit.config.depth / 3)
    depths = sorted({first, math.ceil((first + last) / 2), last})       # fewer in a shallow ViT
    vectors = [vector for x in (*(hidden[depth - 1] for depth in depths), tokens)
               for vector in (x[:, 0], x[:, 1:].mean(1), x[:, 1:].amax(1))]
    return torch.stack(vectors, dim=1)


class AttributeHead(nn.Module):
    """Pooled vectors (B, V, D) -> logits (B, labels): LayerNorm, learned weighted sum over V, linear."""

    def __init__(self, vectors, width, labels):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.weights = nn.Parameter(torch.full((vectors,), 1 / vectors))
        self.linear = nn.Linear(width, labels)

    def forward(self, x):
        return self.linear(torch.einsum("v,bvd->bd", self.weights, self.norm(x)))


class Attributes(Task):
    """Predict the 40 attributes of a face, trained on fractions of the training split."""
    # the official learning rates, 0.3 on CelebA and 0.003 on LFWA, are for SGD
    recipe = dict(epochs=100, batch_size=256, lr=1e-3, warmup=0, weight_decay=0.0)
    toy_recipe = dict(epochs=60, lr=3e-3, validation=500)
    selection_metric = "accuracy"
    columns = {"accuracy": ("accuracy", ""), "balanced": ("balanced accuracy", "")}
    baseline_name, has_own_head = "majority class", True

    def __init__(self, config):
        super().__init__(config)
        self.fractions = sorted(config.fractions)

    def open(self, split, model):
        faces = super().open(split, model)
        if faces.attributes is None:
            raise ValueError(f"{faces.name}: expected attributes to learn, as in CelebA or LFWA; found none")
        return faces

    def encode(self, model, faces, for_training):
        """Fill vectors (I, V, D) and labels (I, labels), float, 0 or 1."""
        compute = lambda images: pool_tokens(model.student.image, images)
        vectors, faces = self.encode_faces(compute, faces, model)
        labels = torch.from_numpy(np.array(faces.attributes)).float()
        return EncodedSplit(count=len(faces), faces=faces, vectors=vectors, labels=labels)

    def trainable_module(self, model, samples):
        _, vectors, width = samples.vectors.shape
        return AttributeHead(vectors, width, len(ATTRIBUTES)).to(model.device)

    def loss(self, head, samples, indices, rng, step):
        """Binary cross-entropy, mean over samples and labels."""
        device = head.weights.device
        logits = head(samples.vectors[indices].to(device).float())
        return F.binary_cross_entropy_with_logits(logits, samples.labels[indices].to(device))

    @torch.no_grad()
    def metrics(self, head, samples):
        """In percent, means over labels. For rare attributes, always predicting "absent" has high
        accuracy; balanced accuracy, the mean of true positive and true negative rate, corrects for that.
        Labels with a single class count towards accuracy only. The majority class is computed on the
        samples being evaluated."""
        device = head.weights.device
        logits = torch.cat([head(chunk.to(device).float()).cpu() for chunk in samples.vectors.split(1024)])
        truth, predicted = samples.labels.bool(), logits > 0                            # (I, labels)
        accuracy = (predicted == truth).double().mean(0)                                # (labels,)
        sensitivity = (predicted & truth).sum(0).double() / truth.sum(0)
        specificity = (~predicted & ~truth).sum(0).double() / (~truth).sum(0)
        balanced = (sensitivity + specificity) / 2                                      # NaN if one class
        frequency = truth.double().mean(0)
        columns = {"accuracy": accuracy, "balanced": balanced,
                   "majority": torch.maximum(frequency, 1 - frequency)}
        per_label = {name: {column: 100 * values[n].item() for column, values in columns.items()}
                     for n, name in enumerate(ATTRIBUTES)}
        means = {column: 100 * values.nanmean().item() for column, values in columns.items()}
        return means | {"per_label": per_label,
                        "baseline": {"accuracy": means["majority"], "balanced": 50.0}}

    def draw(self, results, faces, folder):
        """Plot the accuracy per attribute, trained on the largest fraction, beside the majority class."""
        per_label = results[0].final["per_label"]
        names = sorted(per_label, key=lambda name: per_label[name]["accuracy"] - per_label[name]["majority"])
        figure, axes = new_figure(9, 1.5 + 0.28 * len(names))
        ticks = np.arange(len(names))
        for column, shift, label, color in (("accuracy", 0.2, results[0].name, "tab:blue"),
                                            ("majority", -0.2, "majority class", "lightgrey")):
            values = [per_label[name][column] for name in names]
            axes.barh(ticks + shift, values, 0.4, label=label, color=color)
        axes.set(yticks=ticks, yticklabels=[name.replace("_", " ") for name in names], xlim=(50, 100),
                 ylim=(-1, len(names)), xlabel="accuracy on the test split, %")
        figure.legend(loc="outside upper right", ncols=2)
        figure.savefig(folder / "attributes.png", dpi=110)

    def save(self, model, head, folder):
        write_checkpoint({"model": head.state_dict(), "attributes": list(ATTRIBUTES)}, folder / "head.pt")


# ---- retrieval: FLIP's own projections, matching head and temperature ----------------------------
class Retrieval(Task):
    """Find the face for a caption and the caption for a face."""
    toy_recipe = dict(epochs=30, batch_size=256, lr=3e-3, itm_every=5, num_evaluations=3, k_test=16,
                      faces=2000, validation=300, captions=8)
    toy_note = "Drawn faces are grey here, unlike in pre-training, so that there is something to learn.\n"
    selection_metric = "r_mean"
    columns = {f"{prefix}{way}_r{k}": (title, f"{header} R@{k}")
               for prefix, title in (("itc_", "ITC alone"), ("", "re-ranked"))
               for way, header in (("img", "text to image"), ("txt", "image to text")) for k in (5, 10)}

    def open(self, split, model):
        """Drawn faces are converted to greyscale: a domain shift from pre-training, so that there is
        something to learn."""
        faces = super().open(split, model)
        faces.require_text()
        model.require_tokenizer()
        if split == "train" and (faces.identity == faces.identity[0]).all():
            raise ValueError(f"{faces.name} shows one person only, so there are no negatives; train on more "
                             f"people")
        if split == "test":
            warn_of_chance(faces)
        if self.config.data:
            return faces
        grey = np.asarray(faces.images) @ np.array([0.299, 0.587, 0.114])                   # (I, S, S)
        images = np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=-1)
        return dataclasses.replace(faces, name=f"{faces.name}, greyscale", images=images)

    def encode(self, model, faces, for_training):
        """Fill tokens, captions, cls_tokens, image_of_text and identity. For training, the grammar writes
        config.captions captions per face; for evaluation, the captions are those of `EvaluationSet`."""
        tokens, faces = self.encode_faces(model.student.image, faces, model)
        if for_training and faces.captions is None:
            image_of_text = torch.arange(len(faces)).repeat_interleave(self.config.captions)
            texts = [faces.caption(i, np.random.default_rng((2, i, n % self.config.captions)))
                     for n, i in enumerate(tqdm(image_of_text.tolist(), "writing captions", leave=False))]
        else:
            captioned = EvaluationSet.of(faces)
            texts, image_of_text = captioned.texts, captioned.image_of_text
        captions, device = model.tokenizer(texts), model.device
        with torch.no_grad(), autocast(self.config.precision, device):
            cls_tokens = model.student.cls_tokens(captions.to(device)).float().cpu()
        return EncodedSplit(count=len(faces), faces=faces, tokens=tokens, captions=captions,
                            image_of_text=image_of_text, cls_tokens=cls_tokens,
                            identity=torch.tensor(faces.identity))

    def trainable_module(self, model, samples):
        """The model itself, with only projections, matching head and temperature trainable."""
        for part in (model.student.image_projection, model.student.text_projection, model.matching_head):
            part.requires_grad_(True)
        model.temperature.requires_grad_(True)
        return model

    def loss(self, model, samples, indices, rng, step):
        """ITC + ITM of the images `indices` (B,), each with one of its captions; see losses.py and flip.py.
        ITC trains projections and temperature, ITM only the matching head. ITM costs a pass of the
        text encoder, and skipping it in most steps does not change the gradients of ITC."""
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
        """`rerank_metrics` of the samples, with the chance level and the text-to-image scores."""
        image = project(samples.tokens[:, 0], model.student.image_projection)
        similarity = image @ project(samples.cls_tokens, model.student.text_projection).T     # (I, T)
        metrics, scores = rerank_metrics(model, samples.tokens, samples.captions, similarity,
                                         samples.image_of_text, self.config)
        return metrics | {"scores": scores, "baseline": chance_recalls(samples.image_of_text)}

    def draw(self, results, faces, folder):
        """For some captions of the test split, plot the faces that the first checkpoint ranks highest."""
        plot_retrieval(EvaluationSet.of(faces), results[0].final["scores"], folder / "retrieval.png")

    def save(self, model, head, folder):
        """Save a complete checkpoint; momentum encoder and queue are still those of pre-training."""
        write_checkpoint(model.checkpoint(), folder / "flip.pt")


def rerank_metrics(model, image_tokens, captions, similarity, image_of_text, config):
    """`retrieval_metrics` after re-ranking and by cosine alone ("itc_..."), and the re-ranked
    text-to-image scores (T, I). image_tokens (I, L, D), T captions, similarity (I, T): cosines."""
    device = similarity.device
    with autocast(config.precision, device):
        scores = rerank(model, image_tokens, captions.to(device), similarity, config.k_test, progress=True)
    itc = retrieval_metrics(similarity, similarity.T, image_of_text.to(device))
    reranked = retrieval_metrics(*scores, image_of_text.to(device))
    return reranked | {f"itc_{name}": value for name, value in itc.items()}, scores[1].cpu()


def sample_caption_index(image_of_text, indices, rng):
    """A random caption of each image: indices (B,)."""
    start = torch.searchsorted(image_of_text, indices)
    count = torch.searchsorted(image_of_text, indices, right=True) - start
    return start + (torch.from_numpy(rng.random(len(indices))) * count).long()


def in_batch_contrastive_loss(one, other, identity, temperature):
    """Symmetric contrastive loss within a batch, features (B, E) each. As in pre-training, no gradient
    flows into the keys. It needs no queue: a pair costs only two projections, so a larger batch is cheap."""
    def one_way(rows, keys):        # the second argument, the momentum features, is unused at alpha 0
        return contrastive_loss(rows, rows, keys.detach(), identity, identity, temperature, alpha=0.0)
    return (one_way(one, other) + one_way(other, one)) / 2


def chance_recalls(image_of_text):
    """Expected recalls in percent of a random ranking; an image counts if any of its captions is among
    the first k."""
    T, counts, recall = len(image_of_text), image_of_text.bincount().tolist(), {}
    for k in (5, 10):
        first = min(k, T)
        misses = [math.comb(T - n, first) / math.comb(T, first) for n in counts]    # none of n captions found
        recall[f"img_r{k}"] = 100 * min(1, k / len(counts))
        recall[f"txt_r{k}"] = 100 * (1 - float(np.mean(misses)))
    return recall | {f"itc_{name}": value for name, value in recall.items()}


# ---- sketch: photos and growing sketches through the same encoder and projection -----------------
class Sketch(Retrieval):
    """Find the photo for a sketch that is still being drawn (sketch-less face retrieval)."""
    recipe = dict(epochs=100, lr=1e-4, warmup=200)
    toy_recipe = dict(epochs=600, batch_size=128, lr=1e-2, itm_every=40, faces=800, validation=100, test=200,
                      captions=8)
    steps = 70
    note = ("m@A: mean rank percentile of the photo, m@B: mean reciprocal rank, over all stages;\n"
            "w@A, w@B: the same, early stages weighted more; A: the percentile for the finished sketch.\n")
    toy_note = ""
    selection_metric = "m@B"
    columns = {name: ("sketch", name) for name in ("m@A", "m@B", "w@A", "w@B")} | {
        "finished": ("sketch", "A, finished")}

    def open(self, split, model):
        faces = Task.open(self, split, model)
        if faces.sketches is None:
            raise ValueError(f"{faces.name}: expected sketches, as in FS2K-SDE or FS2K; found none")
        if split == "train" and faces.has_text:
            model.require_tokenizer()
        return faces

    def encode(self, model, faces, for_training):
        """Fill photos (I, D), sketches (I, steps, D) and identity with class tokens; for training on photos
        with captions also `captioned`."""
        captioned = None
        class_token = lambda images: model.student.image(images, first_token_only=True)
        if for_training and faces.has_text:
            captioned = super().encode(model, faces, for_training)
            photos, faces = captioned.tokens[:, 0].float(), captioned.faces
        else:
            photos, faces = self.encode_faces(class_token, faces, model)
        # an encoder trained on photos tells sketches apart better when they are dark on light
        count, steps = len(faces), faces.sketch_steps
        read = lambda n, size: ImageOps.invert(faces.sketch(n // steps, n % steps))
        sketches = self.encode_pictures(class_token, read, count * steps, model,
                                        f"encoding the sketches of {faces.name}").unflatten(0, (count, steps))
        return EncodedSplit(count=count, faces=faces, photos=photos, sketches=sketches, captioned=captioned,
                            identity=torch.tensor(faces.identity))

    def loss(self, model, samples, indices, rng, step):
        """IIC (image-image contrastive loss) between a random step of the sketch and its photo, plus ITC +
        ITM of the photo if it has captions."""
        steps = torch.from_numpy(rng.integers(samples.sketches.shape[1], size=len(indices)))
        sketch = project(samples.sketches[indices, steps], model.student.image_projection)
        photo = project(samples.photos[indices], model.student.image_projection)
        identity = samples.identity[indices].to(sketch.device)
        iic = in_batch_contrastive_loss(sketch, photo, identity, model.temperature)
        if samples.captioned is None:
            return iic
        return iic + super().loss(model, samples.captioned, indices, rng, step)

    @torch.no_grad()
    def metrics(self, model, samples):
        photos = project(samples.photos, model.student.image_projection)                      # (I, E)
        similarity = project(samples.sketches, model.student.image_projection) @ photos.T     # (I, steps, I)
        similarity = similarity.cpu()               # the metrics need float64, which mps lacks
        metrics = early_retrieval(sketch_ranks(similarity), len(photos))
        each_rank = torch.arange(1, len(photos) + 1)[:, None].expand(-1, similarity.shape[1])
        baseline = early_retrieval(each_rank, len(photos)) | {"finished": 50.0}
        metrics |= {"finished": metrics["percentile"][-1]}
        return metrics | {"scores": similarity, "baseline": baseline}

    def draw(self, results, faces, folder, stages=6, top=5):
        """Plot one sketch and its top-ranked photos at several stages, and the metrics over all steps."""
        similarity, steps = results[0].final["scores"], faces.sketch_steps              # (I, steps, I)
        ranks = sketch_ranks(similarity)
        n = int((1 / ranks.double()).mean(1).argsort()[len(ranks) // 2])            # of median difficulty
        rows = []
        for t in sorted({max(0, steps * stage // stages - 1) for stage in range(1, stages + 1)}):
            best = similarity[n, t].argsort(descending=True)[:top].tolist()
            tiles = [(faces.picture(i), f"{similarity[n, t, i]:.2f}", i == n) for i in best]
            rows.append((f"step {t + 1} of {steps}: the true photo ranks {ranks[n, t]} of {len(ranks)}",
                         [(faces.sketch(n, t), "", False), *tiles]))
        contact_sheet(rows, tile=112, legend="green frame: the true photo").save(folder / "sketch.png")
        figure, sides = new_figure(11, 4.2, columns=2)
        percent = 100 * np.arange(1, steps + 1) / steps
        columns = {"percentile": "mean rank percentile", "inverse": "mean reciprocal rank"}
        for axes, (curve, title) in zip(sides, columns.items()):
            for result in results:
                axes.plot(percent, result.final[curve], label=result.name, marker="o" if steps < 10 else None)
            axes.set(xlabel="% of the sketch drawn", ylabel="%", xlim=(0, 100), ylim=(0, 100), title=title)
        sides[0].legend(loc="lower right", fontsize="small")
        figure.savefig(folder / "curves.png", dpi=110)


def sketch_ranks(similarity):
    """similarity (I sketches, steps, I photos), photo i belonging to sketch i -> ranks (I, steps), 1 is
    best. Ties and NaN count against the true photo."""
    true = similarity.diagonal(dim1=0, dim2=2).T                                            # (I, steps)
    return (~(similarity < true[..., None])).sum(-1)


def early_retrieval(ranks, photos):
    """Early-retrieval metrics in percent from ranks (I, steps) among `photos` photos: m@A (mean rank
    percentile) and m@B (mean reciprocal rank) over all steps; w@A and w@B weight step t of n by
    exp(-t / n), without normalisation, so that their maximum is about 63; both curves over the steps."""
    steps = ranks.shape[1]
    percentile, inverse = 100 * (photos - ranks.double()) / (photos - 1), 100 / ranks.double()
    weight = torch.exp(-torch.arange(1, steps + 1, dtype=torch.float64, device=ranks.device) / steps)
    return {"m@A": percentile.mean().item(), "m@B": inverse.mean().item(),
            "w@A": (weight * percentile).mean().item(), "w@B": (weight * inverse).mean().item(),
            "percentile": percentile.mean(0).tolist(), "inverse": inverse.mean(0).tolist()}


TASKS = {"retrieval": Retrieval, "attributes": Attributes, "sketch": Sketch}
