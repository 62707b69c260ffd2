"""Every family of MLPs: found, tried, patched, decoded with, put back; and families that others register."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
transformers = pytest.importorskip("transformers", reason='the extra "hf" brings it')
from torch import nn  # noqa: E402
from torch_devices import DEVICES  # noqa: E402
from transformers.models.arcee.modeling_arcee import ArceeMLP  # noqa: E402
from transformers.models.bitnet.modeling_bitnet import BitNetMLP  # noqa: E402
from transformers.models.glm4.modeling_glm4 import Glm4MLP  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaMLP  # noqa: E402
from transformers.models.nanochat.modeling_nanochat import NanoChatMLP  # noqa: E402
from transformers.models.nemotron.modeling_nemotron import NemotronMLP  # noqa: E402
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMLP  # noqa: E402
from transformers.models.opt.modeling_opt import OPTDecoderLayer  # noqa: E402
from transformers.models.persimmon.modeling_persimmon import PersimmonMLP  # noqa: E402
from transformers.models.phi3.modeling_phi3 import Phi3MLP  # noqa: E402

from prosparse_cupy import cli  # noqa: E402
from prosparse_cupy.compressed import is_too_narrow  # noqa: E402
from prosparse_cupy.crossover import most_tokens  # noqa: E402
from prosparse_cupy.formula import Formula  # noqa: E402
from prosparse_cupy.torch import (  # noqa: E402
    FAMILIES,
    CompressedLinear,
    FATReLU,
    LayerSparsity,
    MLPFamily,
    SparseGatedMLP,
    SparseMLP,
    SparsityMeter,
    SparsityReport,
    SquaredReLU,
    generate,
    load_compressed,
    measure_sparsity,
    patch_model,
    register_family,
    register_fatrelu,
    unpatch_model,
)
from prosparse_cupy.torch import halves as halves_module  # noqa: E402
from prosparse_cupy.torch import mlp as mlp_module  # noqa: E402
from prosparse_cupy.torch.families import mlps  # noqa: E402
from prosparse_cupy.torch.halves import SparseDown, SparseUp  # noqa: E402

WIDTHS: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SIZES = {**WIDTHS, "intermediate_size": 161, "max_position_embeddings": 64}
GROUPED = {**SIZES, "num_key_value_heads": 2}
OPT = {**WIDTHS, "ffn_dim": 161, "max_position_embeddings": 64, "word_embed_proj_dim": 64}
HYBRID = {
    **{key: value for key, value in GROUPED.items() if key != "num_hidden_layers"},
    "head_dim": 16,
    "layers_block_type": ["attention", "mlp", "moe"],
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 97,
    "n_routed_experts": 4,
    "num_experts_per_tok": 4,  # all, so that no rounding decides which
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 1,
    "experts_implementation": "eager",  # which computes in float64 too
}


class DoublyRectified(LlamaMLP):
    """As TurboSparse's code has it."""

    def forward(self, x):
        return self.down_proj(self.gate_proj(x).relu() * self.up_proj(x).relu())


class Rectified(LlamaMLP):
    """As SparseLM's code has it, whose config says silu."""

    def forward(self, x):
        return self.down_proj(self.gate_proj(x).relu() * self.up_proj(x))


class Case(NamedTuple):
    """A model of a family, and what is to be found in it."""

    config: Callable[[], Any]
    family: str
    formula: Formula
    note: str = ""
    code: type | None = None
    """The class of its MLPs, where it is not transformers' own."""


