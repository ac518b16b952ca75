"""The fast path of rollout equals TorchRL's own loop to the bit, or is not taken."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from _models import ACTION, LATENT, linear, make_model, observations, SpecEnv
from _wirings import starts, wirings
from hypothesis import event, given, settings, strategies as st
from tensordict import TensorDict
from tensordict.nn import (
    NormalParamExtractor,
    TensorDictModule as Mod,
    TensorDictSequential,
)
from torch import nn
from torchrl.data import Composite
from torchrl.envs import EnvBase, StepCounter, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, OneHotCategorical, ProbabilisticActor, TanhNormal

from torchrl_wm import WorldModelEnv
from torchrl_wm.modules.keys import unique

PATHS = {"fast": 0, "inherited": 0}


def assert_same(ours: TensorDict, theirs: TensorDict) -> None:
    """Equal to the bit, and of the same make."""
    assert type(ours) is type(theirs)
    assert ours.batch_size == theirs.batch_size
    assert ours.names == theirs.names and ours.device == theirs.device
    assert set(ours.keys()) == set(theirs.keys())
    assert ours.is_locked == theirs.is_locked
    for key in ours.keys():
        left, right = ours.get(key), theirs.get(key)
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype and left.shape == right.shape, key
            assert left.stride() == right.stride(), key
            assert left.device == right.device, key
            assert left.requires_grad == right.requires_grad, key
            assert torch.equal(left, right), key
        else:
            assert_same(left, right)


def inherited(env: WorldModelEnv, *args, **kwargs) -> TensorDict:
    return EnvBase.rollout(env, *args, **kwargs)


class Push(nn.Module):
    """A deterministic policy over anything, for any action spec."""

    def __init__(self, spec: Composite, keys: list) -> None:
        super().__init__()
        self.leaves = [spec[key] for key in keys]
        self.gain = nn.Parameter(torch.tensor(0.3))

    def forward(self, *states):
        lead = states[0].shape[:-1]
        out = []
        for leaf in self.leaves:
            zero = leaf.zero(lead)
            if zero.is_floating_point():
                push = states[0].mean(-1).reshape(lead + (1,) * len(leaf.shape))
                zero = zero + self.gain * push
            out.append(zero)
        return tuple(out) if len(out) > 1 else out[0]


@st.composite
def policies(draw, env: WorldModelEnv):
    """None (random), a module, a sequential, a hooked, a stateful or an opaque policy."""
    kind = draw(
        st.sampled_from(
            # What people use most is drawn most.
            ["module"] * 4
            + ["random", "sequential", "noisy"] * 2
            + ["hooked", "stateful", "opaque"]
        ),
        "policy",
    )
    if kind == "random":
        return None
    spec = env.full_action_spec_unbatched
    keys = unique(spec.keys(True, True))
    plain = Mod(Push(spec, keys), list(env.latent_keys), keys)
    if kind == "sequential":
        extra = Mod(lambda z: z * 2, [env.latent_keys[0]], ["feature"])
        return TensorDictSequential(extra, TensorDictSequential(plain))
    if kind == "noisy":
        noise = Mod(lambda z: z + torch.randn_like(z), [env.latent_keys[0]], ["noise"])
        return TensorDictSequential(noise, plain)
    if kind == "hooked":
        plain.register_forward_hook(
            lambda m, args, out: out.set("seen", out["done"] + 1)
        )
        return plain
    if kind == "stateful":
        return TensorDictSequential(Count(), plain)
    if kind == "opaque":
        return lambda td: plain(td.set("told", torch.ones(*td.batch_size, 1)))
    return plain


class Count(Mod):
    """A module with a forward of its own, which remembers."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), ["done"], ["calls"])
        self.calls = 0

    def forward(self, tensordict):
        self.calls += 1
        size = tensordict.batch_size
        return tensordict.set("calls", torch.full((*size, 1), self.calls))


