"""Terms that keep joint embeddings from collapsing, and the probe that looks into them."""

from __future__ import annotations

import math

import pytest
import torch
from _models import ACTION, linear, make_model, OBS, rssm_model, transitions
from hypothesis import given, settings, strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.objectives import SoftUpdate

from torchrl_wm import WorldModel, WorldModelLoss
from torchrl_wm.modules.keys import join
from torchrl_wm.objectives import (
    LatentTerm,
    LossTerm,
    ProbeTerm,
    SIGRegTerm,
    VICRegTerm,
)

KEYS = ["latent", ("deep", "latent")]
TERMS = {
    "sigreg": lambda **settings: SIGRegTerm(projections=32, **settings),
    "vicreg": lambda **settings: VICRegTerm(**settings),
}
#: What SIGReg expects of Gaussian samples: the integral of (1 - exp(-t^2)) exp(-t^2 / 2).
GAUSSIAN = math.sqrt(2 * math.pi) - math.sqrt(2 * math.pi / 3)


def open_model(*, observation="observation", latent="latent", **parts) -> WorldModel:
    """A model whose latents are the observations, so that a test says what they are."""
    return WorldModel(
        Mod(nn.Identity(), [observation], [latent]),
        linear([latent, "action"], [join("next", latent)], (OBS + ACTION, OBS)),
        **parts,
    )


def seen(samples: torch.Tensor) -> TensorDict:
    """Transitions to observations ``[*B, n]``; those that they begin with do not matter."""
    observations = {"observation": torch.randn_like(samples)}
    return TensorDict(
        {**observations, "next": {"observation": samples}}, samples.shape[:-1]
    )


def value_of(term: LossTerm, samples: torch.Tensor, **entries) -> torch.Tensor:
    """The term's value for embeddings ``[*B, OBS]``, by a loss."""
    loss = WorldModelLoss(open_model(), losses=[term])
    batch = seen(samples)
    return loss(batch.update(entries))[f"loss_{term.name}"]


class TestSIGReg:
    def test_it_is_the_integral(self) -> None:
        """With one feature all directions are the same."""
        x = torch.randn(50, 1).double()
        encoder = Mod(nn.Identity(), ["observation"], ["latent"])
        model = WorldModel(
            encoder, Mod(lambda z, a: z + a, ["latent", "action"], [("next", "latent")])
        )
        term = SIGRegTerm(1.0, projections=3, knots=17)
        found = WorldModelLoss(model, losses=[term])(seen(x))["loss_sigreg"]
        t = torch.linspace(-3, 3, 33).double()
        off = torch.exp(1j * t * x).mean(0) - torch.exp(-(t**2) / 2)
        expected = 50 * torch.trapezoid(off.abs() ** 2 * torch.exp(-(t**2) / 2), t)
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("size", [(64,), (8, 64)])
    def test_gaussian_samples(self, size) -> None:
        """Their statistic does not depend on their number."""
        torch.manual_seed(0)
        term = SIGRegTerm(1.0, projections=64)
        values = [value_of(term, torch.randn(*size, OBS)) for _ in range(30)]
        assert torch.stack(values).mean() == pytest.approx(GAUSSIAN, rel=0.15)

    @pytest.mark.parametrize(
        "change",
        [
            lambda x: 0 * x,
            lambda x: 0.3 * x,
            lambda x: 3 * x,
            lambda x: x + 1,
            lambda x: x[:, :1].expand_as(x),
            lambda x: x.sign(),
        ],
        ids=["collapsed", "small", "large", "shifted", "one dimension", "no Gaussian"],
    )
    def test_others_are_far_from_it(self, change) -> None:
        torch.manual_seed(0)
        samples = torch.randn(512, OBS)
        assert value_of(SIGRegTerm(1.0), change(samples)) > 3 * GAUSSIAN

    def test_directions_are_drawn_anew(self) -> None:
        samples = torch.randn(20, OBS)
        term = SIGRegTerm(projections=2)
        assert value_of(term, samples) != value_of(term, samples)


