"""patch_model, unpatch_model and register_fatrelu on Hugging Face models."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import ClassVar

import pytest

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
transformers = pytest.importorskip("transformers", reason='the extra "hf" brings it')
from torch import nn  # noqa: E402
from torch_devices import DEVICES  # noqa: E402

from prosparse_cupy.formula import Formula  # noqa: E402
from prosparse_cupy.torch import (  # noqa: E402
    CompressedLinear,
    DecodingLinear,
    FATReLU,
    SparseGatedMLP,
    SparsityMeter,
    dispatch,
    measure_sparsity,
    patch_model,
    register_fatrelu,
    unpatch_model,
)

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "pad_token_id": 0,
}
KINDS = ("Llama", "Mistral", "Qwen2")


def _config(kind: str = "Llama", **changes):
    return getattr(transformers, f"{kind}Config")(**{**SIZES, "hidden_act": "relu", **changes})


def _model(kind: str = "Llama", device: str = "cpu", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(_config(kind, **changes), dtype=dtype).eval().to(device)


def _ids(device: str = "cpu"):
    return torch.randint(1, 200, (1, 7), generator=torch.Generator().manual_seed(0)).to(device)


def _text(model, **keywords):
    with torch.inference_mode():
        return model.generate(_ids(model.device), max_new_tokens=20, do_sample=False, **keywords)


def _unchanged(model) -> bool:
    ours = SparseGatedMLP, DecodingLinear, CompressedLinear
    return not any(isinstance(m, ours) for m in model.modules()) and all(
        layer.mlp.down_proj.weight.is_contiguous() for layer in model.model.layers
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_patched_generate_is_the_same_and_unpatch_restores(kind, cache, device):
    model = _model(kind, device)
    keywords = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    before, state = _text(model, **keywords), copy.deepcopy(model.state_dict())
    mlps = [layer.mlp for layer in model.model.layers]
    report = patch_model(model)
    assert [(x.name, x.sparse, x.threshold, x.reason) for x in report.layers] == [
        (f"model.layers.{i}.mlp", True, 0.0, "") for i in range(3)
    ]
    assert all(isinstance(layer.mlp, SparseGatedMLP) for layer in model.model.layers)
    assert torch.equal(_text(model, **keywords), before)
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[k], state[k]) for k in state)
    unpatch_model(model)
    assert [layer.mlp for layer in model.model.layers] == mlps and _unchanged(model)
    assert torch.equal(_text(model, **keywords), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("device", DEVICES)
def test_fatrelu_config_loads_from_disk_and_patches(tmp_path, device, dtype):
    register_fatrelu()
    register_fatrelu()
    model = _model("Llama", device, dtype, hidden_act="fatrelu", hidden_act_param=0.01)
    assert [layer.mlp.act_fn.threshold for layer in model.model.layers] == [0.01] * 3
    model.save_pretrained(tmp_path / "dense")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype).eval().to(device)
    assert [x.threshold for x in patch_model(loaded).layers] == [0.01] * 3
    with torch.inference_mode():
        torch.testing.assert_close(loaded(_ids(device)[:, :1]).logits, model(_ids(device)[:, :1]).logits, atol=3e-2, rtol=3e-2)

    loaded.save_pretrained(tmp_path / "patched")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "patched", dtype=dtype)
    wanted = model.state_dict()
    assert all(torch.equal(value, wanted[name].cpu()) for name, value in again.state_dict().items())


def test_a_patched_model_loads_a_checkpoint():
    model, other = _model(), _model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    patch_model(model)
    model.load_state_dict(other.state_dict())
    assert torch.equal(_text(model), _text(other))


class RemoteModel(nn.Module):
    """As a checkpoint's own code may be: a class nobody knows, with its own activation."""

    class MLP(nn.Module):
        def __init__(self, config) -> None:
            super().__init__()
            self.gate_proj = nn.Linear(64, 160, bias=False)
            self.up_proj = nn.Linear(64, 160, bias=False)
            self.down_proj = nn.Linear(160, 64, bias=False)
            self.twist, self.doubled = config.twist, config.doubled

        def forward(self, x):
            gate, up = self.gate_proj(x), self.up_proj(x)
            return self.twist * self.down_proj(torch.where(gate > 0.05, gate, 0.0) * (up.relu() if self.doubled else up))

    def __init__(self, twist: float = 1.0, doubled: bool = False, **config) -> None:
        super().__init__()
        self.config = SimpleNamespace(twist=twist, doubled=doubled, **config)
        self.mlp = self.MLP(self.config)

    def forward(self, x):
        return x + self.mlp(x)


