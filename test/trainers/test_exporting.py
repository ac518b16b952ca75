"""Exported policies: programs that act as the run does, without this package."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from _real_envs import DREAMER, make_nested, make_reacher, MBPO, PETS, PLANET, TDMPC2
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.data import Unbounded
from torchrl.envs import (
    CatFrames,
    GymEnv,
    ObservationNorm,
    TensorDictPrimer,
    TransformedEnv,
    UnsqueezeTransform,
)

from torchrl_wm.models import make_rssm_world_model, make_transformer_world_model
from torchrl_wm.trainers import (
    DeviationError,
    DreamerTrainer,
    export_policy,
    load_policy,
    MBPOTrainer,
    PETSTrainer,
    PlaNetTrainer,
    Policy,
    Recipe,
    start_run,
    TDMPC2Trainer,
    trainer_class,
)
from torchrl_wm.trainers.exporting.draws import GivenDraws
from torchrl_wm.trainers.pixels import reduced

QUICK = {"steps": 30, "evaluation_interval": 0, "logger": "csv"}
#: What stands for each draw, of the run's own policy and of the exported one.
DRAWN = {"uniform": 0.7, "normal": -0.4}

# Reads what an export says of itself, and acts: nothing of it is from this package.
RUNNER = """
import json, pathlib, sys
import torch


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torchrl_wm", "torchrl", "tensordict", "gymnasium"):
            raise ImportError(f"{name} is not installed here")


sys.meta_path.insert(0, Blocked())
try:
    import tensordict
except ImportError:
    pass
else:
    raise SystemExit("tensordict can be imported")


def run(program, described, observations):
    state, actions, drawn = {}, [], {"uniform": 0.7, "normal": -0.4}
    for number, row in enumerate(observations):
        inputs = {}
        for port in described["inputs"]:
            name, kind, dtype = port["name"], port["kind"], getattr(torch, port["dtype"])
            shape = [1, *port["shape"][1:]]
            if kind == "observation":
                inputs[name] = torch.tensor(row[name], dtype=dtype)[None]
            elif kind == "carried":
                inputs[name] = state.get(name, torch.full(shape, 7, dtype=dtype))
            elif kind == "is_init":
                inputs[name] = torch.tensor([number == 0])
            else:
                inputs[name] = torch.full(shape, drawn[kind], dtype=dtype)
        out = program(inputs)
        state = {name: out[of] for name, of in described["carried"].items()}
        actions.append(out["action"][0].tolist())
    return actions


found = {}
for folder, observations in json.loads(pathlib.Path(sys.argv[1]).read_text()).items():
    described = json.loads(pathlib.Path(folder, "policy.json").read_text())
    program = torch.export.load(pathlib.Path(folder, "policy.pt2")).module()
    found[folder] = run(program, described, observations)
pathlib.Path(sys.argv[2]).write_text(json.dumps(found))
"""


class Case:
    """An export, and what the run's own policy does in some steps of a Gymnasium env."""

    def __init__(self, folder: Path, trainer, written, env) -> None:
        self.trainer, self.written = trainer, written
        self.described = json.loads(written.files["json"].read_text())
        assert self.described == written.described
        self.observations, self.actions = [], []
        policy, pixels = Policy(trainer), trainer.config.pixels
        observation, _ = env.reset(seed=3)
        for _ in range(4):
            seen = env.render() if pixels else observation
            with GivenDraws(lambda kind, size, dtype: torch.full(size, DRAWN[kind])):
                self.actions.append(policy.act(seen))
            # Frames are brought to the run's size before the program.
            seen = reduced(seen, pixels).numpy() if pixels else seen
            self.observations.append(self.named(seen))
            observation, *_ = env.step(self.actions[-1])

    def named(self, seen) -> dict:
        ports = [p for p in self.described["inputs"] if p["kind"] == "observation"]
        if isinstance(seen, dict):
            return {name: value.tolist() for name, value in seen.items()}
        (port,) = ports
        return {port["name"]: np.asarray(seen).tolist()}


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    """Exports of small runs, each of another kind."""
    runs = {
        "nested": (MBPOTrainer, {**MBPO, "env": make_nested}, "Pendulum-v1", None),
        "dict": (MBPOTrainer, {**MBPO, "env": make_reacher}, make_reacher, ["pt2"]),
        "choice": (
            TDMPC2Trainer,
            {**TDMPC2, "env": "CartPole-v1", "evaluate_with": "policy"},
            "CartPole-v1",
            ["pt2"],
        ),
        "recurrent": (
            DreamerTrainer,
            {**DREAMER, "env": "CartPole-v1"},
            "CartPole-v1",
            None,
        ),
        "images": (
            DreamerTrainer,
            {**DREAMER, "version": "v1", "pixels": 24},
            "Pendulum-v1",
            ["pt2"],
        ),
    }
    made = {}
    for name, (kind, settings, env, formats) in runs.items():
        trainer = kind(**{**settings, **QUICK})
        trainer.train()
        folder = tmp_path_factory.mktemp(name)
        written = export_policy(trainer, folder, formats=formats, steps=15)
        if isinstance(env, str):
            env = gymnasium.make(env, render_mode="rgb_array")
        else:
            env = env()
        made[name] = Case(folder, trainer, written, env)
    return made


