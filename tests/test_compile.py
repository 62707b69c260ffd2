"""Kernels compile for every architecture, within register budgets and without spills. NVRTC needs no GPU."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from plans import Shape, plan_of
from test_launch import static_shared_bytes

from prosparse_cupy import compiler, device, launch, measured, models
from prosparse_cupy.compiler import compiler_options, kernel_folder, source
from prosparse_cupy.formats import ITEMSIZE
from prosparse_cupy.knobs import KEPT, KeptKnobs, compressed_formats
from prosparse_cupy.problem import H100, KERNELS, Problem, Target
from prosparse_cupy.tensor_cores import ON_TENSOR_CORES

nvrtc = pytest.importorskip("cupy.cuda.compiler", reason="CuPy's NVRTC bindings compile the kernels")

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# The compiler makes other code for Blackwell, which is fewer users' than it is work: CI compiles that apart.
EACH = [*ARCHITECTURES[:4], *(pytest.param(architecture, marks=pytest.mark.slow) for architecture in ARCHITECTURES[4:])]
# NVRTC makes the same PTX for those that are said to have another's here; then each has machine code of its own.
PTX_OF = {80: 80, 86: 80, 89: 80, 90: 90, 100: 100, 120: 100}
SHAPES = [(m.d_model, m.d_ff, True) for m in (models.LLAMA_2_7B, models.LLAMA_2_13B, models.MINICPM_S_1B)] + [
    (4096, 11008, False)
]
# Threads an SM must hold, of its 65536 registers: what launch_bounds promise and the occupancy the times were measured at.
REGISTERS = {
    "ffn_1": 128,
    "ffn_12": 128,
    "ffn_123": 128,
    "ffn_23": 64,
    "ffn_23 of 12 rows a block": 80,
    "ffn_4": 64,
    "pack_down": 64,
    "decompress": 64,
}


def _compile(kernel: str, code: str, method: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    """What NVRTC makes, with the options that CuPy adds, and its log."""
    log = io.StringIO()
    program = nvrtc._NVRTCProgram(code, f"{kernel}.cu", method=method)
    return program.compile((*options, "-ftz=true", "--device-as-default-execution-space"), log)[0], log.getvalue()


def compile_for(plan: launch.Launch, architecture: int, code: str | None = None) -> tuple[bytes, str]:
    """Machine code and the compiler's report."""
    options = (*compiler_options(plan), f"-arch=sm_{architecture}", "--ptxas-options=-v")
    return _compile(plan.kernel, code or source(plan.kernel), "cubin", options)


@functools.cache
def _assembler() -> Path | None:
    """ptxas as a program, of the very version that NVRTC has inside; the extra `test` brings it."""
    (version,) = re.findall(r", V([\d.]+)\n", _compile("empty", "", "ptx", ("-arch=compute_80",))[0].decode())
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations if packages else ():
        for program in Path(folder).glob("*/bin/ptxas"):
            if f", V{version}\n" in subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout:
                return program
    return None


@functools.lru_cache(maxsize=64)
def _ptx_and_log(kernel: str, options: tuple[str, ...], architecture: int) -> tuple[bytes, str]:
    return _compile(kernel, source(kernel), "ptx", (*options, f"-arch=compute_{architecture}"))


def _assemble(plan: launch.Launch, architecture: int, file: Path) -> str:
    """What `compile_for` reports, by way of PTX that several architectures share: more than half of the time goes into it."""
    text, log = _ptx_and_log(plan.kernel, compiler_options(plan), PTX_OF[architecture])
    file.write_bytes(text)
    command = [_assembler(), "-v", f"-arch=sm_{architecture}", file, "-o", file]
    return log + subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.fixture(scope="session")
