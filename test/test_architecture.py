"""The house rules that a machine can check: imports point one way, in no circle, and no prints.

    cli -> trainers -> export -> {models, planners, diagnostics} -> {envs, objectives} -> modules
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "torchrl_wm"

# From the top of the house down. A package may import from itself and from every layer
# below its own, never from a sibling.
LAYERS = (
    {"cli"},
    {"trainers"},
    {"export"},
    {"models", "planners", "diagnostics"},
    {"envs", "objectives"},
    {"modules"},
)
FLOOR = {name: len(LAYERS) - i for i, layer in enumerate(LAYERS) for name in layer}

# The package's own __init__ stands above everything: it gathers, and nobody reads it. So does
# __main__, which is the command line under another name.
ROOT = "__init__"
MAIN = "__main__"
#: The functions that import what a string names.
IMPORTERS = ("import_module", "__import__", "resolve_name")


def floor_of(part: str) -> int | None:
    """The floor a part of the package stands on: 0 is the lowest, None is nowhere.

    A private module beside the packages (``torchrl_wm/_utils.py``) is the ground: all
    may import it, and it imports nothing else of the package but other such modules.
    """
    if part in (ROOT, MAIN):
        return len(LAYERS) + 1
    if part.startswith("_"):
        return 0
    return FLOOR.get(part)


def modules_of(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def part_of(path: Path, package: Path) -> str:
    """The part of the package that a file belongs to: ``envs/a/b.py`` to ``envs``."""
    return path.relative_to(package).with_suffix("").parts[0]


def imported_names(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Lines and absolute dotted names of all that a file imports, wherever it does so.

    Imports in functions and under ``TYPE_CHECKING`` count: they too say who knows whom.
    """
    for line, name, _ in imports_of(path, package):
        yield line, name


def imports_of(path: Path, package: Path) -> Iterator[tuple[int, str, str]]:
    """As :func:`imported_names`, with the names that the file gives them."""
    here = path.relative_to(package.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, alias.asname or alias.name
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            base = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}", alias.asname or alias.name
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            target = getattr(node.args[0], "value", None)
            if name in IMPORTERS and isinstance(target, str):
                target = target.replace(":", ".")
                yield node.lineno, target, target


def imported_part(name: str, package: Path) -> str | None:
    """The part of the package that a dotted name belongs to, None if it is not ours."""
    head, *rest = name.split(".")
    if head != package.name:
        return None
    if rest and ((package / rest[0]).is_dir() or (package / f"{rest[0]}.py").is_file()):
        return rest[0]
    return ROOT  # `import torchrl_wm`, `from torchrl_wm import WorldModel`


def import_violations(package: Path) -> list[str]:
    found = []
    for path in modules_of(package):
        part, where = part_of(path, package), path.relative_to(package.parent)
        floor = floor_of(part)
        if floor is None:
            found.append(f"{where}: {part!r} has no layer; give it one in LAYERS")
            continue
        for line, name in imported_names(path, package):
            other = imported_part(name, package)
            if other is None or other == part:
                continue
            if other == ROOT:
                found.append(
                    f"{where}:{line}: imports {name} from the top of the package; import it from "
                    f"the package that defines it"
                )
                continue
            other_floor = floor_of(other)
            if other_floor == floor == 0:
                continue
            if other_floor is None or other_floor >= floor:
                found.append(
                    f"{where}:{line}: {part} imports {name}, but {other} is not below {part}"
                )
    return found


def files_behind(name: str, package: Path) -> set[Path]:
    """The files that a dotted name stands for.

    A package only gathers: a name that is imported from it stands for the file that defines
    it, and the package as a whole for all files that it gathers from.
    """
    head, *rest = name.split(".")
    if head != package.name:
        return set()
    place = package
    while rest:
        if (place / f"{rest[0]}.py").is_file():
            return {place / f"{rest[0]}.py"}
        if not (place / rest[0]).is_dir():
            break
        place /= rest.pop(0)
    gathered = gathered_names(place / "__init__.py", package)
    wanted = [gathered[rest[0]]] if rest and rest[0] in gathered else []
    if not rest:
        wanted = list(gathered.values())
    return {file for found in wanted for file in files_behind(found, package)}


