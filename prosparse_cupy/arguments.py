"""What an operator does with its arguments before the launch: every check, then the addresses.

`check_call` is what an operator calls first. All that is known of an array except its address goes into a `Meta`, and `check`
is a pure function of them, memoised by `_checked`: a decoding loop pays for the checks once per shape, and after that for
reading the addresses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, Generic, NamedTuple

import numpy as np
import numpy.typing as npt

from .compressed import CompressedWeight, plain
from .formats import ITEMSIZE, PLAIN, VECTOR_BYTES, Format, vector_length
from .libraries import HOST, NUMPY, A, Description, Family, family_of, family_of_all
from .problem import LARGEST_DIMS
from .workspace import size_class

MOST_TOKENS = 8
"""Of a call. The dense path is faster beyond."""
_TRANSPOSED = {
    "w_down_t": "this is nn.Linear's layout, call pack_down(w_down) once",
    "w_gate": "this is transposed, pass nn.Linear.weight as it is",
    "w_up": "this is transposed, pass nn.Linear.weight as it is",
}
_NO_MEMORY = (RuntimeError, NotImplementedError)  # torch's errors, of tensors without strides or memory
_MAKE_CONTIGUOUS = "pass a contiguous copy (cupy.ascontiguousarray(a), tensor.contiguous())"


class Operand(NamedTuple):
    """One array argument of an operator."""

    name: str
    dims: tuple[str, ...]
    """One name for a vector, which may have a leading dim of tokens; two for a matrix, which may not."""
    aligned: bool
    """Whether the kernels read or write it in 16-byte vectors."""
    define: str = ""
    """Of a weight that may be compressed: the define that says its format."""
    extra: str = ""
    """Of an array that a call may have or not: what kernels call it, one of `OPTIONAL`."""
    may_be_partial: bool = False
    """Of a result: whether it may stay in float32, to be added to those of other GPUs."""

    @property
    def is_vector(self) -> bool:
        """Whether it holds a row for each token."""
        return len(self.dims) == 1 and not self.extra

    def nbytes(self, tokens: tuple[int, ...], dims: dict[str, int], dtype: str) -> int:
        return math.prod(tokens if self.is_vector else ()) * math.prod(dims[d] for d in self.dims) * ITEMSIZE[dtype]


def vector(name: str, dim: str) -> Operand:
    """A (dim,) or (B, dim) argument."""
    return Operand(name, (dim,), aligned=True)


def total(name: str, dim: str) -> Operand:
    """A (dim,) or (B, dim) result, which may be left in float32."""
    return vector(name, dim)._replace(may_be_partial=True)


def weight(name: str) -> Operand:
    """A (d_ff, d_model) argument, which may be a `CompressedWeight`."""
    return Operand(name, ("d_ff", "d_model"), aligned=True, define=name.upper().removesuffix("_T"))


def extra(name: str, dim: str, parameter: str) -> Operand:
    """A (dim,) argument that a call may have or not, and what kernels call it."""
    return Operand(name, (dim,), aligned=False, extra=parameter)


@dataclass(frozen=True, eq=False)
class Signature:
    """An operator's name, its array arguments in order, and its result. Hashed by identity: a call looks it up."""

    operator: str
    inputs: tuple[Operand, ...]
    output: Operand
    has_threshold: bool = False
    """Whether it takes a threshold and an activation too."""
    optional: tuple[Operand, ...] = ()
    """Arrays that a call may have or not; `with_extras` has those of a call among its inputs, the last of them."""


Extras = tuple["Any | None", ...]
"""The arrays of a signature's `optional`, or None of those that a call does not have."""


def with_extras(signature: Signature, extras: Extras) -> tuple[Signature, tuple[Any, ...]]:
    """The signature of a call with these optional arrays, and those that there are."""
    for array in extras:
        if array is not None:
            break
    else:
        return signature, ()
    return _with_extras(signature, tuple(a is not None for a in extras)), tuple(a for a in extras if a is not None)