def test_remote_code():
    model = RemoteModel(hidden_act="fatrelu", hidden_act_param=0.05)
    x = torch.randn(1, 1, 64)
    with torch.no_grad():
        before = model(x)
        assert patch_model(model).layers[0].sparse
        torch.testing.assert_close(model(x), before)


def test_an_mlp_with_another_formula_is_left_dense():
    for model in (
        RemoteModel(twist=2.0, hidden_act="fatrelu", hidden_act_param=0.05),
        RemoteModel(hidden_act="fatrelu", hidden_act_param=0.5),  # not what its code does
        RemoteModel(doubled=True, hidden_act="fatrelu", hidden_act_param=0.05),  # dReLU, as TurboSparse has it
    ):
        (layer,) = patch_model(model).layers
        assert not layer.sparse and "its output differs" in layer.reason
        assert isinstance(model.mlp, RemoteModel.MLP) and model.mlp.down_proj.weight.is_contiguous()


def test_a_threshold_of_the_users_moves_the_activation():
    model = _model()
    assert [x.threshold for x in patch_model(model, 0.02).layers] == [0.02] * 3
    mlp, x = model.model.layers[0].mlp, torch.randn(1, 64)
    gate = mlp.gate_proj(x)
    wanted = mlp.down_proj(torch.where(gate >= 0.02, gate, 0) * mlp.up_proj(x))
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), wanted.detach())
        torch.testing.assert_close(mlp(x.expand(2, -1))[:1], wanted.detach())


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_what_is_not_relu_is_refused_where_its_matrices_are_not_asked_for(activation):
    model = _model(hidden_act=activation)
    for threshold, linears in ((None, False), (0.01, False), (0.01, True)):
        with pytest.raises(
            ValueError,
            match=rf"layers.0.mlp: the config says hidden_act='{activation}': it leaves no zeros: relu, fatrelu, relu2 and",
        ):
            patch_model(model, threshold, linears=linears)
        assert _unchanged(model)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_what_is_not_relu_decodes_through_ffn_1(activation, device):
    model = _model(device=device, hidden_act=activation)
    before, mlps = _text(model), [layer.mlp for layer in model.model.layers]
    report = patch_model(model)
    assert len(report.layers) == 3 and not report.sparse
    assert all(
        f"hidden_act='{activation}': it leaves no zeros: relu, fatrelu, relu2 and dReLU are" in layer.reason
        for layer in report.layers
    )
    assert len(report.decoding) == len(report.matrices) == 3 * 7 + 1
    assert str(report).startswith("0 of 3 MLPs decode sparsely")
    assert "22 of 22 other matrices decode through ffn_1" in str(report)
    assert [layer.mlp for layer in model.model.layers] == mlps
    assert torch.equal(_text(model), before)
    unpatch_model(model)
    assert _unchanged(model) and torch.equal(_text(model), before)


def test_refusals_change_nothing():
    with pytest.raises(ValueError, match="Linear has no module with gate_proj, up_proj, down_proj"):
        patch_model(nn.Linear(2, 2))
    model = _model()
    for switch in ("compress", "linears", "batch_invariant"):
        with pytest.raises(TypeError, match=f"patch_model: {switch} must be True or False, got 'no'"):
            patch_model(model, **{switch: "no"})
    with pytest.raises(ValueError, match="threshold must be finite"):
        patch_model(model, -1.0)
    with pytest.raises(ValueError, match=r"not a model with some: put it in a torch\.nn\.Sequential"):
        patch_model(model.model.layers[0].mlp)
    model.model.layers[2].mlp.config = SimpleNamespace(hidden_act="fatrelu")
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp: .* no hidden_act_param"):
        patch_model(model)
    assert _unchanged(model)
    unpatch_model(model)
    assert _unchanged(model)
    del model.model.layers[2].mlp.config
    patch_model(model)
    with pytest.raises(ValueError, match=r"patched already: call unpatch_model"):
        patch_model(model)


