"""`batch_invariant` through torch: the operators, modules and whole models."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
transformers = pytest.importorskip("transformers", reason='the extra "hf" brings it')
from torch.library import opcheck  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch_devices import DEVICES  # noqa: E402

from prosparse_cupy.torch import (  # noqa: E402
    DecodingLinear,
    SparseGatedMLP,
    dispatch,
    generate,
    mlp,
    patch_model,
    unpatch_model,
)
from prosparse_cupy.torch.parallel import Sharding  # noqa: E402
from prosparse_cupy.torch.step import _parts  # noqa: E402

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 208,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "pad_token_id": 0,
}


class Called(TorchDispatchMode):
    """What is asked of torch.ops.prosparse, and whether in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "prosparse":
            self.calls.append((name, (kwargs or {}).get("batch_invariant", True)))
        return func(*args, **(kwargs or {}))


def _model(device: str = "cpu", dtype=torch.float32, kind: str = "Llama", **changes: Any):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, "hidden_act": "relu", **changes})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(device)


def _prompts(device: str, number: int = 7):
    return torch.randint(1, 200, (number, 7), generator=torch.Generator().manual_seed(0)).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ops(device, dtype):
    def random(*shape: int):
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)

    x, w, w_down = random(6, 128), random(320, 128), random(320, 128)
    x1 = torch.relu(random(6, 320))
    ops, out = torch.ops.prosparse, torch.empty(6, 128, device=device, dtype=dtype)
    for op, arguments in (
        (ops.ffn_1.default, (x, w)),
        (ops.ffn_4.default, (x1, w_down)),
        (ops.sparse_ffn.default, (x, w, w.clone(), w_down)),
    ):
        opcheck(op, arguments, {"batch_invariant": False})
        torch.testing.assert_close(op(*arguments, batch_invariant=False), op(*arguments), rtol=2e-2, atol=1.0)
    opcheck(ops.sparse_ffn.out, (x, w, w.clone(), w_down), {"batch_invariant": False, "out": out})
    assert "batch_invariant" not in str(ops.ffn_23.default._schema)


@pytest.mark.parametrize("kind", ["Llama", "Nemotron", "OPT"])
def test_a_patched_model_asks_for_it_everywhere(kind):
    more = {"OPT": {"ffn_dim": 320, "word_embed_proj_dim": 128}, "Nemotron": {"hidden_act": "relu2"}}.get(kind, {})
    model = _model(kind=kind, **more)
    ids = _prompts("cpu", 1)[:, :6]
    for flag in (False, True):
        patch_model(model, batch_invariant=flag)
        with torch.inference_mode(), Called() as seen:
            model(ids)
        told = {name for name, invariant in seen.calls if not invariant}
        able = {name for name, _ in seen.calls if name in ("ffn_1", "ffn_4", "sparse_ffn")}
        assert able and told == (set() if flag else able), seen.calls
        unpatch_model(model)


def test_it_stays_with_copies_shards_and_pickles():
    model = _model()
    patch_model(model, batch_invariant=False)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = [m for m in other.modules() if isinstance(m, (SparseGatedMLP, DecodingLinear))]
        assert len(found) > 4 and not any(m.batch_invariant for m in found)
    assert SparseGatedMLP.batch_invariant and DecodingLinear.batch_invariant
    old = SparseGatedMLP.from_mlp(_model().model.layers[0].mlp)
    assert old.batch_invariant and "batch_invariant" not in old.__dict__
    unpatch_model(model)


def test_parts_ask_for_it_as_the_whole_does():
    """What is left of a module: some of its neurons, a step's joined projections, this process's part of a projection."""
    model = _model()
    patch_model(model, batch_invariant=False)
    layer, x = model.model.layers[0], torch.randn(7, 128)
    assert not layer.mlp._rows(slice(0, 160), None).batch_invariant
    projections = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    whole = torch.cat([p.weight for p in projections]).detach()
    with torch.inference_mode(), Called() as seen:
        for part in _parts(whole, projections):
            part(x)
        projections[1].batch_invariant = True
        for part in _parts(whole, projections):
            part(x)
        shard = SimpleNamespace(style="colwise", whole=lambda y, _: y)
        for flag in (False, True):
            Sharding.decoded(shard, x, whole, flag)
    assert seen.calls == [("ffn_1", False), ("ffn_1", True), ("ffn_1", False), ("ffn_1", True)]
    unpatch_model(model)


@pytest.mark.gpu
def test_calls_that_pass_by_the_dispatcher_ask_for_it(monkeypatch):
    model, asked = _model("cuda", torch.bfloat16), []

    def noting(name: str, operator: Any) -> Any:
        return lambda *arrays, **how: asked.append((name, how["batch_invariant"])) or operator(*arrays, **how)

    monkeypatch.setattr(dispatch, "ffn_1", noting("ffn_1", dispatch.ffn_1))
    monkeypatch.setattr(mlp, "sparse_ffn", noting("sparse_ffn", mlp.sparse_ffn))
    for flag in (False, True):
        patch_model(model, batch_invariant=flag)
        asked.clear()
        with torch.inference_mode():
            model(_prompts("cuda", 1))
        assert {*asked} == {("ffn_1", flag), ("sparse_ffn", flag)}
        unpatch_model(model)


def test_a_switch_of_one_layer():
    """A module's own attribute, looked at in each call."""
    model = _model()
    patch_model(model, linears=False)
    model.model.layers[1].mlp.batch_invariant = False
    with torch.inference_mode(), Called() as seen:
        model(_prompts("cpu", 1)[:, :5])
    assert seen.calls == [("sparse_ffn", True), ("sparse_ffn", False)]


@pytest.mark.parametrize("device", DEVICES)
def test_generate_of_seven_texts(device):
    """The same texts in float32, where nothing goes to tensor cores; a step that is traced whole takes it too."""
    model = _model(device)
    prompts = _prompts(device)
    patch_model(model)
    expected = generate(model, prompts, max_new_tokens=8)
    unpatch_model(model)
    patch_model(model, batch_invariant=False)
    assert torch.equal(generate(model, prompts, max_new_tokens=8), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"compress": True}], ids=str)
def test_logits_of_seven_texts_on_the_gpu(options):
    """As close to float32's as those of a model that is batch-invariant; and the same again."""
    wide = _model("cuda", torch.float32)
    ids = _prompts("cuda")
    with torch.inference_mode():
        exact = wide(ids).logits[:, -1]
    errors = []
    for flag in (True, False):
        model = _model("cuda", torch.bfloat16)
        patch_model(model, batch_invariant=flag, **options)
        with torch.inference_mode():
            cache = transformers.DynamicCache(config=model.config)
            model(ids[:, :-1], past_key_values=cache)
            again = copy.deepcopy(cache)
            logits = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
            assert torch.equal(model(ids[:, -1:], past_key_values=again).logits[:, -1], logits)
        errors.append((logits.float() - exact).norm() / exact.norm())
    assert errors[1] < 1.3 * errors[0] + 1e-3, errors


@pytest.mark.gpu
def test_the_same_call_writes_the_same_again():
    model = _model("cuda", torch.bfloat16)
    patch_model(model, batch_invariant=False)
    prompts = _prompts("cuda", 8)
    first = generate(model, prompts, max_new_tokens=12)
    assert torch.equal(generate(model, prompts, max_new_tokens=12), first)
