"""Recorded steps: where a dream begins without a real env, and how much members usually disagree."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase

from torchrl_wm.diagnostics.recording import CONTEXT, Episodes, Recording
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules.keys import join
from torchrl_wm.modules.modes import evaluation_mode
from torchrl_wm.trainers.dreaming.with_disagreement import disagreement_keys

#: The most recorded steps that the disagreement is measured in.
_STEPS = 2000


class RecordedStarts:
    """Steps of recorded episodes, for episodes to begin at.

    Args:
        env: the imagined env. A recurrent model filters the episode up to the step, five frames
            at least where there are as many.
        data: the recorded transitions.

    Raises:
        ValueError: if there are none.
    """

    def __init__(self, env: WorldModelEnv, data: Episodes | None) -> None:
        if data is None:
            raise ValueError(
                "Nothing says where the episodes begin: give the real env, real_env=...; recorded "
                "transitions, data=...; or WorldModelEnv(..., start_states=...)."
            )
        self._recording = recording = Recording.of(env, data, "DreamSession")
        length = 1
        if env.world_model.is_recurrent:
            length = min(CONTEXT, recording.longest_window())
        rows, times = recording.window_index(length)
        self._rows, self._times = rows[:, 0], times[:, -1]

    def draw(self) -> TensorDictBase:
        """Return a start that is drawn at random, ``[1]``."""
        chosen = torch.randint(len(self._rows), (1,)).to(self._rows.device)
        recording = self._recording
        return recording.state(recording.steps[self._rows[chosen], self._times[chosen]])


@torch.no_grad()
def usual_disagreement(
    env: WorldModelEnv, data: Episodes | None
) -> dict[str, float] | None:
    """Return how much members disagree along recorded steps: the median, and the 95 % quantile.

    Args:
        env: the imagined env.
        data: recorded transitions, of which some are drawn if there are many.

    Returns:
        ``"median"`` and ``"high"``; None without data, or without a disagreement.
    """
    keys = disagreement_keys(env)
    if data is None or not keys:
        return None
    recording = Recording.of(env, data, "DreamSession")
    steps = recording.transitions()
    if len(steps) > _STEPS:
        steps = steps[torch.randperm(len(steps))[:_STEPS].to(steps.device or "cpu")]
    actions = steps.select(*env.action_keys).unsqueeze(1)
    with evaluation_mode(env.world_model):
        imagined = env.imagine(1, tensordict=recording.state(steps), actions=actions)
    spread = torch.cat([imagined.get(join("next", k)).flatten(1) for k in keys], 1)
    levels = torch.tensor([0.5, 0.95], device=spread.device)
    median, high = spread.max(1).values.float().quantile(levels).tolist()
    return {"median": median, "high": high}
