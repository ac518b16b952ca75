"""Policies of every make act in imagination as TorchRL's own loop lets them act."""

from __future__ import annotations

import functools

import pytest
import torch
from _models import ACTION, LATENT, linear, make_model, observations, SpecEnv
from envs.test_fast_rollout import assert_same, inherited
from tensordict import LazyStackedTensorDict, NonTensorData, TensorDict
from tensordict.nn import (
    CompositeDistribution,
    set_composite_lp_aggregate,
    TensorDictModule as Mod,
    TensorDictSequential,
)
from torch import nn
from torchrl.data import Bounded, Composite
from torchrl.envs import Compose, InitTracker, TransformedEnv
from torchrl.modules import IndependentNormal, LSTMModule, ProbabilisticActor

from torchrl_wm import WorldModel, WorldModelEnv


@pytest.fixture
def env() -> WorldModelEnv:
    return WorldModelEnv(make_model(), SpecEnv())


@pytest.fixture
def start(env) -> TensorDict:
    return env.world_model.encode(observations(3)).detach().select("latent")


class TwoActions(SpecEnv):
    """Actions ("move", "arm") and ("move", "leg")."""

    def __init__(self) -> None:
        super().__init__()
        parts = {name: Bounded(-1, 1, (1,)) for name in ("arm", "leg")}
        self.full_action_spec = Composite(move=Composite(parts))


class Heads(nn.Module):
    """Mean and scale of two actions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(LATENT, 4)

    def forward(self, latent):
        arm, spread, leg, width = self.linear(latent).split(1, -1)
        return arm, spread.exp(), leg, width.exp()


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(LATENT + 2, LATENT)

    def forward(self, *parts):
        return self.linear(torch.cat(parts, -1))


@pytest.mark.parametrize("log_prob", [False, True])
@pytest.mark.parametrize("where", ["params", ("head", "params")])
def test_composite_distributions(log_prob, where) -> None:
    """TorchRL's actor with several heads reads its parameters as one nested tensordict."""
    keys = {"arm": ("move", "arm"), "leg": ("move", "leg")}
    model = make_model()
    dynamics = Mod(Joined(), ["latent", *keys.values()], [("next", "latent")])
    model = WorldModel(model.encoder, dynamics, model.reward_head)
    env = WorldModelEnv(model, TwoActions())
    prefix = (where,) if isinstance(where, str) else where
    written = [(*prefix, name, p) for name in keys for p in ("loc", "scale")]
    start = model.encode(observations(3)).detach()
    with set_composite_lp_aggregate(False):
        policy = ProbabilisticActor(
            Mod(Heads(), ["latent"], written),
            in_keys=[where],
            out_keys=list(keys.values()),
            distribution_class=CompositeDistribution,
            distribution_kwargs={
                "distribution_map": dict.fromkeys(keys, IndependentNormal),
                "name_map": keys,
            },
            return_log_prob=log_prob,
        )
        outs = []
        for rollout in (env.rollout, functools.partial(inherited, env)):
            torch.manual_seed(0)
            outs.append(rollout(4, policy, tensordict=start.clone()))
            if len(outs) == 1:
                assert env.slow_because is None
        assert_same(*outs)
        torch.manual_seed(0)
        imagined = env.imagine(4, policy, start).exclude("collector")
    assert set(imagined.keys(True, True)) == set(outs[0].keys(True, True))
    assert torch.equal(imagined["move", "arm"], outs[0]["move", "arm"])


class Returns(nn.Module):
    """A network that gives what a function makes of its action and its input."""

    def __init__(self, make) -> None:
        super().__init__()
        self.linear, self.make = nn.Linear(LATENT, ACTION), make

    def forward(self, latent):
        return self.make(self.linear(latent), latent)


def _tree(latent) -> TensorDict:
    return TensorDict({"h": latent, "deep": {"h": 2 * latent}}, latent.shape[:-1])


