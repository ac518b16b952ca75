"""Learning curves of the recipes, over seeds.

    python benchmarks/learning.py run pets-cartpole pets-pendulum --workers 2
    python benchmarks/learning.py report

``run`` trains the recipes, a process and a thread for each seed, and writes a CSV for each
experiment into ``docs/benchmarks/learning/``; ``report`` draws the figures and prints the
tables from those files alone. What is there already is not run again.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchrl_wm.cli.demo import PLANS, SETTINGS as PENDULUM_BY_PETS

OUT = Path(__file__).parents[1] / "docs" / "benchmarks" / "learning"
CARTPOLE = "torchrl_wm/ContinuousCartPole-v0"


@dataclass(frozen=True)
class Experiment:
    """One recipe on one task.

    Args:
        recipe: its name.
        settings: of its config; the defaults where not named.
        seeds: how many.
    """

    recipe: str
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: int = 5


# SAC is the MBPO recipe without a model: TorchRL's Trainer, Collector, SACLoss and SoftUpdate.
SAC = {"real_share": 1.0}
POLICY = {"policy_hidden": (64, 64), "learning_rate": 1e-3}
INVERTED = {
    **POLICY,
    "env": "InvertedPendulum-v5",
    "termination": "inverted_pendulum",
    "reward": "inverted_pendulum",
    "stop_return": 950.0,
    "evaluation_interval": 125,
    "updates_per_step": 20,
}
# Long rollouts: the dynamics of a cart and a pole are soon known well.
INVERTED_MODEL = {
    "horizon_schedule": (0, 0, 15, 15),
    "rollouts": 150,
    "model_interval": 125,
    "model_steps": 400,
}
PENDULUM = {
    **POLICY,
    "env": "Pendulum-v1",
    "termination": "none",
    "random_steps": 400,
    "random_hold": 10,
    "evaluation_interval": 100,
    "evaluation_episodes": 10,
    "stop_return": -200.0,
    "updates_per_step": 20,
}
PENDULUM_MODEL = {
    "horizon_schedule": (0, 0, 10, 10),
    "rollouts": 200,
    "model_interval": 100,
    "model_steps": 400,
}
CHEETAH = {
    "env": "HalfCheetah-v5",
    "termination": "none",
    "random_steps": 1000,
    "steps": 5000,
    "evaluation_interval": 500,
    "evaluation_episodes": 3,
    "learning_rate": 1e-3,
    "updates_per_step": 20,
}
CHEETAH_MODEL = {
    "hidden": (200, 200, 200),
    "horizon_schedule": (0, 0, 1, 1),
    "model_steps": 600,
}
ONE_UPDATE = {**SAC, "updates_per_step": 1}
# TD-MPC2's authors train for 100k env steps with an action repeat of 2.
SUITE = {
    "compile": True,
    "action_repeat": 2,
    "termination": "none",
    "steps": 50_000,
    "evaluation_interval": 5000,
    "evaluation_episodes": 5,
}

PIXELS: dict[str, Any] = {
    "env": "Pendulum-v1",
    "pixels": 32,
    "pixels_only": True,
    "termination": "none",
    "compile": True,
    # For its first thousand updates the model decodes nothing of the pendulum.
    "train_ratio": 256.0,
    "random_hold": 10,
    "steps": 10_000,
    "evaluation_interval": 1000,
    "evaluation_episodes": 5,
}

EXPERIMENTS: dict[str, Experiment] = {
    "pets-cartpole": Experiment(
        "pets",
        {
            **PLANS,
            "env": CARTPOLE,
            "termination": "cartpole",
            "planning_horizon": 20,
            "trials": 5,
        },
    ),
    "pets-cartpole-learned": Experiment(
        "pets",
        {
            "env": CARTPOLE,
            "num_candidates": 200,
            "optim_steps": 2,
            "num_particles": 3,
            "planning_horizon": 20,
            "trials": 8,
        },
    ),
    "pets-pendulum": Experiment("pets", {**PENDULUM_BY_PETS, "trials": 8}),
    "mbpo-inverted-pendulum": Experiment("mbpo", {**INVERTED, **INVERTED_MODEL}),
    "sac-inverted-pendulum-same-updates": Experiment(
        "mbpo", {**INVERTED, **SAC, "steps": 2000}
    ),
    "sac-inverted-pendulum-one-update": Experiment(
        "mbpo", {**INVERTED, **ONE_UPDATE, "steps": 5000}
    ),
    "mbpo-pendulum": Experiment("mbpo", {**PENDULUM, **PENDULUM_MODEL}),
    "sac-pendulum-same-updates": Experiment("mbpo", {**PENDULUM, **SAC}),
    "sac-pendulum-one-update": Experiment(
        "mbpo", {**PENDULUM, **ONE_UPDATE, "steps": 3000}
    ),
    "tdmpc2-cartpole-swingup": Experiment(
        "tdmpc2", {"env": "dm_control/cartpole/swingup", **SUITE}, seeds=3
    ),
    "tdmpc2-pendulum-swingup": Experiment(
        "tdmpc2", {"env": "dm_control/pendulum/swingup", **SUITE}, seeds=1
    ),
    "tdmpc2-walker-walk": Experiment(
        "tdmpc2", {"env": "dm_control/walker/walk", **SUITE}, seeds=1
    ),
    "tdmpc2-pendulum": Experiment(
        "tdmpc2",
        {
            "env": "Pendulum-v1",
            "compile": True,
            "termination": "none",
            "random_hold": 10,
            # With 0.975, as episodes of 200 steps have by default, hanging at an angle with full
            # torque is worth nearly as much as swinging up.
            "gamma": 0.99,
            "steps": 5000,
            "evaluation_interval": 500,
            "evaluation_episodes": 10,
        },
    ),
    "tdmpc2-inverted-pendulum": Experiment(
        "tdmpc2",
        {
            "env": "InvertedPendulum-v5",
            "compile": True,
            "steps": 5000,
            "evaluation_interval": 500,
            "evaluation_episodes": 5,
            "stop_return": 950.0,
        },
    ),
    "tdmpc2-cartpole": Experiment(
        "tdmpc2",
        {
            "env": "CartPole-v1",
            "compile": True,
            "steps": 5000,
            "evaluation_interval": 500,
            "evaluation_episodes": 5,
        },
    ),
    "dreamer-cartpole": Experiment(
        "dreamer",
        {
            "env": "CartPole-v1",
            "compile": True,
            "train_ratio": 256.0,
            "entropy_weight": 3e-3,
            "steps": 10_000,
            "evaluation_interval": 1000,
            "evaluation_episodes": 10,
        },
    ),
    "dreamer-pendulum": Experiment(
        "dreamer",
        {
            "env": "Pendulum-v1",
            "compile": True,
            "random_hold": 10,
            "steps": 6000,
            "evaluation_interval": 1000,
            "evaluation_episodes": 10,
        },
    ),
    "dreamer-cartpole-swingup": Experiment(
        "dreamer",
        {
            "env": "dm_control/cartpole/swingup",
            "action_repeat": 2,
            "compile": True,
            "train_ratio": 256.0,
            "random_hold": 5,
            "steps": 25_000,
            "random_steps": 1000,
            "evaluation_interval": 2500,
            "evaluation_episodes": 5,
        },
        seeds=3,
    ),
    "dreamer-pendulum-pixels": Experiment("dreamer", PIXELS, seeds=1),
    "dreamer-pendulum-pixels-stored": Experiment(
        "dreamer", {**PIXELS, "sequence_start": "stored"}, seeds=1
    ),
    "planet-pendulum": Experiment(
        "planet",
        {
            "env": "Pendulum-v1",
            "termination": "none",
            "random_hold": 10,
            "steps": 6000,
            "random_steps": 3000,
            # The paper's 12 steps repeat each action four times; 12 of Pendulum's do not swing up.
            "planning_horizon": 24,
            "evaluation_interval": 1000,
            "evaluation_episodes": 3,
        },
        seeds=3,
    ),
    "mbpo-half-cheetah": Experiment("mbpo", {**CHEETAH, **CHEETAH_MODEL}, seeds=1),
    "sac-half-cheetah-same-updates": Experiment("mbpo", {**CHEETAH, **SAC}, seeds=1),
    "sac-half-cheetah-one-update": Experiment(
        "mbpo", {**CHEETAH, **ONE_UPDATE}, seeds=1
    ),
}


# Running -----------------------------------------------------------------------


def train(name: str, seed: int) -> None:
    """Train one seed, and write its rows beside those of the others."""
    import torch

    from torchrl_wm.trainers import trainer_class

    torch.set_num_threads(1)
    experiment = EXPERIMENTS[name]
    trainer = trainer_class(experiment.recipe)(**experiment.settings, seed=seed)
    if experiment.recipe == "tdmpc2":
        trainer.register_op("post_steps", lambda: evaluate_prior(trainer))
    path = part(name, seed)
    begun = path.with_suffix(".begun")  # left behind by a run that is stopped
    trainer.register_op("post_steps", lambda: show(trainer, seed, begun))
    trainer.train()
    write_rows(trainer, seed, path)
    begun.unlink(missing_ok=True)
    if "pixels" in experiment.settings:
        save_dreams(name, trainer)


def write_rows(trainer: Any, seed: int, path: Path) -> None:
    """Write the metrics so far."""
    rows = [
        {"seed": seed, **row, "cpu": round(time.process_time())}
        for row in trainer.metrics
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        out = csv.DictWriter(file, names)
        out.writeheader()
        out.writerows(rows)


def save_dreams(name: str, trainer: Any) -> None:
    """Write what the model dreams of an episode of the policy, 25 steps from four moments."""
    from torchrl_wm.diagnostics import open_loop_video, save_video

    film = open_loop_video(trainer.recipe.diagnosed_env(), trainer.evaluate(1), 25)
    save_video(OUT / f"{name.replace('-', '_')}_dreams.gif", film, fps=10)


def evaluate_prior(trainer: Any) -> None:
    """Evaluate TD-MPC2's policy without a plan wherever the planner has been evaluated."""
    from torchrl_wm.trainers import episode_return, run_episodes

    row = next((r for r in trainer.metrics[::-1] if "evaluation_return" in r), {})
    if row.get("step") != trainer.collected_frames or "policy_return" in row:
        return
    episodes = trainer.config.evaluation_episodes
    env, first = trainer.make_env(), 1_000_000  # as in the planner's evaluations
    actor = trainer.recipe.actor
    played = run_episodes(env, actor, episodes, first_episode=first)
    returns = [episode_return(env, episode) for episode in played]
    row["policy_return"] = sum(returns) / episodes


