"""A training run: initial weights, plan, state, saving, resuming and log. train.py has the loop.

A run starts from random weights, or those of CLIP and BERT (`new_model`), from the weights of
another FLIP (`model_of_init`), or from its own checkpoint (`starting_model` loads the model, and
`restore` the rest).

A checkpoint contains what `FLIP.checkpoint` returns (weights, momentum encoder, queue, vocabulary)
and, under "training", the states of the optimisers, the step, the configuration, the log, and the
losses that are not in the log yet. It contains no state of random numbers and no position in the
data: both are pure functions of (seed, step).
"""
import contextlib
import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from common.distributed import (
    all_gather_objects,
    choose_precision,
    rank_and_world_size,
    stop_signals,
)
from common.seeds import derive_seed, random_stream
from common.words import known_and_unknown_words
from config import MODELS, Config
from data import FaceDataset, Faces, load_toy_faces, open_faces, readable
from evaluation import EvaluationSet
from flip import FLIP, FLIPConfig
from pretrained import load_bert, load_clip, read_checkpoint, write_checkpoint
from tokenizer import Tokenizer


# ---- starting ------------------------------------------------------------------------------------
def starting_model(config: Config) -> FLIP:
    """The model that a run starts from: new, that of --init, or that of the checkpoint in --out.
    Raises ValueError if --out has a checkpoint that --resume does not ask for."""
    path = Path(config.out) / "flip.pt"
    if config.resume:
        return FLIP.from_pretrained(path)
    if path.exists():
        raise ValueError(f"{path} already exists; use --resume, or choose another --out")
    if config.init:
        model = model_of_init(config)
    else:
        model = new_model(config)
    model.update_momentum(0)        # the momentum encoder starts as a copy of the student
    return model


