"""Each way in which the only other wrapper of this kind was found to go wrong.

One test a row of that review, under the row's own label: what was a wrong answer without a
word is right here, or a clear error.
"""

from __future__ import annotations

import copy

import gymnasium
import numpy as np
import pytest
import torch
from _export_models import ACTION_SPACE, Clock, Net, net_env, OBS_SPACE, ZERO
from _models import OBS as OBS_DIM
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from tensordict.nn import TensorDictModule as Mod
from torch import nn

from torchrl_wm import GymWorldModelEnv

pytestmark = pytest.mark.filterwarnings("ignore:.*infinity.*", "ignore:.*is a sample.*")

VECTOR = np.arange(3, dtype=np.float32)


def make(model=None, obs_space=OBS_SPACE, action_space=ACTION_SPACE, **kwargs):
    model = Clock() if model is None else model
    return GymWorldModelEnv(model, obs_space, action_space, **kwargs)


def stepping(returned, **kwargs):
    """An env whose transition returns this, after a reset."""
    kwargs.setdefault("initial_observation", VECTOR)
    env = make(transition_fn=lambda model, state, action: returned, **kwargs)
    env.reset()
    return env


# Seeding -----------------------------------------------------------------


def test_d1_unseeded_resets_repeat_after_a_seeded_one():
    drawn = []

    def reset_fn(model, seed, options, np_random):
        drawn.append((seed, np_random.integers(1000)))
        return np.random.default_rng(seed).normal(size=3)

    env = make(reset_fn=reset_fn)
    first = [env.reset(seed=0)[0], env.reset()[0]]
    again = [env.reset(seed=0)[0], env.reset()[0]]
    assert np.array_equal(first, again) and drawn[:2] == drawn[2:]
    assert not np.array_equal(*first)


def test_d2_the_constructors_seed_reaches_the_reset():
    seeds = []
    env = make(
        reset_fn=lambda model, seed, options: seeds.append(seed) or VECTOR, seed=5
    )
    env.reset()
    assert seeds == [5]


def test_d4_a_reset_with_gymnasiums_own_signature_is_seeded():
    class Model(Clock):
        def reset(self, *, seed=None, options=None):
            self.seeds.append((seed, options))
            return np.zeros(1), VECTOR

    env = make(model := Model())
    env.reset(seed=3)
    env.reset(seed=4, options={"wind": 1})
    assert model.seeds == [(3, None), (4, {"wind": 1})]
    check_env(env, skip_render_check=True)


def test_d5_reading_the_seed_keeps_the_generator():
    env = make(seed=3)
    generator = env.np_random
    assert env.np_random_seed == 3 and env.np_random is generator


def test_d6_a_shared_action_space_is_not_rewound():
    space = spaces.Box(-1.0, 1.0, (2,), seed=0)
    env = make(action_space=space)
    first = space.sample()
    env.reset(seed=0)
    assert not np.array_equal(first, space.sample())


def test_stoch_torch_noise_in_the_model_is_seeded():
    check_env(make(Net(noise=1.0)), skip_render_check=True)


# State, observation, info --------------------------------------------------


def test_rssm_a_dictionary_without_an_observation_is_refused():
    env = make(
        transition_fn=lambda model, state, action: {"deter": state, "stoch": state},
        initial_observation=VECTOR,
    )
    env.reset()
    with pytest.raises(TypeError, match="deter.*Accepted are"):
        env.step(ZERO)


def test_s1_a_sampled_first_observation_is_said_to_be_one():
    env = make(
        initial_state=torch.zeros(2), transition_fn=lambda m, s, a: (s, VECTOR, 0.0)
    )
    with pytest.warns(UserWarning, match="nothing to do with initial_state"):
        env.reset(seed=0)


