"""The entries of an env that a world model reads or predicts, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tensordict import NestedKey
from torchrl.envs import EnvBase

from torchrl_wm.models.reference import ActionEntry, SpecEntry, SpecsOnlyEnv
from torchrl_wm.modules.blocks.entries import Entry
from torchrl_wm.modules.blocks.pixels import ImageLayout
from torchrl_wm.modules.keys import as_tuple, sibling, unique


@dataclass(frozen=True)
class PixelEntry(Entry):
    """An image among the observations.

    Args:
        layout: the order of its dims: channels first, channels last, or no channels.
        scale: the largest value, 255 or 1, by which networks divide the image.
    """

    layout: ImageLayout = "CHW"
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
    """The entries of an env that a world model reads or predicts.

    Entries are in alphabetical order of their keys (nested keys joined by dots),
    for any order of the env's specs: a model that is saved and loaded, or made for
    another version of the env, joins them in the same order.

    Args:
        vectors: the observations that are not images.
        pixels: the observations that are images.
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
        """The keys of the observations that are not images."""
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
        """The length of the joined vector observations."""
        return sum(entry.size for entry in self.vectors)

    @property
    def action_size(self) -> int:
        """The length of the joined actions."""
        return sum(entry.size for entry in self.actions)

    @property
    def terminated_key(self) -> NestedKey:
        """The key of terminations, beside the done entry."""
        return sibling(self.done.key, "terminated")

    @property
    def logits_key(self) -> NestedKey:
        """The key of a termination head's logits, below "next"."""
        return sibling(self.done.key, "terminated_logits")

    @property
    def continue_key(self) -> NestedKey:
        """The key of a continue head's logits, below "next"."""
        return sibling(self.done.key, "continue_pred")

    @property
    def loss_keys(self) -> dict[str, NestedKey]:
        """The keys for :meth:`~torchrl_wm.WorldModelLoss.set_keys`."""
        return {
            "reward": self.reward.key,
            "done": self.done.key,
            "terminated": self.terminated_key,
        }

    def without_pixels(self, builder: str) -> EnvSpecs:
        """Return these specs, if they have no images.

        Args:
            builder: the name of the builder, for the message.

        Raises:
            ValueError: if there are images; the message names them.
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
        """Return these specs, if all vector observations are floats.

        Args:
            builder: the name of the builder, for the message.

        Raises:
            ValueError: if there are others; the message names them.
        """
        others = [e for e in self.vectors if not e.dtype.is_floating_point]
        if others:
            raise ValueError(
                f"{builder} predicts the observations as floats, and cannot serve "
                f"{_listed(others)}. Convert them with a transform "
                f"(torchrl.envs.DTypeCastTransform, OneHot observations to torch.float32), leave "
                f"them out with observation_keys=[...], or use make_mlp_world_model, which "
                f"encodes them. In a log, write them as floats: observations.astype(np.float32), "
                f"in a CSV file 1.0 for 1."
            )
        return self

    def float_reward(self, builder: str) -> Entry:
        """Return the entry of the reward, if the reward is a float.

        Args:
            builder: the name of the builder, for the message.

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
        """Make an env that has only these specs, as the reference env of a ``WorldModelEnv``.

        Its float observations have no bounds, and it can be neither reset nor stepped.

        Raises:
            ValueError: if the spec of an action is not known, as in files that older
                versions wrote.
        """
        names = ("done", "terminated", "truncated")
        done = [replace(self.done, key=sibling(self.done.key, name)) for name in names]
        observations = (*self.vectors, *self.pixels)
        return SpecsOnlyEnv(observations, self.actions, self.reward, done)

    # Plain data ----------------------------------------------------------

    def to_plain(self) -> dict[str, Any]:
        """Return these specs as dictionaries, lists, strings and numbers, for a file."""
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
        """Return the specs from which :meth:`to_plain` made ``data``.

        Raises:
            KeyError, TypeError, ValueError: if ``data`` is not of that form.
        """
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
        raise ValueError(f"{data['dtype']!r} is not a dtype of torch.")
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
    """Add the spec in a file to an entry; files of older versions hold none."""
    lists = {name: tuple(spec.get(name, ())) for name in ("sizes", "low", "high")}
    kind = str(spec.get("kind", ""))
    out = made(entry.key, entry.shape, entry.dtype, entry.classes, kind, **lists)
    if kind:
        out.to_spec()  # fails here for a damaged file, not later in use
    return out


def _listed(entries: Sequence[Entry]) -> str:
    return ", ".join(f"{e.key!r} {list(e.shape)} {e.dtype}" for e in entries)
