"""Reference envs whose action specs have a mask: of one moment, and no imagined step is bound by it."""

from __future__ import annotations

import warnings

import pytest
import torch
from _models import OBS, SpecEnv
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.data import (
    Binary,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    Unbounded,
)
from torchrl.envs import ActionMask, EnvBase, TransformedEnv

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.planners import CEMPlanner

CARDS = 5


class Deck(EnvBase):
    """A hand of cards, of which each can be played once."""

    def __init__(self, spec, key) -> None:
        super().__init__()
        self.key = key
        self.observation_spec = Composite(
            cards=Unbounded((CARDS,)), allowed=Binary(CARDS, dtype=torch.bool)
        )
        action = Composite(shape=())
        action[key] = spec
        self.action_spec = action
        self.reward_spec = Unbounded((1,))

    def _state(self, cards: torch.Tensor) -> TensorDict:
        return TensorDict({"cards": cards, "allowed": cards > 0})

    def _reset(self, tensordict, **kwargs):
        return self._state(torch.ones(CARDS))

    def _step(self, tensordict):
        played = tensordict[self.key]
        if played.ndim == 0:
            played = nn.functional.one_hot(played, CARDS)
        assert tensordict["allowed"][played.bool()].all()
        cards = tensordict["cards"] * (1 - played.float())
        out = self._state(cards).set("reward", torch.ones(1))
        return out.set("done", ~cards.bool().any().reshape(1))

    def _set_seed(self, seed):
        return seed


class Play(nn.Module):
    """Which cards are left."""

    def forward(self, cards: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        if action.dtype is torch.int64 and action.ndim < cards.ndim:
            action = nn.functional.one_hot(action, CARDS)
        return cards * (1 - action.float())


def deck_model(key="action") -> WorldModel:
    return WorldModel(
        Mod(nn.Identity(), ["cards"], ["latent"]),
        Mod(Play(), ["latent", key], [("next", "latent")]),
        Mod(
            lambda x: x.sum(-1, keepdim=True),
            [("next", "latent")],
            [("next", "reward")],
        ),
        decoder=Mod(lambda x: x > 0, ["latent"], ["allowed"]),
    )


@pytest.mark.parametrize("spec", [OneHot, Categorical], ids=["one-hot", "categorical"])
@pytest.mark.parametrize("key", ["action", ("agent", "card")], ids=["flat", "nested"])
def test_all_options_are_drawn_behind_an_action_mask(spec, key) -> None:
    real = TransformedEnv(Deck(spec(CARDS), key), ActionMask(key, "allowed"))
    real.rollout(3)
    left = real.full_action_spec[key].mask.clone()
    assert left.sum() == CARDS - 3
    start = TensorDict({"latent": torch.ones(200, CARDS)}, batch_size=[200])
    with pytest.warns(UserWarning, match="has a mask"):
        env = WorldModelEnv(deck_model(key), real)
    for drawn in (env.imagine(2, tensordict=start), env.rollout(2, tensordict=start)):
        actions = drawn[key] if spec is Categorical else drawn[key].int().argmax(-1)
        counts = actions.flatten().bincount(minlength=CARDS)
        assert (counts > 400 / CARDS / 2).all()
    # The real env goes on with its own.
    assert torch.equal(real.full_action_spec[key].mask, left)
    assert env.full_action_spec[key].mask is None
    # What is replaced in the model changes nothing of it.
    env.world_model.decoder = None
    env.imagine(1, tensordict=start)
    assert env.full_action_spec[key].mask is None
    with pytest.raises(TypeError, match="do not heed masks"):
        CEMPlanner(env, 3, 2, 12, 3, action_key=key)


def step_model() -> WorldModel:
    """A model that takes every action."""
    return WorldModel(
        Mod(nn.Identity(), ["observation"], ["latent"]),
        Mod(lambda x, a: x + 1, ["latent", "action"], [("next", "latent")]),
        Mod(lambda x: x[..., :1], [("next", "latent")], [("next", "reward")]),
    )


@pytest.mark.parametrize("size", [(), (2,), (2, 3)])
@pytest.mark.parametrize(
    ("spec", "mask"),
    [
        (OneHot(3), [1, 0, 0]),
        (Categorical(3), [1, 0, 0]),
        (Categorical(3, (1,)), [[1, 0, 0]]),
        (MultiOneHot((2, 3)), [1, 0, 1, 0, 0]),
        (MultiCategorical((2, 3)), [1, 0, 1, 0, 0]),
    ],
    ids=["one-hot", "categorical", "column", "multi-one-hot", "multi-categorical"],
)
def test_a_mask_of_any_spec_and_batch_size(spec, mask, size) -> None:
    base = SpecEnv(size, action_spec=spec.clone())
    base.full_action_spec["action"].update_mask(torch.tensor(mask, dtype=torch.bool))
    with pytest.warns(UserWarning, match=r"the actions \['action'\] has a mask"):
        env = WorldModelEnv(step_model(), base)
    lead = size or (60,)
    start = TensorDict({"latent": torch.zeros(*lead, OBS)}, batch_size=lead)
    drawn = env.imagine(60, tensordict=start)["action"].flatten(0, len(lead))
    free = spec.rand((500,))
    assert drawn.shape[1:] == free.shape[1:] and drawn.dtype == free.dtype
    assert torch.equal(drawn.int().unique(dim=0), free.int().unique(dim=0))
    assert base.full_action_spec["action"].mask is not None
    # The imagined env is a reference env like any other, without a mask.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WorldModelEnv(step_model(), env)


def test_a_predicted_mask_can_be_heeded() -> None:
    real = TransformedEnv(
        Deck(OneHot(CARDS), "action"), ActionMask("action", "allowed")
    )
    real.rollout(2)
    with pytest.warns(UserWarning, match="ActionMask"):
        env = WorldModelEnv(deck_model(), real, batch_size=[7], decode=True)
    masked = TransformedEnv(env, ActionMask("action", "allowed"))
    start = TensorDict({"latent": torch.ones(7, CARDS)}, batch_size=[7])
    played = masked.rollout(CARDS, tensordict=start, set_state=True)["action"]
    assert (played.sum(1) == 1).all()  # each card once