def show(trainer: Any, seed: int, path: Path) -> None:
    """Print the evaluation of this step, if there was one, and write the rows so far."""
    # Episodes may have ended at the same step, after the evaluation.
    rows = [r for r in trainer.metrics if r["step"] == trainer.collected_frames]
    for row in (r for r in rows if "evaluation_return" in r):
        write_rows(trainer, seed, path)
        say(", ".join(f"{name} {value:.0f}" for name, value in row.items()))


def part(name: str, seed: int) -> Path:
    return OUT / "seeds" / f"{name}-{seed}.csv"


def run(names: list[str], workers: int, seeds: int | None) -> None:
    """Run what is not there yet, some seeds at a time."""
    jobs = [
        (name, seed)
        for name in names
        for seed in range(seeds or EXPERIMENTS[name].seeds)
        if not part(name, seed).exists()
    ]
    running: list[tuple[tuple[str, int], subprocess.Popen]] = []
    failed = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    while jobs or running:
        while jobs and len(running) < workers:
            name, seed = job = jobs.pop(0)
            command = [sys.executable, __file__, "train", name, str(seed)]
            running.append((job, subprocess.Popen(command, env=environment)))
        time.sleep(1)
        for entry in list(running):
            job, process = entry
            if process.poll() is not None:
                running.remove(entry)
                say(
                    f"{job[0]} seed {job[1]}: {'done' if not process.returncode else 'FAILED'}"
                )
                failed += [job] if process.returncode else []
    if failed:
        sys.exit(f"failed: {failed}")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# Reporting -----------------------------------------------------------------------


