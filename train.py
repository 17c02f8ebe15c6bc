"""Pre-train FLIP (arXiv 2407.08515, section 4).

    python train.py                         drawn faces, a tiny model, ten minutes on two CPU cores
    python train.py --data DIR              your own faces (the layouts that data.py reads)
    python train.py --data DIR --init FILE  the same, beginning with a trained FLIP, ours or official
    python train.py --resume                go on where the run in --out stopped
    torchrun --nproc_per_node 8 train.py --model base --data DIR \\
        --clip openai/clip-vit-base-patch16 --bert bert-base-uncased
                                            the paper's recipe: 8 processes of 80 pairs

The configuration is one dataclass whose fields are the flags. Its defaults are the paper's; but
what runs when nothing else is asked for is the tiny model, and RECIPES says what that does
differently, and why. What changes during a run (learning rate, momentum, hardness of the negatives,
...) is a schedule: a pure function of the step. So are the data and all random numbers, which is
why a run that was stopped and resumed computes what it would have computed.

Into --out go flip.pt (model, vocabulary, and all that --resume needs), log.jsonl, curves.png and
retrieval.png.

Shapes: see vit.py; B pairs per process and micro-batch.
"""
import argparse
import atexit
import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import signal
import textwrap
import time
import typing
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn     # imported once a process group is there, it would keep that alive for good
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from bert import BertConfig, Tokenizer, load_bert
from data import COLUMNS
from flip import (FLIP, FLIPConfig, Knobs, evaluating, rank_and_world, read_checkpoint, rerank,
                  write_checkpoint)
from losses import retrieval_metrics
from vit import ViTConfig, contact_sheet, load_clip, markdown, read_batches, resize_positions, run_script


# ---- configuration -----------------------------------------------------------------------------
TINY = (ViTConfig(image_size=48, patch_size=8, width=128, depth=3, heads=4),
        BertConfig(vocab_size=1, width=128, depth=2, heads=4, positions=66, dropout=0.0), 128)
MODELS = {"tiny": TINY, "base": (ViTConfig(), BertConfig(), 256),       # with the size of the features
          "large": (ViTConfig(width=1024, depth=24, heads=16), BertConfig(), 256)}


