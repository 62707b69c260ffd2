"""Launches as data: which kernel, on what grid, compiled with which constants. No CuPy, no GPU.

A `Problem` and its `Knobs` make a `Launch`, by pure functions, so that a launch can be checked, tested or run elsewhere (the
host build of the tests does) without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from .knobs import KINDS, Define, Knobs, kinds
from .measured import choose
from .problem import H100, KERNELS, Problem, Target
from .tensor_cores import ON_TENSOR_CORES, knobs_on_tensor_cores


@dataclass(frozen=True)
class Launch:
    """One kernel launch, apart from the pointers."""

    kernel: str
    """Stem of the `.cu` file and name of the `extern "C"` symbol."""
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    defines: tuple[Define, ...]
    """NVRTC defines; None for one without a value."""
    arguments: tuple[str, ...]
    """Each kernel parameter in `struct` characters: P a pointer, PP a struct of two, f float32, i int32."""
    shared_bytes: int = 0
    """Dynamic shared memory of a block."""
    partial_bytes: int = 0
    """Of sums that its blocks leave for one another. Then the last two arguments are their address and that of tickets."""
    programmatic: bool = False
    """Whether it may start while its predecessor on the stream ends (programmatic dependent launch)."""


def plan(problem: Problem, target: Target = H100, knobs: Knobs | None = None) -> Launch:
    """The launch of a problem on a GPU, with the knobs that were measured best for it, or with these.

    Raises
    ------
    ValueError
        Knobs that the kernel does not have, or cannot be launched with.
    """
    kernel, interface = problem.kernel, KERNELS[problem.kernel]
    chosen = knobs or knobs_on_tensor_cores(problem, target) or choose(problem, target)
    if type(chosen) not in (*kinds(kernel), ON_TENSOR_CORES.get(kernel)):
        raise ValueError(f"{kernel} has {KINDS[kernel].__name__}, not {type(chosen).__name__}")
    if wrong := chosen.legal(problem, target):
        raise ValueError(f"{kernel}: {chosen}: {wrong}")
    grid, block = chosen.shape(problem)
    programmatic = target.is_programmatic and interface.is_programmatic
    defines = (*_defines(problem), *chosen.defines(problem), *((("PROGRAMMATIC", None),) if programmatic else ()))
    arguments, shared, partial = _arguments(problem), chosen.shared_bytes(problem), chosen.partial_bytes(problem)
    more = ("P", "P") if partial else ()
    return Launch(kernel + chosen.suffix, grid, block, defines, (*arguments, *more), shared, partial, programmatic)


def _defines(problem: Problem) -> tuple[Define, ...]:
    """What the kernel is compiled with, apart from its knobs."""
    interface = KERNELS[problem.kernel]
    dims = (("ROW_OPT", problem.d_ff), ("COL_OPT", problem.d_model)) if problem.specialize else ()
    formats = ((weight, f.struct) for weight, f in zip(interface.weights, problem.formats, strict=True))
    activation = ((f"ACTIVATION_{problem.activation.upper()}", None),) if interface.has_activation else ()
    extras = ((name.upper(), int(name in problem.extras)) for name in interface.optional)
    partial = (("PARTIAL", None),) if problem.partial else ()
    dtype = f"DTYPE_{problem.dtype.upper()}", None
    return (dtype, *dims, ("TOKENS", problem.tokens), *formats, *activation, *extras, *partial)


def _arguments(problem: Problem) -> tuple[str, ...]:
    interface = KERNELS[problem.kernel]
    formats = dict(zip(interface.weights, problem.formats, strict=True))
    kinds = {"threshold": "f", "norm_eps": "f", "d_ff": "i", "d_model": "i"}
    return tuple("P" * formats[p].pointers if p in formats else kinds.get(p, "P") for p in interface.parameters)