def rows_of(name: str) -> dict[int, list[dict[str, str]]]:
    """What the seeds of an experiment wrote."""
    found = {}
    for path in sorted((OUT / "seeds").glob(f"{name}-*.csv")):
        seed = path.stem[len(name) + 1 :]
        if seed.isdigit():  # else of an experiment whose name begins alike
            with open(path, newline="") as file:
                found[int(seed)] = list(csv.DictReader(file))
    return found


def curves(name: str, column: str) -> dict[int, list[tuple[float, float]]]:
    """``(step, value)`` by seed."""
    return {
        seed: [(float(r["step"]), float(r[column])) for r in rows if r.get(column)]
        for seed, rows in rows_of(name).items()
    }


def walls(name: str) -> list[float]:
    """The seconds that each seed took."""
    return [float(rows[-1]["seconds"]) for rows in rows_of(name).values()]


def planned(name: str) -> dict[int, list[float]]:
    """The returns of the trials after the random ones, by seed.

    The random phase counts as the first trial, whatever number of short episodes it had.
    """
    return {
        seed: [float(row["return"]) for row in rows if row["random"] == "0"]
        for seed, rows in rows_of(name).items()
    }


def first_trial(returns: list[float], level: float) -> int | None:
    """The first planned trial that reaches a return; the random phase is trial 1."""
    return next((i + 2 for i, r in enumerate(returns) if r >= level), None)


