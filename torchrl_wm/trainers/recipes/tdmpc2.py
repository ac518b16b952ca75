"""TD-MPC2: planning with a terminal value in a latent world model (arXiv 2310.16828)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torchrl.envs import EnvBase
from torchrl.envs.utils import exploration_type, ExplorationType
from torchrl.objectives import SoftUpdate

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.models import (
    make_tdmpc2_policy,
    make_tdmpc2_q_ensemble,
    make_tdmpc2_world_model,
    read_specs,
    TDMPC2Config as ModelSizes,
)
from torchrl_wm.modules import random_shift
from torchrl_wm.modules.keys import join
from torchrl_wm.objectives import LossTerm, PolicyPriorLoss, ValueTerm, WorldModelLoss
from torchrl_wm.planners import MPPIPlanner
from torchrl_wm.trainers.env_checks import check_action, check_bounds, check_stacked
from torchrl_wm.trainers.gym_actions import gymnasium_env
from torchrl_wm.trainers.learning import compiled_loss, descend
from torchrl_wm.trainers.recipe import Counts, make_replay, Recipe
from torchrl_wm.trainers.recipes.ensemble import transition_keys
from torchrl_wm.trainers.sequences import sample_sequences
from torchrl_wm.trainers.settings import Above, AtLeast, PresetConfig, Within
from torchrl_wm.trainers.steps import Steps

#: The sizes of networks, batches and plans, and what goes with them: a preset that is quick on a
#: CPU, and those of the paper.
PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "latent_size": 64,
        "num_cells": 128,
        "encoder_cells": 128,
        "encoder_depth": 1,
        "pixel_depth": 8,
        "num_q": 2,
        "batch_size": 128,
        "num_candidates": 128,
        "policy_candidates": 6,
        "optim_steps": 3,
        "top_k": 16,
        "tau": 0.05,
        "entropy_weight": 3e-3,
    },
    "1M": {
        "latent_size": 128,
        "num_cells": 384,
        "encoder_cells": 256,
        "encoder_depth": 1,
        "pixel_depth": 32,
        "num_q": 2,
        "batch_size": 256,
        "num_candidates": 512,
        "policy_candidates": 24,
        "optim_steps": 6,
        "top_k": 64,
        "tau": 0.01,
        "entropy_weight": 1e-4,
    },
}
PRESETS["5M"] = {**PRESETS["1M"], "latent_size": 512, "num_cells": 512, "num_q": 5}
PRESETS["19M"] = {
    **PRESETS["5M"],
    "latent_size": 768,
    "num_cells": 1024,
    "encoder_cells": 1024,
    "encoder_depth": 2,
}


@dataclass(frozen=True, kw_only=True)
class TDMPC2Config(PresetConfig):
    """The settings of :class:`TDMPC2`.

    Args:
        preset: the sizes of networks, batches and plans, and the settings that go with them:
            small, which learns on a CPU within thousands of steps, or those of the paper, 1M, 5M
            and 19M parameters; auto is small on a CPU and 5M elsewhere.
        latent_size: the size of the latent, a multiple of 8; None for the preset's.
        num_cells: the size of the hidden layers; None for the preset's.
        encoder_cells: the size of the encoder's hidden layers; None for the preset's.
        encoder_depth: the number of the encoder's hidden layers; None for the preset's.
        pixel_depth: the channels of the first stage of image encoders; None for the preset's.
        num_q: the number of action-value networks; None for the preset's.
        batch_size: the number of sequences of a batch; None for the preset's.
        num_candidates: the number of plans that an iteration tries; None for the preset's.
        policy_candidates: the number of them that the policy proposes; None for the preset's.
        optim_steps: the number of iterations of a plan; None for the preset's, and two more where
            an action has 20 numbers or more.
        top_k: the number of best plans that the next ones are drawn like; None for the preset's.
        horizon: the number of steps of the sequences of a batch.
        planning_horizon: the number of steps of a plan, at most horizon; None for horizon.
        termination: "learned", or "none" if episodes end only by time.
        gamma: the discount per step, above 0; None for 1 - 5 / T with episodes of T steps, within
            0.95 and 0.995, as in the authors' code; 0.99 if T is not known.
        pretraining_updates: the number of updates at the end of the random steps; None for one per
            random step.
        updates_per_step: the number of updates after each later real step.
        learning_rate: the learning rate of model, values and policy.
        encoder_rate: the encoder's learning rate, as a share of the others'.
        clip: the greatest norm of a gradient.
        tau: the share of the values that is mixed into their targets in an update; None for the
            preset's.
        decay: the weight of a step of a sequence relative to the one before it.
        consistency_weight: the weight of the latents' loss.
        reward_weight: the weight of the reward's loss.
        value_weight: the weight of the values' loss.
        termination_weight: the weight of the terminations' loss.
        entropy_weight: the weight of the policy's entropy; None for the preset's.
        init_std: the standard deviation of the first candidates, as a share of half the range
            of an action.
        min_std: the least standard deviation of candidates, in the same unit.
        temperature: the factor on returns in the weights of candidates.
        image_shift: the longest random shift of images, in pixels.
        evaluate_with: the actor in evaluations, films and reports: the planner, or only the
            policy, which is many times faster.
        replay_capacity: the number of real steps that are kept.
        replay_storage: where images of real steps are kept: in the memory of the device, or on
            the disk, in the folder for temporary files (TMPDIR), until the process ends.
        compile: make graphs of the plan's iterations and of the losses, forward and backward; the
            first plan and the first update take a minute or more each.
    """

    PRESETS = PRESETS
    ELSEWHERE = "5M"

    steps: Annotated[int, AtLeast(1)] | None = 10_000
    random_steps: Annotated[int, AtLeast(1)] = 1000
    evaluation_interval: Annotated[int, AtLeast(0)] = 1000
    preset: Literal["auto", "small", "1M", "5M", "19M"] = "auto"
    latent_size: Annotated[int, AtLeast(8)] | None = None
    num_cells: Annotated[int, AtLeast(1)] | None = None
    encoder_cells: Annotated[int, AtLeast(1)] | None = None
    encoder_depth: Annotated[int, AtLeast(1)] | None = None
    pixel_depth: Annotated[int, AtLeast(1)] | None = None
    num_q: Annotated[int, AtLeast(1)] | None = None
    batch_size: Annotated[int, AtLeast(1)] | None = None
    num_candidates: Annotated[int, AtLeast(1)] | None = None
    policy_candidates: Annotated[int, AtLeast(0)] | None = None
    optim_steps: Annotated[int, AtLeast(1)] | None = None
    top_k: Annotated[int, AtLeast(1)] | None = None
    horizon: Annotated[int, AtLeast(1)] = 3
    planning_horizon: Annotated[int, AtLeast(1)] | None = None
    termination: Literal["learned", "none"] = "learned"
    gamma: Annotated[float, Within(0, 1)] | None = None
    pretraining_updates: Annotated[int, AtLeast(0)] | None = None
    updates_per_step: Annotated[int, AtLeast(1)] = 1
    learning_rate: Annotated[float, Above(0)] = 3e-4
    encoder_rate: Annotated[float, AtLeast(0)] = 0.3
    clip: Annotated[float, Above(0)] = 20.0
    tau: Annotated[float, Within(0, 1)] | None = None
    decay: Annotated[float, Within(0, 1)] = 0.5
    consistency_weight: float = 20.0
    reward_weight: float = 0.1
    value_weight: float = 0.1
    termination_weight: float = 1.0
    entropy_weight: float | None = None
    init_std: float = 2.0
    min_std: float = 0.05
    temperature: float = 0.5
    image_shift: Annotated[int, AtLeast(0)] = 3
    evaluate_with: Literal["planner", "policy"] = "planner"
    replay_capacity: Annotated[int, AtLeast(1)] = 1_000_000
    replay_storage: Literal["memory", "disk"] = "memory"
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma == 0:
            raise ValueError("gamma is a discount above 0 and at most 1, got 0.")
        if (self.planning_horizon or 0) > self.horizon:
            raise ValueError(
                f"planning_horizon={self.planning_horizon} is longer than the sequences that the "
                f"model learns from, horizon={self.horizon}: it would not be trained to predict "
                f"so far. Give a longer horizon."
            )
        least = self.horizon * self.num_envs
        if self.random_steps < least:
            raise ValueError(
                f"random_steps={self.random_steps} are no sequence of horizon={self.horizon} steps "
                f"in each of num_envs={self.num_envs} envs: give at least {least}."
            )
        if self.replay_capacity < least:
            raise ValueError(
                f"replay_capacity={self.replay_capacity} has no room for a sequence of each env: "
                f"give at least {least}."
            )

    @property
    def model(self) -> ModelSizes:
        """The settings for the builders of model, values and policy."""
        names = ("latent_size", "num_cells", "encoder_cells", "encoder_depth")
        sizes = {name: self.size(name) for name in (*names, "pixel_depth", "num_q")}
        return ModelSizes(
            **sizes,
            done_head=self.termination == "learned",
            consistency_weight=self.consistency_weight,
            reward_weight=self.reward_weight,
            done_weight=self.termination_weight,
            decay=self.decay,
        )


class TDMPC2(Recipe):
    """Learn a latent model with action values, and act by planning through both.

    Args:
        config: the settings.
        env: the real env.

    Attributes:
        world_model: encoder, latent dynamics, reward and termination.
        q: the action values.
        prior: the policy on latents, which proposes plans and acts at their end.
        loss: the loss of model and values.
        policy_loss: the loss of the prior.
        gamma: the discount.
        imagined_env: the env that the planner imagines in.
        actor: the policy on observations, which acts without a plan.
        policy: the actor: the planner, or with ``evaluate_with="policy"`` an
            :class:`ExploringPlanner`.
        counts: ``counts.updates`` is the number of updates so far.
    """

    name = "tdmpc2"
    config_class = TDMPC2Config
    config: TDMPC2Config
    acts_in_model = False

    def __init__(self, config: TDMPC2Config, env: EnvBase) -> None:
        super().__init__(config, env)
        check_stacked(env)
        check_action(env)
        check_bounds(env.full_action_spec_unbatched[env.action_key], env.action_key)
        sizes = config.model
        self.gamma = discount(config, env) if config.gamma is None else config.gamma
        # Encoder h, latent dynamics d, reward R and termination; values Q and policy prior p.
        self.world_model, model_loss = make_tdmpc2_world_model(env, sizes)
        self.q = make_tdmpc2_q_ensemble(env, sizes)
        self.prior = make_tdmpc2_policy(env, sizes).to(self.device)
        self.loss, self.policy_loss = self.make_losses(model_loss.terms)
        self.targets = SoftUpdate(self.loss, tau=config.size("tau"))
        self.optimizer = model_optimizer(self.loss, config)
        self.policy_optimizer = torch.optim.Adam(
            self.prior.parameters(), lr=config.learning_rate, eps=1e-5, fused=True
        )
        # The losses, as graphs if they are compiled; the checkpoint holds the losses themselves.
        self._model_loss, self._policy_loss = self.loss, self.policy_loss
        if config.compile:
            self._model_loss = compiled_loss(self.loss)
            self._policy_loss = compiled_loss(self.policy_loss)
        # Planning: MPPI with a terminal value; the policy proposes some of the candidates.
        self.imagined_env = WorldModelEnv(self.world_model, env, batch_size=[])
        self.planner = self.make_planner()
        self.actor = TensorDictSequential(self.world_model.encoder, self.prior)
        self.policy = self.planner
        if config.evaluate_with == "policy":
            self.policy = ExploringPlanner(self.planner, self.actor)
        # The buffer B: every real transition.
        self.replay = make_replay(
            config.replay_capacity, self.device, config.replay_storage
        )
        self._keys = transition_keys(env, self.world_model)
        self._images = read_specs(env).pixels
        #: Updates so far.
        self.counts = Counts(updates=0)
        self.parts = {
            "counts": self.counts,
            "loss": self.loss,
            "policy_loss": self.policy_loss,
            "optimizer": self.optimizer,
            "policy_optimizer": self.policy_optimizer,
            "replay": self.replay,
        }

    def make_losses(
        self, terms: Sequence[LossTerm]
    ) -> tuple[WorldModelLoss, PolicyPriorLoss]:
        """Return the loss of model and values, and that of the policy.

        Args:
            terms: the terms of the model.
        """
        config = self.config
        subset = min(2, self.q.num_networks)
        # Eq. 3: joint embeddings, rewards and values, along sequences.
        value = ValueTerm(
            self.q,
            self.prior,
            gamma=self.gamma,
            weight=config.value_weight,
            subset=subset,
        )
        loss = WorldModelLoss(
            self.world_model,
            losses=[*terms, value],
            multi_step=True,
            decay=config.decay,
            return_latents=True,
        )
        loss.set_keys(**read_specs(self.env).loss_keys)
        # The policy, on the latents of the same update (eq. 5).
        policy_loss = PolicyPriorLoss(
            self.prior,
            self.q,
            decay=config.decay,
            entropy_weight=config.size("entropy_weight"),
            subset=subset,
        )
        return loss.to(self.device), policy_loss.to(self.device)

    def make_planner(self) -> MPPIPlanner:
        """Return the planner."""
        config, env = self.config, self.env
        optim_steps = config.size("optim_steps")
        spec = env.full_action_spec_unbatched[env.action_key]
        if config.optim_steps is None and spec.shape.numel() >= 20:
            optim_steps += 2  # as the authors do for large actions
        planner = MPPIPlanner(
            self.imagined_env,
            planning_horizon=config.planning_horizon or config.horizon,
            optim_steps=optim_steps,
            num_candidates=config.size("num_candidates"),
            top_k=config.size("top_k"),
            temperature=config.temperature,
            reward_key=join("next", env.reward_key),
            action_key=env.action_key,
            discount=self.gamma,
            policy=self.prior,
            num_policy_candidates=config.size("policy_candidates"),
            terminal_value=TensorDictSequential(self.prior, self.q),
            init_std=config.init_std,
            min_std=config.min_std,
            warm_start=True,
        )
        return planner.compile() if config.compile else planner

    def exported_policies(self) -> dict[str, TensorDictModuleBase]:
        """Return the policy of evaluations, and the prior, which acts without a plan."""
        plans = self.config.evaluate_with == "planner"
        acting = self.planner if plans else self.actor
        return {"policy": acting, "prior": self.actor}

    def kept(self, steps: TensorDictBase) -> TensorDictBase:
        """Return the entries of real steps that the losses read."""
        return steps.select(*self._keys, "is_init")

    def learn(self, steps: Steps) -> dict[str, torch.Tensor]:
        """Make the updates of Algorithm 1. The trainer has acted by the plan, and extended B."""
        config, losses = self.config, {}
        updates = config.updates_per_step * steps.count
        if not self.counts.updates:  # pretraining, on the random steps
            first = config.pretraining_updates
            updates = max(updates, config.random_steps if first is None else first)
        for update in range(updates):
            # Sample sequences of H steps from B.
            batch = self.sample()
            # Eq. 3: update encoder, dynamics, reward, termination and values ...
            terms = self._model_loss(batch)
            latents = terms.pop("latents")  # z_0 ... z_H, rolled by the dynamics
            number, clip = self.counts.updates, config.clip
            descend(terms, self.optimizer, batch, "The world model", number, clip)
            # Eq. 5: ... then the policy, on the rolled latents ...
            policy = self._policy_loss(latents)
            loss = policy.select("loss_policy")
            descend(loss, self.policy_optimizer, batch, "The policy", number, clip)
            # ... and the target values.
            self.targets.step()
            self.counts.updates += 1
            losses = {**terms.detach(), **policy.detach()}
            if updates > config.updates_per_step * steps.count:
                self.on_fit(update, updates)
        return losses

    def sample(self) -> TensorDictBase:
        """Return sequences of real steps, ``[batch_size, horizon]``, with images shifted."""
        config = self.config
        batch = sample_sequences(
            self.replay, config.size("batch_size"), config.horizon, config.num_envs
        )
        for entry in self._images if config.image_shift else ():
            for key in (entry.key, join("next", entry.key)):
                image = random_shift(batch.get(key), config.image_shift, entry.layout)
                batch.set(key, image)
        return batch

    @property
    def has_learnt(self) -> bool:
        return self.counts.updates > 0

    @property
    def latent_policy(self) -> TensorDictModuleBase:
        return self.prior if self.config.evaluate_with == "policy" else self.planner


class ExploringPlanner(TensorDictModuleBase):
    """An actor that plans to explore, and otherwise follows a policy without a plan.

    Args:
        planner: the planner, which acts under ``ExplorationType.RANDOM``.
        actor: the policy, which reads observations.
    """

    def __init__(self, planner: MPPIPlanner, actor: TensorDictModuleBase) -> None:
        super().__init__()
        self.planner, self.actor = planner, actor
        self.in_keys, self.out_keys = list(planner.in_keys), list(planner.out_keys)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action, ``[*B, *A]``."""
        if exploration_type() is ExplorationType.RANDOM:
            return self.planner(tensordict)
        # Only the action is written: later plans would start from latents that never change.
        acted = self.actor(tensordict.select(*self.actor.in_keys))
        key = self.planner.action_key
        return tensordict.set(key, acted.get(key))

    def make_tensordict_primer(self, **kwargs: Any) -> Any:
        """Return the planner's primer."""
        return self.planner.make_tensordict_primer(**kwargs)


def discount(config: TDMPC2Config, env: EnvBase) -> float:
    """Return the discount of the authors' code for the length of the env's episodes.

    Args:
        config: the settings.
        env: the real env.
    """
    limit, spec = config.max_episode_steps, getattr(gymnasium_env(env), "spec", None)
    own = getattr(spec, "max_episode_steps", None)
    if config.env.startswith("dm_control/"):
        own = 1000  # of all tasks of its suite
    if own is not None:
        own = max(1, own // config.action_repeat)
        limit = own if limit is None else min(limit, own)
    if limit is None:
        return 0.99
    return min(max(1 - 5 / limit, 0.95), 0.995)


def model_optimizer(loss: WorldModelLoss, config: TDMPC2Config) -> torch.optim.Adam:
    """Return the optimizer of model and values, with a lower rate for the encoder."""
    encoder = list(loss.world_model.encoder.parameters())
    slow = {id(parameter) for parameter in encoder}
    others = [p for p in loss.parameters() if id(p) not in slow]
    rate = config.learning_rate
    groups = [
        {"params": encoder, "lr": rate * config.encoder_rate},
        {"params": others, "lr": rate},
    ]
    return torch.optim.Adam(groups, lr=rate, fused=True)
