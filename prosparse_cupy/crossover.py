"""Up to how many tokens at once a patched module calls an operator; beyond, it takes its dense path on the same weights.

The one place that says so. The operators themselves take up to `arguments.MOST_TOKENS`. Pure data.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

Weights = Literal["plain", "bf12"]
"""How a module's weights lie in memory; "bf12" if any of them is compressed."""

_MOST_TOKENS: Mapping[str, Mapping[Weights, int]] = MappingProxyType(
    {
        "sparse_ffn": {"plain": 8, "bf12": 8},
        "ffn_12": {"plain": 8, "bf12": 8},
        "ffn_4": {"plain": 8, "bf12": 8},
        "ffn_1": {"plain": 8, "bf12": 8},
    }
)
"""By operator and weights. The dense path of compressed weights decompresses them first, so it starts to pay later.

`sparse_ffn` is a whole FFN, `ffn_12` and `ffn_4` are halves of one that are called apart (OPT's), `ffn_1` is any other matrix.
Eight tokens take 6 to 9 % longer through `ffn_1` on an H100 than through cuBLAS, but each has the bits that it has alone. So a
text does not depend on what stands beside it, nor on how many tokens are verified at once.
"""
MOST_TOKENS_OF_ANY = max(most for by_weights in _MOST_TOKENS.values() for most in by_weights.values())
"""The one limit for all operators in code that is compiled for any number of tokens: each further one would be a graph more."""


def most_tokens(operator: str, weights: Weights = "plain") -> int:
    """The largest number of tokens for which a module calls an operator."""
    return _MOST_TOKENS[operator][weights]
