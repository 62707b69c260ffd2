"""Linear layers whose calls of few tokens read their weight at the speed of memory, plain or compressed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..compressed import CompressedWeight, compress
from ..crossover import most_tokens
from .compressed import facts_of, numbers_of, packed_of
from .dispatch import decoded, few_tokens
from .parallel import Sharding, Split, local_of, set_local, sharding_of


class DecodingLinear(nn.Linear):
    """`torch.nn.Linear` without bias: one token and a few go through `ffn_1`, more through torch.

    `patch_model` puts it in the place of a model's `nn.Linear`. It has the same parameter under the same name.

    Parameters
    ----------
    in_features, out_features, device, dtype
        As for `torch.nn.Linear`; bfloat16, float16 or float32, `in_features` a multiple of 8 (4 for float32).

    Attributes
    ----------
    batch_invariant : bool
        As for `ffn_1`; True at first.
    """

    batch_invariant: bool = True

    def __init__(self, in_features: int, out_features: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)
        self._replaced: tuple[nn.Module, ...] = ()  # what `patch_model` put it in the place of; no submodule
        self._sharding: Sharding | None = None

    @classmethod
    def of(cls, linear: nn.Linear) -> DecodingLinear:
        """Of an `nn.Linear` without bias, whose parameter it shares; of one that transformers has split, a part."""
        rows, columns = local_of(linear.weight).shape
        decoding = cls(columns, rows, device="meta")
        decoding.weight = linear.weight
        decoding._sharding = known_sharding(linear)
        return decoding.train(linear.training)

    def linear(self) -> nn.Linear:
        """An `nn.Linear` with the same parameter."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = self.weight
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """``input @ weight.T``, (..., in_features) to (..., out_features)."""
        if self._sharding is not None:
            return self._of_shard(input, self._sharding)
        if input.numel() == self.in_features == (shape := input.shape)[-1]:
            if self.bias is None and (y := decoded(input.flatten(), self.weight)) is not None:
                return y.view(*shape[:-1], -1)
        elif (
            self.bias is None
            and (tokens := few_tokens(input, most_tokens("ffn_1"))) is not None
            and (y := decoded(tokens, self.weight, batch_invariant=self.batch_invariant)) is not None
        ):
            return y.view(*input.shape[:-1], -1)
        return nn.functional.linear(input, self.weight, self.bias)

    def _of_shard(self, input: Tensor, sharding: Sharding) -> Tensor:
        """What the projection that transformers has split returns; with gradients, by calling it."""
        if torch.is_grad_enabled() and (self.weight.requires_grad or input.requires_grad) and self._replaced:
            before: Any = self._replaced[0]
            if before.weight is not self.weight:
                before.weight = self.weight
            whole: Tensor = before(input)
            return whole
        weight = local_of(self.weight)
        y = sharding.decoded(input, weight, self.batch_invariant)
        return sharding.whole(nn.functional.linear(input, weight), input.dtype) if y is None else y


class LinearShard(nn.Module):
    """What a process does of a projection that transformers has split, with its part of the parameters as plain ones.

    It has the results of the projection, to the bit. The projection itself swaps its `DTensor` parameters for their parts while
    it runs, which torch.compile does not follow everywhere.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, sharding: Sharding) -> None:
        super().__init__()
        self._sharding = sharding
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(local_of(linear.weight).detach(), requires_grad=False)
        bias = None if linear.bias is None else nn.Parameter(local_of(linear.bias).detach(), requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) or this process's share of them, to (..., out_features) or its share."""
        if self._sharding.style != "rowwise" or self.bias is None:
            return self._sharding.joined(nn.functional.linear(input, self.weight, self.bias))
        return self._sharding.joined(nn.functional.linear(input, self.weight)) + self.bias  # once


