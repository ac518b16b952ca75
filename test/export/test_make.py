"""Imagined envs by name: the factories, and Gymnasium's registry."""

from __future__ import annotations

import subprocess
import sys

import gymnasium
import numpy as np
import pytest

import torchrl_wm
from _export_models import ACTION_SPACE, Clock, Net, OBS_SPACE, ZERO
from _models import imagined_env
from gymnasium.vector import AutoresetMode
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.envs import GymEnv
from torchrl_wm import (
    GymWorldModelEnv,
    GymWorldModelVectorEnv,
    make_env,
    make_world_model_env,
    WorldModel,
)

NAME = "torchrl_wm/WorldModel-v0"
SPACES = {"observation_space": OBS_SPACE, "action_space": ACTION_SPACE}


def pendulum_model() -> WorldModel:
    return WorldModel(
        Mod(nn.Identity(), ["observation"], ["observation"]),
        Mod(
            lambda o, a: o + 0 * a, ["observation", "action"], [("next", "observation")]
        ),
        Mod(nn.Linear(3, 1), [("next", "observation")], [("next", "reward")]),
    )


@pytest.mark.parametrize("backend", ["world-model", "World_Model", "MODEL", "wm"])
def test_make_env(backend):
    env = make_env(Clock(), backend=backend, max_episode_steps=3, **SPACES)
    assert isinstance(env, GymWorldModelEnv) and env.max_episode_steps == 3
    assert isinstance(make_env(imagined_env()), GymWorldModelEnv)


@pytest.mark.parametrize("backend", ["gym", "", None, 3])
def test_unknown_backends(backend):
    with pytest.raises(ValueError, match="Unknown backend"):
        make_env(Clock(), backend=backend, **SPACES)


def test_make_world_model_env():
    assert isinstance(make_world_model_env(Clock(), **SPACES), GymWorldModelEnv)
    envs = make_world_model_env(imagined_env(), num_envs=3)
    assert isinstance(envs, GymWorldModelVectorEnv) and envs.num_envs == 3


def test_gymnasium_make():
    env = gymnasium.make(NAME, world_model=imagined_env(), max_episode_steps=3)
    env.reset(seed=0)
    assert [env.step(ZERO)[3] for _ in range(3)] == [False, False, True]
    assert env.spec.id == NAME and env.spec.max_episode_steps == 3
    with pytest.raises(ValueError, match="render_mode"):
        gymnasium.make(NAME, world_model=imagined_env(), render_mode="ansi")
    with pytest.raises(TypeError, match="world_model"):
        gymnasium.make(NAME)


@pytest.mark.parametrize("mode", [None, "sync", "vector_entry_point"])
def test_gymnasium_make_vec(mode):
    envs = gymnasium.make_vec(
        NAME,
        num_envs=3,
        vectorization_mode=mode,
        world_model=imagined_env(),
        max_episode_steps=2,
    )
    assert isinstance(envs, GymWorldModelVectorEnv) == (mode != "sync")
    assert envs.reset(seed=0)[0].shape == (3, 4)
    envs.step(np.zeros((3, 2), np.float32))
    assert envs.step(np.zeros((3, 2), np.float32))[3].all()
    envs = gymnasium.make_vec(
        NAME, num_envs=2, world_model=imagined_env(), autoreset_mode="SameStep"
    )
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP


@pytest.mark.parametrize(
    "base",
    [
        "Pendulum-v1",
        lambda: gymnasium.make("Pendulum-v1"),
        lambda: GymEnv("Pendulum-v1"),
    ],
)
def test_a_world_model_with_its_base_env(base):
    base = base if isinstance(base, str) else base()
    env = make_env(pendulum_model(), base_env=base, max_episode_steps=5)
    real = gymnasium.make("Pendulum-v1")
    assert env.observation_space.shape == (3,)  # predictions may leave the real bounds
    assert env.action_space == real.action_space
    same = make_env(
        pendulum_model(), observation_space=real.observation_space, base_env=base
    )
    assert same.observation_space == real.observation_space
    first = env.reset(seed=0)[0]
    assert np.allclose(np.hypot(*first[:2]), 1) and np.array_equal(
        first, env.reset(seed=0)[0]
    )
    with pytest.raises(TypeError, match="base_env"):
        make_env(pendulum_model(), base_env=3)
    with pytest.raises(TypeError, match="go with a WorldModel"):
        make_env(Net(), base_env=base, **SPACES)


