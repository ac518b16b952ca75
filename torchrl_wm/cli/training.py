"""``torchrl-wm train``."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from torchrl_wm.cli.console import command, Interrupted, list_paths, say
from torchrl_wm.cli.runs import recipe_of
from torchrl_wm.diagnostics import write_report
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.models import save_world_model
from torchrl_wm.trainers import (
    make_real_env,
    MBPOConfig,
    MBPOTrainer,
    PETSConfig,
    PETSTrainer,
    RecordedEnv,
    RunFolder,
    train_world_model,
    write_run_report,
)
from torchrl_wm.trainers.logged_data import read_transitions
from torchrl_wm.trainers.model_training import as_episodes, split_transitions
from torchrl_wm.trainers.pictures import recorded_episodes
from torchrl_wm.trainers.recipe import RecipeConfig, RecipeTrainer

Settings = tyro.conf.OmitArgPrefixes


def pets(
    config: Annotated[PETSConfig, tyro.conf.arg(name="")] = PETSConfig(),  # noqa: B008
    *,
    run: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="FOLDER", help_behavior_hint="(default: runs/pets-ENV-SEED)"
        ),
    ] = None,
    report: bool = True,
    progress: bool = True,
) -> Callable[[], None]:
    """Learn a model trial by trial, and act by planning through it (PETS).

    torchrl-wm train --resume RUN goes on with a run that was interrupted.

    Args:
        config: the settings.
        run: the folder of the run, which must be new or empty.
        report: write the report at the end.
        progress: show the progress.
    """
    return lambda: start(PETSTrainer, config, run, report, progress)


def mbpo(
    config: Annotated[MBPOConfig, tyro.conf.arg(name="")] = MBPOConfig(),  # noqa: B008
    *,
    run: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="FOLDER", help_behavior_hint="(default: runs/mbpo-ENV-SEED)"
        ),
    ] = None,
    report: bool = True,
    progress: bool = True,
) -> Callable[[], None]:
    """Learn a policy by SAC on short rollouts of a learned model (MBPO).

    torchrl-wm train --resume RUN goes on with a run that was interrupted.

    Args:
        config: the settings.
        run: the folder of the run, which must be new or empty.
        report: write the report at the end.
        progress: show the progress.
    """
    return lambda: start(MBPOTrainer, config, run, report, progress)


def model(
    *,
    data: str,
    env: Annotated[
        str | None,
        tyro.conf.arg(
            help_behavior_hint="(default: none, its specs are read off the data)"
        ),
    ] = None,
    observation_keys: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="[NAME [NAME ...]]", help_behavior_hint="(default: all)"),
    ] = (),
    run: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="FOLDER", help_behavior_hint="(default: runs/model-NAME-SEED)"
        ),
    ] = None,
    steps: int = 2000,
    held_out: float = 0.1,
    interval: int = 200,
    members: int = 7,
    elites: int | None = None,
    hidden: tuple[int, ...] = (200, 200, 200, 200),
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-5,
    batch_size: int = 256,
    seed: int = 0,
    report: bool = True,
) -> Callable[[], None]:
    """Train a world model alone, from logged data.

    Args:
        data: an .npz file, the folder of a replay buffer, tensordict or Minari dataset, or minari:ID of a local one.
        env: the env that was recorded, named as for train pets.
        observation_keys: which observations to model; a slash joins the names of nested ones.
        run: the folder of the run, which must be new or empty.
        steps: how many gradient steps to train for.
        held_out: the share of the episodes that is not trained on.
        interval: how many gradient steps pass between two looks at the held-out error.
        members: how many networks the ensemble has.
        elites: how many of the members predict; None for 5, or all of fewer.
        hidden: the sizes of the hidden layers of each member.
        learning_rate: the learning rate of the optimizer, AdamW.
        weight_decay: the weight decay of the optimizer, AdamW.
        batch_size: how many transitions a batch has.
        seed: the seed of the split, the weights and the batches.
        report: write the report on the held-out episodes at the end.
    """
    settings = {k: v for k, v in locals().items() if k not in ("run", "report")}
    settings["observation_keys"] = [
        tuple(name.split("/")) for name in observation_keys
    ] or None
    return lambda: train_from_data(run, report, **settings)


#: What ``train`` can train, and the options of each.
RECIPES: dict[str, Callable[..., Callable[[], None]]] = {
    "pets": pets,
    "mbpo": mbpo,
    "model": model,
}


def train_from_data(
    run: str | None, report: bool, *, data: str, env: str | None, **settings: Any
) -> None:
    """A world model, its errors on held-out data, and the report on them."""
    real_env = None if env is None else make_real_env(env)
    rows, action_spec = read_transitions(data, real_env)
    name = re.sub(r"[^\w.-]+", "-", Path(data.removeprefix("minari:")).stem)
    path = run or f"runs/model-{name.strip('-')}-{settings['seed']}"
    content = {"algorithm": "model", "config": {"data": data, "env": env, **settings}}
    RunFolder.check_free(path)
    folder: RunFolder | None = None
    say(f"A world model of {len(rows)} transitions from {data}, in {path}")

    def show(row: dict[str, float]) -> None:
        nonlocal folder
        if folder is None:  # settings and data are right
            folder = RunFolder.create(path, content)
        folder.log(row)
        listed = [f"{k} {v:.4g}" for k, v in row.items() if k != "step"]
        say(f"gradient step {row['step']}: {', '.join(listed)}")

    try:
        world_model, metrics = train_world_model(
            rows, env=real_env, action_spec=action_spec, on_row=show, **settings
        )
    except KeyboardInterrupt:
        raise Interrupted(
            f"Interrupted. The training of a model alone does not go on from where it stopped: "
            f"start it again, after removing {path} or with another --run."
        ) from None
    file = folder.path / "model.pt"
    save_world_model(world_model, file)
    best = min(row["held_out_error"] for row in metrics)
    say(
        f"Held-out one-step error: {best:.1%} of that of a model by which nothing changes."
    )
    found = {
        "settings": folder.path / "config.json",
        "metrics": folder.path / "metrics.csv",
        "tensorboard": folder.path / "tensorboard",
        "model": file,
    }
    if report:
        found["report"] = folder.path / "report.html"
        _, test = split_transitions(rows, settings["held_out"], settings["seed"])
        reference = real_env or RecordedEnv(rows, action_spec=action_spec)
        imagined = WorldModelEnv(world_model, reference)
        write_report(
            found["report"],
            imagined,
            recorded_episodes(as_episodes(test)),
            real_env=real_env,
            title=f"A world model of {data}, on held-out episodes",
        )
    list_paths(found)


def start(
    kind: type[RecipeTrainer],
    config: RecipeConfig,
    run: str | None,
    report: bool,
    progress: bool,
) -> None:
    """A run from its beginning."""
    path = run or default_folder(kind.algorithm, config)
    trainer = kind.start(path, config, progress=progress)
    say(f"{kind.algorithm} on {config.env}, seed {config.seed}, in {path}")
    finish(trainer, report)


def resume(path: str, *, recipe: str | None, report: bool, progress: bool) -> None:
    """A run from its last checkpoint on."""
    kind = recipe_of(path)
    if recipe is not None and recipe != kind.algorithm:
        raise ValueError(
            f"{path!r} is a run of {kind.algorithm}, not of {recipe}: torchrl-wm train --resume "
            f"{path} is enough."
        )
    trainer = kind.resume(path, progress=progress)
    if trainer.is_over:
        say(f"{path} is over: {done(trainer)}")
    else:
        say(f"Going on with {path} from step {trainer.collected_frames}.")
    finish(trainer, report)


def finish(trainer: RecipeTrainer, report: bool) -> None:
    """Run to the end, write the report, and say where all is."""
    began = time.monotonic()
    try:
        trainer.train()
        over = f"Done in {time.monotonic() - began:.0f} s: {done(trainer)}"
        if report and trainer.learner.steps:  # SAC alone has no model to report on
            say(f"{over}. Writing the report ...")
            write_run_report(trainer)
        else:
            say(f"{over}.")
    except KeyboardInterrupt:
        raise Interrupted(what_is_saved(trainer)) from None
    list_paths(paths(trainer))


def done(trainer: RecipeTrainer) -> str:
    """What a run has done, in words."""
    text = f"{trainer.episodes} episodes, {trainer.collected_frames} steps"
    returns = [row["return"] for row in trainer.metrics if "return" in row]
    return f"{text}, last return {returns[-1]:.4g}" if returns else text


def what_is_saved(trainer: RecipeTrainer) -> str:
    """What an interruption leaves, and how to go on."""
    run = trainer.run
    saved = run.saved()
    again = command("train", "--resume", run.path)
    if not saved:
        return (
            f"Interrupted before the first checkpoint. {again} begins the run again with the "
            f"settings in {run.path / 'config.json'}."
        )
    steps = int(re.findall(r"\d+", saved[-1].stem)[-1])
    lost = trainer.collected_frames - steps
    return (
        f"Interrupted at step {trainer.collected_frames}. Saved up to step {steps} in {saved[-1]}"
        f"{f' ({lost} steps will be made again)' if lost else ''}. Go on with:\n  {again}"
    )


def paths(trainer: RecipeTrainer) -> dict[str, Path]:
    """What a run has written, by name."""
    run = trainer.run
    found = {
        "settings": run.path / "config.json",
        "metrics": run.path / "metrics.csv",
        "tensorboard": run.path / "tensorboard",
        "checkpoint": run.saved()[-1] if run.saved() else run.checkpoints,
        "report": run.path / "report.html",
    }
    return {name: path for name, path in found.items() if path.exists()}


def default_folder(algorithm: str, config: RecipeConfig) -> str:
    """The folder of a run for which none was named."""
    env = re.sub(r"[^\w.-]+", "-", config.env).strip("-")
    return f"runs/{algorithm}-{env}-{config.seed}"
