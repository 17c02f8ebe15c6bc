"""Pre-train FLIP (arXiv 2407.08515, section 4): schedules, one step, the loop, what a run starts from.

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
uninterrupted one does. A step uses these random numbers, seeded by their name here and

    order                               (seed, epoch)           BatchLoader.batch_indices
    caption and augmentation            (seed, epoch, index)    BatchLoader.__getitem__
    dropout                             (seed, step, rank)      compute_gradients
    negatives, sampled on rank 0        (seed, step)            compute_gradients
"""
import contextlib
import itertools
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.distributed import (
    all_gather_objects,
    autocast,
    choose_precision,
    init_distributed,
    rank_and_world_size,
    rank_zero_first,
    stop_signals,
)
from common.pictures import plot_curves, plot_retrieval
from common.script import Log, run_script
from common.seeds import derive_seed, random_stream
from common.words import known_and_unknown_words
from config import MODELS, TINY, Config, parse_arguments
from data import Batch, BatchLoader, Faces, load_toy_faces, open_faces, readable
from evaluation import EvaluationSet, evaluate, recall_table
from flip import FLIP, FLIPConfig, StepParams
from optim import build_optimizers, load_optimizers, ramp, set_learning_rate, warmup_decay
from pretrained import load_bert, load_clip, load_weights, read_checkpoint, write_checkpoint
from tokenizer import Tokenizer


