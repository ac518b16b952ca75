"""Two processes that train one loss together, and their cases.

``outcomes()`` starts one pair of processes for all cases and returns what they found. Each case
compares the gradient under DDP or ``fully_shard`` with that of one process over the joined batch.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _models import SpecEnv
from _small_models import MAKE
from tensordict import TensorDict
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torchrl.objectives import SoftUpdate

from torchrl_wm import WorldModelLoss
from torchrl_wm.models import make_tdmpc2_policy, make_tdmpc2_q_ensemble, TDMPC2Config
from torchrl_wm.modules import fit_normalizers
from torchrl_wm.objectives import PolicyPriorLoss, ValueTerm

WORLD = 2
NESTED = {
    "observation_key": ("agent", "seen"),
    "action_key": ("agent", "act"),
    "reward_key": ("agent", "reward"),
}
CASES: dict[str, Callable[[int], object]] = {}


def case(function: Callable[[int], object]) -> Callable[[int], object]:
    """Add what each process does, by its rank; it returns what the test looks at."""
    CASES[function.__name__] = function
    return function


def outcomes() -> list[dict[str, object]]:
    """Run all cases in two processes, and return what they returned, by rank and case."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, (folder,), nprocs=WORLD)
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=True)
            for rank in range(WORLD)
        ]


def _run(rank: int, folder: str) -> None:
    """Run the cases in one process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=300),
    )
    found = {}
    for name, function in CASES.items():
        torch.manual_seed(0)
        found[name] = function(rank)
        dist.barrier()
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


# Batches -----------------------------------------------------------------------------------


def batch_of(env: SpecEnv, *size: int) -> TensorDict:
    """Random transitions without an end, the same in both processes."""
    torch.manual_seed(1)
    batch = env.fake_tensordict().expand(size).clone()
    return batch.apply(
        lambda x: torch.randn_like(x) if x.is_floating_point() else torch.zeros_like(x)
    )


def masked(batch: TensorDict, lengths: list[int]) -> TensorDict:
    """Sequences of which only the first steps count; the others hold NaN."""
    valid = torch.arange(batch.shape[-1]) < torch.tensor(lengths).unsqueeze(-1)
    rows = batch.apply(
        lambda x: x.masked_fill(~valid.unsqueeze(-1), torch.nan)
        if x.is_floating_point()
        else x
    )
    return rows.set(("collector", "mask"), valid)


# Gradients ---------------------------------------------------------------------------------


def gradients(loss: nn.Module) -> torch.Tensor:
    """The gradients of a loss's parameters side by side; shards are put together."""
    rows = []
    for parameter in loss.parameters():
        grad = parameter.grad
        grad = torch.zeros_like(parameter) if grad is None else grad
        rows.append(grad.full_tensor() if hasattr(grad, "full_tensor") else grad)
        parameter.grad = None
    return torch.cat([row.flatten() for row in rows])


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance, relative to what is expected."""
    return ((value - expected).norm() / expected.norm()).item()


def compare(
    rank: int,
    make: Callable[[], WorldModelLoss],
    batch: TensorDict,
    wrap: Callable[[nn.Module], nn.Module] = DDP,
    first: int | None = None,
    noise: Callable | None = None,
) -> dict[str, float]:
    """Gradients and losses of two processes beside those of one.

    Args:
        rank: the process.
        make: makes the loss.
        batch: the joined batch; the first process has the first half or ``first`` rows.
        wrap: lets processes train together.
        first: the rows of the first process.
        noise: the context in which random numbers are drawn.
    """
    first = len(batch) // 2 if first is None else first
    part = batch[:first] if rank == 0 else batch[first:]
    with (noise or quiet)():
        loss = make()
        total = loss(batch).sum(reduce=True)
        total.backward()
        expected = gradients(loss)
        # What each process finds by itself, and the average of that.
        loss(part).sum(reduce=True).backward()
        alone = gradients(loss)
        dist.all_reduce(alone)
        joined = make()
        called = wrap(joined)  # DDP has to outlive the backward
        own = called(part).sum(reduce=True)
        own.backward()
        own = own.detach()
        dist.all_reduce(own)
        found = gradients(joined)
    return {
        "gradient": error(found, expected),
        "loss": error(own / WORLD, total.detach()),
        "alone": error(alone / WORLD, expected),
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Let random numbers be their median: a draw would be another one in each process."""
    kept = torch.randn_like, torch.rand, torch.Tensor.normal_
    torch.randn_like = torch.zeros_like
    torch.rand = lambda *size, **to: kept[1](*size, **to).fill_(0.5)
    torch.Tensor.normal_ = lambda self, *_, **__: self.zero_()
    try:
        yield
    finally:
        torch.randn_like, torch.rand, torch.Tensor.normal_ = kept


