"""The report on a run, and pictures of it: learning curve, prediction fan."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TYPE_CHECKING

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs.utils import set_exploration_type

from torchrl_wm.diagnostics import (
    plot_prediction_fan,
    prediction_fan,
    Report,
    ReportSection,
    write_report,
)
from torchrl_wm.diagnostics.drawing import new_figure
from torchrl_wm.diagnostics.prediction_sections import MANY_DIMS
from torchrl_wm.diagnostics.recording import CONTEXT, observed_keys, Recording
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules.modes import evaluation_mode
from torchrl_wm.trainers.evaluation import episode_return, forked_random
from torchrl_wm.trainers.films import found_render
from torchrl_wm.trainers.real_envs import episode_seeds
from torchrl_wm.trainers.recipe import Recipe
from torchrl_wm.trainers.trainer import EVALUATION_EPISODES, RecipeTrainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_learning_curve(
    rows: Sequence[Mapping[str, Any]], *, title: str = "learning curve"
) -> Figure:
    """Draw the returns of a run over its real steps.

    Args:
        rows: the metrics of a run, ``trainer.metrics`` or ``RunFolder.metrics()``.

    Keyword Args:
        title: the title of the figure.

    Returns:
        A matplotlib figure; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: if no episode has ended yet.

    Examples:
        >>> from torchrl_wm.trainers import plot_learning_curve
        >>> figure = plot_learning_curve([{"step": 200, "return": -1200.0}])
    """
    figure = new_figure(7, 4)
    place = figure.add_subplot()
    drawn = False
    for name, label, style in (
        ("return", "episode, as trained", "o-"),
        ("evaluation_return", "evaluation, without exploration", "s-"),
    ):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            place.plot(*zip(*points), style, markersize=4, label=label)
            drawn = True
    if not drawn:
        raise ValueError("There is no return to draw yet: no episode has ended.")
    place.set(xlabel="real steps", ylabel="return of an episode", title=title)
    place.grid(alpha=0.3)
    place.legend()
    return figure


def write_run_report(
    trainer: RecipeTrainer,
    path: str | os.PathLike | None = None,
    *,
    episodes: int = 3,
    seed: int = 0,
    **kwargs: Any,
) -> Report:
    """Write the report on a run's model, on fresh episodes of its policy.

    Args:
        trainer: the run.
        path: the file; ``report.html`` in the run's folder by default.

    Keyword Args:
        episodes: how many real episodes of the policy are recorded. The model of a log is
            measured on its held-out episodes.
        seed: the seed of these episodes, and of what is imagined.
        kwargs: arguments of :func:`~torchrl_wm.diagnostics.write_report`; ``render`` may also be
            the name of a function, ``"module:function"``.

    Returns:
        The measurements.

    Raises:
        ValueError: if there is neither a path nor a folder, or the model has not learnt yet.

    Examples:
        >>> import os, tempfile
        >>> from torchrl_wm.trainers import PETSTrainer, write_run_report
        >>> trainer = PETSTrainer(
        ...     env="Pendulum-v1", max_episode_steps=20, random_steps=20, trials=1,
        ...     model_steps=5, planning_horizon=3, num_candidates=20, top_k=5,
        ... )
        >>> trainer.train()
        >>> path = os.path.join(tempfile.mkdtemp(), "report.html")
        >>> report = write_run_report(trainer, path, episodes=1)
        >>> "open_loop/observation: 1 step, share of the data's spread" in report.numbers
        True
    """
    if path is None:
        if trainer.run is None:
            raise ValueError(
                "The run has no folder: say where to write its report, write_run_report(trainer, "
                "path)."
            )
        path = trainer.run.path / "report.html"
    _check_has_learnt(trainer)
    kwargs["render"] = found_render(kwargs.get("render"))
    if trainer.recipe.learns_from_log:
        return _report_on_data(trainer, path, episodes, seed, **kwargs)
    recorded = trainer.evaluate(episodes, seed=seed)
    settings = {
        "title": f"{trainer.recipe.title}, seed {trainer.config.seed}",
        "seed": seed,
        **kwargs,
    }
    if "real_env" not in settings:
        # An env with its own episodes: that of the run goes on counting.
        settings["real_env"] = real_env = trainer.make_env()
        episode_seeds(real_env).seed = seed
        episode_seeds(real_env).episode = EVALUATION_EPISODES + episodes
    if trainer.recipe.acts_in_model:
        _set_policies(settings, trainer)
    settings["sections"] = [
        _learning_curve(trainer, recorded),
        *trainer.recipe.report_sections(returns_of(trainer, episodes, seed)),
        *settings.get("sections", ()),
    ]
    return write_report(path, trainer.recipe.diagnosed_env(), recorded, **settings)


def _check_has_learnt(trainer: RecipeTrainer) -> None:
    """Refuse a run without a model to report on."""
    if trainer.world_model is None:
        raise ValueError(
            f"The recipe {trainer.recipe.name!r} has no world model to report on. "
            f"plot_learning_curve(trainer.metrics) draws its returns."
        )
    if not trainer.recipe.has_learnt:
        raise ValueError(
            "The run's model has not learnt anything: a report has nothing to measure. Train the "
            "run first; without a model, plot_learning_curve(trainer.metrics) draws its "
            "returns."
        )


def _learning_curve(
    trainer: RecipeTrainer, recorded: Sequence[TensorDictBase]
) -> ReportSection:
    """Return the section on the returns of a run, and on those of fresh episodes."""
    returns = [episode_return(trainer.env, episode) for episode in recorded]
    return ReportSection(
        "Learning curve",
        how="The return of each real episode, over the real steps made so far.",
        verdict=(
            f"The policy without exploration reaches {np.mean(returns):.4g} in "
            f"{len(returns)} fresh episodes, after {trainer.collected_frames:,} real steps and "
            f"{trainer.seconds:.0f} s."
        ),
        pictures=[plot_learning_curve(trainer.metrics)] if trainer.metrics else [],
        numbers={
            "mean return": float(np.mean(returns)),
            "least return": min(returns),
            "largest return": max(returns),
            "real steps": trainer.collected_frames,
            "seconds": trainer.seconds,
        },
    )


def _report_on_data(
    trainer: RecipeTrainer,
    path: str | os.PathLike,
    number: int,
    seed: int,
    **settings: Any,
) -> Report:
    """Write the report on a model of a log, on the held-out episodes, and on what learnt in it."""
    recipe = trainer.recipe
    settings.setdefault("real_env", recipe.real_env)
    about = f"A world model of {recipe.config.about}"
    if recipe.policy is not None:
        about = f"{recipe.title}, seed {recipe.config.seed}"
        _set_policies(settings, trainer)
    settings.setdefault("title", f"{about}, on held-out episodes")
    settings["sections"] = [
        *recipe.report_sections(returns_of(trainer, number, seed)),
        *settings.get("sections", ()),
    ]
    episodes = recipe.held_out_episodes()
    return write_report(path, recipe.diagnosed_env(), episodes, seed=seed, **settings)


def returns_of(
    trainer: RecipeTrainer, episodes: int, seed: int
) -> Callable[[Any], list[float]] | None:
    """Return what gives real returns of a policy; None without a real env."""
    if not trainer.recipe.has_real_env:
        return None
    return lambda policy: trainer.returns(episodes, seed=seed, policy=policy)


def _set_policies(settings: dict[str, Any], trainer: RecipeTrainer) -> None:
    """Set what acts in the imagined env and in the real one: what is given, or the run's policy."""
    recipe = trainer.recipe
    if "policy" in settings:
        real_policy = settings["policy"]
    else:
        settings["policy"] = _without_exploration(recipe, recipe.latent_policy)
        real_policy = _without_exploration(recipe, recipe.policy)
    settings.setdefault("real_policy", _from_the_cpu(recipe.device, real_policy))