@cache
def gathered_names(init: Path, package: Path) -> dict[str, str]:
    """What a package's ``__init__`` gathers: dotted names, by the names that it gives them."""
    return {given: name for _, name, given in imports_of(init, package)}


def import_circles(package: Path) -> list[str]:
    """Files that import each other, directly or through others; one circle of each knot."""
    graph = {
        path: {
            file
            for _, name in imported_names(path, package)
            for file in files_behind(name, package) - {path}
        }
        for path in modules_of(package)
        if path.name != "__init__.py"
    }
    found = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as err:
            circle = err.args[1]
            names = [str(path.relative_to(package.parent)) for path in circle]
            found.append(" is imported by ".join(names))
            graph[circle[1]].discard(circle[0])
        else:
            return found


def style_violations(package: Path) -> list[str]:
    found = []
    for path in modules_of(package):
        where = path.relative_to(package.parent)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        is_docstring = [
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            for node in tree.body
        ]
        if not all(is_docstring) and not any(
            isinstance(node, ast.ImportFrom)
            and node.module == "__future__"
            and any(alias.name == "annotations" for alias in node.names)
            for node in tree.body
        ):
            found.append(f"{where}: lacks `from __future__ import annotations`")
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id == "print":
                found.append(f"{where}:{node.lineno}: uses print")
    return found


def test_imports_point_one_way():
    assert modules_of(PACKAGE), f"no modules found under {PACKAGE}"
    violations = import_violations(PACKAGE)
    assert not violations, "\n".join(violations)


def test_no_files_import_each_other():
    circles = import_circles(PACKAGE)
    assert not circles, "\n".join(circles)


def test_modules_follow_the_house_style():
    violations = style_violations(PACKAGE)
    assert not violations, "\n".join(violations)


# The checker is checked on made-up houses, so that the tests above cannot pass idly.

FUTURE = "from __future__ import annotations\n"


def build(root: Path, files: dict[str, str]) -> Path:
    """Write a package with one empty ``__init__`` for every layer, and these files."""
    package = root / "house"
    for name in FLOOR:
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").touch()
    (package / "__init__.py").touch()
    for name, source in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source)
    return package


@pytest.mark.parametrize(
    "file, source",
    [
        ("envs/a.py", "from house.modules import x"),
        ("envs/a.py", "from ..modules.b import x"),
        ("envs/a.py", "from house import modules"),
        ("envs/a.py", "from .b import x\nfrom house.envs import y"),
        ("planners/a.py", "import house.envs.b, house.modules"),
        ("planners/__init__.py", "from .a import x"),
        ("trainers/deep/a.py", "from ...diagnostics import x\nfrom ..b import y"),
        ("cli/a.py", "import house.trainers"),
        ("__init__.py", "from house.envs import x\nfrom .cli import y"),
        ("export/a.py", "def f():\n    from house.models import x"),
        ("modules/a.py", "import torch\nfrom household import x\nimport houses"),
        ("_utils.py", "import torch"),
    ],
)
def test_checker_accepts(tmp_path, file, source):
    assert import_violations(build(tmp_path, {file: source})) == []


def test_checker_accepts_imports_on_the_ground(tmp_path):
    files = {"_names.py": "import re", "_utils.py": "from ._names import x"}
    assert import_violations(build(tmp_path, files)) == []