class TestVICReg:
    def test_it_is_the_paper_s(self) -> None:
        x = 0.5 * torch.randn(4, 10, OBS) + 3
        found = value_of(VICRegTerm(2.0, variance=0.7, covariance=0.3), x)
        flat = x.flatten(0, 1)
        c = torch.cov(flat.T)
        variance = (1 - (flat.var(0) + 1e-4).sqrt()).clamp_min(0).mean()
        covariance = (c.square().sum() - c.diag().square().sum()) / OBS
        torch.testing.assert_close(found, 2 * (0.7 * variance + 0.3 * covariance))

    def test_spread_features_that_do_not_covary_have_no_loss(self) -> None:
        signs = torch.cartesian_prod(*[torch.tensor([-2.0, 2.0])] * OBS)
        assert value_of(VICRegTerm(), signs) == pytest.approx(0, abs=1e-6)

    def test_a_single_sample_has_no_spread(self) -> None:
        assert value_of(VICRegTerm(), torch.randn(1, OBS)) == 0


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("key", KEYS)
def test_gradients_move_collapsed_embeddings_apart(name, key) -> None:
    torch.manual_seed(0)
    model = make_model(latent=key)
    model.encoder.module[-1].weight.data.mul_(0.01)
    batch = transitions(64)
    loss = WorldModelLoss(
        model, losses=[LatentTerm(stop_gradient=False), TERMS[name](weight=1.0)]
    )
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)

    def spread() -> torch.Tensor:
        return model.encode(batch["next"].select("observation"))[key].std(0).mean()

    assert spread() < 0.02
    for _ in range(60):
        optimizer.zero_grad()
        loss(batch).sum(reduce=True).backward()
        optimizer.step()
    assert spread() > 0.5


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("multi_step", [False, True])
@settings(deadline=None, max_examples=4)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.integers(0, 99))
def test_only_valid_samples_count(name, key, multi_step, lengths, seed) -> None:
    """Padding may hold NaN; a loss, and a gradient, is that of the valid samples alone."""
    torch.manual_seed(seed)
    model = make_model(latent=key)
    batch = transitions(len(lengths), 6)
    for flag in ("done", "terminated", "truncated"):
        batch["next", flag] = torch.zeros_like(batch["next", flag])
    valid = torch.arange(6) < torch.tensor(lengths).unsqueeze(-1)
    rest = batch[valid]
    batch["collector", "mask"] = valid
    batch["next", "observation"][~valid] = float("nan")
    batch["observation"][~valid] = float("nan")
    found = []
    for samples, way in ((batch, multi_step), (rest, False)):
        loss = WorldModelLoss(model, losses=[TERMS[name]()], multi_step=way)
        torch.manual_seed(1)
        value = loss(samples)[f"loss_{name}"]
        value.backward()
        found.append((value, [p.grad.clone() for p in model.encoder.parameters()]))
        model.zero_grad()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", TERMS)
def test_samples_after_an_invalid_one_are_no_zeros(name) -> None:
    """Open loop, the loss blanks what follows an invalid sample: those are no samples, either."""
    batch = transitions(3, 4)
    mask = torch.tensor([[True, False, True, True]]).expand(3, 4)
    values = []
    for valid in (mask, mask.cummin(-1).values):
        loss = WorldModelLoss(open_model(), losses=[TERMS[name]()], multi_step=True)
        torch.manual_seed(0)
        values.append(loss(batch.set(("collector", "mask"), valid))[f"loss_{name}"])
    assert torch.equal(*values)


@pytest.mark.parametrize("name", TERMS)
def test_nothing_valid_is_no_loss(name) -> None:
    mask = torch.zeros(5, dtype=torch.bool)
    value = value_of(
        TERMS[name](), torch.randn(5, OBS), collector=TensorDict({"mask": mask}, [5])
    )
    assert value == 0


@pytest.mark.parametrize("name", TERMS)
def test_half_precision(name) -> None:
    """Statistics are of single precision, in autocast, too."""
    samples = torch.randn(64, OBS).bfloat16()
    torch.manual_seed(0)
    expected = value_of(TERMS[name](), samples.float())
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(value_of(TERMS[name](), samples), expected)


@pytest.mark.parametrize("name", TERMS)
def test_targets_are_encoded_once_for_all_terms(name) -> None:
    model = make_model(decoder=True)
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    losses = [LatentTerm(stop_gradient=False), TERMS[name](), ProbeTerm()]
    WorldModelLoss(model, losses=losses)(transitions(5))
    assert len(calls) == 2  # the observations, and the next ones


