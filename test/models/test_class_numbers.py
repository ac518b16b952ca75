"""Class numbers with a dim too many, ``[*B, 1]``, in whatever is ready-made."""

from __future__ import annotations

import pytest
import torch
from _built import made_env, sequences
from _small_models import MAKE
from _wirings import ACTIONS
from torchrl.data import Categorical

from torchrl_wm.modules import fit_normalizers


@pytest.mark.parametrize("key", ["action", ("robot", "move")])
@pytest.mark.parametrize("size", [(6, 3), (1, 1)])
@pytest.mark.parametrize("name", MAKE)
def test_a_loss_names_them(name, size, key) -> None:
    env = made_env("vector", "categorical", action_key=key)
    world_model, loss = MAKE[name](env)
    batch = sequences(env, *size)
    batch.names = [None, "time"]
    fit_normalizers(world_model, batch)
    expected = loss(batch)
    column = batch.clone().set(key, batch[key].unsqueeze(-1))
    last = "move" if key != "action" else key
    with pytest.raises(ValueError, match=f"'{last}'.* below 4.*squeeze"):
        loss(column)
    right = column.set(key, column.get(key).squeeze(-1))
    assert torch.equal(right[key], batch[key])
    assert loss(right).keys() == expected.keys()


@pytest.mark.parametrize("name", MAKE)
def test_specs_of_one_dim_are_served(name, monkeypatch) -> None:
    """There ``[*B, 1]`` is right, and the batch itself may be ``[*B, 1]``, too."""
    monkeypatch.setitem(ACTIONS, "column", lambda: Categorical(4, shape=(1,)))
    for action in ("column", "categorical"):
        env = made_env("vector", action)
        world_model, loss = MAKE[name](env)
        for size in ((4, 3), (3, 1)):
            batch = sequences(env, *size)
            batch.names = [None, "time"]
            fit_normalizers(world_model, batch)
            assert loss(batch).sum(reduce=True).isfinite()
