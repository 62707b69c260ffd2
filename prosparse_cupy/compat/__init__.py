"""The call signatures of the operators' first release (github.com/Raincleared-Song/sparse_gpu_operator).

Change ``import ffn_23, ffn_4`` into ``from prosparse_cupy.compat import ffn_23, ffn_4`` and the rest of a script stays. Three
things differ: other dims need no source edit, a gate that equals the threshold is kept (the paper's FATReLU) where the first
release dropped it, and mistakes raise.
"""

from . import ffn_4, ffn_23

__all__ = ["ffn_4", "ffn_23"]
