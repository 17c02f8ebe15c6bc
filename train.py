"""Pre-train FLIP (arXiv 2407.08515, section 4).

    python train.py                                     drawn faces, a tiny model, ten minutes on two CPU cores
    python train.py --data DIR                          your own faces (the layouts that data.py reads)
    torchrun --nproc_per_node 8 train.py --model base --data DIR --clip openai/clip-vit-base-patch16 \\
        --bert bert-base-uncased                        the paper's recipe: 8 processes of 80 pairs

The configuration is one dataclass whose fields are the flags. Its defaults are the paper's; RECIPES says what the tiny
model, which is what runs when nothing else is asked for, does differently. What changes during a run (learning rate,
momentum, hardness of the negatives, ...) is a schedule: a pure function of the step. So are the data and all random
numbers, which is why a run that was stopped and resumed computes what it would have computed.

Into --out go flip.pt (model, optimiser, vocabulary), log.jsonl, curves.png and retrieval.png.

Shapes: B pairs per process and micro-batch, T captions and I images in validation.
"""
import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import signal
import time
import typing
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from bert import BertConfig, Tokenizer, load_bert
from flip import FLIP, FLIPConfig, contact_sheet, rank_and_world, read_checkpoint, rerank, write_whole
from losses import retrieval_metrics
from vit import ViTConfig, load_clip, to_tensor


# ---- configuration -------------------------------------------------------------------------------------------------
PRECISION = ("auto", "float32", "bf16")


