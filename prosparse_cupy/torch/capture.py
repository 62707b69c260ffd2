"""Captures into CUDA graphs, one at a time, and what must not be done meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ..driver import without_collections

_capturing = threading.Lock()
"""Held while something is captured: the default generator of a GPU is then part of the capture, whoever draws from it."""


@cache
def _side_stream(device: torch.device) -> Any:
    """The one stream of a GPU that captures come from: cuBLAS keeps 32 MiB for every stream that it has ever seen."""
    return torch.cuda.Stream(device)


def captured(function: Callable[[], None], device: torch.device, before: Callable[[], None]) -> Any:
    """The kernels that `function` launches as a CUDA graph, after `before` has run on the same stream."""
    side, graph = _side_stream(device), torch.cuda.CUDAGraph()
    with torch.cuda.device(device), _capturing:
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                before()
                side.synchronize()
                with without_collections():
                    graph.capture_begin(capture_error_mode="thread_local")
                    try:
                        function()
                    finally:
                        graph.capture_end()
        finally:  # after a failure too: the memory that was run on is freed, for the other stream to take
            torch.cuda.current_stream().wait_stream(side)
    return graph


def synchronize(device: torch.device) -> None:
    """Wait for all that a GPU has been given; while something is captured CUDA refuses that."""
    with _capturing:
        torch.cuda.synchronize(device)
