"""Compiled imagination: one graph, the values of eager, noticed changes."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from _models import (
    ACTION,
    clock_env,
    clock_model,
    ends_at,
    LATENT,
    linear,
    make_model,
    OBS,
    observations,
    rssm_model,
    SpecEnv,
    times,
    transitions,
)
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule as Mod
from torch import nn
from torchrl.envs import GymEnv
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal

from torchrl_wm import WorldModelEnv
from torchrl_wm.models import make_ensemble_world_model
from torchrl_wm.modules import data_limit, with_penalty
from torchrl_wm.modules.blocks.ensemble_dynamics import PROPAGATIONS
from torchrl_wm.modules.blocks.penalty import penalty_paused
from torchrl_wm.modules.world_model import compiling

# Graphs are captured as for a compiler, and run without one: what is tested is
# that there is one graph, not what inductor makes of it.
CAPTURE = {"backend": "eager"}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def policy() -> Mod:
    return linear(["latent"], ["action"], [LATENT, ACTION])


def assert_close(one: TensorDict, two: TensorDict) -> None:
    assert set(one.keys(True, True)) == set(two.keys(True, True))
    assert one.names == two.names and one.batch_size == two.batch_size
    for key in one.keys(True, True):
        torch.testing.assert_close(one.get(key), two.get(key), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(), (3,), (2, 3)])
@pytest.mark.parametrize("max_steps", [None, 2])
def test_one_graph_with_the_values_of_eager(size, max_steps) -> None:
    model = make_model(done="terminated_logits", decoder=True)
    env = WorldModelEnv(model, SpecEnv(), max_steps=max_steps, decode=True)
    start, act = model.encode(observations(*size)).detach(), policy()
    expected = env.imagine(4, act, start)
    assert env.compile(**CAPTURE) is env
    assert_close(env.imagine(4, act, start), expected)
    actions = expected["action"].detach()
    assert_close(env.imagine(4, tensordict=start, actions=actions), expected)


def test_it_is_one_graph() -> None:
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = make_model(done="terminated_logits")
    env = WorldModelEnv(model, SpecEnv()).compile(backend=backend)
    start, act = model.encode(observations(3)).detach(), policy()
    for _ in range(3):
        env.imagine(5, act, start)
    assert len(graphs) == 1
    env.imagine(6, act, start)  # another horizon is another graph
    assert len(graphs) == 2


def test_gradients() -> None:
    model, act = make_model(), policy()
    start = model.encode(observations(3)).detach()
    grads = []
    for compiled in (False, True):
        env = WorldModelEnv(model, SpecEnv())
        if compiled:
            env.compile(**CAPTURE)
        act.zero_grad(), model.zero_grad()
        env.imagine(4, act, start)["next", "reward"].sum().backward()
        parts = [*act.parameters(), *model.dynamics.parameters()]
        grads.append([p.grad.clone() for p in parts])
    for eager, graph in zip(*grads):
        torch.testing.assert_close(eager, graph)


def test_gradient_mode_is_part_of_the_graph() -> None:
    model, act = make_model(), policy()
    env = WorldModelEnv(model, SpecEnv()).compile(**CAPTURE)
    start = model.encode(observations(3)).detach()
    with torch.no_grad():
        assert not env.imagine(2, act, start)["next", "reward"].requires_grad
    assert env.imagine(2, act, start)["next", "reward"].requires_grad


def test_probabilistic_actor_and_stochastic_dynamics() -> None:
    net = nn.Sequential(MLP(LATENT, 2 * ACTION, num_cells=[8]), NormalParamExtractor())
    actor = ProbabilisticActor(
        Mod(net, ["latent"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    model = make_model()
    env = WorldModelEnv(model, SpecEnv()).compile(**CAPTURE)
    out = env.imagine(3, actor, model.encode(observations(4)).detach())
    assert out["action"].shape == (4, 3, ACTION)
    rssm = rssm_model()
    env = WorldModelEnv(rssm, SpecEnv()).compile(**CAPTURE)
    out = env.imagine(3, tensordict=rssm.encode(observations(4)).detach())
    assert out["next", "state"].isfinite().all()


@pytest.mark.parametrize("size", [(), (1,), (4,)])
@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_ensembles_of_any_batch_size(propagation, size) -> None:
    real_env = GymEnv("Pendulum-v1")
    model, _ = make_ensemble_world_model(
        real_env,
        members=3,
        elites=2,
        hidden=(8,),
        propagation=propagation,
        normalize=False,
    )
    env = WorldModelEnv(model, real_env)
    start = real_env.reset().select("observation").expand(size).contiguous()
    act = linear(["observation"], ["action"], [3, 1])
    torch.manual_seed(0)
    expected = env.imagine(3, act, start)
    env.compile(**CAPTURE)
    torch.manual_seed(0)
    assert_close(env.imagine(3, act, start), expected)


@pytest.mark.parametrize("size", [(), (3,)])
@pytest.mark.parametrize("measure", ["disagreement", "deviation"])
@pytest.mark.parametrize("way", ["terminate", "truncate"])
def test_penalties_and_limits(way, measure, size) -> None:
    model, _ = make_ensemble_world_model(
        SpecEnv(), members=3, hidden=(8,), termination_hidden=(8,), normalize=False
    )
    reward = -9.0 if way == "terminate" else None
    limit = data_limit(model, transitions(50), 0.5, measure=measure)
    careful = with_penalty(
        model, 2.0, measure=measure, limit=limit, on_limit=way, limit_reward=reward
    )
    env = WorldModelEnv(careful, SpecEnv())
    start = observations(*size)
    act = linear(["observation"], ["action"], [OBS, ACTION])
    torch.manual_seed(0)
    expected = env.imagine(6, act, start)
    assert expected["next", "done"].any()
    env.compile(**CAPTURE)
    torch.manual_seed(0)
    assert_close(env.imagine(6, act, start), expected)
    with penalty_paused(careful):
        torch.manual_seed(0)
        plain = env.imagine(6, act, start)
    torch.manual_seed(0)
    own = WorldModelEnv(model, SpecEnv()).imagine(6, act, start)
    torch.testing.assert_close(plain["next", "reward"], own["next", "reward"])
    torch.manual_seed(0)
    assert_close(env.imagine(6, act, start), expected)


@pytest.mark.parametrize("what", ["component", "network", "policy"])
def test_replaced_parts_are_noticed(what) -> None:
    model, act = make_model(), policy()
    env = WorldModelEnv(model, SpecEnv()).compile(**CAPTURE)
    start = model.encode(observations(3)).detach()
    env.imagine(2, act, start)
    zero = nn.Linear(LATENT, 1)
    nn.init.zeros_(zero.weight), nn.init.constant_(zero.bias, 7.0)
    if what == "component":
        model.reward_head = Mod(zero, [("next", "latent")], [("next", "reward")])
    elif what == "network":
        model.reward_head.module = zero
    else:
        act.module = nn.Linear(LATENT, ACTION)
        nn.init.zeros_(act.module.weight), nn.init.zeros_(act.module.bias)
    out = env.imagine(2, act, start)
    if what == "policy":
        assert not out["action"].any()
    else:
        assert (out["next", "reward"] == 7).all()


def test_trained_weights_are_used() -> None:
    model, act = make_model(), policy()
    env = WorldModelEnv(model, SpecEnv()).compile(**CAPTURE)
    start = model.encode(observations(3)).detach()
    env.imagine(2, act, start)
    with torch.no_grad():
        for parameter in model.reward_head.parameters():
            parameter.zero_()
    assert not env.imagine(2, act, start)["next", "reward"].any()


def test_mask() -> None:
    env = WorldModelEnv(clock_model(done=ends_at(3)), clock_env()).compile(**CAPTURE)
    out = env.imagine(4, tensordict=times(0.0, 2.0))
    assert out["collector", "mask"].tolist() == [
        [True] * 3 + [False],
        [True] + [False] * 3,
    ]


def test_more_horizons_than_dynamo_compiles_a_function() -> None:
    model = make_model()
    env = WorldModelEnv(model, SpecEnv()).compile(**CAPTURE)
    start, act = model.encode(observations(2)).detach(), policy()
    for horizon in range(1, 11):
        assert env.imagine(horizon, act, start).batch_size == (2, horizon)


def test_opaque_policies_stay_eager() -> None:
    model, calls = make_model(), []
    env = WorldModelEnv(model, SpecEnv()).compile(**CAPTURE)

    def opaque(td):
        calls.append(1)
        return td.set("action", torch.zeros(*td.batch_size, ACTION))

    env.imagine(3, opaque, model.encode(observations(2)))
    assert len(calls) == 3


def test_eager_undoes_it() -> None:
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = make_model()
    env = WorldModelEnv(model, SpecEnv()).compile(backend=backend).eager()
    env.imagine(2, tensordict=observations(3))
    env.step_and_maybe_reset(env.rand_action(env.reset(observations(3))))
    assert not graphs


def test_without_a_compiler_it_says_so_and_goes_on() -> None:
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler here")

    model = make_model()
    env = WorldModelEnv(model, SpecEnv()).compile(backend=broken)
    start, act = model.encode(observations(3)).detach(), policy()
    with pytest.warns(UserWarning, match="could not be compiled and stays eager"):
        out = env.imagine(2, act, start)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(env.imagine(2, act, start), out)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))]
)
def test_copies_of_a_compiled_env(clone) -> None:
    """A copy imagines and steps by its own model, whatever becomes of the original's."""
    model = make_model()
    env = WorldModelEnv(model, SpecEnv()).compile(**CAPTURE)
    start, act = model.encode(observations(3)).detach(), policy()
    env.imagine(2, act, start)
    other = clone(env)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not env.imagine(2, act, start)["next", "reward"].any()
    assert other.imagine(2, act, start)["next", "reward"].any()
    stepped, _ = other.step_and_maybe_reset(act(other.reset(start)))
    assert stepped["next", "latent"].any()