def test_s2_in_place_models_begin_each_episode_at_the_same_state():
    def transition(model, state, action):
        state += 1
        return state, VECTOR * state.item(), 0.0

    start = torch.zeros(1)
    env = make(
        initial_state=start, initial_observation=VECTOR, transition_fn=transition
    )
    for _ in range(2):
        env.reset()
        assert env.step(ZERO)[0].tolist() == [0, 1, 2]
    assert start.item() == 0


def test_s3_s4_what_is_handed_out_is_not_the_state():
    class Model:
        def reset(self):
            state = torch.zeros(3)
            return state, state

        def step(self, state, action):
            state = state + 1
            return state, state, 0.0

    env = make(Model())
    for obs, info in (env.reset(), env.step(ZERO)[::4]):
        obs += 100
        info["model_state"] += 100
    assert env.step(ZERO)[0].tolist() == [2, 2, 2]


def test_s5_no_graph_grows():
    env = make(Net())
    env.reset()
    env.step(ZERO)
    assert env.state.grad_fn is None and not env.state.requires_grad


def test_s6_training_mode_is_off_while_it_imagines():
    env = make(net := Net())
    net.train()
    env.reset()
    modes = []
    net.decoder.register_forward_hook(lambda *_: modes.append(net.dropout.training))
    env.step(ZERO)
    assert modes == [False] and net.training


def test_info_keys_are_the_same_in_reset_and_step():
    env = make()
    assert (
        set(env.reset()[1])
        == set(env.step(ZERO)[4])
        == {"model_state", "elapsed_steps"}
    )


def test_info_options_state_is_heard():
    env = make(
        reset_fn=lambda model, seed: (np.zeros(1), VECTOR),
        transition_fn=lambda model, state, action: (state + 1, VECTOR * state, 0.0),
    )
    start = {"state": np.full(1, 7.0), "observation": VECTOR}
    env.reset(options=start)
    assert env.step(ZERO)[0].tolist() == [0, 7, 14]
    assert env.state.tolist() == [8]


def test_p5_the_next_state_and_observation_win():
    old, new = np.zeros(1), np.ones(1)
    env = stepping(
        {"state": old, "next_state": new, "obs": VECTOR * 0, "next_obs": VECTOR}
    )
    assert env.step(ZERO)[0].tolist() == [0, 1, 2] and env.state.tolist() == [1]


def test_p6_what_stands_below_next_is_read():
    env = stepping(
        {"obs": VECTOR * 0, "next": {"state": np.ones(1), "obs": VECTOR, "reward": 2.0}}
    )
    obs, reward, *_ = env.step(ZERO)
    assert obs.tolist() == [0, 1, 2] and reward == 2 and env.state.tolist() == [1]


@pytest.mark.parametrize("extra", [{"rew": 1.0}, {"discount": 0.0}, {"latent": VECTOR}])
def test_unknown_keys_are_refused(extra):
    with pytest.raises(TypeError, match="unknown keys"):
        stepping({"obs": VECTOR, **extra}).step(ZERO)


def test_prob_done_a_probability_is_no_flag():
    for value in (torch.tensor(0.01), 0.99, np.float32(1.0)):
        with pytest.raises(ValueError, match="probability > 0.5"):
            stepping({"obs": VECTOR, "terminated": value}).step(ZERO)


def test_terminated_none_asks_terminal_fn():
    env = stepping({"obs": VECTOR, "terminated": None}, terminal_fn=lambda model: True)
    assert env.step(ZERO)[2] is True


@pytest.mark.parametrize(
    "returned",
    [
        (np.zeros(1), VECTOR, 1.0, False),  # p1
        (np.zeros(1), VECTOR, 1.0, True),
        (VECTOR, 1.0, False),  # p2
        (VECTOR, 1.0),  # p3
        (np.zeros(1), VECTOR),  # p3b
        [VECTOR, 1.0, False, False, {}],  # p4
    ],
)
def test_p1_to_p4_forms_that_are_none(returned):
    with pytest.raises(TypeError, match="Accepted are"):
        stepping(returned).step(ZERO)


