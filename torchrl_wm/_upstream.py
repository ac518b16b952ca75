"""Every private name of TorchRL, tensordict, torch and Gymnasium that the package uses.

No other file may use one (``test/test_upstream.py``). The next release of these packages may
rename any of them. Where a slower, public way gives the same result, that way is taken then.
Elsewhere an :class:`UpstreamError` names the installed version and the one to install.
:data:`NAMES` lists the names, why they are needed, and what happens without them.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import nn


class Private(NamedTuple):
    """A private name of another package.

    Attributes:
        place: ``"module:name"``, or ``"module:Class.name"`` for what instances of a class have.
        why: what the package needs it for.
        without: what happens in a version that does not have it.
    """

    place: str
    why: str
    without: str


_SLOW = "module calls go through a tensordict: slower, the same result"
_LOOP = "WorldModelEnv.rollout takes TorchRL's own loop: slower, the same result"
_STEP = "the fast rollout does in one go what this method does at each step"

#: The names that the package reads or calls.
NAMES = (
    Private(
        "tensordict.nn:TensorDictModule._call_module",
        "tells a module that only calls its network from one that does more",
        _SLOW,
    ),
    Private(
        "tensordict.nn:TensorDictModule._write_to_tensordict", "as _call_module", _SLOW
    ),
    Private(
        "tensordict.nn:TensorDictModule._kwargs",
        "a network that gets its inputs by keyword cannot be called directly",
        _SLOW,
    ),
    Private("tensordict.nn:TensorDictModule._get_kwargs", "as _kwargs", _SLOW),
    Private(
        "tensordict.nn:TensorDictSequential._select_before_return",
        "a sequential that leaves out entries cannot be taken apart",
        _SLOW,
    ),
    Private(
        "tensordict.nn:ProbabilisticTensorDictSequential._requires_sample",
        "a sequential that draws no sample cannot be taken apart",
        _SLOW,
    ),
    Private(
        "tensordict.nn:ProbabilisticTensorDictModule._generator",
        "a module with random numbers of its own has to draw by itself",
        _SLOW,
    ),
    Private(
        "tensordict.nn:ProbabilisticTensorDictModule._generator_key",
        "as _generator",
        _SLOW,
    ),
    Private(
        "tensordict.nn:ProbabilisticTensorDictModule._dist_sample",
        "draws a sample without a tensordict",
        _SLOW,
    ),
    Private(
        "tensordict:TensorDict._new_unsafe",
        "builds tensordicts from entries whose shapes are known to fit",
        "TensorDict(...) checks them again",
    ),
    Private(
        "torch.nn:Module._forward_hooks",
        "calling a network directly would leave out its module's hooks",
        _SLOW,
    ),
    Private("torch.nn:Module._forward_pre_hooks", "as _forward_hooks", _SLOW),
    Private("torch.nn:Module._backward_hooks", "as _forward_hooks", _SLOW),
    Private("torch.nn:Module._backward_pre_hooks", "as _forward_hooks", _SLOW),
    Private("torch.nn.modules.module:_has_any_global_hook", "as _forward_hooks", _SLOW),
    Private(
        "torch.nn:Module._modules",
        "looks up submodules at every step, without a search",
        "named_children() finds them",
    ),
    Private(
        "torch._C:_set_grad_enabled",
        "switches gradients off and on at every step of an exported env",
        "torch.set_grad_enabled does so",
    ),
    Private(
        "torch._C:_are_functorch_transforms_active",
        "torch.func cannot look into activations that have a backward of their own",
        "torch's own activations are called: slower, the same result",
    ),
    Private(
        "torch._C._functorch:is_legacy_batchedtensor",
        "gradients of several weights at once cannot be written over a tensor of one",
        "they are multiplied into a new one: slower, the same result",
    ),
    Private(
        "torch._dynamo.exc:BackendCompilerFailed",
        "tells a machine without a compiler, where things stay eager with a warning",
        "the compiler's error is raised as it is",
    ),
    Private(
        "torch._dynamo.exc:TorchDynamoException",
        "errors of inputs and networks are raised as they would be without the compiler",
        "the compiler's error is raised as it is",
    ),
    Private(
        "torch.nn.parallel:DistributedDataParallel._active_ddp_module",
        "a loss divides by the steps of all processes while DistributedDataParallel runs it",
        "an error where several processes are joined",
    ),
    Private(
        "torchrl.modules.tensordict_module.rnn:_scan",
        "compile_rollout(scope='scan') makes all steps one graph",
        "compile_rollout warns, and compiles one step: the same result",
    ),
    Private(
        "torchrl.modules.tensordict_module.rnn:_maybe_warm_scan_backward",
        "checks the gradients of scans once, outside of graphs",
        "as without _scan",
    ),
    Private(
        "torchrl.envs.utils:_make_compatible_policy",
        "a policy that reads and returns tensors is wrapped as TorchRL's rollout wraps it",
        f"{_LOOP}; imagine raises an error for such policies",
    ),
    Private("torchrl.envs:EnvBase._step_proc_data", _STEP, _LOOP),
    Private(
        "torchrl.envs:EnvBase._post_step_mdp_hooks",
        "an env may change what the policy reads next",
        f"{_LOOP}; a policy of a run that is used without the env raises an error",
    ),
    Private(
        "torchrl.envs:EnvBase._compiled_step_and_maybe_reset",
        "what was compiled cannot be pickled with the env",
        "nothing is left out of the pickle",
    ),
    Private(
        "torchrl.envs:EnvBase._collector",
        "collectors leave a reference in envs that cannot be pickled",
        "nothing is left out of the pickle",
    ),
    Private(
        "torchrl.envs.libs.gym:GymWrapper._env",
        "the env that a TorchRL env wraps: what it shows, its spaces",
        "an error",
    ),
    Private(
        "torchrl.modules:TanhNormal._t",
        "SquashedNormal makes the transform without a look at values, which waits for the GPU",
        "SAC takes TanhNormal: slower on a GPU, the same result",
    ),
    Private("torchrl.modules:TanhNormal._event_dims", "as _t", "as without _t"),
    Private(
        "torchrl.data:RoundRobinWriter._cursor",
        "where a replay buffer writes next: the order of its steps, and its checkpoint",
        "an error",
    ),
    Private(
        "torchrl.data:RoundRobinWriter._write_count",
        "the key in a writer's state under which it counts",
        "an error",
    ),
    Private(
        "torchrl.trainers:Trainer._post_optim_hook",
        "runs the hooks that were registered under 'post_optim'",
        "an error",
    ),
    Private(
        "torchrl.trainers:Trainer._modules",
        "a part that is registered again takes the place of the one before",
        "an error",
    ),
)

#: The names that the package defines in subclasses, beside the methods documented for that.
REPLACED = (
    Private(
        "torchrl.envs:EnvBase._reset_proc_data",
        "a reset does not write to the start that it is given, and resets what agents share",
        "an error",
    ),
    Private(
        "torchrl.envs:EnvBase._supports_set_state",
        "says that a start state is honoured",
        "an error",
    ),
    Private(
        "torchrl.envs:EnvBase._resolve_set_state",
        "keeps a start state what it is without set_state=True, without a warning",
        "set_state=True has to be given where TorchRL asks for it",
    ),
    Private(
        "torchrl.envs:EnvBase._assert_tensordict_shape",
        "explains a start of another batch size",
        "TorchRL's own error",
    ),
    Private(
        "torchrl.envs:Transform._reset_env_preprocess",
        "seeds an env right before its reset",
        "an error",
    ),
    Private(
        "torch.nn:Module._apply",
        "what depends on a module follows it to another device or dtype",
        "an error",
    ),
    Private(
        "torch.nn:Module._load_from_state_dict",
        "a normaliser knows without a look at its tensors that it is fitted",
        "an error",
    ),
)

#: The methods of an env whose work the fast rollout does. It leaves an env to TorchRL's loop
#: if the env replaces one of them.
STEP_METHODS = ("_reset_proc_data", "_step_proc_data", "_assert_tensordict_shape")
#: The entries of an env's ``__dict__`` that no pickle takes.
COMPILED_STEP = "_compiled_step_and_maybe_reset"
COLLECTOR = "_collector"
#: The function that wraps policies, for the error if it is missing.
POLICY_WRAPPER = "torchrl.envs.utils:_make_compatible_policy"
_STEP_NAMES = (*STEP_METHODS, "_post_step_mdp_hooks")


class UpstreamError(RuntimeError):
    """The installed version of a package lacks what this one needs of it."""


def missing(place: str) -> UpstreamError:
    """Return the error for a name of :data:`NAMES` or :data:`REPLACED` that is not there."""
    why = next(entry.why for entry in (*NAMES, *REPLACED) if entry.place == place)
    package, name = place.split(".")[0].split(":")[0], place.partition(":")[2]
    asked = [r for r in _requirements() if re.match(rf"{package}\b(?!-)", r)]
    known = asked[0].split(";")[0].strip() if asked else package
    return UpstreamError(
        f"{package} {metadata.version(package)} has no {name}. torchrl_wm needs it: {why}. "
        f"Install a version that it was tested with, pip install '{known}', or a newer torchrl-wm."
    )


def _requirements() -> list[str]:
    try:
        return metadata.requires("torchrl-wm") or []
    except metadata.PackageNotFoundError:  # run from its sources
        return []


def _find(module: str, name: str) -> Any | None:
    """Return what a module has under a name; None if there is no such module or name."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def check_replaced(owner: type) -> None:
    """Raise an error if ``owner`` lacks a method in whose place the package puts its own.

    Raises:
        UpstreamError: if nobody would call the package's method.
    """
    for place, _, without in REPLACED:
        kind, _, name = place.partition(":")[2].partition(".")
        if kind == owner.__name__ and without == "an error":
            if not hasattr(owner, name):
                raise missing(place)


