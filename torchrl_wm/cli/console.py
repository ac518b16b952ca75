"""The output of the command line, and its error messages."""

from __future__ import annotations

import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


class Interrupted(Exception):
    """Somebody pressed Ctrl-C; says what is saved and how to go on."""


def say(text: str = "") -> None:
    """Write a line."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def complain(text: str) -> None:
    """Write a line to where errors go."""
    sys.stdout.flush()
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@contextmanager
def plain_notes() -> Iterator[None]:
    """Show this package's warnings as notes, without the line of code that gave them.

    Those of other packages keep Python's form.
    """
    before = warnings.formatwarning

    def note(
        message: Warning | str, category: type, filename: str, *place: object
    ) -> str:
        own = category is UserWarning and _PACKAGE in Path(filename).resolve().parents
        return (
            f"Note: {message}\n" if own else before(message, category, filename, *place)
        )

    warnings.formatwarning = note
    try:
        yield
    finally:
        warnings.formatwarning = before


def list_paths(paths: Mapping[str, object]) -> None:
    """Write what is where."""
    width = max(map(len, paths))
    for name, path in paths.items():
        say(f"  {name:{width}}  {path}")


def describe(err: BaseException) -> str:
    """Say what went wrong in a sentence, with its place if that is not in this package."""
    # KeyError shows its message in quotes.
    one = isinstance(err, KeyError) and len(err.args) == 1
    message = str(err.args[0] if one else err) or type(err).__name__
    frames = traceback.extract_tb(err.__traceback__)
    place = ""
    if frames and _PACKAGE not in Path(frames[-1].filename).resolve().parents:
        last = frames[-1]
        message = f"{type(err).__name__}: {message}"
        place = f" (raised in {last.filename}, line {last.lineno})"
    return f"{message}{place}"


def was_interrupted(err: BaseException | None) -> bool:
    """Return whether an error is what other code made of Ctrl-C."""
    while err is not None:
        if isinstance(err, KeyboardInterrupt):
            return True
        err = err.__cause__ or err.__context__
    return False


def command(*words: object) -> str:
    """Return a command line of this program, to be copied."""
    return shlex.join(["torchrl-wm", *map(str, words)])
