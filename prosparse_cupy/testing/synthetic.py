"""Random FFN inputs with realistic masks, for the demo, the tests and the benchmarks. NumPy only.

In trained models some neurons are active far more often than others: the tenth of them that is active most carries about 36 %
of all activations. `popularity` draws such neurons and `hot_mask` a token's active set among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .truth import moved, to_numpy

# Standard deviation of the logarithm of a neuron's popularity: 1.1 gives the top tenth 36 % of activations at 89 % sparsity.
_SPREAD = 1.1
_MARGIN = 0.1  # of gates from the threshold, so that rounding to bfloat16 keeps the mask
_MOST_STEERED = 3  # times, each of which rounds anew
SHARE = 0.6
"""Of a token's active neurons, how many correlated tokens have in common."""


def active_count(d_ff: int, sparsity: float) -> int:
    """Active neurons of a token at this sparsity."""
    return round(d_ff * (1.0 - sparsity))


def popularity(d_ff: int, rng: np.random.Generator) -> np.ndarray:
    """How much each neuron is drawn to be active: (d_ff,) positive weights, log-normal."""
    return np.exp(rng.normal(0.0, _SPREAD, d_ff))


def hot_mask(popular: np.ndarray, sparsity: float, rng: np.random.Generator) -> np.ndarray:
    """A token's active neurons, (d_ff,) bool with exactly `active_count` set: a weighted draw without replacement."""
    mask = np.zeros(popular.shape, bool)
    mask[_drawn(popular, active_count(popular.size, sparsity), rng)] = True
    return mask


def uniform_mask(d_ff: int, sparsity: float, rng: np.random.Generator) -> np.ndarray:
    """The same number of active neurons, each as likely as any other."""
    return hot_mask(np.ones(d_ff), sparsity, rng)


def contiguous_mask(d_ff: int, sparsity: float, rng: np.random.Generator) -> np.ndarray:
    """All active neurons within one contiguous quarter of d_ff (or as little more as holds them)."""
    count = active_count(d_ff, sparsity)
    width = max(d_ff // 4, count)
    start = int(rng.integers(0, d_ff - width + 1))
    mask = np.zeros(d_ff, bool)
    mask[start + rng.permutation(width)[:count]] = True
    return mask


def correlated_masks(d_ff: int, sparsity: float, tokens: int, rng: np.random.Generator, share: float = SHARE) -> np.ndarray:
    """Active neurons of tokens that are alike, as those of one text are: (tokens, d_ff) bool, `active_count` set in each row.

    The model: a core of ``round(share * active)`` neurons, a hot draw, is active for every token; the rest of each token's
    neurons are a hot draw of its own among the others. Any two tokens so share the core, and beside it what chance adds.
    ``share=0`` gives independent tokens, and ``share=1`` equal ones.
    """
    count = active_count(d_ff, sparsity)
    core = np.zeros(d_ff, bool)
    core[_drawn(popularity(d_ff, rng), round(share * count), rng)] = True
    masks = np.tile(core, (tokens, 1))
    others = np.flatnonzero(~core)
    for mask in masks:
        mask[others[_drawn(popularity(len(others), rng), count - int(core.sum()), rng)]] = True
    return masks


def _drawn(popular: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """The numbers of `count` neurons: a weighted draw without replacement."""
    # The smallest of exponential arrival times with these rates are such a draw (Efraimidis and Spirakis, 2006).
    arrival = rng.exponential(size=popular.shape) / popular
    return np.argsort(arrival)[:count]


def gate_of(mask: np.ndarray, threshold: float, rng: np.random.Generator) -> np.ndarray:
    """Float32 gate values with this mask under FATReLU, far enough from the threshold that rounding to bfloat16 keeps it."""
    size = np.abs(rng.normal(0.0, 0.5, mask.shape)).astype(np.float32)
    return np.where(mask, threshold + _MARGIN + size, threshold - _MARGIN - size).astype(np.float32)


@dataclass(frozen=True)
class Layer:
    """One gated FFN and a token for it, all of one dtype."""

    x: np.ndarray
    w_gate: np.ndarray
    w_up: np.ndarray
    w_down: np.ndarray
    """(d_model, d_ff), `nn.Linear`'s layout."""
    mask: np.ndarray
    """(d_ff,) bool: the neurons that `x` makes active."""
    threshold: float


def weights(rows: int, columns: int, dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """Normal random weights scaled as an initialised `nn.Linear`'s: variance 1 / columns."""
    return (rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(np.sqrt(columns))).astype(dtype)


def steer(w_gate: Any, x: Any, gate: Any) -> None:
    """Move `w_gate`, a NumPy or CuPy array, so that ``x @ w_gate.T`` is `gate`, up to the rounding of its dtype.

    `x` is one token or has several as rows, and so does `gate`. Each row of weights moves by the least that does it, which is
    along the tokens (least squares).

    Raises
    ------
    ValueError
        Some gate is further off than what `gate_of` keeps from the threshold: the tokens are too many, or too much alike, to
        have these gates.
    """
    tokens, gates = x.astype(np.float32).reshape(-1, x.shape[-1]), gate.reshape(-1, gate.shape[-1])
    # A token's column of the pseudo-inverse is the shortest vector whose product with it is 1 and with the others 0.
    moves = moved(np.linalg.pinv(to_numpy(tokens).astype(np.float64), rcond=1e-6).T.astype(np.float32), x)
    for i in range(0, len(w_gate), 2048):
        part, off = slice(i, i + 2048), np.array([np.inf])
        for _ in range(_MOST_STEERED):
            rows = w_gate[part].astype(np.float32)
            for far, move in zip(_off(rows, tokens, gates[:, part]), moves, strict=True):
                rows += far[:, None] * move
            w_gate[part] = rows.astype(w_gate.dtype)
            off = np.array([float(abs(far).max()) for far in _off(w_gate[part].astype(np.float32), tokens, gates[:, part])])
            if (off < _MARGIN).all():
                break
        else:
            named = f"{len(tokens)} tokens of {x.shape[-1]} elements"
            raise ValueError(f"steer: {named} cannot have these gates: off by {off.max():.2g}")


def _off(rows: Any, tokens: Any, gates: Any) -> list[Any]:
    """How far each token's gates are from those wanted."""
    return [gate - (rows * token).sum(axis=1) for token, gate in zip(tokens, gates, strict=True)]


def layer(
    d_model: int,
    d_ff: int,
    dtype: np.dtype,
    sparsity: float,
    threshold: float,
    rng: np.random.Generator,
    progress: Callable[[str], None] = lambda message: None,
) -> Layer:
    """A random layer whose token has a `hot_mask` of this sparsity; `progress` is told before each weight matrix."""
    x = rng.standard_normal(d_model, dtype=np.float32).astype(dtype)
    mask = hot_mask(popularity(d_ff, rng), sparsity, rng)
    size = f"{d_ff * d_model / 1e6:.1f} M random weights"
    progress(f"w_gate, 1 of 3: {size}")
    w_gate = weights(d_ff, d_model, dtype, rng)
    steer(w_gate, x, gate_of(mask, threshold, rng))
    progress(f"w_up, 2 of 3: {size}")
    w_up = weights(d_ff, d_model, dtype, rng)
    progress(f"w_down, 3 of 3: {size}")
    return Layer(x, w_gate, w_up, weights(d_model, d_ff, dtype, rng), mask, threshold)
