"""Importance-weighted evaluation: what a policy is worth, by the episodes that it might have made."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase

from torchrl_wm.diagnostics.logs import Log, resampled
from torchrl_wm.diagnostics.recording import Episodes, positive
from torchrl_wm.diagnostics.seeded import seeded
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import leaf_keys, sibling
from torchrl_wm.modules.modes import evaluation_mode

#: The names under which TorchRL's actors record the log-probability of their actions.
_LOG_PROBS = ("action_log_prob", "sample_log_prob")


@torch.no_grad()
def importance_weighted_value(
    policy: Callable,
    data: Episodes,
    *,
    gamma: float = 0.99,
    log_prob_key: NestedKey | None = None,
    action_key: NestedKey = "action",
    reward_key: NestedKey = "reward",
    done_key: NestedKey = "done",
    resamples: int = 500,
    seed: int | None = 0,
) -> TensorDict:
    """Estimate the value of a policy by weighing recorded episodes with how likely they are under it.

    Weighted importance sampling, step by step (Precup, Sutton and Singh 2000): the reward
    at step ``t`` counts by the product of ``policy(a | s) / behaviour(a | s)`` up to ``t``,
    over the sum of all episodes' products. It needs no model and no network, and works
    where the policy is close to the one that recorded: else few episodes have all the
    weight, which ``"effective_episodes"`` says.

    Args:
        policy: a TorchRL policy that draws, with ``get_dist``, such as
            :class:`~torchrl.modules.ProbabilisticActor`.
        data: recorded transitions ``[*B, T]``, or a list of them, with the log-probability
            of each recorded action under the policy that recorded it.

    Keyword Args:
        gamma: the discount.
        log_prob_key: where these are; by default beside the action, ``"action_log_prob"`` or
            ``"sample_log_prob"``.
        action_key, reward_key, done_key: the names of these entries, nested ones too.
        resamples: how often the episodes are drawn anew for the interval.
        seed: of these. With None, the current random state is used.

    Returns:
        Batch size ``[]``, scalars:

        - ``"value"``: the estimate over the length of the longest episode; NaN if the policy
          could have made none of them.
        - ``"low"``, ``"high"``: the 5 % and 95 % quantiles over the bootstrap of episodes; samples
          without any that is long enough are left out.
        - ``"effective_episodes"``: how many episodes of equal weight would say as much, after
          the last step.
        - ``"episodes"``: how many there are.

    Raises:
        TypeError: if the policy has no distribution.
        KeyError: if log-probabilities, rewards or ends were not recorded.
        ValueError: if a recorded log-probability is not finite, or one of the policy is NaN or
            infinity.

    Examples:
        >>> from tensordict.nn import NormalParamExtractor, TensorDictModule
        >>> from torch import nn
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.modules import MLP, ProbabilisticActor, TanhNormal
        >>> from torchrl_wm.diagnostics import importance_weighted_value
        >>> net = nn.Sequential(MLP(3, 2, num_cells=[32]), NormalParamExtractor())
        >>> policy = ProbabilisticActor(
        ...     TensorDictModule(net, ["observation"], ["loc", "scale"]), in_keys=["loc", "scale"],
        ...     distribution_class=TanhNormal, return_log_prob=True, default_interaction_type="random",
        ... )
        >>> log = [GymEnv("Pendulum-v1").rollout(20, policy) for _ in range(4)]
        >>> importance_weighted_value(policy, log)["effective_episodes"]  # its own episodes
        tensor(4.)
    """
    positive(resamples, "resamples")
    if not hasattr(policy, "get_dist"):
        raise TypeError(
            f"importance_weighted_value needs a policy that draws, with get_dist, such as TorchRL's "
            f"ProbabilisticActor; got {type(policy).__name__}. fitted_q_value takes any policy."
        )
    log = Log.of(data, "importance_weighted_value", reward_key, done_key)
    behaviour = _behaviour(log.rows, log_prob_key, action_key)
    rows, own = log.rows, []
    with evaluation_mode(policy):
        for part in rows.exclude("next").split(10_000):
            action = part.get(action_key)
            likely = policy.get_dist(part.copy()).log_prob(action)
            own.append(likely.reshape(len(part), -1).sum(-1))
    likely = torch.cat(own)
    wrong = likely.isnan() | (likely == torch.inf)
    if wrong.any():
        raise ValueError(
            f"The policy's log-probability of {int(wrong.sum())} of {len(rows)} recorded actions is NaN "
            f"or infinity. Look at its parameters, and at whether the actions are in its bounds."
        )
    ratio = likely - behaviour  # [M]
    reward, weight = _by_episode(log, ratio, gamma)
    value = _weighted(reward, weight, torch.ones_like(weight[:1, :, 0]))[0]
    final = weight[0, :, -1]
    with seeded(seed):
        number = len(final)
        counts = resampled(resamples, number, dtype=weight.dtype, device=final.device)
    around = _weighted(reward, weight, counts)
    out = {
        "value": value,
        "low": around.nanquantile(0.05),
        "high": around.nanquantile(0.95),
        "effective_episodes": final.sum() ** 2 / final.pow(2).sum().clamp_min(1e-300),
        "episodes": torch.tensor(float(number)),
    }
    return TensorDict({name: x.float() for name, x in out.items()}, batch_size=[]).cpu()


def _behaviour(
    rows: TensorDictBase, log_prob_key: NestedKey | None, action_key: NestedKey
) -> torch.Tensor:
    """Return the recorded log-probabilities, ``[M]``."""
    beside = [sibling(action_key, name) for name in _LOG_PROBS]
    keys = beside if log_prob_key is None else [log_prob_key]
    for key in keys:
        value = rows.get(key, None)
        if value is not None:
            value = value.reshape(len(rows), -1).sum(-1)
            wrong = int((~value.isfinite()).sum())
            if wrong:
                raise ValueError(
                    f"The recorded log-probabilities {key!r} are NaN or infinite in {wrong} of "
                    f"{len(rows)} steps: no policy does what it cannot do. Leave such episodes out."
                )
            return value
    raise MissingEntryError(
        f"Importance weights need the log-probabilities of the recorded actions under the policy that "
        f"recorded them, {keys}; the log has {leaf_keys(rows)}. Record with "
        f"ProbabilisticActor(..., return_log_prob=True), or name theirs: log_prob_key=..."
    )


def _by_episode(
    log: Log, ratio: torch.Tensor, gamma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return discounted rewards and weights by episode, ``[1, N, T]``.

    A terminated episode earns nothing more and keeps its weight; one that was cut says
    nothing of later steps, and weighs nothing there.
    """
    episode, begins = log.episode, log.begins
    time = torch.arange(len(ratio), device=ratio.device) - begins[episode]
    size = len(begins), int(time.max()) + 1
    logs, reward = ratio.new_zeros(size).double(), ratio.new_zeros(size).double()
    logs[episode, time] = ratio.double()
    reward[episode, time] = (log.reward * gamma**time).double()
    logs = logs.cumsum(1)
    last = log.ends.nonzero().squeeze(-1)
    lengths = (time[last] + 1)[:, None]
    steps = torch.arange(size[1], device=ratio.device)
    known = (steps < lengths) | log.terminated[last][:, None]
    logs = logs.masked_fill(~known, -torch.inf)
    # Only their shares at each step matter.
    most = logs.amax(0, keepdim=True)
    weight = (logs - torch.where(most.isfinite(), most, 0.0)).exp()
    return reward[None], weight[None]


def _weighted(
    reward: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """Return the values of samples of the episodes, ``[R, N]`` counts, ``[R]``; NaN without any."""
    total = counts @ weight[0]  # [R, T]
    earned = counts @ (weight * reward)[0]
    return torch.where(total > 0, earned / total, torch.nan).sum(-1)
