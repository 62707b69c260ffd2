"""The operators' first release (github.com/Raincleared-Song/sparse_gpu_operator), where its modules are installed."""

from __future__ import annotations

import importlib
import importlib.util

from prosparse_cupy.testing.layers import FirstRelease


def first_release() -> FirstRelease | None:
    """`torch_launch_ffn_fuse_23` and `torch_launch_ffn_4` of the first release's modules, or None if they are not installed."""
    if not all(importlib.util.find_spec(name) for name in ("ffn_23", "ffn_4", "torch")):
        return None
    modules = importlib.import_module("ffn_23"), importlib.import_module("ffn_4")
    return modules[0].torch_launch_ffn_fuse_23, modules[1].torch_launch_ffn_4