SQUARED, NO_GATE = Formula(activation="relu2", gated=False), Formula(gated=False)
CASES = {
    "Nemotron": Case(lambda: transformers.NemotronConfig(**GROUPED, head_dim=16), "no gate", SQUARED),
    "Nemotron, biases": Case(lambda: transformers.NemotronConfig(**GROUPED, head_dim=16, mlp_bias=True), "no gate", SQUARED),
    "Arcee": Case(lambda: transformers.ArceeConfig(**GROUPED), "no gate", SQUARED),
    "Jais2": Case(lambda: transformers.Jais2Config(**GROUPED), "no gate", SQUARED),
    "NanoChat": Case(lambda: transformers.NanoChatConfig(**GROUPED), "nanochat", SQUARED),
    "Persimmon": Case(lambda: transformers.PersimmonConfig(**SIZES), "GPT-NeoX-like", SQUARED),
    "Falcon": Case(
        lambda: transformers.FalconConfig(**WIDTHS, ffn_hidden_size=161, activation="relu", bias=True),
        "GPT-NeoX-like",
        NO_GATE,
    ),
    "BitNet": Case(lambda: transformers.BitNetConfig(**GROUPED), "BitNet", Formula(activation="relu2", normed=True)),
    "OPT": Case(lambda: transformers.OPTConfig(**OPT), "OPT", NO_GATE),
    "OPT, norm after": Case(lambda: transformers.OPTConfig(**OPT, do_layer_norm_before=False), "OPT", NO_GATE),
    "OPT, no biases": Case(lambda: transformers.OPTConfig(**OPT, enable_bias=False), "OPT", NO_GATE),
    "Phi3": Case(lambda: transformers.Phi3Config(**GROUPED, hidden_act="relu"), "fused gate and up", Formula()),
    "GLM4": Case(lambda: transformers.Glm4Config(**GROUPED, head_dim=16, hidden_act="relu"), "fused gate and up", Formula()),
    "NemotronH": Case(lambda: transformers.NemotronHConfig(**HYBRID), "Nemotron-H", SQUARED),
    "Llama, relu2": Case(
        lambda: transformers.LlamaConfig(**GROUPED, hidden_act="relu2"), "LLaMA-like", Formula(activation="relu2")
    ),
    "Llama, biases": Case(
        lambda: transformers.LlamaConfig(**GROUPED, hidden_act="relu", mlp_bias=True), "LLaMA-like", Formula()
    ),
    "dReLU": Case(
        lambda: transformers.LlamaConfig(**GROUPED, hidden_act="relu"),
        "LLaMA-like",
        Formula(activation="drelu"),
        "the config says hidden_act='relu', its code computes drelu",
        DoublyRectified,
    ),
    "SparseLM": Case(
        lambda: transformers.LlamaConfig(**GROUPED, hidden_act="silu"),
        "LLaMA-like",
        Formula(),
        "the config says hidden_act='silu', its code computes relu",
        Rectified,
    ),
}
INSIDE = tuple(name for name in CASES if name.startswith("OPT"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small operations on threads that other tests need wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def families():
    """Has FAMILIES put back."""
    before = list(FAMILIES)
    yield
    FAMILIES[:] = before


@pytest.fixture
def calls(monkeypatch):
    """Names of the operators that modules in the place of FFNs have called, in order."""
    noted: list[str] = []

    def noting(function, name_of):
        def call(*arguments, **keywords):
            y = function(*arguments, **keywords)
            noted.append(name_of(*arguments))
            return y

        return call

    for module in (mlp_module, halves_module):
        monkeypatch.setattr(module, "dispatched", noting(module.dispatched, lambda name, *_: name))
    monkeypatch.setattr(SparseMLP, "_called", noting(SparseMLP._called, lambda *_: "sparse_ffn"))
    for name in ("ffn_12", "ffn_4"):
        monkeypatch.setattr(halves_module, name, noting(getattr(halves_module, name), lambda *_, name=name: name))
    return noted


def _randomise(module):
    """Weights with which every part counts, whatever the class initialises them to; those of norms stay near one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(p + noise / 10 if p.dim() == 1 else noise / p.shape[-1] ** 0.5)
    return module


def _model(name: str, device: str = "cpu", dtype=torch.float32, **changes):
    case = CASES[name]
    config = case.config()
    for key, value in changes.items():
        setattr(config, key, value)
    model = _coded(case, transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval())
    model.generation_config.pad_token_id = 0
    return _randomise(model).to(device)


def _coded(case: Case, model):
    """With the code of the case's MLPs, as remote code would bring it."""
    if case.code is not None:
        for layer in model.model.layers:
            layer.mlp.__class__ = case.code
    return model


LENGTH = 12  # of a prompt: more tokens than the operators take


def _ids(model):
    return torch.randint(1, 128, (1, LENGTH), generator=torch.Generator().manual_seed(0)).to(model.device)


def _text(model):
    with torch.inference_mode():
        return model.generate(_ids(model), max_new_tokens=10, do_sample=False)


def _logits(model, ids=None):
    with torch.inference_mode():
        return model(_ids(model) if ids is None else ids, use_cache=False).logits


def _singles(model):
    """Logits of tokens, each alone."""
    return torch.cat([_logits(model, _ids(model)[:, i : i + 1]) for i in range(LENGTH)])


def _bits(tensor):
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _same_state(one, other) -> None:
    assert list(one) == list(other)
    for key, value in one.items():
        assert value.dtype == other[key].dtype and torch.equal(_bits(value), _bits(other[key])), key


def _state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def _ffns(model):
    return [module for _, module, _ in mlps(model)]


def _down(model):
    """The down-projections of a model, patched or not."""
    return [getattr(module, family.down) for _, module, family in mlps(model)]


def _laid_out(model):
    """A dense copy whose down-projections lie in memory as those of patched ones do: libraries sum in another order then."""
    other = copy.deepcopy(model)
    for down in _down(other):
        mlp_module.pack(down)
    return other


def _is_patched(model) -> bool:
    ours = SparseMLP, SparseUp, SparseDown, CompressedLinear
    return any(isinstance(module, ours) for module in model.modules())


def _check_put_back(model, modules, state) -> None:
    """The very modules, values and layouts of before, each matrix in memory of its own."""
    assert dict(model.named_modules()) == modules
    _same_state(model.state_dict(), state)
    for p in model.parameters():
        assert p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes


def _check_within_contract(found, dense, exact) -> None:
    """At most twice the error of the dense path in bfloat16 too, plus one ulp, as vectors."""
    ours, theirs = ((x.double() - exact).norm().item() for x in (found, dense))
    assert ours <= 2 * theirs + torch.finfo(torch.bfloat16).eps * exact.norm().item(), (ours, theirs)


def _operators(name: str) -> list[str]:
    """What decoding one token calls."""
    return ["ffn_12", "ffn_4"] * 2 if name in INSIDE else ["sparse_ffn"] * 2


# Every family.


def test_every_family_has_a_case():
    assert {case.family for case in CASES.values()} | {"RWKV-7"} == {family.name for family in FAMILIES}
    assert all(family.formula and family.models for family in FAMILIES)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_patched_models_say_the_same_and_come_back(name, device, calls):
    case, model = CASES[name], _model(name, device)
    before, logits, state, modules = _text(model), _logits(model), _state(model), dict(model.named_modules())
    assert [family.name for *_, family in mlps(model)] == [case.family] * 2
    report = patch_model(model, example=_ids(model))
    assert [(x.formula, x.threshold, x.reason, x.note) for x in report.sparse] == [(case.formula, 0.0, "", case.note)] * 2
    assert [x.name for x in report.sparse] == [n for n, *_ in mlps(model)]
    if name in INSIDE:
        assert all(type(layer.fc1) is SparseUp and type(layer.fc2) is SparseDown for layer in _ffns(model))
    else:
        assert all(mlp.formula == case.formula and mlp.family.name == case.family for mlp in _ffns(model))
    assert all(down.weight.t().is_contiguous() for down in _down(model))
    _same_state(model.state_dict(), state)
    calls.clear()
    assert torch.equal(_text(model), before)
    assert calls == _operators(name) * 9  # all but the prompt
    _same_state(model.state_dict(), state)
    unpatch_model(model)
    _check_put_back(model, modules, state)
    assert torch.equal(_bits(_logits(model)), _bits(logits)) and torch.equal(_text(model), before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_as_close_to_float64(name, device, calls):
    model = _model(name, device, torch.bfloat16)
    exact = _singles(copy.deepcopy(model).double()).double()
    dense = _singles(model)
    assert len(patch_model(model).sparse) == 2
    calls.clear()
    found = _singles(model)
    assert calls == _operators(name) * LENGTH
    _check_within_contract(found, dense, exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_a_prompt_gives_the_bits_of_the_dense_model(name, dtype, device, calls):
    model = _model(name, device, dtype)
    wanted = _bits(_logits(_laid_out(model)))
    patch_model(model, linears=False)
    calls.clear()
    assert torch.equal(_bits(_logits(model)), wanted)
    batch = _ids(model).reshape(LENGTH, 1)  # one token each of several texts
    assert torch.equal(_bits(_logits(model, batch)), _bits(_logits(_laid_out_dense(model), batch)))
    assert not calls


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("texts", [2, 8])
@pytest.mark.parametrize("name", CASES)
def test_batches_say_the_same(name, texts, device, calls):
    """Several prompts of different lengths, padded on the left, each step of all of them by the operators."""
    model = _model(name, device)
    ids = torch.randint(1, 128, (texts, LENGTH), generator=torch.Generator().manual_seed(1)).to(device)
    mask = (torch.arange(LENGTH)[None] >= torch.arange(texts)[:, None] % 5).long().to(device)
    if name == "NemotronH":
        mask = torch.ones_like(ids)  # what its state-space layers make of padding is another question

    def text():
        with torch.inference_mode():
            return model.generate(ids * mask, attention_mask=mask, max_new_tokens=6, do_sample=False)

    before = text()
    patch_model(model)
    calls.clear()
    assert torch.equal(text(), before)
    assert calls == _operators(name) * 5


def _laid_out_dense(model):
    other = copy.deepcopy(model)
    unpatch_model(other)
    return _laid_out(other)


@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded_and_copied(name, tmp_path):
    model = _model(name)
    before, state = _text(model), _state(model)
    patch_model(model)
    model.save_pretrained(tmp_path)
    loaded = _coded(CASES[name], transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    assert not _is_patched(loaded)
    _same_state(loaded.state_dict(), state)
    assert torch.equal(_text(loaded), before)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = {id(module) for module in model.modules()}
        assert _is_patched(other) and not any(id(module) in own for module in other.modules())
        for layer in _ffns(other) if name in INSIDE else []:
            assert layer.fc1._layer == (layer,)
        assert torch.equal(_text(other), before)
        unpatch_model(other)
        assert not _is_patched(other) and torch.equal(_text(other), before)
        _same_state(other.state_dict(), state)
    assert _is_patched(model) and torch.equal(_text(model), before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_generate_says_the_same(name, device):
    """The package's own loop, where it takes the model; else it says so and transformers' does it."""
    model = _model(name, device)
    before = _text(model)
    patch_model(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "generate: transformers' own loop does this call")
        assert torch.equal(generate(model, _ids(model), max_new_tokens=10, do_sample=False), before)
    assert torch.equal(_text(model), before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_patched_model_loads_a_state_dict(name, assign, calls):
    model, other = _model(name), _model(name)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.25)
    patch_model(model)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    _same_state(model.state_dict(), other.state_dict())
    assert all(down.weight.t().is_contiguous() for down in _down(model))
    calls.clear()
    assert torch.equal(_text(model), _text(other)) and calls == _operators(name) * 9
    unpatch_model(model)
    _same_state(model.state_dict(), other.state_dict())
    assert torch.equal(_text(model), _text(other))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_patched_or_not_the_same_neurons_are_active(name, device):
    case, model = CASES[name], _model(name, device)
    texts = _ids(model), _ids(model)[:, :1]
    shares: list[float] = []
    handles = [
        down.register_forward_pre_hook(lambda _, given: shares.append((given[0] != 0).double().mean().item()))
        for down in _down(model)
    ]
    for ids in texts:
        _logits(model, ids)
    for handle in handles:
        handle.remove()
    dense = [measure_sparsity(model, ids) for ids in texts]
    patch_model(model)
    sparse = [measure_sparsity(model, ids) for ids in texts]
    assert [x.active for report in dense for x in report.layers] == pytest.approx(shares)
    assert [(x.name, x.active, x.tokens) for report in sparse for x in report.layers] == [
        (x.name, x.active, x.tokens) for report in dense for x in report.layers
    ]
    for report in (*dense, *sparse):
        active = 1 - report.sparsity
        assert 0.1 < active < 0.7 and all(x.gated == case.formula.gated for x in report.layers)
        matrices, rows = (3, 2) if case.formula.gated else (2, 1)
        read = sum(x.neurons * (1 + rows * x.active) for x in report.layers)
        assert report.weights_read == pytest.approx(read / sum(matrices * x.neurons for x in report.layers))
    text = _text(model)
    with SparsityMeter(model) as meter:
        assert torch.equal(_text(model), text)
    assert [x.tokens for x in meter.report().layers] == [LENGTH + 9] * 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["Nemotron, biases", "Persimmon", "Falcon", "BitNet", "OPT", "Phi3", "dReLU"])
def test_gradients_and_autocast_take_the_dense_path(name, device, calls):
    model = _model(name, device)
    twin, token = _laid_out(model), _ids(model)[:, :1]
    patch_model(model)
    calls.clear()
    for own in (model, twin):
        own(token, use_cache=False).logits.square().sum().backward()
    wanted = dict(twin.named_parameters())
    for key, p in model.named_parameters():
        assert (p.grad is None) == (wanted[key].grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, wanted[key].grad, msg=key)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(_logits(model, token), _logits(twin, token))
    assert not calls
    torch.testing.assert_close(_logits(model, token), _logits(twin, token), atol=1e-4, rtol=1e-4)
    assert calls == _operators(name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["Nemotron, biases", "Llama, biases", "Falcon", "BitNet", "OPT"])
def test_vectors_alone_can_be_trained(name, device, calls):
    """Biases, or the norm's weight, of frozen matrices."""
    model = _model(name, device)
    for p in model.parameters():
        p.requires_grad_(p.dim() == 1)
    twin, token = _laid_out(model), _ids(model)[:, :1]
    patch_model(model, linears=False)
    ffns = [{id(p) for p in module.parameters()} for module in (*_ffns(model), *_ffns(twin))]
    for own in (model, twin):
        for p in own.parameters():  # nothing else is in the way
            p.requires_grad_(p.requires_grad and any(id(p) in ids for ids in ffns))
    calls.clear()
    for own in (model, twin):
        own(token, use_cache=False).logits.square().sum().backward()
    assert not calls
    wanted = {key: p.grad for key, p in twin.named_parameters() if p.grad is not None}
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert found and list(found) == list(wanted)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[key], msg=key)


@pytest.mark.parametrize("device", DEVICES)
def test_another_norm_put_there_later_is_what_counts(device, calls):
    model = _model("BitNet", device)
    patched, token = copy.deepcopy(model), _ids(model)[:, :1]
    patch_model(patched, linears=False)
    same_kind = copy.deepcopy(model.model.layers[0].mlp.ffn_sub_norm)
    with torch.no_grad():
        same_kind.weight.mul_(3).add_(0.5)
    same_kind.variance_epsilon = 0.1
    for norm, called in ((same_kind, True), (nn.LayerNorm(161).to(device), False), (nn.Identity(), False)):
        for own in (model, patched):
            own.model.layers[0].mlp.ffn_sub_norm = norm
        calls.clear()
        found = _logits(patched, token)
        assert calls == ["sparse_ffn"] * (1 + called)
        torch.testing.assert_close(found, _logits(model, token), atol=1e-4, rtol=1e-4)
    unpatch_model(patched)
    assert type(patched.model.layers[0].mlp.ffn_sub_norm) is nn.Identity
    assert torch.equal(_logits(patched, token), _logits(model, token))


@pytest.mark.parametrize("name", ["Nemotron, biases", "OPT", "Phi3", "BitNet"])
def test_compiled_models_call_the_operators(name):
    model, targets = _model(name), []
    patch_model(model)
    wanted = _logits(model, _ids(model)[:, :1]), _logits(model)

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    with torch.inference_mode():
        one = compiled(_ids(model)[:, :1], use_cache=False).logits
        found = [target.split(".")[1] for target in targets if target.startswith("prosparse.")]
        many = compiled(_ids(model), use_cache=False).logits
    assert [target for target in found if target != "ffn_1"] == _operators(name)
    torch.testing.assert_close(one, wanted[0])
    torch.testing.assert_close(many, wanted[1])
    torch._dynamo.reset()


# What others put on a patched model.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "targets", "left"),
    [
        ("Nemotron, biases", ["up_proj", "down_proj"], []),
        ("Nemotron", ["down_proj"], []),
        ("Persimmon", ["dense_h_to_4h"], []),
        ("BitNet", ["gate_proj"], []),
        ("Phi3", ["gate_up_proj"], []),
        ("OPT", ["fc1"], ["ffn_4"]),
        ("OPT", ["fc2"], ["ffn_12", "ffn_4"]),
        ("OPT, norm after", ["fc1", "fc2"], ["ffn_4"]),
    ],
)
def test_lora(name, targets, left, device, calls):
    peft = pytest.importorskip("peft", reason="peft brings LoRA adapters")
    model = _model(name, device)
    plain = _text(model)
    patch_model(model, linears=False)
    config = peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config).eval()
    reference = copy.deepcopy(adapted)
    unpatch_model(reference)
    assert not _is_patched(reference)
    calls.clear()
    token = _ids(model)[:, :1]
    torch.testing.assert_close(_logits(adapted, token), _logits(reference, token), atol=1e-4, rtol=1e-4)
    assert calls == left * 2
    text = [m.generate(input_ids=_ids(model), max_new_tokens=10, do_sample=False) for m in (adapted, reference)]
    assert torch.equal(*text) and not torch.equal(text[0], plain)
    merged = adapted.merge_and_unload()
    assert _is_patched(merged) and torch.equal(_text(merged), text[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["Nemotron, biases", "Falcon", "BitNet", "GLM4", "dReLU", "OPT"])
def test_hooks_on_projections_see_what_they_did(name, device):
    """And on the activation and the norm, where there is one: what they change is changed, what they see is dense."""
    model = _model(name, device)
    family = next(family for *_, family in mlps(model))
    patched, token = copy.deepcopy(model), _ids(model)[:, :1]
    patch_model(patched)
    twin = _laid_out(model)
    parts = [*family.projections, *filter(None, [family.norm])]
    if name in INSIDE or not family.gated:
        parts.append(family.activation)
    for part in parts:
        seen: list[list[Any]] = [[], []]
        for own, noted in zip((patched, twin), seen, strict=True):

            def twist(module, given, out, noted=noted):
                noted.append((given[0].clone(), out.clone()))
                return 1.5 * out + 0.25

            handles = [getattr(module, part).register_forward_hook(twist) for module in _ffns(own)]
            noted.append(_logits(own, token))
            for handle in handles:
                handle.remove()
        assert len(seen[0]) == len(seen[1]) == 3, part
        for found, wanted in zip(*seen, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4, msg=part)
    torch.testing.assert_close(_logits(patched, token), _logits(twin, token), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_unpatching_takes_halves_out_of_adapters_and_patching_again_works(threshold):
    peft = pytest.importorskip("peft", reason="peft brings LoRA adapters")
    model = _model("OPT")
    activations = [layer.activation_fn for layer in _ffns(model)]
    patch_model(model, threshold)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["fc1", "fc2"], r=4, init_lora_weights=False))
    unpatch_model(model)
    for layer, activation in zip(_ffns(model), activations, strict=True):
        assert layer.activation_fn is activation
        assert type(layer.fc1.base_layer) is type(layer.fc2.base_layer) is nn.Linear
        assert layer.fc2.base_layer.weight.is_contiguous()
    assert [x.reason for x in patch_model(model).layers] == [
        "fc1 is a peft.tuners.lora.layer.Linear, not a torch.nn.Linear itself"
    ] * 2
    unpatch_model(model)
    merged = adapted.merge_and_unload()
    before = _text(merged)
    assert len(patch_model(merged).sparse) == 2 and torch.equal(_text(merged), before)


class Negated(nn.Module):
    """An activation nobody knows."""

    def forward(self, x):
        return (-x).relu() + x.square()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", [nn.GELU, Negated, SquaredReLU, lambda: FATReLU(0.3), nn.Identity, nn.LeakyReLU])
@pytest.mark.parametrize("name", ["Nemotron", "BitNet", "Phi3", "OPT"])
def test_another_activation_put_there_later_is_what_counts(name, activation, device):
    model = _model(name, device)
    family = next(family for *_, family in mlps(model))
    patched = copy.deepcopy(model)
    patch_model(patched)
    for own in (model, patched):
        for module in _ffns(own):
            setattr(module, family.activation, activation())
    torch.testing.assert_close(_singles(patched), _singles(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_first_half_applies_the_activation_only_where_its_layer_does(device):
    model = _model("OPT", device)
    layer, x = _ffns(model)[0], torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).to(device)
    patch_model(model)
    up, own = layer.fc1, layer.activation_fn
    with torch.inference_mode():
        linear = nn.functional.linear(x, up.weight, up.bias)
        assert (linear < 0).any()
        torch.testing.assert_close(up(x), linear.relu())
        layer.fc1 = nn.Linear(64, 161)  # the layer calls another: nobody knows where this one is called
        assert torch.equal(up(x), linear)
        layer.fc1 = up
        del layer.activation_fn
        assert torch.equal(up(x), linear)
        layer.activation_fn = torch.relu  # no module: nothing says what it is
        assert torch.equal(up(x), linear)
        del layer.activation_fn
        layer.activation_fn = own
        own.register_forward_pre_hook(lambda *_: None)
        assert torch.equal(up(x), linear)
        own._forward_pre_hooks.clear()
        assert not torch.equal(up(x), linear)
        model.double()
        assert torch.equal(up(x.double()), nn.functional.linear(x.double(), up.weight, up.bias))


# Thresholds, examples, failures.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_a_threshold_moves_the_activation(name, device, calls):
    """Against the formula as it is written, in float64."""
    case, threshold = CASES[name], 0.3
    model = _model(name, device)
    family = next(family for *_, family in mlps(model))
    dense, modules, state = _logits(model), dict(model.named_modules()), _state(model)
    report = patch_model(model, threshold)
    formula = replace(case.formula, threshold=threshold)
    assert [(x.formula, x.threshold) for x in report.sparse] == [(formula, threshold)] * 2
    assert f"fat{formula.activation}(0.3)" in str(report) or formula == Formula(threshold)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(2)).to(device)
    calls.clear()
    for module in _ffns(model):

        def run(rows, module=module):
            if name not in INSIDE:
                return module(rows[None])[0]
            return module.fc2(module.activation_fn(module.fc1(rows)))

        with torch.inference_mode():
            for rows in (x, x[:3], x[:1]):  # by the dense path, and twice by the operators
                torch.testing.assert_close(run(rows).double(), _moved(module, family, formula, rows), atol=1e-4, rtol=1e-4)
    assert calls == _operators(name) * 2
    assert not torch.allclose(_logits(model), dense, atol=1e-2)
    unpatch_model(model)
    _check_put_back(model, modules, state)


def _moved(module, family, formula, x):
    def linear(part, x):
        projection = getattr(module, part)
        y = x @ projection.weight.double().t()
        return y if projection.bias is None else y + projection.bias.double()

    wide = x.double()
    if family.fused:
        gate, up = linear(family.fused, wide).chunk(2, dim=-1)
    else:
        up = linear(family.up, wide)
        gate = linear(family.gate, wide) if family.gate else up
    x1 = torch.where(gate >= formula.threshold, gate, 0)
    if formula.activation == "relu2":
        x1 = x1.square()
    if formula.activation == "drelu":
        up = up.relu()
    if family.gated:
        x1 = x1 * up
    if family.norm:
        norm = getattr(module, family.norm)
        x1 = x1 / (x1.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight.double()
    return linear(family.down, x1)


class Secretive:
    """Code that does something else on one hidden state alone."""

    secret = None

    def twisted(self, given, y):
        same = self.secret is not None and given.shape[-1:] == self.secret.shape
        found = (given - self.secret).abs().amax(dim=-1, keepdim=True) < 1e-3 if same else torch.zeros(())
        return torch.where(found.bool(), 2 * y, y)


class SecretiveMLP(Secretive, NemotronMLP):
    def forward(self, x):
        return self.twisted(x, super().forward(x))


class SecretiveReLU(Secretive, nn.ReLU):
    def forward(self, x):
        return self.twisted(x, super().forward(x))


@pytest.mark.parametrize("name", ["Nemotron", "OPT"])
def test_an_example_tries_the_hidden_state(name):
    model = _model(name)
    second = _ffns(model)[1]
    if name == "OPT":
        second.activation_fn = SecretiveReLU()
        secretive = second.activation_fn
    else:
        second.__class__, secretive = SecretiveMLP, second
    seen: list[Any] = []
    handle = secretive.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    _logits(model)
    handle.remove()
    secretive.secret = seen[0].reshape(-1, seen[0].shape[-1])[-1].clone()
    assert [x.sparse for x in patch_model(model).layers] == [True, True]  # nobody could know
    unpatch_model(model)
    report = patch_model(model, example=_ids(model))
    assert [x.sparse for x in report.layers] == [True, False]
    assert report.layers[1].reason.startswith(f"its output differs from that of {CASES[name].formula} by")
    assert report.layers[1].reason.endswith("at the hidden state that was given")
    assert _ffns(model)[1] is second and _down(model)[1].weight.is_contiguous()
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["Nemotron", "OPT", "BitNet", "Phi3"])
@pytest.mark.parametrize("how", ["replacing", "the example", "the example, once patched"])
def test_a_failure_on_the_way_puts_everything_back(name, how, monkeypatch):
    model, count = _model(name), []
    state, modules, wanted = _state(model), dict(model.named_modules()), _logits(model)
    if how.startswith("the example"):
        runs = 1 if how.endswith("patched") else 0
        handle = model.register_forward_pre_hook(lambda *_: count.append(0) if len(count) < runs else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            patch_model(model, example=_ids(model))
        handle.remove()
    else:
        owner, method = (halves_module._Half, "_by_operator") if name in INSIDE else (SparseMLP, "_sparse")
        real = getattr(owner, method)

        def fails_in_the_second_layer(self, *arguments):
            count.append(self)
            if len(count) > len({id(module) for module in count}) and len({id(module) for module in count}) == limit:
                raise torch.OutOfMemoryError("made up")
            return real(self, *arguments)

        limit = 4 if name in INSIDE else 2
        monkeypatch.setattr(owner, method, fails_in_the_second_layer)
        with pytest.raises(torch.OutOfMemoryError, match="made up"):
            patch_model(model)
        monkeypatch.undo()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    _check_put_back(model, modules, state)
    assert torch.equal(_bits(_logits(model)), _bits(wanted))
    assert len(patch_model(model).sparse) == 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_an_example_tells_how_sparse_each_layer_is(name, device, calls):
    """So that, where bits may vary, several tokens take the path that pays at that sparsity."""
    model = _model(name, device)
    known = [layer.sparsity for layer in measure_sparsity(model, _ids(model)).layers]
    assert len(known) == 2 and all(0.2 < share < 0.8 for share in known), "fewer than eight tokens pay at these"
    for batch_invariant in (True, False):
        report = patch_model(model, example=_ids(model), batch_invariant=batch_invariant)
        assert [x.sparsity for x in report.sparse] == pytest.approx(known, abs=0.02)
        operator = "ffn_4" if name in INSIDE else "sparse_ffn" + " without a gate" * (not CASES[name].formula.gated)
        expected = [8 if batch_invariant else most_tokens(operator, "plain", x.sparsity) for x in report.sparse]
        assert [x.most_tokens for x in report.sparse] == expected and (batch_invariant or max(expected) < 8)
        rows = [[cell.strip() for cell in line.split("│")] for line in str(report).splitlines()]
        shown = [[f"{x.sparsity:.1%}", f"1 to {x.most_tokens}".removesuffix(" to 1")] for x in report.sparse]
        assert all(cells in [row[-3:-1] for row in rows] for cells in shown)
        assert not any(getattr(module, "counts", None) is not None for module in model.modules())
        with torch.inference_mode():
            for tokens in (8, max(expected), 1):
                calls.clear()
                model(_ids(model)[:, :1].expand(tokens, 1))
                whole_or_second = [operator for operator in calls if operator in ("sparse_ffn", "ffn_4")]
                assert len(whole_or_second) == sum(tokens <= most for most in expected), (tokens, calls)
        unpatch_model(model)
    report = patch_model(model, batch_invariant=False)
    assert all(math.isnan(x.sparsity) and x.most_tokens == 8 for x in report.layers) and "at once" not in str(report)


# Compressed.

WIDE = {"hidden_size": 2656, "intermediate_size": 256}  # whose slices in ffn_4 are units
MLPS: dict[str, Callable[..., Any]] = {
    "Nemotron": lambda **sizes: NemotronMLP(transformers.NemotronConfig(**sizes)),
    "Nemotron, biases": lambda **sizes: NemotronMLP(transformers.NemotronConfig(**sizes, mlp_bias=True)),
    "Arcee": lambda **sizes: ArceeMLP(transformers.ArceeConfig(**sizes)),
    "NanoChat": lambda **sizes: NanoChatMLP(transformers.NanoChatConfig(**sizes)),
    "Persimmon": lambda **sizes: PersimmonMLP(transformers.PersimmonConfig(**sizes)),
    "BitNet": lambda **sizes: BitNetMLP(transformers.BitNetConfig(**sizes)),
    "Phi3": lambda **sizes: Phi3MLP(transformers.Phi3Config(**sizes, hidden_act="relu")),
    "GLM4": lambda **sizes: Glm4MLP(transformers.Glm4Config(**sizes, hidden_act="relu")),
    "NemotronH": lambda **sizes: NemotronHMLP(transformers.NemotronHConfig(**sizes)),
    "Llama, relu2": lambda **sizes: LlamaMLP(transformers.LlamaConfig(**sizes, hidden_act="relu2")),
    "Llama, biases": lambda **sizes: LlamaMLP(transformers.LlamaConfig(**sizes, hidden_act="relu", mlp_bias=True)),
    "dReLU": lambda **sizes: DoublyRectified(transformers.LlamaConfig(**sizes, hidden_act="relu")),
    "OPT": lambda intermediate_size, **sizes: OPTDecoderLayer(transformers.OPTConfig(**sizes, ffn_dim=intermediate_size)),
}
FFNS = tuple(name for name in MLPS if name not in INSIDE)


class Around(nn.Module):
    """A model of one MLP, or of the layer that one is inside."""

    def __init__(self, mlp: nn.Module, device: str = "cpu", dtype=torch.float32, **config) -> None:
        super().__init__()
        own = getattr(mlp, "config", None)
        self.config = SimpleNamespace(**config) if own is None else own
        self.mlp = mlp
        self.eval().to(device, dtype)

    def forward(self, x):
        if not isinstance(self.mlp, OPTDecoderLayer):
            return self.mlp(x)
        return self.mlp.fc2(self.mlp.activation_fn(self.mlp.fc1(x)))


def _around(name: str, device: str = "cpu", dtype=torch.bfloat16, **sizes: int):
    said = {"Persimmon": {"hidden_act": "relu2"}, "OPT": {"activation_function": "relu"}}
    return Around(_randomise(MLPS[name](**sizes, num_attention_heads=4)), device, dtype, **said.get(name, {}))


def _sprinkled(model):
    """With some weights that have no code."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p[(torch.rand(p.shape, generator=generator) < 1e-4).to(p.device)] = 2.0**-100
    return model


def _tokens(model, count: int):
    down = _down(model)[0]
    x = torch.randn(1, count, down.out_features, generator=torch.Generator().manual_seed(4))
    return x.to(next(model.parameters()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FFNS)
def test_compressed(name, device, calls):
    model = _sprinkled(_around(name, device, **WIDE))
    state, original = _state(model), model.mlp
    x, more = _tokens(model, 1), _tokens(model, 9)
    with torch.inference_mode():
        before = model(x), model(more)
        patch_model(model)
        plain = model(x), model(more)
        unpatch_model(model)
        (layer,) = patch_model(model, compress=True).layers
        assert layer.sparse and 0.75 < layer.ratio < 0.8 and not layer.plain
        family = model.mlp.family
        assert all(type(getattr(model.mlp, part)) is CompressedLinear for part in family.projections)
        assert not any(key.endswith("proj.weight") for key, _ in model.named_parameters())
        calls.clear()
        assert torch.equal(_bits(model(x)), _bits(plain[0])) and calls == ["sparse_ffn"]
        assert torch.equal(_bits(model(more)), _bits(plain[1])) and calls == ["sparse_ffn"]
        _same_state(model.state_dict(), {key: value.cpu() for key, value in state.items()})
        shares = _share(model, x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(_bits(other(x)), _bits(plain[0])) and torch.equal(_bits(other(more)), _bits(plain[1]))
        model.load_state_dict({key: 2 * value for key, value in state.items()})
        _same_state(model.state_dict(), {key: 2 * value.cpu() for key, value in state.items()})
        assert not torch.equal(_bits(model(x)), _bits(plain[0]))
        model.load_state_dict(state)
        assert torch.equal(_bits(model(x)), _bits(plain[0]))
        unpatch_model(model)
        assert model.mlp is original and all(type(getattr(original, part)) is nn.Linear for part in family.projections)
        assert _share(model, x) == pytest.approx(shares, abs=2 / WIDE["intermediate_size"])  # a gate may round to zero
        assert torch.equal(_bits(model(x)), _bits(before[0])) and torch.equal(_bits(model(more)), _bits(before[1]))
    _same_state(model.state_dict(), state)
    assert all(p.is_contiguous() and p.requires_grad for p in model.parameters())


def _share(model, x) -> float:
    with SparsityMeter(model) as meter:
        model(x)
    return meter.report().layers[0].active


@pytest.mark.parametrize("device", DEVICES)
def test_what_does_not_pay_stays_plain(device):
    for name, sizes, plain in (
        ("Persimmon", {"hidden_size": 64, "intermediate_size": 256}, "dense_4h_to_h: d_model 64 is too narrow"),
        ("Phi3", {"hidden_size": 64, "intermediate_size": 256}, "down_proj: d_model 64 is too narrow"),
        # Rows of 331 chunks, so that of an odd number of them not every one starts at 16 bytes.
        (
            "Phi3",
            {"hidden_size": 2648, "intermediate_size": 255},
            "gate_up_proj: compressed, its lower half does not start at a multiple of 16 bytes",
        ),
        ("OPT", {"hidden_size": 64, "intermediate_size": 256}, "inside a layer"),
    ):
        model = _around(name, device, **sizes)
        x = _tokens(model, 1)
        with torch.inference_mode():
            patch_model(model)
            wanted = model(x)
            unpatch_model(model)
            (layer,) = patch_model(model, compress=True).layers
            assert layer.sparse and layer.plain == plain
            assert torch.equal(_bits(model(x)), _bits(wanted))


@pytest.mark.parametrize(
    "name",
    ["BitNet", "Llama, relu2", "Llama, biases", "Nemotron", "Arcee", "Jais2", "Persimmon", "Falcon", "Phi3", "GLM4"],
)
def test_compressed_checkpoints_decode_sparsely(name, tmp_path, calls):
    """Those of every family that the names of weights tell."""
    model = _model(name, dtype=torch.bfloat16)
    state = _state(model)
    model.save_pretrained(tmp_path / "plain")
    done = CliRunner().invoke(cli.main, ["compress", str(tmp_path / "plain"), str(tmp_path / "packed")])
    assert done.exit_code == 0, done.output
    loaded = load_compressed(tmp_path / "packed", "cpu")
    assert all(mlp.formula == CASES[name].formula for mlp in _ffns(loaded))
    patch_model(model)
    calls.clear()
    found = _singles(loaded)
    assert calls == _operators(name) * LENGTH and torch.equal(_bits(found), _bits(_singles(model)))
    assert torch.equal(_bits(_logits(loaded)), _bits(_logits(model)))
    unpatch_model(loaded)
    assert not _is_patched(loaded)
    _same_state(loaded.state_dict(), state)


@pytest.mark.parametrize("name", ["Nemotron, biases", "Phi3", "OPT"])
def test_other_dtypes_do_not_compress(name):
    model = _around(name, dtype=torch.float16, hidden_size=64, intermediate_size=160)
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"mlp: compress=True needs bfloat16 weights, got torch.float16.*nothing was changed"):
        patch_model(model, compress=True)
    assert dict(model.named_modules()) == modules


def test_a_projection_that_rounds_before_it_adds_its_bias_is_not_compressed():
    """Falcon's: prefill would have other bits, and more of them right."""
    model = _model("Falcon", dtype=torch.bfloat16)
    wanted = _bits(_logits(model))
    report = patch_model(model, compress=True, linears=False)
    assert [x.ratio for x in report.sparse] == [1.0] * 2 and all("FalconLinear rounds before" in x.plain for x in report.sparse)
    assert torch.equal(_bits(_logits(model)), wanted)


@pytest.mark.parametrize("name", ["NanoChat", "OPT"])
def test_checkpoints_whose_weights_names_tell_no_family_are_refused(name, tmp_path):
    _model(name, dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    done = CliRunner().invoke(cli.main, ["compress", str(tmp_path / "plain"), str(tmp_path / "packed")])
    assert done.exit_code == 1 and "has no FFN that is known" in done.output and not (tmp_path / "packed").exists()


# RWKV-7's channel mix, whose class also mixes in the token before, and takes more arguments.


class RWKV7FeedForward(nn.Module):
    """As flash-linear-attention has it, in plain torch."""

    def __init__(self, activation: Callable[[Any], Any]) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.rand(64))
        self.key, self.value = nn.Linear(64, 161, bias=False), nn.Linear(161, 64, bias=False)
        self.act_fn = activation

    def forward(self, x, attention_mask=None, state=None):
        before = nn.functional.pad(x, (0, 0, 1, -1))
        return self.value(self.act_fn(self.key(torch.lerp(x, before, self.x_k)))), state


class ChannelMix(nn.Module):
    def __init__(self, activation: Callable[[Any], Any], hidden_act: str = "sqrelu") -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_act=hidden_act)
        self.ffn = RWKV7FeedForward(activation)

    def forward(self, x):
        return self.ffn(x)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("activation", "formula", "operators", "hidden_act", "note"),
    [
        (lambda x: torch.relu(x).square(), SQUARED, ["ffn_4"], "sqrelu", ""),
        (SquaredReLU(), SQUARED, ["ffn_4"], "relu2", ""),
        (nn.ReLU(), NO_GATE, ["ffn_12", "ffn_4"], "sqrelu", "the config says hidden_act='sqrelu', its code computes relu"),
    ],
)
def test_channel_mix_of_rwkv(activation, formula, operators, hidden_act, note, device, calls):
    torch.manual_seed(0)
    with torch.inference_mode():
        model = ChannelMix(activation, hidden_act).to(device).eval()
        token, text = torch.randn(1, 1, 64, device=device), torch.randn(1, 9, 64, device=device)
        before, text_before, share = model(token), model(text), measure_sparsity(model, token).sparsity
        (layer,) = patch_model(model, linears=False).layers
        assert (layer.sparse, layer.formula, layer.note) == (True, formula, note)
        calls.clear()
        assert (model(token) - before).norm() <= 1e-6 * before.norm() and calls == operators
        assert torch.equal(model(text), text_before)
        assert measure_sparsity(model, token).sparsity == share > 0.2
        unpatch_model(model)
        assert type(model.ffn.key) is type(model.ffn.value) is nn.Linear and model.ffn.act_fn is activation
        assert torch.equal(model(token), before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("d_model", "d_ff"), [(64, 192), (2560, 10240)])
def test_channel_mix_of_flash_linear_attention(d_model, d_ff, dtype):
    """The package's own class; its error to float64 is no larger behind patching, and all is undone to the bit."""
    rwkv7 = pytest.importorskip("fla.models.rwkv7.modeling_rwkv7", reason="flash-linear-attention brings RWKV-7")
    torch.manual_seed(0)
    model = ChannelMix(torch.relu)
    feed_forward = model.ffn = rwkv7.RWKV7FeedForward(d_model, intermediate_size=d_ff, layer_idx=0, num_hidden_layers=2)
    with torch.inference_mode():
        for linear in (feed_forward.key, feed_forward.value):
            linear.weight.normal_(0, linear.in_features**-0.5)
        feed_forward.x_k.uniform_()
        model = model.to("cuda", dtype).eval()
        token, text = (torch.randn(1, n, d_model, device="cuda", dtype=dtype) for n in (1, 12))
        before, text_before, share = model(token), model(text), measure_sparsity(model, token).sparsity
        mixed = (token.double() * (1 - feed_forward.x_k.double())).to(dtype).double()
        key = (mixed @ feed_forward.key.weight.double().t()).to(dtype).double()
        exact = key.clamp(min=0).square().to(dtype).double() @ feed_forward.value.weight.double().t()
        (layer,) = patch_model(model, linears=False).layers
        assert layer.sparse and layer.formula == SQUARED, layer.reason
        after = model(token)
        own, error = ((y.double() - exact).norm() for y in (before, after))
        assert error <= 2 * own + torch.finfo(dtype).eps * exact.norm()
        torch.testing.assert_close(model(text), text_before)  # as dense, of weights that lie differently
        assert measure_sparsity(model, token).sparsity == share > 0.2
        unpatch_model(model)
        assert torch.equal(model(token), before) and type(feed_forward.key) is nn.Linear


def test_channel_mix_of_another_power_stays_dense():
    model = ChannelMix(lambda x: torch.relu(x) ** 3)
    (layer,) = patch_model(model, linears=False).layers
    assert not layer.sparse and "differs from that of relu2" in layer.reason and type(model.ffn.key) is nn.Linear
    with pytest.raises(ValueError, match="hidden_act='silu'"):
        patch_model(ChannelMix(nn.SiLU(), "silu"), linears=False)


def test_only_a_relus_threshold_moves_inside_a_layer():
    model = ChannelMix(SquaredReLU(), "relu2")
    (layer,) = patch_model(model, 0.1, linears=False).layers
    assert not layer.sparse and "only the threshold of a ReLU can be moved" in layer.reason


# What stays dense, and mixtures of experts.


@pytest.mark.parametrize("name", ["Nemotron", "NanoChat", "Persimmon", "BitNet", "Phi3", "OPT"])
@pytest.mark.parametrize("activation", [nn.SiLU, nn.GELU, lambda: nn.LeakyReLU(0.01), nn.ReLU6, Negated, nn.Identity])
def test_code_of_no_known_formula_stays_dense(name, activation):
    """Its config says otherwise."""
    model = _around(name, dtype=torch.float32, hidden_size=64, intermediate_size=160)
    ((_, _, family),) = mlps(model)
    setattr(model.mlp, family.activation, activation())
    modules, x = dict(model.named_modules()), _tokens(model, 1)
    with torch.no_grad():
        before = model(x)
        (layer,) = patch_model(model, linears=False).layers
        assert not layer.sparse and not layer.note and "its output differs from that of relu" in layer.reason
        assert dict(model.named_modules()) == modules and torch.equal(model(x), before)
    assert all(p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize("name", FFNS)
def test_an_mlp_by_itself_is_no_model(name):
    mlp = _around(name, dtype=torch.float32, hidden_size=64, intermediate_size=160).mlp
    with pytest.raises(ValueError, match=r"this is an MLP, not a model with some: put it in a torch\.nn\.Sequential"):
        patch_model(mlp)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("name", ["Nemotron", "Persimmon", "Phi3", "OPT", "NemotronH"])
def test_a_config_without_zeros_is_refused_by_its_key(name, activation):
    key = {"OPT": "activation_function", "NemotronH": "mlp_hidden_act"}.get(name, "hidden_act")
    model = _model(name, **{key: activation})
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=rf"the config says {key}='{activation}': it leaves no zeros.*nothing was changed"):
        patch_model(model, linears=False)
    assert dict(model.named_modules()) == modules
    report = patch_model(model)
    assert not report.sparse and all(x.reason for x in report.layers) and report.decoding
    unpatch_model(model)
    assert dict(model.named_modules()) == modules


class Centred(nn.Module):
    """Not an RMS norm, though it looks like one."""

    variance_epsilon = 1e-6

    def __init__(self, weight) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return self.weight * nn.functional.layer_norm(x, x.shape[-1:], eps=self.variance_epsilon)


def _spoil(mlp, how: str) -> None:
    if how == "a bias on a fused matrix":
        mlp.gate_up_proj = nn.Linear(64, 320)
    elif how == "an odd number of rows":
        mlp.gate_up_proj = nn.Linear(64, 321, bias=False)
    elif how == "a norm of layers":
        mlp.ffn_sub_norm = nn.LayerNorm(160)
    elif how == "a norm that nobody knows":
        mlp.ffn_sub_norm = Centred(torch.ones(160))
    elif how == "a norm without a weight":
        mlp.ffn_sub_norm = nn.RMSNorm(160, elementwise_affine=False)
    elif how == "a norm of another dtype":
        mlp.ffn_sub_norm.half()
    elif how == "a hook on the up-projection":
        mlp.fc1.register_forward_hook(lambda *_: None)
    elif how == "a subclass":
        mlp.dense_h_to_4h.__class__ = type("OtherLinear", (nn.Linear,), {})
    elif how == "dropout":
        mlp.dropout = nn.Dropout(0.1)


@pytest.mark.parametrize(
    ("name", "how", "reason"),
    [
        ("Phi3", "a bias on a fused matrix", "gate_up_proj has a bias"),
        ("Phi3", "an odd number of rows", "do not fit each other"),
        ("BitNet", "a norm of layers", "does not run on 256 neurons"),
        ("BitNet", "a norm that nobody knows", "differs from that of relu2, norm by"),
        ("BitNet", "a norm without a weight", "ffn_sub_norm has no weight"),
        ("BitNet", "a norm of another dtype", "different devices or dtypes"),
        ("OPT", "a hook on the up-projection", "has hooks"),
        ("Persimmon", "a subclass", "OtherLinear, not a torch.nn.Linear itself"),
        ("Nemotron", "dropout", "has dropout"),
    ],
)
def test_what_cannot_be_patched_is_said(name, how, reason):
    model = _around(name, dtype=torch.float32, hidden_size=64, intermediate_size=160)
    _spoil(model.mlp, how)
    modules = dict(model.named_modules())
    (layer,) = patch_model(model, linears=False).layers
    assert not layer.sparse and reason in layer.reason
    assert dict(model.named_modules()) == modules and all(p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_mixtures_of_experts_stay_but_for_their_shared_expert(device):
    model = _model("NemotronH", device, num_experts_per_tok=2)
    block = model.model.layers[2].mixer
    kinds = [(name, type(module)) for name, module in block.named_modules() if not name.startswith("shared_experts")]
    experts, text = block.experts, _text(model)
    report = patch_model(model)
    assert [(x.name, x.sparse, x.reason) for x in report.layers] == [
        ("model.layers.2.mixer", False, "a mixture of experts"),
        ("model.layers.1.mixer", True, ""),
        ("model.layers.2.mixer.shared_experts", True, ""),
    ]
    assert str(report).startswith("2 of 3 MLPs decode sparsely") and "dense: a mixture of experts" in str(report)
    assert model.model.layers[2].mixer is block and block.experts is experts
    assert kinds == [(name, type(module)) for name, module in block.named_modules() if not name.startswith("shared_experts")]
    assert type(block.shared_experts) is SparseMLP and block.shared_experts.d_ff == 97
    assert torch.equal(_text(model), text)


class Mixture(nn.Module):
    """Experts as modules of a family of their own, of which every second one is asked."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.NemotronConfig(hidden_size=64, intermediate_size=160)
        self.experts = nn.ModuleList(NemotronMLP(config) for _ in range(4))
        self.shared_expert = NemotronMLP(config)

    def forward(self, x):
        return self.shared_expert(x) + sum(expert(x) for expert in self.experts[::2])


def test_experts_that_are_modules_stay_too():
    model = Around(_randomise(Mixture()), hidden_act="relu2")
    experts = list(model.mlp.experts)
    report = patch_model(model)
    assert [(x.name, x.sparse) for x in report.layers] == [("mlp", False), ("mlp.shared_expert", True)]
    assert list(model.mlp.experts) == experts and all(type(expert) is NemotronMLP for expert in experts)


# Families of others.


class Theirs(nn.Module):
    """Ten lines with names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in = nn.Linear(64, 161)
        self.squash = nn.ReLU()
        self.w_out = nn.Linear(161, 64)

    def forward(self, hidden):
        return self.w_out(self.squash(self.w_in(hidden)) ** 2)


THEIRS = MLPFamily("theirs", up="w_in", down="w_out", activation="squash", classes=("Theirs",), config_keys=("nonlinearity",))


@pytest.mark.parametrize("device", DEVICES)
def test_a_family_of_others(families, device, calls):
    model = Around(_randomise(Theirs()), device, nonlinearity="relu2")
    x, modules, state = _tokens_of(device), dict(model.named_modules()), _state(model)
    with pytest.raises(ValueError, match="Around has no module with gate_proj, up_proj, down_proj or another family's"):
        patch_model(model)
    with pytest.raises(ValueError, match="no MLP of a family that is known"):
        SparsityMeter(model)
    register_family(THEIRS)
    with torch.inference_mode():
        dense = model(x)
        share = _share(model, x)
        (layer,) = patch_model(model).layers
        assert layer.sparse and layer.formula == SQUARED and not layer.note
        calls.clear()
        torch.testing.assert_close(model(x), dense, atol=1e-4, rtol=1e-4)
        assert calls == ["sparse_ffn"] and _share(model, x) == share
        other = pickle.loads(pickle.dumps(model))
        assert torch.equal(other(x), model(x)) and other.mlp.family == THEIRS
    _same_state(model.state_dict(), state)
    unpatch_model(model)
    _check_put_back(model, modules, state)
    model.config.nonlinearity = "relu"
    (layer,) = patch_model(model).layers
    assert layer.note == "the config says nonlinearity='relu', its code computes relu2"


def _tokens_of(device: str):
    return torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(4)).to(device)


def test_a_registered_family_is_asked_first_and_replaces_its_namesake(families):
    known = list(FAMILIES)
    register_family(THEIRS)
    assert list(FAMILIES) == [THEIRS, *known]
    register_family(replace(THEIRS, classes=("Others",)))
    assert len(FAMILIES) == len(known) + 1 and FAMILIES[0].classes == ("Others",)
    register_family(replace(known[1], models="mine"))
    assert len(FAMILIES) == len(known) + 1 and FAMILIES[0].models == "mine" and known[1] not in FAMILIES
    model = _model("Llama, biases")
    assert all(type(mlp) is LlamaMLP for mlp in _ffns(model))
    before = _text(model)
    assert len(patch_model(model).sparse) == 2 and torch.equal(_text(model), before)
    assert not any(type(mlp) is SparseGatedMLP for mlp in _ffns(model))  # whose family is the built-in one


def test_what_a_family_says_of_its_parts_is_tried(families):
    """Names that are wrong are no harm."""
    for family in (
        replace(THEIRS, up="w_out", down="w_in"),
        replace(THEIRS, gate="w_in", up="nothing"),
        replace(THEIRS, norm="nothing"),
        replace(THEIRS, up="nothing"),
    ):
        register_family(family)
        model = Around(_randomise(Theirs()), nonlinearity="relu2")
        modules = dict(model.named_modules())
        try:
            assert not patch_model(model).sparse
        except ValueError as error:
            assert "nothing to patch" in str(error)
        assert dict(model.named_modules()) == modules and all(p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize("family", ["Nemotron", MLPFamily])
def test_only_families_are_registered(family, families):
    known = list(FAMILIES)
    with pytest.raises(TypeError, match=r"register_family: expected an MLPFamily, got (str|type)"):
        register_family(family)
    assert list(FAMILIES) == known


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"gate": "gate_proj", "fused": "gate_up_proj"}, ValueError, "mine: gate and fused exclude each other"),
        ({"gate": "gate_proj", "is_inside": True}, ValueError, "mine: inside a layer only blocks without gate"),
        ({"fused": "gate_up_proj", "is_inside": True}, ValueError, "mine: inside a layer only blocks without gate"),
        ({"norm": "norm", "is_inside": True}, ValueError, "mine: inside a layer only blocks without gate"),
        ({"up": "w", "down": "w"}, ValueError, "mine: its parts must have different names, got w, w"),
        ({"activation": "down_proj"}, ValueError, "mine: its parts must have different names"),
        ({"up": "a.b"}, ValueError, "mine: parts must be names of attributes, got 'a.b'"),
        ({"down": ""}, ValueError, "mine: parts must be names of attributes, got ''"),
        ({"activation": None}, ValueError, "mine: parts must be names of attributes, got None"),
        ({"up": None}, ValueError, "mine: parts must be names of attributes, got None"),
        ({"name": ""}, ValueError, "name must be a str that reports call it by, got ''"),
        ({"name": 3}, ValueError, "name must be a str that reports call it by, got 3"),
        ({"config_keys": ()}, ValueError, "mine: config_keys must name what configs call the activation, got none"),
        ({"classes": "MyMLP"}, TypeError, r"classes must be a tuple of names, of type str, got 'MyMLP': write \('MyMLP',\)"),
        ({"classes": (Theirs,)}, TypeError, r"classes must be a tuple of names, of type str, got .*: write \(name,\)"),
        ({"config_keys": ["hidden_act"]}, TypeError, "config_keys must be a tuple of names"),
        ({"linears": (nn.Linear,)}, TypeError, "linears must be a tuple of names"),
    ],
)
def test_families_whose_parts_do_not_go_together_are_refused(parts, error, message):
    with pytest.raises(error, match=message):
        MLPFamily(**{"name": "mine", **parts})