@pytest.mark.parametrize(
    "file, source, culprit",
    [
        ("modules/a.py", "from house.envs import x", "envs"),
        ("modules/a.py", "from ..envs import x", "envs"),
        ("modules/__init__.py", "from ..envs import x", "envs"),
        ("modules/deep/a.py", "from ...envs.b import x", "envs"),
        ("modules/a.py", "from .. import envs", "envs"),
        ("modules/a.py", "import torch, house.cli", "cli"),
        ("envs/a.py", "from house.objectives import x", "objectives"),
        ("planners/a.py", "from house.models import x", "models"),
        ("export/a.py", "from house.trainers import x", "trainers"),
        ("trainers/a.py", "def f():\n    from house.cli import x", "cli"),
        ("envs/a.py", "if TYPE_CHECKING:\n    import house.planners", "planners"),
        ("envs/a.py", "importlib.import_module('house.export')", "export"),
        ("envs/a.py", "pkgutil.resolve_name('house.export:x')", "export"),
        ("models/a.py", "from house.export import x", "export"),
        ("envs/a.py", "from house import WorldModel", "top of the package"),
        ("envs/a.py", "import house", "top of the package"),
        ("_utils.py", "from .modules import x", "modules"),
        ("attic/a.py", "x = 1", "attic"),
    ],
)
def test_checker_refuses(tmp_path, file, source, culprit):
    violations = import_violations(build(tmp_path, {file: source}))
    assert len(violations) == 1, violations
    assert file in violations[0] and culprit in violations[0]


GATHERS = {"envs/__init__.py": "from house.envs.a import x\nfrom .b import y as z"}


@pytest.mark.parametrize(
    "files",
    [
        {"envs/a.py": "from .b import y", "envs/b.py": "import torch"},
        {"envs/a.py": "x = 1", "envs/b.py": "from house.envs import x", **GATHERS},
        {"envs/a.py": "from house.envs import z", "envs/b.py": "y = 1", **GATHERS},
        {"envs/a.py": "from .b import y", "envs/b.py": "from .deep import a"},
        {"envs/a.py": "from . import w", "envs/b.py": "from .a import x", **GATHERS},
    ],
)
def test_circle_checker_accepts(tmp_path, files):
    assert import_circles(build(tmp_path, files)) == []


@pytest.mark.parametrize(
    "files",
    [
        {"envs/a.py": "from .b import y", "envs/b.py": "from house.envs.a import x"},
        {
            "envs/a.py": "from .b import y",
            "envs/b.py": "def f():\n    import house.envs.a",
        },
        {
            "envs/a.py": "if TYPE_CHECKING:\n    from . import b",
            "envs/b.py": "from .a import x",
        },
        {
            "envs/a.py": "from .b import y",
            "envs/b.py": "from house.envs import x",
            **GATHERS,
        },
        {
            "envs/a.py": "from ..envs import z",
            "envs/b.py": "from .a import x",
            **GATHERS,
        },
        {"envs/a.py": "from .b import y", "envs/b.py": "import house.envs", **GATHERS},
        {
            "envs/a.py": "from .b import y",
            "envs/b.py": "from ..modules import c",
            "modules/c.py": "from house.envs import a",
        },
        {
            "envs/a.py": "from .deep import y",
            "envs/deep/__init__.py": "from .c import y",
            "envs/deep/c.py": "from house.envs.b import y",
            "envs/b.py": "from .a import x",
        },
    ],
)
def test_circle_checker_refuses(tmp_path, files):
    circles = import_circles(build(tmp_path, files))
    assert len(circles) == 1, circles
    assert all(file in circles[0] for file in ("house/envs/a.py", "house/envs/b.py"))


@pytest.mark.parametrize(
    "source",
    ["", '"""Docstring."""\n', f'"""Docstring."""\n{FUTURE}x = 1\n', f"{FUTURE}x = 1"],
)
def test_style_checker_accepts(tmp_path, source):
    assert style_violations(build(tmp_path, {"envs/a.py": source})) == []


@pytest.mark.parametrize(
    "source, culprit",
    [
        ("x = 1", "annotations"),
        ("from __future__ import division\n", "annotations"),
        (f"{FUTURE}print(1)", "print"),
        (f"{FUTURE}def f(log=print):\n    return log", "print"),
    ],
)
def test_style_checker_refuses(tmp_path, source, culprit):
    violations = style_violations(build(tmp_path, {"envs/a.py": source}))
    assert len(violations) == 1, violations
    assert "envs/a.py" in violations[0] and culprit in violations[0]