def sharded(loss: nn.Module) -> nn.Module:
    """Shard a loss as a whole."""
    return fully_shard(loss)


def maker(name: str, env: SpecEnv, **settings) -> Callable[[], WorldModelLoss]:
    """Make the same small model each time."""

    def make() -> WorldModelLoss:
        torch.manual_seed(2)
        world_model, loss = MAKE[name](env, **settings)
        fit_normalizers(world_model, batch_of(env, 64))
        return loss

    return make


# Cases -------------------------------------------------------------------------------------


@case
def mlp(rank: int) -> object:
    env = SpecEnv()
    return compare(rank, maker("mlp", env), batch_of(env, 16))


@case
def rows_of_different_number(rank: int) -> object:
    env = SpecEnv()
    return compare(rank, maker("mlp", env), batch_of(env, 16), first=13)


@case
def masks_and_nested_keys(rank: int) -> object:
    env = SpecEnv(**NESTED)
    batch = masked(batch_of(env, 4, 6), [6, 5, 2, 1])
    return compare(rank, maker("mlp", env), batch)


@case
def a_mask_in_one_process(rank: int) -> object:
    env = SpecEnv()
    batch = masked(batch_of(env, 4, 6), [6, 6, 2, 1])
    make = maker("mlp", env)

    def wrap(loss: nn.Module) -> Callable:
        # A sampler adds the mask where there is padding.
        ddp = DDP(loss)
        return lambda part: ddp(part.exclude("collector") if rank == 0 else part)

    return compare(rank, make, batch, wrap)


@case
def nothing_valid_in_one_process(rank: int) -> object:
    env = SpecEnv()
    batch = masked(batch_of(env, 4, 6), [6, 3, 0, 0])
    return compare(rank, maker("mlp", env), batch)


@case
def nothing_valid_at_all(rank: int) -> object:
    env = SpecEnv()
    loss = maker("mlp", env)()
    total = DDP(loss)(masked(batch_of(env, 2, 6), [0, 0])).sum(reduce=True)
    total.backward()
    return total.item(), gradients(loss).abs().max().item()


@case
def open_loop(rank: int) -> object:
    env = SpecEnv(**NESTED)
    batch = masked(batch_of(env, 4, 6), [6, 5, 2, 1])
    return compare(rank, maker("mlp", env, multi_step=True, decay=0.7), batch)


@contextmanager
def same_directions() -> Iterator[None]:
    """Let SIGReg draw the same directions in each call, and so in each process."""
    kept = torch.randn

    def drawn(*size, **to):
        generator = torch.Generator().manual_seed(3)
        return kept(*size, **to, generator=generator)

    torch.randn = drawn
    try:
        yield
    finally:
        torch.randn = kept


def joint_embedding(**settings) -> Callable[[int], object]:
    def run(rank: int) -> object:
        env = SpecEnv(**NESTED)
        batch = masked(batch_of(env, 4, 6), [6, 5, 2, 1])
        make = maker("jepa", env, regularizer_weight=1.0, **settings)
        return compare(rank, make, batch, noise=same_directions)

    return run


CASES["sigreg"] = joint_embedding()
CASES["sigreg_open_loop"] = joint_embedding(multi_step=True)
CASES["vicreg"] = joint_embedding(regularizer="vicreg")


@case
def directions_are_shared(rank: int) -> object:
    """Seeds differ, and each process finds the statistic of the joined batch."""
    env = SpecEnv()
    loss = maker("jepa", env, reward=False, termination="none", probe=False)()
    torch.manual_seed(rank)
    ddp = DDP(loss)  # it has to outlive the backward
    return ddp(batch_of(env, 16))["loss_sigreg"].item()


def weighted(*names: str) -> Callable[[int], object]:
    def run(rank: int) -> object:
        env = SpecEnv(**NESTED)
        batch = masked(batch_of(env, 4, 6), [6, 5, 2, 6])
        make = maker("mlp", env)
        for name in names:
            batch[("replay", name)] = torch.rand(4, 6) * (1 + torch.arange(4)[:, None])

        def with_keys() -> WorldModelLoss:
            loss = make()
            loss.set_keys(**{name: ("replay", name) for name in names})
            return loss

        return compare(rank, with_keys, batch)

    return run