# What a trial must find, and what a patched module must still do.


class Gated(nn.Module):
    """A LLaMA-like MLP whose code is what a test says."""

    def __init__(self, compute: Callable[..., Any], d_model: int = 64, d_ff: int = 160) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(d_model, d_ff, bias=False) for _ in range(2))
        self.down_proj, self.compute = nn.Linear(d_ff, d_model, bias=False), compute

    def forward(self, hidden_states, residual=None):
        x1 = self.compute(self, self.gate_proj(hidden_states), self.up_proj(hidden_states))
        y = self.down_proj(x1)
        return y if residual is None else y + residual


class OneMLP(nn.Module):
    def __init__(self, mlp: nn.Module, hidden_act: str = "relu") -> None:
        super().__init__()
        self.config, self.mlp = SimpleNamespace(hidden_act=hidden_act), mlp

    def forward(self, x):
        return self.mlp(hidden_states=x)


def _one(compute: Callable[..., Any], **sizes: int) -> OneMLP:
    torch.manual_seed(0)
    return OneMLP(_randomise(Gated(compute, **sizes))).eval().requires_grad_(False)


@pytest.mark.parametrize("threshold", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("d_model", [64, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_threshold_on_the_other_projection_is_found(threshold, d_model, dtype):
    """dReLU whose up-projection has a threshold, which random weights hide in bfloat16 where they make it rarely matter."""
    model = _one(lambda _, g, u: torch.relu(g) * torch.where(u >= threshold, u, 0), d_model=d_model).to(dtype)
    (layer,) = patch_model(model, linears=False).layers
    assert not layer.sparse and "is zero where that of relu is not, with gates of size 0.0001" in layer.reason


def test_parameters_that_no_family_names_keep_a_layer_dense():
    """They would be lost, though they change nothing today."""
    model = _one(lambda mlp, g, u: torch.relu(g) * u * mlp.scale)
    model.mlp.scale = nn.Parameter(torch.ones(1))
    (layer,) = patch_model(model, linears=False).layers
    assert not layer.sparse and layer.reason == "it has parameters of its own: scale" and "mlp.scale" in model.state_dict()


def test_dropout_by_a_function_keeps_a_layer_dense():
    model = _one(lambda mlp, g, u: nn.functional.dropout(torch.relu(g) * u, 0.5, mlp.training))
    (layer,) = patch_model(model, linears=False).layers
    assert not layer.sparse and "differs from that of relu" in layer.reason and not model.mlp.training


def test_what_is_done_to_one_token_alone_is_found():
    model = _one(lambda _, g, u: torch.relu(g) * u * (2 if g.shape[:-1].numel() == 1 else 1))
    (layer,) = patch_model(model, linears=False).layers
    assert not layer.sparse and "differs from that of relu" in layer.reason and type(model.mlp) is Gated


@pytest.mark.parametrize("most", [8, 100])
def test_code_that_treats_a_prompt_otherwise_is_found(most):
    """The sparse module would compute prompts too, by its formula."""
    model = _one(lambda _, g, u: (torch.relu(g) if g.shape[1] <= most else nn.functional.silu(g)) * u)
    (layer,) = patch_model(model, linears=False).layers
    assert not layer.sparse and "its output of 136 tokens at once differs from that of relu by" in layer.reason
    assert type(model.mlp) is Gated


@pytest.mark.parametrize("hidden_act", ["relu", "silu"])
@pytest.mark.parametrize("squares", [False, True])
def test_a_threshold_that_no_config_names_is_told_by_hand(hidden_act, squares):
    activation = SquaredReLU(0.25) if squares else FATReLU(0.25)
    model = _one(lambda _, g, u: activation(g) * u)
    model.config.hidden_act = hidden_act
    x = torch.randn(1, 12, 64)
    wanted, one = model(x), model(x[:, :1])
    for other in (0.2, 0.3):
        if hidden_act == "relu":
            assert "that of relu" in patch_model(model, other, linears=False).layers[0].reason
        else:
            with pytest.raises(ValueError, match="says hidden_act='silu': it leaves no zeros"):
                patch_model(model, other, linears=False)
        assert type(model.mlp) is Gated
    (layer,) = patch_model(model, 0.25, linears=False).layers
    assert layer.sparse and layer.formula == Formula(0.25, "relu2" if squares else "relu")
    name = "fatrelu2" if squares else "fatrelu"
    assert layer.note == f"the config says hidden_act='{hidden_act}', its code computes {name}(0.25)"
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(x[:, :1]), one, rtol=1e-5, atol=1e-6)


FATTENED = {
    "OPT": ("OPTConfig", {**OPT, "activation_function": "fatrelu"}, "activation_function_param"),
    "Persimmon": ("PersimmonConfig", {**SIZES, "hidden_act": "fatrelu"}, "hidden_act_param"),
    "Falcon": ("FalconConfig", {**WIDTHS, "ffn_hidden_size": 161, "activation": "fatrelu"}, "activation_param"),
    "Llama": ("LlamaConfig", {**GROUPED, "hidden_act": "fatrelu"}, "hidden_act_param"),
}


@pytest.mark.parametrize("name", FATTENED)
def test_fatrelu_of_any_family_has_its_configs_threshold(name):
    """Also where its module keeps no config; without one in the config it is told by hand."""
    register_fatrelu()
    config, sizes, key = FATTENED[name]

    def made(**said):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes, **said)).eval()

    told, untold, x = made(**{key: 0.07}), made(), torch.arange(12)[None]
    with torch.inference_mode():
        wanted, one = told(x).logits, told(x[:, :1]).logits
        with pytest.raises(ValueError, match=f"the config has no {key}, its threshold"):
            patch_model(untold)
        for model, threshold in ((told, None), (untold, 0.07)):
            layers = patch_model(model, threshold).layers
            assert all(layer.sparse and layer.threshold == 0.07 for layer in layers)
            torch.testing.assert_close(model(x).logits, wanted)
            torch.testing.assert_close(model(x[:, :1]).logits, one)
            unpatch_model(model)
        assert torch.equal(told(x).logits, wanted)


