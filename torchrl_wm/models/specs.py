"""What a builder needs to know of an env, read from its specs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from tensordict import NestedKey
from torchrl.data import Bounded, Composite, NonTensor, TensorSpec
from torchrl.envs import EnvBase

from torchrl_wm.models.reference import ActionEntry, SpecEntry, SpecsOnlyEnv
from torchrl_wm.modules.blocks.entries import Entry
from torchrl_wm.modules.keys import as_tuple, sibling, unique

#: What transforms write beside the observations, and no model is to predict.
BOOKKEEPING = frozenset(
    {"is_init", "step_count", "traj_ids", "episode_reward", "imagined_step"}
)

PixelLayout = Literal["CHW", "HWC", "HW"]
#: More channels than this are no image: a stack of 4 RGBA frames has 16. Bytes may have more.
_MAX_CHANNELS = 16
#: Fewer rows or columns than this are no image.
_MIN_SIDE = 8


@dataclass(frozen=True)
class PixelEntry(Entry):
    """An image among the observations.

    Args:
        layout: the order of its dims: channels first, last, or none at all.
        scale: the largest value: 255 or 1. Divided by it, the image is in [0, 1].
    """

    layout: PixelLayout = "CHW"
    scale: float = 1.0

    @property
    def chw(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        if self.layout == "HW":
            return (1, *self.shape)
        if self.layout == "CHW":
            return self.shape
        height, width, channels = self.shape
        return channels, height, width


@dataclass(frozen=True)
class EnvSpecs:
    """The entries of an env, as far as a world model has to do with them.

    Entries are in alphabetical order of their keys (nested keys joined by dots),
    whatever the order of the env's specs: models saved and loaded, or made of two
    versions of an env, join the same way.

    Args:
        vectors: observations that are no images.
        pixels: observations that are images.
        actions: the actions.
        reward: the reward.
        done: the done entry.
    """

    vectors: tuple[Entry, ...]
    pixels: tuple[PixelEntry, ...]
    actions: tuple[ActionEntry, ...]
    reward: Entry
    done: Entry

    @property
    def observation_keys(self) -> list[NestedKey]:
        """The keys of all observations, images last."""
        return [entry.key for entry in (*self.vectors, *self.pixels)]

    @property
    def vector_keys(self) -> list[NestedKey]:
        """The keys of the observations that are no images."""
        return [entry.key for entry in self.vectors]

    @property
    def pixel_keys(self) -> list[NestedKey]:
        """The keys of the images."""
        return [entry.key for entry in self.pixels]

    @property
    def action_keys(self) -> list[NestedKey]:
        """The keys of the actions."""
        return [entry.key for entry in self.actions]

    @property
    def vector_size(self) -> int:
        """The length of the vector observations joined."""
        return sum(entry.size for entry in self.vectors)

    @property
    def action_size(self) -> int:
        """The length of the actions joined."""
        return sum(entry.size for entry in self.actions)

    @property
    def terminated_key(self) -> NestedKey:
        """Where terminations stand, beside the done entry."""
        return sibling(self.done.key, "terminated")

    @property
    def logits_key(self) -> NestedKey:
        """Where a termination head writes its logits, below "next"."""
        return sibling(self.done.key, "terminated_logits")

    @property
    def continue_key(self) -> NestedKey:
        """Where a continue head writes its logits, below "next"."""
        return sibling(self.done.key, "continue_pred")

    @property
    def loss_keys(self) -> dict[str, NestedKey]:
        """What :meth:`~torchrl_wm.WorldModelLoss.set_keys` has to be told."""
        return {
            "reward": self.reward.key,
            "done": self.done.key,
            "terminated": self.terminated_key,
        }

    def without_pixels(self, builder: str) -> EnvSpecs:
        """Themselves, if there are no images.

        Raises:
            ValueError: if there are; the message names them.
        """
        if self.pixels:
            raise ValueError(
                f"{builder} cannot serve the images {_listed(self.pixels)}. Use "
                f"make_rssm_world_model, make_tdmpc2_world_model or make_mlp_world_model, or "
                f"choose other observations: {builder}(env, observation_keys=[...]) (there are "
                f"{self.vector_keys or 'no others'})."
            )
        return self

    def only_floats(self, builder: str) -> EnvSpecs:
        """Themselves, if all vector observations are floats, which can be predicted as they are.

        Raises:
            ValueError: if some are not; the message names them.
        """
        others = [e for e in self.vectors if not e.dtype.is_floating_point]
        if others:
            raise ValueError(
                f"{builder} predicts the observations themselves as floats, and cannot serve "
                f"{_listed(others)}. Convert them with a transform "
                f"(torchrl.envs.DTypeCastTransform, OneHot observations to torch.float32), leave "
                f"them out with observation_keys=[...], or use make_mlp_world_model, which "
                f"encodes them."
            )
        return self

    def float_reward(self, builder: str) -> Entry:
        """The reward, if it is a float, which can be predicted as it is.

        Raises:
            ValueError: if it is not; the message names it.
        """
        key, dtype = self.reward.key, self.reward.dtype
        if not dtype.is_floating_point:
            raise ValueError(
                f"{builder} predicts the reward as a float, and the reward {key!r} of the env is "
                f"{dtype}. Convert it: torchrl.envs.TransformedEnv(env, "
                f"torchrl.envs.DTypeCastTransform(dtype_in={dtype}, dtype_out=torch.float32, "
                f"in_keys=[{key!r}]))."
            )
        return self.reward

    def reference_env(self) -> EnvBase:
        """An env with these specs and nothing behind them, for a ``WorldModelEnv``.

        Its float observations have no bounds, and it can neither be reset nor stepped.

        Raises:
            ValueError: if the spec of an action is not known, as in files of older
                versions.
        """
        names = ("done", "terminated", "truncated")
        done = [replace(self.done, key=sibling(self.done.key, name)) for name in names]
        observations = (*self.vectors, *self.pixels)
        return SpecsOnlyEnv(observations, self.actions, self.reward, done)

    # Plain data ----------------------------------------------------------

    def to_plain(self) -> dict[str, Any]:
        """Themselves as dictionaries, lists, strings and numbers, for a file."""
        return {
            name: [_plain(entry) for entry in entries]
            for name, entries in (
                ("vectors", self.vectors),
                ("pixels", self.pixels),
                ("actions", self.actions),
                ("reward", [self.reward]),
                ("done", [self.done]),
            )
        }

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> EnvSpecs:
        """What :meth:`to_plain` made, back."""
        read = {name: [_entry(item) for item in data[name]] for name in data}
        actions = [
            _with_spec(ActionEntry, entry, item.get("spec", {}))
            for entry, item in zip(read["actions"], data["actions"])
        ]
        vectors = [
            _with_spec(SpecEntry, entry, item["spec"]) if "spec" in item else entry
            for entry, item in zip(read["vectors"], data["vectors"])
        ]
        return cls(
            tuple(vectors),
            tuple(read["pixels"]),
            tuple(actions),
            *read["reward"],
            *read["done"],
        )


def read_specs(
    env: EnvBase, *, observation_keys: Sequence[NestedKey] | None = None
) -> EnvSpecs:
    """Read the entries that a world model of ``env`` has to do with.

    - Observations: all entries of the observation spec but what transforms count
      there (``is_init``, ``step_count``, ``episode_reward``, ``traj_ids``). Images,
      under whatever key, are entries ``[C, H, W]``, ``[H, W, C]`` (uint8 or float) or
      ``[H, W]`` (uint8) with at most 16 channels, or, of uint8, fewer than rows and than
      columns, and sides of at least 8.
    - Actions: all entries of the action spec: continuous, one-hot and binary
      ones as floats, categorical ones as one-hot vectors, all flattened.
    - The reward and the done entry: one of each.

    Args:
        env: the env; it is neither reset nor stepped.

    Keyword Args:
        observation_keys: which observations to use, in place of all.

    Returns:
        The entries, without batch dims.

    Raises:
        TypeError: if ``env`` is no TorchRL env.
        ValueError: if a spec cannot be served, or an observation has the key of an action;
            the message names it.

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
            # What floats there may be no model heeds; of bits and options it says which.
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
    """The entry of an image; None if the spec is of something else."""
    shape, dtype = tuple(spec.shape), spec.dtype
    if dtype is not torch.uint8 and not dtype.is_floating_point:
        return None
    if len(shape) == 2 and dtype is torch.uint8:
        layout: PixelLayout = "HW"
        sides = shape
    elif len(shape) == 3:
        # The fewer of the first and last dim are the channels.
        first = shape[0] <= shape[-1]
        layout = "CHW" if first else "HWC"
        sides = shape[1:] if first else shape[:-1]
        most = _MAX_CHANNELS
        if dtype is torch.uint8:
            most = max(most, min(sides) - 1)
        if min(shape[0], shape[-1]) > most:
            return None
    else:
        return None
    if min(sides) < _MIN_SIDE:
        return None
    scale = 1.0
    if dtype is torch.uint8:
        scale = 255.0
    elif isinstance(spec, Bounded) and 1 < float(spec.space.high.max()) <= 255:
        scale = 255.0
    return PixelEntry(unique([key])[0], shape, dtype, layout=layout, scale=scale)


