"""The three tasks: train heads on frozen encoders, choose the best by validation, evaluate them on the test
split and print the table (FLIP paper, section 5 and figure 2, panels b to d).

    python finetune.py retrieval      find the face for a caption, and the caption for a face
    python finetune.py attributes     predict the 40 attributes of a face
    python finetune.py sketch         find the photo for a sketch that is still being drawn

A task is a function that returns what is trained, its loss, its metrics and its picture; `train_heads` is the
loop. Frozen means evaluation mode (no dropout) and no gradient. For comparison, the same heads are trained on
encoders with random weights. Without --data, drawn faces take a few minutes on two CPU cores. --out/<task>
receives log.jsonl, table.md, a picture, and the weights trained on --checkpoint: head.pt for attributes,
otherwise a complete flip.pt (momentum encoder and queue are still those of pre-training).

Departures: the official code selects the best epoch on the test split, trains LFWA's head on the test split,
leaves dropout on inside the "frozen" encoders, keeps a momentum encoder and a queue for them, trains the
attribute head with SGD, and for sketches a matching head that no metric uses. None of this is done here.
"""
import argparse
import contextlib
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common.distributed import autocast, use_device
from common.images import iterate_images
from common.pictures import contact_sheet, new_figure, plot_retrieval
from common.script import markdown_table, parse_flags, run_script
from common.seeds import derive_seed, random_stream
from config import SharedFlags
from data import ATTRIBUTES, BatchLoader, Faces, load_toy_faces, open_faces, readable
from evaluation import EvaluationSet, chance_recalls, evaluate
from flip import FLIP, StepParams, project
from losses import contrastive_loss
from optim import build_optimizers, set_learning_rate, warmup_decay
from pretrained import write_checkpoint
from runs import Log, init_model


# ---- configuration -------------------------------------------------------------------------------
@dataclass(frozen=True)
class TaskConfig(SharedFlags):
    """The flags, see config.py. Defaults are the paper's for retrieval."""
    task: str = ""
    checkpoint: str = "out/flip.pt"             # from train.py, or the official one: file, folder or hub name
    random: bool = True                         # also train on frozen encoders with random weights
    out: str = "out"                            # folder for the results, in a subfolder named after the task
    faces: int = 4000                           # number of faces to draw for training
    validation: int = 1000                      # number to draw for validation; with --data the maximum
    test: int = 5000                            # likewise for the test split; 0: all of --data
    fractions: tuple[float, ...] = (1.0,)       # parts of the training split, each trained on by itself
    seed: int = 0                               # seed of random encoders, new weights, data and negatives
    epochs: int = 50                            # epochs; a smaller fraction has the same number of steps
    batch_size: int = 64                        # samples per step
    lr: float = 3e-5                            # peak learning rate, after 10 % of the steps; cosine decay
    workers: int = 8                            # data loading processes of retrieval
    # fields for a recipe: train the matching head in every n-th step; number of stages of drawn sketches
    itm_every: int = 1
    sketch_steps: int = 70


RECIPES = {"retrieval": {}, "sketch": dict(epochs=100, lr=1e-4, test=0),
           # the official learning rates, 0.3 for CelebA and 0.003 for LFWA, are for SGD
           "attributes": dict(epochs=100, batch_size=256, lr=1e-3, fractions=(0.01, 0.1, 1.0), test=0)}
DRAWN = {"retrieval": dict(epochs=30, batch_size=250, lr=3e-3, itm_every=5, k_test=16, faces=2000,
                           validation=200, test=1000, workers=0),
         "attributes": dict(epochs=60, lr=3e-3, validation=500, test=1000),
         "sketch": dict(epochs=600, batch_size=128, lr=1e-2, faces=800, validation=100, test=200)}


# ---- training ------------------------------------------------------------------------------------
class Task(NamedTuple):
    """What a task returns, given a model with frozen encoders and the faces of each split."""
    trained: nn.Module      # the model or a new head; parameters that require gradients are updated
    batches: Callable       # batches(samples, config): endless, from these faces of the training split
    loss: Callable          # loss(batch, step) -> a scalar tensor
    metrics: Callable       # metrics("val" or "test") -> metrics in percent, and what `draw` needs
    draw: Callable          # draw(second result of metrics("test"), path)
    selected_by: str        # a metric of the validation split
    baseline: tuple         # the table's first row, name and metrics; these are its columns
    note: str = ""          # printed below the table


