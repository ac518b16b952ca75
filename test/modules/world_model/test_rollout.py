"""Steps through time: the bits of a loop over tensordicts, compiled steps, scans."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from _models import (
    ACTION,
    gru_model,
    LATENT,
    linear,
    make_model,
    OBS,
    rssm_model,
    transitions,
)
from hypothesis import given, settings, strategies as st
from tensordict import TensorDict
from tensordict.nn import (
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule as Mod,
    TensorDictModuleBase,
)
from tensordict.nn.probabilistic import interaction_type
from torch import nn
from torch.distributions import Normal
from torchrl.modules import MLP

from torchrl_wm import WorldModel, WorldModelLoss
from torchrl_wm.modules.keys import is_next, strip_next

# Graphs are captured as for a compiler, and run without one.
CAPTURE = {"backend": "eager"}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def deep_model() -> WorldModel:
    """A recurrent model whose entries are those of three agents."""
    cell = nn.Linear(LATENT + 5 + ACTION, LATENT + 5)

    def dynamics(latent, belief, action):
        out = cell(torch.cat([latent, belief, action], -1)).tanh()
        return out[..., :LATENT], out[..., LATENT:]

    module = Mod(
        dynamics,
        [("agents", "latent"), ("agents", "belief"), ("agents", "action")],
        [("next", "agents", "latent"), ("next", "agents", "belief")],
    )
    module.cell = cell
    return WorldModel(
        linear([("agents", "observation")], [("agents", "latent")], [OBS, LATENT]),
        module,
        linear([("next", "agents", "belief")], [("next", "reward")], [5, 1]),
        initial_state={("agents", "belief"): torch.full((3, 5), 0.5)},
    )


def probabilistic_model() -> WorldModel:
    """A GRU-like model whose dynamics draw the next latent from a distribution."""
    net = MLP(LATENT + ACTION, 2 * LATENT, num_cells=[8])
    base = make_model()
    dynamics = ProbabilisticTensorDictSequential(
        Mod(
            LocScale(net),
            ["latent", "action"],
            [("next", "loc"), ("next", "scale")],
        ),
        ProbabilisticTensorDictModule(
            in_keys={"loc": ("next", "loc"), "scale": ("next", "scale")},
            out_keys=[("next", "latent")],
            distribution_class=Normal,
            default_interaction_type="random",
        ),
    )
    return WorldModel(base.encoder, dynamics, base.reward_head)


class LocScale(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.split = net, NormalParamExtractor()

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.split(self.net(*inputs))


class Opaque(TensorDictModuleBase):
    """A module with a forward of its own, which writes more than its keys say."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.in_keys, self.out_keys = module.in_keys, module.out_keys

    def forward(self, tensordict):
        out = self.module(tensordict)
        return out.set(("next", "extra"), out["action"] * 2)


def opaque_model() -> WorldModel:
    base = rssm_model()
    base.dynamics = Opaque(base.dynamics)
    return base


def hooked_model() -> WorldModel:
    model = rssm_model()
    model.posterior.register_forward_hook(
        lambda module, args, out: out.set(("next", "state"), out["next", "state"] * 2)
    )
    return model


def root_posterior_model() -> WorldModel:
    base = rssm_model()
    posterior = Mod(
        base.posterior.module,
        ["belief", "encoded_latents"],
        ["posterior_mean", "posterior_std", "state"],
    )
    return WorldModel(
        base.encoder,
        base.dynamics,
        base.reward_head,
        posterior=posterior,
        initial_state=base.initial_state(()),
    )


MODELS = {
    "plain": make_model,
    "gru": gru_model,
    "rssm": rssm_model,
    "rssm-v3": lambda: rssm_model(3),
    "nested": deep_model,
    "probabilistic": probabilistic_model,
    "hooked": hooked_model,
    "opaque": opaque_model,
    "root posterior": root_posterior_model,
}


def sequences(model: WorldModel, *size: int) -> TensorDict:
    """Sequences for a model, with rewards."""
    data = transitions(*size).exclude(
        ("next", "done"), ("next", "terminated"), ("next", "truncated")
    )
    if ("agents", "latent") not in model.latent_keys:
        return data

    def agents(width: int) -> torch.Tensor:
        return torch.randn(*size, 3, width)

    data["agents"] = TensorDict(
        {"observation": agents(OBS), "action": agents(ACTION)}, [*size, 3]
    )
    data["next", "agents"] = TensorDict({"observation": agents(OBS)}, [*size, 3])
    return data.exclude("observation", "action", ("next", "observation"))


