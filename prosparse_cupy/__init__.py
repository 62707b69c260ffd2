"""Exact sparse FFN decoding for ReLU-activated LLMs on NVIDIA GPUs, as CuPy raw kernels."""

from . import models, reference
from .compiler import KernelCompileError
from .compressed import CompressedWeight, compress
from .device import NoGPUError, UnsupportedGPUError
from .ffn import CompiledKernel, SparseFFN, sparse_ffn, warmup
from .ops import ffn_1, ffn_4, ffn_12, ffn_23, ffn_123, pack_down

__version__ = "0.1.0"

__all__ = [
    "CompiledKernel",
    "CompressedWeight",
    "KernelCompileError",
    "NoGPUError",
    "SparseFFN",
    "UnsupportedGPUError",
    "compress",
    "ffn_1",
    "ffn_4",
    "ffn_12",
    "ffn_23",
    "ffn_123",
    "models",
    "pack_down",
    "reference",
    "sparse_ffn",
    "warmup",
]
