"""Recipes by name: registered, installed by packages, and refused where a name is taken."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
from _runs import PETS as SMALL

from torchrl_wm import _registry
from torchrl_wm.trainers import (
    MBPO,
    PETS,
    PETSConfig,
    PETSTrainer,
    Recipe,
    register_recipe,
    resume_run,
    start_run,
    trainer_class,
)

BUILT_IN = ["pets", "mbpo", "tdmpc2", "dreamer", "planet", "mopo", "model"]


@pytest.fixture(autouse=True)
def registered(monkeypatch) -> dict:
    """What is registered in a test is forgotten after it."""
    monkeypatch.setattr(_registry, "_REGISTERED", {})
    return _registry._REGISTERED


@pytest.fixture
def install(monkeypatch):
    """Install packages that name recipes in the entry point group."""
    points = []

    def add(name: str, recipe: type, package: str) -> None:
        module = ModuleType(f"{package}_recipes")
        setattr(module, recipe.__name__, recipe)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        recipe.__module__, recipe.__qualname__ = module.__name__, recipe.__name__
        value = f"{module.__name__}:{recipe.__name__}"
        dist = SimpleNamespace(name=package)
        points.append(SimpleNamespace(name=name, value=value, dist=dist))

    def entry_points(group: str) -> list:
        return points if group == "torchrl_wm.recipes" else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    monkeypatch.setattr(_registry, "entry_points", entry_points)
    return add


def make(parent: type = PETS, **content) -> type:
    """A recipe of one's own, of a fresh class."""
    return type("Own", (parent,), {"__doc__": "My own planner.\n\nMore.", **content})


def test_a_registered_recipe_runs_under_its_name(tmp_path) -> None:
    own = register_recipe("own", make())
    assert own.name == "own" and PETS.name == "pets"
    assert _registry.recipe_names() == [*BUILT_IN, "own"]
    entry = _registry.find_recipe("own")
    assert entry.summary == "My own planner." and entry.load() is own
    start_run("own", tmp_path / "run", **{**SMALL, "trials": 1}).train()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["algorithm"] == "own" and config["recipe"].endswith(":Own")
    again = resume_run(tmp_path / "run")
    assert type(again.recipe) is own and again.is_over


def test_a_decorator() -> None:
    @register_recipe("decorated")
    class Decorated(PETS):
        """Decorated."""

    assert Decorated.name == "decorated"
    assert trainer_class("decorated") is trainer_class(Decorated)


def test_a_class_that_is_defined_again_takes_its_place() -> None:
    first = register_recipe("own", make())
    second = register_recipe("own", make())  # as by a cell of a notebook
    assert _registry.find_recipe("own").load() is second is not first


def test_names_that_are_taken() -> None:
    with pytest.raises(
        ValueError, match="'pets' is taken by .*pets:PETS of torchrl_wm"
    ):
        register_recipe("pets", make())
    register_recipe("own", make())
    with pytest.raises(ValueError, match="'own' is taken by.*:Own .*another name"):
        register_recipe("own", type("Other", (PETS,), {}))
    assert register_recipe("pets", PETS) is PETS  # what is so already


def test_a_recipe_has_one_name() -> None:
    with pytest.raises(ValueError, match="has the name 'pets' already.*subclass"):
        register_recipe("my-pets", PETS)
    assert PETS.name == "pets" and _registry.find_recipe("pets").load() is PETS
    own = register_recipe("own", make())
    with pytest.raises(ValueError, match="has the name 'own' already"):
        register_recipe("mine", own)
    assert _registry.recipe_names() == [*BUILT_IN, "own"]


def test_what_is_no_recipe() -> None:
    for wrong in (PETSConfig, PETSTrainer, 3):
        with pytest.raises(TypeError, match="subclass of torchrl_wm.trainers.Recipe"):
            register_recipe("wrong", wrong)
    with pytest.raises(TypeError, match="must be a subclass.*Recipe"):
        register_recipe("wrong", make()(PETSConfig(**SMALL), PETSTrainer(**SMALL).env))
    assert "wrong" not in _registry.recipe_names()


