"""What is installed is what is promised: version, extras, typing marker, make targets."""

from __future__ import annotations

import ast
import importlib
import re
from importlib import metadata, resources
from pathlib import Path

import pytest

import torchrl_wm

ROOT = Path(__file__).resolve().parents[1]

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture
def pyproject() -> dict:
    if tomllib is None:
        pytest.skip("tomllib needs Python 3.11")
    return tomllib.loads(read("pyproject.toml"))


def distribution() -> metadata.Distribution:
    try:
        return metadata.distribution("torchrl-wm")
    except metadata.PackageNotFoundError:
        pytest.skip("torchrl-wm is not installed, only on the path")


def test_version_has_one_source(pyproject):
    assert "version" not in pyproject["project"]
    assert pyproject["project"]["dynamic"] == ["version"]
    attr = pyproject["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert attr == "torchrl_wm.__version__"


def test_version_is_a_literal():
    # Otherwise a build would import the package, and so need torch.
    tree = ast.parse(read("torchrl_wm/__init__.py"))
    literals = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and [getattr(target, "id", None) for target in node.targets] == ["__version__"]
        and isinstance(node.value, ast.Constant)
    ]
    assert literals == [torchrl_wm.__version__]
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", literals[0])


def test_installed_version_is_this_one():
    version = distribution().version
    assert version == torchrl_wm.__version__, "stale install: run `make venv`"


def test_extras_exist():
    provided = set(distribution().metadata.get_all("Provides-Extra"))
    expected = {"test", "docs", "lint", "plot"}
    expected |= {"cli", "sb3", "mujoco", "dm-control"}
    assert expected <= provided


def test_the_command_exists(pyproject):
    module, _, name = pyproject["project"]["scripts"]["torchrl-wm"].partition(":")
    pytest.importorskip("tyro")
    assert callable(getattr(importlib.import_module(module), name))


def test_py_typed_is_shipped(pyproject):
    assert resources.files("torchrl_wm").joinpath("py.typed").is_file()
    package_data = pyproject["tool"]["setuptools"]["package-data"]
    assert "py.typed" in package_data["torchrl_wm"]


def test_lint_pins_agree(pyproject):
    # pre-commit and `make lint` run the same versions.
    pins = dict(
        pin.split(";")[0].split("==")
        for pin in pyproject["project"]["optional-dependencies"]["lint"]
        if "==" in pin.split(";")[0]
    )
    hooks = read(".pre-commit-config.yaml")
    for tool, version in pins.items():
        pattern = rf"(/{tool}\n +rev: v?|- {tool} == ){re.escape(version)}\n"
        assert re.search(pattern, hooks), f"{tool}=={version} is not in pre-commit"


def test_what_is_tested_is_what_is_asked_for(pyproject):
    # The table of CONTRIBUTING.md: package, least, usual.
    table = re.findall(
        r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", read("CONTRIBUTING.md"), re.M
    )
    least = {name: least for name, least, _ in table}
    bounds = [
        re.match(r"(\w+)>=([\d.]+)", d) for d in pyproject["project"]["dependencies"]
    ]
    assert least == {bound[1]: bound[2] for bound in bounds}
    for name, _, usual in table:
        assert f"\n{name}=={usual}\n" in read("constraints.txt"), name


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", read("Makefile"), flags=re.MULTILINE))


def test_makefile_has_its_targets():
    expected = {"help", "venv", "demo", "test", "lint", "format", "docs", "bench"}
    assert expected | {"clean"} <= make_targets()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_promised_make_targets_exist(document):
    if not (ROOT / document).exists():
        pytest.skip(f"there is no {document}")
    # In code only: prose may "make sense".
    promised = set(re.findall(r"(?:^|`)make ([a-z]+)", read(document), re.MULTILINE))
    if not promised:
        pytest.skip(f"{document} promises no make target")
    assert promised <= make_targets()