CASES["priority_weights"] = weighted("priority_weight")
CASES["two_weights"] = weighted("weight", "priority_weight")


@case
def ensemble(rank: int) -> object:
    env = SpecEnv()
    return compare(rank, maker("ensemble", env), batch_of(env, 16))


@case
def ensemble_weighted_by_variance(rank: int) -> object:
    env = SpecEnv(**NESTED)
    make = maker("ensemble", env, beta=0.5)

    def spread() -> WorldModelLoss:
        loss = make()
        network = loss.world_model.dynamics
        for parameter in network.parameters():
            parameter.data.add_(torch.randn(parameter.shape), alpha=0.3)
        return loss

    return compare(rank, spread, masked(batch_of(env, 4, 6), [6, 5, 2, 1]))


@case
def recurrent_gaussian(rank: int) -> object:
    env = SpecEnv()
    batch = masked(batch_of(env, 4, 5), [5, 4, 2, 1])
    return compare(rank, maker("planet", env, kl_weight=2.0, free_nats=0.0), batch)


@case
def recurrent_categorical_and_nested_keys(rank: int) -> object:
    env = SpecEnv(**NESTED)
    batch = masked(batch_of(env, 4, 5), [5, 4, 2, 1])
    return compare(rank, maker("dreamer-v3", env, free_nats=0.0), batch)


def two_losses(env: SpecEnv) -> tuple[WorldModelLoss, PolicyPriorLoss, SoftUpdate]:
    """TD-MPC2 as a whole, its values no longer zero."""
    settings = {"latent_size": 16, "num_cells": 8, "q_dropout": 0.0}
    config = TDMPC2Config(encoder_cells=8, **settings)
    loss = maker("tdmpc2", env)()
    policy, q = make_tdmpc2_policy(env, config), make_tdmpc2_q_ensemble(env, config)
    for parameter in q.parameters():
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.5)
    value = ValueTerm(q, policy, subset=None)
    keys = loss.tensor_keys
    loss = WorldModelLoss(
        loss.world_model,
        losses=[*loss.terms, value],
        multi_step=True,
        decay=0.5,
        delay_encoder=True,
        return_latents=True,
    )
    loss.set_keys(reward=keys.reward, done=keys.done, terminated=keys.terminated)
    policy_loss = PolicyPriorLoss(policy, q, subset=None)
    return loss, policy_loss, SoftUpdate(loss, tau=0.3)


def updates(
    call: Callable[[nn.Module], nn.Module], env: SpecEnv, batch: TensorDict
) -> dict[str, torch.Tensor]:
    """Three updates of TD-MPC2; all that they change."""
    torch.manual_seed(2)
    loss, policy_loss, target = two_losses(env)
    before = nn.utils.parameters_to_vector(loss.parameters()).detach().clone()
    called, policy_called = call(loss), call(policy_loss)
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.03) for x in (loss, policy_loss)]
    with quiet():
        for _ in range(3):
            losses = called(batch)
            latents = losses.pop("latents")
            losses.sum(reduce=True).backward()
            policy_called(latents)["loss_policy"].backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            target.step()
    after = nn.utils.parameters_to_vector(loss.parameters()).detach()
    return {
        "parameters": after - before,
        "policy": nn.utils.parameters_to_vector(policy_loss.parameters()).detach(),
        "targets": torch.cat(
            [
                x.flatten()
                for name in ("encoder", "q_ensemble")
                for x in getattr(loss, f"target_{name}_params").values(True, True)
            ]
        ),
        "scale": policy_loss.scale.value,
    }


def tdmpc2(**keys) -> Callable[[int], object]:
    def run(rank: int) -> object:
        env = SpecEnv(**keys)
        batch = masked(batch_of(env, 5, 3), [3, 3, 1, 2, 3])
        expected = updates(lambda x: x, env, batch)
        found = updates(DDP, env, batch[:3] if rank == 0 else batch[3:])
        return {name: error(found[name], expected[name]) for name in expected}

    return run


CASES["tdmpc2_updates"] = tdmpc2()
CASES["tdmpc2_updates_with_nested_keys"] = tdmpc2(**NESTED)


@case
def one_process_evaluates(rank: int) -> object:
    env = SpecEnv()
    make = maker("mlp", env)
    ddp = DDP(make())
    batch = masked(batch_of(env, 2, 6), [6, 1])
    values = []
    if rank == 0:
        values = [m(batch).sum(reduce=True).item() for m in (make(), ddp.module)]
    return values