def test_code_around_an_mlp_finds_what_it_has():
    """Sizes, a config, a number of its own; and after `unpatch_model` the module itself."""
    model = _one(lambda _, g, u: torch.relu(g) * u)
    mlp = model.mlp
    mlp.scale, mlp.config, mlp.hidden_size = 0.5, model.config, 64
    patch_model(model, linears=False)
    again = copy.deepcopy(model)
    for patched in (model, again):
        assert isinstance(patched.mlp, SparseMLP) and (patched.mlp.scale, patched.mlp.hidden_size) == (0.5, 64)
    assert model.mlp.config is model.config
    unpatch_model(model)
    assert model.mlp is mlp


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ("a text", TypeError, "must be a torch.Tensor of token numbers, got str: call a tokenizer on it"),
        ([[1, 2]], TypeError, "must be a torch.Tensor of token numbers, got list"),
        (torch.arange(5), ValueError, r"must have the shape \(texts, tokens\), got \(5,\): .*\[None\] has it"),
        (torch.ones(1, 5), TypeError, "must be token numbers, of an integer dtype, got torch.float32"),
        (torch.ones(1, 0, dtype=torch.int64), ValueError, r"must have tokens, got the shape \(1, 0\)"),
    ],
)
def test_what_is_no_text_is_refused(given, error, said):
    model = _model("Nemotron")
    modules = dict(model.named_modules())
    with pytest.raises(error, match=f"patch_model: example {said}"):
        patch_model(model, example=given)
    with pytest.raises(error, match=f"measure_sparsity: input_ids {said}"):
        measure_sparsity(model, given)
    assert dict(model.named_modules()) == modules


