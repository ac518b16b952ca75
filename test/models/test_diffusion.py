"""What make_diffusion_world_model builds: through filter, env, planner, export and file."""

from __future__ import annotations

import copy

import pytest
import torch
from _built import image, made_env, ObservingEnv, sequences
from _env_kinds import drawn_transitions, env_of, episodes, real_env
from _small_models import DIFFUSION, MAKE
from _wirings import ACTIONS
from tensordict.nn import set_interaction_type
from torchrl.data import Categorical, LazyTensorStorage, ReplayBuffer, Unbounded
from torchrl.envs.utils import check_env_specs

from torchrl_wm import GymWorldModelVectorEnv, WorldModelEnv
from torchrl_wm.diagnostics import open_loop_error
from torchrl_wm.models import (
    DiffusionConfig,
    load_world_model,
    make_diffusion_world_model,
    save_world_model,
)
from torchrl_wm.modules import DiffusionSampler, fit_normalizers, TransitionLSTM
from torchrl_wm.modules.keys import join
from torchrl_wm.planners import CEMPlanner

make = MAKE["diffusion"]
OBSERVATIONS = ("vector", "dictionary", "one-hot", "pixels", "channels first", "grey")
CASES = [(name, "bounded") for name in OBSERVATIONS]
CASES += [("vector", name) for name in ACTIONS if name != "bounded"]
CASES += [("pixels", "categorical")]


def fitted(env, **settings):
    torch.manual_seed(0)
    model, loss = make(env, **settings)
    batch = sequences(env, 3, 6)
    fit_normalizers(model, batch)
    return model, loss, batch


@pytest.mark.parametrize("observations, action", CASES)
@pytest.mark.parametrize("head_memory", [False, True])
def test_every_kind_of_env(observations, action, head_memory) -> None:
    env = made_env(observations, action)
    model, loss, batch = fitted(env, head_memory=head_memory)
    losses = loss(batch)
    assert all(value.isfinite() for value in losses.values())
    losses.sum(reduce=True).backward()
    for name, part in model.components.items():
        grads = [p.grad for p in part.parameters()]
        assert not grads or any(g is not None and g.any() for g in grads), name
    starts = batch.select(*model.encoder.in_keys)[:, 0]
    imagined = WorldModelEnv(model, env, start_states=starts, decode=True)
    check_env_specs(imagined)
    with torch.no_grad():
        out = imagined.imagine(3)
    kept = out.keys(True, True)
    for key in model.memory_keys:
        assert key not in kept and join("next", key) not in kept
    for key in model.encoder.in_keys:
        spec = env.full_observation_spec[key]
        assert spec.expand(3, *spec.shape).is_in(out["next"].get(key))
    assert imagined.rollout(1).shape == (1,) and imagined.slow_because is None


@pytest.mark.parametrize("size", [(3,), (2, 2)])
def test_nested_keys_and_batched_envs(size) -> None:
    env = env_of("dictionary", "categorical", size, nested=True)
    model, loss = make(env)
    batch = drawn_transitions(env, *size, 2).refine_names(*[None] * len(size), "time")
    fit_normalizers(model, batch)
    assert all(value.isfinite() for value in loss(batch).values())
    starts = batch[..., 0].select(*model.encoder.in_keys)
    imagined = WorldModelEnv(model, env, batch_size=size, start_states=starts)
    check_env_specs(imagined)
    assert imagined.imagine(3)["next", "agent", "score"].shape == (*size, 3, 1)


def test_one_frame_is_recorded_for_each_step() -> None:
    env = made_env("pixels")
    model, _, batch = fitted(env)
    assert model.latent_keys == ["frame"]
    assert model.memory_keys == [
        "past_frames",
        "past_actions",
        "judge_hidden",
        "judge_cell",
    ]
    start = model.encode(batch[:, 0].select("pixels"))
    made = WorldModelEnv(model, env).imagine(4, tensordict=start)
    frames = [k for k, v in made.items(True, True) if v.shape[-3:] == (3, 8, 8)]
    assert sorted(frames, key=str) == [("next", "frame"), "frame"]


