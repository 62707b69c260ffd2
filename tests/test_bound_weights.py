"""Weights that are checked once: what a call looks at, and what happens if they move. On arrays that are only facts."""

from __future__ import annotations

import pytest

from prosparse_cupy import arguments
from prosparse_cupy.arguments import BoundWeights, with_bound_extras
from prosparse_cupy.ffn import BOUND_FFN, UNGATED_BOUND_FFN
from prosparse_cupy.libraries import Family

D_MODEL, D_FF = 16, 24


class _Array:
    """An array on GPU 0."""

    def __init__(self, address: int, *shape: int, dtype: str = "bfloat16", contiguous: bool = True) -> None:
        self.address, self.shape, self.dtype, self.contiguous = address, shape, dtype, contiguous


class _Facts(Family):
    name = "facts"

    def __init__(self) -> None:
        self.described: list[_Array] = []
        self.made: list[_Array] = []

    def describe(self, array):
        self.described.append(array)
        return array.shape, array.dtype, 0, array.contiguous

    def address(self, array):
        return array.address

    def empty(self, shape, dtype, device):
        self.made.append(_Array(0x900000, *shape, dtype=dtype))
        return self.made[-1]


@pytest.fixture
def family(monkeypatch):
    facts = _Facts()
    monkeypatch.setattr(arguments, "_common_family", lambda signature, kinds: facts)
    monkeypatch.setattr(arguments, "family_or_none", lambda kind: facts if kind is _Array else None)
    return facts


def _weights() -> list[_Array]:
    return [_Array(0x1000 * (i + 1), D_FF, D_MODEL) for i in range(3)]


def _token(address: int = 0x800000, size: int = D_MODEL) -> _Array:
    return _Array(address, size)


def test_weights_are_checked_once(family, monkeypatch):
    weights, x, out = _weights(), _token(), _Array(0x700000, D_MODEL)
    bound = BoundWeights(BOUND_FFN, tuple(weights))
    assert bound.facts == (D_MODEL, D_FF, "bfloat16", 0) and family.described == weights
    call = bound.call(x, None)
    assert call.inputs == [0x1000, 0x2000, 0x3000, 0x800000] and call.output == 0x900000 and call.result() is family.made[-1]
    assert bound.call(x, out).result() is out
    monkeypatch.setattr(arguments, "check", pytest.fail)
    assert bound.call(x, None).checked is call.checked, "the kernel is looked up by it"
    assert bound.call(_token(0x810000), out).output == 0x700000


def test_weights_in_other_memory_are_used(family):
    weights = _weights()
    bound = BoundWeights(BOUND_FFN, tuple(weights))
    weights[1].address = 0x5000
    assert bound.call(_token(), None).inputs[1] == 0x5000


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"shape": (D_FF, 32)}, ValueError, "w_up must have shape"),
        ({"shape": (D_MODEL, D_FF)}, ValueError, "w_up must have shape"),
        ({"dtype": "float16"}, TypeError, "w_up must have the dtype of w_gate"),
        ({"contiguous": False}, ValueError, "w_up must be C-contiguous"),
        ({"address": 0x5008}, ValueError, "w_up must start at a multiple of 16 bytes"),
        ({"address": 0}, TypeError, "w_up must be a plain strided array"),
    ],
)
def test_weights_that_changed_are_refused_at_every_call(family, moved, change, error, message):
    weights = _weights()
    bound = BoundWeights(BOUND_FFN, tuple(weights))
    bound.call(_token(), None)
    weights[1].__dict__.update({**({"address": 0x5000} if moved else {}), **change})
    for _ in range(2):
        with pytest.raises(error, match=f"SparseFFN: {message}"):
            bound.call(_token(), None)


def test_all_weights_of_another_shape_are_refused(family):
    weights = _weights()
    bound = BoundWeights(BOUND_FFN, tuple(weights))
    for w in weights:
        w.address, w.shape = w.address + 0x100, (48, D_MODEL)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"its weights have changed since it was built: .*\(16, 24, .* are \(16, 48"):
            bound.call(_token(), None)


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (_token(size=8), None, r"x must have shape \(d_model,\) = \(16,\), got \(8,\): d_model is 16 in w_gate"),
        (_token(0x800008), None, "x must start at a multiple of 16 bytes"),
        (_token(), _Array(0x700000, 8), r"out must have shape \(d_model,\) = \(16,\), got \(8,\)"),
        (_token(), _Array(0x1010, D_MODEL), "out must not share memory with w_gate"),
        (_token(), _Array(0x800000, D_MODEL), "out must not share memory with x"),
    ],
)
def test_wrong_tokens_and_results_are_refused_by_name(family, x, out, message):
    bound = BoundWeights(BOUND_FFN, tuple(_weights()))
    for _ in range(2):
        with pytest.raises(ValueError, match=f"SparseFFN: {message}"):
            bound.call(x, out)


