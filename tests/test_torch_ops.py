"""torch.ops.prosparse: values, schemas, torch.compile, CUDA graphs, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from checks import DTYPES, bits, gate, token, weights

import prosparse_cupy as psc
from prosparse_cupy import reference

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
from torch.library import opcheck  # noqa: E402
from torch_devices import DEVICES  # noqa: E402

from prosparse_cupy.torch.ops import as_numpy, from_numpy  # noqa: E402

D_MODEL, D_FF, T = 256, 1000, 0.25
OPS = ("ffn_1", "ffn_123", "ffn_23", "ffn_4", "sparse_ffn")


def _arguments(name: str, dtype: str, seed: int = 0) -> tuple:
    rng = np.random.default_rng(seed)
    x, g, w = token(D_MODEL, dtype, rng), gate(D_FF, dtype, 0.8, rng, T), [weights(D_FF, D_MODEL, dtype, i) for i in range(3)]
    return {
        "ffn_1": (x, w[0]),
        "ffn_123": (x, w[0], w[1], T),
        "ffn_23": (g, x, w[1], T),
        "ffn_4": (reference.ffn_23(g, x, w[1], T), w[2]),
        "sparse_ffn": (x, *w, T),
    }[name]


def _of_several(name: str, dtype: str, tokens: int) -> tuple:
    """The same with a row of its own for each of several tokens."""
    each = [_arguments(name, dtype, seed) for seed in range(tokens)]
    first = _arguments(name, dtype)
    return tuple(
        np.array([one[i] for one in each], a.dtype).reshape(tokens, -1 if tokens else len(a))
        if isinstance(a, np.ndarray) and a.ndim == 1
        else a
        for i, a in enumerate(first)
    )


def _on(device: str, arguments: tuple) -> list:
    return [from_numpy(a.copy()).to(device) if isinstance(a, np.ndarray) else a for a in arguments]


def _poisoned(name: str, dtype: str, device: str):
    return torch.full((D_FF if name in ("ffn_1", "ffn_123", "ffn_23") else D_MODEL,), float("nan")).to(
        device, getattr(torch, dtype)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_ops_are_the_operators_to_the_bit(name, dtype, device):
    arguments = _arguments(name, dtype)
    plain = [*arguments] if device == "cpu" else _on(device, arguments)
    wanted = getattr(psc, name)(*plain)
    wanted = wanted if device == "cpu" else as_numpy(wanted.cpu())
    given, op = _on(device, arguments), getattr(torch.ops.prosparse, name)
    result, out = op(*given), _poisoned(name, dtype, device)
    assert result.device.type == device and result.dtype == getattr(torch, dtype)
    assert op.out(*given, out=out) is None
    for tensor in (result, out):
        np.testing.assert_array_equal(bits(as_numpy(tensor.cpu())), bits(wanted))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, dtype, device):
    given, op = _on(device, _arguments(name, dtype)), getattr(torch.ops.prosparse, name)
    opcheck(op.default, tuple(given))
    opcheck(op.out, tuple(given), {"out": _poisoned(name, dtype, device)})
    if name != "ffn_4":
        at = 1 if name == "ffn_23" else 0
        rows = [a[None] if isinstance(a, torch.Tensor) and a.ndim == 1 else a for a in given]
        assert rows[at].shape == (1, D_MODEL)
        opcheck(op.default, tuple(rows))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [2, 8])
@pytest.mark.parametrize("name", OPS)
def test_opcheck_of_several_tokens(name, tokens, device):
    given, op = _on(device, _of_several(name, "float32", tokens)), getattr(torch.ops.prosparse, name)
    opcheck(op.default, tuple(given))
    opcheck(op.out, tuple(given), {"out": torch.full_like(op(*given), float("nan"))})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize("name", OPS)
def test_each_of_several_tokens_has_the_bits_that_it_has_alone(name, tokens, dtype, device):
    given, op = _on(device, _of_several(name, dtype, tokens)), getattr(torch.ops.prosparse, name)
    vectors = [i for i, a in enumerate(given) if isinstance(a, torch.Tensor) and len(a) == tokens]
    found = op(*given)
    for i in range(tokens):
        alone = op(*(a[i].clone() if j in vectors else a for j, a in enumerate(given)))
        np.testing.assert_array_equal(bits(as_numpy(found[i].cpu())), bits(as_numpy(alone.cpu())))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_more_tokens_than_eight_and_none_are_refused(name, device):
    op = getattr(torch.ops.prosparse, name)
    for tokens in (0, 9):
        given = _on(device, _of_several(name, "float32", tokens))
        with pytest.raises(ValueError, match=rf"{name}: \w+ must hold one token, \(d,\), or 1 to 8.*got {tokens} tokens"):
            op(*given)


@pytest.mark.parametrize("device", DEVICES)
def test_fake_results_have_a_row_for_each_token(device):
    from torch._subclasses import FakeTensorMode

    for name in OPS:
        given, op = _on(device, _of_several(name, "bfloat16", 3)), getattr(torch.ops.prosparse, name)
        real = op(*given)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in given))
        assert fake.shape == real.shape and len(fake) == 3 and (fake.dtype, fake.device) == (real.dtype, real.device)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_whole(device):
    def steps(x, w_gate, w_up, w_down_t):
        op = torch.ops.prosparse
        x1 = op.ffn_23(op.ffn_1(x * 1, w_gate), x, w_up, T)
        out = torch.empty_like(x)
        op.ffn_4.out(x1, w_down_t, out=out)
        return out + 0, op.sparse_ffn(x, w_gate, w_up, w_down_t, T)

    given = _on(device, _arguments("sparse_ffn", "float32"))[:4]
    # aot_eager: without a C++ compiler inductor makes nothing on the CPU.
    compiled = torch.compile(steps, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    with torch.inference_mode():
        for ours, theirs in zip(compiled(*given), steps(*given), strict=True):
            assert torch.equal(ours, theirs)
            assert bool(ours.any())


@pytest.mark.gpu
def test_reduce_overhead_keeps_nothing_of_its_graphs(torch_gpu):
    compiled = torch.compile(torch.ops.prosparse.sparse_ffn, fullgraph=True, mode="reduce-overhead")
    given = _on("cuda", _arguments("sparse_ffn", "bfloat16"))
    with torch.inference_mode():
        for seed in range(4):
            given[0].copy_(from_numpy(_arguments("sparse_ffn", "bfloat16", seed)[0]))
            result = compiled(*given).clone()
            assert torch.equal(result, torch.ops.prosparse.sparse_ffn(*given))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_captured_in_a_cuda_graph(name, torch_gpu):
    given, op = _on("cuda", _arguments(name, "bfloat16")), getattr(torch.ops.prosparse, name)
    op(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = op(*given)
    given[0].copy_(from_numpy(_arguments(name, "bfloat16", 1)[0]))
    result.fill_(float("nan"))
    graph.replay()
    assert torch.equal(result, op(*given))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_gradients_are_refused(name, device):
    given, op = _on(device, _arguments(name, "float32")), getattr(torch.ops.prosparse, name)
    given[0].requires_grad_()
    out = _poisoned(name, "float32", device)
    for call in (lambda: op(*given), lambda: op.out(*given, out=out)):
        with pytest.raises(RuntimeError, match=f"prosparse::{name} is for inference: .*inference_mode"):
            call()
    assert bool(out.isnan().all())
    with pytest.raises(Exception, match="is for inference"):
        torch.compile(op, fullgraph=True, backend="aot_eager")(*given)
    with torch.no_grad():
        assert not op(*given).requires_grad
    with torch.inference_mode():
        op(*given)


@pytest.mark.parametrize("device", DEVICES)
def test_bad_input_gets_the_operators_errors(device):
    x, w_gate, *_ = _on(device, _arguments("sparse_ffn", "bfloat16"))
    with pytest.raises(ValueError, match=r"ffn_1: w_gate must have shape \(d_ff, d_model\) with d_model = 256"):
        torch.ops.prosparse.ffn_1(x, w_gate[:, :128].contiguous())
    with pytest.raises(TypeError, match=r"ffn_1: w_gate must have the dtype of x"):
        torch.ops.prosparse.ffn_1(x, w_gate.float())
    with pytest.raises(ValueError, match=r"threshold must be finite as float32 and >= 0"):
        torch.ops.prosparse.ffn_123(x, w_gate, w_gate, -1.0)
    with pytest.raises(ValueError, match="strided view"):
        torch.ops.prosparse.ffn_4(w_gate[:, 0].contiguous(), w_gate.t().contiguous().t())


def test_the_memory_of_a_cpu_tensor_is_shared():
    for dtype in DTYPES:
        tensor = torch.arange(6, dtype=getattr(torch, dtype)).view(2, 3)
        array = as_numpy(tensor)
        assert array.dtype == DTYPES[dtype] and array.tolist() == [[0, 1, 2], [3, 4, 5]]
        array[0, 0] = 7
        assert tensor[0, 0] == 7 and torch.equal(from_numpy(array), tensor)
