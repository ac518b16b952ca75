"""Images in and out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from torchrl_wm.modules import PixelDecoder, PixelEncoder
from torchrl_wm.modules.blocks.pixels import default_multipliers


def arranged(shape: tuple[int, int, int], layout: str) -> tuple[int, ...]:
    channels, height, width = shape
    return {
        "CHW": shape,
        "HWC": (height, width, channels),
        "HW": (height, width),
    }[layout]


@settings(max_examples=30)
@given(
    channels=st.integers(1, 4),
    height=st.integers(4, 20),
    width=st.integers(4, 20),
    layout=st.sampled_from(["CHW", "HWC", "HW"]),
    size=st.sampled_from([(), (3,), (2, 3)]),
    stages=st.sampled_from([None, (1,), (1, 2)]),
)
def test_any_image(channels, height, width, layout, size, stages) -> None:
    """Every size, order of dims and batch shape goes in and comes out again."""
    shape = (1 if layout == "HW" else channels, height, width)
    options = {"layout": layout, "depth": 2, "multipliers": stages, "scale": 255.0}
    encoder = PixelEncoder(shape, **options)
    image = torch.randint(256, (*size, *arranged(shape, layout)), dtype=torch.uint8)
    features = encoder(image)
    assert features.shape == (*size, encoder.out_features)
    decoder = PixelDecoder(encoder.out_features, shape, **options)
    assert decoder(features).shape == image.shape


@pytest.mark.parametrize("layout", ["CHW", "HWC", "HW"])
def test_order_and_range_do_not_matter(layout) -> None:
    """Bytes and floats, channels first and last: one picture is one picture."""
    shape = (1 if layout == "HW" else 3, 8, 10)
    torch.manual_seed(0)
    reference = PixelEncoder(shape, depth=2)
    torch.manual_seed(0)
    encoder = PixelEncoder(shape, layout=layout, scale=255.0, depth=2)
    image = torch.randint(256, (5, *shape), dtype=torch.uint8)
    moved = image.movedim(1, -1) if layout == "HWC" else image
    moved = moved.squeeze(1) if layout == "HW" else moved
    torch.testing.assert_close(reference(image / 255), encoder(moved))
    # Nothing is scaled twice: TorchRL's encoder takes bytes itself.
    torch.testing.assert_close(encoder.network(image), encoder(moved))


def test_decodes_in_the_units_of_the_observation() -> None:
    torch.manual_seed(0)
    unit = PixelDecoder(4, (3, 8, 8), depth=2)
    torch.manual_seed(0)
    bytes_ = PixelDecoder(4, (3, 8, 8), depth=2, layout="HWC", scale=255.0)
    latent = torch.randn(5, 4)
    torch.testing.assert_close(255 * unit(latent).movedim(-3, -1), bytes_(latent))
    assert bytes_(latent[:, :1], latent[:, 1:]).shape == (5, 8, 8, 3)


def test_learns_an_image() -> None:
    """Both train: an odd-sized picture is reproduced."""
    encoder = PixelEncoder((1, 9, 7), layout="HW", scale=255.0, depth=4)
    decoder = PixelDecoder(
        encoder.out_features, (1, 9, 7), layout="HW", scale=255.0, depth=4
    )
    images = torch.randint(256, (2, 9, 7), dtype=torch.uint8)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(60):
        loss = ((decoder(encoder(images)) - images) / 255).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02


def test_stages_by_size() -> None:
    assert default_multipliers(64, 64) == (2, 3, 4, 4)
    assert default_multipliers(16, 90) == (2, 3)
    assert default_multipliers(4, 4) == (2,)


def test_wrong_images() -> None:
    with pytest.raises(ValueError, match="Unknown layout='NCHW'"):
        PixelEncoder((3, 8, 8), layout="NCHW")
    encoder = PixelEncoder((3, 8, 8), depth=2)
    with pytest.raises(ValueError, match=r"\(5, 8, 8, 3\); \[\*B, 3, 8, 8\]"):
        encoder(torch.zeros(5, 8, 8, 3))


@pytest.mark.parametrize(
    "kind", [PixelEncoder, lambda *a, **k: PixelDecoder(3, *a, **k)]
)
@pytest.mark.parametrize(
    "shape, options, reason",
    [
        ((3, 8), {}, r"\(channels, height, width\).*got \(3, 8\)"),
        ((3, 0, 8), {}, "at least 1.*got"),
        ((0, 8, 8), {}, "at least 1.*got"),
        ((3, 8, 8.5), {}, "whole numbers"),
        ((3, 8, 8), {"layout": "HW"}, "one channel.*got"),
        ((3, 8, 8), {"depth": 0}, "depth and multipliers.*got 0"),
        ((3, 8, 8), {"multipliers": (1, 0)}, "depth and multipliers.*0"),
        ((3, 8, 8), {"scale": 0.0}, "scale.*got 0.0"),
    ],
)
def test_sizes_that_no_image_has(kind, shape, options, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        kind(shape, **options)