def test_it_acts_where_the_package_is_missing(cases, tmp_path) -> None:
    given, found = tmp_path / "given.json", tmp_path / "found.json"
    observations = {
        str(case.written.folder): case.observations for case in cases.values()
    }
    given.write_text(json.dumps(observations))
    words = [sys.executable, "-c", RUNNER, str(given), str(found)]
    subprocess.run(words, check=True, cwd=tmp_path, env={"PATH": ""})
    acted = json.loads(found.read_text())
    for name, case in cases.items():
        actions = np.array(acted[str(case.written.folder)])
        assert np.abs(actions - np.stack(case.actions)).max() < 1e-5, name
        assert len(np.unique(actions)) > 1 or name in ("choice", "recurrent")


@pytest.mark.parametrize("name", ["nested", "recurrent"])
def test_onnx_acts_the_same_in_batches_of_any_size(cases, name) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    case = cases[name]
    pt2 = torch.export.load(case.written.files["pt2"]).module()
    session = onnxruntime.InferenceSession(case.written.files["onnx"])
    assert [port.name for port in session.get_inputs()] == [
        port["name"] for port in case.described["inputs"]
    ]
    outputs = [port["name"] for port in case.described["outputs"]]
    assert [port.name for port in session.get_outputs()] == outputs
    for rows in (1, 3, 300):
        inputs = {}
        for port in case.described["inputs"]:
            shape, dtype = (rows, *port["shape"][1:]), getattr(torch, port["dtype"])
            inputs[port["name"]] = torch.rand(shape).round(decimals=2).to(dtype)
        expected = pt2(inputs)
        arrays = {name: value.numpy() for name, value in inputs.items()}
        for name, value in zip(outputs, session.run(None, arrays)):
            assert value.shape == expected[name].shape
            assert np.abs(value - expected[name].numpy()).max() < 1e-5


def test_inputs_and_outputs_are_described(cases) -> None:
    nested, images = cases["nested"].described, cases["images"].described
    (port,) = nested["inputs"]
    assert (port["name"], port["shape"]) == ("observation", ["N", 3])
    assert (port["low"], port["high"]) == ([-1, -1, -8], [1, 1, 8])
    (action,) = nested["outputs"]
    assert (action["low"], action["high"], action["dtype"]) == (-2, 2, "float32")
    assert nested["transforms"] == {"inside": ["RenameTransform"], "outside": []}
    assert not nested["carried"] and nested["check"]["steps"] == 15
    assert set(nested["check"]["largest_deviation"]) == {"pt2", "onnx"}
    kinds = {port["name"]: (port["kind"], port["shape"]) for port in images["inputs"]}
    assert kinds["pixels"] == ("observation", ["N", 24, 24, 3])
    assert kinds["is_init"] == ("is_init", ["N"])
    # One input for what begins and what goes on; the prior's own draw is of no use.
    assert [kind for kind, _ in kinds.values() if kind in DRAWN] == ["normal"]
    assert images["carried"] == {
        name: f"next_{name}" for name in ("state", "belief", "last_action")
    }
    # Its observations have infinite bounds, between which nothing is drawn.
    recurrent = cases["recurrent"].described["inputs"]
    (draw,) = (port for port in recurrent if port["kind"] in DRAWN)
    assert draw["kind"] == "uniform" and "[0, 1)" in draw["form"]
    choice = cases["choice"].described["outputs"][0]
    assert choice["dtype"] == "int64" and (choice["low"], choice["high"]) == (0, 1)
    assert "0 to 1" in choice["form"] and choice["shape"] == ["N"]


