"""What lies between a real env and the policy: transforms, and the form of actions."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any

import torch
from gymnasium import spaces
from tensordict import TensorDictBase
from torch import nn
from torchrl import envs
from torchrl.data import Composite, OneHot, TensorSpec
from torchrl.envs import EnvBase, Transform, TransformedEnv

from torchrl_wm.trainers.episode_seeds import EpisodeSeeds
from torchrl_wm.trainers.gym_actions import innermost, layers, own_action_space
from torchrl_wm.trainers.pixels import Pixels
from torchrl_wm.trainers.real_envs import ActionRepeat

#: Transforms that change neither observations nor actions, or are part of the run and done by
#: other means: casts by the dtype of the entries, "is_init" by an input.
_ASIDE = (
    EpisodeSeeds,
    ActionRepeat,
    Pixels,
    envs.DoubleToFloat,
    envs.FiniteTensorDictCheck,
    envs.FrameSkipTransform,
    envs.InitTracker,
    envs.NoopResetEnv,
    envs.RemoveEmptySpecs,
    envs.RewardClipping,
    envs.RewardScaling,
    envs.RewardSum,
    envs.StepCounter,
    envs.TensorDictPrimer,
)
#: Transforms that treat each step alone, by operations on tensors.
_OF_A_STEP = (
    envs.ActionScaling,
    envs.CatTensors,
    envs.CenterCrop,
    envs.ClipTransform,
    envs.Crop,
    envs.DTypeCastTransform,
    envs.ExcludeTransform,
    envs.FlattenObservation,
    envs.GrayScale,
    envs.ObservationNorm,
    envs.PermuteTransform,
    envs.RenameTransform,
    envs.SelectTransform,
    envs.SqueezeTransform,
    envs.ToTensorImage,
    envs.UnsqueezeTransform,
)


class Surroundings(nn.Module):
    """The transforms between a real env and its policy, for a batch of steps.

    Args:
        env: the real env, with all transforms.

    Attributes:
        inside: the names of the user's transforms that are applied here.
        outside: those that cannot be, as they keep a state or are not known. Then none is
            applied: the policy reads what they give.
    """

    def __init__(self, env: EnvBase) -> None:
        super().__init__()
        inner_first = chain.from_iterable(reversed([*layers(env)]))
        every = [each for each in inner_first if type(each) not in _ASIDE]
        known = all(_is_known(each) for each in every)
        names = [type(each).__name__ for each in every]
        self.inside, self.outside = (names, []) if known else ([], names)
        every = [Affine(t) if isinstance(t, envs.ObservationNorm) else t for t in every]
        self.transforms = nn.ModuleList(every if known else [])
        self._outer = env.full_observation_spec_unbatched
        #: The entries that the policy is given in an env, before any transform if that is possible.
        self.entries = _shown(env) if known else self._outer
        self._action_key = env.action_key
        self._inner_key = innermost(env).action_key if known else env.action_key
        self.action_form = ActionForm(env, own=known)

    def observe(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return what the policy reads of observations of the env, ``[B]``."""
        for transform in self.transforms:
            is_affine = isinstance(transform, Affine)
            change = transform if is_affine else partial(transform._reset, tensordict)
            tensordict = change(tensordict)
        for key in list(tensordict.keys(True, True)):
            value, spec = tensordict.get(key), self._outer.get(key, None)
            if spec is not None and spec.dtype != value.dtype:
                tensordict.set(key, value.to(spec.dtype))
        return tensordict

    def act(self, acted: TensorDictBase) -> torch.Tensor:
        """Return the action of a policy, ``[B, *A]``, as the env takes it."""
        acted = acted.select(self._action_key)
        for transform in reversed(self.transforms):
            if not isinstance(transform, Affine):
                acted = transform.inv(acted)
        return self.action_form(acted.get(self._inner_key))


def _is_known(transform: Transform) -> bool:
    is_norm = isinstance(transform, envs.ObservationNorm)
    # Dims from the left are other ones in a batch.
    dims = (getattr(transform, name, -1) for name in ("_dim", "first_dim", "last_dim"))
    is_of_a_step = type(transform) in _OF_A_STEP and all(dim < 0 for dim in dims)
    return is_of_a_step and not (is_norm and transform.in_keys_inv)


