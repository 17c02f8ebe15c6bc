"""Saving, stopping and resuming a run. For an exact resume, a checkpoint needs

  - from `FLIP.checkpoint`: all weights (also of the momentum encoder), queues, queue pointer, vocabulary;
  - under "training": the optimiser states, step, configuration and log, and the numbers of processes and of
    faces, which must not change.

It needs no random-number state and no data position: both are pure functions of (seed, step)."""
import contextlib
import json
import signal
from dataclasses import asdict
from pathlib import Path

from common.distributed import rank_and_world_size
from common.weights import read_checkpoint, write_checkpoint


def save(run, step):
    """Save the `train.TrainState` after `step` steps as flip.pt, on rank 0. Raises ValueError, and keeps the
    previous checkpoint, if weights are NaN or infinite."""
    if not all(weights.isfinite().all() for weights in run.model.parameters()):
        raise ValueError(f"after step {step}: expected finite weights, found NaN or infinity; training has "
                         f"diverged and is not saved; restart with a smaller --lr or with --grad_clip")
    if rank_and_world_size()[0] == 0:
        state = {"config": asdict(run.config), "processes": rank_and_world_size()[1],
                 "faces": len(run.loader.faces), "step": step, "log": run.log.lines,
                 "optimizers": [optimizer.state_dict() for optimizer in run.optimizers]}
        write_checkpoint(run.model.checkpoint() | {"training": state}, Path(run.config.out) / "flip.pt")


def load_run(path: str | Path) -> dict:
    """Read a checkpoint that `save` wrote. Raises ValueError if it has no training state."""
    checkpoint = read_checkpoint(path)
    state = checkpoint.get("training")
    if not isinstance(state, dict) or "optimizers" not in state:
        raise ValueError(f"{path}: expected a training state of this version, found only a model; use --init "
                         f"and another --out to start from it")
    return checkpoint


class Log:
    """log.jsonl: the configuration, then a line every few steps. A resumed run rewrites it from the copy in
    the checkpoint, without the lines of steps that it repeats."""

    def __init__(self, path: Path, lines, writes=True):
        self.path, self.lines, self.writes = path, list(lines), writes
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def write(self, **line):
        self.lines.append(line)
        if self.writes:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")


@contextlib.contextmanager
def graceful_stop():
    """Yield a list to which SIGINT and SIGTERM append, so that the loop can finish its step and save; a
    second Ctrl-C stops at once. On exit, restore both handlers."""
    received = []

    def handle(number, frame):
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
