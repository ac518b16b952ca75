"""The networks of a loss, and parameters in place of their own: targets, and frozen ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tensordict import TensorDict, TensorDictBase
from torch import nn

from torchrl_wm.modules import WorldModel
from torchrl_wm.objectives.terms import LossTerm


def named_networks(
    world_model: WorldModel, terms: Iterable[LossTerm]
) -> dict[str, nn.Module]:
    """Return the components of a model and the modules of terms, by name.

    Raises:
        ValueError: if two modules have one name.
    """
    networks = dict(world_model.components)
    if world_model.initial_state is not None:
        networks["initial_state"] = world_model.initial_state
    for term in terms:
        for name, module in term.modules().items():
            if networks.setdefault(name, module) is not module:
                raise ValueError(
                    f"The loss {term.name!r} calls a module of its own {name!r}, and there "
                    f"is another one of that name. Give it another name in modules()."
                )
    return networks


@contextmanager
def swapped_parameters(
    network: nn.Module, parameters: TensorDictBase
) -> Iterator[None]:
    """Let a network use other parameters for a while.

    Args:
        network: the network.
        parameters: the parameters and buffers in place of its own, in the form of
            :meth:`tensordict.TensorDict.from_module`.
    """
    own = TensorDict.from_module(network)
    try:
        with parameters.to_module(network, preserve_module_state=False):
            yield
    except Exception:
        # tensordict leaves the other parameters in a module that raised.
        own.to_module(network, preserve_module_state=False)
        raise


def move_along(targets: TensorDictBase, network: nn.Module) -> None:
    """Move target parameters to the device and dtype of their network."""
    for name, source in network.named_parameters():
        target = targets.get(tuple(name.split(".")), None)
        if target is None or not source.is_floating_point():
            continue
        if (target.device, target.dtype) != (source.device, source.dtype):
            # As a module: TensorDictParams.to makes another one.
            nn.Module.to(targets, source.device, source.dtype)
        return
