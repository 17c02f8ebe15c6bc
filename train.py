"""Pre-train FLIP (arXiv 2407.08515, section 4): schedules, one training step, the loop, and setting up
a run.

    python train.py                         drawn faces, the tiny model, minutes on two CPU cores
    python train.py --data DIR              your own faces (layouts: readers/layouts.py)
    python train.py --data DIR --init FILE  the same, starting from a trained FLIP, ours or the official
    python train.py --resume                resume the run in --out
    torchrun --nproc_per_node 8 train.py --model base --data DIR \\
        --clip openai/clip-vit-base-patch16 --bert bert-base-uncased
                                            the paper's recipe: 8 processes with 80 pairs each

Flags, the paper's values and the tiny model's recipe are in config.py. Everything that changes
during a run (learning rate, momentum, hardness of the negatives, ...) is a schedule, a pure function
of the step. So are the data and all random numbers; hence a resumed run computes exactly what an
uninterrupted one does. A step uses these random numbers, seeded by

    order of the faces                  (seed, epoch)           BatchLoader.batch_indices
    caption and augmentation            (seed, epoch, index)    FaceDataset.__getitem__
    dropout                             (seed, step, rank)      train_step
    negatives, sampled on rank 0        (seed, step)            train_step

--out receives flip.pt (its contents: common/resume.py), log.jsonl, retrieval.png and curves.png, with
the reference rows of the table as dotted and dashed lines.
"""
import contextlib
import dataclasses
import itertools
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from bert import Tokenizer
from common.distributed import autocast, choose_precision, init_distributed, rank_and_world_size
from common.optim import build_optimizers, load_optimizers, set_learning_rate
from common.resume import Log, Progress, load_run, save, saved_at_end
from common.script import run_script
from common.weights import load_bert, load_clip, load_weights
from config import MODELS, TINY, Config, parse_arguments
from data import Batch, BatchLoader, Faces, drop_unreadable, load_toy_faces, open_faces
from evaluation import EvaluationSet, evaluate_and_draw, recall_table, warn_of_chance
from flip import FLIP, FLIPConfig, StepParams
from vit import ViTConfig


# ---- schedules: pure functions of the step -------------------------------------------------------
def ramp(x: float, start: float, end: float) -> float:
    """0 up to start, 1 from end on, linear in between."""
    return float(x >= end) if end <= start else min(1.0, max(0.0, (x - start) / (end - start)))


def warmup_decay(step, steps, warmup, lr, lr_start=0.0, lr_min=0.0, decay="cosine"):
    """Linear warm-up from lr_start to lr, then cosine or linear decay to lr_min at step `steps`."""
    if step < warmup:
        return lr_start + (lr - lr_start) * step / warmup
    done = ramp(step, warmup, steps)
    left = 1 - done if decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return lr_min + (lr - lr_min) * left


