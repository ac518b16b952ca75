"""Runs from settings, and runs from folders."""

from __future__ import annotations

import os
import sys
import sysconfig
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from torchrl_wm._registry import find_recipe, path_of
from torchrl_wm.trainers.loggers import check_loggers
from torchrl_wm.trainers.real_envs import EnvSource
from torchrl_wm.trainers.recipe import Recipe
from torchrl_wm.trainers.run_folder import RunFolder
from torchrl_wm.trainers.run_state import seed_all
from torchrl_wm.trainers.settings import Settings
from torchrl_wm.trainers.trainer import RecipeTrainer
from torchrl_wm.trainers.watching import watch


class ConfiguredTrainer(RecipeTrainer):
    """A trainer that makes a recipe and its parts from settings; each recipe has a subclass.

    Args:
        config: the settings; the defaults of the recipe if None.

    Keyword Args:
        env: the real env, if ``config.env`` is not enough: an object, or a function
            that makes one (see :func:`~torchrl_wm.trainers.make_real_env`).
        run: the folder of the run; :meth:`start` makes one.
        progress: show a progress bar.
        given: objects that the recipe takes from Python (``reward_function``), and settings by
            name.

    Raises:
        TypeError: if the config is that of another recipe, or a setting is unknown.
        ValueError: if a setting has no valid value.
    """

    recipe_class: ClassVar[type[Recipe]]

    def __init__(
        self,
        config: Settings | None = None,
        *,
        env: EnvSource | None = None,
        run: RunFolder | None = None,
        progress: bool = False,
        **given: Any,
    ) -> None:
        config, objects = self.configured(config, {**given, "env": env})
        source = objects.pop("env", None)
        seed_all(config.seed)
        real_env = self.recipe_class.make_env(config, source)
        recipe = self.recipe_class(config, real_env, **objects)
        collector = recipe.make_collector(source)
        random_steps = getattr(config, "random_steps", 0)
        if config.steps is not None and config.steps < random_steps:
            warnings.warn(
                f"The run ends after steps={config.steps}, before the random ones do "
                f"(random_steps={random_steps}): it will learn nothing.",
                stacklevel=2,
            )
        super().__init__(recipe, collector, run=run, progress=progress)
        watch(self)

    @classmethod
    def start(
        cls,
        path: str | os.PathLike,
        config: Settings | None = None,
        *,
        progress: bool = False,
        **given: Any,
    ) -> ConfiguredTrainer:
        """Make a run in a new folder; :meth:`train` runs it.

        Args:
            path: the folder; an empty one may be there already.
            config: the settings.

        Keyword Args:
            progress, given: as for the trainer itself.

        Raises:
            FileExistsError: if the folder is not empty.
            TypeError: if the run would be saved under the name of another recipe.
        """
        cls._check_registered()
        RunFolder.check_free(path)
        config, objects = cls.configured(config, given)
        # The trainer is built first, so that errors leave no folder behind.
        trainer = cls(config, progress=progress, **objects)
        check_loggers(config.logger)
        trainer.collector.prepare()
        content = {
            "algorithm": cls.recipe_class.name,
            "recipe": path_of(cls.recipe_class),
            "config": asdict(config),
            "given": sorted(objects),
            # Where "module:function" was found, to open the run from another folder.
            "python_path": _own_paths(),
        }
        trainer.attach(RunFolder.create(path, content))
        return trainer

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike,
        *,
        checkpoint: int | None = None,
        progress: bool = False,
        **given: Any,
    ) -> ConfiguredTrainer:
        """Return a run at its newest checkpoint; :meth:`train` goes on with it.

        A run that was stopped before its first checkpoint begins again.

        Args:
            path: the run's folder.

        Keyword Args:
            checkpoint: the step of another checkpoint that the folder has.
            progress: show a progress bar.
            given: objects that the run was started with beside its config: an env, functions;
                a later end of the run, such as ``steps=50_000``; another ``device`` or
                ``ray_address``.

        Raises:
            FileNotFoundError: if the folder is not one of a run, or has no such checkpoint.
            ValueError: if its content is damaged, or of another recipe, or the run would end
                earlier.
        """
        run = RunFolder.open(path)
        cls._check_is_mine(run)
        _use_paths(run.config.get("python_path", []))
        config = cls.recipe_class.config_class.from_json(run.config["config"])
        objects = {**given}
        changes = {
            field.name: objects.pop(field.name)
            for field in fields(config)
            if field.name in objects
            and (field.name != "env" or isinstance(objects["env"], str))
        }
        _, objects = cls.configured(config, objects)
        cls._check_given(run, objects)
        if "env" in changes and changes["env"] == config.env:
            changes.pop("env")
        places = {name: changes.pop(name) for name in config.PLACES if name in changes}
        config = replace(config, **places).lengthened(changes)
        trainer = cls(config, run=run, progress=progress, **objects)
        run.config["config"] = asdict(config)
        if run.saved() or checkpoint is not None:
            trainer.load(checkpoint)
        if changes and trainer.is_over:
            warnings.warn(
                f"The run in {str(run.path)!r} has made {trainer.collected_frames} steps and is over "
                f"with {changes} as well. Give a later end: {list(config.ENDS)}.",
                stacklevel=2,
            )
        return trainer

    @classmethod
    def configured(
        cls, config: Settings | None, given: Mapping[str, Any]
    ) -> tuple[Settings, dict[str, Any]]:
        """Return the config with the settings among ``given``, and the objects among them.

        Raises:
            TypeError: if ``config`` is that of another recipe, or a setting is unknown.
        """
        names = ("env", *cls.recipe_class.objects)
        settings = {name: given[name] for name in given if name not in names}
        # None is a value of a setting; for an object it means that there is none.
        objects = {name: given[name] for name in names if given.get(name) is not None}
        if isinstance(objects.get("env"), str):
            settings["env"] = objects.pop("env")
        return cls.recipe_class.config_class.make(config, settings), objects

    @classmethod
    def _check_registered(cls) -> None:
        """Refuse to save a run that :func:`resume_run` would open as another recipe."""
        name, kind = cls.recipe_class.name, cls.recipe_class
        registered = find_recipe(name).load() if name else None
        if registered is not kind or cls is not trainer_class(kind):
            raise TypeError(
                f"A run of {cls.__name__} would be saved as {name!r}, which is "
                f"{registered.__name__ if registered else 'no recipe'}, and be opened as that. "
                f"Make a subclass of the recipe {kind.__name__}, and register it under a name of "
                f"its own: torchrl_wm.trainers.register_recipe('my-{name}', ...)."
            )

    @classmethod
    def _check_is_mine(cls, run: RunFolder) -> None:
        algorithm, mine = run.config.get("algorithm"), cls.recipe_class
        if algorithm != mine.name or run.config.get("recipe") != path_of(mine):
            raise ValueError(
                f"{str(run.path)!r} is a run of {algorithm!r} ({run.config.get('recipe')}), and "
                f"this is {mine.name!r} ({path_of(mine)})."
            )

    @classmethod
    def _check_given(cls, run: RunFolder, objects: Mapping[str, Any]) -> None:
        """Refuse to go on without the objects that no file can hold."""
        missing = sorted(set(run.config.get("given", [])) - set(objects))
        if missing:
            raise ValueError(
                f"The run in {str(run.path)!r} was started with {missing} from Python, which no "
                f"file can hold. Give the same again: {cls.__name__}.resume(path, "
                f"{', '.join(f'{name}=...' for name in missing)})."
            )