# ---- schedules: pure functions of the step -------------------------------------------------------
def learning_rate(step: int, config: Config, steps_per_epoch: int) -> float:
    """`warmup_decay` or, as in the paper, decay by 0.9 per epoch, which begins where the warm-up ends."""
    warmup = min(config.warmup, config.steps // 5)
    if config.lr_decay == "epoch" and step >= warmup:
        epochs = step // steps_per_epoch - warmup // steps_per_epoch
        return max(config.lr_min, config.lr * 0.9 ** epochs)
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
@dataclass
class TrainState:
    """A run. The loop reassigns the last three fields; model, optimisers and log change in place."""
    config: Config                  # with the number of steps set
    model: FLIP
    ddp_model: nn.Module            # DistributedDataParallel(model), or with one process the model
    optimizers: list[torch.optim.Optimizer]
    loader: BatchLoader
    steps_per_epoch: int
    validation: EvaluationSet
    log: Log
    done: int                       # steps done, more than 0 at the start of a resumed run
    recent: list[torch.Tensor]      # their losses not yet written to the log
    updating: bool = False          # in the middle of a change of the model


def compute_gradients(run: TrainState, micro_batches: list[Batch], step: int):
    """Compute the gradients of one step on `accumulate` micro-batches. Returns a tensor (3,), the mean
    (ITC, ITM) loss of all processes and the number of micro-batches that have an ITM, which is 0 for others,
    and the outputs of `FLIP.forward`."""
    config, device, (rank, world_size) = run.config, run.model.device, rank_and_world_size()
    params = schedule(step, config)
    torch.manual_seed(derive_seed("dropout", config.seed, step, rank))
    generator = torch.Generator().manual_seed(derive_seed("negatives", config.seed, step))     # of all ranks
    losses, outputs = torch.zeros(3, device=device), []
    for number, batch in enumerate(micro_batches, start=1):
        # DistributedDataParallel averages gradients in the last backward pass only
        run.ddp_model.require_backward_grad_sync = number == len(micro_batches)
        with autocast(config.precision, device):
            batch = batch.to(device)
            out = run.ddp_model(batch.images, batch.captions, batch.identity, params, generator)
            ((out.itc + out.itm) / len(micro_batches)).backward()
        outputs.append(out)
        losses[:2] += torch.stack([out.itc, out.itm]).detach() / len(micro_batches)
        losses[2] += out.has_itm
    if world_size > 1:
        dist.all_reduce(losses)
        losses /= world_size
    return losses, outputs


def update(run: TrainState, outputs, step: int):
    """Everything that a step changes: queue, weights, temperature and momentum encoder."""
    config, model = run.config, run.model
    if config.grad_clip:
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    set_learning_rate(run.optimizers, learning_rate(step, config, run.steps_per_epoch))
    for out in outputs:
        model.enqueue(out.image_keys, out.text_keys, out.identity)
    for optimizer in run.optimizers:
        with autocast(config.precision, model.device):      # for Muon's matrix products
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.clamp_temperature()
    model.update_momentum(schedule(step + 1, config).momentum)      # for the next step


def train(config: Config):
    """Run the training; returns the model and its final validation metrics."""
    device, (rank, _) = init_distributed(config.device), rank_and_world_size()
    path = Path(config.out) / "log.jsonl"           # locked until it is closed
    with contextlib.closing(Log(path, writes=rank == 0)) as log:
        run = setup(config, device, log)
        with stop_signals() as stopped:
            try:
                training_loop(run, stopped)
            except Exception as error:
                if not run.updating:
                    save(run)
                    # a ValueError would be raised again
                    advice = "" if isinstance(error, ValueError) else "; continue with --resume"
                    if rank == 0:
                        error.add_note(f"saved after step {run.done}{advice}")
                raise
    metrics = [line for line in log.lines if "r_mean" in line]
    if rank == 0:
        initial = metrics[0] if metrics[0]["step"] == 0 else None
        print(f"{recall_table(metrics[-1], run.validation, initial)}\n"
              f"{config.out}: flip.pt, log.jsonl, curves.png, retrieval.png")
    return run.model, metrics[-1]


def training_loop(run: TrainState, stopped: list):
    """Train until the last step, or until `stopped` has a signal."""
    config, log, rank = run.config, run.log, rank_and_world_size()[0]
    is_due = lambda done: done % config.eval_every == 0 or done == config.steps
    if run.done == 0:
        save(run)           # so that --resume finds the configuration
    if run.done == 0 and config.init:
        validate(run)       # for the table
    timed_from, waited, begin, last_save = run.done, 0.0, time.time(), time.time()
    bar = tqdm(range(run.done, config.steps), "training", initial=run.done, total=config.steps,
               disable=rank > 0)
    with contextlib.closing(run.loader.iterate_from(run.done * config.accumulate)) as stream:
        for step in bar:
            waiting = time.time()
            micro_batches = list(itertools.islice(stream, config.accumulate))
            waited += time.time() - waiting
            losses, outputs = compute_gradients(run, micro_batches, step)
            run.updating = True
            update(run, outputs, step)
            run.recent.append(losses)
            run.updating, run.done = False, step + 1
            if run.done % config.log_every == 0 or run.done == config.steps:
                line, steps = mean_losses(run), run.done - timed_from
                line["seconds"] = (time.time() - begin) / steps                 # per step
                line["data_seconds"] = waited / steps                           # of these, waiting for data
                log.write(step=run.done, **line)
                bar.set_postfix({name: line[name] for name in ("itc", "itm", "seconds", "data_seconds")})
                run.recent, timed_from, waited, begin = [], run.done, 0.0, time.time()
            stop = any(all_gather_objects(bool(stopped)))       # all ranks stop after the same step
            if is_due(run.done):
                validate(run)
                timed_from, waited, begin = run.done, 0.0, time.time()
            if is_due(run.done) or stop or time.time() - last_save > 60 * config.save_every:
                save(run)
                last_save = time.time()
            if stop:
                raise SystemExit(f"stopped after step {run.done}; continue with --resume")


def mean_losses(run: TrainState):
    """Mean losses since the last line of the log; ITM is None if no step trained it. "itm_skipped" is the
    number of micro-batches without ITM because they show one person. Raises ValueError if the losses are not
    finite."""
    losses, steps = run.recent, range(run.done - len(run.recent), run.done)
    itc, itm, num_with_itm = torch.stack(losses).sum(0).tolist()                # of (steps, 3)
    if not math.isfinite(itc + itm):
        raise ValueError(f"the loss of steps {steps[0] + 1} to {steps[-1] + 1} is NaN or infinite")
    accumulate = run.config.accumulate
    scheduled = accumulate * sum(schedule(step, run.config).with_itm for step in steps)
    return {"itc": itc / len(losses), "itm": accumulate * itm / num_with_itm if num_with_itm else None,
            "itm_skipped": scheduled - int(num_with_itm),
            "temperature": run.model.temperature.item(),
            "lr": learning_rate(steps[-1], run.config, run.steps_per_epoch)}


def validate(run: TrainState):
    """Evaluate the model, log the metrics, draw the plots."""
    run.model.eval()
    metrics, text_to_image = evaluate(run.model, run.validation, run.config)
    run.model.train()
    run.log.write(step=run.done, **metrics)
    if rank_and_world_size()[0] == 0:
        plot_curves(run.log.lines, run.validation, Path(run.config.out) / "curves.png")
        plot_retrieval(run.validation, text_to_image, Path(run.config.out) / "retrieval.png")


# ---- saving, stopping and resuming ---------------------------------------------------------------
# A checkpoint has what `FLIP.checkpoint` returns (weights, momentum encoder, queues, vocabulary) and, under
# "training", optimiser states, step, configuration, log and the losses that it does not contain yet. It needs
# no state of random numbers and no position in the data: both are pure functions of (seed, step).
def save(run: TrainState):
    """Save the run, on rank 0. Raises ValueError, and keeps the previous checkpoint, if weights are NaN or
    infinite."""
    if not all(p.isfinite().all() for p in run.model.parameters()):
        raise ValueError(f"after step {run.done}: some weights are NaN or infinite: training has diverged "
                         "and is not saved; start a new run with a smaller --lr, or with --grad_clip")
    rank, world_size = rank_and_world_size()
    if rank == 0:
        digests = [run.loader.faces.digest, run.validation.faces.digest]
        state = {"config": asdict(run.config), "processes": world_size, "digests": digests,
                 "step": run.done, "log": run.log.lines, "recent": run.recent,
                 "optimizers": [optimizer.state_dict() for optimizer in run.optimizers]}
        write_checkpoint(run.model.checkpoint() | {"training": state}, Path(run.config.out) / "flip.pt")


# ---- what a run starts from ----------------------------------------------------------------------
def setup(config: Config, device: torch.device, log: Log) -> TrainState:
    """Data, model and optimisers: new, or from the checkpoint in --out."""
    (rank, world_size), path = rank_and_world_size(), Path(config.out) / "flip.pt"
    if path.exists() and not config.resume:         # looked up once the folder is locked
        raise ValueError(f"{path} already exists; use --resume, or choose another --out")
    saved = read_checkpoint(path) if config.resume else None
    with rank_zero_first():     # it draws or indexes the data and downloads the weights, for all
        if saved:
            model = FLIP.from_pretrained(path, saved=saved)
            faces, validation = load_data(config, model.config.vit.image_size)
        else:
            model, faces, validation = new_model(config)
    model.to(device).train()
    if config.fit_batch:
        config = replace(config, batch_size=min(config.batch_size, max(2, len(faces) // (4 * world_size))))
    loader = BatchLoader(faces, model.tokenizer, model.config.vit.image_size, config.batch_size,
                         config.seed, config.augment, rank, world_size, config.workers)
    steps_per_epoch = loader.batches_per_epoch // config.accumulate
    if steps_per_epoch == 0:
        raise ValueError(f"--accumulate {config.accumulate} needs as many batches in an epoch, found "
                         f"{loader.batches_per_epoch}; use a smaller value, or a smaller --batch_size")
    steps = config.steps or config.epochs * steps_per_epoch
    config = replace(config, steps=min(steps, config.max_epochs * steps_per_epoch or steps),
                     precision=choose_precision(config.precision, device))      # resolved, for the checkpoint
    optimizers = build_optimizers(model, config.weight_decay, config.beta2, config.temperature_lr,
                                  config.muon_lr_image, config.muon_lr_text, config.muon_momentum)
    if saved:
        saved = saved["training"]
        if saved["processes"] != world_size:
            raise ValueError(f"--resume: the run in {path} had {saved['processes']} processes, found "
                             f"{world_size}; use as many")
        if saved["digests"] != [faces.digest, validation.digest]:
            raise ValueError(f"--resume: the run in {path} had other faces than {config.data or faces.name}: "
                             "their images, captions or annotations differ; use the same, in any folder")
        load_optimizers(optimizers, saved["optimizers"], path)
        log.restart(saved["log"])
        done, recent = saved["step"], [losses.to(device) for losses in saved["recent"]]
    else:
        log.restart([{"config": asdict(config)}])       # an empty log, but for this line
        done, recent = 0, []
        if rank == 0:
            print_plan(config, faces, validation, world_size, model.tokenizer)
    ddp_model = model if world_size == 1 else DistributedDataParallel(
        model, broadcast_buffers=False, find_unused_parameters=config.itm_from > 0 or config.itm_every > 1)
    validation = EvaluationSet.from_faces(validation, faces, config.batch_size * world_size)
    return TrainState(config, model, ddp_model, optimizers, loader, steps_per_epoch, validation, log, done,
                      recent)


@torch.no_grad()
def new_model(config: Config) -> tuple[FLIP, Faces, Faces]:
    """A model to train, and its training and validation faces. Its weights are those of --init, or random but
    for those of --clip and --bert. Without --init and --bert, the vocabulary is built from captions."""
    vit, bert, embed_dim = MODELS[config.model]
    tokenizer, initial, posterior = None, None, config.posterior
    if config.init:
        initial = FLIP.from_pretrained(config.init, vocabulary=config.vocabulary)
        if initial.config.vit.width != vit.width:
            raise ValueError(f"--init {config.init}: its image encoder has width {initial.config.vit.width}, "
                             f"but --model {config.model} has {vit.width}; choose the --model of that width")
        vit, bert, embed_dim = initial.config.vit, initial.config.bert, initial.config.embed_dim
        tokenizer = initial.require_tokenizer()
        posterior = posterior or initial.config.itm_hardness is not None
    elif config.bert:
        tokenizer = Tokenizer.load(config.bert)
    vit = replace(vit, image_size=config.image_size or vit.image_size)
    faces, validation = load_data(config, vit.image_size)
    tokenizer = tokenizer or Tokenizer.train(sample_captions(faces))
    bert = replace(bert, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(derive_seed("initial weights", config.seed))
    model = init_model(FLIPConfig(vit, bert, embed_dim, config.queue_size,
                                  config.hardness if posterior else None), tokenizer)
    if initial:                     # all learned weights; queue and momentum encoder start anew
        load_weights(model.student, initial.student.state_dict(), config.init,
                     image_positions=("image.positions",))      # resized if --image_size differs
        model.matching_head.load_state_dict(initial.matching_head.state_dict())
        model.temperature.copy_(initial.temperature)
    if config.clip:
        load_clip(model.student.image, config.clip)
    if config.bert:
        load_bert(model.student.text, config.bert)
    model.update_momentum(0)        # the momentum encoder starts as a copy of the student
    return model, faces, validation


def load_data(config: Config, size: int) -> tuple[Faces, Faces]:
    """Training and validation faces, for a model with an input of size x size pixels."""
    if config.data:
        train, validation = (open_faces(config.data, split, config.cache, config.columns)
                             for split in ("train", "val"))
        if not train.has_text:
            raise ValueError(f"{train.name}: expected captions, or attributes to write them from, found none")
        return train, readable(validation.subset(range(min(config.validation, len(validation)))), size)
    return (load_toy_faces(config.faces, size, seed=0, folder=config.cache),
            load_toy_faces(config.validation, size, seed=1, folder=config.cache))


def print_plan(config: Config, faces: Faces, validation: Faces, world_size: int, tokenizer: Tokenizer):
    """Print the length of the run, and warnings about few faces or unknown words."""
    epochs = config.steps * config.accumulate * config.batch_size * world_size / len(faces)
    print(f"{faces.name}: {len(faces):,} faces; {validation.name}: {len(validation):,} faces\n"
          f"{config.steps:,} steps of {config.batch_size * config.accumulate * world_size} pairs are "
          f"{epochs:.1f} epochs, in {config.precision}")
    if epochs > 60:
        print(f"this will overfit: try --steps {round(30 * config.steps / epochs)}, or more faces")
    chance = min(100, 1000 / len(validation))
    if chance > 4:
        print(f"with {len(validation)} validation faces, R@10 is {chance:.0f} % by chance")
    texts = sample_captions(faces, 500) if config.init else []
    if unknown := {word for text in texts for word in known_and_unknown_words(text, tokenizer)[1]}:
        print(f"{len(unknown)} words of the captions are not in the vocabulary: {min(unknown)}, ...")


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
    return [faces.caption(i, random_stream("captions for the vocabulary", i, k))
            for i in range(min(count, len(faces))) for k in range(2)]


if __name__ == "__main__":
    run_script(lambda: train(parse_arguments(description=__doc__)))