def test_the_path_of_a_saved_model(tmp_path, monkeypatch):
    """By the loader of torchrl_wm.models, whose own tests are elsewhere."""
    path = tmp_path / "model.pt"
    path.touch()
    models = type(sys)("torchrl_wm.models")
    monkeypatch.setitem(sys.modules, "torchrl_wm.models", models)
    monkeypatch.setattr(torchrl_wm, "models", models, raising=False)
    with pytest.raises(ImportError, match="load_world_model"):
        make_env(path, base_env="Pendulum-v1")
    model = pendulum_model()
    models.load_world_model = lambda given: model if given == path else None
    for env in (
        make_env(str(path), base_env="Pendulum-v1"),
        gymnasium.make(NAME, world_model=path, base_env="Pendulum-v1").unwrapped,
        gymnasium.make_vec(
            NAME, num_envs=2, world_model=str(path), base_env="Pendulum-v1"
        ),
    ):
        assert env._source.env.world_model is model
        env.reset(seed=0)
    with pytest.raises(FileNotFoundError, match="no saved world model"):
        make_env(tmp_path / "other.pt", base_env="Pendulum-v1")


@pytest.mark.filterwarnings("ignore:A normaliser")
@pytest.mark.parametrize("kind", ["ensemble", "mlp", "rssm", "tdmpc2"])
def test_ready_made_models_saved_and_made_again(kind, tmp_path):
    from torchrl_wm import models

    build = getattr(models, f"make_{kind}_world_model")
    world_model, _ = build(GymEnv("Pendulum-v1"))
    path = tmp_path / "model.pt"
    models.save_world_model(world_model, path)
    kwargs = {"base_env": "Pendulum-v1", "max_episode_steps": 4}
    one = gymnasium.make(NAME, world_model=path, base_env="Pendulum-v1")
    many = gymnasium.make_vec(NAME, num_envs=3, world_model=str(path), **kwargs)
    again = make_env(world_model.eval(), num_envs=3, **kwargs)
    for env in (one, many, again):
        assert env.observation_space.contains(env.reset(seed=0)[0])
    action = many.action_space.sample()
    for _ in range(6):
        (got, *_), (expected, *_) = many.step(action), again.step(action)
        assert np.array_equal(got, expected)


@pytest.mark.filterwarnings("ignore:A normaliser")
@pytest.mark.parametrize("real", ["Pendulum-v1", "CartPole-v1"])
@pytest.mark.parametrize("kind", ["ensemble", "mlp", "rssm", "tdmpc2"])
def test_ready_made_models_need_no_base_env(kind, real, tmp_path):
    """The file says which entries there are; the start states say where episodes begin."""
    from torchrl_wm import models

    world_model, _ = getattr(models, f"make_{kind}_world_model")(GymEnv(real))
    path = tmp_path / "model.pt"
    models.save_world_model(world_model, path)
    start = GymEnv(real).rollout(5)
    kwargs = {"start_states": start, "max_episode_steps": 4}
    one = gymnasium.make(NAME, world_model=path, **kwargs)
    many = gymnasium.make_vec(NAME, num_envs=3, world_model=str(path), **kwargs)
    same = make_env(world_model.eval(), num_envs=3, base_env=real, **kwargs)
    assert one.action_space == gymnasium.make(real).action_space
    for env in (many, make_world_model_env(world_model, num_envs=3, **kwargs)):
        assert env.single_action_space == same.single_action_space
        assert env.single_observation_space == same.single_observation_space
        env.reset(seed=0), same.reset(seed=0)
        action = env.action_space.sample()
        (got, *_), (expected, *_) = env.step(action), same.step(action)
        assert np.array_equal(got, expected)


