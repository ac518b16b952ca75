"""Private names of other packages: all in one file, and what happens without them."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import pickle
import pkgutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import pytest
import torch
import torchrl_wm
from _models import (
    ACTION,
    gru_model,
    LATENT,
    linear,
    make_model,
    observations,
    SpecEnv,
    transitions,
)
from tensordict import TensorDict
from tensordict.nn import (
    NormalParamExtractor,
    TensorDictModule as Mod,
    TensorDictSequential,
)
from torch import nn
from torchrl.data import LazyTensorStorage, ReplayBuffer, RoundRobinWriter
from torchrl.envs import EnvBase, GymEnv, GymWrapper, Transform
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal
from torchrl.trainers import Trainer

from torchrl_wm import _upstream, GymWorldModelEnv, WorldModelEnv, WorldModelLoss

PACKAGE = Path(torchrl_wm.__file__).parent
ROOM = "_upstream.py"
PACKAGES = ("torch", "torchrl", "tensordict", "gymnasium")

# What TorchRL documents for subclasses to define.
HOOKS = {
    "EnvBase": {"_step", "_reset", "_set_seed"},
    "Transform": {"_step", "_reset", "_call", "_apply_transform"},
    "LossModule": {"_forward_value_estimator_keys", "_AcceptedKeys"},
    "Logger": {"_create_experiment"},
}
# What ends the keys of logits, beside being an attribute of distributions.
SUFFIXES = {"_logits"}
# The documented methods of every named tuple.
NAMED_TUPLE = {"_replace", "_asdict", "_fields"}
# What stable-baselines3 leaves to each VecEnv; it is none of the four packages.
OTHERS = {
    "sb3.py": {
        "_seeds",
        "_options",
        "_reset_seeds",
        "_reset_options",
        "_get_indices",
    }
}
_BY_NAME = ("getattr", "hasattr", "setattr", "delattr")
_DICT_METHODS = ("get", "pop", "setdefault")


def is_private(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.startswith("_")
        and not name.startswith("__")
        and name.isidentifier()
        and bool(name.strip("_"))
    )


def is_upstream(module: str | None) -> bool:
    return (module or "").partition(".")[0] in PACKAGES


# What a file uses ------------------------------------------------------------------------


def declared(tree: ast.AST) -> set[str]:
    """The private names that a file gives something of its own."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                names.add(node.attr)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            if getattr(node.value, "attr", None) == "__dict__":
                names.add(getattr(node.slice, "value", None))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "setdefault":
                names.add(getattr(node.args[0], "value", None))
    return set(filter(is_private, names))


def looked_up(node: ast.AST) -> Iterator[str]:
    """The private names that are looked up by string: getattr, __dict__["..."] and its like."""
    if isinstance(node, ast.Subscript):
        owner, names = node.value, [node.slice]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id not in _BY_NAME:
            return
        yield from (a.value for a in node.args[1:2] if isinstance(a, ast.Constant))
        return
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr not in _DICT_METHODS:
            return
        owner, names = node.func.value, node.args[:1]
    else:
        return
    held = isinstance(owner, ast.Attribute) and owner.attr == "__dict__"
    held = held or getattr(getattr(owner, "func", None), "id", None) == "vars"
    yield from (n.value for n in names if held and isinstance(n, ast.Constant))


