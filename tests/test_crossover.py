"""Several tokens at once through patched modules: up to how many, which path they take, and their bits."""

from __future__ import annotations

import copy
import pickle

import pytest

from prosparse_cupy.arguments import MOST_TOKENS
from prosparse_cupy.crossover import _PAYING, MOST_TOKENS_OF_ANY, most_tokens

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
from torch import nn  # noqa: E402
from torch_devices import DEVICES  # noqa: E402

from prosparse_cupy.families import FAMILIES, LLAMA_LIKE, MLPFamily  # noqa: E402
from prosparse_cupy.formula import Formula  # noqa: E402
from prosparse_cupy.torch import CompressedLinear, DecodingLinear, FATReLU, SparseGatedMLP, SparseMLP  # noqa: E402
from prosparse_cupy.torch.halves import SparseDown, SparseUp  # noqa: E402
from prosparse_cupy.torch.mlp import count_active  # noqa: E402

D_MODEL, D_FF, T = 64, 161, 0.125
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(8, 1), (1, 8), (2, 4), (1, 2), (3, 1), (7,), (2,)]


def test_the_operators_take_what_pays():
    for operator, by_weights in _PAYING.items():
        for weights, steps in by_weights.items():
            assert 1 <= most_tokens(operator, weights) == steps[-1][0] <= MOST_TOKENS_OF_ANY <= MOST_TOKENS
            assert list(steps) == sorted(steps) and list(steps) == sorted(steps, key=lambda step: step[1])
            assert [most_tokens(operator, weights, least) for _, least in steps] == [most for most, _ in steps]


@pytest.mark.parametrize(("sparsity", "most"), [(None, 8), (1.0, 8), (0.8, 8), (0.799, 4), (0.5, 4), (0.499, 2), (0.0, 2)])
def test_denser_layers_pay_for_fewer_tokens(sparsity, most):
    assert most_tokens("sparse_ffn", "plain", sparsity) == most
    assert most_tokens("sparse_ffn", "bf12", sparsity) == 8, "decompressing costs more than any number of tokens"
    assert most_tokens("ffn_1", "plain", sparsity) == 8


class NoGate(nn.Module):
    """As Nemotron has it, with biases."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.act_fn = nn.ReLU()


NO_GATE = MLPFamily("no gate of a test", up="up_proj", down="down_proj", activation="act_fn")


class Halves(nn.Module):
    """Two projections that belong to a module that does more, as OPT's do."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model)
        family = next(family for family in FAMILIES if family.name == "OPT")
        self.fc1 = SparseUp(self.fc1, self, family, 0.0, self.activation_fn)
        self.fc2 = SparseDown(self.fc2)

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))


def _gated(compress: bool):
    mlp = SparseGatedMLP(D_MODEL, D_FF, T, dtype=torch.bfloat16 if compress else None)
    for name in LLAMA_LIKE.projections if compress else ():
        setattr(mlp, name, CompressedLinear(getattr(mlp, name).weight, transposed=name == "down_proj"))
    return mlp


MODULES = {
    "gated": lambda: _gated(False),
    "gated, compressed": lambda: _gated(True),
    "no gate, biases": lambda: SparseMLP.of(NoGate(D_MODEL, D_FF), NO_GATE, Formula(activation="relu2", gated=False)),
    "halves": lambda: Halves(D_MODEL, D_FF),
    "linear": lambda: DecodingLinear(D_MODEL, 40),
    "linear, compressed": lambda: CompressedLinear(torch.randn(40, D_MODEL).to(torch.bfloat16) / 8),
}
MOST = {
    "gated": most_tokens("sparse_ffn"),
    "gated, compressed": most_tokens("sparse_ffn", "bf12"),
    "no gate, biases": most_tokens("sparse_ffn"),
    "halves": min(most_tokens("ffn_12"), most_tokens("ffn_4")),
    "linear": most_tokens("ffn_1"),
    "linear, compressed": most_tokens("ffn_1", "bf12"),
}


def _module(name: str, device: str, dtype=torch.float32):
    torch.manual_seed(0)
    module = MODULES[name]().requires_grad_(False)
    return (module if "compressed" in name else module.to(dtype)).to(device).eval()


