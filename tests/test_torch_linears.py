"""DecodingLinear, and patch_model on the matrices beside the sparse FFNs: attention's, the head's, those of dense MLPs."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import numpy as np
import pytest
from checks import assert_no_worse_than_vendor

import prosparse_cupy as psc
from prosparse_cupy.crossover import most_tokens

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
transformers = pytest.importorskip("transformers", reason='the extra "hf" brings it')
from torch import nn  # noqa: E402
from torch_devices import DEVICES  # noqa: E402

from prosparse_cupy.torch import (  # noqa: E402
    CompressedLinear,
    DecodingLinear,
    SparseGatedMLP,
    generate,
    patch_model,
    unpatch_model,
)
from prosparse_cupy.torch.linears import whole_of  # noqa: E402
from prosparse_cupy.torch.ops import as_numpy  # noqa: E402

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
QKV = ("q_proj", "k_proj", "v_proj")


def _model(device: str = "cpu", dtype=torch.float32, kind: str = "Llama", **changes):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 200,
        "max_position_embeddings": 128,
        "eos_token_id": None,
        "hidden_act": "relu",
    }
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for p in model.parameters():  # some versions of torch draw zeros in 16 bits, which have no code
        if p.dim() == 2:
            p.data = (torch.randn(p.shape) / 50).to(dtype)
    return model.to(device)


class Attention(nn.Module):
    """The projections of an attention, one after the other, so that each counts."""

    def __init__(self, width: int = 64, bias: bool = False) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj, self.v_proj = (nn.Linear(width, 32, bias=bias) for _ in range(2))
        self.o_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x):
        return self.o_proj(self.q_proj(x) * torch.cat([self.k_proj(x), self.v_proj(x)], -1))


class Around(nn.Module):
    """A model with one attention and no FFN."""

    def __init__(self, device: str = "cpu", dtype=torch.float32, **more) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = Attention(**more).to(device, dtype)

    def forward(self, x):
        return self.attention(x)


def _bits(tensor):
    return tensor.detach().cpu().contiguous().view(torch.int16)


def _qkv(model, layer: int = 0):
    holder = model.attention if isinstance(model, Around) else model.model.layers[layer].self_attn
    return [getattr(holder, name) for name in QKV]


LENGTH = 9  # of a prompt: more tokens than `ffn_1` takes


def _ids(device="cpu"):
    return torch.randint(1, 200, (1, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)


def _logits(model, tokens: int = 1):
    with torch.inference_mode():
        return model(_ids(model.device)[:, :tokens], use_cache=False).logits


def _same_modules(model, before) -> bool:
    """Of a model that was put back; the projections of compressed FFNs are made anew, all else is what it was."""
    after = dict(model.named_modules())
    anew = [name for name in before if after[name] is not before[name]]
    return list(after) == list(before) and all(".mlp." in name and type(after[name]) is nn.Linear for name in anew)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small operations on threads that other tests need wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# One linear.


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_tokens_are_as_right_as_torchs_and_more_are_torchs(dtype, device):
    torch.manual_seed(0)
    plain = nn.Linear(256, 129, bias=False, device=device, dtype=dtype)
    linear = DecodingLinear.of(plain)
    assert linear.weight is plain.weight and list(linear.state_dict()) == ["weight"] and linear.bias is None
    with torch.inference_mode():
        for shape in ((256,), (1, 256), (1, 1, 256), (2, 256), (1, 3, 256), (2, 2, 256), (most_tokens("ffn_1"), 1, 256)):
            x = torch.randn(shape, device=device).to(dtype)
            found, vendor = linear(x), plain(x)
            exact = nn.functional.linear(x.double(), plain.weight.double())
            assert found.shape == vendor.shape and found.dtype == dtype and found.device == x.device
            assert_no_worse_than_vendor(*(as_numpy(t.cpu()) for t in (found, vendor)), exact.cpu().numpy())
        for shape in ((most_tokens("ffn_1") + 1, 256), (3, 5, 256), (0, 256), (2, 0, 256)):
            x = torch.randn(shape, device=device).to(dtype)
            assert torch.equal(linear(x), plain(x))
    again = linear.linear()
    assert type(again) is nn.Linear and again.weight is plain.weight


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
def test_few_tokens_go_through_ffn_1(device):
    """To the bit, so that the fast path is the one that is taken; also rows that lie apart, as the last of several texts do."""
    linear = DecodingLinear(64, 40, device=device)
    x = torch.randn(1, 1, 64, device=device)
    texts = torch.randn(4, 7, 64, device=device)[:, -1:]
    with torch.inference_mode():
        assert torch.equal(linear(x).flatten(), torch.ops.prosparse.ffn_1(x.flatten(), linear.weight))
        found = linear(texts)
        assert found.shape == (4, 1, 40)
        assert torch.equal(found[:, 0], torch.ops.prosparse.ffn_1(texts[:, 0].contiguous(), linear.weight))


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
def test_a_number_is_refused_as_torch_does(device):
    mlp = SparseGatedMLP(8, 16, device=device)
    compressed = CompressedLinear(torch.randn(8, 8, device=device).bfloat16())
    with torch.inference_mode():
        for module in (DecodingLinear(8, 4, device=device), compressed, mlp):
            with pytest.raises(RuntimeError, match="at least 1D"):
                module(torch.tensor(1.0, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_as_many_elements_in_another_shape_are_refused_as_torch_does(device):
    """Half a token twice has the elements of one."""
    linear = DecodingLinear(64, 40, device=device)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(2, 32, device=device))


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_torchs(device):
    plain = nn.Linear(64, 40, bias=False, device=device)
    linear, x = DecodingLinear.of(plain), torch.randn(1, 64, device=device)
    found = []
    for module in (plain, linear):
        own = x.clone().requires_grad_(True)
        y = module(own)
        y.square().sum().backward()
        found.append((y.detach(), own.grad, plain.weight.grad.clone()))
        plain.weight.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    plain.weight.requires_grad_(False)
    linear(x.requires_grad_(True)).sum().backward()
    assert plain.weight.grad is None and x.grad is not None
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(linear(dual)).tangent
    torch.testing.assert_close(tangent, plain.weight.sum(1)[None])


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
def test_autocast_is_torchs(device):
    plain = nn.Linear(64, 40, bias=False, device=device)
    linear, x = DecodingLinear.of(plain), torch.randn(1, 64, device=device)
    with torch.inference_mode(), torch.autocast(device, dtype=torch.bfloat16):
        found, wanted = linear(x), plain(x)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)


@pytest.mark.quick
def test_what_ffn_1_does_not_take_is_torchs():
    """A strided or misaligned token, vmap, another dtype's error, and what was made of the module since."""
    plain = nn.Linear(64, 40, bias=False)
    linear = DecodingLinear.of(plain)
    with torch.inference_mode():
        for x in (torch.randn(1, 128)[:, ::2], torch.randn(65)[1:]):
            torch.testing.assert_close(linear(x), plain(x))
        batch = torch.randn(3, 64)
        torch.testing.assert_close(torch.vmap(linear)(batch), plain(batch))
    with pytest.raises(RuntimeError, match="dtype"):
        linear(torch.randn(1, 64).half())
    linear.bias = nn.Parameter(torch.randn(40))
    x = torch.randn(1, 64)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x), plain(x) + linear.bias)
        linear.bias = None
        linear.weight = nn.Parameter(torch.randn(64, 40).t())
        torch.testing.assert_close(linear(x), x @ linear.weight.t())


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_whole(device):
    linear, x = DecodingLinear(64, 40, device=device), torch.randn(1, 64, device=device)
    compiled = torch.compile(linear, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), linear(x))


