"""Random shifts of images."""

from __future__ import annotations

import pytest
import torch

from torchrl_wm.modules import random_shift


@pytest.mark.parametrize("layout", ["CHW", "HWC", "HW"])
@pytest.mark.parametrize("size", [(), (5,), (4, 3)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_images_are_moved_as_a_whole(layout, size, dtype) -> None:
    shape = {"CHW": (3, 12, 14), "HWC": (12, 14, 3), "HW": (12, 14)}[layout]
    rows, columns = torch.arange(12).view(12, 1), torch.arange(14)
    image = (20 * rows + columns).to(dtype)
    if layout != "HW":
        image = image.unsqueeze(0 if layout == "CHW" else -1)
    images = image.expand(*size, *shape).clone()
    before = images.clone()
    moved = random_shift(images, 2, layout)
    assert moved.shape == images.shape and moved.dtype == dtype
    assert torch.equal(images, before)
    flat = moved.reshape(-1, *shape)
    for one in flat:
        grid = one if layout == "HW" else one.select(0 if layout == "CHW" else -1, 0)
        down, right = divmod(int(grid[6, 7]) - (20 * 6 + 7), 20)
        if right > 10:
            down, right = down + 1, right - 20
        assert abs(down) <= 2 and abs(right) <= 2
        expected = 20 * (rows + down).clamp(0, 11) + (columns + right).clamp(0, 13)
        assert torch.equal(grid, expected.to(dtype))


def test_no_shift_and_many() -> None:
    images = torch.rand(300, 1, 8, 8)
    assert torch.equal(random_shift(images, 0), images)
    image = torch.zeros(1, 8, 8)
    image[0, 4, 4] = 1
    moved = random_shift(image.expand(300, 1, 8, 8), 1)
    places = moved.flatten(1).argmax(1).unique()
    assert places.tolist() == [27, 28, 29, 35, 36, 37, 43, 44, 45]