@settings(max_examples=200)
@given(data=st.data())
def test_equals_the_inherited_loop(data) -> None:
    model, base, options, keys = data.draw(wirings())
    source = starts(keys, 10) if data.draw(st.booleans(), "start_states") else None
    env = WorldModelEnv(model, base, start_states=source, **options)
    size = env.batch_size or data.draw(st.sampled_from([(), (1,), (3,), (2, 3)]))
    start = starts(keys, *size)
    if data.draw(st.booleans(), "other entries"):
        start.set("note", torch.randn(*size, 2)).set(("deep", "note"), torch.ones(size))
    if source is not None and not env.batch_locked and data.draw(st.booleans()):
        start = None
    policy = data.draw(policies(env))
    kwargs = {
        "break_when_any_done": data.draw(st.sampled_from([None, True, False])),
        "return_contiguous": data.draw(st.sampled_from([False, True, None])),
    }
    if data.draw(st.integers(0, 9)) == 5:  # the ends are drawn more often
        kwargs["callback"] = lambda *_: None
    steps = data.draw(st.integers(1, 4), "steps")
    seed = data.draw(st.integers(0, 2**16), "seed")
    grad = data.draw(st.booleans(), "grad")
    outs, after = [], []
    for rollout in (env.rollout, lambda *a, **k: inherited(env, *a, **k)):
        acting = copy.deepcopy(policy) if isinstance(policy, nn.Module) else policy
        env.set_seed(seed)
        with torch.set_grad_enabled(grad):
            given_start = None if start is None else start.clone()
            outs.append(rollout(steps, acting, tensordict=given_start, **kwargs))
        after.append(torch.get_rng_state())
        if len(outs) == 1:
            fast = env.slow_because is None
    PATHS["fast" if fast else "inherited"] += 1
    event("fast" if fast else f"inherited: {env.slow_because}")
    assert_same(*outs)
    assert torch.equal(*after), "the random numbers were drawn otherwise"


def test_most_draws_took_the_fast_path() -> None:
    """Reads what the test before it counted; a fast path that is never taken proves nothing."""
    total = sum(PATHS.values())
    if not total:
        pytest.skip("the draws were not run")
    share = PATHS["fast"] / total
    assert share >= 0.5, PATHS


def actors():
    """What PPO, SAC and Dreamer act with."""
    normal = nn.Sequential(
        MLP(LATENT, 2 * ACTION, num_cells=[8]), NormalParamExtractor()
    )
    for log_prob in (False, True):
        yield ProbabilisticActor(
            Mod(normal, ["latent"], ["loc", "scale"]),
            in_keys=["loc", "scale"],
            distribution_class=TanhNormal,
            return_log_prob=log_prob,
        )
    yield TensorDictSequential(
        Mod(nn.Identity(), ["latent"], ["hidden"]),
        ProbabilisticActor(
            Mod(MLP(LATENT, ACTION, num_cells=[8]), ["hidden"], ["logits"]),
            in_keys=["logits"],
            distribution_class=OneHotCategorical,
        ),
    )


@pytest.mark.parametrize("policy", actors(), ids=["tanh-normal", "log-prob", "one-hot"])
@pytest.mark.parametrize(
    "kind", [None, ExplorationType.RANDOM, ExplorationType.DETERMINISTIC]
)
@pytest.mark.parametrize("grad", [False, True])
def test_probabilistic_actors_are_fast(policy, kind, grad) -> None:
    model = make_model(done="terminated_logits")
    env = WorldModelEnv(model, SpecEnv())
    start = model.encode(observations(5)).detach()
    outs = []
    for rollout in (env.rollout, lambda *a, **k: inherited(env, *a, **k)):
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad), set_exploration_type(kind):
            outs.append(rollout(6, policy, tensordict=start.clone()))
        if len(outs) == 1:
            assert env.slow_because is None
    assert_same(*outs)


def test_gradients_are_the_same() -> None:
    model = make_model()
    env = WorldModelEnv(model, SpecEnv())
    policy = linear(["latent"], ["action"], [LATENT, ACTION])
    start = model.encode(observations(3)).detach()
    grads = []
    for rollout in (env.rollout, lambda *a, **k: inherited(env, *a, **k)):
        policy.zero_grad(), model.zero_grad()
        rollout(5, policy, tensordict=start)["next", "reward"].sum().backward()
        parts = [*policy.parameters(), *model.dynamics.parameters()]
        grads.append([p.grad.clone() for p in parts])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_the_env_says_why_it_was_slow() -> None:
    model = make_model()
    env = WorldModelEnv(model, SpecEnv())
    start = model.encode(observations(3))
    assert "no rollout" in env.slow_because
    env.rollout(2, tensordict=start)
    assert env.slow_because is None
    TransformedEnv(env, StepCounter()).rollout(2, tensordict=start, set_state=True)
    assert "one by one" in env.slow_because
    env.rollout(2, tensordict=start, callback=lambda *_: None)
    assert "callback" in env.slow_because
    env.rollout(2, lambda td: env.rand_action(td), tensordict=start)
    assert "policy, function" in env.slow_because
    env.rollout(2, tensordict=start)
    assert env.slow_because is None


