"""The policy of a recurrent world model in the real envs: a filter before what acts on latents."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.data import Composite
from torchrl.envs import Compose, Transform

from torchrl_wm.modules import Observer, WorldModel
from torchrl_wm.modules.keys import as_tuple, unique
from torchrl_wm.modules.world_model.flat import FlatTensors


class CarriedMemory:
    """The memory that an observer carries from step to step, as a part of checkpoints.

    Args:
        observer: the observer.
    """

    def __init__(self, observer: Observer) -> None:
        self.observer = observer

    def state_dict(self) -> dict[str, list]:
        """Return the memory, and the latents to which it belongs, as plain data."""
        held = self.observer.held
        return {"latents": _plain(held.latents), "memory": _plain(held.memory)}

    def load_state_dict(self, state_dict: dict[str, list]) -> None:
        """Restore what :meth:`state_dict` returned."""
        device = _device_of(self.observer)
        parts = [
            {unravel_key(tuple(names)): value.to(device) for names, value in entries}
            for entries in (state_dict["latents"], state_dict["memory"])
        ]
        self.observer.held.keep(*parts)


def _plain(entries: FlatTensors) -> list:
    return [[list(as_tuple(key)), value.cpu()] for key, value in entries.items()]


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


class FilteredPolicy(TensorDictModuleBase):
    """A policy that brings the latents up to date with the observations, and acts on them.

    The latents travel from step to step in the tensordict; the transform of
    :meth:`make_tensordict_primer` gives an env their entries.

    Args:
        world_model: the model that filters.
        actor: the policy or planner, which reads latents.
        observation_spec: of the env, for the shapes of latents that the encoder writes.

    Examples:
        >>> from torchrl_wm.models import make_dreamer_actor_critic, make_rssm_world_model
        >>> from torchrl_wm.trainers import make_real_env
        >>> from torchrl_wm.trainers.filtered_policy import FilteredPolicy
        >>> env = make_real_env("Pendulum-v1")
        >>> world_model, _ = make_rssm_world_model(env, belief_size=8)
        >>> actor, _ = make_dreamer_actor_critic(env, belief_size=8)
        >>> policy = FilteredPolicy(world_model, actor)
        >>> env = env.append_transform(policy.make_tensordict_primer())
        >>> env.rollout(5, policy)["belief"].shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        world_model: WorldModel,
        actor: TensorDictModuleBase,
        observation_spec: Composite | None = None,
    ) -> None:
        super().__init__()
        self._observation_spec = observation_spec
        self.observer, self.actor = world_model.observer(), actor
        latents = self.observer.out_keys
        reads = [key for key in actor.in_keys if key not in latents]
        self.in_keys = unique([*self.observer.in_keys, *reads])
        self.out_keys = unique([*latents, *actor.out_keys])
        #: The model's memory at the newest step, for checkpoints.
        self.memory = CarriedMemory(self.observer)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Update the latents in ``tensordict``, ``[*B]``, and write the action."""
        return self.actor(self.filter(tensordict))

    def filter(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Update only the latents, for steps in which something else acts."""
        return self.observer(tensordict)

    def make_tensordict_primer(self, **kwargs: Any) -> Transform:
        """Return a transform that gives an env the entries of filter and actor."""
        spec, device = self._observation_spec, _device_of(self.observer)
        example = None if spec is None else spec.zero().to(device)
        primers = [self.observer.make_tensordict_primer(example, **kwargs)]
        make = getattr(self.actor, "make_tensordict_primer", None)
        if make is not None:
            primers.append(make(**kwargs))
        return Compose(*primers)