def test_a_failure_on_the_way_puts_everything_back(monkeypatch):
    model, calls = _model(), []
    before = _text(model)
    real = SparseGatedMLP._sparse

    def fails_at_the_third(self, *tensors):
        calls.append(self)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("made up")
        return real(self, *tensors)

    monkeypatch.setattr(SparseGatedMLP, "_sparse", fails_at_the_third)
    with pytest.raises(torch.OutOfMemoryError, match="made up"):
        patch_model(model)
    assert len(calls) == 3 and _unchanged(model) and torch.equal(_text(model), before)


def test_without_a_config_the_activation_module_decides():
    model = RemoteModel()
    del model.config
    model.mlp.act_fn = nn.SiLU()
    with pytest.raises(ValueError, match="the config has no hidden_act, and act_fn is a SiLU"):
        patch_model(model, linears=False)
    report = patch_model(model)
    assert not report.sparse and "the config has no hidden_act, and act_fn is a SiLU" in report.layers[0].reason
    assert [m.name for m in report.decoding] == ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    unpatch_model(model)
    model.mlp.act_fn = FATReLU(0.05)
    assert patch_model(model).layers[0].sparse


class QuantisedLinear(nn.Linear):
    """As quantisation libraries have them."""


def _spoil(mlp, how: str) -> None:
    if how == "quantised":
        mlp.up_proj = QuantisedLinear(64, 160, bias=False)
    elif how == "vector":
        mlp.gate_proj = nn.Linear(64, 160).requires_grad_(False)
        mlp.gate_proj.bias.data = mlp.gate_proj.bias.data.half()
    elif how == "meta":
        mlp.to("meta")
    elif how == "hook":
        mlp.register_forward_hook(lambda module, given, out: None)
    elif how == "float64":
        mlp.double()
    elif how == "mixed":
        mlp.up_proj.half()
    elif how == "width":
        mlp.gate_proj, mlp.up_proj, mlp.down_proj = (nn.Linear(*s, bias=False) for s in ((63, 160), (63, 160), (160, 63)))
    elif how == "shapes":
        mlp.up_proj = nn.Linear(64, 80, bias=False)
    elif how == "view":
        mlp.gate_proj.weight = nn.Parameter(torch.randn(64, 160).t())


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("quantised", "test_torch_patch.QuantisedLinear, not a torch.nn.Linear itself"),
        ("vector", "different devices or dtypes"),
        ("meta", "on the meta device"),
        ("hook", "has hooks"),
        ("float64", "torch.float64"),
        ("mixed", "different devices or dtypes"),
        ("width", "d_model is 63, not a multiple of 4"),
        ("shapes", "do not fit each other"),
        ("view", "strided or not aligned"),
    ],
)
def test_what_cannot_be_patched_is_left_dense_and_said(how, reason):
    model = _model()
    mlp = model.model.layers[1].mlp
    _spoil(mlp, how)
    report = patch_model(model)
    assert [x.sparse for x in report.layers] == [True, False, True] and reason in report.layers[1].reason
    assert model.model.layers[1].mlp is mlp and mlp.down_proj.weight.is_contiguous()
    text = str(report)
    assert text.startswith("2 of 3 MLPs decode sparsely") and "dense: " in text and "model.layers.1.mlp" in text


