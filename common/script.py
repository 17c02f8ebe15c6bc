"""What all scripts share: running them, errors, files, flags, tables."""
import argparse
import contextlib
import ctypes
import dataclasses
import os
import typing
import warnings
from dataclasses import field
from pathlib import Path

import torch


def tune_cpu():
    """Two things on which a CPU wastes its time. Numbers below 1e-38, which attention that has learned
    to look at few tokens gives to all others, cost it far more than others do; in a long run steps came
    to take nearly twice the time, so they are taken for 0 (in threads, too, if said before there are
    any). And large tensors, whose memory glibc returns to the system as soon as they are freed; to fetch
    and clear it anew costs several percent. It may keep up to 32 MB a tensor, the most one can ask."""
    torch.set_flush_denormal(True)
    with contextlib.suppress(OSError, AttributeError, TypeError):       # there is no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 * 2 ** 20)           # M_MMAP_THRESHOLD: smaller ones come from the heap
        mallopt(-1, 2 ** 31 - 1)            # M_TRIM_THRESHOLD: how much of the heap may lie unused


def run_script(main):
    """Run a script: what its user can mend ends in a sentence, not in a traceback."""
    tune_cpu()
    warnings.formatwarning = lambda message, *_: f"{message}\n"
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {escape_control_chars(error)}")
    except KeyboardInterrupt:
        raise SystemExit("interrupted")


def escape_control_chars(text):
    """A file's name, for example, whose odd characters cannot steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def short_message(error):
    """An error's text, as far as it fits into a sentence."""
    return (str(error) or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def error_context(what, where):
    """Whatever goes wrong inside becomes one sentence, which ends with what Python says of it."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{where}: expected {what} ({kind}{short_message(error)})") from error


def check_ranges(config, **limits):
    """Sizes are read from files, too: better a sentence than all the memory there is."""
    for name, bound in limits.items():
        size = getattr(config, name)
        if not (isinstance(size, int) and 1 <= size <= bound):
            raise ValueError(f"{type(config).__name__}: {name} is {size!r}, expected a whole number from 1 "
                             f"to {bound}")


@contextlib.contextmanager
def atomic_write(path):
    """A name to write to; the file appears at `path` whole, or, after an error, not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.urandom(4).hex()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def markdown_table(header, rows):
    """A table of texts."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def flag(default, help, low=0, high=2 ** 62, choices=(), was=""):
    """A field that is a flag: its default, what it is, what it may be (both ends included), its old name."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices, was=was))


def renamed_flags(config, values):
    """{name: value} as an older version saved them, under the names of today."""
    today = {f.metadata.get("was"): f.name for f in dataclasses.fields(config)}
    return {today.get(name, name): value for name, value in values.items()}


def check_flags(config):
    """ValueError for the first field that is out of its range; a pair must not fall."""
    for f in filter(lambda f: f.metadata, dataclasses.fields(config)):
        value, rule = getattr(config, f.name), f.metadata
        values = value if isinstance(value, tuple) else (value,)
        if rule["choices"] and not set(values) <= set(rule["choices"]):
            raise ValueError(f"--{f.name} {value}: expected one of {', '.join(rule['choices'])}")
        numbers = [x for x in values if isinstance(x, (int, float))]
        if not all(rule["low"] <= x <= rule["high"] for x in numbers):          # so nan is refused as well
            most = "" if rule["high"] == 2 ** 62 else f" and at most {rule['high']}"
            raise ValueError(f"--{f.name} {value}: expected at least {rule['low']}{most}")
        if f.type == tuple[float, float] and (len(value) != 2 or value[0] > value[1]):
            raise ValueError(f"--{f.name} {value}: expected two numbers, the smaller first")


def parse_flags(parser, config, argv):
    """A flag for every field of a configuration; what was given, {name: value}."""
    for f in filter(lambda f: f.metadata, dataclasses.fields(config)):
        shown = f" ({f.default})" if f.default not in ("", ()) else ""
        options = {"default": argparse.SUPPRESS, "help": f.metadata["help"] + shown}
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(f.default, tuple):
            options |= {"type": typing.get_args(f.type)[0], "nargs": "+", "metavar": f.name.upper()}
        else:
            options |= {"type": f.type, "metavar": f.name.upper()}
        names = [f"--{name}" for name in (f.name, f.metadata["was"]) if name]
        parser.add_argument(*names, dest=f.name, **options)
    given = vars(parser.parse_args(argv))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
