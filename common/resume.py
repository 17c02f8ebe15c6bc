"""Saving, stopping and resuming a run. For an exact resume, a checkpoint needs

  - from `FLIP.checkpoint`: all weights (also of the momentum encoder), queues, queue pointer, vocabulary;
  - under "training": the optimiser states, step, configuration and log, and the numbers of processes and of
    faces, which must not change.

It needs no random-number state and no data position: both are pure functions of (seed, step)."""
import contextlib
import json
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

from common.distributed import rank_and_world_size
from common.script import check_like, error_context, lock, prepare_folder, short_message
from common.weights import read_checkpoint, write_checkpoint


def save(run, ranks=1):
    """Save a `train.TrainState` as flip.pt, on each of the first `ranks` ranks. Raises ValueError, and keeps
    the previous checkpoint, if weights are NaN or infinite."""
    (rank, world_size), step = rank_and_world_size(), run.progress.done
    if not all(weights.isfinite().all() for weights in run.model.parameters()):
        raise ValueError(f"after step {step}: expected finite weights, found NaN or infinity; training has "
                         f"diverged and is not saved; restart with a smaller --lr or with --grad_clip")
    if rank < ranks:
        state = {"config": asdict(run.config), "processes": world_size, "faces": len(run.loader.faces),
                 "step": step, "log": run.log.lines,
                 "optimizers": [optimizer.state_dict() for optimizer in run.optimizers]}
        write_checkpoint(run.model.checkpoint() | {"training": state}, Path(run.config.out) / "flip.pt")
        run.progress.saved = step


def load_run(path: str | Path) -> dict:
    """Read a checkpoint that `save` wrote. Raises ValueError if it has no training state, or an invalid one;
    `parse_arguments` checks its configuration, `load_optimizers` its optimisers."""
    checkpoint = read_checkpoint(path)
    if "training" not in checkpoint:
        raise ValueError(f"{path}: expected a training state, found only a model; use --init and another "
                         f"--out to start from it")
    template = dict(config={}, processes=1, faces=1, step=1, log=[{}],
                    optimizers=[dict(state={}, param_groups=[])])
    check_like(checkpoint["training"], template, f"{path}: training")
    with error_context("a log that JSON can express", path):
        json.dumps(checkpoint["training"]["log"], allow_nan=False)
    return checkpoint


class Log:
    """log.jsonl: the configuration, then a line every few steps. A resumed run rewrites it from the copy in
    the checkpoint, without the lines of steps that it repeats. Raises ValueError if another run has it open:
    it would write to the same folder."""

    def __init__(self, path: Path, lines, writes=True):
        self.lines, self.file = list(lines), None
        if writes:
            prepare_folder(path.parent)
            self.file = open(path, "ab", buffering=0)
            try:
                lock(self.file)
            except BlockingIOError:
                raise ValueError(f"{path} is in use by another run; choose another --out") from None
            except (OSError, ImportError):
                pass                        # this system has no locks
            self.file.truncate(0)
            self._append(lines)

    def write(self, **line):
        self.lines.append(line)
        self._append([line])

    def _append(self, lines):
        if self.file:
            size = os.fstat(self.file.fileno()).st_size
            data = "".join(json.dumps(line) + "\n" for line in lines).encode()
            with error_context("enough disk space", self.file.name):
                if self.file.write(data) < len(data):
                    self.file.truncate(size)                # keep only whole lines
                    raise ValueError("a line is cut off")

    def close(self):
        """Let another run use the folder."""
        if self.file:
            self.file.close()


@dataclass
class Progress:
    """How far a run is."""
    done: int | None        # whole steps; None while a step changes the model
    saved: int              # the last step that this process saved
    stop: bool = False      # SIGINT or SIGTERM arrived: stop after this step


@contextlib.contextmanager
def saved_at_end(run):
    """Whatever ends the block (a signal, a killed process, any error), save the run after its last whole
    step. SIGINT and SIGTERM set `run.progress.stop`, so that the loop can finish its step; a second Ctrl-C
    stops at once."""
    progress = run.progress

    def handle(number, frame):
        progress.stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except BaseException as error:
        note = f"the last checkpoint is of step {progress.saved}"
        try:
            if progress.done is not None:
                if progress.done > progress.saved:
                    save(run, ranks=2)      # rank 1, too: rank 0 may have been killed
                note = f"after step {progress.done}; continue with --resume"
        except (ValueError, OSError) as problem:
            note = note if str(problem) == str(error) else f"{problem}; {note}"
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(1 if rank_and_world_size()[0] else f"stopped {note}") from None
        if isinstance(error, (ValueError, OSError, RuntimeError)):
            raise ValueError(f"{short_message(error):.200} ({note})") from error
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        run.log.close()