def true_dynamics(seed: int, episodes: list[int]) -> list[float]:
    """Returns of planning with Pendulum's true dynamics, from the starts of a run's trials."""
    import torch
    from tensordict.nn import TensorDictModule as Mod
    from torch import nn

    from torchrl_wm import WorldModel, WorldModelEnv
    from torchrl_wm.planners import ICEMPlanner
    from torchrl_wm.trainers import episode_return, make_real_env, run_episodes
    from torchrl_wm.trainers.known_tasks import pendulum_reward

    class Pendulum(nn.Module):
        def forward(self, observation, action):
            cos, sin, velocity = observation.unbind(-1)
            torque = action[..., 0].clamp(-2, 2)
            velocity = (velocity + (15 * sin + 3 * torque) * 0.05).clamp(-8, 8)
            angle = torch.atan2(sin, cos) + velocity * 0.05
            return torch.stack([angle.cos(), angle.sin(), velocity], -1)

    torch.manual_seed(seed)
    env = make_real_env("Pendulum-v1", seed=seed)
    inputs = ["observation", "action"]
    model = WorldModel(
        Mod(nn.Identity(), ["observation"], ["observation"]),
        Mod(Pendulum(), inputs, [("next", "observation")]),
        Mod(
            lambda o, a: pendulum_reward(o, a, o).unsqueeze(-1),
            inputs,
            [("next", "reward")],
        ),
    )
    planner = ICEMPlanner(
        WorldModelEnv(model, env), 40, 4, 300, 30, noise_beta=2.0, warm_start=True
    )
    returns = []
    for episode in episodes:
        (played,) = run_episodes(env, planner, 1, first_episode=episode)
        returns.append(episode_return(env, played))
    return returns


def optimum() -> None:
    """Write what true-dynamics planning reaches from the starts of pets-pendulum's trials."""
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / "pendulum_true_dynamics.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["seed", "trial", "return"])
        for seed in range(EXPERIMENTS["pets-pendulum"].seeds):
            trials = range(3, 11)
            returns = true_dynamics(seed, [trial - 1 for trial in trials])
            out.writerows([seed, trial, value] for trial, value in zip(trials, returns))


