"""Train heads on frozen encoders, select them on the validation split, test them, print the table (FLIP
paper, section 5).

    python finetune.py retrieval      find the face for a caption, and the caption for a face
    python finetune.py attributes     predict the 40 attributes of a face
    python finetune.py sketch         find the photo for a sketch that is still being drawn

The tasks are classes in tasks.py. Without --data they run on drawn faces, in a few minutes on two CPU
cores. Frozen means evaluation mode, no gradient and no optimiser state for the encoders. Several
checkpoints can be compared; the same heads are also trained on a frozen encoder with random weights.
The best validation metric selects the weights; the test split selects nothing.

Departures: the official code selects the best epoch on the test split, trains LFWA's head on the test
split, leaves dropout on inside the "frozen" encoders, trains the attribute head with SGD, and keeps a
momentum encoder and a queue, though frozen encoders allow large batches. None of this is done here.

--out/<task> receives log.jsonl, table.md, plots, and the weights trained on the first checkpoint:
head.pt for attributes, otherwise a complete flip.pt, which --checkpoint accepts.
"""
import argparse
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common.distributed import autocast, choose_device
from common.optim import build_optimizers, set_learning_rate
from common.script import Log, check_flags, flag, markdown_table, parse_flags, run_script
from config import SharedFlags
from data import Faces
from flip import FLIP
from readers.index import SPLITS
from tasks import TASKS, Task
from train import init_model, warmup_decay


# ---- configuration -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config(SharedFlags):
    """The flags. Defaults are the paper's for retrieval; a task's `recipe` overrides them, and for drawn
    faces its `toy_recipe`."""
    task: str = field(default="")
    checkpoint: tuple[str, ...] = flag(("out/flip.pt",), "one or more: from train.py, or the official one")
    random: bool = flag(True, "also train on a frozen encoder with random weights, for comparison")
    out: str = flag("out", "folder for the results, in a subfolder named after the task")
    faces: int = flag(4000, "number of faces to draw for training", low=2)
    validation: int = flag(1000, "number of faces to draw for validation; with --data the maximum", low=2)
    test: int = flag(1000, "number of faces to draw for the test split", low=2)
    captions: int = flag(2, "captions the grammar writes for each training face without captions", low=1)
    seed: int = flag(0, "seed of the random encoder, new weights, data order, captions and negatives")
    epochs: int = flag(50, "epochs over the training split; smaller fractions get more epochs, so that the "
                           "number of steps stays the same", low=1)
    batch_size: int = flag(64, "samples per step", low=2)
    lr: float = flag(3e-5, "peak learning rate, with cosine decay to 0")
    warmup: int = flag(2000, "warm-up steps, at most 10 %% of all")
    weight_decay: float = flag(0.05, "weight decay of parameters with two or more dimensions")
    itm_every: int = flag(1, "train the matching head in every n-th step", low=1)
    fractions: tuple[float, ...] = flag((0.01, 0.1, 1.0), "attributes: fractions of the training split to "
                                                          "train on", low=1e-6, high=1)
    num_evaluations: int = flag(5, "number of validation runs; the best one is kept", low=1)

    def __post_init__(self):
        check_flags(self)
        if len(set(self.fractions)) < len(self.fractions):
            raise ValueError(f"--fractions {self.fractions}: expected no duplicates")
        if self.task != "attributes" and self.fractions != Config.fractions:
            raise ValueError(f"--fractions is a flag of attributes, not of {self.task}")