def with_bound_extras(signature: Signature, extras: Mapping[str, Any]) -> tuple[Signature, tuple[Any, ...]]:
    """The same of a bound FFN's, whose last argument is the token: these come before it."""
    present = tuple(o for o in signature.optional if o.name in extras)
    return _with_bound(signature, present), tuple(extras[o.name] for o in present)


@cache
def _with_bound(signature: Signature, present: tuple[Operand, ...]) -> Signature:
    *bound, token = signature.inputs
    return replace(signature, inputs=(*bound, *present, token)) if present else signature


@cache
def _with_extras(signature: Signature, given: tuple[bool, ...]) -> Signature:
    present = tuple(operand for operand, is_given in zip(signature.optional, given, strict=True) if is_given)
    return replace(signature, inputs=(*signature.inputs, *present))


class Meta(NamedTuple):
    """What `check` sees of an array."""

    family: Family
    shape: tuple[int, ...]
    dtype: str
    device: int
    contiguous: bool


@dataclass(frozen=True, eq=False, slots=True)
class Checked:
    """What is known once the metadata of a call has passed. Hashed by identity: equal calls share one, see `_checked`."""

    d_model: int
    d_ff: int
    dtype: str
    device: int
    out_shape: tuple[int, ...]
    names: tuple[str, ...]
    """Whose each address is: of the inputs, a compressed weight having several, then of the output."""
    nbytes: tuple[int, ...]
    """What lies there; 0 of a compressed weight's number."""
    aligned: tuple[bool, ...]
    """Whether each of them must be a multiple of 16."""
    formats: tuple[tuple[str, Format], ...]
    """Of the weights, by their defines."""
    extras: tuple[str, ...]
    """Which of the kernels' `OPTIONAL` arguments there are."""
    extra_places: tuple[int, ...]
    """Where these are among the inputs' addresses."""
    down_pointers: int
    """How many of the inputs are `w_down_t`."""
    tokens: int
    scratch_bytes: int
    """What an FFN takes of `workspace`."""
    partial: bool
    """Whether the result is a float32 sum that is not rounded to the dtype."""


class Call(Generic[A]):
    """A checked call of an operator: dims, addresses, and the array that takes the result."""

    __slots__ = ("_given", "_views", "arrays", "checked", "extras", "family", "inputs", "out", "output")

    def __init__(
        self,
        family: Family,
        checked: Checked,
        inputs: list[int],
        out: Any,
        output: int,
        given: A | None,
        arrays: tuple[Any, ...],
        views: Sequence[Any],
    ) -> None:
        self.family, self.checked, self.inputs, self.out, self.output = family, checked, inputs, out, output
        self.extras: dict[str, int] = {}
        """Addresses of optional arrays, by what kernels call them; they are not among the inputs."""
        if checked.extras:
            places = checked.extra_places
            self.extras = {name: inputs[i] for name, i in zip(checked.extras, places, strict=True)}
            self.inputs = [address for i, address in enumerate(inputs) if i not in places]
        self._given = given
        self.arrays = arrays  # the caller's, in the order of the signature
        self._views = views  # of foreign arrays, perhaps copies, which must live until they are launched on

    @property
    def on_host(self) -> bool:
        """Whether the arrays are NumPy's, so that the reference runs."""
        return self.family is NUMPY

    def on_reference(
        self,
        operator: Callable[..., npt.NDArray[Any]],
        *scalars: float,
        arrays: tuple[Any, ...] | None = None,
        **keywords: Any,
    ) -> A:
        """The result of a `reference` function of the caller's arrays, or of these."""
        if self.checked.partial:
            keywords["dtype"] = np.float32
        given = self.arrays if arrays is None else arrays
        required = given[: len(given) - len(self.extras)] if arrays is None else given
        return self.result(operator(*map(plain, required), *scalars, **keywords))

    def result(self, value: npt.NDArray[Any] | None = None) -> A:
        """The result in the caller's own type; on the host, `value` is stored in it first."""
        if value is not None:
            self.out[...] = value
        if self._given is not None:
            return self._given
        handed_out: A = self.family.hand_out(self.out, self.arrays)
        return handed_out


