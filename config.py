"""The configuration of train.py and finetune.py: the paper's values (FLIP paper, sections 4 and 5)
as defaults; the tiny model's recipe, with reasons; the tasks' recipes. A field whose default is
wrapped in `flag` is also a command-line flag."""
import math
import textwrap
from dataclasses import dataclass, fields
from pathlib import Path

from bert import BertConfig
from common.script import flag, parse_flags
from pretrained import read_checkpoint
from readers.index import COLUMNS
from vit import ViTConfig

# image encoder, text encoder (the vocabulary sets vocab_size), dimension of the features. The tiny
# model has no dropout, because drawn faces get new captions in every epoch. Its 66 positions are
# enough for captions of up to 65 tokens (tokenizer.py)
TINY = (ViTConfig(image_size=48, patch_size=8, width=128, depth=3, heads=4),
        BertConfig(vocab_size=1, width=128, depth=2, heads=4, positions=66, dropout=0.0),
        128)
MODELS = {"tiny": TINY, "base": (ViTConfig(), BertConfig(), 256)}
AT_LEAST_ONE = ("faces validation epochs batch_size queue_size log_every eval_every "
                "k_test").split()
AT_MOST_ONE = "alpha momentum fractions".split()
CHANGEABLE_ON_RESUME = "data cache device workers log_every eval_every save_every".split()


@dataclass(frozen=True)
class SharedFlags:
    """Flags of both train.py and finetune.py."""
    data: str = flag("", "folder or JSON list of faces; default: drawn faces, cached in --cache")
    cache: str = flag("cache", "folder for drawn faces and for the index of --data")
    columns: tuple[str, ...] = flag(("caption", "face_caption"),
        "caption columns of FaceCaption-15M; caption and face_caption are two names of one column",
        type=str, nargs="+", choices=COLUMNS)
    vocabulary: str = flag("",
        "for a checkpoint without one (the official one): file, folder or hub name")
    device: str = flag("auto",
        "cpu, cuda, mps (Apple; untried), or auto: CUDA if available, else the CPU")
    precision: str = flag("auto",
        "auto: bf16 on GPUs from A100 on, on CPUs with AVX512-BF16 or AMX; else float32",
        choices=("auto", "float32", "bf16"))
    k_test: int = flag(256, "candidates per query to re-rank with the matching head")

    def __post_init__(self):
        """Raise ValueError unless every number is at least 0 (at least 1 for AT_LEAST_ONE) and, for
        AT_MOST_ONE, at most 1."""
        for name, value in vars(self).items():
            lowest = 1 if name in AT_LEAST_ONE else 0
            highest = 1 if name in AT_MOST_ONE else math.inf
            numbers = value if isinstance(value, tuple) else [value]
            for number in numbers:
                is_checked = isinstance(number, (int, float)) and name != "seed"
                if is_checked and not lowest <= number <= highest:
                    raise ValueError(f"--{name} {number}: expected a number from {lowest} to "
                                     f"{highest}")