# ---- training ------------------------------------------------------------------------------------
def train_head(task, module, training, train_indices, validation, log):
    """Train the parameters of `module` that require gradients on the training samples `train_indices`,
    then restore those with the best validation metric (possibly the initial ones)."""
    config, device = task.config, next(module.parameters()).device
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    [optimizer] = build_optimizers(module, config.weight_decay)
    epochs = round(config.epochs * training.count / len(train_indices))     # equal steps for all fractions
    per_epoch, step = math.ceil(len(train_indices) / config.batch_size), 0
    warmup = min(config.warmup, epochs * per_epoch // 10)
    eval_epochs = {round(epochs * (n + 1) / config.num_evaluations) for n in range(config.num_evaluations)}
    best_metric = task.metrics(module, validation)[task.selection_metric]
    best_weights = copy_parameters(trained)
    for epoch in tqdm(range(1, epochs + 1), "training", leave=False):
        rng = np.random.default_rng((config.seed, epoch))
        order, losses = train_indices[rng.permutation(len(train_indices))], []
        for indices in order.tensor_split(per_epoch):                   # batches of nearly equal size
            step += 1
            set_learning_rate([optimizer], warmup_decay(step, epochs * per_epoch, warmup, config.lr))
            with autocast(config.precision, device):
                loss = task.loss(module, training, indices, rng, step - 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not task.has_own_head:                                   # then the module is the FLIP
                module.clamp_temperature()
            losses.append(loss.detach())
        if epoch in eval_epochs:
            metrics = task.metrics(module, validation)
            log.write(epoch=epoch, loss=torch.stack(losses).mean().item(),
                      **{f"val_{column}": metrics[column] for column in task.columns})
            if metrics[task.selection_metric] > best_metric:
                best_metric, best_weights = metrics[task.selection_metric], copy_parameters(trained)
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(best_weights[name])


def copy_parameters(parameters):
    return {name: p.detach().clone() for name, p in parameters.items()}


# ---- the run -------------------------------------------------------------------------------------
class Result(NamedTuple):
    """Test metrics of one encoder, for each fraction of the training split."""
    name: str
    before: dict            # {fraction: metrics} before training
    tuned: dict             # {fraction: metrics} after training

    @property
    def final(self):
        """Metrics for the largest fraction."""
        return self.tuned[max(self.tuned)]


def evaluate_encoder(name: str, model: FLIP, task: Task, splits: dict[str, Faces], log: Log):
    """Train on one frozen encoder with each fraction of the training split, and test. Returns the Result,
    the module trained on the largest fraction, and the test faces."""
    training, validation, testing = (
        task.encode(model, splits[split], split == "train") for split in ("train", "val", "test"))
    result, order = Result(name, {}, {}), np.random.default_rng(task.config.seed).permutation(training.count)
    for fraction in task.fractions:
        torch.manual_seed(task.config.seed)
        module = task.trainable_module(model, training)
        log.write(encoder=name, fraction=fraction)
        result.before[fraction] = task.metrics(module, testing)     # for the table only
        count = max(1, round(fraction * training.count))
        train_indices = order[:count] if fraction < 1 else np.arange(training.count)
        train_head(task, module, training, torch.from_numpy(train_indices), validation, log)
        result.tuned[fraction] = task.metrics(module, testing)
    log.write(encoder=name, **{f"test_{column}": result.final[column] for column in task.columns})
    return result, module, testing.faces


def open_encoders(config: Config) -> list[tuple[str, FLIP]]:
    """[(name, FLIP)]: the checkpoints, then one with random weights, initialised as in train.py."""
    encoders = [(path, FLIP.from_pretrained(path, vocabulary=config.vocabulary))
                for path in config.checkpoint]
    if config.random:
        torch.manual_seed(config.seed)
        model = encoders[-1][1]
        encoders.append(("random weights", init_model(model.config, model.tokenizer)))
    return encoders


def finetune(config: Config) -> list[Result]:
    """Evaluate all encoders and return their results. Each encoder's are saved before the next starts."""
    device = choose_device(config.device)
    task, folder = TASKS[config.task](config), Path(config.out) / config.task
    if (folder / "table.md").exists():
        raise ValueError(f"{folder} already contains results; remove it, or choose another --out")
    encoders = open_encoders(config)
    splits = {split: task.open(split, encoders[0][1]) for split in SPLITS}
    for faces in splits.values():
        if len(faces) < 2:
            raise ValueError(f"{faces.name}: {len(faces)} images, expected at least 2")
    log, results = Log(folder / "log.jsonl"), []
    log.restart([{"config": asdict(config)}])
    for name, model in encoders:
        print(f"{name} ...", flush=True)
        model.to(device).eval().requires_grad_(False)       # frozen; tasks unfreeze the heads
        result, module, tested = evaluate_encoder(name, model, task, splits, log)
        results.append(result)
        (folder / "table.md").write_text(table(results, task) + "\n", encoding="utf-8")
        if len(results) == 1:
            task.save(model, module, folder)
        task.draw(results, tested, folder)
        model.cpu()
    note = task.note + (task.toy_note if not config.data else "")
    print(f"\n{table(results, task)}\n{note}\n{folder}: log.jsonl, table.md, the trained weights, plots")
    return results


def table(results, task):
    """A Markdown table per title in `task.columns`, in percent: the baseline, then the encoders, the last one
    first."""
    rows = [(task.baseline_name, dict.fromkeys(task.fractions, results[0].final["baseline"]))]
    for result in results[::-1]:
        if not task.has_own_head:
            rows.append((f"{result.name}, before tuning", result.before))
        rows.append((f"{result.name}, tuned", result.tuned))
    tables = []
    for title in dict.fromkeys(title for title, _ in task.columns.values()):
        cells = [(column, fraction, header or f"{100 * fraction:g} % of the faces")
                 for column, (of, header) in task.columns.items() if of == title
                 for fraction in task.fractions]
        tables.append(markdown_table([f"{title}, %", *(header for _, _, header in cells)], [
            [name, *(f"{metrics[fraction][column]:.1f}" for column, fraction, _ in cells)]
            for name, metrics in rows]))
    return "\n\n".join(tables)


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Defaults in brackets are the paper's for retrieval. Overrides for drawn faces:\n"
               + "\n".join(f"{name}: {task.recipe | task.toy_recipe}" for name, task in TASKS.items()))
    parser.add_argument("task", choices=tuple(TASKS))
    given = parse_flags(parser, Config, argv)
    task = TASKS[given["task"]]
    return Config(**task.recipe | ({} if given.get("data") else task.toy_recipe) | given)


if __name__ == "__main__":
    run_script(lambda: finetune(parse_arguments()))
