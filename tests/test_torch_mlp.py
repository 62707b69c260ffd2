"""FATReLU and SparseGatedMLP."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import numpy as np
import pytest
from checks import assert_no_worse_than_vendor

from prosparse_cupy import reference

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
from torch import nn  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.nn.utils import parametrize, prune  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from torch_devices import DEVICES  # noqa: E402

from prosparse_cupy.formula import largest_inactive  # noqa: E402
from prosparse_cupy.torch import FATReLU, SparseGatedMLP  # noqa: E402
from prosparse_cupy.torch.mlp import PROJECTIONS, pack, unpack  # noqa: E402
from prosparse_cupy.torch.ops import as_numpy  # noqa: E402

D_MODEL, D_FF, T = 128, 520, 0.125
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


class DenseMLP(nn.Module):
    """As a LLaMA-like model has it."""

    def __init__(self, threshold: float = T, device="cpu", dtype=torch.float32) -> None:
        super().__init__()
        for name in PROJECTIONS:
            shape = (D_MODEL, D_FF) if name != "down_proj" else (D_FF, D_MODEL)
            setattr(self, name, nn.Linear(*shape, bias=False, device=device, dtype=dtype))
        self.act_fn = FATReLU(threshold)

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _packed(module: nn.Module) -> bool:
    return module.down_proj.weight.t().is_contiguous() and not module.down_proj.weight.is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.25, 1e-3])
def test_fatrelu_keeps_its_threshold_and_nan(threshold, dtype, device):
    t = torch.tensor(float(np.float32(threshold)), dtype=dtype, device=device)  # rounded to the dtype: may be just below T
    up = torch.nextafter(t.cpu(), torch.tensor(9.0, dtype=dtype)).to(device) if dtype != torch.float16 else t * 1.01
    x = torch.stack([t, up, -t, t * 0, -t * 0, t / 2, t * 0 + 3, t * 0 - 3, t * float("nan")])
    wanted = torch.where((x.double() < float(np.float32(threshold))) | (x == 0), 0 * x.nan_to_num(), x)
    result = FATReLU(threshold)(x)
    assert result.dtype == dtype
    assert torch.equal(result.isnan(), x.isnan()) and torch.equal(result.nan_to_num(7), wanted.nan_to_num(7))
    assert not torch.signbit(result[(result == 0)]).any()


def test_fatrelu_agrees_with_the_reference_near_its_threshold():
    for dtype in (np.float16, np.float32):
        for threshold in (0.01, 0.1, 1 / 3, 0.25):
            near = np.array([threshold], dtype)
            x = np.concatenate([np.nextafter(near, dtype(0)), near, np.nextafter(near, dtype(9))])
            ours = FATReLU(threshold)(torch.from_numpy(x)).numpy()
            np.testing.assert_array_equal(ours, reference.fatrelu(x, threshold))
            assert largest_inactive(threshold, np.dtype(dtype)) < np.float32(threshold)


def test_fatrelu_without_or_with_a_bad_threshold():
    with pytest.raises(RuntimeError, match="hidden_act_param"):
        FATReLU()(torch.ones(3))
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="threshold must be finite"):
            FATReLU(bad)
    assert repr(FATReLU(0.5)) == "FATReLU(threshold=0.5)"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_and_many_are_within_the_contract(dtype, device):
    torch.manual_seed(0)
    mlp = SparseGatedMLP(D_MODEL, D_FF, T, device=device, dtype=dtype)
    x = torch.randn(1, 3, D_MODEL).to(device, dtype)
    with torch.inference_mode():
        many = mlp(x)
        for i in range(3):
            one = mlp(x[:, i : i + 1])
            assert one.shape == (1, 1, D_MODEL) and one.dtype == dtype
            w_gate, w_up, w_down = (as_numpy(getattr(mlp, n).weight.cpu()) for n in PROJECTIONS)
            token = as_numpy(x[0, i].cpu())
            exact = reference.ffn_4(reference.ffn_123(token, w_gate, w_up, T).astype(np.float64), w_down.T.astype(np.float64))
            assert_no_worse_than_vendor(as_numpy(one[0, 0].cpu()), as_numpy(many[0, i].cpu()), exact)
            assert torch.equal(mlp(x[0, i]), one[0, 0]), "any shape of one token"
        assert mlp(x[:, :0]).shape == (1, 0, D_MODEL)


def test_state_dict_is_a_llama_mlps():
    sparse, dense = SparseGatedMLP(D_MODEL, D_FF, T), DenseMLP()
    ours, theirs = sparse.state_dict(), dense.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    x = torch.randn(2, D_MODEL)
    for assign in (False, True):
        sparse.load_state_dict(theirs, assign=assign)
        assert _packed(sparse)
        assert torch.equal(sparse.down_proj.weight, theirs["down_proj.weight"])
        torch.testing.assert_close(sparse(x), dense(x))
    dense.load_state_dict(SparseGatedMLP(D_MODEL, D_FF).state_dict())
    assert dense.down_proj.weight.is_contiguous()


def test_the_layout_survives_what_modules_go_through():
    sparse = SparseGatedMLP(D_MODEL, D_FF, T)
    file = io.BytesIO()
    torch.save(sparse.state_dict(), file)
    file.seek(0)
    again = SparseGatedMLP(D_MODEL, D_FF, T)
    again.load_state_dict(torch.load(file))
    for module in (
        again,
        copy.deepcopy(sparse),
        copy.deepcopy(sparse).to(torch.bfloat16),
        copy.deepcopy(sparse).half().float(),
    ):
        assert _packed(module) and module.threshold == T
    assert torch.equal(again.down_proj.weight, sparse.down_proj.weight)


@pytest.mark.parametrize("device", DEVICES)
def test_from_mlp_shares_the_weights(device):
    dense = DenseMLP(device=device)
    x = torch.randn(4, D_MODEL, device=device)
    before, values = dense(x), dense.down_proj.weight.detach().clone()
    parameters = [getattr(dense, n).weight for n in PROJECTIONS]
    sparse = SparseGatedMLP.from_mlp(dense, T)
    assert [id(getattr(sparse, n).weight) for n in PROJECTIONS] == [id(p) for p in parameters]
    assert _packed(sparse) and torch.equal(dense.down_proj.weight, values)
    assert (sparse.d_model, sparse.d_ff, sparse.threshold, sparse.training) == (D_MODEL, D_FF, T, True)
    torch.testing.assert_close(dense(x), before)
    torch.testing.assert_close(sparse(x), before)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x[:1]), before[:1])
    unpack(dense.down_proj)
    assert dense.down_proj.weight.is_contiguous() and torch.equal(dense.down_proj.weight, values)
    pack(dense.down_proj)
    address = dense.down_proj.weight.data_ptr()
    pack(dense.down_proj)
    assert dense.down_proj.weight.data_ptr() == address, "packed already: nothing is copied"


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_whole(device):
    mlp = SparseGatedMLP(D_MODEL, D_FF, T, device=device)
    compiled = torch.compile(mlp, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    with torch.inference_mode():
        for tokens in (1, 3, 1):
            x = torch.randn(1, tokens, D_MODEL, device=device)
            torch.testing.assert_close(compiled(x), mlp(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_flow_for_one_token_and_for_many(device):
    mlp, dense = SparseGatedMLP(D_MODEL, D_FF, T, device=device), DenseMLP(device=device)
    mlp.load_state_dict(dense.state_dict())
    for tokens in (2, 1):
        x = torch.randn(tokens, D_MODEL, device=device, requires_grad=True)
        for module in (mlp, dense):
            module.zero_grad()
            x.grad = None
            module(x).sum().backward()
            module.found = [x.grad.clone(), *(getattr(module, n).weight.grad.clone() for n in PROJECTIONS)]
        for ours, theirs in zip(mlp.found, dense.found, strict=True):
            torch.testing.assert_close(ours, theirs)
    mlp.requires_grad_(False)
    assert not mlp(torch.randn(1, D_MODEL, device=device)).requires_grad


class LowRank(nn.Module):
    """A projection with an adapter beside it, as LoRA makes one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.delta = nn.Parameter(0.05 * torch.randn_like(base.weight))

    @property
    def weight(self) -> nn.Parameter:
        return self.base.weight

    def forward(self, x):
        return self.base(x) + nn.functional.linear(x, self.delta)