def flag(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """Every field is a flag; the defaults are the paper's. Shares are fractions of the whole run."""
    model: str = flag("tiny", "tiny (for drawn faces, two CPU cores are enough), base (the paper's ViT-B/16 and BERT-base) or "
                              "large (ViT-L/16)")
    data: str = flag("", "folder with your own faces; without it faces are drawn and kept in --cache")
    out: str = flag("out", "folder for checkpoint, log and pictures")
    cache: str = flag("cache", "folder for the drawn faces")
    faces: int = flag(20_000, "how many faces to draw for training")
    validation: int = flag(1000, "at most how many faces to validate on")
    resume: bool = flag(False, "continue the run in --out exactly where it stopped")
    seed: int = flag(0, "of initial values, order, captions, negatives")
    clip: str = flag("", "start the image encoder from CLIP: file, folder or hub name (openai/clip-vit-base-patch16)")
    bert: str = flag("", "start the text encoder from BERT, with its vocabulary: folder or hub name (bert-base-uncased)")
    epochs: int = flag(15, "passes over the data")
    steps: int = flag(0, "length of the run in steps instead of epochs; it scales the schedules")
    batch_size: int = flag(80, "pairs per process and micro-batch; every pair is contrasted with the batch and the queue")
    accumulate: int = flag(1, "micro-batches per step, when memory does not allow larger ones")
    lr: float = flag(3e-5, "highest learning rate")
    lr_start: float = flag(1e-6, "learning rate at the first step")
    lr_min: float = flag(1e-6, "learning rate that the decay stops at")
    lr_decay: str = flag("epoch", "after the warm-up: epoch (x 0.9 each epoch) or cosine")
    warmup: int = flag(20_000, "steps from lr_start to lr")
    temperature_lr: float = flag(1.0, "learning rate of the temperature, as a multiple of lr")
    weight_decay: float = flag(0.05, "of weight matrices and embeddings")
    decay_all: bool = flag(False, "decay LayerNorms, biases and temperature too, as the official code does")
    beta2: float = flag(0.999, "AdamW's second beta")
    clip_grad: float = flag(0.0, "limit of the gradient's norm; 0: none")
    small_init: bool = flag(False, "initial values for small models that start from nothing")
    alpha: float = flag(0.4, "final share of the momentum encoder's soft targets")
    alpha_ramp: tuple[float, float] = flag((0, 2 / 15), "shares of the run between which alpha rises from 0")
    momentum: float = flag(0.995, "final momentum")
    momentum_from: float = flag(0.0, "share of the run until which momentum is 0: the momentum encoder copies the student")
    queue_size: int = flag(61_440, "entries in the queue")
    queue_from: float = flag(0.0, "share of the run after which the queue is used")
    itm_from: float = flag(0.0, "share of the run after which ITM is trained")
    itm_every: int = flag(1, "train ITM at each n-th step")
    hardness: float = flag(1.0, "final hardness of the negatives: 1 draws them by similarity as the paper does, 0 evenly")
    hard_ramp: tuple[float, float] = flag((0, 0), "shares of the run between which hardness rises from 0")
    augment: bool = flag(True, "flip and distort the pictures as the paper does")
    workers: int = flag(8, "processes that read pictures, for each training process")
    precision: str = flag("auto", "float32, bf16 (autocast), or auto: bf16 on CUDA")
    log_every: int = flag(50, "steps between lines of the log")
    eval_every: int = flag(5000, "steps between evaluations, each of which also saves the checkpoint")
    k_test: int = flag(256, "candidates per query that the matching head scores again")
    cosine_weight: float = flag(1.0, "of the cosine beside the matching logit when it does")

    def __post_init__(self):
        for name, allowed in (("model", MODELS), ("lr_decay", ("epoch", "cosine")), ("precision", PRECISION)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} {getattr(self, name)}: expected one of {', '.join(allowed)}")
        for name in ("faces", "validation", "epochs", "batch_size", "accumulate", "itm_every", "queue_size", "eval_every",
                     "log_every", "k_test"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: expected at least 1")
        for name in ("seed", "steps", "lr", "lr_start", "lr_min", "warmup", "weight_decay", "clip_grad", "temperature_lr",
                     "hardness", "workers", "cosine_weight"):
            if not 0 <= getattr(self, name) < 2 ** 62:                  # neither negative nor infinite nor nan
                raise ValueError(f"--{name} {getattr(self, name)}: expected a number that is not negative")
        for name in ("alpha", "alpha_ramp", "momentum", "beta2", "momentum_from", "queue_from", "itm_from", "hard_ramp"):
            values = getattr(self, name)
            values = values if isinstance(values, tuple) else (0, values)
            if not 0 <= values[0] <= values[1] <= 1:
                raise ValueError(f"--{name} {getattr(self, name)}: expected a share from 0 to 1, or two with FROM <= TO")


TINY = (ViTConfig(image_size=48, patch_size=8, width=128, depth=3, heads=4),
        BertConfig(vocab_size=0, width=128, depth=2, heads=4, positions=66, dropout=0.0), 128)
MODELS = {"tiny": TINY, "base": (ViTConfig(), BertConfig(), 256),
          "large": (ViTConfig(width=1024, depth=24, heads=16), BertConfig(), 256)}

# What learning from random weights needs, in a thousand steps, beyond the paper's recipe (which starts from CLIP and BERT):
RECIPES = {"base": {}, "large": {}, "tiny": dict(
    steps=1500, batch_size=128, workers=0, augment=False, log_every=20, eval_every=750, k_test=16,
    lr=1e-3, lr_start=1e-5, lr_min=2e-5, lr_decay="cosine", warmup=60, beta2=0.98, clip_grad=1.0,
    # At the full rate the temperature falls to 0.01 before there is anything to tell apart.
    temperature_lr=0.1,
    # BERT's 0.02 at width 128 leaves [CLS] nearly blind to the caption.
    small_init=True,
    # Asked about hard negatives from the start, the matching head never leaves its prior: even ones first. And never the
    # hardest: 40 attributes are no person, so the caption most like an image's own is often true of the image as well.
    itm_from=0.4, itm_every=3, hard_ramp=(0.5, 0.9), hardness=0.5,
    # In the logit's unit, which is log-odds, a cosine weighs 1 / temperature.
    cosine_weight=20.0,
    # In a short run a slow teacher lags behind most of what was learned: it slows down, and is listened to, late.
    momentum=0.95, momentum_from=0.7, alpha_ramp=(0.75, 0.95), queue_size=512, queue_from=0.75)}


def add_flags(parser, config, recipes):
    """A flag for every field of a configuration that has a help text; it names the default, for each recipe where they differ.
    What is not given is absent from the parsed result."""
    for f in dataclasses.fields(config):
        if "help" not in f.metadata:
            continue
        defaults = {name: recipe.get(f.name, f.default) for name, recipe in recipes.items()}
        same = all(default == f.default for default in defaults.values())
        shown = f.default if same else ", ".join(f"{name} {default}" for name, default in defaults.items())
        told = f.metadata["help"] + (f" ({shown})" if shown not in ("", ()) else "")
        options = {"default": argparse.SUPPRESS, "help": told.replace("%", "%%")}
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif f.type == tuple[float, float]:
            options |= {"type": float, "nargs": 2, "metavar": ("FROM", "TO")}
        elif isinstance(f.default, tuple):
            options |= {"type": typing.get_args(f.type)[0], "nargs": "+", "metavar": f.name.upper()}
        else:
            options |= {"type": f.type, "metavar": f.name.upper()}
        parser.add_argument(f"--{f.name}", **options)


def given_flags(parser, argv):
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(parser.parse_args(argv)).items()}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, Config, {name: RECIPES[name] for name in ("tiny", "base")})
    given = given_flags(parser, argv)
    if "epochs" in given:
        given = {"steps": 0} | given                # or the tiny recipe's number of steps would decide
    return Config(**RECIPES.get(given.get("model", "tiny"), {}) | given)