def _dtype(name: str, dtype=torch.float32):
    return torch.bfloat16 if "compressed" in name else dtype


def _tokens(shape, device: str, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(*shape, D_MODEL, generator=generator).to(device, dtype)


def _bits(tensor):
    return tensor.cpu().contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.fixture
def operators(monkeypatch):
    """The operators of the dispatcher that are called on the CPU, and how many tokens each got."""
    from prosparse_cupy.torch import dispatch, halves, mlp

    noted, real = [], dispatch.dispatched

    def noting(name, x, *arguments, **keywords):
        noted.append((name, 1 if x.dim() == 1 else len(x)))
        return real(name, x, *arguments, **keywords)

    for module in (dispatch, halves, mlp):
        monkeypatch.setattr(module, "dispatched", noting)
    return noted


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODULES)
def test_a_tokens_bits_are_those_that_it_has_alone(name, dtype, device):
    if "compressed" in name and dtype != torch.bfloat16:
        pytest.skip("only bfloat16 is compressed")
    module = _module(name, device, dtype)
    with torch.inference_mode():
        for shape in SHAPES:
            if torch.Size(shape).numel() > MOST[name]:
                continue
            x = _tokens(shape, device, dtype)
            together, alone = module(x), [module(row) for row in x.reshape(-1, D_MODEL)]
            assert together.shape[:-1] == shape and together.dtype == dtype and together.is_contiguous()
            assert torch.equal(_bits(together.flatten(0, -2)), _bits(torch.stack(alone))), shape


@pytest.mark.parametrize("name", MODULES)
def test_more_tokens_than_pay_and_none_take_the_dense_path(name, operators):
    module = _module(name, "cpu")
    expected = {"halves": ["ffn_12", "ffn_4"]}.get(name, ["ffn_1" if "linear" in name else "sparse_ffn"])
    with torch.inference_mode():
        for shape in ((1,), (1, 1), (2,), (MOST[name], 1), (1, MOST[name])):
            module(_tokens(shape, "cpu", _dtype(name)))
            assert operators == [(operator, torch.Size(shape).numel()) for operator in expected]
            operators.clear()
        for shape in ((MOST[name] + 1,), (1, MOST[name] + 1), (3, 5), (0,), (1, 0), (0, 1)):
            y = module(_tokens(shape, "cpu", _dtype(name)))
            assert y.shape[:-1] == shape and not operators


@pytest.mark.parametrize("name", ["gated", "gated, compressed", "no gate, biases", "halves"])
def test_tokens_that_do_not_pay_at_a_layers_sparsity_take_the_dense_path(name, operators):
    """Where bits may vary; else each token keeps those that it has alone, whatever that costs."""
    module = _module(name, "cpu")
    knows = module.fc2 if name == "halves" else module
    by_sparsity = "sparse_ffn" if name != "halves" else "ffn_4"
    few = {"gated": (4, 2), "no gate, biases": (2, 2), "halves": (2, 1)}.get(name, (8, 8))
    varying = [(False, None, 8), (False, 0.9, 8), (False, 0.6, few[0]), (False, 0.3, few[1])]
    for batch_invariant, sparsity, most in [(True, 0.3, 8), *varying]:
        knows.batch_invariant, knows.sparsity = batch_invariant, sparsity
        with torch.inference_mode():
            for tokens in range(1, 10):
                y = module(x := _tokens((tokens, 1), "cpu", _dtype(name)))
                assert ((by_sparsity, tokens) in operators) == (tokens <= most), (batch_invariant, sparsity, tokens)
                operators.clear()
                alone = torch.stack([module(row) for row in x.flatten(0, -2)]).view_as(y)
                torch.testing.assert_close(y, alone, atol=3e-2 if y.dtype == torch.bfloat16 else 1e-5, rtol=1e-2)
                operators.clear()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODULES)
