"""Many imagined envs as one batch, with Gymnasium's vector API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import iterate

from torchrl_wm._checks import positive_int
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.export.arguments import (
    checked_limit,
    checked_options,
    checked_render_mode,
    checked_seed,
    draw_seeds,
)
from torchrl_wm.export.forwarding import attribute_of_each, call_for_each
from torchrl_wm.export.infos import holding, in_rows, Infos, merge, with_masks
from torchrl_wm.export.rendering import Renderer
from torchrl_wm.export.resolve import make_source
from torchrl_wm.export.sources import ModelUser, Moment, Start
from torchrl_wm.export.spaces import batched, sample_start
from torchrl_wm.export.trees import merge_rows, snapshot


class GymWorldModelVectorEnv(ModelUser, VectorEnv):
    """``N`` imagined envs as one batch: one call of the model for each vector step.

    Everything is as in :class:`~torchrl_wm.GymWorldModelEnv`, but the inputs and outputs
    of the model have a first dim ``N``. A :class:`~torchrl_wm.WorldModelEnv` needs no
    change for this. The ``transition_fn`` of another model gets states and actions
    ``[N, ...]`` and returns observations ``[N, ...]``, and rewards and flags ``[N]`` or
    ``[N, 1]``. ``initial_observation`` and ``initial_state`` are those of one env and
    are repeated. A ``reset_fn`` finds ``N`` in ``options["num_envs"]`` and returns ``N``
    rows, of which those of the envs that begin are used.

    Episodes that end begin anew as Gymnasium defines it:

    - ``NEXT_STEP``: the step after the end ignores the action, and returns the first
      observation, reward 0 and no flags;
    - ``SAME_STEP``: the step that ends an episode returns the first observation of the
      next one, with the last one in ``infos["final_obs"]`` and its info in
      ``infos["final_info"]``;
    - ``DISABLED``: the caller calls ``reset(options={"reset_mask": mask})``.

    Args:
        world_model: see :class:`~torchrl_wm.GymWorldModelEnv`.
        observation_space: the observation space of one env.
        action_space: the action space of one env.

    Keyword Args:
        num_envs: the number of envs ``N``; by default the ``WorldModelEnv``'s batch size.
        autoreset_mode: see above; Stable-Baselines3 and most PPO implementations like
            CleanRL's expect ``"SameStep"``.
        max_episode_steps: the number of steps after which an env's episode is truncated.
        seed: the seed of the first reset, if that has none of its own.
        kwargs: initial_observation, initial_state, reset_fn, transition_fn, reward_fn,
            terminal_fn, render_fn, action_transform_fn, render_mode, device,
            torch_actions, clip_observations, render_env, base_env, start_states and
            decode are those of :class:`~torchrl_wm.GymWorldModelEnv`.

    Raises:
        TypeError, ValueError, FloatingPointError, RuntimeError: as
            :class:`~torchrl_wm.GymWorldModelEnv`.

    Examples:
        >>> import numpy as np
        >>> import torch
        >>> from gymnasium.spaces import Box
        >>> from torchrl_wm import GymWorldModelVectorEnv
        >>> class Model(torch.nn.Linear):
        ...     def step(self, state, action):  # [N, 4] and [N, 2]
        ...         state = self(torch.cat([state, action], -1))
        ...         return state, state[:, :3], state.sum(-1)
        >>> envs = GymWorldModelVectorEnv(
        ...     Model(6, 4),
        ...     Box(-np.inf, np.inf, (3,)),
        ...     Box(-1, 1, (2,)),
        ...     num_envs=64,
        ...     initial_state=torch.zeros(4),
        ...     initial_observation=np.zeros(3),
        ...     max_episode_steps=200,
        ... )
        >>> observations, infos = envs.reset(seed=0)
        >>> actions = envs.action_space.sample()
        >>> observations, rewards, terminations, truncations, infos = envs.step(actions)
        >>> observations.shape, rewards.shape, infos["model_state"].shape
        ((64, 3), (64,), (64, 4))
    """

    metadata: ClassVar[dict[str, Any]] = {
        "render_modes": ["rgb_array"],
        "render_fps": 30,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        world_model: Any,
        observation_space: spaces.Space | None = None,
        action_space: spaces.Space | None = None,
        *,
        num_envs: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        render_fn: Callable | None = None,
        render_env: Any = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_envs = _count(num_envs, world_model)
        self.autoreset_mode = _as_mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = checked_render_mode(render_mode, self.metadata)
        self.max_episode_steps = checked_limit(max_episode_steps)
        self._first_seed: Any = checked_seed(seed)
        self._source = make_source(
            world_model, observation_space, action_space, self.num_envs, **kwargs
        )
        self.single_observation_space = self._source.observation_space
        self.single_action_space = self._source.action_space
        self.observation_space = batched(self.single_observation_space, self.num_envs)
        self.action_space = batched(self.single_action_space, self.num_envs)
        self._renderer = Renderer(self._source, render_fn, render_env)
        if self._first_seed is not None:
            super().reset(seed=self._first_seed)
        self._state: Any = None
        self._observation: Any = None
        self._elapsed = np.zeros(self.num_envs, np.int64)
        #: The envs whose episodes are over.
        self._over = np.zeros(self.num_envs, bool)
        self._refuses: str | None = "Call reset() before step()."
        self._use_model()

    @property
    def state(self) -> Any:
        """A copy of the model's state, ``[N, ...]``; None before the first reset."""
        return None if self._state is None else self._source.shown(self._state)

    @property
    def observation(self) -> Any:
        """A copy of the present observations, ``[N, ...]``; None before the first reset."""
        return None if self._observation is None else snapshot(self._observation)

    @property
    def elapsed_steps(self) -> np.ndarray:
        """The steps of each env since its last reset, ``[N]`` int64."""
        return self._elapsed.copy()

    # Resetting -----------------------------------------------------------

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Begin episodes.

        Args:
            seed: the seed of everything random: one int, or one for each env.
            options: the envs that begin, ``"reset_mask"``, ``[N]`` bool, while the others
                stay as they are; and the ``"state"`` or the ``"observation"`` to start
                from, ``[N, ...]``.

        Returns:
            The observations of all envs, and infos with ``model_state`` and
            ``elapsed_steps``.

        Raises:
            RuntimeError: if the env is closed, or for a mask before the first reset.
            TypeError, ValueError: if seed, options or outputs of the model are wrong.
        """
        if self.closed:
            raise RuntimeError("The env is closed. Make a new one.")
        options = checked_options(options)
        mask = self._checked_mask(options.pop("reset_mask", None))
        if seed is None:
            seed, self._first_seed = self._first_seed, None
        else:
            self._first_seed = None
        seed = self._one_seed(seed)
        super().reset(seed=seed)
        seeds = draw_seeds(self.np_random)
        if mask is None or seed is not None:
            self._source.isolation.seed(seeds[1])
        self._refuses = "The last reset() failed. Call reset() before step()."
        start = Start(
            seeds[0] if seed is None else seed,
            self.np_random,
            options,
            mask,
            self._state,
        )
        moment = self._source.reset(start)
        begun = np.ones(self.num_envs, bool) if mask is None else mask
        if mask is not None:
            moment.observation = merge_rows(mask, moment.observation, self._observation)
        self._state, self._observation = moment.state, moment.observation
        self._elapsed[begun], self._over[begun] = 0, False
        self._refuses = None
        return snapshot(self._observation), self._infos(
            holding(moment.info, begun), begun
        )

    def _checked_mask(self, mask: Any) -> np.ndarray | None:
        if mask is None:
            return None
        fits = isinstance(mask, np.ndarray) and mask.dtype == bool
        if not fits or mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(
                f"options['reset_mask'] must be a numpy array of {self.num_envs} bools, at least "
                f"one of them True, got {mask!r:.80}."
            )
        if self._state is None and self._refuses is not None:
            raise RuntimeError(
                "Call reset() for all envs before one with a reset_mask."
            )
        return mask.copy()

    def _one_seed(self, seed: Any) -> int | None:
        if not isinstance(seed, (Sequence, np.ndarray)) or isinstance(seed, str):
            return checked_seed(seed)
        seeds = [checked_seed(one) for one in seed]
        if len(seeds) != self.num_envs:
            raise ValueError(
                f"A list of seeds needs one for each of the {self.num_envs} envs, got {len(seeds)}."
            )
        if seeds == [None] * self.num_envs:
            return None
        if None in seeds:
            raise ValueError(
                f"Either give seeds for every env or for none: they share one random stream; got "
                f"{seeds}."
            )
        # All seeds together seed the random stream that the envs share.
        return int(np.random.SeedSequence(seeds).generate_state(1)[0])

    def _begin(self, mask: np.ndarray) -> Moment:
        """Begin the episodes of the envs in ``mask``, with the next random numbers."""
        seed, _ = draw_seeds(self.np_random)
        return self._source.reset(Start(seed, self.np_random, {}, mask, self._state))

    # Stepping ------------------------------------------------------------

    def step(
        self, actions: Any
    ) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Predict one step of all envs.

        Args:
            actions: actions in the action space, ``[N, ...]``.

        Returns:
            Observations ``[N, ...]``, rewards ``[N]`` float64, terminations and
            truncations ``[N]`` bool, and infos, such as ``disagreement`` and ``penalty``, ``[N]``;
            see :meth:`GymWorldModelEnv.step`.

        Raises:
            RuntimeError: before a reset, and without autoreset when an episode is over.
            ValueError: if an action or an output of the model is not in its space.
            FloatingPointError: if the model predicts NaN or infinity.
        """
        if self._refuses is not None:
            raise RuntimeError(self._refuses)
        ended = self._over if self._over.any() else None
        actions = self._checked(actions, ended)
        begun = None
        if ended is not None:
            if self.autoreset_mode is AutoresetMode.DISABLED:
                raise RuntimeError(
                    f"The episodes of the envs {np.flatnonzero(ended).tolist()} are over. Reset "
                    f"them: reset(options={{'reset_mask': terminations | truncations}}); or make "
                    f"the env with autoreset_mode='NextStep'."
                )
            # Before the call of the model, so that it never gets the state of an ended episode.
            begun = self._begin(ended)
            self._state = begun.state
        if begun is not None and begun.state is None and ended.all():
            # A step would move on the model's own state, and so the episodes just begun.
            moment = begun
        else:
            moment = self._source.step(self._state, actions)
        self._elapsed += 1
        limit = self.max_episode_steps
        if limit is not None:
            moment.truncated |= self._elapsed >= limit
        infos = holding(moment.info, np.ones(self.num_envs, bool))
        if begun is not None:
            infos = merge(ended, holding(begun.info, ended), infos)
            self._put_begun(moment, begun, ended)
        self._state, self._observation = moment.state, moment.observation
        over = moment.terminated | moment.truncated
        if self.autoreset_mode is AutoresetMode.SAME_STEP and over.any():
            infos = self._end_and_begin(moment, infos, over)
        else:
            self._over = over
            infos = self._infos(infos)
        return (
            snapshot(self._observation),  # partial resets need the original
            moment.reward,
            moment.terminated,
            moment.truncated,
            infos,
        )

    def _checked(self, actions: Any, ended: np.ndarray | None) -> Any:
        """Check actions; where episodes begin they are not used, and may be anything."""
        check = self._source.check_action
        if ended is None or self.autoreset_mode is not AutoresetMode.NEXT_STEP:
            return check(actions)
        try:
            return check(actions)
        except ValueError as err:
            valid = sample_start(self.action_space, 0)
            try:
                actions = merge_rows(ended, valid, actions)
            except Exception:  # they have not even the structure of the space
                raise err from None
            return check(actions)

    def _put_begun(self, moment: Moment, begun: Moment, ended: np.ndarray) -> None:
        """Replace predictions by the first state of the episodes that begin."""
        if moment.state is not None:
            moment.state = merge_rows(ended, begun.state, moment.state)
        moment.observation = merge_rows(ended, begun.observation, moment.observation)
        moment.reward[ended] = 0.0
        moment.terminated[ended] = False
        moment.truncated[ended] = False
        self._elapsed[ended] = 0

    def _end_and_begin(
        self, moment: Moment, infos: Infos, over: np.ndarray
    ) -> dict[str, Any]:
        """Begin the next episodes in the step that ends the last ones."""
        last = snapshot(moment.observation)
        final = np.full(self.num_envs, None, dtype=object)
        for i, observation in enumerate(iterate(self.observation_space, last)):
            if over[i]:
                final[i] = observation
        final_info = self._infos(holding(moment.info, over), over)
        begun = self._begin(over)
        self._state = begun.state
        self._observation = merge_rows(over, begun.observation, moment.observation)
        self._elapsed[over] = 0
        out = self._infos(merge(over, holding(begun.info, over), infos))
        out.update(
            final_obs=final,
            _final_obs=over.copy(),
            final_info=final_info,
            _final_info=over.copy(),
        )
        return out

    def _infos(self, model: Infos, where: np.ndarray | None = None) -> dict[str, Any]:
        """Return infos in Gymnasium's form: arrays, and the envs for which they hold."""
        mask = np.ones(self.num_envs, bool) if where is None else where
        own = {
            "model_state": self._source.state_of(self._state),
            "elapsed_steps": self._elapsed,
        }
        return with_masks({**model, **holding(in_rows(own, self.num_envs), mask)})

    # The rest ------------------------------------------------------------

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Draw the present states as frames ``[height, width, 3]`` uint8, one for each env.

        Raises:
            RuntimeError: without a render mode, before a reset, after :meth:`close`, or if
                there is nothing to draw.
        """
        if self.closed:
            raise RuntimeError("The env is closed. Make a new one.")
        if self.render_mode is None:
            raise RuntimeError(
                "render() needs a render mode: pass render_mode='rgb_array'."
            )
        if self._observation is None:
            raise RuntimeError("Call reset() before render().")
        rows = list(iterate(self.observation_space, self._observation))
        return tuple(
            self._renderer(
                None if self._state is None else self._source.shown(self._state, i), row
            )
            for i, row in enumerate(rows)
        )

    def close_extras(self, **kwargs: Any) -> None:
        """Release the model: its own ``close`` is called once no other open env uses it."""
        self._refuses = "The env is closed. Make a new one."
        self._renderer.close()
        self._release_model()

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if not self.closed:
            self._use_model()  # the copy has its own model

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """Return an attribute of this env, else of the model, once for each env.

        Arrays and tensors with a row for each env are split.

        Raises:
            AttributeError: if neither has it.
        """
        return attribute_of_each(self, name)

    def set_attr(self, name: str, value: Any) -> None:
        """Set an attribute that all envs share: that of the model, if only the model has it."""
        model = self.world_model
        own = hasattr(self, name) or not hasattr(model, name)
        setattr(self if own else model, name, value)

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call a method of this env, else of the model, once for all envs.

        Args:
            name: the name of the method. Without arguments, a parameter ``state`` or
                ``obs`` of it gets the model's state or the observations, ``[N, ...]``.
            args, kwargs: the arguments. If they have rows of their own (arrays, lists),
                the result belongs to these rows, and each env gets all of it.

        Returns:
            The result for each env, as numpy: its row of ``[N, ...]``, or the one value
            for all.

        Raises:
            AttributeError: if neither has the method; the message says how to add one.
            NotImplementedError: for ``reset``, ``step`` and ``close``.
            ValueError: if the result has another number of rows.
        """
        return call_for_each(self, self._source.isolation, name, args, kwargs)


def _count(num_envs: Any, world_model: Any) -> int:
    if num_envs is None and isinstance(world_model, WorldModelEnv):
        if not world_model.batch_size:
            raise ValueError(
                "The WorldModelEnv takes any batch size: say how many envs there are, "
                "GymWorldModelVectorEnv(env, num_envs=3)."
            )
        num_envs = world_model.batch_size.numel()
    return positive_int("num_envs", num_envs)


def _as_mode(mode: Any) -> AutoresetMode:
    known = {name: m for m in AutoresetMode for name in (m.value, m.name, m)}
    if not isinstance(mode, (str, AutoresetMode)) or mode not in known:
        raise ValueError(
            f"autoreset_mode must be one of {[m.value for m in AutoresetMode]}, got {mode!r}."
        )
    return known[mode]