class CompressedLinear(nn.Module):
    """`torch.nn.Linear` whose bfloat16 weight is in 12 bits, without loss; a bias stays as it is.

    `patch_model(model, compress=True)` puts it in the place of a model's projections. Up to 8 tokens go through `ffn_1`, or,
    in a `SparseMLP`, through the sparse operators; for more it decompresses its weight for the time of the call. In a state
    dict it is an `nn.Linear`: its ``weight``, decompressed, in host memory.

    Parameters
    ----------
    weight : torch.Tensor, (out_features, in_features)
        bfloat16. It may be freed afterwards.
    transposed : bool, default False
        For a down-projection: the transpose of the weight is compressed, as `ffn_4` reads it.
    bias : torch.nn.Parameter, (out_features,), optional
        bfloat16; shared, not copied.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, *, transposed: bool = False, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.transposed = transposed
        self.register_parameter("bias", bias)
        self._replaced: tuple[nn.Module, ...] = ()  # what `patch_model` put it in the place of; no submodule
        self._split: Split | None = None  # how its weight was spread over processes, of which it has this one's part
        self._sharding: Sharding | None = None
        self.tie: object | None = None
        """The same object in all whose weights were one parameter."""
        self._requires_grad = weight.requires_grad
        self._take(weight)

    @classmethod
    def of_packed(cls, packed: CompressedWeight[Tensor], *, transposed: bool) -> CompressedLinear:
        """Of a weight that is compressed already, (d_ff, d_model)."""
        linear = cls.__new__(cls)
        nn.Module.__init__(linear)
        linear.register_parameter("bias", None)
        linear.transposed, linear._requires_grad, linear._replaced = transposed, True, ()
        linear._split, linear._sharding, linear.tie = None, None, None
        linear.out_features, linear.in_features = packed.shape[::-1] if transposed else packed.shape
        linear._hold(packed)
        return linear

    def _take(self, weight: Tensor) -> None:
        """Hold this weight from now on."""
        self.out_features, self.in_features = weight.shape
        rows = weight.detach().t() if self.transposed else weight.detach()
        self._hold(compress(rows.contiguous(), layout="slices" if self.transposed else "rows"))

    def _hold(self, packed: CompressedWeight[Tensor]) -> None:
        self.facts = facts_of(packed)
        self._numbers = numbers_of(packed)
        self._parts = len(packed.arrays)
        for i, array in enumerate(packed.arrays):
            # Integers, so that what casts floating buffers leaves them alone.
            self.register_buffer(f"part_{i}", array.view(torch.int16) if i == self._parts - 1 else array, persistent=False)
        self._packed: tuple[tuple[Tensor, ...], CompressedWeight[Tensor]] | None = None

    @property
    def packed(self) -> CompressedWeight[Tensor]:
        """The weight as the operators take it, (d_ff, d_model)."""
        held = self._arrays()
        if self._packed is None or any(a is not b for a, b in zip(self._packed[0], held, strict=True)):
            self._packed = held, packed_of(held, self._numbers, self.facts)
        return self._packed[1]

    def _arrays(self) -> tuple[Tensor, ...]:
        buffers: Any = self._buffers
        return tuple([buffers[f"part_{i}"] for i in range(self._parts)])

    @property
    def parts(self) -> list[Tensor]:
        """The weight as torch's dispatcher takes it, beside `facts`."""
        return [*self._arrays(), self._numbers]

    def take_place_of(self, linear: nn.Linear, name: str, *holders: nn.Module | None) -> None:
        """Be the submodule `name` of these, and remember what `unpatch_model` puts back, without its weight.

        The weight goes last, so that an interrupt at any moment leaves it where `unpatch_model` finds it.
        """
        self.train(linear.training)
        self._split, self._sharding = Split.of(linear.weight), known_sharding(linear)
        self._requires_grad = linear.weight.requires_grad
        self._replaced = (linear,)
        for holder in holders:
            setattr(holder, name, self)
        empty = torch.empty(0, dtype=linear.weight.dtype, device=linear.weight.device)
        linear.weight = nn.Parameter(empty, requires_grad=linear.weight.requires_grad)

    def put_back(self) -> nn.Linear:
        """The `nn.Linear` whose place this one took, or a new one, with the same bits."""
        linear = self.linear()
        if not self._replaced:
            return linear
        before: Any = self._replaced[0]
        before.weight, before.bias = linear.weight, self.bias
        if self._split is not None:
            before.weight = nn.Parameter(self._split.of_local(linear.weight.detach()), requires_grad=self._requires_grad)
        return before.train(self.training)  # type: ignore[no-any-return]

    def show_one_escape(self) -> None:
        """Have `parts` show but one of the escapes; the others lie behind it in memory, where `packed_of` finds them.

        Every matrix has another number of them, and code that is compiled for tensors of one shape should serve all.
        """
        name = f"part_{self._parts - 1}"
        self._buffers = {**self._buffers, name: self.get_buffer(name)[:1]}

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight as the operators take it, (d_ff, d_model)."""
        return self.facts[1], self.facts[2]

    @property
    def device(self) -> torch.device:
        device: torch.device = self.get_buffer("part_0").device
        return device

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features), decompressed anew, bit for bit."""
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
            plain: Tensor = torch.ops.prosparse.decompress(self.parts, self.facts)
        else:
            plain = self.packed.decompress()
        return plain.t() if self.transposed else plain

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``, (..., in_features) to (..., out_features)."""
        if self._split is not None and torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "CompressedLinear: a shard is for inference: call it under torch.no_grad(), or unpatch_model first"
            )
        if self._sharding is not None and not self.transposed and self.bias is None:
            y = self._sharding.decoded(x, self)
            return self._sharding.whole(nn.functional.linear(x, self.weight), x.dtype) if y is None else y
        bias = self.bias if self._split is None or self.bias is None else local_of(self.bias)
        if x.numel() == self.in_features == (shape := x.shape)[-1]:
            if not self.transposed and (y := decoded(x.flatten(), self, bias)) is not None:
                return y.view(*shape[:-1], -1)
        elif (
            not self.transposed
            and (tokens := few_tokens(x, most_tokens("ffn_1", "bf12"))) is not None
            and (y := decoded(tokens, self, bias)) is not None
        ):
            return y.view(*x.shape[:-1], -1)
        return nn.functional.linear(x, self.weight, bias)

    def extra_repr(self) -> str:
        dims, bias = f"in_features={self.in_features}, out_features={self.out_features}", self.bias is not None
        return f"{dims}, bias={bias}, ratio={self.packed.ratio:.4f}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        plain = self.weight.detach()
        # What is spread over processes is gathered where it is.
        plain = plain.to("cpu").contiguous() if self._split is None else self._split.of_local(plain.contiguous())
        destination[f"{prefix}weight"] = plain
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: Any,
        unexpected_keys: Any,
        error_msgs: Any,
    ) -> None:
        if self.bias is not None:
            self._load_bias(state_dict.get(f"{prefix}bias"), f"{prefix}bias", strict, missing_keys, error_msgs)
        key = f"{prefix}weight"
        given = state_dict.get(key)
        if given is None:
            if strict:
                missing_keys.append(key)
            return
        if self._split is not None and given.shape == self._split.shape:
            given = self._split.part_of(given)
        if tuple(given.shape) != (self.out_features, self.in_features):
            expected = (self.out_features, self.in_features)
            error_msgs.append(f"size mismatch for {key}: {tuple(given.shape)} in the state dict, {expected} in the model")
            return
        with torch.no_grad():
            self._take(given.to(self.device, torch.bfloat16))

    def _load_bias(self, given: Tensor | None, key: str, strict: bool, missing_keys: Any, error_msgs: Any) -> None:
        assert self.bias is not None
        if given is None:
            missing_keys.extend([key] * strict)
        elif given.shape != self.bias.shape:
            found, expected = tuple(given.shape), tuple(self.bias.shape)
            error_msgs.append(f"size mismatch for {key}: {found} in the state dict, {expected} in the model")
        else:
            with torch.no_grad():
                self.bias.copy_(given)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedLinear:
        becomes = fn(torch.empty(0, dtype=torch.bfloat16, device=self.device)).dtype
        if becomes is not torch.bfloat16:
            raise TypeError(
                f"CompressedLinear: compressed weights are bfloat16 and cannot become {becomes}: "
                "call unpatch_model(model) first"
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._packed = None  # which would keep the memory of before
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def linear(self) -> nn.Linear:
        """An `nn.Linear` with the same bits."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=torch.bfloat16)
        linear.weight = nn.Parameter(self.weight.contiguous(), requires_grad=self._requires_grad)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def part(self, start: int, stop: int) -> CompressedLinear:
        """Some rows of it, which share its memory; of one that is not transposed."""
        return CompressedLinear.of_packed(self.packed.rows(start, stop), transposed=False)