def test_rows_that_lie_apart_and_rows_that_are_one(name, device):
    """The last tokens of several texts, a step through memory, and an expanded token."""
    module, dtype = _module(name, device), _dtype(name)
    x = _tokens((3, 5), device, dtype)
    with torch.inference_mode():
        for strided in (x[:, -1:], x[:, ::4][:1], x[:1, :1].expand(3, 1, -1), x.transpose(0, 1)[:1]):
            assert torch.equal(_bits(module(strided)), _bits(module(strided.contiguous())))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["gated", "no gate, biases", "halves"])
def test_nan_in_a_neuron_stays_with_the_tokens_that_use_it(name, device):
    """The weights of a neuron that is inactive for a token do not reach it, whoever else in the batch reads them."""
    module = _module(name, device)
    down = module.fc2 if name == "halves" else module.down_proj
    up = module.fc1 if name == "halves" else module.gate_proj if name == "gated" else module.up_proj
    x = _tokens((6,), device)
    with torch.inference_mode():
        gates = nn.functional.linear(x, up.weight, up.bias)
        share = ((gates > T).sum(0) - 3).abs()
        neuron = int(share.argmin())  # half of the tokens use it
        assert gates[:, neuron].gt(T).sum() in (1, 2, 3, 4, 5) and gates[:, neuron].sub(T).abs().min() > 1e-4
        uses = gates[:, neuron] > (T if name == "gated" else 0)
        before = module(x)
        down.weight[:, neuron] = float("nan")
        after = module(x)
    assert uses.any() and not uses.all()
    assert after[uses].isnan().all() and torch.equal(after[~uses], before[~uses])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["gated", "gated, compressed", "no gate, biases"])
