"""The command line: read its words, and run a command."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from torchrl_wm._interrupts import keep_sigterm
from torchrl_wm._registry import find_recipe
from torchrl_wm.cli.console import (
    complain,
    describe,
    Interrupted,
    plain_notes,
    was_interrupted,
)

DESCRIPTION = """Learn world models, act by them, and see how good they are.

Each command explains its options: torchrl-wm COMMAND --help, torchrl-wm train pets --help.
With --debug, any command shows the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after ``torchrl-wm``; those of the process by default.

    Returns:
        The exit code of the process: 0; 2 after an error; 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not find_spec("tyro"):
        complain("torchrl-wm needs tyro: pip install 'torchrl-wm[cli]'")
        return 2
    # Its notes, such as that a storage is initialised, do not help people who run a command.
    os.environ.setdefault("RL_LOGGING_LEVEL", "WARNING")
    logging.getLogger("torchrl").setLevel(logging.WARNING)  # if it is imported already
    # Nor do warnings that other packages give of each other. Our own are shown.
    for package in ("torchrl", "tensordict", "torch", "gymnasium"):
        warnings.filterwarnings("ignore", module=rf"{package}(\.|$)")
    # Only frames are drawn, and no windows: without a display SDL reports an error.
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    keep_sigterm()
    # `--env module:factory` is searched in the working directory, as by `python -m`.
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        with plain_notes():
            run = parse(words)
            run()
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 2 if exit.code else 0
    except Interrupted as stop:
        complain(f"\n{stop}")
        return 130
    except KeyboardInterrupt:
        complain("\nInterrupted.")
        return 130
    except Exception as err:  # whatever an env or a library raises
        if was_interrupted(err):
            complain("\nInterrupted.")
            return 130
        if debug:
            traceback.print_exc()
        complain(f"torchrl-wm: error: {describe(err)}")
        return 2
    return 0


def parse(words: Sequence[str]) -> Callable[[], None]:
    """Return the function that does what a command line says.

    Raises:
        SystemExit: after ``--help``, and for words that are not understood.
    """
    import tyro

    from torchrl_wm.cli import commands
    from torchrl_wm.cli.options import OPTIONS

    trains = bool(words) and words[0] == "train"
    resumes = any(word.split("=")[0] == "--resume" for word in words)
    # The settings of a recipe are read from its config. Importing it imports torch, which is
    # slow, so only the commands that need it do.
    recipe = words[1] if trains and words[1:] and words[1][0] != "-" else None
    if recipe is not None and not resumes:
        recipe = find_recipe(recipe).name
        from torchrl_wm.cli import training

        prog = f"torchrl-wm train {recipe}"
        return tyro.cli(
            training.command_of(recipe), prog=prog, args=words[2:], registry=OPTIONS
        )
    if trains:
        words, ends = _split_ends(words[1:])
        go = tyro.cli(
            commands.train,
            prog="torchrl-wm train",
            description=commands.describe_train(),
            args=words,
            registry=OPTIONS,
        )
        return lambda: go(ends)
    return tyro.extras.subcommand_cli_from_dict(
        commands.COMMANDS,
        prog="torchrl-wm",
        description=DESCRIPTION,
        args=words,
        registry=OPTIONS,
    )


def _split_ends(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Split the words of ``train --resume`` from the settings beside them, which end a run later."""
    own = ("resume", "checkpoint", "device", "report", "no-report")
    own = (*own, "progress", "no-progress", "help")
    left, ends = list(words), {}
    for word in words:
        name, _, value = word.partition("=")
        if not name.startswith("--") or name[2:].replace("_", "-") in own:
            continue
        at = left.index(word)
        if not value:
            value = left.pop(at + 1) if len(left) > at + 1 else ""
        left.pop(at)
        ends[name[2:].replace("-", "_")] = _value(value)
    return left, ends


def _value(word: str) -> Any:
    """Read a setting: None, a number or a word."""
    if word.lower() == "none":
        return None
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
