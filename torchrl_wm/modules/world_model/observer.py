"""A recurrent model as the front of a policy in the real env."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Composite, Unbounded
from torchrl.envs import TensorDictPrimer

from torchrl_wm.modules.keys import as_tuple, missing_from, unique
from torchrl_wm.modules.world_model.filtering import IS_INIT


class Observer(TensorDictModuleBase):
    """A module that keeps the latents of a world model up to date with the observations.

    Put it before a policy that reads latents: ``TensorDictSequential(
    world_model.observer(), actor)``. The latents travel in the tensordict, as the
    states of TorchRL's recurrent modules do: give the env an ``InitTracker``,
    so that they begin anew with each episode, and the transform of
    :meth:`make_tensordict_primer`, so that the env knows them.

    Args:
        world_model: the :class:`~torchrl_wm.WorldModel`; its components are shared, not
            copied.

    Examples:
        >>> import torch
        >>> from tensordict.nn import TensorDictModule as Mod, TensorDictSequential
        >>> from torchrl.envs import GymEnv, InitTracker, TransformedEnv
        >>> from torchrl_wm.models import make_rssm_world_model
        >>> env = TransformedEnv(GymEnv("Pendulum-v1"), InitTracker())
        >>> world_model, _ = make_rssm_world_model(env, belief_size=8)
        >>> observer = world_model.observer()
        >>> env = env.append_transform(observer.make_tensordict_primer(env.reset()))
        >>> actor = Mod(torch.nn.Linear(8, 1), ["belief"], ["action"])
        >>> with torch.no_grad():
        ...     rollout = env.rollout(5, TensorDictSequential(observer, actor))
        >>> rollout["belief"].shape
        torch.Size([5, 8])
    """

    def __init__(self, world_model: TensorDictModuleBase) -> None:
        super().__init__()
        world_model.filter.check_observable()
        self.world_model = world_model
        self.out_keys = list(world_model.latent_keys)
        before = [*self.out_keys, *world_model.filter.transition.context]
        self.in_keys = unique([*world_model.encoder.in_keys, *before, IS_INIT])

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Update the latents in ``tensordict``, ``[*B]``, by its observation."""
        return self.world_model.filter.observe_step(tensordict)

    def make_tensordict_primer(
        self, observations: TensorDictBase | None = None, **kwargs: Any
    ) -> TensorDictPrimer:
        """Return a transform that gives an env the latents' entries.

        They are zero until the first step, where ``is_init`` lets them begin.

        Args:
            observations: an example, any batch size, to find the shapes of
                latents that the encoder writes and the initial state lacks.
                Nested latents get the dims that their neighbours have there.
            kwargs: for :class:`~torchrl.envs.TensorDictPrimer`, such as
                ``reset_key``.

        Raises:
            ValueError: if the shape of a latent is not known.
        """
        model = self.world_model
        carried = self.out_keys
        begin = TensorDict({}, batch_size=[])
        if model.initial_state is not None:
            begin = model.initial_state(begin.batch_size).detach()
        unknown = missing_from(begin, carried)
        if unknown and observations is not None:
            row = (
                observations.reshape(-1)[:1]
                if observations.batch_dims
                else observations
            )
            begin.update(
                model.encode(row.copy()).detach().reshape(-1)[0].select(*unknown)
            )
            unknown = missing_from(begin, carried)
        if unknown:
            raise ValueError(
                f"The shapes of the latents {unknown} are not known. Put them into the model's "
                f"initial_state, or pass an example: make_tensordict_primer(env.reset())."
            )
        spec = Composite(shape=())
        for key in carried:
            value, node = begin.get(key), spec
            *parents, name = as_tuple(key)
            for depth, parent in enumerate(parents, start=1):
                if parent not in node.keys():
                    dims = _own_dims(observations, as_tuple(key)[:depth])
                    node[parent] = Composite(shape=dims)
                node = node[parent]
            node[name] = Unbounded(value.shape, dtype=value.dtype, device=value.device)
        return TensorDictPrimer(spec, default_value=0.0, expand_specs=True, **kwargs)


def _own_dims(observations: TensorDictBase | None, key: tuple[str, ...]) -> torch.Size:
    """Return the dims that a nested tensordict has beyond the batch dims."""
    node = None if observations is None else observations.get(key, None)
    if node is None:
        return torch.Size([])
    return node.batch_size[observations.batch_dims :]