def test_plain_network_as_policy_is_fast() -> None:
    model = make_model()
    env = WorldModelEnv(model, SpecEnv())
    start = model.encode(observations(3)).detach()
    network = MLP(LATENT, ACTION, num_cells=[8])
    out = env.rollout(3, network, tensordict=start.clone())
    assert env.slow_because is None
    assert_same(out, inherited(env, 3, network, tensordict=start.clone()))


def test_hooks_on_components_run() -> None:
    model = make_model()
    env = WorldModelEnv(model, SpecEnv())
    calls = []
    handle = model.reward_head.register_forward_hook(lambda *_: calls.append(1))
    env.rollout(3, tensordict=observations(2))
    assert len(calls) == 3
    handle.remove()
    inner = model.reward_head.module.register_forward_hook(lambda *_: calls.append(1))
    env.rollout(3, tensordict=observations(2))
    assert len(calls) == 6
    inner.remove()


def test_entries_that_are_no_tensors_take_the_inherited_loop() -> None:
    model = make_model()
    env = WorldModelEnv(model, SpecEnv())
    start = model.encode(observations(2)).set("name", "a run")
    out = env.rollout(3, tensordict=start)
    assert "no plain tensordict" in env.slow_because
    assert out[0, 0]["name"] == "a run"


@pytest.mark.parametrize("plain", [False, True])
def test_policies_that_read_nested_tensordicts(plain) -> None:
    model = make_model(latent=("deep", "latent"))
    env = WorldModelEnv(model, SpecEnv())
    start = model.encode(observations(3)).detach()

    class Whole(nn.Module):
        def forward(self, deep):
            return deep["latent"][..., :ACTION]

    policy = Whole() if plain else Mod(Whole(), ["deep"], ["action"])
    out = env.rollout(3, policy, tensordict=start.clone())
    assert "nested" in env.slow_because
    assert torch.equal(out["action"], out["deep", "latent"][..., :ACTION])
    imagined = env.imagine(3, policy, start)
    assert torch.equal(imagined["action"], out["action"])


def test_dims_of_nested_tensordicts_are_kept() -> None:
    """Each has the dims that it has beside the batch, however deep it stands."""
    model = make_model()
    env = WorldModelEnv(model, SpecEnv())
    policy = linear(["latent"], ["action"], [LATENT, ACTION])
    info = TensorDict({"x": torch.zeros(3, 2, 5)}, [3, 2])
    start = model.encode(observations(3)).detach()
    start.set("agents", TensorDict({"info": info}, [3, 2]))
    out = env.rollout(3, policy, tensordict=start.clone())
    assert env.slow_because is None
    assert out["agents", "info"].batch_size == (3, 3, 2)
    assert_same(out, inherited(env, 3, policy, tensordict=start.clone()))


def test_other_containers_keep_the_options() -> None:
    model = make_model()
    env = WorldModelEnv(model, SpecEnv())
    start = model.encode(observations(2)).set("name", "a run").detach()
    for contiguous in (True, False):
        ours, theirs = (
            rollout(3, tensordict=start.clone(), return_contiguous=contiguous)
            for rollout in (env.rollout, lambda *a, **k: inherited(env, *a, **k))
        )
        assert type(ours) is type(theirs)


