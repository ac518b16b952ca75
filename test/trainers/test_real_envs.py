"""Real envs for the recipes: actions that begin elsewhere than at 0, and spaces they refuse."""

from __future__ import annotations

import re
from collections.abc import Callable

import gymnasium
import numpy  # as the advice in errors says it
import numpy as np
import pytest
import torch
from _real_envs import MBPO, PETS
from gymnasium import spaces
from torchrl.envs import GymWrapper

from torchrl_wm.trainers import make_real_env, MBPOTrainer, PETSTrainer

SMALL = {PETSTrainer: PETS, MBPOTrainer: MBPO}


class Echo(gymnasium.Env):
    """Observes the numbers of the action that it was given last, which its space must hold."""

    def __init__(
        self, action_space: gymnasium.Space, observation_space: gymnasium.Space = None
    ) -> None:
        self.action_space = action_space
        size = len(self.numbers(action_space.sample()))
        self.observation_space = observation_space or spaces.Box(-99, 99, (size,))

    @staticmethod
    def numbers(action) -> np.ndarray:
        parts = action.values() if isinstance(action, dict) else [action]
        return np.concatenate([np.ravel(part) for part in parts]).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(self.observation_space.shape, np.float32), {}

    def step(self, action):
        assert action in self.action_space, action
        numbers = self.numbers(action)
        return numbers, float(numbers.sum()), False, False, {}


class Arm(Echo):
    """Its action is within two dictionaries."""

    @staticmethod
    def numbers(action) -> np.ndarray:
        return action["arm"]["torque"].astype(np.float32)


class Lever(Echo):
    """Its options are -1, 0 and 1."""

    def __init__(self) -> None:
        super().__init__(spaces.Discrete(3, start=-1))


gymnasium.register("test/Lever-v0", Lever)


def trained(kind=PETSTrainer, **settings):
    trainer = kind(**{**SMALL[kind], **settings})
    trainer.train()
    return trainer


def followed(advice: str, env: gymnasium.Env) -> gymnasium.Env:
    """The env as the code in an error makes it."""
    code = re.search(r"(space = [^;]+; )?env = .*?\)(?=\. )", advice).group()
    names = {"env": env, "gymnasium": gymnasium, "numpy": numpy}
    exec(code, names)
    return names["env"]


# Where options begin ----------------------------------------------------------


@pytest.mark.parametrize(
    "env",
    [Lever, Lever(), "test/Lever-v0", f"{__name__}:Lever"],
    ids=["function", "object", "id", "module"],
)
def test_options_begin_where_the_env_says(env) -> None:
    trainer = trained(env=env, random_steps=24, trials=1)
    (episode,) = trainer.evaluate(1)
    for rows in (trainer.data[:], episode):
        option = rows["action"].long().argmax(-1).float()
        torch.testing.assert_close(rows["next", "observation"][:, 0], option - 1)
    assert set(trainer.data[:]["next", "observation"][:, 0].tolist()) == {-1, 0, 1}


@pytest.mark.parametrize(
    "space, first",
    [
        (spaces.MultiDiscrete([3, 2], start=[4, -7]), [4, -7]),
        (spaces.Dict({"lever": spaces.Discrete(2, start=9)}), [9]),
        (spaces.Discrete(4), [0]),
    ],
)
def test_options_of_other_spaces(space, first) -> None:
    env = make_real_env(Echo(space), max_episode_steps=20)
    rows = env.rollout(20)
    key = env.action_key
    groups = (
        rows[key].long().split([3, 2] if len(first) == 2 else rows[key].shape[-1], -1)
    )
    options = torch.stack([group.argmax(-1) for group in groups], -1)
    expected = (options + torch.tensor(first)).float()
    torch.testing.assert_close(rows["next", "observation"], expected)


@pytest.mark.parametrize("kind", [PETSTrainer, MBPOTrainer])
def test_a_dictionary_of_one_action_stays_a_dictionary(kind) -> None:
    space = spaces.Dict({"arm": spaces.Dict({"torque": spaces.Box(-2, 2, (2,))})})
    rows = trained(kind, env=Arm(space)).data[:]
    action = rows["arm", "torque"]
    torch.testing.assert_close(rows["next", "observation"], action)
    assert action.abs().max() > 1


def test_a_torchrl_env_that_begins_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"(?s)start=-1.*Give the Gymnasium env"):
        PETSTrainer(**{**PETS, "env": lambda: GymWrapper(Lever())})


# Spaces that recipes refuse ----------------------------------------------------


TWO_ARMS = spaces.Dict({"left": spaces.Box(-1, 1, (2,)), "right": spaces.Box(0, 3)})


@pytest.mark.parametrize("kind", [PETSTrainer, MBPOTrainer])
def test_several_actions(kind) -> None:
    env = Echo(TWO_ARMS)
    with pytest.raises(
        ValueError, match=r"one action.* 2: \['left', 'right'\]"
    ) as caught:
        kind(**{**SMALL[kind], "env": env})
    trainer = trained(kind, env=followed(str(caught.value), env))
    rows = trainer.data[:]
    assert rows["action"].shape[-1] == 3 and rows["action"].max() > 1
    torch.testing.assert_close(rows["next", "observation"], rows["action"])