def reference(model: WorldModel, data: TensorDict) -> TensorDict:
    """The filter as a loop over tensordicts, each component called as a module."""
    latents, inputs = model.latent_keys, model.encoder.in_keys
    known = data[..., 0].select(*inputs, *latents, strict=False)
    state = model.encode(known).select(*latents)
    restart, begun = data.get("is_init", None), None
    if restart is not None:
        restart = restart.squeeze(-1)
        given_latents = [k for k in latents if data.get(k, None) is not None]
        if given_latents and restart[..., 0].any():
            fresh = model.encode(data[..., 0].select(*inputs))
            state = choose(restart[..., 0], fresh, state)
        if restart[..., 1:].any():  # nothing is drawn in vain
            begun = model.encode(data.select(*inputs))
    encoded = model.encoder(data["next"].select(*inputs))
    encoded = encoded.select(*model.encoder.out_keys)
    context = [k for k in model.dynamics.in_keys if k not in latents and not is_next(k)]
    steps = []
    for t in range(data.shape[-1]):
        if begun is not None and t:
            state = choose(restart[..., t], begun[..., t], state)
        work = data[..., t].select(*context).update(state)
        work = model.dynamics(work.copy())
        following = work["next"]
        state_before, state = state, following.select(*latents).copy()
        if model.posterior is None:
            state.update(encoded[..., t].select(*latents, strict=False))
        else:
            written = [strip_next(key) for key in model.posterior.out_keys]
            keep = [*following.keys(True, True), *written]
            following.update(encoded[..., t])
            if model.posterior.in_keys[0][0] == "next":
                following = model.posterior(work)["next"]
            else:
                following = model.posterior(following)
            following = following.select(*dict.fromkeys(keep))
            state = following.select(*latents)
        steps.append(state_before.select(*latents).set("next", following))
    # By key: nested tensordicts of the steps may have dims of their own, or not.
    dim = data.batch_dims - 1
    out = TensorDict({}, data.batch_size)
    for key in steps[-1].keys(True, True):
        out[key] = torch.stack([step[key] for step in steps], dim)
    return out


def choose(mask: torch.Tensor, new: TensorDict, old: TensorDict) -> TensorDict:
    out = old.copy()
    for key in old.keys(True, True):
        rows = mask.reshape(mask.shape + (1,) * (old[key].ndim - mask.ndim))
        out[key] = torch.where(rows, new[key], old[key])
    return out


def with_gradients(function, model: WorldModel) -> tuple[TensorDict, list]:
    """What ``function`` gives of a seed, and the gradients of all it gives."""
    model.zero_grad()
    torch.manual_seed(5)
    out = function()
    leaves = [out[key] for key in out.keys(True, True)]
    moved = [x for x in leaves if x.requires_grad]
    sum((x * (1 + x.detach())).sum() for x in moved).backward()
    return out, [p.grad for p in model.parameters()]


def assert_equal(one, two, *, exact: bool = True) -> None:
    """Values and gradients agree, to the bit or within 1e-5."""
    (out, grads), (expected, expected_grads) = one, two
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-5}
    for key in expected.keys(True, True):
        value = out[key]
        torch.testing.assert_close(value, expected[key], **tolerance)
        assert value.stride() == expected[key].stride(), key
        assert value.requires_grad == expected[key].requires_grad, key
    for mine, theirs in zip(grads, expected_grads):
        if exact:
            assert (mine is None) == (theirs is None)
        # A scan has zeros for what it does not use.
        if mine is not None or theirs is not None:
            mine = torch.zeros_like(theirs) if mine is None else mine
            theirs = torch.zeros_like(mine) if theirs is None else theirs
            torch.testing.assert_close(mine, theirs, **tolerance)


