"""The policy of a recurrent world model in the real envs: a filter before what acts on latents."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import Compose, Transform

from torchrl_wm.modules import WorldModel
from torchrl_wm.modules.keys import unique


class FilteredPolicy(TensorDictModuleBase):
    """A policy that brings the latents up to date with the observations, and acts on them.

    The latents travel from step to step in the tensordict; the transform of
    :meth:`make_tensordict_primer` gives an env their entries.

    Args:
        world_model: the model that filters.
        actor: the policy or planner, which reads latents.

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

    def __init__(self, world_model: WorldModel, actor: TensorDictModuleBase) -> None:
        super().__init__()
        self.observer, self.actor = world_model.observer(), actor
        latents = self.observer.out_keys
        reads = [key for key in actor.in_keys if key not in latents]
        self.in_keys = unique([*self.observer.in_keys, *reads])
        self.out_keys = unique([*latents, *actor.out_keys])

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Update the latents in ``tensordict``, ``[*B]``, and write the action."""
        return self.actor(self.filter(tensordict))

    def filter(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Update only the latents, for steps in which something else acts."""
        return self.observer(tensordict)

    def make_tensordict_primer(self, **kwargs: Any) -> Transform:
        """Return a transform that gives an env the entries of filter and actor."""
        parts = [self.observer, self.actor]
        made = [getattr(part, "make_tensordict_primer", None) for part in parts]
        return Compose(*(make(**kwargs) for make in made if make is not None))