@pytest.mark.filterwarnings("ignore:A normaliser")
def test_without_a_base_env_something_says_where_to_start(tmp_path):
    from torchrl_wm import models

    world_model, _ = models.make_mlp_world_model(GymEnv("Pendulum-v1"), hidden=(8,))
    env = make_env(world_model)
    with pytest.raises(RuntimeError, match="base_env=.*start_states="):
        env.reset()
    observation = np.array([1, 0, 0], np.float32)
    env.reset(options={"observation": observation})
    env.step(env.action_space.sample())
    make_env(world_model, initial_observation=observation).reset()
    with pytest.raises(TypeError, match="wired by hand.*base_env"):
        make_env(pendulum_model())


@pytest.mark.parametrize("kind", ["ensemble", "tdmpc2"])
def test_another_env_than_the_models_own_is_refused_at_construction(kind):
    from torchrl_wm import models

    world_model, _ = getattr(models, f"make_{kind}_world_model")(GymEnv("CartPole-v1"))
    cart = GymEnv("CartPole-v1", categorical_action_encoding=True)
    for kwargs, text in (
        ({"base_env": "Pendulum-v1"}, r"observation.*\(4,\); base_env has.*\(3,\)"),
        (
            {"base_env": cart},
            r"action.*\(2,\); base_env has.*\(\) and the classes \[2\]",
        ),
        ({"start_states": "Pendulum-v1"}, r"\(4,\); start_states has.*\(3,\)"),
        (
            {"base_env": "CartPole-v1", "start_states": GymEnv("Pendulum-v1")},
            r"\(4,\); start_states has.*\(3,\)",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            make_env(world_model, **kwargs)
    make_env(world_model, base_env="CartPole-v1", start_states="CartPole-v1")
    with pytest.raises(ValueError, match=r"\(3,\); start_states has.*\(4,\)"):
        make_env(pendulum_model(), base_env="Pendulum-v1", start_states="CartPole-v1")


def test_an_older_file_asks_for_the_base_env(tmp_path):
    import torch

    from torchrl_wm import models

    world_model, _ = models.make_mlp_world_model(GymEnv("Pendulum-v1"), hidden=(8,))
    path = tmp_path / "model.pt"
    models.save_world_model(world_model, path)
    content = torch.load(path, weights_only=True)
    del content["recipe"]["specs"]["actions"][0]["spec"]
    torch.save(content, path)
    with pytest.raises(TypeError, match="older version.*base_env"):
        make_env(path)
    make_env(path, base_env="Pendulum-v1").reset(seed=0)
    models.load_world_model(path, world_model)  # its weights are the same


def test_importing_the_package_registers_the_env_and_not_sb3():
    code = (
        "import sys, gymnasium, torchrl_wm; gymnasium.spec('torchrl_wm/WorldModel-v0'); "
        "assert 'stable_baselines3' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_id_with_the_packages_name_needs_no_import():
    code = (
        "import gymnasium\n"
        "try: gymnasium.make('torchrl_wm:torchrl_wm/WorldModel-v0', world_model=None)\n"
        "except TypeError as error: assert 'cannot be stepped' in str(error), error\n"
        "else: raise AssertionError"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sb3_is_asked_for_by_its_extra(monkeypatch):
    from torchrl_wm.export import sb3

    monkeypatch.setattr(sb3, "_MISSING", ImportError("no module"))
    with pytest.raises(ImportError, match=r"torchrl-wm\[sb3\]"):
        sb3.SB3VecEnv(imagined_env(), num_envs=2)


def test_unknown_names():
    with pytest.raises(AttributeError, match="Nothing"):
        torchrl_wm.export.Nothing
