"""The policy of a recurrent world model in the real envs: a filter before what acts on latents."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Composite
from torchrl.envs import Compose, Transform

from torchrl_wm.modules import Observer, WorldModel
from torchrl_wm.modules.blocks.normalizer import without_warnings
from torchrl_wm.modules.keys import unique
from torchrl_wm.modules.world_model.flat import Placement, to_flat, to_tensordict
from torchrl_wm.trainers.checkpoints import from_plain_entries, plain_entries
from torchrl_wm.trainers.evaluation import device_of


class CarriedMemory:
    """The memory that an observer carries from step to step, as a part of checkpoints.

    Args:
        observer: the observer.
    """

    def __init__(self, observer: Observer) -> None:
        self.observer = observer

    def state_dict(self) -> dict[str, list]:
        """Return the memory, and the latents to which it belongs, as plain data."""
        held, at = self.observer.held, Placement(torch.Size([]), None)
        parts = {"latents": held.latents, "memory": held.memory}
        return {k: plain_entries(to_tensordict(v, at)) for k, v in parts.items()}

    def load_state_dict(self, state_dict: dict[str, list]) -> None:
        """Restore what :meth:`state_dict` returned."""
        model, device = self.observer.world_model, device_of(self.observer)
        latents, memory = (
            from_plain_entries(state_dict[name], []).to(device)
            for name in ("latents", "memory")
        )
        if not memory.is_empty():
            latents = to_flat(latents, model.latent_keys)
            self.observer.held.keep(latents, to_flat(memory, model.memory_keys))


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
        return self.actor(self.observer(tensordict))

    def filter(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Update only the latents, for steps in which something else acts."""
        # A recipe fits the normalisers of its model once the first steps, which others make, are over.
        with without_warnings(self.observer.world_model):
            return self.observer(tensordict)

    def make_tensordict_primer(self, **kwargs: Any) -> Transform:
        """Return a transform that gives an env the entries of filter and actor."""
        spec, device = self._observation_spec, device_of(self.observer)
        example = None if spec is None else spec.zero().to(device)
        with without_warnings(self.observer.world_model):  # only for shapes
            primers = [self.observer.make_tensordict_primer(example, **kwargs)]
        make = getattr(self.actor, "make_tensordict_primer", None)
        if make is not None:
            primers.append(make(**kwargs))
        return Compose(*primers)
