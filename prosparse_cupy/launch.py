"""Launches as data: which kernel, on what grid, compiled with which constants. No CuPy, no GPU.

A `Problem` and its `Knobs` make a `Launch`, by pure functions, so that a launch can be checked, tested or run elsewhere (the
host build of the tests does) without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .knobs import KINDS, ColumnKnobs, Knobs, SharedRowKnobs, order_of_ffn_4
from .measured import choose
from .problem import H100, WARP, WEIGHTS, Problem, Target, ceil_div

Define = tuple[str, "int | str | None"]


@dataclass(frozen=True)
class Launch:
    """One kernel launch, apart from the pointers."""

    kernel: str
    """Stem of the `.cu` file and name of the `extern "C"` symbol."""
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    defines: tuple[Define, ...]
    """NVRTC defines; None for one without a value."""
    arguments: str
    """Kernel parameters as `struct` characters: P pointer, f float32, i int32."""
    programmatic: bool = False
    """Whether it may start while its predecessor on the stream ends (programmatic dependent launch)."""


KERNELS = tuple(KINDS)
"""Every kernel."""
_ARGUMENTS = {"ffn_1": "PPPii", "ffn_123": "PPPPfii", "ffn_23": "PPPPfii", "ffn_4": "PPPii", "pack_down": "PPii"}
_ACTIVATING = ("ffn_123", "ffn_23")


def plan(problem: Problem, target: Target = H100, knobs: Knobs | None = None) -> Launch:
    """The launch of a problem on a GPU, with the knobs that were measured best for it, or with these.

    Raises
    ------
    ValueError
        Knobs that the kernel does not have, or cannot be launched with.
    """
    chosen = choose(problem, target) if knobs is None else knobs
    if type(chosen) is not KINDS[problem.kernel]:
        raise ValueError(f"{problem.kernel} has {KINDS[problem.kernel].__name__}, not {type(chosen).__name__}")
    if wrong := chosen.legal(problem, target):
        raise ValueError(f"{problem.kernel}: {chosen}: {wrong}")
    grid, block = _SHAPES[problem.kernel](problem, chosen)
    programmatic = target.is_programmatic and problem.kernel != "pack_down"
    defines = (*_defines(problem), *chosen.defines(), *((("PROGRAMMATIC", None),) if programmatic else ()))
    return Launch(problem.kernel, grid, block, defines, _ARGUMENTS[problem.kernel], programmatic)


def _defines(problem: Problem) -> tuple[Define, ...]:
    """What the kernel is compiled with, apart from its knobs."""
    dims = (("ROW_OPT", problem.d_ff), ("COL_OPT", problem.d_model)) if problem.specialize else ()
    formats = ((weight, f.struct) for weight, f in zip(WEIGHTS[problem.kernel], problem.formats, strict=True))
    activation = ((f"ACTIVATION_{problem.activation.upper()}", None),) if problem.kernel in _ACTIVATING else ()
    order = order_of_ffn_4(problem).defines() if problem.kernel == "ffn_4" else ()
    return ((f"DTYPE_{problem.dtype.upper()}", None), *dims, ("TOKENS", problem.tokens), *formats, *activation, *order)


Shape = tuple[tuple[int, int, int], tuple[int, int, int]]
"""Grid and block."""


def _row_per_warp(problem: Problem, knobs: Knobs) -> Shape:
    return (ceil_div(problem.d_ff, knobs.warps), 1, 1), (WARP * knobs.warps, 1, 1)


def _shared_rows(problem: Problem, knobs: SharedRowKnobs) -> Shape:
    return (ceil_div(problem.d_ff, knobs.rows or knobs.warps), 1, 1), (WARP * knobs.warps, 1, 1)


def _slices(problem: Problem, knobs: ColumnKnobs) -> Shape:
    return (ceil_div(problem.vectors, order_of_ffn_4(problem).lanes), 1, 1), (WARP * knobs.warps, 1, 1)


def _tiles(problem: Problem, knobs: Knobs) -> Shape:
    return (ceil_div(problem.d_ff, WARP), ceil_div(problem.d_model, WARP), 1), (WARP, knobs.warps, 1)


_SHAPES: dict[str, Callable[..., Shape]] = {
    "ffn_1": _row_per_warp,
    "ffn_123": _row_per_warp,
    "ffn_23": _shared_rows,
    "ffn_4": _slices,
    "pack_down": _tiles,
}
