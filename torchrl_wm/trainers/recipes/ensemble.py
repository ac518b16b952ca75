"""The common base of PETS and MBPO: an ensemble that learns the env."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Annotated

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.models import make_ensemble_world_model
from torchrl_wm.modules import FunctionHead, with_propagation, WorldModel
from torchrl_wm.modules.keys import join, unique
from torchrl_wm.objectives import WorldModelLoss
from torchrl_wm.trainers.env_checks import check_bounds, check_float_observations
from torchrl_wm.trainers.known_tasks import (
    find_function,
    Function,
    REWARDS,
    TERMINATIONS,
)
from torchrl_wm.trainers.learning import ModelLearner
from torchrl_wm.trainers.recipe import make_replay, Recipe
from torchrl_wm.trainers.settings import Above, AtLeast, RunConfig

#: How many real transitions are kept.
CAPACITY = 1_000_000


@dataclass(frozen=True, kw_only=True)
class EnsembleRunConfig(RunConfig):
    """The settings of a run that learns an ensemble.

    Args:
        reward: where the model's reward comes from: "learned", a function's name, which is one
            of "pendulum", "cartpole" and "inverted_pendulum", or module:function.
        termination: where the model's terminations come from: "learned", "none" if episodes end
            only by time, a function's name, which is one of "cartpole", "inverted_pendulum"
            and "hopper", or module:function.
        members: how many networks the ensemble has.
        elites: how many of the members predict; None for all of them.
        hidden: the sizes of the hidden layers of each member.
        beta: the weight of rows that are hard to predict, from 0, the plain likelihood,
            to 1, the likelihood weighted by the predicted variance (beta-NLL, arXiv 2203.09168).
        model_learning_rate: the learning rate of the model's optimizer, AdamW.
        model_weight_decay: the weight decay of the model's optimizer, AdamW.
        model_batch_size: how many transitions a batch of the model's training has.
    """

    reward: str = "learned"
    termination: str = "learned"
    members: Annotated[int, AtLeast(1)] = 5
    elites: int | None = None
    hidden: tuple[int, ...] = (128, 128)
    beta: float = 0.0
    model_learning_rate: Annotated[float, Above(0)] = 1e-3
    model_weight_decay: Annotated[float, AtLeast(0)] = 1e-5
    model_batch_size: Annotated[int, AtLeast(1)] = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(
                f"hidden are the sizes of the hidden layers, at least one and each at least 1, got "
                f"{tuple(self.hidden)}."
            )


class EnsembleRecipe(Recipe):
    """A recipe that learns an ensemble of the env.

    Args:
        config: the settings.
        env: the real env.

    Keyword Args:
        reward_function, termination_function: known functions
            ``f(observation, action, next_observation)``, in place of the config's.

    Attributes:
        learner: trains the ensemble.
        imagined_env: the imagined env, in which one member predicts at a time.
    """

    config: EnsembleRunConfig
    objects = ("reward_function", "termination_function")

    def __init__(
        self,
        config: EnsembleRunConfig,
        env: EnvBase,
        *,
        reward_function: Function | None = None,
        termination_function: Function | None = None,
    ) -> None:
        super().__init__(config, env)
        check_bounds(env.full_action_spec_unbatched[env.action_key], env.action_key)
        check_float_observations(env)
        self.world_model, loss = make_model(
            config, env, reward_function, termination_function
        )
        self.loss = loss.to(self.device)
        self.learner = ModelLearner(
            self.world_model,
            self.loss,
            learning_rate=config.model_learning_rate,
            weight_decay=config.model_weight_decay,
            batch_size=config.model_batch_size,
        )
        # The data: every real transition.
        self.replay = make_replay(CAPACITY, self.device)
        self._keys = transition_keys(env, self.world_model)

    def kept(self, steps: TensorDictBase) -> TensorDictBase:
        """Return the entries of real steps that the model and the losses read."""
        return steps.select(*self._keys)

    def fit_model(self, steps: int) -> dict[str, torch.Tensor]:
        """Train the ensemble on all real transitions; return its losses."""
        if not self.learner.steps:
            warn_if_functions_disagree(self.world_model, self.replay[:])
        return self.learner.fit(self.replay, steps, self.on_fit)

    @property
    def has_learnt(self) -> bool:
        return self.learner.steps > 0

    def diagnosed_env(self) -> WorldModelEnv:
        """Return the imagined env in which all members predict."""
        model = with_propagation(self.world_model, "ts1")
        return WorldModelEnv(model, self.env, batch_size=[])


def make_model(
    config: EnsembleRunConfig,
    env: EnvBase,
    reward_function: Function | None,
    termination_function: Function | None,
) -> tuple[WorldModel, WorldModelLoss]:
    """Return the ensemble of a config, and its loss."""
    reward = reward_function or find_function(
        config.reward, REWARDS, "reward", ("learned",)
    )
    termination = termination_function or find_function(
        config.termination, TERMINATIONS, "termination", ("learned", "none")
    )
    return make_ensemble_world_model(
        env,
        members=config.members,
        elites=config.members if config.elites is None else config.elites,
        hidden=tuple(config.hidden),
        beta=config.beta,
        termination_hidden=tuple(config.hidden),
        termination_members=config.members,
        reward_function=reward,
        termination_function=termination,
        termination="none" if config.termination == "none" else "learned",
    )


def transition_keys(env: EnvBase, world_model: WorldModel) -> list:
    """Return the keys of a real step that the model, its loss and a policy's loss read."""
    latents = unique(world_model.encoder.in_keys)
    following = [*latents, env.reward_key, *env.done_keys]
    return [
        *latents,
        *env.done_keys,
        env.action_key,
        *(join("next", key) for key in following),
    ]


def warn_if_functions_disagree(world_model: WorldModel, rows: TensorDictBase) -> None:
    """Warn if a given reward or termination function disagrees with the real env."""
    for name in ("reward", "done"):
        head = getattr(world_model, f"{name}_head")
        if not isinstance(head, FunctionHead):
            continue
        key = head.out_keys[0]
        real = rows.get(key).reshape(len(rows), -1).double()
        with torch.no_grad():
            said = head(rows.copy()).get(key).reshape(len(rows), -1).double()
        differs = ((said - real).abs() > 1e-3 * (1 + real.abs())).any(-1)
        if differs.double().mean() > 0.01:
            warnings.warn(
                f"The {'reward' if name == 'reward' else 'termination'} function and the real env "
                f"differ in {int(differs.sum())} of {len(rows)} steps, first in step "
                f"{int(differs.nonzero()[0])}: {said[differs][0].tolist()}, and the env gave "
                f"{real[differs][0].tolist()}. Planning and policy learning use the function; "
                f"reported returns come from the env.",
                stacklevel=2,
            )
