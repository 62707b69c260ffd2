"""Compressed weights in torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from ..bf12 import ESCAPE, SLICES, Packed
from ..compressed import CompressedWeight, Layout

Facts = tuple[int, ...]
"""Of a weight in the dispatcher, which takes tensors and numbers alone: its layout and dims."""
FACTS_OF_PLAIN: Facts = (-1, 0, 0)

_LAYOUTS: tuple[Layout, ...] = ("rows", "slices")
_ESCAPE = ESCAPE - (1 << 32)  # as int32


def facts_of(weight: Tensor | CompressedWeight[Tensor]) -> Facts:
    """What `parts_of` leaves out."""
    if isinstance(weight, Tensor):
        return FACTS_OF_PLAIN
    return (_LAYOUTS.index(weight.layout), *weight.shape)


def parts_of(weight: Tensor | CompressedWeight[Tensor]) -> list[Tensor]:
    """The tensors of a weight; the last one of a compressed weight, in host memory, is its base and its number of escapes."""
    return [weight] if isinstance(weight, Tensor) else [*weight.arrays, numbers_of(weight)]


def numbers_of(weight: CompressedWeight[Tensor]) -> Tensor:
    """Base and escapes as a tensor, so that code compiled for one weight serves another."""
    return torch.tensor([weight.base, weight.escapes], dtype=torch.int64, device="cpu")


def packed_of(arrays: Sequence[Tensor], numbers: Tensor, facts: Facts) -> CompressedWeight[Tensor]:
    """The compressed weight of these parts."""
    layout, d_ff, d_model = facts
    base, escapes = numbers.tolist()
    *words, kept = arrays
    kept = kept.view(torch.bfloat16)
    if kept.dim() == 2 and len(kept) == 1 < escapes <= (kept.untyped_storage().nbytes() - kept.storage_offset() * 2) // 16:
        kept = kept.as_strided((escapes, 8), (8, 1))  # only the first was shown, see `CompressedLinear.show_one_escape`
    return CompressedWeight((d_ff, d_model), _LAYOUTS[layout], Packed(tuple(words), kept, base), escapes)


def weight_of(parts: list[Tensor], facts: Facts) -> Tensor | CompressedWeight[Tensor]:
    """The weight of an operator's parts: the inverse of `parts_of` and `facts_of`, or the one tensor of a plain weight."""
    return parts[0] if facts == FACTS_OF_PLAIN else checked_packed_of(parts, facts)


def checked_packed_of(parts: Sequence[Tensor], facts: Facts) -> CompressedWeight[Tensor]:
    """`packed_of` parts from elsewhere; ValueError where they are not of one weight."""
    if len(facts) != len(FACTS_OF_PLAIN) or not 0 <= facts[0] < len(_LAYOUTS) or len(parts) < 3:
        raise ValueError(f"a compressed weight in {len(parts)} parts with the facts {facts}: take both from one weight")
    *words, kept, numbers = parts
    if any(p.dtype is not torch.int32 for p in words) or kept.element_size() != 2:
        found = ", ".join(str(p.dtype) for p in parts[:-1])
        raise ValueError(f"a compressed weight of {found}: its parts are of int32 and 16 bits")
    if numbers.device.type != "cpu" or numbers.dtype is not torch.int64 or numbers.shape != (2,):
        raise ValueError(
            f"a compressed weight whose last part is {numbers.dtype} of shape {tuple(numbers.shape)} on {numbers.device}: its "
            "base and its number of escapes are int64 on the CPU"
        )
    packed = packed_of(parts[:-1], numbers, facts)
    if packed.misfit:
        raise ValueError(f"a compressed weight whose parts do not fit its facts {facts}: {packed.misfit}")
    return packed


def why_not_these_escapes(weight: CompressedWeight[Tensor]) -> str:
    """Why a weight from elsewhere is not to be read, or nothing: a chunk that escapes says where its plain bytes lie."""
    first, *others = weight.arrays[:-1]
    if weight.layout == "rows":
        places = [(first[..., 0], others[0])]
    else:
        where = SLICES.ORDER.argsort()
        places = [(first[..., where[c]], first[..., where[c + 2]]) for c in range(0, len(where), 3)]
    for numbers, high in places:
        wrong = numbers[(high == _ESCAPE) & ((numbers < 0) | (numbers >= weight.escapes))]
        if len(wrong):
            return f"a chunk of weights is number {int(wrong[0])} of {weight.escapes} that are kept as they are"
    return ""


def on_host(weight: Tensor | CompressedWeight[Tensor], as_numpy: Callable[[Tensor], np.ndarray]) -> Any:
    """A weight in host memory as NumPy's."""
    if isinstance(weight, Tensor):
        return as_numpy(weight)
    *words, kept = (as_numpy(a) for a in weight.arrays)
    packed = Packed(tuple(words), kept.view(ml_dtypes.bfloat16), weight.base)
    return CompressedWeight(weight.shape, weight.layout, packed, weight.escapes)
