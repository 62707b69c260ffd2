"""`torch.ops.prosparse.all_reduce`: the short sums of a step that several GPUs share, in one launch of each.

``all_reduce(part, shared, ranks, rank, capacity, seconds)`` is the sum of all GPUs' `part`, float32, on each of them, in the
order of their ranks. `shared`, int64, is the memory that they see of each other (`peers.Layout`). It is not declared as
changed: what is in it is the GPUs', and torch.compile must not put a copy in its place.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from .. import peers
from ..compiler import target_of
from ..driver import overlaps
from . import capture
from .parallel import TensorParallel

_LIBRARY = torch.library.Library("prosparse", "FRAGMENT")
_LIBRARY.define(
    "all_reduce(Tensor part, Tensor shared, int ranks, int rank, int capacity, int seconds) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
torch.library.register_fake("prosparse::all_reduce", lambda part, *_: torch.empty_like(part), lib=_LIBRARY)


def _on_gpu(part: Tensor, shared: Tensor, ranks: int, rank: int, capacity: int, seconds: int) -> Tensor:
    layout, device = peers.Layout(ranks, capacity), part.get_device()
    _check(part, shared, layout, rank)
    out, stream = torch.empty_like(part), torch.cuda.current_stream(device).cuda_stream
    offsets = shared.data_ptr()
    exchanges, mail = offsets + 8 * layout.exchanges, offsets + 8 * layout.mail
    kernel = peers.all_reduce_kernel(ranks, part.numel(), device)
    pointers = part.data_ptr(), out.data_ptr(), mail, offsets, exchanges
    kernel.launch(stream, overlaps(stream), *pointers, rank, part.numel(), capacity, seconds)
    return out


def _check(part: Tensor, shared: Tensor, layout: peers.Layout, rank: int) -> None:
    """ValueError before anything is launched."""
    if part.dtype != torch.float32 or not part.is_contiguous():
        raise ValueError(f"all_reduce: part must be contiguous float32, got {part.dtype} with strides {part.stride()}")
    if not 0 <= rank < layout.ranks:
        raise ValueError(f"all_reduce: rank {rank} is not one of {layout.ranks}")
    if not 0 < part.numel() <= 2 * layout.capacity:
        raise ValueError(f"all_reduce: {part.numel()} numbers, where there is room for 1 to {2 * layout.capacity}")
    if shared.dtype != torch.int64 or shared.device != part.device or not shared.is_contiguous():
        raise ValueError(f"all_reduce: shared must be contiguous int64 on {part.device}, got {shared.dtype} on {shared.device}")
    if shared.numel() < layout.words or shared.data_ptr() % 16:
        raise ValueError(f"all_reduce: shared must be {layout.words} words from a multiple of 16 bytes, got {shared.numel()}")


_LIBRARY.impl("all_reduce", _on_gpu, "CUDA")


class PeerParallel(TensorParallel):
    """The processes of a group whose GPUs see each other's memory, for the launches of one stream.

    Short vectors are added and gathered through that memory in one launch, which starts while its predecessor ends; all else
    goes the group's way.

    Parameters
    ----------
    parallel : TensorParallel
        Of the group. Its processes call this at the same time.
    device : torch.device
        The GPU of this process.
    numbers : int
        That a sum, or all that is gathered at once, may have.

    Raises
    ------
    OSError
        In all processes, where they cannot: too many, on different hosts, GPUs that are not linked, or without memory.
    """

    def __init__(self, parallel: TensorParallel, device: torch.device, numbers: int) -> None:
        super().__init__(parallel.group)
        self.failures = parallel.failures
        if not 2 <= self.size <= peers.MOST_RANKS:
            raise OSError(f"all_reduce adds the numbers of 2 to {peers.MOST_RANKS} GPUs, not of {self.size}")
        own = peers.capacity_of(numbers, target_of(device.index).multiprocessors)
        self._layout = peers.Layout(self.size, min(parallel.told(own)))
        memory = _taken(parallel, device, 8 * self._layout.words)
        self.failures.covers(memory)
        weakref.finalize(self, parallel.idle_memory.append, memory)
        with torch.inference_mode(False):
            self._shared: Tensor = from_dlpack(memory.words())
            self._shared[: self.size + 1] = torch.tensor(memory.offsets, device=device)

    def sum(self, partial: Tensor) -> Tensor:
        # Two halves that are added in float32 and rounded once have the bits of those that are added in their own dtype.
        is_exact = partial.dtype == torch.float32 or (self.size == 2 and partial.dtype in (torch.bfloat16, torch.float16))
        if partial.numel() > 2 * self._layout.capacity or not is_exact:
            return super().sum(partial)
        return self._added(partial.float().contiguous()).to(partial.dtype)

    def gather(self, part: Tensor) -> Tensor:
        if part.numel() * self.size > 2 * self._layout.capacity or not part.is_floating_point() or part.dtype == torch.float64:
            return super().gather(part)
        return self._added(among_zeros(part, self.rank, self.size)).to(part.dtype)

    def _added(self, part: Tensor) -> Tensor:
        total: Tensor = torch.ops.prosparse.all_reduce(
            part, self._shared, self.size, self.rank, self._layout.capacity, peers.SECONDS
        )
        return total


def among_zeros(part: Tensor, rank: int, size: int) -> Tensor:
    """All processes' tensors side by side along the last dim, in float32, but zeros in the places of the others.

    The sum over all processes is what they have: -0 changes no number that it is added to, a zero's sign included.
    """
    own = part.shape[-1]
    return nn.functional.pad(part.float(), (rank * own, (size - 1 - rank) * own), value=-0.0)


def _taken(parallel: TensorParallel, device: torch.device, nbytes: int) -> peers.SharedMemory:
    """Memory of at least so many bytes that all processes have left, or new memory."""
    index: int = device.index
    idle = {memory.number: memory for memory in parallel.idle_memory if memory.nbytes >= nbytes and memory.device == index}
    said = parallel.told((parallel.shared_memories, {*idle}))
    common = set.intersection(*(numbers for _, numbers in said))
    if not common:
        parallel.shared_memories = 1 + max(made for made, _ in said)
        return peers.SharedMemory(parallel.shared_memories, nbytes, index, parallel.rank, parallel.told)
    memory = idle[min(common)]
    capture.synchronize(device)  # a step that nobody has any more may still run
    memory.clear(parallel.told)
    parallel.idle_memory.remove(memory)
    return memory