# Reading -------------------------------------------------------------------


def _leaves(spec: Composite) -> dict[NestedKey, TensorSpec]:
    """The leaves by flat key, in alphabetical order."""
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
        # A lone string is one key, not its letters.
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
    """Refuse observations that stand where a transition has something else."""
    for key in observations:
        names = as_tuple(key)
        if names[0] == "next":
            place, what, way = 0, "what comes after a step", ""
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
            f"The {kind} {key!r} has the spec {type(spec).__name__}, which is no tensor of "
            f"numbers, so no network reads it. "
            + (
                "Leave it out with observation_keys=[...]."
                if kind == "observation"
                else "Replace it by a transform."
            )
        )
    if any(n < 1 for n in spec.shape):
        raise ValueError(
            f"The {kind} {key!r} has the shape {tuple(spec.shape)}; one of fixed dims, none of "
            f"them empty, is needed."
        )


def _check_no_image(key: NestedKey, spec: TensorSpec) -> None:
    """Refuse bytes that look like images and would become a vector of thousands of numbers."""
    shape = tuple(spec.shape)
    large = sum(n >= _MIN_SIDE for n in shape)
    if spec.dtype is not torch.uint8 or len(shape) < 3 or large < 2:
        return
    dims = f"{-len(shape)}, -1, in_keys=[{key!r}]"
    raise ValueError(
        f"The observation {key!r} has the shape {shape} of torch.uint8, and is no image that a "
        f"network reads: [C, H, W] or [H, W, C] with fewer channels than rows and than columns, "
        f"or [H, W]. Stack frames along the channels (torchrl.envs.CatFrames(N, dim=-3, "
        f"in_keys=[{key!r}])), make one vector of it if that is what it is "
        f"(torchrl.envs.FlattenObservation({dims})), or leave it out with "
        f"observation_keys=[...]."
    )