@pytest.mark.parametrize("lacking", [(), ("done",), ("done", "terminated")])
@pytest.mark.parametrize("head", [None, "terminated_logits"])
def test_starts_that_are_not_reset(lacking, head) -> None:
    """What a reset would have given may be True, or missing."""
    model = make_model(done=head)
    env = WorldModelEnv(model, SpecEnv())
    policy = linear(["latent"], ["action"], [LATENT, ACTION])
    start = env.reset(model.encode(observations(3)).detach())
    start.set("done", ~start["done"]).set("terminated", ~start["terminated"])
    start = start.exclude(*lacking)
    options = {"auto_reset": False, "break_when_any_done": False}
    out = env.rollout(3, policy, tensordict=start.clone(), **options)
    assert env.slow_because is None if not lacking else "lacks" in env.slow_because
    theirs = inherited(env, 3, policy, tensordict=start.clone(), **options)
    assert type(out) is type(theirs)
    if not lacking:
        assert_same(out, theirs)


@pytest.mark.parametrize("what", ["names", "reward"])
def test_starts_with_what_a_reset_would_take_away(what) -> None:
    model = make_model()
    env = WorldModelEnv(model, SpecEnv())
    policy = linear(["latent"], ["action"], [LATENT, ACTION])
    start = env.reset(model.encode(observations(3)).detach())
    if what == "names":
        start.names = ["row"]
    else:
        start = env.rollout(1, policy, tensordict=start)[:, 0]["next"].detach()
    outs = [
        rollout(3, policy, tensordict=start.clone(), auto_reset=False)
        for rollout in (env.rollout, lambda *a, **k: inherited(env, *a, **k))
    ]
    assert type(outs[0]) is type(outs[1]) and outs[0].names == outs[1].names
    for step in range(3):
        ours, theirs = (out[:, step] for out in outs)
        assert set(ours.keys(True, True)) == set(theirs.keys(True, True))
        assert all(torch.equal(ours[k], theirs[k]) for k in ours.keys(True, True))


@pytest.mark.parametrize("slow", [False, True])
def test_the_start_is_not_written_to(slow) -> None:
    model = make_model()
    env = WorldModelEnv(model, SpecEnv())
    start = env.reset(model.encode(observations(3)).detach())
    before = set(start.keys())
    callback = (lambda *_: None) if slow else None
    env.rollout(2, callback=callback, tensordict=start, auto_reset=False)
    assert set(start.keys()) == before


@pytest.mark.parametrize("nested", [False, True])
def test_done_entries_of_a_start_are_dropped(nested) -> None:
    """What a replay sample says of how its step ended is nothing of the episode imagined from it."""
    latent = ("deep", "latent") if nested else "latent"
    model = make_model(latent=latent)
    env = WorldModelEnv(model, SpecEnv())
    policy = linear([latent], ["action"], [LATENT, ACTION])
    start = model.encode(observations(3)).detach().exclude("observation")
    flags = {
        name: torch.ones(3, 1, dtype=torch.bool) for name in ("done", "terminated")
    }
    start.update(flags)
    out = env.rollout(3, policy, tensordict=start.clone())
    assert env.slow_because is None
    assert_same(out, inherited(env, 3, policy, tensordict=start.clone()))
    assert not out["done"].any() and not env.imagine(3, policy, start)["done"].any()


@pytest.mark.parametrize("off", [np.bool_(False), 0])
def test_what_counts_as_false_is_false(off) -> None:
    model = make_model(done="terminated_logits")
    env = WorldModelEnv(model, SpecEnv())
    start = model.encode(observations(64)).detach()
    policy = linear(["latent"], ["action"], [LATENT, ACTION])
    out = env.rollout(6, policy, tensordict=start, break_when_any_done=off)
    assert out.shape == (64, 6)
    assert_same(out, inherited(env, 6, policy, tensordict=start, break_when_any_done=0))


@pytest.mark.parametrize("nested", [False, True])
def test_policies_that_read_done_entries(nested) -> None:
    latent = ("deep", "latent") if nested else "latent"
    model = make_model(latent=latent)
    env = WorldModelEnv(model, SpecEnv())
    start = model.encode(observations(3)).detach()

    def push(z, done):
        return z[..., :ACTION] * ~done

    policy = Mod(push, [latent, "done"], ["action"])
    out = env.rollout(3, policy, tensordict=start.clone())
    assert env.slow_because is None
    assert_same(out, inherited(env, 3, policy, tensordict=start.clone()))
    again = env.imagine(3, policy, start)
    assert torch.equal(again["action"], out["action"])
    assert_same(again.exclude("collector"), out)