def uses(source: str, ours: set[str], theirs: set[str]) -> list[tuple[int, str]]:
    """The private upstream names that a file uses, by line.

    Args:
        source: the file.
        ours: what the package gives its own things as private names.
        theirs: the private names of the upstream classes that the package knows.

    A name is upstream's if it is imported from there; if it is read, by string too, and nobody
    in the package declares it; or if it is among ``theirs`` and is read from something else
    than ``self``, or stands in a string. What an own class shares with its upstream bases,
    :func:`inherited_uses` tells.
    """
    tree = ast.parse(source)
    here = declared(tree)
    found, within = [], {}
    for node in ast.walk(tree):  # parents come first
        method = node.name if isinstance(node, ast.FunctionDef) else within.get(node)
        for child in ast.iter_child_nodes(node):
            within[child] = method
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.ImportFrom) and not node.level:
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            if is_upstream(node.module):
                found += [(line, part) for part in parts if is_private(part)]
        elif isinstance(node, ast.Import):
            parts = [
                p for a in node.names if is_upstream(a.name) for p in a.name.split(".")
            ]
            found += [(line, part) for part in parts if is_private(part)]
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            # A method may call its like in the class above, and in its parts.
            if node.attr in NAMED_TUPLE or node.attr == within.get(node):
                continue
            owner = getattr(node.value, "id", None)
            foreign = owner not in ("self", "cls") and node.attr in theirs
            if foreign or node.attr not in ours:
                found.append((line, node.attr))
        elif isinstance(node, ast.Constant) and is_private(node.value):
            if node.value in theirs and node.value not in here:
                found.append((line, node.value))
        for name in filter(is_private, looked_up(node)):
            if name not in ours | NAMED_TUPLE:
                found.append((line, name))
    return sorted(set(found))


# What classes share with upstream's ------------------------------------------------------


@cache
def classes_of(module: str) -> dict[str, ast.ClassDef]:
    """The classes at the top of a module as they are written."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):  # not written in Python
        return {}
    body = ast.parse(source).body
    return {node.name: node for node in body if isinstance(node, ast.ClassDef)}


@cache
def private_names(kind: type) -> frozenset[str]:
    """The private names that a class itself gives to what it has."""
    names = set(vars(kind)) | set(getattr(kind, "__annotations__", {}))
    written = classes_of(kind.__module__).get(kind.__name__, ast.parse(""))
    for node in ast.walk(written):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            names.add(getattr(node.slice, "value", None))
    return frozenset(filter(is_private, names))


def upstream_names(kind: type) -> dict[str, type]:
    """The private names of a class's upstream bases, and whose they are."""
    bases = [base for base in kind.__mro__ if is_upstream(base.__module__)]
    return {name: base for base in reversed(bases) for name in private_names(base)}


def replaceable(kind: type) -> set[str]:
    """What a class may define in place of its bases' own."""
    own = {base.__name__ for base in kind.__mro__}
    names = {name for base in own for name in HOOKS.get(base, ())}
    for place, *_ in _upstream.REPLACED:
        base, _, name = place.partition(":")[2].partition(".")
        if base in own:
            names.add(name)
    return names


def inherited_uses(kind: type) -> list[str]:
    """The private names of upstream bases that a class of the package uses or defines."""
    theirs, allowed = upstream_names(kind), replaceable(kind)
    tree = classes_of(kind.__module__)[kind.__name__]
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {getattr(target, "id", None) for target in node.targets}
    return sorted(
        f"{kind.__module__}.{kind.__name__}: {name} of {theirs[name].__name__}"
        for name in names & theirs.keys() - allowed
    )


@cache
def own_modules() -> list:
    found = []
    for info in pkgutil.walk_packages(torchrl_wm.__path__, "torchrl_wm."):
        if not info.name.endswith("__main__"):
            found.append(importlib.import_module(info.name))
    return found


def own_classes() -> list[type]:
    return [
        kind
        for module in own_modules()
        for kind in vars(module).values()
        if inspect.isclass(kind) and kind.__module__ == module.__name__
    ]


@cache
def known_names() -> frozenset[str]:
    """The private names of every upstream class that a file of the package imports."""
    kinds = {
        kind
        for module in own_modules()
        for kind in vars(module).values()
        if inspect.isclass(kind) and is_upstream(kind.__module__)
    }
    return frozenset(name for kind in kinds for name in upstream_names(kind))


def hook_names() -> set[str]:
    return {name for names in HOOKS.values() for name in names}


def package_uses(package: Path) -> list[str]:
    files = [path for path in package.rglob("*.py") if path.name != ROOM]
    sources = {path: path.read_text(encoding="utf-8") for path in files}
    ours = {name for s in sources.values() for name in declared(ast.parse(s))}
    theirs = set(known_names()) - hook_names() - SUFFIXES
    return [
        f"{path.relative_to(package.parent)}:{line}: {name}"
        for path, source in sorted(sources.items())
        for line, name in uses(source, ours, theirs)
        if name not in OTHERS.get(path.name, ())
    ]