# Placement, and the state of a model.


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_q_k_and_v_lie_side_by_side(dtype, device):
    model = _model(device, dtype)
    parameters, state = dict(model.named_parameters()), {k: v.clone() for k, v in model.state_dict().items()}
    patch_model(model)
    assert all(parameters[name] is p for name, p in model.named_parameters()), "an optimizer knows them"
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[k], state[k]) for k in state)
    for layer in range(2):
        q, k, v = _qkv(model, layer)
        assert all(type(linear) is DecodingLinear for linear in (q, k, v))
        assert k.weight.data_ptr() == q.weight.data_ptr() + q.weight.nbytes
        assert v.weight.data_ptr() == k.weight.data_ptr() + k.weight.nbytes
        assert len({linear.weight.untyped_storage().data_ptr() for linear in (q, k, v)}) == 1
        assert q.weight.untyped_storage().nbytes() == sum(linear.weight.nbytes for linear in (q, k, v))
        whole = whole_of([q, k, v])
        assert torch.equal(whole, torch.cat([q.weight, k.weight, v.weight])) and whole.data_ptr() == q.weight.data_ptr()
        x = torch.randn(64, device=device).to(dtype)
        with torch.inference_mode():
            together, apart = torch.ops.prosparse.ffn_1(x, whole), [linear(x) for linear in (q, k, v)]
        assert torch.equal(together, torch.cat(apart))
        assert whole_of([k, q, v]) is None and whole_of([q, v]) is None