@pytest.mark.parametrize("observations", ["vector", "pixels"])
@pytest.mark.parametrize("context", [1, 2, 4])
def test_the_filter_is_the_step_and_imagination_is_the_hand_loop(
    observations, context
) -> None:
    env = made_env(observations)
    model, _, batch = fitted(env, context=context)
    with set_interaction_type("deterministic"), torch.no_grad():
        start = model.burn_in(batch) if model.memory_keys else None
        if start is None:
            seen = batch["next"][:, -1].select(*model.encoder.in_keys)
            start = model.encode(seen)
        # The same, step by step.
        step = model.encode(batch[:, 0].select(*model.encoder.in_keys))
        if model.memory_keys:
            step.update(model.filter.initial_memory(step.batch_size, None))
        for t in range(batch.shape[1]):
            now = model.step(step.copy().set("action", batch["action"][:, t]))
            seen = model.encode(batch["next"][:, t].select(*model.encoder.in_keys))
            # The heads judge the real frame.
            judged = now.copy().set(("next", "frame"), seen["frame"])
            model.reward_head(judged)
            step = judged["next"].select(*model.latent_keys, *model.memory_keys)
        for key in (*model.latent_keys, *model.memory_keys):
            torch.testing.assert_close(start[key], step[key], msg=str(key))
        actions = 2 * torch.rand(3, 5, *batch["action"].shape[2:]) - 1
        made = WorldModelEnv(model, env).imagine(5, tensordict=start, actions=actions)
        for t in range(5):
            step = model.step(step.set("action", actions[:, t]))["next"]
            torch.testing.assert_close(made["next", "frame"][:, t], step["frame"])
            torch.testing.assert_close(made["next", "reward"][:, t], step["reward"])


def test_a_context_of_one_on_vectors_has_no_memory() -> None:
    model, loss, batch = fitted(made_env(), context=1)
    assert model.memory_keys == [] and not model.is_recurrent
    assert loss(batch.reshape(-1)).keys() == loss(batch).keys()


@pytest.mark.parametrize("observations", ["vector", "pixels"])
def test_planners_act_on_it(observations) -> None:
    env = made_env(observations)
    model, _, batch = fitted(env)
    imagined = WorldModelEnv(model, env)
    planner = CEMPlanner(
        imagined, planning_horizon=3, optim_steps=2, num_candidates=6, top_k=2
    )
    start = model.burn_in(batch)
    action = planner(start)["action"]
    assert action.shape == (3, *env.action_spec.shape)
    assert env.action_spec.expand(action.shape).is_in(action)


def test_it_is_a_gymnasium_env() -> None:
    env = made_env("pixels")
    model, _, batch = fitted(env)
    starts = batch[:, 0].select("pixels")
    imagined = WorldModelEnv(model, env, start_states=starts, decode=True, max_steps=4)
    vector = GymWorldModelVectorEnv(imagined, num_envs=3)
    seen, _ = vector.reset(seed=0)
    assert seen.shape == (3, 8, 8, 3) and seen.dtype.name == "uint8"
    for _ in range(5):
        seen, reward, *_ = vector.step(vector.action_space.sample())
    assert vector.observation_space.contains(seen) and reward.shape == (3,)


@pytest.mark.parametrize("observations", ["vector", "pixels"])
def test_files_and_copies(observations, tmp_path) -> None:
    env = made_env(observations)
    model, _, batch = fitted(env)
    save_world_model(model, tmp_path / "model.pt")
    again = load_world_model(tmp_path / "model.pt")
    assert again.recipe == model.recipe
    made = []
    for part in (model, again, copy.deepcopy(model)):
        start = part.burn_in(batch)
        torch.manual_seed(0)
        out = WorldModelEnv(part, env).imagine(
            3, tensordict=start, actions=batch["action"][:, :3]
        )
        made.append(out["next", "frame"])
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_images_of_one_size_are_channels_of_one_frame() -> None:
    sizes = {"a": image(8, 10, 3), ("b", "c"): image(2, 8, 10, floats=True)}
    env = ObservingEnv(sizes)
    model, _, batch = fitted(env)
    encoded = model.encode(batch.select("a", ("b", "c")))
    assert encoded["frame"].shape == (3, 6, 5, 8, 10)
    decoded = model.decode(encoded.select("frame"))
    torch.testing.assert_close(decoded["a"], batch["a"].float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(decoded["b", "c"], batch["b", "c"])


def test_terminations_may_be_left_out() -> None:
    model, loss, batch = fitted(made_env(), termination="none")
    assert model.done_head is None and "loss_done" not in loss(batch).keys()


def test_diagnostics_filter_without_the_sampler() -> None:
    env = made_env()
    model, _, batch = fitted(env)
    drawn = []

    class Counted(DiffusionSampler):
        def forward(self, denoise, like, dims=1, noisy=True):
            drawn.append(like.shape)
            return super().forward(denoise, like, dims, noisy)

    model.dynamics.model.sampler = Counted()
    imagined = WorldModelEnv(model, env, decode=True)
    drawn.clear()
    error = open_loop_error(imagined, batch, 2)
    assert error["model", "observation"].shape == (2, 5)
    assert len(drawn) == 2, "once for each of the two steps ahead"


def test_imagined_rows_go_into_a_buffer_and_train_it_again() -> None:
    env = made_env()
    model, loss, batch = fitted(env)
    starts = batch[:, 0].select("observation")
    imagined = WorldModelEnv(model, env, start_states=starts, decode=True)
    made = imagined.imagine(6, tensordict=starts)
    buffer = ReplayBuffer(storage=LazyTensorStorage(10))
    buffer.extend(made.exclude("collector").detach())
    losses = loss(buffer.sample(4).refine_names(None, "time"))
    assert all(value.isfinite() for value in losses.values())


def test_the_papers_sizes() -> None:
    env = ObservingEnv({"pixels": image(64, 64, 3)}, action_spec=Categorical(18))
    model, _ = make_diffusion_world_model(env, DiffusionConfig.diamond())
    dynamics, head = model.dynamics, model.reward_head
    assert dynamics.context == 4 and dynamics.model.sampler.steps == 3
    assert head[0].module.cell.hidden_size == 512
    assert 3e6 < sum(p.numel() for p in dynamics.parameters()) < 5e6


def test_settings_choose_the_judge() -> None:
    for observations, given, found in (
        ("vector", None, False),
        ("vector", True, True),
        ("pixels", None, True),
        ("pixels", False, False),
    ):
        model, _ = make(made_env(observations), head_memory=given)
        lstms = [m for m in model.modules() if isinstance(m, TransitionLSTM)]
        assert bool(lstms) is found


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"sampling_steps": 0}, "sampling_steps must be at least 1, got 0"),
        ({"sampler": "ddim"}, "Unknown sampler 'ddim'"),
        ({"sigma_min": 6.0}, "sigma_min=6.0 and sigma_max=5.0"),
        ({"termination": "ever"}, "Unknown termination 'ever'"),
    ],
)
def test_bad_settings_are_refused(settings, match) -> None:
    with pytest.raises(ValueError, match=match):
        make(made_env(), **settings)