class TestBits:
    @pytest.mark.parametrize("given_latents", [False, True])
    @pytest.mark.parametrize("restarts", [False, True])
    @pytest.mark.parametrize("name", MODELS)
    def test_filter_is_a_loop_over_tensordicts(
        self, name, restarts, given_latents
    ) -> None:
        model = MODELS[name]()
        data = sequences(model, 3, 5)
        if given_latents:
            shapes = model.observe(data).select(*model.latent_keys)
            data.update(shapes.apply(torch.randn_like).detach())
        if restarts:
            data["is_init"] = torch.rand(3, 5, 1) < 0.4
        expected = with_gradients(lambda: reference(model, data), model)
        out = with_gradients(lambda: model.observe(data), model)
        # Only the rows where an episode begins are encoded for it: another product of matrices.
        assert_equal(out, expected, exact=not restarts)
        new = set(out[0].keys(True, True)) - set(data.keys(True, True))
        assert new <= set(expected[0].keys(True, True))

    @given(data=st.data())
    @settings(max_examples=25)
    def test_any_shape_and_restart(self, data) -> None:
        model = MODELS[data.draw(st.sampled_from(["gru", "rssm", "nested"]), "model")]()
        rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
        batch = sequences(model, rows, length)
        flags = st.lists(st.booleans(), min_size=rows * length, max_size=rows * length)
        is_init = torch.tensor(data.draw(flags, "is_init"))
        batch["is_init"] = is_init.reshape(rows, length, 1)
        assert_equal(
            with_gradients(lambda: model.observe(batch), model),
            with_gradients(lambda: reference(model, batch), model),
            exact=not is_init.any(),
        )

    def test_nested_containers_stay(self) -> None:
        model = deep_model()
        out = model.observe(sequences(model, 2, 4).refine_names(None, "time"))
        assert out["agents"].batch_size == out["next", "agents"].batch_size == (2, 4, 3)
        assert out["agents", "belief"].shape == (2, 4, 3, 5)
        assert out.names == [None, "time"]

    def test_output_of_another_shape(self) -> None:
        """A step that forgets a row is named, whichever component it is."""
        model = rssm_model()

        class Forgetful(nn.Module):
            def forward(self, state, belief, action):
                return state[:1], state[:1], state[:1], belief[:1]

        model.dynamics.module = Forgetful()
        with pytest.raises(RuntimeError, match="dynamics failed on.*'action'"):
            model.observe(sequences(model, 3, 4))