def test_unknown_names_with_a_hint() -> None:
    with pytest.raises(ValueError, match="no recipe 'pest'. Did you mean 'pets'"):
        start_run("pest", "never")
    with pytest.raises(
        ValueError, match=r"no recipe 'x{9}'\. Valid choices are .*register_rec"
    ):
        trainer_class("x" * 9)


# Packages -------------------------------------------------------------------


def test_a_package_names_its_recipe(install, tmp_path) -> None:
    own = make()
    install("theirs", own, "their-package")
    assert "theirs" in _registry.recipe_names()
    entry = _registry.find_recipe("theirs")
    assert entry.origin == "their-package"
    start_run("theirs", tmp_path / "run", **{**SMALL, "trials": 1}).train()
    assert own.name == "theirs"  # which it did not say itself
    assert type(resume_run(tmp_path / "run").recipe) is own
    register_recipe("theirs", own)  # once more changes nothing
    assert _registry.recipe_names().count("theirs") == 1


def test_a_name_that_two_packages_register(install, tmp_path) -> None:
    install("twice", make(), "first-package")
    install("twice", make(), "second-package")
    with pytest.raises(
        ValueError, match="(?s)more than once.*first-package.*second-package.*another"
    ):
        start_run("twice", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert _registry.recipe_names().count("twice") == 1
    assert trainer_class("mbpo").recipe_class is MBPO  # others are as they were


def test_a_package_that_takes_a_name_of_ours(install) -> None:
    install("pets", make(), "their-package")
    with pytest.raises(ValueError, match="more than once.*torchrl_wm'.*their-package"):
        trainer_class("pets")


def test_a_package_that_calls_its_recipe_otherwise(install) -> None:
    install("outer", make(name="inner"), "their-package")
    with pytest.raises(ValueError, match="has the name 'inner' already"):
        trainer_class("outer")


def test_a_package_that_is_broken(install, monkeypatch) -> None:
    install("broken", make(), "their-package")
    monkeypatch.delitem(sys.modules, "their-package_recipes")
    with pytest.raises(ValueError, match="of their-package cannot be imported from"):
        trainer_class("broken")
    assert "broken" in _registry.recipe_names()


# Subclasses ------------------------------------------------------------------


def test_a_subclass_that_would_be_saved_as_its_parent(tmp_path) -> None:
    class Mine(PETS):
        """Without a name of its own."""

    trainer = trainer_class(Mine)
    trainer(**SMALL)  # without a folder there is nothing to mistake
    with pytest.raises(TypeError, match="saved as 'pets', which is PETS.*'my-pets'"):
        trainer.start(tmp_path / "run", **SMALL)

    class MyTrainer(PETSTrainer):
        """A trainer of another kind."""

        def end_steps(self) -> None:
            super().end_steps()

    with pytest.raises(TypeError, match="A run of MyTrainer would be saved as 'pets'"):
        MyTrainer.start(tmp_path / "run", **SMALL)
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_is_not_registered(tmp_path) -> None:
    class Empty(Recipe):
        """No algorithm."""

    with pytest.raises(TypeError, match="saved as '', which is no recipe"):
        trainer_class(Empty).start(tmp_path / "run")


def test_a_run_whose_recipe_is_not_known_here(tmp_path) -> None:
    register_recipe("own", make())
    start_run("own", tmp_path / "run", **{**SMALL, "trials": 1}).train()
    _registry._REGISTERED.clear()  # another process, without the import
    with pytest.raises(ValueError, match="no recipe 'own'.*register_recipe"):
        resume_run(tmp_path / "run")
    register_recipe("own", type("Other", (PETS,), {}))
    with pytest.raises(ValueError, match=r"'own' \(.*:Own\).*'own' \(.*:Other\)"):
        resume_run(tmp_path / "run")


def test_looking_for_recipes_imports_none() -> None:
    code = """
import sys
from torchrl_wm import _registry
assert _registry.recipe_names()[:7] == ["pets", "mbpo", "tdmpc2", "dreamer", "planet", "mopo", "model"]
assert _registry.find_recipe("pets").summary
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
