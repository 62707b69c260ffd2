"""The gated FFN of a LLaMA-like model as a module that decodes sparsely."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ffn import SparseFFN, sparse_ffn
from .activation import FATReLU
from .dispatch import (
    TorchWeight,
    dispatched,
    does_more,
    forward_is_torchs,
    is_cast,
    is_recorded,
    is_taken,
    is_watched,
    plain_or_packed,
)
from .linears import CompressedLinear

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
        self._bound: tuple[Any, SparseFFN[Tensor]] | None = None
        """Compressed weights as they were at the last call; they are kept, so no other has the id of one."""
        self.register_load_state_dict_post_hook(_pack_what_was_loaded)  # type: ignore[no-untyped-call]
        pack(self.down_proj)

    @classmethod
    def from_mlp(cls, mlp: Any, threshold: float = 0.0) -> SparseGatedMLP:
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
    def threshold(self) -> float | None:
        """FATReLU's T, or None where `act_fn` has been replaced by something else."""
        return self.act_fn.threshold if isinstance(self.act_fn, FATReLU) else None

    def forward(self, x: Tensor) -> Tensor:
        """The FFN of `x`, (..., d_model).

        One token goes through the sparse operators, unless gradients are recorded or the modules are not those of an FFN that
        was patched any more: a LoRA adapter, a hook, a bias, another activation and the like take the dense path, which calls
        the modules as they are.
        """
        if x.numel() == x.shape[-1] and (y := self._sparse(x)) is not None:
            return y
        x1 = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if self.counts is not None:
            count_active(self.counts, x1)
        dense: Tensor = self.down_proj(x1)
        return dense

    def _sparse(self, x: Tensor) -> Tensor | None:
        """One token by the sparse operators, or None where only calling the modules does what they do."""
        weights = self._plain_weights()
        if weights is None or is_cast(x) or is_recorded(x, weights):
            return None
        activation: Any = self._modules["act_fn"]
        token, threshold = x.flatten(), activation.threshold
        if self.counts is None and x.is_cuda and not is_watched():
            try:
                return self._called(token, weights, threshold).view_as(x)  # the dispatcher costs 8 µs
            except (TypeError, ValueError):  # what the operators refuse, the modules do, or refuse as they always did
                return None
        if not is_taken(token, *weights):
            return None
        if self.counts is None:
            return dispatched("sparse_ffn", token, weights, threshold).view_as(x)
        x1 = dispatched("ffn_123", token, weights[:2], threshold)
        count_active(self.counts, x1)
        return dispatched("ffn_4", x1, weights[2:]).view_as(x)

    def _called(self, token: Tensor, weights: tuple[TorchWeight, TorchWeight, TorchWeight], threshold: float) -> Tensor:
        """The operators themselves. Compressed weights are bound, so that one call and not each pays for looking at them."""
        w_gate, w_up, w_down_t = weights
        if isinstance(w_gate, Tensor) and isinstance(w_up, Tensor) and isinstance(w_down_t, Tensor):
            return sparse_ffn(token, w_gate, w_up, w_down_t, threshold)
        operands: tuple[Any, Any, Any] = (plain_or_packed(w_gate), plain_or_packed(w_up), plain_or_packed(w_down_t))
        key = (threshold, *((w.data_ptr(), w.dtype) if isinstance(w, Tensor) else id(w) for w in operands))
        bound = self._bound
        if bound is None or bound[0] != key:
            bound = self._bound = key, SparseFFN(*operands, threshold=threshold)
        return bound[1](token)

    def _apply(self, fn: Any, recurse: bool = True) -> SparseGatedMLP:
        self._bound = None  # which would keep the memory of before
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": None}

    def _plain_weights(self) -> tuple[TorchWeight, TorchWeight, TorchWeight] | None:
        """w_gate, w_up and w_down_t, if calling the modules does what it did when this one was made."""
        weights: list[TorchWeight] = []
        modules = self._modules
        for name in PROJECTIONS:
            linear: Any = modules.get(name)
            if type(linear) is CompressedLinear:
                if does_more(linear) or linear.transposed != (name == "down_proj"):
                    return None
                weights.append(linear)
                continue
            if type(linear) is not nn.Linear or does_more(linear):
                return None
            parameters = linear._parameters
            weight = parameters.get("weight")
            if parameters.get("bias") is not None or weight is None:
                return None
            weights.append(weight.mT if name == "down_proj" else weight)
        activation = modules.get("act_fn")
        if type(activation) is not FATReLU or activation.threshold is None or does_more(activation):
            return None
        if not forward_is_torchs():
            return None
        return weights[0], weights[1], weights[2]


def _pack_what_was_loaded(module: SparseGatedMLP, incompatible_keys: Any) -> None:
    pack(module.down_proj)


def pack(down_proj: nn.Linear) -> None:
    """Lay the weight out so that its transpose is contiguous: the same parameter, shape and values."""
    weight = down_proj._parameters.get("weight") if isinstance(down_proj, nn.Module) else None
    if isinstance(weight, Tensor) and not weight.t().is_contiguous():
        weight.data = weight.data.t().contiguous().t()


def unpack(down_proj: nn.Linear) -> None:
    """The inverse of `pack`: `nn.Linear`'s own layout."""
    weight = down_proj._parameters.get("weight")
    if isinstance(weight, Tensor) and not weight.is_contiguous():
        weight.data = weight.data.contiguous()


def count_active(counts: Tensor, x1: Tensor) -> None:
    """Add the nonzero elements of `x1` and all of them to `counts`, on the device, without waiting for it."""
    counts[0] += torch.count_nonzero(x1)
    counts[1] += x1.numel()