class Packed(nn.Module):
    """As of a quantised model: no `weight`, and no names of dims."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.qweight = nn.Parameter(linear.weight.detach())

    def forward(self, x):
        return nn.functional.linear(x, self.qweight)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("how", ["packed", "metered"])
def test_an_example_counts_sparse_layers_alone(how, compress):
    """Of dense ones nobody asks, and they may have no weights to be asked about."""
    model = _model(dtype=torch.bfloat16)
    mlp = model.model.layers[1].mlp
    meter = SparsityMeter(model, ["model.layers.1.mlp"]) if how == "metered" else None
    if how == "packed":
        mlp.down_proj = Packed(mlp.down_proj)
    report = patch_model(model, example=_ids(), batch_invariant=False, compress=compress, linears=False)
    assert [x.sparse for x in report.layers] == [True, False, True] and model.model.layers[1].mlp is mlp
    assert [0.2 < x.sparsity < 0.8 for x in report.layers] == [True, False, True]
    assert [x.most_tokens == 8 for x in report.layers] == [compress, True, compress]
    row = next(line for line in str(report).splitlines() if "layers.1.mlp" in line)
    assert "nan" not in row and "1 to" not in row
    if meter is not None:
        assert [(x.name, x.tokens) for x in meter.report().layers] == [("model.layers.1.mlp", 14)], "the example, twice"
        meter.remove()
    assert not any(getattr(module, "counts", None) is not None for module in model.modules())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("biased", [("gate_proj",), ("up_proj",), ("down_proj",), ("gate_proj", "up_proj", "down_proj")])
def test_biases_are_added(biased, device):
    model = _model(device=device, mlp_bias=True)
    for layer in model.model.layers:
        for name, linear in layer.mlp.named_children():
            if isinstance(linear, nn.Linear):
                linear.bias = nn.Parameter(torch.randn_like(linear.bias) / 4) if name in biased else None
    before, token = _text(model), _ids(device)[:, :1]
    with torch.inference_mode():
        wanted = model(token, use_cache=False).logits
    report = patch_model(model)
    assert [(x.sparse, str(x.formula), x.note) for x in report.layers] == [(True, "relu", "")] * 3
    with torch.inference_mode():
        torch.testing.assert_close(model(token, use_cache=False).logits, wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(_text(model), before)
    unpatch_model(model)
    assert _unchanged(model) and torch.equal(_text(model), before)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_decoding_step(device):
    model = _model(device=device)
    patch_model(model)
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    token = _ids(device)[:, :1]
    with torch.inference_mode():
        torch.testing.assert_close(
            compiled(token, use_cache=False).logits, model(token, use_cache=False).logits, atol=1e-4, rtol=1e-3
        )


@pytest.mark.gpu
def test_captured_step_with_a_static_cache(torch_gpu):
    model = _model(device="cuda")
    wanted = _text(model)[0, 7:]
    patch_model(model)
    with torch.inference_mode():
        cache = transformers.StaticCache(config=model.config, max_cache_len=64)
        first = model(_ids("cuda"), past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        token = first.clone()

        def step() -> None:
            token.copy_(model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True))

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        tokens = [int(first), int(token)]
        for _ in range(18):
            graph.replay()
            tokens.append(int(token))
    assert tokens == wanted.tolist()


@pytest.mark.gpu
def test_patching_takes_none_of_torchs_memory(torch_gpu):
    model = _model(device="cuda", dtype=torch.bfloat16)
    _text(model)
    before = torch.cuda.memory_allocated()
    patch_model(model)
    assert torch.cuda.memory_allocated() == before
    _text(model)
    unpatch_model(model)
    assert torch.cuda.memory_allocated() == before


class Twisted(nn.Module):
    """A gated MLP, but for one step of its own."""

    TWISTS: ClassVar = {
        "nothing": lambda self, gate, up: gate.relu() * up,
        "scaled by 0.95": lambda self, gate, up: 0.95 * (gate.relu() * up),
        "scaled by 0.999": lambda self, gate, up: 0.999 * (gate.relu() * up),
        "leaky": lambda self, gate, up: nn.functional.leaky_relu(gate, 0.01) * up,
        "clamped": lambda self, gate, up: gate.relu().clamp(max=7.0) * up,
        "clamped far out": lambda self, gate, up: gate.clamp(-1e3, 1e3).relu() * up,
        "SiLU": lambda self, gate, up: nn.functional.silu(gate) * up,
        "squared": lambda self, gate, up: gate.relu().square() * up,
        "relu6": lambda self, gate, up: nn.functional.relu6(gate) * up,
        "dReLU": lambda self, gate, up: gate.relu() * up.relu(),
        "an offset": lambda self, gate, up: (gate - 0.001).relu() * up,
        "a threshold": lambda self, gate, up: torch.where(gate >= 0.02, gate, 0) * up,
        "clamped as float16 is": lambda self, gate, up: (gate.relu() * up).clamp(-65504, 65504),
        "two outputs": lambda self, gate, up: gate.relu() * up,
        "an assertion": lambda self, gate, up: self.fail(),
        "a sub-norm": lambda self, gate, up: self.norm(gate.relu() * up),
        "a norm without weights": lambda self, gate, up: nn.functional.rms_norm(gate.relu() * up, (gate.shape[-1],)),
    }

    def __init__(self, twist: str, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(64, 160, bias=False)
        self.up_proj = nn.Linear(64, 160, bias=False)
        self.down_proj = nn.Linear(160, 64, bias=False)
        self.norm = nn.RMSNorm(160) if twist == "a sub-norm" else None
        self.twist = twist
        self.to(device, dtype)

    def fail(self):
        raise AssertionError

    def forward(self, x):
        y = self.down_proj(self.TWISTS[self.twist](self, self.gate_proj(x), self.up_proj(x)))
        return (y, None) if self.twist == "two outputs" else y


class Around(nn.Module):
    """A model with one MLP and a config."""

    def __init__(self, mlp: nn.Module, **config) -> None:
        super().__init__()
        self.config, self.mlp = SimpleNamespace(**config), mlp

    def forward(self, x):
        return x + self.mlp(x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.02])
@pytest.mark.parametrize("twist", Twisted.TWISTS)
def test_only_what_the_code_computes_is_taken(twist, threshold, dtype, device):
    if device == "cuda" and twist not in ("nothing", "squared", "dReLU", "scaled by 0.999", "leaky", "a sub-norm"):
        pytest.skip("its code is tried in float64 alike on any device")
    torch.manual_seed(0)
    model = Around(Twisted(twist, dtype, device), hidden_act="relu")
    mlp = model.mlp
    known = {"nothing": "relu", "squared": "relu2", "dReLU": "drelu"}
    if threshold == 0.02:  # which a config cannot say beside relu
        known["a threshold"] = "relu"
    (layer,) = patch_model(model, threshold).layers
    assert layer.sparse == (twist in known), layer.reason
    if twist in known:
        formula = Formula(threshold or 0.0, known[twist])
        assert layer.formula == model.mlp.formula == formula and model.mlp.threshold == layer.threshold == (threshold or 0.0)
        name = "fatrelu(0.02)" if twist == "a threshold" else known[twist]
        assert layer.note == ("" if twist == "nothing" else f"the config says hidden_act='relu', its code computes {name}")
    else:
        assert layer.formula is None and not layer.note
        assert model.mlp is mlp and mlp.down_proj.weight.is_contiguous()
        found = {
            "two outputs": "not return one tensor",
            "a sub-norm": "does not run on 256",
            "an offset": "is zero where that of relu is not",
            "a threshold": "is zero where that of relu is not",
            "an assertion": "does not run on 256",
        }
        assert found.get(twist, "differs from that of relu by") in layer.reason


@pytest.mark.parametrize("twist", ["nothing", "squared", "dReLU", "leaky"])
def test_a_config_that_claims_a_threshold_is_not_told_otherwise(twist):
    """The code of a config with a threshold is tried for that formula alone."""
    model = Around(Twisted(twist, torch.float32, "cpu"), hidden_act="fatrelu", hidden_act_param=0.02)
    mlp = model.mlp
    (layer,) = patch_model(model).layers
    assert not layer.sparse and not layer.note and "differs from that of fatrelu(0.02) by" in layer.reason
    assert model.mlp is mlp


@pytest.mark.parametrize("twist", ["nothing", "squared", "dReLU", "leaky", "SiLU"])
def test_a_config_that_says_silu_is_told_what_the_code_computes(twist):
    """As SparseLM has it, whose config says silu and whose code computes ReLU."""
    known = {"nothing": "relu", "squared": "relu2", "dReLU": "drelu"}
    model = Around(Twisted(twist, torch.float32, "cpu"), hidden_act="silu")
    report = patch_model(model)
    (layer,) = report.layers
    assert layer.sparse == (twist in known)
    if twist in known:
        assert layer.formula == Formula(0.0, known[twist]) and layer.note in str(report).replace("\n", " ")
        assert layer.note == f"the config says hidden_act='silu', its code computes {known[twist]}"
    else:
        assert layer.reason.startswith("the config says hidden_act='silu': it leaves no zeros") and not layer.note


@pytest.mark.parametrize("twist", ["a threshold", "nothing", "leaky"])
def test_a_threshold_by_hand_where_the_config_has_none(twist):
    model = Around(Twisted(twist, torch.float32, "cpu"), hidden_act="fatrelu")
    (layer,) = patch_model(model, 0.02).layers
    assert layer.sparse == (twist == "a threshold") and layer.threshold == 0.02
    if not layer.sparse:
        assert "differs from that of fatrelu(0.02) by" in layer.reason


def test_an_activation_without_its_threshold_takes_the_one_given():
    mlp = Twisted("nothing", torch.float32, "cpu")
    mlp.act_fn = FATReLU()
    mlp.TWISTS = {"nothing": lambda self, gate, up: self.act_fn(gate) * up}
    model = Around(mlp, hidden_act="fatrelu")
    (layer,) = patch_model(model, 0.02).layers
    assert layer.sparse and model.mlp.threshold == 0.02


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["gate_proj", "down_proj"])
def test_weights_that_are_not_finite_leave_a_layer_dense(name, device):
    model = Around(Twisted("nothing", torch.float32, device), hidden_act="relu")
    with torch.no_grad():
        getattr(model.mlp, name).weight[3] = float("nan")
    (layer,) = patch_model(model).layers
    assert not layer.sparse and "not finite" in layer.reason


def test_every_layer_that_is_called_sparse_is_sparse(monkeypatch):
    """Whatever stands in the way of the sparse path is found before, whatever does not is not."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate brings offloading")
    model = _model()
    accelerate.cpu_offload(model.model.layers[0].mlp)
    accelerate.hooks.remove_hook_from_submodules(model.model.layers[0].mlp)
    assert "forward" in model.model.layers[0].mlp.up_proj.__dict__, "accelerate cleans up: try something else here"
    doubled = model.model.layers[1].mlp.gate_proj
    doubled.forward = lambda x: 2 * nn.Linear.forward(doubled, x)
    report, taken, real = patch_model(model), [], SparseGatedMLP._sparse

    def noting(self, x):
        y = real(self, x)
        taken.append(y is not None)
        return y

    monkeypatch.setattr(SparseGatedMLP, "_sparse", noting)
    with torch.inference_mode():
        model(_ids()[:, :1], use_cache=False)
    assert [x.sparse for x in report.layers] == [True, False, True] and taken == [True, True]
    assert "a forward of its own" in report.layers[1].reason


