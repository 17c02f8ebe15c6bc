"""The three tasks: train heads on frozen encoders, choose the best by validation, evaluate them on
the test split and print the table (FLIP paper, section 5 and figure 2, panels b to d).

    python finetune.py retrieval      find the face for a caption, and the caption for a face
    python finetune.py attributes     predict the 40 attributes of a face
    python finetune.py sketch         find the photo for a sketch that is still being drawn

    python finetune.py attributes --predict IMAGE ...       use the head that has been trained

A task is a class with its batches, loss, metrics and picture; `train_heads` is the loop. Frozen
means evaluation mode (no dropout) and no gradient. For comparison, the same heads are trained on
encoders with random weights. Without --data, drawn faces take a few minutes on two CPU cores.

--out/<task> receives log.jsonl, table.md, a picture, and the weights trained on --checkpoint:
head.pt for attributes, otherwise a complete flip.pt (with the momentum encoder and queue left from
pre-training).

Departures from the official code:

    the official code                                       here
    selects weights on the test split, and trains           selects on the validation split, trains
    LFWA's head on it                                       on the training split
    keeps dropout in the frozen encoders, and the           uses none of these
    momentum encoder and queue
    trains the attribute head with SGD                      with AdamW
    also trains a matching head for sketches                does not: no metric uses it
"""
import contextlib
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from captions import ATTRIBUTES
from common.distributed import autocast, use_device
from common.images import iterate_images, pixel_batches
from common.pictures import plot_accuracies, plot_retrieval, plot_sketch
from common.script import markdown_table, run_script
from common.seeds import derive_seed, random_stream
from config import TaskConfig, parse_task_arguments
from data import FaceDataset, Faces, load_toy_faces, open_faces, readable
from evaluation import EvaluationSet, chance_recalls, evaluate
from flip import FLIP, StepParams, project
from losses import clip_loss
from optim import build_optimizers, set_learning_rate, warmup_decay
from pretrained import read_file, write_checkpoint
from runs import Log


# ---- training ------------------------------------------------------------------------------------
class Task:
    """What the three tasks have in common. A task is made of a model with frozen encoders, on its
    device, and the faces of each split ("train", "val", "test").

    It sets two attributes:

        trained             the module to optimise: a new head, or the model (of which only
                            parameters that require gradients are trained)
        baseline            the first row of the table, (name, metrics), which defines the columns

    and has four methods:

        batches(samples)    an endless stream of batches; samples: indices of the faces to train on
        loss(batch, step)   a scalar tensor
        metrics(split)      metrics in percent, and details for the picture
        draw(details, path) saves the picture, from the details of the test split
    """
    selected_by: str        # the metric of the validation split that chooses the weights
    note = ""               # printed below the table

    def __init__(self, model: FLIP, splits: dict[str, Faces], config: TaskConfig):
        self.model = model
        self.splits = splits
        self.config = config
        self.trained = model

    def copy_weights(self):
        """Copies of the weights that are trained."""
        weights = {}
        for name, p in self.trained.named_parameters():
            if p.requires_grad:
                weights[name] = p.detach().clone()
        return weights

    def restore(self, weights):
        """Return to what `copy_weights` returned."""
        self.trained.load_state_dict(weights, strict=False)


