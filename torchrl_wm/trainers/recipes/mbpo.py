"""MBPO: model-based policy optimisation (arXiv 1906.08253)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules import with_propagation
from torchrl_wm.trainers.imagined_replay import ImaginedReplayHook, mixed_batches
from torchrl_wm.trainers.recipe import make_replay
from torchrl_wm.trainers.recipes.ensemble import EnsembleRecipe, EnsembleRunConfig
from torchrl_wm.trainers.recipes.sac import SoftActorCritic
from torchrl_wm.trainers.settings import Above, AtLeast, Within
from torchrl_wm.trainers.steps import Steps


@dataclass(frozen=True, kw_only=True)
class MBPOConfig(EnsembleRunConfig):
    """The settings of :class:`MBPO`.

    Args:
        model_interval: how many real steps pass between two trainings of the model.
        model_steps: how many gradient steps each training of the model takes.
        imagination_interval: how many real steps pass between two rounds of imagined rollouts.
        rollouts: how many imagined rollouts a round has, branched off real states.
        horizon_schedule: the length of imagined rollouts, as first_step, last_step, first and
            last: the length goes from first to last between these two real steps.
        retained_rounds: how many of the newest rounds of rollouts the policy learns from, counted
            in rounds of the present length.
        real_share: the share of real transitions in a batch of the policy. With 1 there is
            no model, which is SAC.
        updates_per_step: how many updates of the policy follow each real step.
        batch_size: how many transitions a batch of the policy has.
        learning_rate: the learning rate of policy, values and temperature.
        policy_hidden: the sizes of the hidden layers of policy and values.
        alpha_init: the initial temperature of the policy's entropy, which is learnt.
        gamma: the discount per step.
        tau: the share of the values that is mixed into their targets in an update.
    """

    env: str = "InvertedPendulum-v5"
    random_steps: Annotated[int, AtLeast(1)] = 500
    steps: Annotated[int, AtLeast(1)] | None = 3000
    members: Annotated[int, AtLeast(1)] = 7
    elites: int | None = 5
    evaluation_interval: Annotated[int, AtLeast(0)] = 250
    model_interval: Annotated[int, AtLeast(1)] = 250
    model_steps: Annotated[int, AtLeast(1)] = 500
    imagination_interval: Annotated[int, AtLeast(1)] = 25
    rollouts: Annotated[int, AtLeast(1)] = 400
    horizon_schedule: tuple[int, int, int, int] = (0, 0, 5, 5)
    retained_rounds: Annotated[int, AtLeast(1)] = 20
    real_share: Annotated[float, Within(0, 1)] = 0.05
    updates_per_step: Annotated[int, AtLeast(1)] = 10
    batch_size: Annotated[int, AtLeast(1)] = 256
    learning_rate: Annotated[float, Above(0)] = 3e-4
    policy_hidden: tuple[int, ...] = (128, 128)
    alpha_init: Annotated[float, Above(0)] = 0.2
    gamma: Annotated[float, Within(0, 1)] = 0.99
    tau: Annotated[float, Within(0, 1)] = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.real_share:
            raise ValueError(
                "real_share is the share of real transitions in a batch, above 0 and at most 1, "
                "got 0."
            )
        if min(self.horizon_schedule[2:]) < 1:
            raise ValueError(
                f"horizon_schedule is (first_step, last_step, first, last) with horizons of at "
                f"least 1, got {self.horizon_schedule}."
            )

    def horizon(self, step: int) -> int:
        """Return the length of imagined rollouts at a real step."""
        begin, end, first, last = self.horizon_schedule
        share = 1.0 if end <= begin else (step - begin) / (end - begin)
        return round(first + min(max(share, 0.0), 1.0) * (last - first))


class MBPO(EnsembleRecipe):
    """Learn a policy by SAC on short rollouts of a learned ensemble.

    Args:
        config: the settings.
        env: the real env.

    Keyword Args:
        reward_function, termination_function: known functions
            ``f(observation, action, next_observation)``, in place of the config's.

    Attributes:
        world_model: the ensemble.
        imagined_env: the env of the imagined rollouts.
        imagined: the imagined transitions.
        policy: the actor.
        sac: TorchRL's loss of policy and values.
        counts: ``counts.updates`` is how many updates of the policy have been made.
    """

    name = "mbpo"
    config_class = MBPOConfig
    config: MBPOConfig

    def __init__(self, config: MBPOConfig, env: EnvBase, **functions: Any) -> None:
        # The predictive model p_theta: an ensemble. D_env is self.replay.
        super().__init__(config, env, **functions)
        self.imagined_env = WorldModelEnv(
            with_propagation(self.world_model, "ts1", all_members=False), env
        )
        # The policy, and the values and losses of SAC.
        self.learning = SoftActorCritic(
            env,
            list(self.world_model.encoder.in_keys),
            hidden=config.policy_hidden,
            alpha_init=config.alpha_init,
            gamma=config.gamma,
            tau=config.tau,
            learning_rate=config.learning_rate,
            device=self.device,
        )
        self.policy, self.sac = self.learning.policy, self.learning.loss
        self.optimizer = self.learning.optimizer
        # D_model.
        longest = max(config.horizon_schedule[2:])
        self.imagined = make_replay(
            max(1, config.retained_rounds * config.rollouts * longest), self.device
        )
        self.imagine = ImaginedReplayHook(
            self.imagined_env,
            self.imagined,
            self.replay,
            policy=self.policy,
            num_starts=config.rollouts,
        )
        #: Updates of the policy so far.
        self.counts = self.learning.counts
        self.parts = {
            **self.learning.parts,
            "learner": self.learner,
            "replay": self.replay,
            "imagined": self.imagined,
        }

    def learn(self, steps: Steps) -> dict[str, torch.Tensor]:
        """Make a step of Algorithm 2. The trainer has taken it in the real env, and added it to D_env."""
        config, losses = self.config, {}
        if config.real_share < 1:
            # Line 3, at intervals: train the model p_theta on D_env by maximum likelihood.
            if steps.due(config.model_interval, since=config.random_steps):
                losses.update(self.fit_model(config.model_steps))
            # Lines 6 to 8: k-step rollouts by the policy from states of D_env, into D_model.
            if steps.due(config.imagination_interval, since=config.random_steps):
                self.imagine.horizon = config.horizon(steps.total)
                self.imagine()
        # Lines 9 and 10: G gradient updates of the policy on D_model and a share of D_env.
        for batch in self.batches(steps):
            losses.update(self.update_policy(batch))
        return losses

    def batches(self, steps: Steps) -> Iterator[TensorDictBase]:
        """Give the batches of the updates, ``[batch_size]``: real and imagined transitions."""
        config = self.config
        updates = config.updates_per_step * steps.count
        real = round(config.real_share * config.batch_size)
        # The buffer has room for the longest rollouts, and so for more rounds of shorter ones.
        horizon = config.horizon(steps.total)
        retained = config.retained_rounds * config.rollouts * horizon
        sources = (
            (self.replay, real, len(self.replay)),
            (self.imagined, config.batch_size - real, retained),
        )
        return mixed_batches(sources, updates, self._keys)

    def update_policy(self, batch: TensorDictBase) -> dict[str, torch.Tensor]:
        """Make an update of policy, values, temperature and targets; return the losses."""
        return self.learning.update(batch)