def test_dense_gates_lie_beside_ups():
    model = _model(hidden_act="silu")
    patch_model(model)
    mlp = model.model.layers[1].mlp
    assert torch.equal(whole_of([mlp.gate_proj, mlp.up_proj]), torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
    assert whole_of([mlp.up_proj, mlp.gate_proj]) is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compress", [False, True])
def test_unpatching_gives_back_the_modules_the_bits_and_storages_of_their_own(compress, device):
    model = _model(device, torch.bfloat16)
    before = dict(model.named_modules())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    patch_model(model, compress=compress)
    assert sum(isinstance(m, CompressedLinear if compress else DecodingLinear) for m in model.modules()) == 9 + 4 * compress
    unpatch_model(model)
    assert _same_modules(model, before) and (compress or all(m is before[name] for name, m in model.named_modules()))
    assert all(torch.equal(_bits(value), _bits(state[name])) for name, value in model.state_dict().items())
    assert all(compress or parameters[name] is p for name, p in model.named_parameters())
    for name, p in model.named_parameters():
        assert p.requires_grad and p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes, name
    after = dict(model.named_modules())
    unpatch_model(model)
    assert all(module is after[name] for name, module in model.named_modules())


@pytest.mark.parametrize("compress", [False, True])
def test_checkpoints_go_both_ways(tmp_path, compress):
    model = _model(dtype=torch.bfloat16)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    patch_model(model, compress=compress)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(_bits(value), _bits(state[name])) for name, value in loaded.state_dict().items())
    assert all(type(linear) is nn.Linear for linear in _qkv(loaded))
    assert not any(p.untyped_storage().nbytes() > 2 * p.nbytes for n, p in loaded.named_parameters() if "k_proj" in n)

    other = _model(dtype=torch.bfloat16)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    model.load_state_dict(other.state_dict())
    assert all(torch.equal(_bits(v), _bits(model.state_dict()[k])) for k, v in other.state_dict().items())
    torch.testing.assert_close(_logits(model), _logits(other), atol=2e-2, rtol=2e-2)
    if not compress:
        assert whole_of(_qkv(model)) is not None, "values are loaded in place"
    patch_model(other, compress=compress)
    assert torch.equal(_logits(model), _logits(other))


# What is left alone, and said.


class Quantised(nn.Linear):
    """As quantisation libraries have them."""


def _spoil(model, how: str) -> None:
    holder = model.attention
    k = holder.k_proj
    if how == "bias":
        holder.k_proj = nn.Linear(64, 32)
    elif how == "quantised":
        holder.k_proj = Quantised(64, 32, bias=False)
    elif how == "hook":
        k.register_forward_hook(lambda module, given, out: None)
    elif how == "pre-hook":
        k.register_forward_pre_hook(lambda module, given: None)
    elif how == "forward":
        k.forward = lambda x: 2 * nn.Linear.forward(k, x)
    elif how == "offloaded":
        k._hf_hook, k.forward = object(), functools.partial(nn.Linear.forward, k)
    elif how == "meta":
        k.to("meta")
    elif how == "float64":
        k.double()
    elif how == "strided":
        k.weight = nn.Parameter(torch.randn(64, 32).t())
    elif how == "misaligned":
        k.weight = nn.Parameter(torch.randn(32 * 64 + 1)[1:].view(32, 64))
    elif how == "empty":
        k.weight = nn.Parameter(torch.empty(0, 64))
    elif how == "twice":
        holder.v_proj = k


