"""Run TensorDict modules on a flat dictionary of tensors, as fast as their networks.

A ``TensorDictModule`` costs more around its network than a small network itself: it
looks entries up in nested tensordicts, checks and converts what it writes, and builds
containers. A :class:`Program` calls the networks directly where that changes nothing, and
the module itself where it might (a hook, a class with a forward of its own).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import (
    is_leaf_nontensor,
    NestedKey,
    TensorDict,
    TensorDictBase,
    unravel_key,
)
from tensordict.nn import (
    CompositeDistribution,
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from tensordict.nn.probabilistic import interaction_type
from torch import nn
from torchrl.modules import SafeProbabilisticModule

from torchrl_wm import _upstream
from torchrl_wm._upstream import has_hooks
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import as_tuple, overlap, unique
from torchrl_wm.modules.world_model.flat import FlatTensors, Placement, to_tensordict

Step = Callable[[FlatTensors, Placement], None]


class Program:
    """TensorDict modules, run one after the other on a dictionary of tensors.

    Args:
        modules: the modules, in order. Sequentials are taken apart.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._given = list(modules)
        self.modules = [leaf for module in self._given for leaf in _leaves(module)]
        #: All keys that the modules read, including those that they write for each other.
        self.reads = {key for module in self.modules for key in module.in_keys}
        #: All keys that they declare to write.
        self.writes = {key for module in self.modules for key in module.out_keys} - {
            "_"
        }
        #: The modules that the program was made for; networks are compared by identity.
        self.made_for = tuple(_signature(module) for module in self.modules)
        #: True if running it is known to be the same as calling the modules on a
        #: tensordict, as with plain modules and with the sampling of distributions,
        #: which reads and writes nothing but its keys.
        self.is_known = all(is_plain(m) or only_samples(m) for m in self.modules)
        self._steps = [_step_of(module) for module in self.modules]
        #: The modules in order, as functions for inputs like those of a call before:
        #: outputs are not checked again. One of another shape is noticed when it is stacked.
        self.trusted = [_step_of(module, trusted=True) for module in self.modules]

    @property
    def in_keys(self) -> list[NestedKey]:
        """The keys that must be there: those that modules read and none before them writes."""
        written: set[NestedKey] = set()
        read: list[NestedKey] = []
        for module in self.modules:
            read += [key for key in unique(module.in_keys) if key not in written]
            written.update(unique(module.out_keys))
        return unique(read)

    def part(self, wanted: Iterable[NestedKey]) -> Program:
        """Return the program of the modules that some outputs depend on; itself if all do.

        Args:
            wanted: keys that the modules write, or that stand above or below one of these.
        """
        needed, kept = set(wanted), []
        for module in reversed(self.modules):
            if any(overlap(key, other) for key in module.out_keys for other in needed):
                needed.update(unique(module.in_keys))
                kept.append(module)
        return self if len(kept) == len(self.modules) else Program(reversed(kept))

    def is_for(self, module: nn.Module) -> bool:
        """Return whether this is the program of ``module`` and nothing else, as it is now."""
        return [module] == self._given and self.is_current()

    def is_current(self) -> bool:
        """Return whether the modules are what they were: same networks, keys and hooks."""
        now = [leaf for module in self._given for leaf in _leaves(module)]
        if len(now) != len(self.modules):
            return False
        for leaf, module, made_for in zip(now, self.modules, self.made_for):
            if leaf is not module or _signature(leaf) != made_for:
                return False
        return True

    def __call__(self, values: FlatTensors, at: Placement) -> None:
        """Run the modules, and put what they write into ``values``.

        Args:
            values: the entries that are read, by flat key (``("next", "latent")``, not
                nested dictionaries), each ``[*B, ...]``.
            at: the batch size and device. With ``trusted``, inputs are like those of a
                call before, and outputs are not checked.
        """
        for step in self.trusted if at.trusted else self._steps:
            step(values, at)


def is_plain(module: nn.Module) -> bool:
    """Return whether a module only calls its network on its inputs and writes the outputs."""
    kind = type(module)
    return (
        isinstance(module, TensorDictModule)
        and kind.forward is TensorDictModule.forward
        and _upstream.only_calls(module, TensorDictModule)
        and module.inplace is True
        and module.method is None
        and not module.method_kwargs
        and not module.strict
        and module.out_keys == module.out_keys_source
        and not has_hooks(module)
    )


