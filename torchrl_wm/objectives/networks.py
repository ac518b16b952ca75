"""The networks of a loss, and parameters in place of their own: targets, and frozen ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from operator import is_not
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.objectives import LossModule

from torchrl_wm import _upstream
from torchrl_wm.modules import WorldModel
from torchrl_wm.modules.blocks.normalizer import with_statistics
from torchrl_wm.objectives.processes import TrainedTogether
from torchrl_wm.objectives.terms import LossTerm

_OF_THE_MODEL = (*WorldModel.component_names, "initial_state")


class LossWithNetworks(TrainedTogether, LossModule):
    """A base of losses over the networks of a world model and of terms.

    The model is a submodule, the terms' modules are registered under their names, and only
    networks with target parameters have functional ones: their targets.

    Attributes:
        world_model: the model.
        terms: the terms.
        delay_encoder: whether the encoder has target parameters.
    """

    world_model: WorldModel
    terms: Sequence[LossTerm]
    delay_encoder: bool

    def __init__(self) -> None:
        super().__init__()
        #: The modules of each network that has target parameters, when these began.
        self._copied: dict[str, list[nn.Module]] = {}

    def _parts(self) -> dict[str, nn.Module]:
        """Return the model's components and the terms' own modules, by name."""
        return named_networks(self.world_model, self.terms)

    def _follow_parts(self) -> None:
        """Register the terms' modules, and begin the targets of other networks anew."""
        if torch.compiler.is_compiling():
            return  # a graph is made for the present networks
        delayed = {name for term in self.terms for name in term.delayed}
        if self.delay_encoder:
            delayed.add("encoder")
        for name, network in self._parts().items():
            standing = _upstream.submodules(self).get(name)
            if name not in _OF_THE_MODEL and standing is not network:
                setattr(self, name, network)
            if name in delayed:
                modules, before = list(network.modules()), self._copied.get(name, [])
                same = len(modules) == len(before)
                if not same or any(map(is_not, modules, before)):
                    self._begin_targets(name, network)
                    self._copied[name] = modules

    def _begin_targets(self, name: str, network: nn.Module) -> None:
        """Make target parameters for a network, as a copy of its parameters."""
        with warnings.catch_warnings():
            # The class cannot annotate modules of terms.
            warnings.filterwarnings("ignore", ".*part of the annotations")
            self.convert_to_functional(network, name, create_target_params=True)
        # Only the targets are the loss's own: the network stands in the model or in a term.
        delattr(self, f"{name}_params")
        del self.__dict__[name]

    def __getattr__(self, item: str) -> Any:
        """Return a network or its present parameters; targets follow it to its device."""
        try:
            value = super().__getattr__(item)
        except AttributeError:
            if item == "world_model" or item.startswith("target_"):
                raise
            network = self._parts().get(item.removesuffix("_params"))
            if network is None:
                raise
            if item.endswith("_params"):
                return TensorDict.from_module(network, as_module=True)
            return network
        if item.startswith("target_") and item.endswith("_params"):
            name = item.removeprefix("target_").removesuffix("_params")
            move_along(value, self._parts()[name])
        return value

    def delayed_networks(self) -> dict[str, nn.Module]:
        """Return the networks that have target parameters, by name."""
        networks = self._parts()
        return {name: networks[name] for name in self._copied}

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that are trained, by name."""
        return nn.Module.named_parameters(self, prefix, recurse, remove_duplicate)

    def reset_parameters_recursive(self) -> None:
        """Reset the parameters of all networks; targets begin as a copy of them."""
        TensorDictModuleBase.reset_parameters_recursive(self)
        for name in self._copied:
            parameters = getattr(self, f"{name}_params")
            getattr(self, f"target_{name}_params").data.update_(parameters.data)

    def target_parameters(self, name: str) -> AbstractContextManager[None]:
        """Let a network use its target parameters for a while.

        Args:
            name: ``"encoder"`` (with ``delay_encoder``), or a module of a term that
                is among its ``delayed``.
        """
        network = self._parts()[name]
        targets = getattr(self, f"target_{name}_params")
        own = TensorDict.from_module(network)
        return swapped_parameters(network, with_statistics(targets, own, network))


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