def train_heads(task: Task, samples: np.ndarray, steps: int, log: Log):
    """Train on the faces `samples` (indices) of the training split; validate before the first step
    and five times during training; then restore the weights with the best validation metric."""
    model = task.model
    config = task.config
    optimizers = build_optimizers(task.trained, weight_decay=0.05)      # for what is not frozen
    [adamw] = optimizers
    validate_after = [round(steps * n / 5) for n in range(1, 6)]
    metrics, _ = task.metrics("val")
    best = metrics[task.selected_by]
    best_weights = task.copy_weights()
    with contextlib.closing(task.batches(samples)) as batches:
        for step, batch in zip(tqdm(range(steps), "training", leave=False), batches):
            lr = warmup_decay(step, steps, steps // 10, config.lr)
            set_learning_rate(optimizers, lr)
            with autocast(config.precision, model.device):
                loss = task.loss(batch, step)
            adamw.zero_grad()
            loss.backward()
            adamw.step()
            model.clamp_temperature()

            if step + 1 in validate_after:
                metrics, _ = task.metrics("val")
                log.write(step=step + 1, loss=loss.item(), validation=metrics)
                if metrics[task.selected_by] > best:
                    best = metrics[task.selected_by]
                    best_weights = task.copy_weights()
    task.restore(best_weights)


def shuffled_batches(samples, config):
    """Yield index tensors (B,): each epoch all samples in a new order, in batches of nearly equal
    size."""
    rng = random_stream("order", config.seed)
    count = math.ceil(len(samples) / config.batch_size)
    while True:
        order = torch.from_numpy(rng.permutation(samples))
        yield from order.tensor_split(count)


@torch.no_grad()
def encode(compute, read, count, model, config):
    """Apply compute(pixels (B, 3, S, S)) -> (B, ...) once to the images read(0, size), ...,
    read(count - 1, size), resized to size x size; returns (count, ...) in float16 on the CPU."""
    chunks = []
    size = model.config.vit.image_size
    for _, pixels in iterate_images(read, count, size, "encoding images"):
        with autocast(config.precision, model.device):
            encoded = compute(pixels.to(model.device))
        chunks.append(encoded.half().cpu())
    return torch.cat(chunks)        # outside autocast, which cannot concatenate float16 on a CPU


# ---- retrieval: find the face for a caption, and the caption for a face --------------------------
class Retrieval(Task):
    """Both encoders are frozen. They run in every step: the text encoder because the grammar writes
    new captions in every epoch, and the image encoder because the matching head attends to all of
    its tokens. Projections, matching head and temperature are trained. The loss is ITC + ITM within
    the batch, that is `FLIP.forward` without momentum encoder, queue and soft targets. The metrics
    are recalls after re-ranking."""
    selected_by = "r_mean"

    def __init__(self, model, splits, config):
        super().__init__(model, splits, config)
        self.tokenizer = model.require_tokenizer()
        self.sets = {split: EvaluationSet.from_faces(splits[split]) for split in ("val", "test")}
        self.baseline = "chance", chance_recalls(self.sets["test"].image_of_text)
        if not config.data:     # see `draw_faces`
            self.note = ("The drawn faces of this task are grey: on colour faces, there is nothing "
                         "left to gain.\n")

    def batches(self, samples):
        config = self.config
        faces = self.splits["train"].subset(samples)
        batch_size = min(config.batch_size, len(samples))
        dataset = FaceDataset(faces, self.tokenizer, self.model.config.vit.image_size, batch_size,
                              config.seed, augmented=False, workers=config.workers)
        return dataset.iterate_from(0)

    def loss(self, batch, step):
        # ITM trains only the matching head, not the projections, and costs a pass of the text
        # encoder: skipping it in most steps changes nothing for ITC
        with_itm = step % self.config.itm_every == 0
        params = StepParams(within_batch=True, with_itm=with_itm)
        batch = batch.to(self.model.device)
        out = self.model(batch.images, batch.captions, batch.identity, params)
        return out.itc + out.itm

    def metrics(self, split):
        return evaluate(self.model, self.sets[split], self.config)

    def draw(self, text_to_image, path):
        plot_retrieval(self.sets["test"], text_to_image, path)


# ---- attributes: predict the 40 attributes of a face ---------------------------------------------
class Attributes(Task):
    """The image encoder is frozen and encodes each image once. A new `AttributeHead` is trained.
    The loss is binary cross-entropy, averaged over faces and labels; the metrics are accuracy and
    balanced accuracy, averaged over labels."""
    selected_by = "accuracy"

    def __init__(self, model, splits, config):
        super().__init__(model, splits, config)
        self.vectors = {}       # {split: (I, V, D)}
        self.labels = {}        # {split: (I, 40)}
        for split, faces in splits.items():
            self.vectors[split] = encode(self.pool, faces.picture, len(faces), model, config)
            self.labels[split] = torch.tensor(np.array(faces.attributes))
        _, V, D = self.vectors["train"].shape
        self.trained = AttributeHead(V, D, len(ATTRIBUTES)).to(model.device)

        # the accuracy of always predicting a label's more frequent value
        frequency = self.labels["test"].double().mean(0)
        self.majority = 100 * torch.maximum(frequency, 1 - frequency)           # (40,)
        metrics = {"accuracy": self.majority.mean().item(), "balanced accuracy": 50.0}
        self.baseline = "majority class", metrics

    def pool(self, images):
        return pool_tokens(self.model.student.image, images)

    def batches(self, samples):
        return shuffled_batches(samples, self.config)

    def logits(self, vectors):
        return self.trained(vectors.to(self.model.device).float())

    def loss(self, batch, step):
        logits = self.logits(self.vectors["train"][batch])
        labels = self.labels["train"][batch]
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits))

    @torch.no_grad()
    def metrics(self, split):
        logits = []
        for vectors in self.vectors[split].split(1024):
            logits.append(self.logits(vectors).cpu())
        predicted = torch.cat(logits) > 0
        accuracy, balanced = accuracies(predicted, self.labels[split])          # (40,)
        metrics = {"accuracy": accuracy.mean().item(),
                   "balanced accuracy": balanced.nanmean().item()}
        return metrics, accuracy

    def draw(self, accuracy, path):
        test = self.splits["test"]
        percent = 100 * max(self.config.fractions)
        title = (f"{test.name}: {len(test):,}; head trained on {percent:g} % of "
                 f"{len(self.splits['train']):,} others")
        plot_accuracies(ATTRIBUTES, accuracy, self.majority, title, path)