OUTPUTS = {
    "a tensordict of the out_keys": (
        ["action", "aux"],
        lambda a, z: TensorDict({"action": a, "aux": z}, z.shape[:-1]),
    ),
    "a dict of the out_keys": (["action", "aux"], lambda a, z: {"action": a, "aux": z}),
    "a nested tensordict": (["action", "tree"], lambda a, z: (a, _tree(z))),
    "a nested dict": (["action", "tree"], lambda a, z: (a, {"h": z, "i": {"j": z}})),
    "a tensordict below another": (
        ["action", ("robot", "tree")],
        lambda a, z: (a, _tree(z)),
    ),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_networks_that_return_tensordicts(env, start, kind) -> None:
    out_keys, make = OUTPUTS[kind]
    policy = Mod(Returns(make), ["latent"], out_keys)
    out = env.rollout(3, policy, tensordict=start.clone())
    assert_same(out, inherited(env, 3, policy, tensordict=start.clone()))
    assert_same(env.imagine(3, policy, start).exclude("collector"), out)


@pytest.mark.parametrize("whole", [False, True], ids=["parts", "whole"])
def test_modules_that_read_what_another_wrote_below_a_key(env, start, whole) -> None:
    """One writes a tensordict and the next its parts, or the other way round."""

    def take(tree):
        return (tree["h"] if whole else tree)[..., :ACTION]

    reads = "tree" if whole else ("tree", "h")
    if whole:
        first = Mod(lambda z: 2 * z, ["latent"], [("tree", "h")])
    else:
        first = Mod(
            lambda z: TensorDict({"h": 2 * z}, z.shape[:-1]), ["latent"], ["tree"]
        )
    policy = TensorDictSequential(first, Mod(take, [reads], ["action"]))
    out = env.rollout(3, policy, tensordict=start.clone())
    assert_same(out, inherited(env, 3, policy, tensordict=start.clone()))
    assert_same(env.imagine(3, policy, start).exclude("collector"), out)


def test_outputs_that_are_no_tensors_are_named(env, start) -> None:
    policy = Mod(Returns(lambda a, z: (a, "left")), ["latent"], ["action", "side"])
    with pytest.raises(TypeError, match="'side' was written as str"):
        env.rollout(3, policy, tensordict=start)


def test_components_that_return_tensordicts() -> None:
    model = make_model()

    def ahead(latent, action):
        following = latent + action.sum(-1, keepdim=True)
        return TensorDict({"next": {"latent": following}}, latent.shape[:-1])

    dynamics = Mod(ahead, ["latent", "action"], [("next", "latent")])
    model = WorldModel(model.encoder, dynamics, model.reward_head)
    env = WorldModelEnv(model, SpecEnv())
    start = model.encode(observations(3)).detach()
    td = env.rand_action(env.reset(start))
    expected = td["latent"] + td["action"].sum(-1, keepdim=True)
    assert torch.equal(env.step(td)["next", "latent"], expected)
    policy = linear(["latent"], ["action"], [LATENT, ACTION])
    out = env.rollout(3, policy, tensordict=start)
    assert_same(out, inherited(env, 3, policy, tensordict=start))


class Writes(nn.Module):
    """A policy that takes the tensordict, and writes more than an action into it."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.linear, self.late, self.calls = nn.Linear(LATENT, ACTION), late, 0

    def forward(self, tensordict):
        self.calls += 1
        latent, size = tensordict["latent"], tensordict.batch_size
        tensordict["action"] = self.linear(latent)
        if not self.late:
            tensordict["note"] = NonTensorData("a note", batch_size=size)
            tensordict["rows"] = TensorDict({"h": latent}, [*size, LATENT])
        elif self.calls > 1:
            tensordict["late"] = latent * self.calls
        return tensordict


def test_modules_that_take_the_tensordict_lose_nothing(env, start) -> None:
    out = env.rollout(3, Writes(), tensordict=start.clone())
    assert "Writes" in env.slow_because
    assert out[0, 0]["note"] == "a note" and out["rows"].batch_size == (3, 3, LATENT)
    late = env.rollout(3, Writes(late=True), tensordict=start.clone())
    assert isinstance(late, LazyStackedTensorDict) and "late" in late[:, -1].keys()


def test_imagine_refuses_what_it_cannot_stack(env, start) -> None:
    with pytest.raises(TypeError, match="the policy wrote.*note"):
        env.imagine(3, Writes(), start)
    with pytest.raises(ValueError, match="late.*at step 1 and not before"):
        env.imagine(3, Writes(late=True), start)


def test_strict_modules_miss_what_is_not_there(env, start) -> None:
    def act(latent, goal):
        return latent[..., :ACTION] if goal is None else goal

    lenient = Mod(act, ["latent", "goal"], ["action"])
    env.rollout(2, lenient, tensordict=start)
    strict = Mod(act, ["latent", "goal"], ["action"], strict=True)
    with pytest.raises(KeyError, match="goal"):
        env.rollout(2, strict, tensordict=start)


class TwoWays(nn.Linear):
    def other(self, value):
        return 0 * self(value)


def test_a_method_set_later_is_called(env, start) -> None:
    policy = Mod(TwoWays(LATENT, ACTION), ["latent"], ["action"])
    assert env.rollout(2, policy, tensordict=start)["action"].any()
    policy.method = "other"
    assert not env.rollout(2, policy, tensordict=start)["action"].any()


def test_recurrent_policies_are_told_what_they_need(env, start) -> None:
    """... and act once they have it."""
    rnn = LSTMModule(input_size=LATENT, hidden_size=5, in_key="latent", out_key="h")
    policy = TensorDictSequential(rnn, linear(["h"], ["action"], [5, ACTION]))
    with pytest.raises(KeyError, match=r"batch_size=\[N\].*make_tensordict_primer"):
        env.rollout(2, policy, tensordict=start)
    sized = WorldModelEnv(env.world_model, SpecEnv(), batch_size=[3])
    primed = TransformedEnv(sized, Compose(InitTracker(), rnn.make_tensordict_primer()))
    out = primed.rollout(4, policy, tensordict=start, set_state=True)
    assert out.batch_size == (3, 4) and out["next", "recurrent_state_h"].any()


@pytest.mark.parametrize("call", ["rollout", "imagine"])
def test_a_tensor_with_entries_below_it_is_refused(env, start, call) -> None:
    """A tensordict has no place for both, and neither may vanish."""
    policy = Mod(
        Returns(lambda a, z: (a, z, 2 * z)), ["latent"], ["action", "h", ("h", "twice")]
    )
    with pytest.raises(KeyError, match="'h' is a tensor and has.*twice"):
        getattr(env, call)(2, policy, tensordict=start)


@pytest.mark.parametrize("call", ["rollout", "imagine", "compiled"])
def test_a_policy_without_an_action_is_told_so(env, start, call) -> None:
    policy = linear(["latent"], ["act"], [LATENT, ACTION])
    if call == "compiled":
        env.compile(backend="eager")
    act = env.rollout if call == "rollout" else env.imagine
    with pytest.raises(KeyError, match="No action: the imagined env reads.*action"):
        act(2, policy, tensordict=start)


def test_compiled_errors_are_those_of_eager(env, start) -> None:
    env.compile(backend="eager")
    policy = linear(["latent"], ["action"], [LATENT, ACTION + 1])
    with pytest.raises(ValueError, match="feature shape"):
        env.imagine(2, policy, start)


@pytest.mark.parametrize("given", [{"latent": torch.ones(3, LATENT)}, torch.ones(3)])
def test_imagine_names_a_start_that_is_no_tensordict(env, given) -> None:
    with pytest.raises(TypeError, match="The start must be a TensorDict"):
        env.imagine(2, tensordict=given)


def test_actions_of_another_kind_are_named(env, start) -> None:
    for actions in ([[0.0]], torch.zeros(3, 2, ACTION).numpy()):
        with pytest.raises(TypeError, match="as_tensor"):
            env.imagine(2, tensordict=start, actions=actions)
    actions = TensorDict(
        {"action": torch.zeros(3, 2, ACTION), "torque": torch.zeros(3, 2)}, [3, 2]
    )
    with pytest.raises(ValueError, match="torque"):
        env.imagine(2, tensordict=start, actions=actions)


@pytest.mark.parametrize("shape", [(), (2,)])
def test_a_network_that_no_longer_fits_is_named(env, start, shape) -> None:
    """The network inside a component can be replaced; what it writes has to fit the specs."""
    policy = linear(["latent"], ["action"], [LATENT, ACTION])
    env.rollout(2, policy, tensordict=start)
    env.world_model.reward_head.module = _Sized(shape)
    for act in (env.rollout, env.imagine, functools.partial(inherited, env)):
        with pytest.raises(ValueError, match="'reward'.*its spec asks for"):
            act(2, policy, tensordict=start)


class _Sized(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, latent, *_):
        return latent.new_zeros(*latent.shape[:-1], *self.shape)


@pytest.mark.parametrize("max_steps", [None, 10])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(max_steps, compiled) -> None:
    """Networks compute in bfloat16; what the env carries keeps the dtypes of its specs."""
    model = make_model(done="terminated_logits")
    env = WorldModelEnv(model, SpecEnv(), max_steps=max_steps)
    if compiled:
        env.compile(backend="eager")
    policy = linear(["latent"], ["action"], [LATENT, ACTION])
    start = model.encode(observations(16)).detach()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outs = [
            env.imagine(5, policy, start),
            env.imagine(5, policy, model.encode(observations(16))),
            env.imagine(5, tensordict=observations(16)),
            env.rollout(5, policy, tensordict=start, break_when_any_done=False),
            inherited(env, 5, policy, tensordict=start, break_when_any_done=False),
        ]
    for out in outs:
        for key in ("latent", ("next", "latent"), ("next", "reward")):
            assert out[key].dtype is torch.float32 and out[key].isfinite().all()
    assert_same(*outs[-2:])
    exact = env.imagine(5, policy, start)["next", "reward"]
    difference = (outs[0]["next", "reward"] - exact).abs().max()
    assert 0 < difference < 0.1 * exact.abs().max()