def _signature(module: nn.Module) -> tuple:
    """Return what a program depends on; a network is compared by identity."""
    network = _upstream.submodules(module).get("module", module.__dict__.get("module"))
    own = module.__dict__
    method = own.get("method"), bool(own.get("method_kwargs"))
    keys = tuple(module.in_keys), tuple(module.out_keys)
    return (type(module), has_hooks(module), id(network), *method, *keys)


def is_decomposable(module: nn.Module) -> bool:
    """Return whether a sequential only runs its modules in order."""
    if has_hooks(module) or _upstream.leaves_out_entries(module):
        return False
    if module.partial_tolerant:
        return False
    forward = type(module).forward
    if isinstance(module, ProbabilisticTensorDictSequential):
        return (
            forward is ProbabilisticTensorDictSequential.forward
            and module.inplace in (None, True)
            and not module.return_composite
            and type(module).get_dist_params
            is ProbabilisticTensorDictSequential.get_dist_params
            # The type of sampling is set for its deterministic part.
            and all(
                is_plain(leaf)
                for child in _children(module)[:-1]
                for leaf in _leaves(child)
            )
            and _upstream.draws_sample(module)
        )
    return forward is TensorDictSequential.forward and module.inplace in (None, True)


def _children(sequential: TensorDictSequential) -> list[nn.Module]:
    """Return the modules that a sequential runs, in order, whether they have names or not."""
    held = sequential.module
    return list(held.children() if isinstance(held, nn.ModuleDict) else held)


def _leaves(module: nn.Module) -> list[nn.Module]:
    """Return the modules that run in place of ``module``: itself, or those of a sequential."""
    if isinstance(module, TensorDictSequential) and is_decomposable(module):
        return [leaf for child in _children(module) for leaf in _leaves(child)]
    return [module]


def only_samples(module: nn.Module) -> bool:
    """Return whether a module only draws from a distribution by its keys."""
    return (
        type(module).forward
        in (ProbabilisticTensorDictModule.forward, SafeProbabilisticModule.forward)
        and module.num_samples is None
        and not _upstream.has_generator(module)
        and not has_hooks(module)
    )


def _writes_one_tensor(module: ProbabilisticTensorDictModule) -> bool:
    """Return whether a module that :func:`only_samples` writes its sample, one tensor, only."""
    kind, drawn = type(module), module.distribution_class
    return (
        not module.return_log_prob
        and len(module.out_keys) == 1
        and module.out_keys != ["_"]
        and list(module.in_keys) == [unravel_key(key) for key in module.in_keys]
        and isinstance(drawn, type)
        and not issubclass(drawn, CompositeDistribution)
        and kind.get_dist is ProbabilisticTensorDictModule.get_dist
        and _upstream.draws_as(module, ProbabilisticTensorDictModule)
    )


# Steps -------------------------------------------------------------------


def _step_of(module: nn.Module, trusted: bool = False) -> Step:
    """Return a module as a function of flat entries, by the shortest way that is the same."""
    if is_plain(module):
        return _direct(module, trusted)
    if not only_samples(module):
        return _through_tensordict(module)
    return _sampling(module) if _writes_one_tensor(module) else _narrowed(module)


def _direct(module: TensorDictModule, trusted: bool) -> Step:
    """Return a step that calls the network of a plain module; if trusted, without checks."""
    network = module.module
    in_keys, out_keys = list(module.in_keys), list(module.out_keys)
    single = out_keys[0] if len(out_keys) == 1 and out_keys[0] != "_" else None

    def step(values: FlatTensors, at: Placement) -> None:
        try:
            inputs = [values[key] for key in in_keys]
        except KeyError:
            inputs = [_get(values, key, at) for key in in_keys]
        try:
            out = network(*inputs)
        except Exception as err:
            missing = [key for key, value in zip(in_keys, inputs) if value is None]
            if not missing:
                raise
            raise MissingEntryError(
                f"{module} reads {missing}; there are {sorted(values, key=str)}."
            ) from err
        if single is not None and type(out) is torch.Tensor:
            if trusted or (
                out.shape[: len(at.batch_size)] == at.batch_size
                and (at.device is None or out.device == at.device)
            ):
                values[single] = out
                return
        _write(values, out, out_keys, module, at)

    return step


