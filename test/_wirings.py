"""Drawn wirings: a world model, a reference env that fits it, and the env's options."""

from __future__ import annotations

import torch
from _models import linear
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod, TensorDictSequential
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    Unbounded,
)
from torchrl.envs import EnvBase

from torchrl_wm import WorldModel
from torchrl_wm.modules import with_penalty
from torchrl_wm.modules.keys import join

OBS, LATENT = 5, 3

ACTIONS = {
    "bounded": lambda: Bounded(-1.0, 1.0, (2,)),
    "odd bounds": lambda: Bounded(
        torch.tensor([100.0, -3.0]), torch.tensor([200.0, -2.0]), (2,)
    ),
    "unbounded": lambda: Unbounded((2,)),
    "one-hot": lambda: OneHot(4),
    "multi-one-hot": lambda: MultiOneHot((2, 3)),
    "categorical": lambda: Categorical(4),
    "multi-categorical": lambda: MultiCategorical((2, 3)),
    "binary": lambda: Binary(3),
    "matrix": lambda: Bounded(-1.0, 1.0, (2, 3)),
}
HEADS = {
    "none": None,
    "logits": ("terminated_logits", lambda p: p),
    "continue": ("continue_pred", lambda p: -p),
    "terminated": ("terminated", lambda p: p > 0),
    "done": ("done", lambda p: p > 0),
    "truncated": ("truncated", lambda p: p > 0),
}
ON_LIMIT = ("terminate", "truncate")
sizes = st.sampled_from([(), (1,), (3,), (2, 3)])


class Reference(EnvBase):
    """Specs under drawn keys."""

    def __init__(self, size, actions: dict, keys: dict, done_names) -> None:
        super().__init__(batch_size=size)

        def build(entries: dict) -> Composite:
            spec = Composite(shape=())
            for key, leaf in entries.items():
                spec[key] = leaf
            return spec.expand(self.batch_size).clone()

        flag = Categorical(2, (1,), dtype=torch.bool)
        self.observation_spec = build(
            {keys["observation"]: Unbounded((OBS,)), keys["goal"]: Unbounded((2,))}
        )
        self.action_spec = build(actions)
        self.reward_spec = build({keys["reward"]: Unbounded((1,))})
        self.done_spec = build({name: flag for name in done_names})

    def _reset(self, tensordict, **kwargs):
        raise AssertionError("the reference env must not be touched")

    _step = _reset

    def _set_seed(self, seed):
        return seed


class Dynamics(torch.nn.Module):
    """Moves any number of latents, whatever the actions look like."""

    def __init__(self, latents: int, noisy: bool) -> None:
        super().__init__()
        self.latents, self.noisy = latents, noisy
        self.drift = torch.nn.Parameter(torch.randn(LATENT))

    def forward(self, *inputs):
        states, rest = inputs[: self.latents], inputs[self.latents :]
        dims = states[0].ndim - 1
        push = sum(
            x.reshape(*states[0].shape[:-1], -1).float().mean(-1, keepdim=True)
            if x.ndim > dims
            else x.float().unsqueeze(-1)
            for x in rest
        )
        moved = [(z + self.drift + 0.1 * push.clamp(-5, 5)).sin() for z in states]
        if self.noisy:
            moved = [z + torch.randn_like(z) for z in moved]
        return tuple(moved) if len(moved) > 1 else moved[0]


@st.composite
def wirings(draw):
    """A model, a reference env that fits it, and how the imagined env is to be made."""
    nest = draw(st.booleans())

    def key(name):
        return ("group", name) if nest else name

    keys = {name: key(name) for name in ("observation", "goal", "reward")}
    families = draw(st.lists(st.sampled_from(sorted(ACTIONS)), min_size=1, max_size=2))
    actions = {key(f"action_{i}"): ACTIONS[f]() for i, f in enumerate(families)}
    latents = [key(f"latent_{i}") for i in range(draw(st.integers(1, 2)))]
    recurrent = len(latents) > 1 and draw(st.booleans())
    encoded = latents[:1] if recurrent else latents
    memory = latents[1:] if recurrent and draw(st.booleans()) else []
    shown = [latent for latent in latents if latent not in memory]
    goal = [keys["goal"]] if draw(st.booleans()) else []
    nexts = [join("next", k) for k in latents]
    head = HEADS[draw(st.sampled_from(sorted(HEADS)))]
    probe = linear(nexts, ["_"], [LATENT * len(latents), 1]).module
    done_head = None
    if head is not None:
        done_head = Mod(lambda *z, f=head[1]: f(probe(*z)), nexts, [("next", head[0])])
    decode = draw(st.booleans())
    reward_head = linear(
        nexts, [join("next", keys["reward"])], [LATENT * len(latents), 1]
    )
    declared = None
    if draw(st.booleans()):  # a prediction that is neither latent, reward nor done
        spread = Mod(lambda z: z.std(-1), nexts[:1], [join("next", key("spread"))])
        reward_head = TensorDictSequential(reward_head, spread)
        declared = Composite(shape=())
        declared[key("spread")] = Unbounded(())
    pays = draw(st.integers(0, 2)) == 1
    if pays:
        doubt = Mod(
            lambda z: z.std(-1, keepdim=True), nexts[:1], [join("next", key("doubt"))]
        )
        reward_head = TensorDictSequential(reward_head, doubt)
        if draw(st.booleans()):
            declared = Composite(shape=()) if declared is None else declared
            declared[key("penalty")] = Unbounded((1,))
    model = WorldModel(
        Mod(
            lambda x: tuple(x[..., i : i + LATENT] for i in range(len(encoded)))
            if len(encoded) > 1
            else x[..., :LATENT],
            [keys["observation"]],
            encoded,
        ),
        Mod(
            Dynamics(len(latents), draw(st.booleans())),
            [*latents, *actions, *goal],
            nexts,
        ),
        reward_head,
        done_head=done_head,
        decoder=linear(shown, [keys["observation"]], [LATENT * len(shown), OBS])
        if decode
        else None,
        memory=memory,
        initial_state=TensorDict({latents[-1]: torch.randn(LATENT)})
        if recurrent
        else None,
    )
    if pays:
        limit = draw(st.sampled_from([None, 0.4]))
        way = "terminate" if limit is None else draw(st.sampled_from(ON_LIMIT))
        model = with_penalty(
            model, 0.5, measure=key("doubt"), limit=limit, on_limit=way
        )
    done_names = draw(
        st.sampled_from(
            [("done",), ("done", "terminated"), ("done", "terminated", "truncated")]
        )
    )
    base = Reference(draw(sizes), actions, keys, done_names)
    options = {
        "batch_size": draw(sizes),
        "decode": decode,
        "observation_spec": declared,
        "max_steps": draw(st.sampled_from([None, 2])),
    }
    return model, base, options, keys


def starts(keys: dict, *size: int) -> TensorDict:
    td = TensorDict({}, batch_size=size)
    td.set(keys["observation"], torch.randn(*size, OBS))
    td.set(keys["goal"], torch.randn(*size, 2))
    return td
