"""World models in files: they come back as they were, and files are not trusted."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
import zipfile

import pytest
import torch
from _models import make_model, transitions
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Categorical
from torchrl.envs import GymEnv
from torchrl.modules import MLP

from torchrl_wm import WorldModel
from torchrl_wm.models import (
    load_world_model,
    make_ensemble_world_model,
    make_jepa_world_model,
    make_mlp_world_model,
    save_world_model,
)
from torchrl_wm.models.building import BUILDERS
from torchrl_wm.models.persistence import FORMAT, VERSION
from torchrl_wm.modules import (
    EnsembleLinear,
    fit_normalizers,
    penalty_of,
    with_penalty,
    with_propagation,
    without_penalty,
)
from torchrl_wm.modules.keys import join

SMALL = {
    "diffusion": {"hidden": (8,), "noise_features": 4},
    "ensemble": {"members": 3, "elites": 2, "hidden": (8,), "termination_hidden": (8,)},
    "jepa": {"hidden": (8,), "latent_size": 4, "probe": True, "reward": True},
    "mlp": {"hidden": (8,), "latent_size": 4},
}
MAKE = {
    "ensemble": make_ensemble_world_model,
    "jepa": make_jepa_world_model,
    "mlp": make_mlp_world_model,
}


def make(name: str, env=None, **settings):
    env = GymEnv("CartPole-v1") if env is None else env
    return MAKE[name](env, **{**SMALL[name], **settings})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype
        assert torch.equal(left[key], right[key]), key


@pytest.mark.parametrize("name", sorted(MAKE))
def test_a_ready_made_model_comes_back_by_itself(name, path) -> None:
    world_model, _ = make(name)
    batch = GymEnv("CartPole-v1").rollout(20, break_when_any_done=False)
    fit_normalizers(world_model, batch)
    save_world_model(world_model, path)
    before = torch.get_rng_state()
    again = load_world_model(path)
    assert torch.equal(torch.get_rng_state(), before), "loading drew random numbers"
    assert_equal(world_model, again)
    assert again.recipe == world_model.recipe
    outs = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the normalisers are fitted
        for model in (world_model, again):
            torch.manual_seed(0)
            outs.append(model(batch.exclude("next"))["next", "reward"])
    assert torch.equal(*outs)
    assert os.listdir(path.parent) == [path.name], "something else was left behind"


@pytest.mark.parametrize("name", sorted(MAKE))
def test_nested_keys_and_categorical_actions_come_back(name, path) -> None:
    from _models import SpecEnv

    env = SpecEnv(
        observation_key=("robot", "state"),
        action_key=("robot", "move"),
        reward_key=("robot", "score"),
        action_spec=Categorical(3),
        extra_observations={"goal": (2, 2)},
    )
    world_model, _ = make(name, env, observation_keys=(("robot", "state"), "goal"))
    save_world_model(world_model, path)
    again = load_world_model(path)
    assert again.recipe == world_model.recipe and again.in_keys == world_model.in_keys
    assert_equal(world_model, again)


def test_weights_load_into_a_model_and_reach_its_loss(path) -> None:
    world_model, _ = make("ensemble")
    save_world_model(world_model, path)
    other, loss = make("ensemble")
    batch = GymEnv("CartPole-v1").rollout(5, break_when_any_done=False)
    with pytest.warns(UserWarning, match="normaliser"):
        before = loss(batch)["loss_nll"]
    assert load_world_model(path, other) is other
    assert_equal(world_model, other)
    assert not torch.equal(loss(batch)["loss_nll"], before)


def test_a_hand_wired_model_loads_into_an_instance(path) -> None:
    world_model, other = make_model(done="terminated_logits"), make_model(
        done="terminated_logits"
    )
    save_world_model(world_model, path)
    assert_equal(load_world_model(path, other), world_model)
    with pytest.raises(ValueError, match="wired by hand"):
        load_world_model(path)


def replaced_head(world_model) -> None:
    old = world_model.reward_head
    world_model.reward_head = TensorDictModule(nn.Identity(), old.in_keys, old.out_keys)


def replaced_layer(world_model) -> None:
    world_model.dynamics.module.step.ensemble.network.layers[0] = EnsembleLinear(
        3, 6, 8
    )


def added_module(world_model) -> None:
    world_model.reward_head.module.extra = nn.ReLU()


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("change", [replaced_head, replaced_layer, added_module])
def test_a_model_with_other_parts_is_wired_by_hand(change, view, path) -> None:
    """It has settings that would make another model of the same weights."""
    world_model, _ = make("ensemble")
    change(world_model)
    if view:
        world_model = with_propagation(world_model, "tsinf")
    save_world_model(world_model, path)
    with pytest.raises(
        ValueError, match="wired by hand, or a component of it was replaced"
    ):
        load_world_model(path)
    other, _ = make("ensemble")
    change(other)
    if view:
        other = with_propagation(other, "tsinf")
    assert_equal(load_world_model(path, other), world_model)


def copied(world_model):
    return copy.deepcopy(world_model)


def pickled(world_model):
    return pickle.loads(pickle.dumps(world_model))


def moved(world_model):
    return world_model.to(torch.float64)


def viewed(world_model):
    return with_propagation(world_model, "mean", all_members=False)


def put_back(world_model):
    head = world_model.reward_head
    replaced_head(world_model)
    world_model.reward_head = head
    return world_model


@pytest.mark.parametrize("change", [copied, pickled, moved, viewed, put_back])
def test_a_model_of_the_same_parts_needs_no_wiring(change, path) -> None:
    world_model = change(make("ensemble")[0])
    save_world_model(world_model, path)
    again = load_world_model(path)
    assert_equal(again, world_model)
    assert again.recipe == world_model.recipe
    assert again.dynamics.all_members
    replaced_head(world_model)
    save_world_model(world_model, path)
    with pytest.raises(ValueError, match="was replaced"):
        load_world_model(path)


def test_functions_are_no_part_of_a_file(path) -> None:
    def upright(observation, action, next_observation):
        return next_observation[..., 2].abs() < 0.2

    settings = {"termination_function": upright}
    world_model, _ = make("ensemble", **settings)
    save_world_model(world_model, path)
    with pytest.raises(ValueError, match="'termination_function': 'upright'"):
        load_world_model(path)
    other, _ = make("ensemble", **settings)
    assert_equal(load_world_model(path, other), world_model)


def test_dtype_is_kept(path) -> None:
    world_model = make("mlp")[0].double()
    save_world_model(world_model, path)
    assert_equal(load_world_model(path), world_model)
    with pytest.raises(ValueError, match=r"world_model.to\(torch.float64\)"):
        load_world_model(path, make("mlp")[0])


class Mine(nn.Module):
    """A class that only code could bring back."""


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_errors(share, path) -> None:
    save_world_model(make("mlp")[0], path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="no world model file, or a damaged one"):
        load_world_model(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\x80\x04N.", b"PK\x03\x04" + bytes(100), bytes(1000)],
)
def test_foreign_bytes_are_errors(content, path) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no world model file"):
        load_world_model(path)


@pytest.mark.parametrize("kind", ["state_dict", "tensor", "other format"])
def test_foreign_torch_files_are_errors(kind, path) -> None:
    world_model, _ = make("mlp")
    content = {
        "state_dict": world_model.state_dict(),
        "tensor": torch.zeros(3),
        "other format": {"format": "something", "state_dict": {}},
    }[kind]
    torch.save(content, path)
    with pytest.raises(ValueError, match="a file of torch, but no world model file"):
        load_world_model(path)


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_file_never_runs(into, writer, path, tmp_path) -> None:
    sprung = tmp_path / "sprung"
    world_model, _ = make("mlp")
    content = {
        "format": FORMAT,
        "version": VERSION,
        "recipe": None,
        "state_dict": world_model.state_dict(),
        "extra": Trap(sprung),
    }
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="no world model file"):
        load_world_model(path, world_model if into else None)
    assert not sprung.exists()
    torch.load(path, weights_only=False) if writer == "torch" else pickle.loads(
        path.read_bytes()
    )
    assert sprung.exists(), "the trap itself works"


def rewritten(path, **changes) -> None:
    content = torch.load(path, weights_only=True)
    content.update(changes)
    torch.save(content, path)


def test_a_newer_file_is_an_error(path) -> None:
    save_world_model(make("mlp")[0], path)
    rewritten(path, version=VERSION + 1)
    with pytest.raises(ValueError, match=f"version {VERSION + 1}.*Update"):
        load_world_model(path)


@pytest.mark.parametrize("version", [0, -1, True, "1", 1.0, None])
def test_versions_that_there_never_were_are_errors(version, path) -> None:
    world_model, _ = make("mlp")
    save_world_model(world_model, path)
    rewritten(path, version=version)
    for into in (None, world_model):
        with pytest.raises(ValueError, match=f"of version {version!r} of the format"):
            load_world_model(path, into)


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize(
    "where",
    [
        ("functions",),
        ("config", "latent_size"),
        ("config", "hidden"),
        ("specs", "reward", 0, "shape", 0),
        ("specs", "actions", 0, "key"),
    ],
)
@pytest.mark.parametrize("tensor", [torch.zeros(2), torch.tensor(4)])
def test_tensors_are_no_settings(where, into, tensor, path) -> None:
    """They compare as nothing else does, and would do so in the middle of loading."""
    world_model, _ = make("mlp")
    save_world_model(world_model, path)
    recipe = torch.load(path, weights_only=True)["recipe"]
    place = recipe
    for step in where[:-1]:
        place = place[step]
    place[where[-1]] = tensor
    rewritten(path, recipe=recipe)
    with pytest.raises(ValueError, match="settings in .*model.pt.*is a tensor"):
        load_world_model(path, world_model if into else None)


def lazy_model(key) -> WorldModel:
    latent = join("next", key)
    return WorldModel(
        TensorDictModule(nn.LazyLinear(4), ["observation"], [key]),
        TensorDictModule(MLP(out_features=4, num_cells=[8]), [key, "action"], [latent]),
        TensorDictModule(nn.Linear(4, 1), [latent], [("next", "reward")]),
    )


@pytest.mark.parametrize("key", ["latent", ("deep", "latent")])
def test_a_lazy_model_is_saved_once_it_has_run(key, path) -> None:
    world_model, batch = lazy_model(key), transitions(3)
    with pytest.raises(
        ValueError, match=r"'encoder.module.weight' has no shape.*once on data first"
    ):
        save_world_model(world_model, path)
    assert not path.exists()
    world_model(batch.exclude("next"))
    save_world_model(world_model, path)
    assert_equal(load_world_model(path, lazy_model(key)), world_model)


def test_settings_of_another_version_are_errors(path) -> None:
    save_world_model(make("mlp")[0], path)
    recipe = torch.load(path, weights_only=True)["recipe"]
    rewritten(path, recipe={**recipe, "builder": "quantum"})
    with pytest.raises(ValueError, match="'quantum' is unknown.*'ensemble'"):
        load_world_model(path)
    config = {**recipe["config"], "flux": 1}
    rewritten(path, recipe={**recipe, "config": config})
    with pytest.raises(ValueError, match="no setting 'flux'"):
        load_world_model(path)
    rewritten(path, recipe={"builder": "mlp"})
    with pytest.raises(ValueError, match="'config'"):
        load_world_model(path)


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize(
    "where", ["recipe", "config", "specs", "builder", "state_dict"]
)
@pytest.mark.parametrize("value", [7, [1], "x", {"a": 1}, {1: 2}])
def test_malformed_contents_are_errors(where, value, into, path) -> None:
    world_model, _ = make("mlp")
    save_world_model(world_model, path)
    recipe = torch.load(path, weights_only=True)["recipe"]
    if where in ("recipe", "state_dict"):
        rewritten(path, **{where: value})
    else:
        rewritten(path, recipe={**recipe, where: value})
    if into and where == "config" and isinstance(value, dict):
        load_world_model(path, world_model)  # settings of another version
        return
    with pytest.raises(ValueError, match="model.pt"):
        load_world_model(path, world_model if into else None)


@pytest.mark.parametrize("hidden", ["x", -1, (0.5,), ("a",), None])
def test_settings_that_no_network_takes_are_errors(hidden, path) -> None:
    save_world_model(make("mlp")[0], path)
    recipe = torch.load(path, weights_only=True)["recipe"]
    config = {**recipe["config"], "hidden": hidden}
    rewritten(path, recipe={**recipe, "config": config})
    with pytest.raises(ValueError, match="settings in .*model.pt"):
        load_world_model(path)


def test_other_models_are_refused_before_anything_changes(path) -> None:
    save_world_model(make("mlp")[0], path)
    other, _ = make("mlp", hidden=(9,))
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.warns(UserWarning, match="'hidden'"):
        with pytest.raises(ValueError, match=r"\(9, .*in the model, \(8, "):
            load_world_model(path, other)
    after = other.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(ValueError, match="by the builder 'mlp'"):
        load_world_model(path, make("ensemble")[0])
    with pytest.raises(ValueError, match="the file lacks"):
        load_world_model(path, make_model())
    with pytest.raises(ValueError, match="for the env specs"):
        load_world_model(path, make("mlp", GymEnv("Pendulum-v1"))[0])


def test_settings_that_do_not_shape_weights_may_differ_and_are_told(path) -> None:
    world_model, _ = make("ensemble", termination_threshold=0.5)
    save_world_model(world_model, path)
    other, _ = make("ensemble", termination_threshold=0.9)
    with pytest.warns(UserWarning, match=r"'termination_threshold': \(0.5, 0.9\)"):
        load_world_model(path, other)
    assert_equal(world_model, other)


def test_what_no_file_can_hold_is_named(path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self):
            return Mine()

        def set_extra_state(self, state):
            pass

    world_model = make_model()
    world_model.reward_head.module = Odd(4, 1)
    with pytest.raises(TypeError, match="Mine"):
        save_world_model(world_model, path)
    with pytest.raises(TypeError, match="got Linear"):
        save_world_model(nn.Linear(2, 2), path)
    assert not os.listdir(path.parent)


def test_a_failed_write_leaves_the_old_file(path, monkeypatch) -> None:
    world_model, _ = make("mlp")
    save_world_model(world_model, path)

    def fails(content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        save_world_model(make("mlp")[0], path)
    monkeypatch.undo()
    assert_equal(load_world_model(path), world_model)
    assert os.listdir(path.parent) == [path.name]


def test_paths(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        load_world_model(tmp_path / "nowhere.pt")
    save_world_model(make("mlp")[0], str(tmp_path / "a.pt"))
    assert load_world_model(str(tmp_path / "a.pt"), device="cpu").latent_keys == [
        "latent"
    ]
    with pytest.raises(ValueError, match="device is for models that are made anew"):
        load_world_model(tmp_path / "a.pt", make("mlp")[0], device="cpu")


@pytest.mark.parametrize("begin", ["ts1", "tsinf"])
@pytest.mark.parametrize("propagation", ["ts1", "tsinf", "mean"])
def test_views_of_another_propagation_come_back(begin, propagation, path) -> None:
    world_model, _ = make("ensemble", propagation=begin)
    view = with_propagation(world_model, propagation)
    save_world_model(view, path)
    again = load_world_model(path)
    assert again.dynamics.propagation == propagation
    assert again.recipe == view.recipe and again.in_keys == view.in_keys
    assert world_model.recipe.config.propagation == begin
    assert_equal(view, again)


@pytest.mark.parametrize("measure", ["disagreement", "deviation"])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_penalties_come_back(limit, measure, path) -> None:
    world_model, _ = make("ensemble", propagation="tsinf")
    view = with_penalty(world_model, 2.0, measure=measure, limit=limit)
    save_world_model(view, path)
    again = load_world_model(path)
    assert penalty_of(again) == penalty_of(view) and again.recipe == view.recipe
    assert again.dynamics.propagation == "tsinf"
    assert_equal(view, again)
    plain = without_penalty(again)
    assert plain.recipe.penalty is None and world_model.recipe.penalty is None
    plain_path = path.with_name("plain.pt")
    save_world_model(plain, plain_path)
    assert_equal(load_world_model(plain_path), world_model)

    given, _ = make("ensemble", propagation="tsinf")
    with pytest.raises(ValueError, match="holds a model with a penalty.*with_penalty"):
        load_world_model(path, given)
    careful = with_penalty(given, 3.0, measure=measure, limit=limit)
    with pytest.raises(ValueError, match="without a penalty.*without_penalty"):
        load_world_model(plain_path, careful)
    with pytest.warns(UserWarning, match="other settings.*'penalty'"):
        load_world_model(path, careful)
    assert_equal(careful, view)
    assert_equal(load_world_model(plain_path, without_penalty(careful)), world_model)


def test_only_files_with_a_penalty_are_of_the_newer_version(path) -> None:
    world_model, _ = make("ensemble")
    for model, version in ((world_model, 1), (with_penalty(world_model, 1.0), 2)):
        save_world_model(model, path)
        assert torch.load(path, weights_only=True)["version"] == version


@pytest.mark.parametrize("name", ["model.safetensors", "model.npz", "model", "m.zip"])
def test_any_name_will_do(name, tmp_path) -> None:
    world_model, _ = make("mlp")
    save_world_model(world_model, tmp_path / name)
    assert_equal(load_world_model(tmp_path / name), world_model)


def test_changed_bytes_are_errors(path) -> None:
    world_model, _ = make("mlp")
    save_world_model(world_model, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        weights = [info for info in archive.infolist() if "/data/" in info.filename]
    # In the middle of the largest weights, where any bytes are a number.
    largest = max(weights, key=lambda info: info.file_size)
    place = content.index(largest.filename.encode()) + 100 + largest.file_size // 2
    content[place] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged one.*checksum"):
        load_world_model(path)


def test_files_have_the_permissions_of_any_other(path) -> None:
    world_model, _ = make("mlp")
    before = os.umask(0o027)
    try:
        save_world_model(world_model, path)
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o604)
        save_world_model(world_model, path)
        assert path.stat().st_mode & 0o777 == 0o604
    finally:
        os.umask(before)


def test_every_builder_has_a_config_that_a_file_can_hold(path) -> None:
    env = GymEnv("CartPole-v1")
    from torchrl_wm.models.building import build

    for name in sorted(BUILDERS):
        world_model, _ = build(name, env, None, SMALL.get(name, {}))
        save_world_model(world_model, path)
        assert_equal(load_world_model(path), world_model)