def test_several_actions_of_several_kinds() -> None:
    space = spaces.Dict({"arm": spaces.Box(-1, 1, (2,)), "gear": spaces.Discrete(3)})
    with pytest.raises(ValueError, match="TransformAction") as caught:
        PETSTrainer(**{**PETS, "env": Echo(space)})
    assert "unflatten" not in str(
        caught.value
    )  # it is wrong for floats in place of choices


def test_policies_name_actions_that_are_no_vectors() -> None:
    env = Echo(spaces.Box(-2, 2, (2, 3)))
    with pytest.raises(ValueError, match=r"the action 'action' has the shape \(2, 3\)"):
        MBPOTrainer(**{**MBPO, "env": env})
    with pytest.raises(ValueError) as caught:
        MBPOTrainer(**{**MBPO, "env": env})
    assert "FlattenObservation" not in str(caught.value)
    rows = trained(MBPOTrainer, env=followed(str(caught.value), env)).data[:]
    assert rows["action"].shape[-1] == 6
    torch.testing.assert_close(rows["next", "observation"], rows["action"])


@pytest.mark.parametrize("kind", [PETSTrainer, MBPOTrainer])
@pytest.mark.parametrize(
    "space, options",
    [
        (
            spaces.MultiDiscrete([2, 3]),
            lambda n: np.stack(np.unravel_index(n, (2, 3)), -1),
        ),
        (
            spaces.MultiDiscrete([3, 2], start=[1, -2]),
            lambda n: np.stack(np.unravel_index(n, (3, 2)), -1) + [1, -2],
        ),
        (spaces.MultiBinary(3), lambda n: np.stack([n // 4, n // 2 % 2, n % 2], -1)),
        (
            spaces.Box(-1, 1, (2,), np.int64),
            lambda n: np.stack([n // 3, n % 3], -1) - 1,
        ),
    ],
    ids=["multi-discrete", "start", "binary", "integers"],
)
def test_several_choices_become_one(
    kind, space, options: Callable[[np.ndarray], np.ndarray]
) -> None:
    """What the error advises is what PETS plans, and the env gets the actions of its space."""
    env = Echo(space)
    with pytest.raises(ValueError, match="'action'.*one choice.*combinations") as error:
        kind(**{**SMALL[kind], "env": env})
    made = followed(str(error.value), env)
    rows = trained(env=made, random_steps=24, trials=1).data[:]
    number = rows["action"].long().argmax(-1).numpy()
    assert np.array_equal(rows["next", "observation"].numpy(), options(number))


def test_too_many_combinations_are_not_all_listed() -> None:
    with pytest.raises(ValueError, match="TABLE"):
        PETSTrainer(**{**PETS, "env": Echo(spaces.MultiBinary(40))})


def test_choices_are_for_planners() -> None:
    with pytest.raises(ValueError, match="plan instead: PETSTrainer"):
        MBPOTrainer(**{**MBPO, "env": Lever})


class Mixed(Echo):
    """Observes a place and a gear."""

    def __init__(self, **spaces_of: gymnasium.Space) -> None:
        super().__init__(spaces.Box(-1, 1), spaces.Dict(spaces_of))

    def reset(self, *, seed=None, options=None):
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


@pytest.mark.parametrize("kind", [PETSTrainer, MBPOTrainer])
def test_observations_that_are_no_floats(kind) -> None:
    env = Mixed(place=spaces.Box(-5, 5, (2,)), gear=spaces.Discrete(4, start=1))
    with pytest.raises(ValueError, match=r"'gear': '\[4\] torch.int64'") as caught:
        kind(**{**SMALL[kind], "env": env})
    assert "observation_keys" not in str(caught.value)
    rows = trained(kind, env=followed(str(caught.value), env)).data[:]
    assert rows["observation"].shape[-1] == 6
    gear = rows["observation"][:, :4]
    assert (gear.sum(-1) == 1).all() and (gear.amax(-1) == 1).all()


def test_images() -> None:
    env = Mixed(
        frame=spaces.Box(0, 255, (16, 16, 3), np.uint8), x=spaces.Box(0, 1, (1,))
    )
    with pytest.raises(ValueError, match=r"images: \['frame'\].*FilterObservation"):
        PETSTrainer(**{**PETS, "env": env})


def test_a_tuple_with_an_image() -> None:
    image, number = spaces.Box(0, 255, (16, 16, 3), np.uint8), spaces.Box(0, 1, (1,))
    env = Mixed()
    env.observation_space = spaces.Tuple([image, number])
    with pytest.raises(ValueError, match="dictionary of the observations") as caught:
        make_real_env(env)
    spec = make_real_env(followed(str(caught.value), env)).observation_spec
    assert spec["part0"].shape == (16, 16, 3) and spec["part1"].shape == (1,)


@pytest.mark.parametrize(
    "env", ["Blackjack-v1", lambda: Echo(spaces.MultiBinary([2, 3]))]
)
def test_spaces_that_torchrl_does_not_take(env) -> None:
    with pytest.raises(ValueError, match="FlattenObservation"):
        PETSTrainer(**{**PETS, "env": env})
