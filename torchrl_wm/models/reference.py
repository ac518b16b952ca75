"""An env that is only specs: what a file knows of the env that its model was made for."""

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

#: Kinds of specs; each before those whose class it derives from.
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
    """An entry with what it takes to make its spec again.

    Args:
        kind: the kind of its spec, such as ``"bounded"``; empty where it is unknown.
        sizes: of a discrete spec, the numbers of choices.
        low: of a bounded spec, the least values, flattened.
        high: the greatest ones.
    """

    kind: str = ""
    sizes: tuple[int, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    @classmethod
    def from_spec(cls, key: NestedKey, spec: TensorSpec) -> SpecEntry:
        """The entry of a spec without batch dims."""
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
        """The spec, without batch dims.

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
            f"The spec of the action {self.key!r} is not known: the file was written by an older "
            f"version, or the spec is of a kind that no file holds. Pass the env, base_env=..."
        )


class ActionEntry(SpecEntry):
    """An action, with what it takes to make its spec again; see :class:`SpecEntry`."""


class SpecsOnlyEnv(EnvBase):
    """An env that has specs and nothing behind them: a reference env for imagination.

    Args:
        observations: the observations' entries. Of floats the bounds are not known.
        actions: the actions' entries.
        reward: the reward's entry.
        done: the done entry; its siblings are made beside it.

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
            "This env has specs only: the model was made again from a file, without the env. "
            "Pass base_env=..., the real env, or start_states=..., where episodes begin."
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
