"""How far imagination strays from reality, step by step."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from torchrl_wm.diagnostics.recording import (
    Episodes,
    imagine_windows,
    matching,
    Recording,
)
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules.keys import join


@torch.no_grad()
def open_loop_error(
    env: WorldModelEnv,
    episodes: Episodes,
    horizon: int,
    *,
    stride: int = 1,
    particles: int = 1,
) -> TensorDict:
    """Measure the error of ``k``-step predictions on recorded episodes, for ``k = 1..H``.

    From every ``stride``-th recorded step the model imagines ``H`` steps with
    the recorded actions and no further look at the observations. Windows that
    cross the end of an episode are left out.

    The observations that the env has (those that are latents or decoded) are
    compared; if it has none, its latents are compared with the encodings of the
    recorded observations. A recurrent model starts from latents that it filters
    from the observations before; padding (``("collector", "mask")``) is left out.

    Args:
        env: an imagined env of batch size ``[]``.
        episodes: recorded transitions, ``[*B, T]``, time last, as rollouts and collectors
            return them, or a list of them, of any lengths.
        horizon: ``H``.
        stride: the distance of the windows' starts, in steps.
        particles: how many times each window is imagined; the mean is compared. With
            one particle, a model that samples has the error of a single sample.

    Returns:
        Root mean squared errors in the units of the data, batch size ``[H]``;
        entry ``k - 1`` is the error ``k`` steps ahead:

        - ``("model", key)``: those of the model, ``[H, *feature]``.
        - ``("persistence", key)``: those of the prediction that nothing changes.
        - ``("mean", key)``: those of predicting the data's mean.
        - ``("model", "reward")`` and ``("mean", "reward")``, if the data has
          rewards.

    Raises:
        ValueError: if the env is batch-locked, if no window fits into the
            episodes, or if there is nothing to compare.
        KeyError: if the episodes lack actions.

    Examples:
        >>> import torch
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.modules import MLP
        >>> from torchrl_wm import WorldModel, WorldModelEnv
        >>> from torchrl_wm.diagnostics import open_loop_error
        >>> real_env = GymEnv("Pendulum-v1")
        >>> world_model = WorldModel(
        ...     Mod(torch.nn.Identity(), ["observation"], ["observation"]),
        ...     Mod(MLP(4, 3, num_cells=[32]), ["observation", "action"], [("next", "observation")]),
        ...     Mod(MLP(4, 1, num_cells=[32]), ["observation", "action"], [("next", "reward")]),
        ... )
        >>> error = open_loop_error(
        ...     WorldModelEnv(world_model, real_env), real_env.rollout(30), horizon=5
        ... )
        >>> error["model", "observation"].shape
        torch.Size([5, 3])
    """
    recording = Recording.of(env, episodes, "open_loop_error")
    windows = recording.windows(horizon, stride)
    observed = recording.real(windows)
    real = {**observed, **recording.rewards(windows)}
    imagined = imagine_windows(recording, windows, list(real), particles)
    out = TensorDict({}, batch_size=[horizon])
    for key, value in real.items():
        predicted, true = matching(key, imagined.steps[key], value)
        out.set(join("model", key), _rmse(predicted, true))
        out.set(join("mean", key), _rmse(true.mean((0, 1), keepdim=True), true))
        if key not in observed:
            continue  # the start does not have the reward of the step before
        first = windows[:, 0].get(key, None)
        if first is None or first.shape[1:] != true.shape[2:]:
            first = imagined.start[key]
        first = first.unsqueeze(1).to(true.dtype)  # it may be bytes or bools
        out.set(join("persistence", key), _rmse(first, true))
    return out


def _rmse(predicted: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Return the error of ``[N, H, *feature]`` over the windows, ``[H, *feature]``."""
    return (predicted - real).pow(2).mean(0).sqrt()