@pytest.mark.parametrize("form", ["mapping", "tuple"])
def test_p7_info_may_be_none(form):
    returned = (np.zeros(1), VECTOR, 0.0, False, False, None)
    if form == "mapping":
        returned = {"obs": VECTOR, "info": None}
    assert stepping(returned).step(ZERO)[4]["elapsed_steps"] == 1


def test_p8_a_step_that_loses_the_latent_is_refused():
    env = make(
        initial_state=torch.zeros(5),
        initial_observation=VECTOR,
        transition_fn=lambda model, state, action: (VECTOR, 0.0, False, False, {}),
    )
    env.reset()
    with pytest.raises(TypeError, match="would stand still"):
        env.step(ZERO)


def test_p9_without_a_state_the_observation_is_the_state():
    env = make(
        reset_fn=lambda: torch.zeros(3),
        transition_fn=lambda model, state, action: (state + 1, 0.0, False, False, {}),
    )
    env.reset()
    assert [env.step(ZERO)[0][0] for _ in range(3)] == [1, 2, 3]


def test_r1_another_float_type_or_a_value_out_of_bounds_is_still_the_observation():
    box = spaces.Box(-1, 1, (3,))
    env = make(obs_space=box, reset_fn=lambda: (np.ones(3, np.float64), {"a": 1}))
    obs, info = env.reset()
    assert obs.tolist() == [1, 1, 1] and info["a"] == 1
    env = make(obs_space=box, reset_fn=lambda: (np.ones(3) * 1.0001, {}))
    with pytest.warns(UserWarning, match="outside of the bounds"):
        assert env.reset()[0] == pytest.approx(1.0001)


def test_r2_two_dictionaries_that_fit_are_ambiguous():
    space = spaces.Dict({"a": spaces.Box(-1, 1, (1,))})
    one = {"a": np.zeros(1, np.float32)}
    with pytest.raises(ValueError, match="could be"):
        make(obs_space=space, reset_fn=lambda: (one, copy.deepcopy(one))).reset()
    env = make(obs_space=space, reset_fn=lambda: ({"h": 1}, one))
    assert env.reset()[0] == one
    env = make(obs_space=space, reset_fn=lambda: (one, {"h": 1}))
    assert env.reset()[1]["h"] == 1


def test_r3_a_bare_dictionary_is_an_observation():
    image = spaces.Box(0, 255, (2, 2), np.uint8)
    for key in ("a", "image", "observation"):
        space = spaces.Dict({key: image, "b": spaces.Box(-1, 1, (1,))})
        value = {key: np.ones((2, 2), np.uint8), "b": np.ones(1, np.float32)}
        obs, _ = make(obs_space=space, reset_fn=lambda v=value: v).reset()
        assert obs.keys() == value.keys() and obs[key].sum() == 4


# Call conventions ----------------------------------------------------------


def test_c1_c4_c5_arguments_are_told_by_their_names():
    class Swapped(Clock):
        def step(self, action, state, return_info=False):
            assert return_info is False and action.shape == (2,) and state.shape == (1,)
            return state + 1, VECTOR, 1.0

    def transition(state, action):
        assert action.shape == (2,) and state.shape == (1,)
        return state + 1, VECTOR, 2.0

    for kwargs, reward in (({}, 1.0), ({"transition_fn": transition}, 2.0)):
        env = make(Swapped(), **kwargs)
        env.reset()
        assert env.step(ZERO)[1] == reward


def test_c2_single_arguments_are_told_by_their_names():
    seen = []
    env = make(
        action_transform_fn=lambda action: seen.append(action) or action,
        reset_fn=lambda seed: seen.append(seed) or (np.zeros(1), VECTOR),
    )
    env.reset(seed=8)
    env.step(ZERO)
    assert seen[0] == 8 and seen[1].shape == (2,)
    with pytest.raises(TypeError, match="action_transform_fn"):
        make(action_transform_fn=lambda x: x)


