"""The configuration of train.py: a dataclass whose fields are the flags, with the paper's values
(FLIP paper, section 4) as defaults, and the recipe of the tiny model, with reasons."""
import argparse
import textwrap
from dataclasses import dataclass
from pathlib import Path

from bert import BertConfig
from common.script import check_flags, flag, parse_flags
from common.weights import read_checkpoint
from readers.index import COLUMNS
from vit import ViTConfig

# image encoder, text encoder (vocab_size is set later; positions >= bert.MAX_TOKENS), feature size
TINY = (ViTConfig(image_size=48, patch_size=8, width=128, depth=3, heads=4),
        BertConfig(vocab_size=1, width=128, depth=2, heads=4, positions=66, dropout=0.0), 128)
MODELS = {"tiny": TINY, "base": (ViTConfig(), BertConfig(), 256),
          "large": (ViTConfig(width=1024, depth=24, heads=16), BertConfig(), 256)}
CHANGEABLE_ON_RESUME = ("data", "cache", "outside", "device", "max_errors", "workers", "log_every",
                        "eval_every", "save_every")


@dataclass(frozen=True)
class SharedFlags:
    """Flags of both train.py and finetune.py."""
    data: str = flag("", "folder or json list of faces; default: drawn faces, cached in --cache")
    cache: str = flag("cache", "folder for drawn faces and for the index of --data")
    outside: bool = flag(False, "accept images outside --data, which its lists may name by absolute paths")
    max_errors: float = flag(1.0, "percent of records or images that may be invalid; they are skipped and "
                                  "counted, and the run stops if there are more", high=100)
    vocabulary: str = flag("", "for a checkpoint without one (the official one): file, folder or hub name")
    device: str = flag("auto", "cpu, cuda, mps (Apple; untried), or auto: CUDA if any, else the CPU")
    precision: str = flag("auto", "float32, bf16, or auto: bf16 on GPUs from A100 on, avx512_bf16, AMX",
                          choices=("auto", "float32", "bf16"))
    k_test: int = flag(256, "candidates per query to re-rank with the ITM head", low=1)


@dataclass(frozen=True)
class Config(SharedFlags):
    """The flags. The default values are the paper's. But `python train.py` trains the tiny model, for which
    `RECIPES` overrides most of them. Fractions refer to the whole run."""
    model: str = flag("tiny", "tiny (for drawn faces, trains on two CPU cores), base (the paper's ViT-B/16 "
                              "and BERT-base) or large (ViT-L/16)", choices=tuple(MODELS))
    out: str = flag("out", "folder for checkpoint, log and plots")
    columns: tuple[str, ...] = flag(COLUMNS[:2], "caption columns of FaceCaption-15M (the first two are one)",
                                    choices=COLUMNS)
    faces: int = flag(20_000, "number of faces to draw for training", low=1)
    validation: int = flag(1000, "maximum number of validation faces", low=1)
    resume: bool = flag(False, "resume the run in --out, or start it if no checkpoint exists; flags come "
                               f"from the checkpoint, except {', '.join(CHANGEABLE_ON_RESUME)}")
    seed: int = flag(0, "seed of initial weights, data order, captions, dropout and negatives")
    init: str = flag("", "initialise from this FLIP, ours or the official one: file, folder or hub name")
    image_size: int = flag(0, "side of the model's input in pixels; 0: as in --init or --model")
    clip: str = flag("", "initialise the image encoder from CLIP: file, folder or hub name")
    bert: str = flag("", "initialise the text encoder from BERT and use its vocabulary: folder or hub name")
    epochs: int = flag(15, "epochs to train, if --steps is 0", low=1)
    steps: int = flag(0, "length of the run in steps (overrides --epochs)")
    batch_size: int = flag(80, "pairs per process and micro-batch", low=1)
    accumulate: int = flag(1, "micro-batches per step, if a larger batch does not fit in memory", low=1)
    lr: float = flag(3e-5, "peak learning rate")
    lr_start: float = flag(1e-6, "learning rate at step 0")
    lr_min: float = flag(1e-6, "lowest learning rate; cosine and linear decay end there")
    lr_decay: str = flag("epoch", "after the warm-up: epoch (x 0.9 per epoch since step 0), cosine or linear",
                         choices=("epoch", "cosine", "linear"))
    warmup: int = flag(20_000, "steps from lr_start to lr, at most 20 %% of the run")
    temperature_lr: float = flag(1.0, "learning rate of the temperature, as a multiple of lr")
    muon_lr_image: float = flag(0.0, "learning rate of Muon (common/optim.py), as a multiple of lr, for the "
                                     "matrices in the image encoder's blocks; 0: AdamW")
    muon_lr_text: float = flag(0.0, "the same for the text encoder's layers")
    muon_momentum: float = flag(0.95, "Muon's momentum", high=1)
    weight_decay: float = flag(0.05, "weight decay of parameters with two or more dimensions")
    beta2: float = flag(0.999, "AdamW's second beta", high=1)
    grad_clip: float = flag(0.0, "maximum gradient norm; 0: no clipping")
    alpha: float = flag(0.4, "final weight of the soft targets", high=1)
    alpha_ramp: tuple[float, float] = flag((0.0, 2 / 15), "fractions between which alpha rises from 0 (the "
                                                         "paper: 2 of 15 epochs)", high=1)
    momentum: float = flag(0.995, "final momentum of the momentum encoder", high=1)
    momentum_from: float = flag(0.0, "before this fraction of the run it copies the student", high=1)
    queue_size: int = flag(61_440, "entries of the queue", low=1)
    queue_from: float = flag(0.0, "fraction of the run after which the queue is used", high=1)
    itm_from: float = flag(0.0, "fraction of the run after which ITM is trained; 1: never", high=1)
    itm_every: int = flag(1, "train ITM in every n-th step", low=1)
    hardness: float = flag(1.0, "final hardness of the negatives: 1 samples them by similarity, as the paper "
                                "does, 0 uniformly")
    hardness_ramp: tuple[float, float] = flag((0.0, 0.0), "fractions of the run between which hardness rises "
                                                          "from 0", high=1)
    augment: bool = flag(True, "augment the images as in the paper")
    workers: int = flag(8, "data loading processes per training process")
    log_every: int = flag(50, "steps between log lines", low=1)
    eval_every: int = flag(5000, "steps between evaluations; each also saves a checkpoint", low=1)
    save_every: float = flag(30.0, "minutes between further checkpoints")
    posterior: bool = flag(False, "re-rank by log-odds + hardness * cosine / temperature, an estimate of log("
                                  "p(text | image) / p(text)), instead of by the paper's score; always on if "
                                  "--init was trained with it")

    def __post_init__(self):
        check_flags(self)
        if self.init and (self.clip or self.bert):
            raise ValueError("--init contains all weights; omit --clip and --bert")
        if self.vocabulary and not self.init:
            raise ValueError("--vocabulary applies only to --init; otherwise --bert provides the vocabulary")


