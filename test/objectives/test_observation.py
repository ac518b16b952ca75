"""The observation term against its formula."""

from __future__ import annotations

import pytest
import torch
from _models import LATENT, linear, make_model, OBS, rssm_model, transitions
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn

from torchrl_wm import WorldModel, WorldModelLoss
from torchrl_wm.objectives import ObservationTerm


def symlog(x):
    return x.sign() * (x.abs() + 1).log()


@pytest.mark.parametrize("target", ["next", "observation"])
@pytest.mark.parametrize("squash", [False, True])
def test_formula(target, squash) -> None:
    model, batch = make_model(decoder=True), transitions(3)
    term = ObservationTerm(weight=0.5, target=target, symlog=squash)
    loss = WorldModelLoss(model, losses=[term], reduction="none")
    latent = model.encoder.module(batch["observation"])
    real = batch["observation"]
    if target == "next":
        latent = model.dynamics.module(latent, batch["action"])
        real = batch["next", "observation"]
    decoded = model.decoder.module(latent)
    if squash:
        decoded, real = symlog(decoded), symlog(real)
    expected = 0.5 * (decoded - real).pow(2).sum(-1)
    torch.testing.assert_close(loss(batch)["loss_reconstruction"], expected)


def test_images_and_nested_keys() -> None:
    """Bytes are compared in [0, 1], and symlog is only for those named."""
    base = make_model()
    image, speed = ("camera", "image"), ("body", "speed")
    model = WorldModel(
        Mod(
            lambda x, y: torch.cat([x.flatten(-2) / 255, y], -1), [image, speed], ["z"]
        ),
        linear(["z", "action"], [("next", "z")], [12 + 2, 12]),
        linear([("next", "z")], [("next", "reward")], [12, 1]),
        decoder=Mod(
            lambda z: (255 * z[..., :9].unflatten(-1, (3, 3)), z[..., 9:]),
            ["z"],
            [image, speed],
        ),
    )
    del base
    batch = TensorDict({"action": torch.rand(4, 2)}, [4])
    for prefix in ((), ("next",)):
        batch[(*prefix, *image)] = torch.randint(256, (4, 3, 3), dtype=torch.uint8)
        batch[(*prefix, *speed)] = 10 * torch.randn(4, 3)
    term = ObservationTerm(symlog=[speed], scale={image: 255.0})
    out = WorldModelLoss(model, losses=[term], reduction="none")(batch)
    ahead = model.dynamics.module(
        torch.cat([batch[image].flatten(-2) / 255, batch[speed]], -1), batch["action"]
    )
    real = batch[("next", *image)].float() / 255
    expected = (ahead[:, :9].unflatten(-1, (3, 3)) - real).pow(2).sum((-2, -1))
    gap = symlog(ahead[:, 9:]) - symlog(batch[("next", *speed)])
    expected = expected + gap.pow(2).sum(-1)
    torch.testing.assert_close(out["loss_reconstruction"], expected)


def test_the_first_observation_of_a_recurrent_sequence() -> None:
    """It counts in the first step, where nothing else would say what it is."""
    model = rssm_model()
    batch = transitions(2, 3)
    model.decoder = Mod(_Last(), ["state", "belief"], ["observation"])
    for part in (model.dynamics.module, model.posterior.module):
        part.forward = lambda *x, f=part.forward: f(*x, noise=torch.zeros(3))
    loss = WorldModelLoss(model, losses=[ObservationTerm()], reduction="none")
    out = loss(batch)["loss_reconstruction"]
    latents = model.observe(batch)

    def error(latents, real):
        decoded = model.decoder.module(latents["state"], latents["belief"])
        return (decoded - real).pow(2).sum(-1)

    expected = error(latents["next"], batch["next", "observation"])
    first = error(latents[:, 0], batch["observation"][:, 0])
    torch.testing.assert_close(out[:, 0], expected[:, 0] + first)
    torch.testing.assert_close(out[:, 1:], expected[:, 1:])


class _Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, OBS)

    def forward(self, state, belief):
        return self.linear(torch.cat([state, belief], -1))


def test_masks() -> None:
    model, batch = make_model(decoder=True), transitions(4)
    each = WorldModelLoss(model, losses=[ObservationTerm()], reduction="none")(batch)
    batch["collector", "mask"] = torch.tensor([True, False, True, True])
    batch["next", "observation"][1] = float("nan")
    out = WorldModelLoss(model, losses=[ObservationTerm()])(batch)
    each = each["loss_reconstruction"][[0, 2, 3]]
    torch.testing.assert_close(out["loss_reconstruction"], each.mean())


def test_other_shapes_are_refused() -> None:
    model, batch = make_model(decoder=True), transitions(4)
    model.decoder = linear(["latent"], ["observation"], [LATENT, OBS + 1])
    with pytest.raises(ValueError, match="nothing is broadcast"):
        WorldModelLoss(model, losses=[ObservationTerm()])(batch)
