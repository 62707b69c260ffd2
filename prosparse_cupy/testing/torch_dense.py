"""The dense FFN through torch, for comparison, and CUDA graphs of what torch launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.utils.dlpack

from ..driver import without_collections
from ..formula import Formula
from ..torch.activation import module_of
from . import timing
from .dense import Dense


def sees_gpu() -> bool:
    """Whether this torch can use a GPU."""
    return torch.cuda.is_available()


class TorchDense(Dense):
    """cuBLAS through torch: `mv`, or `mm` of several tokens, a threshold, a multiplication."""

    def __init__(self) -> None:
        self.name = f"torch {torch.__version__} (cuBLAS)"

    def adopt(self, array: object) -> torch.Tensor:
        return torch.utils.dlpack.from_dlpack(array)

    def capture(self, calls: Sequence[timing.Call]) -> timing.Call:
        return capture(calls)

    def mv(self, weights: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
        if x.ndim == 1:
            torch.mv(weights, x, out=out)
        else:
            torch.mm(x, weights.t(), out=out)

    def activate(self, pre: torch.Tensor, formula: Formula, out: torch.Tensor | None = None) -> torch.Tensor:
        activated = _activation(formula)(pre)
        return activated if out is None else out.copy_(activated)

    def norm(self, x1: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x1, x1.shape[-1:], weight, eps)


_activation = cache(module_of)


def capture(calls: Sequence[timing.Call], runs_before: int = 1) -> timing.Call:
    """`timing.capture` for launches through torch; the calls run `runs_before` times before they are captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # what the calls read may still be being written there
    with torch.cuda.stream(side):
        for _ in range(runs_before):
            for call in calls:
                call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with without_collections(), torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def eager_ffn(x: torch.Tensor, w_gate: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The FFN of one token as a model's code runs it: three `linear` and a ReLU, eagerly."""
    linear = torch.nn.functional.linear
    token = x[None]

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return linear(torch.relu(linear(token, w_gate)) * linear(token, w_up), w_down)

    return call