def test_c3_keyword_only_arguments_are_given():
    seen = []
    make(reset_fn=lambda *, seed: seen.append(seed) or VECTOR).reset(seed=2)
    assert seen == [2]


# Dtypes and spaces -----------------------------------------------------------


def test_v1_discrete_actions_are_integers():
    table = nn.Embedding(4, 3)
    env = make(
        table,
        action_space=spaces.Discrete(4),
        reset_fn=lambda: VECTOR,
        transition_fn=lambda model, state, action: (model(action), 0.0, False, {}),
    )
    env.reset()
    assert np.array_equal(env.step(2)[0], table.weight[2].detach())


def test_v1c_dictionary_actions():
    env = make(
        action_space=spaces.Dict({"a": spaces.Discrete(2), "b": ACTION_SPACE}),
        reset_fn=lambda: VECTOR,
        transition_fn=lambda model, state, action: (
            state + action["b"].sum().numpy(),
            0.0,
            False,
            {},
        ),
    )
    env.reset()
    env.step({"a": 1, "b": ZERO})


def test_v2_arrays_of_an_action_transform_become_tensors():
    net = nn.Linear(4, 3)
    env = make(
        net,
        action_space=spaces.Discrete(4),
        action_transform_fn=lambda model, action: np.eye(4)[int(action)],
        reset_fn=lambda: VECTOR,
        transition_fn=lambda model, state, action: (model(action), 0.0, False, {}),
    )
    env.reset()
    assert env.step(1)[0].shape == (3,)


def test_v3_a_batch_dim_of_one_is_refused():
    for returned, error in (
        ((torch.zeros(1), torch.zeros(1, 3), 0.0), TypeError),
        ({"obs": torch.zeros(1, 3)}, ValueError),
    ):
        with pytest.raises(error, match="batch dim of 1"):
            stepping(returned).step(ZERO)


def test_v4_floats_do_not_become_bytes():
    space = spaces.Box(0, 255, (3,), np.uint8)
    with pytest.raises(ValueError, match="its space holds uint8"):
        make(obs_space=space, reset_fn=lambda: torch.rand(3)).reset()
    with pytest.raises(ValueError, match="outside"):
        make(obs_space=space, reset_fn=lambda: {"obs": np.array([0, 1, 300])}).reset()


def test_v5_bfloat16():
    obs, reward, *_ = stepping(
        (
            np.zeros(1),
            torch.ones(3, dtype=torch.bfloat16),
            torch.ones((), dtype=torch.bfloat16),
        )
    ).step(ZERO)
    assert obs.dtype == np.float32 and reward == 1.0


def test_v6_batches_of_rewards_and_flags_are_refused():
    for returned in (
        (VECTOR, torch.tensor([1.0, 2.0, 3.0]), False, False, {}),
        (VECTOR, 1.0, torch.zeros(3, dtype=torch.bool), False, {}),
    ):
        with pytest.raises(ValueError, match="must be one number"):
            stepping(returned).step(ZERO)
    assert stepping((VECTOR, 16777217, False, {})).step(ZERO)[1] == 16777217


def test_v7_nan_is_refused():
    for returned in ((VECTOR * np.nan, 0.0, False, {}), (VECTOR, np.nan, False, {})):
        with pytest.raises(FloatingPointError):
            stepping(returned).step(ZERO)


def test_v8_actions_outside_of_the_space_are_refused():
    with pytest.raises(ValueError, match="action must be"):
        stepping((VECTOR, 0.0, False, {})).step(np.full(2, 3.0))


# With other libraries, on torch states -----------------------------------


def test_g1_check_env_with_a_torch_state():
    check_env(make(Net()), skip_render_check=True)


def test_g3_infos_in_a_sync_vector_env():
    envs = SyncVectorEnv([lambda: make(Net())] * 2)
    _, infos = envs.reset(seed=0)
    assert (
        infos["model_state"].shape == (2, 4)
        and infos["model_state"].dtype == np.float32
    )