def figure(title: str, column: str, names: dict[str, str], y: str, level: float | None):
    """Curves by experiment: thin lines for seeds, a thick one for their median."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.5, 4), layout="constrained")
    axes = drawn.add_subplot()
    for number, (name, label) in enumerate(names.items()):
        found, color = curves(name, column), f"C{number}"
        for curve in found.values():
            axes.plot(*zip(*curve), color=color, alpha=0.25, lw=0.8)
        steps = sorted({step for curve in found.values() for step, _ in curve})
        medians = []
        for step in steps:
            # A run that ended at the level counts with what it reached.
            reached = [[v for s, v in curve if s <= step] for curve in found.values()]
            values = sorted(past[-1] for past in reached if past)
            if len(values) > len(found) / 2:
                medians.append((step, values[len(values) // 2]))
        if medians:
            axes.plot(
                *zip(*medians),
                color=color,
                lw=2,
                label=f"{label} ({len(found)} seed{'s' * (len(found) > 1)})",
            )
    if level is not None:
        axes.axhline(level, color="0.6", ls=":", lw=1)
    axes.set(title=title, xlabel="real steps", ylabel=y)
    axes.legend(fontsize="small")
    return drawn


def trials_figure(title: str, names: dict[str, str], first: int, level: float | None):
    """Returns by trial, from the ``first`` one in which the planner acted."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.5, 4), layout="constrained")
    axes = drawn.add_subplot()
    for number, (name, label) in enumerate(names.items()):
        for i, returns in enumerate(planned(name).values()):
            axes.plot(
                range(first, first + len(returns)),
                returns,
                color=f"C{number}",
                alpha=0.5,
                lw=1,
                marker=".",
                label=f"{label}" if not i else None,
            )
    if level is not None:
        axes.axhline(level, color="0.6", ls=":", lw=1)
    axes.set(title=title, xlabel="trial", ylabel="return")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small")
    return drawn


def pendulum_figure():
    """Returns by trial beside those of planning with the true dynamics."""
    drawn = trials_figure(
        "PETS on Pendulum-v1", {"pets-pendulum": "PETS, reward learned"}, 3, None
    )
    (axes,) = drawn.axes
    for seed, returns in true_returns().items():
        label = None if seed else "true dynamics, from the same starts"
        axes.plot(range(3, 3 + len(returns)), returns, "kx", ms=4, label=label)
    axes.legend(fontsize="small")
    return drawn


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def cartpole_table() -> str:
    rows = []
    for name in ("pets-cartpole", "pets-cartpole-learned"):
        returns_of = planned(name)
        for seed, written in rows_of(name).items():
            returns = returns_of[seed]
            first = first_trial(returns, 200)
            reached = (r["seconds"] for r in written if float(r["return"]) >= 200)
            wall = next((f"{float(seconds):.0f}" for seconds in reached), "-")
            after = returns[(first or 1) - 2 :] if first else []
            rows.append(
                [
                    name,
                    seed,
                    first or "-",
                    wall,
                    f"{sum(r >= 200 for r in after)} of {len(after)}" if first else "-",
                    " ".join(f"{r:.0f}" for r in returns),
                ]
            )
    header = [
        "experiment",
        "seed",
        "200 by trial",
        "seconds until then",
        "kept",
        "returns of trials 2, 3, ...",
    ]
    return table(header, rows)


def true_returns() -> dict[int, list[float]]:
    """What :func:`optimum` wrote, by seed."""
    best: dict[int, list[float]] = {}
    with open(OUT / "pendulum_true_dynamics.csv", newline="") as file:
        for row in csv.DictReader(file):
            best.setdefault(int(row["seed"]), []).append(float(row["return"]))
    return best


def pendulum_table() -> str:
    best, rows = true_returns(), []
    seconds = walls("pets-pendulum")
    for (seed, mine), wall in zip(planned("pets-pendulum").items(), seconds):
        mean, top = sum(mine) / len(mine), sum(best[seed]) / len(best[seed])
        shown = (f"{value:.0f}" for value in (mean, top, top - mean, wall))
        rows.append([seed, *shown])
    header = [
        "seed",
        "mean return of trials 3 to 10",
        "true dynamics",
        "difference",
        "seconds, all 10 trials",
    ]
    return table(header, rows)


