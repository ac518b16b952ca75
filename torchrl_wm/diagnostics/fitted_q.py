"""Fitted Q evaluation: what a policy is worth, by a log alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import ValueOperator
from torchrl.objectives import DDPGLoss, SoftUpdate

from torchrl_wm.diagnostics.logs import (
    actions_of,
    best_tenth,
    flat,
    Log,
    resampled,
    seen_keys,
)
from torchrl_wm.diagnostics.recording import Episodes, positive
from torchrl_wm.diagnostics.seeded import seeded
from torchrl_wm.modules import EnsembleMLP
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import join, leaf_keys, missing_from, unique

#: Half the width of a normal distribution's 90 % interval, in standard deviations.
_NINETY = 1.645

#: What is added to the diagonal of the last solution's matrix, in units of its mean.
_RIDGE = 1e-6


def fitted_q_value(
    policy: Callable,
    data: Episodes,
    *,
    gamma: float = 0.99,
    steps: int = 1000,
    members: int = 5,
    batch_size: int = 256,
    hidden: Sequence[int] = (64, 64),
    learning_rate: float = 1e-3,
    tau: float = 0.05,
    observation_keys: Sequence[NestedKey] | None = None,
    action_keys: Sequence[NestedKey] = ("action",),
    reward_key: NestedKey = "reward",
    done_key: NestedKey = "done",
    seed: int | None = 0,
) -> TensorDict:
    """Estimate the value of a policy at the episodes' beginnings from recorded transitions alone.

    Fitted Q evaluation (arXiv 1903.08738): a network learns ``Q(s, a) = r + gamma Q'(s', a')``
    with the recorded ``s``, ``a``, ``r``, ``s'``, and the policy's own action ``a'``.
    The value is ``Q(s, a)`` at each episode's first ``s``, ``a`` from the policy. It needs no
    model, and its errors are not the model's: where both agree, there is reason
    to believe them. It cannot know actions that are nowhere in the log.

    Values over hundreds of steps take that long to spread: in the end the last layers are
    solved for at once, on what the others have learnt (LSTD-Q, Lagoudakis and Parr 2003).
    The loss is the value loss of TorchRL's :class:`~torchrl.objectives.DDPGLoss`, with its TD(0)
    estimator and :class:`~torchrl.objectives.SoftUpdate`. An episode's value ends where it
    terminates, and goes on behind a time limit. Observations, actions and rewards are
    normalised by the log. A value that no rewards of the log could add up to is cut.

    Args:
        policy: reads observations, writes actions. One that draws is drawn once for each row.
        data: recorded transitions ``[*B, T]``, or a list of them, by whatever policy.

    Keyword Args:
        gamma: the discount, above 0 and below 1.
        steps: gradient steps.
        members: ``E``, networks; each learns from a bootstrap sample of the episodes. Of a log of
            one episode all see the same, and the interval is too narrow.
        batch_size: transitions in a batch of each.
        hidden: the sizes of their hidden layers.
        learning_rate: of Adam at the beginning; it falls to zero.
        tau: the share of the networks that is mixed into their targets at each step.
        observation_keys: what the networks see; by default all float entries that stand at
            the root and below "next". Vectors, or latents of images.
        action_keys, reward_key, done_key: the names of these entries, nested ones too.
        seed: of networks, batches and a policy that draws. The random state is put back afterwards. With None,
            the current state is used.

    Returns:
        Batch size ``[]``, scalars but for the members:

        - ``"value"``: the mean over the members.
        - ``"members"``: the value by each, ``[E]``.
        - ``"low"``, ``"high"``: an interval that should hold it in 9 of 10 cases, by the
          members' spread. It knows of chance, not of actions that the log lacks.
        - ``"unsettled"``: the share of these values that are more than a tenth beyond what the
          rewards of the log could add up to. Above a tenth, do not use the estimate.
        - ``"log_value"``: what the episodes of the log were worth; one that was cut is taken
          to go on as it was.
        - ``"best_log_value"``: the mean of the best tenth of them.

    Raises:
        KeyError: if an entry is missing, or the policy writes no action.
        ValueError: if a number is out of range, if observations are not vectors of floats, or if
            observations or actions are not finite.

    Examples:
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.modules import MLP
        >>> from torchrl_wm.diagnostics import fitted_q_value
        >>> log = [GymEnv("Pendulum-v1").rollout(50) for _ in range(3)]
        >>> policy = TensorDictModule(MLP(3, 1, num_cells=[32]), ["observation"], ["action"])
        >>> found = fitted_q_value(policy, log, steps=10)
        >>> found["low"] <= found["value"] <= found["high"]
        tensor(True)
    """
    for name, number in (("steps", steps), ("members", members)):
        positive(number, name)
    positive(batch_size, "batch_size")
    if not 0 < gamma < 1:
        raise ValueError(
            f"gamma must be above 0 and below 1, got {gamma}: the value of an episode without an "
            f"end is infinite without a discount."
        )
    actions = unique(action_keys)
    log = Log.of(data, "fitted_q_value", reward_key, done_key)
    with seeded(seed):
        transitions = _transitions(policy, log, observation_keys, actions)
        counts = resampled(
            members, len(log.begins), dtype=torch.float32, device=log.reward.device
        )
        scale = _Scale(log, gamma)
        network = _Network(transitions, members, hidden, scale.range)
        _fit(
            network, transitions, scale, counts[:, log.episode],
            gamma=gamma, steps=steps, batch_size=batch_size, rate=learning_rate, tau=tau,
        )  # fmt: skip
        first = log.begins
        with torch.no_grad():
            inputs = transitions["state"][first], transitions["policy_action"][first]
            raw = network.uncut(*(x.expand(members, -1, -1) for x in inputs))
    values = scale.undone(raw.clamp(*network.limits))
    values = (values.squeeze(-1) * counts).sum(1) / counts.sum(1)  # [E]
    mean = values.mean()
    half = _NINETY * values.std() if members > 1 else torch.nan * mean
    episodes = log.episode_values(gamma)
    out = {"value": mean, "members": values, "low": mean - half, "high": mean + half}
    out["unsettled"] = _beyond(raw, network.limits)
    out["log_value"] = episodes.mean()
    out["best_log_value"] = best_tenth(episodes)
    return TensorDict(out, batch_size=[]).cpu()


def _transitions(
    policy: Callable,
    log: Log,
    observation_keys: Sequence[NestedKey] | None,
    action_keys: list[NestedKey],
) -> TensorDict:
    """Return transitions ``[M]`` of one vector each, with the policy's actions beside those of the log."""
    rows, following = log.rows, log.rows.get("next")
    missing = missing_from(rows, action_keys)
    if missing:
        raise MissingEntryError(
            f"The log lacks the actions {missing}; it has {leaf_keys(rows)}. Name others: "
            f"action_keys=[...]."
        )
    if observation_keys is None:
        keys = [
            k
            for k in seen_keys(rows, action_keys)
            if rows.get(k).dtype.is_floating_point
        ]
    else:
        keys = unique(observation_keys)
    missing = missing_from(rows, keys) or missing_from(following, keys)
    if missing or not keys:
        raise MissingEntryError(
            f"fitted_q_value needs observations at the root and below 'next'; {missing or 'all'} "
            f"are missing from {leaf_keys(rows)}. Name others: observation_keys=[...]."
        )
    coarse = [key for key in keys if not rows.get(key).is_floating_point()]
    if coarse:
        raise ValueError(
            f"The observations {coarse} are not floats. Images are evaluated by their latents: "
            f"observation_keys=[...]."
        )
    seen = unique([*keys, *seen_keys(rows, action_keys)])
    for key in keys:
        for side, place in (("", rows), ("next", following)):
            if not place.get(key).isfinite().all():
                raise ValueError(
                    f"The log's {join(side, key) if side else key!r} is not finite everywhere. Leave "
                    f"such episodes out, or choose others: observation_keys=[...]."
                )
    ahead = rows.exclude("next").copy().update(following.select(*seen))
    actions = {
        "The log's actions": flat(rows, action_keys),
        "The policy's actions": actions_of(policy, rows, action_keys),
        "The policy's next actions": actions_of(policy, ahead, action_keys),
    }
    for name, value in actions.items():
        wrong = int((~value.isfinite()).any(-1).sum())
        if wrong:
            raise ValueError(
                f"{name} {action_keys} are NaN or infinite in {wrong} of {len(rows)} recorded steps. "
                f"Leave such episodes out, or look at the parameters of the policy."
            )
    taken, own, next_own = actions.values()
    return TensorDict(
        {
            "state": flat(rows, keys),
            "action": taken,
            "policy_action": own,
            "next": {
                "state": flat(following, keys),
                "policy_action": next_own,
                "reward": log.reward[:, None],
                "terminated": log.terminated[:, None],
                "done": log.terminated[:, None],
            },
        },
        batch_size=[len(rows)],
    )


