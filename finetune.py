"""Three tasks on a frozen FLIP (FLIP paper, section 5 and figure 2, panels b to d).

    python finetune.py retrieval      the face for a sentence, and the sentence for a face
    python finetune.py attributes     the 40 attributes of a face
    python finetune.py sketch         the photo for a sketch that is still being drawn

Without --data they run on drawn faces, in a few minutes on two CPU cores; with it, on your own (see
data.py). The encoders are frozen: evaluation mode, no gradient, no optimiser state. What they make
of a picture is therefore computed once, before the first epoch (only ITM and re-ranking run the
text encoder again, over captions and images), and a small part is trained on it: the projections,
the matching head and the temperature that FLIP has already (retrieval; sketch, too, where photos
have captions, else the image projection and the temperature), or a linear layer on pooled tokens
(attributes).

`tune` trains any of these; then come the tasks, a class each: what is computed once, what is
trained, its loss, its metrics. Several checkpoints can be given; each is tuned in the same way, a
frozen encoder of random weights as well, and the table puts them side by side. The best evaluation
on the validation part decides what is kept; the test part decides nothing.

Departures from the official code: it chooses the best epoch on the test part, trains LFWA's head on
the test part, leaves dropout on inside the "frozen" encoders, trains the attribute head by plain
gradient descent, and keeps a momentum encoder and a queue, though behind frozen encoders all keys
of a batch are fresh.

Into --out/<task> go log.jsonl, table.md, pictures, and what was tuned on the first checkpoint:
head.pt for attributes, else a whole flip.pt, which --checkpoint takes again.

Shapes: see vit.py; I pictures, T captions, V vectors pooled per picture.
"""
import argparse
import itertools
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from captions import ATTRIBUTES
from common.distributed import autocast
from common.optim import build_optimizers, set_learning_rate
from common.resume import Log
from common.script import check_flags, flag, markdown_table, parse_flags, run_script
from flip import FLIP
from readers.index import SPLITS
from tasks import TASKS
from train import init_model, warmup_decay