def test_a_token_without_memory_is_refused_by_name(family):
    bound = BoundWeights(BOUND_FFN, tuple(_weights()))
    with pytest.raises(TypeError, match="SparseFFN: x must be a plain strided array in GPU memory"):
        bound.call(_token(0), None)
    with pytest.raises(TypeError, match="SparseFFN: out must be a plain strided array in GPU memory"):
        bound.call(_token(), _Array(0, D_MODEL))


def test_misaligned_weights_are_refused_when_they_are_bound(family):
    weights = _weights()
    weights[2].address += 8
    with pytest.raises(ValueError, match="SparseFFN: w_down_t must start at a multiple of 16 bytes"):
        BoundWeights(BOUND_FFN, tuple(weights))


def _with_biases(signature, weights: list[_Array]):
    """Bound weights with a bias of each dim and a norm, at addresses that need no alignment; and these arrays."""
    extras = {"up_bias": _Array(0x5002, D_FF), "down_bias": _Array(0x6004, D_MODEL), "norm_weight": _Array(0x7006, D_FF)}
    bound, present = with_bound_extras(signature, extras)
    return BoundWeights(bound, (*weights, *present)), extras


@pytest.mark.parametrize("signature", [BOUND_FFN, UNGATED_BOUND_FFN], ids=["gate", "no gate"])
def test_biases_are_checked_once_and_told_from_weights(family, monkeypatch, signature):
    weights = _weights()[-len(signature.inputs) + 1 :]
    bound, _ = _with_biases(signature, weights)
    assert bound.facts == (D_MODEL, D_FF, "bfloat16", 0) and len(family.described) == len(weights) + 3
    call = bound.call(_token(), None)
    assert call.inputs == [*(w.address for w in weights), 0x800000]
    assert call.extras == {"up_bias": 0x5002, "down_bias": 0x6004, "norm_weight": 0x7006}
    assert call.checked.extras == ("up_bias", "down_bias", "norm_weight")
    monkeypatch.setattr(arguments, "check", pytest.fail)
    assert bound.call(_token(), None).checked is call.checked, "the kernel is looked up by it"


def test_biases_in_other_memory_are_used(family):
    bound, extras = _with_biases(UNGATED_BOUND_FFN, _weights()[1:])
    extras["down_bias"].address = 0x9002
    assert bound.call(_token(), None).extras == {"up_bias": 0x5002, "down_bias": 0x9002, "norm_weight": 0x7006}


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("up_bias", {"shape": (D_FF + 1,)}, ValueError, r"up_bias must have shape \(d_ff,\) = \(24,\), got \(25,\)"),
        (
            "up_bias",
            {"shape": (1, D_FF)},
            ValueError,
            r"up_bias must be 1-D, one for all tokens, got \(1, 24\): pass up_bias\[0\]",
        ),
        ("down_bias", {"shape": (D_FF,)}, ValueError, r"down_bias must have shape \(d_model,\) = \(16,\), got \(24,\)"),
        ("norm_weight", {"dtype": "float32"}, TypeError, "norm_weight must have the dtype of w_gate, bfloat16, got float32"),
        ("norm_weight", {"contiguous": False}, ValueError, "norm_weight must be C-contiguous"),
        ("down_bias", {"address": 0}, TypeError, "down_bias must be a plain strided array in GPU memory"),
    ],
)
def test_biases_that_changed_are_refused_at_every_call(family, name, change, error, message):
    bound, extras = _with_biases(BOUND_FFN, _weights())
    bound.call(_token(), None)
    extras[name].__dict__.update(change)
    for _ in range(2):
        with pytest.raises(error, match=f"SparseFFN: {message}"):
            bound.call(_token(), None)


@pytest.mark.parametrize(("name", "address"), [("up_bias", 0x5010), ("down_bias", 0x5FF0), ("norm_weight", 0x7020)])
def test_a_result_over_a_bias_is_refused(family, name, address):
    bound, _ = _with_biases(BOUND_FFN, _weights())
    with pytest.raises(ValueError, match=f"SparseFFN: out must not share memory with {name}"):
        bound.call(_token(), _Array(address, D_MODEL))
