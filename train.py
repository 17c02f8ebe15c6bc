r"""Pre-train FLIP (arXiv 2407.08515, section 4): schedules, one step, the loop, validation.

    python train.py                         drawn faces, the tiny model, minutes on two CPU cores
    python train.py --data DIR              your own faces (layouts: readers/layouts.py)
    python train.py --data DIR --init FILE  the same, from a trained FLIP, ours or the official
    python train.py --resume                resume the run in --out
    torchrun --nproc_per_node 8 train.py --model base --data DIR \
        --clip openai/clip-vit-base-patch16 --bert bert-base-uncased
                                            the paper's recipe: 8 processes with 80 pairs each

A run has two phases: ITC within the batch; complete FLIP, with ITM, momentum encoder, queue and
soft targets. The paper's run is phase 2 from its first step on; the tiny model's run enters phase 2
after 90 % of its steps.

Flags, the paper's values and the tiny model's recipe are in config.py; what a run starts from, and
how it is saved and resumed, is in runs.py. What changes from step to step (learning rate, phase,
weight of the soft targets) follows a schedule that depends only on the step. Data and random
numbers depend only on the seed and the position in the run. So a resumed run computes exactly what
an uninterrupted one does. Random numbers are seeded by their purpose and the numbers listed here:

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
from tqdm import tqdm

import runs
from common.distributed import (
    autocast,
    init_distributed,
    rank_and_world_size,
    rank_zero_first,
)
from common.pictures import plot_curves, plot_retrieval
from common.script import run_script
from common.seeds import derive_seed
from config import Config, parse_arguments
from data import Batch
from evaluation import EvaluationSet, evaluate, recall_table
from flip import FLIPOutput, StepParams
from optim import build_optimizers, learning_rate, ramp, set_learning_rate

# ---- schedules: pure functions of the step -------------------------------------------------------
PHASES = {1: "ITC within the batch", 2: "complete FLIP"}


def phase(step: int, config: Config) -> int:
    """The phase of a step, see PHASES. The last step is in phase 2, however short the run."""
    return 1 if step < int(config.complete_from * config.steps) else 2


def schedule(step: int, config: Config) -> StepParams:
    """What changes during a run, except the learning rate (optim.py)."""
    if phase(step, config) == 1:
        return StepParams(within_batch=True, with_itm=False)
    start = config.complete_from * config.steps
    end = start + config.alpha_warmup * (config.steps - start)
    return StepParams(alpha=config.alpha * ramp(step, start, end))


# ---- one step ------------------------------------------------------------------------------------
def compute_gradients(run: runs.Run, batch: Batch, step: int):
    """Compute the gradients of one step. Returns the output of `FLIP.forward` and a tensor (2,):
    ITC and ITM, averaged over processes."""
    config = run.config
    device = run.model.device
    rank, world_size = rank_and_world_size()
    params = schedule(step, config)
    torch.manual_seed(derive_seed("dropout", config.seed, step, rank))
    generator = torch.Generator().manual_seed(derive_seed("negatives", config.seed, step))

    batch = batch.to(device)
    with autocast(config.precision, device):
        out = run.parallel_model(batch.images, batch.captions, batch.identity, params, generator)
    loss = out.itc + out.itm
    loss.backward()

    step_losses = torch.stack([out.itc, out.itm]).detach()
    if world_size > 1:
        dist.all_reduce(step_losses)
        step_losses /= world_size
    return out, step_losses


def update(run: runs.Run, out: FLIPOutput, step: int):
    """Apply the step: change queue, weights, temperature and momentum encoder. The queue is filled
    in phase 1, too, so that phase 2 begins with features of earlier batches."""
    config = run.config
    model = run.model
    model.enqueue(out.image_keys, out.text_keys, out.identity)

    lr = learning_rate(step, config, run.dataset.batches_per_epoch)
    set_learning_rate(run.optimizers, lr)
    for optimizer in run.optimizers:
        with autocast(config.precision, model.device):      # for Muon's matrix products
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.clamp_temperature()

    if phase(step + 1, config) == 2:        # the next step needs the momentum encoder
        is_first = phase(step, config) == 1
        model.update_momentum(0.0 if is_first else config.momentum)     # 0: a copy of the student


# ---- the run -------------------------------------------------------------------------------------
def train(config: Config):
    """Run the training; returns the model and its final validation metrics."""
    device = init_distributed(config.device)
    rank, _ = rank_and_world_size()
    log = runs.Log(Path(config.out) / "log.jsonl", writes=rank == 0)
    with contextlib.closing(log):
        run = build_run(config, device, log)
        with runs.resumable(run):
            training_loop(run)
    validations = log.validations()
    if run.is_main:
        initial = validations[0] if validations[0]["step"] == 0 else None
        print(recall_table(validations[-1], run.validation, initial))
        print(f"{config.out}: flip.pt, log.jsonl, curves.png, retrieval.png")
    return run.model, validations[-1]


def build_run(config: Config, device: torch.device, log: runs.Log) -> runs.Run:
    """Model, data and optimisers, new or from the checkpoint in --out."""
    with rank_zero_first():     # it draws or indexes the data and downloads weights for all ranks
        model = runs.starting_model(config)
        image_size = model.config.vit.image_size
        faces = runs.training_faces(config, image_size)
        validation_faces = runs.validation_faces(config, image_size)

    model.to(device).train()
    if config.compile:
        runs.compile_encoders(model)
    dataset, config = runs.plan_run(config, model, faces)
    optimizers = build_optimizers(model, config.weight_decay, config.muon_multiple)
    validation = EvaluationSet.from_faces(validation_faces, faces,
                                          config.batch_size * config.processes)
    parallel_model = runs.data_parallel(model, config)
    run = runs.Run(config, model, parallel_model, optimizers, dataset, validation, log)
    if config.resume:
        runs.restore(run)
    else:
        runs.begin(run)
    return run


def training_loop(run: runs.Run):
    """Train until the last step, or until a signal asks to stop."""
    config = run.config
    if run.validation_is_due():     # before the first step only with --init
        validate(run)
    first = run.steps_done
    steps = range(first, config.steps)
    bar = tqdm(steps, initial=first, total=config.steps, disable=not run.is_main)
    began = time.time()
    with contextlib.closing(run.dataset.iterate_from(first)) as batches:
        for step, batch in zip(bar, batches):
            number = phase(step, config)
            bar.set_description(f"phase {number}: {PHASES[number]}")
            out, step_losses = compute_gradients(run, batch, step)
            run.updating = True             # if this fails halfway, the run is not saved
            update(run, out, step)
            run.unlogged_losses.append(step_losses)
            run.steps_done = step + 1
            run.updating = False

            if run.steps_done % config.log_every == 0 or run.steps_done == config.steps:
                means = mean_losses(run)
                seconds = (time.time() - began) / (run.steps_done - first)      # per step, so far
                run.log.write(step=run.steps_done, seconds=seconds, **means)
                bar.set_postfix(itc=means["itc"], itm=means["itm"])
                run.unlogged_losses = []

            is_validated = run.validation_is_due()
            if is_validated:
                validate(run)
            must_stop = run.must_stop()     # because of a signal
            if is_validated or must_stop or run.save_is_due():
                runs.save(run)
            if must_stop and run.steps_done < config.steps:
                raise SystemExit(f"stopped after step {run.steps_done}; continue with --resume")


def mean_losses(run: runs.Run):
    """Mean losses since the last line of the log; that of ITM over the steps that train it, or None
    if there are none. Raises ValueError if the losses are not finite."""
    config = run.config
    steps = range(run.steps_done - len(run.unlogged_losses), run.steps_done)
    itc, itm = torch.stack(run.unlogged_losses).sum(0).tolist()
    if not math.isfinite(itc + itm):
        raise ValueError(f"the loss of steps {steps[0] + 1} to {steps[-1] + 1} is NaN or infinite: "
                         "training has diverged; start a new run with a smaller --lr")
    num_with_itm = sum(schedule(step, config).with_itm for step in steps)
    return {
        "phase": phase(steps[-1], config),
        "itc": itc / len(steps),
        "itm": itm / num_with_itm if num_with_itm else None,
        "temperature": run.model.temperature.item(),
        "lr": learning_rate(steps[-1], config, run.dataset.batches_per_epoch),
    }


def validate(run: runs.Run):
    """Evaluate the model, log the metrics, draw the plots. The matching head re-ranks only if it is
    trained: by steps of phase 2, or in the model of --init."""
    config = run.config
    run.model.eval()
    head_is_trained = bool(config.init) or phase(run.steps_done - 1, config) == 2
    metrics, text_to_image = evaluate(run.model, run.validation, config, reranks=head_is_trained)
    run.model.train()
    run.log.write(step=run.steps_done, **metrics)
    if run.is_main:
        folder = Path(config.out)
        plot_curves(run.log.lines, run.validation, folder / "curves.png")
        plot_retrieval(run.validation, text_to_image, folder / "retrieval.png")


if __name__ == "__main__":
    run_script(lambda: train(parse_arguments(description=__doc__)))
