"""Many imagined envs as a Stable-Baselines3 ``VecEnv``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from torchrl_wm.export.infos import row_of
from torchrl_wm.export.trees import to_numpy
from torchrl_wm.export.vector_env import GymWorldModelVectorEnv

try:
    from stable_baselines3.common.vec_env import VecEnv

    _MISSING = None
except ImportError as err:  # the error is raised when the class is used
    VecEnv, _MISSING = object, err


class SB3VecEnv(VecEnv):
    """``N`` imagined envs for Stable-Baselines3, stepped as one batch.

    Episodes begin anew in the step that ends them. That env's info then holds the last
    observation under ``terminal_observation``, and under ``TimeLimit.truncated`` whether
    a time limit ended the episode, as SB3's algorithms expect. SB3's own
    ``VecMonitor`` records episode returns. Infos hold the model's own info, but not
    ``model_state``, which is in ``env.state``.

    Args:
        env: a :class:`~torchrl_wm.GymWorldModelVectorEnv` with
            ``autoreset_mode="SameStep"``; or the model for one, with further arguments.
        args, kwargs: the other arguments of :class:`~torchrl_wm.GymWorldModelVectorEnv`.

    Raises:
        ImportError: without stable-baselines3.
        TypeError: if arguments are given beside a vector env.
        ValueError: if the env has another autoreset mode.

    Examples:
        >>> import numpy as np
        >>> from gymnasium.spaces import Box
        >>> from stable_baselines3 import PPO
        >>> from torchrl_wm.export import SB3VecEnv
        >>> class Model:
        ...     def reset(self, seed, options):
        ...         return np.zeros((options["num_envs"], 1), np.float32)
        ...     def step(self, state, action):
        ...         return state + action, state + action, -np.abs(state[:, 0])
        >>> env = SB3VecEnv(
        ...     Model(),
        ...     Box(-100, 100, (1,)),
        ...     Box(-1, 1, (1,)),
        ...     num_envs=8,
        ...     torch_actions=False,
        ...     max_episode_steps=20,
        ... )
        >>> agent = PPO("MlpPolicy", env, n_steps=16, batch_size=64, seed=0).learn(128)
        >>> agent.num_timesteps
        128
    """

    def __init__(self, env: Any, *args: Any, **kwargs: Any) -> None:
        if _MISSING is not None:
            raise ImportError(
                "SB3VecEnv needs stable-baselines3: pip install torchrl-wm[sb3]."
            ) from _MISSING
        if not isinstance(env, GymWorldModelVectorEnv):
            kwargs.setdefault("autoreset_mode", AutoresetMode.SAME_STEP)
            env = GymWorldModelVectorEnv(env, *args, **kwargs)
        elif args or kwargs:
            raise TypeError("Arguments make a vector env, and one is given already.")
        if env.autoreset_mode is not AutoresetMode.SAME_STEP:
            raise ValueError(
                f"Stable-Baselines3 expects that an episode begins in the step that ends the last "
                f"one: make the vector env with autoreset_mode='SameStep', not "
                f"{env.autoreset_mode.value!r}."
            )
        self.env = env
        self._actions: Any = None
        super().__init__(
            env.num_envs, env.single_observation_space, env.single_action_space
        )

    def reset(self) -> Any:
        seeds = None if self._seeds[0] is None else self._seeds
        options = self._options[0]
        if any(not _same(other, options) for other in self._options[1:]):
            raise ValueError(
                "The envs are one batch: set_options takes one dictionary for all, whose 'state' "
                "or 'observation' has a row for each env."
            )
        observations, infos = self.env.reset(seed=seeds, options=options or None)
        self.reset_infos = self._rows(infos)
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> Any:
        observations, rewards, terminated, truncated, vector_infos = self.env.step(
            self._actions
        )
        dones = terminated | truncated
        final = vector_infos.pop("final_obs", None)
        final_infos = vector_infos.pop("final_info", None)
        infos = self._rows(vector_infos)
        for info in infos:
            info["TimeLimit.truncated"] = False
        if dones.any():
            final_infos = _models_own(final_infos)
            for i in np.flatnonzero(dones):
                self.reset_infos[i] = row_of(_models_own(vector_infos), i)
                infos[i] = row_of(final_infos, i)
                infos[i]["TimeLimit.truncated"] = bool(
                    truncated[i] and not terminated[i]
                )
                infos[i]["terminal_observation"] = final[i]
        return observations, rewards.astype(np.float32), dones, infos

    def _rows(self, infos: dict[str, Any]) -> list[dict[str, Any]]:
        infos = _models_own(infos)
        return [row_of(infos, i) for i in range(self.num_envs)]

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute of the vector env, else of the model, for each env in ``indices``."""
        values = self.env.get_attr(attr_name)
        return [values[i] for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the vector env, else of the model, for all envs.

        Raises:
            ValueError: if ``indices`` are not all envs, which share the attribute.
        """
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise ValueError(
                f"The envs are one batch and share {attr_name!r}: set it for all of them."
            )
        self.env.set_attr(attr_name, value)

    def env_method(
        self,
        method_name: str,
        *method_args: Any,
        indices: Any = None,
        **method_kwargs: Any,
    ) -> list[Any]:
        """Call a method of the vector env, else of the model: once, for all envs.

        :meth:`~torchrl_wm.GymWorldModelVectorEnv.call` describes its arguments and how
        results are split.

        Raises:
            ValueError: if it returns nothing and was called only for some of the envs:
                such a method changes the model, which all envs share.
        """
        values = self.env.call(method_name, *method_args, **method_kwargs)
        chosen = list(self._get_indices(indices))
        if len(chosen) < self.num_envs and all(value is None for value in values):
            raise ValueError(
                f"{method_name!r} returned nothing, and the envs are one batch: it was called for "
                f"all {self.num_envs}, not only for {chosen}. Call it without indices."
            )
        return [values[i] for i in chosen]

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Return False for each env: VecEnv wrappers wrap the whole batch."""
        return [False for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return the frames of all envs."""
        if self.render_mode is None:
            return [None] * self.num_envs
        return list(self.env.render())


def _same(one: Any, other: Any) -> bool:
    """Return whether two options are equal; they may hold arrays and tensors."""
    if one is other:
        return True
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    try:
        return bool(np.array_equal(to_numpy(one), to_numpy(other)))
    except (TypeError, ValueError):
        return False


def _models_own(infos: dict[str, Any]) -> dict[str, Any]:
    """Return the model's own infos, as splitting the env's own entries by env takes time."""
    own = {"model_state", "elapsed_steps"}
    return {key: value for key, value in infos.items() if key.lstrip("_") not in own}
