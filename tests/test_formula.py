"""The formula: activity, what a config names, and the contract's rule."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from checks import DTYPES
from hypothesis import given
from hypothesis import strategies as st

from prosparse_cupy.formats import PLAIN
from prosparse_cupy.formula import (
    Formula,
    UnsupportedFormula,
    check_activation,
    check_norm_eps,
    formula_of,
    largest_inactive,
)
from prosparse_cupy.numerics import within_contract


@pytest.mark.parametrize("dtype", DTYPES)
def test_activity_is_decided_in_float32(dtype):
    tiny = {"bfloat16": 2.0**-133, "float16": 2.0**-24, "float32": 2.0**-149}[dtype]
    gate = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, tiny, -tiny, 0.25, 0.2490234375, -0.25]).astype(DTYPES[dtype])
    zero, quarter = Formula(), Formula(0.25)
    assert zero.active(gate).tolist() == [True, True, False, False, False, True, False, True, True, False]
    assert quarter.active(gate).tolist() == [True, True, False, False, False, False, False, True, False, False]
    kept = quarter.activate(gate)
    assert kept.dtype == gate.dtype and not np.signbit(kept[2:7].astype(np.float32)).any()


def test_formulas_by_hand():
    gate = np.array([-3.0, -0.0, 0.25, 0.5, 3.0, np.nan, np.inf], np.float32)
    up = np.array([1.0, 1.0, 1.0, -2.0, 2.0, 1.0, 0.0])
    with np.errstate(invalid="ignore"):
        for formula, s, x1 in [
            (Formula(0.5), [0, 0, 0, 0.5, 3, np.nan, np.inf], [0, 0, 0, -1, 6, np.nan, np.nan]),
            (Formula(0.5, "relu2"), [0, 0, 0, 0.25, 9, np.nan, np.inf], [0, 0, 0, -0.5, 18, np.nan, np.nan]),
            (Formula(0.5, "drelu"), [0, 0, 0, 0.5, 3, np.nan, np.inf], [0, 0, 0, 0, 6, np.nan, 0]),
            (Formula(0.0, "relu2"), [0, 0, 0.0625, 0.25, 9, np.nan, np.inf], [0, 0, 0.0625, -0.5, 18, np.nan, np.nan]),
        ]:
            np.testing.assert_array_equal(formula.activate(gate), np.array(s, np.float32))
            combined = formula.combine(gate, up)
            np.testing.assert_array_equal(combined, x1)
            assert not np.signbit(combined[combined == 0]).any(), "an inactive output is not +0"
    assert np.isnan(Formula(activation="drelu").combine(np.ones(1, np.float32), np.array([np.nan])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_squares_are_taken_in_float32(dtype):
    """2**-80 is a number, its square is none in float32; float16 has no 300**2, and nobody is warned of it."""
    gate = np.array([1.1, 2.0**-80, 300.0], np.float32).astype(DTYPES[dtype])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s = Formula(activation="relu2").activate(gate)
        x1 = Formula(activation="relu2").combine(gate, np.full(3, 2.0**90))
    wide = gate.astype(np.float64)
    assert s.dtype == gate.dtype and s[0] == np.float32(wide[0] ** 2).astype(s.dtype) and s[1] == 0
    assert np.isinf(s[2]) == (dtype == "float16")
    assert x1.tolist() == [float(np.float32(wide[0] ** 2)) * 2.0**90, 0.0, float(np.float32(wide[2] ** 2)) * 2.0**90]


def test_an_activation_that_kernels_do_not_know_is_refused():
    for known in ("relu", "relu2", "drelu"):
        assert check_activation("f", known) == known
    for wrong in ("silu", "ReLU", "", None, 3, []):
        with pytest.raises(ValueError, match=r"^f: activation must be 'relu' or 'relu2' or 'drelu', got "):
            check_activation("f", wrong)
    with pytest.raises(ValueError, match=r"got 'fatrelu': FATReLU is activation='relu' with a threshold$"):
        check_activation("f", "fatrelu")
    assert check_activation("f", "relu2", gated=False) == "relu2"
    with pytest.raises(ValueError, match=r"^f: activation must be 'relu' or 'relu2', got 'drelu': dReLU needs a gate$"):
        check_activation("f", "drelu", gated=False)


def test_what_a_norm_adds_is_a_number_that_float32_has():
    for right in (0, 1e-6, np.float32(1e-5), Fraction(1, 3), 1e38):
        assert check_norm_eps("f", right, True) == float(right)
    assert check_norm_eps("f", 0.0, False) == 0.0
    for wrong in (-1e-9, math.nan, math.inf, 1e39, 10**400):
        with pytest.raises(ValueError, match=r"^f: norm_eps must be finite as float32 and >= 0, got "):
            check_norm_eps("f", wrong, True)
    for wrong in ("1e-6", None, np.zeros(1)):
        with pytest.raises(TypeError, match=r"^f: norm_eps must be a Python number, got \w+: pass a float$"):
            check_norm_eps("f", wrong, True)
    with pytest.raises(ValueError, match=r"^f: norm_eps=1e-06 without a norm: pass norm_weight too, or leave norm_eps out$"):
        check_norm_eps("f", 1e-6, False)


@given(st.floats(0, 2.0**100, width=32), st.sampled_from(sorted(DTYPES)))
def test_the_largest_inactive_number_is_the_neighbour_of_an_active_one(threshold, dtype):
    kind = DTYPES[dtype]
    below = np.array([largest_inactive(threshold, kind)], kind)
    if np.isinf(below.astype(np.float32))[0] or threshold == 0:
        return
    assert not Formula(threshold).active(below)[0]
    assert Formula(threshold).active(np.nextafter(below, np.array(np.inf, kind)))[0]


def test_what_a_config_names():
    assert formula_of("relu", None) == Formula() == formula_of("relu", 0.5)
    assert formula_of("fatrelu", 0.01) == Formula(0.01) and formula_of("fatrelu", 1) == Formula(1.0)
    assert formula_of("relu2", None) == Formula(activation="relu2") == formula_of("relu2", 0.5)
    assert formula_of("relu2", None, gated=False, normed=True) == Formula(0.0, "relu2", gated=False, normed=True)
    assert formula_of("fatrelu", 0.01, gated=False) == Formula(0.01, gated=False)
    assert (str(Formula()), str(Formula(0.01))) == ("relu", "fatrelu(0.01)")
    assert str(Formula(0.01, "relu2", gated=False, normed=True)) == "fatrelu2(0.01), no gate, norm"
    assert str(Formula(activation="drelu")) == "drelu"


@pytest.mark.parametrize(
    ("activation", "parameter", "why"),
    [
        ("silu", None, "it leaves no zeros: relu, fatrelu, relu2 and dReLU are"),
        (None, None, "it leaves no zeros: relu, fatrelu, relu2 and dReLU are"),
        ("drelu", None, "it leaves no zeros"),  # no config names it
        ([], None, "it leaves no zeros"),
        ("relu6", None, "it is none that is known: relu, fatrelu, relu2 and dReLU are"),
        ("fatrelu", None, "it has no hidden_act_param"),
        *(
            ("fatrelu", parameter, "must be >= 0 and finite as float32")
            for parameter in (-1, math.nan, math.inf, 1e39, True, "0.01", [])
        ),
    ],
)
def test_what_is_no_formula_is_refused(activation, parameter, why):
    with pytest.raises(UnsupportedFormula, match=why):
        formula_of(activation, parameter)


def test_the_contract_is_twice_the_dense_error_and_one_ulp():
    assert within_contract(2.0 + 0.125, 1.0, 0.125) and not within_contract(2.126, 1.0, 0.125)
    assert within_contract(2.5, 1.0, 0.125, size=4.0) and not within_contract(2.51, 1.0, 0.125, size=4.0)
    assert not within_contract(float("nan"), 1.0, 0.125) and not within_contract(1.0, float("nan"), 0.125)


def test_a_plain_row_is_its_elements():
    assert PLAIN.row_bytes(4096, "bfloat16") == 8192 and PLAIN.row_bytes(4096, "float32") == 16384
