"""Launches by shape, as the tests ask for them."""

from __future__ import annotations

from typing import NamedTuple

from prosparse_cupy import launch
from prosparse_cupy.knobs import Knobs
from prosparse_cupy.problem import H100, Problem, Target


class Shape(NamedTuple):
    """What all kernels of a layer are planned for."""

    d_model: int
    d_ff: int
    dtype: str
    specialize: bool = True
    target: Target = H100


def plan_of(kernel: str, shape: Shape, knobs: Knobs | None = None, **more) -> launch.Launch:
    """The launch of a kernel on a shape, with these knobs or those of the rule; `more` goes to its `Problem`."""
    return launch.plan(Problem(kernel, shape.d_model, shape.d_ff, shape.dtype, shape.specialize, **more), shape.target, knobs)
