"""What a model promises the policies of several penalties, and which of them to take."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_wm.diagnostics import ReportSection
from torchrl_wm.diagnostics.drawing import new_figure
from torchrl_wm.diagnostics.logs import best_tenth
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules import with_penalty, with_propagation, WorldModel
from torchrl_wm.modules.keys import as_tuple, join, leaf_keys, sibling
from torchrl_wm.modules.modes import evaluation_mode
from torchrl_wm.trainers.evaluation import forked_random
from torchrl_wm.trainers.model_training import as_episodes, episode_starts

#: The longest imagined episodes, if nobody says how long they are.
LONGEST = 1000


@dataclass(frozen=True)
class Outcome:
    """What a model promises a policy, over imagined episodes from recorded starts.

    Args:
        mean: the mean return, without penalty.
        worst: the mean return in the elite member of the ensemble that promises least.
        measured: the mean of the measure over the steps.
        charged: the mean over episodes of the measure's sum.
        length: the mean length of the episodes.
    """

    mean: float
    worst: float
    measured: float
    charged: float
    length: float

    def penalised(self, price: float) -> float:
        """Return the mean return if a unit of the measure costs a price."""
        return self.mean - price * self.charged


@torch.no_grad()
def judged(
    world_model: WorldModel,
    imagining: WorldModel,
    env: EnvBase,
    policies: Sequence[TensorDictModuleBase],
    log: Sequence[TensorDictBase],
    *,
    episodes: int,
    steps: int | None = None,
    measure: Literal["disagreement", "deviation"] = "disagreement",
) -> list[Outcome]:
    """Return what a model promises each policy, without exploration, from the same starts.

    Args:
        world_model: an ensemble.
        imagining: the same without penalties, of which each member imagines episodes of its own
            (TSinf); they may end at a limit.
        env: the env that was recorded, or its specs.
        policies: the policies.
        log: the recorded transitions, in parts ``[N]`` of one episode after the other. Imagined
            episodes begin where some of the recorded ones do.

    Keyword Args:
        episodes: how many imagined episodes there are, at least one for each elite member.
        steps: how long they are at most; None for the longest recorded episode, and no more
            than 1000.
        measure: what penalties charge.
    """
    imagined = WorldModelEnv(imagining, env, batch_size=[])
    begun = [episode_starts(part) for part in log]
    steps = steps or min(LONGEST, max(map(_longest, log, begun)))
    elites = world_model.dynamics.elites
    firsts = [
        part.select(*world_model.encoder.in_keys)[at] for part, at in zip(log, begun)
    ]
    firsts = torch.cat(firsts)
    number = min(len(firsts), max(1, episodes // len(elites)))
    firsts = firsts[torch.randperm(len(firsts))[:number]]
    # All starts for each member: [E, S].
    starts = firsts.expand(len(elites), number).clone()
    starts.set("member", elites[:, None].expand(-1, number).clone())
    out = []
    for policy in policies:
        deterministic = set_exploration_type(ExplorationType.DETERMINISTIC)
        # From the same random state, so that the others make no difference to a policy.
        with forked_random(), evaluation_mode(imagining, policy), deterministic:
            rollout = imagined.imagine(steps, policy, starts)
        charge = measured_on(world_model, env, rollout, measure)
        out.append(_outcome(rollout, charge, env.reward_key))
    return out


def _longest(part: TensorDictBase, begun: torch.Tensor) -> int:
    """Return the length of the longest episode of a part of the log."""
    ends = torch.cat([begun[1:], begun.new_tensor([len(part)])])
    return int((ends - begun).max())


@torch.no_grad()
def measured_on(
    world_model: WorldModel, env: EnvBase, steps: TensorDictBase, measure: str
) -> torch.Tensor:
    """Return the measure of some steps, ``[*B]``: what the members say of their states and actions."""
    model = with_propagation(world_model, "mean")
    model = with_penalty(model, 1.0, measure=measure)
    with evaluation_mode(model):
        out = model.step(steps.select(*model.latent_keys, env.action_key))
    taken = out.get(join("next", sibling(env.reward_key, "penalty")))
    return taken.flatten(steps.ndim).sum(-1)


def _outcome(
    rollout: TensorDictBase, charge: torch.Tensor, reward_key: NestedKey
) -> Outcome:
    """Return what a policy got from the starts of each member, ``[E, S, T]``."""
    valid = rollout.get(("collector", "mask"))
    charge = charge * valid
    reward = rollout.get(join("next", reward_key)).flatten(3).sum(-1)
    returns = (reward * valid).sum(-1)  # [E, S]
    return Outcome(
        mean=returns.mean().item(),
        worst=returns.mean(1).min().item(),
        measured=(charge.sum() / valid.sum()).item(),
        charged=charge.sum(-1).mean().item(),
        length=valid.sum(-1).double().mean().item(),
    )


def recorded_returns(
    log: Sequence[TensorDictBase], reward_key: NestedKey
) -> torch.Tensor:
    """Return what each recorded episode got, ``[N]``."""
    key = join("next", reward_key)
    returns = [e.get(key).sum() for part in log for e in as_episodes(part)]
    return torch.stack(returns)


def chosen_of(outcomes: Sequence[Outcome]) -> int:
    """Return the policy to take: the one that the most doubtful member promises most."""
    return max(range(len(outcomes)), key=lambda number: outcomes[number].worst)


# The report ---------------------------------------------------------------------------


def sweep_section(
    penalties: Mapping[float, float],
    outcomes: Sequence[Outcome],
    chosen: int,
    of_data: float,
    recorded: torch.Tensor,
    real: Sequence[Sequence[float]] | None,
    measure: str,
) -> ReportSection:
    """Return the section of a report on the policies of all penalties.

    Args:
        penalties: the penalties, and what a unit of the measure costs with each.
        outcomes: what the model promises the policy of each.
        chosen: the number of the policy that was taken.
        of_data: the mean of the measure on held-out recorded steps.
        recorded: what each recorded episode got.
        real: real returns of each policy, if there is a real env.
        measure: the name of the measure.
    """
    log_mean, log_best = recorded.mean().item(), best_tenth(recorded).item()
    numbers = {
        f"{measure} of held-out steps": of_data,
        "return of recorded episodes": log_mean,
        "of the best tenth of them": log_best,
    }
    for number, (penalty, outcome) in enumerate(zip(penalties, outcomes)):
        row = {
            f"reward for a unit of {measure}": penalties[penalty],
            "return in the model": outcome.mean,
            "with the penalty": outcome.penalised(penalties[penalty]),
            "in the member that promises least": outcome.worst,
            measure: outcome.measured,
            "length of imagined episodes": outcome.length,
        }
        if real is not None:
            row["real return"] = sum(real[number]) / len(real[number])
        numbers.update({f"penalty {penalty:g}: {k}": v for k, v in row.items()})
    best, taken = outcomes[chosen], [*penalties][chosen]
    times = best.measured / max(of_data, 1e-12)
    verdict = (
        f"The policy of the penalty {taken:g} acts: the member of the ensemble that "
        f"promises it least still promises {best.worst:.4g}, the most of {len(outcomes)}. "
        if len(outcomes) > 1
        else f"One penalty, {taken:g}: the model promises {best.mean:.4g}, and the "
        f"member that promises least {best.worst:.4g}. "
    )
    verdict += (
        f"Recorded episodes got {log_mean:.4g}, the best tenth of them {log_best:.4g}. "
    )
    verdict += f"Along its imagined episodes the {measure} is {times:.2g} times that of the data."
    if real is not None:
        got = numbers[f"penalty {taken:g}: real return"]
        verdict += f" In the real env it gets {got:.4g}."
    return ReportSection(
        "Penalties",
        how=(
            "What the model promises the policy of each penalty in imagined episodes that begin "
            "where recorded ones do, beside what these got: returns here are sums over an episode, "
            f"without a discount. A {measure} far above that of the data says that a policy "
            "has left them, and that its promised return may not hold."
        ),
        verdict=verdict,
        pictures=[
            _figure(penalties, outcomes, chosen, of_data, log_mean, real, measure)
        ],
        numbers=numbers,
    )


def _figure(
    penalties: Mapping[float, float],
    outcomes: Sequence[Outcome],
    chosen: int,
    of_data: float,
    log_mean: float,
    real: Sequence[Sequence[float]] | None,
    measure: str,
):
    """Draw returns and the measure over the penalties."""
    figure = new_figure(9, 3.6)
    returns, measured = figure.subplots(1, 2)
    at = range(len(penalties))
    lines = {
        "in the model": [o.mean for o in outcomes],
        "with the penalty": [
            o.penalised(price) for price, o in zip(penalties.values(), outcomes)
        ],
        "in the member that promises least": [o.worst for o in outcomes],
    }
    for label, values in lines.items():
        returns.plot(at, values, "o-", markersize=4, label=label)
    if real is not None:
        means = [sum(values) / len(values) for values in real]
        returns.plot(at, means, "ks--", markersize=5, label="real")
    returns.axhline(log_mean, color="0.5", ls=":", label="recorded episodes")
    measured.plot(at, [o.measured for o in outcomes], "o-", markersize=4)
    measured.axhline(of_data, color="0.5", ls=":", label="held-out data")
    returns.set(title="mean return of an episode", xlabel="penalty")
    measured.set(title=f"mean {measure}", xlabel="penalty", ylim=(0, None))
    for place in (returns, measured):
        place.set_xticks(at, [f"{penalty:g}" for penalty in penalties])
        place.axvline(chosen, color="0.85", lw=6, zorder=0)
        place.grid(alpha=0.3)
        place.legend(fontsize="small")
    return figure


# What is refused ----------------------------------------------------------------------


def check_penalties(penalties: Sequence[float]) -> None:
    """Refuse penalties that are no sweep.

    Raises:
        ValueError: if there are none, one is negative or not finite, or one comes twice.
    """
    wrong = [p for p in penalties if not 0 <= p < float("inf")]
    names = {f"{penalty:g}" for penalty in penalties}  # those of columns and policies
    if not penalties or wrong or len(names) < len(penalties):
        raise ValueError(
            f"penalties say how much doubt costs, each 0 or more and each once (in six digits), such "
            f"as (0.0, 1.0, 5.0), got {tuple(penalties)}."
        )


def check_actions(log: Sequence[TensorDictBase], env: EnvBase) -> None:
    """Refuse a log of choices, or one whose actions are always the same; warn if some of them are.

    Raises:
        ValueError: if actions are no floats, or none of them changes.
    """
    key = env.action_key
    spec = env.full_action_spec_unbatched[key]
    if not spec.dtype.is_floating_point:
        raise ValueError(
            f"MOPO's policies (SAC) give continuous actions, and {key!r} of the log is "
            f"{type(spec).__name__} of the shape {tuple(spec.shape)}. Train only a model, "
            f"torchrl-wm train model --data LOG, and with its penalty, "
            f"torchrl_wm.modules.with_penalty(model, 1.0), plan through it or train a policy of "
            f"choices in it, such as DQN or PPO by way of torchrl_wm.export."
        )
    actions = torch.cat([part.get(key).flatten(1) for part in log])
    still = (actions == actions[0]).all(0)
    if still.all():
        raise ValueError(
            f"All {len(actions)} actions {key!r} of the log are the same, {actions[0].tolist()}: it "
            f"does not tell what other actions do, and no policy can be learnt from it. Record "
            f"some with other actions, random ones for instance."
        )
    if still.any():
        warnings.warn(
            f"The log's actions {key!r} never change in the dims {still.nonzero().flatten().tolist()}: "
            f"the model does not know what they do, and a policy may use them as it likes. Record "
            f"some in which they change.",
            stacklevel=2,
        )


def check_rewards_vary(log: Sequence[TensorDictBase], reward_key: NestedKey) -> None:
    """Refuse a log whose rewards are always the same.

    Raises:
        ValueError: if they are.
    """
    rewards = torch.cat([part.get(join("next", reward_key)).flatten() for part in log])
    if (rewards == rewards[0]).all():
        raise ValueError(
            f"All {len(rewards)} rewards {reward_key!r} of the log are {rewards[0].item():g}: "
            f"nothing in it is better than anything else. Record some steps with other rewards, "
            f"or write the rewards that you want into the log."
        )


def check_episodes(log: Sequence[TensorDictBase]) -> None:
    """Warn if a log has one episode, whose last steps are a part of their own."""
    train, test = log
    ends = [key for key in leaf_keys(train) if as_tuple(key)[-1] == "done"]
    # Only the ends are joined: observations need much memory.
    if len(episode_starts(torch.cat([part.select(*ends) for part in log]))) == 1:
        warnings.warn(
            f"The log has one episode of {len(train) + len(test)} steps: its last {len(test)} are "
            f"held out, and what the model promises a policy is asked from two steps alone. If it "
            f"has more episodes, say where they end.",
            stacklevel=2,
        )