# ---- train.py ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config(SharedFlags):
    """The defaults are the paper's, as far as it has a value. For the tiny model, `RECIPES`
    replaces some of them; warm-up, weight decay, momentum and alpha stay."""
    model: str = flag("tiny",
        "tiny (for drawn faces, trains on two CPU cores) or base (the paper's ViT-B/16 and "
        "BERT-base)", choices=tuple(MODELS))
    out: str = flag("out", "folder for checkpoint, log and plots")
    faces: int = flag(40_000, "number of faces to draw for training")
    validation: int = flag(1000, "maximum number of validation faces")
    resume: bool = flag(False, "resume the run in --out")
    seed: int = flag(0, "seed of initial weights, data order, captions, dropout, negatives")
    init: str = flag("",
        "start from a trained FLIP, ours or the official: file, folder or hub name")
    image_size: int = flag(0, "side of the model's input in pixels; 0: as in --init or --model")
    clip: str = flag("", "start the image encoder from CLIP: file, folder or hub name")
    bert: str = flag("", "start the text encoder from BERT, with its vocabulary: likewise")
    epochs: int = flag(15, "epochs to train, if --steps is 0")
    steps: int = flag(0, "length of the run in steps (overrides --epochs)")
    batch_size: int = flag(80, "pairs per process")
    compile: bool = flag(False,
        "compile the encoders with torch.compile, which takes minutes; for GPUs (on a CPU, it "
        "needs a C++ compiler and hardly pays)")
    lr: float = flag(3e-5, "peak learning rate")
    warmup: int = flag(20_000, "steps to the peak learning rate, at most 20 % of the run")
    weight_decay: float = flag(0.05, "weight decay of parameters with two or more dimensions")
    alpha: float = flag(0.4, "final weight of the soft targets")
    momentum: float = flag(0.995, "momentum of the momentum encoder")
    queue_size: int = flag(61_440, "entries of the queue")
    augment: bool = flag(True, "augment the images as in the paper")
    workers: int = flag(8, "data loading processes per training process")
    log_every: int = flag(50, "steps between log lines")
    eval_every: int = flag(5000, "steps between evaluations; each also saves a checkpoint")
    save_every: float = flag(10.0, "minutes between further checkpoints")

    # these fields are not flags: the run sets the number of processes; the others are constants of
    # the paper, some of which the tiny recipe replaces
    processes: int = 1
    # upper limit on the run's length, in epochs; 0: none
    max_epochs: int = 0
    # limit a batch to a quarter of the faces, so that an epoch has at least four steps
    fit_batch: bool = False
    # learning rate at step 0, and at the end of its decay
    lr_start: float = 1e-6
    lr_min: float = 1e-6
    # how the learning rate decays after the warm-up: "epoch" (x 0.9 per epoch) or "linear"
    lr_decay: str = "epoch"
    # Muon's learning rate for the matrices, as a multiple of lr, see `optim.build_optimizers`; 0:
    # AdamW updates them
    muon_multiple: float = 0.0
    # fraction of the run at which phase 2 begins, complete FLIP, see `train.schedule`
    complete_from: float = 0.0
    # first part of phase 2, as a fraction of it, in which alpha rises from 0 to its final value
    alpha_warmup: float = 2 / 15
    # re-rank by pointwise mutual information, see `FLIP.rerank_score`, instead of by the paper's
    # score; always, if the model of --init was trained with it
    rerank_by_pmi: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.init and (self.clip or self.bert):
            raise ValueError("--init has all weights; omit --clip and --bert")
        if self.vocabulary and not self.init:
            raise ValueError("--vocabulary is for --init; otherwise --bert provides it")


# The paper's recipe starts from CLIP and BERT. A short run from random weights needs other values
RECIPES = {"base": {}, "tiny": dict(
    # the length of the run, and what follows from it
    steps=1920, max_epochs=30, batch_size=128, fit_batch=True, workers=0, log_every=16,
    eval_every=960, k_test=16,
    # in six epochs, with new captions in each, there is little to overfit; --data turns
    # augmentation on
    augment=False,
    # larger rates, as there are no pretrained weights to preserve, that decay to nearly zero
    lr=1e-3, lr_decay="linear",
    # Muon moves in all directions at the same rate, so that rare attributes are not learned last
    muon_multiple=3.0,
    # ITC within the batch to 90 %: hard negatives teach ITM only when the features are good, and a
    # momentum encoder lags far behind the student until the learning rate is low
    complete_from=0.9,
    # 32 batches
    queue_size=4096,
    # the paper's score relies on the matching head, which is hardly trained: for the last 192
    # steps, at no more than an eighth of the peak learning rate
    rerank_by_pmi=True)}


def parse_arguments(argv: list[str] | None = None, description: str | None = __doc__) -> Config:
    """The configuration of the command line; with --resume, that of the checkpoint in --out."""
    tiny = ", ".join(f"{name} {value}" for name, value in RECIPES["tiny"].items())
    epilog = ("Defaults in brackets are those of base. The tiny model, the default, has\n"
              f"{textwrap.fill(tiny, 100)}\n(augment True with --data). With --resume, flags come "
              f"from the checkpoint, except\n{', '.join(CHANGEABLE_ON_RESUME)}")
    given = parse_flags(Config, argv, description, epilog)      # only the flags that argv contains
    if given.get("resume"):
        return resumed_config(Path(given.get("out", Config.out)), given)
    recipe = dict(RECIPES[given.get("model", Config.model)])
    if "epochs" in given or "steps" in given:       # instead of the recipe's length
        recipe["steps"] = 0
        recipe["max_epochs"] = 0
    if "batch_size" in given:
        recipe["fit_batch"] = False
    if given.get("data"):
        recipe["augment"] = True
    return Config(**recipe | given)