def check_call(signature: Signature, arrays: tuple[Any, ...], given: A | None, extras: Extras = ()) -> Call[A]:
    """The call of an operator with these arrays, `out` (`given` or None), and those of its optional arrays that are given."""
    if extras:
        signature, present = with_extras(signature, extras)
        arrays = (*arrays, *present)
    views: Sequence[Any] = arrays if given is None else (*arrays, given)
    kinds = tuple(map(type, views))
    if CompressedWeight in kinds:
        return _check_compressed(signature, arrays, given)
    family = _common_family(signature, kinds)
    if family.is_foreign:
        views = _brought_in(signature, family, arrays, given)
    try:
        described, addresses = family.describe_all(views), family.addresses(views)
    except _NO_MEMORY:
        _refuse_without_memory(signature, family, views)
        raise
    checked = _checked(signature, family, described, given is not None)
    return _call(signature, family, checked, addresses, given, arrays, views)


def _check_compressed(signature: Signature, arrays: tuple[Any, ...], given: Any) -> Call[Any]:
    """`check_call` of arrays of which some are compressed weights."""
    seen = _see_through(signature, arrays, given)
    checked = _checked(signature, seen.family, seen.described, given is not None, seen.parts)
    return _call(signature, seen.family, checked, seen.addresses, given, arrays, seen.views)


class _Seen(NamedTuple):
    """Arrays of which some are compressed weights: these are described as what they stand for."""

    family: Family
    described: tuple[Description, ...]
    addresses: list[int]
    views: list[Any]
    parts: tuple[Part | None, ...]


def _see_through(signature: Signature, arrays: tuple[Any, ...], given: Any) -> _Seen:
    everything = arrays if given is None else (*arrays, given)
    for operand, array in zip((*signature.inputs, signature.output._replace(name="out", define="")), everything, strict=False):
        if type(array) is CompressedWeight and not operand.define:
            raise TypeError(
                f"{signature.operator}: {operand.name} must be an array, got a CompressedWeight: decompress() it first"
            )
    family = _common_family(signature, tuple(type(a.arrays[-1] if type(a) is CompressedWeight else a) for a in everything))
    described, addresses, views, parts = list[Description](), list[int](), list[Any](), list[Part | None]()
    for array in everything:
        if type(array) is CompressedWeight:
            described.append(array.description)
            addresses += array.addresses
            views.append(array.arrays[-1])
            parts.append(array.parts)
            continue
        views.append(_brought_in(signature, family, (), array)[0] if array is given else family.bring_in(array))
        parts.append(None)
        try:
            described.append(family.describe(views[-1]))
            addresses.append(family.address(views[-1]))
        except _NO_MEMORY:
            _refuse_without_memory(signature, family, views)
            raise
    return _Seen(family, tuple(described), addresses, views, tuple(parts[: len(arrays)]))


def _call(
    signature: Signature,
    family: Family,
    checked: Checked,
    addresses: list[int],
    given: A | None,
    arrays: tuple[Any, ...],
    views: Sequence[Any],
) -> Call[A]:
    """A call whose metadata is right: the result is allocated, then the addresses are checked."""
    if given is None:
        out = family.empty(checked.out_shape, checked.dtype, checked.device)
        addresses.append(family.address(out))
    else:
        out = views[-1]
        if family is NUMPY and not out.flags.writeable:
            raise ValueError(f"{signature.operator}: out is a read-only array: pass one that may be written")
    if 0 in addresses:
        _refuse_without_memory(signature, family, views)
    _check_addresses(signature, checked, tuple(addresses))
    *inputs, output = addresses
    return Call(family, checked, inputs, out, output, given, arrays, views)


