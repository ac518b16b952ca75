"""EDM: its identities, its noise levels, and samplers that find distributions that are known."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, strategies as st
from tensordict import TensorDict
from tensordict.nn import set_interaction_type
from torch import nn
from torchrl.data import Categorical, Unbounded

from torchrl_wm.modules import (
    Denoiser,
    DenoiserMLP,
    DenoiserUNet,
    DiffusionDynamics,
    DiffusionSampler,
    draw_sigma,
    Entry,
    FrameModel,
    ImageFeatures,
    JoinEntries,
    karras_sigmas,
    Normalizer,
    preconditioning,
    TransitionLSTM,
)
from torchrl_wm.modules.blocks.diffusion_dynamics import stacked


def gaussian(std: float, mean: float = 0.0):
    """The best denoiser of a Gaussian."""

    def denoise(x, sigma):
        share = std**2 / (std**2 + sigma.unsqueeze(-1) ** 2)
        return mean + share * (x - mean)

    return denoise


@given(sigma=st.floats(1e-3, 100.0), data=st.floats(0.1, 5.0))
def test_factors_give_inputs_and_targets_unit_variance(sigma, data) -> None:
    scales = preconditioning(torch.tensor(sigma, dtype=torch.float64), data)
    # Of x = y + sigma * n, with y of variance data ** 2:
    variance = scales.inner**2 * (data**2 + sigma**2)
    assert float(variance) == pytest.approx(1.0)
    # The target (y - skip * x) / out.
    left = (1 - scales.skip) ** 2 * data**2 + scales.skip**2 * sigma**2
    assert float(left / scales.out**2) == pytest.approx(1.0)
    # That skip makes the network's share of the result the least (EDM, eq. 129).
    for other in (0.99 * scales.skip, 1.01 * scales.skip):
        assert (1 - other) ** 2 * data**2 + other**2 * sigma**2 >= left


def test_a_network_of_zeros_is_the_best_denoiser_of_a_gaussian() -> None:
    denoiser = Denoiser(lambda x, noise: torch.zeros_like(x), sigma_data=0.7)
    x, sigma = torch.randn(4, 5, 3), torch.rand(4, 5) + 0.1
    torch.testing.assert_close(denoiser(x, sigma), gaussian(0.7)(x, sigma))
    torch.manual_seed(0)
    data = 0.7 * torch.randn(20_000, 3)
    assert denoiser.loss(data).mean() == pytest.approx(1.0, abs=0.02)


@given(steps=st.integers(2, 30), rho=st.floats(1.0, 9.0))
def test_noise_levels_fall_between_their_ends(steps, rho) -> None:
    levels = karras_sigmas(steps, 0.01, 7.0, rho)
    assert len(levels) == steps + 1 and levels[-1] == 0
    assert levels[0] == 7.0 and levels[-2] == pytest.approx(0.01, rel=1e-3)
    assert (levels.diff() < 0).all()


def test_one_step_begins_at_the_top() -> None:
    assert karras_sigmas(1, 0.01, 7.0).tolist() == [7.0, 0.0]


def test_noise_levels_of_training() -> None:
    torch.manual_seed(0)
    drawn = draw_sigma(torch.empty(50_000))
    assert drawn.min() >= 2e-3 and drawn.max() <= 20
    assert drawn.log().mean() == pytest.approx(-0.4, abs=0.02)
    assert drawn.log().std() == pytest.approx(1.2, abs=0.02)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"steps": 0}, "at least one step, got steps=0"),
        ({"low": 3.0, "high": 2.0}, "got low=3.0, high=2.0"),
        ({"method": "ddim"}, "Unknown method='ddim'"),
    ],
)
def test_bad_samplers_are_refused(change, match) -> None:
    with pytest.raises(ValueError, match=match):
        DiffusionSampler(**change)


def test_bad_denoisers_are_refused() -> None:
    with pytest.raises(ValueError, match="sigma_data must be above 0"):
        Denoiser(nn.Identity(), sigma_data=0.0)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_samples_of_a_mixture_are_those_of_the_mixture(method) -> None:
    means, std = torch.tensor([-1.0, 0.5]), 0.1

    def denoise(x, sigma):  # the posterior mean, by Bayes
        variance = std**2 + sigma.unsqueeze(-1) ** 2
        weight = (-((x - means) ** 2) / (2 * variance)).softmax(-1)
        mean = means + std**2 / variance * (x - means)
        return (weight * mean).sum(-1, keepdim=True)

    torch.manual_seed(0)
    sampler = DiffusionSampler(40, method)
    drawn = sampler(denoise, torch.empty(4000, 1))
    left = drawn < -0.25
    assert left.float().mean() == pytest.approx(0.5, abs=0.03)
    for part, mean in ((drawn[left], -1.0), (drawn[~left], 0.5)):
        assert part.mean() == pytest.approx(mean, abs=0.02)
        assert part.std() == pytest.approx(std, abs=0.02)


def test_heun_is_of_second_order() -> None:
    exact, wrong = 0.3, {}
    for method in ("euler", "heun"):
        for steps in (10, 40):
            torch.manual_seed(0)
            sampler = DiffusionSampler(steps, method)
            noise = 5.0 * torch.randn(100, 2)
            torch.manual_seed(0)
            drawn = sampler(gaussian(exact), torch.empty(100, 2))
            # The equation scales x by the ratio of the standard deviations.
            goal = noise * exact / (exact**2 + 25) ** 0.5
            wrong[method, steps] = (drawn - goal).abs().max()
    assert wrong["heun", 10] < wrong["euler", 10]
    assert wrong["heun", 10] / wrong["heun", 40] > 2 * (
        wrong["euler", 10] / wrong["euler", 40]
    )


def test_how_often_the_denoiser_runs() -> None:
    for method, expected in (("euler", 4), ("heun", 7)):
        denoise = Mock(side_effect=lambda x, sigma: x)
        DiffusionSampler(4, method)(denoise, torch.empty(2, 3))
        assert denoise.call_count == expected


def test_without_noise_it_begins_at_zero() -> None:
    seen = []

    def denoise(x, sigma):
        seen.append(x)
        return x + 1

    sampler = DiffusionSampler(2)
    one, two = (sampler(denoise, torch.empty(3, 1), noisy=False) for _ in range(2))
    assert not seen[0].any() and torch.equal(one, two)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_networks_of_any_batch_and_size(lead) -> None:
    sizes = {"context": 3, "action_size": 2}
    mlp = Denoiser(DenoiserMLP(4, hidden=(8, 8), **sizes))
    x, sigma = torch.randn(*lead, 4), torch.rand(lead) + 0.1
    context = torch.randn(*lead, 3, 4), torch.randn(*lead, 3, 2)
    assert mlp(x, sigma, *context).shape == x.shape
    assert mlp.loss(x, *context).shape == lead
    for side in ((8, 8), (9, 13)):
        network = DenoiserUNet(
            (2, *side),
            channels=(4, 8, 8),
            depths=(1, 2, 1),
            attention=(False, False, True),
            condition_features=8,
            **sizes,
        )
        unet = Denoiser(network, 3, offset_noise=0.3)
        x = torch.randn(*lead, 2, *side)
        context = torch.randn(*lead, 3, 2, *side), torch.randn(*lead, 3, 2)
        assert unet(x, sigma, *context).shape == x.shape
        value = unet.loss(x, *context)
        assert value.shape == lead and value.isfinite().all()


def test_every_condition_of_the_networks_counts() -> None:
    torch.manual_seed(0)
    sizes = {"context": 2, "action_size": 2}
    networks = (
        (DenoiserMLP(4, hidden=(8,), **sizes), (4,)),
        (
            DenoiserUNet(
                (1, 8, 8), channels=(4, 4), depths=(1, 1), condition_features=8, **sizes
            ),
            (1, 8, 8),
        ),
    )
    for network, shape in networks:
        for parameter in network.parameters():  # some begin at zero
            nn.init.normal_(parameter, std=0.3)
        given = [
            torch.randn(3, *shape),
            torch.randn(3),
            torch.randn(3, 2, *shape),
            torch.randn(3, 2, 2),
        ]
        given = [value.requires_grad_() for value in given]
        network(*given).square().sum().backward()
        assert all(value.grad.abs().sum() > 1e-6 for value in given)


@pytest.mark.parametrize(
    "stages",
    [
        {"channels": (8, 8), "depths": (1,)},
        {"channels": (), "depths": ()},
        {"channels": (8, 0), "depths": (1, 1)},
        {"channels": (8,), "depths": (1,), "attention": (True, True)},
    ],
)
def test_stages_that_do_not_fit_are_refused(stages) -> None:
    with pytest.raises(ValueError, match="channels"):
        DenoiserUNet((3, 8, 8), context=1, action_size=1, **stages)


# Dynamics ------------------------------------------------------------------


def dynamics_of(context: int = 3, nested: bool = False) -> DiffusionDynamics:
    torch.manual_seed(0)
    move = ("agent", "move") if nested else "action"
    entries = [
        Entry.from_spec(move, Unbounded((2,))),
        Entry.from_spec("turn", Categorical(3)),
    ]
    network = DenoiserMLP(4, context=context, action_size=6, hidden=(16,))
    nn.init.normal_(network.out.weight)
    return DiffusionDynamics(
        FrameModel(Denoiser(network), changes=Normalizer(4).fit(torch.randn(50, 4))),
        JoinEntries(entries),
        (4,),
        context=context,
        frame_key=("deep", "frame") if nested else "frame",
        action_keys=[move, "turn"],
        memory_keys=(("deep", "old"), "acts") if nested else ("old", "acts"),
    )


def step_of(dynamics: DiffusionDynamics, *size: int) -> TensorDict:
    td = TensorDict({}, size)
    if dynamics.memory:
        td.update(dynamics.initial_memory.expand(size))
    td.set(dynamics.frame_key, torch.randn(*size, 4))
    td.set(dynamics.action_keys[0], torch.randn(*size, 2))
    return td.set("turn", torch.randint(3, size))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("size", [(), (3,), (2, 3)])
def test_frames_and_actions_are_remembered_and_marked_as_real(size, nested) -> None:
    dynamics = dynamics_of(nested=nested)
    frame, old, acts = dynamics.frame_key, *dynamics.memory
    td = step_of(dynamics, *size)
    first = td.get(frame)
    out = dynamics(td)["next"]
    assert out.get(frame).shape == (*size, 4)
    torch.testing.assert_close(out.get(old)[..., -1, :], first)
    assert not out.get(old)[..., 0, :].any(), "padding moves up"
    assert (out.get(acts)[..., -1] == torch.tensor([0.0, 1.0])).all()
    assert out.get(acts).shape == (*size, 2, 6)


def test_a_context_of_one_has_no_memory() -> None:
    dynamics = dynamics_of(context=1)
    assert dynamics.memory == [] and dynamics.initial_memory is None
    td = dynamics(step_of(dynamics, 3))
    assert list(td["next"].keys()) == ["frame"]
    value = dynamics.denoising_loss(
        td["frame"], [td["action"], td["turn"]], td["next", "frame"]
    )
    assert value.shape == (3,)


@pytest.mark.parametrize("context", [0, -1])
def test_a_context_below_one_is_refused(context) -> None:
    model, actions = dynamics_of().model, dynamics_of().actions
    with pytest.raises(ValueError, match=f"at least 1 .* got {context}"):
        DiffusionDynamics(model, actions, (4,), context=context)


def test_draws_differ_and_modes_do_not() -> None:
    dynamics = dynamics_of()
    td = step_of(dynamics, 5)

    def frames(kind):
        with set_interaction_type(kind):
            return dynamics(td.copy())["next", "frame"]

    assert not torch.equal(frames("random"), frames("random"))
    assert torch.equal(frames("deterministic"), frames("deterministic"))


def test_images_of_bytes_are_rounded_and_have_gradients() -> None:
    network = DenoiserUNet(
        (1, 8, 8),
        context=1,
        action_size=2,
        channels=(4,),
        depths=(1,),
        condition_features=8,
    )
    model = FrameModel(Denoiser(network, 3), levels=255)
    frames = torch.rand(2, 1, 1, 8, 8).requires_grad_()
    drawn = model(frames, torch.ones(2, 1, 2))
    grey = (drawn + 1) * 127.5
    torch.testing.assert_close(grey, grey.round(), rtol=0, atol=1e-3)
    assert drawn.abs().max() <= 1
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    model(frames, torch.ones(2, 1, 2)).sum().backward()
    assert frames.grad.any()


@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    length=st.integers(1, 6),
    count=st.integers(1, 5),
    ends=st.lists(st.integers(0, 5), max_size=3),
    dims=st.integers(0, 2),
)
def test_stacks_are_what_steps_remember(lead, length, count, ends, dims) -> None:
    values = torch.randn(*lead, length, *(2,) * dims)
    begins = torch.zeros(*lead, length, dtype=torch.bool)
    for place in ends:
        begins[..., place % length] = True
    found = stacked(values, count, dims, begins.cumsum(-1))
    memory = torch.zeros(*lead, count, *(2,) * dims)
    for t in range(length):
        at = (slice(None),) * len(lead) + (t,)
        fresh = begins[at].reshape(*lead, *(1,) * (dims + 1))
        memory = torch.where(fresh, torch.zeros_like(memory), memory)
        newest = values[at].unsqueeze(len(lead))
        memory = torch.cat([memory, newest], len(lead)).narrow(len(lead), 1, count)
        torch.testing.assert_close(found[at], memory)


# The judge -------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_an_lstm_over_transitions_of_images(lead) -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"channels": (4, 8), "depths": (1, 1), "condition_features": 2}
            self.images = ImageFeatures(2, 9, 8, **sizes)
            self.out_features = self.images.out_features

        def forward(self, frame, following, action):
            return self.images(torch.cat([frame, following], 1), action)

    actions = JoinEntries([Entry.from_spec("action", Unbounded((2,)))])
    lstm = TransitionLSTM(Features(), actions, dims=3, size=6)
    frame, state = torch.randn(*lead, 1, 9, 8), torch.zeros(*lead, 6)
    hidden, cell = lstm(frame, torch.randn(*lead, 2), state, state, frame)
    assert hidden.shape == cell.shape == (*lead, 6)
