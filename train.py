r"""Pre-train FLIP (arXiv 2407.08515, section 4): schedules, one step, the loop, validation.

    python train.py                         drawn faces, the tiny model, minutes on two CPU cores
    python train.py --data DIR              your own faces (layouts: readers/layouts.py)
    python train.py --data DIR --init FILE  the same, from a trained FLIP, ours or the official
    python train.py --resume                resume the run in --out
    torchrun --nproc_per_node 8 train.py --model base --data DIR \
        --clip openai/clip-vit-base-patch16 --bert bert-base-uncased
                                            the paper's recipe: 8 processes with 80 pairs each

Flags, the paper's values and the tiny model's recipe are in config.py; what a run starts from, and
how it is saved and resumed, is in runs.py. Everything that changes during a run (learning rate,
momentum, hardness of the negatives, ...) follows a schedule that depends only on the step. Data and
random numbers depend only on the seed and the position in the run. So a resumed run computes
exactly what an uninterrupted one does. Random numbers are seeded by their purpose and these
numbers:

    order of the faces                  (seed, epoch)           FaceDataset.batch_indices
    caption and augmentation            (seed, epoch, index)    FaceDataset.__getitem__
    dropout                             (seed, step, rank)      compute_gradients
    negatives, sampled on rank 0        (seed, step)            compute_gradients
"""
import contextlib
import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

import runs
from common.distributed import autocast, init_distributed, rank_and_world_size
from common.pictures import plot_curves, plot_retrieval
from common.script import run_script
from common.seeds import derive_seed
from config import Config, parse_arguments
from data import Batch
from evaluation import EvaluationSet, evaluate, recall_table
from flip import StepParams
from optim import build_optimizers, ramp, set_learning_rate, warmup_decay
from runs import Log, Run, StepTimer


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
    """Compute the gradients of one step on `accumulate` micro-batches. Returns the outputs of
    `FLIP.forward` and a tensor (3,): the sums of ITC and of ITM over the micro-batches, and the
    number of those with ITM, each averaged over processes."""
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
        run.parallel_model.require_backward_grad_sync = number == len(micro_batches)
        batch = batch.to(device)
        with autocast(config.precision, device):
            out = run.parallel_model(batch.images, batch.captions, batch.identity, params,
                                     generator)
            loss = (out.itc + out.itm) / len(micro_batches)
            loss.backward()
        outputs.append(out)
        step_losses[0] += out.itc.detach()
        step_losses[1] += out.itm.detach()
        step_losses[2] += out.has_itm

    if world_size > 1:
        dist.all_reduce(step_losses)
        step_losses /= world_size
    return outputs, step_losses


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


# ---- the run -------------------------------------------------------------------------------------
def train(config: Config):
    """Run the training; returns the model and its final validation metrics."""
    device = init_distributed(config.device)
    rank, _ = rank_and_world_size()
    log = Log(Path(config.out) / "log.jsonl", writes=rank == 0)
    with contextlib.closing(log):
        run = build_run(config, device, log)
        with runs.saved_on_error(run):
            training_loop(run)
    metrics = [line for line in log.lines if "r_mean" in line]
    if run.is_main:
        initial = metrics[0] if metrics[0]["step"] == 0 else None
        print(recall_table(metrics[-1], run.validation, initial))
        print(f"{config.out}: flip.pt, log.jsonl, curves.png, retrieval.png")
    return run.model, metrics[-1]


def build_run(config: Config, device: torch.device, log: Log) -> Run:
    """Model, data and optimisers, new or from the checkpoint in --out."""
    start = runs.starting_point(config)
    model = start.model.to(device).train()
    dataset, config = runs.plan_steps(config, model, start.faces)
    optimizers = build_optimizers(model, config.weight_decay, config.beta2, config.temperature_lr,
                                  config.muon_lr_image, config.muon_lr_text, config.muon_momentum)
    validation = EvaluationSet.from_faces(start.validation, start.faces,
                                          config.batch_size * config.processes)
    parallel_model = runs.data_parallel(model, config)
    run = Run(config, model, parallel_model, optimizers, dataset, validation, log)
    if start.state:
        runs.restore(run, start.state)
    else:
        runs.begin(run)
    return run


def training_loop(run: Run):
    """Train until the last step, or until a signal asks to stop."""
    config = run.config
    if validation_is_due(run):
        validate(run)
    first = run.steps_done
    bar = tqdm(range(first, config.steps), "training", initial=first, total=config.steps,
               disable=not run.is_main)
    timer = StepTimer()
    with contextlib.closing(run.dataset.iterate_from(first * config.accumulate)) as stream:
        for step in bar:
            micro_batches = timer.next_batches(stream, config.accumulate)
            outputs, step_losses = compute_gradients(run, micro_batches, step)
            run.updating = True             # until this is over, the run cannot be saved
            update(run, outputs, step)
            run.unlogged_losses.append(step_losses)
            run.steps_done = step + 1
            run.updating = False

            if run.steps_done % config.log_every == 0 or run.steps_done == config.steps:
                line = mean_losses(run) | timer.means()
                run.log.write(step=run.steps_done, **line)
                bar.set_postfix(itc=line["itc"], itm=line["itm"], seconds=line["seconds"])
                run.unlogged_losses = []
                timer.restart()

            is_due = validation_is_due(run)
            if is_due:
                validate(run)
                timer.restart()
            runs.save_if_due(run, validated=is_due)


def validation_is_due(run: Run) -> bool:
    """Whether to validate now: every `eval_every` steps, after the last step and, with --init,
    before the first one; but not if the log has the metrics already."""
    step = run.steps_done
    is_due = step % run.config.eval_every == 0 or step == run.config.steps
    if step == 0:
        is_due = bool(run.config.init)
    return is_due and not any("r_mean" in line and line["step"] == step for line in run.log.lines)


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
    return {
        "itc": itc / (config.accumulate * len(steps)),
        "itm": itm / num_with_itm if num_with_itm else None,
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