def flag(default, help, low=0, high=2 ** 62, choices=()):
    """A field that is a flag: its default, what it is, and what it may be (both ends included)."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass(frozen=True)
class Config:
    """Every field is a flag; the defaults are the paper's. Shares are fractions of the whole
    run."""
    model: str = flag("tiny", "tiny (for drawn faces; two CPU cores are enough), base (the paper's ViT-B/16 "
                              "and BERT-base) or large (ViT-L/16)", choices=tuple(MODELS))
    data: str = flag("", "folder with your own faces; without it faces are drawn and kept in --cache")
    out: str = flag("out", "folder for checkpoint, log and pictures")
    cache: str = flag("cache", "folder for drawn faces, and for the index of your own")
    columns: tuple[str, ...] = flag(COLUMNS[:2], "which columns of FaceCaption-15M the captions are from; "
                                                    "of several a random one at a time", choices=COLUMNS)
    max_lost: float = flag(1.0, "percent of the faces whose record or picture may be damaged: they are "
                                "counted, and left out; more end the run, and 0 is strict", high=100)
    faces: int = flag(20_000, "how many faces to draw for training", low=1)
    validation: int = flag(1000, "at most how many faces to validate on", low=1)
    resume: bool = flag(False, "continue the run in --out, if it saved anything, else begin it; its flags "
                               "are those it began with, but for --data, --cache, --max_lost, --workers, "
                               "--log_every, --eval_every and --save_every, which may be new")
    seed: int = flag(0, "of initial values, order, captions, negatives")
    init: str = flag("", "go on from this FLIP, from train.py or the official one: file, folder or hub name")
    vocabulary: str = flag("", "for an --init that holds none, as the official: file, folder, hub name")
    image_size: int = flag(0, "pixels on a side that the model looks at; 0: as --init or --model has it")
    clip: str = flag("", "start the image encoder from CLIP: file, folder or hub name")
    bert: str = flag("", "start the text encoder from BERT, with its vocabulary: folder or hub name")
    epochs: int = flag(15, "passes over the data, unless --steps says how long", low=1)
    steps: int = flag(0, "length of the run in steps instead of epochs; the shares below are shares of it")
    batch_size: int = flag(80, "pairs per process and micro-batch", low=1)
    accumulate: int = flag(1, "micro-batches per step, when memory does not allow larger ones", low=1)
    lr: float = flag(3e-5, "highest learning rate")
    lr_start: float = flag(1e-6, "learning rate at the first step")
    lr_min: float = flag(1e-6, "learning rate that the decay stops at")
    lr_decay: str = flag("epoch", "after the warm-up: epoch (x 0.9 each epoch), cosine or linear",
                         choices=("epoch", "cosine", "linear"))
    warmup: int = flag(20_000, "steps from lr_start to lr, but at most a fifth of the run")
    temperature_lr: float = flag(1.0, "learning rate of the temperature, as a multiple of lr")
    muon_image: float = flag(0.0, "learning rate of Muon, as a multiple of lr, for the matrices inside the "
                                  "image encoder's blocks; 0: AdamW for them, too")
    muon_text: float = flag(0.0, "the same for the text encoder's layers")
    weight_decay: float = flag(0.05, "of weight matrices and embeddings")
    beta2: float = flag(0.999, "AdamW's second beta", high=1)
    clip_grad: float = flag(0.0, "limit of the gradient's norm; 0: none")
    alpha: float = flag(0.4, "final share of the momentum encoder's soft targets", high=1)
    alpha_ramp: tuple[float, float] = flag((0, 2 / 15), "shares of the run between which alpha rises from 0",
                                           high=1)
    momentum: float = flag(0.995, "final momentum", high=1)
    momentum_from: float = flag(0.0, "share of the run until which the momentum encoder copies the student",
                                high=1)
    queue_size: int = flag(61_440, "entries in the queue", low=1)
    queue_from: float = flag(0.0, "share of the run after which the queue is used", high=1)
    itm_from: float = flag(0.0, "share of the run after which ITM is trained; 1: never", high=1)
    itm_every: int = flag(1, "train ITM at each n-th step", low=1)
    hardness: float = flag(1.0, "final hardness of the negatives: 1 draws them by similarity as the paper "
                                "does, 0 evenly")
    hard_ramp: tuple[float, float] = flag((0, 0), "shares of the run between which hardness rises from 0",
                                          high=1)
    augment: bool = flag(True, "flip and distort the pictures as the paper does")
    workers: int = flag(8, "processes that read pictures, for each training process")
    precision: str = flag("auto", "float32, bf16 (autocast), or auto: bf16 on CUDA",
                          choices=("auto", "float32", "bf16"))
    log_every: int = flag(50, "steps between lines of the log", low=1)
    eval_every: int = flag(5000, "steps between evaluations, each of which also saves the checkpoint", low=1)
    save_every: float = flag(30.0, "minutes after which a checkpoint is saved between evaluations, too")
    k_test: int = flag(256, "candidates per query that the matching head scores again", low=1)
    posterior: bool = flag(False, "rank them by log-odds + hardness * cosine / temperature (why: see "
                                  "FLIP.matching_score) instead of the paper's matching logit + cosine")

    def __post_init__(self):
        check_flags(self)
        if self.init and (self.clip or self.bert):
            raise ValueError("--init brings all weights: leave --clip and --bert out")
        if self.vocabulary and not self.init:
            raise ValueError("--vocabulary is for an --init that holds none; without --init, --bert has one")


# What learning from random weights needs in a short run; the paper's recipe starts from CLIP and BERT:
RECIPES = {"tiny": dict(
    steps=1800, batch_size=128, workers=0, augment=False,       # but on for one's own faces, which are few
    log_every=20, eval_every=900, k_test=16,
    lr=1e-3, lr_start=1e-5, lr_min=0.0, lr_decay="linear", warmup=60, beta2=0.98, clip_grad=1.0,
    # Sentences are learned sooner than faces, and a text encoder that moves more slowly than the
    # image encoder is one that this can follow.
    muon_image=4.5, muon_text=1.5,
    # At the full rate the temperature falls to 0.01 before there is anything to tell apart.
    temperature_lr=0.1,
    # Hard negatives from the start would leave the matching head at its prior: even ones first.
    itm_from=0.4, itm_every=3, hard_ramp=(0.45, 0.7), posterior=True,
    # In a short run a slow teacher lags behind most of what was learned: it slows down, and is
    # listened to, late. So the queue, too, is used late, when its entries change slowly.
    momentum=0.95, momentum_from=0.7, alpha_ramp=(0.75, 0.95), queue_size=512, queue_from=0.75)}


# ---- schedules: pure functions of the step -----------------------------------------------------
def ramp(x, start, end):
    """0 until start, 1 from end on, a straight line between."""
    return float(x >= end) if end <= start else min(1.0, max(0.0, (x - start) / (end - start)))


def warmup_decay(step, steps, warmup, lr, lr_start=0.0, lr_min=0.0, decay="cosine"):
    """A straight line from lr_start to lr over the warm-up, then down to lr_min along half a cosine
    or, with decay "linear", another straight line."""
    if step < warmup:
        return lr_start + (lr - lr_start) * step / warmup
    done = ramp(step, warmup, steps)
    left = 1 - done if decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return lr_min + (lr - lr_min) * left


def learning_rate(step, config, steps_per_epoch):
    """`warmup_decay`, or after the warm-up x 0.9 per epoch (the first is epoch 0)."""
    warmup = min(config.warmup, config.steps // 5)
    if config.lr_decay == "epoch" and step >= warmup:
        return max(config.lr_min, config.lr * 0.9 ** (step // steps_per_epoch))
    return warmup_decay(step, config.steps, warmup, config.lr, config.lr_start, config.lr_min,
                        config.lr_decay)


def knobs_at(step, config):
    """All else that changes during a run."""
    queue_length = config.queue_size        # in the paper full from the start, of random negatives
    if config.queue_from > 0:               # used later, only what was written so far counts
        pairs_seen = step * config.accumulate * config.batch_size * rank_and_world()[1]
        queue_length = min(config.queue_size, pairs_seen) if step >= config.queue_from * config.steps else 0
    return Knobs(alpha=config.alpha * ramp(step / config.steps, *config.alpha_ramp),
                 momentum=config.momentum if step >= config.momentum_from * config.steps else 0.0,
                 queue_length=queue_length,
                 hardness=config.hardness * ramp(step / config.steps, *config.hard_ramp),
                 with_itm=step >= config.itm_from * config.steps and step % config.itm_every == 0)


# ---- the step and the loop ---------------------------------------------------------------------
class Run(NamedTuple):
    """What the loop works on."""
    config: Config                  # with the number of steps decided
    model: FLIP
    wrapped: nn.Module              # the model itself, or DistributedDataParallel around it
    optimizers: list[torch.optim.Optimizer]
    batches: data.Batches
    steps_per_epoch: int
    validation: "Validation"
    log: "Log"
    start: int                      # the first step to do


def train_step(run, micro_batches, step):
    """One step on `accumulate` micro-batches; everything that changes state is here. Returns (ITC,
    ITM) as one tensor (2,); ITM is 0 in steps that do not train it."""
    config, model, rank = run.config, run.model, rank_and_world()[0]
    device, knobs = model.temperature.device, knobs_at(step, config)
    torch.manual_seed(seed_of(config.seed, step, rank))                         # dropout
    generator = torch.Generator().manual_seed(seed_of(config.seed, step))       # negatives: one draw for all
    model.update_momentum(knobs.momentum)
    losses = torch.zeros(2, device=device)
    for number, batch in enumerate(micro_batches, start=1):
        # DistributedDataParallel averages gradients in the last backward only; without it this does
        # nothing.
        run.wrapped.require_backward_grad_sync = number == len(micro_batches)
        with autocast(config, device):
            batch = batch.to(device)
            out = run.wrapped(batch.images, batch.captions, batch.identity, knobs, generator)
            ((out.itc + out.itm) / len(micro_batches)).backward()
        model.enqueue(out.image_keys, out.text_keys, out.identity)
        losses += torch.stack([out.itc, out.itm]).detach() / len(micro_batches)
    if config.clip_grad:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
    set_learning_rate(run.optimizers, learning_rate(step, config, run.steps_per_epoch))
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.clamp_temperature()
    return losses


def train(config):
    """The whole run; returns the trained model and its metrics."""
    run = prepare(config)
    config, log, rank = run.config, run.log, rank_and_world()[0]
    is_due = lambda done: done % config.eval_every == 0 or done == config.steps
    # A checkpoint is saved before its evaluation, which is therefore still to do.
    metrics = evaluate_and_draw(run, run.start) if run.start and is_due(run.start) else None
    stream = run.batches.from_batch(run.start * config.accumulate)
    recent, begin, saved = [], time.time(), time.time()
    bar = tqdm(range(run.start, config.steps), "training", initial=run.start, total=config.steps,
               disable=rank > 0)
    with stop_on_interrupt() as stop:
        for step in bar:
            recent.append(train_step(run, next_batches(run, stream, step, stop), step))
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                line = summarise(recent, range(done - len(recent), done), run)
                log.write(step=done, **line, seconds=(time.time() - begin) / len(recent),
                          lost=len(run.batches.lost))
                bar.set_postfix(itc=line["itc"], itm=line["itm"])
                recent, begin = [], time.time()
            if is_due(done) or time.time() - saved > 60 * config.save_every:
                save(run, done)
                saved = time.time()
            if is_due(done):
                paused = time.time()
                metrics = evaluate_and_draw(run, done)
                begin += time.time() - paused
    if rank == 0:
        print(f"{table(metrics, run.validation)}\n"
              f"{config.out}: flip.pt, log.jsonl, curves.png, retrieval.png")
    return run.model, metrics


def next_batches(run, stream, step, stop):
    """The micro-batches of a step. Where a process was asked to stop, or met a damaged picture, all
    hear of it, the first one saves, and each ends, with a sentence: nothing that was learned is
    lost."""
    problem, micro_batches = None, []
    try:
        micro_batches = list(itertools.islice(stream, run.config.accumulate))
    except (ValueError, RuntimeError) as error:     # RuntimeError: a process that reads pictures was killed
        problem = error
    ends = torch.tensor([problem is not None, bool(stop)], dtype=torch.float32,
                        device=run.model.temperature.device)
    if dist.is_initialized():
        dist.all_reduce(ends)
    failed, stopped = (ends > 0).tolist()
    if (failed or stopped) and step > run.start:
        save(run, step)
    if failed:
        raise ValueError(f"{problem or 'another process could not read its batch'} "
                         f"({step} steps are saved: --resume)")
    if stopped:
        first = rank_and_world()[0] == 0                    # one sentence, not one from each process
        raise SystemExit(f"stopped after step {step}; continue with --resume" if first else 1)
    return micro_batches


def summarise(losses, steps, run):
    """Mean losses of the recent steps over all processes; ITM is None where no step trained it."""
    stacked = torch.stack(losses)                                               # (steps, 2)
    bad, total = (~stacked.isfinite()).any(1).float(), stacked.sum(0)           # (steps,), (2,)
    if dist.is_initialized():
        dist.all_reduce(bad)
        dist.all_reduce(total)
        total /= dist.get_world_size()
    if bad.any():
        raise ValueError(f"a loss of step {steps[int(bad.argmax())] + 1} is not a finite number: training "
                         f"has diverged; begin again with a smaller --lr, or with --clip_grad")
    itc, itm = total.tolist()
    matched = sum(knobs_at(step, run.config).with_itm for step in steps)
    return {"itc": itc / len(losses), "itm": itm / matched if matched else None,
            "temperature": run.model.temperature.item(),
            "lr": learning_rate(steps[-1], run.config, run.steps_per_epoch)}


def seed_of(*numbers):
    """One seed that depends on all the numbers and on how many they are (alone, SeedSequence
    ignores a last 0)."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1)[0])


