"""What the plug-ins of serving engines are made of, on layers like an engine's. `test_vllm.py` runs an engine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
from torch import Tensor, nn  # noqa: E402
from torch_devices import DEVICES  # noqa: E402

from prosparse_cupy.engines import ffn as ffn_module  # noqa: E402
from prosparse_cupy.engines import vllm as plugin  # noqa: E402
from prosparse_cupy.engines.imports import when_imported  # noqa: E402
from prosparse_cupy.engines.mlp import Engine, mlps, names_zeros, sparsify  # noqa: E402
from prosparse_cupy.formula import Formula  # noqa: E402
from prosparse_cupy.torch import FATReLU, SquaredReLU  # noqa: E402

D_MODEL, D_FF = 64, 96


class _Parameter(nn.Parameter):
    """A parameter of an engine's own class."""


class _Parallel(nn.Module):
    """A projection as engines have it: a parameter of its own class, and a bias that may be returned rather than added."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool = False, return_bias: bool = True, quantised: bool = False) -> None:
        super().__init__()
        self.weight = _Parameter(torch.randn(d_out, d_in) / d_in**0.5, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(d_out), requires_grad=False) if bias else None
        self.return_bias, self.quantised = return_bias, quantised
        self.tp_rank, self.tp_size, self.reduce_results = 0, 1, True

    @property
    def output_sizes(self) -> list[int]:
        return [len(self.weight) // 2] * 2

    def forward(self, x: Tensor) -> Any:
        y = nn.functional.linear(x, self.weight, self.bias)
        return (y, None) if self.return_bias else y


class _Kernel(nn.Module):
    """An activation whose kernels do not know float64."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("no kernel for Double")
        return self.act(x)


def _fat_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return nn.functional.threshold(gate, 0.3, 0.0) * up


class _Merged(nn.Module):
    """Gate and up in one matrix, and the activation as one kernel: MiniCPM's in vLLM."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = _Parallel(D_MODEL, 2 * D_FF), _Parallel(D_FF, D_MODEL)
        self.act_fn = _Kernel(_fat_and_mul) if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.gate_up_proj(x)
        x, _ = self.down_proj(self.act_fn(x))
        return x


class _NoGate(nn.Module):
    """Nemotron's in vLLM."""

    def __init__(self, act: Callable[[Tensor], Tensor] | None = None, *, bias: bool = False) -> None:
        super().__init__()
        self.up_proj, self.down_proj = _Parallel(D_MODEL, D_FF, bias=bias), _Parallel(D_FF, D_MODEL, bias=bias)
        self.act_fn = _Kernel(act or (lambda x: torch.relu(x).square()))

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.up_proj(x)
        x, _ = self.down_proj(self.act_fn(x))
        return x


class _Rewritten(nn.Module):
    """A transformers MLP whose gate and up have been merged, and whose forward belongs to the instance."""

    def __init__(self) -> None:
        super().__init__()
        self.merged_proj_9_gate_proj_7_up_proj = _Parallel(D_MODEL, 2 * D_FF, return_bias=False)
        self.down_proj = _Parallel(D_FF, D_MODEL, return_bias=False)
        self.act_fn = nn.ReLU()
        self.forward = MethodType(_rewritten, self)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("the class's code calls projections that are gone")


