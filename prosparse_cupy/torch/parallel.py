"""Tensor parallelism: processes that hold a shard each of a layer's neurons, and what they have to do together.

An FFN is split by its neurons: gate and up by rows, down by the same rows of its transpose. Each process computes its neurons'
part of y in float32; the parts are added, and y is rounded once. transformers splits models so when it loads them with
``tp_plan="auto"``: its projections then hold a `DTensor`, of which a process has its own part, and a `forward` that does what
the parts need.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..crossover import most_tokens
from ..peers import SharedMemory
from .dispatch import TorchWeight, decoded, few_tokens, is_watched
from .failures import FailedAlone, Failures

Style = Literal["colwise", "rowwise", "gathered"]
"""What of a projection a process holds: some of its outputs; some of its inputs, so that results are added; or some of its
outputs, which all processes then get from each other. The first two have transformers' names."""

_TRANSFORMERS = "transformers.distributed.tensor_parallel"
T = TypeVar("T")


class TensorParallel:
    """The processes of a group, as those that hold the shards of a module.

    Every process makes the same calls in the same order, as with all of torch.distributed.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
        NCCL's for modules on GPUs.
    """

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        self._group = weakref.ref(group)  # whoever keeps a destroyed group keeps its threads, which abort a process that ends
        self.name: str = group.group_name
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.failures = Failures(group, self.rank, self.size)
        self.shared_memories, self.idle_memory = 0, list[SharedMemory]()  # made so far, and those that no step has

    @property
    def group(self) -> Any:
        """The process group; RuntimeError once it has been destroyed."""
        group = self._group()
        if group is None:
            raise RuntimeError(f"the process group {self.name!r} that this module was split over has been destroyed")
        return group

    def is_of(self, group: Any) -> bool:
        """Whether it is that group."""
        return self._group() is group

    def why_not_on(self, device: torch.device) -> str:
        """Why the group cannot add what lies on a device, or nothing."""
        import torch.distributed as dist

        backend = dist.get_backend_config(self.group) if hasattr(dist, "get_backend_config") else dist.get_backend(self.group)
        if device.type == "cuda" and "nccl" not in str(backend):
            return f"its process group has the backend {backend}: GPUs need NCCL"
        return ""

    def sum(self, partial: Tensor) -> Tensor:
        """The sum of all processes' tensors, which may take the place of this one's."""
        if is_watched():
            functional = torch.ops._c10d_functional
            partial = functional.wait_tensor(functional.all_reduce(partial, "sum", self.name))
            return partial
        import torch.distributed as dist

        self.failures.stop()
        dist.all_reduce(partial, group=self.group)
        return partial

    def gather(self, part: Tensor) -> Tensor:
        """All processes' tensors of one shape, side by side along the last dim."""
        flat = part.reshape(1, -1, part.shape[-1])
        if is_watched():
            functional = torch.ops._c10d_functional
            parts: Tensor = functional.wait_tensor(functional.all_gather_into_tensor(flat, self.size, self.name))
        else:
            import torch.distributed as dist

            self.failures.stop()
            parts = flat.new_empty((self.size, *flat.shape[1:]))
            dist.all_gather_into_tensor(parts, flat.contiguous(), group=self.group)
        return parts.transpose(0, 1).reshape(*part.shape[:-1], -1)

    def share(self, tensor: Tensor) -> None:
        """Have a tensor hold what it holds in the first process."""
        import torch.distributed as dist

        self.failures.stop()
        dist.broadcast(tensor, src=dist.get_global_rank(self.group, 0), group=self.group)

    def told(self, what: T) -> list[T]:
        """What each process says, in the order of their ranks; waits for all, and fails if one has failed meanwhile."""
        said = self._gathered(("", False, what))
        for rank, (failure, is_memory, _) in enumerate(said):
            if failure:
                text = f"rank {rank} of {self.size} failed, so all stop: {failure}"
                error: Exception = MemoryError(text) if is_memory else RuntimeError(text)
                error.told = failure  # type: ignore[attr-defined]
                raise error
        return [word for _, _, word in said]

    def _gathered(self, what: Any) -> list[Any]:
        import torch.distributed as dist

        self.failures.stop()
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, what, group=self.group)
        return said

    def agreed(self, reason: str) -> str:
        """The first reason that any process has not to do something, and whose it is, or nothing."""
        said = self.told(reason)
        return next((f"{text} (rank {rank} of {self.size})" for rank, text in enumerate(said) if text), "")

    @contextmanager
    def together(self, *, adds: bool = False) -> Iterator[None]:
        """What one process fails in, all fail in, with its message, when they next tell each other something.

        What is run may call `told` and what uses it. If it also `adds` parts, the others may wait in a sum instead: then
        `Failures.shared` tells them.
        """
        try:
            yield
        except Exception as error:
            if not getattr(error, "told", "") and not isinstance(error, FailedAlone):
                self.failures.meets()
                if adds and not self.failures.all_meet():
                    raise FailedAlone(f"{type(error).__name__}: {error}") from error
                self._gathered((f"{type(error).__name__}: {error}", isinstance(error, MemoryError), None))
                error.told = str(error)  # type: ignore[attr-defined]
            raise
        self.failures.meets()
        self.told(None)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return any(self.told(flag))

    def refuse_others(self, function: str, facts: dict[str, Any]) -> None:
        """ValueError in every process if what must be the same in all of them is not."""
        said = self.told(facts)
        for name in facts:
            values = [str(other.get(name)) for other in said]
            if len({*values}) > 1:
                each = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
                raise ValueError(f"{function}: {name} must be the same in all processes of the group, got {each}")

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorParallel:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a shard belongs to the process group of this process and cannot be pickled: save its state_dict(), or call "
            "unpatch_model(model) first"
        )

    def __repr__(self) -> str:
        return f"TensorParallel(rank={self.rank}, size={self.size})"