# The house -------------------------------------------------------------------------------


def test_private_names_stand_in_one_file() -> None:
    found = package_uses(PACKAGE)
    found += [use for kind in own_classes() for use in inherited_uses(kind)]
    assert not found, "put these into torchrl_wm/_upstream.py:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source, name",
    [
        ("from torchrl.envs.utils import _update_during_reset", "_update_during_reset"),
        ("import torch._dynamo", "_dynamo"),
        ("from torch._dynamo.exc import Unsupported", "_dynamo"),
        ("def f():\n    return torch._C.x", "_C"),
        ("def f(td):\n    return td._tensordict", "_tensordict"),
        (
            "class A:\n    def f(self):\n        return self._module_iter()",
            "_module_iter",
        ),
        ("def f(x):\n    return getattr(x, '_batch_locked', None)", "_batch_locked"),
        ("def f(x):\n    return x.__dict__.get('_inner_env')", "_inner_env"),
        ("def f(x):\n    return vars(x)['_inner_env']", "_inner_env"),
        ("def f(x):\n    x.__dict__.pop('_inner_env')", "_inner_env"),
        ("NAMES = ('_step_proc_data',)", "_step_proc_data"),
        ("class A:\n    def _apply(self, x):\n        x.part._buffers", "_buffers"),
    ],
)
def test_the_test_finds(tmp_path, source, name) -> None:
    (tmp_path / "planted.py").write_text(source)
    found = package_uses(tmp_path)
    assert len(found) == 1 and found[0].endswith(f" {name}"), found


@pytest.mark.parametrize(
    "source",
    [
        "from torchrl.envs import EnvBase\nfrom house import _mine",
        "class A:\n    def __init__(self):\n        self._x = 1\n\n    def f(self, o):\n        return o._x",
        "def f(p):\n    return p._replace(x=1)",
        "class A:\n    def f(self):\n        self.__dict__['_x'] = 1\n        return self._x",
        "def f(td):\n    return td.get('_reset')",
    ],
)
def test_the_test_lets_pass(tmp_path, source) -> None:
    (tmp_path / "planted.py").write_text(source)
    assert package_uses(tmp_path) == []


class HookedEnv(EnvBase):
    def _reset(self, tensordict=None, **kwargs):
        return super()._reset(tensordict)


class PokingEnv(EnvBase):
    _batch_locked = False

    def _step_proc_data(self, tensordict):
        return self._cache_in_keys


def test_the_test_finds_what_a_class_shares_with_its_bases() -> None:
    assert inherited_uses(HookedEnv) == []
    found = [use.split(": ")[1].split()[0] for use in inherited_uses(PokingEnv)]
    assert found == ["_batch_locked", "_cache_in_keys", "_step_proc_data"]


def test_every_name_has_its_reason_and_is_used() -> None:
    source = (PACKAGE / ROOM).read_text()
    rest = "".join(p.read_text() for p in PACKAGE.rglob("*.py") if p.name != ROOM)
    entries = (*_upstream.NAMES, *_upstream.REPLACED)
    assert len({entry.place for entry in entries}) == len(entries)
    for place, why, without in entries:
        name = place.partition(":")[2].rpartition(".")[2]
        assert why and without, place
        beyond_the_table = source.replace(place, "", 1) + rest
        assert name in beyond_the_table, f"{place} is not used"
    listed = {entry.place.partition(":")[2].rpartition(".")[2] for entry in entries}
    names = {
        n.attr for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)
    }
    named = {
        n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant)
    }
    used = {name for name in names | named if is_private(name)}
    used -= {"_asdict"}
    assert used <= listed | {"_C", "_dynamo", "_functorch"}, used - listed


