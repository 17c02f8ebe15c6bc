"""Saving, stopping, resuming."""
import contextlib
import json
import signal
from dataclasses import asdict
from pathlib import Path

from common.distributed import rank_and_world_size
from common.weights import read_checkpoint, write_checkpoint


def save(run, step):
    """Write the checkpoint, from the first process; never weights that are no numbers over good
    ones."""
    if not all(weights.isfinite().all() for weights in run.model.parameters()):
        raise ValueError(f"after step {step} some weights are not finite numbers: training has diverged, and "
                         f"this is not saved; begin again with a smaller --lr, or with --grad_clip")
    if rank_and_world_size()[0] == 0:
        state = {"config": asdict(run.config), "processes": rank_and_world_size()[1],
                 "faces": len(run.loader.faces), "step": step, "log": run.log.lines,
                 "optimizers": [optimizer.state_dict() for optimizer in run.optimizers]}
        write_checkpoint(run.model.checkpoint() | {"training": state}, Path(run.config.out) / "flip.pt")


def load_run(path):
    """The checkpoint of a run that can be resumed: under "training" is what `save` put there."""
    checkpoint = read_checkpoint(path)
    state = checkpoint.get("training")
    if not isinstance(state, dict) or "optimizers" not in state:
        raise ValueError(f"{path} holds a model but no training state of this version, so there is nothing "
                         f"to resume")
    return checkpoint


class Log:
    """log.jsonl: the configuration, then a line every few steps. It also rides in the checkpoint,
    from which a resumed run writes it anew: what lay beyond the checkpoint happens again."""

    def __init__(self, path, lines, writes=True):
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
    """A list that Ctrl-C or a polite kill puts something into, so that the loop can finish its step
    and save; a second one stops at once. Afterwards both do what they did before."""
    received = []

    def handle(number, frame):
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
