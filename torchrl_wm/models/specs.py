"""Reading the entries that a world model has from the specs of an env."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import NestedKey
from torchrl.data import Bounded, Composite, NonTensor, TensorSpec
from torchrl.envs import EnvBase

from torchrl_wm.models.env_specs import EnvSpecs, PixelEntry
from torchrl_wm.models.reference import ActionEntry, SpecEntry
from torchrl_wm.modules.blocks.entries import Entry
from torchrl_wm.modules.blocks.pixels import image_layout, MIN_SIDE
from torchrl_wm.modules.keys import as_tuple, unique

#: Entries that transforms write beside the observations, and that no model predicts.
BOOKKEEPING = frozenset(
    {"is_init", "step_count", "traj_ids", "episode_reward", "imagined_step"}
)


def read_specs(
    env: EnvBase, *, observation_keys: Sequence[NestedKey] | None = None
) -> EnvSpecs:
    """Read the entries that a world model of ``env`` reads or predicts.

    - Observations: all entries of the observation spec but the counters of transforms
      (``is_init``, ``step_count``, ``episode_reward``, ``traj_ids``). An image, under
      any key, is an entry ``[C, H, W]`` or ``[H, W, C]`` (uint8 or float) or ``[H, W]``
      (uint8). Its sides are at least 8, and it has at most 16 channels; one of uint8
      may have more, but fewer than rows and than columns.
    - Actions: all entries of the action spec, flattened: continuous, one-hot and binary
      ones as floats, categorical ones as one-hot vectors.
    - One reward and one done entry.

    Args:
        env: the env; it is neither reset nor stepped.

    Keyword Args:
        observation_keys: the observations to read; all by default.

    Returns:
        The entries, without batch dims.

    Raises:
        TypeError: if ``env`` is not a TorchRL env.
        ValueError: for an entry that no builder serves, and for an observation with the key
            of an action; the message names it.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm.models import read_specs
        >>> specs = read_specs(GymEnv("CartPole-v1"))
        >>> specs.observation_keys, specs.vector_size, specs.action_keys, specs.action_size
        (['observation'], 4, ['action'], 2)
    """
    if not isinstance(env, EnvBase):
        raise TypeError(
            f"env must be a torchrl.envs.EnvBase, whose specs are read, got "
            f"{type(env).__name__}. Wrap a Gymnasium env: torchrl.envs.GymWrapper(env)."
        )
    observations = _observations(env, observation_keys)
    actions = _leaves(env.full_action_spec_unbatched)
    _check_names(observations, actions)
    vectors, pixels = [], []
    for key, spec in observations.items():
        _check_numeric("observation", key, spec)
        pixel = pixel_entry(key, spec)
        if pixel is None:
            _check_no_image(key, spec)
            # A spec of bits or options says which values there are; of floats, only the form counts.
            kind = Entry if spec.dtype.is_floating_point else SpecEntry
            vectors.append(kind.from_spec(key, spec))
        else:
            pixels.append(pixel)
    if not actions:
        raise ValueError("The env has no action: its action spec is empty.")
    for key, spec in actions.items():
        _check_numeric("action", key, spec)
    return EnvSpecs(
        tuple(vectors),
        tuple(pixels),
        tuple(ActionEntry.from_spec(key, spec) for key, spec in actions.items()),
        _reward(env),
        _done(env),
    )


def pixel_entry(key: NestedKey, spec: TensorSpec) -> PixelEntry | None:
    """Return the entry of an image; None if the spec is not that of an image."""
    shape, dtype = tuple(spec.shape), spec.dtype
    layout = image_layout(shape, dtype)
    if layout is None:
        return None
    scale = 1.0
    if dtype is torch.uint8:
        scale = 255.0
    elif isinstance(spec, Bounded) and 1 < float(spec.space.high.max()) <= 255:
        scale = 255.0
    return PixelEntry(unique([key])[0], shape, dtype, layout=layout, scale=scale)


# Reading -------------------------------------------------------------------


def _leaves(spec: Composite) -> dict[NestedKey, TensorSpec]:
    """Return the leaves by flat key, in alphabetical order."""
    keys = unique(spec.keys(True, True))
    return {key: spec[key] for key in sorted(keys, key=lambda k: ".".join(as_tuple(k)))}


def _observations(
    env: EnvBase, wanted: Sequence[NestedKey] | None
) -> dict[NestedKey, TensorSpec]:
    leaves = _leaves(env.full_observation_spec_unbatched)
    if wanted is None:
        found = {
            key: spec
            for key, spec in leaves.items()
            if as_tuple(key)[-1] not in BOOKKEEPING
        }
    else:
        # A string is one key, not its letters.
        names = unique([wanted] if isinstance(wanted, str) else wanted)
        unknown = [key for key in names if key not in leaves]
        if unknown:
            raise ValueError(
                f"observation_keys names {unknown}, which the env lacks; its observations are "
                f"{list(leaves)}."
            )
        found = {key: spec for key, spec in leaves.items() if key in names}
    if not found:
        raise ValueError(
            f"There is no observation to model: the env's observation spec has {list(leaves)}, "
            f"and observation_keys is {wanted!r}."
        )
    return found


def _check_names(
    observations: Mapping[NestedKey, TensorSpec],
    actions: Mapping[NestedKey, TensorSpec],
) -> None:
    """Refuse observations under keys that mean something else in a transition."""
    for key in observations:
        names = as_tuple(key)
        if names[0] == "next":
            place, what, way = 0, "the results of a step", ""
        elif key in actions:
            place, what = len(names) - 1, "the action, which a policy writes over it"
            way = ", or leave it out with observation_keys=[...]"
        else:
            continue  # TorchRL itself refuses the names of rewards and ends
        other = (*names[:place], f"env_{names[place]}", *names[place + 1 :])
        raise ValueError(
            f"The env has the observation {key!r}, where a transition has {what}. Rename it: "
            f"torchrl.envs.TransformedEnv(env, torchrl.envs.RenameTransform(in_keys=[{key!r}], "
            f"out_keys=[{unique([other])[0]!r}])){way}."
        )


def _check_numeric(kind: str, key: NestedKey, spec: TensorSpec) -> None:
    if isinstance(spec, NonTensor) or spec.dtype is None:
        raise ValueError(
            f"The {kind} {key!r} has the spec {type(spec).__name__}, which is not a tensor of "
            f"numbers, so that no network can read it. "
            + (
                "Leave it out with observation_keys=[...]."
                if kind == "observation"
                else "Replace it by a transform."
            )
        )
    if any(n < 1 for n in spec.shape):
        raise ValueError(
            f"The {kind} {key!r} has the shape {tuple(spec.shape)}, and needs one of fixed dims, "
            f"none of them empty."
        )


def _check_no_image(key: NestedKey, spec: TensorSpec) -> None:
    """Refuse bytes that look like an image and would become a vector of thousands of numbers."""
    shape = tuple(spec.shape)
    large = sum(n >= MIN_SIDE for n in shape)
    if spec.dtype is not torch.uint8 or len(shape) < 3 or large < 2:
        return
    dims = f"{-len(shape)}, -1, in_keys=[{key!r}]"
    raise ValueError(
        f"The observation {key!r} has the shape {shape} of torch.uint8, and is no image that a "
        f"network reads: [C, H, W] or [H, W, C] with fewer channels than rows and than columns, "
        f"or [H, W]. Stack frames along the channels (torchrl.envs.CatFrames(N, dim=-3, "
        f"in_keys=[{key!r}])), flatten it if it is a vector "
        f"(torchrl.envs.FlattenObservation({dims})), or leave it out with "
        f"observation_keys=[...]."
    )


def _reward(env: EnvBase) -> Entry:
    rewards = _leaves(env.full_reward_spec_unbatched)
    if len(rewards) != 1:
        raise ValueError(
            f"The env's reward spec has {list(rewards)}; a builder serves one reward. Wire the "
            f"model by hand, WorldModel(...), with a reward_head that writes all of them."
        )
    return Entry.from_spec(*next(iter(rewards.items())))


def _done(env: EnvBase) -> Entry:
    dones = {
        key: spec
        for key, spec in _leaves(env.full_done_spec_unbatched).items()
        if as_tuple(key)[-1] == "done"
    }
    # Beside the done entries of single agents, the shared one ends the episode.
    shared = {key: spec for key, spec in dones.items() if isinstance(key, str)}
    dones = shared or dones
    if len(dones) != 1:
        raise ValueError(
            f"The env's done spec has {list(dones)}; a builder serves one done entry. Wire the "
            f"model by hand, WorldModel(...), with a done_head that writes all of them."
        )
    return Entry.from_spec(*next(iter(dones.items())))