def learning_rate(step: int, config: Config, steps_per_epoch: int) -> float:
    """`warmup_decay` or, as in the paper, decay by 0.9 per epoch (from step 0) once the warm-up is over."""
    warmup = min(config.warmup, config.steps // 5)
    if config.lr_decay == "epoch" and step >= warmup:
        return max(config.lr_min, config.lr * 0.9 ** (step // steps_per_epoch))
    return warmup_decay(step, config.steps, warmup, config.lr, config.lr_start, config.lr_min,
                        config.lr_decay)


def schedule(step: int, config: Config) -> StepParams:
    """Everything else that changes during a run."""
    queue_length = config.queue_size        # the paper's queue is full of random negatives at step 0
    if config.queue_from > 0:               # a queue that is used later has only the entries written so far
        pairs_seen = step * config.accumulate * config.batch_size * rank_and_world_size()[1]
        queue_length = min(config.queue_size, pairs_seen) if step >= config.queue_from * config.steps else 0
    return StepParams(alpha=config.alpha * ramp(step / config.steps, *config.alpha_ramp),
                      momentum=config.momentum if step >= config.momentum_from * config.steps else 0.0,
                      queue_length=queue_length,
                      hardness=config.hardness * ramp(step / config.steps, *config.hardness_ramp),
                      with_itm=step >= config.itm_from * config.steps and step % config.itm_every == 0)


# ---- the step and the loop -----------------------------------------------------------------------
class TrainState(NamedTuple):
    """What the training loop works on."""
    config: Config                  # with the number of steps set
    model: FLIP
    ddp_model: nn.Module            # DistributedDataParallel(model), or with one process the model
    optimizers: list[torch.optim.Optimizer]
    loader: BatchLoader
    steps_per_epoch: int
    validation: EvaluationSet
    log: Log
    progress: Progress


def train_step(run: TrainState, micro_batches: list[Batch], step: int) -> torch.Tensor:
    """One optimiser step on `accumulate` micro-batches. Returns the mean (ITC, ITM) loss as a tensor (2,);
    ITM is 0 in steps that skip it. All changes of state are here, at the end: whatever fails before them
    leaves the state of the last step."""
    config, model, rank = run.config, run.model, rank_and_world_size()[0]
    device, params = model.device, schedule(step, config)
    torch.manual_seed(derive_seed(config.seed, step, rank))                     # dropout
    generator = torch.Generator().manual_seed(derive_seed(config.seed, step))   # negatives, for all ranks
    losses, outputs = torch.zeros(2, device=device), []
    for number, batch in enumerate(micro_batches, start=1):
        # DistributedDataParallel averages gradients in the last backward pass only
        run.ddp_model.require_backward_grad_sync = number == len(micro_batches)
        with autocast(config.precision, device):
            batch = batch.to(device)
            out = run.ddp_model(batch.images, batch.captions, batch.identity, params, generator)
            ((out.itc + out.itm) / len(micro_batches)).backward()
        outputs.append(out)
        losses += torch.stack([out.itc, out.itm]).detach() / len(micro_batches)
    if config.grad_clip:
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    set_learning_rate(run.optimizers, learning_rate(step, config, run.steps_per_epoch))
    run.progress.done = None                        # from here on the model changes
    for out in outputs:
        model.enqueue(out.image_keys, out.text_keys, out.identity)
    for optimizer in run.optimizers:
        with autocast(config.precision, device):        # for Muon's matrix products
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.clamp_temperature()
    model.update_momentum(schedule(step + 1, config).momentum)      # for the next step
    run.progress.done = step + 1
    return losses


def train(config: Config):
    """Run the training; returns the model and its final validation metrics."""
    run = setup(config)
    config, log, rank, start = run.config, run.log, rank_and_world_size()[0], run.progress.done
    is_due = lambda done: done % config.eval_every == 0 or done == config.steps
    stream = run.loader.iterate_from(start * config.accumulate)
    bar = tqdm(range(start, config.steps), "training", initial=start, total=config.steps, disable=rank > 0)
    with saved_at_end(run), contextlib.closing(stream):
        # a resumed run may have ended before the evaluation of its step; the model of --init has a row, too
        metrics = evaluate_and_draw(run, start) if is_due(start) and (start or config.init) else None
        recent, waited, begin, last_save = [], 0.0, time.time(), time.time()
        for step in bar:
            waiting = time.time()
            micro_batches = next_batches(run, stream)
            waited += time.time() - waiting
            recent.append(train_step(run, micro_batches, step))
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                line = mean_losses(recent, range(done - len(recent), done), run)
                line["seconds"] = (time.time() - begin) / len(recent)       # per step, of them
                line["data_seconds"] = waited / len(recent)                 # waiting for data
                log.write(step=done, **line, num_errors=len(run.loader.errors))
                bar.set_postfix({name: line[name] for name in ("itc", "itm", "seconds", "data_seconds")})
                recent, waited, begin = [], 0.0, time.time()
            if is_due(done) or time.time() - last_save > 60 * config.save_every:
                save(run)
                last_save = time.time()
            if is_due(done):
                paused = time.time()
                metrics = evaluate_and_draw(run, done)
                begin += time.time() - paused
    if rank == 0:
        initial = next((line for line in log.lines if line.get("step") == 0), None)
        print(f"{recall_table(metrics, run.validation, initial)}\n"
              f"{config.out}: flip.pt, log.jsonl, curves.png, retrieval.png")
    return run.model, metrics


def next_batches(run, stream):
    """The micro-batches of a step. If any rank received a stop signal or failed to read its batch, every
    rank raises an error, so that all stop after the same step."""
    failure, micro_batches = None, []
    try:
        micro_batches = list(itertools.islice(stream, run.config.accumulate))
    except Exception as error:                      # a damaged image, or a data worker was killed
        failure = error
    flags = torch.tensor([failure is not None, run.progress.stop], dtype=torch.float32,
                         device=run.model.device)
    if dist.is_initialized():
        dist.all_reduce(flags)
    failed, stopped = (flags > 0).tolist()
    if failed:
        raise failure or ValueError("another process could not read its batch")
    if stopped:
        raise KeyboardInterrupt
    return micro_batches


def mean_losses(losses, steps, run):
    """Mean losses of these steps over all processes, for the log; ITM is None if no step trained it.
    Raises ValueError if a loss is not finite."""
    stacked = torch.stack(losses)                                               # (steps, 2)
    bad, total = (~stacked.isfinite()).any(1).float(), stacked.sum(0)           # (steps,), (2,)
    if dist.is_initialized():
        dist.all_reduce(bad)
        dist.all_reduce(total)
        total /= dist.get_world_size()
    if bad.any():
        raise ValueError(f"a loss of step {steps[int(bad.argmax())] + 1} is NaN or infinite: training has "
                         f"diverged; start a new run with a smaller --lr, or with --grad_clip")
    itc, itm = total.tolist()
    matched = sum(schedule(step, run.config).with_itm for step in steps)
    return {"itc": itc / len(losses), "itm": itm / matched if matched else None,
            "temperature": run.model.temperature.item(),
            "lr": learning_rate(steps[-1], run.config, run.steps_per_epoch)}


def derive_seed(*numbers: int) -> int:
    """One seed from several numbers and their count (SeedSequence alone ignores trailing zeros)."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1)[0])


# ---- what a run starts from ----------------------------------------------------------------------
def setup(config: Config) -> TrainState:
    """Data, model and optimisers: new, or from the checkpoint in --out."""
    device, (rank, world_size) = init_distributed(config.device), rank_and_world_size()
    path = Path(config.out) / "flip.pt"
    if path.exists() and not config.resume:
        raise ValueError(f"{path} already exists; use --resume, or choose another --out")
    checkpoint = load_run(path) if path.exists() else {}
    saved = checkpoint.get("training")
    if config.resume and not saved and rank == 0:
        print(f"no checkpoint in {config.out} yet: starting a new run")
    if rank > 0:
        dist.barrier()              # until rank 0 has drawn or indexed the data and downloaded the weights
    model = FLIP.from_pretrained(path, saved=checkpoint) if saved else load_initial(config)
    vit = model.config.vit if model else MODELS[config.model][0]
    vit = dataclasses.replace(vit, image_size=config.image_size or vit.image_size)
    faces, validation = load_data(config, vit.image_size)
    if saved and (saved["processes"], saved["faces"]) != (world_size, len(faces)):
        raise ValueError(f"--resume: the run in {path} had {saved['processes']} processes and "
                         f"{saved['faces']} faces, found {world_size} and {len(faces)}; use the same")
    if not saved:
        model = build_model(config, vit, faces, initial=model)
    model.to(device).train()
    if rank == 0 and world_size > 1:
        dist.barrier()
    loader = BatchLoader(faces, model.tokenizer, model.config.vit.image_size, config.batch_size,
                         config.seed, config.augment, rank, world_size, config.workers, config.max_errors)
    steps_per_epoch = loader.batches_per_epoch // config.accumulate
    if steps_per_epoch == 0:
        raise ValueError(f"an epoch has {loader.batches_per_epoch} batches, fewer than --accumulate "
                         f"{config.accumulate}")
    config = dataclasses.replace(config, steps=config.steps or config.epochs * steps_per_epoch,
                                 precision=choose_precision(config.precision, device))
    if rank == 0 and not saved:
        print_plan(config, faces, validation, world_size, model.tokenizer)
    optimizers = build_optimizers(model, config.weight_decay, config.beta2, config.temperature_lr,
                                  config.muon_lr_image, config.muon_lr_text, config.muon_momentum)
    start = saved["step"] if saved else 0
    if not 0 <= start <= config.steps:
        raise ValueError(f"{path}: expected a step from 0 to {config.steps}, found {start}")
    if saved:
        load_optimizers(optimizers, saved["optimizers"], f"{path}: training, optimizers")
    lines = saved["log"] if saved else [{"config": asdict(config)}]
    log = Log(Path(config.out) / "log.jsonl", lines, writes=rank == 0)
    ddp_model = model if world_size == 1 else DistributedDataParallel(
        model, broadcast_buffers=False, find_unused_parameters=config.itm_from > 0 or config.itm_every > 1)
    return TrainState(config, model, ddp_model, optimizers, loader, steps_per_epoch,
                      EvaluationSet.of(validation, faces, config.batch_size * world_size), log,
                      Progress(start, start))


def load_data(config: Config, size: int) -> tuple[Faces, Faces]:
    """Training and validation faces, for a model with an input of size x size pixels."""
    if config.data:
        train, validation = (
            open_faces(config.data, split, config.cache, config.columns, config.max_errors,
                       outside=config.outside)
            for split in ("train", "val"))
        validation = validation.subset(range(min(config.validation, len(validation))))
        return train, drop_unreadable(validation, config.max_errors, size)
    return (load_toy_faces(config.faces, size, seed=0, folder=config.cache),
            load_toy_faces(config.validation, size, seed=1, folder=config.cache))


@torch.no_grad()
def build_model(config: Config, vit: ViTConfig, faces: Faces, initial: FLIP | None) -> FLIP:
    """A new model with the image encoder `vit`, otherwise sized like `initial` (from --init) or --model.
    Weights are those of `initial`, of --clip and --bert, or random. Without --init and --bert the
    vocabulary is built from captions of `faces`."""
    torch.manual_seed(config.seed)
    _, bert, embed_dim = MODELS[config.model]
    if initial:
        bert, embed_dim, tokenizer = initial.config.bert, initial.config.embed_dim, initial.tokenizer
    else:
        tokenizer = Tokenizer.load(config.bert) if config.bert else Tokenizer.train(sample_captions(faces))
    bert = dataclasses.replace(bert, vocab_size=tokenizer.vocab_size)
    posterior = config.posterior or initial is not None and initial.config.hardness is not None
    hardness = config.hardness if posterior else None
    flip_config = FLIPConfig(vit, bert, embed_dim, config.queue_size, hardness)
    model = init_model(flip_config, tokenizer)
    if initial:                     # all learned weights; queue and momentum encoder start anew
        load_weights(model.student, initial.student.state_dict(), config.init,
                     image_positions=("image.positions",))
        model.matching_head.load_state_dict(initial.matching_head.state_dict())
        model.temperature.copy_(initial.temperature)
    if config.clip:
        load_clip(model.student.image, config.clip)
    if config.bert:
        load_bert(model.student.text, config.bert)
    model.update_momentum(0)        # the momentum encoder starts as a copy of the student
    return model


def load_initial(config: Config) -> FLIP | None:
    """The model of --init, or None. Raises ValueError if its width is not that of --model."""
    if not config.init:
        return None
    initial = FLIP.from_pretrained(config.init, vocabulary=config.vocabulary)
    width, expected = initial.config.vit.width, MODELS[config.model][0].width
    if width != expected:
        raise ValueError(f"--init {config.init}: its image encoder has width {width}, but --model "
                         f"{config.model} has width {expected}; choose the --model of matching width")
    initial.require_tokenizer()
    return initial


def print_plan(config: Config, faces: Faces, validation: Faces, world_size: int, tokenizer: Tokenizer):
    """Print the length of the run, and warnings about few faces or unknown words."""
    epochs = config.steps * config.accumulate * config.batch_size * world_size / len(faces)
    print(f"{len(faces):,} training faces, {len(validation):,} validation faces; {config.steps:,} steps are "
          f"{epochs:.1f} epochs, in {config.precision}")
    if epochs > 60:
        print(f"this will overfit: try --steps {round(30 * config.steps / epochs)}, or more faces")
    warn_of_chance(validation)
    if config.init:
        unknown = {word for text in sample_captions(faces, 500) for word in tokenizer.unknown_words(text)}
        if unknown:
            print(f"{len(unknown)} words of the captions are not in the vocabulary of --init, for example "
                  f"{min(unknown)!r}")


@torch.no_grad()
def init_model(flip_config: FLIPConfig, tokenizer: Tokenizer) -> FLIP:
    """A FLIP with random weights, initialised like CLIP and BERT. The tiny model, trained from scratch,
    needs larger values: Xavier for all linear layers; larger still for value and output of the text
    self-attention, since with BERT's 0.02 at width 128 [CLS] barely depends on the caption; word
    embeddings larger than positions, so that captions differ from step one; image positions on the
    scale of the patch embeddings, so that an eyebrow can be told from a moustache."""
    model = FLIP(flip_config, tokenizer)
    if flip_config.vit.width != TINY[0].width:
        return model
    nn.init.normal_(model.student.image.positions, std=0.5)
    nn.init.normal_(model.student.text.words.weight, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    for layer in model.student.text.layers:
        for linear in (layer.attention.value, layer.attention.out):
            nn.init.normal_(linear.weight, std=2 * linear.in_features ** -0.5)
    return model


def sample_captions(faces: Faces, count: int = 3000) -> list[str]:
    """Two captions of each of the first `count` faces, the same in every call."""
    return [faces.caption(i, np.random.default_rng((i, k)))
            for i in range(min(count, len(faces))) for k in range(2)]


if __name__ == "__main__":
    run_script(lambda: train(parse_arguments(description=__doc__)))