# ---- schedules: pure functions of the step -------------------------------------------------------------------------
def ramp(x, start, end):
    """0 until start, 1 from end on, a straight line between."""
    return float(x >= end) if end <= start else min(1.0, max(0.0, (x - start) / (end - start)))


def learning_rate(step, config, steps_per_epoch):
    """A straight line to `lr` over the warm-up, then x 0.9 per epoch (the first is epoch 0) or a cosine, not below lr_min."""
    if step < config.warmup:
        return config.lr_start + (config.lr - config.lr_start) * step / config.warmup
    if config.lr_decay == "epoch":
        return max(config.lr_min, config.lr * 0.9 ** (step // steps_per_epoch))
    done = ramp(step, config.warmup, config.steps)
    return config.lr_min + (config.lr - config.lr_min) * (1 + math.cos(math.pi * done)) / 2


def alpha_at(step, config):
    """Share of the soft targets: the paper lets it rise over the first two of its epochs."""
    return config.alpha * ramp(step / config.steps, *config.alpha_ramp)


def momentum_at(step, config):
    return config.momentum if step >= config.momentum_from * config.steps else 0.0


def queue_length_at(step, config):
    """Entries of the queue that ITC uses: the paper's queue is full from the start, with random entries as negatives; one
    that is used later counts only the features written so far."""
    if config.queue_from == 0:
        return config.queue_size
    pairs_seen = step * config.accumulate * config.batch_size * rank_and_world()[1]
    return min(config.queue_size, pairs_seen) if step >= config.queue_from * config.steps else 0


def hardness_at(step, config):
    """How strongly similarity decides which negatives ITM sees."""
    return config.hardness * ramp(step / config.steps, *config.hard_ramp)


def itm_at(step, config):
    return step >= config.itm_from * config.steps and step % config.itm_every == 0


# ---- building ------------------------------------------------------------------------------------------------------
def build_model(config, faces):
    """FLIP as --model says, from random weights, CLIP's or BERT's; without BERT, with a vocabulary from captions of `faces`."""
    torch.manual_seed(config.seed)
    vit, bert, embed_dim = MODELS[config.model]
    tokenizer = Tokenizer.load(config.bert) if config.bert else Tokenizer.train(sample_captions(faces))
    bert = dataclasses.replace(bert, vocab_size=tokenizer.vocab_size)
    model = FLIP(FLIPConfig(vit, bert, embed_dim, config.queue_size, config.momentum, config.cosine_weight), tokenizer)
    if config.small_init:
        initialise_small(model)
    if config.clip:
        load_clip(model.student.image, config.clip)
    if config.bert:
        load_bert(model.student.text, config.bert)
    model.update_momentum(0)        # the momentum encoder starts as a copy of the student
    return model


@torch.no_grad()
def initialise_small(model):
    """Xavier for all linear layers; in the text encoder's self-attention, values and outputs larger, so that what the
    caption says reaches [CLS] through a post-norm encoder that was never trained; the image encoder's positions as large
    as what the patches bring, so that it can tell an eyebrow from a moustache."""
    nn.init.normal_(model.student.image.positions, std=0.3)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    for layer in model.student.text.layers:
        for linear in (layer.attention.value, layer.attention.out):
            nn.init.normal_(linear.weight, std=2 * linear.in_features ** -0.5)


def build_optimizer(model, config):
    """AdamW; every trained parameter in exactly one group: decayed matrices, the rest, and the temperature."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and name != "temperature"]
    decayed = [p for name, p in named if p.ndim > 1 or config.decay_all]
    others = [p for name, p in named if p.ndim <= 1 and not config.decay_all]
    groups = [{"params": decayed, "weight_decay": config.weight_decay, "scale": 1.0},
              {"params": others, "weight_decay": 0.0, "scale": 1.0},
              {"params": [model.temperature], "weight_decay": config.weight_decay * config.decay_all,
               "scale": config.temperature_lr}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), eps=1e-8, fused=model.temperature.is_cuda or None)


def open_data(config):
    """Faces to train on and faces to validate on."""
    size = MODELS[config.model][0].image_size
    if config.data:
        train, validation = data.open_faces(config.data, "train"), data.open_faces(config.data, "val")
        validation = validation.subset(range(min(config.validation, len(validation))))
        data.check_pictures(validation)             # a damaged one would stop every evaluation; in training, see train()
        return train, validation
    return (data.drawn_faces(config.faces, size, seed=0, folder=config.cache),
            data.drawn_faces(config.validation, size, seed=1, folder=config.cache))


def sample_captions(faces, count=3000):
    """Captions to learn a vocabulary from: two for each of the first faces, the same for everyone."""
    return [faces.caption(i, np.random.default_rng((i, k))) for i in range(min(count, len(faces))) for k in range(2)]


def autocast(config, device):
    enabled = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


# ---- evaluation ----------------------------------------------------------------------------------------------------
class Validation(NamedTuple):
    """Faces never trained on, one caption of the grammar each, or all the captions that came with them."""
    faces: data.Faces
    texts: list                     # T captions
    image_of_text: torch.Tensor     # (T,)
    references: dict                # recalls in percent of who knows every attribute, in the order of the table's columns;
                                    # {} where captions are not the grammar's

    @staticmethod
    def of(faces):
        texts, image_of_text = validation_texts(faces)
        if faces.captions is not None:
            return Validation(faces, texts, image_of_text, {})
        stated = np.stack([grammar_caption(faces, i)[1] for i in range(len(faces))])
        recalls = data.reference_recalls(stated, faces.attributes)
        references = {name: [100 * ways[way][k] for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
                      for name, ways in recalls.items()}
        return Validation(faces, texts, image_of_text, references)


def validation_texts(faces):
    """(texts, image_of_text): all captions that came with the faces, or one of the grammar each."""
    if faces.captions is None:
        return [grammar_caption(faces, i)[0] for i in range(len(faces))], torch.arange(len(faces))
    counts = torch.tensor([len(captions) for captions in faces.captions])
    return [text for captions in faces.captions for text in captions], torch.arange(len(faces)).repeat_interleave(counts)


def grammar_caption(faces, i):
    """(text, stated (40,) bool) of face i: the same at every evaluation."""
    return data.caption(faces.attributes[i], np.random.default_rng((1, i)))


@torch.no_grad()
def evaluate(model, validation, config, batch_size=100):
    """Recalls both ways by cosine alone ("itc_...") and re-ranked, and the text-to-image scores (T, I)."""
    device = model.temperature.device
    show, was_training = rank_and_world()[0] == 0, model.training
    model.eval()
    image_tokens, image_features = [], []
    with autocast(config, device):
        for start in tqdm(range(0, len(validation.faces), batch_size), "encoding faces", leave=False, disable=not show):
            pictures = [validation.faces.picture(i) for i in range(start, min(start + batch_size, len(validation.faces)))]
            pixels = torch.stack([to_tensor(picture, model.config.vit.image_size) for picture in pictures])
            tokens, features = model.encode_image(pixels.to(device))
            image_tokens.append(tokens.cpu())
            image_features.append(features)
        captions = model.tokenizer(validation.texts).to(device)
        text_features = torch.cat([model.encode_text(captions.select(part)) for part in torch.arange(len(captions)).split(500)])
    similarity = torch.cat(image_features) @ text_features.T                                        # (I, T), in float32
    result = recalls(model, torch.cat(image_tokens), captions, similarity, validation.image_of_text, config)
    model.train(was_training)
    return result


def recalls(model, image_tokens, captions, similarity, image_of_text, config):
    """The same from image tokens (I, L, D), T captions and the cosines (I, T) of their features."""
    device, show = similarity.device, rank_and_world()[0] == 0
    with autocast(config, device):
        scores = rerank(model, image_tokens, captions.to(device), similarity, config.k_test, progress=show)
    itc = retrieval_metrics(similarity, similarity.T, image_of_text.to(device))
    reranked = retrieval_metrics(*scores, image_of_text.to(device))
    return {f"itc_{name}": value for name, value in itc.items()} | reranked, scores[1].cpu()


def table(metrics, validation):
    """The final table: recalls in percent, text to image and image to text, beside chance and the references."""
    rows = {"chance": [100 * min(1, k / len(validation.faces)) for k in (1, 5, 10)] * 2} | validation.references
    for name, prefix in (("this model, ITC alone", "itc_"), ("this model, re-ranked", "")):
        rows[name] = [metrics[f"{prefix}{way}_r{k}"] for way in ("img", "txt") for k in (1, 5, 10)]
    ours = rows["this model, re-ranked"]
    for name in validation.references:
        rows[f"share of {name}"] = [100 * a / b for a, b in zip(ours, validation.references[name])]
    lines = ["| recall in % | text to image R@1 | R@5 | R@10 | image to text R@1 | R@5 | R@10 |", "|---|---|---|---|---|---|---|"]
    return "\n".join(lines + [f"| {name} | " + " | ".join(f"{value:.1f}" for value in row) + " |" for name, row in rows.items()])


def retrieval_sheet(validation, text_to_image, path, queries=6, top=5):
    """For some captions the best faces with their scores; the face that the caption was written for is framed."""
    rows = []
    for t in np.linspace(0, len(validation.texts) - 1, queries).astype(int):
        best = text_to_image[t].argsort(descending=True)[:top].tolist()
        tiles = [(validation.faces.picture(i), f"score {text_to_image[t, i]:.1f}", i == validation.image_of_text[t]) for i in best]
        rows.append((validation.texts[t], tiles))
    contact_sheet(rows).save(path)


def plot_curves(log, validation, path):
    """Losses and recalls over steps, with the references as dashed lines."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    losses, recalls = [line for line in log if "itc" in line], [line for line in log if "img_r10" in line]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for name in ("itc", "itm"):
        shown = [(line["step"], line[name]) for line in losses if line[name] is not None]
        left.plot(*zip(*shown) if shown else ([], []), label=name.upper())
    left.set(xlabel="step", title="training losses")
    for k, colour in ((1, "tab:blue"), (5, "tab:orange"), (10, "tab:green")):
        steps, shown = [line["step"] for line in recalls], [line[f"img_r{k}"] for line in recalls]
        right.plot(steps, shown, "o-", color=colour, label=f"R@{k}")
        for name, style in zip(validation.references, (":", "--")):
            right.axhline(validation.references[name][(1, 5, 10).index(k)], color=colour, linestyle=style, linewidth=0.8)
    right.set(xlabel="step", ylabel="%", ylim=(0, 100), xlim=(0, None),
              title="recall, text to image, re-ranked\n(dotted: consistency, dashed: ceiling)")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---- starting -------------------------------------------------------------------------------------------------------
def start_processes():
    """Join the other processes when started by torchrun; returns this one's device."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ and not dist.is_initialized():
        # the others wait while the first process draws or checks the data
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2))
    return torch.device("cuda" if cuda else "cpu")


def on_first_process(build):
    """Run `build` on the first process, then on the others (which find its files)."""
    rank, world = rank_and_world()
    if rank == 0:
        result = build()
    if world > 1:
        dist.barrier()
    return result if rank == 0 else build()


FREE_TO_CHANGE = ("resume", "out", "cache", "data", "validation", "workers", "log_every", "eval_every", "k_test", "cosine_weight")


def settings(config, faces):
    """What decides how a run goes: the flags, the number of processes (hence the global batch) and the data."""
    # file names without their folder, which may be moved
    names = [path.name for path in faces.pictures] if isinstance(faces.pictures, list) else faces.name
    digest = zlib.crc32(str(names).encode())
    return asdict(config) | {"processes": rank_and_world()[1], "pictures": f"{len(faces)} (digest {digest})"}


def load_training(now, saved, optimizer, path):
    """Put the optimiser where the run stopped; returns the step to go on with. Refuses other settings than `now`, by name."""
    before = saved["training"]["settings"]
    for name in now:
        if name not in FREE_TO_CHANGE and now[name] != before.get(name):
            raise ValueError(f"--resume: the run in {path} had {name} {before.get(name)}, now it is {now[name]}; use the same")
    optimizer.load_state_dict(saved["training"]["optimizer"])
    return saved["training"]["step"]


class Run(NamedTuple):
    """What the loop works on."""
    config: Config                  # with the number of steps decided
    model: FLIP
    wrapped: nn.Module              # the model itself, or DistributedDataParallel around it
    optimizer: torch.optim.Optimizer
    batches: data.Batches
    steps_per_epoch: int
    validation: Validation
    start: int                      # the first step to do


def prepare(config):
    """Data, model and optimiser, as new or as the checkpoint in --out has them."""
    device, (rank, world) = start_processes(), rank_and_world()
    path = Path(config.out) / "flip.pt"
    if path.exists() and not config.resume:
        raise ValueError(f"{path} is there already; continue that run with --resume, or choose another --out")
    saved = read_checkpoint(path) if config.resume else None
    if saved and "training" not in saved:
        raise ValueError(f"{path} holds a model but no training state, so there is nothing to resume")
    faces, validation = on_first_process(lambda: open_data(config))
    model = (FLIP.from_pretrained(path) if saved else build_model(config, faces)).to(device).train()
    batches = data.Batches(faces, model.tokenizer, model.config.vit.image_size, config.batch_size, config.seed, config.augment,
                           rank, world, config.workers)
    steps_per_epoch = batches.steps_per_epoch // config.accumulate
    if steps_per_epoch == 0:
        raise ValueError(f"an epoch has {batches.steps_per_epoch} batches, fewer than --accumulate {config.accumulate}")
    config = dataclasses.replace(config, steps=config.steps or config.epochs * steps_per_epoch)
    optimizer = build_optimizer(model, config)
    try:
        start = load_training(settings(config, faces), saved, optimizer, path) if saved else 0
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: its training state is damaged, or of another version ({error})") from error
    wrapped = model if world == 1 else DistributedDataParallel(
        model, broadcast_buffers=False, find_unused_parameters=config.itm_from > 0 or config.itm_every > 1)
    return Run(config, model, wrapped, optimizer, batches, steps_per_epoch, Validation.of(validation), start)


def save(run, step):
    """Write the checkpoint, from the first process."""
    if rank_and_world()[0] == 0:
        state = {"settings": settings(run.config, run.batches.faces), "step": step, "optimizer": run.optimizer.state_dict()}
        write_whole(run.model.checkpoint() | {"training": state}, Path(run.config.out) / "flip.pt")


# ---- the step and the loop -------------------------------------------------------------------------------------------
def seed_of(*numbers):
    """One seed that depends on all the numbers and on how many they are (alone, SeedSequence ignores a last 0)."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1)[0])


def train_step(run, micro_batches, step):
    """One step on `accumulate` micro-batches; everything that changes state is here. Returns (ITC, ITM) as one tensor (2,);
    ITM is 0 in steps that do not train it."""
    config, model, rank = run.config, run.model, rank_and_world()[0]
    device = model.temperature.device
    torch.manual_seed(seed_of(config.seed, step, rank))                             # dropout
    generator = torch.Generator().manual_seed(seed_of(config.seed, step))           # negatives: the same on every process
    momentum = momentum_at(step, config)
    model.update_momentum(momentum)
    with_itm, losses = itm_at(step, config), torch.zeros(2, device=device)
    for number, batch in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)
        with contextlib.nullcontext() if last or run.wrapped is model else run.wrapped.no_sync(), autocast(config, device):
            batch = batch.to(device)
            out = run.wrapped(batch.images, batch.captions, batch.identity, alpha=alpha_at(step, config),
                          queue_length=queue_length_at(step, config), hardness=hardness_at(step, config),
                          with_momentum=momentum > 0, with_itm=with_itm, generator=generator)
            ((out.itc + out.itm) / len(micro_batches)).backward()
        model.enqueue(out.image_keys, out.text_keys, out.identity)
        losses += torch.stack([out.itc, out.itm]).detach() / len(micro_batches)
    if config.clip_grad:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(step, config, run.steps_per_epoch) * group["scale"]
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    model.clamp_temperature()
    return losses


def train(config):
    """The whole run; returns the trained model and its metrics."""
    run = prepare(config)
    config, model, (rank, world) = run.config, run.model, rank_and_world()
    log = Log(Path(config.out) / "log.jsonl", config, run.start, writes=rank == 0)
    stream = run.batches.from_step(run.start * config.accumulate)
    metrics, recent, begin = None, [], time.time()
    bar = tqdm(range(run.start, config.steps), "training", initial=run.start, total=config.steps, disable=rank > 0)
    with stop_on_interrupt() if world == 1 else contextlib.nullcontext([]) as stop:
        for step in bar:
            micro_batches = next_batches(run, stream, step)
            recent.append(train_step(run, micro_batches, step))
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                line = summarise(recent, range(done - len(recent), done), run)
                log.write(step=done, **line, seconds=(time.time() - begin) / len(recent))
                bar.set_postfix({name: f"{line[name]:.3f}" for name in ("itc", "itm") if line[name] is not None})
                recent, begin = [], time.time()
            if done % config.eval_every == 0 or done == config.steps or stop:
                save(run, done)
                if stop:
                    raise SystemExit(f"stopped after step {done}; continue with --resume")
                paused = time.time()
                metrics = evaluate_and_draw(run, done, log)
                begin += time.time() - paused
    if metrics is None:                                     # resumed after the last step
        metrics = evaluate_and_draw(run, config.steps, log)
    if rank == 0:
        print(table(metrics, run.validation))
    return model, metrics


def next_batches(run, stream, step):
    """The micro-batches of a step. A damaged picture costs nothing that was learned: all processes hear of it, the first
    one saves, and each ends with the sentence that says what is wrong."""
    problem, micro_batches = None, []
    try:
        micro_batches = list(itertools.islice(stream, run.config.accumulate))
    except (ValueError, RuntimeError) as error:             # RuntimeError: a process that reads pictures was killed
        problem = error
    failed = torch.tensor(float(problem is not None), device=run.model.temperature.device)
    if dist.is_initialized():
        dist.all_reduce(failed)
    if failed > 0:
        if step > run.start:
            save(run, step)
        raise ValueError(f"{problem or 'another process could not read its batch'} ({step} steps are saved: --resume)")
    return micro_batches


def evaluate_and_draw(run, step, log):
    """Recalls on the validation faces, into the log and the two pictures."""
    metrics, text_to_image = evaluate(run.model, run.validation, run.config)
    log.write(step=step, **metrics)
    if rank_and_world()[0] == 0:
        plot_curves(log.lines, run.validation, Path(run.config.out) / "curves.png")
        retrieval_sheet(run.validation, text_to_image, Path(run.config.out) / "retrieval.png")
    return metrics


def summarise(losses, steps, run):
    """Mean losses of the recent steps over all processes; ITM is None where no step trained it."""
    total = torch.stack(losses).sum(0)                                              # (2,)
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    (itc, itm), matched = total.tolist(), sum(itm_at(step, run.config) for step in steps)
    return {"itc": itc / len(losses), "itm": itm / matched if matched else None,
            "temperature": run.model.temperature.item(), "lr": learning_rate(steps[-1], run.config, run.steps_per_epoch)}


class Log:
    """log.jsonl: the configuration, then a line every few steps. Resuming drops the lines after the checkpoint."""

    def __init__(self, path, config, start, writes):
        self.path, self.writes = path, writes
        before = read_log(path) if start and path.exists() else []
        self.lines = [line for line in before if line.get("step", 0) <= start] or [{"config": asdict(config)}]
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    def write(self, **line):
        self.lines.append(line)
        if self.writes:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")


def read_log(path):
    """The lines of a log; a last one that was cut off while it was written is dropped."""
    written, lines = path.read_text().splitlines(), []
    for number, line in enumerate(written, start=1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            if number < len(written):
                raise ValueError(f"{path} line {number} is not a json object; repair or delete the log") from None
    return lines


@contextlib.contextmanager
def stop_on_interrupt():
    """A list that Ctrl-C or a polite kill puts something into, so that the loop can finish its step and save; a second one
    stops at once. Afterwards both do what they did before."""
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


if __name__ == "__main__":
    try:
        train(parse_arguments())
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")
    except KeyboardInterrupt:
        raise SystemExit("interrupted")