# Modules ---------------------------------------------------------------------------------


def has_hooks(module: nn.Module) -> bool:
    """Return whether calling ``module`` runs more than its forward."""
    try:
        return bool(
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or nn.modules.module._has_any_global_hook()
        )
    except AttributeError:
        return True


def only_calls(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a TensorDictModule calls its network, and writes, as ``kind`` does."""
    own = type(module)
    try:
        return (
            own._call_module is kind._call_module
            and own._write_to_tensordict is kind._write_to_tensordict
            and module._kwargs is None
            and not module._get_kwargs
        )
    except AttributeError:
        return False


def leaves_out_entries(sequential: nn.Module) -> bool:
    """Return whether a TensorDictSequential may write less than its modules do."""
    return bool(getattr(sequential, "_select_before_return", True))


def draws_sample(sequential: nn.Module) -> bool:
    """Return whether a probabilistic sequential is known to draw a sample."""
    return bool(getattr(sequential, "_requires_sample", False))


def has_generator(module: nn.Module) -> bool:
    """Return whether a probabilistic module may have random numbers of its own."""
    try:
        return module._generator is not None or module._generator_key is not None
    except AttributeError:
        return True


def draws_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a probabilistic module draws as ``kind`` does, and :func:`draw` can."""
    try:
        return type(module)._dist_sample is kind._dist_sample
    except AttributeError:
        return False


def draw(module: nn.Module, dist: Any, interaction_type: Any) -> Any:
    """Draw from ``dist`` as a probabilistic module does, if :func:`draws_as` returns True for it."""
    return module._dist_sample(dist, interaction_type=interaction_type)


def submodules(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """Return the modules that are registered in a module, by name."""
    try:
        return module._modules
    except AttributeError:
        return dict(module.named_children())


def new_tensordict(
    source: dict[str, Any],
    batch_size: torch.Size,
    device: torch.device | None,
    names: list[str | None] | None,
) -> TensorDict:
    """Return a tensordict of entries whose shapes and devices are known to fit."""
    try:
        make = TensorDict._new_unsafe
    except AttributeError:
        make = TensorDict
    return make(source, batch_size=batch_size, device=device, names=names)


# torch -----------------------------------------------------------------------------------


def grad_setter() -> Callable[[bool], Any]:
    """Return the fastest function that switches gradients on or off."""
    return _find("torch._C", "_set_grad_enabled") or torch.set_grad_enabled


def is_transformed() -> bool:
    """Return whether torch.func transforms the present call, or may do so."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return True if active is None else active()


def is_batched(tensor: torch.Tensor) -> bool:
    """Return whether a gradient is a batch of several (``is_grads_batched``), or may be one."""
    functions = getattr(torch._C, "_functorch", None)
    batched = getattr(functions, "is_legacy_batchedtensor", None)
    return True if batched is None else batched(tensor)


def running_ddp() -> nn.Module | None:
    """Return the DistributedDataParallel whose forward runs now; None outside of one.

    Raises:
        UpstreamError: if torch does not say.
    """
    kind = nn.parallel.DistributedDataParallel
    try:
        return kind._active_ddp_module
    except AttributeError:
        raise missing(
            "torch.nn.parallel:DistributedDataParallel._active_ddp_module"
        ) from None


def backend_errors() -> tuple[type[Exception], ...]:
    """Return the errors that say that nothing can be compiled here, for ``except``."""
    found = _find("torch._dynamo.exc", "BackendCompilerFailed")
    return () if found is None else (found,)


def tracing_errors() -> tuple[type[Exception], ...]:
    """Return the errors of what ``torch.compile`` makes of a call, for ``except``."""
    found = _find("torch._dynamo.exc", "TorchDynamoException")
    return () if found is None else (found,)


def scan_functions() -> tuple[Callable, Callable] | None:
    """Return TorchRL's scan, and what checks its gradients on a device; None without them."""
    module = "torchrl.modules.tensordict_module.rnn"
    found = _find(module, "_scan"), _find(module, "_maybe_warm_scan_backward")
    return None if None in found else found


# Envs ------------------------------------------------------------------------------------


def unknown_step(kind: type) -> str | None:
    """Return a part of an env's step that TorchRL has no more; None if all are there."""
    return next((name for name in _STEP_NAMES if not hasattr(kind, name)), None)


def has_step_hooks(env: Any) -> bool:
    """Return whether something happens between two steps of an env, or may."""
    return getattr(env, "_post_step_mdp_hooks", True) is not None


def following_root(env: Any, step: Any) -> Any:
    """Return what a policy reads after a step, as TorchRL's rollout makes it."""
    try:
        hooks = env._post_step_mdp_hooks
    except AttributeError:
        raise missing("torchrl.envs:EnvBase._post_step_mdp_hooks") from None
    following = env.step_mdp(step)
    return following if hooks is None else hooks(step, following)[1]


def compatible_policy(policy: Callable, observation_spec: Any, env: Any) -> Any | None:
    """Return a policy that takes tensordicts, as TorchRL wraps it; None if it cannot be made."""
    make = _find(*POLICY_WRAPPER.split(":"))
    if make is None:
        return None
    return make(policy, observation_spec, env=env, fast_wrap=True)


def wrapped_env(env: Any) -> Any | None:
    """Return what a TorchRL env wraps; None if it wraps nothing.

    Raises:
        UpstreamError: if it wraps something and does not say what.
    """
    # Not getattr, which makes batched envs start their workers.
    inner = env.__dict__.get("_env")
    if inner is None and _wraps(env):
        raise missing("torchrl.envs.libs.gym:GymWrapper._env")
    return inner


def set_wrapped_env(env: Any, inner: Any) -> None:
    """Put another env into a TorchRL env that wraps one."""
    wrapped_env(env)
    env._env = inner


def _wraps(env: Any) -> bool:
    from torchrl.envs import DMControlEnv, DMControlWrapper, GymWrapper

    return isinstance(env, (GymWrapper, DMControlWrapper, DMControlEnv))


# Distributions, data, trainers -----------------------------------------------------------


def is_known_tanh(kind: type) -> bool:
    """Return whether :func:`set_tanh` prepares a TanhNormal as its constructor does."""
    made = vars(kind(torch.zeros(1), torch.ones(1)))
    return "_t" in made and "_event_dims" in made


def set_tanh(dist: Any, transform: Any, event_dims: int) -> None:
    """Give a TanhNormal its transform."""
    dist._t, dist._event_dims = transform, event_dims


def cursor(writer: Any) -> int | None:
    """Return the row that a writer fills next; None if it does not write in a circle.

    Raises:
        UpstreamError: if it does and does not say where it is.
    """
    from torchrl.data import RoundRobinWriter

    found = getattr(writer, "_cursor", None)
    if isinstance(found, int):
        return found
    if isinstance(writer, RoundRobinWriter):
        raise missing("torchrl.data:RoundRobinWriter._cursor")
    return None


def set_cursor(writer: Any, cursor: int, write_count: int) -> None:
    """Let a writer go on at row ``cursor``, after ``write_count`` rows."""
    state = {"_cursor": cursor, "_write_count": write_count}
    if state.keys() != writer.state_dict().keys():
        raise missing("torchrl.data:RoundRobinWriter._write_count")
    writer.load_state_dict(state)


def run_post_optim(trainer: Any) -> None:
    """Run what was registered in a trainer under ``"post_optim"``."""
    try:
        run = trainer._post_optim_hook
    except AttributeError:
        raise missing("torchrl.trainers:Trainer._post_optim_hook") from None
    run()


def unregister(trainer: Any, name: str) -> Any | None:
    """Take out and return what was registered as a trainer's module; None if nothing was."""
    try:
        modules = trainer._modules
    except AttributeError:
        raise missing("torchrl.trainers:Trainer._modules") from None
    return modules.pop(name, None)