@pytest.mark.parametrize(
    "place", [entry.place for entry in (*_upstream.NAMES, *_upstream.REPLACED)]
)
def test_the_installed_versions_have_it(place) -> None:
    """A failure says which way the package now goes: the entry's ``without``."""
    module, _, path = place.partition(":")
    kind, _, name = path.rpartition(".")
    owner = importlib.import_module(module)
    if not kind:
        assert hasattr(owner, name)
    elif name not in ("_collector", "_write_count"):
        owner = getattr(owner, kind)
        assert hasattr(owner, name) or name in upstream_names(owner)


# Without a name --------------------------------------------------------------------------


class Hidden:
    """A name of a class that is there for all but ``_upstream``, as if it had another name."""

    def __init__(self, kind: type, name: str) -> None:
        self.kind, self.name = kind, name
        self.original = inspect.getattr_static(kind, name, None)

    def __get__(self, instance, owner):
        frame = sys._getframe(1)
        while frame.f_code.co_name == "__getattr__":
            frame = frame.f_back
        if frame.f_globals["__name__"] == _upstream.__name__:
            raise AttributeError(self.name)
        if instance is not None and self.name in instance.__dict__:
            return instance.__dict__[self.name]
        if hasattr(self.original, "__get__"):
            return self.original.__get__(instance, owner)
        if self.original is None and self.name not in vars(self.kind):
            raise AttributeError(self.name)
        return self.original

    def __set__(self, instance, value) -> None:
        instance.__dict__[self.name] = value

    def __delete__(self, instance) -> None:
        del instance.__dict__[self.name]


def hide(monkeypatch, place: str) -> None:
    """Take a name away from ``_upstream``."""
    module, _, path = place.partition(":")
    kind, _, name = path.rpartition(".")
    if kind:
        owner = getattr(importlib.import_module(module), kind)
        monkeypatch.setattr(owner, name, Hidden(owner, name), raising=False)
        return
    find = _upstream._find
    monkeypatch.setattr(
        _upstream, "_find", lambda m, n: None if n == name else find(m, n)
    )
    bare = SimpleNamespace(modules=SimpleNamespace(module=SimpleNamespace()))
    if name == "_has_any_global_hook":
        monkeypatch.setattr(_upstream, "nn", bare)


def flat(tensordict: TensorDict) -> dict:
    return {key: value.clone() for key, value in tensordict.items(True, True)}


def imagined(policy) -> dict:
    """A rollout with a policy, and the fixed horizon of ``imagine``."""
    torch.manual_seed(2)
    model = make_model(done="terminated_logits", latent=("agent", "latent"))
    env = WorldModelEnv(model, SpecEnv())
    start = model.encode(observations(5)).detach()
    torch.manual_seed(3)
    out = flat(env.rollout(6, policy, tensordict=start.clone()))
    out["slow"] = env.slow_because
    return out