@pytest.mark.parametrize("where", ["act_fn", "dropout"])
def test_what_else_a_layer_has_leaves_it_dense(where):
    model = _model()
    mlp = model.model.layers[1].mlp
    if where == "act_fn":
        mlp.act_fn.register_forward_hook(lambda module, given, out: None)
    else:
        mlp.dropout = nn.Dropout(0.1)
    report = patch_model(model)
    assert [x.sparse for x in report.layers] == [True, False, True]
    assert ("hooks" if where == "act_fn" else "dropout") in report.layers[1].reason


def test_an_empty_ffn_is_left_dense():
    model = _model()
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (nn.Linear(*s, bias=False) for s in ((64, 0), (64, 0), (0, 64)))
    report = patch_model(model)
    assert "it has no neurons: gate_proj.weight has shape (0, 64)" in report.layers[1].reason


def test_unpatching_keeps_the_mode():
    model = _model()
    patch_model(model)
    model.train()
    unpatch_model(model)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("function", [patch_model, unpatch_model, measure_sparsity, SparsityMeter])
def test_the_name_of_a_model_is_no_model(function):
    arguments = (torch.zeros(1, 1, dtype=torch.int64),) if function is measure_sparsity else ()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str: load it first.*from_pretrained"):
        function("a folder", *arguments)