def test_actions_and_outputs_given_as_tensors() -> None:
    model = make_model()
    env = WorldModelEnv(model, SpecEnv(), batch_size=[2])
    start = model.encode(observations(2)).detach()
    actions = torch.randn(3, 2, ACTION)
    out = env.rollout(actions=actions, max_steps=3, tensordict=start)
    assert "actions" in env.slow_because
    assert torch.equal(out["action"], actions.transpose(0, 1))
    kept = out.detach().clone().zero_()
    with torch.no_grad():
        env.rollout(actions=actions, max_steps=3, tensordict=start, out=kept)
    assert torch.equal(kept["next", "latent"], out["next", "latent"])


def test_methods_replaced_on_the_env_are_heeded(monkeypatch) -> None:
    model = make_model()
    env = WorldModelEnv(model, SpecEnv())
    step, calls = env._step, []
    monkeypatch.setattr(env, "_step", lambda td: calls.append(1) or step(td))
    env.rollout(3, tensordict=model.encode(observations(2)))
    assert "_step" in env.slow_because and len(calls) == 3


def test_wrapped_methods_are_heeded() -> None:
    model = make_model()
    env = WorldModelEnv(model, SpecEnv())
    step, calls = env.step, []

    @functools.wraps(step)
    def counted(tensordict):
        calls.append(1)
        return step(tensordict)

    env.step = counted
    env.rollout(3, tensordict=model.encode(observations(2)))
    assert "step" in env.slow_because and len(calls) == 3


def _zeroed(name: str, key: str) -> type:
    """An env whose method ``name`` ends with a zero under ``key``."""

    def method(self, *args, **kwargs):
        out = getattr(WorldModelEnv, name)(self, *args, **kwargs)
        return out.set(key, torch.zeros_like(out[key]))

    return type("Mine", (WorldModelEnv,), {name: method})


@pytest.mark.parametrize(
    "name,key",
    [
        ("reset", "latent"),
        ("_reset_proc_data", "latent"),
        ("_step_proc_data", "reward"),
    ],
)
def test_methods_of_subclasses_are_heeded(name, key) -> None:
    model = make_model()
    env = _zeroed(name, key)(model, SpecEnv())
    start = model.encode(observations(3)).detach()
    policy = linear(["latent"], ["action"], [LATENT, ACTION])
    out = env.rollout(2, policy, tensordict=start)
    assert env.slow_because == f"Mine overrides {name}"
    zeroed = out["latent"][:, 0] if key == "latent" else out["next", "reward"]
    assert (zeroed == 0).all()


class Remembers(nn.Module):
    """A policy that reads an entry if it is there, and writes one beside the action."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(LATENT, ACTION)

    def forward(self, latent, entry=None):
        action = self.linear(latent)
        if entry is not None:
            action = action + 1 + entry
        return action, action.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    "read,written",
    [
        (("next", "reward"), "extra"),  # what was predicted before is not to be seen
        (("next", "deep", "extra"), ("next", "deep", "extra")),
        (("next", "latent"), ("next", "reward")),  # the model's own word counts
        ("reward", "reward"),
        ("extra", "extra"),  # carried from step to step
    ],
)
@pytest.mark.parametrize(
    "head", [{}, {"done": "terminated_logits"}], ids=["endless", "ends"]
)
def test_policies_that_read_what_may_be_missing(read, written, head) -> None:
    model = make_model(**head)
    env = WorldModelEnv(model, SpecEnv())
    start = model.encode(observations(3)).detach()
    policy = Mod(Remembers(), ["latent", read], ["action", written])
    options = {"tensordict": start, "break_when_any_done": False}
    with torch.no_grad():
        out = env.rollout(4, policy, **options)
        assert env.slow_because is None
        assert_same(out, inherited(env, 4, policy, **options))
        assert_same(env.imagine(4, policy, start).exclude("collector"), out)


def test_added_truncated_keys_keep_the_fast_path() -> None:
    model = make_model()
    env = WorldModelEnv(model, SpecEnv())
    env.add_truncated_keys()
    start = model.encode(observations(3)).detach()
    policy = linear(["latent"], ["action"], [LATENT, ACTION])
    out = env.rollout(3, policy, tensordict=start.clone())
    assert env.slow_because is None and ("next", "truncated") in out.keys(True)
    assert_same(out, inherited(env, 3, policy, tensordict=start.clone()))