def test_stages_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="one depth"):
        make(made_env("pixels"), channels=(8, 8), depths=(1,))


@pytest.mark.parametrize(
    "observations, match",
    [
        (
            {"pixels": image(8, 8, 3), "x": Unbounded((2,))},
            r"has both: \['x'\] and \['pixels'\]. Choose",
        ),
        (
            {"a": image(8, 8, 3), "b": image(16, 16, 3)},
            "differ in size.*Resize",
        ),
        (
            {"number": Categorical(5), "x": Unbounded((2,))},
            r"\['number'\] are class numbers.*one-hot",
        ),
    ],
)
def test_observations_that_are_not_served_are_named(observations, match) -> None:
    with pytest.raises(ValueError, match=match):
        make(ObservingEnv(observations))
    key = next(iter(observations))
    if key != "number":
        make(ObservingEnv(observations), observation_keys=(key,))


def test_images_of_another_shape_are_refused() -> None:
    model, _, batch = fitted(made_env("pixels"))
    other = batch[:, 0].select("pixels")
    other["pixels"] = other["pixels"][:, :4]
    with pytest.raises(RuntimeError, match="'pixels' has the shape"):
        model.encode(other)


def test_it_learns_a_pendulum_in_seconds() -> None:
    env, data = real_env("Pendulum-v1"), episodes("Pendulum-v1", 8, 100, 0)
    torch.manual_seed(0)
    settings = {**DIFFUSION, "hidden": (64, 64), "noise_features": 16}
    model, loss = make_diffusion_world_model(env, termination="none", **settings)
    fit_normalizers(model, data)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 400)
        first = int(torch.randint(93, ()))
        optimizer.zero_grad()
        loss(data[:, first : first + 8]).sum(reduce=True).backward()
        optimizer.step()
    held_out = episodes("Pendulum-v1", 4, 100, 1)
    error = open_loop_error(
        WorldModelEnv(model, env, decode=True), held_out, 5, stride=10
    )
    share = error["model", "observation"] / error["persistence", "observation"]
    assert (share[[0, 4]] < 0.35).all()


@pytest.mark.slow
@pytest.mark.parametrize("observations", ["vector", "pixels"])
def test_loss_and_imagination_are_graphs(observations) -> None:
    env = made_env(observations)
    model, loss, batch = fitted(env)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    found = []
    for function in (loss, compiled):
        torch.manual_seed(1)
        found.append(function(batch).sum(reduce=True))
    torch.testing.assert_close(*found)
    start, actions = model.burn_in(batch), batch["action"][:, :3]
    imagined = WorldModelEnv(model, env)
    made = []
    for compiles in (False, True):
        if compiles:
            imagined.compile(backend="eager")
        with torch.no_grad(), set_interaction_type("deterministic"):
            out = imagined.imagine(3, tensordict=start, actions=actions)
        made.append(out["next", "frame"])
    torch.testing.assert_close(*made)


def test_gradients_flow_through_imagination() -> None:
    env = made_env("pixels")
    model, _, batch = fitted(env)
    for parameter in model.parameters():  # some begin at zero
        torch.nn.init.normal_(parameter, std=0.05)
    actions = batch["action"][:, :3].clone().requires_grad_()
    start = model.burn_in(batch).detach()
    out = WorldModelEnv(model, env).imagine(3, tensordict=start, actions=actions)
    out["next", "reward"].sum().backward()
    assert actions.grad[:, 0].any()