# The paper's recipe starts from CLIP and BERT. A short run from random weights needs other values:
RECIPES = {"tiny": dict(
    steps=2130, batch_size=128, workers=0, augment=False,       # --data turns augmentation on
    log_every=20, eval_every=1065, k_test=16,
    lr=1e-3, lr_start=1e-5, lr_min=0.0, lr_decay="linear", warmup=60, beta2=0.98, grad_clip=1.0,
    # captions are learned faster than images: a slower text encoder lets the image encoder keep up
    muon_lr_image=4.5, muon_lr_text=1.5, muon_momentum=0.9, weight_decay=0.1,
    # at the full rate the temperature drops before the features are of any use
    temperature_lr=0.3,
    # with hard negatives from the start, the matching head learns only the base rate: first, uniform ones
    itm_from=0.25, itm_every=8, hardness_ramp=(0.5, 0.75), posterior=True,
    # in a short run a slow momentum encoder lags far behind the student: momentum and alpha rise late,
    # and the queue is used late, when the features of its entries change slowly
    momentum=0.95, momentum_from=0.85, alpha_ramp=(0.85, 0.97), queue_size=512, queue_from=0.88)}


# ---- the command line ----------------------------------------------------------------------------
def parse_arguments(argv: list[str] | None = None, description: str | None = __doc__) -> Config:
    """The configuration of the command line; with --resume that of the checkpoint in --out, if there is
    one. Raises ValueError if a flag would change a resumed run."""
    tiny = ", ".join(f"{name} {value}" for name, value in RECIPES["tiny"].items())
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Defaults in brackets are those of base and large. The tiny model, the default, has\n"
               f"{textwrap.fill(tiny, 100)}\n(augment True with --data)")
    given = parse_flags(parser, Config, argv)
    path = Path(given.get("out", Config.out)) / "flip.pt"
    if given.get("resume") and path.exists():
        before = read_checkpoint(path)["training"]["config"]
        for name, value in given.items():
            if name not in ("resume", "out", *CHANGEABLE_ON_RESUME) and value != before[name]:
                raise ValueError(f"--resume: the run in {path} has --{name} {before[name]}, which cannot "
                                 f"change; omit --{name} {value}, or start a new run with another --out")
        return Config(**before | given)
    recipe = RECIPES.get(given.get("model", "tiny"), {})
    if "epochs" in given:
        recipe = recipe | {"steps": 0}              # --epochs overrides the recipe's steps
    if "data" in given:
        recipe = recipe | {"augment": True}
    return Config(**recipe | given)