class BoundWeights:
    """The weights of an FFN, checked once. A call only sees whether they are still what was checked.

    Weights of another shape, dtype, GPU or layout are refused; other memory is taken. NumPy arrays, and those that are seen
    through DLPack, are checked at every call.
    """

    def __init__(self, signature: Signature, arrays: tuple[Any, ...]) -> None:
        """`signature` is of a call: the weights, then `x`."""
        self._signature, self.arrays = signature, arrays
        self._of_weights = _weights_of(signature)
        self._known: dict[tuple[Description, ...], Checked] = {}
        """What is checked of a call, by the description of its arrays: of weights that are as they were bound."""
        self._has_compressed = any(type(a) is CompressedWeight for a in arrays)
        self._family, described, addresses, views, parts = _see_through(self._of_weights, arrays, None)
        self._views = tuple(a.arrays[-1] if type(a) is CompressedWeight else a for a in arrays)  # which stand for the weights
        self._is_checked_anew = self._family is NUMPY or self._family.is_foreign
        checked = _checked(self._of_weights, self._family, described, False, parts)
        if 0 in addresses:
            _refuse_without_memory(self._of_weights, self._family, views)
        _check_alignment(self._of_weights, checked, addresses)
        self.facts = _facts(checked)

    def call(self, x: A, given: A | None) -> Call[A]:
        """The call with this token."""
        family, arrays = self._family, (*self.arrays, x)
        same_library = family_or_none(type(x)) is family and (given is None or family_or_none(type(given)) is family)
        if self._is_checked_anew or not same_library:
            call = check_call(self._signature, arrays, given)
            self._refuse_other(call.checked)
            return call
        views = (*self._views, x) if given is None else (*self._views, x, given)
        try:
            described, addresses = family.describe_all(views), family.addresses(views)
        except _NO_MEMORY:
            _refuse_without_memory(self._signature, family, views)
            raise
        checked = self._known.get(described)
        if checked is None:
            checked = self._known[described] = self._check(described, arrays, given)
        if self._has_compressed:
            addresses = self._all_addresses(addresses)
        return _call(self._signature, family, checked, addresses, given, arrays, views)

    def _check(self, described: tuple[Description, ...], arrays: tuple[Any, ...], given: Any) -> Checked:
        """What is checked of a call of arrays that were not seen so before."""
        if self._has_compressed:
            seen = _see_through(self._signature, arrays, given)
            checked = _checked(self._signature, seen.family, seen.described, given is not None, seen.parts)
            self._refuse_other(checked)
            return checked
        self._refuse_other(_checked(self._of_weights, self._family, described[: len(self.arrays)], False))
        return _checked(self._signature, self._family, described, given is not None)

    def _all_addresses(self, addresses: list[int]) -> list[int]:
        """With a compressed weight's own in the place of the one of its view."""
        own = zip(self.arrays, addresses, strict=False)
        weights = [at for a, address in own for at in (a.addresses if type(a) is CompressedWeight else (address,))]
        return weights + addresses[len(self.arrays) :]

    def _refuse_other(self, now: Checked) -> None:
        if _facts(now) != self.facts:
            operator = self._signature.operator
            raise ValueError(
                f"{operator}: its weights have changed since it was built: (d_model, d_ff, dtype, GPU) were {self.facts}, are "
                f"{_facts(now)}: make a new {operator} of them"
            )


def _facts(checked: Checked) -> tuple[int, int, str, int]:
    """What bound weights may not change: d_model, d_ff, dtype and GPU."""
    return checked.d_model, checked.d_ff, checked.dtype, checked.device


@cache
def _weights_of(signature: Signature) -> Signature:
    """The part of a bound FFN's signature that is bound."""
    return replace(signature, inputs=signature.inputs[:-1])


def family_or_none(kind: type) -> Family | None:
    """The family of an array type, or None of what is no array."""
    try:
        return family_of(kind)
    except TypeError:
        return None


