"""Tensors that are not plain memory: refused by name before anything is launched."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest

import prosparse_cupy as psc

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.testing._internal.two_tensor import TwoTensor  # noqa: E402
from torch_devices import DEVICES  # noqa: E402

import prosparse_cupy.torch  # noqa: E402  registers the ops
from prosparse_cupy.libraries import family_of  # noqa: E402

D_MODEL, D_FF = 16, 24


def _tensors(device: str = "cpu"):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=rng).to(device) for shape in ((D_MODEL,), (D_FF, D_MODEL))]


class Wrapper(torch.Tensor):
    """Data that only its own code knows, as DTensor has it."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


class Plain(torch.Tensor):
    """A subclass with memory of its own, as many libraries have one for a name."""


def _nested(w):
    return torch.nested.as_nested_tensor([w, w])


def _jagged(w):
    return torch.nested.as_nested_tensor([w, w], layout=torch.jagged)


STRANGE = {
    "wrapper": (Wrapper, "Wrapper, a tensor subclass that is not plain memory"),
    "two tensors": (lambda w: TwoTensor(w, w), "TwoTensor, a tensor subclass that is not plain memory"),
    "fake": (lambda w: FakeTensorMode().from_tensor(w), "FakeTensor, a tensor subclass that is not plain memory"),
    "jagged": (_jagged, "NestedTensor, a tensor subclass that is not plain memory"),
    "uninitialised": (
        lambda w: torch.nn.UninitializedParameter(device=w.device),
        "UninitializedParameter, which has no memory yet",
    ),
    "nested": (_nested, "a nested tensor"),
    "sparse": (lambda w: w.to_sparse(), "a tensor of layout torch.sparse_coo"),
    "sparse rows": (lambda w: w.to_sparse_csr(), "a tensor of layout torch.sparse_csr"),
    "quantised": (
        lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
        "must be bfloat16, float16 or float32, got torch.qint8",
    ),
    "meta": (lambda w: w.to("meta"), "got a torch array in host memory, on the meta device or the like"),
    "functional": (torch._to_functional_tensor, "a functional tensor"),
}


@pytest.mark.filterwarnings("ignore:.*prototype")
@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", STRANGE)
def test_tensors_without_memory_are_refused_by_name(kind, device):
    x, w = _tensors(device)
    make, message = STRANGE[kind]
    strange = make(w)
    host = "must be on a CUDA GPU, got a torch array in host memory"  # x, on the CPU, may be what is named first
    for call in (
        lambda: psc.ffn_1(x, strange),
        lambda: psc.sparse_ffn(x, w, strange, w),
        lambda: psc.pack_down(w.t().contiguous(), out=strange),
        lambda: psc.SparseFFN(w, w, strange),
    ):
        with pytest.raises(TypeError) as caught:
            call()
        assert message in str(caught.value) or (
            device == "cpu" and kind in ("meta", "functional") and host in str(caught.value)
        )


@pytest.mark.parametrize("device", DEVICES)
def test_inside_a_transform(device):
    x, w = _tensors(device)
    with pytest.raises(TypeError, match=r"x must be a plain strided array in GPU memory, got a tensor inside a torch\.func"):
        torch.vmap(lambda x: psc.ffn_1(x, w))(x.expand(3, -1))


@pytest.mark.gpu
def test_subclasses_with_memory_are_taken(torch_gpu):
    x, w = _tensors("cuda")
    expected = psc.ffn_1(x, w)
    for kind in (Plain, torch.nn.Parameter):
        given = w.as_subclass(kind) if kind is Plain else kind(w)
        assert torch.equal(psc.ffn_1(x, given).as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["ffn_1", "ffn_4", "sparse_ffn"])
def test_meta_weights_beside_real_tokens_give_no_memory_that_nobody_wrote(name, device):
    x, w = _tensors(device)
    x1 = torch.randn(D_FF).to(device)
    given = {"ffn_1": (x, w), "ffn_4": (x1, w), "sparse_ffn": (x, w, w, w)}[name]
    op = getattr(torch.ops.prosparse, name)
    with torch.inference_mode():
        for i in range(1, len(given)):
            wrong = [a.to("meta") if j == i else a for j, a in enumerate(given)]
            with pytest.raises(ValueError, match=rf"{name}: w_\w+ must be on the device of x1?, {device}.*, got meta: move it"):
                op(*wrong)
        with pytest.raises(ValueError, match=rf"{name}: out must be on the device of"):
            op.out(*given, out=op(*given).to("meta"))
        assert op(*(a.to("meta") for a in given)).device.type == "meta", "shapes alone are fine"


@pytest.mark.parametrize("kind", ["none", "half imported"])
def test_torch_that_is_not_there(monkeypatch, kind):
    family_of.cache_clear()
    monkeypatch.setitem(sys.modules, "torch", None if kind == "none" else ModuleType("torch"))
    monkeypatch.setitem(sys.modules, "cupy", None if kind == "none" else ModuleType("cupy"))
    x, w = (t.numpy() for t in _tensors())
    assert psc.ffn_1(x, w).shape == (D_FF,)
    with pytest.raises(TypeError, match=r"must be a CuPy array.* got builtins\.list"):
        psc.ffn_1([1.0], w)
    np.testing.assert_array_equal(psc.sparse_ffn(x, w, w, w), psc.reference.sparse_ffn(x, w, w, w))
    family_of.cache_clear()
