"""A world model whose rewards pay for what it does not know, and whose episodes end there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Literal

from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import nn

from torchrl_wm.modules.blocks.ensemble_dynamics import DOUBTS, EnsembleDynamics
from torchrl_wm.modules.blocks.penalty_heads import (
    ENDING_NAMES,
    LimitHead,
    Penalty,
    PenaltyHead,
)
from torchrl_wm.modules.keys import as_tuple, is_next, join, sibling, strip_next, unique
from torchrl_wm.modules.world_model.views import view_of
from torchrl_wm.modules.world_model.wiring import written_keys
from torchrl_wm.modules.world_model.world_model import WorldModel


def with_penalty(
    world_model: WorldModel,
    coefficient: float,
    *,
    measure: NestedKey = "disagreement",
    limit: float | None = None,
    on_limit: Literal["terminate", "truncate"] = "terminate",
    limit_reward: float | None = None,
    reward_key: NestedKey | None = None,
    done_key: NestedKey = "done",
) -> WorldModel:
    """Return the same world model with rewards that pay for what it does not know.

    The reward is ``r - coefficient * u`` (MOPO, arXiv 2005.13239, algorithm 1): a policy that is
    trained in this model keeps to where the model is sure. Where ``u`` is above ``limit``, the
    imagined episode ends (MOReL, arXiv 2005.05951, section 4: an unknown state and action lead to
    an absorbing state of the reward ``limit_reward``).

    Networks, normalisers and elites are shared, so that training either trains both. The loss
    is that of the model itself: build it on ``world_model``, not on what is returned here.

    ==========================  ==============  ==============================================
    writes                      shape           what
    ==========================  ==============  ==============================================
    ``("next", "reward")``      as before       ``r - coefficient * u``; ``limit_reward``
                                                beyond the limit, if that is given
    ``("next", "penalty")``     as the reward   what was taken off: reward and penalty add up
                                                to the reward of ``world_model``
    ``("next", "terminated")``  as before       True beyond the limit, too
    ==========================  ==============  ==============================================

    With ``on_limit="truncate"`` that is ``("next", "truncated")``. Either way
    :class:`~torchrl_wm.WorldModelEnv` has ``done == terminated | truncated``.

    Args:
        world_model: the model, with a reward head.
        coefficient: the price of ``u``, in units of reward. Not negative; zero for a limit alone.

    Keyword Args:
        measure: ``u``, an entry ``[*B, 1]`` that the dynamics write below "next".
            ``"disagreement"``: the spread of the members' means; ``"deviation"``: the largest
            norm of a member's predicted standard deviation, as in MOPO. Both are those of
            :class:`EnsembleDynamics`, in units of the targets' own spread. Or a key of yours.
        limit: the value of ``u`` above which an episode ends, or which is no number; None for
            no limit. :func:`data_limit` reads one off the data.
        on_limit: ``"terminate"``, nothing is worth anything afterwards, or ``"truncate"``:
            values go on as if the episode did.
        limit_reward: the reward of a step that terminates beyond the limit.
        reward_key: the reward, if the reward head writes several entries and none of them is
            called "reward". By default all that are called so pay.
        done_key: the done entry of the env, beside which the ending is written if the model has
            no done head, ``[*B, 1]``. An env whose done entry has more dims, such as one for each
            agent, needs a model with a done head.

    Returns:
        The new world model, in the same mode (training or not). :func:`without_penalty` undoes it,
        :func:`penalty_of` tells the settings. It can be saved as the model itself can.

    Raises:
        TypeError: if ``world_model`` is no WorldModel, or a number is none.
        ValueError: if a number is negative or not finite; if nothing writes the measure, a reward
            or what else is named; if the model has a penalty already.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> from torchrl_wm.modules import with_penalty
        >>> real_env = GymEnv("Pendulum-v1")
        >>> world_model, loss = make_ensemble_world_model(real_env, members=3, hidden=(32,))
        >>> careful = with_penalty(world_model, 1.0, limit=2.0, limit_reward=-20.0)
        >>> env = WorldModelEnv(careful, real_env)
        >>> env.imagine(4, tensordict=real_env.reset().expand(10))["next", "reward"].shape
        torch.Size([10, 4, 1])
        >>> out = careful(real_env.rand_action(real_env.reset()))["next"]
        >>> out["reward"].shape, out["penalty"].shape
        (torch.Size([1]), torch.Size([1]))
    """
    if not isinstance(world_model, WorldModel):
        raise TypeError(
            f"with_penalty needs a WorldModel, got {type(world_model).__name__}."
        )
    if penalty_of(world_model) is not None:
        raise ValueError(
            f"The world model has a penalty already: {penalty_of(world_model)}. Give it another: "
            f"with_penalty(without_penalty(world_model), {coefficient}, ...)."
        )
    penalty = Penalty(
        coefficient=coefficient,
        measure=join("next", strip_next(measure)),
        limit=limit,
        on_limit=on_limit,
        limit_reward=limit_reward,
        reward_key=reward_key,
        done_key=done_key,
    )
    dynamics = measuring(world_model, penalty.measure).dynamics
    replaced: dict[str, nn.Module | None] = {"dynamics": dynamics}
    rewards = _rewards(world_model, reward_key)
    head = PenaltyHead(penalty, rewards)
    _check_new(world_model, [key for key in head.out_keys if key not in rewards])
    replaced["reward_head"] = _behind(
        world_model.reward_head, head, world_model.training
    )
    if limit is not None:
        ending = LimitHead(penalty, _endings(world_model))
        replaced["done_head"] = _behind(
            world_model.done_head, ending, world_model.training
        )
    return view_of(world_model, replaced, {"penalty": asdict(penalty)})


def without_penalty(world_model: WorldModel) -> WorldModel:
    """Return the world model that :func:`with_penalty` was given; without a penalty, itself.

    Components are shared. A model that was saved with its penalty is trained on through this.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> from torchrl_wm.modules import with_penalty, without_penalty
        >>> world_model, loss = make_ensemble_world_model(GymEnv("Pendulum-v1"), members=3)
        >>> plain = without_penalty(with_penalty(world_model, 1.0))
        >>> plain.reward_head is world_model.reward_head
        True
    """
    if penalty_of(world_model) is None:
        return world_model
    replaced: dict[str, nn.Module | None] = {
        "reward_head": _before(world_model.reward_head)
    }
    if isinstance(_last(world_model.done_head), LimitHead):
        replaced["done_head"] = _before(world_model.done_head)
    return view_of(world_model, replaced, {"penalty": None})


def penalty_of(world_model: WorldModel) -> Penalty | None:
    """Return the settings of :func:`with_penalty`; None if the model has no penalty.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> from torchrl_wm.modules import penalty_of, with_penalty
        >>> world_model, loss = make_ensemble_world_model(GymEnv("Pendulum-v1"), members=3)
        >>> penalty_of(with_penalty(world_model, 0.5)).coefficient
        0.5
    """
    head = _last(world_model.reward_head)
    return head.penalty if isinstance(head, PenaltyHead) else None


@contextmanager
def penalty_paused(world_model: WorldModel, paused: bool = True) -> Iterator[None]:
    """Let a model predict its own rewards and ends for a while; a model without penalty does.

    With ``paused=False`` it pays meanwhile, within a pause.
    """
    heads = [_last(world_model.reward_head), _last(world_model.done_head)]
    parts = [h.module for h in heads if isinstance(h, (PenaltyHead, LimitHead))]
    before = [part.paused for part in parts]  # a pause within a pause does not end it
    try:
        for part in parts:
            part.paused = paused
        yield
    finally:
        for part, was in zip(parts, before):
            part.paused = was


def paying(policy: Callable | None, world_model: WorldModel) -> Callable | None:
    """Return a policy that acts while the penalty is paused as it does else: planners plan with it."""
    if policy is None or penalty_of(world_model) is None:
        return policy
    if isinstance(policy, nn.Module):
        head = _last(world_model.reward_head).module
        if all(module is not head for module in policy.modules()):
            return policy  # it does not ask the model, and may be a program of networks

    def act(tensordict: TensorDictBase) -> TensorDictBase:
        with penalty_paused(world_model, False):
            return policy(tensordict)

    return act


def measuring(world_model: WorldModel, measure: NestedKey) -> WorldModel:
    """Return the world model, or a view of it, whose step writes ``measure``.

    Raises:
        ValueError: if nothing writes it, or if it is always zero.
    """
    dynamics = world_model.dynamics
    name = as_tuple(measure)[-1]
    ours = measure in DOUBTS
    if ours and isinstance(dynamics, EnsembleDynamics):
        if not dynamics.all_members:
            raise ValueError(
                f"The ensemble writes no {measure}: it is propagated with all_members=False, which "
                f"asks one member for each row, and none of the others. Let all of them speak: "
                f"with_propagation(world_model, {dynamics.propagation!r})."
            )
        if name == "disagreement" and dynamics.ensemble.members == 1:
            raise ValueError(
                "An ensemble of one member never disagrees. Make one of more members, or measure "
                "what it predicts of its own error: measure='deviation'."
            )
        if name == "deviation" and measure not in written_keys(dynamics):
            dynamics = dynamics.with_propagation(dynamics.propagation, deviation=True)
            return view_of(world_model, {"dynamics": dynamics}, {})
        return world_model
    written = [key for key in _written_before(world_model) if is_next(key)]
    if measure not in written:
        fix = f"measure={written[0]!r}" if written else "measure=..."
        if ours:
            fix = "make_ensemble_world_model(env) makes a model whose dynamics write it"
        raise ValueError(
            f"No component writes the measure {measure}: the dynamics are "
            f"{type(dynamics).__name__}, and below 'next' there are {written}. Name one of these, "
            f"[*B, 1], or another model: {fix}."
        )
    return world_model


def _written_before(world_model: WorldModel) -> list[NestedKey]:
    """Return what dynamics and reward head write."""
    keys = written_keys(world_model.dynamics)
    if world_model.reward_head is not None:
        keys += written_keys(world_model.reward_head)
    return unique(keys)


def _rewards(world_model: WorldModel, given: NestedKey | None) -> list[NestedKey]:
    """Return the rewards that the reward head writes.

    Raises:
        ValueError: if there is no reward head, or if it does not say which entry is the reward.
    """
    if world_model.reward_head is None:
        raise ValueError(
            "with_penalty needs a model that predicts rewards, and this one has no reward_head. "
            "For plans that are not judged by rewards, add DisagreementPenalty() to their score."
        )
    written = [key for key in written_keys(world_model.reward_head) if is_next(key)]
    if given is not None:
        rewards = [key for key in written if key == join("next", strip_next(given))]
    elif len(written) == 1:
        rewards = written
    else:
        rewards = [key for key in written if as_tuple(key)[-1] == "reward"]
    if not rewards:
        called = "'reward'" if given is None else repr(given)
        raise ValueError(
            f"reward_head writes no reward called {called}: it writes {written}. Say which of "
            f"these it is: with_penalty(..., reward_key=...)."
        )
    return rewards


def _endings(world_model: WorldModel) -> list[NestedKey]:
    """Return the entries by which the done head ends episodes.

    Raises:
        ValueError: if another component writes some.
    """
    for name in ("dynamics", "reward_head"):
        taken = _ending_keys(world_model.components[name])
        if taken:
            raise ValueError(
                f"{name} writes {taken}, and a limit must change that. Let a done_head write it: "
                f"WorldModel(..., done_head=TensorDictModule(...))."
            )
    return _ending_keys(world_model.done_head)


def _ending_keys(module: nn.Module | None) -> list[NestedKey]:
    written = [] if module is None else written_keys(module)
    return [
        key for key in written if is_next(key) and as_tuple(key)[-1] in ENDING_NAMES
    ]


def _check_new(world_model: WorldModel, keys: list[NestedKey]) -> None:
    """Refuse a model that has entries of the penalty's names already."""
    taken = [key for key in keys if key in _written_before(world_model)]
    if taken:
        other = sibling(taken[0], f"env_{as_tuple(taken[0])[-1]}")
        raise ValueError(
            f"The world model writes {taken} already, where the penalty is to stand. Give the "
            f"entry another name in the model and in the env, such as {strip_next(other)!r}: "
            f"torchrl.envs.RenameTransform renames observations."
        )


def _behind(
    given: TensorDictModuleBase | None, head: TensorDictModuleBase, training: bool
) -> TensorDictSequential:
    """Return a component that runs ``head`` after the given one."""
    parts = [head] if given is None else [given, head]
    joined = TensorDictSequential(*parts)
    for module in (joined, joined.module, *head.modules()):
        module.training = training
    return joined


def _last(component: nn.Module | None) -> nn.Module | None:
    """Return the last part of a component that is a sequence; None of any other."""
    is_sequence = isinstance(component, TensorDictSequential)
    return component[-1] if is_sequence else None


def _before(component: TensorDictSequential) -> TensorDictModuleBase | None:
    """Return the component that :func:`_behind` was given."""
    return component[0] if len(component.module) == 2 else None
