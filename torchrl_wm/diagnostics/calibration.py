"""Calibration: compare predicted uncertainties with errors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDict

from torchrl_wm.diagnostics.one_step import (
    elite_members,
    gaussians,
    LOC,
    LOG_VAR,
    one_step_prediction,
)
from torchrl_wm.diagnostics.recording import Episodes
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules.keys import join

_LEVELS = tuple(level / 20 for level in range(1, 20))


@torch.no_grad()
def calibration_curve(
    env: WorldModelEnv,
    episodes: Episodes,
    *,
    levels: Sequence[float] = _LEVELS,
    targets: Sequence[NestedKey] | None = None,
    loc: NestedKey = LOC,
    log_var: NestedKey = LOG_VAR,
) -> TensorDict:
    """Measure how often the truth lies within the predicted intervals, against how often it should.

    The intervals are the central ones (equal tails) of the one-step prediction, for
    the equally weighted mixture of the elites' Gaussians, which TS1 and TSinf sample
    from, and for each member's Gaussian. At the nominal level 0.9 a calibrated model
    has 0.9 of the truth inside; less is overconfident, more is underconfident
    (Kuleshov et al., arXiv 1807.00263).

    Args:
        env: an imagined env of batch size ``[]``.
        episodes: recorded transitions, ``[*B, T]``, or a list of them; padding is left out. Use
            ones that the model was not trained on.
        levels: ``K`` nominal levels, in (0, 1).
        targets, loc, log_var: see :func:`one_step_prediction`.

    Returns:
        Batch size ``[K]``:

        - ``"level"``: the nominal levels, ``[K, 1]``.
        - ``("mixture", key)``: the coverage of the mixture, ``[K, *feature]``.
        - ``("members", key)``: that of each member, ``[K, E, *feature]``.

    Raises:
        ValueError: if the model predicts no Gaussians, or a level is not in (0, 1).

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.diagnostics import calibration_curve
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> real_env = GymEnv("Pendulum-v1")
        >>> world_model, _ = make_ensemble_world_model(real_env, hidden=(32,), normalize=False)
        >>> coverage = calibration_curve(WorldModelEnv(world_model, real_env), real_env.rollout(30))
        >>> coverage["mixture", "observation"].shape
        torch.Size([19, 3])
    """
    nominal = torch.as_tensor(list(levels), dtype=torch.float64)
    if not len(nominal) or not bool(((nominal > 0) & (nominal < 1)).all()):
        raise ValueError(f"levels must lie between 0 and 1, got {list(levels)}.")
    prediction = one_step_prediction(
        env, episodes, targets=targets, loc=loc, log_var=log_var
    )
    keys = gaussians(env, prediction, "calibration_curve")
    out = TensorDict(
        {"level": nominal.float().unsqueeze(-1)}, batch_size=[len(nominal)]
    )
    for key in keys:
        mean = prediction.get(join("loc", key)).double().cpu()  # [M, E, ...]
        scale = prediction.get(join("scale", key)).double().cpu()
        real = prediction.get(join("real", key)).double().cpu().unsqueeze(1)
        below = torch.special.ndtr((real - mean) / scale)
        elites = elite_members(env, mean.shape[1])
        out.set(join("mixture", key), _coverage(below[:, elites].mean(1), nominal))
        out.set(join("members", key), _coverage(below, nominal))
    return out


def _coverage(below: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the share of the truth in central intervals, ``[K, ...]``.

    Args:
        below: the predicted probability of what is less than the truth, ``[M, ...]``.
        levels: ``[K]``.
    """
    needed = (2 * below - 1).abs()  # the level whose interval just holds the truth
    shares = [(needed <= level).double().mean(0) for level in levels]
    return torch.stack(shares).float()