def _without_exploration(recipe: Recipe, policy: TensorDictModuleBase) -> Callable:
    """Return a policy as evaluations run it, whatever exploration is set around it."""

    def act(tensordict: TensorDictBase) -> TensorDictBase:
        exploration = recipe.evaluation_exploration
        with set_exploration_type(exploration), evaluation_mode(policy):
            return policy(tensordict)

    return act


def _from_the_cpu(device: torch.device, policy: Callable) -> Callable:
    """Return a policy for the real env, which is on the CPU whatever the device of the run."""
    if device.type == "cpu":
        return policy
    return lambda tensordict: policy(tensordict.to(device)).to("cpu")


def save_prediction_fan(
    trainer: RecipeTrainer,
    path: str | os.PathLike,
    episode: TensorDictBase,
    *,
    horizon: int = 25,
    starts: int = 3,
    particles: int = 100,
    seed: int = 0,
    labels: Sequence[str] | None = None,
) -> Path:
    """Draw what the model imagines from some steps of an episode, beside what came true.

    Args:
        trainer: the run.
        path: the file of the picture.
        episode: a real episode, ``[T]``.

    Keyword Args:
        horizon: ``H``; less if the episode is shorter.
        starts: how many steps imagination starts from, the first one among them; a recurrent
            model sees five frames before it.
        particles: how many times each of them is imagined.
        seed: the seed of what is imagined.
        labels: a name for each dim of the observation.
    """
    with forked_random(seed):
        figure = fan_figure(
            trainer.recipe.diagnosed_env(), episode, horizon, starts, particles, labels
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def fan_figure(
    env: WorldModelEnv,
    episode: TensorDictBase,
    horizon: int,
    starts: int,
    particles: int,
    labels: Sequence[str] | None = None,
) -> Figure:
    """Draw the fans of a model from some steps of an episode.

    A recurrent model has filtered the episode up to each of them, five frames at least if the
    episode is long enough. Images are not drawn.

    Args: the imagined env, and those of :func:`save_prediction_fan`.

    Raises:
        ValueError: if all that is predicted has too many dims to draw.
    """
    steps = Recording.of(env, episode, "save_prediction_fan").steps[0]
    horizon = min(horizon, len(episode))
    last = len(episode) - horizon
    earliest = min(CONTEXT - 1, last) if env.world_model.is_recurrent else 0
    first = torch.linspace(earliest, last, starts).long().unique()
    windows = torch.stack([steps[int(i) : int(i) + horizon] for i in first])
    keys = [
        key
        for key in observed_keys(env) or env.latent_keys
        if env.observation_spec[key].shape.numel() <= MANY_DIMS
    ]
    if not keys:
        raise ValueError("All that the model predicts has too many dims to draw.")
    fan = prediction_fan(env, windows, horizon, particles=particles, keys=keys[:1])
    return plot_prediction_fan(fan, keys[0], labels=labels, max_starts=len(first))