_TRAINERS: dict[type[Recipe], type[ConfiguredTrainer]] = {}


def trainer_class(recipe: str | type[Recipe]) -> type[ConfiguredTrainer]:
    """Return the trainer of a recipe.

    Args:
        recipe: its class, or its name.

    Raises:
        ValueError: if there is no recipe of that name.

    Examples:
        >>> from torchrl_wm.trainers import trainer_class
        >>> trainer_class("pets").__name__
        'PETSTrainer'
    """
    kind = find_recipe(recipe).load() if isinstance(recipe, str) else recipe
    if kind not in _TRAINERS:
        name = f"{kind.__name__}Trainer"
        content = {"recipe_class": kind, "__doc__": kind.__doc__}
        content["__module__"] = __name__
        _TRAINERS[kind] = type(name, (ConfiguredTrainer,), content)
    return _TRAINERS[kind]


def start_run(
    recipe: str, path: str | os.PathLike, config: Settings | None = None, **given: Any
) -> ConfiguredTrainer:
    """Make a run of a recipe in a new folder; its ``train()`` runs it.

    Args:
        recipe: the name.
        path, config, given: see :meth:`ConfiguredTrainer.start`.

    Examples:
        >>> import tempfile
        >>> from torchrl_wm.trainers import resume_run, start_run
        >>> settings = dict(max_episode_steps=20, random_steps=20, trials=1, model_steps=5)
        >>> settings.update(planning_horizon=3, num_candidates=20, top_k=5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     start_run("pets", folder + "/run", env="Pendulum-v1", **settings).train()
        ...     again = resume_run(folder + "/run", trials=2)
        ...     again.train()
        >>> [row["step"] for row in again.metrics]
        [20, 40, 60]
    """
    return trainer_class(recipe).start(path, config, **given)


def resume_run(path: str | os.PathLike, **given: Any) -> ConfiguredTrainer:
    """Return the run of a folder at its newest checkpoint; its ``train()`` goes on with it.

    Args:
        path: the folder.
        given: see :meth:`ConfiguredTrainer.resume`.

    Raises:
        FileNotFoundError: if the folder is not one of a run.
        ValueError: if its recipe is not known here, or another recipe has its name.
    """
    return trainer_of(path).resume(path, **given)


def trainer_of(path: str | os.PathLike) -> type[ConfiguredTrainer]:
    """Return the trainer of the recipe of a run's folder."""
    run = RunFolder.open(path)
    _use_paths(run.config.get("python_path", []))
    if "algorithm" not in run.config:
        raise ValueError(
            f"{str(run.path / 'config.json')!r} does not name the recipe of the run: it has no "
            f"'algorithm'."
        )
    entry = find_recipe(run.config["algorithm"], run.config.get("recipe"))
    return trainer_class(entry.name)


def _own_paths() -> list[str]:
    """Return where modules of the user's are found: the path without installed packages."""
    # Not by Python's own prefix: with /usr that would also match /usr/src/app.
    library = sysconfig.get_path("stdlib")
    installed = ("site-packages", "dist-packages")
    return [
        entry
        for entry in map(os.path.abspath, sys.path)
        if os.path.isdir(entry)
        and not Path(entry).is_relative_to(library)
        and not {*Path(entry).parts}.intersection(installed)
    ]


def _use_paths(paths: list[str]) -> None:
    """Add the folders in which modules were found when the run was started."""
    known = {os.path.abspath(entry) for entry in sys.path}
    sys.path.extend(entry for entry in paths if entry not in known)