def test_graphs_of_what_is_gone_are_let_go() -> None:
    model = make_model()
    env = WorldModelEnv(model, SpecEnv()).compile(**CAPTURE)
    start = model.encode(observations(3)).detach()
    gone = []
    for _ in range(3):
        act = policy()
        env.imagine(2, act, start)
        gone += [weakref.ref(act.module), weakref.ref(model.reward_head.module)]
        model.reward_head = linear(
            [("next", "latent")], [("next", "reward")], [LATENT, 1]
        )
    env.imagine(2, policy(), start)
    del act
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


def test_policies_made_anew_do_not_pile_up(monkeypatch) -> None:
    monkeypatch.setattr(compiling, "MOST_GRAPHS", 2)
    model = make_model()
    env = WorldModelEnv(model, SpecEnv()).compile(**CAPTURE)
    start = model.encode(observations(3)).detach()
    policies = [policy() for _ in range(4)]
    for act in policies:
        env.imagine(2, act, start)
    gone = [weakref.ref(act.module) for act in policies[:2]]
    del policies, act
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_rollouts_stay_fast() -> None:
    model = make_model(done="terminated_logits")
    env = WorldModelEnv(model, SpecEnv())
    start, act = model.encode(observations(3)).detach(), policy()
    expected = env.rollout(3, act, tensordict=start)
    out = env.compile(**CAPTURE).rollout(3, act, tensordict=start)
    assert env.slow_because is None
    assert_close(out, expected)


def test_one_graph_cannot_look_at_values() -> None:
    env = WorldModelEnv(make_model(), SpecEnv(), check_finite=True)
    with pytest.raises(ValueError, match="check_finite"):
        env.compile()
    env.compile(fullgraph=False, **CAPTURE)
    assert env.imagine(2, tensordict=observations(3)).batch_size == (3, 2)


def test_start_that_is_no_tensor() -> None:
    model = make_model()
    env = WorldModelEnv(model, SpecEnv())
    start = model.encode(observations(2))
    start["name"] = "a run"
    with pytest.raises(TypeError, match=r"\['name'\].*exclude"):
        env.imagine(2, tensordict=start)
    lazy = torch.stack(list(model.encode(observations(2)).unbind(0)))
    assert env.imagine(2, tensordict=lazy).batch_size == (2, 2)