def pool_tokens(vit, images):
    """Images (B, 3, S, S) -> V pooled vectors (B, V, D): class token, mean and maximum of the patch
    tokens, each after 1/3, 1/2 and 2/3 of the blocks (4, 6 and 8 of 12) and after the final
    norm."""
    tokens, hidden = vit(images, return_hidden=True)            # (B, L, D), and a list of the same
    depth = vit.config.depth
    # a set: in a shallow encoder, some of the depths coincide
    depths = {max(1, depth // 3), math.ceil(depth / 2), math.ceil(2 * depth / 3)}
    vectors = []
    for x in [hidden[n - 1] for n in sorted(depths)] + [tokens]:
        patches = x[:, 1:]
        vectors += [x[:, 0], patches.mean(1), patches.amax(1)]
    return torch.stack(vectors, dim=1)


class AttributeHead(nn.Module):
    """Pooled vectors (B, V, D) -> logits (B, labels): LayerNorm, learned weighted sum over V,
    linear."""

    def __init__(self, vectors, width, labels):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.weights = nn.Parameter(torch.full((vectors,), 1 / vectors))
        self.linear = nn.Linear(width, labels)

    def forward(self, x):
        pooled = torch.einsum("v,bvd->bd", self.weights, self.norm(x))
        return self.linear(pooled)


def load_head(path: Path, model: FLIP):
    """The `AttributeHead` in a head.pt, and the names of its labels. Raises ValueError if it was
    trained on another image encoder."""
    saved = read_file(path)
    if saved["encoder"] != model.image_encoder_hash():
        raise ValueError(f"{path} was trained on another --checkpoint")
    state = saved["model"]
    num_labels, width = state["linear.weight"].shape
    head = AttributeHead(len(state["weights"]), width, num_labels)
    head.load_state_dict(state)
    return head.to(model.device), saved["labels"]


@torch.no_grad()
def predict_attributes(model: FLIP, head: AttributeHead, images):
    """Probabilities (I, labels) of the attributes of images (paths or PIL images)."""
    probabilities = []
    for pixels in pixel_batches(images, model.config.vit.image_size):
        vectors = pool_tokens(model.student.image, pixels.to(model.device, model.dtype))
        probabilities.append(head(vectors.float()).sigmoid())
    return torch.cat(probabilities)


def accuracies(predicted, truth):
    """Accuracy and balanced accuracy in percent, (labels,) each, from bool (I, labels). For rare
    attributes, always predicting "absent" has high accuracy; balanced accuracy, the mean of true
    positive and true negative rate, corrects for that. It is NaN for a label that all faces or none
    have."""
    accuracy = (predicted == truth).double().mean(0)
    sensitivity = (predicted & truth).sum(0) / truth.sum(0)
    specificity = (~predicted & ~truth).sum(0) / (~truth).sum(0)
    return 100 * accuracy, 50 * (sensitivity + specificity)


# ---- sketch: find the photo for a sketch that is still being drawn -------------------------------
class Sketch(Task):
    """Both encoders are frozen; each photo, each stage of each sketch and one caption per face are
    encoded once. Projections and temperature are trained; photos and sketches share a projection.
    The loss is IIC (image-image contrastive loss) between a random stage of the sketch and its
    photo, plus ITC of the photo if it has captions. The metrics are those of `early_retrieval`."""
    selected_by = "m@B"
    note = ("m@A: mean rank percentile of the photo, m@B: mean reciprocal rank, over all stages;\n"
            "w@A, w@B: early stages weighted more; A: the percentile for the finished sketch.\n")

    def __init__(self, model, splits, config):
        super().__init__(model, splits, config)
        self.photo_tokens = {}      # {split: class tokens of the photos (I, D)}
        self.sketch_tokens = {}     # {split: those of the sketches (I, stages, D)}
        for split, faces in splits.items():
            tokens = encode(self.class_tokens, faces.picture, len(faces), model, config)
            self.photo_tokens[split] = tokens
            self.sketch_tokens[split] = self.encode_sketches(faces)
        self.caption_tokens = None
        if splits["train"].has_text:
            self.caption_tokens = self.encode_captions(splits["train"])

        num_photos = len(splits["test"])
        stages = splits["test"].sketch_stages
        every_rank = torch.arange(1, num_photos + 1)[:, None].expand(-1, stages)
        self.baseline = "chance", early_retrieval(every_rank, num_photos)

    def class_tokens(self, images):
        return self.model.student.image(images, first_token_only=True)

    def encode_sketches(self, faces):
        """Class tokens (I, stages, D) of all stages of all sketches."""
        def read_sketch(n, size):
            i, t = divmod(n, faces.sketch_stages)
            return faces.sketch(i, t)

        count = len(faces) * faces.sketch_stages
        sketches = encode(self.class_tokens, read_sketch, count, self.model, self.config)
        return sketches.unflatten(0, (len(faces), -1))

    @torch.no_grad()
    def encode_captions(self, faces):
        """[CLS] tokens of a caption of each face (I, D)."""
        model = self.model
        texts = []
        for i in range(len(faces)):
            rng = random_stream("caption", self.config.seed, i)
            texts.append(faces.caption(i, rng))
        tokenizer = model.require_tokenizer()
        captions = tokenizer(texts).to(model.device)
        with autocast(self.config.precision, model.device):
            return model.student.cls_tokens(captions)

    def batches(self, samples):
        return shuffled_batches(samples, self.config)

    def loss(self, batch, step):
        student = self.model.student
        faces = self.splits["train"]
        stage = torch.randint(faces.sketch_stages, batch.shape)
        sketch_tokens = self.sketch_tokens["train"][batch, stage]
        sketch = project(sketch_tokens, student.image_projection)               # (B, E)
        photo = project(self.photo_tokens["train"][batch], student.image_projection)
        identity = torch.from_numpy(faces.identity[batch.numpy()]).to(photo.device)
        shared = identity, identity, self.model.temperature
        iic = clip_loss(sketch, photo, sketch, photo, *shared)
        if self.caption_tokens is None:
            return iic
        text = project(self.caption_tokens[batch], student.text_projection)
        return iic + clip_loss(photo, text, photo, text, *shared)

    @torch.no_grad()
    def metrics(self, split):
        projection = self.model.student.image_projection
        photo = project(self.photo_tokens[split], projection)                   # (I, E)
        sketch = project(self.sketch_tokens[split], projection)                 # (I, stages, E)
        similarity = (sketch @ photo.T).cpu()                                   # (I, stages, I)
        return early_retrieval(sketch_ranks(similarity), len(photo)), similarity

    def draw(self, similarity, path):
        """The sketch of median rank when finished."""
        ranks = sketch_ranks(similarity)
        i = int(ranks[:, -1].argsort()[len(ranks) // 2])
        plot_sketch(self.splits["test"], i, similarity[i], ranks[i], path)


def sketch_ranks(similarity):
    """similarity (I sketches, stages, I photos), photo i belonging to sketch i -> ranks (I,
    stages), 1 is best. Ties and NaN count against the true photo."""
    true = similarity.diagonal(dim1=0, dim2=2).T                        # (I, stages)
    return (~(similarity < true[..., None])).sum(-1)


def early_retrieval(ranks, photos):
    """Metrics in percent from ranks (I, stages) among `photos` photos: m@A (mean rank percentile)
    and m@B (mean reciprocal rank) over all stages; w@A and w@B weight stage t of n by exp(-t / n),
    without normalisation, so that their maximum is about 63; A, the percentile of the finished
    sketch."""
    stages = ranks.shape[1]
    percentile = 100 * (photos - ranks.double()) / (photos - 1)
    inverse = 100 / ranks.double()
    weight = torch.exp(-torch.arange(1, stages + 1, dtype=torch.float64) / stages)
    return {
        "m@A": percentile.mean().item(),
        "m@B": inverse.mean().item(),
        "w@A": (weight * percentile).mean().item(),
        "w@B": (weight * inverse).mean().item(),
        "A, finished": percentile[:, -1].mean().item(),
    }


# ---- the run -------------------------------------------------------------------------------------
TASKS = {"retrieval": Retrieval, "attributes": Attributes, "sketch": Sketch}


def open_splits(config: TaskConfig, size: int) -> dict[str, Faces]:
    """The splits of --data, or drawn faces that train.py never uses."""
    if config.data:
        return {"train": open_task_split(config, "train", 0, size),
                "val": open_task_split(config, "val", config.validation, size),
                "test": open_task_split(config, "test", config.test, size)}
    return {"train": draw_faces(config, 10, config.faces, size),
            "val": draw_faces(config, 11, config.validation, size),
            "test": draw_faces(config, 12, config.test, size)}


def draw_faces(config: TaskConfig, seed: int, count: int, size: int) -> Faces:
    """Drawn faces for a task. Those of retrieval are grey: a domain shift from pre-training."""
    stages = config.sketch_stages if config.task == "sketch" else 0
    faces = load_toy_faces(count, size, seed, config.cache, stages)
    if config.task != "retrieval":
        return faces
    to_grey = np.outer((0.299, 0.587, 0.114), (1, 1, 1))
    grey = np.asarray(faces.images) @ to_grey
    return replace(faces, images=grey.round().astype(np.uint8))


def open_task_split(config: TaskConfig, split: str, count: int, size: int) -> Faces:
    """At most `count` faces of a split of --data (0: all). Raises ValueError if it lacks what the
    task needs."""
    faces = open_faces(config.data, split, config.cache, config.columns)
    available = {"retrieval": faces.has_text, "attributes": faces.attributes is not None,
                 "sketch": faces.sketches is not None}
    if not available[config.task]:
        raise ValueError(f"{faces.name} lacks the annotations that {config.task} needs")
    if split == "train" and config.task == "retrieval":     # its batches replace damaged images
        return faces
    if count:
        faces = faces.subset(range(min(count, len(faces))))
    return readable(faces, size)


def finetune(config: TaskConfig) -> list[tuple[str, dict]]:
    """Train and test on --checkpoint, then on random weights; returns the table's rows (name,
    metrics)."""
    device = use_device(config.device)
    folder = Path(config.out) / config.task
    if (folder / "table.md").exists():
        raise ValueError(f"{folder} already contains results; remove the folder, or choose another "
                         "--out")
    model = FLIP.from_pretrained(config.checkpoint, vocabulary=config.vocabulary)
    splits = open_splits(config, model.config.vit.image_size)
    torch.manual_seed(derive_seed("random encoders", config.seed))
    models = {config.checkpoint: model}
    if config.random:
        models["random weights"] = FLIP(model.config, model.tokenizer)

    rows = []
    with contextlib.closing(Log(folder / "log.jsonl")) as log:
        log.restart([{"config": asdict(config)}])
        for name, model in models.items():
            model.to(device).eval()
            model.student.image.requires_grad_(False)
            model.student.text.requires_grad_(False)
            purpose = "new weights, negatives, stages of sketches"
            torch.manual_seed(derive_seed(purpose, config.seed))
            task = TASKS[config.task](model, splits, config)
            if not rows:
                rows.append(task.baseline)
            tuned, details = tune(task, name, log)
            rows += tuned
            if name == config.checkpoint:
                save_task(task, details, folder)
    text = table(rows, config.task)
    # written last, because a folder with a table counts as finished
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n{task.note}\n{folder}: log.jsonl, table.md, weights and a picture")
    return rows


def tune(task: Task, name: str, log: Log):
    """Train on each fraction of the training split, always from the same weights; returns the
    table's rows, and the details of the last one for the picture."""
    config = task.config
    rows = []
    if task.trained is task.model:
        metrics, _ = task.metrics("test")           # for the table only
        rows.append((f"{name}, before tuning", metrics))
    num_faces = len(task.splits["train"])
    order = random_stream("nested fractions", config.seed).permutation(num_faces)
    steps = config.epochs * math.ceil(num_faces / config.batch_size)
    initial = task.copy_weights()
    for fraction in sorted(config.fractions):
        count = max(1, round(fraction * num_faces))
        task.restore(initial)
        train_heads(task, order[:count], steps, log)
        metrics, details = task.metrics("test")
        log.write(encoder=name, fraction=fraction, test=metrics)
        row = f"{name}, tuned"
        if config.fractions != (1.0,):
            row += f" on {100 * fraction:g} % of the faces"
        rows.append((row, metrics))
    return rows, details


def save_task(task: Task, details, folder: Path):
    """Save the picture and the weights of the last fraction."""
    task.draw(details, folder / f"{task.config.task}.png")
    if task.trained is task.model:
        write_checkpoint(task.model.checkpoint(), folder / "flip.pt")
    else:
        head = {"model": task.trained.state_dict(), "labels": list(ATTRIBUTES),
                "encoder": task.model.image_encoder_hash()}
        write_checkpoint(head, folder / "head.pt")


def print_predictions(config: TaskConfig):
    """Print the probability of each attribute for each image of --predict."""
    model = FLIP.from_pretrained(config.checkpoint, device=config.device)
    head, labels = load_head(Path(config.out) / "attributes" / "head.pt", model)
    percent = 100 * predict_attributes(model, head, config.predict)                 # (I, labels)
    rows = [[label, *values] for label, values in zip(labels, percent.T.tolist())]
    print(markdown_table(["probability, %", *config.predict], rows, digits=0))


def table(rows, title):
    """A Markdown table with the columns of the first row, the baseline."""
    _, baseline = rows[0]
    header = [f"{title}, %"]
    for column in baseline:
        column = column.replace("img_r", "text to image R@")
        header.append(column.replace("txt_r", "image to text R@"))
    cells = []
    for name, metrics in rows:
        cells.append([name, *[metrics[column] for column in baseline]])
    return markdown_table(header, cells)


def main():
    config = parse_task_arguments(description=__doc__)
    if not config.predict:
        finetune(config)
    elif config.task == "attributes":
        print_predictions(config)
    else:
        raise ValueError(f"--predict: expected the task attributes, found {config.task}")


if __name__ == "__main__":
    run_script(main)
