"""Attention of new tokens over static caches: the launch of ``kernels/attend.cu``, and how it shares the work."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from .compiler import Kernel, loading, target_of
from .formats import vector_length
from .launch import Launch
from .problem import WARP

_WARPS = 8
_BLOCKS = 256  # of eight warps: about two a multiprocessor, which hold them both where heads do not share keys
_MOST_SPLITS = 32
_MOST_HEADS = 4  # of a block: more would not fit its registers
_MOST_TOKENS = 8  # of a launch, as of the operators
_MOST_ELEMENTS = 1024  # of a block's heads: their sums, one set a warp, lie in shared memory


class Attention(NamedTuple):
    """What the launch depends on."""

    dtype: str
    heads: int
    """Of the query."""
    kv_heads: int
    head_dim: int
    sequences: int = 1
    """With a cache and a position each."""
    tokens: int = 1
    """In a row, of each sequence."""

    @property
    def misfit(self) -> str:
        """Why the kernel does not take it, or nothing."""
        if self.heads < 1 or self.kv_heads < 1 or self.heads % self.kv_heads:
            return f"{self.heads} heads of the query do not share {self.kv_heads} heads of keys evenly"
        vector = vector_length(self.dtype)
        if not 0 < self.head_dim <= _MOST_ELEMENTS // 4 or self.head_dim % vector:
            return f"a head of {self.head_dim} elements is not a multiple of {vector} up to {_MOST_ELEMENTS // 4}"
        if not 1 <= self.sequences * self.tokens <= _MOST_TOKENS:
            return f"{self.sequences} sequences of {self.tokens} tokens are not 1 to {_MOST_TOKENS} tokens"
        return ""

    @property
    def heads_of_block(self) -> int:
        """Of those that read the same keys."""
        group = self.heads // self.kv_heads
        return max(n for n in range(1, _MOST_HEADS + 1) if group % n == 0 and n * self.head_dim <= _MOST_ELEMENTS)

    @property
    def blocks(self) -> int:
        """That have heads of their own."""
        return self.heads // self.heads_of_block

    @property
    def splits(self) -> int:
        """Blocks that share the positions of the same heads of a token.

        It decides the order of sums, so it follows from the shape of one token.
        """
        return max(1, min(_MOST_SPLITS, _BLOCKS // self.blocks))

    @property
    def partials(self) -> int:
        """Numbers in float32 that the blocks leave for the last one."""
        return self.sequences * self.tokens * self.heads * self.splits * (self.head_dim + 2)

    @property
    def tickets(self) -> int:
        """One for each block of heads of each token."""
        return self.sequences * self.tokens * self.blocks

    @property
    def scratch_words(self) -> int:
        """Words of 32 bits that a launch needs: `partials`, then `tickets`; zeros at first."""
        return self.partials + self.tickets


@cache
def attend_kernel(attention: Attention, device: int) -> Kernel:
    """The kernel on a GPU, compiled at the first call and kept."""
    with loading():
        return _load_once(attention, device)


@cache
def _load_once(attention: Attention, device: int) -> Kernel:
    return Kernel(attend_plan(attention, target_of(device).is_programmatic), device)


def attend_plan(attention: Attention, programmatic: bool) -> Launch:
    """The launch of an attention of this shape."""
    a = attention
    # With several tokens the launch waits for its predecessor's end: it was neither tested nor timed otherwise.
    programmatic = programmatic and a.sequences * a.tokens == 1
    defines = (
        (f"DTYPE_{a.dtype.upper()}", None),
        ("HEAD_DIM", a.head_dim),
        ("HEADS", a.heads_of_block),
        ("BLOCKS", a.blocks),
        ("SHARERS", a.heads // a.kv_heads // a.heads_of_block),
        ("SPLITS", a.splits),
        ("WARPS", _WARPS),
        ("SEQUENCES", a.sequences),
        ("TOKENS", a.tokens),
        *((("PROGRAMMATIC", None),) if programmatic else ()),
    )
    grid = a.splits * a.tokens, a.blocks, a.sequences
    return Launch("attend", grid, (WARP * _WARPS, 1, 1), defines, (*9 * ("P",), "f", "i", "i"), programmatic=programmatic)