def _rewritten(self: Any, x: Tensor) -> Tensor:
    merged = self.merged_proj_9_gate_proj_7_up_proj
    gate, up = merged(x).split([size // merged.tp_size for size in merged.output_sizes], -1)
    return self.down_proj(self.act_fn(gate) * up)


class _Separate(nn.Module):
    """Gate and up in two matrices, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (_Parallel(D_MODEL, D_FF, bias=True, return_bias=False) for _ in range(2))
        self.down_proj, self.act_fn = _Parallel(D_FF, D_MODEL, bias=True, return_bias=False), FATReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class _Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.shared_experts = nn.ModuleList([_NoGate()]), _NoGate()


class _Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


FAT, RELU, RELU2 = (
    SimpleNamespace(hidden_act="fatrelu", hidden_act_param=0.3),
    SimpleNamespace(hidden_act="relu"),
    SimpleNamespace(hidden_act="relu2"),
)
ENGINE = Engine(_Parallel, _Kernel, lambda layer, is_down: "quantised" * layer.quantised, lambda y: 2 * y)
CASES = {
    "merged": (_Merged, FAT, Formula(0.3)),
    "no gate": (_NoGate, RELU2, Formula(0.0, "relu2", False)),
    "no gate, biases": (lambda: _NoGate(bias=True), RELU2, Formula(0.0, "relu2", False)),
    "rewritten": (_Rewritten, RELU, Formula()),
    "separate": (_Separate, SimpleNamespace(hidden_act="fatrelu", hidden_act_param=0.2), Formula(0.2)),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often an FFN went through the sparse operators, and how often it did not."""
    counts = {"_sparse": 0, "_dense": 0}
    for name in counts:
        was = getattr(ffn_module, name)

        def counted(*arguments: Any, _name: str = name, _was: Any = was) -> Tensor:
            counts[_name] += 1
            return _was(*arguments)

        monkeypatch.setattr(ffn_module, name, counted)
    return counts


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_ffns_decode_sparsely_on_the_engines_own_weights(case: str, dtype: Any, device: str, calls: dict[str, int]) -> None:
    torch.manual_seed(0)
    kind, config, formula = CASES[case]
    model = _Model(kind(), kind()).to(device, dtype)
    xs = [torch.randn(*shape, D_MODEL).to(device, dtype) for shape in ((1,), (8,), (9,), (1, 3), (1, 20), (0,))]
    for numbers, steps in (*((p, 8) for p in model.parameters()), *((x, 4) for x in xs)):
        numbers.copy_((numbers * steps).round() / steps)  # bfloat16 holds gates exactly, so the same ones pass the threshold
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    expected = [[layer(x) for x in xs] for layer in model.layers]
    report = sparsify(model, config, ENGINE)
    assert [(layer.sparse, layer.formula, layer.reason) for layer in report.layers] == [(True, formula, "")] * 2
    calls.update(_sparse=0, _dense=0)
    for layer, ys in zip(model.layers, expected, strict=True):
        for x, y in zip(xs, ys, strict=True):
            torch.testing.assert_close(layer(x), y, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0.02)
    assert calls == {"_sparse": 6, "_dense": 6}
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.mT.is_contiguous() if name.endswith("down_proj.weight") else parameter.is_contiguous()


def test_weights_can_be_loaded_again_in_place() -> None:
    model, other = _Model(_NoGate()), _Model(_NoGate())
    assert sparsify(model, RELU2, ENGINE).sparse
    model.load_state_dict(other.state_dict())
    x = torch.randn(2, D_MODEL)
    torch.testing.assert_close(model.layers[0](x), other.layers[0](x))
    assert model.layers[0].down_proj.weight.mT.is_contiguous()


def _hooked(mlp: Any) -> Any:
    mlp.register_forward_hook(lambda *arguments: None)
    return mlp


def _with(mlp: Any, name: str, value: Any) -> Any:
    setattr(mlp, name, value)
    return mlp


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: _NoGate(lambda x: torch.relu(x).clamp(max=1000.0).square()), "differs"),
        (lambda: _NoGate(nn.functional.silu), "differs"),
        (lambda: _Merged(_Kernel(lambda x: torch.relu(x[..., D_FF:]) * x[..., :D_FF])), "do"),
        (lambda: _with(_NoGate(), "down_proj", _Parallel(D_FF, D_MODEL, quantised=True)), "down_proj: quantised"),
        (lambda: _hooked(_NoGate()), "hooks"),
        (lambda: _with(_NoGate(), "forward", lambda x: x), "a forward of its own"),
        (lambda: _with(_NoGate(), "down_proj", _Parallel(D_FF // 2, D_MODEL)), "do not fit each other"),
        (
            lambda: _with(_Separate(), "up_proj", _Parallel(D_MODEL, D_FF, return_bias=False)),
            "only one of gate and up has a bias",
        ),
        (lambda: _with(_NoGate(), "scale", nn.Parameter(torch.ones(1))), "parameters of its own: scale"),
        (_Mixture, "mixture of experts"),
    ],
)
def test_what_differs_is_left_as_it_is(layer: Callable[[], nn.Module], reason: str) -> None:
    made = layer()
    model = _Model(made)
    forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    report = sparsify(model, RELU2, ENGINE)
    assert report.layers
    assert not report.sparse
    assert all(reason in found.reason for found in report.layers), report
    assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == forwards
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_an_activation_without_a_threshold_is_left_as_it_is() -> None:
    (found,) = sparsify(_Model(_Merged()), SimpleNamespace(hidden_act="fatrelu"), ENGINE).layers
    assert not found.sparse
    assert "hidden_act_param" in found.reason


def test_kernels_that_do_not_run_leave_the_layer_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> Tensor:
        raise ImportError("CuPy is not installed")

    monkeypatch.setattr(ffn_module, "_sparse", fails)
    model = _Model(_NoGate())
    (found,) = sparsify(model, RELU2, ENGINE).layers
    assert found.reason == "its kernels do not run (ImportError CuPy is not installed)"
    assert model.layers[0].down_proj.weight.is_contiguous()


def test_an_adapter_in_a_projections_place_is_called() -> None:
    model = _Model(_NoGate())
    assert sparsify(model, RELU2, ENGINE).sparse
    layer, x = model.layers[0], torch.randn(2, D_MODEL)
    layer.up_proj = _Parallel(D_MODEL, D_FF)
    expected, _ = layer.down_proj(layer.act_fn(layer.up_proj(x)[0]))
    torch.testing.assert_close(layer(x), expected)


def test_calls_of_one_argument_alone_are_the_ffns() -> None:
    model = _Model(_NoGate())
    assert sparsify(model, RELU2, ENGINE).sparse
    layer, x = model.layers[0], torch.randn(2, D_MODEL)
    assert torch.equal(layer(x=x), layer(x))
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        layer(x, None)


def test_many_tokens_are_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = ffn_module._dense
    monkeypatch.setattr(ffn_module, "_dense", lambda *arguments: dense(*arguments) * 1.01)
    (found,) = sparsify(_Model(_NoGate()), RELU2, ENGINE).layers
    assert "differs from that of relu2, no gate" in found.reason


def test_ranks_add_up_and_one_adds_the_bias() -> None:
    whole = _NoGate(bias=True)
    shards = []
    for rank in range(2):
        shard, rows = _NoGate(bias=True), slice(rank * D_FF // 2, (rank + 1) * D_FF // 2)
        for name, value in (("up_proj", whole.up_proj.weight[rows]), ("down_proj", whole.down_proj.weight[:, rows])):
            getattr(shard, name).weight = _Parameter(value.contiguous(), requires_grad=False)
            getattr(shard, name).tp_rank, getattr(shard, name).tp_size = rank, 2
        shard.up_proj.bias = nn.Parameter(whole.up_proj.bias[rows].contiguous(), requires_grad=False)
        shard.down_proj.bias = whole.down_proj.bias
        shards.append(shard)
    summed: list[Tensor] = []
    engine = Engine(_Parallel, _Kernel, ENGINE.why_dense, lambda y: summed.append(y) or y)
    for shard in shards:
        if shard.down_proj.tp_rank:  # an engine's own row-parallel layer leaves the bias to the first rank
            shard.down_proj.forward = lambda x, layer=shard.down_proj: (nn.functional.linear(x, layer.weight), None)
        assert sparsify(_Model(shard), RELU2, engine).sparse
    x = torch.randn(3, D_MODEL)
    parts = [shard(x) for shard in shards]
    assert len(summed) == 2
    torch.testing.assert_close(parts[0] + parts[1], whole(x))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (RELU, True),
        (RELU2, True),
        (FAT, True),
        (SimpleNamespace(hidden_act="fatrelu"), False),
        (SimpleNamespace(hidden_act="silu"), False),
        (SimpleNamespace(mlp_hidden_act="relu2", hidden_act="silu"), True),
        (SimpleNamespace(), False),
        (SimpleNamespace(get_text_config=lambda: RELU), True),
    ],
)
def test_only_configs_that_name_zeros_are_looked_at(config: Any, named: bool) -> None:
    assert names_zeros(config) is named


def test_families_are_found_by_the_engines_layers() -> None:
    model = _Model(_Merged(), _NoGate(), _Rewritten(), _Separate(), nn.Linear(4, 4))
    assert [family.projections[0] for _, _, family in mlps(model, ENGINE)] == [
        "gate_up_proj",
        "up_proj",
        "merged_proj_9_gate_proj_7_up_proj",
        "gate_proj",
    ]
    assert not list(mlps(model, Engine(nn.Linear, _Kernel, ENGINE.why_dense, ENGINE.all_reduce)))


def _arguments(device: str, dtype: Any, tokens: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(tokens)
    x, up, down = (
        torch.randn(shape, generator=generator) for shape in ((tokens, D_MODEL), (2 * D_FF, D_MODEL), (D_FF, D_MODEL))
    )
    return x.to(device, dtype), [(up / 8).to(device, dtype)], (down / 8).to(device, dtype).mT, 0.25


@pytest.mark.parametrize("device", DEVICES)
def test_one_compiled_graph_takes_any_number_of_tokens(device: str, calls: dict[str, int]) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    call = torch.compile(lambda *a: torch.ops.prosparse.ffn(*a) + 1, dynamic=True, fullgraph=True, backend=backend)
    with torch.no_grad():
        for tokens in (2, 5, 8, 9, 40):
            arguments = _arguments(device, torch.float32, tokens)
            assert torch.equal(call(*arguments), torch.ops.prosparse.ffn(*arguments) + 1)
    assert len(graphs) == 1
    assert calls == {"_sparse": 6, "_dense": 4}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [3, 12])
def test_torch_accepts_the_operator(device: str, tokens: int) -> None:
    torch.library.opcheck(torch.ops.prosparse.ffn.default, _arguments(device, torch.float32, tokens))


def test_a_gate_may_rectify_up_too() -> None:
    x, (both,), down, _ = _arguments("cpu", torch.float32, 16)
    y = torch.ops.prosparse.ffn(x, [both], down, 0.0, activation="drelu")
    few = torch.cat([torch.ops.prosparse.ffn(row[None], list(both.chunk(2)), down, 0.0, activation="drelu") for row in x])
    gate, up = (x @ both.mT).chunk(2, dim=1)
    torch.testing.assert_close(y, (gate.relu() * up.relu()) @ down.mT)
    torch.testing.assert_close(few, y)


@pytest.mark.parametrize("tokens", [4, 12])
def test_gate_and_up_may_lie_in_one_matrix_with_their_biases(tokens: int) -> None:
    x, (both,), down, threshold = _arguments("cpu", torch.float32, tokens)
    bias, down_bias = torch.randn(2 * D_FF), torch.randn(D_MODEL)
    y = torch.ops.prosparse.ffn(x, [both], down, threshold, b_in=[bias], b_down=down_bias)
    parts = list(both.chunk(2)), down, threshold
    torch.testing.assert_close(y, torch.ops.prosparse.ffn(x, *parts, b_in=list(bias.chunk(2)), b_down=down_bias))
    gate, up = (x @ both.mT + bias).chunk(2, dim=1)
    torch.testing.assert_close(y, (torch.where(gate >= threshold, gate, 0) * up) @ down.mT + down_bias)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 8, 16])
