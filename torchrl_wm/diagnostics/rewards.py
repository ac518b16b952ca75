"""Errors of predicted rewards and returns."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from torchrl_wm.diagnostics.recording import (
    Episodes,
    imagine_windows,
    matching,
    Recording,
)
from torchrl_wm.diagnostics.statistics import correlation
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import join, leaf_keys


@torch.no_grad()
def reward_error(
    env: WorldModelEnv,
    episodes: Episodes,
    horizon: int,
    *,
    stride: int = 1,
    particles: int = 1,
) -> TensorDict:
    """Measure the error of rewards predicted ``k`` steps ahead, and of their sums.

    Windows and actions are those of :func:`open_loop_error`. A planner compares sums
    of future rewards: their correlation says whether the model tells good plans from
    bad ones. Rewards are compared without the penalty of
    :func:`~torchrl_wm.modules.with_penalty`.

    Args:
        env: an imagined env of batch size ``[]``.
        episodes: recorded transitions with rewards, ``[*B, T]``, time last, or a list of them.
        horizon: ``H``.
        stride: the distance of the windows' starts, in steps.
        particles: how many times each window is imagined; the mean is compared.

    Returns:
        Batch size ``[H]``; entry ``k - 1`` is ``k`` steps ahead. For every reward,
        each ``[H, *feature]``, in the units of the reward:

        - ``("rmse", key)``: root mean squared error.
        - ``("bias", key)``: mean of predicted minus real.
        - ``("mean", key)``: the RMSE of predicting the mean.
        - ``("correlation", key)``: that of predicted and real rewards over the windows.
        - ``("return_rmse", key)``, ``("return_correlation", key)``: those of the sums
          of the first ``k`` rewards.

        A correlation with something constant is NaN.

    Raises:
        ValueError: as :func:`open_loop_error`.
        KeyError: if the episodes lack actions or rewards.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.diagnostics import reward_error
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> real_env = GymEnv("Pendulum-v1")
        >>> world_model, _ = make_ensemble_world_model(real_env, hidden=(32,), normalize=False)
        >>> error = reward_error(WorldModelEnv(world_model, real_env), real_env.rollout(30), 5)
        >>> error["rmse", "reward"].shape
        torch.Size([5, 1])
    """
    recording = Recording.of(env, episodes, "reward_error")
    windows = recording.windows(horizon, stride)
    real = recording.rewards(windows)
    if not real:
        keys = [join("next", key) for key in env.reward_keys]
        raise MissingEntryError(
            f"The episodes lack the rewards {keys}; they have {leaf_keys(windows)}."
        )
    imagined = imagine_windows(recording, windows, list(real), particles)
    out = TensorDict({}, batch_size=[horizon], device=windows.device)
    for key, value in real.items():
        predicted, true = matching(key, imagined.steps[key], value)
        error = predicted - true
        sums = predicted.cumsum(1), true.cumsum(1)
        found = {
            "rmse": error.pow(2).mean(0).sqrt(),
            "bias": error.mean(0),
            "mean": (true - true.mean((0, 1))).pow(2).mean(0).sqrt(),
            "correlation": correlation(predicted, true),
            "return_rmse": (sums[0] - sums[1]).pow(2).mean(0).sqrt(),
            "return_correlation": correlation(*sums),
        }
        for name, entry in found.items():
            out.set(join(name, key), entry)
    return out