class Affine(nn.Module):
    """What an ObservationNorm does, without a look at its tensors, which a program cannot take.

    Args:
        norm: the transform.
    """

    def __init__(self, norm: envs.ObservationNorm) -> None:
        super().__init__()
        self._keys = list(zip(norm.in_keys, norm.out_keys))
        self._is_standard = bool(norm.standard_normal)
        self.register_buffer("loc", norm.loc.detach().clone(), persistent=False)
        self.register_buffer("scale", norm.scale.detach().clone(), persistent=False)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the normed observations."""
        for key, out in self._keys:
            value = tensordict.get(key)
            if self._is_standard:
                value = (value - self.loc) / self.scale
            else:
                value = value * self.scale + self.loc
            tensordict.set(out, value)
        return tensordict


class ActionForm(nn.Module):
    """The form in which the real env takes actions.

    Args:
        env: the real env.
        own: take the form of the env itself; False for that of its transforms.

    Attributes:
        described: in words.
        spec: TorchRL's spec of the action before.
        space: the Gymnasium space, if the env is one of Gymnasium's.
        entry: the entry of a dictionary that the action is, if the env takes one.
    """

    def __init__(self, env: EnvBase, own: bool = True) -> None:
        super().__init__()
        inner = innermost(env) if own else env
        self.spec: TensorSpec = inner.full_action_spec_unbatched[inner.action_key]
        space, self.entry = own_action_space(env) if own else None, None
        if isinstance(space, spaces.Dict) and len(space) == 1:
            self.entry, space = next(iter(space.items()))
        self.space = space if isinstance(space, (spaces.Box, spaces.Discrete)) else None
        if isinstance(self.space, spaces.Discrete):
            first = int(space.start)
            self.described = (
                f"an option, {first} to {first + int(space.n) - 1}, as the env counts"
            )
        elif self.space is not None:
            self.described = "the numbers of a Box"
            self.register_buffer("low", torch.as_tensor(space.low), persistent=False)
            self.register_buffer("high", torch.as_tensor(space.high), persistent=False)
        else:
            self.described = f"as in TorchRL's {type(self.spec).__name__}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an action."""
        return tuple((self.space or self.spec).shape)

    def forward(self, action: torch.Tensor) -> torch.Tensor:
        """Return actions of the TorchRL env, ``[B, *A]``, in this form."""
        if isinstance(self.space, spaces.Discrete):
            if isinstance(self.spec, OneHot):
                action = action.long().argmax(-1)
            option = action.reshape(action.shape[:1]).long() + int(self.space.start)
            return option.to(getattr(torch, self.space.dtype.name))
        if self.space is None:
            return action.to(self.spec.dtype)
        action = action.to(self.low.dtype).reshape(-1, *self.shape)
        inside = action.clamp(self.low, self.high)
        # Bounds in float32 may exceed those in float64 by a rounding error.
        rounded = (inside - action).abs() <= 1e-6 * action.abs()
        return torch.where(rounded, inside, action)

    def bounds(self) -> tuple[Any, Any]:
        """Return the least and the greatest numbers; None where there are none."""
        if self.space is not None:
            is_choice = isinstance(self.space, spaces.Discrete)
            first = int(self.space.start) if is_choice else 0
            last = first + int(self.space.n) - 1 if is_choice else 0
            return (first, last) if is_choice else (self.low, self.high)
        return bounds_of(self.spec)


def bounds_of(spec: TensorSpec) -> tuple[Any, Any]:
    """Return the bounds of a spec; None where there are none."""
    space = getattr(spec, "space", None)
    return getattr(space, "low", None), getattr(space, "high", None)


def shown_env(env: EnvBase) -> EnvBase:
    """Return the innermost env, with the images that a run observes."""
    inner = innermost(env)
    for transform in chain.from_iterable(layers(env)):
        if isinstance(transform, Pixels):
            return TransformedEnv(inner, transform.clone(), auto_unwrap=False)
    return inner


def _shown(env: EnvBase) -> Composite:
    return shown_env(env).full_observation_spec_unbatched
