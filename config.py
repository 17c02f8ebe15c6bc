"""The flags of train.py."""
import argparse
import textwrap
from dataclasses import dataclass
from pathlib import Path

from bert import BertConfig
from common.resume import load_run
from common.script import check_flags, flag, parse_flags, renamed_flags
from readers.index import COLUMNS
from vit import ViTConfig

TINY = (ViTConfig(image_size=48, patch_size=8, width=128, depth=3, heads=4),
        BertConfig(vocab_size=1, width=128, depth=2, heads=4, positions=66, dropout=0.0), 128)
MODELS = {"tiny": TINY, "base": (ViTConfig(), BertConfig(), 256),       # with the size of the features
          "large": (ViTConfig(width=1024, depth=24, heads=16), BertConfig(), 256)}


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
    max_errors: float = flag(1.0, "percent of the faces whose record or picture may be damaged: they are "
                                "counted, and left out; more end the run, and 0 is strict", high=100,
                                was="max_lost")
    faces: int = flag(20_000, "how many faces to draw for training", low=1)
    validation: int = flag(1000, "at most how many faces to validate on", low=1)
    resume: bool = flag(False, "continue the run in --out, if it saved anything, else begin it; its flags "
                               "are those it began with, but for --data, --cache, --max_errors, --workers, "
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
    muon_lr_image: float = flag(0.0, "learning rate of Muon, as a multiple of lr, for the matrices inside the "
                                  "image encoder's blocks; 0: AdamW for them, too",
                                was="muon_image")
    muon_lr_text: float = flag(0.0, "the same for the text encoder's layers",
                                was="muon_text")
    weight_decay: float = flag(0.05, "of weight matrices and embeddings")
    beta2: float = flag(0.999, "AdamW's second beta", high=1)
    grad_clip: float = flag(0.0, "limit of the gradient's norm; 0: none",
                                was="clip_grad")
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
    hardness_ramp: tuple[float, float] = flag((0, 0), "shares of the run between which hardness rises from 0",
                                              high=1,
                                was="hard_ramp")
    augment: bool = flag(True, "flip and distort the pictures as the paper does")
    workers: int = flag(8, "processes that read pictures, for each training process")
    precision: str = flag("auto", "float32, bf16 (autocast), or auto: bf16 on CUDA",
                          choices=("auto", "float32", "bf16"))
    log_every: int = flag(50, "steps between lines of the log", low=1)
    eval_every: int = flag(5000, "steps between evaluations, each of which also saves the checkpoint", low=1)
    save_every: float = flag(30.0, "minutes after which a checkpoint is saved between evaluations, too")
    k_test: int = flag(256, "candidates per query that the matching head scores again", low=1)
    posterior: bool = flag(False, "rank them by log-odds + hardness * cosine / temperature (why: see "
                                  "FLIP.rerank_score) instead of the paper's matching logit + cosine")

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
    lr=1e-3, lr_start=1e-5, lr_min=0.0, lr_decay="linear", warmup=60, beta2=0.98, grad_clip=1.0,
    # Sentences are learned sooner than faces, and a text encoder that moves more slowly than the
    # image encoder is one that this can follow.
    muon_lr_image=4.5, muon_lr_text=1.5,
    # At the full rate the temperature falls to 0.01 before there is anything to tell apart.
    temperature_lr=0.1,
    # Hard negatives from the start would leave the matching head at its prior: even ones first.
    itm_from=0.4, itm_every=3, hardness_ramp=(0.45, 0.7), posterior=True,
    # In a short run a slow teacher lags behind most of what was learned: it slows down, and is
    # listened to, late. So the queue, too, is used late, when its entries change slowly.
    momentum=0.95, momentum_from=0.7, alpha_ramp=(0.75, 0.95), queue_size=512, queue_from=0.75)}


# ---- the command line ----------------------------------------------------------------------------
CHANGEABLE_ON_RESUME = ("resume", "out", "data", "cache", "max_errors", "workers", "log_every", "eval_every",
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
        before = renamed_flags(Config, load_run(path)["training"]["config"])
        for name, value in given.items():
            if name not in CHANGEABLE_ON_RESUME and value != before.get(name):
                raise ValueError(f"--resume: the run in {path} has --{name} {before.get(name)} and goes on "
                                 f"with it; leave --{name} {value} out, or start anew with another --out")
        return Config(**before | given)
    recipe = RECIPES.get(given.get("model", "tiny"), {})
    if "epochs" in given:
        recipe = recipe | {"steps": 0}              # or the tiny recipe's steps would decide
    if "data" in given:
        recipe = recipe | {"augment": True}
    return Config(**recipe | given)
