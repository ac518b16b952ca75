"""What a builder reads of an env."""

from __future__ import annotations

import re
from math import prod

import gymnasium
import numpy as np
import pytest
import torch
from _models import SpecEnv
from hypothesis import given, settings, strategies as st
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    NonTensor,
    OneHot,
    Unbounded,
)
from torchrl.envs import (
    CatFrames,
    Compose,
    FlattenObservation,
    GymEnv,
    GymWrapper,
    InitTracker,
    StepCounter,
    TransformedEnv,
)

from torchrl_wm.models import EnvSpecs, read_specs
from torchrl_wm.models.specs import pixel_entry


def env_with(observations: dict | None = None, **kwargs) -> SpecEnv:
    """A reference env with these observations, by key, in place of its own."""
    env = SpecEnv(**kwargs)
    if observations is not None:
        spec = Composite(shape=())
        for key, leaf in observations.items():
            spec[key] = leaf
        env.observation_spec = spec.expand(env.batch_size).clone()
    return env


def test_a_vector_env() -> None:
    specs = read_specs(GymEnv("Pendulum-v1"))
    assert specs.observation_keys == specs.vector_keys == ["observation"]
    assert (specs.vector_size, specs.action_size) == (3, 1)
    assert specs.reward.key == "reward" and specs.reward.shape == (1,)
    assert specs.terminated_key == "terminated"
    assert specs.logits_key == "terminated_logits"


@pytest.mark.parametrize("categorical", [False, True])
def test_a_discrete_action_takes_one_number_a_class(categorical) -> None:
    env = GymEnv("CartPole-v1", categorical_action_encoding=categorical)
    (action,) = read_specs(env).actions
    assert action.size == 2
    assert action.classes == ((2,) if categorical else ())


def test_dictionaries_are_merged_in_alphabetical_order() -> None:
    leaves = {("robot", "vel"): Unbounded((2,)), "goal": Unbounded((4,))}
    for keys in (list(leaves), list(reversed(leaves))):
        specs = read_specs(env_with({key: leaves[key] for key in keys}))
        assert specs.vector_keys == ["goal", ("robot", "vel")]
        assert specs.vector_size == 6


def test_batched_envs_are_read_without_their_batch() -> None:
    action = MultiCategorical((2, 3))
    specs = read_specs(env_with(batch_size=(4, 2), action_spec=action))
    assert specs == read_specs(env_with(action_spec=action))
    assert specs.action_size == 5


def test_nested_actions_rewards_and_dones() -> None:
    env = env_with(action_key=("agent", "move"), reward_key=("agent", "score"))
    flag = Categorical(2, (1,), dtype=torch.bool)
    env.done_spec = Composite(agent=Composite(done=flag, terminated=flag.clone()))
    specs = read_specs(env)
    assert specs.action_keys == [("agent", "move")]
    assert specs.loss_keys == {
        "reward": ("agent", "score"),
        "done": ("agent", "done"),
        "terminated": ("agent", "terminated"),
    }
    assert specs.logits_key == ("agent", "terminated_logits")


def test_what_transforms_count_is_no_observation() -> None:
    env = TransformedEnv(GymEnv("Pendulum-v1"), Compose(StepCounter(), InitTracker()))
    assert read_specs(env).observation_keys == ["observation"]
    assert read_specs(env, observation_keys=["step_count"]).vector_keys == [
        "step_count"
    ]


@pytest.mark.parametrize(
    "spec, layout, chw, scale",
    [
        (Unbounded((3, 64, 48), dtype=torch.uint8), "CHW", (3, 64, 48), 255),
        (Unbounded((64, 48, 3), dtype=torch.uint8), "HWC", (3, 64, 48), 255),
        (Bounded(0, 255, (96, 96), dtype=torch.uint8), "HW", (1, 96, 96), 255),
        (Bounded(0.0, 1.0, (12, 64, 64)), "CHW", (12, 64, 64), 1),
        (Bounded(0.0, 255.0, (84, 84, 4)), "HWC", (4, 84, 84), 255),
        (Unbounded((1, 64, 64)), "CHW", (1, 64, 64), 1),
        (Bounded(0, 255, (24, 64, 48), dtype=torch.uint8), "CHW", (24, 64, 48), 255),
        (Bounded(0, 255, (64, 48, 47), dtype=torch.uint8), "HWC", (47, 64, 48), 255),
        (Bounded(0, 255, (16, 16, 16), dtype=torch.uint8), "CHW", (16, 16, 16), 255),
    ],
)
def test_images_are_recognised(spec, layout, chw, scale) -> None:
    specs = read_specs(env_with({("camera", "front"): spec, "state": Unbounded((2,))}))
    (pixel,) = specs.pixels
    assert specs.pixel_keys == [("camera", "front")] and specs.vector_keys == ["state"]
    assert specs.observation_keys == ["state", ("camera", "front")]
    assert (pixel.layout, pixel.chw, pixel.scale) == (layout, chw, scale)


