"""The gated FFN of a LLaMA-like model as a module that decodes sparsely."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .activation import FATReLU

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class SparseGatedMLP(nn.Module):
    """``down_proj(fatrelu(gate_proj(x)) * up_proj(x))``: one token by the sparse operators, more by the dense path.

    Both paths read the same weights: `down_proj.weight` is the transposed view of a contiguous (d_ff, d_model) buffer, so that
    a neuron is one contiguous row, and there is no second copy. Names and shapes in the state dict are those of a LLaMA MLP.

    Parameters
    ----------
    d_model, d_ff : int
        The model's width, a multiple of 8 (4 for float32), and the number of neurons.
    threshold : float, default 0.0
        FATReLU's T; 0 is ReLU.
    device, dtype : optional
        As for `torch.nn.Linear`; bfloat16, float16 or float32.
    """

    def __init__(self, d_model: int, d_ff: int, threshold: float = 0.0, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        linear = partial(nn.Linear, bias=False, device=device, dtype=dtype)
        self.gate_proj, self.up_proj, self.down_proj = linear(d_model, d_ff), linear(d_model, d_ff), linear(d_ff, d_model)
        self.act_fn = FATReLU(threshold)
        self.counts: Tensor | None = None
        """Active neurons and all neurons so far, (2,) int64, where a `SparsityMeter` counts them."""
        self._replaced: tuple[nn.Module, ...] = ()
        self.register_load_state_dict_post_hook(lambda module, _: pack(module.down_proj))
        pack(self.down_proj)

    @classmethod
    def from_mlp(cls, mlp: nn.Module, threshold: float = 0.0) -> SparseGatedMLP:
        """Of a LLaMA-like MLP: bias-free `gate_proj`, `up_proj` and `down_proj`, the activation FATReLU of `threshold`.

        The three `nn.Linear` are shared with `mlp`, not copied; `down_proj.weight` changes its layout in memory, not its
        values.
        """
        d_ff, d_model = mlp.gate_proj.weight.shape
        sparse = cls(d_model, d_ff, threshold, device="meta")
        sparse.gate_proj, sparse.up_proj, sparse.down_proj = (getattr(mlp, name) for name in PROJECTIONS)
        sparse._replaced = (mlp,)
        pack(sparse.down_proj)
        return sparse.train(mlp.training)

    @property
    def replaced(self) -> nn.Module | None:
        """The module that `from_mlp` made this one of; no submodule."""
        return self._replaced[0] if self._replaced else None

    @property
    def d_model(self) -> int:
        return self.gate_proj.in_features

    @property
    def d_ff(self) -> int:
        return self.gate_proj.out_features

    @property
    def threshold(self) -> float:
        return self.act_fn.threshold

    def forward(self, x: Tensor) -> Tensor:
        """The FFN of `x`, (..., d_model); inference only where `x` is one token."""
        if x.numel() == x.shape[-1]:
            return self._sparse(x.reshape(-1)).view(x.shape)
        x1 = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if self.counts is not None:
            count_active(self.counts, x1)
        return self.down_proj(x1)

    def _sparse(self, token: Tensor) -> Tensor:
        w_gate, w_up, w_down_t = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight.t()
        if self.counts is not None:
            x1 = torch.ops.prosparse.ffn_123(token, w_gate, w_up, self.act_fn.threshold)
            count_active(self.counts, x1)
            return torch.ops.prosparse.ffn_4(x1, w_down_t)
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not token.is_cuda:
            return torch.ops.prosparse.sparse_ffn.default(token, w_gate, w_up, w_down_t, self.act_fn.threshold)
        return ops.sparse_ffn(token, w_gate, w_up, w_down_t, self.act_fn.threshold)  # the dispatcher costs 13 µs


def pack(down_proj: nn.Linear) -> None:
    """Lay the weight out so that its transpose is contiguous: the same parameter, shape and values."""
    weight = down_proj.weight
    if not weight.t().is_contiguous():
        weight.data = weight.data.t().contiguous().t()


def unpack(down_proj: nn.Linear) -> None:
    """The inverse of `pack`: `nn.Linear`'s own layout."""
    down_proj.weight.data = down_proj.weight.data.contiguous()


def count_active(counts: Tensor, x1: Tensor) -> None:
    """Add the nonzero elements of `x1` and all of them to `counts`, on the device, without waiting for it."""
    counts[0] += torch.count_nonzero(x1)
    counts[1] += x1.numel()
