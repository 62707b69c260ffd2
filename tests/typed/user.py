"""What a user's type checker must make of the public functions. Checked by `test_types`, never run."""

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import assert_type

import prosparse_cupy as psc
from prosparse_cupy.torch import PatchReport, SparseGatedMLP, measure_sparsity, patch_model

Floats = npt.NDArray[np.float32]


def on_numpy(x: Floats, w: Floats, gate: Floats) -> None:
    assert_type(psc.ffn_1(x, w), Floats)
    assert_type(psc.ffn_1(x, w, bias=gate), Floats)
    assert_type(psc.ffn_12(x, w, activation="relu2", bias=gate), Floats)
    assert_type(psc.ffn_12(x, psc.compress(w)), Floats)
    assert_type(psc.ffn_123(x, w, w, 0.01, out=gate), Floats)
    assert_type(psc.ffn_123(x, w, w, activation="drelu", gate_bias=gate, up_bias=gate), Floats)
    assert_type(psc.ffn_4(gate, w, bias=x, norm_weight=gate, norm_eps=1e-6), Floats)
    assert_type(psc.sparse_ffn(x, None, w, w, activation="relu2", up_bias=gate, down_bias=x), Floats)
    assert_type(psc.SparseFFN(None, w, w, activation="relu2", norm_weight=gate, norm_eps=1e-6)(x), Floats)
    assert_type(psc.ffn_23(gate, x, w), Floats)
    assert_type(psc.ffn_4(gate, w, specialize=False), Floats)
    assert_type(psc.pack_down(w), Floats)
    assert_type(psc.sparse_ffn(x, w, w, w), Floats)
    assert_type(psc.SparseFFN(w, w, w)(x), Floats)
    assert_type(psc.reference.active(gate), npt.NDArray[np.bool_])
    assert_type(psc.compress(w), psc.CompressedWeight[Floats])
    assert_type(psc.compress(w).decompress(), Floats)
    assert_type(psc.ffn_1(x, psc.compress(w)), Floats)
    assert_type(psc.SparseFFN(psc.compress(w), w, psc.compress(w, layout="slices"))(x), Floats)


def on_torch(x: torch.Tensor, linear: torch.nn.Linear, model: torch.nn.Module) -> None:
    w = linear.weight.detach()
    assert_type(psc.ffn_1(x, w), torch.Tensor)
    assert_type(psc.ffn_1(x, linear.weight), torch.Tensor)
    ffn = psc.SparseFFN(w, w, psc.pack_down(w), threshold=0.01)
    assert_type(ffn(x, out=x), torch.Tensor)
    assert_type(patch_model(model), PatchReport)
    assert_type(SparseGatedMLP(64, 128).threshold, float | None)
    assert_type(measure_sparsity(model, x).sparsity, float)


def facts() -> None:
    assert_type(psc.models.LLAMA_2_7B.d_ff, int)
    assert_type(psc.warmup(64, 128, dtype="float16"), list[psc.CompiledKernel])
    psc.warmup(64, 128, dtype=torch.bfloat16)
    psc.warmup(64, 128, dtype=np.float32, activation="relu2", gated=False, bias=True, norm=True)


def mistakes(x: Floats, w: Floats, t: torch.Tensor) -> None:
    psc.ffn_1("x", w)  # error
    psc.ffn_1(x, psc.compress(t))  # error
    psc.compress(w, layout="columns")  # error
    psc.compress("w")  # error
    psc.ffn_1(x, "w")  # error
    psc.ffn_1(3, w)  # error
    psc.ffn_4(x, w, out="y")  # error
    psc.ffn_23(x, x, w, "0.1")  # error
    psc.SparseFFN(w, w, "w")  # error
    psc.SparseFFN(w, None, w)  # error
    psc.ffn_12(x, w, activation=2)  # error
    psc.ffn_1(x, w, bias="b")  # error
    psc.ffn_23(x, x, w, bias=psc.compress(w))  # error
    psc.ffn_4(x, w, norm_eps="1e-6")  # error
    psc.warmup("64", 128)  # error
    patch_model("model")  # error