def test_what_a_family_without_a_named_activation_computes_is_said(families):
    """Here gate and up-projection are exchanged."""
    register_family(MLPFamily("theirs", gate="up_proj", up="gate_proj", activation="none", classes=("Gated",)))
    model = nn.Sequential(_one(lambda _, g, u: torch.relu(g) * u).mlp)
    with pytest.raises(ValueError, match=r"its code computes none of relu, relu2, drelu: its output differs from that of relu"):
        patch_model(model, linears=False)


def test_neurons_that_a_norm_hides_are_active():
    """A norm's weight of zero makes another zero than the activation's."""
    model = _model("BitNet")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.ffn_sub_norm.weight[:80] = 0
    for ids in (torch.arange(5)[None], torch.arange(12)[None]):
        dense = measure_sparsity(model, ids)
        patch_model(model)
        sparse = measure_sparsity(model, ids)
        unpatch_model(model)
        assert [x.active for x in sparse.layers] == pytest.approx([x.active for x in dense.layers], abs=0.005)


class ParallelExperts(nn.Module):
    """As JetMoE calls what holds the weights of all experts."""

    def forward(self, x):
        return x


def test_experts_are_known_by_their_class_too():
    model = _one(lambda _, g, u: torch.relu(g) * u)
    model.moe = nn.Module()
    model.moe.input_linear, model.moe.output_linear = ParallelExperts(), ParallelExperts()
    report = patch_model(model, linears=False)
    assert [(x.name, x.sparse, x.reason) for x in report.layers] == [("moe", False, "a mixture of experts"), ("mlp", True, "")]