def squashed() -> TensorDictSequential:
    torch.manual_seed(4)
    cells = nn.Sequential(
        MLP(LATENT, 2 * ACTION, num_cells=[8]), NormalParamExtractor()
    )
    return ProbabilisticActor(
        Mod(cells, [("agent", "latent")], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
    )


def plain() -> nn.Module:
    torch.manual_seed(4)
    return linear([("agent", "latent")], ["action"], [LATENT, ACTION])


def learnt() -> dict:
    """The losses and gradients of a model, and those after it was moved."""
    torch.manual_seed(5)
    model = make_model(decoder=True, done="terminated_logits")
    loss = WorldModelLoss(model, delay_encoder=True)
    out = {}
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(6)
        loss.to(dtype)
        data = transitions(4).to(dtype)
        for name, value in loss(data).items():
            model.zero_grad()
            value.backward(retain_graph=True)
            out[f"{name} {dtype}"] = value.detach()
        for name, value in model.named_parameters():
            if value.grad is not None:
                out[f"{name} {dtype}"] = value.grad.clone()
    return out


def exported() -> dict:
    torch.manual_seed(7)
    env = GymWorldModelEnv(
        make_model(),
        base_env=SpecEnv(),
        start_states=observations(3),
        seed=3,
    )
    env.reset()
    steps = [env.step(0.5 * env.action_space.low) for _ in range(3)]
    return {str(i): torch.as_tensor(step[0]) for i, step in enumerate(steps)}


ROLLOUTS = [
    entry.place
    for entry in _upstream.NAMES
    if _upstream._SLOW in entry.without or _upstream._LOOP in entry.without
] + ["torch.nn:Module._modules", "tensordict:TensorDict._new_unsafe"]


@pytest.mark.parametrize("place", ROLLOUTS)
def test_rollouts_are_the_same_without(monkeypatch, place) -> None:
    policies = [squashed, plain, lambda: None]
    expected = [imagined(make()) for make in policies]
    assert [out.pop("slow") for out in expected] == [None] * 3
    hide(monkeypatch, place)
    outs = [imagined(make()) for make in policies]
    slow = [out.pop("slow") for out in outs]
    for out, right in zip(outs, expected):
        assert out.keys() == right.keys()
        assert all(torch.equal(out[key], right[key]) for key in right)
    if "EnvBase" in place:
        assert all("TorchRL's envs have no" in why for why in slow)


@pytest.mark.parametrize("place", ["torch.nn:Module._modules"])
@pytest.mark.filterwarnings("ignore:No target network updater")
def test_losses_are_the_same_without(monkeypatch, place) -> None:
    expected = learnt()
    hide(monkeypatch, place)
    out = learnt()
    assert out.keys() == expected.keys()
    assert all(torch.equal(out[key], expected[key]) for key in expected)


def test_policies_without_keys_need_torchrl_to_wrap_them(monkeypatch) -> None:
    network, model = MLP(LATENT, ACTION, num_cells=[8]), make_model()
    start = model.encode(observations(3)).detach()
    env = WorldModelEnv(model, SpecEnv())
    expected = flat(env.rollout(3, network, tensordict=start))
    assert env.slow_because is None
    hide(monkeypatch, "torchrl.envs.utils:_make_compatible_policy")
    env = WorldModelEnv(model, SpecEnv())
    out = flat(env.rollout(3, network, tensordict=start))
    assert "MLP" in env.slow_because
    assert all(torch.equal(out[key], expected[key]) for key in expected)
    with pytest.raises(_upstream.UpstreamError, match="torchrl 0.* has no .*policy"):
        env.imagine(3, network, start)


def test_exported_envs_are_the_same_without_the_fast_switch(monkeypatch) -> None:
    from torchrl_wm.export import isolation

    expected = exported()
    hide(monkeypatch, "torch._C:_set_grad_enabled")
    assert _upstream.grad_setter() is torch.set_grad_enabled
    monkeypatch.setattr(isolation, "_set_grad", _upstream.grad_setter())
    out = exported()
    assert torch.is_grad_enabled()
    assert all(torch.equal(out[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["_scan", "_maybe_warm_scan_backward"])
def test_steps_are_compiled_without_a_scan(monkeypatch, name) -> None:
    model = gru_model()
    data = transitions(2, 4).refine_names(..., "time")
    expected = flat(model.observe(data))
    hide(monkeypatch, f"torchrl.modules.tensordict_module.rnn:{name}")
    with pytest.warns(UserWarning, match="no scan"):
        model.compile_rollout("scan", backend="eager")
    out = flat(model.observe(data))
    for key, value in expected.items():
        torch.testing.assert_close(out[key], value)


def test_the_compilers_errors_are_raised_without_their_types(monkeypatch) -> None:
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    data = transitions(2, 3).refine_names(..., "time")
    model = gru_model().compile_rollout(backend=broken)
    with pytest.warns(UserWarning, match="stays eager"):
        model.observe(data)
    hide(monkeypatch, "torch._dynamo.exc:BackendCompilerFailed")
    model = gru_model().compile_rollout(backend=broken)
    with pytest.raises(Exception, match="no compiler here"):
        model.observe(data)


def test_sac_takes_torchrls_distribution_without_its_parts() -> None:
    from torchrl_wm.modules.blocks.squashed_normal import SquashedNormal

    class Renamed(TanhNormal):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self._transform = self.__dict__.pop("_t")

    assert _upstream.is_known_tanh(TanhNormal)
    assert not _upstream.is_known_tanh(Renamed)
    bounds = {"low": torch.tensor([-2.0, 0.5]), "high": torch.tensor([2.0, 3.0])}
    loc, scale = torch.randn(4, 2), torch.rand(4, 2) + 0.1
    ours, theirs = (kind(loc, scale, **bounds) for kind in (SquashedNormal, TanhNormal))
    actions = []
    for dist in (ours, theirs):
        torch.manual_seed(0)
        actions.append(dist.rsample())
    torch.testing.assert_close(*actions)
    torch.testing.assert_close(ours.log_prob(actions[0]), theirs.log_prob(actions[0]))


def test_envs_are_copied_without_what_no_pickle_takes() -> None:
    env = WorldModelEnv(make_model(), SpecEnv())
    env.__dict__[_upstream.COMPILED_STEP] = lambda *_: None
    for copied in (pickle.loads(pickle.dumps(env)), copy.deepcopy(env)):
        assert _upstream.COMPILED_STEP not in copied.__dict__


# Errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place, use",
    [
        (
            "torchrl.envs:EnvBase._reset_proc_data",
            lambda: WorldModelEnv(make_model(), SpecEnv()),
        ),
        (
            "torchrl.envs:EnvBase._supports_set_state",
            lambda: WorldModelEnv(make_model(), SpecEnv()),
        ),
        (
            "torchrl.envs:Transform._reset_env_preprocess",
            lambda: _upstream.check_replaced(Transform),
        ),
        ("torch.nn:Module._apply", make_model),
        ("torch.nn:Module._load_from_state_dict", make_model),
        (
            "torchrl.envs:EnvBase._post_step_mdp_hooks",
            lambda: _upstream.following_root(SpecEnv(), TensorDict()),
        ),
        (
            "torch.nn.parallel:DistributedDataParallel._active_ddp_module",
            _upstream.running_ddp,
        ),
        (
            "torchrl.data:RoundRobinWriter._cursor",
            lambda: _upstream.cursor(RoundRobinWriter()),
        ),
        (
            "torchrl.trainers:Trainer._post_optim_hook",
            lambda: _upstream.run_post_optim(object.__new__(Trainer)),
        ),
        (
            "torchrl.trainers:Trainer._modules",
            lambda: _upstream.unregister(object.__new__(Trainer), "x"),
        ),
    ],
)
def test_errors_name_the_version_and_what_to_install(monkeypatch, place, use) -> None:
    hide(monkeypatch, place)
    name = place.rpartition(".")[2]
    package = "torchrl" if "torchrl" in place else "torch"
    with pytest.raises(_upstream.UpstreamError, match=rf"{package} \d.*{name}") as err:
        use()
    assert f"pip install '{package}" in str(err.value)


def test_a_wrapped_env_that_is_not_found_is_an_error() -> None:
    env = GymEnv("Pendulum-v1")
    assert isinstance(_upstream.wrapped_env(env), gymnasium.Env)
    assert _upstream.wrapped_env(SpecEnv()) is None
    other = GymWrapper(gymnasium.make("CartPole-v1"))
    _upstream.set_wrapped_env(env, _upstream.wrapped_env(other))
    assert "CartPole" in repr(_upstream.wrapped_env(env))
    env.__dict__["_inner"] = env.__dict__.pop("_env")
    with pytest.raises(_upstream.UpstreamError, match="GymWrapper._env"):
        _upstream.wrapped_env(env)


def test_writers_say_where_they_are() -> None:
    buffer = ReplayBuffer(storage=LazyTensorStorage(5))
    buffer.extend(TensorDict({"x": torch.arange(7)}, [7]))
    assert _upstream.cursor(buffer.writer) == 2
    _upstream.set_cursor(buffer.writer, 4, 14)
    assert _upstream.cursor(buffer.writer) == 4
    assert buffer.write_count == 14
    state = SimpleNamespace(state_dict=lambda: {"_place": 0})
    with pytest.raises(_upstream.UpstreamError, match="_write_count"):
        _upstream.set_cursor(state, 4, 14)
