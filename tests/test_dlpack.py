"""DLPack objects: where results go, what may not be written, and CuPy arrays beside them."""

from __future__ import annotations

import numpy as np
import pytest
from checks import DTYPES, bits, gate, poisoned, token, weights
from gpu_arrays import Exporter, OnCupy

import prosparse_cupy as psc
from prosparse_cupy.libraries import _IS_COPIED, _READ_ONLY, _dlpack_flags

on = OnCupy()
D_MODEL, D_FF, T = 64, 100, 0.25


class Copying(Exporter):
    """Exports a copy and does not say so."""

    def __dlpack__(self, **options):
        return self.array.copy().__dlpack__(**options)


class Old(Exporter):
    """Of the time before DLPack 1.0."""

    def __dlpack__(self, *, stream=None):
        return self.array.__dlpack__(stream=stream)


class ReadOnly(Exporter):
    """Sets the flag of DLPack 1.0 that forbids writing."""

    def __dlpack__(self, **options):
        capsule = self.array.__dlpack__(**options)
        if options.get("max_version"):
            _flags(capsule).value |= _READ_ONLY
        return capsule


class SaysItCopies(Copying):
    """Exports the same copy twice, and says that it is one."""

    def __dlpack__(self, **options):
        self.copy = getattr(self, "copy", self.array.copy())
        capsule = self.copy.__dlpack__(**options)
        if options.get("max_version"):
            _flags(capsule).value |= _IS_COPIED
        return capsule


def _flags(capsule):
    """Where a capsule of DLPack 1.0 has its flags."""
    import ctypes

    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.argtypes, get.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    return ctypes.c_uint64.from_address(get(capsule, b"dltensor_versioned") + 24)


def test_flags_are_those_that_numpy_sets():
    array = np.arange(4, dtype=np.float32)
    assert _dlpack_flags(array.__dlpack__(max_version=(1, 0))) & _READ_ONLY == 0
    array.flags.writeable = False
    assert _dlpack_flags(array.__dlpack__(max_version=(1, 0))) & _READ_ONLY
    assert _dlpack_flags(np.arange(3).__dlpack__()) == 0, "an older capsule has none"


def _arrays(dtype: str = "bfloat16"):
    rng = np.random.default_rng(3)
    x, g, w = token(D_MODEL, dtype, rng), gate(D_FF, dtype, 0.8, rng, T), weights(D_FF, D_MODEL, dtype)
    return [on.put(a) for a in (x, g, w)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dlpack_user_can_use_the_results_in_the_next_operator(dtype):
    x, g, w = _arrays(dtype)
    expected = psc.ffn_4(psc.ffn_23(g, x, w, T), w)
    ex, eg, ew = map(Exporter, (x, g, w))
    x1 = psc.ffn_23(eg, ex, ew, T)
    y = psc.ffn_4(x1, ew)
    np.testing.assert_array_equal(bits(on.get(y)), bits(on.get(expected)))
    out = on.put(poisoned(D_MODEL, dtype))
    assert psc.ffn_4(Exporter(x1), w, out=out) is out
    np.testing.assert_array_equal(bits(on.get(out)), bits(on.get(expected)))
    assert psc.sparse_ffn(x, ew, w, ew, T).shape == (D_MODEL,)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Exporter, Old])
def test_out_is_written(kind):
    x, _, w = _arrays()
    out = kind(on.put(poisoned(D_FF, "bfloat16")))
    assert psc.ffn_1(kind(x), kind(w), out=out) is out
    np.testing.assert_array_equal(bits(on.get(out.array)), bits(on.get(psc.ffn_1(x, w))))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Copying, "exports a copy of its memory"),
        (SaysItCopies, "exports a copy of its memory"),
        (ReadOnly, "a read-only ReadOnly"),
    ],
)
def test_an_out_that_would_not_be_written_is_refused(kind, message):
    x, _, w = _arrays()
    out = kind(on.put(poisoned(D_FF, "bfloat16")))
    before = on.get(out.array)
    with pytest.raises(ValueError, match=f"ffn_1: out is .*{message}"):
        psc.ffn_1(kind(x), kind(w), out=out)
    np.testing.assert_array_equal(bits(on.get(out.array)), bits(before))
    result = psc.ffn_1(kind(x), kind(w))
    np.testing.assert_array_equal(bits(on.get(result)), bits(on.get(psc.ffn_1(x, w)))), "copies may be read"


@pytest.mark.gpu
def test_libraries_that_do_not_go_together(torch):
    x, _, w = _arrays()
    with pytest.raises(TypeError, match=r"one library, got x is .*Exporter, w_gate is .*Old"):
        psc.ffn_1(Exporter(x), Old(w))
    with pytest.raises(TypeError, match=r"one library, got x is .*Exporter, w_gate is torch"):
        psc.ffn_1(Exporter(x), torch.from_dlpack(w))