# ---- configuration -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    """Every field but the task is a flag. The defaults are the paper's for retrieval; each task
    says what it changes (`recipe`), and what drawn faces change (`drawn`)."""
    task: str = field(default="")
    checkpoint: tuple[str, ...] = flag(("out/flip.pt",), "one or more: made by train.py, or the official one")
    vocabulary: str = flag("", "for a checkpoint that holds none, as the official: file, folder, hub name")
    random: bool = flag(True, "tune on a frozen encoder of random weights as well, for comparison")
    data: str = flag("", "folder with your own faces; without it faces are drawn and kept in --cache")
    out: str = flag("out", "results go into a folder below it, named after the task")
    cache: str = flag("cache", "folder for drawn faces, and for the index of your own")
    max_errors: float = flag(1.0, "percent of the faces whose record or picture may be damaged: they are "
                                "counted and left out; 0 is strict", high=100,
                                was="max_lost")
    faces: int = flag(4000, "how many faces to draw for training", low=2)
    validation: int = flag(1000, "how many to draw for validation; of your own, at most how many", low=2)
    test: int = flag(1000, "how many faces to draw for the test part", low=2)
    captions: int = flag(2, "sentences the grammar writes for each training face that came without", low=1)
    seed: int = flag(0, "of the random encoder, new weights, order, captions, negatives")
    epochs: int = flag(50, "passes over the training part; over a share of it so many more that as many "
                           "samples are seen", low=1)
    batch_size: int = flag(64, "samples per step", low=2)
    lr: float = flag(3e-5, "highest learning rate; it falls to 0 along a cosine")
    warmup: int = flag(2000, "steps in which the learning rate rises; at most a tenth of all")
    weight_decay: float = flag(0.05, "of AdamW, on matrices only")
    itm_every: int = flag(1, "train the matching head at each n-th step", low=1)
    fractions: tuple[float, ...] = flag((0.01, 0.1, 1.0), "attributes: shares of the training part to learn "
                                        "from", low=1e-6, high=1,
                                was="shares")
    labels: tuple[str, ...] = flag((), "attributes: which ones to learn (default: all)", choices=ATTRIBUTES)
    num_evaluations: int = flag(5, "how often to look at the validation part; the best look decides", low=1,
                                was="evaluations")
    k_test: int = flag(256, "candidates per query that the matching head scores again", low=1)
    precision: str = flag("auto", "float32, bf16 (autocast), or auto: bf16 on CUDA",
                          choices=("auto", "float32", "bf16"))

    def __post_init__(self):
        check_flags(self)
        for name in ("fractions", "labels"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"--{name} {values}: expected each once")
            if self.task != "attributes" and values != getattr(Config, name):
                raise ValueError(f"--{name} is for attributes, not for {self.task}")


# ---- tuning --------------------------------------------------------------------------------------
def train_head(task, module, training, train_indices, validation, log):
    """Train what requires gradients of the module `learner` on the samples `chosen` of the training
    part, and leave it as it was when the validation part liked it best_weights, which may be before the
    first step."""
    config, device = task.config, next(module.parameters()).device
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    [optimizer] = build_optimizers(module, config.weight_decay)
    epochs = round(config.epochs * training.count / len(train_indices))  # so that shares differ in data only
    per_epoch, step = math.ceil(len(train_indices) / config.batch_size), 0
    warmup = min(config.warmup, epochs * per_epoch // 10)
    eval_epochs = {round(epochs * (n + 1) / config.num_evaluations) for n in range(config.num_evaluations)}
    best_metric, best_weights = task.metrics(module, validation)[task.selection_metric], copy_parameters(trained)
    for epoch in tqdm(range(1, epochs + 1), "tuning", leave=False):
        rng = np.random.default_rng((config.seed, epoch))
        order, losses = train_indices[rng.permutation(len(train_indices))], []
        for indices in order.tensor_split(per_epoch):                   # nearly equal batches
            step += 1
            set_learning_rate([optimizer], warmup_decay(step, epochs * per_epoch, warmup, config.lr))
            with autocast(config, device):
                loss = task.loss(module, training, indices, rng, step - 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not task.has_own_head:                                   # then it is FLIP itself
                module.clamp_temperature()
            losses.append(loss.detach())
        if epoch in eval_epochs:
            found = task.metrics(module, validation)
            log.write(epoch=epoch, loss=torch.stack(losses).mean().item(),
                      **{f"val_{column}": found[column] for column in task.columns})
            if found[task.selection_metric] > best_metric:
                best_metric, best_weights = found[task.selection_metric], copy_parameters(trained)
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(best_weights[name])


def copy_parameters(parameters):
    return {name: p.detach().clone() for name, p in parameters.items()}


# ---- the run -------------------------------------------------------------------------------------
class Result(NamedTuple):
    """What came of one encoder, on the test part; share: of the training part that the learner has
    seen."""
    name: str
    before: dict            # {share: metrics} of the learner that tuning began with
    tuned: dict             # {share: metrics} after it

    @property
    def final(self):
        """From the largest share."""
        return self.tuned[max(self.tuned)]


def evaluate_encoder(name, model, task, parts, log):
    """Tune on one frozen encoder, with each share of the training part, and test. Returns the
    result, the learner of the largest share, and the faces of the test."""
    training, validation, testing = (
        task.encode(model, parts[split], split == "train") for split in ("train", "val", "test"))
    result, order = Result(name, {}, {}), np.random.default_rng(task.config.seed).permutation(training.count)
    for share in task.fractions:
        torch.manual_seed(task.config.seed)
        module = task.trainable_module(model, training)
        log.write(encoder=name, share=share)
        result.before[share] = task.metrics(module, testing)        # to be reported, no more
        train_indices = order[:max(1, round(share * training.count))] if share < 1 else np.arange(training.count)
        train_head(task, module, training, torch.from_numpy(train_indices), validation, log)
        result.tuned[share] = task.metrics(module, testing)
    log.write(encoder=name, **{f"test_{column}": result.final[column] for column in task.columns})
    return result, module, testing.faces


def open_encoders(config):
    """[(name, FLIP)]: the checkpoints, then one with random weights, initialised as train.py
    would."""
    encoders = [(path, FLIP.from_pretrained(path, vocabulary=config.vocabulary))
                for path in config.checkpoint]
    if config.random:
        torch.manual_seed(config.seed)
        model = encoders[-1][1]
        encoders.append(("random weights", init_model(model.config, model.tokenizer)))
    return encoders


def finetune(config):
    """The whole run; returns the results, the first checkpoint's first. What is done lies in --out
    before the next begins."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task, folder = TASKS[config.task](config), Path(config.out) / config.task
    if (folder / "table.md").exists():
        raise ValueError(f"{folder} holds the results of an earlier run; take it away, or choose another "
                         f"--out")
    encoders = open_encoders(config)
    parts = {split: task.open(split, encoders[0][1]) for split in SPLITS}
    for part in parts.values():
        if len(part) < 2:
            raise ValueError(f"{part.name}: {len(part)} pictures, expected at least 2")
    log, results = Log(folder / "log.jsonl", [{"config": asdict(config)}]), []
    for name, model in encoders:
        print(f"{name} ...", flush=True)
        model.to(device).eval().requires_grad_(False)       # frozen; a learner thaws what is no encoder
        result, module, tested = evaluate_encoder(name, model, task, parts, log)
        results.append(result)
        (folder / "table.md").write_text(table(results, task) + "\n", encoding="utf-8")
        if len(results) == 1:
            task.save(model, module, folder)
        task.draw(results, tested, folder)
        model.cpu()
    print(f"\n{table(results, task)}\n\n{folder}: log.jsonl, table.md, what was tuned, pictures")
    return results


def table(results, task):
    """Markdown: who has learned nothing, then the encoders side by side, the last first."""
    cells = list(itertools.product(task.columns, task.fractions))
    header = [task.columns[column] + (f", {100 * share:g} %" if len(task.fractions) > 1 else "")
              for column, share in cells]
    rows = [(task.baseline_name, dict.fromkeys(task.fractions, results[0].final["baseline"]))]
    for result in results[::-1]:
        if not task.has_own_head:
            rows.append((f"{result.name}, before tuning", result.before))
        rows.append((f"{result.name}, tuned", result.tuned))
    return markdown_table(["%", *header], [[name, *(f"{metrics[share][column]:.1f}" for column, share in cells)]
                                           for name, metrics in rows])


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="In brackets: the paper's values for retrieval on your own faces. Drawn faces have\n"
               + "\n".join(f"{name}: {task.recipe | task.toy_recipe}" for name, task in TASKS.items()))
    parser.add_argument("task", choices=tuple(TASKS))
    given = parse_flags(parser, Config, argv)
    task = TASKS[given["task"]]
    return Config(**task.recipe | ({} if given.get("data") else task.toy_recipe) | given)


if __name__ == "__main__":
    run_script(lambda: finetune(parse_arguments()))
