"""A recurrent model as the front of a policy in the real env."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.data import Composite, Unbounded
from torchrl.envs import TensorDictPrimer

from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import as_tuple, missing_from, unique
from torchrl_wm.modules.world_model.filtering import episode_begins, IS_INIT
from torchrl_wm.modules.world_model.flat import FlatTensors, to_flat
from torchrl_wm.modules.world_model.memory import HeldMemory


class Observer(TensorDictModuleBase):
    """A module that keeps the latents of a world model up to date with the observations.

    Put it before a policy that reads latents: ``TensorDictSequential(
    world_model.observer(), actor)``. The latents travel in the tensordict, as the
    states of TorchRL's recurrent modules do: give the env an ``InitTracker``,
    so that they begin anew with each episode, and the transform of
    :meth:`make_tensordict_primer`, so that the env knows them. The memory of a model does not
    travel: the observer carries it from call to call, and hands it to a planner behind it. So an
    observer is for the envs of one batch; others have observers of their own
    (:func:`memory_apart` lends them this one).

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
        #: The memory of the last call.
        self.held = HeldMemory()

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Update the latents in ``tensordict``, ``[*B]``, by its observation."""
        filter_ = self.world_model.filter
        if not filter_.memory:
            return filter_.observe_step(tensordict)
        self.world_model.observed_memory = self.held
        given = filter_.given_memory(tensordict)
        step = tensordict.copy().update(given or self._held_memory(tensordict))
        step = filter_.observe_step(step)
        memory = to_flat(step, filter_.memory)
        latents = to_flat(step, filter_.latents)
        self.held.keep(latents, memory)
        for key, value in (latents if given is None else {**latents, **memory}).items():
            tensordict.set(key, value)
        return tensordict

    def _held_memory(self, tensordict: TensorDictBase) -> FlatTensors:
        """Return the memory of the step before; none where all episodes begin.

        Raises:
            MissingEntryError: if the latents are not those that this observer left.
        """
        latents = self.world_model.filter.latents
        begins = episode_begins(tensordict)
        if missing_from(tensordict, latents) or (begins is not None and begins.all()):
            return {}
        found = self.held.find(to_flat(tensordict, latents), begins)
        if found is None:
            raise MissingEntryError(
                f"The observer carries the memory {self.world_model.memory_keys} from call to "
                f"call, and the latents of this one are not those that it left. Give each batch of "
                f"envs an observer of its own, world_model.observer(); let episodes begin where "
                f"'is_init' says so (torchrl.envs.InitTracker); or give the memory beside the "
                f"latents: world_model.burn_in(sequences)."
            )
        return found

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


@contextmanager
def memory_apart(policy: Any) -> Iterator[None]:
    """Let the observers in a policy act in other envs, and then go on where they were."""
    parts = policy.modules() if isinstance(policy, nn.Module) else ()
    observers = [part for part in parts if isinstance(part, Observer)]
    before = [observer.held for observer in observers]
    for observer in observers:
        observer.held = observer.held.copied()
    try:
        yield
    finally:
        for observer, held in zip(observers, before):
            observer.held = held


def _own_dims(observations: TensorDictBase | None, key: tuple[str, ...]) -> torch.Size:
    """Return the dims that a nested tensordict has beyond the batch dims."""
    node = None if observations is None else observations.get(key, None)
    if node is None:
        return torch.Size([])
    return node.batch_size[observations.batch_dims :]