def test_all_tokens_are_counted(name, device):
    module, dtype = _module(name, device), _dtype(name)
    x = _tokens((2, 3), device, dtype)
    with torch.inference_mode():
        module.counts = torch.zeros(2, dtype=torch.int64, device=device)
        y = module(x)
        found, module.counts = module.counts, torch.zeros(2, dtype=torch.int64, device=device)
        for row in x.reshape(-1, D_MODEL):
            module(row)
        assert found.tolist() == module.counts.tolist() and found[1] == 6 * D_FF and 0 < found[0] < found[1]
        module.counts = None
        assert torch.equal(_bits(module(x)), _bits(y))
    counts = torch.zeros(2, dtype=torch.int64)
    count_active(counts, torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    assert counts.tolist() == [3, 4]


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_few_tokens_are_torchs(device, operators):
    mlp = SparseGatedMLP(D_MODEL, D_FF, T, device=device)
    x = _tokens((4,), device).requires_grad_(True)
    mlp(x).sum().backward()
    assert not operators and x.grad is not None and mlp.up_proj.weight.grad is not None


# torch.compile and torch.export.

MANY = (1, 7), (1, 1), (1, 20), (1, 2), (1, 8), (1, 33), (2, 1), (8, 1), (9, 1), (2, 4), (2, 5), (4, 2), (5, 7), (3, 1), (1, 5)


class Block(nn.Module):
    """What a layer has: a sparse FFN, and a matrix whose limit is another."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.linear, self.act_fn = SparseGatedMLP(D_MODEL, D_FF, T), DecodingLinear(D_MODEL, 40), FATReLU(T)

    def forward(self, x):
        return self.act_fn(self.linear(x + self.mlp(x)))


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_code_has_a_graph_for_few_tokens_and_one_for_many(device):
    """Each where torch tells batches, texts and both apart, beside one for one token; no more than torch keeps."""
    torch.manual_seed(0)
    block, graphs = Block().requires_grad_(False).to(device), []

    def backend(graph, inputs):
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        graphs.append([target.split(".")[1] for target in targets if target.startswith("prosparse.")])
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    with torch.inference_mode():
        for shape in (*MANY, *MANY):
            x = _tokens(shape, device)
            torch.testing.assert_close(compiled(x), block(x), atol=1e-5, rtol=1e-4)
    assert graphs[1] == ["sparse_ffn", "ffn_1"] and len(graphs) <= torch._dynamo.config.recompile_limit
    assert all(graph in ([], ["sparse_ffn", "ffn_1"], ["sparse_ffn"]) for graph in graphs)
    assert graphs.count(["sparse_ffn"]) <= 1, "only a graph of one shape tells their limits apart"
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["gated", "gated, compressed", "no gate, biases", "halves"])
def test_layers_of_different_sparsity_are_traced_whole_and_share_graphs(name):
    """One graph for all layers that take the same path, as a step compiles them."""
    torch.manual_seed(0)
    layers, graphs = [MODULES[name]().requires_grad_(False).eval() for _ in range(12)], []
    for i, layer in enumerate(layers):
        knows = layer.fc2 if name == "halves" else layer
        knows.batch_invariant, knows.sparsity = False, 0.3 + 0.06 * i
        for linear in layer.modules():
            if isinstance(linear, CompressedLinear):
                linear.show_one_escape()  # as a step does

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda layer, x: layer(x), fullgraph=True, dynamic=False, backend=backend)
    x = _tokens((6, 1), "cpu", _dtype(name))
    with torch.inference_mode():
        for layer in layers:
            torch.testing.assert_close(compiled(layer, x), layer(x), atol=3e-2 if "compressed" in name else 1e-5, rtol=1e-2)
    paths = {(layer.fc2 if name == "halves" else layer).most_tokens for layer in layers}
    assert len(paths) == (1 if "compressed" in name else 3) and len(graphs) <= len(paths)
    torch._dynamo.reset()


@pytest.mark.parametrize("share", [-0.1, 1.5, 89, float("nan")])
def test_a_sparsity_that_is_no_share_is_refused(share):
    module = _gated(False)
    module.sparsity = 0.5
    with pytest.raises(ValueError, match="sparsity: must be a share of neurons, 0 to 1, or None, got"):
        module.sparsity = share
    for what in ("0.9", True, [0.9]):
        with pytest.raises(TypeError, match="sparsity: must be a share of neurons, 0 to 1, or None, got"):
            module.sparsity = what
    assert module.sparsity == 0.5
    module.sparsity = None
    assert module.sparsity is None and module.most_tokens == 8


def test_copies_and_states_know_the_sparsity():
    from prosparse_cupy.torch.eligibility import state_of

    module = _gated(False)
    before = state_of(module)
    module.batch_invariant, module.sparsity = False, 0.6
    assert state_of(module) != before, "a step of before would take the other path"
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (copied.sparsity, copied.batch_invariant, copied.most_tokens) == (0.6, False, 4)
    module.sparsity = 0.85
    assert copied.most_tokens == 4 and module.most_tokens == 8


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [2, 8])
def test_compiled_whole(tokens, device):
    torch._dynamo.reset()
    block, x = Block().requires_grad_(False).to(device), _tokens((tokens, 1), device)
    compiled = torch.compile(block, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), block(x), atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph(torch_gpu):
    block, x = Block().requires_grad_(False).to("cuda"), _tokens((4, 1), "cuda")
    with torch.inference_mode():
        block(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = block(x)
        x.copy_(_tokens((1, 4), "cuda").view(4, 1, -1))
        graph.replay()
        assert torch.equal(y, block(x))


@pytest.mark.parametrize("sparsity", [None, 0.6])
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_of_any_number_of_tokens_is_dense(strict, sparsity):
    """It has one path, which must be right for any number; of one shape it has the path that pays."""
    mlp, x = SparseGatedMLP(D_MODEL, D_FF, T).requires_grad_(False), _tokens((1, 4), "cpu")
    mlp.batch_invariant, mlp.sparsity = sparsity is None, sparsity
    with torch.no_grad():
        for dynamic in (None, {"x": {1: torch.export.Dim("tokens", min=2, max=64)}}):
            program = torch.export.export(mlp, (x,), dynamic_shapes=dynamic, strict=strict)
            called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
            assert ("prosparse.sparse_ffn.default" in called) == (dynamic is None)
            for tokens in (4,) if dynamic is None else (2, 4, 30):
                more = _tokens((1, tokens), "cpu")
                torch.testing.assert_close(program.module()(more), mlp(more), atol=1e-5, rtol=1e-4)