@pytest.mark.parametrize(
    "spec",
    [
        Unbounded((2, 3)),
        Unbounded((3, 4, 5)),
        Unbounded((3, 64, 64), dtype=torch.int64),
        Unbounded((64, 64, 64)),
        Unbounded((24, 64, 64)),
        Unbounded((2, 3, 64, 64)),
        Unbounded((128,), dtype=torch.uint8),
        Unbounded((7, 7, 3), dtype=torch.uint8),
        Unbounded((2, 2, 2, 9), dtype=torch.uint8),
    ],
)
def test_other_shapes_are_no_images(spec) -> None:
    assert pixel_entry("x", spec) is None
    assert read_specs(env_with({("a", "x"): spec})).vector_keys == [("a", "x")]


@pytest.mark.parametrize("key", ["view", ("camera", "front")])
@pytest.mark.parametrize(
    "shape", [(4, 3, 64, 64), (64, 64, 64), (64, 48, 60), (10, 3, 10), (17, 17, 17)]
)
def test_bytes_that_look_like_images_are_no_vectors(key, shape) -> None:
    """Images of a shape that no network here reads, without a word, would be thousands of numbers."""
    env = env_with({key: Unbounded(shape, dtype=torch.uint8), "x": Unbounded((2,))})
    with pytest.raises(ValueError, match="no image that a network reads") as error:
        read_specs(env)
    assert f"{key!r} has the shape {shape}" in str(error.value)
    assert read_specs(env, observation_keys=["x"]).vector_keys == ["x"]
    # What the message names, does.
    call = re.search(r"torchrl.envs.(Flatten.*?\]\))", str(error.value))[1]
    flatten = eval(call, {"FlattenObservation": FlattenObservation})
    vector = TransformedEnv(env, flatten)
    assert read_specs(vector, observation_keys=[key]).vector_size == prod(shape)


@pytest.mark.parametrize("key", ["view", ("camera", "front")])
def test_frames_stacked_along_the_channels_are_an_image(key) -> None:
    env = env_with({key: Bounded(0, 255, (3, 64, 64), dtype=torch.uint8)})
    specs = read_specs(TransformedEnv(env, CatFrames(8, dim=-3, in_keys=[key])))
    assert specs.pixels[0].chw == (24, 64, 64)


def test_a_gymnasium_dictionary_with_an_image_and_nested_vectors() -> None:
    class Robot(gymnasium.Env):
        observation_space = gymnasium.spaces.Dict(
            {
                "view": gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8),
                "joints": gymnasium.spaces.Dict(
                    {"q": gymnasium.spaces.Box(-1, 1, (5,), np.float64)}
                ),
            }
        )
        action_space = gymnasium.spaces.MultiDiscrete([2, 3])

    specs = read_specs(GymWrapper(Robot()))
    assert specs.pixels[0].layout == "HWC"
    assert specs.vector_keys == [("joints", "q")] and specs.action_size == 5


def test_observations_can_be_chosen() -> None:
    env = env_with({"a": Unbounded((1,)), "b": NonTensor(())})
    assert read_specs(env, observation_keys=["a"]).observation_keys == ["a"]
    assert read_specs(env, observation_keys="a").observation_keys == ["a"]
    with pytest.raises(ValueError, match=r"names \['c'\].*\['a', 'b'\]"):
        read_specs(env, observation_keys=["c"])
    with pytest.raises(ValueError, match="no observation"):
        read_specs(env, observation_keys=[])


def test_what_cannot_be_served_is_named() -> None:
    with pytest.raises(ValueError, match="observation 'text'.*NonTensor"):
        read_specs(env_with({"text": NonTensor(())}))
    with pytest.raises(ValueError, match=r"'cloud' has the shape \(-1, 3\)"):
        read_specs(env_with({"cloud": Unbounded((-1, 3))}))
    env = env_with()
    env.reward_spec = Composite(red=Unbounded((1,)), blue=Unbounded((1,)))
    with pytest.raises(ValueError, match=r"reward spec has \['blue', 'red'\]"):
        read_specs(env)
    with pytest.raises(TypeError, match="GymWrapper"):
        read_specs(gymnasium.make("CartPole-v1"))


def test_what_some_builders_cannot_serve_is_named() -> None:
    image = Unbounded((3, 64, 64), dtype=torch.uint8)
    specs = read_specs(env_with({"view": image, "level": OneHot(3)}))
    with pytest.raises(ValueError, match=r"make_x cannot serve the images 'view'"):
        specs.without_pixels("make_x")
    with pytest.raises(ValueError, match=r"make_x .*cannot serve 'level' \[3\]"):
        specs.only_floats("make_x")
    plain = read_specs(env_with())
    assert plain.without_pixels("make_x").only_floats("make_x") is plain


