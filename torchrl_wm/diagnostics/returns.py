"""Returns that the model promises a policy, against those that the real env pays."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.envs import EnvBase

from torchrl_wm.diagnostics.recording import (
    as_rows,
    check_env,
    ends,
    Episodes,
    positive,
)
from torchrl_wm.diagnostics.terminations import real_terminations
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules.blocks.penalty import paying, penalty_paused
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import as_tuple, join, leaf_keys, missing_from
from torchrl_wm.modules.modes import evaluation_mode


@torch.no_grad()
def exploitation_gap(
    env: WorldModelEnv,
    policy: Callable,
    real: EnvBase | Episodes,
    horizon: int,
    *,
    episodes: int = 10,
    real_policy: Callable | None = None,
    gamma: float = 1.0,
    reward_key: NestedKey | None = None,
) -> TensorDict:
    """Measure the imagined return of a policy minus its real return, from the same starts.

    A policy that learns in a model, or plans in it, finds and exploits the model's
    errors. The model then promises more than the real env pays: the gap is positive,
    and grows while the policy learns.

    Each episode counts ``horizon`` steps, less where it ends. Where the *real* episode
    was cut (a time limit, the end of the recording), the imagined one is cut
    at the same step; where it terminated, the imagined one goes on until it terminates.
    A model of :func:`~torchrl_wm.modules.with_penalty` promises its own rewards: what is real
    has no penalty.

    Args:
        env: an imagined env of batch size ``[]``.
        policy: acts in the imagined env.
        real: the real env, in which the policy is run; or episodes that were
            recorded with it, ``[*B, T]``, or a list of them. Rows may hold several episodes
            one after the other.
        horizon: ``H``.

    Keyword Args:
        episodes: ``N``, how many are run in a real env (a batched env rounds up).
        real_policy: acts in the real env, where that takes something else, such as an
            observer before a policy on latents; ``policy`` by default.
        gamma: the discount, for both returns.
        reward_key: which reward, if the env has several.

    Returns:
        Batch size ``[N]``, each ``[N, 1]``: ``"imagined_return"``, ``"real_return"``,
        ``"gap"`` (the difference), and the int64 counts ``"imagined_length"`` and
        ``"real_length"`` of steps.

    Raises:
        TypeError: if ``real`` is neither an env nor episodes.
        ValueError: if the env is batch-locked, or has several rewards and none is named.
        KeyError: if rewards or starts were not recorded, or the policy reads an entry that
            the imagined env does not have.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.modules import MLP
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.diagnostics import exploitation_gap
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> real_env = GymEnv("Pendulum-v1")
        >>> world_model, _ = make_ensemble_world_model(real_env, hidden=(32,), normalize=False)
        >>> policy = TensorDictModule(MLP(3, 1, num_cells=[32]), ["observation"], ["action"])
        >>> gap = exploitation_gap(
        ...     WorldModelEnv(world_model, real_env), policy, real_env, horizon=20, episodes=3
        ... )
        >>> gap["gap"].shape
        torch.Size([3, 1])
    """
    check_env(env, "exploitation_gap")
    positive(horizon, "horizon")
    positive(episodes, "episodes")
    reward_key = _reward_key(env, reward_key)
    if isinstance(real, (TensorDictBase, list, tuple)):
        steps = as_rows(real, "exploitation_gap")
    elif isinstance(real, EnvBase):
        steps = rolled_out(real, real_policy or policy, horizon, episodes)
    else:
        raise TypeError(
            f"exploitation_gap compares with a TorchRL env or recorded episodes, got "
            f"{type(real).__name__}. Wrap a Gymnasium env: torchrl.envs.GymWrapper(env)."
        )
    missing = missing_from(steps, [join("next", reward_key)])
    if missing:
        raise MissingEntryError(
            f"The real episodes lack the rewards {missing}; they have {leaf_keys(steps)}."
        )
    starts, rewards, valid, terminated = _episodes(env, steps, reward_key, horizon)
    with evaluation_mode(env.world_model), penalty_paused(env.world_model):
        imagined = env.imagine(horizon, paying(policy, env.world_model), starts)
    promised = imagined.get(join("next", reward_key)).flatten(2).sum(-1)
    alive = imagined.get(("collector", "mask"))
    counted = alive & (valid | terminated[:, None])
    out = TensorDict({}, batch_size=[len(starts)])
    discount = gamma ** torch.arange(horizon, device=promised.device)
    for name, value, mask in (
        ("imagined", promised, counted),
        ("real", rewards, valid),
    ):
        value = torch.where(mask, value * discount, 0.0).sum(1, keepdim=True)
        out.set(f"{name}_return", value.cpu())
        out.set(f"{name}_length", mask.sum(1, keepdim=True).cpu())
    return out.set("gap", out.get("imagined_return") - out.get("real_return"))


def _reward_key(env: WorldModelEnv, reward_key: NestedKey | None) -> NestedKey:
    keys = env.reward_keys
    if reward_key is None and len(keys) == 1:
        return keys[0]
    if reward_key not in keys:
        raise ValueError(
            f"The env has the rewards {keys}: name one of them, reward_key=..., got {reward_key!r}."
        )
    return reward_key


def rolled_out(
    env: EnvBase, policy: Callable, horizon: int, episodes: int
) -> TensorDictBase:
    """Run at least ``episodes`` real episodes, padded to ``[N, H]``."""
    rows: list[TensorDictBase] = []
    while sum(row.batch_size[:-1].numel() for row in rows) < episodes:
        rollout = env.rollout(horizon, policy, break_when_any_done=not env.batch_dims)
        rollout = rollout.reshape(-1, rollout.batch_size[-1])
        rows.append(_first_episodes(rollout, ends(env, rollout), horizon))
    return torch.cat(rows)


def _first_episodes(
    row: TensorDictBase, done: torch.Tensor, horizon: int
) -> TensorDictBase:
    """Return rows ``[N, T]`` as ``[N, H]``, with a mask that is True up to each row's first end."""
    number, length = row.batch_size
    mask = torch.zeros(number, horizon, dtype=torch.bool, device=row.device)
    mask[:, :length] = done.long().cumsum(1) - done.long() == 0
    if length < horizon:
        last = row[:, -1:].expand(number, horizon - length)
        row = torch.cat([row, last], 1)
    return row.copy().set(("collector", "mask"), mask)