class Sharding(NamedTuple):
    """How transformers has split a projection."""

    parallel: TensorParallel
    style: Style

    def whole(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """What the projection's `forward` returns of this process's result; sums are added in float32 whoever made them."""
        return self.joined(y.float()).to(dtype) if self.style == "rowwise" else self.joined(y)

    def joined(self, y: Tensor) -> Tensor:
        """The same of a result that is added in its own dtype, as transformers does."""
        if self.style == "rowwise":
            return self.parallel.sum(y)
        return self.parallel.gather(y) if self.style == "gathered" else y

    def decoded(self, x: Tensor, weight: TorchWeight, batch_invariant: bool = True) -> Tensor | None:
        """The projection of few tokens by `ffn_1`, of which `weight` is this process's part; None of what is for torch."""
        most = most_tokens("ffn_1", "plain" if isinstance(weight, Tensor) else "bf12")
        tokens = x.flatten() if x.dim() and x.numel() == x.shape[-1] else few_tokens(x, most)
        is_partial = self.style == "rowwise"
        if tokens is None or (y := decoded(tokens, weight, partial=is_partial, batch_invariant=batch_invariant)) is None:
            return None
        return self.whole(y, x.dtype).view(*x.shape[:-1], -1)


def is_split(tensor: Any) -> bool:
    """Whether a tensor is one of torch's that are spread over processes."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")  # no tensor is one before that has been imported
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: of one that is not spread, all of it."""
    local: Tensor = tensor._local_tensor if is_split(tensor) else tensor  # type: ignore[attr-defined]
    return local


def set_local(parameter: Tensor, data: Tensor) -> None:
    """Give a parameter other memory for what this process holds of it; the values are the same."""
    if is_split(parameter):
        parameter._local_tensor = data  # type: ignore[attr-defined]
    else:
        parameter.data = data


class Split(NamedTuple):
    """How a parameter is spread over processes, without what it holds."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size

    @classmethod
    def of(cls, parameter: Any) -> Split | None:
        """That of a parameter, None if it is whole."""
        return cls(parameter.device_mesh, parameter.placements, parameter.shape) if is_split(parameter) else None

    def of_local(self, local: Tensor) -> Tensor:
        """A tensor that is spread so, of which `local` is this process's part."""
        from torch.distributed.tensor import DTensor

        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=stride)

    def part_of(self, whole: Tensor) -> Tensor:
        """This process's part of a tensor of the parameter's shape, spread or not."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(whole, DTensor):
            whole = distribute_tensor(whole.to(self.mesh.device_type), self.mesh, self.placements, src_data_rank=None)
        elif tuple(whole.placements) != tuple(self.placements):
            whole = whole.redistribute(self.mesh, self.placements)
        return local_of(whole)


def stay_split(module: nn.Module, copied: nn.Module) -> None:
    """Have the copy of a module that transformers has split do what its parts need, too."""
    kept = _kept(module.__dict__["forward"])
    copied.__dict__.pop("forward", None)
    if {"self", "mesh"} <= kept.keys():  # without them it adds gradients alone
        kept["self"].install_forward(copied, kept["mesh"])


def hold_parts(module: nn.Module) -> None:
    """Give a copy of a module what this process holds of its parameters, as plain ones."""
    split = {name: p for name, p in module._parameters.items() if is_split(p)}
    parts = {name: nn.Parameter(local_of(p).detach(), requires_grad=False) for name, p in split.items() if p is not None}
    module._parameters = {**module._parameters, **parts}
    module.__dict__.pop("forward", None)


def forward_is_parallel(module: nn.Module) -> bool:
    """Whether all that calling a module does more than its class says is what transformers adds to a split projection."""
    own = module.__dict__.get("forward")
    hooked = module._forward_hooks or module._forward_pre_hooks
    return own is not None and not hooked and getattr(own, "__module__", "") == _TRANSFORMERS


_groups: dict[str, TensorParallel] = {}


def parallel_of_group(group: Any) -> TensorParallel:
    """The one `TensorParallel` of a group, of a mesh of one dim, or, for None, of all processes."""
    import torch.distributed as dist

    if group is None:
        group = dist.group.WORLD
    if hasattr(group, "get_group") and getattr(group, "ndim", 1) == 1:
        group = group.get_group()
    if not hasattr(group, "group_name"):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup that this process belongs to, got {group!r:.60}: initialise "
            "torch.distributed first, or pass torch.distributed.group.WORLD"
        )
    if (found := _groups.get(group.group_name)) is None or not found.is_of(group):
        found = _groups[group.group_name] = TensorParallel(group)
    return found


def sharding_of(linear: Any) -> Sharding | str | None:
    """How a projection is split, None if it is not, or why that is no way that is known here."""
    weight: Any = linear._parameters.get("weight") if isinstance(linear, nn.Module) else None
    if not is_split(weight):
        return None
    if not forward_is_parallel(linear):
        return "a DTensor that transformers has not split"
    if weight.device_mesh.ndim != 1:
        return f"split over a mesh of {weight.device_mesh.ndim} dims"
    style = _style_of(linear)
    if style is None:
        return f"split as {_placed(weight)}, by a {type(_layer_of(linear)).__name__}"
    return Sharding(parallel_of_group(weight.device_mesh.get_group()), style)


def _style_of(linear: Any) -> Style | None:
    from torch.distributed.tensor import Replicate, Shard

    layer, placements = _layer_of(linear), tuple(linear.weight.placements)
    name, local = type(layer).__name__, getattr(layer, "use_local_output", False)
    if not local or linear.weight.dim() != 2:
        return None
    reads, writes = layer.input_layouts, layer.output_layouts
    if name == "ColwiseParallel" and placements == (Shard(0),) and reads == Replicate():
        if writes == Shard(-1):
            return "colwise"
        evenly = linear.weight.shape[0] % linear.weight.device_mesh.size() == 0
        return "gathered" if writes == Replicate() and evenly else None
    if name == "RowwiseParallel" and placements == (Shard(1),) and reads == Shard(-1) and writes == Replicate():
        return "rowwise"
    return None


def _layer_of(linear: Any) -> Any:
    """The object of transformers that has split a module, which its forward keeps."""
    return _kept(linear.__dict__["forward"]).get("self")


def _kept(function: Any) -> dict[str, Any]:
    """What a function keeps of where it was made."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    return {name: cell.cell_contents for name, cell in cells}


