"""Compressed weights in modules and in torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from ..bf12 import Packed
from ..compressed import CompressedWeight, Layout, compress

TorchWeight: TypeAlias = "Tensor | CompressedWeight[Tensor]"
Facts = tuple[int, ...]
"""Of a weight in the dispatcher, which takes tensors and numbers alone: its layout, dims, base and escapes."""

_LAYOUTS: tuple[Layout, ...] = ("rows", "slices")
_FACTS_OF_PLAIN: Facts = (-1, 0, 0, 0, 0)


class CompressedLinear(nn.Module):
    """`torch.nn.Linear` without bias whose bfloat16 weight is in 12 bits, without loss.

    `patch_model(model, compress=True)` puts it in the place of an FFN's projections. Called with tokens, it decompresses its
    weight for the time of the call; `SparseGatedMLP` hands the compressed weight to the sparse operators. In a state dict it is
    an `nn.Linear`: its ``weight``, decompressed, in host memory.

    Parameters
    ----------
    weight : torch.Tensor, (out_features, in_features)
        bfloat16. It may be freed afterwards.
    transposed : bool, default False
        For a down-projection: the transpose of the weight is compressed, as `ffn_4` reads it.
    """

    bias: None = None

    def __init__(self, weight: Tensor, *, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self._requires_grad = weight.requires_grad
        self._take(weight)

    @classmethod
    def of_packed(cls, packed: CompressedWeight[Tensor], *, transposed: bool) -> CompressedLinear:
        """Of a weight that is compressed already, (d_ff, d_model)."""
        linear = cls.__new__(cls)
        nn.Module.__init__(linear)
        linear.transposed, linear._requires_grad = transposed, True
        linear.out_features, linear.in_features = packed.shape[::-1] if transposed else packed.shape
        linear._hold(packed)
        return linear

    def _take(self, weight: Tensor) -> None:
        """Hold this weight from now on."""
        self.out_features, self.in_features = weight.shape
        rows = weight.detach().t() if self.transposed else weight.detach()
        self._hold(compress(rows.contiguous(), layout="slices" if self.transposed else "rows"))

    def _hold(self, packed: CompressedWeight[Tensor]) -> None:
        self._facts = facts_of(packed)
        self._parts = len(packed.arrays)
        for i, array in enumerate(packed.arrays):
            # Integers, so that what casts floating buffers leaves them alone.
            self.register_buffer(f"part_{i}", array.view(torch.int16) if i == self._parts - 1 else array, persistent=False)
        self._packed: tuple[tuple[Tensor, ...], CompressedWeight[Tensor]] | None = None

    @property
    def packed(self) -> CompressedWeight[Tensor]:
        """The weight as the operators take it, (d_ff, d_model)."""
        buffers = self._buffers
        held = tuple([buffers[f"part_{i}"] for i in range(self._parts)])
        if self._packed is None or any(a is not b for a, b in zip(self._packed[0], held, strict=True)):
            self._packed = held, packed_of(held, self._facts)  # type: ignore[assignment, arg-type]
        return self._packed[1]  # type: ignore[index]

    @property
    def device(self) -> torch.device:
        device: torch.device = self.get_buffer("part_0").device
        return device

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features), decompressed anew, bit for bit."""
        plain = decompress(self.packed)
        return plain.t() if self.transposed else plain

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T``, (..., in_features) to (..., out_features)."""
        return nn.functional.linear(x, self.weight)

    def extra_repr(self) -> str:
        packed = self.packed
        return f"in_features={self.in_features}, out_features={self.out_features}, bias=False, ratio={packed.ratio:.4f}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight.detach().to("cpu").contiguous()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: Any,
        unexpected_keys: Any,
        error_msgs: Any,
    ) -> None:
        key = f"{prefix}weight"
        given = state_dict.get(key)
        if given is None:
            if strict:
                missing_keys.append(key)
            return
        if tuple(given.shape) != (self.out_features, self.in_features):
            expected = (self.out_features, self.in_features)
            error_msgs.append(f"size mismatch for {key}: {tuple(given.shape)} in the state dict, {expected} in the model")
            return
        with torch.no_grad():
            self._take(given.to(self.device, torch.bfloat16))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedLinear:
        becomes = fn(torch.empty(0, dtype=torch.bfloat16, device=self.device)).dtype
        if becomes is not torch.bfloat16:
            raise TypeError(
                f"CompressedLinear: compressed weights are bfloat16 and cannot become {becomes}: "
                "call unpatch_model(model) first"
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def linear(self) -> nn.Linear:
        """An `nn.Linear` with the same bits."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=torch.bfloat16)
        linear.weight = nn.Parameter(self.weight.contiguous(), requires_grad=self._requires_grad)
        return linear.train(self.training)


def facts_of(weight: TorchWeight) -> Facts:
    """What `parts_of` leaves out."""
    if isinstance(weight, Tensor):
        return _FACTS_OF_PLAIN
    return (_LAYOUTS.index(weight.layout), *weight.shape, weight.base, weight.escapes)


def parts_of(weight: TorchWeight) -> list[Tensor]:
    """The tensors of a weight."""
    return [weight] if isinstance(weight, Tensor) else list(weight.arrays)


def packed_of(parts: tuple[Tensor, ...] | list[Tensor], facts: Facts) -> CompressedWeight[Tensor]:
    """The compressed weight of these parts."""
    layout, d_ff, d_model, base, escapes = facts
    *words, kept = parts
    kept = kept.view(torch.bfloat16)
    return CompressedWeight((d_ff, d_model), _LAYOUTS[layout], Packed(tuple(words), kept, base), escapes)


def weight_of(parts: list[Tensor], facts: Facts) -> TorchWeight:
    """The inverse of `parts_of` and `facts_of`."""
    return parts[0] if facts == _FACTS_OF_PLAIN else checked_packed_of(parts, facts)


def checked_packed_of(parts: list[Tensor], facts: Facts) -> CompressedWeight[Tensor]:
    """`packed_of` parts from elsewhere; ValueError where they are not of one weight."""
    if len(facts) != len(_FACTS_OF_PLAIN) or not 0 <= facts[0] < len(_LAYOUTS) or len(parts) < 2:
        raise ValueError(f"a compressed weight in {len(parts)} parts with the facts {facts}: take both from one weight")
    if any(p.dtype is not torch.int32 for p in parts[:-1]) or parts[-1].element_size() != 2:
        raise ValueError(f"a compressed weight of {', '.join(str(p.dtype) for p in parts)}: its parts are of int32 and 16 bits")
    packed = packed_of(parts, facts)
    if packed.misfit:
        raise ValueError(f"a compressed weight whose parts do not fit its facts {facts}: {packed.misfit}")
    return packed


def decompress(packed: CompressedWeight[Tensor]) -> Tensor:
    """`packed.decompress()`, through the dispatcher where torch notes what is called."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        plain: Tensor = torch.ops.prosparse.decompress(parts_of(packed), facts_of(packed))
        return plain
    return packed.decompress()


def on_host(weight: TorchWeight, as_numpy: Callable[[Tensor], np.ndarray]) -> Any:
    """A weight in host memory as NumPy's."""
    if isinstance(weight, Tensor):
        return as_numpy(weight)
    *words, kept = (as_numpy(a) for a in weight.arrays)
    packed = Packed(tuple(words), kept.view(ml_dtypes.bfloat16), weight.base)
    return CompressedWeight(weight.shape, weight.layout, packed, weight.escapes)
