"""The checks of what the first release took for granted."""

from __future__ import annotations

from typing import Any

from ..arguments import MOST_TOKENS


def check_dims(operator: str, array: str, weights: Any, expected: dict[str, int]) -> None:
    """ValueError if `weights` is not shaped as the numbers passed with it say."""
    shape = tuple(getattr(weights, "shape", ()))
    if shape != tuple(expected.values()):
        raise ValueError(
            f"{operator}: {array} must have shape ({', '.join(expected)}) = {tuple(expected.values())} by the dims passed "
            f"with it, got {shape}: pass the arrays' own dims"
        )


def check_one_token(operator: str, array: str, vector: Any, successor: str) -> None:
    """ValueError if `vector` holds several tokens, which the first release's calls never did."""
    shape = tuple(getattr(vector, "shape", ()))
    if len(shape) == 2 and shape[0] != 1:
        raise ValueError(
            f"{operator}: {array} must hold one token, as in the first release, got shape {shape}: call "
            f"prosparse_cupy.{successor}, which takes up to {MOST_TOKENS}"
        )
