"""`torch.ops.prosparse.all_reduce`: the short sums of a step that several GPUs share, in one launch of each.

``all_reduce(part, mail, offsets, exchanges, rank, seconds)`` is the sum of all GPUs' `part`, float32, on each of them, in the
order of their ranks. The other tensors are a `PeerParallel`'s.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .. import peers
from ..driver import overlaps
from .parallel import TensorParallel

_LIBRARY = torch.library.Library("prosparse", "FRAGMENT")
_LIBRARY.define(
    "all_reduce(Tensor part, Tensor(a!) mail, Tensor offsets, Tensor(b!) exchanges, int rank, int seconds) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
torch.library.register_fake("prosparse::all_reduce", lambda part, *_: torch.empty_like(part), lib=_LIBRARY)


def _on_gpu(part: Tensor, mail: Tensor, offsets: Tensor, exchanges: Tensor, rank: int, seconds: int) -> Tensor:
    device, ranks, numbers = part.get_device(), offsets.numel(), part.numel()
    capacity = mail.numel() // peers.mail_words(ranks, 1)
    _check(part, mail, offsets, exchanges, rank, capacity)
    out, stream = torch.empty_like(part), torch.cuda.current_stream(device).cuda_stream
    pointers = [tensor.data_ptr() for tensor in (part, out, mail, offsets, exchanges)]
    kernel = peers.all_reduce_kernel(ranks, numbers, device)
    kernel.launch(stream, overlaps(stream), *pointers, rank, numbers, capacity, seconds)
    return out


def _check(part: Tensor, mail: Tensor, offsets: Tensor, exchanges: Tensor, rank: int, capacity: int) -> None:
    """ValueError before anything is launched."""
    if part.dtype != torch.float32 or not part.is_contiguous():
        raise ValueError(f"all_reduce: part must be contiguous float32, got {part.dtype} with strides {part.stride()}")
    dtypes = {"mail": (mail, torch.int64), "offsets": (offsets, torch.int64), "exchanges": (exchanges, torch.int32)}
    for name, (tensor, dtype) in dtypes.items():
        if tensor.dtype != dtype or tensor.device != part.device or not tensor.is_contiguous():
            raise ValueError(
                f"all_reduce: {name} must be contiguous {dtype} on {part.device}, got {tensor.dtype} on {tensor.device}"
            )
    if not 0 <= rank < offsets.numel():
        raise ValueError(f"all_reduce: rank {rank} is not one of {offsets.numel()}")
    if not 0 < part.numel() <= 2 * capacity or exchanges.numel() < peers.blocks_of(capacity):
        raise ValueError(f"all_reduce: {part.numel()} numbers, where the mail has room for 1 to {2 * capacity}")


_LIBRARY.impl("all_reduce", _on_gpu, "CUDA")


class PeerParallel(TensorParallel):
    """The processes of a group whose GPUs see each other's memory, for the launches of one stream.

    Short sums go through that memory in one launch, which overlaps its neighbours as ours do; all else goes the group's way.

    Parameters
    ----------
    parallel : TensorParallel
        Of the group. Its processes call this at the same time.
    device : torch.device
        The GPU of this process.
    numbers : int
        That a sum may have.

    Raises
    ------
    OSError
        In all processes, where they cannot: on different hosts, or GPUs that are not linked.
    """

    def __init__(self, parallel: TensorParallel, device: torch.device, numbers: int) -> None:
        super().__init__(parallel.group)
        capacity = min(peers.CAPACITY, -(-numbers // 2))
        memory = _taken(parallel, device.index, 8 * peers.mail_words(self.size, capacity))
        weakref.finalize(self, parallel.idle_memory.append, memory)
        capacity = memory.nbytes // 8 // peers.mail_words(self.size, 1)
        self._numbers = 2 * capacity
        with torch.inference_mode(False):
            self._mail: Tensor = from_dlpack(memory.words())
            self._offsets = torch.tensor(memory.offsets, device=device)
            self._exchanges = torch.zeros(peers.blocks_of(capacity), dtype=torch.int32, device=device)

    def sum(self, partial: Tensor) -> Tensor:
        # The sum of two that is rounded once is the one that is added in their own dtype.
        if partial.numel() > self._numbers or not (partial.dtype == torch.float32 or self.size == 2):
            return super().sum(partial)
        part = partial.float().contiguous()
        total: Tensor = torch.ops.prosparse.all_reduce(
            part, self._mail, self._offsets, self._exchanges, self.rank, peers.SECONDS
        )
        return total.to(partial.dtype)


def _taken(parallel: TensorParallel, device: int, nbytes: int) -> peers.SharedMemory:
    """Memory of at least so many bytes that all processes have left, or new memory."""
    idle = {memory.number: memory for memory in parallel.idle_memory if memory.nbytes >= nbytes and memory.device == device}
    common = set.intersection(*map(set, parallel.told([*idle])))
    if not common:
        parallel.shared_memories += 1
        return peers.SharedMemory(parallel.shared_memories, nbytes, device, parallel.rank, parallel.told)
    memory = idle[min(common)]
    memory.clear(parallel.told)
    parallel.idle_memory.remove(memory)
    return memory