def autocast(config, device):
    enabled = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


# ==== A first reading may stop here: building, evaluation, saving, flags ==========================
@torch.no_grad()
def build_model(config, vit, faces, initial):
    """FLIP with the ViTConfig `vit`, else as --init has it (`initial`) or --model says, from random
    weights, CLIP's or BERT's; without any text encoder to start from, with a vocabulary from captions
    of `faces`."""
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
    model = new_model(flip_config, tokenizer)
    if initial:                     # all that is learned; queue and momentum encoder begin anew
        learned = initial.student.state_dict()
        learned["image.positions"] = resize_positions(learned["image.positions"], vit.patches)
        model.student.load_state_dict(learned)
        model.matching_head.load_state_dict(initial.matching_head.state_dict())
        model.temperature.copy_(initial.temperature)
    if config.clip:
        load_clip(model.student.image, config.clip)
    if config.bert:
        load_bert(model.student.text, config.bert)
    model.update_momentum(0)        # the momentum encoder starts as a copy of the student
    return model


def open_initial(config):
    """The model that --init names, or None."""
    if not config.init:
        return None
    initial = FLIP.from_pretrained(config.init, vocabulary=config.vocabulary)
    width, expected = initial.config.vit.width, MODELS[config.model][0].width
    if width != expected:
        raise ValueError(f"--init {config.init}: its image encoder is {width} wide, that of --model "
                         f"{config.model} {expected}; give the --model whose size, and recipe, it has")
    initial.need_tokenizer()
    return initial


