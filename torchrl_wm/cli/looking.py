"""``torchrl-wm evaluate``, ``report`` and ``play``: what a run has learnt."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

from torchrl_wm.cli.console import say
from torchrl_wm.cli.runs import open_run
from torchrl_wm.trainers import episode_return, film_policy, write_run_report


def evaluate(path: str, *, episodes: int, seed: int, progress: bool) -> None:
    """Print the returns of the policy."""
    positive(episodes, "--episodes")
    trainer = open_run(path)
    returns = []
    for number, episode in enumerate(trainer.iterate(episodes, seed=seed)):
        returns.append(episode_return(trainer.env, episode))
        if progress:
            say(f"episode {number + 1}: return {returns[-1]:.6g}, {len(episode)} steps")
    spread = f", std {stdev(returns):.6g}" if len(returns) > 1 else ""
    say(
        f"{trainer.algorithm} on {trainer.config.env} after {trainer.collected_frames} steps, "
        f"{episodes} episodes: mean {mean(returns):.6g}{spread}, least {min(returns):.6g}, "
        f"largest {max(returns):.6g}"
    )


def report(
    path: str, *, out: str | None, episodes: int, horizon: int, seed: int
) -> None:
    """Write the report."""
    positive(episodes, "--episodes")
    trainer = open_run(path)
    written = write_run_report(
        trainer, out, episodes=episodes, seed=seed, horizon=horizon
    )
    for verdict in written.verdicts.values():
        if verdict:
            say(verdict)
    say(str(written.path))


def play(path: str, *, out: str | None, real_only: bool, **settings: float) -> None:
    """Film the policy."""
    trainer = open_run(path)
    film = Path(out) if out else trainer.run.path / "film.gif"
    both = film_policy(trainer, film, real_only=real_only, **settings)
    if not both and not real_only:
        say(
            f"The real env alone: nothing is known that draws {trainer.config.env} from its "
            f"observations, and with it what is imagined."
        )
    say(str(film))


def positive(value: int, name: str) -> None:
    """Refuse counts below one."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