LEFT_ALONE = {
    "bias": "has a bias",
    "quantised": "test_torch_linears.Quantised, not a torch.nn.Linear itself",
    "hook": "has hooks",
    "pre-hook": "has hooks",
    "forward": "a forward of its own",
    "offloaded": "has hooks",
    "meta": "on the meta device: load it first",
    "float64": "torch.float64 in a Tensor",
    "strided": "strided or not aligned to 16 bytes",
    "misaligned": "strided or not aligned to 16 bytes",
    "empty": "empty: shape (0, 64)",
    "twice": "the same module in two places",
}


@pytest.mark.quick
@pytest.mark.parametrize("how", LEFT_ALONE)
def test_what_cannot_be_taken_is_left_alone_and_said(how):
    model = Around()
    _spoil(model, how)
    k = model.attention.k_proj
    weight, address = k.weight, 0 if how == "meta" else k.weight.data_ptr()
    report = patch_model(model)
    done = {m.name.rpartition(".")[2]: m for m in report.matrices}
    left = {"k_proj", "v_proj"} if how == "twice" else {"k_proj"}
    assert {name for name, m in done.items() if not m.decoding} == left
    assert LEFT_ALONE[how] in done["k_proj"].reason and LEFT_ALONE[how] in str(report).replace("\n", " ")
    assert model.attention.k_proj is k and k.weight is weight and (how == "meta" or weight.data_ptr() == address)
    assert type(model.attention.q_proj) is DecodingLinear and type(model.attention.o_proj) is DecodingLinear
    assert whole_of(_qkv(model)) is None
    assert model.attention.q_proj.weight.untyped_storage().nbytes() == model.attention.q_proj.weight.nbytes
    unpatch_model(model)
    assert model.attention.k_proj is k and type(model.attention.q_proj) is nn.Linear


@pytest.mark.quick
def test_widths_that_are_no_whole_vectors_are_left_alone():
    model = Around(width=66)
    model.attention.q_proj = nn.Linear(66, 64, bias=False)
    report = patch_model(model)
    assert not report.decoding and {m.reason for m in report.matrices} == {"66 inputs, not a multiple of 4"}


def test_biases_of_qwen_and_a_tied_head():
    model = _model(dtype=torch.bfloat16, kind="Qwen2", tie_word_embeddings=True)
    before, head = _logits(model), model.lm_head
    report = patch_model(model, compress=True)
    done = {m.name: m for m in report.matrices}
    assert [m for m in done if not done[m].decoding] == [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in QKV]
    assert {done[f"model.layers.0.self_attn.{name}"].reason for name in QKV} == {"has a bias"}
    assert type(model.model.layers[0].self_attn.o_proj) is CompressedLinear
    assert type(model.lm_head) is DecodingLinear and model.lm_head.weight is model.model.embed_tokens.weight
    assert (
        done["lm_head"].decoding and done["lm_head"].ratio == 1 and done["lm_head"].reason == "plain, shared with a Embedding"
    )
    assert "plain, shared with a Embedding" in str(report)
    torch.testing.assert_close(_logits(model), before, atol=2e-2, rtol=2e-2)
    unpatch_model(model)
    assert model.lm_head is head and head.weight is model.model.embed_tokens.weight
    assert torch.equal(_logits(model), before)


def test_the_report():
    text = str(patch_model(_model(hidden_act="silu")))
    assert text.startswith("0 of 2 MLPs decode sparsely") and "15 of 15 other matrices decode through ffn_1" in text
    for name in (*QKV, "o_proj"):
        assert f"model.layers.*.self_attn.{name}" in text
    assert "model.layers.*.mlp.gate_proj" in text and "lm_head" in text and "100.0%" in text
    report = patch_model(_model(), linears=False)
    assert report.matrices == () and "other matrices" not in str(report)
    compressed = patch_model(_model(dtype=torch.bfloat16), compress=True)
    assert "75." in str(compressed) and all(0.75 <= m.ratio < 0.8 for m in compressed.decoding)