def resumed_config(folder: Path, given: dict) -> Config:
    """The configuration of the checkpoint in a folder, with those of the given flags that may
    change. Raises ValueError if there is none, if it is not that of a run, or if a flag would
    change the run."""
    path = folder / "flip.pt"
    if not path.exists():
        raise ValueError(f"--resume: {path} does not exist; to start a run, omit --resume")
    training = read_checkpoint(path).get("training")
    if not training:
        raise ValueError(f"--resume: {path} is a model without the state of a run; use it with "
                         "--init")
    saved = training["config"]
    differing = saved.keys() ^ {field.name for field in fields(Config)}
    if differing:
        raise ValueError(f"--resume: {path} is of another version of this program, which differs "
                         f"in {', '.join(sorted(differing))}")
    changed = {"resume": True, "out": str(folder)}      # the folder may have been moved
    for name, value in given.items():
        if name in CHANGEABLE_ON_RESUME:
            changed[name] = value
        elif name not in changed and value not in (saved[name], "auto"):    # "auto": as saved
            raise ValueError(f"--resume: the run in {path} has --{name} {saved[name]}, which "
                             f"cannot change; omit --{name} {value}, or start another run")
    return Config(**saved | changed)


# ---- finetune.py ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class TaskConfig(SharedFlags):
    """The defaults are the paper's for retrieval."""
    task: str = ""
    checkpoint: str = flag("out/flip.pt",
        "from train.py, or the official one: file, folder or hub name")
    random: bool = flag(True, "also train on frozen encoders with random weights")
    out: str = flag("out", "folder for the results, in a subfolder named after the task")
    faces: int = flag(4000, "number of faces to draw for training")
    validation: int = flag(1000, "number of validation faces to draw; with --data the maximum")
    test: int = flag(5000, "number of test faces to draw; with --data the maximum (0: all)")
    fractions: tuple[float, ...] = flag((1.0,),
        "parts of the training split to train on, each from the same initial weights",
        type=float, nargs="+")
    seed: int = flag(0, "seed of random encoders, new weights, data and negatives")
    epochs: int = flag(50, "epochs; a smaller fraction has the same number of steps")
    batch_size: int = flag(64, "samples per step")
    lr: float = flag(3e-5, "peak learning rate, after 10 % of the steps; cosine decay")
    workers: int = flag(8, "data loading processes of retrieval")
    predict: tuple[str, ...] = flag((),
        "images: instead of training, print their attributes, predicted by the head in --out",
        type=str, nargs="+")

    # these fields are not flags; recipes set them
    # train the matching head every n-th step
    itm_every: int = 1
    # number of stages in which a sketch is drawn
    sketch_stages: int = 70


# values for each task, and what differs for the drawn faces
TASK_RECIPES = {
    "retrieval": {},
    # the official learning rates, 0.3 for CelebA and 0.003 for LFWA, are for SGD
    "attributes": dict(epochs=100, batch_size=256, lr=1e-3, fractions=(0.01, 0.1, 1.0), test=0),
    "sketch": dict(epochs=100, lr=1e-4, test=0),
}
DRAWN_RECIPES = {
    "retrieval": dict(faces=2000, validation=200, test=1000, epochs=30, batch_size=250, lr=3e-3,
                      itm_every=5, k_test=16, workers=0),
    "attributes": dict(validation=500, test=1000, epochs=60, lr=3e-3),
    "sketch": dict(faces=800, validation=100, test=200, epochs=600, batch_size=128, lr=1e-2),
}


def parse_task_arguments(argv: list[str] | None = None, description: str | None = None):
    """The `TaskConfig` of the command line."""
    epilog = ("Defaults in brackets are for retrieval.\n"
              f"Other tasks: {TASK_RECIPES}\nDrawn faces: {DRAWN_RECIPES}")
    given = parse_flags(TaskConfig, argv, description, epilog, task=tuple(TASK_RECIPES))
    values = TASK_RECIPES[given["task"]]
    if not given.get("data"):
        values = values | DRAWN_RECIPES[given["task"]]
    return TaskConfig(**values | given)