@pytest.mark.parametrize("how", ["torch.save", "pickle", "deepcopy"])
def test_a_patched_model_is_copied_whole(how, tmp_path):
    model = _model()
    patch_model(model)
    before = _text(model)
    if how == "torch.save":
        torch.save(model, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        again = pickle.loads(pickle.dumps(model)) if how == "pickle" else copy.deepcopy(model)
    assert all(isinstance(layer.mlp, SparseGatedMLP) for layer in again.model.layers)
    assert torch.equal(_text(again), before)
    unpatch_model(again)
    assert _unchanged(again) and torch.equal(_text(again), before)
    assert all(isinstance(layer.mlp, SparseGatedMLP) for layer in model.model.layers)


@pytest.mark.parametrize("device", DEVICES)
def test_one_token_with_gradients(device):
    model = _model(device=device)
    token = _ids(device)[:, :1]
    model(token).logits.sum().backward()
    wanted = model.model.layers[1].mlp.gate_proj.weight.grad.clone()
    model.zero_grad()
    patch_model(model)
    model(token).logits.sum().backward()
    torch.testing.assert_close(model.model.layers[1].mlp.gate_proj.weight.grad, wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_lora(device):
    peft = pytest.importorskip("peft", reason="peft brings LoRA adapters")
    model = _model(device=device)
    plain = _text(model)
    patch_model(model)
    config = peft.LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], r=4, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    reference = copy.deepcopy(adapted)
    unpatch_model(reference)
    with torch.inference_mode():
        logits = [m(_ids(device)[:, :1], use_cache=False).logits for m in (adapted, reference)]
        torch.testing.assert_close(*logits)
        text = [m.generate(input_ids=_ids(device), max_new_tokens=20, do_sample=False) for m in (adapted, reference)]
    assert torch.equal(*text) and not torch.equal(text[0], plain)
    merged = adapted.merge_and_unload()
    assert torch.equal(_text(merged), text[0])
    assert all(isinstance(layer.mlp, SparseGatedMLP) for layer in merged.model.layers)


@pytest.mark.parametrize("device", DEVICES)
def test_offloading_after_patching(device):
    accelerate = pytest.importorskip("accelerate", reason="accelerate brings offloading")
    model = _model(device=device)
    before = _text(model)
    patch_model(model)
    accelerate.cpu_offload(model, execution_device=torch.device(device))
    with torch.inference_mode():
        assert torch.equal(model.generate(_ids(device), max_new_tokens=20, do_sample=False), before)


@pytest.mark.parametrize(
    ("device", "to", "stays"),
    [
        ("cuda:1", "cuda:1", True),
        ("cuda:1", "cuda", True),  # the current GPU
        ("cuda:0", "cuda", False),
        ("cuda:0", "cuda:1", False),
        ("cpu", "cpu", True),
        ("cpu", "cuda", False),
        ("cuda:1", "cpu", False),
    ],
)
def test_what_a_hook_moves_nowhere(device, to, stays, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert dispatch._stays(torch.device(device), torch.device(to)) is stays


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_hooks_that_only_move_inputs_leave_layers_sparse(device, compress):
    """As ``device_map="auto"`` leaves them: all weights stay where they are, so an FFN computes what it would without."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate brings hooks")
    model = _model(device=device, dtype=torch.bfloat16 if compress else torch.float32)
    before = _text(model)
    accelerate.hooks.attach_execution_device_hook(model, torch.device(device))
    hooked = [m for m in model.modules() if hasattr(m, "_hf_hook")]
    projections = [layer.mlp.up_proj for layer in model.model.layers]
    assert all(p in hooked for p in projections), "accelerate hooks other modules: try something else here"
    report = patch_model(model, compress=compress)
    assert all(x.sparse for x in report.layers) and all(m.decoding for m in report.matrices), str(report)
    assert torch.equal(_text(model), before)
    unpatch_model(model)
    assert _unchanged(model) and [m for m in model.modules() if hasattr(m, "_hf_hook")] == hooked
    assert torch.equal(_text(model), before)


def test_hooks_that_fetch_weights_leave_layers_dense():
    accelerate = pytest.importorskip("accelerate", reason="accelerate brings hooks")
    model = _model()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    report = patch_model(model)
    assert not report.sparse and all("meta" in x.reason or "hooks" in x.reason for x in report.layers)


@pytest.mark.gpu
def test_a_model_on_two_gpus():
    """Layers on both, activations moved by accelerate: sparse on each, the text of one GPU."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate brings device maps")
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    model = _model(device="cuda:0")
    before = _text(model)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
    places |= {f"model.layers.{i}": 1 for i in (1, 2)} | {"model.norm": 1, "lm_head": 1}
    spread = accelerate.dispatch_model(model, places)
    report = patch_model(spread)
    assert all(x.sparse for x in report.layers), str(report)
    assert {layer.mlp.down_proj.weight.device.index for layer in spread.model.layers} == {0, 1}
    taken, real = [], SparseGatedMLP._sparse

    def noting(self, x):
        y = real(self, x)
        taken.append(y is not None)
        return y

    SparseGatedMLP._sparse = noting
    try:
        assert torch.equal(_text(spread), before)
    finally:
        SparseGatedMLP._sparse = real
    assert len(taken) >= 3 * 19 and all(taken)


def test_parameters_that_were_one_are_one_again():
    model = _model(dtype=torch.bfloat16)
    first, *others = [layer.mlp for layer in model.model.layers]
    for mlp in others:
        mlp.up_proj.weight = first.up_proj.weight
    before, modules = _text(model), [layer.mlp.up_proj for layer in model.model.layers]
    patch_model(model, compress=True)
    unpatch_model(model)
    assert [layer.mlp.up_proj for layer in model.model.layers] == modules
    assert len({id(layer.mlp.up_proj.weight) for layer in model.model.layers}) == 1
    assert len({id(layer.mlp.gate_proj.weight) for layer in model.model.layers}) == 3
    assert torch.equal(_text(model), before)


def test_projections_that_layers_share_are_compressed_once():
    model = _model(dtype=torch.bfloat16)
    first, second, _ = (layer.mlp for layer in model.model.layers)
    second.up_proj = first.up_proj
    before, shared = _text(model), first.up_proj
    report = patch_model(model, compress=True)
    assert all(x.sparse and x.ratio < 1 for x in report.layers)
    assert model.model.layers[0].mlp.up_proj is model.model.layers[1].mlp.up_proj
    unpatch_model(model)
    assert model.model.layers[0].mlp.up_proj is model.model.layers[1].mlp.up_proj is shared
    assert torch.equal(_text(model), before)


def test_biases_that_are_set_while_compressed_stay():
    model = _model(dtype=torch.bfloat16, mlp_bias=True)
    patch_model(model, compress=True)
    bias = model.model.layers[0].mlp.up_proj.bias = nn.Parameter(torch.ones(160, dtype=torch.bfloat16))
    unpatch_model(model)
    assert model.model.layers[0].mlp.up_proj.bias is bias


def test_frozen_parameters_stay_frozen():
    model = _model(dtype=torch.bfloat16).requires_grad_(False)
    patch_model(model, compress=True)
    unpatch_model(model)
    assert not any(p.requires_grad for p in model.parameters())
