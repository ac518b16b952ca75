"""TorchRL's RSSM networks as components."""

from __future__ import annotations

import pytest
import torch
from _models import linear, make_model, OBS, rssm_model
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torchrl.data import Categorical, OneHot, Unbounded
from torchrl.modules import RSSMPosterior, RSSMPrior, RSSMPriorV3

from torchrl_wm import WorldModel
from torchrl_wm.modules import (
    ContinuationModel,
    Entry,
    JoinEntries,
    RSSMDynamics,
    RSSMPosteriorHead,
)


def prior_of(actions: int) -> RSSMPrior:
    return RSSMPrior(
        Unbounded((actions,)),
        hidden_dim=5,
        rnn_hidden_dim=5,
        state_dim=3,
        action_dim=actions,
    )


@pytest.mark.parametrize("size", [(4,), (), (2, 3)])
def test_prior_for_any_batch_shape(size) -> None:
    """Every row is what TorchRL's network makes of it."""
    prior = prior_of(2)
    state, belief = torch.randn(*size, 3), torch.randn(*size, 5)
    action = torch.randn(*size, 2)
    torch.manual_seed(0)
    out = RSSMDynamics(prior)(state, belief, action)
    torch.manual_seed(0)
    expected = prior(*(x.reshape(-1, x.shape[-1]) for x in (state, belief, action)))
    for mine, theirs in zip(out, expected):
        assert mine.shape[: len(size)] == size
        torch.testing.assert_close(mine.reshape(theirs.shape), theirs)


def test_posterior_for_any_batch_shape() -> None:
    posterior = RSSMPosterior(8, 3, rnn_hidden_dim=5, obs_embed_dim=7)
    belief, embedding = torch.randn(2, 3, 5), torch.randn(2, 3, 7)
    mean, scale, state = RSSMPosteriorHead(posterior)(belief, embedding)
    expected = posterior(belief.flatten(0, 1), embedding.flatten(0, 1))
    torch.testing.assert_close(mean.flatten(0, 1), expected[0])
    assert scale.shape == state.shape == (2, 3, 3)


def test_actions_of_any_kind() -> None:
    """A class number does what its one-hot vector does."""
    prior = prior_of(4)
    state, belief = torch.randn(6, 3), torch.randn(6, 5)
    number = torch.tensor([0, 1, 2, 3, 0, 1])
    means = [
        RSSMDynamics(prior, JoinEntries([Entry.from_spec("action", spec)]))(
            state, belief, action
        )[0]
        for spec, action in (
            (Categorical(4), number),
            (OneHot(4), torch.nn.functional.one_hot(number, 4)),
        )
    ]
    torch.testing.assert_close(means[0], means[1])


def test_v3_keeps_its_categories() -> None:
    prior = RSSMPriorV3(
        action_shape=(2,),
        action_dim=2,
        hidden_dim=8,
        rnn_hidden_dim=8,
        num_categoricals=3,
        num_classes=4,
    )
    logits, state, _ = RSSMDynamics(prior)(
        torch.zeros(2, 5, 12), torch.zeros(2, 5, 8), torch.zeros(2, 5, 2)
    )
    assert logits.shape == (2, 5, 3, 4)
    torch.testing.assert_close(state.unflatten(-1, (3, 4)).sum(-1), torch.ones(2, 5, 3))


class TestContinuationModel:
    @pytest.mark.parametrize("name", ["continue_pred", "terminated_logits"])
    def test_probability_of_going_on(self, name) -> None:
        model = make_model(done=name)
        td = TensorDict({"latent": torch.randn(5, 4)}, [5])
        logits = model.done_head.module(td["latent"])
        out = ContinuationModel(model, ("my", "continuation"))(td)
        sign = 1 if name == "continue_pred" else -1
        expected = 1 / (1 + (-sign * logits).exp())
        torch.testing.assert_close(out["my", "continuation"], expected)

    def test_follows_the_model(self) -> None:
        """Its head is the model's, also when that is replaced."""
        model = make_model(done="continue_pred")
        goes_on = ContinuationModel(model)
        model.done_head = Mod(
            lambda x: torch.zeros_like(x[..., :1]),
            [("next", "latent")],
            [("next", "continue_pred")],
        )
        td = TensorDict({"latent": torch.randn(5, 4)}, [5])
        assert (goes_on(td)["continuation"] == 0.5).all()

    def test_models_that_do_not_say(self) -> None:
        with pytest.raises(ValueError, match="needs a done_head.*the model has none"):
            ContinuationModel(rssm_model())
        with pytest.raises(ValueError, match=r"it writes \[\('next', 'done'\)\]"):
            ContinuationModel(make_model(done="done"))
        base = make_model()
        model = WorldModel(
            base.encoder,
            base.dynamics,
            base.reward_head,
            done_head=linear(
                ["latent", "action"], [("next", "continue_pred")], [OBS, 1]
            ),
        )
        with pytest.raises(ValueError, match=r"reads \['latent', 'action'\]"):
            ContinuationModel(model)