def place_together(linears: Sequence[nn.Linear]) -> None:
    """Move the weights of projections of one input into one buffer, row after row: the same parameters with the same values."""
    weights = [local_of(linear.weight).detach() for linear in linears]
    whole = torch.cat(weights)
    for linear, rows in zip(linears, whole.split([len(weight) for weight in weights]), strict=True):
        set_local(linear.weight, rows)


def place_apart(linear: nn.Linear) -> None:
    """The inverse of `place_together`, for one of them: memory of its own."""
    data = local_of(linear.weight).detach()
    if data.untyped_storage().nbytes() > data.nbytes:
        set_local(linear.weight, data.clone())


def known_sharding(linear: Any) -> Sharding | None:
    """How transformers has split a projection, where that is a way that is known."""
    found = sharding_of(linear)
    return found if isinstance(found, Sharding) else None


def whole_of(linears: Sequence[nn.Module]) -> Tensor | CompressedLinear | None:
    """Projections of one input as one, if they lie one after the other in memory; None if they do not."""
    shardings: list[Sharding | None] = [getattr(linear, "_sharding", None) for linear in linears]
    if any(sharding is not None and sharding.style != "colwise" for sharding in shardings):
        return None
    if all(type(linear) is DecodingLinear and linear.bias is None for linear in linears):
        return _adjacent([local_of(linear.weight).detach() for linear in linears])  # type: ignore[arg-type]
    compressed = [x for x in linears if type(x) is CompressedLinear and not x.transposed and x.bias is None]
    if len(compressed) < len(linears):
        return None
    first = compressed[0]
    if any(not torch.equal(first._numbers[:1], other._numbers[:1]) for other in compressed):
        return None
    *parts, escapes = zip(*(linear._arrays() for linear in compressed), strict=True)
    words = [_adjacent(part) for part in parts]
    if any(e.data_ptr() != escapes[0].data_ptr() for e in escapes) or any(w is None for w in words):
        return None
    rows = sum(linear.out_features for linear in compressed)
    facts = (first.facts[0], rows, first.in_features)
    packed = packed_of((*words, escapes[0]), first._numbers, facts)  # type: ignore[arg-type]
    return CompressedLinear.of_packed(packed, transposed=False)


def _adjacent(parts: Sequence[Tensor]) -> Tensor | None:
    """Contiguous tensors that lie one after the other in one buffer, as one."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.dtype != first.dtype or part.shape[1:] != first.shape[1:] or not part.is_contiguous():
            return None
        end += part.nbytes
    storage = first.untyped_storage()
    if storage.data_ptr() + storage.nbytes() < end:
        return None
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())
