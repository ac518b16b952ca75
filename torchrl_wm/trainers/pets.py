"""PETS: probabilistic ensembles with trajectory sampling (arXiv 1805.12114)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tensordict import TensorDictBase
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.utils import ExplorationType

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules import with_propagation
from torchrl_wm.modules.keys import join
from torchrl_wm.planners import CEMPlanner, ICEMPlanner
from torchrl_wm.planners.base import MPCPlanner
from torchrl_wm.trainers.env_checks import check_planned_action
from torchrl_wm.trainers.functions import Function
from torchrl_wm.trainers.real_envs import EnvSource
from torchrl_wm.trainers.recipe import BufferPart, RecipeConfig, RecipeTrainer
from torchrl_wm.trainers.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class PETSConfig(RecipeConfig):
    """The settings of :class:`PETSTrainer`.

    Args:
        trials: how many episodes to plan, after the random ones.
        model_steps: how many gradient steps each training of the model takes.
        first_model_steps: how many the first training takes, which is on the random steps;
            None for as many as the others.
        model_interval: how many real steps pass between two trainings within a trial; None to
            train after each trial alone.
        planner: the method that improves plans.
        planning_horizon: how many steps a plan has.
        optim_steps: how often the candidates are improved at each real step.
        num_candidates: how many plans are tried at the first iteration.
        top_k: how many of the best plans the next ones are drawn after.
        num_particles: how often each plan is imagined.
        propagation: how plans are imagined: "ts1" draws a member of the ensemble anew at each
            step, "tsinf" one for each particle, "expectation" averages the members' Gaussians,
            and "mean" leaves their noise out, too.
        noise_beta: how slowly the random actions of iCEM's plans vary over time; 0 is white
            noise.
    """

    trials: int = 10
    model_steps: int = 500
    first_model_steps: int | None = None
    model_interval: int | None = None
    planner: Literal["icem", "cem"] = "icem"
    planning_horizon: int = 25
    optim_steps: int = 3
    num_candidates: int = 150
    top_k: int = 15
    num_particles: int = 5
    propagation: Literal["ts1", "tsinf", "expectation", "mean"] = "ts1"
    noise_beta: float = 2.0

    @classmethod
    def minima(cls) -> dict[str, float]:
        positive = (
            "trials",
            "model_steps",
            "first_model_steps",
            "model_interval",
            "num_particles",
        )
        return {**super().minima(), **dict.fromkeys(positive, 1)}


class PETSTrainer(RecipeTrainer):
    """Learns a model trial by trial, and acts by planning through it (PETS, Algorithm 1).

    Args:
        config: the settings; :class:`PETSConfig`'s defaults if None.

    Keyword Args:
        env: the real env, where ``config.env`` is not enough: an object, or a function
            that makes one (see :func:`~torchrl_wm.trainers.make_real_env`).
        run: the folder of the run; :meth:`start` makes one.
        reward_function, termination_function: known functions
            ``f(observation, action, next_observation)``, in place of the config's.
        progress: show a progress bar.
        settings: of the config, by name.

    Attributes:
        world_model: the ensemble.
        imagined_env: the env that the planner imagines in.
        policy: the planner.
        metrics: a row for each trial.

    Raises:
        ValueError: if the env's specs cannot be served, as unbounded actions.

    Examples:
        >>> from torchrl_wm.trainers import PETSTrainer
        >>> trainer = PETSTrainer(
        ...     env="Pendulum-v1", max_episode_steps=20, random_steps=20, trials=1,
        ...     model_steps=5, planning_horizon=3, num_candidates=20, top_k=5,
        ... )
        >>> trainer.train()
        >>> [row["step"] for row in trainer.metrics]
        [20, 40]
    """

    algorithm = "pets"
    config_class = PETSConfig
    # A planner imagines as it did in training: what the members do not agree on is uncertain.
    evaluation_exploration = ExplorationType.RANDOM

    def __init__(
        self,
        config: PETSConfig | None = None,
        *,
        env: EnvSource | None = None,
        run: RunFolder | None = None,
        reward_function: Function | None = None,
        termination_function: Function | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> None:
        config, given = self.configured(config, {**settings, "env": env})
        # The dynamics: a bootstrap ensemble of probabilistic networks.
        real_env, world_model, loss = self.build(
            config, given.get("env"), reward_function, termination_function
        )
        check_planned_action(real_env)
        # Trajectory sampling: particles, each by members of the ensemble.
        self.imagined_env = WorldModelEnv(
            with_propagation(world_model, config.propagation, all_members=False),
            real_env,
        )
        # Actions: the first of the best plan found, the plan kept for the next step.
        planner = make_planner(self.imagined_env, config)
        self._planner = planner
        super().__init__(
            config,
            self.prepared(real_env),
            planner,
            world_model=world_model,
            loss_module=loss,
            parts={"learner": self.learner, "data": BufferPart(self.data)},
            run=run,
            progress=progress,
        )
        # Each real step, in this order:
        self.register_op("batch_process", self.add_step)
        self.register_op("post_steps", self.end_step)

    def optim_steps(self, step: TensorDictBase) -> None:
        """Train the dynamics on D: after each trial, and within it where asked for."""
        config = self.config
        if self.collected_frames < config.random_steps:
            return
        is_due = self._is_done
        if config.model_interval is not None and not self.acting.is_random:
            is_due |= self.acting.length % config.model_interval == 0
        if is_due:
            first = None if self.learner.steps else config.first_model_steps
            self.fit_model(first or config.model_steps)

    @property
    def is_over(self) -> bool:
        return self.planned_trials >= self.config.trials

    @property
    def planned_trials(self) -> int:
        """Finished episodes in which the planner acted."""
        return sum(1 - row["random"] for row in self.metrics)

    @property
    def expected_steps(self) -> int:
        lengths = [row["length"] for row in self.metrics] or [self.config.random_steps]
        left = self.config.trials - self.planned_trials
        return self.collected_frames + left * max(lengths)

    def prepared(self, env: TransformedEnv) -> EnvBase:
        # Zero at a reset of the whole env, of which it may have done flags of parts, too.
        primer = self._planner.make_tensordict_primer(reset_key=env.reset_keys[0])
        return TransformedEnv(env, primer, auto_unwrap=False)


def make_planner(env: WorldModelEnv, config: PETSConfig) -> MPCPlanner:
    """The planner that a config asks for."""
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
    if config.planner == "cem":
        return CEMPlanner(env, **settings)
    raise ValueError(
        f"Unknown planner {config.planner!r}. Valid choices are ['icem', 'cem']."
    )