def test_several_outputs_of_an_encoder_are_spread_together() -> None:
    samples = torch.randn(9, OBS)

    def halves(x):
        return x[..., :2], x[..., 2:].unflatten(-1, (2, 2))

    model = WorldModel(
        Mod(halves, ["observation"], ["a", ("b", "c")]),
        Mod(
            lambda a, c, u: (a + u, c),
            ["a", ("b", "c"), "action"],
            [("next", "a"), ("next", "b", "c")],
        ),
    )
    for keys, expected in (
        (None, samples),
        (("b", "c"), samples[:, 2:]),
        (["a"], samples[:, :2]),
    ):
        found = WorldModelLoss(model, losses=[VICRegTerm(keys=keys)])(seen(samples))
        flat = torch.cov(expected.T)
        hinge = (1 - (flat.diag() + 1e-4).sqrt()).relu().mean()
        others = (flat.square().sum() - flat.diag().square().sum()) / len(flat)
        torch.testing.assert_close(found["loss_vicreg"], hinge + 0.04 * others)


def test_an_embedding_that_is_no_latent() -> None:
    """As a recurrent model has it."""
    model = rssm_model()
    with pytest.raises(ValueError, match=r"spreads.*not \['state', 'belief'\].*keys="):
        WorldModelLoss(model, losses=[SIGRegTerm()])
    written = model.encoder.out_keys
    assert WorldModelLoss(model, losses=[SIGRegTerm(keys=list(written))])


@pytest.mark.parametrize("observation", ["observation", ("camera", "view")])
def test_a_probe_trains_the_decoder_alone(observation) -> None:
    model = make_model(observation=observation, decoder=True)
    batch = transitions(6)
    batch.rename_key_("observation", observation)
    batch["next"].rename_key_("observation", observation)
    loss = WorldModelLoss(model, losses=["latent", ProbeTerm(scale=lambda key: 2.0)])
    assert loss.out_keys == ["loss_latent", "loss_probe"]
    value = loss(batch)["loss_probe"]
    latents = model.encode(batch["next"].select(observation)).detach()
    error = (model.decode(latents)[observation] - batch["next", observation]) / 2
    torch.testing.assert_close(value, error.square().mean())
    value.backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad.any() for p in model.decoder.parameters())


def test_a_probe_of_a_target_encoder() -> None:
    model = make_model(decoder=True)
    loss = WorldModelLoss(model, losses=["latent", ProbeTerm()], delay_encoder=True)
    SoftUpdate(loss, tau=0.1)
    assert loss(transitions(4))["loss_probe"].requires_grad


class TestErrors:
    @pytest.mark.parametrize("setting", [{"projections": 0}, {"knots": 1}])
    def test_sigreg(self, setting) -> None:
        with pytest.raises(ValueError, match="at least 1 projection and 2 knots, got"):
            SIGRegTerm(**setting)

    @pytest.mark.parametrize(
        "setting", [{"variance": -1.0}, {"variance": 0.0, "covariance": 0.0}]
    )
    def test_vicreg(self, setting) -> None:
        with pytest.raises(ValueError, match="not negative, and not both zero"):
            VICRegTerm(**setting)

    @pytest.mark.parametrize("name", TERMS)
    def test_the_batch_lacks_next_observations(self, name) -> None:
        loss = WorldModelLoss(make_model(), losses=[TERMS[name]()])
        assert ("next", "observation") in loss.in_keys
        batch = transitions(4)
        batch.pop(("next", "observation"))
        with pytest.raises(KeyError, match=r"lacks \[\('next', 'observation'\)\]"):
            loss(batch)

    @pytest.mark.parametrize("name", TERMS)
    def test_keys_that_the_encoder_does_not_write(self, name) -> None:
        term = TERMS[name](keys="seen")
        with pytest.raises(ValueError, match=r"writes \['latent'\], not \['seen'\]"):
            WorldModelLoss(make_model(), losses=[term])

    @pytest.mark.parametrize("name", TERMS)
    def test_a_target_encoder_gets_no_gradient(self, name) -> None:
        loss = WorldModelLoss(make_model(), losses=[TERMS[name]()], delay_encoder=True)
        with pytest.raises(ValueError, match="Leave out delay_encoder"):
            loss(transitions(4))

    def test_probes(self) -> None:
        with pytest.raises(ValueError, match="trains the decoder"):
            WorldModelLoss(make_model(), losses=[ProbeTerm()])
        with pytest.raises(
            ValueError, match=r"decoder read.*not \['state', 'belief'\]"
        ):
            WorldModelLoss(rssm_model(), losses=[ProbeTerm()])
        with pytest.raises(ValueError, match="Unknown"):
            ProbeTerm("l3")