def announce(config, faces, validation, world, tokenizer):
    """Say how long the run is, and what about it will disappoint."""
    passes = config.steps * config.accumulate * config.batch_size * world / len(faces)
    chance = 100 * min(1, 10 / len(validation))
    print(f"{len(faces):,} faces to train on, {len(validation):,} to validate on; {config.steps:,} steps are "
          f"{passes:.1f} passes over the former")
    if passes > 60:
        print(f"so often seen, faces are learned by heart: try --steps "
              f"{round(30 * config.steps / passes)}, or more faces")
    if chance > 4:
        print(f"among {len(validation)} faces chance alone reaches {chance:.0f} % at R@10: figures say more "
              f"with more faces to validate on (at most --validation {config.validation})")
    if config.init:
        unknown = Counter(word for text in sample_captions(faces, 500) for word in tokenizer.words(text)[1])
        if unknown:
            words = ", ".join(word for word, _ in unknown.most_common(10))
            print(f"{len(unknown)} words of the captions are not in the vocabulary of --init, and are "
                  f"spelled in letters: {words}{', ...' if len(unknown) > 10 else ''}")


@torch.no_grad()
def new_model(flip_config, tokenizer):
    """A FLIP with random weights, CLIP's and BERT's initial values, or, for the tiny model, which
    starts from nothing else, larger ones: Xavier for all linear layers; in the text encoder's
    self-attention, values and outputs larger still, since BERT's 0.02 at width 128 leaves [CLS]
    nearly blind to the caption; words louder than their positions, so that captions with other words
    differ from the first step; the image encoder's positions as large as what the patches bring, so
    that it can tell an eyebrow from a moustache."""
    model = FLIP(flip_config, tokenizer)
    if flip_config.vit.width != TINY[0].width:
        return model
    nn.init.normal_(model.student.image.positions, std=0.3)
    nn.init.normal_(model.student.text.words.weight, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    for layer in model.student.text.layers:
        for linear in (layer.attention.value, layer.attention.out):
            nn.init.normal_(linear.weight, std=2 * linear.in_features ** -0.5)
    return model


def sample_captions(faces, count=3000):
    """Two captions of each of the first faces, the same each time, to learn a vocabulary from."""
    return [faces.caption(i, np.random.default_rng((i, k)))
            for i in range(min(count, len(faces))) for k in range(2)]


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (kellerjordan.github.io/posts/muon), for matrices that map hidden
    vectors to hidden vectors: of U S V^T, U V^T is taken, times a factor that makes it as large as
    an update of AdamW (arXiv 2502.16982).

    Why that helps a model that starts from nothing: its gradients are nearly of low rank. A few
    directions, what most captions say, are large, and Adam, which scales entry by entry, follows
    them; the many small ones, each a rare mark, must wait. Here all move at one pace."""

    def __init__(self, groups, momentum=0.95):
        super().__init__(groups, dict(momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same_shape = {}                     # large products of many matrices, not many small ones
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    ahead = p.grad.lerp(momentum, group["momentum"])                # Nesterov's
                    same_shape.setdefault(p.shape, []).append((p, ahead))
            for shape, members in same_shape.items():
                for (p, _), update in zip(members, orthogonal(torch.stack([ahead for _, ahead in members]))):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])


def orthogonal(X, steps=5):
    """Matrices U S V^T (n, rows, columns) -> about U V^T, by Newton-Schulz iteration: a step maps
    each singular value s to a s + b s^3 + c s^5, and five bring all above a thousandth of the norm to
    between 0.7 and 1.2. (In float32: few laptops have hardware for torch.optim.Muon's bfloat16.)"""
    if X.shape[1] > X.shape[2]:                 # X X^T had better be the small one
        return orthogonal(X.mT, steps).mT
    a, b, c = 3.4445, -4.7750, 2.0315           # Jordan's
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


def build_optimizers(module, weight_decay, beta2=0.999, temperature_lr=1.0, muon_image=0.0, muon_text=0.0):
    """[AdamW], which is all that finetune.py needs, or [AdamW, Muon]; every trained parameter in
    exactly one group. Only matrices decay. The temperature has `temperature_lr` times the learning
    rate; the matrices that Muon is for have `muon_image` and `muon_text` times it, or, at 0, AdamW."""
    groups = {"adamw": {}, "muon": {}}                      # {optimiser: {(scale, weight decay): parameters}}
    for name, p in module.named_parameters():
        muon_lr = muon_image if ".blocks." in name else muon_text if ".layers." in name else 0.0
        optimizer, scale = ("muon", muon_lr) if muon_lr and p.ndim == 2 else ("adamw", 1.0)
        scale, decay = temperature_lr if name == "temperature" else scale, (p.ndim > 1) * weight_decay
        if p.requires_grad:
            groups[optimizer].setdefault((scale, decay), []).append(p)
    adamw, muon = ([{"params": params, "scale": scale, "weight_decay": decay}
                    for (scale, decay), params in kinds.items()] for kinds in groups.values())
    optimizers = [torch.optim.AdamW(adamw, betas=(0.9, beta2), eps=1e-8, fused=True)]
    return optimizers + [Muon(muon)] if muon else optimizers


def set_learning_rate(optimizers, lr):
    for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
        group["lr"] = lr * group["scale"]


def open_data(config, size):
    """Faces to train on, faces to validate on, in a size that suits size x size pixels."""
    if config.data:
        train, validation = (
            data.open_faces(config.data, split, config.cache, config.columns, config.max_lost)
            for split in ("train", "val"))
        validation = validation.subset(range(min(config.validation, len(validation))))
        return train, data.readable(validation, config.max_lost, size)  # or every evaluation would stop
    return (data.drawn_faces(config.faces, size, seed=0, folder=config.cache),
            data.drawn_faces(config.validation, size, seed=1, folder=config.cache))


def start_processes():
    """Join the other processes when started by torchrun; returns this one's device."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ and not dist.is_initialized():
        # the others wait while the first process draws or checks the data
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2))
        if not cuda:        # a thread of gloo that frees a tensor while Python ends aborts the process
            atexit.register(dist.destroy_process_group)
    return torch.device("cuda" if cuda else "cpu")


def prepare(config):
    """Data, model and optimisers, new or as the checkpoint in --out has them."""
    device, (rank, world) = start_processes(), rank_and_world()
    path = Path(config.out) / "flip.pt"
    if path.exists() and not config.resume:
        raise ValueError(f"{path} is there already; continue that run with --resume, or choose another --out")
    checkpoint = read_run(path) if path.exists() else {}
    saved = checkpoint.get("training")
    if config.resume and not saved and rank == 0:
        print(f"nothing was saved in {config.out} yet: the run begins")
    if rank > 0:
        dist.barrier()              # until the first process has drawn or listed data, and downloaded weights
    model = FLIP.from_pretrained(path, saved=checkpoint) if saved else open_initial(config)
    vit = model.config.vit if model else MODELS[config.model][0]
    vit = dataclasses.replace(vit, image_size=config.image_size or vit.image_size)
    faces, validation = open_data(config, vit.image_size)
    if saved and (saved["processes"], saved["faces"]) != (world, len(faces)):
        raise ValueError(f"--resume: the run in {path} had {saved['processes']} processes and "
                         f"{saved['faces']} faces, now there are {world} and {len(faces)}; use the same")
    if not saved:
        model = build_model(config, vit, faces, initial=model)
    model.to(device).train()
    if rank == 0 and world > 1:
        dist.barrier()
    batches = data.Batches(faces, model.tokenizer, model.config.vit.image_size, config.batch_size,
                           config.seed, config.augment, rank, world, config.workers, config.max_lost)
    steps_per_epoch = batches.per_epoch // config.accumulate
    if steps_per_epoch == 0:
        raise ValueError(f"an epoch has {batches.per_epoch} batches, fewer than --accumulate "
                         f"{config.accumulate}")
    config = dataclasses.replace(config, steps=config.steps or config.epochs * steps_per_epoch)
    if rank == 0 and not saved:
        announce(config, faces, validation, world, model.tokenizer)
    optimizers = build_optimizers(model, config.weight_decay, config.beta2, config.temperature_lr,
                                  config.muon_image, config.muon_text)
    for optimizer, state in zip(optimizers, saved["optimizers"] if saved else ()):
        optimizer.load_state_dict(state)
    lines = saved["log"] if saved else [{"config": asdict(config)}]
    log = Log(Path(config.out) / "log.jsonl", lines, writes=rank == 0)
    wrapped = model if world == 1 else DistributedDataParallel(
        model, broadcast_buffers=False, find_unused_parameters=config.itm_from > 0 or config.itm_every > 1)
    return Run(config, model, wrapped, optimizers, batches, steps_per_epoch, Validation.of(validation), log,
               start=saved["step"] if saved else 0)


# ---- evaluation --------------------------------------------------------------------------------
class Validation(NamedTuple):
    """Faces never trained on, one caption of the grammar each, or all captions that came with
    them."""
    faces: data.Faces
    texts: list                     # T captions
    image_of_text: torch.Tensor     # (T,)
    references: dict                # for the table: recalls of who knows every attribute, or {}

    @staticmethod
    def of(faces):
        images = torch.arange(len(faces))
        if faces.captions is not None:
            counts = torch.tensor([len(captions) for captions in faces.captions])
            texts = [text for captions in faces.captions for text in captions]
            return Validation(faces, texts, images.repeat_interleave(counts), {})
        texts, stated = zip(*(data.caption(attributes, np.random.default_rng((1, i)))   # the same every time
                              for i, attributes in enumerate(faces.attributes)))
        references = {}
        for name, ways in data.reference_recalls(np.stack(stated), faces.attributes).items():
            both = ways["text_to_image"], ways["image_to_text"]
            references[name] = [100 * way[k] for way in both for k in (1, 5, 10)]
        return Validation(faces, list(texts), images, references)


def evaluate(model, validation, config):
    """What `recalls` says of the validation faces."""
    device, size, faces = model.temperature.device, model.config.vit.image_size, validation.faces
    show, image_tokens, image_features = rank_and_world()[0] == 0, [], []
    captions = model.tokenizer(validation.texts).to(device)
    with evaluating(model):
        with autocast(config, device):
            for _, pixels in read_batches(faces.picture, len(faces), size, "encoding faces", show=show):
                tokens, features = model.student.encode_image(pixels.to(device))
                image_tokens.append(tokens.cpu())
                image_features.append(features)
            text_features = model.student.text_features(captions)
        similarity = torch.cat(image_features) @ text_features.T                    # (I, T), in float32
        return recalls(model, torch.cat(image_tokens), captions, similarity, validation.image_of_text, config)


def recalls(model, image_tokens, captions, similarity, image_of_text, config):
    """Recalls both ways, by cosine alone ("itc_...") and re-ranked, and the re-ranked text-to-image
    scores (T, I); from image tokens (I, L, D), T captions and the cosines (I, T) of their
    features."""
    device, show = similarity.device, rank_and_world()[0] == 0
    with autocast(config, device):
        scores = rerank(model, image_tokens, captions.to(device), similarity, config.k_test, progress=show)
    itc = retrieval_metrics(similarity, similarity.T, image_of_text.to(device))
    reranked = retrieval_metrics(*scores, image_of_text.to(device))
    return reranked | {f"itc_{name}": value for name, value in itc.items()}, scores[1].cpu()


def table(metrics, validation):
    """The final table: recalls in percent, both ways, beside chance and the references. A share
    above 100 % means more than that reference finds, which takes all captions that fit a face for
    equal."""
    chance = [100 * min(1, k / len(validation.faces)) for k in (1, 5, 10)] * 2
    rows = {"chance": chance} | validation.references
    for name, prefix in (("this model, ITC alone", "itc_"), ("this model, re-ranked", "")):
        rows[name] = [metrics[f"{prefix}{way}_r{k}"] for way in ("img", "txt") for k in (1, 5, 10)]
    ours = rows["this model, re-ranked"]
    for name in validation.references:
        rows[f"share of {name}"] = [100 * a / b for a, b in zip(ours, validation.references[name])]
    header = ["recall in %", "text to image R@1", "R@5", "R@10", "image to text R@1", "R@5", "R@10"]
    return markdown(header, [[name, *(f"{value:.1f}" for value in row)] for name, row in rows.items()])


def retrieval_sheet(validation, text_to_image, path, queries=6, top=5):
    """For some captions the best faces with their scores; the caption's own face is framed."""
    rows = []
    for t in np.linspace(0, len(validation.texts) - 1, queries).astype(int):
        own, scores = validation.image_of_text[t], text_to_image[t]
        rows.append((validation.texts[t], [(validation.faces.picture(i), f"score {scores[i]:.1f}", i == own)
                                           for i in scores.argsort(descending=True)[:top].tolist()]))
    contact_sheet(rows, legend="green: the face that the sentence was written for").save(path)


def figure_of(width, height, columns=1):
    from matplotlib.figure import Figure                    # without pyplot: no window, nothing to close
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def plot_curves(log, validation, path):
    """Losses and recalls over steps, with the references as dotted and dashed lines."""
    figure, (left, right) = figure_of(12, 4.5, columns=2)
    for name in ("itc", "itm"):
        shown = [(line["step"], line[name]) for line in log if line.get(name) is not None]
        left.plot(*zip(*shown) if shown else ([], []), label=name.upper())
    left.set(xlabel="step", title="training losses")
    evaluations = [line for line in log if "img_r10" in line]
    for column, k, colour in ((0, 1, "tab:blue"), (1, 5, "tab:orange"), (2, 10, "tab:green")):
        steps, recall = zip(*((line["step"], line[f"img_r{k}"]) for line in evaluations))
        right.plot(steps, recall, "o-", color=colour, label=f"R@{k}")
        for name, style in zip(validation.references, (":", "--")):
            right.axhline(validation.references[name][column], color=colour, linestyle=style, linewidth=0.8)
    right.set(xlabel="step", ylabel="%", ylim=(0, 100), xlim=(0, None),
              title="recall, text to image, re-ranked\n(dotted: consistency, dashed: ceiling)")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=110)


def evaluate_and_draw(run, step):
    """Recalls on the validation faces, into the log and the two pictures."""
    metrics, text_to_image = evaluate(run.model, run.validation, run.config)
    run.log.write(step=step, **metrics)
    if rank_and_world()[0] == 0:
        plot_curves(run.log.lines, run.validation, Path(run.config.out) / "curves.png")
        retrieval_sheet(run.validation, text_to_image, Path(run.config.out) / "retrieval.png")
    return metrics


# ---- saving, stopping, resuming ----------------------------------------------------------------
class Log:
    """log.jsonl: the configuration, then a line every few steps. It also rides in the checkpoint,
    from which a resumed run writes it anew: what lay beyond the checkpoint happens again."""

    def __init__(self, path, lines, writes=True):
        self.path, self.lines, self.writes = path, list(lines), writes
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def write(self, **line):
        self.lines.append(line)
        if self.writes:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")


def save(run, step):
    """Write the checkpoint, from the first process; never weights that are no numbers over good
    ones."""
    if not all(weights.isfinite().all() for weights in run.model.parameters()):
        raise ValueError(f"after step {step} some weights are not finite numbers: training has diverged, and "
                         f"this is not saved; begin again with a smaller --lr, or with --clip_grad")
    if rank_and_world()[0] == 0:
        state = {"config": asdict(run.config), "processes": rank_and_world()[1],
                 "faces": len(run.batches.faces), "step": step, "log": run.log.lines,
                 "optimizers": [optimizer.state_dict() for optimizer in run.optimizers]}
        write_checkpoint(run.model.checkpoint() | {"training": state}, Path(run.config.out) / "flip.pt")


def read_run(path):
    """The checkpoint of a run that can be resumed: under "training" is what `save` put there."""
    checkpoint = read_checkpoint(path)
    state = checkpoint.get("training")
    if not isinstance(state, dict) or "optimizers" not in state:
        raise ValueError(f"{path} holds a model but no training state of this version, so there is nothing "
                         f"to resume")
    return checkpoint


@contextlib.contextmanager
def stop_on_interrupt():
    """A list that Ctrl-C or a polite kill puts something into, so that the loop can finish its step
    and save; a second one stops at once. Afterwards both do what they did before."""
    pressed = []

    def handle(number, frame):
        pressed.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield pressed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- flags -------------------------------------------------------------------------------------
def check_flags(config):
    """ValueError for the first field that is out of its range; a pair must not fall."""
    for f in filter(lambda f: f.metadata, dataclasses.fields(config)):
        value, rule = getattr(config, f.name), f.metadata
        values = value if isinstance(value, tuple) else (value,)
        if rule["choices"] and not set(values) <= set(rule["choices"]):
            raise ValueError(f"--{f.name} {value}: expected one of {', '.join(rule['choices'])}")
        numbers = [x for x in values if isinstance(x, (int, float))]
        if not all(rule["low"] <= x <= rule["high"] for x in numbers):          # so nan is refused as well
            most = "" if rule["high"] == 2 ** 62 else f" and at most {rule['high']}"
            raise ValueError(f"--{f.name} {value}: expected at least {rule['low']}{most}")
        if f.type == tuple[float, float] and (len(value) != 2 or value[0] > value[1]):
            raise ValueError(f"--{f.name} {value}: expected two numbers, the smaller first")


def parse_flags(parser, config, argv):
    """A flag for every field of a configuration; what was given, {name: value}."""
    for f in filter(lambda f: f.metadata, dataclasses.fields(config)):
        shown = f" ({f.default})" if f.default not in ("", ()) else ""
        options = {"default": argparse.SUPPRESS, "help": f.metadata["help"] + shown}
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(f.default, tuple):
            options |= {"type": typing.get_args(f.type)[0], "nargs": "+", "metavar": f.name.upper()}
        else:
            options |= {"type": f.type, "metavar": f.name.upper()}
        parser.add_argument(f"--{f.name}", **options)
    given = vars(parser.parse_args(argv))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


FREE_TO_CHANGE = ("resume", "out", "data", "cache", "max_lost", "workers", "log_every", "eval_every",
                  "save_every")


def parse_arguments(argv=None):
    """The configuration that the command line asks for; with --resume that of the run in --out, or,
    where nothing was saved yet, as if it were not given."""
    tiny = ", ".join(f"{name} {value}" for name, value in RECIPES["tiny"].items())
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"In brackets: the defaults of base and large. The tiny model, which runs without --model, "
               f"has\n{textwrap.fill(tiny, 100)}\n(augment True with --data)")
    given = parse_flags(parser, Config, argv)
    path = Path(given.get("out", Config.out)) / "flip.pt"
    if given.get("resume") and path.exists():
        before = read_run(path)["training"]["config"]
        for name, value in given.items():
            if name not in FREE_TO_CHANGE and value != before.get(name):
                raise ValueError(f"--resume: the run in {path} has --{name} {before.get(name)} and goes on "
                                 f"with it; leave --{name} {value} out, or start anew with another --out")
        return Config(**before | given)
    recipe = RECIPES.get(given.get("model", "tiny"), {})
    if "epochs" in given:
        recipe = recipe | {"steps": 0}              # or the tiny recipe's steps would decide
    if "data" in given:
        recipe = recipe | {"augment": True}
    return Config(**recipe | given)


if __name__ == "__main__":
    run_script(lambda: train(parse_arguments()))
