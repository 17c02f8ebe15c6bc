"""Pre-train FLIP (arXiv 2407.08515, section 4): schedules, one step, the loop, validation.

    python train.py                         drawn faces, the tiny model, minutes on two CPU cores
    python train.py --data DIR              your own faces (layouts: readers/layouts.py)
    python train.py --data DIR --init FILE  the same, from a trained FLIP, ours or the official
    python train.py --resume                resume the run in --out
    torchrun --nproc_per_node 8 train.py --model base --data DIR \\
        --clip openai/clip-vit-base-patch16 --bert bert-base-uncased
                                            the paper's recipe: 8 processes with 80 pairs each

Flags, the paper's values and the tiny model's recipe are in config.py; what a run starts from, and
how it is saved and resumed, is in runs.py. Everything that changes during a run (learning rate,
momentum, hardness of the negatives, ...) is a schedule, a pure function of the step. So are the
data and all random numbers; hence a resumed run computes exactly what an uninterrupted one does.
The random numbers of a step are seeded by their purpose and these numbers:

    order of the faces                  (seed, epoch)           FaceDataset.batch_indices
    caption and augmentation            (seed, epoch, index)    FaceDataset.__getitem__
    dropout                             (seed, step, rank)      compute_gradients
    negatives, sampled on rank 0        (seed, step)            compute_gradients
"""
import contextlib
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

from common.distributed import autocast, init_distributed, rank_and_world_size
from common.pictures import plot_curves, plot_retrieval
from common.script import run_script
from common.seeds import derive_seed
from config import Config, parse_arguments
from data import Batch
from evaluation import evaluate, recall_table
from flip import StepParams
from optim import ramp, set_learning_rate, warmup_decay
from runs import Run, StepTimer, open_run, save


