"""Memory: carried from step to step, recorded nowhere; the same predictions as with latents."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from _memory_models import (
    ACTION,
    CELL,
    data,
    imagined_env,
    model_of,
    NAMES,
    OBS,
    RealEnv,
    RecurrentReward,
    SLOTS,
)
from _models import SpecEnv
from hypothesis import given, settings, strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import InitTracker, ParallelEnv, RewardSum, SerialEnv, TransformedEnv

from torchrl_wm import GymWorldModelVectorEnv, WorldModel, WorldModelEnv, WorldModelLoss
from torchrl_wm.diagnostics import one_step_prediction, open_loop_error
from torchrl_wm.modules import memory_apart, MissingEntryError, write_memory
from torchrl_wm.modules.keys import join
from torchrl_wm.objectives import RewardTerm
from torchrl_wm.planners import CEMPlanner

names = pytest.mark.parametrize("names", NAMES)


def env_of(model: WorldModel, **options) -> WorldModelEnv:
    return WorldModelEnv(model, SpecEnv(), **options)


def start_of(model: WorldModel, *size: int) -> TensorDict:
    torch.manual_seed(2)
    return model.encode(TensorDict({"observation": torch.randn(*size, OBS)}, size))


def is_free_of(memory, tensordict) -> bool:
    keys = tensordict.keys(True, True)
    return not any(key in keys or join("next", key) in keys for key in memory)


@names
def test_it_is_neither_latent_nor_recorded_and_predictions_are_the_same(names) -> None:
    model, twin = model_of(names), model_of(names, memory=False)
    assert model.latent_keys == [names[0]] and model.memory_keys == list(names[1:])
    assert twin.memory_keys == []
    batch = data(2, 5)
    batch["is_init"][1, 2] = True
    found, expected = model.observe(batch), twin.observe(batch)
    assert is_free_of(model.memory_keys, found)
    torch.testing.assert_close(found["next", names[0]], expected["next", names[0]])
    actions = torch.rand(3, 4, ACTION)
    envs = env_of(model), env_of(twin)
    start = start_of(model, 3)
    made = [env.imagine(4, tensordict=start, actions=actions) for env in envs]
    assert is_free_of(model.memory_keys, made[0])
    for key in (names[0], join("next", names[0]), ("next", "reward")):
        torch.testing.assert_close(made[0][key], made[1][key])


@settings(max_examples=40)
@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    length=st.integers(1, 6),
    begins=st.lists(st.integers(0, 40), max_size=4),
    names=st.sampled_from(NAMES),
)
def test_filter_steps_and_loss_are_those_of_latents(lead, length, begins, names):
    model, twin = model_of(names), model_of(names, memory=False)
    batch = data(*(lead or [1]), length)
    flags = batch["is_init"].reshape(-1)
    for place in begins:
        flags[place % len(flags)] = True
    found, expected = model.observe(batch), twin.observe(batch)
    for key in found.keys(True, True):
        if key != ("next", "reward"):  # the twin's is the label
            torch.testing.assert_close(found[key], expected[key])
    losses = []
    for part in (model, twin):
        loss = WorldModelLoss(part)(
            batch.refine_names(*[None] * len(lead or [1]), "time")
        )
        total = sum(loss.values())
        found_grads = torch.autograd.grad(
            total, list(part.parameters()), allow_unused=True
        )
        losses.append([g for g in found_grads if g is not None])
    for one, other in zip(*losses):
        torch.testing.assert_close(one, other)


@names
@pytest.mark.parametrize("multi_step", [False, True])
def test_the_loss_trains_heads_with_memory(names, multi_step) -> None:
    model, twin = model_of(names), model_of(names, memory=False)
    batch = data(2, 5)
    values = [
        WorldModelLoss(part, multi_step=multi_step)(batch) for part in (model, twin)
    ]
    values[0]["loss_reward"].backward()
    assert model.reward_head.module.cell.weight.grad.any()
    torch.testing.assert_close(values[0]["loss_reward"], values[1]["loss_reward"])


@names
def test_rollout_is_the_inherited_one_and_hands_the_memory_on(names) -> None:
    model = model_of(names)
    env, start = env_of(model), start_of(model, 3)
    weight = torch.ones(OBS, ACTION) / 10

    def act(td):
        return td.set("action", (td[names[0]] @ weight).sigmoid())

    policy = Mod(lambda z: (z @ weight).sigmoid(), [names[0]], ["action"])
    with torch.no_grad():
        whole = env.rollout(6, policy, tensordict=start)
        assert env.slow_because is None and is_free_of(model.memory_keys, whole)
        inherited = env.rollout(6, act, tensordict=start)
        assert env.slow_because is not None
        torch.testing.assert_close(inherited["next", names[0]], whole["next", names[0]])
        torch.testing.assert_close(inherited["next", "reward"], whole["next", "reward"])
        first = env.rollout(2, policy, tensordict=start)
        last = first[:, -1]["next"].select(names[0]).update(env.memory)
        rest = env.rollout(4, policy, tensordict=last)
        assert is_free_of(model.memory_keys, rest)
        torch.testing.assert_close(
            rest["next", names[0]], whole["next", names[0]][:, 2:]
        )
        # Also without a reset, and step by step.
        first = env.rollout(2, act, tensordict=start)
        for kind in (act, policy):
            last = first[:, -1].clone()
            env.rollout(2, policy, tensordict=start)
            rest = env.rollout(4, kind, tensordict=env.step_mdp(last), auto_reset=False)
            torch.testing.assert_close(
                rest["next", names[0]], whole["next", names[0]][:, 2:]
            )


def test_gradients_flow_through_it() -> None:
    model, twin = model_of(), model_of(memory=False)
    grads = []
    for part in (model, twin):
        actions = torch.full((2, 5, ACTION), 0.5, requires_grad=True)
        env = env_of(part)
        made = env.imagine(5, tensordict=start_of(part, 2), actions=actions)
        made["next", "reward"][:, -1].sum().backward()
        grads.append(actions.grad)
        assert not any(v.requires_grad for v in env.memory.values(True, True))
    assert grads[0].any()
    torch.testing.assert_close(grads[0], grads[1])


@names
def test_segments_make_starts(names) -> None:
    model, twin = model_of(names), model_of(names, memory=False)
    batch = data(2, 5)
    batch["is_init"][1, 2] = True
    start = model.burn_in(batch)
    assert start.batch_size == (2,)
    with torch.no_grad():
        last = twin.observe(batch)[:, -1]["next"]
    for key in names[1:]:
        torch.testing.assert_close(start[key], last[key])
    env, actions = env_of(model), torch.rand(2, 3, ACTION)
    made = env.imagine(3, tensordict=start, actions=actions)
    expected = env_of(twin).imagine(3, tensordict=start.select(*names), actions=actions)
    torch.testing.assert_close(made["next", names[0]], expected["next", names[0]])
    source = env_of(model, start_states=lambda size: start[:1].expand(size))
    torch.testing.assert_close(
        source.imagine(3, actions=actions)["next", names[0]][0],
        made["next", names[0]][0] * 0
        + env.imagine(3, tensordict=start[:1], actions=actions[:1])["next", names[0]][
            0
        ],
    )


def test_memory_is_given_whole_or_not_at_all() -> None:
    model = model_of()
    start = model.burn_in(data(2, 3)).exclude("cell")
    for run in (
        lambda: env_of(model).imagine(2, tensordict=start),
        lambda: env_of(model).rollout(2, tensordict=start),
        lambda: planner_of(model)(start),
        lambda: model.observe(data(2, 3).update(start.unsqueeze(1).expand(2, 3))),
    ):
        with pytest.raises(MissingEntryError, match=r"'cell'.*all of them"):
            run()


def test_latents_are_given_whole_or_not_at_all() -> None:
    twin = model_of(memory=False)
    start = start_of(twin, 2).exclude("cell")
    start["observation"] = torch.zeros(2, OBS)
    with pytest.raises(MissingEntryError, match=r"lacks \['cell'\].*all of them"):
        env_of(twin).imagine(2, tensordict=start)
    with pytest.raises(MissingEntryError, match=r"lacks \['cell'\].*all of them"):
        twin.encode(start)


def test_other_latents_than_those_of_the_newest_step_have_no_memory() -> None:
    model = model_of()
    env = env_of(model)
    begun = env.reset(start_of(model, 2))
    first = env.step(begun.set("action", torch.rand(2, ACTION)))
    second = env.step_mdp(first)
    memory = env.memory
    with torch.no_grad():
        one = env.step(second.copy().set("action", torch.zeros(2, ACTION)))
        with pytest.raises(MissingEntryError, match="not those that the env left"):
            env.step(second.copy().set("action", torch.zeros(2, ACTION)))
        branch = second.copy().update(memory.clone())
        two = env.step(branch.set("action", torch.zeros(2, ACTION)))
    assert is_free_of(model.memory_keys, two)
    torch.testing.assert_close(two["next", "latent"], one["next", "latent"])


def test_the_start_is_not_written_to() -> None:
    class Writes(nn.Module):
        def forward(self, latent, action, cache):
            cache = write_memory(cache, latent.ndim - 1, 0, latent[..., 0])
            return latent + cache.sum(-1, keepdim=True), cache

    model = WorldModel(
        Mod(nn.Identity(), ["observation"], ["latent"]),
        Mod(
            Writes(),
            ["latent", "action", "cache"],
            [("next", "latent"), ("next", "cache")],
        ),
        Mod(lambda z: z[..., :1], [("next", "latent")], [("next", "reward")]),
        memory=["cache"],
        initial_state={"cache": torch.zeros(2)},
    )
    start = TensorDict({"latent": torch.ones(1, OBS), "cache": torch.zeros(1, 2)}, [1])
    env, before = env_of(model), start.clone()
    with torch.no_grad():
        for size in ((), (1,), (3,)):
            begin = TensorDict({"observation": torch.ones(*size, OBS)}, size)
            runs = [env.rollout(3, tensordict=begin)["latent"] for _ in range(2)]
            assert not model.initial_state.state_dict()["value/cache"].any()
            assert runs[0].shape == runs[1].shape
        env.imagine(2, tensordict=start)
        planner_of(model)(start)
        env.step(start.copy().set("action", torch.zeros(1, ACTION)))
        assert (start.select(*before.keys()) == before).all()


def planner_of(model: WorldModel, **options) -> CEMPlanner:
    torch.manual_seed(3)
    settings = {
        "planning_horizon": 3,
        "optim_steps": 2,
        "num_candidates": 12,
        "top_k": 3,
    }
    return CEMPlanner(env_of(model, batch_size=[]), **settings, **options)


@names
@pytest.mark.parametrize("size", [(), (1,), (3,)])
def test_planners_go_on_from_it(names, size) -> None:
    model, twin = model_of(names), model_of(names, memory=False)
    batch = data(*(size or (1,)), 4)
    start = model.burn_in(batch)
    if not size:
        start = start[0]
    acted = []
    for part in (model, twin):
        planner = planner_of(part)
        torch.manual_seed(0)
        acted.append(planner(start.copy()))
    torch.testing.assert_close(acted[0]["action"], acted[1]["action"])


def test_the_observer_carries_it_and_hands_it_to_a_planner() -> None:
    model, twin = model_of(), model_of(memory=False)
    seen = []
    for part in (model, twin):
        real = TransformedEnv(SerialEnv(2, RealEnv), InitTracker())
        observer = part.observer()
        primer = observer.make_tensordict_primer(real.reset())
        assert is_free_of(model.memory_keys, primer.primers) == (part is model)
        real.append_transform(primer)
        real.set_seed(0)
        torch.manual_seed(0)
        planner = planner_of(part)
        torch.manual_seed(0)
        rollout = real.rollout(12, TensorDictSequential(observer, planner))
        seen.append(rollout)
    assert is_free_of(model.memory_keys, seen[0])
    torch.testing.assert_close(seen[0]["latent"], seen[1]["latent"])
    torch.testing.assert_close(seen[0]["action"], seen[1]["action"])


def test_an_observer_is_for_one_batch_of_envs_and_can_be_lent() -> None:
    model = model_of()
    observer, batch = model.observer(), data(2, 4)
    batch["is_init"][:, 0] = True

    def run(times, carried):
        for t in times:
            carried.update(batch[:, t].select("observation", "is_init"))
            carried = observer(carried).set("action", batch["action"][:, t])
        return carried

    expected = run(range(4), TensorDict({}, [2]))["latent"]
    half = run(range(2), TensorDict({}, [2]))
    with memory_apart(observer):
        run(range(3), TensorDict({}, [2]))
    torch.testing.assert_close(run(range(2, 4), half.copy())["latent"], expected)
    with pytest.raises(MissingEntryError, match="not those that it left"):
        run(range(2, 4), half.copy())


@names
def test_rows_that_begin_anew_begin_with_an_empty_one(names) -> None:
    model, twin = model_of(names), model_of(names, memory=False)
    torch.manual_seed(0)
    sources = RealEnv(), RealEnv()
    runs = []
    for part, source in zip((model, twin), sources):
        env = env_of(part, batch_size=[3], start_states=source, max_steps=3)
        stagger = TransformedEnv(env)
        stagger.set_seed(0)
        with torch.no_grad():
            state = stagger.reset()
            made = []
            for t in range(7):
                state["action"] = torch.full((3, ACTION), 0.1 * t)
                if t == 1:  # one row begins anew by itself
                    state["_reset"] = torch.tensor([[False], [True], [False]])
                    action = state["action"]
                    state = stagger.reset(state).set("action", action)
                now, state = stagger.step_and_maybe_reset(state)
                made.append(now["next", names[0]])
        runs.append(torch.stack(made))
    torch.testing.assert_close(runs[0], runs[1])


@pytest.mark.parametrize("kind", [SerialEnv, ParallelEnv])
def test_batched_envs_and_collectors(kind) -> None:
    model = model_of()
    env = kind(2, imagined_env)
    try:
        with torch.no_grad():
            env.check_env_specs()
            collector = Collector(env, None, frames_per_batch=20, total_frames=40)
            ends = 0
            for batch in collector:
                assert is_free_of(model.memory_keys, batch)
                ends += batch["next", "done"].sum()
            assert ends == 2 * 5
    finally:
        env.close(raise_if_closed=False)


@names
def test_copies_pickles_and_compiled_imagination(names) -> None:
    model = model_of(names)
    env, actions = env_of(model), torch.rand(2, 4, ACTION)
    start = start_of(model, 2)
    with torch.no_grad():
        expected = env.imagine(4, tensordict=start, actions=actions)
        for other in (copy.deepcopy(env), pickle.loads(pickle.dumps(env))):
            assert other.memory.is_empty() and not env.memory.is_empty()
            made = other.imagine(4, tensordict=start, actions=actions)
            torch.testing.assert_close(
                made["next", "reward"], expected["next", "reward"]
            )
        env.compile(backend="eager")
        made = env.imagine(4, tensordict=start, actions=actions)
        torch.testing.assert_close(made["next", names[0]], expected["next", names[0]])
        batch = data(2, 5)
        plain = model.observe(batch)
        model.compile_rollout(backend="eager")
        torch.testing.assert_close(
            model.observe(batch)["next", names[0]], plain["next", names[0]]
        )


@names
def test_gymnasium_envs_carry_it_and_do_not_show_it(names) -> None:
    model, twin = model_of(names), model_of(names, memory=False)
    runs = []
    for part in (model, twin):
        env = GymWorldModelVectorEnv(
            env_of(part, start_states=RealEnv(), max_steps=3), num_envs=2
        )
        env.reset(seed=0)
        rewards = []
        for _ in range(7):
            _, reward, _, _, info = env.step(env.action_space.sample() * 0 + 0.1)
            rewards.append(torch.as_tensor(reward))
        runs.append(torch.stack(rewards))
        env.close()
    torch.testing.assert_close(runs[0], runs[1])


def test_forward_predicts_with_an_empty_memory() -> None:
    model, twin = model_of(), model_of(memory=False)
    batch = data(3).select("observation", "action")
    out, expected = model(batch.copy()), twin(batch.copy())
    assert is_free_of(model.memory_keys, out)
    torch.testing.assert_close(out["next", "reward"], expected["next", "reward"])
    assert model.in_keys == twin.in_keys
    assert not {*model.out_keys} & {("next", "cache"), ("next", "count")}


def test_replacing_a_component_keeps_it() -> None:
    model = model_of()
    env = env_of(model)
    env.imagine(2, tensordict=start_of(model, 1))
    model.reward_head = Mod(
        RecurrentReward(),
        [("next", "latent"), "cell"],
        [("next", "reward"), ("next", "cell")],
    )
    assert model.memory_keys == ["cache", "count", "cell"]
    assert is_free_of(model.memory_keys, env.imagine(2, tensordict=start_of(model, 1)))
    assert "memory" in repr(model)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"memory": ["cash"]}, r"\['cash'\] is not carried.*'cache'"),
        ({"memory": ["cache", "latent"]}, r"encoder has the memory \['latent'\]"),
        (
            {"decoder": Mod(nn.Identity(), ["cell"], ["observation"])},
            r"decoder has the memory \['cell'\]",
        ),
        (
            {"encoder": Mod(lambda o, c: o, ["observation", "cache"], ["latent"])},
            r"encoder has the memory \['cache'\]",
        ),
        ({"initial_state": None}, "Nothing says where the memory"),
        (
            {"initial_state": {"cell": torch.ones(CELL), "count": torch.zeros(1)}},
            r"lacks the memory \['cache'\]",
        ),
    ],
)
def test_wirings_that_cannot_work_are_refused(change, message) -> None:
    model = model_of()
    begin = {
        "cache": torch.zeros(SLOTS, OBS),
        "count": torch.zeros(1, dtype=torch.int64),
        "cell": torch.ones(CELL),
    }
    parts = {
        **model.components,
        "memory": model.memory_keys,
        "initial_state": begin,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        WorldModel(**parts)


def test_a_step_that_changes_the_shape_of_its_memory_is_refused() -> None:
    model = model_of()
    model.initial_state = type(model.initial_state)(
        {
            "cache": torch.zeros(SLOTS, OBS),
            "count": torch.zeros(1, dtype=torch.int64),
            "cell": torch.ones(1, CELL),
        }
    )
    with pytest.raises((ValueError, RuntimeError), match="cell|reward_head"):
        env_of(model)


@names
def test_diagnostics_start_with_the_memory_of_each_step(names) -> None:
    model, twin = model_of(names), model_of(names, memory=False)
    episodes = data(3, 9)
    episodes["is_init"][1, 4] = True
    episodes["next", "done"][1, 3] = True
    errors = [open_loop_error(env_of(part), episodes, 4) for part in (model, twin)]
    torch.testing.assert_close(
        errors[0]["model", names[0]], errors[1]["model", names[0]]
    )
    steps = [one_step_prediction(env_of(part), episodes) for part in (model, twin)]
    torch.testing.assert_close(steps[0]["loc", names[0]], steps[1]["loc", names[0]])


class Counts(nn.Module):
    """Counts its steps, in place where it may."""

    def forward(self, latent, tally):
        tally = write_memory(tally, tally.ndim - 1, 0, tally[..., 0] + 1)
        return tally[..., :1] + 0 * latent[..., :1], tally


def counting(names=("latent", "tally"), done: bool = False) -> WorldModel:
    """A model whose reward head counts the steps since the episode began."""
    latent, tally = names
    done_head = None
    if done:  # has memory, and reads what the head before it predicts
        done_head = Mod(
            lambda r, c: (r + c - 1e9, c + 1),
            [("next", "reward"), "calls"],
            [("next", "terminated_logits"), ("next", "calls")],
        )
    memory = [tally, "calls"] if done else [tally]
    begin = TensorDict({}).set(tally, torch.zeros(2))
    return WorldModel(
        Mod(nn.Linear(OBS, OBS), ["observation"], [latent]),
        Mod(
            lambda z, a: z + a.sum(-1, keepdim=True),
            [latent, "action"],
            [join("next", latent)],
        ),
        Mod(
            Counts(),
            [join("next", latent), tally],
            [("next", "reward"), join("next", tally)],
        ),
        done_head=done_head,
        memory=memory,
        initial_state=begin.set("calls", torch.zeros(1)) if done else begin,
    )


COUNTED = pytest.mark.parametrize(
    "names", [("latent", "tally"), (("deep", "latent"), ("far", "tally"))]
)


@COUNTED
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("done", [False, True])
def test_what_is_written_in_place_counts_once(names, grad, done) -> None:
    model, batch = counting(names, done), data(2, 6)
    expected = torch.arange(1.0, 7).expand(2, 6).unsqueeze(-1)
    with torch.set_grad_enabled(grad):
        found = model.observe(batch)
        torch.testing.assert_close(found["next", "reward"], expected)
        assert model.burn_in(batch)[names[1]][:, 0].eq(6).all()
        made = env_of(model).imagine(6, tensordict=start_of(model, 2))
        torch.testing.assert_close(made["next", "reward"], expected)


@COUNTED
def test_memory_of_the_caller_is_not_written_to(names) -> None:
    model, batch = counting(names), data(2, 4)
    with torch.no_grad():
        start = model.burn_in(batch)
        given = start[names[1]].clone()
        sequence = batch.copy()
        sequence.set(names[1], start[names[1]].unsqueeze(1).expand(2, 4, 2).clone())
        before = sequence[names[1]].clone()
        model.observe(sequence), model.burn_in(sequence)
        assert torch.equal(sequence[names[1]], before)
        action = torch.zeros(2, ACTION)
        out = model.step(start.copy().set("action", action))
        assert out["next", names[1]][:, 0].eq(5).all()
        model.observer()(
            start.copy().update(batch[:, 0].select("observation", "action"))
        )
        assert torch.equal(start[names[1]], given)


@COUNTED
def test_a_transformed_env_goes_on_from_a_segment(names) -> None:
    """The memory that the caller gave stays in the outer tensordict, and is that of no later step."""
    model = counting(names)
    start = model.burn_in(data(3, 4))
    env = TransformedEnv(env_of(model, batch_size=[3]), RewardSum())
    with torch.no_grad():
        out = env.rollout(4, tensordict=start, set_state=True)
    expected = torch.arange(5.0, 9).expand(3, 4).unsqueeze(-1)
    torch.testing.assert_close(out["next", "reward"], expected)


def test_gradients_stop_where_the_caller_detaches() -> None:
    model = model_of()
    env = env_of(model)
    td = env.reset(start_of(model, 2).detach())
    for _ in range(2):  # two chunks
        total = 0
        for _ in range(2):
            td = env.step(td.set("action", torch.zeros(2, ACTION)))
            total = total + td["next", "reward"].sum()
            td = env.step_mdp(td)
        total.backward()
        td = td.detach()


def test_latents_that_were_changed_in_place_have_no_memory() -> None:
    model = model_of()
    env = env_of(model)
    with torch.no_grad():
        td = env.reset(start_of(model, 2))
        td["latent"].add_(1)
        with pytest.raises(MissingEntryError, match="not those that the env left"):
            env.step(td.set("action", torch.zeros(2, ACTION)))


def test_a_failed_step_leaves_no_memory() -> None:
    model = counting()
    env = env_of(model)
    with torch.no_grad():
        td = env.reset(start_of(model, 2)).set("action", torch.zeros(2, ACTION))
        td = env.step_mdp(env.step(td)).set("action", torch.zeros(2, ACTION))
        count = env.memory

        def fail(*_):
            raise RuntimeError("no")

        hook = model.reward_head.module.register_forward_hook(fail)
        with pytest.raises(RuntimeError):
            env.step(td.copy())
        hook.remove()
        with pytest.raises(MissingEntryError):
            env.step(td.copy())
        assert env.step(td.update(count))["next", "reward"].eq(2).all()


def test_real_latents_are_not_judged_beside_predicted_ones() -> None:
    model, batch = counting(), data(2, 4)
    terms = [RewardTerm(real_next=True), "latent"]
    with pytest.raises(ValueError, match="real_next=True asks for"):
        WorldModelLoss(model, losses=terms)(batch)
    WorldModelLoss(model, losses=terms[:1])(batch)


def test_a_head_does_not_read_what_was_written_before_it() -> None:
    model = model_of()
    parts = {
        **model.components,
        "done_head": Mod(lambda c: c[..., :1] < 0, ["cell"], [("next", "done")]),
    }
    with pytest.raises(
        ValueError, match=r"done_head reads the memory \['cell'\].*'next', 'cell'"
    ):
        WorldModel(
            **parts,
            memory=model.memory_keys,
            initial_state={
                "cache": torch.zeros(SLOTS, OBS),
                "count": torch.zeros(1, dtype=torch.int64),
                "cell": torch.ones(CELL),
            },
        )


def test_gymnasium_starts_take_memory() -> None:
    model = counting()
    env = GymWorldModelVectorEnv(env_of(model, max_steps=5), num_envs=2)
    start = model.burn_in(data(2, 4))
    options = {
        "state": {key: start[key].detach().numpy() for key in ("latent", "tally")}
    }
    env.reset(options=options)
    _, reward, *_ = env.step(env.action_space.sample())
    assert (reward == 5).all()


def test_a_policy_that_reads_memory_is_told() -> None:
    model = counting()
    policy = Mod(lambda c: c, ["tally"], ["action"])
    with pytest.raises(MissingEntryError, match="no policy sees it"):
        env_of(model).rollout(2, policy, tensordict=start_of(model, 2))
