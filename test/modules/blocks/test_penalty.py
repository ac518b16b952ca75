"""Penalties and limits: what is paid, how episodes end, and that one model serves all."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from _models import SpecEnv
from hypothesis import given, settings, strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.data import Composite, Unbounded

from torchrl_wm import WorldModel, WorldModelEnv, WorldModelLoss
from torchrl_wm.models import (
    load_world_model,
    make_ensemble_world_model,
    save_world_model,
)
from torchrl_wm.modules import (
    ContinueHead,
    fit_normalizers,
    Penalty,
    penalty_of,
    TerminationHead,
    with_penalty,
    with_propagation,
    without_penalty,
)
from torchrl_wm.modules.blocks.penalty import penalty_paused
from torchrl_wm.modules.keys import join, sibling

OBS, ACTION = 3, 2
sizes = st.sampled_from([(), (1,), (4,), (2, 3)])


def head_of(kind: str, latent, done_key="done"):
    """A done head of a kind; None for none."""
    read = [join("next", latent)]

    def at(name):
        return [join("next", sibling(done_key, name))]

    net = nn.Linear(OBS, 1)
    return {
        "none": lambda: None,
        "termination": lambda: TerminationHead(net, read, done_key=done_key),
        "continue": lambda: ContinueHead(net, read, done_key=done_key),
        "logits": lambda: Mod(net, read, at("terminated_logits")),
        "continue logits": lambda: Mod(net, read, at("continue_pred")),
        "bool": lambda: Mod(lambda x: net(x) > 0, read, at("terminated")),
        "done": lambda: Mod(lambda x: net(x) > 0, read, at("done")),
        "truncated": lambda: Mod(lambda x: net(x) > 0, read, at("truncated")),
        "done and truncated": lambda: Mod(
            lambda x: (net(x) > 0, net(-x) > 0), read, at("done") + at("truncated")
        ),
    }[kind]()


KINDS = [
    "none",
    "termination",
    "continue",
    "logits",
    "continue logits",
    "bool",
    "done",
    "truncated",
    "done and truncated",
]


class Spread(nn.Module):
    """Dynamics that say how unsure they are: more, the farther the state is from zero."""

    def forward(self, state, action):
        return state + 0.3 * torch.randn_like(state), state.abs().mean(-1, keepdim=True)


def model_of(
    kind: str = "none",
    *,
    observation="observation",
    action="action",
    reward="reward",
    measure="spread",
) -> WorldModel:
    ahead = join("next", observation)
    return WorldModel(
        Mod(nn.Identity(), [observation], [observation]),
        Mod(Spread(), [observation, action], [ahead, join("next", measure)]),
        Mod(nn.Linear(OBS, 1), [ahead], [join("next", reward)]),
        done_head=head_of(kind, observation),
    )


def ensemble(members: int = 3, **kwargs):
    env = SpecEnv(observation=OBS)
    model, loss = make_ensemble_world_model(
        env, members=members, hidden=(8,), termination_hidden=(8,), **kwargs
    )
    return model, loss, env


def states(*size: int, key="observation") -> TensorDict:
    return TensorDict({key: torch.randn(*size, OBS)}, size)


def typical(model, measure) -> float:
    """A value of the measure that is passed by half of all states."""
    start = states(100).set("action", torch.rand(100, ACTION) * 2 - 1)
    model = with_penalty(model, 0.0, measure=measure)
    return step(model, start)[measure].median().item()


def step(model, start, seed=0, **more):
    torch.manual_seed(seed)
    return model.step(start.copy())["next"]


@settings(max_examples=60)
@given(data=st.data())
def test_reward_and_penalty_add_up_and_endings_are_one_truth(data) -> None:
    nest = data.draw(st.booleans())

    def key(name):
        return ("group", name) if nest else name

    names = {k: key(k) for k in ("observation", "action", "reward", "measure")}
    model = model_of(data.draw(st.sampled_from(KINDS)), **names)
    coefficient = data.draw(st.sampled_from([0, 0.5, 3.0]))
    limit = data.draw(st.sampled_from([None, 0.7]))
    truncate = limit is not None and data.draw(st.booleans())
    kappa = None
    if limit is not None and not truncate:
        kappa = data.draw(st.sampled_from([None, -7.0]))
    careful = with_penalty(
        model,
        coefficient,
        measure=names["measure"],
        limit=limit,
        on_limit="truncate" if truncate else "terminate",
        limit_reward=kappa,
    )
    size = data.draw(sizes)
    start = states(*size, key=names["observation"])
    start.set(names["action"], torch.rand(*size, ACTION))
    plain, paid = step(model, start), step(careful, start)
    u, reward = plain[names["measure"]], paid[names["reward"]]
    assert torch.allclose(
        reward + paid[key("penalty")], plain[names["reward"]], atol=1e-5
    )
    beyond = u > limit if limit is not None else torch.zeros_like(u, dtype=torch.bool)
    expected = plain[names["reward"]] - coefficient * u
    if kappa is not None:
        expected = torch.where(beyond, kappa, expected)
    assert torch.allclose(reward, expected, atol=1e-5)

    base = SpecEnv(
        observation=OBS,
        observation_key=names["observation"],
        action_key=names["action"],
        reward_key=names["reward"],
    )
    outs = []
    for each in (model, careful):
        env = WorldModelEnv(each, base, batch_size=[])
        torch.manual_seed(1)
        outs.append(env.step(start.clone())["next"])
    before, after = outs
    assert torch.equal(after["done"], after["terminated"] | after["truncated"])
    flag, other = (
        ("truncated", "terminated") if truncate else ("terminated", "truncated")
    )
    u = start[names["observation"]].abs().mean(-1, keepdim=True)
    beyond = u > limit if limit is not None else torch.zeros_like(u, dtype=torch.bool)
    assert torch.equal(after[flag], before[flag] | beyond)
    assert torch.equal(after[other], before[other])


@pytest.mark.parametrize("order", ["penalty last", "propagation last"])
@pytest.mark.parametrize("measure", ["disagreement", "deviation"])
@pytest.mark.parametrize("propagation", ["ts1", "tsinf", "expectation", "mean"])
def test_with_propagation_in_either_order(propagation, measure, order) -> None:
    model, _, env = ensemble(termination="none", log_var_high=-2.0)
    limit = typical(model, measure)

    def pay(m):
        return with_penalty(m, 2.0, measure=measure, limit=limit, limit_reward=-9.0)

    if order == "penalty last":
        careful = pay(with_propagation(model, propagation))
    else:
        careful = with_propagation(pay(model), propagation)
    assert careful.dynamics.propagation == propagation
    assert penalty_of(careful) == Penalty(
        2.0, ("next", measure), limit, "terminate", -9.0
    )
    spec = Composite({measure: Unbounded((1,))})
    out = WorldModelEnv(careful, env, observation_spec=spec).imagine(
        3, tensordict=states(20)
    )["next"]
    done = out["done"]
    assert torch.equal(done, out["terminated"]) and torch.equal(
        done, out[measure] > limit
    )
    assert done.any() and not done.all()
    assert (out["reward"][done] == -9.0).all()
    assert {p.data_ptr() for p in careful.parameters()} == {
        p.data_ptr() for p in model.parameters()
    }


def test_deviation_is_the_largest_norm_of_a_standard_deviation() -> None:
    model, _, env = ensemble(termination="none")
    batch = TensorDict(
        {
            "observation": torch.randn(50, OBS) * 5,
            "action": torch.randn(50, ACTION),
            "next": {"observation": torch.randn(50, OBS), "reward": torch.ones(50, 1)},
        },
        [50],
    )
    fit_normalizers(model, batch)
    careful = with_penalty(model, 1.5, measure="deviation")
    out = step(careful, batch.exclude("next"))
    # In units of the targets' spread; the reward, which never changed, counts nothing.
    targets = batch["next", "observation"] - batch["observation"]
    std = (out["log_var"][..., :OBS] / 2).exp() / targets.std(0, unbiased=False)
    expected = std.pow(2).sum(-1).sqrt().amax(-1, keepdim=True)
    assert torch.allclose(out["deviation"], expected, rtol=1e-3)
    assert torch.allclose(out["penalty"], 1.5 * out["deviation"])
    assert "deviation" not in step(model, batch.exclude("next")).keys()


def test_wrong_arguments_are_named() -> None:
    model, _, env = ensemble()
    inf, nan = float("inf"), float("nan")
    for error, match, given_ in (
        (ValueError, "coefficient=-1.0 must not be negative", (-1.0, {})),
        (ValueError, "coefficient must be finite, got nan", (nan, {})),
        (ValueError, "coefficient must be finite, got inf", (inf, {})),
        (TypeError, "coefficient must be a number, got str", ("1", {})),
        (TypeError, "coefficient must be a number, got bool", (True, {})),
        (ValueError, "limit must be finite.* got inf", (1.0, {"limit": inf})),
        (
            ValueError,
            "limit_reward must be finite",
            (1, {"limit": 1, "limit_reward": nan}),
        ),
        (ValueError, "limit is None. Give one", (1.0, {"limit_reward": -1.0})),
        (ValueError, "limit is None. Give one", (1.0, {"on_limit": "truncate"})),
        (
            ValueError,
            "Unknown on_limit 'stop'",
            (1.0, {"limit": 1.0, "on_limit": "stop"}),
        ),
        (
            ValueError,
            "limit_reward=-1 is the reward of an episode that terminates",
            (1, {"limit": 1.0, "on_limit": "truncate", "limit_reward": -1}),
        ),
        (
            ValueError,
            r"writes the measure \('next', 'doubt'\).*'loc'",
            (1, {"measure": "doubt"}),
        ),
        (ValueError, "no reward called 'gain'", (1.0, {"reward_key": "gain"})),
    ):
        with pytest.raises(error, match=match):
            with_penalty(model, given_[0], **given_[1])
    with pytest.raises(TypeError, match="needs a WorldModel, got WorldModelEnv"):
        with_penalty(WorldModelEnv(model, env), 1.0)
    careful = with_penalty(model, 1.0)
    with pytest.raises(ValueError, match="has a penalty already: .*without_penalty"):
        with_penalty(careful, 2.0)
    with pytest.raises(ValueError, match="WorldModelLoss.without_penalty"):
        WorldModelLoss(careful)


def test_a_model_that_does_not_measure_says_what_to_do() -> None:
    model, _, _ = ensemble()
    quick = with_propagation(model, "ts1", all_members=False)
    for measure in ("disagreement", "deviation"):
        with pytest.raises(ValueError, match="all_members=False.*with_propagation"):
            with_penalty(quick, 1.0, measure=measure)
        with pytest.raises(ValueError, match="pay for.*without_penalty"):
            careful = with_penalty(model, 1.0, measure=measure)
            with_propagation(careful, "ts1", all_members=False)
        with pytest.raises(ValueError, match="make_ensemble_world_model"):
            with_penalty(model_of(), 1.0, measure=measure)
    with pytest.raises(ValueError, match="one member never disagrees.*deviation"):
        with_penalty(ensemble(members=1)[0], 1.0)
    with_penalty(ensemble(members=1)[0], 1.0, measure="deviation")
    blind = model_of()
    blind.reward_head = None
    with pytest.raises(ValueError, match="no reward_head.*DisagreementPenalty"):
        with_penalty(blind, 1.0, measure="spread")
    ending = model_of()
    ending.dynamics = Mod(
        lambda x, a: (x, x[..., :1], x[..., :1] > 9),
        ["observation", "action"],
        [("next", "observation"), ("next", "spread"), ("next", "terminated")],
    )
    with pytest.raises(ValueError, match="dynamics writes .*'terminated'.*a done_head"):
        with_penalty(ending, 1.0, measure="spread", limit=1.0)
    taken = model_of(measure="penalty")
    with pytest.raises(ValueError, match=r"writes \[\('next', 'penalty'\)\] already"):
        with_penalty(taken, 1.0, measure="penalty")
    with pytest.raises(RuntimeError, match=r"measure .* has the shape \(4, 3\)"):
        wide = model_of()
        wide.dynamics = Mod(
            lambda x, a: (x, x),
            ["observation", "action"],
            [("next", "observation"), ("next", "spread")],
        )
        env = SpecEnv((4,), observation=OBS)
        WorldModelEnv(with_penalty(wide, 1.0, measure="spread"), env)


def test_what_is_no_number_is_beyond_the_limit() -> None:
    careful = with_penalty(model_of(), 1.0, measure="spread", limit=1.0)
    start = states(2).set("action", torch.zeros(2, ACTION))
    start["observation"][0] = float("nan")
    start["observation"][1] = 0.0
    assert careful.step(start)["next", "terminated"].tolist() == [[True], [False]]


@pytest.mark.parametrize("kind", ["none", "bool"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_itself_comes_back(training, kind) -> None:
    model = model_of(kind).train(training)
    careful = with_penalty(model, 1.0, measure="spread", limit=1.0)
    assert all(module.training is training for module in careful.modules())
    again = without_penalty(careful)
    assert again.components == model.components and penalty_of(again) is None
    assert without_penalty(again) is again
    twin = copy.deepcopy(careful)
    assert penalty_of(twin) == penalty_of(careful)


def test_training_the_model_trains_the_view_and_is_not_disturbed() -> None:
    model, loss, env = ensemble()
    careful = with_penalty(model, 5.0, limit=1.0, limit_reward=-1.0)
    start = states(4).set("action", torch.rand(4, ACTION))
    batch = start.clone()
    batch["next"] = states(4).update(
        {"reward": torch.randn(4, 1), "terminated": torch.zeros(4, 1, dtype=bool)}
    )
    torch.manual_seed(0)
    before = loss(batch).sum(reduce=True)
    with_penalty(model, 5.0)
    torch.manual_seed(0)
    assert torch.equal(loss(batch).sum(reduce=True), before)
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad)
    here, there = step(model, start), step(careful, start)
    assert torch.equal(here["loc"], there["loc"])


class Agents(nn.Module):
    """Two agents, each with a reward of its own, and one doubt for both."""

    def forward(self, state, action):
        doubt = state.abs().mean((-2, -1)).unsqueeze(-1)
        return state, doubt


def test_one_measure_for_many_agents() -> None:
    ahead = ("next", "agents", "observation")
    model = WorldModel(
        Mod(nn.Identity(), [ahead[1:]], [ahead[1:]]),
        Mod(Agents(), [ahead[1:], ("agents", "action")], [ahead, ("next", "doubt")]),
        Mod(nn.Linear(OBS, 1), [ahead], [("next", "agents", "reward")]),
        done_head=Mod(
            lambda x: x[..., :1] > 99, [ahead], [("next", "agents", "terminated")]
        ),
    )
    careful = with_penalty(model, 2.0, measure="doubt", limit=0.5)
    start = TensorDict({"agents": {"observation": torch.randn(5, 2, OBS)}}, [5])
    start["agents", "action"] = torch.zeros(5, 2, ACTION)
    out, plain = step(careful, start), step(model, start)
    expected = 2 * plain["doubt"].unsqueeze(1).expand(5, 2, 1)
    assert torch.equal(out["agents", "penalty"], expected)
    assert torch.equal(out["agents", "reward"], plain["agents", "reward"] - expected)
    beyond = (plain["doubt"] > 0.5).unsqueeze(1).expand(5, 2, 1)
    assert torch.equal(out["agents", "terminated"], beyond)


def test_a_pause_within_a_pause_does_not_end_it() -> None:
    careful = with_penalty(model_of("bool"), 2.0, measure="spread", limit=0.0)
    start = states(5).set("action", torch.zeros(5, ACTION))
    own = step(without_penalty(careful), start)["reward"]
    paid = own - 2 * start["observation"].abs().mean(-1, keepdim=True)
    with penalty_paused(careful):
        with penalty_paused(careful):
            pass
        assert torch.equal(step(careful, start)["reward"], own)
        with penalty_paused(careful, False):
            torch.testing.assert_close(step(careful, start)["reward"], paid)
        assert torch.equal(step(careful, start)["reward"], own)
    torch.testing.assert_close(step(careful, start)["reward"], paid)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_numbers_of_numpy_are_numbers(kind, tmp_path) -> None:
    """A sweep over np.logspace gives such; files hold Python's."""
    model, _, _ = ensemble()
    careful = with_penalty(model, kind(2), limit=kind(3), limit_reward=kind(-4))
    save_world_model(careful, tmp_path / "model.pt")
    again = penalty_of(load_world_model(tmp_path / "model.pt"))
    assert again == penalty_of(with_penalty(model, 2.0, limit=3.0, limit_reward=-4.0))