def report_of(shared_folder):
    """The compiler's report on a launch; what several tests ask about is compiled once for all of them, in any worker."""
    folder = shared_folder / "compiler_reports"
    folder.mkdir(exist_ok=True)
    scratch = folder / f"assembled.{os.getpid()}"

    def report(plan: launch.Launch, architecture: int) -> str:
        asked = "\0".join((source(plan.kernel), *compiler_options(plan), str(architecture)))
        kept = folder / hashlib.sha256(asked.encode()).hexdigest()
        if not kept.exists():
            text = _assemble(plan, architecture, scratch) if _assembler() else compile_for(plan, architecture)[1]
            unfinished = kept.with_suffix(f".{os.getpid()}")
            unfinished.write_text(text)
            unfinished.replace(kept)
        return kept.read_text()

    return report


def _reported(pattern: str, report: str) -> int:
    return int(re.search(pattern, report).group(1))


@pytest.mark.parametrize("architecture", EACH)
@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_spills_within_budget(report_of, kernel, dtype, architecture):
    for d_model, d_ff, specialize in SHAPES:
        target = Target(architecture, 132)
        plan = plan_of(kernel, Shape(d_model, d_ff, dtype, specialize, target), in_ffn=True)
        report = report_of(plan, architecture)
        assert _reported(r"(\d+) bytes spill stores", report) == _reported(r"(\d+) bytes spill loads", report) == 0
        assert _reported(r"(\d+) bytes stack frame", report) == 0
        name = f"{kernel} of 12 rows a block" if (kernel, dict(plan.defines).get("ROWS")) == ("ffn_23", 12) else kernel
        assert _reported(r"Used (\d+) registers", report) <= REGISTERS[name]
        assert "warning" not in report, report


@pytest.mark.parametrize("architecture", EACH)
@pytest.mark.parametrize("kernel", ["ffn_1", "ffn_12", "ffn_123", "ffn_23", "ffn_4", "decompress"])
def test_weights_in_12_bits_do_not_spill_either(report_of, kernel, architecture):
    for d_model, d_ff, specialize in SHAPES:
        formats = compressed_formats(kernel, d_model, d_ff)
        shape = Shape(d_model, d_ff, "bfloat16", specialize, Target(architecture, 132))
        plan = plan_of(kernel, shape, formats=formats, in_ffn=True)
        report = report_of(plan, architecture)
        assert _reported(r"(\d+) bytes spill stores", report) == _reported(r"(\d+) bytes spill loads", report) == 0, plan
        assert _reported(r"(\d+) bytes stack frame", report) == 0
        assert "warning" not in report, report


def _on_tensor_cores(kernel: str, dims: tuple[int, int], architecture: int, tokens: int = 8, **more) -> launch.Launch:
    shape = Shape(*dims, more.pop("dtype", "bfloat16"), True, Target(architecture, 132))
    return plan_of(kernel, shape, tokens=tokens, batch_invariant=False, **more)


def _assert_nothing_spills(report: str) -> None:
    """In any function: a kernel may call one."""
    for what in ("bytes stack frame", "bytes spill stores", "bytes spill loads"):
        found = re.findall(rf"(\d+) {what}", report)
        assert found and {*found} == {"0"}, report
    assert "warning" not in report, report


@pytest.mark.parametrize("architecture", EACH)
@pytest.mark.parametrize("kernel", ON_TENSOR_CORES)
def test_tensor_cores_do_not_spill_either(report_of, kernel, architecture):
    for d_model, d_ff, specialize in SHAPES:
        if specialize:
            plan = _on_tensor_cores(kernel, (d_model, d_ff), architecture)
            assert plan.kernel == f"{kernel}_mma"
            _assert_nothing_spills(report_of(plan, architecture))