def _get(
    values: FlatTensors, key: NestedKey, at: Placement
) -> torch.Tensor | TensorDict | None:
    """Return what a network reads as from a tensordict: an entry, those below a key, or None."""
    if key in values:
        return values[key]
    below = _below(values, key)
    return to_tensordict(below, at).get(key) if below else None


def _below(values: FlatTensors, key: NestedKey) -> FlatTensors:
    """Return the entries below a key, which names a nested tensordict."""
    path = as_tuple(key)
    return {k: v for k, v in values.items() if as_tuple(k)[: len(path)] == path}


def _write(
    values: FlatTensors,
    out: Any,
    out_keys: Sequence[NestedKey],
    module: nn.Module,
    at: Placement,
) -> None:
    """Write outputs as a TensorDictModule does, into a dictionary."""
    if out is None:
        out = ()
    elif isinstance(out, (dict, TensorDictBase)):
        found = [out.get(key, None) for key in out_keys]
        if all(value is not None for value in found):
            out = tuple(found)
    if not isinstance(out, tuple):
        out = (out,)
    if len(out) != len(out_keys):
        raise RuntimeError(
            f"{module} returned {len(out)} outputs for the out_keys {list(out_keys)}."
        )
    for key, value in zip(out_keys, out):
        if key == "_":
            continue
        if not isinstance(value, torch.Tensor):
            value = TensorDict.from_any(value)
        if isinstance(value, TensorDictBase):
            for name, part in value.items(True, True, is_leaf=is_leaf_nontensor):
                name = unravel_key((*as_tuple(key), *as_tuple(name)))
                values[name] = _fitting(name, part, module, at)
        else:
            values[key] = _fitting(key, value, module, at)


def _fitting(
    key: NestedKey, value: Any, module: nn.Module, at: Placement
) -> torch.Tensor:
    """Return one output, checked, and on the device where it belongs."""
    if isinstance(value, (bool, int, float, np.generic, np.ndarray)):
        value = torch.as_tensor(value)
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{key!r} was written as {type(value).__name__} by {module}. World models and the "
            f"policies that act in them write tensors: leave the entry out of out_keys, or call "
            f"it '_'."
        )
    if value.shape[: len(at.batch_size)] != at.batch_size:
        raise RuntimeError(
            f"{key!r} was written with the shape {tuple(value.shape)}, which does not begin "
            f"with the batch size {tuple(at.batch_size)}, by {module}."
        )
    device = at.device
    return value if device is None or value.device == device else value.to(device)


def _through_tensordict(module: nn.Module) -> Step:
    """Return a step that shows a module all entries, and keeps whatever it writes."""

    def step(values: FlatTensors, at: Placement) -> None:
        _keep(values, module(to_tensordict(values, at)), module, at)

    return step


def _narrowed(module: ProbabilisticTensorDictModule) -> Step:
    """Return a step of a module that is known to read and write nothing but its keys."""
    in_keys = unique(module.in_keys)
    out_keys = [key for key in unique(module.out_keys) if key != "_"]

    def step(values: FlatTensors, at: Placement) -> None:
        shown: FlatTensors = {}
        for key in in_keys:
            shown.update(_below(values, key))
        _keep(values, module(to_tensordict(shown, at)).select(*out_keys), module, at)

    return step


def _keep(
    values: FlatTensors, out: TensorDictBase, module: nn.Module, at: Placement
) -> None:
    """Keep all entries of a tensordict."""
    for key, value in out.items(True, True, is_leaf=is_leaf_nontensor):
        key = unravel_key(key)
        values[key] = _fitting(key, value, module, at)


def _sampling(module: ProbabilisticTensorDictModule) -> Step:
    """Return a step that draws as the module does, without the tensordict."""
    out_keys = list(module.out_keys)

    def step(values: FlatTensors, at: Placement) -> None:
        dist = module.get_dist(values)
        mode = interaction_type()
        mode = module.default_interaction_type if mode is None else mode
        sample = None
        if mode is InteractionType.DETERMINISTIC:
            # Computed once: the module would compute it twice.
            sample = getattr(dist, "deterministic_sample", None)
        if sample is None:
            sample = _upstream.draw(module, dist, mode)
        _write(values, sample, out_keys, module, at)

    return step
