"""The transformer world model: trained in one pass, imagined with a cache that nothing records."""

from __future__ import annotations

import pytest
import torch
from _built import CASES, made_env, sequences
from _env_kinds import env_of
from _models import SpecEnv
from _small_models import MAKE
from tensordict import TensorDict
from torchrl.envs import GymEnv

from torchrl_wm import GymWorldModelVectorEnv, WorldModelEnv
from torchrl_wm.models import (
    load_world_model,
    make_transformer_world_model,
    save_world_model,
    TransformerConfig,
)
from torchrl_wm.modules import check_sequence, fit_normalizers
from torchrl_wm.planners import CEMPlanner

make = MAKE["transformer"]


@pytest.mark.parametrize("observations, action", CASES)
def test_serves_every_env(observations, action) -> None:
    env = made_env(observations, action)
    world_model, loss = make(env)
    batch = sequences(env, 2, 5)
    fit_normalizers(world_model, batch)
    batch["is_init"] = torch.zeros(2, 5, 1, dtype=torch.bool)
    batch["is_init"][1, 2] = True
    check_sequence(world_model, batch)
    losses = loss(batch)
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    for name, module in world_model.components.items():
        assert any(
            p.grad is not None and p.grad.any() for p in module.parameters()
        ), name
    imagined = WorldModelEnv(world_model, env, decode=True)
    with torch.no_grad():
        out = imagined.imagine(4, tensordict=world_model.burn_in(batch))
    assert out.shape == (2, 4)
    assert not {"cache", "step_in_context"} & {*out.keys()}
    for key in env.full_observation_spec.keys(True, True):
        assert out["next", key].dtype == env.full_observation_spec[key].dtype


def test_the_loss_makes_no_step_of_the_dynamics() -> None:
    """It would take a Python loop over time."""
    env = made_env()
    world_model, loss = make(env)

    def fail(*_):
        raise AssertionError("a step was made")

    batch = sequences(env, 2, 5)
    world_model.dynamics.module.register_forward_pre_hook(fail)
    loss(batch)
    with pytest.raises(RuntimeError, match="a step was made"):
        world_model.sequence = None
        loss(batch)


@pytest.mark.parametrize("nested", [False, True])
def test_from_nested_envs_to_plans_files_and_gymnasium(nested, tmp_path) -> None:
    env = env_of("vector", "bounded", nested=nested)
    world_model, _ = make(env, termination="none")
    save_world_model(world_model, tmp_path / "model.pt")
    again = load_world_model(tmp_path / "model.pt")
    assert again.memory_keys == ["cache", "step_in_context"]
    batch = sequences(env, 2, 5)
    check_sequence(again, batch)
    acted = []
    for model in (world_model, again):
        start = model.burn_in(batch)
        imagined = WorldModelEnv(model, env, batch_size=[])
        planner = CEMPlanner(
            imagined,
            planning_horizon=3,
            optim_steps=2,
            num_candidates=8,
            top_k=2,
            action_key=env.action_key,
            reward_key=("next", *env.reward_key)
            if nested
            else ("next", env.reward_key),
        )
        torch.manual_seed(0)
        acted.append(planner(start)[env.action_key])
    torch.testing.assert_close(*acted)
    starts = batch.select(*world_model.encoder.in_keys).reshape(-1)
    imagined = WorldModelEnv(again, env, start_states=starts, max_steps=3)
    vector_env = GymWorldModelVectorEnv(imagined, num_envs=2)
    vector_env.reset(seed=0)
    for _ in range(5):
        observation, *_ = vector_env.step(vector_env.action_space.sample())
    assert not [name for name in observation if "cache" in name]


def test_what_one_frame_does_not_show_is_learnt_from_several() -> None:
    """A point that moves on as it did: its speed is in no observation."""
    torch.manual_seed(0)
    env = SpecEnv(observation=1)
    speed = torch.rand(256, 1, 1) * 2 - 1
    place = torch.rand(256, 1, 1) + 0.2 * speed * torch.arange(9)[:, None]
    data = TensorDict(
        {
            "observation": place[:, :-1],
            "action": torch.zeros(256, 8, 2),
            "next": {
                "observation": place[:, 1:],
                "reward": speed.expand(-1, 8, -1),
                "done": torch.zeros(256, 8, 1, dtype=torch.bool),
            },
        },
        [256, 8],
    )
    world_model, loss = make_transformer_world_model(
        env, latent_size=16, width=16, hidden=(32,), termination="none"
    )
    fit_normalizers(world_model, data)
    optimizer = torch.optim.Adam(loss.parameters(), 3e-3)
    for _ in range(250):
        optimizer.zero_grad()
        sum(loss(data[torch.randint(256, (32,))]).values()).backward()
        optimizer.step()
    imagined = WorldModelEnv(world_model, env, decode=True)
    errors = {}
    with torch.no_grad():
        for name, start in {
            "several": world_model.burn_in(data[:, :4]),
            "one": world_model.encode(data[:, 4].select("observation")),
        }.items():
            out = imagined.imagine(4, tensordict=start, actions=torch.zeros(256, 4, 2))
            error = out["next", "observation"] - place[:, 5:]
            errors[name] = error.pow(2).mean().sqrt().item()
    assert errors["several"] < 0.3 * errors["one"], errors


def test_recorded_bytes_do_not_grow_with_the_cache() -> None:
    env, sizes = made_env(), []
    for context in (2, 50):
        world_model, _ = make(env, context=context)
        start = world_model.encode(sequences(env, 3, 1)[:, 0].exclude("next"))
        out = WorldModelEnv(world_model, env).imagine(4, tensordict=start)
        sizes.append(sum(v.nbytes for v in out.values(True, True)))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tokens": 3, "latent_size": 8}, "latent_size=8 and tokens=3"),
        ({"width": 10, "heads": 4}, "heads=4 and width=10"),
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
    ],
)
def test_settings_that_do_not_fit(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_transformer_world_model(made_env(), **settings)


def test_the_papers_sizes_can_be_made() -> None:
    for config in (TransformerConfig.storm(layers=1), TransformerConfig.iris(layers=1)):
        world_model, _ = make_transformer_world_model(
            GymEnv("Pendulum-v1"), config, normalize=False
        )
        out = world_model(
            TensorDict(
                {"observation": torch.zeros(1, 3), "action": torch.zeros(1, 1)}, [1]
            )
        )
        assert out["next", "belief"].shape == (1, config.width)
