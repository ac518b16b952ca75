"""PlaNet: planning through a recurrent model (arXiv 1811.04551)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import torch
from tensordict.nn import TensorDictSequential
from torch import nn
from torchrl.envs import EnvBase
from torchrl.modules import AdditiveGaussianModule, EGreedyModule

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.models import RSSMConfig, TransformerConfig
from torchrl_wm.modules import fit_normalizers
from torchrl_wm.modules.keys import join
from torchrl_wm.planners import CEMPlanner
from torchrl_wm.trainers.filtered_policy import FilteredPolicy
from torchrl_wm.trainers.learning import descend
from torchrl_wm.trainers.recipes.recurrent import RecurrentRecipe, RecurrentRunConfig
from torchrl_wm.trainers.settings import Above, AtLeast, Within
from torchrl_wm.trainers.steps import Steps

#: The sizes of networks, batches and plans: one that is quick on a CPU, and the paper's.
PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "belief_size": 128,
        "state_size": 16,
        "hidden_size": 128,
        "num_cells": 128,
        "depth": 2,
        "pixel_depth": 8,
        "free_nats": 0.0,
        # A few numbers tell less than an image: at the full weight, a state that knows them well
        # costs more nats than it saves errors, and plans through what it forgets are blind.
        "kl_weight": 0.1,
        "batch_size": 16,
        "batch_length": 32,
        "train_ratio": 512.0,  # a plan takes longer than an update
        "num_candidates": 200,
        "optim_steps": 4,
        "top_k": 20,
    },
    "paper": {
        "belief_size": 200,
        "state_size": 30,
        "hidden_size": 200,
        "num_cells": 200,
        "depth": 2,
        "pixel_depth": 32,
        "free_nats": 3.0,
        "kl_weight": 1.0,
        "batch_size": 50,
        "batch_length": 50,
        # 100 updates after each episode of 1000 steps, with an action repeat of 4.
        "train_ratio": 1000.0,
        "num_candidates": 1000,
        "optim_steps": 10,
        "top_k": 100,
    },
}
#: The settings that only one of the models has. Of a transformer, no memory is kept with the steps.
_ONLY_OF = {
    "state_size": "rssm",
    "free_nats": "rssm",
    "kl_weight": "rssm",
    "sequence_start": "rssm",
    "context": "transformer",
}


@dataclass(frozen=True, kw_only=True)
class PlaNetConfig(RecurrentRunConfig):
    """The settings of :class:`PlaNet`.

    Args:
        model: the recurrent model: the paper's recurrent state space model, or a transformer over
            time, whose width is the belief_size and whose latents have the hidden_size.
        preset: the sizes of networks, batches and plans: small, which learns on a CPU, or paper;
            auto is small on a CPU and paper elsewhere.
        state_size: the size of the stochastic state; None for the preset's. Of an RSSM.
        free_nats: the free nats of the KL, per step; None for the preset's. Of an RSSM.
        kl_weight: the weight of the KL beside the errors of observations and rewards; None for
            the preset's. Of an RSSM.
        context: how many steps a transformer sees.
        planning_horizon: how many steps a plan has.
        num_candidates: how many plans are tried at each iteration; None for the preset's.
        optim_steps: how often the candidates are improved at each real step; None for the
            preset's.
        top_k: how many of the best plans the next ones are drawn like; None for the preset's.
        discount: the factor on rewards per step of a plan.
        action_noise: the standard deviation of the noise on the actions of a run, as a share of
            half their range; for a choice, the share of actions that are random. Evaluations
            have none.
        learning_rate: the learning rate of Adam.
        clip: the greatest norm of the gradient.
    """

    PRESETS = PRESETS
    ELSEWHERE = "paper"

    model: Literal["rssm", "transformer"] = "rssm"
    preset: Literal["auto", "small", "paper"] = "auto"
    state_size: Annotated[int, AtLeast(1)] | None = None
    free_nats: Annotated[float, AtLeast(0)] | None = None
    kl_weight: Annotated[float, AtLeast(0)] | None = None
    context: Annotated[int, AtLeast(1)] = 16
    planning_horizon: Annotated[int, AtLeast(1)] = 12
    num_candidates: Annotated[int, AtLeast(1)] | None = None
    optim_steps: Annotated[int, AtLeast(1)] | None = None
    top_k: Annotated[int, AtLeast(1)] | None = None
    discount: Annotated[float, Within(0, 1)] = 1.0
    action_noise: Annotated[float, AtLeast(0)] = 0.3
    learning_rate: Annotated[float, Above(0)] = 1e-3
    clip: Annotated[float, Above(0)] = 1000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for item in fields(self):
            only = _ONLY_OF.get(item.name, self.model)
            if only != self.model and getattr(self, item.name) != item.default:
                raise ValueError(
                    f"model={self.model!r} has no {item.name}: this is a setting of model={only!r}. "
                    f"Leave it out."
                )
        if self.model == "transformer":
            self.model_settings()  # raises if the sizes do not fit together

    def model_settings(self) -> RSSMConfig | TransformerConfig:
        if self.model == "transformer":
            return TransformerConfig(
                latent_size=self.size("hidden_size"),
                width=self.size("belief_size"),
                hidden=(self.size("num_cells"),) * self.size("depth"),
                context=self.context,
                pixel_depth=self.size("pixel_depth"),
                termination=self.termination,
            )
        names = ("belief_size", "state_size", "hidden_size", "num_cells", "depth")
        settings = {name: self.size(name) for name in (*names, "pixel_depth")}
        return RSSMConfig.planet(
            **settings,
            free_nats=self.size("free_nats"),
            kl_weight=self.size("kl_weight"),
            continue_head=self.termination == "learned",
        )


class PlaNet(RecurrentRecipe):
    """Learn a recurrent model, and act by planning through it.

    Args:
        config: the settings.
        env: the real env.

    Attributes:
        world_model: the recurrent model.
        loss: its loss.
        imagined_env: the env that the planner imagines in.
        planner: the planner, which begins at filtered latents.
        policy: the filter and the planner, with noise on the actions of the run.
        counts: ``counts.updates`` is how many updates have been made.
    """

    name = "planet"
    config_class = PlaNetConfig
    config: PlaNetConfig
    acts_in_model = False

    def __init__(self, config: PlaNetConfig, env: EnvBase) -> None:
        super().__init__(config, env)
        key = env.action_key
        spec = env.full_action_spec_unbatched[key]
        self.loss.return_latents = False  # nothing learns from them
        self.optimizer = torch.optim.Adam(
            self.loss.parameters(), lr=config.learning_rate, eps=1e-4, fused=True
        )
        # Planning: the cross-entropy method, from the filtered latents.
        self.imagined_env = WorldModelEnv(self.world_model, env, batch_size=[])
        self.planner = CEMPlanner(
            self.imagined_env,
            planning_horizon=config.planning_horizon,
            optim_steps=config.size("optim_steps"),
            num_candidates=config.size("num_candidates"),
            top_k=config.size("top_k"),
            reward_key=join("next", env.reward_key),
            action_key=key,
            discount=config.discount,
        )
        acting = TensorDictSequential(self.planner, self._noise(spec.to(self.device)))
        observed = env.full_observation_spec_unbatched
        self.policy = FilteredPolicy(self.world_model, acting, observed)
        self.parts = {
            "counts": self.counts,
            "ratio": self.ratio,
            "loss": self.loss,
            "optimizer": self.optimizer,
            "replay": self.replay,
        }
        if self.world_model.memory_keys:
            self.parts["memory"] = self.policy.memory

    def _noise(self, spec: Any) -> nn.Module:
        """Return the module that adds noise to actions while the run explores."""
        share, key = self.config.action_noise, self.env.action_key
        if not spec.dtype.is_floating_point:
            return EGreedyModule(spec, eps_init=share, eps_end=share, action_key=key)
        noise = AdditiveGaussianModule(
            spec, sigma_init=float(share), sigma_end=float(share), action_key=key
        )
        noise.std = (spec.space.high - spec.space.low) / 2
        return noise

    def learn(self, steps: Steps) -> dict[str, torch.Tensor]:
        """Make the updates that the train ratio asks for. The trainer has extended the replay."""
        losses = {}
        if self.config.model == "transformer" and self.counts.updates == 0:
            fit_normalizers(self.world_model, self.replay[:])
        for _ in range(self.ratio(steps.total)):
            # Sequences of real steps: filter them, and predict observations and rewards.
            batch = self.sample()
            terms = self.loss(batch)
            updates, clip = self.counts.updates, self.config.clip
            descend(terms, self.optimizer, batch, "The world model", updates, clip)
            self.counts.updates += 1
            losses = dict(terms.detach())
        return losses
