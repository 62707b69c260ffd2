"""FATReLU and SparseGatedMLP."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
from checks import assert_no_worse_than_vendor

from prosparse_cupy import reference

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
from torch import nn  # noqa: E402
from torch_devices import DEVICES  # noqa: E402

from prosparse_cupy.torch import FATReLU, SparseGatedMLP  # noqa: E402
from prosparse_cupy.torch.activation import largest_below  # noqa: E402
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
            assert largest_below(threshold, np.dtype(dtype)) < np.float32(threshold)


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


def test_gradients_flow_where_it_is_dense_and_are_refused_where_it_is_sparse():
    mlp = SparseGatedMLP(D_MODEL, D_FF, T)
    mlp(torch.randn(2, D_MODEL)).sum().backward()
    assert mlp.down_proj.weight.grad.shape == (D_MODEL, D_FF)
    with pytest.raises(RuntimeError, match="is for inference"):
        mlp(torch.randn(1, D_MODEL))


@pytest.mark.gpu
def test_no_second_copy_on_the_gpu(torch_gpu):
    dense = DenseMLP(device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    sparse = SparseGatedMLP.from_mlp(dense, T)
    with torch.inference_mode():
        sparse(torch.randn(1, D_MODEL, device="cuda", dtype=torch.bfloat16))
    grown = torch.cuda.memory_allocated() - before
    assert grown in (0, 1536), "the scratch, 1040 bytes in blocks of 512, unless an earlier test has left it"