def steps_table(names: dict[str, str], level: float) -> str:
    rows = []
    for name, label in names.items():
        found = []
        for curve in curves(name, "evaluation_return").values():
            reached = (f"{step:.0f}" for step, value in curve if value >= level)
            found.append(next(reached, f"> {curve[-1][0]:.0f}"))
        if not found:
            continue
        shown = ", ".join(found)
        seconds = sorted(walls(name))
        rows.append([label, shown, f"{seconds[len(seconds) // 2]:.0f}"])
    return table(
        ["recipe", f"real steps to {level:.0f}, by seed", "seconds a run (median)"],
        rows,
    )


def evaluations_table(name: str, level: float) -> str:
    """When each seed reached a return, and all its evaluations."""
    rows = []
    found = curves(name, "evaluation_return")
    for (seed, curve), seconds in zip(found.items(), cpu_seconds(name)):
        first = next((f"{step:.0f}" for step, value in curve if value >= level), "-")
        shown = " ".join(f"{value:.0f}" for _, value in curve)
        rows.append([seed, first, shown, f"{curve[-1][0]:.0f}", f"{seconds:.0f}"])
    header = [
        "seed",
        f"{level:.0f} by step",
        "evaluations",
        "real steps",
        "CPU seconds",
    ]
    return table(header, rows)


def last_table(names: dict[str, str]) -> str:
    """The last evaluation of each seed."""
    rows = []
    for name, label in names.items():
        found = curves(name, "evaluation_return")
        for (seed, curve), seconds in zip(found.items(), walls(name)):
            step, value = curve[-1]
            shown = (f"{number:.0f}" for number in (step, value, seconds))
            rows.append([label, seed, *shown])
    header = ["recipe", "seed", "real steps", "mean return then", "seconds"]
    return table(header, rows)


def planner_and_policy_table(name: str) -> str:
    """The last evaluation of TD-MPC2's planner and of its policy without a plan, by seed."""
    planner, policy = (curves(name, column) for column in ACTORS)
    rows = []
    for (seed, curve), seconds in zip(planner.items(), cpu_seconds(name)):
        numbers = (*curve[-1], policy[seed][-1][1], seconds)
        rows.append([seed, *(f"{number:.0f}" for number in numbers)])
    header = ["seed", "real steps", "planner", "policy without a plan", "CPU seconds"]
    return table(header, rows)


#: The columns of TD-MPC2's evaluations: with a plan, and by the policy without one.
ACTORS = ("evaluation_return", "policy_return")


def cpu_seconds(name: str) -> list[float]:
    """The seconds of the processor that each seed took."""
    return [float(rows[-1]["cpu"]) for rows in rows_of(name).values()]


