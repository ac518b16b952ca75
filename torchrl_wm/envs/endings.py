"""One truth about how imagined episodes end.

Whatever a model's heads write (logits, continue logits, bools, only some of
them), every step of the env carries ``terminated``, ``truncated`` where it can
be true, and ``done == terminated | truncated``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from tensordict import NestedKey
from torchrl.data import Categorical, Composite

from torchrl_wm.modules.keys import as_tuple, join, unique

#: What a head may write to say how a step ended, below "next".
ENDING_NAMES = (
    "terminated_logits",
    "continue_pred",
    "terminated",
    "truncated",
    "done",
)
_BOOL_NAMES = ("terminated", "truncated", "done")


@dataclass
class EndingGroup:
    """The done entries at one place of the tree, and what decides them.

    Args:
        prefix: where the entries stand: ``()`` at the root, ``("agents",)``
            for the agents of a multi-agent env.
        shape: their feature shape, ``(1,)`` or ``(n_agents, 1)``.
        written: which of :data:`ENDING_NAMES` the model writes there.
        truncates: whether the group has a ``truncated`` entry.
    """

    prefix: tuple[str, ...]
    shape: torch.Size
    written: frozenset[str]
    truncates: bool

    def __post_init__(self) -> None:
        # Looked up at every step.
        self._keys = {name: join(*self.prefix, name) for name in ENDING_NAMES}
        self._predicted = {
            name: join("next", key)
            for name, key in self._keys.items()
            if name in self.written
        }

    def key(self, name: str) -> NestedKey:
        """The group's entry called ``name``."""
        return self._keys[name]

    def keys(self) -> list[NestedKey]:
        """The entries that the env carries for this group."""
        names = ("done", "terminated", "truncated")
        return [
            self.key(name) for name in names if name != "truncated" or self.truncates
        ]

    def read(
        self, predicted: Mapping[NestedKey, torch.Tensor]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the model says: ``(terminated, truncated)``, None where it is silent."""
        written = self.written
        entry = {name: predicted[key] for name, key in self._predicted.items()}
        truncated, done = entry.get("truncated"), entry.get("done")
        if "terminated" in written:
            terminated = entry["terminated"]
        elif "terminated_logits" in written:
            terminated = entry["terminated_logits"] > 0
        elif "continue_pred" in written:
            # The logit of going on: its sign says the opposite.
            terminated = entry["continue_pred"] < 0
        elif done is not None:
            # A lone done is a termination, except where it is a truncation.
            return (done if truncated is None else done & ~truncated), truncated
        else:
            return None, truncated
        if done is not None:
            only_done = done & ~terminated
            truncated = only_done if truncated is None else truncated | only_done
        return terminated, truncated


class Endings:
    """The done entries of an env: their spec, and their values at each step.

    Args:
        reference_spec: the reference env's full done spec, without batch dims.
        written: the root keys that the model's step writes below "next".
        time_limit: whether the env truncates after a number of steps.
    """

    def __init__(
        self,
        reference_spec: Composite,
        written: Iterable[NestedKey],
        *,
        time_limit: bool,
    ) -> None:
        written = set(unique(written))
        self.time_limit = time_limit
        self.groups: list[EndingGroup] = []
        for prefix, node in _done_nodes(reference_spec):
            names = frozenset(n for n in ENDING_NAMES if join(*prefix, n) in written)
            leaf = next(node[n] for n in _BOOL_NAMES if n in node.keys())
            truncates = (
                time_limit
                or "truncated" in node.keys()
                or "truncated" in names
                or (
                    "done" in names
                    and names & {"terminated", "terminated_logits", "continue_pred"}
                )
            )
            self.groups.append(EndingGroup(prefix, leaf.shape, names, bool(truncates)))
        # A truncation above or below reaches the groups that have no head of
        # their own, and needs an entry there to be told from a termination.
        for group in self.groups:
            if not group.written:
                group.truncates |= any(
                    other.truncates for other in self.groups if _related(group, other)
                )
        # Parents first: a group without a head follows its nearest ancestor.
        self.groups.sort(key=lambda group: len(group.prefix))
        #: Whether an episode can end, by a head or by time.
        self.can_end = time_limit or any(group.written for group in self.groups)
        #: Whether there is one group of done entries, at the root.
        self.at_root = [group.prefix for group in self.groups] == [()]
        self._find_keys()

    def _find_keys(self) -> None:
        # Looked up at every rollout.
        #: The done entries of all groups.
        self.keys = tuple(key for group in self.groups for key in group.keys())
        #: The done entries of an env that cannot end; none if it can.
        self.never_keys = frozenset(() if self.can_end else self.keys)

    def add_truncated(self) -> None:
        """Let every group have a truncated entry."""
        for group in self.groups:
            group.truncates = True
        self._find_keys()

    @property
    def bool_keys(self) -> list[NestedKey]:
        """What the model itself writes under a bool done key."""
        return [
            group.key(name)
            for group in self.groups
            for name in _BOOL_NAMES
            if name in group.written
        ]

    @property
    def logit_keys(self) -> list[NestedKey]:
        """What the model writes as logits."""
        return [
            group.key(name)
            for group in self.groups
            for name in ("terminated_logits", "continue_pred")
            if name in group.written
        ]

    def spec(self, reference_spec: Composite) -> Composite:
        """The done spec without batch dims, with the entries that are missing added."""
        spec = reference_spec.clone()
        for group in self.groups:
            node = spec[group.prefix] if group.prefix else spec
            leaf = next(node[n] for n in _BOOL_NAMES if n in node.keys())
            for key in group.keys():
                name = as_tuple(key)[-1]
                if name not in node.keys():
                    node[name] = Categorical(
                        2, shape=leaf.shape, dtype=torch.bool, device=leaf.device
                    )
        return spec

    def read(
        self,
        predicted: Mapping[NestedKey, torch.Tensor],
        batch_size: torch.Size,
        device: torch.device | None,
        time_is_up: torch.Tensor | None,
    ) -> dict[NestedKey, torch.Tensor]:
        """The done entries of one step.

        Args:
            predicted: what the model predicted, by ``("next", key)``.
            batch_size: ``*B``.
            device: where flags that nobody predicts are made.
            time_is_up: ``[*B, 1]`` bool, where the time limit is reached; None
                without one.

        Returns:
            Bools by key, of shape ``[*B, *feature]``; no two alias each other.
        """
        decided: dict[tuple[str, ...], tuple] = {
            group.prefix: group.read(predicted) for group in self.groups
        }
        for group in self.groups:
            if not group.written:
                decided[group.prefix] = self._inherit(group, decided, batch_size)
        out: dict[NestedKey, torch.Tensor] = {}
        for group in self.groups:
            terminated, truncated = decided[group.prefix]
            shape = (*batch_size, *group.shape)
            if terminated is None:
                terminated = torch.zeros(shape, dtype=torch.bool, device=device)
            if time_is_up is not None:
                limit = _expand_to(time_is_up, batch_size, shape)
                truncated = limit.clone() if truncated is None else truncated | limit
            if truncated is None:
                done = terminated.clone()
            else:
                done = terminated | truncated
            out[group.key("done")] = done
            out[group.key("terminated")] = terminated
            if group.truncates:
                out[group.key("truncated")] = (
                    torch.zeros_like(terminated) if truncated is None else truncated
                )
        return out

    def none(
        self, batch_size: torch.Size, device: torch.device | None
    ) -> dict[NestedKey, torch.Tensor]:
        """All done entries False, as after a reset."""
        return {
            key: torch.zeros(
                (*batch_size, *group.shape), dtype=torch.bool, device=device
            )
            for group in self.groups
            for key in group.keys()
        }

    def never(
        self, batch_size: torch.Size, device: torch.device | None
    ) -> dict[NestedKey, torch.Tensor] | None:
        """The done entries of every step of an env that cannot end; None if it can."""
        return None if self.can_end else self.none(batch_size, device)

    def ended(
        self,
        flags: Mapping[NestedKey, torch.Tensor],
        batch_size: torch.Size,
        name: str = "done",
        *,
        any_group: bool = False,
    ) -> torch.Tensor:
        """Whether whole trajectories have ended, ``[*B]`` bool; or terminated, by ``name``.

        A group that has an ancestor is heard only through it, as in TorchRL;
        of groups side by side all must have ended, or with ``any_group`` one.
        """
        top = [
            group
            for group in self.groups
            if not any(_is_above(other, group) for other in self.groups)
        ]
        dims = len(batch_size)
        done = [flags[group.key(name)].flatten(dims).all(-1) for group in top]
        if len(done) == 1:
            return done[0]
        return (
            torch.stack(done, -1).any(-1)
            if any_group
            else torch.stack(done, -1).all(-1)
        )

    def _inherit(
        self, group: EndingGroup, decided: dict, batch_size: torch.Size
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What a group without a head takes from its nearest ancestor, else from below."""
        shape = (*batch_size, *group.shape)
        above = [other for other in self.groups if _is_above(other, group)]
        if above and decided[above[-1].prefix] != (None, None):
            return tuple(
                None if flag is None else _expand_to(flag, batch_size, shape).clone()
                for flag in decided[above[-1].prefix]
            )
        below = [
            decided[other.prefix]
            for other in self.groups
            if other.written and _is_above(group, other)
        ]
        if not below:
            return None, None
        # The whole has ended when every part has; as a termination only where
        # every part terminated.
        dims = len(batch_size)
        terminated, ended = [], []
        for flags in below:
            known = next(flag for flag in flags if flag is not None)
            parts = [torch.zeros_like(known) if f is None else f for f in flags]
            terminated.append(_whole(parts[0], dims))
            ended.append(_whole(parts[0] | parts[1], dims))
        all_terminated = torch.stack(terminated).all(0)
        all_ended = torch.stack(ended).all(0)
        if not group.truncates:
            return _expand_to(all_ended, batch_size, shape).clone(), None
        return (
            _expand_to(all_terminated, batch_size, shape).clone(),
            _expand_to(all_ended & ~all_terminated, batch_size, shape).clone(),
        )


def _is_above(upper: EndingGroup, lower: EndingGroup) -> bool:
    depth = len(upper.prefix)
    return depth < len(lower.prefix) and lower.prefix[:depth] == upper.prefix


def _related(one: EndingGroup, other: EndingGroup) -> bool:
    return _is_above(one, other) or _is_above(other, one)


def _done_nodes(spec: Composite, prefix: tuple[str, ...] = ()):
    """The places of a done spec that hold done entries, with their prefixes."""
    if any(name in spec.keys() for name in _BOOL_NAMES):
        yield prefix, spec
    for name, child in spec.items():
        if isinstance(child, Composite):
            yield from _done_nodes(child, (*prefix, name))


def _whole(flag: torch.Tensor, dims: int) -> torch.Tensor:
    """``[*B, n_agents, 1]`` as ``[*B, 1]``: whether all are set."""
    return flag.flatten(dims).all(-1, keepdim=True)


def _expand_to(
    flag: torch.Tensor, batch_size: torch.Size, shape: tuple[int, ...]
) -> torch.Tensor:
    """Repeat ``[*B, 1]`` or ``[*B, *shorter]`` over the feature dims of ``shape``."""
    dims = len(batch_size)
    flag = _whole(flag, dims) if flag.shape[dims:].numel() == 1 else flag
    lead = (1,) * (len(shape) - flag.ndim)
    return flag.reshape(*flag.shape[:dims], *lead, *flag.shape[dims:]).expand(shape)
