"""The subject of a report on a policy: what it does in the model, beside the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.envs import EnvBase

from torchrl_wm.diagnostics.one_step import stepped
from torchrl_wm.diagnostics.recording import (
    CONTEXT,
    Episodes,
    FILTERED,
    positive,
    Recording,
    spread,
)
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules import penalty_of
from torchrl_wm.modules.blocks.ensemble_dynamics import DISAGREEMENT
from torchrl_wm.modules.blocks.penalty import paying, penalty_paused
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import join, leaf_keys, missing_from, strip_next, unique
from torchrl_wm.modules.modes import evaluation_mode

_ROWS_AT_ONCE = 10_000


@dataclass
class PolicyStudy:
    """A policy, the model that it acts in, and the log that the model has learnt from.

    Args: those of :func:`~torchrl_wm.diagnostics.write_policy_report`.
    """

    recording: Recording
    policy: Callable
    horizons: Sequence[int]
    gamma: float = 0.99
    coefficient: float | None = None
    rollouts: int = 200
    max_rows: int = 5000
    steps: int = 1000
    real_env: EnvBase | None = None
    real_policy: Callable | None = None
    real_episodes: int = 5

    @property
    def env(self) -> WorldModelEnv:
        """The imagined env."""
        return self.recording.env

    @property
    def horizon(self) -> int:
        """``H``, the longest horizon."""
        return max(self.horizons)

    @cached_property
    def imagined(self) -> TensorDictBase:
        """What the policy does in the model, from where episodes of the log begin, ``[S, H]``."""
        return imagine_policy(self.recording, self.policy, self.horizon, self.rollouts)

    @cached_property
    def alive(self) -> torch.Tensor:
        """The imagined steps up to the end of each rollout, ``[S, H]`` bool."""
        return self.imagined.get(("collector", "mask"))

    @property
    def measure(self) -> NestedKey:
        """What is penalised, without the "next"."""
        penalty = penalty_of(self.env.world_model)
        return DISAGREEMENT if penalty is None else strip_next(penalty.measure)

    @cached_property
    def along(self) -> dict[NestedKey, torch.Tensor]:
        """What the model's step says of its doubts, ``[S, H]`` by key, as far as it does.

        The members' disagreement, and what a penalty is on. Rollouts do not record them; they
        depend on latents and actions alone.
        """
        env, model = self.env, self.env.world_model
        if model.memory_keys:  # which was not recorded either
            return {}
        keys = [*env.start_keys, *env.action_keys]
        rows = self.imagined.select(*keys, strict=False).flatten()
        found: dict[NestedKey, list[torch.Tensor]] = {}
        with torch.no_grad(), evaluation_mode(model):
            for part in rows.split(_ROWS_AT_ONCE):
                ahead = model.step(part.copy()).get("next")
                for key in unique([DISAGREEMENT, self.measure]):
                    if ahead.get(key, None) is not None:
                        value = ahead.get(key).reshape(len(part), -1).sum(-1)
                        found.setdefault(key, []).append(value)
        return {k: torch.cat(v).reshape(self.alive.shape) for k, v in found.items()}

    @cached_property
    def latents(self) -> TensorDictBase:
        """All recorded steps with their latents, ``[N, T]``."""
        return latent_rows(self.recording, self.env.latent_keys)

    @cached_property
    def some(self) -> TensorDictBase:
        """At most ``max_rows`` steps of the log, from the first to the last, ``[M]``."""
        rows = self.recording.transitions()
        return rows[spread(len(rows), self.max_rows).to(rows.device or "cpu")]

    @cached_property
    def predicted(self) -> TensorDictBase:
        """What the model predicts of these, ``[M]``."""
        return stepped(self.recording, self.some)


def study_of(
    env: WorldModelEnv,
    policy: Callable,
    data: Episodes,
    name: str,
    horizon: int,
    **kwargs,
) -> PolicyStudy:
    """Return the study behind one measure, called ``name``."""
    positive(horizon, "horizon")
    return PolicyStudy(Recording.of(env, data, name), policy, (horizon,), **kwargs)


@torch.no_grad()
def imagine_policy(
    recording: Recording, policy: Callable, horizon: int, rollouts: int
) -> TensorDictBase:
    """Let a policy act in the model from where recorded episodes begin, ``[S, H]``.

    The beginnings take turns until there are ``rollouts`` of them. A recurrent model has seen
    five frames of an episode, if any is as long. A penalised model predicts its own rewards.

    Raises:
        KeyError: if the policy reads an entry that the imagined env does not have.
    """
    positive(rollouts, "rollouts")
    starts = recording.steps[begins_of(recording)]
    if len(starts) > rollouts:
        starts = starts[spread(len(starts), rollouts)]
    else:
        starts = starts[torch.arange(rollouts) % len(starts)]
    model = recording.env.world_model
    with evaluation_mode(model, policy), penalty_paused(model):
        act = paying(policy, model)
        return recording.env.imagine(horizon, act, recording.state(starts))


def begins_of(recording: Recording) -> torch.Tensor:
    """Return the steps that rollouts begin at, ``[N, T]`` bool."""
    recording.check_any()
    valid, ages = recording.valid, recording.ages
    if recording.env.world_model.is_recurrent:
        later = valid & (ages == CONTEXT - 1)
        if later.any():
            return later
    return valid & (ages == 0)


def latent_rows(recording: Recording, keys: Sequence[NestedKey]) -> TensorDictBase:
    """Return all recorded steps, ``[N, T]``, with the latents at their root and below "next".

    What was recorded is encoded, or was filtered by a recurrent model.

    Raises:
        KeyError: if the observations that are encoded were not recorded.
    """
    steps, model = recording.steps, recording.env.world_model
    inputs = unique(model.encoder.in_keys)
    missing = missing_from(steps, [*inputs, *(join("next", key) for key in inputs)])
    if missing:
        raise MissingEntryError(
            f"The latents of the log are the encodings of {missing}, which it lacks; it has "
            f"{leaf_keys(steps)}."
        )
    if model.is_recurrent:
        following = steps.get(FILTERED)
        out = steps.exclude(FILTERED)
    elif set(keys) <= set(inputs):
        return steps
    else:
        with torch.no_grad(), evaluation_mode(model):
            now = model.encode(steps.select(*inputs).copy())
            following = model.encode(steps.get("next").select(*inputs).copy())
        out = steps.copy().update(now.select(*keys, strict=False))
    ahead = out.get("next").copy().update(following.select(*keys, strict=False))
    return out.copy().set("next", ahead)