FAMILIES = [
    lambda: Unbounded((2, 3)),
    lambda: Unbounded((), dtype=torch.float64),
    lambda: Unbounded((9, 8, 3), dtype=torch.uint8),
    lambda: MultiCategorical((2, 3)),
    lambda: OneHot(4),
]
KEYS = st.sampled_from(["a", "b", ("n", "a"), ("n", "m", "b"), "z"])


@given(
    st.dictionaries(KEYS, st.sampled_from(FAMILIES), min_size=1),
    st.sampled_from(FAMILIES),
)
@settings(deadline=None, max_examples=40)
def test_specs_survive_as_plain_data(observations, action) -> None:
    env = env_with({key: make() for key, make in observations.items()})
    env.action_spec = Composite(act=Composite(x=action()))
    specs = read_specs(env)
    plain = specs.to_plain()
    assert EnvSpecs.from_plain(plain) == specs
    assert set(specs.observation_keys) == set(observations)

    def is_plain(value) -> bool:
        if isinstance(value, dict):
            return all(map(is_plain, value.values()))
        if isinstance(value, list):
            return all(map(is_plain, value))
        return type(value) in (str, int, float)

    assert is_plain(plain)


ACTIONS = {
    "bounded": lambda: Bounded(torch.tensor([-1.5, 0.1]), torch.tensor([2.0, 0.3])),
    "matrix": lambda: Bounded(-1.0, 1.0, (2, 3), dtype=torch.float64),
    "steps": lambda: Bounded(0, 2**60 + 1, (2,), dtype=torch.int64),
    "unbounded": lambda: Unbounded((2,)),
    "one_hot": lambda: OneHot(4),
    "multi_one_hot": lambda: MultiOneHot([2, 3]),
    "binary": lambda: Binary(3),
    "categorical": lambda: Categorical(5),
    "row": lambda: Categorical(5, shape=(1,)),
    "flag": lambda: Categorical(2, shape=(1,), dtype=torch.bool),
    "multi_categorical": lambda: MultiCategorical([2, 3]),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", sorted(ACTIONS))
def test_an_env_made_of_plain_specs(name, nested) -> None:
    """Actions come back as they were, observations without their bounds."""
    key = ("robot", "move") if nested else "move"
    seen = {"robot": Bounded(0.0, 1.0, (3,)), "level": Categorical(3), "on": Binary(2)}
    env = env_with({("deep", k): spec for k, spec in seen.items()})
    env.action_spec = Composite()
    action = Composite(shape=())
    action[key] = ACTIONS[name]()
    env.action_spec = action
    made = EnvSpecs.from_plain(read_specs(env).to_plain()).reference_env()
    assert made.full_action_spec[key] == ACTIONS[name]()
    assert made.full_reward_spec == env.full_reward_spec
    assert made.full_done_spec == env.full_done_spec
    for k, spec in seen.items():
        other = made.observation_spec["deep", k]
        assert (other.shape, other.dtype) == (spec.shape, spec.dtype)
    with pytest.raises(NotImplementedError, match="base_env=.*start_states="):
        made.reset()


def test_observations_of_bits_and_options_come_back_as_they_were() -> None:
    seen = {
        "cell": OneHot(4),
        ("robot", "cards"): MultiOneHot([2, 3]),
        "lights": Binary(4),
        "levels": Bounded(-1, 2, (2, 3), dtype=torch.int32),
        "memory": Unbounded((9,), dtype=torch.uint8),
        "flag": Categorical(2, shape=(1,), dtype=torch.bool),
        "speed": Unbounded((2,)),
    }
    plain = read_specs(env_with(seen)).to_plain()
    made = EnvSpecs.from_plain(plain).reference_env()
    for key, spec in seen.items():
        assert made.observation_spec[key] == spec
    assert EnvSpecs.from_plain(plain) == read_specs(env_with(seen))
    for entry in plain["vectors"]:  # as older versions wrote them
        entry.pop("spec", None)
    older = EnvSpecs.from_plain(plain).reference_env()
    assert older.observation_spec["cell"].shape == (4,)


def test_actions_of_which_a_file_says_too_little() -> None:
    plain = read_specs(GymEnv("Pendulum-v1")).to_plain()
    spec = plain["actions"][0].pop("spec")
    older = EnvSpecs.from_plain(plain)
    with pytest.raises(ValueError, match="action 'action'.*base_env"):
        older.reference_env()
    plain["actions"][0]["spec"] = {**spec, "low": [0.0, 1.0]}  # damaged
    with pytest.raises((ValueError, RuntimeError)):
        EnvSpecs.from_plain(plain)
