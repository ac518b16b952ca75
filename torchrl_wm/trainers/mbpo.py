"""MBPO: model-based policy optimisation (arXiv 1906.08253)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.envs import EnvBase
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate
from torchrl.trainers import OptimizationStepper, Trainer

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules import with_propagation
from torchrl_wm.trainers.env_checks import (
    check_policy_action,
    check_policy_observations,
)
from torchrl_wm.trainers.evaluation import episode_return
from torchrl_wm.trainers.functions import Function
from torchrl_wm.trainers.imagined_replay import ImaginedReplayHook
from torchrl_wm.trainers.learning import check_losses
from torchrl_wm.trainers.real_envs import EnvSource
from torchrl_wm.trainers.recipe import (
    BufferPart,
    make_buffer,
    RecipeConfig,
    RecipeTrainer,
    sample_newest,
)
from torchrl_wm.trainers.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class MBPOConfig(RecipeConfig):
    """The settings of :class:`MBPOTrainer`.

    Args:
        steps: how many real steps to make in all; the episode in which they are reached is
            finished.
        model_interval: how many real steps pass between two trainings of the model.
        model_steps: how many gradient steps each training of the model takes.
        imagination_interval: how many real steps pass between two rounds of imagined rollouts.
        rollouts: how many imagined rollouts a round has, branched off real states.
        horizon_schedule: the length of imagined rollouts, as first_step, last_step, first and
            last: it goes from first to last between these two real steps.
        retained_rounds: how many rounds of rollouts are learnt from, the newest ones, counted
            as rounds of the present length.
        real_share: the share of real transitions in a batch of the policy. With 1 there is
            no model: this is SAC.
        updates_per_step: how many updates of the policy follow each real step.
        batch_size: how many transitions a batch of the policy has.
        learning_rate: the learning rate of policy, values and temperature.
        policy_hidden: the sizes of the hidden layers of policy and values.
        alpha_init: the temperature of the policy's entropy to begin with; it is learnt.
        gamma: the discount per step.
        tau: the share of the values that goes to their targets in an update.
        evaluation_interval: how many real steps pass between two evaluations; 0 for none.
        evaluation_episodes: how many episodes an evaluation has.
        stop_return: the mean return of an evaluation that ends the run; None for no such end.
    """

    env: str = "InvertedPendulum-v5"
    random_steps: int = 500
    steps: int = 3000
    members: int = 7
    elites: int | None = 5
    model_interval: int = 250
    model_steps: int = 500
    imagination_interval: int = 25
    rollouts: int = 400
    horizon_schedule: tuple[int, int, int, int] = (0, 0, 5, 5)
    retained_rounds: int = 20
    real_share: float = 0.05
    updates_per_step: int = 10
    batch_size: int = 256
    learning_rate: float = 3e-4
    policy_hidden: tuple[int, ...] = (128, 128)
    alpha_init: float = 0.2
    gamma: float = 0.99
    tau: float = 0.005
    evaluation_interval: int = 250
    evaluation_episodes: int = 5
    stop_return: float | None = None

    @classmethod
    def minima(cls) -> dict[str, float]:
        positive = (
            "steps",
            "model_interval",
            "model_steps",
            "imagination_interval",
            "rollouts",
            "retained_rounds",
            "updates_per_step",
            "batch_size",
            "evaluation_episodes",
        )
        return {
            **super().minima(),
            **dict.fromkeys(positive, 1),
            "evaluation_interval": 0,
        }

    def horizon(self, step: int) -> int:
        """The length of imagined rollouts at a real step."""
        begin, end, first, last = self.horizon_schedule
        share = 1.0 if end <= begin else (step - begin) / (end - begin)
        return round(first + min(max(share, 0.0), 1.0) * (last - first))


class MBPOTrainer(RecipeTrainer):
    """Learns a policy by SAC on short rollouts of a learned model (MBPO, Algorithm 2).

    Args:
        config: the settings; :class:`MBPOConfig`'s defaults if None.

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
        imagined_env: where the rollouts branch.
        policy: the actor.
        metrics: a row for each episode and each evaluation.

    Raises:
        ValueError: if the actions are not continuous and bounded, or the observations are
            not vectors.

    Examples:
        >>> from torchrl_wm.trainers import MBPOTrainer
        >>> trainer = MBPOTrainer(
        ...     env="Pendulum-v1", max_episode_steps=20, random_steps=20, steps=40,
        ...     model_interval=20, model_steps=5, rollouts=30, updates_per_step=1,
        ...     evaluation_interval=0,
        ... )
        >>> trainer.train()
        >>> [row["step"] for row in trainer.metrics]
        [20, 40]
    """

    algorithm = "mbpo"
    config_class = MBPOConfig

    def __init__(
        self,
        config: MBPOConfig | None = None,
        *,
        env: EnvSource | None = None,
        run: RunFolder | None = None,
        reward_function: Function | None = None,
        termination_function: Function | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> None:
        config, given = self.configured(config, {**settings, "env": env})
        _check(config)
        # The predictive model, p_theta: an ensemble.
        real_env, world_model, _ = self.build(
            config, given.get("env"), reward_function, termination_function
        )
        self.imagined_env = WorldModelEnv(
            with_propagation(world_model, "ts1", all_members=False), real_env
        )
        # The policy, and what SAC needs beside it.
        actor, sac = make_sac(real_env, list(world_model.encoder.in_keys), config)
        optimizer = torch.optim.Adam(
            sac.parameters(), lr=config.learning_rate, fused=True
        )
        # D_env is self.data; this is D_model.
        longest = max(config.horizon_schedule[2:])
        self.imagined = make_buffer(
            max(1, config.retained_rounds * config.rollouts * longest)
        )
        self.imagine = ImaginedReplayHook(
            self.imagined_env,
            self.imagined,
            self.data,
            policy=actor,
            num_starts=config.rollouts,
        )
        super().__init__(
            config,
            real_env,
            actor,
            world_model=world_model,
            loss_module=sac,
            parts={
                "learner": self.learner,
                "sac": sac,
                "optimizer": optimizer,
                "data": BufferPart(self.data),
                "imagined": BufferPart(self.imagined),
            },
            run=run,
            progress=progress,
            optim_steps_per_batch=config.updates_per_step,
            optimizer=optimizer,
            optimization_stepper=_Update(),
        )
        # Each real step, in this order:
        self.register_op("batch_process", self.add_step)
        self.register_op("pre_optim_steps", self.renew_model)
        self.register_op("pre_epoch", self.draw_batches)
        self.register_op("process_optim_batch", self.next_batch)
        # After each update: TorchRL's TargetNetUpdaterHook comes once for each real step.
        self.register_op("post_optim", SoftUpdate(sac, tau=config.tau).step)
        self.register_op("post_steps", self.end_step)

    def optim_steps(self, step: TensorDictBase) -> None:
        """Once the random steps are over: model, rollouts, and updates of the policy."""
        if self.collected_frames >= self.config.random_steps:
            super().optim_steps(step)

    def renew_model(self) -> None:
        """Every so many steps: train the model on D_env; and imagine into D_model."""
        config = self.config
        if config.real_share == 1:
            return
        since = self.collected_frames - config.random_steps
        if since % config.model_interval == 0 or not self.learner.steps:
            self.fit_model(config.model_steps)
        if since % config.imagination_interval == 0 or not len(self.imagined):
            self.imagine.horizon = config.horizon(self.collected_frames)
            self.imagine()

    def draw_batches(self, step: TensorDictBase) -> TensorDictBase:
        """The batches of this step's updates, ``[G, N]``: real and imagined transitions."""
        config, parts = self.config, []
        real = round(config.real_share * config.batch_size)
        # The buffer has room for the longest rollouts: of shorter ones, more rounds fit.
        horizon = config.horizon(self.collected_frames)
        retained = config.retained_rounds * config.rollouts * horizon
        for buffer, size, among in (
            (self.data, real, len(self.data)),
            (self.imagined, config.batch_size - real, retained),
        ):
            if size:
                number = config.updates_per_step * size
                rows = sample_newest(buffer, number, among)
                rows = rows.select(*self._keys)
                parts.append(rows.reshape(config.updates_per_step, size))
        self._batches: Iterator[TensorDictBase] = iter(torch.cat(parts, 1).unbind(0))
        return step

    def next_batch(self, step: TensorDictBase) -> TensorDictBase:
        """The batch of the next update."""
        return next(self._batches)

    def end_step(self) -> None:
        """Evaluate where it is time to; end the episode where it ended, or the run."""
        config = self.config
        interval = config.evaluation_interval
        is_due = interval and self.collected_frames % interval == 0
        if is_due:
            returns = [
                episode_return(self.env, episode)
                for episode in self.evaluate(config.evaluation_episodes)
            ]
            mean = sum(returns) / len(returns)
            self.record(evaluation_return=mean, evaluation_least=min(returns))
        super().end_step()
        if is_due and self.has_reached and not self._is_done:
            if self.run is not None:
                self.save()
            self.request_stop()

    @property
    def has_reached(self) -> bool:
        """Whether an evaluation reached ``config.stop_return``."""
        level = self.config.stop_return
        return level is not None and any(
            row.get("evaluation_return", -math.inf) >= level for row in self.metrics
        )

    @property
    def is_over(self) -> bool:
        return self.has_reached or self.collected_frames >= self.config.steps

    @property
    def expected_steps(self) -> int:
        return self.config.steps


