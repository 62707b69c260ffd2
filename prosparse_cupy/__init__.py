"""Exact sparse FFN decoding for ReLU-activated LLMs on NVIDIA GPUs, as CuPy raw kernels."""

from . import models, reference
from ._compile import KernelCompileError
from ._gpu import NoGPUError, UnsupportedGPUError
from .ops import CompiledKernel, SparseFFN, ffn_1, ffn_4, ffn_23, ffn_123, pack_down, sparse_ffn, warmup

__version__ = "0.1.0"

__all__ = [
    "CompiledKernel",
    "KernelCompileError",
    "NoGPUError",
    "SparseFFN",
    "UnsupportedGPUError",
    "ffn_1",
    "ffn_4",
    "ffn_23",
    "ffn_123",
    "models",
    "pack_down",
    "reference",
    "sparse_ffn",
    "warmup",
]