def _beyond(values: torch.Tensor, limits: tuple[float, float]) -> torch.Tensor:
    """Return the share of values more than a tenth of the range beyond its limits."""
    low, high = limits
    margin = 0.1 * (high - low)
    within = (values >= low - margin) & (values <= high + margin)  # NaN is not
    return (~within).float().mean()


class _Scale:
    """Values in units that a network learns soon: those of the log have mean 0 and spread 1.

    With ``Q = mean / (1 - gamma) + scale * q``, the rewards of ``q`` are ``(r - mean) /
    scale``, and the value behind a termination, 0, is ``-mean / (1 - gamma) / scale``.
    """

    def __init__(self, log: Log, gamma: float) -> None:
        reward = log.reward
        self.mean, self.gamma = reward.mean(), gamma
        self.offset = self.mean / (1 - gamma)
        spread = log.to_go(gamma).std() if len(reward) > 1 else reward.new_ones(())
        self.scale = torch.where(spread > 0, spread, 1.0)
        low, high = reward.min() / (1 - gamma), reward.max() / (1 - gamma)
        if log.terminated.any():
            low, high = low.clamp_max(0), high.clamp_min(0)
        self.range = tuple(float(self.done(value)) for value in (low, high))

    def done(self, value: torch.Tensor) -> torch.Tensor:
        return (value - self.offset) / self.scale

    def undone(self, value: torch.Tensor) -> torch.Tensor:
        return value * self.scale + self.offset

    def rewards(
        self, log_reward: torch.Tensor, terminated: torch.Tensor
    ) -> torch.Tensor:
        """Return the rewards of ``q``, with what a termination is worth."""
        behind = self.gamma * self.done(torch.zeros_like(log_reward)) * terminated
        return (log_reward - self.mean) / self.scale + behind


