"""Programmatic launches: what a kernel may do before it waits for its predecessor, and after it lets its successor in."""

from __future__ import annotations

import re

import pytest
from plans import Shape, plan_of
from test_compile import ptx_of

from prosparse_cupy import models
from prosparse_cupy.attention import Attention, attend_plan
from prosparse_cupy.peers import all_reduce_plan
from prosparse_cupy.problem import Target

KERNELS = ["ffn_1", "ffn_12", "ffn_123", "ffn_23", "ffn_4"]
WAIT, LET_IN, BARRIER = "griddepcontrol.wait", "griddepcontrol.launch_dependents", "bar.sync"
EXTRAS = {
    "ffn_1": ("gate_bias",),
    "ffn_12": ("up_bias",),
    "ffn_123": ("gate_bias", "up_bias"),
    "ffn_23": ("up_bias",),
    "ffn_4": ("down_bias", "norm_weight"),
}


def _ptx(kernel: str, architecture: int = 90, model: models.Model = models.MINICPM_S_1B, **more) -> str:
    shape = Shape(model.d_model, model.d_ff, "bfloat16", target=Target(architecture, 132))
    return ptx_of(plan_of(kernel, shape, **more), architecture)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_reads_and_writes_after_its_wait(kernel):
    """And never through the cache of what does not change while the kernel runs: its predecessor may be writing."""
    seven_b, eight = {"model": models.LLAMA_2_7B}, {"tokens": 8, "extras": EXTRAS[kernel]}
    for more in (seven_b, eight):
        before, waits, after = _ptx(kernel, in_ffn=True, **more).partition(WAIT)
        assert waits and WAIT not in after
        assert not re.search(r"\b(ld|st|cp)\.\S*global", before) and "ld.global.nc" not in after
    assert not re.search(r"griddepcontrol|cluster", _ptx(kernel, 80)), "sm_80 has none of these"


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_successor_that_may_write_before_it_waits_finds_nothing_left_to_read(kernel, tokens):
    """It comes when the launch ends; `ffn_4` lets it in before, behind the barrier that its last reads are before."""
    text = _ptx(kernel, tokens=tokens)
    assert text.count(LET_IN) == (kernel == "ffn_4")
    if kernel == "ffn_4":
        before, after = text.split(LET_IN)
        reads, barrier, between = before.rpartition(BARRIER)
        assert barrier and not re.search(r"\b(ld|st|bra)\b|global", between)
        assert "ld.global" in reads and "st.global" not in reads and "st.global" in after and "ld.global" not in after
        assert LET_IN in _ptx(kernel, tokens=tokens, extras=("norm_weight",)), "the norm's weights are read with the rows"
    assert LET_IN not in _ptx(kernel, tokens=tokens, extras=EXTRAS[kernel]), "a bias is read at the end"


@pytest.mark.parametrize("kernel", ["ffn_12", "ffn_123"])
def test_ffn_4_is_let_in_between_the_last_read_and_the_write(kernel):
    """By each warp as it is done: `ffn_4` waits before it writes."""
    for extras in ((), EXTRAS[kernel]):
        reads, lets, writes = _ptx(kernel, in_ffn=True, extras=extras).partition(LET_IN)
        assert lets and LET_IN not in writes and BARRIER not in reads
        assert "ld.global" in reads and "st.global" not in reads and "st.global" in writes and "ld.global" not in writes


@pytest.mark.parametrize(("kernel", "bias"), [("ffn_1", "gate_bias"), ("ffn_4", "down_bias")])
def test_tensor_cores(kernel, bias):
    """`ffn_1_mma` lets its successor in behind the barrier of its last tile; `ffn_4_mma` may read x1 once more."""
    for extras in ((), (bias,)):
        text = _ptx(kernel, model=models.LLAMA_2_7B, tokens=8, batch_invariant=False, extras=extras)
        before, waits, after = text.partition(f".entry {kernel}_mma")[2].partition(WAIT)
        assert waits and not re.search(r"\b(ld|st|cp)\.\S*global", before)
        lets_in = kernel == "ffn_1" and not extras
        assert after.count(LET_IN) == lets_in
        if lets_in:
            reads, _, writes = after.partition(LET_IN)
            reads, barrier, between = reads.rpartition(BARRIER)
            assert barrier and not re.search(r"\b(ld|st)\b", between) and "st.global" in writes and "ld.global" not in writes


def test_attend_lets_its_successor_in_once_all_but_its_own_sums_is_read():
    assert "griddepcontrol" not in ptx_of(attend_plan(Attention("bfloat16", 32, 8, 128, 2, 4), True), 90), "launched as ever"
    text = ptx_of(attend_plan(Attention("bfloat16", 32, 8, 128), True), 90)
    before, after = text.split(LET_IN)
    reads, barrier, between = before.rpartition(BARRIER)
    assert barrier and "ld.global" in reads and not re.search(r"\b(ld|st|bra)\b", between)
    assert set(re.findall(r"\bld\.[\w.]*global[\w.]*", after)) == {"ld.volatile.global.f32"}, "what blocks leave for each other"


@pytest.mark.parametrize("ranks", [2, 8])
def test_all_reduce_lets_its_successor_in_while_it_waits_for_the_other_gpus(ranks):
    """Its numbers have been read, and sent, by all threads of the block."""
    before, after = ptx_of(all_reduce_plan(ranks, 5120, programmatic=True), 90).split(LET_IN)
    reads, barrier, between = before.rpartition(BARRIER)
    assert barrier and "ld.global" in reads and "st.relaxed.sys" in reads and not re.search(r"\bld\.(?!param)", between)
    assert re.findall(r"\bst\.\S+", between) == ["st.global.u32"], "the number of the exchange, before anybody else can look"
    assert "ld.global.f32" not in after and "ld.relaxed.sys" in after and "st.relaxed.sys" not in after
