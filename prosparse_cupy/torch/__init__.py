"""PyTorch and Hugging Face: the operators as torch ops, modules, and one line that patches a model.

Nothing outside this folder imports torch.
"""

from ..families import FAMILIES, MLPFamily, register_family
from . import ops as _ops  # noqa: F401  registers torch.ops.prosparse
from .activation import FATReLU, SquaredReLU, register_fatrelu
from .generation import decoding_loop, generate, prepare_generation
from .linears import CompressedLinear, DecodingLinear
from .loading import load_compressed
from .matrices import MatrixPatch
from .mlp import SparseGatedMLP, SparseMLP
from .patch import LayerPatch, PatchReport, patch_model, unpatch_model
from .sparsity import LayerSparsity, SparsityMeter, SparsityReport, measure_sparsity
from .steps import release_generation

__all__ = [
    "FAMILIES",
    "CompressedLinear",
    "DecodingLinear",
    "FATReLU",
    "LayerPatch",
    "LayerSparsity",
    "MLPFamily",
    "MatrixPatch",
    "PatchReport",
    "SparseGatedMLP",
    "SparseMLP",
    "SparsityMeter",
    "SparsityReport",
    "SquaredReLU",
    "decoding_loop",
    "generate",
    "load_compressed",
    "measure_sparsity",
    "patch_model",
    "prepare_generation",
    "register_family",
    "register_fatrelu",
    "release_generation",
    "unpatch_model",
]
