"""The processes that train one loss together, and what they have to agree on.

Data-parallel training averages the gradients of its processes. This is the gradient of the
joined batch only if every process divides by the same number: a mean over the valid steps of
each process is not the mean over all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchrl_wm import _upstream


class Processes:
    """The processes that average their gradients. Alone, a process does not communicate.

    A term of your own that needs a statistic of the whole batch, such as a mean, takes it over
    the batches of all processes: ``loss.processes`` (:class:`LossContext`).

    Args:
        groups: the groups that they form. Several groups are the dims of one mesh.

    Examples:
        >>> import torch
        >>> from torchrl_wm.objectives import Processes
        >>> alone = Processes()
        >>> rows = torch.tensor([1.0, 2.0, 6.0])
        >>> alone.average(rows.sum()) / alone.average(torch.tensor(3.0))
        tensor(3.)
        >>> alone.gather(rows)
        tensor([1., 2., 6.])
    """

    def __init__(self, groups: Iterable[dist.ProcessGroup] = ()) -> None:
        self.groups = list(groups)

    def average(self, value: torch.Tensor) -> torch.Tensor:
        """Return the mean of a tensor over the processes, without gradient."""
        value = value.detach().clone() if self.groups else value.detach()
        for group in self.groups:
            dist.all_reduce(value, group=group)
            value /= dist.get_world_size(group)
        return value

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Return the numbers of all processes, ``[n]``; each may have any number of them."""
        values = values.detach().flatten()
        for group in self.groups:
            world = dist.get_world_size(group)
            size = torch.tensor([len(values)], device=values.device)
            sizes = [torch.empty_like(size) for _ in range(world)]
            dist.all_gather(sizes, size, group=group)
            lengths = torch.cat(sizes).tolist()
            padded = values.new_zeros(max(lengths))
            padded[: len(values)] = values
            parts = [torch.empty_like(padded) for _ in range(world)]
            dist.all_gather(parts, padded, group=group)
            values = torch.cat([part[:n] for part, n in zip(parts, lengths)])
        return values


class TrainedTogether(nn.Module):
    """A base of losses that several processes train, under DDP or ``fully_shard``.

    Attributes:
        processes: those that average the gradients of the present call: the processes of
            :class:`~torch.nn.parallel.DistributedDataParallel` while it runs the loss, or of
            one that wraps a network of the loss, and those that ``fully_shard`` shards it
            over. A loss that is called by itself, and not by its wrapper, is one process's own
            business: one may evaluate, and the others need not. All processes must call a loss
            that is sharded, or one of whose networks is wrapped by itself.
    """

    processes = Processes()
    #: The processes that the parameters are sharded over.
    _shards = Processes()
    _shows_losses = False

    def delayed_networks(self) -> dict[str, nn.Module]:
        """Return the networks that have target parameters, by name."""
        return {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _is_initialized():
            return super().__call__(*args, **kwargs)
        self._look_for_shards()
        wrapper = _upstream.running_ddp()
        if wrapper is None:  # a network of the loss may be wrapped by itself
            wrapper = next(_of(self, DistributedDataParallel), None)
        elif not torch.compiler.is_compiling():
            self._check_wrapper(wrapper)
        self.processes = (
            self._shards if wrapper is None else Processes([wrapper.process_group])
        )
        try:
            out = super().__call__(*args, **kwargs)
        finally:
            self.processes = Processes()
        return _hidden(out) if self._shows_losses else out

    def _check_wrapper(self, wrapper: DistributedDataParallel) -> None:
        """Raise an error if DDP looks for losses where it cannot see them."""
        if wrapper.module is self and wrapper.find_unused_parameters:
            raise ValueError(
                "DistributedDataParallel(find_unused_parameters=True) does not look for losses "
                "in tensordicts. Leave the argument out, and freeze what no loss trains, such as "
                "world_model.decoder.requires_grad_(False)."
            )

    def _look_for_shards(self) -> None:
        """Find the processes that parameters are sharded over.

        Raises:
            ValueError: for a module whose gradients ``fully_shard`` would not find, and for a
                sharded network that has target parameters.
        """
        kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
        sharded = [] if kind is None else list(_of(self, kind))
        if not sharded:
            return
        self._check_shards(sharded)
        for parameter in self.parameters():
            # They may be whole, in a pass or after one that had no backward.
            mesh = getattr(parameter, "device_mesh", None)
            if mesh is not None:
                self._shards = Processes(map(mesh.get_group, range(mesh.ndim)))
                break
        if self in sharded and not self._shows_losses:
            # fully_shard looks for losses in dictionaries, and not in tensordicts.
            self.register_forward_hook(_shown, prepend=True)
            self._shows_losses = True

    def _check_shards(self, sharded: list[nn.Module]) -> None:
        """Raise an error if nothing, or the wrong network, would be trained."""
        names = {module: name for name, module in self.named_modules()}
        for module in sharded:
            if module is not self and isinstance(module, TensorDictModuleBase):
                raise ValueError(
                    f"{names[module]} is sharded by itself and returns a tensordict, in which "
                    f"fully_shard finds no gradients: it would not be trained. Shard the loss as "
                    f"a whole, fully_shard(loss), or networks that return tensors, such as "
                    f"fully_shard(world_model.dynamics.module), and make the optimizer after that."
                )
        for name, network in self.delayed_networks().items():
            if self in sharded or any(part in sharded for part in network.modules()):
                raise ValueError(
                    f"{name} has target parameters, target_{name}_params, and they would not "
                    f"follow its shards. Shard networks without targets, such as "
                    f"fully_shard(world_model.dynamics.module), or train with "
                    f"DistributedDataParallel(loss), which keeps all parameters whole."
                )


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _of(module: nn.Module, kind: type) -> Iterator[Any]:
    """Yield the modules of a kind in a module, itself included."""
    return (part for part in module.modules() if isinstance(part, kind))


def _shown(module: nn.Module, args: Any, out: Any) -> Any:
    """Return losses as a dictionary."""
    return dict(out.items()) if isinstance(out, TensorDictBase) else out


def _hidden(out: Any) -> Any:
    """Return losses that are a dictionary as a tensordict."""
    if not isinstance(out, dict):
        return out
    size = next(iter(out.values())).shape  # a scalar, or one number per sample
    return TensorDict(out, batch_size=size)