def new_model(config: Config) -> FLIP:
    """A model with random weights or, if given, those of --clip and --bert. Without --bert, the
    vocabulary is built from captions of the training faces."""
    vit, bert, embed_dim = MODELS[config.model]
    vit = replace(vit, image_size=config.image_size or vit.image_size)
    if config.bert:
        tokenizer = Tokenizer.load(config.bert)
    else:
        tokenizer = Tokenizer.train(sample_captions(training_faces(config, vit.image_size)))
    bert = replace(bert, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(derive_seed("initial weights", config.seed))
    sizes = FLIPConfig(vit, bert, embed_dim, config.queue_size, config.rerank_by_pmi)
    model = FLIP(sizes, tokenizer)
    if config.clip:
        load_clip(model.student.image, config.clip)
    if config.bert:
        load_bert(model.student.text, config.bert)
    return model


def model_of_init(config: Config) -> FLIP:
    """A model with the learned weights of --init and a new queue."""
    model = FLIP.from_pretrained(config.init, vocabulary=config.vocabulary,
                                 image_size=config.image_size)
    model.require_tokenizer()
    found = model.config.vit.width
    width = MODELS[config.model][0].width
    if found != width:
        raise ValueError(f"--init {config.init}: its image encoder has width {found}, but --model "
                         f"{config.model} has {width}; choose the --model of that width")

    by_pmi = config.rerank_by_pmi or model.config.rerank_by_pmi
    torch.manual_seed(derive_seed("initial queue", config.seed))
    model.config = replace(model.config, queue_size=config.queue_size, rerank_by_pmi=by_pmi)
    model.init_queue()
    return model


# ---- data ----------------------------------------------------------------------------------------
def training_faces(config: Config, size: int) -> Faces:
    """The faces to train on, drawn at size x size pixels or read from --data."""
    if not config.data:
        return load_toy_faces(config.faces, size, seed=0, folder=config.cache)
    faces = open_faces(config.data, "train", config.cache, config.columns)
    if not faces.has_text:
        raise ValueError(f"{faces.name}: expected captions, or attributes to write them from")
    return faces


def validation_faces(config: Config, size: int) -> Faces:
    """The faces to evaluate on, at most --validation of them. Unreadable images of --data are left
    out."""
    if not config.data:
        return load_toy_faces(config.validation, size, seed=1, folder=config.cache)
    faces = open_faces(config.data, "val", config.cache, config.columns)
    return readable(faces.subset(range(min(config.validation, len(faces)))), size)


def sample_captions(faces: Faces, count: int = 3000) -> list[str]:
    """Two captions of each of the first `count` faces, the same in every call."""
    texts = []
    for i in range(min(count, len(faces))):
        for k in range(2):
            rng = random_stream("captions for the vocabulary", i, k)
            texts.append(faces.caption(i, rng))
    return texts


# ---- processes and compilation -------------------------------------------------------------------
def data_parallel(model: FLIP, config: Config) -> nn.Module:
    """The model itself or, if there are several processes, a DistributedDataParallel around it."""
    if config.processes == 1:
        return model
    # phase 1 leaves cross-attention and matching head without gradients
    has_phase_1 = config.complete_from > 0
    return DistributedDataParallel(model, broadcast_buffers=False,
                                   find_unused_parameters=has_phase_1)


def compile_encoders(model: FLIP):
    """Compile the blocks of all four encoders in place. All blocks of an encoder share their code,
    so that each kind of call is compiled once."""
    for encoders in (model.student, model.momentum_encoder):
        for block in encoders.image.blocks:
            block.compile()
        for layer in encoders.text.layers:
            layer.compile(dynamic=True)         # the number of tokens differs between batches


# ---- the plan ------------------------------------------------------------------------------------
def plan_run(config: Config, model: FLIP, faces: Faces) -> tuple[FaceDataset, Config]:
    """The data set, and the configuration completed by the run's batch size, steps, precision and
    number of processes."""
    rank, world_size = rank_and_world_size()
    batch_size = config.batch_size
    if config.fit_batch:            # to at least four steps per epoch
        batch_size = min(batch_size, max(2, len(faces) // (4 * world_size)))
    dataset = FaceDataset(faces, model.tokenizer, model.config.vit.image_size, batch_size,
                          config.seed, config.augment, rank, world_size, config.workers)
    steps = config.steps or config.epochs * dataset.batches_per_epoch
    if config.max_epochs:
        steps = min(steps, config.max_epochs * dataset.batches_per_epoch)
    precision = choose_precision(config.precision, model.device)
    config = replace(config, batch_size=batch_size, steps=steps, precision=precision,
                     processes=world_size)
    return dataset, config


# ---- the run -------------------------------------------------------------------------------------
@dataclass
class Run:
    """A training run. During training, only the fields from `steps_done` on are assigned."""
    config: Config                  # as `plan_run` has completed it
    model: FLIP
    parallel_model: nn.Module       # see `data_parallel`
    optimizers: list[torch.optim.Optimizer]
    dataset: FaceDataset
    validation: EvaluationSet
    log: "Log"
    steps_done: int = 0
    unlogged_losses: list = field(default_factory=list)     # one tensor (2,) per step
    updating: bool = False          # True while an update is half applied
    signals: list = field(default_factory=list)             # received so far, see `stop_signals`
    last_save: float = field(default_factory=time.time)

    @property
    def is_main(self):
        """Whether this is the process that prints and writes files."""
        return rank_and_world_size()[0] == 0

    def must_stop(self):
        """Whether a signal asks the run to stop. Several processes agree on this every `log_every`
        steps, so that all stop after the same one."""
        if self.config.processes > 1 and self.steps_done % self.config.log_every:
            return False
        return any(all_gather_objects(bool(self.signals)))

    def validation_is_due(self) -> bool:
        """Whether to validate now: every `eval_every` steps, after the last step and, with --init,
        before the first one; but not if the log has the metrics already."""
        step = self.steps_done
        if step == 0:
            is_due = bool(self.config.init)
        else:
            is_due = step % self.config.eval_every == 0 or step == self.config.steps
        return is_due and step not in [line["step"] for line in self.log.validations()]

    def save_is_due(self) -> bool:
        """Whether the last save was more than `save_every` minutes ago."""
        return time.time() - self.last_save > 60 * self.config.save_every


def begin(run: Run):
    """Begin the log of a new run, and print its plan."""
    run.log.restart([{"config": asdict(run.config)}])
    if run.is_main:
        print_plan(run)


def print_plan(run: Run):
    """Print the length of the run, and a warning about unknown words."""
    config = run.config
    faces = run.dataset.faces
    validation = run.validation.faces
    pairs = config.batch_size * config.processes
    epochs = config.steps * pairs / len(faces)
    print(f"{faces.name}: {len(faces):,} faces; {validation.name}: {len(validation):,} faces")
    print(f"{config.steps:,} steps of {pairs} pairs are {epochs:.1f} epochs, in {config.precision}")
    if config.init:         # otherwise the vocabulary is built from these captions, or is BERT's
        unknown = set()
        for text in sample_captions(faces, 500):
            unknown.update(known_and_unknown_words(text, run.model.tokenizer)[1])
        if unknown:
            print(f"{len(unknown)} words of the captions are not in the vocabulary: "
                  f"{min(unknown)}, ...")


# ---- saving and resuming -------------------------------------------------------------------------
@contextlib.contextmanager
def resumable(run: Run):
    """While the block trains the run, keep it resumable: save a new run before the first step,
    collect signals in `run.signals`, and save the run if the block fails between two updates."""
    with stop_signals() as run.signals:
        if run.steps_done == 0:
            save(run)           # so that --resume finds the configuration
        try:
            yield
        except Exception as error:
            if not run.updating:
                save(run)
                note = f"saved after step {run.steps_done}"
                if not isinstance(error, ValueError):       # a ValueError would only recur
                    note += "; continue with --resume"
                if run.is_main:
                    error.add_note(note)
            raise


def save(run: Run):
    """Save the run, on rank 0. Raises ValueError, and keeps the previous checkpoint, if weights are
    NaN or infinite."""
    if not all(p.isfinite().all() for p in run.model.parameters()):
        raise ValueError(f"after step {run.steps_done}: some weights are NaN or infinite: training "
                         "has diverged and is not saved; start a new run with a smaller --lr")
    run.last_save = time.time()
    if run.is_main:
        checkpoint = run.model.checkpoint()
        checkpoint["training"] = {
            "config": asdict(run.config),
            "digests": digests(run),
            "step": run.steps_done,
            "log": run.log.lines,
            "unlogged_losses": run.unlogged_losses,
            "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        }
        write_checkpoint(checkpoint, Path(run.config.out) / "flip.pt")


def digests(run: Run) -> list[str]:
    """What must be unchanged when a run is resumed: its training and validation faces."""
    return [run.dataset.faces.digest, run.validation.faces.digest]


def restore(run: Run):
    """Restore the state of a resumed run, except the model, from the checkpoint in --out. Raises
    ValueError if it had other faces or another number of processes."""
    config = run.config
    path = Path(config.out) / "flip.pt"
    saved = read_checkpoint(path)["training"]
    processes = saved["config"]["processes"]
    if processes != config.processes:
        raise ValueError(f"--resume: the run in {path} had {processes} processes, found "
                         f"{config.processes}; use as many")
    if saved["digests"] != digests(run):
        name = config.data or run.dataset.faces.name
        raise ValueError(f"--resume: the run in {path} had other faces than {name}: their images, "
                         "captions or annotations differ; use the same, in any folder")
    for optimizer, state in zip(run.optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    run.log.restart(saved["log"])
    run.steps_done = saved["step"]
    run.unlogged_losses = [losses.to(run.model.device) for losses in saved["unlogged_losses"]]


# ---- the log -------------------------------------------------------------------------------------
class Log:
    """log.jsonl: the configuration, then a line every few steps. The file is locked until it is
    closed, so that no two runs use one folder. Raises ValueError if another run has locked it."""

    def __init__(self, path: Path, writes: bool = True):
        self.lines = []
        self.file = None
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a")
            try:
                import fcntl
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{path} is in use by another run; choose another --out") from None
            except (OSError, ImportError):
                pass                        # a network disk without locks; Windows

    def restart(self, lines: list[dict]):
        """Replace all lines. A resumed run does this with the copy in its checkpoint."""
        self.lines = []
        if self.file:
            self.file.truncate(0)
        for line in lines:
            self.write(**line)

    def write(self, **line):
        self.lines.append(line)
        if self.file:
            print(json.dumps(line), file=self.file, flush=True)

    def validations(self) -> list[dict]:
        """The lines with the metrics of a validation."""
        return [line for line in self.lines if "r_mean" in line]

    def close(self):
        if self.file:
            self.file.close()
