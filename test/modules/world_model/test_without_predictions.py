"""A filter without predictions runs those modules that the latents and the heads depend on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod, TensorDictSequential
from torch import nn

from torchrl_wm import WorldModel, WorldModelLoss
from torchrl_wm.modules.keys import join
from torchrl_wm.objectives import DoneTerm, LossTerm, RewardTerm

#: Latent, the latent before, hints of the dynamics, the heads' cell, and their sum.
NAMES = [
    ("latent", "before", "hint", "cell", "count"),
    (("a", "latent"), ("a", "before"), ("b", "hint"), ("b", "cell"), "count"),
]


class Counted(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.calls = function, 0

    def forward(self, *values):
        self.calls += 1
        return self.function(*values)


class Recurrent(nn.Module):
    """A head with a cell; what it reads beside that is added up."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 1)
        self.calls = 0

    def forward(self, cell, *values):
        self.calls += 1
        cell = torch.tanh(self.inner(cell + sum(values)))
        return cell, self.out(cell)


class Nothing(LossTerm):
    needs_prediction = False

    def labels(self, world_model, keys):
        return []

    def __call__(self, predicted, batch, loss):
        key = loss.world_model.latent_keys[0]
        return predicted.get(key).square().mean(-1)


def model_of(names=NAMES[0], *, hint: bool = True):
    """A model whose dynamics remember the latent before; the reward head reads a hint of it."""
    torch.manual_seed(0)
    latent, before, hint_key, cell, count = names
    nexts = {k: join("next", k) for k in names}
    parts = {
        "shift": Counted(lambda latent, before, action: latent + 0 * before),
        "hint": Counted(lambda before: 2 * before),
        "draw": Counted(lambda latent, before, action: latent + before + action.mean()),
    }
    dynamics = TensorDictSequential(
        Mod(parts["shift"], [latent, before, "action"], [nexts[before]]),
        Mod(parts["hint"], [nexts[before]], [nexts[hint_key]]),
        Mod(parts["draw"], [latent, before, "action"], [nexts[latent]]),
    )
    reads = [cell, nexts[latent], *([nexts[hint_key]] if hint else [])]
    reward, done = Recurrent(), Recurrent()
    carried = [before, cell, count]
    begin = {key: torch.zeros(4) for key in carried}
    model = WorldModel(
        Mod(nn.Linear(3, 4), ["observation"], [latent]),
        dynamics,
        Mod(reward, reads, [nexts[cell], ("next", "reward")]),
        done_head=Mod(
            done, [count, nexts[latent]], [nexts[count], ("next", "terminated_logits")]
        ),
        memory=carried,
        initial_state=TensorDict(begin),
    )
    return model, parts, reward, done


def data(*size: int) -> TensorDict:
    torch.manual_seed(1)
    observed = torch.randn(*size[:-1], size[-1] + 1, 3)
    flag = torch.zeros(*size, 1, dtype=torch.bool)
    return TensorDict(
        {
            "observation": observed[..., :-1, :],
            "action": torch.rand(*size, 2),
            "is_init": flag,
            "next": {
                "observation": observed[..., 1:, :],
                "reward": torch.randn(*size, 1),
                "terminated": flag.clone(),
            },
        },
        size,
    )


def calls(parts, reward, done) -> tuple[int, ...]:
    return (*(part.calls for part in parts.values()), reward.calls, done.calls)


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize(
    "hint, terms, expected",
    [
        # shift, hint, draw, reward, done
        (True, [Nothing("nothing")], (0, 0, 0, 0, 0)),
        (True, [RewardTerm(real_next=True)], (4, 4, 0, 4, 0)),
        (False, [RewardTerm(real_next=True)], (0, 0, 0, 4, 0)),
        (True, [DoneTerm(real_next=True)], (0, 0, 0, 0, 4)),
        (True, [Nothing("nothing"), DoneTerm(real_next=True)], (0, 0, 0, 0, 4)),
    ],
)
def test_what_terms_do_not_depend_on_is_not_run(names, hint, terms, expected) -> None:
    model, *parts = model_of(names, hint=hint)
    WorldModelLoss(model, losses=terms)(data(2, 4))
    assert calls(*parts) == expected


@pytest.mark.parametrize("names", NAMES)
def test_predictions_run_everything(names) -> None:
    model, *parts = model_of(names)
    model.observe(data(2, 4))
    assert all(calls(*parts))


@pytest.mark.parametrize("names", NAMES)
def test_steps_and_starts_carry_the_memory_without_predictions(names) -> None:
    model, *parts = model_of(names)
    batch = data(2, 4)
    start = model.burn_in(batch)
    assert calls(*parts)[2] == 0, "the next latent was predicted"
    latent, before = names[:2]
    seen = model.encode(batch.select("observation"))[latent]
    torch.testing.assert_close(start[before], seen[:, -1])
    observer, td = model.observer(), batch[:, 0].exclude("next")
    td["is_init"] = torch.ones(2, 1, dtype=torch.bool)
    for t in range(4):
        td.update(batch[:, t].select("observation"))
        observer(td)
        td["is_init"] = torch.zeros(2, 1, dtype=torch.bool)
        td["action"] = batch["action"][:, t]
    assert calls(*parts)[2] == 0
    torch.testing.assert_close(model.observed_memory.memory[before], seen[:, -2])


@settings(max_examples=30)
@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    length=st.integers(1, 5),
    begins=st.lists(st.integers(0, 40), max_size=4),
    names=st.sampled_from(NAMES),
    hint=st.booleans(),
)
def test_losses_and_gradients_are_those_of_a_filter_that_runs_all(
    lead, length, begins, names, hint
) -> None:
    batch = data(*(lead or [1]), length)
    flags = batch["is_init"].reshape(-1)
    for place in begins:
        flags[place % len(flags)] = True
    batch = batch.refine_names(*[None] * len(lead or [1]), "time")
    terms = [RewardTerm(real_next=True), DoneTerm(real_next=True)]
    found = []
    for every in (False, True):
        model, *_ = model_of(names, hint=hint)
        loss = WorldModelLoss(model, losses=terms)
        if every:  # all is run, and the heads' outputs are read from the corrected pass
            filter_ = model.filter
            whole = filter_.transition
            filter_._sparing = lambda heads, whole=whole: whole
        losses = loss(batch)
        losses.sum(reduce=True).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([*losses.values(), *grads])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


def test_a_replaced_component_is_noticed() -> None:
    model, *_ = model_of()
    loss = WorldModelLoss(model, losses=[RewardTerm(real_next=True)])
    before = loss(data(2, 4))["loss_reward"]
    with torch.no_grad():
        model.reward_head.module.out.weight.add_(1)
    changed = loss(data(2, 4))["loss_reward"]
    assert not torch.equal(before, changed)
    model.reward_head.module = Recurrent()
    assert not torch.equal(changed, loss(data(2, 4))["loss_reward"])