MIXES = {
    "the token before": lambda g: g + torch.nn.functional.pad(g, (0, 0, 1, 0))[..., :-1, :],
    "all tokens of a text": lambda g: g * (1 + g.mean(1, keepdim=True)),
    "all texts": lambda g: g * (1 + g.mean(0, keepdim=True)) if len(g) > 1 else g,
    "eight tokens": lambda g: g.flip(1) if g.shape[1] == 8 else g,
    "eight texts": lambda g: g.flip(0) if len(g) == 8 else g,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mixed", MIXES)
def test_code_that_mixes_tokens_is_found(mixed, dtype):
    model = _one(lambda _, g, u: torch.relu(MIXES[mixed](g)) * u).to(dtype)
    (layer,) = patch_model(model, linears=False).layers
    assert not layer.sparse and "differs from that of relu" in layer.reason and type(model.mlp) is Gated


@pytest.mark.parametrize("how", ["mixes", "is another"])
def test_an_operator_that_fails_for_several_tokens_keeps_a_layer_dense(how, monkeypatch):
    real = SparseMLP._sparse

    def spoiled(self, tokens):
        y = real(self, tokens)
        return y if tokens.dim() == 1 else y.flip(0) if how == "mixes" else 1.5 * y

    monkeypatch.setattr(SparseMLP, "_sparse", spoiled)
    (layer,) = patch_model(_one(lambda _, g, u: torch.relu(g) * u), linears=False).layers
    assert not layer.sparse and "its sparse output of 8 tokens at once differs from that of relu" in layer.reason


def test_calls_by_keyword_and_with_other_arguments():
    model = _one(lambda _, g, u: torch.relu(g) * u)
    x, residual = torch.randn(2, 1, 1, 64)
    wanted, with_residual = model(x), model.mlp(x, residual)
    (layer,) = patch_model(model, linears=False, example=x).layers
    assert layer.sparse and isinstance(model.mlp, SparseMLP)
    for found, exact in (
        (model(x), wanted),
        (model.mlp(x, residual), with_residual),
        (model.mlp(x, residual=residual), with_residual),
    ):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        model.mlp.down_proj.weight.zero_()
    assert torch.equal(model.mlp(x, residual), residual), "the parts of now"
    with pytest.raises(TypeError, match="SparseGatedMLP takes one tensor, got 2 arguments"):
        SparseGatedMLP(64, 160)(x, residual)


@pytest.mark.parametrize("shape", [(1,), "strided"])
def test_biases_that_are_broadcast_or_strided_keep_a_layer_dense(shape):
    model = _one(lambda _, g, u: torch.relu(g) * u)
    bias = torch.randn(320)[::2] if shape == "strided" else torch.randn(shape)
    model.mlp.up_proj.bias = nn.Parameter(bias)
    (layer,) = patch_model(model, linears=False).layers
    assert not layer.sparse and "no contiguous vector" in layer.reason


def test_torchs_own_norm_is_taken():
    torch.manual_seed(0)

    class Normed(Gated):
        def __init__(self, eps):
            super().__init__(lambda mlp, g, u: mlp.ffn_sub_norm(torch.relu(g).square() * u))
            self.ffn_sub_norm = nn.RMSNorm(160, eps)

    for eps, dtypes in ((None, [torch.float32]), (1e-5, [torch.float32, torch.bfloat16])):
        for dtype in dtypes:
            model = OneMLP(_randomise(Normed(eps)), "relu2").eval().to(dtype).requires_grad_(False)
            x = torch.randn(1, 1, 64, dtype=dtype)
            wanted = copy.deepcopy(model).double()(x.double()) if eps else model(x)
            (layer,) = patch_model(model, linears=False).layers
            assert layer.sparse, layer.reason
            assert (model(x).double() - wanted).norm() <= (0.02 if dtype == torch.bfloat16 else 1e-5) * wanted.norm()


def test_the_activation_says_what_it_is():
    """FATReLU and SquaredReLU with a threshold, behind a config that says something else."""
    for activation, formula in ((FATReLU(0.5), Formula(0.5)), (SquaredReLU(0.25), Formula(0.25, "relu2"))):
        model = _one(lambda mlp, g, u: mlp.act_fn(g) * u)
        model.mlp.act_fn, model.config.hidden_act = activation, "silu"
        x = torch.randn(1, 1, 64)
        wanted = model(x)
        (layer,) = patch_model(model, linears=False).layers
        assert layer.sparse and layer.formula == formula and "says hidden_act='silu'" in layer.note
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-6)