# ---- schedules: pure functions of the step -------------------------------------------------------
def learning_rate(step: int, config: Config, steps_per_epoch: int) -> float:
    """`warmup_decay` or, as in the paper, decay by 0.9 per epoch, which begins where the warm-up
    ends."""
    warmup = min(config.warmup, config.steps // 5)
    if config.lr_decay == "epoch" and step >= warmup:
        epochs = step // steps_per_epoch - warmup // steps_per_epoch
        return max(config.lr_min, config.lr * 0.9 ** epochs)
    return warmup_decay(step, config.steps, warmup, config.lr, config.lr_start, config.lr_min,
                        config.lr_decay)


def schedule(step: int, config: Config) -> StepParams:
    """Everything else that changes during a run."""
    fraction = step / config.steps
    alpha = config.alpha * ramp(fraction, *config.alpha_ramp)
    hardness = config.hardness * ramp(fraction, *config.hardness_ramp)
    momentum = config.momentum if step >= config.momentum_from * config.steps else 0.0
    with_itm = step >= config.itm_from * config.steps and step % config.itm_every == 0

    queue_length = config.queue_size    # the paper's queue is full of random negatives at step 0
    if config.queue_from > 0:           # a queue that is used later has only what is written so far
        pairs_seen = step * config.accumulate * config.batch_size * config.processes
        is_used = step >= config.queue_from * config.steps
        queue_length = min(config.queue_size, pairs_seen) if is_used else 0
    return StepParams(alpha, momentum, queue_length, hardness, with_itm)


# ---- one step ------------------------------------------------------------------------------------
def compute_gradients(run: Run, micro_batches: list[Batch], step: int):
    """Compute the gradients of one step on `accumulate` micro-batches. Returns a tensor (3,), which
    has ITC and ITM, means of all processes, and the number of micro-batches with ITM (without, it
    is 0), and the outputs of `FLIP.forward`."""
    config = run.config
    device = run.model.device
    rank, world_size = rank_and_world_size()
    params = schedule(step, config)
    torch.manual_seed(derive_seed("dropout", config.seed, step, rank))
    generator = torch.Generator().manual_seed(derive_seed("negatives", config.seed, step))

    step_losses = torch.zeros(3, device=device)
    outputs = []
    for number, batch in enumerate(micro_batches, start=1):
        # DistributedDataParallel averages gradients in the last backward pass only
        run.ddp_model.require_backward_grad_sync = number == len(micro_batches)
        batch = batch.to(device)
        with autocast(config.precision, device):
            out = run.ddp_model(batch.images, batch.captions, batch.identity, params, generator)
            loss = (out.itc + out.itm) / len(micro_batches)
            loss.backward()
        outputs.append(out)
        step_losses[0] += out.itc.detach() / len(micro_batches)
        step_losses[1] += out.itm.detach() / len(micro_batches)
        step_losses[2] += out.has_itm

    if world_size > 1:
        dist.all_reduce(step_losses)
        step_losses /= world_size
    return step_losses, outputs


def update(run: Run, outputs, step: int):
    """Change everything that a step changes: queue, weights, temperature and momentum encoder."""
    config = run.config
    model = run.model
    for out in outputs:
        model.enqueue(out.image_keys, out.text_keys, out.identity)

    if config.grad_clip:
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    set_learning_rate(run.optimizers, learning_rate(step, config, run.steps_per_epoch))
    for optimizer in run.optimizers:
        with autocast(config.precision, model.device):      # for Muon's matrix products
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.clamp_temperature()

    # for the next step; before the first step with a momentum, the momentum encoder becomes a copy
    momentum = schedule(step + 1, config).momentum
    if momentum > 0 or schedule(step + 2, config).momentum > 0:
        model.update_momentum(momentum)


# ---- the loop ------------------------------------------------------------------------------------
def train(config: Config):
    """Run the training; returns the model and its final validation metrics."""
    device = init_distributed(config.device)
    with open_run(config, device) as run:
        training_loop(run)
    validations = [line for line in run.log.lines if "r_mean" in line]
    first = validations[0]
    last = validations[-1]
    if run.is_main:
        initial = first if first["step"] == 0 else None
        print(recall_table(last, run.validation, initial))
        print(f"{config.out}: flip.pt, log.jsonl, curves.png, retrieval.png")
    return run.model, last


def training_loop(run: Run):
    """Train until the last step, or until a signal asks to stop."""
    config = run.config
    first = run.steps_done
    if first == 0 and config.init:
        validate(run)       # a row of the table
    timer = StepTimer()
    bar = tqdm(range(first, config.steps), "training", initial=first, total=config.steps,
               disable=not run.is_main)
    with contextlib.closing(run.dataset.iterate_from(first * config.accumulate)) as stream:
        for step in bar:
            micro_batches = timer.next_batches(stream, config.accumulate)
            step_losses, outputs = compute_gradients(run, micro_batches, step)
            run.updating = True
            update(run, outputs, step)
            run.unlogged_losses.append(step_losses)
            run.steps_done = step + 1
            run.updating = False

            is_last = run.steps_done == config.steps
            if run.steps_done % config.log_every == 0 or is_last:
                line = mean_losses(run) | timer.means()
                run.log.write(step=run.steps_done, **line)
                bar.set_postfix(itc=line["itc"], itm=line["itm"], seconds=line["seconds"])
                run.unlogged_losses = []
                timer.restart()

            is_due = run.steps_done % config.eval_every == 0 or is_last
            if is_due:
                validate(run)
                timer.restart()
            must_stop = run.must_stop()
            if is_due or must_stop or time.time() - run.last_save > 60 * config.save_every:
                save(run)
            if must_stop:
                raise SystemExit(f"stopped after step {run.steps_done}; continue with --resume")


def mean_losses(run: Run):
    """Mean losses since the last line of the log; ITM is None if no step trained it. "itm_skipped"
    is the number of micro-batches without ITM because they show one person. Raises ValueError if
    the losses are not finite."""
    config = run.config
    steps = range(run.steps_done - len(run.unlogged_losses), run.steps_done)
    itc, itm, num_with_itm = torch.stack(run.unlogged_losses).sum(0).tolist()
    if not math.isfinite(itc + itm):
        raise ValueError(f"the loss of steps {steps[0] + 1} to {steps[-1] + 1} is NaN or infinite")
    num_scheduled = config.accumulate * sum(schedule(step, config).with_itm for step in steps)
    mean_itm = None
    if num_with_itm:
        mean_itm = config.accumulate * itm / num_with_itm
    return {
        "itc": itc / len(steps),
        "itm": mean_itm,
        "itm_skipped": num_scheduled - int(num_with_itm),
        "temperature": run.model.temperature.item(),
        "lr": learning_rate(steps[-1], config, run.steps_per_epoch),
    }


def validate(run: Run):
    """Evaluate the model, log the metrics, draw the plots."""
    run.model.eval()
    metrics, text_to_image = evaluate(run.model, run.validation, run.config)
    run.model.train()
    run.log.write(step=run.steps_done, **metrics)
    if run.is_main:
        folder = Path(run.config.out)
        plot_curves(run.log.lines, run.validation, folder / "curves.png")
        plot_retrieval(run.validation, text_to_image, folder / "retrieval.png")


if __name__ == "__main__":
    run_script(lambda: train(parse_arguments(description=__doc__)))