class Doubled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


class Tripled(nn.Module):
    """A parametrisation."""

    def forward(self, weight):
        return 3 * weight


def _subclassed(linear: nn.Linear) -> nn.Linear:
    other = Doubled(linear.in_features, linear.out_features, bias=False, device=linear.weight.device)
    other.weight = linear.weight
    return other


def _add_forward(module: nn.Module) -> None:
    """As accelerate and others wrap a module."""
    forward = module.forward
    module.forward = lambda x: 3 * forward(x)


CHANGES = {
    "a forward hook": lambda m, p: getattr(m, p).register_forward_hook(lambda module, given, out: 2 * out),
    "a pre-hook": lambda m, p: getattr(m, p).register_forward_pre_hook(lambda module, given: (2 * given[0],)),
    "an adapter": lambda m, p: setattr(m, p, LowRank(getattr(m, p))),
    "a subclass": lambda m, p: setattr(m, p, _subclassed(getattr(m, p))),
    "a bias": lambda m, p: setattr(getattr(m, p), "bias", nn.Parameter(torch.randn_like(getattr(m, p).weight[:, 0]))),
    "a forward of its own": lambda m, p: _add_forward(getattr(m, p)),
    "parametrised": lambda m, p: parametrize.register_parametrization(getattr(m, p), "weight", Tripled()),
    "pruned": lambda m, p: prune.random_unstructured(getattr(m, p), "weight", 0.5),
    "a weight of another layout": lambda m, p: setattr(
        getattr(m, p), "weight", nn.Parameter(torch.randn_like(getattr(m, p).weight).t().contiguous().t() * 0.1)
    ),
    "another sequence": lambda m, p: setattr(m, p, nn.Sequential(getattr(m, p), nn.Softplus())),
}


