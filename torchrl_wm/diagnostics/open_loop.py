"""How far imagination strays from reality, step by step."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import join, leaf_keys, missing_from, unique
from torchrl_wm.modules.modes import evaluation_mode


@torch.no_grad()
def open_loop_error(
    env: WorldModelEnv, episodes: TensorDictBase, horizon: int, *, stride: int = 1
) -> TensorDict:
    """The error of ``k``-step predictions on recorded episodes, for ``k = 1..H``.

    From every ``stride``-th recorded step the model imagines ``H`` steps with
    the recorded actions and no further look at the observations. Windows that
    cross the end of an episode are left out.

    Compared are the observations that the env has (those that are latents or
    decoded); of a model that has none, the latents with the encodings of the
    recorded observations.

    Args:
        env: an imagined env of batch size ``[]``.
        episodes: recorded transitions, ``[*B, T]``, time last, as rollouts and
            collectors return them.
        horizon: ``H``.
        stride: the distance of the windows' starts, in steps.

    Returns:
        Root mean squared errors in the units of the data, batch size ``[H]``;
        entry ``k - 1`` is the error ``k`` steps ahead:

        - ``("model", key)``: of the model, ``[H, *feature]``.
        - ``("persistence", key)``: of the prediction that nothing changes.
        - ``("mean", key)``: of predicting the data's mean.
        - ``("model", "reward")`` and ``("mean", "reward")``, if the data has
          rewards.

    Raises:
        ValueError: if the env is batch-locked, if no window fits into the
            episodes, or if there is nothing to compare.

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
    if env.batch_locked:
        raise ValueError(
            f"open_loop_error needs an env of any batch size, got one of "
            f"{tuple(env.batch_size)}. Make it with WorldModelEnv(..., batch_size=[])."
        )
    missing = missing_from(episodes, env.action_keys)
    if missing:
        raise MissingEntryError(
            f"The episodes lack the actions {missing}; they have {leaf_keys(episodes)}."
        )
    windows = episode_windows(env, episodes, horizon, stride)
    start = windows[:, 0]
    actions = windows.select(*env.action_keys)
    with evaluation_mode(env.world_model):
        imagined = env.imagine(
            horizon, tensordict=start.exclude("next"), actions=actions
        )
        pairs = _compared(env, start, windows, imagined)
    out = TensorDict({}, batch_size=[horizon])
    for key, (predicted, real, first) in pairs.items():
        out.set(join("model", key), _rmse(predicted, real))
        out.set(join("persistence", key), _rmse(first.unsqueeze(1), real))
        out.set(join("mean", key), _rmse(real.mean((0, 1), keepdim=True), real))
    for key in env.reward_keys:
        real = windows.get(join("next", key), None)
        if real is not None:
            predicted = imagined.get(join("next", key))
            out.set(join("model", key), _rmse(predicted, real))
            out.set(join("mean", key), _rmse(real.mean((0, 1), keepdim=True), real))
    return out


def episode_windows(
    env: WorldModelEnv, episodes: TensorDictBase, horizon: int, stride: int = 1
) -> TensorDictBase:
    """All windows of ``horizon`` steps that lie within one episode, ``[N, H]``."""
    length = episodes.batch_size[-1] if episodes.batch_dims else 0
    if horizon < 1 or length < horizon:
        raise ValueError(
            f"No window of horizon={horizon} steps fits into episodes of batch size "
            f"{tuple(episodes.batch_size)} (time is the last dim)."
        )
    rows = episodes.reshape(-1, length)
    starts = torch.arange(0, length - horizon + 1, stride)
    index = starts[:, None] + torch.arange(horizon)
    windows = rows[:, index.to(rows.device)].reshape(-1, horizon)
    crosses = torch.zeros(windows.batch_size, dtype=torch.bool, device=windows.device)
    for key in env.done_keys:
        done = windows.get(join("next", key), None)
        if done is not None:
            crosses |= done.flatten(2).any(-1)
    keep = ~crosses[:, :-1].any(-1)  # the last step may end the episode
    valid = windows.get(("collector", "mask"), None)
    if valid is not None:
        keep &= valid.reshape(windows.batch_size).all(-1)
    if not keep.any():
        raise ValueError(
            f"No window of horizon={horizon} steps lies within one episode. Take a shorter "
            f"horizon, or longer episodes."
        )
    return windows[keep]


def _compared(
    env: WorldModelEnv,
    start: TensorDictBase,
    windows: TensorDictBase,
    imagined: TensorDictBase,
) -> dict[NestedKey, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """``(predicted [N, H, ...], real [N, H, ...], at the start [N, ...])`` by key."""
    keys = [
        key
        for key in unique(env.observation_spec.keys(True, True))
        if windows.get(join("next", key), None) is not None
    ]
    if keys:
        return {
            key: (
                imagined.get(join("next", key)),
                # Images may be bytes, whose differences would wrap around.
                windows.get(join("next", key)).to(imagined.get(key).dtype),
                start.get(key).to(imagined.get(key).dtype),
            )
            for key in keys
        }
    inputs = unique(env.world_model.encoder.in_keys)
    next_td = windows.get("next")
    if missing_from(next_td, inputs):
        raise ValueError(
            f"There is nothing to compare: the imagined env has "
            f"{list(env.observation_spec.keys(True, True))}, and the episodes have "
            f"{leaf_keys(windows)}. Record {[join('next', k) for k in inputs]}."
        )
    real = env.world_model.encode(next_td.select(*inputs))
    return {
        key: (
            imagined.get(join("next", key)),
            real.get(key),
            imagined.get(key)[:, 0],
        )
        for key in env.latent_keys
        if real.get(key, None) is not None
    }


def _rmse(predicted: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """``[N, H, *feature]`` as ``[H, *feature]``."""
    return (predicted - real).pow(2).mean(0).sqrt()