def planner_and_policy_figure(title: str, name: str, y: str, level: float):
    """Curves of the planner and of the policy without a plan, by seed."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.5, 4), layout="constrained")
    axes = drawn.add_subplot()
    for number, column in enumerate(ACTORS):
        for i, curve in enumerate(curves(name, column).values()):
            shown = ("planner", "policy without a plan")[number]
            axes.plot(
                *zip(*curve),
                color=f"C{number}",
                lw=1,
                marker=".",
                alpha=0.7,
                label=None if i else shown,
            )
    axes.axhline(level, color="0.6", ls=":", lw=1)
    axes.set(title=title, xlabel="real steps", ylabel=y)
    axes.legend(fontsize="small")
    return drawn


@dataclass(frozen=True)
class Suite:
    """Tasks of dm_control, action repeat 2, on which a recipe's authors published their curves.

    Args:
        recipe: the recipe; its experiments are ``<recipe>-<task>``.
        tasks: the tasks, by the names of the published file.
        env_steps: at how many steps of the env a published return is compared.
        sizes: how many parameters our model has, and how many theirs.
    """

    recipe: str
    tasks: tuple[str, ...]
    env_steps: int
    sizes: tuple[str, str]

    def ours(self, task: str) -> dict[int, list[tuple[float, float]]]:
        """``(env step, return)`` by seed, as recorded."""
        found = curves(f"{self.recipe}-{task}", "evaluation_return")
        return {
            seed: [(2 * step, value) for step, value in curve]
            for seed, curve in found.items()
        }

    def published(self, task: str) -> dict[int, list[tuple[float, float]]]:
        """``(env step, return)`` by seed, of the results in the repository of the authors."""
        found: dict[int, list[tuple[float, float]]] = {}
        with open(OUT / f"{self.recipe}_published.csv", newline="") as file:
            for row in csv.DictReader(file):
                if row["task"] == task:
                    point = float(row["env_step"]), float(row["return"])
                    found.setdefault(int(row["seed"]), []).append(point)
        return found

    def published_then(self, task: str) -> list[float]:
        """The returns of the authors' seeds at the step of the comparison."""
        return [dict(curve)[self.env_steps] for curve in self.published(task).values()]

    def table(self) -> str:
        """The last evaluation of each seed beside the published ones."""
        rows = []
        for task in self.tasks:
            theirs = ", ".join(f"{value:.0f}" for value in self.published_then(task))
            seconds = cpu_seconds(f"{self.recipe}-{task}")
            for (seed, curve), cpu in zip(self.ours(task).items(), seconds):
                numbers = (f"{number:.0f}" for number in (*curve[-1], cpu))
                rows.append([task, seed, *numbers, theirs])
        header = ["task", "seed", "env steps", "return", "CPU seconds"]
        return table([*header, f"authors, {self.env_steps:,}"], rows)

    def figure(self) -> Any:
        """Our curves by seed, and the published ones, over env steps."""
        from matplotlib.figure import Figure

        there = [task for task in self.tasks if self.ours(task)]
        drawn = Figure(figsize=(4.5 * len(there), 3.6), layout="constrained")
        all_axes = drawn.subplots(1, len(there), squeeze=False)[0]
        for axes, task in zip(all_axes, there):
            for by, style, lw, found in (
                (f"ours, {self.sizes[0]}", "C0.-", 1, self.ours(task)),
                (f"authors, {self.sizes[1]}", "kx--", 0.7, self.published(task)),
            ):
                for i, curve in enumerate(found.values()):
                    axes.plot(*zip(*curve), style, lw=lw, label=None if i else by)
            axes.set(title=task, xlabel="env steps", ylabel="return", ylim=(0, 1000))
            axes.set_xlim(0, 105_000)
            axes.legend(fontsize="small")
        return drawn

    @property
    def report(self) -> tuple[Callable[[], str], Callable[[], Any]]:
        return self.table, self.figure


TDMPC2_SUITE = Suite(
    "tdmpc2",
    ("cartpole-swingup", "pendulum-swingup", "walker-walk"),
    100_000,
    ("0.2 M", "5 M"),
)
DREAMER_SUITE = Suite("dreamer", ("cartpole-swingup",), 50_000, ("0.3 M", "1 M"))


def label(task: str) -> dict[str, str]:
    return {
        f"mbpo-{task}": "MBPO",
        f"sac-{task}-same-updates": "SAC, as many updates",
        f"sac-{task}-one-update": "SAC, one update a step",
    }


def evaluations_report(
    name: str, title: str, level: float, episodes: int
) -> dict[str, tuple[Callable[[], str], Callable[[], Any]]]:
    """The report of an experiment whose runs go on to their last step, by its name."""
    recipe, task = name.split("-", 1)

    def draw() -> Any:
        y = f"mean return of {episodes} episodes"
        return figure(title, "evaluation_return", {name: title.split()[0]}, y, level)

    file = f"{task.replace('-', '_')}_{recipe}"
    return {file: (lambda: evaluations_table(name, level), draw)}