@lru_cache(maxsize=256)
def _common_family(signature: Signature, kinds: tuple[type, ...]) -> Family:
    """The family of arrays of these types, in the order of the arguments."""
    try:
        family = family_of_all({*kinds})
    except TypeError as error:
        wrong = next(n for n, kind in zip(_names(signature), kinds, strict=False) if family_or_none(kind) is None)
        raise TypeError(
            f"{signature.operator}: {wrong} must be a CuPy array, a CUDA torch tensor, a NumPy array or a CUDA object with "
            f"__dlpack__, got {error}"
        ) from None
    if family is None:
        named = zip(_names(signature), kinds, strict=False)
        found = ", ".join(f"{n} is {kind.__module__}.{kind.__qualname__}" for n, kind in named)
        raise TypeError(
            f"{signature.operator}: all arrays of a call must come from one library, got {found}: "
            "convert them first, nothing is copied behind your back"
        )
    return family


def _brought_in(signature: Signature, family: Family, arrays: tuple[Any, ...], given: Any) -> list[Any]:
    views = [family.bring_in(a) for a in arrays]
    if given is None:
        return views
    try:
        return [*views, family.bring_out(given)]
    except ValueError as error:
        raise ValueError(f"{signature.operator}: out is {error}") from None


def _refuse_without_memory(signature: Signature, family: Family, arrays: Sequence[Any]) -> None:
    """TypeError for the first array that has no address."""
    for name, array in zip(_names(signature), arrays, strict=False):
        try:
            described, address = family.describe(array), family.address(array)
        except _NO_MEMORY:
            described, address = None, 0
        if address == 0 and (described is None or 0 not in described[0]):
            raise TypeError(
                f"{signature.operator}: {name} must be a plain strided array in GPU memory, got {family.why_no_memory(array)}"
            )


def _names(signature: Signature) -> tuple[str, ...]:
    return (*(o.name for o in signature.inputs), "out")


@lru_cache(maxsize=4096)
def _checked(
    signature: Signature,
    family: Family,
    described: tuple[tuple[Any, ...], ...],
    has_out: bool,
    parts: tuple[Part | None, ...] = (),
) -> Checked:
    """`check` of what `family.describe` says of the inputs and, last, `out`."""
    metas = tuple(Meta(family, *d) for d in described)
    return check(signature, metas[:-1], metas[-1], parts) if has_out else check(signature, metas, None, parts)


Part = tuple[Format, tuple[int, ...]]
"""A compressed weight: its format, and the bytes at each of its addresses."""


def check(signature: Signature, metas: tuple[Meta, ...], out: Meta | None, parts: tuple[Part | None, ...] = ()) -> Checked:
    """Check dtypes, devices, shapes and layout of a call; TypeError or ValueError says what is wrong and what to do.

    `parts` has an entry for each input, None where it is an array; it is empty where all are.
    """
    operator, operands, output = signature.operator, signature.inputs, signature.output
    given = [*zip(operands, metas, strict=True)] + ([] if out is None else [(output._replace(name="out"), out)])
    partial = output.may_be_partial and out is not None and out.dtype == "float32" != metas[0].dtype
    _check_dtypes(operator, given[:-1] if partial else given)
    _check_devices(operator, given)

    dims: dict[str, int] = {}
    origins: dict[str, str] = {}
    tokens = _check_tokens(operator, given)
    for operand, meta in given:
        _check_shape(operator, operand, meta.shape, dims, origins)
    for operand, meta in given:
        _check_contiguous(operator, operand, meta)
    dtype = metas[0].dtype
    _check_d_model(operator, dims["d_model"], dtype)

    out_shape = (*(tokens if output.is_vector else ()), *(dims[d] for d in output.dims))
    number = math.prod(tokens)
    scratch_bytes = size_class(number * dims["d_ff"] * ITEMSIZE[dtype])
    at = [
        (o.name, n, o.aligned and n > 0)
        for o, part in _with_parts(operands, parts)
        for n in _bytes_of(o, part, tokens, dims, dtype)
    ]
    out_bytes = output.nbytes(tokens, dims, "float32" if partial else dtype)
    names, nbytes, aligned = zip(*at, ("out", out_bytes, output.aligned), strict=True)
    formats = tuple((o.define, PLAIN if part is None else part[0]) for o, part in _with_parts(operands, parts) if o.define)
    extras = tuple(o.extra for o in operands if o.extra)
    extra_names = {o.name for o in operands if o.extra}
    places = tuple(i for i, name in enumerate(names) if name in extra_names)
    facts = dims["d_model"], dims["d_ff"], dtype, metas[0].device
    pointers = names.count("w_down_t")
    return Checked(*facts, out_shape, names, nbytes, aligned, formats, extras, places, pointers, number, scratch_bytes, partial)


