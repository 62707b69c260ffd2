"""Up to how many tokens at once a patched module calls an operator; beyond, it takes its dense path on the same weights.

The one place that says so. The operators themselves take up to `arguments.MOST_TOKENS`. Pure data.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

Weights = Literal["plain", "bf12"]
"""How a module's weights lie in memory; "bf12" if any of them is compressed."""

_PAYING: Mapping[str, Mapping[Weights, tuple[tuple[int, float], ...]]] = MappingProxyType(
    {
        "sparse_ffn": {"plain": ((2, 0.0), (4, 0.5), (8, 0.8)), "bf12": ((8, 0.0),)},
        "sparse_ffn without a gate": {"plain": ((2, 0.0), (4, 0.8), (8, 0.9)), "bf12": ((8, 0.0),)},
        "ffn_12": {"plain": ((8, 0.0),), "bf12": ((8, 0.0),)},
        "ffn_4": {"plain": ((2, 0.5), (8, 0.8)), "bf12": ((8, 0.0),)},
        "ffn_1": {"plain": ((8, 0.0),), "bf12": ((8, 0.0),)},
    }
)
"""By what is called and the weights: up to so many tokens pay where each leaves at least this share of neurons at zero.

`sparse_ffn` is a whole FFN, `ffn_12` and `ffn_4` are halves of one that are called apart (OPT's), `ffn_1` is any other matrix.
The shares of `sparse_ffn` and `ffn_4` are those measured from which on none of two shapes takes more than 1.02 times cuBLAS's
time, masks independent, with tensor cores from 5 tokens on (H100, bfloat16; docs/measurements.md, "Several tokens over
sparsities"). They are taken for float16 and float32 too. The dense path of compressed weights decompresses them first, which
takes longer than 8 tokens do at any sparsity.

Eight tokens take up to 12 % longer through `ffn_1` and `ffn_12`, which are dense, on an H100 than through cuBLAS, and 3 % less
to 2 % longer where blocks keep them, but each has the bits that it has alone. So a text does not depend on what stands beside
it, nor on how many tokens are verified at once.
"""
MOST_TOKENS_OF_ANY = max(most for by_weights in _PAYING.values() for steps in by_weights.values() for most, _ in steps)
"""The one limit for all operators in code that is compiled for any number of tokens: each further one would be a graph more."""


def most_tokens(called: str, weights: Weights = "plain", sparsity: float | None = None) -> int:
    """The largest number of tokens for which a module calls an operator, or an FFN without a gate, by its name in the table.

    `sparsity`, 0 to 1, is what is known of a layer whose tokens need not have the bits that they have alone. Where nothing is
    known, or bits must not vary, every layer is taken for one that leaves most neurons at zero. One token is never too many.
    """
    steps = _PAYING[called][weights]
    if sparsity is None:
        return steps[-1][0]
    return max((most for most, least in steps if sparsity >= least), default=1)