@case
def a_wrapped_network(rank: int) -> object:
    env = SpecEnv()

    def wrap(loss: nn.Module) -> nn.Module:
        for component in loss.world_model.components.values():
            component.module = DDP(component.module)
        return loss

    batch = masked(batch_of(env, 4, 6), [6, 5, 2, 1])
    return compare(rank, maker("mlp", env, normalize=False), batch, wrap)


@case
def compiled(rank: int) -> object:
    env = SpecEnv()

    def wrap(loss: nn.Module) -> nn.Module:
        return DDP(torch.compile(loss, backend="eager", fullgraph=True))

    batch = masked(batch_of(env, 4, 6), [6, 5, 2, 1])
    return compare(rank, maker("mlp", env), batch, wrap, noise=nullcontext)


def without_decoder(env: SpecEnv) -> WorldModelLoss:
    """A loss in which a part of the model has no share."""
    model = maker("mlp", env)().world_model
    return WorldModelLoss(model, losses=["reward", "latent"])


@case
def unused_parameters(rank: int) -> object:
    env = SpecEnv()
    ddp = DDP(without_decoder(env), find_unused_parameters=True)
    try:
        ddp(batch_of(env, 4))
    except ValueError as err:
        return str(err)


@case
def frozen_parts(rank: int) -> object:
    env = SpecEnv()

    def make() -> WorldModelLoss:
        loss = without_decoder(env)
        for name in ("decoder", "done_head"):
            getattr(loss.world_model, name).requires_grad_(False)
        return loss

    return compare(rank, make, batch_of(env, 16))


# Shards ------------------------------------------------------------------------------------


def shards_of(name: str, **settings) -> Callable[[int], object]:
    def run(rank: int) -> object:
        env = SpecEnv(**NESTED)
        batch = masked(batch_of(env, 4, 5), [5, 4, 2, 1])
        return compare(rank, maker(name, env, **settings), batch, sharded)

    return run


for _name in ("mlp", "ensemble", "planet", "dreamer-v3", "tdmpc2"):
    CASES[f"shards_{_name}"] = shards_of(_name)


@case
def shards_of_networks(rank: int) -> object:
    env = SpecEnv()

    def wrap(loss: nn.Module) -> nn.Module:
        for component in loss.world_model.components.values():
            fully_shard(component.module)
        return fully_shard(loss)

    batch = masked(batch_of(env, 4, 5), [5, 4, 2, 1])
    return compare(rank, maker("mlp", env), batch, wrap)


@case
def shards_return_what_the_loss_returns(rank: int) -> object:
    env = SpecEnv()
    batch = batch_of(env, 4, 5)
    found = []
    for reduction in ("mean", "none"):
        whole, loss = maker("mlp", env)(), fully_shard(maker("mlp", env)())
        for x in (whole, loss):
            x.return_latents, x.reduction = True, reduction
        expected, out = whole(batch), loss(batch)
        found.append(
            type(out) is type(expected)
            and out.batch_size == expected.batch_size
            and out["latents"].batch_size == expected["latents"].batch_size
            and bool(torch.allclose(out["loss_latent"], expected["loss_latent"]))
        )
    return found


@case
def shards_learn(rank: int) -> object:
    """Steps of an optimizer that was made before the first call."""
    env = SpecEnv()
    loss = fully_shard(maker("mlp", env)())
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    batch, totals = batch_of(env, 8), []
    for _ in range(20):
        total = loss(batch).sum(reduce=True)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        totals.append(total.item())
    return totals[0], totals[-1]


@case
def shards_that_would_not_learn(rank: int) -> object:
    """The message of each way that fully_shard would leave untrained, or train wrongly."""
    env, found = SpecEnv(), {}

    def component(loss: nn.Module) -> nn.Module:
        fully_shard(loss.world_model.dynamics)
        return loss

    def components(loss: nn.Module) -> nn.Module:
        for part in loss.world_model.components.values():
            fully_shard(part)
        return fully_shard(loss)

    def model(loss: nn.Module) -> nn.Module:
        fully_shard(loss.world_model)
        return loss

    def targets(loss: nn.Module) -> nn.Module:
        return fully_shard(WorldModelLoss(loss.world_model, delay_encoder=True))

    def policy(loss: nn.Module) -> nn.Module:
        _, policy_loss, _ = two_losses(env)
        fully_shard(policy_loss.policy)
        return policy_loss

    for way in (component, components, model, targets, policy):
        try:
            way(maker("mlp", env)())(batch_of(env, 8))
        except ValueError as err:
            found[way.__name__] = str(err)
    return found