REPORTS: dict[str, tuple[Callable[[], str], Callable[[], Any]]] = {
    "pendulum_tdmpc2": (
        lambda: planner_and_policy_table("tdmpc2-pendulum"),
        lambda: planner_and_policy_figure(
            "TD-MPC2 on Pendulum-v1",
            "tdmpc2-pendulum",
            "mean return of 10 episodes",
            -250,
        ),
    ),
    "inverted_pendulum_tdmpc2": (
        lambda: steps_table({"tdmpc2-inverted-pendulum": "TD-MPC2"}, 950),
        lambda: figure(
            "TD-MPC2 on InvertedPendulum-v5",
            "evaluation_return",
            {"tdmpc2-inverted-pendulum": "TD-MPC2"},
            "mean return of 5 episodes",
            950,
        ),
    ),
    "suite_tdmpc2": TDMPC2_SUITE.report,
    "suite_dreamer": DREAMER_SUITE.report,
    "cartpole_tdmpc2": (
        lambda: planner_and_policy_table("tdmpc2-cartpole"),
        lambda: planner_and_policy_figure(
            "TD-MPC2 on CartPole-v1",
            "tdmpc2-cartpole",
            "mean return of 5 episodes",
            475,
        ),
    ),
    **evaluations_report("dreamer-cartpole", "Dreamer on CartPole-v1", 475, 10),
    **evaluations_report("dreamer-pendulum", "Dreamer on Pendulum-v1", -250, 10),
    **evaluations_report(
        "dreamer-pendulum-pixels", "Dreamer on Pendulum-v1 from images", -250, 5
    ),
    **evaluations_report(
        "dreamer-pendulum-pixels-stored",
        "Dreamer on Pendulum-v1 from images, with stored latents",
        -250,
        5,
    ),
    **evaluations_report("planet-pendulum", "PlaNet on Pendulum-v1", -300, 3),
    "cartpole": (
        cartpole_table,
        lambda: trials_figure(
            "PETS on continuous CartPole",
            {
                "pets-cartpole": "termination given",
                "pets-cartpole-learned": "nothing given",
            },
            2,
            200,
        ),
    ),
    "pendulum_pets": (
        pendulum_table,
        pendulum_figure,
    ),
    "inverted_pendulum": (
        lambda: steps_table(label("inverted-pendulum"), 950),
        lambda: figure(
            "InvertedPendulum-v5",
            "evaluation_return",
            label("inverted-pendulum"),
            "mean return of 5 episodes",
            950,
        ),
    ),
    "pendulum_mbpo": (
        lambda: steps_table(label("pendulum"), -200),
        lambda: figure(
            "Pendulum-v1",
            "evaluation_return",
            label("pendulum"),
            "mean return of 10 episodes",
            -200,
        ),
    ),
    "half_cheetah": (
        lambda: last_table(label("half-cheetah")),
        lambda: figure(
            "HalfCheetah-v5",
            "evaluation_return",
            label("half-cheetah"),
            "mean return of 3 episodes",
            None,
        ),
    ),
}


def report(names: list[str]) -> None:
    for name in names or REPORTS:
        make_table, make_figure = REPORTS[name]
        try:
            text = make_table()
        except FileNotFoundError as err:
            say(f"{name}: {err}")
            continue
        if text.count("\n") < 3:
            say(f"{name}: has not been run")
            continue
        make_figure().savefig(OUT / f"{name}.png", dpi=110)
        (OUT / f"{name}.md").write_text(text)
        say(f"\n{name}\n{text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("names", nargs="+", choices=EXPERIMENTS)
    running.add_argument("--workers", type=int, default=2)
    running.add_argument("--seeds", type=int)
    training = commands.add_parser("train")
    training.add_argument("name", choices=EXPERIMENTS)
    training.add_argument("seed", type=int)
    commands.add_parser("optimum")
    reporting = commands.add_parser("report")
    reporting.add_argument("names", nargs="*")
    args = parser.parse_args()
    if args.command == "run":
        run(args.names, args.workers, args.seeds)
    elif args.command == "train":
        train(args.name, args.seed)
    elif args.command == "optimum":
        optimum()
    else:
        report(args.names)


if __name__ == "__main__":
    main()
