"""Reads the command line and runs a command."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from torchrl_wm.cli.console import complain, describe, ERRORS, Interrupted

DESCRIPTION = """Learn world models, act by them, and see how good they are.

Each command explains its options: torchrl-wm COMMAND --help, torchrl-wm train pets --help.
Every command takes --debug, too: then an error comes with its traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after ``torchrl-wm``; those of the process by default.

    Returns:
        What the process exits with: 0; 2 after an error; 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not find_spec("tyro"):
        complain("torchrl-wm needs tyro: pip install 'torchrl-wm[cli]'")
        return 2
    # Its notes, such as that a storage is initialised, are not for people who run a command.
    os.environ.setdefault("RL_LOGGING_LEVEL", "WARNING")
    # Frames are drawn, no windows: without a display SDL complains as if something had failed.
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    # `--env module:factory` is looked for where the user is, as `python -m` does.
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
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
    except ERRORS as err:
        if debug:
            traceback.print_exc()
        complain(f"torchrl-wm: error: {describe(err)}")
        return 2
    return 0


def parse(words: Sequence[str]) -> Callable[[], None]:
    """What a command line asks for.

    Raises:
        SystemExit: after ``--help``, and for words that are not understood.
    """
    import tyro

    from torchrl_wm.cli import commands
    from torchrl_wm.cli.options import OPTIONS

    resumes = any(word.split("=")[0] == "--resume" for word in words)
    options = sorted(word for word in words if _is_setting(word))
    if resumes and options:
        raise ValueError(
            f"--resume goes on with the settings in the folder's config.json, and takes none beside "
            f"it: {options}. For other settings, such as more trials, start a new run."
        )
    # The settings of a recipe are read from its config, whose import takes as long as torch's.
    # Hence only where they are asked for.
    recipe = words[1] if len(words) > 1 and words[0] == "train" else None
    if recipe in commands.RECIPES and not resumes:
        from torchrl_wm.cli import training

        prog = f"torchrl-wm train {recipe}"
        return tyro.cli(
            training.RECIPES[recipe], prog=prog, args=words[2:], registry=OPTIONS
        )
    if recipe is not None and not recipe.startswith("-"):
        commands.check_recipe(recipe)
    return tyro.extras.subcommand_cli_from_dict(
        commands.COMMANDS,
        prog="torchrl-wm",
        description=DESCRIPTION,
        args=words,
        registry=OPTIONS,
    )


def _is_setting(word: str) -> bool:
    """Whether a word is an option that going on with a run does not have."""
    known = ("resume", "report", "no-report", "progress", "no-progress", "help")
    name = word.split("=")[0]
    return name.startswith("--") and name[2:].replace("_", "-") not in known
