"""The specs of an env of which there are only recorded data."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import Binary, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import as_tuple, leaf_keys, unique
from torchrl_wm.trainers.logged_actions import action_keys, action_specs
from torchrl_wm.trainers.logged_bounds import ActionBounds
from torchrl_wm.trainers.logged_data import DataSource, read_transitions
from torchrl_wm.trainers.logged_entries import ENDS


class RecordedEnv(EnvBase):
    """The specs of the env that logged data came from, as far as the data show them.

    It cannot be stepped. It serves :class:`~torchrl_wm.WorldModelEnv` and the builders of models
    in place of a real env. Its reset returns observations of the data.

    Args:
        data: transitions ``[N]``, as :func:`load_transitions` returns them.

    Keyword Args:
        action_spec: the spec of the actions, without batch dims, with which the data was loaded.
            Without it the values say: rows of 0 and 1 with a single 1 each are one-hot; with a
            1 in each of several blocks, several such choices; other rows of 0 and 1 are binary;
            integers are the numbers of options, as many as the greatest number plus one; and
            floats are quantities. Their bounds are what the data reach, with a margin of 5 % of
            the range, or the round numbers that they come near on both sides; a warning names
            them.
        action_bounds: ``(low, high)``, numbers or one for each dim, in place of ``action_spec``:
            the bounds of actions that are quantities.
        stacklevel: whose line the warning names, 1 for that of the caller.

    Raises:
        KeyError: if there are no observations, actions or rewards.
        ValueError: if the actions may be of several kinds, or do not fit ``action_spec`` or
            ``action_bounds``.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm.trainers import load_transitions, RecordedEnv
        >>> data = load_transitions(GymEnv("Pendulum-v1").rollout(10))
        >>> env = RecordedEnv(data, action_bounds=(-2, 2))
        >>> env.observation_spec["observation"].shape, env.action_spec.shape
        (torch.Size([3]), torch.Size([1]))
        >>> RecordedEnv(load_transitions(GymEnv("CartPole-v1").rollout(10))).action_spec
        OneHot(
            shape=torch.Size([2]),
            space=CategoricalBox(n=2),
            device=cpu,
            dtype=torch.int64,
            domain=discrete)
    """

    def __init__(
        self,
        data: TensorDictBase,
        *,
        action_spec: TensorSpec | None = None,
        action_bounds: ActionBounds | None = None,
        stacklevel: int = 1,
    ) -> None:
        super().__init__(device=data.device)
        keys = unique(k for k in leaf_keys(data) if as_tuple(k)[0] != "next")
        following = unique(data.get("next").keys(True, True))
        dones = [key for key in following if as_tuple(key)[-1] in ENDS]
        rewards = [key for key in following if as_tuple(key)[-1] == "reward"]
        actions = action_keys(data)
        others = {*dones, *rewards, *actions}
        observations = [key for key in following if key in keys and key not in others]
        found = {"observations": observations, "actions": actions, "rewards": rewards}
        for name, there in found.items():
            if not there:
                raise MissingEntryError(f"The data has no {name}: {leaf_keys(data)}.")
        # Nothing else is needed again: the data need not stay in memory.
        self._starts = data.select(*observations)
        self.observation_spec = _specs(data, observations)
        self.full_action_spec = action_specs(
            data, action_spec, action_bounds, stacklevel=2 + stacklevel
        )
        self.reward_spec = _specs(data.get("next"), rewards)
        self.full_done_spec = Composite(
            {key: Binary(1, shape=(1,), dtype=torch.bool) for key in dones}
        )

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> Any:
        out = self._starts[int(torch.randint(len(self._starts), ()))].clone()
        return out.update(self.full_done_spec.zero())

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        raise RuntimeError(
            "Recorded data cannot be stepped. Imagine instead, WorldModelEnv(world_model, "
            "recorded_env), or make the real env."
        )

    def _set_seed(self, seed: int | None) -> None:
        pass


def read_recorded(
    source: DataSource, *, env: EnvBase | None = None, stacklevel: int = 1, **how: Any
) -> tuple[TensorDictBase, EnvBase]:
    """Return the transitions ``[N]`` of a source, and the env, or a :class:`RecordedEnv` in place of None.

    Args:
        source: see :func:`load_transitions`.

    Keyword Args:
        env: the env that was recorded.
        stacklevel: whose line warnings name, 1 for that of the caller.
        how: the others of :func:`load_transitions`.
    """
    rows, spec = read_transitions(source, env=env, stacklevel=1 + stacklevel, **how)
    if env is None:
        env = RecordedEnv(rows, action_spec=spec, stacklevel=1 + stacklevel)
    return rows, env


def _specs(data: TensorDictBase, keys: list) -> Composite:
    specs = Composite(shape=())
    for key in keys:
        value = data.get(key)
        specs[key] = Unbounded(shape=value.shape[1:], dtype=value.dtype)
    return specs