@pytest.mark.parametrize("tokens", range(5, 9))
@pytest.mark.parametrize("kernel", KEPT)
def test_blocks_that_keep_tokens_do_not_spill_either(report_of, kernel, tokens):
    """On the GPUs that launch them: all others have another launch."""
    for d_model, d_ff, dtype in [(4096, 11008, "bfloat16"), (5120, 13824, "float16"), (1024, 8192, "bfloat16")]:
        biases = {"ffn_1": ("gate_bias",), "ffn_12": ("up_bias",), "ffn_123": ("gate_bias", "up_bias")}[kernel]
        more = {} if kernel == "ffn_1" else {"activation": "relu2"}
        knobs = KeptKnobs.rule(Problem(kernel, d_model, d_ff, dtype, tokens=tokens), H100)
        for extras in ((), biases):
            plan = plan_of(kernel, Shape(d_model, d_ff, dtype), knobs, tokens=tokens, extras=extras, **more)
            report = report_of(plan, 90)
            assert plan.kernel == f"{kernel}_kept" and _reported(r"Used (\d+) registers", report) <= 65536 // (12 * 32)
            _assert_nothing_spills(report)


@pytest.mark.parametrize("architecture", [80, 90])
def test_what_tensor_cores_may_have_beside(report_of, architecture):
    for kernel, bias in (("ffn_1", "gate_bias"), ("ffn_4", "down_bias")):
        for more in ({"dtype": "float16"}, {"tokens": 5, "extras": (bias,)}, {"partial": True, "tokens": 6}):
            _assert_nothing_spills(report_of(_on_tensor_cores(kernel, (2304, 3840), architecture, **more), architecture))


@pytest.mark.parametrize("architecture", [80, 86, 90])
def test_lists_of_tensor_cores_fit_a_block_to_the_byte(report_of, architecture):
    """Also where a launch asks for all the shared memory that there is: what a kernel declares would come on top."""
    wide = [(d_model, 64 * n) for d_model in (2048, 4096, 5120, 8192) for n in range(8, 800, 8)]
    plans = [_on_tensor_cores("ffn_4", dims, architecture) for dims in wide]
    served = [plan for plan in plans if plan.kernel == "ffn_4_mma"]
    largest, most = max(served, key=lambda plan: plan.shared_bytes), Target(architecture, 132).shared_bytes
    assert 0.98 * most < largest.shared_bytes <= most and len(served) < len(plans)
    report = report_of(largest, architecture)
    _assert_nothing_spills(report)
    assert " smem" not in report, report


# What a kernel has beside ReLU: the activations that cost more than it with all their biases, and the norm; on the oldest GPU,
# on the one that was measured and on the newest, for the dims of 7B and those of AFM-4.5B, whose ffn_4 has 32 warps.
OTHERS = {
    "ffn_1": [("relu", ("gate_bias",))],
    "ffn_12": [("relu2", ("up_bias",))],
    "ffn_123": [(activation, ("gate_bias", "up_bias")) for activation in ("relu2", "drelu")],
    "ffn_23": [(activation, ("up_bias",)) for activation in ("relu2", "drelu")],
    "ffn_4": [("relu", ("down_bias", "norm_weight"))],
}


@pytest.mark.parametrize("architecture", [EACH[0], 90, EACH[-1]])
@pytest.mark.parametrize("weights", ["bfloat16", "float32", "12 bits"])
@pytest.mark.parametrize("kernel", OTHERS)
def test_activations_biases_and_norm_do_not_spill_either(report_of, kernel, weights, architecture):
    """Nor take more registers than the budget."""
    assert set(OTHERS) == {name for name, interface in KERNELS.items() if interface.optional}
    for d_model, d_ff in ((4096, 11008), (2560, 18432)):
        more = {"formats": compressed_formats(kernel, d_model, d_ff)} if weights == "12 bits" else {}
        dtype = "bfloat16" if more else weights
        for activation, extras in OTHERS[kernel]:
            shape = Shape(d_model, d_ff, dtype, True, Target(architecture, 132))
            plan = plan_of(kernel, shape, activation=activation, extras=extras, in_ffn=True, **more)
            report = report_of(plan, architecture)
            assert _reported(r"(\d+) bytes spill stores", report) == _reported(r"(\d+) bytes spill loads", report) == 0, plan
            assert _reported(r"(\d+) bytes stack frame", report) == 0
            assert int(re.search(r"(\d+) bytes smem", report + " 0 bytes smem")[1]) == static_shared_bytes(plan)
            name = f"{kernel} of 12 rows a block" if (kernel, dict(plan.defines).get("ROWS")) == ("ffn_23", 12) else kernel
            assert more or _reported(r"Used (\d+) registers", report) <= REGISTERS[name]
            assert "warning" not in report, report