class _Update(OptimizationStepper):
    """One update of SAC."""

    def step(self, trainer: Trainer, sub_batch: TensorDictBase) -> TensorDictBase:
        losses = trainer.loss_module(sub_batch)
        terms = losses.select(*(key for key in losses.keys() if "loss" in key))
        total = terms.sum(reduce=True)
        check_losses(terms, total, sub_batch, "The policy", trainer._optim_count)
        trainer.optimizer.zero_grad()
        total.backward()
        trainer.optimizer.step()
        terms = terms.detach()
        trainer.losses.update({k: v.item() for k, v in terms.items()})
        return terms


def make_sac(
    env: EnvBase, observation_keys: list, config: MBPOConfig
) -> tuple[ProbabilisticActor, SACLoss]:
    """A squashed Gaussian policy with twin values, and TorchRL's loss for them."""
    spec = env.full_action_spec_unbatched[env.action_key]
    check_policy_action(env)
    check_policy_observations(env, observation_keys)
    hidden = list(config.policy_hidden)
    observation_size = sum(
        env.full_observation_spec_unbatched[key].shape.numel()
        for key in observation_keys
    )
    size = spec.shape.numel()
    actor_net = nn.Sequential(
        MLP(observation_size, 2 * size, num_cells=hidden, activation_class=nn.ReLU),
        NormalParamExtractor(),
    )
    actor = ProbabilisticActor(
        TensorDictModule(_Joined(actor_net), observation_keys, ["loc", "scale"]),
        in_keys=["loc", "scale"],
        out_keys=[env.action_key],
        spec=spec,
        distribution_class=TanhNormal,
        distribution_kwargs={"low": spec.space.low, "high": spec.space.high},
        return_log_prob=False,
    )
    value_net = MLP(
        observation_size + size, 1, num_cells=hidden, activation_class=nn.ReLU
    )
    # Named, as TorchRL knows the value of an action by the key "action" alone.
    value = ValueOperator(
        _Joined(value_net),
        in_keys=[*observation_keys, env.action_key],
        out_keys=["state_action_value"],
    )
    sac = SACLoss(
        actor,
        value,
        action_spec=spec,
        num_qvalue_nets=2,
        alpha_init=config.alpha_init,
    )
    done_key, terminated_key = env.done_keys[0], env.done_keys[0]
    for key in env.done_keys:
        if (key if isinstance(key, str) else key[-1]) == "terminated":
            terminated_key = key
    sac.set_keys(
        action=env.action_key,
        reward=env.reward_key,
        done=done_key,
        terminated=terminated_key,
    )
    sac.make_value_estimator(gamma=config.gamma)
    return actor, sac


class _Joined(nn.Module):
    """A network over several inputs side by side."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return self.network(torch.cat(values, -1))


def _check(config: MBPOConfig) -> None:
    if not 0 <= config.gamma <= 1:
        raise ValueError(f"gamma must lie between 0 and 1, got {config.gamma}.")
    if not 0 < config.real_share <= 1:
        raise ValueError(
            f"real_share is the share of real transitions in a batch, above 0 and at most 1, got "
            f"{config.real_share}."
        )
    if len(config.horizon_schedule) != 4 or min(config.horizon_schedule[2:]) < 1:
        raise ValueError(
            f"horizon_schedule is (first_step, last_step, first, last) with horizons of at least "
            f"1, got {config.horizon_schedule}."
        )