@pytest.mark.slow
def test_g4_infos_in_an_async_vector_env():
    envs = AsyncVectorEnv([net_env] * 2)
    envs.reset(seed=0)
    infos = envs.step(envs.action_space.sample())[4]
    assert infos["model_state"].shape == (2, 4)
    envs.close()


def test_g6_deepcopy():
    env = make(Net())
    env.reset(seed=0)
    env.step(ZERO)
    assert np.array_equal(copy.deepcopy(env).step(ZERO)[0], env.step(ZERO)[0])


def test_g7_the_latent_is_in_the_info_for_torchrl():
    from torchrl.envs.libs.gym import default_info_dict_reader, GymWrapper

    env = GymWrapper(make(Net()))
    env.set_info_dict_reader(default_info_dict_reader(["model_state"]))
    assert env.rollout(2)["next", "model_state"].shape == (2, 4)


def test_g8_torchrls_world_model_is_named():
    from torchrl.modules import WorldModel

    model = WorldModel(
        Mod(nn.Linear(OBS_DIM, 4), ["observation"], ["latent"]),
        Mod(nn.Bilinear(4, 2, 4), ["latent", "action"], [("next", "latent")]),
        Mod(nn.Linear(4, 1), [("next", "latent")], [("next", "reward")]),
    )
    with pytest.raises(TypeError, match="WorldModelEnv"):
        make(model)


# Life cycle --------------------------------------------------------------


def test_l1_stepping_after_the_end():
    env = stepping((VECTOR, 0.0, True, {}))
    env.step(ZERO)
    with pytest.raises(RuntimeError, match="over"):
        env.step(ZERO)


@pytest.mark.parametrize("limit", [0, -3, 2.5])
def test_l2_time_limits(limit):
    with pytest.raises(ValueError, match="max_episode_steps"):
        make(max_episode_steps=limit)


def test_l3_render_modes_and_frames():
    with pytest.raises(ValueError, match="render_mode"):
        make(render_mode="human")
    space = spaces.Box(0, 1, (3, 8, 6))
    env = make(
        obs_space=space, reset_fn=lambda: np.ones((3, 8, 6)), render_mode="rgb_array"
    )
    env.reset()
    assert env.render().shape == (8, 6, 3) and env.render().dtype == np.uint8


def test_l4_a_shared_model_is_closed_by_the_last_env():
    model = Clock()
    one, two = make(model), make(model)
    one.close()
    assert not model.closed
    two.reset()
    two.step(ZERO)
    two.close()
    assert model.closed


def test_l5_a_shared_model_with_a_state_of_its_own_is_refused():
    class Stateful:
        def reset(self):
            self.count = 0
            return VECTOR

        def step(self, action):
            self.count += 1
            return VECTOR * self.count, 0.0, False, False, {}

    model = Stateful()
    shared = SyncVectorEnv([lambda: make(model)] * 3)
    shared.reset()
    with pytest.raises(RuntimeError, match="another env has used the model"):
        shared.step(shared.action_space.sample())
    own = SyncVectorEnv([lambda: make(Stateful())] * 3)
    own.reset()
    assert own.step(own.action_space.sample())[0][:, 1].tolist() == [1, 1, 1]


def test_devices_and_strings_are_refused_at_construction():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="not available"):
            make(device="cuda")
    with pytest.raises(FileNotFoundError):
        make("a string")


def test_the_factory_has_a_vector_class():
    env = gymnasium.make_vec(
        "torchrl_wm/WorldModel-v0",
        num_envs=4,
        vectorization_mode="vector_entry_point",
        world_model=Net(batch=(4,)),
        observation_space=OBS_SPACE,
        action_space=ACTION_SPACE,
    )
    assert env.reset(seed=0)[0].shape == (4, 3)