def _as_its_modules_say(mlp: nn.Module, x):
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))


def _mlp(device: str, dtype=torch.float32) -> SparseGatedMLP:
    torch.manual_seed(0)
    return SparseGatedMLP(D_MODEL, D_FF, T, device=device, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_projection_that_was_changed_is_obeyed(change, projection, device):
    if change == "pruned" and projection == "down_proj":
        pytest.skip("torch prunes contiguous weights only")
    mlp, x = _mlp(device), torch.randn(1, 1, D_MODEL, device=device)
    with torch.no_grad():
        before = mlp(x)
        CHANGES[change](mlp, projection)
        mlp.requires_grad_(False)
        wanted = _as_its_modules_say(mlp, x)
        assert (before - wanted).norm() > 0.1 * before.norm(), "the change does nothing"
        torch.testing.assert_close(mlp(x), wanted)
        torch.testing.assert_close(mlp(x.expand(1, 2, -1))[:, :1], wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("change", ["replaced", "by a function", "a hook", "a hook on every module", "without a threshold"])
def test_an_activation_that_was_changed_is_obeyed(change, device, request):
    mlp, x = _mlp(device), torch.randn(1, 1, D_MODEL, device=device)
    with torch.no_grad():
        before = mlp(x)
        if change == "replaced":
            mlp.act_fn = nn.SiLU()
        elif change == "by a function":
            del mlp.act_fn
            mlp.act_fn = torch.tanh
        elif change == "a hook":
            mlp.act_fn.register_forward_hook(lambda module, given, out: 2 * out)
        elif change == "a hook on every module":

            def double_activations(module, given, out):
                return 2 * out if isinstance(module, FATReLU) else None

            handle = nn.modules.module.register_module_forward_hook(double_activations)
            request.addfinalizer(handle.remove)
        else:
            mlp.act_fn = FATReLU()
            for tokens in (1, 2):
                with pytest.raises(RuntimeError, match="FATReLU has no threshold"):
                    mlp(x.expand(1, tokens, -1))
            assert mlp.threshold is None
            return
        wanted = _as_its_modules_say(mlp, x)
        assert (before - wanted).norm() > 0.1 * before.norm()
        torch.testing.assert_close(mlp(x), wanted)
    if change in ("replaced", "by a function"):
        assert mlp.threshold is None


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_that_only_the_dense_path_takes(device):
    mlp = _mlp(device)
    with torch.no_grad():
        buffer = torch.randn(D_MODEL + 1, device=device)
        torch.testing.assert_close(mlp(buffer[1:]), mlp(buffer[1:].clone()), msg="not at a multiple of 16 bytes")
        strided = torch.randn(D_MODEL, 2, device=device)[:, 0]
        torch.testing.assert_close(mlp(strided), mlp(strided.contiguous()))
        torch.testing.assert_close(mlp(strided[None, None])[0, 0], mlp(strided.contiguous()))
        many = torch.randn(3, D_MODEL, device=device)
        torch.testing.assert_close(torch.vmap(mlp)(many), mlp(many))
        for wrong in (torch.randn(1, D_MODEL + 4, device=device), torch.randn(1, D_MODEL, device=device).half()):
            with pytest.raises(RuntimeError):
                mlp(wrong)
        wide = _mlp(device).double()
        assert wide(many[:1].double()).dtype == torch.float64


@pytest.mark.parametrize("device", DEVICES)
def test_what_torch_traces_is_the_whole_ffn(device):
    """A launch past the dispatcher would leave an output in the trace that nobody writes."""
    mlp, (x, other) = _mlp(device), torch.randn(2, 1, D_MODEL, device=device)
    with torch.no_grad():
        for traced in (torch.jit.trace(mlp, x), make_fx(mlp)(x)):
            torch.testing.assert_close(traced(other), mlp(other))
        with FlopCounterMode(display=False):
            torch.testing.assert_close(mlp(x), mlp(x.expand(2, -1))[:1])


@pytest.mark.parametrize("device", DEVICES)
def test_forward_derivatives_and_a_linear_that_is_patched_itself(device, monkeypatch):
    mlp, (x, tangent) = _mlp(device), torch.randn(2, 1, D_MODEL, device=device)
    with forward_ad.dual_level():
        found = [forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))) for f in (mlp, partial(_as_its_modules_say, mlp))]
        torch.testing.assert_close(found[0].tangent, found[1].tangent)
    real = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * real(self, x))
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), _as_its_modules_say(mlp, x))


