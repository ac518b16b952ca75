"""One imagined env with Gymnasium's API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces

from torchrl_wm.export.arguments import (
    checked_limit,
    checked_options,
    checked_render_mode,
    checked_seed,
    draw_seeds,
)
from torchrl_wm.export.rendering import Renderer
from torchrl_wm.export.resolve import make_source, StartSource
from torchrl_wm.export.sources import ModelUser, Start
from torchrl_wm.export.trees import snapshot


class GymWorldModelEnv(ModelUser, gymnasium.Env):
    """A world model as a :class:`gymnasium.Env`, for any library that takes one.

    The model is a :class:`~torchrl_wm.WorldModelEnv`, whose specs define the spaces,
    or any object with spaces, stepped by callables or by its own methods.

    Callables get the following arguments, and may take fewer of them. The names of
    their parameters tell which, or the order if they take all:

    - ``reset_fn(model, seed, options)`` returns ``observation``,
      ``(observation, info)``, ``(state, observation)``,
      ``(state, observation, info)`` or a mapping.
    - ``transition_fn(model, state, action)`` returns
      ``(observation, reward, terminated, truncated, info)``,
      ``(observation, reward, done, info)``, ``(state, observation, reward)``,
      ``(state, observation, reward, terminated, truncated, info)`` or a mapping.
    - ``reward_fn(model, state, obs, action)`` and
      ``terminal_fn(model, state, obs, action)`` return the reward and the termination, if
      the transition does not; without them the reward is 0 and nothing terminates.
      ``state`` and ``obs`` are those after the step.
    - ``action_transform_fn(model, action)`` returns the action that the model gets.
    - ``render_fn(model, state, obs)`` draws.

    A mapping has an observation (``observation``, ``obs``, ``image``, ``pixels``,
    ``next_observation`` or ``next_obs``) and may have ``state`` or ``next_state``,
    ``reward``, ``terminated`` or ``done``, ``truncated`` and ``info``. The first
    real output decides which form all have; an output that could have two forms is
    an error.

    Without callables the model's own methods are called, the first that it has of
    ``env_step, step, predict_step, predict, imagine_step, transition, __call__`` and of
    ``reset_env, reset_state, reset``.

    No autograd graph is kept. All outputs are numpy and share no memory with
    the model. Torch draws from random numbers of the env, seeded at every reset
    from ``np_random``: after one seeded reset everything repeats. Modules run in
    evaluation mode, and return to the mode that they were in.

    Args:
        world_model: a :class:`~torchrl_wm.WorldModelEnv`; a
            :class:`~torchrl_wm.WorldModel` or the path of a saved one, with
            ``base_env`` or ``start_states``; or any object.
        observation_space: the observation space; an object needs it. For a
            ``WorldModelEnv``, it chooses the entries to observe: by default all decoded
            ones, or, without any, all latents. One entry has a Box, several have a Dict.
        action_space: the action space; an object needs it. For a ``WorldModelEnv``, by
            default that of its action spec.

    Keyword Args:
        initial_observation: the first observation of episodes. A ``WorldModelEnv``
            encodes it.
        initial_state: the first state of episodes; copied at every reset. For a
            ``WorldModelEnv``, latents by name.
        reset_fn, transition_fn, reward_fn, terminal_fn, action_transform_fn: see above;
            not for a ``WorldModelEnv``.
        render_fn: a function that draws a frame ``[height, width, 3]``.
        max_episode_steps: the number of steps after which episodes are truncated.
        render_mode: ``"rgb_array"`` or None.
        device: the device of actions and states, to which a module is moved.
        torch_actions: give callables tensors; else arrays. The output of an
            ``action_transform_fn`` becomes a tensor only if the model is a module or the
            state is a tensor.
        seed: the seed of the first reset, if that has none of its own.
        clip_observations: clip predictions to the observation space. By default they
            are returned as they are, and a warning tells once that one is outside.
        render_env: ``"Pendulum-v1"``, ``"CartPole-v1"`` or a MuJoCo env that observes
            positions and velocities (``"Hopper-v5"``): the real env's own renderer
            draws the observation.
        base_env: for a ``WorldModel`` or a path, the env whose specs it has (a TorchRL
            env, a Gymnasium env or its id). Episodes start from its resets unless
            ``start_states`` are given. A model that a builder made, also a saved one,
            knows its specs and needs no ``base_env``; then episodes start from
            ``start_states``, ``initial_observation`` or ``reset(options=...)``.
        start_states: see :class:`~torchrl_wm.WorldModelEnv`.
        decode: see :class:`~torchrl_wm.WorldModelEnv`; by default True if there is a
            decoder.

    Raises:
        TypeError: if a space is not a ``gymnasium.Space``, or if the arguments or results of
            the model or of a callable are not clear.
        ValueError: if an argument has no meaning, or outputs do not fit the spaces.
        FloatingPointError: if the model predicts NaN or infinity.
        RuntimeError: for a step before a reset, after the end of an episode, or after
            :meth:`close`.

    .. note:: TorchRL's own ``EnvBase.register_gym`` works on a
        :class:`~torchrl_wm.WorldModelEnv`, too: use it for tensors in and out, with
        gradients, and with TorchRL's transforms. Use this class for libraries that
        expect numpy, seeds, copies and errors as Gymnasium has them.

    Examples:
        >>> import torch
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.modules import MLP
        >>> from torchrl_wm import GymWorldModelEnv, WorldModel, WorldModelEnv
        >>> real_env = GymEnv("Pendulum-v1")
        >>> world_model = WorldModel(
        ...     Mod(torch.nn.Linear(3, 4), ["observation"], ["latent"]),
        ...     Mod(MLP(5, 4, num_cells=[32]), ["latent", "action"], [("next", "latent")]),
        ...     Mod(torch.nn.Linear(4, 1), [("next", "latent")], [("next", "reward")]),
        ... )
        >>> imagined = WorldModelEnv(world_model, real_env, start_states=real_env)
        >>> env = GymWorldModelEnv(imagined, max_episode_steps=10)
        >>> observation, info = env.reset(seed=0)
        >>> observation.shape, info["elapsed_steps"]
        ((4,), 0)
        >>> observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        >>> observation.dtype, type(reward), info["model_state"]["latent"].shape
        (dtype('float32'), <class 'float'>, (4,))

        Any other model needs spaces, and a function that steps it:

        >>> import numpy as np
        >>> from gymnasium.spaces import Box
        >>> env = GymWorldModelEnv(
        ...     torch.nn.Linear(3, 2),
        ...     Box(-np.inf, np.inf, (2,)),
        ...     Box(-1, 1, (1,)),
        ...     initial_observation=np.zeros(2),
        ...     initial_state=torch.zeros(2),
        ...     transition_fn=lambda model, state, action: (
        ...         (following := model(torch.cat([state, action]))), following, 0.0
        ...     ),
        ... )
        >>> env.reset(seed=0)[0]
        array([0., 0.], dtype=float32)
        >>> env.step(env.action_space.sample())[0].shape
        (2,)
    """

    metadata: ClassVar[dict[str, Any]] = {
        "render_modes": ["rgb_array"],
        "render_fps": 30,
    }

    def __init__(
        self,
        world_model: Any,
        observation_space: spaces.Space | None = None,
        action_space: spaces.Space | None = None,
        *,
        initial_observation: Any = None,
        initial_state: Any = None,
        reset_fn: Callable | None = None,
        transition_fn: Callable | None = None,
        reward_fn: Callable | None = None,
        terminal_fn: Callable | None = None,
        render_fn: Callable | None = None,
        action_transform_fn: Callable | None = None,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        device: Any = None,
        torch_actions: bool = True,
        seed: int | None = None,
        clip_observations: bool = False,
        render_env: Any = None,
        base_env: Any = None,
        start_states: StartSource | None = None,
        decode: bool | None = None,
    ) -> None:
        self.render_mode = checked_render_mode(render_mode, self.metadata)
        self.max_episode_steps = checked_limit(max_episode_steps)
        self._first_seed = checked_seed(seed)
        self._source = make_source(
            world_model,
            observation_space,
            action_space,
            None,
            initial_observation=initial_observation,
            initial_state=initial_state,
            reset_fn=reset_fn,
            transition_fn=transition_fn,
            reward_fn=reward_fn,
            terminal_fn=terminal_fn,
            action_transform_fn=action_transform_fn,
            device=device,
            torch_actions=torch_actions,
            clip_observations=clip_observations,
            base_env=base_env,
            start_states=start_states,
            decode=decode,
        )
        self.observation_space = self._source.observation_space
        self.action_space = self._source.action_space
        self._renderer = Renderer(self._source, render_fn, render_env)
        if self._first_seed is not None:
            super().reset(seed=self._first_seed)
        self._state: Any = None
        self._observation: Any = None
        self._elapsed = 0
        #: Why a step is not possible now; None if it is possible.
        self._refuses: str | None = "Call reset() before step()."
        self._closed = False
        self._use_model()

    @property
    def state(self) -> Any:
        """A copy of the model's state, in the model's form; None before the first reset.

        For a :class:`~torchrl_wm.WorldModelEnv`, latents and context by name.
        ``reset(options={"state": state})`` goes back to it.
        """
        return None if self._state is None else self._source.shown(self._state, 0)

    @property
    def elapsed_steps(self) -> int:
        """The number of steps since the last reset."""
        return self._elapsed

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: the seed of ``np_random``, and with it of everything random. Without
                it, the next random numbers of ``np_random`` are used.
            options: the ``"state"`` or the ``"observation"`` to start from. A ``reset_fn``
                that takes options gets all of them.

        Returns:
            The first observation, and an info with ``model_state`` and
            ``elapsed_steps``.

        Raises:
            RuntimeError: if the env is closed.
            TypeError, ValueError: if seed, options or outputs of the model are wrong.
        """
        self._check_open()
        options = checked_options(options)
        if seed is None:
            seed, self._first_seed = self._first_seed, None
        else:
            self._first_seed = None
        super().reset(seed=seed)
        seeds = draw_seeds(self.np_random)
        self._refuses = "The last reset() failed. Call reset() before step()."
        self._source.isolation.seed(seeds[1])
        start = Start(seeds[0] if seed is None else seed, self.np_random, options)
        moment = self._source.reset(start)
        self._state, self._observation = moment.state, moment.observation
        self._elapsed, self._refuses = 0, None
        return self._handed_out(moment.observation), self._info(moment)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Predict one step.

        Args:
            action: an action in the action space.

        Returns:
            Observation, reward, terminated, truncated, and an info with
            ``model_state`` and ``elapsed_steps``. Of a ``WorldModelEnv`` it also has the
            ``disagreement`` of an ensemble, the ``penalty`` of
            :func:`~torchrl_wm.modules.with_penalty` and what that measures, and the predictions
            that the env's ``observation_spec`` declares: floats, or arrays.

        Raises:
            RuntimeError: before a reset, or when the episode is over.
            ValueError: if the action or an output of the model is not in its space.
            FloatingPointError: if the model predicts NaN or infinity.
        """
        if self._refuses is not None:
            raise RuntimeError(self._refuses)
        source = self._source
        moment = source.step(self._state, source.check_action(action))
        self._state, self._observation = moment.state, moment.observation
        self._elapsed += 1
        limit = self.max_episode_steps
        if limit is not None and self._elapsed >= limit:
            moment.truncated = True
        terminated, truncated = moment.terminated, moment.truncated
        if terminated or truncated:
            self._refuses = "The episode is over. Call reset() before step()."
        return (
            self._handed_out(moment.observation),
            moment.reward,
            terminated,
            truncated,
            self._info(moment),
        )

    def _handed_out(self, observation: Any) -> Any:
        # With a render mode the env keeps an observation, and so returns a copy of it.
        return observation if self.render_mode is None else snapshot(observation)

    def _info(self, moment: Any) -> dict[str, Any]:
        info = moment.info
        info["model_state"] = self._source.state_of(moment.state)
        info["elapsed_steps"] = self._elapsed
        return info

    def render(self) -> np.ndarray | None:
        """Draw the present state as a frame ``[height, width, 3]`` uint8.

        Returns:
            The frame; None without a render mode.

        Raises:
            RuntimeError: before a reset, or if there is nothing to draw.
        """
        self._check_open()
        if self.render_mode is None:
            gymnasium.logger.warn(
                "render() does nothing without a render mode: pass render_mode='rgb_array'."
            )
            return None
        if self._observation is None:
            raise RuntimeError("Call reset() before render().")
        return self._renderer(self.state, self._observation)

    def close(self) -> None:
        """Release the model: its own ``close`` is called once no other open env uses it."""
        if self._closed:
            return
        self._closed = True
        self._refuses = "The env is closed. Make a new one."
        self._renderer.close()
        self._release_model()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("The env is closed. Make a new one.")

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if not self._closed:
            self._use_model()  # the copy has its own model
