"""``torchrl-wm train``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import tyro

from torchrl_wm._registry import find_recipe
from torchrl_wm.cli.console import (
    command,
    Interrupted,
    list_paths,
    say,
    was_interrupted,
)
from torchrl_wm.cli.open_run import free
from torchrl_wm.trainers import (
    RecipeTrainer,
    resume_run,
    RunConfig,
    RunFolder,
    start_run,
    write_run_report,
)
from torchrl_wm.trainers.run_folder import step_of
from torchrl_wm.trainers.settings import Settings


def command_of(name: str) -> Callable[..., Callable[[], None]]:
    """Return the command that trains a recipe; its options are the recipe's settings."""
    recipe = find_recipe(name)
    kind = recipe.load()

    def train(
        config: Settings,
        *,
        run: str | None = None,
        report: bool = True,
        progress: bool = True,
    ) -> Callable[[], None]:
        return lambda: start(name, config, run, report, progress)

    train.__doc__ = f"""{recipe.summary}

    torchrl-wm train --resume RUN goes on with a run that was interrupted.

    Args:
        config: the settings.
        run: the folder of the run, which must be new or empty.
        report: write the report at the end.
        progress: show the progress.
    """
    about = "ENV" if issubclass(kind.config_class, RunConfig) else "NAME"
    folder = tyro.conf.arg(
        metavar="FOLDER", help_behavior_hint=f"(default: runs/{name}-{about}-SEED)"
    )
    train.__annotations__ = {
        "config": Annotated[kind.config_class, tyro.conf.arg(name="")],
        "run": Annotated[str | None, folder],
        "report": bool,
        "progress": bool,
    }
    return train


def start(
    name: str, config: Settings, run: str | None, report: bool, progress: bool
) -> None:
    """Start a run."""
    default = Path("runs") / f"{name}-{config.short_name}-{config.seed}"
    path = free(default) if run is None else Path(run)
    trainer = start_run(name, path, config, progress=progress)
    say(f"{trainer.recipe.title}, seed {config.seed}, in {path}")
    finish(trainer, report)


def resume(
    path: str,
    *,
    recipe: str | None,
    checkpoint: int | None,
    report: bool,
    progress: bool,
    **given: Any,
) -> None:
    """Go on with a run from a checkpoint."""
    algorithm = RunFolder.open(path).config.get("algorithm")
    if recipe is not None and recipe != algorithm:
        raise ValueError(
            f"{path!r} is a run of {algorithm}, not of {recipe}: torchrl-wm train --resume "
            f"{path} is enough."
        )
    trainer = resume_run(path, checkpoint=checkpoint, progress=progress, **given)
    if trainer.is_over:
        say(f"{path} is over: {done(trainer)}. To make it longer: {_longer(trainer)}")
    else:
        say(f"Going on with {path} from step {trainer.collected_frames}.")
    finish(trainer, report)


def finish(trainer: RecipeTrainer, report: bool) -> None:
    """Run to the end, write the report, and list the files."""
    began = time.monotonic()
    with saying_what_is_saved(trainer):
        trainer.train()
        over = f"Done in {time.monotonic() - began:.0f} s: {done(trainer)}"
        if report and trainer.recipe.has_learnt:  # else there is no model to report on
            say(f"{over}. Writing the report ...")
            write_run_report(trainer)
        else:
            say(f"{over}.")
    list_paths(paths(trainer))
    say(f"In all {trainer.run.size / 1e6:.1f} MB in {trainer.run.path}.")


def done(trainer: RecipeTrainer) -> str:
    """Say what a run has done."""
    words = [f"{trainer.collected_frames} steps"]
    returns = [row["return"] for row in trainer.metrics if "return" in row]
    if returns:
        words = [f"{trainer.episodes} episodes", *words]
        words.append(f"last return {returns[-1]:.4g}")
    measures = trainer.recipe.measures()
    words += [
        f"{name.replace('_', ' ')} {value:.4g}" for name, value in measures.items()
    ]
    return ", ".join(words)


@contextmanager
def saying_what_is_saved(trainer: RecipeTrainer) -> Iterator[None]:
    """Say what is saved after Ctrl-C, whatever error other code makes of it."""
    try:
        yield
    except (KeyboardInterrupt, Exception) as err:
        if not was_interrupted(err):
            raise
        raise Interrupted(what_is_saved(trainer)) from None


def what_is_saved(trainer: RecipeTrainer) -> str:
    """Say what an interruption leaves, and how to go on."""
    run = trainer.run
    saved = run.saved()
    again = command("train", "--resume", run.path)
    if not saved:
        return (
            f"Interrupted before the first checkpoint. {again} begins the run again with the "
            f"settings in {run.path / 'config.json'}."
        )
    steps = step_of(saved[-1])
    lost = trainer.collected_frames - steps
    return (
        f"Interrupted at step {trainer.collected_frames}. Saved up to step {steps} in {saved[-1]}"
        f"{f' ({lost} steps will be made again)' if lost else ''}. Go on with:\n  {again}"
    )


def paths(trainer: RecipeTrainer) -> dict[str, Path]:
    """Return what a run has written, by name."""
    run = trainer.run
    found = {
        "settings": run.path / "config.json",
        "metrics": run.path / "metrics.csv",
        "tensorboard": run.path / "tensorboard",
        "checkpoint": run.saved()[-1] if run.saved() else run.checkpoints,
        "model": run.path / "model.pt",
        "report": run.path / "report.html",
    }
    return {name: path for name, path in found.items() if path.exists()}


def _longer(trainer: RecipeTrainer) -> str:
    """Return the command that makes a run twice as long, without a return that ends it."""
    options = []
    for name in trainer.config.ENDS:
        end = getattr(trainer.config, name)
        if name == "stop_return":
            options += ["--stop-return", "none"] if trainer.has_reached else []
        elif end is not None:
            options += [f"--{name.replace('_', '-')}", 2 * end]
    return command("train", "--resume", trainer.run.path, *options)