def test_shapes_alone():
    mlp = SparseGatedMLP(D_MODEL, D_FF, T, device="meta").requires_grad_(False)
    for tokens in (1, 2):
        assert mlp(torch.randn(tokens, D_MODEL, device="meta")).shape == (tokens, D_MODEL)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("tokens", [torch.bfloat16, torch.float32])
def test_autocast(tokens, weights, device):
    mlp = _mlp(device, weights)
    x = torch.randn(1, D_MODEL, device=device, dtype=tokens)
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        one, two = mlp(x), mlp(x.expand(2, -1))[:1]
        assert one.dtype == two.dtype == torch.bfloat16
        torch.testing.assert_close(one, two, atol=2e-2, rtol=2e-2)


def test_a_module_pickles(tmp_path):
    mlp, x = _mlp("cpu"), torch.randn(1, D_MODEL)
    again = pickle.loads(pickle.dumps(mlp))
    torch.save(mlp, tmp_path / "mlp.pt")
    for module in (again, torch.load(tmp_path / "mlp.pt", weights_only=False)):
        assert _packed(module)
        with torch.no_grad():
            assert torch.equal(module(x), mlp(x))
        module.load_state_dict(DenseMLP().state_dict())
        assert _packed(module), "the copy packs what it loads, too"


@pytest.mark.gpu
def test_no_second_copy_on_the_gpu(torch_gpu):
    dense = DenseMLP(device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    sparse = SparseGatedMLP.from_mlp(dense, T)
    with torch.inference_mode():
        sparse(torch.randn(1, D_MODEL, device="cuda", dtype=torch.bfloat16))
    grown = torch.cuda.memory_allocated() - before
    assert grown == 0, "scratch is not torch's"