def _episodes(
    env: WorldModelEnv, steps: TensorDictBase, reward_key: NestedKey, horizon: int
) -> tuple[TensorDictBase, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return starts ``[N]``, rewards and validity ``[N, H]``, and whether each terminated, ``[N]``."""
    steps = steps.reshape(-1, steps.batch_size[-1])
    if env.device is not None:
        steps = steps.to(env.device)
    rows, length = steps.batch_size
    mask = steps.get(("collector", "mask"), None)
    if mask is None:
        mask = torch.ones(rows, length, dtype=torch.bool, device=steps.device)
    mask = mask.reshape(rows, length)
    done = ends(env, steps)
    goes_on = torch.zeros_like(mask)
    goes_on[:, 1:] = mask[:, :-1] & ~done[:, :-1]
    row, start = (mask & ~goes_on).nonzero(as_tuple=True)
    index = start[:, None] + torch.arange(horizon, device=start.device)
    inside = index < length
    index = index.clamp(max=length - 1)
    follows = goes_on[row[:, None], index] & mask[row[:, None], index]
    follows[:, 0] = True
    valid = inside & (follows.long().cumprod(1) > 0)
    rewards = steps.get(join("next", reward_key))[row[:, None], index]
    terminated = _terminates(env, steps)[row[:, None], index] & valid
    # Entries of the real env or of the sampler do not belong to an imagined start.
    starts = steps[row, start].select(*env.start_keys, strict=False)
    return starts, rewards.flatten(2).sum(-1), valid, terminated.any(1)


def _terminates(env: WorldModelEnv, steps: TensorDictBase) -> torch.Tensor:
    """Return the steps that end an episode other than by a time limit, ``[*B]`` bool."""
    out = torch.zeros(steps.batch_size, dtype=torch.bool, device=steps.device)
    for key in env.done_keys:
        recorded = steps.get(join("next", key), None)
        if as_tuple(key)[-1] == "done" and recorded is not None:
            value = real_terminations(steps, key)
            out |= value.reshape(*steps.batch_size, -1).any(-1)
    return out