def test_a_cuda_graph_keeps_the_branch_of_its_size(torch_gpu: None, tokens: int) -> None:
    torch.manual_seed(0)
    model = _Model(_NoGate(), _NoGate()).to("cuda", torch.bfloat16)
    assert len(sparsify(model, RELU2, ENGINE).sparse) == 2
    x = torch.randn(tokens, D_MODEL, device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = model.layers[1](model.layers[0](x))
    for _ in range(2):
        x.normal_()
        graph.replay()
        assert torch.equal(y, model.layers[1](model.layers[0](x)))


def test_a_module_is_called_back_once_after_its_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_late.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[Any] = []

    def then(module: Any) -> None:
        seen.append((module.value, module.__spec__.loader is module.__loader__))

    finders = len(sys.meta_path)
    when_imported("imported_late", then)
    when_imported("imported_late", then)
    assert len(sys.meta_path) == finders + 1
    try:
        module = import_module("imported_late")
        assert seen == [(1, True)]
        assert type(module.__loader__).__name__ == "SourceFileLoader"
        assert len(sys.meta_path) == finders
        when_imported("imported_late", then)
        assert len(seen) == 2
    finally:
        sys.modules.pop("imported_late", None)


def test_what_is_wrapped_is_wrapped_once_and_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    made = SimpleNamespace(hf_text_config=RELU)
    loader, importer = type(sys)("vllm.loader"), type(sys)("vllm.importer")
    loader.initialize_model = importer.initialize_model = lambda vllm_config, **keywords: order.append("make")
    loader.process_weights_after_loading = lambda *arguments: order.append("process")
    monkeypatch.setitem(sys.modules, "vllm.loader", loader)
    monkeypatch.setitem(sys.modules, "vllm.importer", importer)
    monkeypatch.setattr(plugin, "_sparsify", lambda model, config: order.append(f"sparsify {model}"))
    plugin._wrap(loader)
    plugin._wrap(loader)
    assert importer.initialize_model is loader.initialize_model
    importer.initialize_model(vllm_config=SimpleNamespace(model_config=made), prefix="")
    loader.process_weights_after_loading("model", None, "cpu")
    assert order == ["make", "sparsify model", "process"]


def test_registering_imports_nothing_and_may_be_repeated() -> None:
    code = (
        "import sys; from prosparse_cupy.engines.vllm import register; register(); register()\n"
        "assert not {'torch', 'cupy', 'vllm', 'transformers'} & set(sys.modules), 'imports more than itself'\n"
        "print(sum(type(finder).__name__ == '_Finder' for finder in sys.meta_path))"
    )
    for switch, finders in (("1", "1"), ("0", "0")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**_environment(), plugin.SWITCH: switch},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.stdout.strip(), done.returncode) == (finders, 0), done.stderr


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)


def test_a_switch_that_is_neither_on_nor_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.SWITCH, "yes")
    with pytest.raises(ValueError, match="PROSPARSE_VLLM must be 0 or 1, got 'yes'"):
        plugin.register()


def test_squared_relus_of_torch_modules_are_known() -> None:
    mlp = _NoGate()
    mlp.act_fn = SquaredReLU()
    assert sparsify(_Model(mlp), RELU2, ENGINE).sparse
