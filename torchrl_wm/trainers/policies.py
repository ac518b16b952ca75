"""Act with a trained run, on observations as Gymnasium's envs return them."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import Compose, EnvBase, FrameSkipTransform, TransformedEnv
from torchrl.envs.utils import set_exploration_type

from torchrl_wm import _upstream
from torchrl_wm.modules.keys import unique
from torchrl_wm.modules.modes import evaluation_mode
from torchrl_wm.trainers.acting import prepared
from torchrl_wm.trainers.episode_seeds import EpisodeSeeds
from torchrl_wm.trainers.evaluation import forked_random
from torchrl_wm.trainers.gym_actions import innermost, layers
from torchrl_wm.trainers.observations import HandedValues
from torchrl_wm.trainers.pixels import Pixels
from torchrl_wm.trainers.real_envs import ActionRepeat
from torchrl_wm.trainers.runs import resume_run
from torchrl_wm.trainers.trainer import RecipeTrainer

#: Transforms that seed, step or draw the env itself.
_OF_THE_ENV = (EpisodeSeeds, ActionRepeat, FrameSkipTransform, Pixels)


def load_policy(
    run: str | os.PathLike,
    *,
    checkpoint: int | None = None,
    device: str = "auto",
    seed: int = 0,
    **given: Any,
) -> Policy:
    """Return the policy of a run from its folder, which is not changed.

    Args:
        run: the folder.

    Keyword Args:
        checkpoint: the step of the checkpoint; the newest one by default.
        device: the device to act on: auto (a GPU if there is one), cpu, cuda, cuda:1.
        seed: the seed of random draws, such as those of a planner.
        given: the objects that the run was started with from Python: an env, functions.

    Raises:
        FileNotFoundError: if the folder is not one of a run, or has no such checkpoint.
        ValueError: if its content is damaged, or the run has no policy.

    Examples:
        >>> import gymnasium, tempfile
        >>> from torchrl_wm.trainers import load_policy, start_run
        >>> settings = dict(max_episode_steps=20, random_steps=20, trials=1, model_steps=5)
        >>> settings.update(planning_horizon=3, num_candidates=20, top_k=5)
        >>> folder = tempfile.mkdtemp() + "/run"
        >>> start_run("pets", folder, env="Pendulum-v1", **settings).train()
        >>> policy = load_policy(folder)
        >>> env = gymnasium.make("Pendulum-v1")
        >>> observation, _ = env.reset(seed=0)
        >>> for _ in range(5):
        ...     action = policy.act(observation)
        ...     observation, *_ = env.step(action)
        >>> policy.reset()  # before the first observation of the next episode
        >>> action
        array([...], dtype=float32)
    """
    with forked_random():
        trainer = resume_run(run, checkpoint=checkpoint, device=device, **given)
        if not trainer.run.saved():
            trainer.load()  # raises the error that there is none
    return Policy(trainer, seed=seed)


class Policy:
    """The policy of a run, without exploration, on observations of Gymnasium's envs.

    It acts as in evaluations, and keeps what the policy carries from step to step, such as a
    planner's plan: call :meth:`reset` before the first observation of an episode. Observations
    go through all transforms of the run's real env. The global random states are left as they
    were.

    Args:
        trainer: the run. During training, it acts as it has learnt so far.

    Keyword Args:
        seed: the seed of random draws.
        module: what acts instead of the run's policy, such as TD-MPC2's policy without a plan.

    Attributes:
        action_repeat: for how many calls an action is kept, as in the run. Set it to 1 to act
            in an env that repeats actions itself.

    Raises:
        ValueError: if the run has no policy, or one that reads rewards.

    Examples:
        Several episodes at a time; finished ones are reset:

        >>> import gymnasium
        >>> from torchrl_wm.trainers import MBPOTrainer, Policy
        >>> policy = Policy(MBPOTrainer(env="Pendulum-v1"))
        >>> envs = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make("Pendulum-v1")] * 3)
        >>> observation, _ = envs.reset(seed=0)
        >>> actions = policy.act(observation)
        >>> observation, _, terminated, truncated, _ = envs.step(actions)
        >>> policy.reset(terminated | truncated)
        >>> actions.shape
        (3, 1)
    """

    def __init__(
        self,
        trainer: RecipeTrainer,
        *,
        seed: int = 0,
        module: TensorDictModuleBase | None = None,
    ) -> None:
        policy, env = trainer.recipe.policy if module is None else module, trainer.env
        if policy is None:
            raise ValueError(
                f"A run of {trainer.recipe.name!r} learns no policy: there is nothing that acts."
            )
        rewards = {*env.reward_keys, "episode_reward"} & {*unique(policy.in_keys)}
        if rewards:
            raise ValueError(
                f"The policy of {trainer.recipe.name!r} reads {sorted(rewards)}, which no observation "
                f"tells. Act by trainer.evaluate(episodes)."
            )
        self.trainer = trainer
        self._policy, self._device = policy, trainer.recipe.device
        # The real env with all transforms, and with the entries that the policy carries.
        self._around = prepared(env, policy)
        pixels = _pixels_of(self._around)
        self._values = HandedValues(innermost(self._around), pixels)
        self.action_repeat = repeats(self._around)
        self._random = PrivateRandom(seed, self._device)
        self._size: int | None = None
        self._seats: list[Seat] = []
        self._goes_on = False

    @torch.no_grad()
    def act(self, observation: Any) -> Any:
        """Return an action for an observation, or actions for a batch of them.

        Args:
            observation: the observation of a Gymnasium env or a vector env, ``[N, ...]``, from
                ``reset`` or ``step``: an array, or a dictionary or tuple of arrays. In a run with
                ``pixels``, frames of any size, as ``render`` returns them; with
                ``pixels_only=False`` a dictionary of "pixels" and the env's own observations, a
                single array of which is called "observation".

        Returns:
            The action for ``step`` of the same env: an array of the action space's dtype, or an
            int for a ``Discrete`` space; for a batch, actions as a vector env takes them.

        Raises:
            ValueError: if entries are missing, or have other shapes than in the run; or if the
                batch has another size than at the call before.
        """
        size, rows = self._values.split(observation)
        if self._goes_on and size != self._size:
            raise ValueError(
                f"This is {_counted(size)}, and the call before had {_counted(self._size)}: it is not "
                f"known which plans go on. Call policy.reset() to start new episodes."
            )
        seats = self.act_on(size, [self._values.read(row) for row in rows])
        actions = [seat.action for seat in seats]
        return copy.copy(actions[0]) if size is None else self._values.batch(actions)

    @torch.no_grad()
    def act_on(self, size: int | None, read: list[TensorDictBase]) -> list[Seat]:
        """Act on observations that are entries of the run's innermost env; return the seats.

        Args:
            size: the size of the batch; None for a single observation.
            read: the observations.
        """
        if len(self._seats) != len(read):
            self._seats = [Seat(self._around) for _ in read]
        self._size, self._goes_on = size, True
        asked = [number for number, seat in enumerate(self._seats) if not seat.kept]
        if asked:
            states = [self._seats[number].observe(read[number]) for number in asked]
            for number, acted in zip(asked, self._acted(states)):
                seat = self._seats[number]
                seat.handed = seat.take(acted, self.action_repeat)
                seat.action = self._values.action(seat.handed)
        for seat in self._seats:
            seat.kept -= 1
        return self._seats

    def reset(self, mask: Any = None) -> None:
        """Begin new episodes: the next observation is the first one of an episode.

        Args:
            mask: the rows of a batch that begin new episodes, ``[N]`` bool; by default all.
        """
        if mask is None:
            self._goes_on = False
            for seat in self._seats:
                seat.begin()
            return
        mask = np.asarray(mask)
        if mask.dtype != bool or mask.ndim != 1:
            raise ValueError(
                f"mask says which rows of a batch begin new episodes, [N] bool, got the shape {mask.shape} of "
                f"{mask.dtype}. For a single env call policy.reset()."
            )
        if not self._goes_on:
            return
        if self._size != len(mask):
            raise ValueError(
                f"mask has {len(mask)} values, and the call before had {_counted(self._size)}."
            )
        for number in mask.nonzero()[0]:
            self._seats[number].begin()

    def _acted(self, states: list[TensorDictBase]) -> list[TensorDictBase]:
        """Return the states with what the policy writes, the action included."""
        together = states[0].copy()
        if self._size is not None:
            together = torch.stack(_alike(states, self._policy.in_keys))
        exploration = self.trainer.recipe.evaluation_exploration
        with self._random.used(), set_exploration_type(exploration):
            with evaluation_mode(self._policy):
                acted = self._policy(together.to(self._device)).to("cpu")
        return [acted] if self._size is None else list(acted.unbind(0))

    def __repr__(self) -> str:
        recipe = self.trainer.recipe
        return f"Policy({recipe.name} on {recipe.config.about}, device={self._device})"


class Seat:
    """The state of one episode outside the env: the transforms of the real env, and the last action.

    Args:
        around: the real env, whose transforms are copied.
    """

    def __init__(self, around: EnvBase) -> None:
        observed, pixels = innermost(around), _pixels_of(around)
        if pixels is not None:
            observed = TransformedEnv(observed, pixels.clone(), auto_unwrap=False)
        self._handed = HandedEnv(observed)
        self._env: EnvBase = self._handed
        for transforms in reversed([*layers(around)]):
            # The handed env is neither seeded nor stepped several times.
            kept = [t for t in transforms if not isinstance(t, _OF_THE_ENV)]
            copies = [copy.deepcopy(transform.clone()) for transform in kept]
            self._env = TransformedEnv(self._env, Compose(*copies), auto_unwrap=False)
        #: What the policy read last, and what it wrote; None where an episode begins.
        self.observed: TensorDictBase | None = None
        self.acted: TensorDictBase | None = None
        #: The action as the innermost env gets it, the same as the env within takes it, and how
        #: many more calls it is kept for.
        self.handed: torch.Tensor | None = None
        self.action: Any = None
        self.kept = 0

    def begin(self) -> None:
        """Let the next observation be the first one of an episode."""
        self.acted, self.kept = None, 0

    def observe(self, observation: TensorDictBase) -> TensorDictBase:
        """Return what the policy reads after an observation of the innermost env."""
        env, self._handed.observation = self._env, observation
        if self.acted is None:
            state = env.reset()
        else:
            state = _upstream.following_root(env, env.step(self.acted))
        self.observed = state.copy()
        return state

    def take(self, acted: TensorDictBase, times: int) -> torch.Tensor:
        """Keep what the policy wrote; return the action that the innermost env gets."""
        self.acted, self.kept = acted, times
        env = self._env
        while isinstance(env, TransformedEnv):
            acted = env.transform.inv(acted)
            env = env.base_env
        return acted[env.action_key]


class HandedEnv(EnvBase):
    """An env with the specs of another, whose observations are set from outside.

    Args:
        env: the other env.

    Attributes:
        observation: the observation that the next step or reset returns.
    """

    def __init__(self, env: EnvBase) -> None:
        super().__init__(device=env.device, batch_size=[])
        self.observation_spec = env.observation_spec.clone()
        self.full_action_spec = env.full_action_spec.clone()
        self.full_reward_spec = env.full_reward_spec.clone()
        self.full_done_spec = env.full_done_spec.clone()
        self.observation: TensorDictBase | None = None
        self._on_reset = self.full_done_spec.zero()
        self._on_step = self.full_reward_spec.zero().update(self._on_reset)

    def _reset(
        self, tensordict: TensorDictBase | None = None, **kwargs: Any
    ) -> TensorDictBase:
        return self.observation.copy().update(self._on_reset.clone())

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self.observation.copy().update(self._on_step.clone())

    def _set_seed(self, seed: int | None) -> None:
        """Do nothing: the env draws no random numbers."""


class PrivateRandom:
    """Private random states of the CPU and a device.

    Args:
        seed: their first seed.
        device: the device.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        with forked_random(seed):
            self._states = self._now()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let torch draw from these states."""
        with forked_random():
            torch.set_rng_state(self._states[0])
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._states[1], self._cuda)
            yield
            self._states = self._now()

    def _now(self) -> list[torch.Tensor]:
        states = [torch.get_rng_state()]
        if self._cuda is not None:
            states.append(torch.cuda.get_rng_state(self._cuda))
        return states


def _alike(
    states: list[TensorDictBase], read: Sequence[NestedKey]
) -> list[TensorDictBase]:
    """Return states with the same entries.

    Episodes that have just begun lack what a step leaves. What the policy reads of that, such as
    the last action, is zero there: "is_init" says that it does not matter.
    """
    found = [{*state.keys(True, True)} for state in states]
    every = set.intersection(*found)
    filled = {}
    for key in {*unique(read)} & set.union(*found) - every:
        other = next(state for state, keys in zip(states, found) if key in keys)
        filled[key] = torch.zeros_like(other.get(key))
    made = []
    for state, keys in zip(states, found):
        made.append(state.select(*every, *(key for key in filled if key in keys)))
        for key in filled.keys() - keys:
            made[-1].set(key, filled[key])
    return made


def repeats(env: EnvBase) -> int:
    """Return how many steps of the env within are one of the run's."""
    times = getattr(innermost(env), "wrapper_frame_skip", 1)
    for transform in chain.from_iterable(layers(env)):
        if isinstance(transform, ActionRepeat):
            times *= transform.times
        elif isinstance(transform, FrameSkipTransform):
            times *= transform.frame_skip
    return times


def _pixels_of(env: EnvBase) -> Pixels | None:
    """Return what observes the frames of a real env; None if nothing does."""
    transforms = chain.from_iterable(layers(env))
    return next((each for each in transforms if isinstance(each, Pixels)), None)


def _counted(size: int | None) -> str:
    return "a single observation" if size is None else f"a batch of {size}"
