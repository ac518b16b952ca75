"""Small world models and reference envs for the tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.modules import MLP, RSSMPosterior, RSSMPosteriorV3, RSSMPrior, RSSMPriorV3

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.modules.keys import join

OBS, LATENT, ACTION = 6, 4, 2


class SpecEnv(EnvBase):
    """A reference env that only has specs; stepping it is an error."""

    def __init__(
        self,
        batch_size: Sequence[int] = (),
        *,
        observation: int = OBS,
        action_spec=None,
        done_names: Sequence[str] = ("done", "terminated", "truncated"),
        extra_observations: dict[NestedKey, tuple[int, ...]] | None = None,
        reward_key: NestedKey = "reward",
        observation_key: NestedKey = "observation",
        action_key: NestedKey = "action",
    ) -> None:
        super().__init__(batch_size=batch_size)
        size = torch.Size(batch_size)
        obs = Composite(shape=())
        obs[observation_key] = Unbounded((observation,))
        for key, shape in (extra_observations or {}).items():
            obs[key] = Unbounded(shape)
        action = Composite(shape=())
        action[action_key] = action_spec or Bounded(-1.0, 1.0, (ACTION,))
        reward = Composite(shape=())
        reward[reward_key] = Unbounded((1,))
        done = Composite(
            {name: Categorical(2, (1,), dtype=torch.bool) for name in done_names},
            shape=(),
        )
        self.observation_spec = obs.expand(size).clone()
        self.action_spec = action.expand(size).clone()
        self.reward_spec = reward.expand(size).clone()
        self.done_spec = done.expand(size).clone()

    def _reset(self, tensordict, **kwargs):
        raise AssertionError("the reference env must not be reset")

    def _step(self, tensordict):
        raise AssertionError("the reference env must not be stepped")

    def _set_seed(self, seed):
        return seed


class Counter(nn.Module):
    """Moves a latent by one per step, so that the time is in the latent."""

    def forward(self, latent: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return latent + 1


def linear(
    inputs: Sequence[NestedKey], outputs: Sequence[NestedKey], sizes: Sequence[int]
) -> Mod:
    """A small network from several entries to one."""
    return Mod(MLP(sizes[0], sizes[1], num_cells=[16]), list(inputs), list(outputs))


def make_model(
    *,
    latent: NestedKey = "latent",
    observation: NestedKey = "observation",
    action: NestedKey = "action",
    reward: NestedKey = "reward",
    done: Mod | str | None = None,
    decoder: bool | NestedKey = False,
    action_dim: int = ACTION,
) -> WorldModel:
    """A model of small networks. ``done`` is a module, or the entry its logits go to."""
    next_latent = join("next", latent)
    if isinstance(done, str):
        done = linear([next_latent], [join("next", done)], [LATENT, 1])
    if decoder is not False:
        key = observation if decoder is True else decoder
        decoder = linear([latent], [key], [LATENT, OBS])
    return WorldModel(
        linear([observation], [latent], [OBS, LATENT]),
        linear([latent, action], [next_latent], [LATENT + action_dim, LATENT]),
        linear([next_latent], [join("next", reward)], [LATENT, 1]),
        done_head=done,
        decoder=decoder or None,
    )


def clock_model(
    done: Mod | None = None, decoder: Mod | None = None, latent: NestedKey = "latent"
) -> WorldModel:
    """A model whose latent is the time: it starts at the observation and counts up.

    The reward is the next latent. A ``done`` head can say when to end.
    """
    next_latent = join("next", latent)
    return WorldModel(
        Mod(nn.Identity(), ["observation"], [latent]),
        Mod(Counter(), [latent, "action"], [next_latent]),
        Mod(lambda x: x.clone(), [next_latent], [("next", "reward")]),
        done_head=done,
        decoder=decoder,
    )


def clock_env(batch_size: Sequence[int] = (), **kwargs) -> SpecEnv:
    """The reference env of :func:`clock_model`: one observation, one action."""
    return SpecEnv(
        batch_size, observation=1, action_spec=Bounded(-1.0, 1.0, (1,)), **kwargs
    )


def ends_at(time: float, key: str = "terminated") -> Mod:
    """A bool head that says, under ``key``, that the clock has reached ``time``."""
    return Mod(lambda x: x >= time, [("next", "latent")], [("next", key)])


def observations(*size: int, dim: int = OBS) -> TensorDict:
    """Random observations."""
    return TensorDict({"observation": torch.randn(*size, dim)}, batch_size=size)


def times(*values: float) -> TensorDict:
    """Observations of the clock, one row for each value."""
    return TensorDict(
        {"observation": torch.tensor(values).unsqueeze(-1)}, batch_size=[len(values)]
    )


def transitions(*size: int) -> TensorDict:
    """Random real transitions with all labels."""
    done = torch.rand(*size, 1) < 0.3
    truncated = torch.rand(*size, 1) < 0.3
    return TensorDict(
        {
            "observation": torch.randn(*size, OBS),
            "action": torch.rand(*size, ACTION),
            "next": {
                "observation": torch.randn(*size, OBS),
                "reward": torch.randn(*size, 1),
                "terminated": done,
                "truncated": truncated,
                "done": done | truncated,
            },
        },
        batch_size=size,
    )


def imagined_env(max_steps: int | None = None) -> WorldModelEnv:
    """An env that can be reset; here, where the workers of a ParallelEnv find it."""
    return WorldModelEnv(
        make_model(),
        SpecEnv(),
        start_states=observations(10),
        max_steps=max_steps,
    )


# Recurrent models ----------------------------------------------------------

STATE, BELIEF, EMBED = 3, 5, 7


def gru_model() -> WorldModel:
    """A GRU: the encoder writes ``latent``, the belief begins at the initial state."""
    cell = nn.GRUCell(LATENT + ACTION, BELIEF)
    head = nn.Linear(BELIEF, LATENT)

    def dynamics(latent, belief, action):
        shape = latent.shape[:-1]
        inputs = torch.cat([latent, action], -1).reshape(-1, LATENT + ACTION)
        belief = cell(inputs, belief.reshape(-1, BELIEF)).reshape(*shape, BELIEF)
        return head(belief), belief

    module = Mod(
        dynamics,
        ["latent", "belief", "action"],
        [("next", "latent"), ("next", "belief")],
    )
    module.cell, module.head = cell, head  # so that they count as its parameters
    return WorldModel(
        linear(["observation"], ["latent"], [OBS, LATENT]),
        module,
        linear([("next", "belief")], [("next", "reward")], [BELIEF, 1]),
        initial_state=TensorDict({"belief": torch.full((BELIEF,), 0.5)}),
    )


def rssm_model(version: int = 1, *, decoder: bool = True) -> WorldModel:
    """TorchRL's RSSM (PlaNet, Dreamer) or RSSM-V3 (DreamerV3) as a world model."""
    if version == 1:
        state = STATE
        prior = RSSMPrior(
            action_spec=Unbounded((ACTION,)),
            hidden_dim=BELIEF,  # TorchRL's prior needs them equal
            rnn_hidden_dim=BELIEF,
            state_dim=state,
            action_dim=ACTION,
        )
        posterior = RSSMPosterior(
            hidden_dim=8, state_dim=state, rnn_hidden_dim=BELIEF, obs_embed_dim=EMBED
        )
        statistics = ["prior_mean", "prior_std"], ["posterior_mean", "posterior_std"]
    else:
        state = 6
        prior = RSSMPriorV3(
            action_shape=torch.Size([ACTION]),
            hidden_dim=8,
            rnn_hidden_dim=BELIEF + 3,  # divisible by the number of blocks
            num_categoricals=3,
            num_classes=2,
            action_dim=ACTION,
        )
        posterior = RSSMPosteriorV3(
            hidden_dim=8,
            num_categoricals=3,
            num_classes=2,
            rnn_hidden_dim=BELIEF + 3,
            obs_embed_dim=EMBED,
        )
        statistics = ["prior_logits"], ["posterior_logits"]
    belief = BELIEF if version == 1 else BELIEF + 3
    latents = ["state", "belief"]
    return WorldModel(
        linear(["observation"], ["encoded_latents"], [OBS, EMBED]),
        Mod(
            prior,
            [*latents, "action"],
            [
                *[("next", k) for k in statistics[0]],
                ("next", "state"),
                ("next", "belief"),
            ],
        ),
        linear(
            [("next", k) for k in latents], [("next", "reward")], [state + belief, 1]
        ),
        posterior=Mod(
            posterior,
            [("next", "belief"), ("next", "encoded_latents")],
            [*[("next", k) for k in statistics[1]], ("next", "state")],
        ),
        decoder=linear(latents, ["observation"], [state + belief, OBS])
        if decoder
        else None,
        initial_state=TensorDict(
            {"state": torch.zeros(state), "belief": torch.zeros(belief)}
        ),
    )