def test_matrices_that_do_not_compress_stay_plain_and_are_said():
    model = Around(dtype=torch.bfloat16)
    with torch.no_grad():
        weight = model.attention.o_proj.weight
        weight.copy_(torch.randn(weight.shape) * 2.0 ** torch.randint(-60, 60, weight.shape))
    report = patch_model(model, compress=True)
    (o,) = (m for m in report.matrices if m.name.endswith("o_proj"))
    assert o.decoding and o.ratio == 1 and "% of its size compressed" in o.reason and "plain, " in o.reason
    assert type(model.attention.o_proj) is DecodingLinear and type(model.attention.q_proj) is CompressedLinear


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_other_dtypes_do_not_compress(activation, dtype):
    model = _model(dtype=dtype, hidden_act=activation)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"compress=True needs bfloat16 weights, got torch.float.*nothing was changed"):
        patch_model(model, compress=True)
    assert all(module is before[name] for name, module in model.named_modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_do_not_compress_without_ffns_either(dtype):
    model = Around(dtype=dtype)
    before = dict(model.named_modules())
    with pytest.raises((TypeError, ValueError), match="bfloat16"):
        patch_model(model, compress=True)
    assert all(module is before[name] for name, module in model.named_modules())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_failure_on_the_way_puts_everything_back(error, compress, device, monkeypatch):
    model = _model(device, torch.bfloat16)
    before, state = dict(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    kind, calls = (CompressedLinear, []) if compress else (DecodingLinear, [])
    name = "of_packed" if compress else "of"
    real = getattr(kind, name)

    def fails_on_the_way(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 7:  # in the second layer's attention
            raise error("made up")
        return real(*arguments, **keywords)

    monkeypatch.setattr(kind, name, fails_on_the_way)
    with pytest.raises(error, match="made up"):
        patch_model(model, compress=compress)
    monkeypatch.undo()
    assert len(calls) == 7 and _same_modules(model, before)
    assert all(torch.equal(_bits(value), _bits(state[name])) for name, value in model.state_dict().items())
    assert not any(isinstance(m, (SparseGatedMLP, DecodingLinear, CompressedLinear)) for m in model.modules())
    for layer in range(2):
        assert whole_of(_qkv(model, layer)) is None
    patch_model(model, compress=compress)


# A patched model at work.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_many_tokens_and_one_agree(activation, dtype, device):
    model = _model(device, dtype, hidden_act=activation)
    exact = _logits(copy.deepcopy(model).double(), LENGTH)[0].cpu().numpy()
    dense = _logits(model, LENGTH)[0]
    patch_model(model)
    torch.testing.assert_close(_logits(model, LENGTH)[0], dense)
    if activation == "silu" and device == "cpu":  # no matrix is laid out anew, as a sparse FFN's down-projection is
        assert torch.equal(_logits(model, LENGTH)[0], dense), "prefill is torch's"
    cache, rows = transformers.DynamicCache(config=model.config), []
    with torch.inference_mode():
        for i in range(LENGTH):
            rows.append(model(_ids(device)[:, i : i + 1], past_key_values=cache).logits[0, 0])
    found, vendor = (as_numpy(t.cpu()) for t in (torch.stack(rows), dense))
    ours, theirs = (np.linalg.norm(a.astype(np.float64) - exact) for a in (found, vendor))
    assert ours <= 2 * theirs + torch.finfo(dtype).eps * np.linalg.norm(exact)


@pytest.mark.parametrize("device", DEVICES)
def test_training_takes_torchs_path(device):
    model = _model(device)
    twin = copy.deepcopy(model).train()
    patch_model(model)
    model.train()
    losses = []
    for own in (model, twin):
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
        for tokens in (_ids(device)[:, :1], _ids(device)):
            loss = own(tokens).logits.float().square().mean()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    np.testing.assert_allclose(losses[:2], losses[2:], rtol=1e-5)
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    assert all(m.training for m in model.modules())
    unpatch_model(model)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("device", DEVICES)
def test_lora_on_attention(device):
    peft = pytest.importorskip("peft", reason="peft brings LoRA adapters")
    model = _model(device)
    config = peft.LoraConfig(target_modules=[*QKV, "o_proj"], r=4, init_lora_weights=False)
    before = _logits(model)
    patch_model(model)
    adapted = peft.get_peft_model(model, config).eval()
    reference = copy.deepcopy(adapted)
    unpatch_model(reference)
    assert type(reference.base_model.model.model.layers[0].mlp).__name__ == "LlamaMLP"
    torch.testing.assert_close(_logits(adapted), _logits(reference))
    torch.testing.assert_close(_logits(adapted, 5), _logits(reference, 5))
    assert (_logits(adapted) - before).abs().max() > 1e-3
    with adapted.disable_adapter():
        torch.testing.assert_close(_logits(adapted), before)

    other = peft.get_peft_model(_model(device), config).eval()  # patched with adapters: they stay, the head is taken
    wanted = _logits(other)
    report = patch_model(other)
    assert [m.name.rpartition(".")[2] for m in report.decoding] == ["lm_head"]
    assert any("not a torch.nn.Linear itself" in m.reason for m in report.matrices)
    torch.testing.assert_close(_logits(other), wanted)


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved], ids=["copy", "pickle", "save"]
)
def test_copies(how, compress):
    model = _model(dtype=torch.bfloat16)
    patch_model(model, compress=compress)
    other = how(model)
    kind = CompressedLinear if compress else DecodingLinear
    assert all(type(linear) is kind for linear in (*_qkv(other), other.lm_head))
    assert torch.equal(_logits(other), _logits(model)) and torch.equal(_logits(other, 5), _logits(model, 5))
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    assert not torch.equal(_logits(other), _logits(model))
    unpatch_model(other)
    assert all(type(linear) is nn.Linear for linear in (*_qkv(other), other.lm_head))
    assert all(type(linear) is kind for linear in _qkv(model))
    assert all(
        torch.equal(_bits(v), _bits(other.state_dict()[k])) for k, v in model.state_dict().items() if k != "model.norm.weight"
    )


# Compressed, together and apart.


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
def test_compressed_q_k_and_v_together_are_the_three(device):
    model = Around(device, torch.bfloat16)
    with torch.no_grad():
        for linear in _qkv(model):
            linear.weight.view(-1)[::501] = 2.0**-100  # which has no code
    patch_model(model, compress=True)
    linears = _qkv(model)
    whole = whole_of(linears)
    assert type(whole) is CompressedLinear and (whole.out_features, whole.in_features) == (128, 64)
    assert torch.equal(_bits(whole.weight), _bits(torch.cat([linear.weight for linear in linears])))
    assert whole.packed.escapes > 0 and not whole.packed.misfit
    for seed in range(3):
        x = torch.randn(1, 64, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)
        with torch.inference_mode():
            assert torch.equal(_bits(whole(x)), _bits(torch.cat([linear(x) for linear in linears], -1)))
    addresses = [array.data_ptr() for linear in (whole, linears[0]) for array in linear.packed.arrays]
    assert addresses[:3] == addresses[3:], "nothing is copied"
    assert whole_of([linears[1], linears[0], linears[2]]) is None
    assert whole_of([linears[0], DecodingLinear(64, 32, dtype=torch.bfloat16)]) is None


@pytest.mark.parametrize("device", DEVICES)
def test_one_small_head_of_keys_beside_many_escapes(device):
    """Of the queries' matrix, which are more than k_proj has chunks."""
    model = Around(device, torch.bfloat16)
    model.attention.q_proj = nn.Linear(64, 1024, bias=False, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        model.attention.q_proj.weight.view(-1)[::250] = 2.0**-100
    weights = [linear.weight.detach().clone() for linear in _qkv(model)]
    patch_model(model, compress=True)
    assert all(torch.equal(_bits(a.weight), _bits(b)) for a, b in zip(_qkv(model), weights, strict=True))
    assert all(not linear.packed.misfit for linear in _qkv(model))
    for linear in _qkv(model):
        torch.ops.prosparse.decompress(linear.parts, linear.facts)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("how", ["loaded", "cloned", "swapped", "copied"])
def test_what_lies_apart_is_read_apart(how, compress, device):
    model = _model(device, torch.bfloat16)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    patch_model(model, compress=compress)
    assert all(whole_of(_qkv(model, i)) is not None for i in range(2))
    if how == "loaded" and not compress:
        model.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
    elif how == "loaded":
        model.load_state_dict(state)
    elif how == "cloned":
        model._apply(lambda t: t.clone())  # as .to() does, from the GPU to the host and back
    elif how == "swapped":
        for layer in model.model.layers:
            own = copy.deepcopy(layer.self_attn.k_proj)
            layer.self_attn.k_proj = own
    else:
        model = pickle.loads(pickle.dumps(model))
    assert all(whole_of(_qkv(model, i)) is None for i in range(2))
    reference = _model(device, torch.bfloat16)
    patch_model(reference, compress=compress)
    assert torch.equal(_logits(model), _logits(reference)) and torch.equal(_logits(model, 5), _logits(reference, 5))
    texts = [generate(m, _ids(device), max_new_tokens=10, do_sample=False) for m in (model, reference)]
    assert torch.equal(*texts)


def _weight(rows: int = 40, width: int = 64):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(rows, width, generator=generator) / 8).to(torch.bfloat16)
    weight.view(-1)[::1001] = 2.0**-100
    weight[5, 3] = float("nan")
    return weight


@pytest.mark.quick
@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_a_compressed_weight(device):
    weight = _weight().to(device)
    whole = psc.compress(weight)
    x = torch.randn(64, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    for start, stop in ((0, 40), (0, 1), (8, 24), (39, 40), (4, 40), (1, 2)):
        part = whole.rows(start, stop)
        own = psc.compress(weight[start:stop].contiguous())
        assert part.shape == (stop - start, 64) and part.layout == "rows" and not part.misfit
        assert torch.equal(_bits(part.decompress()), _bits(own.decompress()))
        assert torch.equal(_bits(part.decompress()), _bits(weight[start:stop]))
        for array, of in zip(part.arrays[:-1], whole.arrays[:-1], strict=True):
            assert array.data_ptr() == of[start:].data_ptr() and array.is_contiguous()
        clean = weight[start:stop].isfinite().all(1)
        found, wanted = (torch.ops.prosparse.ffn_1(x, w.decompress()) for w in (part, own))
        assert torch.equal(found[clean], wanted[clean])
    again = whole.rows(8, 24).rows(4, 8)
    assert torch.equal(_bits(again.decompress()), _bits(weight[12:16]))


@pytest.mark.quick
def test_rows_that_are_not_there_are_refused():
    whole = psc.compress(_weight())
    for start, stop in ((-1, 4), (0, 41), (40, 40), (8, 8), (12, 4), (40, 41)):
        with pytest.raises(ValueError, match=rf"rows: must lie in 0 to 40, got {start} to {stop}"):
            whole.rows(start, stop)
    narrow = psc.compress(_weight(40, 8))  # rows of one chunk: 4 bytes in the smaller part
    assert torch.equal(_bits(narrow.rows(4, 8).decompress()), _bits(_weight(40, 8)[4:8]))
    for start in (1, 2, 3, 5):
        with pytest.raises(ValueError, match=f"rows: row {start} does not start at a multiple of 16 bytes"):
            narrow.rows(start, 8)
    with pytest.raises(ValueError, match='layout "slices" cannot be taken apart'):
        psc.compress(_weight(), layout="slices").rows(0, 8)


@pytest.mark.quick
def test_compressed_rows_that_would_not_start_aligned_are_compressed_apart():
    """Rows of one chunk are 4 bytes: three of them end between two multiples of 16."""
    model = Around(dtype=torch.bfloat16)
    holder = model.attention
    holder.q_proj, holder.k_proj, holder.v_proj = (
        nn.Linear(8, rows, bias=False, dtype=torch.bfloat16) for rows in (64, 33, 31)
    )
    weights = [linear.weight.detach().clone() for linear in _qkv(model)]
    patch_model(model, compress=True)
    assert all(type(linear) in (CompressedLinear, DecodingLinear) for linear in _qkv(model)) and whole_of(_qkv(model)) is None
    assert all(torch.equal(_bits(a.weight), _bits(b)) for a, b in zip(_qkv(model), weights, strict=True))
