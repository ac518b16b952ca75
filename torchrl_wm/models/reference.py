"""An env that has only specs: those in a file, of the env that its model was made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl import data
from torchrl.data import Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from torchrl_wm.modules.blocks.entries import Entry

#: The kinds of specs; subclasses stand before their base classes.
_KINDS: dict[str, type[TensorSpec]] = {
    "multi_one_hot": data.MultiOneHot,
    "one_hot": data.OneHot,
    "binary": data.Binary,
    "multi_categorical": data.MultiCategorical,
    "categorical": data.Categorical,
    "bounded": data.Bounded,
    "unbounded": Unbounded,
}


@dataclass(frozen=True)
class SpecEntry(Entry):
    """An entry from which its spec can be made again.

    Args:
        kind: the kind of its spec, such as ``"bounded"``; empty if it is unknown.
        sizes: the numbers of choices of a discrete spec.
        low: the lower bounds of a bounded spec, flattened.
        high: the upper bounds, flattened.
    """

    kind: str = ""
    sizes: tuple[int, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    @classmethod
    def from_spec(cls, key: NestedKey, spec: TensorSpec) -> SpecEntry:
        """Return the entry of a spec without batch dims."""
        plain = Entry.from_spec(key, spec)
        kind = next((name for name, k in _KINDS.items() if isinstance(spec, k)), "")
        sizes: Sequence[Any] = ()
        low: Sequence[float] = ()
        high: Sequence[float] = ()
        if kind == "bounded":
            bounds = (spec.space.low, spec.space.high)
            low, high = (b.expand(spec.shape).reshape(-1).tolist() for b in bounds)
        elif kind == "multi_one_hot":
            sizes = [int(n) for n in spec.nvec]
        elif kind == "multi_categorical":
            sizes = spec.nvec.expand(spec.shape).reshape(-1).tolist()
        elif kind in ("one_hot", "categorical"):
            sizes = [int(spec.space.n)]
        return cls(
            plain.key,
            plain.shape,
            plain.dtype,
            plain.classes,
            kind,
            tuple(int(n) for n in sizes),
            tuple(low),
            tuple(high),
        )

    def to_spec(self) -> TensorSpec:
        """Return the spec, without batch dims.

        Raises:
            ValueError: if the kind of the spec is unknown.
        """
        form = {"shape": torch.Size(self.shape), "dtype": self.dtype}
        if self.kind == "bounded":
            low, high = (
                torch.tensor(bound, dtype=self.dtype).reshape(self.shape)
                for bound in (self.low, self.high)
            )
            return data.Bounded(low, high, **form)
        if self.kind == "multi_categorical":
            return data.MultiCategorical(
                torch.tensor(self.sizes).reshape(self.shape), **form
            )
        if self.kind == "multi_one_hot":
            return data.MultiOneHot(list(self.sizes), **form)
        if self.kind in ("one_hot", "categorical"):
            return _KINDS[self.kind](self.sizes[0], **form)
        if self.kind == "binary":
            return data.Binary(self.shape[-1] if self.shape else None, **form)
        if self.kind == "unbounded":
            return Unbounded(**form)
        raise ValueError(
            f"The spec of the action {self.key!r} is not known: an older version wrote the file, "
            f"or files cannot hold specs of this kind. Pass the env, base_env=..."
        )


class ActionEntry(SpecEntry):
    """An action from which its spec can be made again; see :class:`SpecEntry`."""


class SpecsOnlyEnv(EnvBase):
    """An env that has only specs: a reference env for imagination.

    Args:
        observations: the entries of the observations. Floats have no bounds.
        actions: the entries of the actions.
        reward: the entry of the reward.
        done: the entries of "done", "terminated" and "truncated".

    Raises:
        ValueError: if the spec of an action is not known.
    """

    def __init__(
        self,
        observations: Sequence[Entry],
        actions: Sequence[ActionEntry],
        reward: Entry,
        done: Sequence[Entry],
    ) -> None:
        super().__init__(batch_size=[])
        self.observation_spec = _composite((e, _observation(e)) for e in observations)
        self.full_action_spec = _composite((e, e.to_spec()) for e in actions)
        self.full_reward_spec = _composite([(reward, _observation(reward))])
        self.full_done_spec = _composite(
            (entry, data.Categorical(2, shape=entry.shape, dtype=torch.bool))
            for entry in done
        )

    def _nothing(self) -> NotImplementedError:
        return NotImplementedError(
            "This env has only specs: the model was made again from a file, without the env. "
            "Pass the real env, base_env=..., or the states where episodes begin, "
            "start_states=..."
        )

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> Any:
        raise self._nothing()

    def _step(self, tensordict: TensorDictBase) -> Any:
        raise self._nothing()

    def _set_seed(self, seed: int | None) -> None:
        pass


def _observation(entry: Entry) -> TensorSpec:
    if isinstance(entry, SpecEntry) and entry.kind:
        return entry.to_spec()
    shape = torch.Size(entry.shape)
    if entry.classes and len(set(entry.classes)) == 1:
        return data.Categorical(entry.classes[0], shape=shape, dtype=entry.dtype)
    if entry.classes:
        sizes = torch.tensor(entry.classes).reshape(shape)
        return data.MultiCategorical(sizes, shape=shape, dtype=entry.dtype)
    if entry.dtype is torch.bool:
        return data.Categorical(2, shape=shape, dtype=torch.bool)
    return Unbounded(shape=shape, dtype=entry.dtype)


def _composite(entries: Any) -> Composite:
    spec = Composite(shape=())
    for entry, leaf in entries:
        spec[entry.key] = leaf
    return spec