def test_launches_of_the_shipped_tables_do_not_spill(report_of):
    """And have the registers that their blocks leave them on a multiprocessor."""
    for file in measured._SHIPPED.glob("*.json"):
        target = H100._replace(name=json.loads(file.read_text())["gpu"])
        for row in measured.read(file, target):
            plan = launch.plan(replace(row.problem, in_ffn=True), target, row.knobs)
            report = report_of(plan, target.capability)
            assert _reported(r"(\d+) bytes spill stores", report) == _reported(r"(\d+) bytes spill loads", report) == 0, row
            threads = 32 * row.knobs.warps * row.knobs.min_blocks
            assert _reported(r"Used (\d+) registers", report) <= min(255, 65536 // threads), row


# Of models with exact zeros in their FFN: prosparse-llama-2 7B and 13B, MiniCPM-S, Mistral-sized TurboSparse, Minitron, AFM,
# Nemotron-H, BitNet, and ReluLLaMA-70B.
DIMS = [
    (4096, 11008),
    (5120, 13824),
    (1536, 3840),
    (4096, 14336),
    (3072, 9216),
    (2560, 18432),
    (4096, 21504),
    (2560, 6912),
    (8192, 28672),
]


@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("multiprocessors", [16, 28, 188])
def test_real_models_compile_for_gpus_of_any_size(report_of, dtype, multiprocessors):
    """From MIG slices and laptops to the largest: nothing but one flag of ffn_123 depends on the GPU's size."""
    for d_model, d_ff in DIMS:
        shape = Shape(d_model, d_ff, dtype, target=Target(89, multiprocessors))
        for kernel in KERNELS:
            plan = plan_of(kernel, shape)
            assert plan == plan_of(kernel, shape._replace(target=Target(89, 132)))
            if multiprocessors != 28 or kernel not in ("ffn_123", "ffn_4"):
                continue
            report = report_of(plan, 89)
            used = re.search(r"(\d+) bytes smem", report)
            assert (int(used[1]) if used else 0) == static_shared_bytes(plan)
            assert _reported(r"(\d+) bytes spill stores", report) == 0


@pytest.mark.parametrize("architecture", EACH[4:])
@pytest.mark.parametrize(
    ("dtype", "d_model"),
    [("float32", d) for d in (1668, 1728, 1804, 1916)]
    + [(d, n) for d in ("float16", "bfloat16") for n in (3848, 3896, 4016, 4088)],
)
def test_rows_that_end_in_a_second_batch_do_not_spill(report_of, dtype, d_model, architecture):
    plan = plan_of("ffn_23", Shape(d_model, 11008, dtype, target=Target(architecture, 148)))
    report = report_of(plan, architecture)
    assert _reported(r"(\d+) bytes spill stores", report) == _reported(r"(\d+) bytes spill loads", report) == 0
    assert int(re.search(r"(\d+) bytes smem", report)[1]) == static_shared_bytes(plan)


# Eight tokens, which want most registers, for all; fewer where the knobs were measured.
@pytest.mark.parametrize("architecture", EACH)
@pytest.mark.parametrize("kernel", OTHERS)
def test_kernels_of_eight_tokens_hardly_spill(report_of, kernel, architecture):
    _hardly_spills(report_of, kernel, 8, architecture)


@pytest.mark.parametrize("tokens", [2, 3, 4])
@pytest.mark.parametrize("kernel", OTHERS)
def test_kernels_of_several_tokens_hardly_spill(report_of, kernel, tokens):
    _hardly_spills(report_of, kernel, tokens, 90)


def _hardly_spills(report_of, kernel, tokens, architecture):
    """More warps are faster, even where some words of theirs go to memory, which L1 holds."""
    for d_model, d_ff, specialize in SHAPES:
        for formats in ((), compressed_formats(kernel, d_model, d_ff)):
            target = Target(architecture, 132)
            plan = plan_of(kernel, Shape(d_model, d_ff, "bfloat16", specialize, target), tokens=tokens, formats=formats)
            report = report_of(plan, architecture)
            assert _reported(r"(\d+) bytes spill stores", report) <= (96 if specialize else 512), plan
            assert "warning" not in report, report


@pytest.mark.parametrize("architecture", EACH)
@pytest.mark.parametrize(("kernel", "tokens"), [("ffn_23", 1), ("decompress", 1)])
def test_reports_are_those_of_nvrtc(tmp_path, kernel, tokens, architecture):
    """What `report_of` takes for granted, on two kernels; with CUDA 12.9 it was so on every launch that is compiled here."""
    if not _assembler():
        pytest.skip("no ptxas of NVRTC's version: the reports are NVRTC's")
    formats = compressed_formats(kernel, 4096, 11008)
    shape = Shape(4096, 11008, "bfloat16", True, Target(architecture, 132))
    plan = plan_of(kernel, shape, tokens=tokens, formats=formats)
    code, expected = compile_for(plan, architecture)
    found = _assemble(plan, architecture, tmp_path / "assembled")
    facts = re.compile(r"\d+ bytes (?:stack frame|spill \w+|smem)|Used \d+ registers|used \d+ barriers")
    assert facts.findall(found) == facts.findall(expected) and len(facts.findall(expected)) >= 5
    assert _instructions((tmp_path / "assembled").read_bytes()) == _instructions(code)


def _instructions(cubin: bytes) -> bytes:
    """The section of an ELF file that has a kernel's machine code."""
    (offset,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<2I4Q", cubin, offset + i * size) for i in range(count)]
    text_of = [cubin[start : start + length] for _, _, _, _, start, length in sections]
    (code,) = (text for (name, *_), text in zip(sections, text_of, strict=True) if text_of[names][name:].startswith(b".text."))
    return code


def test_older_architectures_are_refused_by_name():
    with pytest.raises(nvrtc.CompileException, match=r"elements\.cuh.*compute capability 8\.0"):
        compile_for(plan_of("ffn_4", Shape(64, 64, "bfloat16")), 75)


WHOLE = (("ACTIVATION_RELU", None), ("DTYPE_FLOAT32", None), ("LOADS", 8), ("W_UP", "Plain"), ("MIN_BLOCKS", 1), ("TOKENS", 1))


@pytest.mark.parametrize(
    ("kernel", "defines", "message"),
    [
        ("ffn_4", (), "exactly one of DTYPE_"),
        ("ffn_4", (("DTYPE_FLOAT16", None), ("DTYPE_FLOAT32", None)), "exactly one of DTYPE_"),
        ("ffn_4", (("DTYPE_FLOAT16", None), ("TOKENS", 1), ("ROW_OPT", 64)), "ROW_OPT and COL_OPT go together"),
        ("ffn_4", (("DTYPE_FLOAT16", None), ("TOKENS", 1), ("ROW_OPT", 64), ("COL_OPT", 12)), "multiple of 16 bytes"),
        ("ffn_4", (("DTYPE_FLOAT32", None),), "define TOKENS, 1 to 8"),
        (
            "ffn_4",
            (("DTYPE_FLOAT32", None), ("TOKENS", 1)),
            "define LANES, LOADS, EACH, UNIT, LISTED, SHARES, LISTS and HERE",
        ),
        ("ffn_1", (("DTYPE_FLOAT32", None), ("TOKENS", 1)), "define LOADS"),
        ("ffn_1", (("DTYPE_FLOAT32", None), ("TOKENS", 1), ("LOADS", 3)), "even loads are even in every batch"),
        ("ffn_23", (*WHOLE, ("WARPS", 3), ("ROWS", 8)), "warps come in pairs"),
        ("ffn_23", (*WHOLE[:-1], ("WARPS", 3), ("TOKENS", 2)), "with several tokens warps come in pairs"),
        ("ffn_23", (*WHOLE[:-1], ("WARPS", 4), ("TOKENS", 2)), "warps that share a row end together"),
        ("ffn_123", (*WHOLE[:-1], ("W_GATE", "Plain"), ("WARPS", 4), ("TOKENS", 2)), "go on to the same ones"),
        (
            "ffn_23",
            (*WHOLE[1:], ("WARPS", 8), ("ROWS", 8)),
            "exactly one of ACTIVATION_RELU, ACTIVATION_RELU2, ACTIVATION_DRELU",
        ),
    ],
)
def test_kernels_refuse_defines_that_make_no_sense(kernel, defines, message):
    plan = launch.Launch(kernel, (1, 1, 1), (32, 1, 1), defines, "PPPii")
    with pytest.raises(nvrtc.CompileException, match=message):
        compile_for(plan, 90)


def test_a_missing_compiler_is_a_clear_error(monkeypatch):
    """What CuPy raises without NVRTC or the CUDA headers, on a stand-in for it: this machine may have no GPU."""

    class NoCompiler:
        class cuda:
            compiler = nvrtc
            Device = staticmethod(lambda index: contextlib.nullcontext())

        @staticmethod
        def RawModule(**_):
            raise RuntimeError("Failed to find CUDA headers")

    monkeypatch.setattr(compiler, "cupy", lambda: NoCompiler)
    monkeypatch.setattr(compiler, "gpu", lambda index: device.Gpu(0, "NVIDIA H100", 90, 132))
    with pytest.raises(compiler.KernelCompileError) as caught:
        compiler.Kernel(plan_of("ffn_4", Shape(64, 64, "bfloat16")), 0)
    for part in ("ffn_4", "NVIDIA H100 (sm_90)", "-DROW_OPT=64", "Failed to find CUDA headers", "prosparse-cupy doctor"):
        assert part in str(caught.value)


def test_the_source_is_self_contained_and_keeps_its_line_numbers():
    for kernel in KERNELS:
        text = source(kernel)
        assert not re.search(r"^#include", text, re.MULTILINE)
        lines = (kernel_folder() / f"{kernel}.cu").read_text().splitlines()
        last = max(i for i, line in enumerate(text.splitlines()) if re.fullmatch(rf'#line \d+ "{kernel}\.cu"', line))
        number = int(text.splitlines()[last].split()[1])
        assert text.splitlines()[last + 1 :] == lines[number - 1 :]


def ptx_of(plan: launch.Launch, architecture: int) -> str:
    """What NVRTC makes of a launch for its assembler."""
    options = (*compiler_options(plan), f"-arch=compute_{architecture}")
    return _compile(plan.kernel, source(plan.kernel), "ptx", options)[0].decode()


@pytest.mark.parametrize("kernel", ["ffn_1", "ffn_123", "ffn_23", "ffn_4"])
def test_weights_are_read_16_bytes_at_a_time(kernel):
    """Nothing is read in words of 4 bytes, and the weights past L1."""
    text = ptx_of(plan_of(kernel, Shape(4096, 11008, "bfloat16")), 90)
    fetched = ".L2::256B" if kernel == "ffn_4" else ""  # whose neighbouring blocks read the rest of a line
    assert f"ld.global.L1::no_allocate{fetched}.v4.u32" in text
    assert not re.search(r"ld\.global(\.nc)?\.[usbf]32", text)
