"""Helpers of all scripts: running `main`, errors, files, command-line flags, tables."""
import argparse
import contextlib
import ctypes
import os
import sys
import traceback
import warnings
from dataclasses import field, fields
from pathlib import Path

import torch


def tune_cpu():
    """Avoid two slowdowns on a CPU. Must be called before any thread starts.

    Denormals (below 1e-38), which peaked attention produces, nearly doubled the step time of a long
    run, so they are flushed to zero. glibc returns large freed tensors to the system, and mapping
    new memory costs several percent of the time, so blocks of up to 32 MB are kept."""
    torch.set_flush_denormal(True)
    with contextlib.suppress(OSError, AttributeError, TypeError):       # without glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 * 2 ** 20)           # M_MMAP_THRESHOLD: smaller blocks come from the heap
        mallopt(-1, 2 ** 31 - 1)            # M_TRIM_THRESHOLD: free bytes at which the heap shrinks


def run_script(main):
    """Run `main`. An error that the user can usually fix, which is a ValueError, an OSError or an
    error with the name of a file (`naming`), is printed in one line with the place that raised it.
    Any other error, usually a programmer's mistake, keeps its traceback."""
    tune_cpu()
    warnings.formatwarning = lambda message, *_: f"{message}\n"
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit("interrupted")
    except BrokenPipeError:         # the reader of the output, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        notes = getattr(error, "__notes__", [])
        last_line = str(error).strip().rpartition("\n")[2]
        message = "; ".join([last_line, *notes])
        if not isinstance(error, (ValueError, OSError)):
            if not any(note.startswith("in ") for note in notes):
                raise
            message = f"{type(error).__name__}: {message}"
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise SystemExit(f"error: {message} ({Path(place.filename).name}, line {place.lineno})")


@contextlib.contextmanager
def naming(path):
    """Add the path to the errors of libraries that read a file, most of which do not name it."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in {path}")
        raise


@contextlib.contextmanager
def atomic_write(path: str | Path):
    """Yield a temporary path beside `path`. At the end of the block, the temporary file replaces
    `path`; after an error, it is deleted. So a killed process leaves the old file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def markdown_table(header, rows, digits=1):
    """Format a header and rows of cells as a Markdown table, floats with this number of decimal
    digits."""
    def text(cell):
        return f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell)

    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(text, line)) + " |" for line in lines)


def flag(default, text: str, **options):
    """A dataclass field that is also a command-line flag: its default value and help text, and
    options of `add_argument`; without a type among them, the flag has that of the field."""
    return field(default=default, metadata={"help": text, **options})


def parse_flags(config, argv, description: str, epilog: str, **positional):
    """Parse `argv` with a flag for every `flag` of a dataclass, and with positional arguments,
    given by name with their choices. Returns {name: value} of the arguments in `argv`."""
    parser = argparse.ArgumentParser(description=description, epilog=epilog, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, choices in positional.items():
        parser.add_argument(name, choices=choices)
    for each in fields(config):
        if not each.metadata:
            continue
        text = each.metadata["help"]
        if each.default not in ("", ()):
            text += f" ({each.default})"
        options = {"type": each.type, **each.metadata, "help": text.replace("%", "%%")}
        if each.type is bool:
            del options["type"]
            options["action"] = argparse.BooleanOptionalAction
        parser.add_argument(f"--{each.name}", default=argparse.SUPPRESS, **options)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(value)
    return given
