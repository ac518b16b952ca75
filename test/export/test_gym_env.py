"""One imagined env with Gymnasium's API: spaces, forms, seeds, copies, life cycle."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import sys
from collections import namedtuple

import gymnasium
import numpy as np
import pytest
import torch
from _export_models import ACTION_SPACE, Clock, Net, OBS_SPACE, ZERO
from _models import (
    clock_env,
    clock_model,
    ends_at,
    gru_model,
    imagined_env,
    make_model,
    observations,
    SpecEnv,
    times,
)
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings, strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    MultiCategorical,
    MultiOneHot,
    OneHot,
)

from torchrl_wm import GymWorldModelEnv, WorldModelEnv


def adapter(model=None, **kwargs) -> GymWorldModelEnv:
    return GymWorldModelEnv(
        Net() if model is None else model, OBS_SPACE, ACTION_SPACE, **kwargs
    )


def clock(**kwargs) -> GymWorldModelEnv:
    """The clock as a WorldModelEnv, which starts at 0."""
    model = clock_model(kwargs.pop("done", None))
    env = WorldModelEnv(
        model,
        clock_env(),
        start_states=times(0.0),
        max_steps=kwargs.pop("max_steps", None),
    )
    return GymWorldModelEnv(env, **kwargs)


def episode(env, seed: int | None, steps: int = 5) -> list:
    """All that an episode hands out, under one sequence of actions."""
    draw = np.random.default_rng(0)
    env.action_space.seed(0)
    out = [env.reset(seed=seed)]
    for _ in range(steps):
        action = np.clip(draw.normal(size=env.action_space.shape), -1, 1)
        out.append(env.step(action.astype(np.float32)))
    return out


# Both kinds of models --------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*infinity.*")
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_check_env(noise):
    check_env(adapter(Net(noise)), skip_render_check=True)
    check_env(GymWorldModelEnv(imagined_env()), skip_render_check=True)


@pytest.mark.parametrize(
    "make", [lambda: adapter(Net(0.5)), lambda: GymWorldModelEnv(imagined_env())]
)
def test_seeds(make):
    env = make()
    first, second = episode(env, 1), episode(env, None)
    again, after = episode(env, 1), episode(env, None)
    other = episode(make(), 2)
    for one, two in zip(first + second, again + after):
        assert str(one) == str(two)
    assert str(first) != str(other) and str(first) != str(second)


def test_seed_of_the_constructor_is_that_of_the_first_reset():
    one, two = adapter(Net(0.5), seed=3), adapter(Net(0.5))
    two.world_model.load_state_dict(one.world_model.state_dict())
    generator = one.np_random
    assert one.np_random_seed == 3 and one.np_random is generator
    assert str(episode(one, None)) == str(episode(two, 3))
    model = Clock()
    adapter(model, seed=3).reset()
    assert model.seeds == [3]


def test_the_callers_random_numbers_are_left_alone():
    env = adapter(Net(0.5))
    torch.manual_seed(7)
    env.reset(seed=0)
    env.step(ZERO)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))
    torch.manual_seed(99)  # nor do they reach the env
    noisy = env.step(ZERO)[0]
    env.reset(seed=0)
    env.step(ZERO)
    assert np.array_equal(noisy, env.step(ZERO)[0])


def test_evaluation_mode_and_back():
    for env, model in [
        (adapter(net := Net()), net),
        (
            adapter(
                holder := type("Holder", (), {})(), **_through(holder, net := Net())
            ),
            net,
        ),
    ]:
        model.train()
        model.decoder.eval()
        env.reset(seed=0)
        first = env.step(ZERO)[0]
        env.reset(seed=0)
        assert np.array_equal(first, env.step(ZERO)[0]) and first.any()
        assert model.training and model.dropout.training and not model.decoder.training


def _through(holder, net) -> dict:
    holder.net = net
    return {
        "reset_fn": lambda model, seed, options: model.net.reset(),
        "transition_fn": lambda model, state, action: model.net.step(state, action),
    }


@pytest.mark.parametrize(
    "make", [lambda: adapter(Net()), lambda: GymWorldModelEnv(imagined_env())]
)
def test_no_graph_and_nothing_shared(make):
    env = make()
    first, info = env.reset(seed=0)
    for _ in range(3):
        kept = copy.deepcopy((first, info))
        state = env.state
        observation, _, _, _, new_info = env.step(ZERO)
        assert str(kept) == str((first, info))  # a step does not write to what is out
        before = episode_from(env)
        leaves = [observation, *arrays(new_info), *arrays(info)]
        for leaf in leaves:
            assert isinstance(leaf, np.ndarray)
            leaf[...] = 1e6
        for tensor in tensors(state) + tensors(env.state):
            assert not tensor.requires_grad and tensor.grad_fn is None
            tensor.fill_(1e6)
        assert str(before) == str(episode_from(env))


def episode_from(env):
    """What the next step would be."""
    return copy.deepcopy(env).step(ZERO)


def arrays(info) -> list:
    values = info.values() if isinstance(info, dict) else info
    return [
        a
        for v in values
        for a in (arrays(v) if isinstance(v, dict) else [v])
        if not isinstance(a, int)
    ]


def tensors(state) -> list:
    return list(state.values()) if isinstance(state, dict) else [state]


def test_actions_are_copied():
    seen = []
    env = adapter(
        transition_fn=lambda model, state, action: seen.append(action)
        or model.step(state, action)
    )
    env.reset()
    action = np.full(2, 0.5, np.float32)
    env.step(action)
    action[:] = 9
    assert seen[0].tolist() == [0.5, 0.5] and isinstance(seen[0], torch.Tensor)


def test_memory_is_constant_over_10_000_steps():
    for env in (adapter(Net()), GymWorldModelEnv(imagined_env())):
        env.reset(seed=0)

        def steps(n, env=env):
            for _ in range(n):
                env.step(ZERO)
            gc.collect()
            held = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
            return held, sys.getallocatedblocks()

        tensors_before, blocks_before = steps(200)
        tensors_after, blocks_after = steps(10_000)
        assert tensors_after <= tensors_before
        assert blocks_after < blocks_before + 1000  # a leak would be one a step


def test_copies_and_pickles_go_on_alone():
    for env in (adapter(Net(0.5)), GymWorldModelEnv(imagined_env()), clock()):
        zero = np.zeros(env.action_space.shape, np.float32)
        env.reset(seed=0)
        env.step(zero)
        copies = [copy.deepcopy(env), pickle.loads(pickle.dumps(env))]
        expected = str(env.step(zero))
        for other in copies:
            assert str(other.step(zero)) == expected
        assert env.elapsed_steps == 2


def test_copies_of_models_with_a_state_of_their_own():
    class Stateful:
        def reset(self):
            self.count = 0
            return OBS

        def step(self, action):
            self.count += 1
            return OBS * self.count, 0.0, False, {}

    env = adapter(Stateful())
    env.reset()
    env.step(ZERO)
    other = copy.deepcopy(env)
    for one in (other, env):
        assert one.step(ZERO)[0].tolist() == [0, 2, 4]


def test_states_go_out_and_in_again():
    limited = WorldModelEnv(
        make_model(), SpecEnv(), start_states=observations(3), max_steps=9
    )
    for env in (GymWorldModelEnv(imagined_env()), GymWorldModelEnv(limited)):
        env.reset(seed=0)
        env.step(ZERO)
        state, expected = env.state, episode_from(env)[0]
        assert state["latent"].shape == (4,)
        env.reset(options={"state": state})
        assert np.array_equal(env.step(ZERO)[0], expected)


def test_a_copy_does_not_close_the_original():
    env = adapter(model := Clock())
    other = copy.deepcopy(env)
    other.close()
    assert other.world_model.closed and not model.closed


def test_life_cycle():
    env = adapter(Clock(), max_episode_steps=2)
    with pytest.raises(RuntimeError, match=re.escape("Call reset() before step().")):
        env.step(ZERO)
    env.reset()
    assert env.step(ZERO)[3] is False
    assert env.step(ZERO)[2:4] == (False, True)
    with pytest.raises(RuntimeError, match="The episode is over"):
        env.step(ZERO)
    env.reset()
    assert env.step(ZERO)[4]["elapsed_steps"] == 1
    env.close()
    env.close()
    for call in (env.reset, lambda: env.step(ZERO)):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_a_failed_reset_does_not_leave_a_steppable_env():
    env = adapter(
        Clock(),
        reset_fn=lambda model, seed, options: (
            None,
            np.zeros(options["size"], np.float32),
        ),
    )
    env.reset(options={"size": 3})
    with pytest.raises(ValueError, match="shape"):
        env.reset(options={"size": 4})
    with pytest.raises(RuntimeError, match="last reset"):
        env.step(ZERO)


@pytest.mark.parametrize("limit", [0, -3, 2.5, True, "3"])
def test_time_limits_that_are_none(limit):
    with pytest.raises(ValueError, match="max_episode_steps must be a positive int"):
        adapter(max_episode_steps=limit)


@pytest.mark.parametrize("seed", [-1, 0.5, "0"])
def test_seeds_that_are_none(seed):
    with pytest.raises(ValueError, match="seed must be"):
        adapter(seed=seed)


@pytest.mark.parametrize("mode", ["human", "ansi", "rgb", 3])
def test_unknown_render_modes(mode):
    with pytest.raises(ValueError, match="render_mode must be one of"):
        adapter(render_mode=mode)


@pytest.mark.parametrize(
    "space, error",
    [
        ((3,), TypeError),
        (None, TypeError),
        (spaces.Text(3), TypeError),
        (spaces.Dict({"a": spaces.Text(3)}), TypeError),
        (spaces.Dict({}), ValueError),
        (spaces.Box(-1, 1, (0,)), ValueError),
    ],
)
def test_spaces_that_cannot_serve(space, error):
    for args in ((space, ACTION_SPACE), (OBS_SPACE, space)):
        with pytest.raises(error, match="_space"):
            GymWorldModelEnv(Net(), *args)


def test_devices_that_are_not_there():
    device = "cuda" if not torch.cuda.is_available() else "cuda:99"
    with pytest.raises(ValueError, match="not available"):
        adapter(device=device)
    with pytest.raises(ValueError, match="not available"):
        adapter(device="gpu")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_predictions(value):
    bad = np.full(3, value, np.float32)
    good = np.zeros(3, np.float32)
    for outcome, name in (
        ((good, value, False, False, {}), "reward"),
        ((bad, 0.0, False, False, {}), "observation"),
    ):
        env = adapter(
            initial_observation=good,
            transition_fn=lambda model, state, action, o=outcome: o,
        )
        env.reset()
        with pytest.raises(FloatingPointError, match=name):
            env.step(ZERO)


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(1, 60),
    place=st.integers(0, 59),
    value=st.sampled_from([0.0, 1e15, 1e25, -3e38, np.nan, np.inf, -np.inf]),
    bounded=st.booleans(),
)
def test_values_are_refused_where_they_are_not_finite(size, place, value, bounded):
    """However many there are, also where squares of them overflow."""
    end = 3.2e38 if bounded else np.inf
    predicted = np.zeros(size, np.float32)
    predicted[place % size] = value
    env = GymWorldModelEnv(
        object(),
        spaces.Box(-end, end, (size,), np.float32),
        ACTION_SPACE,
        initial_observation=np.zeros(size, np.float32),
        transition_fn=lambda model, state, action: (predicted, 0.0, False, {}),
    )
    env.reset()
    if np.isfinite(value):
        assert np.array_equal(env.step(ZERO)[0], predicted)
    else:
        with pytest.raises(FloatingPointError, match="observation"):
            env.step(ZERO)


@pytest.mark.parametrize(
    "action",
    [
        np.full(2, 1.5),
        np.full(2, np.nan),
        np.zeros(3),
        0.0,
        "ab",
        None,
        {"a": 1},
        [True, "x"],
    ],
)
def test_actions_outside_of_the_space(action):
    env = adapter(Clock())
    env.reset()
    with pytest.raises(ValueError, match="action must be"):
        env.step(action)


def test_rounding_does_not_make_an_action_invalid():
    seen = []
    space = spaces.Box(-0.3, 0.3, (2,), np.float32)
    env = GymWorldModelEnv(
        Clock(),
        OBS_SPACE,
        space,
        transition_fn=lambda m, s, a: seen.append(a) or m.step(s, a),
    )
    env.reset()
    env.step(np.full(2, 0.3000001))
    assert space.contains(seen[0].numpy())


def test_integer_actions_do_not_wrap_around():
    space = spaces.Box(0, 255, (2,), np.uint8)
    env = GymWorldModelEnv(Clock(), OBS_SPACE, space)
    env.reset()
    with pytest.raises(ValueError, match="action must be"):
        env.step(np.array([256, 0]))
    env.step(np.array([255, 0]))


def test_spaces_are_the_envs_own():
    space = spaces.Box(-1.0, 1.0, (2,), seed=1)
    env = GymWorldModelEnv(Net(), OBS_SPACE, space)
    first = space.sample()
    env.action_space.seed(1)
    env.reset(seed=1)
    second = space.sample()
    fresh = spaces.Box(-1.0, 1.0, (2,), seed=1)
    assert np.array_equal(first, fresh.sample()) and np.array_equal(
        second, fresh.sample()
    )


# Models of other makes ---------------------------------------------------


OBS = np.arange(3, dtype=np.float32)
STATE = np.zeros(1, np.float32)


@pytest.mark.parametrize(
    "returned",
    [
        OBS,
        [0.0, 1.0, 2.0],
        OBS.astype(np.float64),
        torch.arange(3.0, dtype=torch.bfloat16),
        (OBS, {}),
        (OBS.astype(np.float64), {"a": 1}),
        (OBS, None),
        (STATE, OBS),
        (STATE, OBS, {}),
        {"observation": OBS},
        {"state": STATE, "obs": OBS, "info": {}},
        {"next_obs": OBS},
        {"image": OBS},
        TensorDict({"pixels": torch.arange(3.0)}),
        namedtuple("Reset", "obs info")(OBS, None),
    ],
)
def test_what_resets_return(returned):
    env = adapter(Clock(), reset_fn=lambda model, seed, options: returned)
    observation, info = env.reset()
    assert observation.tolist() == [0, 1, 2] and observation.dtype == np.float32
    assert {"model_state", "elapsed_steps"} <= set(info)


@pytest.mark.parametrize(
    "returned",
    [
        ((), {}),
        (STATE, STATE),
        [OBS, {}],
        (OBS, {}, {}, {}),
        {"state": STATE},
        {"observation": OBS, "extra": 1},
        {"obs": OBS, "image": OBS},
        None,
        "observation",
    ],
)
def test_what_resets_must_not_return(returned):
    env = adapter(Clock(), reset_fn=lambda model, seed, options: returned)
    with pytest.raises((TypeError, ValueError)):
        env.reset()


@pytest.mark.parametrize(
    "returned, reward, terminated, truncated",
    [
        ((OBS, 1.0, True, False, {}), 1.0, True, False),
        ((OBS, 1, False, np.True_, None), 1.0, False, True),
        ((OBS, torch.tensor([1.0]), torch.tensor([True]), {}), 1.0, True, False),
        ((STATE, OBS, np.float64(2)), 2.0, False, False),
        ((STATE, OBS, 2.0, 1, 0, {"a": torch.ones(1)}), 2.0, True, False),
        ({"state": STATE, "obs": OBS}, 0.0, False, False),
        ({"next_state": STATE, "next_obs": OBS, "done": True}, 0.0, True, False),
        ({"obs": OBS, "reward": 3, "truncated": True, "info": None}, 3.0, False, True),
        ({"next": {"obs": OBS, "reward": torch.ones(1, 1)}}, 1.0, False, False),
    ],
)
def test_what_steps_return(returned, reward, terminated, truncated):
    env = adapter(
        initial_observation=OBS, transition_fn=lambda model, state, action: returned
    )
    env.reset()
    out = env.step(ZERO)
    assert out[0].tolist() == [0, 1, 2]
    assert out[1:4] == (reward, terminated, truncated)
    assert [type(x) for x in out[1:4]] == [float, bool, bool]
    assert all(not isinstance(v, torch.Tensor) for v in out[4].values())


@pytest.mark.parametrize(
    "returned",
    [
        (OBS, 1.0),
        (STATE, OBS),
        (OBS, 1.0, False),
        (STATE, OBS, 1.0, False),
        [STATE, OBS, 1.0],
        (OBS, 1.0, False, False, 3),
        (STATE, OBS, 1.0, False, False, {}, 1),
        {"latent": STATE, "rew": 1.0},
        {"observation": OBS, "rew": 1.0},
        {"observation": OBS, "discount": 0.9},
        {"obs": OBS, "image": OBS},
        {"state": STATE, "reward": 1.0},
        {"next": {"obs": OBS}, "reward": 1.0},
        OBS,
        None,
    ],
)
def test_what_steps_must_not_return(returned):
    env = adapter(
        initial_observation=OBS, transition_fn=lambda model, state, action: returned
    )
    env.reset()
    with pytest.raises(TypeError, match="Accepted are|unknown keys|several|not clear"):
        env.step(ZERO)


def test_infos_are_dictionaries():
    for info, fits in ((TensorDict({"a": torch.ones(1)}), True), (3, False)):
        env = adapter(
            initial_observation=OBS,
            transition_fn=lambda _, __, ___, i=info: {"obs": OBS, "info": i},
        )
        env.reset()
        if fits:
            assert env.step(ZERO)[4]["a"].tolist() == [1]
        else:
            with pytest.raises(TypeError, match="info must be a dictionary"):
                env.step(ZERO)


def test_the_form_stays_the_first_ones():
    forms = iter([(OBS, 1.0, False, False, {}), {"observation": OBS}])
    env = adapter(
        initial_observation=OBS, transition_fn=lambda model, state, action: next(forms)
    )
    env.reset()
    env.step(ZERO)
    with pytest.raises(TypeError, match="one form"):
        env.step(ZERO)


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda model, state, action: (model, state, action), "MSA"),
        (lambda state, action: (None, state, action), ".SA"),
        (lambda action, state: (None, state, action), ".SA"),
        (lambda a, s: (None, s, a), ".SA"),
        (lambda obs, action: (None, obs, action), ".SA"),
        (lambda action: (None, None, action), "..A"),
        (lambda x, y, z: (x, y, z), "MSA"),
        (lambda *args: args, "MSA"),
        (lambda _, state, __: (None, state, None), ".S."),
        (lambda model, x: (model, x, None), "MS."),
        (lambda state, action, flag=False: (flag or None, state, action), ".SA"),
        (lambda *, action, world_model: (world_model, None, action), "M.A"),
        (lambda: (None, None, None), "..."),
    ],
)
def test_what_callables_take(function, expected):
    from torchrl_wm.export.signatures import bind

    bound = bind(
        function, ("model", "state", "action"), "transition_fn", {"obs": "state"}
    )
    out = bound({"model": "M", "state": "S", "action": "A", "np_random": None})
    assert "".join(x or "." for x in out) == expected


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x,
        lambda x, y: x,
        lambda action, obs, extra: obs,
        lambda state, obs, action: obs,
        lambda *, x: x,
        lambda a, b, c, d: a,
        3,
    ],
)
def test_what_callables_cannot_take(function):
    with pytest.raises(TypeError, match="transition_fn"):
        adapter(initial_state=STATE, initial_observation=OBS, transition_fn=function)


def test_where_episodes_begin_without_a_reset():
    step = {"transition_fn": lambda model, state, action: (state + 1, OBS, 0.0)}
    plain = type("Plain", (), {})()
    env = adapter(plain, initial_observation=OBS, initial_state=STATE, **step)
    assert env.reset()[0].tolist() == [0, 1, 2]
    env = adapter(Net(), initial_state=torch.ones(4))
    assert np.allclose(
        env.reset()[0], Net.decode(env.world_model, torch.ones(4)).detach()
    )
    env = adapter(plain, initial_state=STATE, **step)
    with pytest.warns(UserWarning, match="nothing to do with initial_state"):
        first, second = env.reset(seed=1)[0], env.reset(seed=2)[0]
    with pytest.warns(UserWarning):
        assert np.array_equal(first, env.reset(seed=1)[0]) and not np.array_equal(
            first, second
        )
    with pytest.raises(TypeError, match="Nothing says where episodes begin"):
        adapter(plain, **step)


def test_options_say_where_to_start():
    env = adapter(Net())
    env.reset(seed=0)
    state = env.state
    expected = env.step(ZERO)[0]
    env.world_model.reset = lambda seed=None: (torch.zeros(4), torch.zeros(3), {})
    other = adapter(env.world_model)
    other.reset(options={"state": state})
    assert np.array_equal(other.step(ZERO)[0], expected)
    with pytest.raises(ValueError, match="'wind'"):
        other.reset(options={"wind": state})


def test_reward_and_terminal_functions():
    env = adapter(
        Clock(),
        transition_fn=lambda model, state, action: {
            "state": state + 1,
            "obs": OBS,
            "reward": None,
            "done": None,
        },
        reward_fn=lambda model, state, obs, action: float(state[0] + obs[2]),
        terminal_fn=lambda state: state[0] >= 2,
    )
    env.reset()
    assert env.step(ZERO)[1:3] == (3.0, False)
    assert env.step(ZERO)[1:3] == (4.0, True)


def test_rewards_keep_their_digits():
    env = adapter(
        Clock(),
        reward_fn=lambda model: 16777217,
        transition_fn=lambda state: {"state": state, "obs": OBS},
    )
    env.reset()
    assert env.step(ZERO)[1] == 16777217.0


@pytest.mark.parametrize("space", [spaces.Discrete(4), spaces.Discrete(4, start=3)])
@pytest.mark.parametrize("torch_actions", [True, False])
def test_discrete_actions(space, torch_actions):
    seen = []
    env = GymWorldModelEnv(
        Clock(),
        OBS_SPACE,
        space,
        torch_actions=torch_actions,
        transition_fn=lambda m, s, a: seen.append(a) or m.step(s, a),
    )
    env.reset()
    for action in (
        space.start,
        np.int64(space.start),
        np.array(space.start),
        torch.tensor(space.start),
    ):
        env.step(action)
        assert int(seen[-1]) == space.start
        assert isinstance(seen[-1], torch.Tensor) == torch_actions
        assert seen[-1].dtype == (torch.int64 if torch_actions else np.int64)
    for action in (space.start + 4, space.start - 1, 1.0, np.array([space.start])):
        with pytest.raises(ValueError, match="action must be"):
            env.step(action)


def test_dictionaries_in_and_out():
    obs_space = spaces.Dict(
        {
            "image": spaces.Box(0, 255, (4, 4, 3), np.uint8),
            "vec": spaces.Box(-1, 1, (2,)),
            "n": spaces.Discrete(3),
        }
    )
    action_space = spaces.Dict(
        {"move": spaces.Box(-1, 1, (2,)), "fire": spaces.Discrete(2)}
    )
    obs = {
        "image": torch.zeros(4, 4, 3, dtype=torch.uint8),
        "vec": torch.ones(2),
        "n": 1,
    }

    def step(model, state, action):
        assert (
            action["fire"].dtype == torch.int64
            and action["move"].dtype == torch.float32
        )
        return obs, action["move"].sum(), False, False, {}

    env = GymWorldModelEnv(
        Clock(), obs_space, action_space, reset_fn=lambda: obs, transition_fn=step
    )
    check_env(env, skip_render_check=True)
    bad = dict(obs, vec=torch.ones(3))
    env = GymWorldModelEnv(
        Clock(),
        obs_space,
        action_space,
        reset_fn=lambda: {"obs": bad},
        transition_fn=step,
    )
    with pytest.raises(
        ValueError, match=re.escape("observation['vec'] has the shape (3,)")
    ):
        env.reset()


def test_observations_outside_of_their_bounds():
    space = spaces.Box(-1, 1, (3,))
    step = {
        "initial_observation": np.zeros(3),
        "transition_fn": lambda m, s, a: (np.full(3, 1.2), 0.0, False, {}),
    }
    env = GymWorldModelEnv(Clock(), space, ACTION_SPACE, **step)
    env.reset()
    with pytest.warns(UserWarning, match="clip_observations"):
        assert env.step(ZERO)[0] == pytest.approx(1.2)
    assert env.step(ZERO)[0] == pytest.approx(1.2)  # said once
    env = GymWorldModelEnv(Clock(), space, ACTION_SPACE, clip_observations=True, **step)
    env.reset()
    assert (env.step(ZERO)[0] == 1).all()


# World models of ours ------------------------------------------------------


def test_a_world_model_env_steps_as_it_does():
    env, start = imagined_env(), observations(1)
    gym = GymWorldModelEnv(env)
    first, info = gym.reset(options={"observation": start["observation"][0].numpy()})
    latent = env.world_model.encode(start)
    assert np.array_equal(first, latent["latent"][0].detach().numpy())
    actions = torch.rand(1, 6, 2) * 2 - 1
    with torch.no_grad():
        expected = env.imagine(6, tensordict=latent, actions=actions)
    for i in range(6):
        obs, reward, *_, info = gym.step(actions[0, i].numpy())
        assert np.array_equal(obs, expected["next", "latent"][0, i].numpy())
        assert reward == expected["next", "reward"][0, i].item()
        assert np.array_equal(info["model_state"]["latent"], obs)


def test_terminations_and_time_limits_of_a_world_model_env():
    env = clock(done=ends_at(3.0), max_episode_steps=10)
    env.reset()
    zero = np.zeros(1, np.float32)
    assert [env.step(zero)[1:4] for _ in range(3)] == [
        (1.0, False, False),
        (2.0, False, False),
        (3.0, True, False),
    ]
    for env in (clock(max_steps=2), clock(max_episode_steps=2)):
        env.reset()
        assert [env.step(zero)[2:4] for _ in range(2)] == [
            (False, False),
            (False, True),
        ]


@pytest.mark.parametrize("decode", [False, True])
def test_observation_keys(decode):
    env = WorldModelEnv(
        make_model(decoder=True), SpecEnv(), start_states=observations(4), decode=decode
    )
    gym = GymWorldModelEnv(env)
    assert gym.observation_space.shape == ((6,) if decode else (4,))
    wanted = spaces.Dict({"latent": spaces.Box(-np.inf, np.inf, (4,))})
    gym = GymWorldModelEnv(env, wanted)
    assert list(gym.reset()[0]) == ["latent"]
    for wrong in (
        spaces.Dict({"pixels": OBS_SPACE}),
        spaces.Box(-1, 1, (9,)),
        spaces.Discrete(3),
    ):
        with pytest.raises((ValueError, TypeError), match="observation_space"):
            GymWorldModelEnv(env, wrong)


def test_several_and_nested_keys():
    env = WorldModelEnv(gru_model(), SpecEnv(), start_states=observations(4))
    gym = GymWorldModelEnv(env)
    assert {k: s.shape for k, s in gym.observation_space.items()} == {
        "latent": (4,),
        "belief": (5,),
    }
    check_env_quietly(gym)
    nested = make_model(
        latent=("agent", "latent"),
        observation=("agent", "obs"),
        action=("agent", "action"),
        reward=("agent", "reward"),
    )
    reference = SpecEnv(
        observation_key=("agent", "obs"),
        action_key=("agent", "action"),
        reward_key=("agent", "reward"),
    )
    start = TensorDict({"agent": {"obs": torch.randn(4, 6)}}, [4])
    gym = GymWorldModelEnv(WorldModelEnv(nested, reference, start_states=start))
    check_env_quietly(gym)
    _, info = gym.reset()
    assert list(info["model_state"]) == ["agent/latent"]
    gym = GymWorldModelEnv(
        gym._source.env,
        spaces.Dict({"agent/latent": spaces.Box(-np.inf, np.inf, (4,))}),
    )
    assert list(gym.reset()[0]) == ["agent/latent"]


def check_env_quietly(env) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(env, skip_render_check=True)


@pytest.mark.parametrize(
    "spec, space, dim",
    [
        (Bounded(-2.0, 2.0, (3,)), spaces.Box(-2, 2, (3,)), 3),
        (Bounded(-2.0, 2.0, (2, 3)), spaces.Box(-2, 2, (2, 3)), None),
        (OneHot(4), spaces.Discrete(4), 4),
        (OneHot(4, dtype=torch.float32), spaces.Discrete(4), 4),
        (Categorical(4), spaces.Discrete(4), None),
        (Categorical(4, (1,)), spaces.Discrete(4), 1),
        (Categorical(4, (3,)), spaces.MultiDiscrete([4, 4, 4]), 3),
        (MultiCategorical([2, 3]), spaces.MultiDiscrete([2, 3]), 2),
        (MultiOneHot([2, 3]), spaces.MultiDiscrete([2, 3]), 5),
        (Binary(3), spaces.MultiBinary(3), 3),
        (Bounded(0, 9, (2,), dtype=torch.int64), spaces.Box(0, 9, (2,), np.int64), 2),
    ],
    ids=str,
)
def test_action_specs(spec, space, dim):
    seen = []

    def dynamics(latent, action):
        seen.append(action)
        return latent + action.reshape(*latent.shape[:-1], -1).float().sum(
            -1, keepdim=True
        )

    model = make_model()
    model.dynamics = Mod(dynamics, ["latent", "action"], [("next", "latent")])
    env = WorldModelEnv(model, SpecEnv(action_spec=spec), start_states=observations(4))
    gym = GymWorldModelEnv(env)
    assert gym.action_space == space
    gym.action_space.seed(0)
    gym.reset(seed=0)
    for _ in range(5):
        gym.step(gym.action_space.sample())
        assert seen[-1].dtype == spec.dtype and seen[-1].shape == (1, *spec.shape)
        assert spec.is_in(seen[-1][0])
    check_env_quietly(gym)


@pytest.mark.parametrize(
    "spec, space",
    [
        (OneHot(3), spaces.Discrete(3, start=1)),
        (OneHot(3), spaces.Discrete(2)),
        (MultiOneHot([2, 3]), spaces.MultiDiscrete([3, 2])),
        (MultiOneHot([2, 3]), spaces.MultiDiscrete([2, 3], start=[1, 0])),
        (Bounded(-1, 1, (2,)), spaces.Box(-2, 2, (2,))),
        (Bounded(-1, 1, (2,)), spaces.Box(-1, np.array([1, 1.5], np.float32), (2,))),
    ],
)
def test_action_spaces_with_actions_that_the_env_does_not_have(spec, space):
    model = make_model()
    model.dynamics = Mod(
        lambda latent, action: latent, ["latent", "action"], [("next", "latent")]
    )
    env = WorldModelEnv(model, SpecEnv(action_spec=spec), start_states=observations(4))
    with pytest.raises(ValueError, match="action_space.* is "):
        GymWorldModelEnv(env, action_space=space)


def test_action_spaces_within_the_envs_own():
    spec = Bounded(-1, 1, (2,))
    env = WorldModelEnv(
        make_model(), SpecEnv(action_spec=spec), start_states=observations(4)
    )
    space = spaces.Box(-0.5, 1, (2,))
    assert GymWorldModelEnv(env, action_space=space).action_space == space


def test_dtypes_that_the_conversion_of_torchrl_loses():
    from torchrl_wm.export.spaces import space_of_spec

    assert (
        space_of_spec(Bounded(0, 255, (3, 8, 8), dtype=torch.uint8)).dtype == np.uint8
    )
    assert (
        space_of_spec(Bounded(0.0, 1.0, (2,), dtype=torch.float64)).dtype == np.float64
    )
    sample = space_of_spec(SpecEnv().observation_spec["observation"]).sample()
    assert np.isfinite(sample).all()


@settings(max_examples=20)
@given(
    shape=st.lists(st.integers(1, 3), max_size=3),
    low=st.floats(-5, 0),
    width=st.floats(0.1, 5),
)
def test_boxes_of_any_shape(shape, low, width):
    from torchrl_wm.export.spaces import space_of_spec

    space = space_of_spec(Bounded(low, low + width, tuple(shape)))
    assert space.shape == tuple(shape) and space.contains(space.sample())


def test_what_a_world_model_env_does_not_take():
    env = imagined_env()
    with pytest.raises(TypeError, match="reward_fn"):
        GymWorldModelEnv(env, reward_fn=lambda: 0)
    with pytest.raises(ValueError, match="batch size"):
        GymWorldModelEnv(WorldModelEnv(make_model(), SpecEnv(), batch_size=[3]))
    with pytest.raises(RuntimeError, match="Nothing says where episodes begin"):
        GymWorldModelEnv(WorldModelEnv(make_model(), SpecEnv())).reset()
    with pytest.raises(ValueError, match="'wind'"):
        GymWorldModelEnv(env).reset(options={"wind": 1})
    with pytest.raises(ValueError, match="shape"):
        GymWorldModelEnv(env).reset(options={"state": np.zeros(5)})


def test_starts_given_to_the_constructor():
    env = WorldModelEnv(make_model(), SpecEnv())
    latent = np.arange(4, dtype=np.float32)
    gym = GymWorldModelEnv(env, initial_state=latent)
    assert np.array_equal(gym.reset()[0], latent)
    gym = GymWorldModelEnv(env, initial_observation=torch.ones(6))
    first = gym.reset()[0]
    assert np.array_equal(
        first,
        env.world_model.encode(TensorDict({"observation": torch.ones(1, 6)}, [1]))[
            "latent"
        ][0].detach(),
    )


def test_replacing_a_component_is_noticed():
    env = imagined_env()
    gym = GymWorldModelEnv(env)
    gym.reset(seed=0)
    gym.step(ZERO)
    env.world_model.reward_head = Mod(
        lambda x: x.sum(-1, keepdim=True) * 0 + 5,
        [("next", "latent")],
        [("next", "reward")],
    )
    assert gym.step(ZERO)[1] == 5.0


@pytest.mark.parametrize(
    "model, words",
    [
        (None, "cannot be stepped"),
        (Net, "the class Net"),
        (3, "cannot be stepped"),
        (make_model(), "base_env"),
        (SpecEnv(), "register_gym"),
        (make_model().dynamics, "tensordicts"),
        (type("Nothing", (), {})(), "none of the methods"),
    ],
)
def test_models_that_cannot_be_stepped(model, words):
    with pytest.raises(TypeError, match=words):
        GymWorldModelEnv(model, OBS_SPACE, ACTION_SPACE)


def test_a_missing_file():
    with pytest.raises(FileNotFoundError, match="no saved world model"):
        GymWorldModelEnv("nowhere.pt", base_env=SpecEnv())


def test_register_gym_of_torchrl_works_too():
    name = "wm_test/Registered-v0"
    WorldModelEnv.register_gym(name, entry_point=imagined_env, to_numpy=True)
    env = gymnasium.make(name, disable_env_checker=True)
    observation, _ = env.reset()
    assert observation["latent"].shape == (4,)
    assert env.step(torch.zeros(2))[0]["latent"].shape == (4,)