def _with_parts(operands: tuple[Operand, ...], parts: tuple[Part | None, ...]) -> list[tuple[Operand, Part | None]]:
    return [*zip(operands, parts or (None,) * len(operands), strict=True)]


def _bytes_of(
    operand: Operand, part: Part | None, tokens: tuple[int, ...], dims: dict[str, int], dtype: str
) -> tuple[int, ...]:
    """Bytes at each address of an input."""
    return (operand.nbytes(tokens, dims, dtype),) if part is None else part[1]


_Given = list[tuple[Operand, Meta]]


def _check_dtypes(operator: str, given: _Given) -> None:
    for operand, meta in given:
        if meta.dtype not in ITEMSIZE:
            raise TypeError(f"{operator}: {operand.name} must be bfloat16, float16 or float32, got {meta.dtype}: cast it first")
    first, dtype = given[0][0].name, given[0][1].dtype
    for operand, meta in given:
        if meta.dtype != dtype:
            raise TypeError(
                f"{operator}: {operand.name} must have the dtype of {first}, {dtype}, got {meta.dtype}: "
                "one dtype per call, cast one of them"
            )


def _check_devices(operator: str, given: _Given) -> None:
    for operand, meta in given:
        if meta.device == HOST and meta.family is not NUMPY:
            raise TypeError(
                f"{operator}: {operand.name} must be on a CUDA GPU, got a {meta.family.name} array in host memory, on the meta "
                "device or the like: move it with .cuda(), or pass NumPy arrays, which run the reference"
            )
    first, device = given[0][0].name, given[0][1].device
    for operand, meta in given:
        if meta.device != device:
            raise ValueError(
                f"{operator}: {operand.name} must be on the GPU of {first}, {device}, got GPU {meta.device}: move one of them"
            )


def _check_tokens(operator: str, given: _Given) -> tuple[int, ...]:
    """The leading dims of the vectors: () or (B,)."""
    vectors = [(o.name, m.shape) for o, m in given if o.is_vector]
    for name, shape in vectors:
        if len(shape) not in (1, 2):
            raise ValueError(f"{operator}: {name} must be 1-D, or 2-D with one token per row, got shape {shape}")
    if not vectors:
        return ()
    first, tokens = vectors[0][0], tuple(vectors[0][1][:-1])
    for name, shape in vectors:
        if tuple(shape[:-1]) != tokens:
            raise ValueError(
                f"{operator}: {name} must have the leading dims of {first}, {tokens}, got {tuple(shape[:-1])}: "
                "reshape one of them"
            )
    if tokens and not 1 <= tokens[0] <= MOST_TOKENS:
        limit = (
            "there must be at least one" if tokens[0] == 0 else "more are for the dense path, x @ w.T, which is faster there"
        )
        raise ValueError(
            f"{operator}: {first} must hold one token, (d,), or 1 to {MOST_TOKENS}, (B, d), got {tokens[0]} tokens: {limit}"
        )
    return tokens


