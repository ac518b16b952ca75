"""Disagreement: compare how the members of an ensemble differ with their error."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from torchrl_wm.diagnostics.one_step import (
    elite_members,
    gaussians,
    one_step_prediction,
)
from torchrl_wm.diagnostics.recording import Episodes, Recording
from torchrl_wm.diagnostics.statistics import rank_correlation
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules.keys import join


@torch.no_grad()
def disagreement(env: WorldModelEnv, episodes: Episodes, **gaussian_keys) -> TensorDict:
    """Measure the members' disagreement along recorded episodes, and the error of their mean.

    Both are those of one-step predictions, in units of the spread of the recorded changes
    (of the values, for rewards), as the root mean square over all predicted dims. A
    dim that is constant in the episodes is left out. The rank correlation of the two
    is what makes disagreement worth a penalty or a bonus: near 1 it points to where
    the model is wrong, near 0 it says nothing.

    Args:
        env: an imagined env of batch size ``[]``, of a model that is an ensemble.
        episodes: recorded transitions, ``[*B, T]``, or a list of them: then ``*B`` is the
            number of rows and ``T`` the longest length.
        gaussian_keys: ``targets``, ``loc`` and ``log_var``, see
            :func:`one_step_prediction`.

    Returns:
        Batch size ``[]``:

        - ``"disagreement"``: standard deviation of the members' means, ``[*B, T, 1]``.
        - ``"error"``: distance of the elites' mean from the truth, ``[*B, T, 1]``.
        - ``"rank_correlation"``: Spearman's, over all steps; a scalar, NaN if either is
          constant.
        - ``("collector", "mask")``: False for padding, ``[*B, T]`` bool; the other
          entries are zero there.

    Raises:
        ValueError: if the model has no members, or nothing changes in the episodes.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.diagnostics import disagreement
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> real_env = GymEnv("Pendulum-v1")
        >>> world_model, _ = make_ensemble_world_model(real_env, hidden=(32,), normalize=False)
        >>> out = disagreement(WorldModelEnv(world_model, real_env), real_env.rollout(30))
        >>> out["disagreement"].shape, out["rank_correlation"].shape
        (torch.Size([30, 1]), torch.Size([]))
    """
    recording = Recording.of(env, episodes, "disagreement")
    prediction = one_step_prediction(env, episodes, **gaussian_keys)
    spreads, errors = [], []
    for key in gaussians(env, prediction, "disagreement", members=True):
        means = prediction.get(join("loc", key)).flatten(2).float()  # [M, E, D]
        real = prediction.get(join("real", key)).flatten(1).float()
        before = prediction.get(join("start", key), None)
        change = real if before is None else real - before.flatten(1)
        unit = change.std(0, unbiased=False)
        moves = unit > 1e-6 * (1 + change.abs().mean(0))
        elites = elite_members(env, means.shape[1]).to(means.device)
        unit = unit[moves]
        spreads.append(means.std(1, unbiased=False)[:, moves] / unit)
        errors.append((means[:, elites].mean(1) - real)[:, moves] / unit)
    spread, error = torch.cat(spreads, -1), torch.cat(errors, -1)
    if not spread.shape[-1]:
        raise ValueError(
            "Nothing that the model predicts changes in the episodes: there is no unit to measure "
            "disagreement in. Give more than one step."
        )
    size, valid = recording.batch_size, recording.valid
    out = TensorDict({}, batch_size=[], device=valid.device)
    found = {}
    for name, value in (("disagreement", spread), ("error", error)):
        found[name] = value.pow(2).mean(-1).sqrt()
        along = torch.zeros(valid.shape, dtype=value.dtype, device=valid.device)
        along[valid] = found[name]
        out.set(name, along.reshape(*size, 1))
    out.set("rank_correlation", rank_correlation(found["disagreement"], found["error"]))
    return out.set(("collector", "mask"), valid.reshape(size))