def _reward(env: EnvBase) -> Entry:
    rewards = _leaves(env.full_reward_spec_unbatched)
    if len(rewards) != 1:
        raise ValueError(
            f"The env's reward spec has {list(rewards)}; a builder serves one reward. Wire the "
            f"model by hand, WorldModel(...), with a reward_head that writes them all."
        )
    return Entry.from_spec(*next(iter(rewards.items())))


def _done(env: EnvBase) -> Entry:
    dones = {
        key: spec
        for key, spec in _leaves(env.full_done_spec_unbatched).items()
        if as_tuple(key)[-1] == "done"
    }
    # Agents' own done entries beside one for all: the latter ends the episode.
    shared = {key: spec for key, spec in dones.items() if isinstance(key, str)}
    dones = shared or dones
    if len(dones) != 1:
        raise ValueError(
            f"The env's done spec has {list(dones)}; a builder serves one done entry. Wire the "
            f"model by hand, WorldModel(...), with a done_head that writes them all."
        )
    return Entry.from_spec(*next(iter(dones.items())))


# Plain data ----------------------------------------------------------------


def _plain(entry: Entry) -> dict[str, Any]:
    plain = {
        "key": list(as_tuple(entry.key)),
        "shape": list(entry.shape),
        "dtype": str(entry.dtype).removeprefix("torch."),
        "classes": list(entry.classes),
    }
    if isinstance(entry, PixelEntry):
        plain.update(layout=entry.layout, scale=entry.scale)
    if isinstance(entry, SpecEntry):
        lists = {name: list(getattr(entry, name)) for name in ("sizes", "low", "high")}
        plain["spec"] = {"kind": entry.kind, **lists}
    return plain


def _entry(data: dict[str, Any]) -> Entry:
    dtype = getattr(torch, data["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{data['dtype']!r} is no dtype of torch.")
    entry = Entry(
        unique([tuple(data["key"])])[0],
        tuple(data["shape"]),
        dtype,
        tuple(data["classes"]),
    )
    if "layout" not in data:
        return entry
    base = {name: getattr(entry, name) for name in entry.__dataclass_fields__}
    return replace(PixelEntry(**base), layout=data["layout"], scale=data["scale"])


def _with_spec(made: type[SpecEntry], entry: Entry, spec: dict[str, Any]) -> SpecEntry:
    """The entry with what the file says of the spec; older files say nothing."""
    lists = {name: tuple(spec.get(name, ())) for name in ("sizes", "low", "high")}
    kind = str(spec.get("kind", ""))
    out = made(entry.key, entry.shape, entry.dtype, entry.classes, kind, **lists)
    if kind:
        out.to_spec()  # a damaged file shows here, and not in use
    return out


def _listed(entries: Sequence[Entry]) -> str:
    return ", ".join(f"{e.key!r} {list(e.shape)} {e.dtype}" for e in entries)