class _Network(nn.Module):
    """Action values of ``E`` members, of states and actions ``[E, B, D]``."""

    def __init__(
        self,
        transitions: TensorDict,
        members: int,
        hidden: Sequence[int],
        limits: tuple[float, float],
    ) -> None:
        super().__init__()
        joined = torch.cat([transitions["state"], transitions["action"]], -1)
        spread = joined.std(0) if len(joined) > 1 else torch.ones_like(joined[0])
        self.register_buffer("mean", joined.mean(0))
        # What never changes in the log is not blown up where it does in the policy's actions.
        self.register_buffer("spread", torch.where(spread > 1e-6, spread, 1.0))
        self.values = EnsembleMLP(
            members, joined.shape[1], 1, hidden=hidden, activation=nn.ReLU
        ).to(joined.device)
        self.limits = limits

    def forward(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        value = self.uncut(state, action)
        # Values are cut, and their gradients are not: a value can come back.
        return value + (value.clamp(*self.limits) - value).detach()

    def uncut(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Return the values as the last layers give them, ``[E, B, 1]``."""
        return self.values.layers[-1](self.features(state, action))

    def features(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Return what the last layers read, ``[E, B, F]``."""
        value = (torch.cat([state, action], -1) - self.mean) / self.spread
        for layer in self.values.layers[:-1]:
            value = self.values.activation(layer(value))
        return value


def _fit(
    network: _Network,
    transitions: TensorDict,
    scale: _Scale,
    weights: torch.Tensor,
    *,
    gamma: float,
    steps: int,
    batch_size: int,
    rate: float,
    tau: float,
) -> None:
    """Fit the members, each on rows drawn by its weights, ``[E, M]``."""
    inputs, outputs = ["state", "action"], ["state_action_value"]
    # The policy stays as it is, so that its actions are looked up.
    policy = TensorDictModule(nn.Identity(), ["policy_action"], ["action"])
    loss = DDPGLoss(policy, ValueOperator(network, inputs, outputs), delay_value=True)
    loss.make_value_estimator(gamma=gamma)
    targets = SoftUpdate(loss, tau=tau)
    optimizer = torch.optim.Adam(loss.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / steps)
    ahead = transitions["next"]
    reward = scale.rewards(ahead["reward"], ahead["terminated"])
    data = transitions.copy().set(("next", "reward"), reward)
    drawn = torch.multinomial(weights, steps * batch_size, replacement=True)
    for rows in drawn.split(batch_size, 1):
        value, _ = loss.loss_value(data[rows])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        targets.step()
    with loss.value_network_params.to_module(loss.value_network):
        network.load_state_dict(loss.value_network.module.state_dict())
    _solve_last(network, data, weights, gamma)


@torch.no_grad()
def _solve_last(
    network: _Network, data: TensorDict, weights: torch.Tensor, gamma: float
) -> None:
    """Set the last layers to the fixed point of the Bellman equation on their inputs (LSTD-Q)."""
    last = network.values.layers[-1]
    members, size, _ = last.weight.shape
    place = {"dtype": torch.double, "device": last.weight.device}
    left = torch.zeros(members, size + 1, size + 1, **place)
    right = torch.zeros(members, size + 1, 1, **place)
    grams = torch.zeros_like(left)
    for part, weight in zip(data.split(10_000), weights.split(10_000, 1)):
        ahead = part["next"]

        def features(rows, action):
            found = network.features(
                rows["state"].expand(members, -1, -1), action.expand(members, -1, -1)
            )
            return torch.cat([found, torch.ones_like(found[..., :1])], -1).double()

        now = features(part, part["action"])
        then = features(ahead, ahead["policy_action"]) * ~ahead["terminated"]
        weighed = (now * weight[..., None]).mT
        grams += weighed @ now
        left += weighed @ (now - gamma * then)
        right += weighed @ ahead["reward"].double()
    ridge = _RIDGE * grams.diagonal(dim1=1, dim2=2).mean(-1)
    left += ridge[:, None, None] * torch.eye(size + 1, **place)
    found = torch.linalg.solve(left, right).to(last.weight.dtype)
    last.weight.copy_(found[:, :-1])
    last.bias.copy_(found[:, -1:])
