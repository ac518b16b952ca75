"""What a run looks like: its learning curve, its report, a film of its policy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TYPE_CHECKING

import numpy as np
import torch
from tensordict import pad, TensorDictBase
from torchrl.envs.utils import set_exploration_type

from torchrl_wm.diagnostics import (
    observation_renderer,
    plot_prediction_fan,
    prediction_fan,
    render_comparison,
    Report,
    ReportSection,
    save_video,
    write_report,
)
from torchrl_wm.diagnostics.drawing import new_figure
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules import with_propagation
from torchrl_wm.planners.base import MPCPlanner
from torchrl_wm.trainers.evaluation import episode_return
from torchrl_wm.trainers.real_envs import episode_seeds, rendered_frame
from torchrl_wm.trainers.recipe import EVALUATION_EPISODES, RecipeTrainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_learning_curve(
    rows: Sequence[Mapping[str, Any]], *, title: str = "learning curve"
) -> Figure:
    """Draw the returns of a run over its real steps.

    Args:
        rows: the metrics of a run, ``trainer.metrics`` or ``RunFolder.metrics()``.

    Keyword Args:
        title: stands above it.

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


def recorded_episodes(episodes: Sequence[TensorDictBase]) -> TensorDictBase:
    """Episodes as one batch ``[N, T]``; a mask says where the shorter ones end."""
    longest = max(map(len, episodes))
    padded = []
    for episode in episodes:
        mask = torch.arange(longest) < len(episode)
        row = pad(episode, [0, longest - len(episode)])
        padded.append(row.set(("collector", "mask"), mask))
    return torch.stack(padded)


def diagnosed_env(trainer: RecipeTrainer) -> WorldModelEnv:
    """The imagined env of a run as diagnostics want it, with all members asked."""
    model = trainer.world_model
    if hasattr(model.dynamics, "propagation"):
        model = with_propagation(model, "ts1")
    return WorldModelEnv(model, trainer.env, batch_size=[])


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
        episodes: how many real episodes the policy acts in for it.
        seed: of these episodes, and of what is imagined.
        kwargs: for :func:`~torchrl_wm.diagnostics.write_report`.

    Returns:
        What was measured.

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
    if not trainer.learner.steps:
        raise ValueError(
            "The run's model has not learnt anything: a report has nothing to measure. Train the "
            "run first; with real_share=1 it has no model, and plot_learning_curve(trainer.metrics) "
            "draws its returns."
        )
    recorded = trainer.evaluate(episodes, seed=seed)
    returns = [episode_return(trainer.env, episode) for episode in recorded]
    config = trainer.config
    curve = ReportSection(
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
    settings = {
        "title": f"{trainer.algorithm} on {config.env}, seed {config.seed}",
        "seed": seed,
        **kwargs,
    }
    if "real_env" not in settings:
        # One with episodes of its own: that of the run goes on counting.
        settings["real_env"] = real_env = trainer.make_env()
        episode_seeds(real_env).seed = seed
        episode_seeds(real_env).episode = EVALUATION_EPISODES + episodes
    if not isinstance(trainer.policy, MPCPlanner):
        settings.setdefault("policy", _without_exploration(trainer))
    sections = [curve, *settings.pop("sections", ())]
    return write_report(
        path,
        diagnosed_env(trainer),
        recorded_episodes(recorded),
        sections=sections,
        **settings,
    )


def _without_exploration(trainer: RecipeTrainer) -> Callable:
    """The policy as evaluations run it, whatever the model around it does at random."""

    def act(tensordict: TensorDictBase) -> TensorDictBase:
        with set_exploration_type(trainer.evaluation_exploration):
            return trainer.policy(tensordict)

    return act


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
    """Draw what the model imagines from some steps of an episode, and what came true.

    Args:
        trainer: the run.
        path: the picture.
        episode: a real one, ``[T]``.

    Keyword Args:
        horizon: ``H``; less if the episode is shorter.
        starts: how many steps are imagined from, the first one among them.
        particles: how often.
        seed: of what is imagined.
        labels: a name for each dim of the observation.
    """
    env = diagnosed_env(trainer)
    horizon = min(horizon, len(episode))
    first = torch.linspace(0, len(episode) - horizon, starts).long().unique()
    windows = torch.stack([episode[int(i) : int(i) + horizon] for i in first])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fan = prediction_fan(env, windows, horizon, particles=particles)
    key = next(iter(fan.get("real").keys(True, True)))
    figure = plot_prediction_fan(fan, key, labels=labels, max_starts=len(first))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def film_policy(
    trainer: RecipeTrainer,
    path: str | os.PathLike,
    *,
    horizon: int = 50,
    max_steps: int = 1000,
    real_only: bool = False,
    seed: int = 0,
    fps: float = 20.0,
    height: int | None = 240,
    episode: TensorDictBase | None = None,
) -> bool:
    """Film an episode of a run's policy, what the model imagines beside it where that can be drawn.

    The model imagines the same actions, and looks at the real state again every ``horizon``
    steps.

    Args:
        trainer: the run.
        path: ends in ``.gif`` or ``.mp4``.

    Keyword Args:
        horizon: for how many steps the model imagines without another look.
        max_steps: the length of the film.
        real_only: film the real env alone.
        seed: of how the episode begins.
        fps, height: of the film; the height of the env's own frames if None.
        episode: a real episode ``[T]`` to show, in place of a fresh one. Not for films of the
            real env alone, which are taken while the policy acts.

    Returns:
        Whether the imagined is beside the real.

    Raises:
        ValueError: if nothing can be drawn.
    """
    if horizon < 1 or max_steps < 1:
        raise ValueError(
            f"horizon and max_steps must be at least 1, got {horizon} and {max_steps}."
        )
    draw = None if real_only else observation_renderer(trainer.env)
    if draw is None:
        save_video(path, _real_frames(trainer, seed, max_steps), fps=fps)
        return False
    if episode is None:
        (episode,) = trainer.evaluate(1, seed=seed)
    env, frames = diagnosed_env(trainer), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for window in episode[:max_steps].split(horizon):
            part = render_comparison(env, window, render=draw, height=height)
            # A window begins with what the one before ended with.
            frames.append(part if not frames else part[1:])
    save_video(path, np.concatenate(frames), fps=fps)
    return True


def _real_frames(trainer: RecipeTrainer, seed: int, max_steps: int) -> np.ndarray:
    """The frames of an episode, as the real env's own renderer draws them."""
    env, frames = trainer.make_env(render_mode="rgb_array"), []

    def take(*_: Any) -> None:
        if len(frames) <= max_steps:
            frames.append(rendered_frame(env))

    # Before each action; not by the rollout's callback, which misses both ends.
    hook = trainer.policy.register_forward_pre_hook(take)
    try:
        trainer.evaluate(1, env, seed=seed)
    finally:
        hook.remove()
    take()
    if any(frame is None for frame in frames):
        raise ValueError(
            f"{trainer.config.env!r} has no renderer that gives frames. In Gymnasium that is a "
            f"render() which returns [height, width, 3] uint8 for render_mode='rgb_array'; a "
            f"factory gets render_mode if it has a parameter of that name."
        )
    return np.stack(frames)