def test_the_same_mlp_in_two_places_stays_dense():
    model = _one(lambda _, g, u: torch.relu(g) * u)
    model.again = model.mlp
    (layer,) = patch_model(model, linears=False).layers
    assert layer.reason == "the same module in two places" and model.again is model.mlp and type(model.mlp) is Gated


def test_the_share_of_weights_read_counts_layers_by_their_size():
    report = SparsityReport((LayerSparsity("a", 0.5, 1.0, True, 100), LayerSparsity("b", 0.1, 1.0, False, 300)))
    assert report.weights_read == pytest.approx((100 * 2 + 300 * 1.1) / (100 * 3 + 300 * 2))


def test_layers_that_saw_no_token_do_not_count():
    """As those of a vision tower where a text was read."""
    seen, unseen = LayerSparsity("a", 0.25, 1.0, True, 100), LayerSparsity("b", float("nan"), 0.0, True, 100)
    report = SparsityReport((seen, unseen))
    assert (report.sparsity, report.weights_read) == (0.75, 0.5) and "average sparsity 75.00%" in str(report)
    nothing = SparsityReport((unseen,))
    assert math.isnan(nothing.sparsity) and math.isnan(nothing.weights_read) and "nan" in str(nothing)


# As large as published models have them.

PUBLISHED = {
    "Minitron-4B": ("Nemotron", 3072, 9216),
    "AFM-4.5B": ("Arcee", 2560, 18432),
    "Nemotron-H-8B": ("NemotronH", 4096, 21504),
    "BitNet b1.58 2B4T": ("BitNet", 2560, 6912),
    "TurboSparse-Mistral": ("dReLU", 4096, 14336),
    "OPT-6.7B": ("OPT", 4096, 16384),
    "Persimmon-8B": ("Persimmon", 4096, 16384),
    "GLM-4-9B, were it ReLU": ("GLM4", 4096, 13696),
}
SPARSITY = 0.9


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model_name", PUBLISHED)
def test_published_sizes_in_bfloat16(model_name, device, calls):
    """One module at 90 % sparsity, plain and compressed, by the contract; a sixteenth as wide and high on the CPU."""
    name, d_model, d_ff = PUBLISHED[model_name]
    if device == "cpu":
        d_model, d_ff = d_model // 16, d_ff // 16
    with torch.device(device):
        mlp = MLPS[name](hidden_size=d_model, intermediate_size=d_ff, num_attention_heads=d_model // 128)
    model = Around(mlp, device, torch.bfloat16)
    if name == "OPT":
        model.config = SimpleNamespace(activation_function="relu")
    elif name == "Persimmon":
        model.config = SimpleNamespace(hidden_act="relu2")
    generator = torch.Generator(device).manual_seed(0)
    ((_, mlp, family),) = mlps(model)
    with torch.no_grad():
        for part in family.projections:
            weight = getattr(mlp, part).weight
            weight.copy_(torch.randn(weight.shape, device=device, generator=generator) / weight.shape[1] ** 0.5)
            if getattr(mlp, part).bias is not None:
                getattr(mlp, part).bias.normal_(0, 0.1, generator=generator)
        x = torch.randn(1, d_model, device=device, generator=generator).to(torch.bfloat16)
        _steer(getattr(mlp, family.fused or family.gate or family.up), x[0], d_ff, generator)
        batch = torch.cat([x, *(torch.randn(2, d_model, device=device, generator=generator).to(torch.bfloat16),)])
        exact_model = copy.deepcopy(model).double()
        exact, exact_batch = exact_model(x.double()), exact_model(batch.double())
        del exact_model
        dense, dense_batch, share = model(x), model(batch), _share(model, x)
        assert share == pytest.approx((1 - SPARSITY) * (0.5 if name == "dReLU" else 1), abs=0.02)
        for compress in (False, True):
            (layer,) = patch_model(model, compress=compress).layers
            assert layer.sparse, layer.reason
            calls.clear()
            _check_within_contract(model(x), dense, exact)
            assert calls == (["ffn_12", "ffn_4"] if name == "OPT" else ["sparse_ffn"])
            _check_within_contract(model(batch), dense_batch, exact_batch)
            assert _share(model, x) == pytest.approx(share, abs=2e-3)
            if compress and device == "cuda":
                wide = not is_too_narrow(d_model, d_ff)
                said = "inside a layer" if name == "OPT" else "" if wide else f"down_proj: d_model {d_model} is too narrow"
                assert layer.plain == said
                assert layer.ratio == 1 if name == "OPT" else 0.75 < layer.ratio < (0.8 if wide else 0.9)
            unpatch_model(model)
            assert torch.equal(_bits(model(x)), _bits(dense)) and torch.equal(_bits(model(batch)), _bits(dense_batch))


def _steer(reader, x, d_ff: int, generator) -> None:
    """Move the first `d_ff` rows of a projection along `x`, so that it activates a share of 1 - SPARSITY of the neurons."""
    size = torch.randn(d_ff, device=x.device, generator=generator).abs() / 2 + 0.1
    on = torch.randperm(d_ff, device=x.device, generator=generator) < round(d_ff * (1 - SPARSITY))
    wide, rows = x.float(), reader.weight[:d_ff].float()
    wanted = torch.where(on, size, -size) - (0 if reader.bias is None else reader.bias[:d_ff].float())
    reader.weight[:d_ff] = (rows + (wanted - rows @ wide)[:, None] * wide / wide.square().sum()).to(reader.weight.dtype)