def _placed(tensor: Any) -> str:
    return ", ".join(map(str, tensor.placements))


def sharding_of_all(linears: Sequence[Any], styles: Sequence[Style]) -> TensorParallel | str | None:
    """Whose shards projections are that belong together, None if they are whole, or why they do not fit each other."""
    found = [sharding_of(linear) for linear in linears]
    if all(s is None for s in found):
        return None
    for s in found:
        if isinstance(s, str):
            return s
    shardings = [s for s in found if isinstance(s, Sharding)]
    got = [s.style for s in shardings]
    if len(shardings) < len(found) or got != list(styles) or len({id(s.parallel) for s in shardings}) > 1:
        said = ", ".join("whole" if s is None else s.style for s in found if not isinstance(s, str))
        return f"its projections are split as {said}, where {', '.join(styles)} is needed"
    return shardings[0].parallel


def rows_of(rank: int, size: int, number: int) -> slice:
    """The neurons of a process: as many in each, or one more in the first ones."""
    least, more = divmod(number, size)
    start = rank * least + min(rank, more)
    return slice(start, start + least + (rank < more))


def parallel_of(model: nn.Module) -> TensorParallel | None:
    """The group whose processes hold parts of a model, or None."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None  # at once: every call of `generate` asks several times
    for module in model.modules():
        if isinstance(own := module.__dict__.get("parallel"), TensorParallel):
            return own
        if isinstance(sharding := module.__dict__.get("_sharding"), Sharding):
            return sharding.parallel
        weight: Any = module._parameters.get("weight")
        if is_split(weight) and weight.device_mesh.ndim == 1 and forward_is_parallel(module):
            return parallel_of_group(weight.device_mesh.get_group())
    return None


def with_all(parallel: TensorParallel | None, do: Callable[[], T]) -> T:
    """What a function without communication returns; if it fails in one process, all of a group fail."""
    if parallel is None:
        return do()
    with parallel.together():
        return do()


@contextmanager
def as_one(model: nn.Module) -> Iterator[TensorParallel | None]:
    """A call that all processes make which hold parts of a model: if it fails in one, the others fail too. Yields the group."""
    parallel = parallel_of(model)
    with nullcontext() if parallel is None else parallel.failures.shared():
        yield parallel
