"""The formula: activity, what a config names, and the contract's rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
from checks import DTYPES
from hypothesis import given
from hypothesis import strategies as st

from prosparse_cupy.formats import PLAIN
from prosparse_cupy.formula import Formula, UnsupportedFormula, formula_of, largest_inactive
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
    assert (str(Formula()), str(Formula(0.01))) == ("relu", "fatrelu(0.01)")


@pytest.mark.parametrize(
    ("activation", "parameter", "why"),
    [
        ("silu", None, "gated FFNs with relu or fatrelu"),
        (None, None, "gated FFNs with relu or fatrelu"),
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