def train_heads(task: Task, model: FLIP, samples: np.ndarray, steps: int, config: TaskConfig, log: Log):
    """Train on the faces `samples` of the training split, then restore the weights with the best validation
    metric (possibly the initial ones)."""
    [optimizer] = build_optimizers(task.trained, weight_decay=0.05)     # AdamW; skips what is frozen
    evaluated = {round(steps * n / 5) for n in range(1, 6)}
    best, best_weights = task.metrics("val")[0][task.selected_by], trained_weights(task)
    with contextlib.closing(task.batches(samples, config)) as batches:
        for step, batch in zip(tqdm(range(steps), "training", leave=False), batches):
            set_learning_rate([optimizer], warmup_decay(step, steps, steps // 10, config.lr))
            with autocast(config.precision, model.device):
                loss = task.loss(batch, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.clamp_temperature()
            if step + 1 in evaluated:
                metrics, _ = task.metrics("val")
                log.write(step=step + 1, loss=loss.item(), validation=metrics)
                if metrics[task.selected_by] > best:
                    best, best_weights = metrics[task.selected_by], trained_weights(task)
    task.trained.load_state_dict(best_weights, strict=False)


def trained_weights(task):
    """Copies of the weights that are trained."""
    return {name: p.detach().clone() for name, p in task.trained.named_parameters() if p.requires_grad}


def shuffled_batches(samples, config):
    """Yield index tensors (B,): each epoch all samples in a new order, in batches of nearly equal size."""
    rng, count = random_stream("order", config.seed), math.ceil(len(samples) / config.batch_size)
    while True:
        yield from torch.from_numpy(rng.permutation(samples)).tensor_split(count)


@torch.no_grad()
def encode(compute, read, count, model, config):
    """Apply compute(pixels (B, 3, S, S)) -> (B, ...) once to the images read(0, size), ...,
    read(count - 1, size), resized to size x size; returns (count, ...) in float16 on the CPU."""
    chunks = []
    for _, pixels in iterate_images(read, count, model.config.vit.image_size, "encoding images"):
        with autocast(config.precision, model.device):
            chunks.append(compute(pixels.to(model.device)).half().cpu())
    return torch.cat(chunks)            # outside autocast, which cannot concatenate float16 on a CPU


# ---- retrieval: find the face for a caption, and the caption for a face --------------------------
def retrieval(model: FLIP, splits: dict[str, Faces], config: TaskConfig) -> Task:
    """Frozen: both encoders; they run in every step, as the grammar writes new captions in every epoch.
    Trained: projections, matching head, temperature. Loss: ITC + ITM within the batch, that is `FLIP.forward`
    without momentum encoder, queue and soft targets. Metrics: recall after re-ranking."""
    tokenizer, size = model.require_tokenizer(), model.config.vit.image_size
    evaluation_sets = {split: EvaluationSet.from_faces(splits[split]) for split in ("val", "test")}
    hardness = 1.0 if model.config.itm_hardness is None else model.config.itm_hardness

    def batches(samples, config):
        batch_size = min(config.batch_size, len(samples))
        return BatchLoader(splits["train"].subset(samples), tokenizer, size, batch_size, config.seed,
                           augmented=False, workers=config.workers).iterate_from(0)

    def loss(batch, step):
        # ITM costs a pass of the text encoder and trains the matching head only: skipping it in most steps
        # does not change the gradients of ITC
        params = StepParams(alpha=0.0, momentum=0.0, queue_length=0, hardness=hardness,
                            with_itm=step % config.itm_every == 0)
        batch = batch.to(model.device)
        out = model(batch.images, batch.captions, batch.identity, params)
        return out.itc + out.itm

    metrics = lambda split: evaluate(model, evaluation_sets[split], config)
    draw = lambda text_to_image, path: plot_retrieval(evaluation_sets["test"], text_to_image, path)
    return Task(model, batches, loss, metrics, draw, selected_by="r_mean",
                baseline=("chance", chance_recalls(evaluation_sets["test"].image_of_text)),
                note="" if config.data else "Drawn faces are grey here; in colour, all is learned.\n")


# ---- attributes: predict the 40 attributes of a face ---------------------------------------------
def attributes(model: FLIP, splits: dict[str, Faces], config: TaskConfig) -> Task:
    """Frozen: the image encoder; it encodes each image once. Trained: a new `AttributeHead`. Loss: binary
    cross-entropy, mean over faces and labels. Metrics: accuracy and balanced accuracy, means over labels."""
    pool, device = lambda images: pool_tokens(model.student.image, images), model.device
    vectors = {split: encode(pool, faces.picture, len(faces), model, config)
               for split, faces in splits.items()}                                          # (I, V, D)
    labels = {split: torch.tensor(np.array(faces.attributes)) for split, faces in splits.items()}   # (I, 40)
    head = AttributeHead(*vectors["train"].shape[1:], len(ATTRIBUTES)).to(device)

    def loss(batch, step):
        logits = head(vectors["train"][batch].to(device).float())
        return F.binary_cross_entropy_with_logits(logits, labels["train"][batch].to(logits))

    @torch.no_grad()
    def metrics(split):
        logits = torch.cat([head(chunk.to(device).float()).cpu() for chunk in vectors[split].split(1024)])
        accuracy, balanced = accuracies(logits > 0, labels[split])                          # (40,)
        return {"accuracy": accuracy.mean().item(), "balanced accuracy": balanced.nanmean().item()}, accuracy

    def draw(accuracy, path):
        """The accuracy on the test split for each attribute, beside that of the majority class."""
        order, ticks = (accuracy - majority).argsort(), np.arange(len(majority))
        figure, axes = new_figure(9, 1.5 + 0.28 * len(majority))
        axes.barh(ticks, accuracy[order].numpy(), label=config.checkpoint, color="lightblue")
        axes.plot(majority[order].numpy(), ticks, "k|", label="majority class")
        axes.set(yticks=ticks, yticklabels=[ATTRIBUTES[n].replace("_", " ") for n in order], xlim=(50, 100),
                 ylim=(-1, len(ticks)), xlabel="accuracy on the test split, %")
        figure.legend(loc="outside upper right", ncols=2)
        figure.savefig(path, dpi=110)

    frequency = labels["test"].double().mean(0)
    majority = 100 * torch.maximum(frequency, 1 - frequency)
    return Task(head, shuffled_batches, loss, metrics, draw, selected_by="accuracy",
                baseline=("majority class", {"accuracy": majority.mean().item(), "balanced accuracy": 50.0}))


def pool_tokens(vit, images):
    """Images (B, 3, S, S) -> V pooled vectors (B, V, D): class token, mean and maximum of the patch tokens,
    each after 1/3, 1/2 and 2/3 of the blocks (4, 6 and 8 of 12) and after the final norm."""
    tokens, hidden = vit(images, return_hidden=True)            # (B, L, D), and that after each block
    depth = vit.config.depth                                    # a shallow ViT has fewer of these
    depths = sorted({max(1, depth // 3), math.ceil(depth / 2), math.ceil(2 * depth / 3)})
    chosen = [hidden[n - 1] for n in depths] + [tokens]
    vectors = [vector for x in chosen for vector in (x[:, 0], x[:, 1:].mean(1), x[:, 1:].amax(1))]
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


def accuracies(predicted, truth):
    """Accuracy and balanced accuracy in percent, (labels,) each, from bool (I, labels). For rare attributes,
    always predicting "absent" has high accuracy; balanced accuracy, the mean of true positive and true
    negative rate, corrects for that. It is NaN for a label that all faces or none have."""
    sensitivity = (predicted & truth).sum(0) / truth.sum(0)
    specificity = (~predicted & ~truth).sum(0) / (~truth).sum(0)
    return 100 * (predicted == truth).double().mean(0), 50 * (sensitivity + specificity)


# ---- sketch: find the photo for a sketch that is still being drawn -------------------------------
def sketch(model: FLIP, splits: dict[str, Faces], config: TaskConfig) -> Task:
    """Frozen: both encoders; they encode photos, all steps of the sketches and a caption each once. Trained:
    projections and temperature; photos and sketches share theirs. Loss: IIC (image-image contrastive loss)
    between a random step of the sketch and its photo, plus ITC of the photo if it has captions. Metrics:
    `early_retrieval`."""
    student, train, photos, sketches, caption_tokens = model.student, splits["train"], {}, {}, None
    class_token = lambda images: student.image(images, first_token_only=True)
    for split, faces in splits.items():
        photos[split] = encode(class_token, faces.picture, len(faces), model, config)       # (I, D)
        read = lambda n, size: faces.sketch(*divmod(n, faces.sketch_steps))
        encoded = encode(class_token, read, len(faces) * faces.sketch_steps, model, config)
        sketches[split] = encoded.unflatten(0, (len(faces), -1))                            # (I, steps, D)
    if train.has_text:
        texts = [train.caption(i, random_stream("caption", config.seed, i)) for i in range(len(train))]
        with torch.no_grad(), autocast(config.precision, model.device):
            caption_tokens = student.cls_tokens(model.require_tokenizer()(texts).to(model.device))  # (I, D)

    def loss(batch, step):
        at_step = torch.randint(train.sketch_steps, batch.shape)
        photo = project(photos["train"][batch], student.image_projection)                   # (B, E)
        drawn = project(sketches["train"][batch, at_step], student.image_projection)
        shared = torch.from_numpy(train.identity[batch.numpy()]).to(photo.device), model.temperature
        iic = in_batch_contrastive_loss(drawn, photo, *shared)
        if caption_tokens is None:
            return iic
        text = project(caption_tokens[batch], student.text_projection)
        return iic + in_batch_contrastive_loss(photo, text, *shared)

    @torch.no_grad()
    def metrics(split):
        photo = project(photos[split], student.image_projection)
        similarity = (project(sketches[split], student.image_projection) @ photo.T).cpu()   # (I, steps, I)
        return early_retrieval(sketch_ranks(similarity), len(photo)), similarity

    def draw(similarity, path, stages=6, top=5):
        """One sketch, of median difficulty, and its highest-ranked photos at several stages."""
        faces, ranks, rows = splits["test"], sketch_ranks(similarity), []
        n, steps = int((1 / ranks.double()).mean(1).argsort()[len(ranks) // 2]), faces.sketch_steps
        for t in sorted({max(0, steps * stage // stages - 1) for stage in range(1, stages + 1)}):
            best = similarity[n, t].argsort(descending=True)[:top].tolist()
            tiles = [(faces.picture(i), f"{similarity[n, t, i]:.2f}", i == n) for i in best]
            rows.append((f"step {t + 1} of {steps}: the true photo ranks {ranks[n, t]} of {len(ranks)}",
                         [(faces.sketch(n, t), "", False), *tiles]))
        contact_sheet(rows, tile=112, legend="green frame: the true photo").save(path)

    every_rank = torch.arange(1, len(splits["test"]) + 1)[:, None].expand(-1, splits["test"].sketch_steps)
    return Task(model, shuffled_batches, loss, metrics, draw, selected_by="m@B",
                baseline=("chance", early_retrieval(every_rank, len(every_rank))),
                note="m@A: mean rank percentile of the photo, m@B: mean reciprocal rank, over all steps;\n"
                     "w@A, w@B: early steps weighted more; A: the percentile for the finished sketch.\n")


def in_batch_contrastive_loss(one, other, identity, temperature):
    """Symmetric contrastive loss of B pairs, features (B, E) each: ITC and IIC without a queue. As in
    pre-training, no gradient flows into the keys."""
    def one_way(feature, keys):
        return contrastive_loss(feature, feature, keys, identity, identity, temperature, alpha=0.0)
    return (one_way(one, other) + one_way(other, one)) / 2      # at alpha 0 there are no momentum features


def sketch_ranks(similarity):
    """similarity (I sketches, steps, I photos), photo i belonging to sketch i -> ranks (I, steps), 1 is
    best. Ties and NaN count against the true photo."""
    true = similarity.diagonal(dim1=0, dim2=2).T                                            # (I, steps)
    return (~(similarity < true[..., None])).sum(-1)


def early_retrieval(ranks, photos):
    """Metrics in percent from ranks (I, steps) among `photos` photos: m@A (mean rank percentile) and m@B
    (mean reciprocal rank) over all steps; w@A and w@B weight step t of n by exp(-t / n), without
    normalisation, so that their maximum is about 63; A, the percentile of the finished sketch."""
    steps = ranks.shape[1]
    percentile, inverse = 100 * (photos - ranks.double()) / (photos - 1), 100 / ranks.double()
    weight = torch.exp(-torch.arange(1, steps + 1, dtype=torch.float64) / steps)
    return {"m@A": percentile.mean().item(), "m@B": inverse.mean().item(),
            "w@A": (weight * percentile).mean().item(), "w@B": (weight * inverse).mean().item(),
            "A, finished": percentile[:, -1].mean().item()}


# ---- the run -------------------------------------------------------------------------------------
TASKS = {"retrieval": retrieval, "attributes": attributes, "sketch": sketch}


def open_splits(config: TaskConfig, size: int) -> dict[str, Faces]:
    """The splits of --data, or drawn faces that train.py never uses. Raises ValueError if they lack what the
    task needs."""
    splits = {}
    for split, count, seed in (("train", config.faces, 10), ("val", config.validation, 11),
                               ("test", config.test, 12)):
        if config.data:
            faces = open_faces(config.data, split, config.cache, config.columns)
            available = {"retrieval": faces.has_text, "attributes": faces.attributes is not None,
                         "sketch": faces.sketches is not None}
            if not available[config.task]:
                raise ValueError(f"{faces.name}: has nothing to train {config.task} on")
            if split != "train" and count:
                faces = faces.subset(range(min(count, len(faces))))
            if split != "train" or config.task != "retrieval":      # whose batches replace damaged images
                faces = readable(faces, size)
        else:
            steps = config.sketch_steps if config.task == "sketch" else 0
            faces = load_toy_faces(count, size, seed, config.cache, steps)
        if config.task == "retrieval" and not config.data:      # greyscale: a domain shift from pre-training
            grey = np.asarray(faces.images) @ np.outer((0.299, 0.587, 0.114), (1, 1, 1))
            faces = replace(faces, images=grey.round().astype(np.uint8))
        splits[split] = faces
    return splits


def finetune(config: TaskConfig) -> list[tuple[str, dict]]:
    """Train and test on --checkpoint, then on random weights; returns the table's rows (name, metrics)."""
    device, folder = use_device(config.device), Path(config.out) / config.task
    if (folder / "table.md").exists():
        raise ValueError(f"{folder} already contains results; remove it, or choose another --out")
    model = FLIP.from_pretrained(config.checkpoint, vocabulary=config.vocabulary)
    splits = open_splits(config, model.config.vit.image_size)
    torch.manual_seed(derive_seed("random encoders", config.seed))
    encoders = {config.checkpoint: model}
    if config.random:
        encoders["random weights"] = init_model(model.config, model.tokenizer)
    log, rows = Log(folder / "log.jsonl"), []
    log.restart([{"config": asdict(config)}])
    samples = random_stream("nested fractions", config.seed).permutation(len(splits["train"]))
    steps = config.epochs * math.ceil(len(samples) / config.batch_size)
    for name, model in encoders.items():
        model.to(device).eval()
        for encoder in (model.student.image, model.student.text):
            encoder.requires_grad_(False)
        torch.manual_seed(derive_seed("new weights, negatives, steps of sketches", config.seed))
        task = TASKS[config.task](model, splits, config)
        rows = rows or [task.baseline]
        if task.trained is model:
            rows.append((f"{name}, before tuning", task.metrics("test")[0]))      # for the table only
        initial = trained_weights(task)
        for fraction in sorted(config.fractions):
            task.trained.load_state_dict(initial, strict=False)
            train_heads(task, model, samples[:max(1, round(fraction * len(samples)))], steps, config, log)
            metrics, details = task.metrics("test")
            log.write(encoder=name, fraction=fraction, test=metrics)
            part = f" on {100 * fraction:g} % of the faces" if config.fractions != (1.0,) else ""
            rows.append((f"{name}, tuned{part}", metrics))
        if name == config.checkpoint:
            task.draw(details, folder / f"{config.task}.png")
            weights = model.checkpoint() if task.trained is model else {"model": task.trained.state_dict()}
            write_checkpoint(weights, folder / ("flip.pt" if task.trained is model else "head.pt"))
    (folder / "table.md").write_text(table(rows, config.task) + "\n", encoding="utf-8")
    print(f"\n{table(rows, config.task)}\n{task.note}\n{folder}: log.jsonl, table.md, weights and a picture")
    return rows


def table(rows, task):
    """A Markdown table with the columns of the first row, the baseline."""
    columns = rows[0][1]
    headers = (c.replace("img_r", "text to image R@").replace("txt_r", "image to text R@") for c in columns)
    return markdown_table([f"{task}, %", *headers], [
        [name, *(f"{metrics[column]:.1f}" for column in columns)] for name, metrics in rows])


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Defaults in brackets are for retrieval.\nOther tasks: {RECIPES}\nDrawn faces: {DRAWN}")
    parser.add_argument("task", choices=tuple(TASKS))
    given = parse_flags(parser, TaskConfig, argv)
    drawn = {} if given.get("data") else DRAWN[given["task"]]
    return TaskConfig(**RECIPES[given["task"]] | drawn | given)


if __name__ == "__main__":
    run_script(lambda: finetune(parse_arguments()))