def test_files_hold_what_acts_and_no_more(cases) -> None:
    case = cases["recurrent"]
    program = torch.export.load(case.written.files["pt2"])
    sizes = {name: value.numel() for name, value in program.state_dict.items()}
    assert any(size for name, size in sizes.items() if "posterior" in name)
    assert not any(size for name, size in sizes.items() if "decoder" in name)
    for case in cases.values():
        with zipfile.ZipFile(case.written.files["pt2"]) as file:
            (graph,) = (n for n in file.namelist() if n.endswith("/model.json"))
            text = file.read(graph)
        assert b"stack_trace" not in text and b"site-packages" not in text
    assert all(p.numel() for p in case.trainer.world_model.decoder.parameters())


def test_a_run_is_exported_from_its_folder(tmp_path) -> None:
    trainer = start_run("mbpo", tmp_path / "run", **{**MBPO, **QUICK})
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        export_policy(tmp_path / "run", formats="pt2")
    trainer.train()
    state = torch.get_rng_state()
    written = export_policy(tmp_path / "run", formats="pt2", steps=3)
    assert torch.equal(state, torch.get_rng_state())
    assert written.folder == tmp_path / "run" / "export"
    assert sorted(p.name for p in written.folder.iterdir()) == [
        "policy.json",
        "policy.pt2",
    ]
    act = torch.export.load(written.files["pt2"]).module()
    action = act({"observation": torch.full((1, 3), 0.5)})["action"][0]
    expected = load_policy(tmp_path / "run").act(np.full(3, 0.5, np.float32))
    assert np.abs(action.numpy() - expected).max() < 1e-5


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        (PETSTrainer, PETS, "'pets' is a planner.*load_policy"),
        (PlaNetTrainer, PLANET, "'planet' is a planner"),
        (TDMPC2Trainer, TDMPC2, "planner.*policy='prior'.*--policy prior"),
    ],
)
def test_planners_stay_with_python(kind, settings, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        export_policy(kind(**settings), tmp_path, formats="pt2")
    assert not list(tmp_path.iterdir())


def test_the_policy_without_a_plan_is_exported_by_name(tmp_path) -> None:
    trainer = TDMPC2Trainer(**TDMPC2)
    written = export_policy(trainer, tmp_path, formats="pt2", policy="prior", steps=5)
    assert written.described["policy"] == "prior"
    acting = Policy(trainer, module=trainer.recipe.actor)
    observation = np.array([0.6, 0.8, 1], np.float32)
    act = torch.export.load(written.files["pt2"]).module()
    action = act({"observation": torch.tensor(observation)[None]})["action"][0].numpy()
    assert np.abs(action - acting.act(observation)).max() < 1e-5
    with pytest.raises(ValueError, match=r"\['policy', 'prior'\], and not 'actor'"):
        export_policy(trainer, tmp_path, policy="actor")


# Recipes of one's own ----------------------------------------------------------------------


class Own(Recipe):
    """Learns nothing; a subclass makes its policy."""

    name = "own"

    def __init__(self, config, env):
        super().__init__(config, env)
        self.policy, self.parts = self.make(env), {}

    def learn(self, steps):
        return {}


class Counting(TensorDictModule):
    """Hands on how often it has acted in an episode, and says so by its action."""

    def __init__(self):
        keys = ["observation", "acted", "is_init"]
        super().__init__(self._act, keys, ["action", ("next", "acted")])

    @staticmethod
    def _act(observed, acted, begins):
        acted = torch.where(begins, 0, acted) + 1
        return (acted / 10 + observed[..., :1]).float(), acted

    def make_tensordict_primer(self, reset_key=None):
        return TensorDictPrimer(
            acted=Unbounded((1,), dtype=torch.int64), reset_key=reset_key
        )


class Counted(Own):
    def make(self, env):
        return Counting()


class Observing(Own):
    """A filter before an actor, in a sequential of TorchRL's."""

    @staticmethod
    def model(env):
        return make_rssm_world_model(env, belief_size=8)

    def make(self, env):
        world_model, _ = self.model(env)
        observer = world_model.observer()
        size = env.action_spec.shape[-1]
        latent = observer.out_keys[-1]
        actor = TensorDictModule(torch.nn.LazyLinear(size), [latent], ["action"])
        policy = TensorDictSequential(observer, actor)
        policy.make_tensordict_primer = observer.make_tensordict_primer
        policy(env.reset())
        return policy


class Remembering(Observing):
    @staticmethod
    def model(env):
        return make_transformer_world_model(env, width=8, heads=2, layers=1)


class Of(Own):
    """A policy that is a function of the observation."""

    @staticmethod
    def act(observation):
        return observation[..., :1]

    def make(self, env):
        return TensorDictModule(self.act, ["observation"], ["action"])


class Branching(Of):
    @staticmethod
    def act(observation):
        if observation[..., :1].sum() > 0:
            return observation[..., :1]
        return -observation[..., :1]


class InRows(Of):
    @staticmethod
    def act(observation):
        return observation[..., 0, :1]


class Choosing(Of):
    @staticmethod
    def act(observation):
        return torch.nn.functional.one_hot((observation[..., 0] > 0).long(), 2)


class Renewing(Of):
    """Writes the observation anew before it acts."""

    def make(self, env):
        halved = TensorDictModule(lambda x: x / 2, ["observation"], ["observation"])
        return TensorDictSequential(halved, super().make(env))


class Timed(Of):
    def make(self, env):
        keys = ["observation", "step_count"]
        return TensorDictModule(lambda x, count: x[..., :1] * count, keys, ["action"])


class Mixing(Of):
    """Each row depends on the whole batch."""

    @staticmethod
    def act(observation):
        return observation[..., :1] - observation.mean()


class Drawing(Of):
    @staticmethod
    def act(observation):
        return torch.bernoulli(observation[..., :1].sigmoid())


class Hiding(Drawing):
    """Draws in a part of the program with a mode of gradients of its own."""

    @staticmethod
    @torch.enable_grad()
    def act(observation):
        return Drawing.act(observation)


def export(kind: type[Recipe], folder: Path, **settings):
    settings = {"env": "Pendulum-v1", "max_episode_steps": 8, **settings}
    trainer = trainer_class(kind)(**settings)
    trainer.env.reset()  # some transforms know the shapes of what they keep only then
    return export_policy(trainer, folder, formats="pt2", steps=20)


def test_what_a_policy_carries_is_input_and_output(tmp_path) -> None:
    written = export(Counted, tmp_path)
    assert written.described["carried"] == {"acted": "next_acted"}
    act = torch.export.load(written.files["pt2"]).module()
    inputs = {"observation": torch.zeros(2, 3), "acted": torch.tensor([[4], [4]])}
    out = act({**inputs, "is_init": torch.tensor([True, False])})
    assert torch.allclose(out["action"], torch.tensor([[0.1], [0.5]]))
    assert out["next_acted"].tolist() == [[1], [5]]


def test_a_filter_in_a_sequential_is_exported(tmp_path) -> None:
    written = export(Observing, tmp_path)
    assert {"state", "belief", "last_action"} == set(written.described["carried"])


def test_transforms_of_a_step_are_inside_and_others_are_named(tmp_path) -> None:
    def norm():
        keys = {"in_keys": ["observation"], "out_keys": ["observation"]}
        return ObservationNorm(loc=1.0, scale=2.0, **keys)

    def stacked():
        stack = CatFrames(2, dim=-1, in_keys=["observation"])
        return TransformedEnv(TransformedEnv(GymEnv("Pendulum-v1"), norm()), stack)

    one = export(
        Of, tmp_path / "one", env=lambda: TransformedEnv(GymEnv("Pendulum-v1"), norm())
    )
    assert one.described["transforms"]["inside"] == ["ObservationNorm"]
    act = torch.export.load(one.files["pt2"]).module()
    assert act({"observation": torch.full((1, 3), 0.25)})["action"].item() == 1.5
    two = export(Of, tmp_path / "two", env=stacked)
    assert two.described["transforms"]["outside"] == ["ObservationNorm", "CatFrames"]
    assert two.described["inputs"][0]["shape"] == ["N", 6]


def test_dims_from_the_left_stay_outside(tmp_path) -> None:
    def first():
        layer = UnsqueezeTransform(0, allow_positive_dim=True, in_keys=["observation"])
        return TransformedEnv(GymEnv("Pendulum-v1"), layer)

    written = export(InRows, tmp_path, env=first)
    assert written.described["transforms"]["outside"] == ["UnsqueezeTransform"]
    assert written.described["inputs"][0]["shape"] == ["N", 1, 3]


def test_what_the_env_shows_is_not_carried(tmp_path) -> None:
    written = export(Renewing, tmp_path)
    assert [port["kind"] for port in written.described["inputs"]] == ["observation"]
    act = torch.export.load(written.files["pt2"]).module()
    assert act({"observation": torch.full((1, 3), 0.5)})["action"].item() == 0.25


def test_options_have_the_dtype_of_the_env(tmp_path) -> None:
    class Narrow(gymnasium.make("CartPole-v1").unwrapped.__class__):
        def __init__(self):
            super().__init__()
            self.action_space.dtype = np.dtype(np.int32)

    written = export(Choosing, tmp_path, env=Narrow)
    assert written.described["outputs"][0]["dtype"] == "int32"
    act = torch.export.load(written.files["pt2"]).module()
    assert act({"observation": torch.ones(1, 4)})["action"].dtype == torch.int32


@pytest.mark.parametrize(
    "kind, error, message",
    [
        (
            Timed,
            ValueError,
            r"\['step_count'\], which the env does not observe.*load_policy",
        ),
        (Branching, ValueError, "torch.export cannot follow.*torch.where"),
        (Mixing, DeviationError, "deviate by .*1e-05 is allowed.*No file"),
        (Drawing, ValueError, "draws random numbers by aten.bernoulli.*torch.rand"),
        (Hiding, ValueError, "draws random numbers by aten.bernoulli.*torch.rand"),
        (Remembering, ValueError, "memory.*load_policy"),
    ],
)
def test_what_cannot_be_exported_leaves_no_file(kind, error, message, tmp_path) -> None:
    with pytest.raises(error, match=message):
        export(kind, tmp_path)
    assert not list(tmp_path.iterdir())


def test_wrong_words_are_named(tmp_path, monkeypatch) -> None:
    trainer = trainer_class(Of)(env="Pendulum-v1")
    with pytest.raises(ValueError, match=r"\['pt2', 'onnx'\], got \['tflite'\]"):
        export_policy(trainer, tmp_path, formats="tflite")
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        export_policy(trainer, tmp_path, formats="pt2", steps=0)
    with pytest.raises(ValueError, match="no folder"):
        export_policy(trainer, formats="pt2")
    trainer.recipe.policy = None
    with pytest.raises(ValueError, match="'own' learns no policy"):
        export_policy(trainer, tmp_path, formats="pt2")
    hidden = ("onnx", "onnxscript")
    monkeypatch.setattr(
        "torchrl_wm.trainers.exporting.formats.find_spec",
        lambda name: name not in hidden,
    )
    with pytest.raises(ImportError, match=r"onnx, onnxscript: .*torchrl-wm\[export\]"):
        export_policy(trainer, tmp_path, formats=["onnx"])
