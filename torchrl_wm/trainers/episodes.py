"""The unfinished episodes in the real envs of a run, and how new envs continue them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase, Transform

from torchrl_wm.modules.keys import join, strip_next
from torchrl_wm.trainers.checkpoints import from_plain_entries, plain_entries


class Episodes:
    """The unfinished episodes in the real envs of a run, with their actions so far.

    Each env begins its episodes from seeds (:class:`EpisodeSeeds`), so that repeating the actions
    since then restores its state: a run can go on from a checkpoint within episodes.

    Args:
        env: one of the envs.
        num_envs: ``N``.
        carried_keys: the entries that the policy hands from step to step.

    Attributes:
        finished: how many episodes each env has finished, ``[N]``.
        returns, lengths: those of the episodes so far, ``[N]``.
        random: the episodes with random actions, ``[N]``.
    """

    def __init__(self, env: EnvBase, num_envs: int, carried_keys: list) -> None:
        self._env, self._carried_keys = env, carried_keys
        self.finished = torch.zeros(num_envs, dtype=torch.long)
        self.returns = torch.zeros(num_envs, dtype=torch.double)
        self.lengths = torch.zeros(num_envs, dtype=torch.long)
        self.random = torch.zeros(num_envs, dtype=torch.bool)
        #: The random actions that are repeated, ``[N, *A]``.
        self.held: torch.Tensor | None = None
        #: The actions since the oldest of the episodes began, ``[N]`` each.
        self._actions: list[TensorDictBase] = []
        self._last: TensorDictBase | None = None

    def __len__(self) -> int:
        return len(self.finished)

    def begin(self, rows: torch.Tensor, random: bool) -> None:
        """Begin new episodes in some envs, ``[N]`` bool."""
        self.returns[rows], self.lengths[rows], self.random[rows] = 0.0, 0, random
        self._forget()

    def abandon(self) -> None:
        """Begin new episodes in all envs; random episodes stay random."""
        self.finished += 1
        self.returns.zero_(), self.lengths.zero_()
        self._forget()

    def add(self, steps: TensorDictBase) -> torch.Tensor:
        """Count a step of each env, ``[N]``; return which of them ended their episodes."""
        rewards = steps.get(join("next", self._env.reward_key))
        self.returns += rewards.reshape(len(self), -1).sum(1).double()
        self.lengths += 1
        self._actions.append(steps.select(*self._env.action_keys))
        self._forget()
        self._last = steps
        ended = steps.get(join("next", self._env.done_keys[0]))
        return ended.reshape(len(self), -1).any(1)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and what :class:`ContinuedEpisodes` needs, as plain data."""
        state = {
            "finished": self.finished,
            "returns": self.returns,
            "lengths": self.lengths,
            "random": self.random,
            "held": self.held,
        }
        if self._actions:
            actions, last = self._so_far()
            state["actions"], state["last"] = map(plain_entries, (actions, last))
            state["steps"] = len(self._actions)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if len(state_dict["finished"]) != len(self):
            raise ValueError(
                f"it has {len(state_dict['finished'])} envs, and the run {len(self)}"
            )
        for name in ("finished", "returns", "lengths", "random"):
            getattr(self, name).copy_(state_dict[name])
        self.held = state_dict["held"]
        if "last" in state_dict:
            size = [len(self), state_dict["steps"]]
            self._last = from_plain_entries(state_dict["last"], size[:1])
            actions = from_plain_entries(state_dict["actions"], size)
            self._actions = list(actions.unbind(1))

    def _forget(self) -> None:
        """Forget the actions of finished episodes."""
        longest = int(self.lengths.max())
        self._actions = self._actions[-longest:] if longest else []

    def continued(self) -> ContinuedEpisodes | None:
        """Return what continues the episodes in new envs; None if no episode has begun."""
        if not self.lengths.any():
            return None
        lengths = self.lengths.clone()
        return ContinuedEpisodes(*self._so_far(), lengths, self._carried_keys)

    def _so_far(self) -> tuple[TensorDictBase, TensorDictBase]:
        """Return the actions since the oldest episode began, ``[N, T]``, and the last step, ``[N]``."""
        observed = [join("next", key) for key in self._env.observation_keys]
        last = self._last.select(*observed, *self._carried_keys, strict=False)
        return torch.stack(self._actions, 1), last


class ContinuedEpisodes(Transform):
    """A transform that continues the episodes of a checkpoint at the first reset of new envs.

    Args:
        actions: the actions so far, ``[N, T]``, the newest last.
        last: the last step, ``[N]``.
        lengths: how many of the actions belong to the episode of each env, ``[N]``.
        carried_keys: the entries of the last step that the policy carries on.
    """

    def __init__(
        self,
        actions: TensorDictBase,
        last: TensorDictBase,
        lengths: torch.Tensor,
        carried_keys: list,
    ) -> None:
        super().__init__()
        self._actions: TensorDictBase | None = actions
        self._last, self._lengths = last, lengths
        self._carried_keys = carried_keys
        #: Whether the envs did not repeat themselves, and began new episodes.
        self.is_abandoned = False

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        if self._actions is None:
            return tensordict_reset
        done, self._actions = self._actions, None
        env, size = self.parent, self.parent.batch_size
        now = tensordict_reset
        longest = int(self._lengths.max())
        for step in range(longest):
            # Shorter episodes begin later, so that all end at the same step.
            acts = (longest - step) <= self._lengths
            before = now.copy().update(done[:, step - longest].reshape(size))
            if not acts.all():
                before.set("_step", acts)
            # Only the entries of a reset: actions are left out.
            after = env.step_mdp(env.step(before)).select(*now.keys(True, True))
            now = after if acts.all() else torch.where(acts, after, now)
        last, goes_on = self._last, self._lengths > 0
        observed = last.exclude(*self._carried_keys).get("next")
        if not _is_same(now.reshape(-1)[goes_on], observed[goes_on]):
            warnings.warn(
                "The real env does not repeat itself from its seed and actions: the unfinished "
                "episodes of the checkpoint are given up, and new ones begin.",
                stacklevel=2,
            )
            self.is_abandoned = True
            return env.reset()
        now = now.copy()
        for key in self._carried_keys:
            carried = last.get(key)
            # A reset gives no action, which a filter reads at the next step.
            fresh = now.get(strip_next(key), None)
            if fresh is None:
                fresh = torch.zeros_like(carried).reshape(*size, *carried.shape[1:])
            carried = carried.reshape(fresh.shape)
            rows = goes_on.reshape(size).view(*size, *[1] * (fresh.ndim - len(size)))
            now.set(strip_next(key), torch.where(rows, carried, fresh))
        return now


def _is_same(now: TensorDictBase, before: TensorDictBase) -> bool:
    """Return whether observations are those that were recorded, NaN included."""
    return all(
        torch.equal(now.get(key).nan_to_num(), before.get(key).nan_to_num())
        for key in before.keys(True, True)
    )
