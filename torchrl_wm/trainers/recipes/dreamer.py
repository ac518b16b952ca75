"""Dreamer: an actor and a critic learn in what a recurrent model imagines (arXiv 2301.04104)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.envs import EnvBase
from torchrl.objectives import DreamerV3ActorLoss, DreamerValueLoss, SoftUpdate
from torchrl.objectives.utils import ValueEstimators
from torchrl.trainers.algorithms import DreamerV3Optimizer

from torchrl_wm.models import make_dreamer_actor_critic, read_specs, RSSMConfig
from torchrl_wm.objectives import ImaginedValueLoss
from torchrl_wm.trainers.actor_imagination import Imagination, recalled
from torchrl_wm.trainers.filtered_policy import FilteredPolicy
from torchrl_wm.trainers.learning import compiled_loss, descend
from torchrl_wm.trainers.recipes.recurrent import RecurrentRecipe, RecurrentRunConfig
from torchrl_wm.trainers.settings import Above, AtLeast, Within
from torchrl_wm.trainers.steps import Steps

#: The sizes of networks and batches: one that is quick on a CPU, and the authors'.
PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "belief_size": 128,
        "hidden_size": 64,
        "num_cells": 64,
        "depth": 2,
        "pixel_depth": 8,
        "categoricals": 16,
        "classes": 16,
        "batch_size": 16,
        "batch_length": 32,
        "train_ratio": 128.0,
        "imagine_every": 4,
        "learning_rate": 1e-3,
        "actor_rate": 0.3,
        "warmup": 100,
        "gamma": 0.99,
    },
    "12M": {
        "belief_size": 2048,
        "hidden_size": 256,
        "num_cells": 256,
        "depth": 3,
        "pixel_depth": 16,
        "categoricals": 32,
        "classes": 16,
        "batch_size": 16,
        "batch_length": 64,
        "train_ratio": 512.0,
        "imagine_every": 1,
        "learning_rate": 4e-5,
        "actor_rate": 1.0,
        "warmup": 1000,
        "gamma": 0.997,
    },
}
PRESETS["1M"] = {
    **PRESETS["12M"],
    "belief_size": 512,
    "hidden_size": 64,
    "num_cells": 64,
    "pixel_depth": 4,
    "classes": 4,
}


@dataclass(frozen=True, kw_only=True)
class DreamerConfig(RecurrentRunConfig):
    """The settings of :class:`Dreamer`.

    Args:
        version: the model, its loss, and how actor and critic learn: those of DreamerV3, of
            DreamerV2 (arXiv 2010.02193) or of the first Dreamer (arXiv 1912.01603), which
            predicts no terminations. All of them have the optimizer of V3.
        preset: the sizes of networks and batches: small, which learns on a CPU, or those of
            DreamerV3's authors, 1M and 12M parameters; auto is small on a CPU and 12M elsewhere.
        categoricals: the number of distributions of a state; None for the preset's.
        classes: the number of classes of each of them; None for the preset's.
        free_nats: the free nats of the KL, per step; None for those of the version.
        imagine_every: imagine from every n-th state of a sequence; None for the preset's.
        horizon: for how many steps the model imagines.
        gamma: the discount per step, below 1; None for the preset's, 0.99 in the small one and
            0.997 in those of the authors.
        lmbda: the weight of later steps in the targets of values.
        entropy_weight: the weight of the actor's entropy.
        replay_value_weight: the weight of the values' loss on real steps; only in V3.
        slow_critic_weight: the weight of the distance from the slow critic; only in V3.
        tau: the share of the critic that is mixed into the slow one in an update.
        learning_rate: the learning rate of model and critic; None for the preset's.
        actor_rate: the actor's learning rate, as a share of theirs; None for the preset's.
        warmup: over how many updates the learning rate rises; None for the preset's.
        clip: the greatest norm of a gradient, as a share of the norm of its parameter; 0 for no
            limit.
        compile: make graphs of the steps of filter and imagination, and of the values' loss; the
            first update takes a minute or more.
    """

    PRESETS = PRESETS
    ELSEWHERE = "12M"

    version: Literal["v3", "v2", "v1"] = "v3"
    preset: Literal["auto", "small", "1M", "12M"] = "auto"
    categoricals: Annotated[int, AtLeast(1)] | None = None
    classes: Annotated[int, AtLeast(2)] | None = None
    free_nats: Annotated[float, AtLeast(0)] | None = None
    imagine_every: Annotated[int, AtLeast(1)] | None = None
    horizon: Annotated[int, AtLeast(1)] = 15
    gamma: Annotated[float, Within(0, 1)] | None = None
    lmbda: Annotated[float, Within(0, 1)] = 0.95
    entropy_weight: float = 3e-4
    replay_value_weight: Annotated[float, AtLeast(0)] = 0.3
    slow_critic_weight: Annotated[float, AtLeast(0)] = 1.0
    tau: Annotated[float, Within(0, 1)] = 0.02
    learning_rate: Annotated[float, Above(0)] | None = None
    actor_rate: Annotated[float, AtLeast(0)] | None = None
    warmup: Annotated[int, AtLeast(0)] | None = None
    clip: Annotated[float, AtLeast(0)] = 0.3
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.size("gamma") < 1:
            raise ValueError(
                f"gamma is a discount above 0 and below 1, got {self.gamma}."
            )
        every, length = self.size("imagine_every"), self.size("batch_length")
        if every > length:
            raise ValueError(
                f"imagine_every={every} is more than the steps of a sequence, batch_length={length}: "
                f"from some sequences nothing would be imagined. Give at most {length}, or longer "
                f"sequences."
            )

    def model_settings(self) -> RSSMConfig:
        names = ["belief_size", "hidden_size", "num_cells", "depth", "pixel_depth"]
        if self.version != "v1":
            names += ["categoricals", "classes"]
        settings = {name: self.size(name) for name in names}
        if self.free_nats is not None:
            settings["free_nats"] = self.free_nats
        if self.termination == "none":
            settings["continue_head"] = False
        if self.version == "v1":
            return RSSMConfig.planet(**settings)
        if self.version == "v2":
            return RSSMConfig.dreamer_v2(**settings)
        return RSSMConfig.dreamer_v3(**settings)


class Dreamer(RecurrentRecipe):
    """Learn a recurrent model, and an actor and a critic in what it imagines.

    Args:
        config: the settings.
        env: the real env.

    Attributes:
        world_model: the recurrent model.
        actor: the policy on latents.
        critic: the values of latents.
        loss: the loss of the world model.
        actor_loss, value_loss: TorchRL's losses of actor and critic.
        imagination: makes the steps that they learn from.
        gamma: the discount.
        policy: the filter and the actor.
        learns_real_values: whether the values are also learnt on real steps.
        counts: ``counts.updates`` is how many updates have been made.
    """

    name = "dreamer"
    config_class = DreamerConfig
    config: DreamerConfig

    def __init__(self, config: DreamerConfig, env: EnvBase) -> None:
        super().__init__(config, env)
        key = env.action_key
        spec = env.full_action_spec_unbatched[key]
        actor, critic = make_dreamer_actor_critic(env, self.sizes)
        self.actor, self.critic = actor.to(self.device), critic.to(self.device)
        self.gamma = config.size("gamma")
        # Only the first Dreamers, and V2 only for continuous actions, learn through the model.
        is_choice = not spec.dtype.is_floating_point
        self.is_v3 = config.version == "v3"
        self.learns_real_values = self.is_v3 and config.replay_value_weight > 0
        # The loss of the values on real steps trains the model, too.
        self.loss.detach_latents = not self.learns_real_values
        through_model = not self.is_v3 and not is_choice
        self.imagination = Imagination(self.world_model, self.critic, through_model)
        self.actor_loss = self._make_actor_loss(through_model)
        self.value_loss = self._make_value_loss()
        self.targets = (
            SoftUpdate(self.value_loss, tau=config.tau)
            if self.has_slow_critic
            else None
        )
        rate = config.size("learning_rate")
        others = (*self.loss.parameters(), *self.value_loss.parameters())
        acting_rate = rate * config.size("actor_rate")
        self.optimizer = DreamerV3Optimizer(
            [
                {"params": others},
                {"params": list(self.actor.parameters()), "lr": acting_rate},
            ],
            lr=rate,
            agc=config.clip,
            warmup_steps=config.size("warmup"),
        )
        self._value_loss = self.value_loss
        if config.compile:
            self.world_model.compile_rollout("step")
            self.imagination.compile_steps()
            self._value_loss = compiled_loss(self.value_loss)
        acting = self.actor
        if not is_choice:  # the Gaussian reaches beyond the bounds
            inside = TensorDictModule(spec.to(self.device).project, [key], [key])
            acting = TensorDictSequential(self.actor, inside)
        observed = env.full_observation_spec_unbatched
        self.policy = FilteredPolicy(self.world_model, acting, observed)
        self.parts = {
            "counts": self.counts,
            "ratio": self.ratio,
            "loss": self.loss,
            "actor": self.actor,
            "return_norm": self.actor_loss.retnorm,
            "value_loss": self.value_loss,
            "optimizer": self.optimizer,
            "replay": self.replay,
        }

    @property
    def has_slow_critic(self) -> bool:
        """Whether there is a slow copy of the critic."""
        return self.is_v3 and self.config.slow_critic_weight > 0

    def _make_actor_loss(self, through_model: bool) -> DreamerV3ActorLoss:
        config, env = self.config, self.env
        goes_on = self.world_model.done_head is not None
        loss = DreamerV3ActorLoss(
            self.actor,
            recalled("state_value"),
            self.imagination,
            continuation_model=recalled("continuation") if goes_on else None,
            imagination_horizon=config.horizon,
            entropy_bonus=config.entropy_weight,
            use_reinforce=not through_model,
            return_normalization=self.is_v3,
        )
        loss.set_keys(action=env.action_key, reward=env.reward_key)
        # TorchRL finds the dim of time by its name, which is lost on the way.
        loss.make_value_estimator(
            ValueEstimators.TDLambda,
            gamma=self.gamma,
            lmbda=config.lmbda,
            time_dim=-2,
        )
        # TorchRL does not hand it on; the estimator reads it where nothing ends.
        loss.value_estimator.set_keys(reward=env.reward_key)
        return loss.to(self.device)

    def _make_value_loss(self) -> ImaginedValueLoss | DreamerValueLoss:
        config, env = self.config, self.env
        if not self.is_v3:
            return DreamerValueLoss(self.critic, gamma=self.gamma).to(self.device)
        loss = ImaginedValueLoss(
            self.critic,
            num_value_bins=self.sizes.reward_bins,
            actor_loss=self.actor_loss,
            slow_critic_regularization=config.slow_critic_weight,
        )
        loss.set_keys(**read_specs(env).loss_keys)
        return loss.to(self.device)

    def learn(self, steps: Steps) -> dict[str, torch.Tensor]:
        """Make the updates that the train ratio asks for. The trainer has extended the replay."""
        losses = {}
        for _ in range(self.ratio(steps.total)):
            # Sequences of T real steps.
            batch = self.sample()
            # Dynamics learning: filter them, and predict observations, rewards and ends.
            terms = self.loss(batch)
            latents = terms.pop("latents")
            # Behaviour learning: imagine H steps from the filtered states s_1 ... s_T ...
            starts, every = self.starts(latents)
            acting, imagined = self.actor_loss(starts.reshape(-1))
            terms["loss_actor"] = acting["loss_actor"]
            # ... whose lambda-returns are the targets of the values, on real steps, too.
            if self.is_v3:
                imagined["state_value_logits"] = self.imagination.value_logits
            valuing, _ = self._value_loss(imagined)
            terms["loss_value"] = valuing["loss_value"]
            if self.learns_real_values:
                returns = imagined["lambda_target"][:, 0].reshape(starts.shape)
                real = self.replayed(batch, latents, returns, every)
                terms["loss_replay_value"] = self.replay_value(real)
            descend(terms, self.optimizer, batch, "Dreamer", self.counts.updates)
            if self.targets is not None:
                self.targets.step()
            self.counts.updates += 1
            losses = {**terms.detach(), "entropy": acting["actor_entropy"]}
            losses["return_scale"] = acting["return_scale"]
        return losses

    def starts(self, latents: TensorDictBase) -> tuple[TensorDictBase, slice]:
        """Return the states to imagine from, ``[B, T / every]``, and which they are of all."""
        every = self.config.size("imagine_every")
        first = int(torch.randint(every, ())) if every > 1 else 0
        chosen = slice(first, None, every)
        states = latents["next"].select(*self.world_model.latent_keys)
        return states[:, chosen].detach(), chosen

    def replayed(
        self,
        batch: TensorDictBase,
        latents: TensorDictBase,
        returns: torch.Tensor,
        imagined: slice,
    ) -> TensorDictBase:
        """Return the filtered states of real steps, ``[B, T]``, for the loss of their values.

        Args:
            batch: the real steps.
            latents: the filtered states.
            returns: the returns of the imagined ones, ``[B, T / every]``.
            imagined: which of them were imagined. The critic judges the others.
        """
        states = latents["next"].select(*self.world_model.latent_keys)
        bootstrap = returns
        if imagined.step > 1:
            with torch.no_grad():
                bootstrap = self.critic(states.copy())["state_value"].squeeze(-1)
            bootstrap[:, imagined] = returns
        states.set("bootstrap", bootstrap)
        return states.set("next", batch.get("next"))

    def replay_value(self, real: TensorDictBase) -> torch.Tensor:
        """Return the loss of the values on real steps."""
        config = self.config
        found = self.value_loss.replay_value_loss(
            real, horizon=1 / (1 - self.gamma), lmbda=config.lmbda
        )
        return config.replay_value_weight * found["loss_replay_value"]
