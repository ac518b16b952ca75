"""PETS: probabilistic ensembles with trajectory sampling (arXiv 1805.12114)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules import with_propagation
from torchrl_wm.modules.keys import join
from torchrl_wm.planners import CEMPlanner, ICEMPlanner
from torchrl_wm.planners.base import MPCPlanner
from torchrl_wm.trainers.env_checks import check_action
from torchrl_wm.trainers.recipes.ensemble import EnsembleRecipe, EnsembleRunConfig
from torchrl_wm.trainers.settings import AtLeast
from torchrl_wm.trainers.steps import Steps


@dataclass(frozen=True, kw_only=True)
class PETSConfig(EnsembleRunConfig):
    """The settings of :class:`PETS`.

    Args:
        trials: how many episodes to plan, after the random ones; 10 if neither trials nor steps
            is given.
        model_steps: how many gradient steps each training of the model takes.
        first_model_steps: how many the first training takes, which is on the random steps;
            None for as many as the others.
        model_interval: how many real steps pass between two trainings within a trial; None to
            train only after each trial.
        planner: the method that improves plans.
        planning_horizon: how many steps a plan has.
        optim_steps: how many times the candidates are improved at each real step.
        num_candidates: how many plans are tried at the first iteration.
        top_k: how many of the best plans the next candidates are drawn from.
        num_particles: how many times each plan is imagined.
        propagation: how plans are imagined: "ts1" draws a member of the ensemble at each
            step, "tsinf" one for each particle, "expectation" averages the members' Gaussians,
            and "mean" also leaves out their noise.
        noise_beta: how slowly the random actions of iCEM's plans vary over time; 0 is white
            noise.
    """

    trials: Annotated[int, AtLeast(1)] | None = None
    model_steps: Annotated[int, AtLeast(1)] = 500
    first_model_steps: Annotated[int, AtLeast(1)] | None = None
    model_interval: Annotated[int, AtLeast(1)] | None = None
    planner: Literal["icem", "cem"] = "icem"
    planning_horizon: int = 25
    optim_steps: int = 3
    num_candidates: int = 150
    top_k: int = 15
    num_particles: Annotated[int, AtLeast(1)] = 5
    propagation: Literal["ts1", "tsinf", "expectation", "mean"] = "ts1"
    noise_beta: float = 2.0

    ENDS = ("steps", "stop_return", "trials")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trials is None and self.steps is None:
            object.__setattr__(self, "trials", 10)

    def lengthened(self, ends: dict[str, Any]) -> PETSConfig:
        # A new number of steps replaces the number of trials, and the reverse.
        if "steps" in ends and "trials" not in ends:
            ends = {**ends, "trials": None}
        if "trials" in ends and "steps" not in ends:
            ends = {**ends, "steps": None}
        return super().lengthened(ends)


class PETS(EnsembleRecipe):
    """Learn an ensemble trial by trial, and act by planning through it.

    Args:
        config: the settings.
        env: the real env.

    Keyword Args:
        reward_function, termination_function: known functions
            ``f(observation, action, next_observation)``, in place of the config's.

    Attributes:
        world_model: the ensemble.
        imagined_env: the env that the planner imagines in.
        policy: the planner.
    """

    name = "pets"
    config_class = PETSConfig
    config: PETSConfig
    acts_in_model = False
    # A planner imagines as in training: where the members disagree, plans are uncertain.
    evaluation_exploration = ExplorationType.RANDOM

    def __init__(self, config: PETSConfig, env: EnvBase, **functions: Any) -> None:
        # The dynamics: a bootstrap ensemble of probabilistic networks.
        super().__init__(config, env, **functions)
        check_action(env)
        # Trajectory sampling: particles, each by members of the ensemble.
        self.imagined_env = WorldModelEnv(
            with_propagation(self.world_model, config.propagation, all_members=False),
            env,
        )
        # Actions: the first of the best plan found, the plan kept for the next step.
        self.policy = make_planner(self.imagined_env, config)
        self.parts = {"learner": self.learner, "replay": self.replay}

    def learn(self, steps: Steps) -> dict[str, torch.Tensor]:
        """Make a step of Algorithm 1.

        The trainer runs the rest of its loop: the data D begin with random trials; at each
        step the planner optimises action sequences by CEM over particles (lines 6 to 8), the
        first action is executed (line 9), and the outcome is recorded in D (line 10).
        """
        config = self.config
        # Line 4: train the dynamics on D, after each trial ...
        is_due = steps.ended.any()
        # ... and within trials, which the paper does not.
        if config.model_interval is not None:
            within = steps.lengths % config.model_interval == 0
            is_due |= (within & ~steps.random).any()
        if not is_due:
            return {}
        first = None if self.learner.steps else config.first_model_steps
        return self.fit_model(first or config.model_steps)

    def is_over(self, metrics: list[dict[str, Any]]) -> bool:
        """Return whether all trials have been planned."""
        trials = self.config.trials
        return trials is not None and planned_trials(metrics) >= trials

    def expected_steps(self, metrics: list[dict[str, Any]], total: int) -> int | None:
        if self.config.trials is None:
            return self.config.steps
        lengths = [row["length"] for row in metrics if "length" in row]
        left = self.config.trials - planned_trials(metrics)
        return total + left * max(lengths or [self.config.random_steps])


def planned_trials(metrics: list[dict[str, Any]]) -> int:
    """Return how many of the finished episodes were planned."""
    return sum(1 - row["random"] for row in metrics if "random" in row)


def make_planner(env: WorldModelEnv, config: PETSConfig) -> MPCPlanner:
    """Return the planner of a config."""
    settings = {
        "planning_horizon": config.planning_horizon,
        "optim_steps": config.optim_steps,
        "num_candidates": config.num_candidates,
        "top_k": config.top_k,
        "num_particles": config.num_particles,
        "reward_key": join("next", env.reward_key),
        "action_key": env.action_key,
        "warm_start": True,
    }
    if config.planner == "icem":
        return ICEMPlanner(env, **settings, noise_beta=config.noise_beta)
    return CEMPlanner(env, **settings)