def _check_shape(
    operator: str, operand: Operand, shape: tuple[int, ...], dims: dict[str, int], origins: dict[str, str]
) -> None:
    """Check one argument's shape against the `dims` of those before it, and add its own; `origins` says whose each is."""
    sizes = shape[1:] if operand.is_vector and len(shape) == 2 else shape
    if operand.extra and len(shape) == 2 and shape[0] == 1:
        raise ValueError(
            f"{operator}: {operand.name} must be 1-D, one for all tokens, got {tuple(shape)}: pass {operand.name}[0]"
        )
    if len(sizes) == len(operand.dims) and _agree(operand.dims, sizes, dims):
        for dim, size in zip(operand.dims, sizes, strict=True):
            if size == 0:
                raise ValueError(f"{operator}: {operand.name} must not be empty, got shape {tuple(shape)}: its {dim} is 0")
            if size > LARGEST_DIMS[dim]:
                raise ValueError(f"{operator}: {operand.name} must have {dim} <= {LARGEST_DIMS[dim]}, got shape {tuple(shape)}")
            dims[dim] = size
            origins.setdefault(dim, operand.name)
        return
    known, hint = dims, ""
    if len(sizes) == len(operand.dims) == 2 and _agree(operand.dims, sizes[::-1], dims):
        known = {**dims, **dict(zip(operand.dims, sizes[::-1], strict=True))}
        hint = f": {_TRANSPOSED.get(operand.name, 'this is transposed')}."
    elif len(sizes) == len(operand.dims):
        others = [d for d, size in zip(operand.dims, sizes, strict=True) if dims.get(d, size) != size]
        hint = ": " + " and ".join(f"{d} is {dims[d]} in {origins[d]}" for d in others)
    expected = _expected_shape(operand, known)
    raise ValueError(f"{operator}: {operand.name} must have shape {expected}, got {tuple(shape)}{hint}")


def _expected_shape(operand: Operand, known: dict[str, int]) -> str:
    names = f"({', '.join(operand.dims)}{',' if len(operand.dims) == 1 else ''})"
    if all(dim in known for dim in operand.dims):
        return f"{names} = {tuple(known[dim] for dim in operand.dims)}"
    facts = [f"{dim} = {known[dim]}" for dim in operand.dims if dim in known]
    return f"{names} with {', '.join(facts)}" if facts else names


def _agree(names: tuple[str, ...], sizes: tuple[int, ...], dims: dict[str, int]) -> bool:
    return all(dims.get(name, size) == size for name, size in zip(names, sizes, strict=True))


def _check_contiguous(operator: str, operand: Operand, meta: Meta) -> None:
    if not meta.contiguous:
        packed = operand.name == "w_down_t"
        fix = "a transposed view is not packed, call pack_down(w_down) once" if packed else _MAKE_CONTIGUOUS
        raise ValueError(
            f"{operator}: {operand.name} must be C-contiguous, got a strided view of shape {tuple(meta.shape)}: {fix}"
        )


def _check_d_model(operator: str, d_model: int, dtype: str) -> None:
    multiple = vector_length(dtype)
    if d_model % multiple:
        raise ValueError(
            f"{operator}: d_model must be a multiple of {multiple} for {dtype}, since rows are read {VECTOR_BYTES} bytes at a "
            f"time, got {d_model}: pad x and the weights with zeros"
        )


@lru_cache(maxsize=4096)
def _check_addresses(signature: Signature, checked: Checked, addresses: tuple[int, ...]) -> None:
    """ValueError for an array that does not start at a multiple of 16 bytes, or an output that shares memory with an input."""
    start = addresses[-1]
    end = start + checked.nbytes[-1]
    for address, name, nbytes in zip(addresses[:-1], checked.names, checked.nbytes, strict=False):
        if address < end and start < address + nbytes:
            raise ValueError(
                f"{signature.operator}: out must not share memory with {name}: kernels read it while out is written, pass "
                "another array"
            )
    _check_alignment(signature, checked, addresses)


def _check_alignment(signature: Signature, checked: Checked, addresses: Sequence[int]) -> None:
    """ValueError for an array that does not start at a multiple of 16 bytes."""
    for address, aligned, name in zip(addresses, checked.aligned, checked.names, strict=False):
        if aligned and address % VECTOR_BYTES and checked.device != HOST:
            raise ValueError(
                f"{signature.operator}: {name} must start at a multiple of {VECTOR_BYTES} bytes, got address {address:#x}: "
                "copy it, or slice the buffer at a multiple of 16 bytes"
            )
