"""A log as off-policy evaluation reads it: flat transitions, and where their episodes begin and end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.objectives.value.functional import reward2go

from torchrl_wm.diagnostics.recording import as_rows, ends_of, Episodes
from torchrl_wm.diagnostics.terminations import real_terminations
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import (
    as_tuple,
    join,
    leaf_keys,
    missing_from,
    sibling,
    unique,
)
from torchrl_wm.modules.modes import evaluation_mode

#: Entries of a transition that are neither seen nor done by a policy.
_NOT_SEEN = {"reward", "done", "terminated", "truncated", "is_init", "step_count"}


@dataclass(frozen=True)
class Log:
    """Recorded transitions ``[M]``, in the order of recording.

    Args:
        rows: the transitions.
        reward: their rewards, ``[M]``; those of several agents are added up.
        terminated: the steps after which there is nothing more to get, ``[M]`` bool. A time
            limit is not one of them.
        ends: the last steps of episodes, ``[M]`` bool.
    """

    rows: TensorDictBase
    reward: torch.Tensor
    terminated: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def of(
        cls, data: Episodes, name: str, reward_key: NestedKey, done_key: NestedKey
    ) -> Log:
        """Check recorded episodes ``[*B, T]``, or a list of them, for what is called ``name``.

        Raises:
            KeyError: if rewards or ends were not recorded.
            ValueError: if there is no step, or a reward is not finite.
        """
        steps = as_rows(data, name)
        steps = steps.reshape(-1, steps.batch_size[-1]).detach()
        missing = missing_from(steps, [join("next", reward_key)])
        if missing:
            raise MissingEntryError(
                f"{name} needs the rewards {missing}, and the log has {leaf_keys(steps)}. Name "
                f"another: reward_key=..."
            )
        mask = steps.get(("collector", "mask"), None)
        valid = torch.ones(steps.batch_size, dtype=torch.bool, device=steps.device)
        if mask is not None:
            valid = mask.reshape(steps.batch_size)
        if not valid.any():
            raise ValueError(
                f"{name} was given no step: the log's ('collector', 'mask') calls all invalid."
            )
        beside = [sibling(done_key, name) for name in ("terminated", "truncated")]
        last = ends_of([done_key, *beside], steps)
        last[:, -1] = True
        last[:, :-1] |= valid[:, :-1] & ~valid[:, 1:]
        terminated = real_terminations(steps, done_key)
        terminated = terminated.reshape(*steps.batch_size, -1).any(-1)
        reward = steps.get(join("next", reward_key))
        reward = reward.reshape(*steps.batch_size, -1).sum(-1)
        rows, reward = steps[valid], reward[valid].float()
        if not reward.isfinite().all():
            bad = int((~reward.isfinite()).nonzero()[0])
            raise ValueError(
                f"{name}: reward {bad} of the log is {float(reward[bad])}. Leave such episodes out."
            )
        return cls(rows, reward, terminated[valid], last[valid])

    @property
    def begins(self) -> torch.Tensor:
        """The numbers of the rows that begin an episode, ``[N]`` int64."""
        first = torch.ones_like(self.ends)
        first[1:] = self.ends[:-1]
        return first.nonzero().squeeze(-1)

    @property
    def episode(self) -> torch.Tensor:
        """The number of each row's episode, ``[M]`` int64."""
        return self.ends.long().cumsum(0) - self.ends.long()

    def to_go(self, gamma: float) -> torch.Tensor:
        """Return the discounted sum of the rewards from each row to the end of its episode, ``[M]``."""
        reward, done = self.reward[:, None], self.ends[:, None]
        return reward2go(reward, done, gamma=gamma).squeeze(-1)

    def episode_values(self, gamma: float) -> torch.Tensor:
        """Return what the episodes were worth at their beginnings, ``[N]``.

        An episode that was cut is taken to go on as it was: its discounted sum is
        divided by ``1 - gamma ** T``.
        """
        sums = self.to_go(gamma)[self.begins]
        lengths = torch.bincount(self.episode)
        cut = ~self.terminated[self.ends.nonzero().squeeze(-1)]
        return torch.where(cut, sums / (1 - gamma**lengths), sums)


def resampled(
    samples: int, number: int, *, dtype: torch.dtype, device: torch.device | None
) -> torch.Tensor:
    """Return how often each of some episodes is in samples of as many, with replacement.

    Args:
        samples: ``R``, how many samples.
        number: ``N``, how many episodes.

    Keyword Args:
        dtype, device: those of the counts.

    Returns:
        ``[R, N]``.
    """
    drawn = torch.randint(number, (samples, number), device=device)
    counts = torch.zeros(samples, number, device=device, dtype=dtype)
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=dtype))


def seen_keys(
    rows: TensorDictBase, action_keys: Sequence[NestedKey]
) -> list[NestedKey]:
    """Return what a policy may see: entries that stand at the root and below "next"."""
    following = rows.get("next")
    return [
        key
        for key in unique(rows.keys(True, True))
        if as_tuple(key)[-1] not in _NOT_SEEN
        and as_tuple(key)[0] not in ("next", "collector")
        and key not in action_keys
        and following.get(key, None) is not None
    ]


def flat(rows: TensorDictBase, keys: Sequence[NestedKey]) -> torch.Tensor:
    """Return entries of rows ``[M]`` side by side as floats, ``[M, D]``."""
    return torch.cat([rows.get(key).reshape(len(rows), -1).float() for key in keys], -1)


@torch.no_grad()
def actions_of(
    policy: Callable,
    rows: TensorDictBase,
    action_keys: Sequence[NestedKey],
    at_once: int = 10_000,
) -> torch.Tensor:
    """Return the actions of a policy in rows ``[M]``, side by side, ``[M, A]``.

    Raises:
        KeyError: if the policy writes no action.
    """
    given = rows.exclude("next", *action_keys)
    out = []
    with evaluation_mode(policy):
        for part in given.split(at_once):
            acted = policy(part.copy())
            missing = missing_from(acted, action_keys)
            if missing:
                raise MissingEntryError(
                    f"The policy writes no {missing}; it returned {leaf_keys(acted)}. Name its "
                    f"actions: action_keys=[...]."
                )
            out.append(flat(acted, action_keys))
    return torch.cat(out)


def best_tenth(returns: torch.Tensor) -> torch.Tensor:
    """Return the mean of the best tenth of returns ``[N]``, of one at least."""
    return returns.sort(descending=True).values[: max(1, len(returns) // 10)].mean()