class Graphs:
    """A compiler that counts what it is given."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, graph, inputs):
        self.sizes.append(len(graph.graph.nodes))
        return graph.forward


class TestCompiledRollout:
    @pytest.mark.parametrize(
        "name,restarts,scope",
        [
            ("plain", False, "step"),
            ("gru", False, "step"),
            ("gru", True, "step"),
            ("nested", True, "step"),
            ("gru", True, "scan"),
            ("nested", False, "scan"),
        ],
    )
    def test_filter_equals_eager(self, name, restarts, scope) -> None:
        model = MODELS[name]()
        data = sequences(model, 2, 5)
        if restarts:
            data["is_init"] = torch.rand(2, 5, 1) < 0.4
        expected = with_gradients(lambda: model.observe(data), model)
        assert model.compile_rollout(scope, **CAPTURE) is model
        assert_equal(
            with_gradients(lambda: model.observe(data), model), expected, exact=False
        )

    @pytest.mark.parametrize("name", ["rssm", "rssm-v3", "probabilistic"])
    def test_sampling_inside_a_step(self, name) -> None:
        model = MODELS[name]()
        data = sequences(model, 2, 5)
        expected = with_gradients(lambda: model.observe(data), model)
        model.compile_rollout(**CAPTURE)
        assert_equal(
            with_gradients(lambda: model.observe(data), model), expected, exact=False
        )

    def test_sampling_inside_a_scan(self) -> None:
        """Each step draws anew, and its draw is the one that gradients go through."""
        model = rssm_model()
        data = sequences(model, 4, 6)
        data["state"], data["belief"] = torch.randn(4, 6, 3), torch.randn(4, 6, 5)
        data["is_init"] = torch.zeros(4, 6, 1, dtype=torch.bool)
        model.compile_rollout("scan", backend="aot_eager")
        nxt = model.observe(data)["next"]
        noise = ((nxt["state"] - nxt["posterior_mean"]) / nxt["posterior_std"]).detach()
        assert noise.std() > 0.3
        assert (noise[:, 1:] != noise[:, :-1]).all()
        expected = self.replayed(model, data, noise)
        moved = {key: nxt[key] for key in expected}
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)
        grads = []
        for entries in (moved, expected):
            model.zero_grad()
            sum(value.pow(2).sum() for value in entries.values()).backward()
            grads.append([p.grad.clone() for p in model.posterior.parameters()])
        for mine, theirs in zip(*grads):
            assert theirs.any()
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)

    def replayed(self, model, data, noise) -> dict[str, torch.Tensor]:
        """The filter by hand, with the noise of the posterior given."""
        encoded = model.encoder.module(data["next", "observation"])
        state, belief = data["state"][:, 0], data["belief"][:, 0]
        steps = {"belief": [], "posterior_mean": [], "posterior_std": [], "state": []}
        for t in range(data.shape[1]):
            _, _, _, belief = model.dynamics.module(state, belief, data["action"][:, t])
            mean, std, _ = model.posterior.module(belief, encoded[:, t])
            state = mean + std * noise[:, t]
            for key, value in zip(steps, (belief, mean, std, state)):
                steps[key].append(value)
        return {key: torch.stack(values, 1) for key, values in steps.items()}

    def test_open_loop(self) -> None:
        model = gru_model()
        batch = sequences(model, 2, 5)
        loss = WorldModelLoss(model, losses=["reward"], multi_step=True)
        expected = with_gradients(lambda: loss(batch), model)
        model.compile_rollout(**CAPTURE)
        assert_equal(with_gradients(lambda: loss(batch), model), expected, exact=False)

    @pytest.mark.parametrize("multi_step", [False, True])
    def test_graphs_do_not_grow_with_time(self, multi_step) -> None:
        model, graphs = gru_model(), Graphs()
        model.compile_rollout(backend=graphs)
        loss = WorldModelLoss(model, losses=["reward"], multi_step=multi_step)
        loss(sequences(model, 2, 4)).sum(reduce=True).backward()
        assert len(graphs.sizes) == 1
        for length in (3, 9, 12):
            loss(sequences(model, 2, length))
        assert len(graphs.sizes) == 1

    def test_a_scan_does_not_grow_with_time(self) -> None:
        sizes = []
        for length in (4, 12):
            torch._dynamo.reset()
            model, graphs = gru_model(), Graphs()
            model.compile_rollout("scan", backend=graphs)
            model.observe(sequences(model, 2, length))
            assert len(graphs.sizes) == 1
            sizes += graphs.sizes
        assert sizes[0] == sizes[1]

    @pytest.mark.parametrize(
        "scope", ["step", pytest.param("scan", marks=pytest.mark.slow)]
    )
    def test_within_a_compiled_loss(self, scope) -> None:
        model = rssm_model()
        batch = sequences(model, 2, 3)
        loss = WorldModelLoss(model, losses=["reward"])
        expected = with_gradients(lambda: loss(batch), model)
        model.compile_rollout(scope, **(CAPTURE if scope == "step" else {}))
        before = interaction_type()
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        assert_equal(
            with_gradients(lambda: compiled(batch), model), expected, exact=False
        )
        assert interaction_type() is before

    @pytest.mark.parametrize("what", ["component", "network", "weights"])
    def test_replaced_parts_are_noticed(self, what) -> None:
        model = gru_model().compile_rollout(**CAPTURE)
        data = sequences(model, 2, 4)
        model.observe(data)
        other = gru_model().dynamics
        if what == "component":
            model.dynamics = other
        elif what == "network":
            model.dynamics.module = other.module
        else:
            with torch.no_grad():
                for parameter in model.dynamics.parameters():
                    parameter.add_(1.0)
        out = model.observe(data)
        expected = copy.deepcopy(model).observe(data) if what != "network" else None
        if expected is None:
            expected = model.eager_rollout().observe(data)
        torch.testing.assert_close(out["next", "belief"], expected["next", "belief"])

    @pytest.mark.parametrize(
        "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
    )
    def test_copies_start_eager(self, clone) -> None:
        graphs = Graphs()
        model = make_model().compile_rollout(backend=graphs)
        loss = WorldModelLoss(model, multi_step=True)
        batch = sequences(model, 2, 4)
        expected = loss(batch)["loss_reward"]
        other = clone(model)
        count = len(graphs.sizes)
        value = WorldModelLoss(other, multi_step=True)(batch)["loss_reward"]
        torch.testing.assert_close(value, expected)
        assert len(graphs.sizes) == count == 1

    def test_eager_undoes_it(self) -> None:
        graphs = Graphs()
        model = gru_model().compile_rollout(backend=graphs)
        assert model.eager_rollout() is model
        model.observe(sequences(model, 2, 4))
        assert not graphs.sizes

    @pytest.mark.parametrize("scope", ["step", "scan"])
    def test_without_a_compiler_it_says_so_and_goes_on(self, scope) -> None:
        def broken(graph, inputs):
            raise RuntimeError("no C++ compiler here")

        model = gru_model()
        data = sequences(model, 2, 4)
        expected = model.observe(data)["belief"]
        model.compile_rollout(scope, backend=broken)
        with pytest.warns(UserWarning, match="could not be compiled and stays eager"):
            out = model.observe(data)["belief"]
        assert torch.equal(out, expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(model.observe(data)["belief"], expected)

    def test_many_models_and_batch_shapes(self) -> None:
        """dynamo compiles one function eight times; these are not one function."""
        models = [gru_model().compile_rollout(**CAPTURE) for _ in range(5)]
        for model in models:
            for rows in (1, 2, 3):
                model.observe(sequences(model, rows, 3))

    def test_one_step_needs_no_compiler(self) -> None:
        graphs = Graphs()
        model = gru_model().compile_rollout(backend=graphs)
        assert model.observe(sequences(model, 2, 1))["belief"].shape == (2, 1, 5)
        assert not graphs.sizes

    def test_unknown_scope(self) -> None:
        with pytest.raises(ValueError, match="'step' or 'scan', got 'loop'"):
            gru_model().compile_rollout("loop")
