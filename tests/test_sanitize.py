"""The command that runs compute-sanitizer: what it reads in logs, and when it fails. A program stands in for the tool."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import sanitize
from click.testing import CliRunner

INVALID = """\
========= COMPUTE-SANITIZER
a line of the application
=========
========= Invalid __global__ write of size 4 bytes
=========     at ffn_4+0x90 in ffn_4.cu:271
=========     by thread (3,0,0) in block (7,0,0)
=========     Address 0x7cc43aa00100 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7cc43aa00000 of size 256 bytes
=========         Device Frame: ffn_4+0x30 in ffn_4.cu:190
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cuLaunchKernelEx [0x31b70] in libcuda.so.1
=========
========= Invalid __global__ read of size 16 bytes
=========     at load_once(const uint4 *)+0xb0 in memory.cuh:12
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x1 is misaligned
=========
========= ERROR SUMMARY: 2 errors
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
NO_RACE = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
FIRST, LAST = sanitize._lines_of_the_fetch()
_FETCH = f"void fetch_into_l1<(int)256>(const scalar *, int)+0x2f0 in memory.cuh:{LAST - 2}"
WORD = f"""\
========= Warning: Race reported between Write access at {_FETCH}
=========     and Write access at {_FETCH} [508 hazards]
=========
"""
RACE = """\
========= Error: Race reported between Write access at add_other_half<(int)1>(float (&)[1])+0x90 in row_dot.cuh:186
=========     and Read access at add_other_half<(int)1>(float (&)[1])+0x100 in row_dot.cuh:189 [64 hazards]
=========
"""
UNINITIALISED = """\
========= Uninitialized __global__ memory read of size 4 bytes
=========     at ffn_control(int *)+0x70 in kernel.cu:1
=========     by thread (31,0,0) in block (0,0,0)
=========     Address 0x7f3c7ec000fc
=========
"""
BARRIER = """\
========= Barrier error detected. Invalid arguments
=========     at __cuda_sm70_warpsync+0x30
=========     by thread (16,0,0) in block (0,0,0)
=========     Device Frame:ffn_control(int *)+0x3c0
=========
"""
NEVER_STARTED = """\
========= COMPUTE-SANITIZER
========= Error: Target application terminated before first instrumented API call
========= Tracking kernels launched by child processes requires the --target-processes all option.
"""
OVERFLOW = "========= Warning: Maximum number of hazards reached. The environment can raise it.\n=========\n"


def _race_summary(hazards: int) -> str:
    return f"========= RACECHECK SUMMARY: {hazards} hazard{'s' * (hazards != 1)} displayed (0 errors, {hazards} warnings)\n"


def _tests(total: int, failures: int = 0, skipped: int = 0, errors: int = 0) -> str:
    counts = f'errors="{errors}" failures="{failures}" skipped="{skipped}" tests="{total}"'
    return f'<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite name="pytest" {counts} time="1.0"/></testsuites>'


def test_reports_are_taken_apart():
    said = sanitize.read_log(INVALID)
    assert said.counted == 2 and len(said.reports) == 2
    first, second = (report.splitlines() for report in said.reports)
    assert first[:2] == ["Invalid __global__ write of size 4 bytes", "at ffn_4+0x90 in ffn_4.cu:271"] and len(first) == 8
    assert second[-1] == "Address 0x1 is misaligned"
    assert sanitize.read_log(CLEAN) == sanitize.Said((), 0) == sanitize.read_log(NO_RACE)
    assert sanitize.read_log("") == sanitize.Said((), None)
    assert sanitize.read_log(RACE + WORD + _race_summary(2)).counted == 2
    assert len(sanitize.read_log(RACE + WORD + UNINITIALISED + BARRIER + OVERFLOW).reports) == 5
    assert len(sanitize.read_log(NEVER_STARTED).reports) == 2, "what has no known meaning is a report"


def test_a_clean_run_is_clean():
    for tool, log in (("memcheck", CLEAN), ("racecheck", NO_RACE), ("racecheck", WORD * 3 + _race_summary(3))):
        outcome = sanitize.judge(tool, log, _tests(30, skipped=2))
        assert outcome.is_clean and outcome.passed == 28 and outcome.expected == log.count("Race"), str(outcome)


@pytest.mark.parametrize(
    ("log", "tests", "why"),
    [
        (INVALID, _tests(30), "2 reports"),
        (CLEAN, _tests(30, failures=1), "29 tests passed, 1 failed"),
        (CLEAN, _tests(30, errors=1), "29 tests passed, 1 failed"),
        (CLEAN, _tests(30, skipped=30), "0 tests passed"),
        (CLEAN, _tests(0), "0 tests passed"),
        (CLEAN, "", "0 tests passed"),
        ("", _tests(30), "30 tests passed"),
        (NEVER_STARTED, "", "2 reports"),
        (NEVER_STARTED, _tests(30), "2 reports"),
        (RACE + _race_summary(1), _tests(30), "1 reports"),
        (WORD + _race_summary(7), _tests(30), "1 of the discarded word"),
        (WORD + OVERFLOW + _race_summary(1), _tests(30), "1 reports"),
        (UNINITIALISED + CLEAN, _tests(30), "1 reports"),
        (BARRIER + CLEAN, _tests(30), "1 reports"),
    ],
)
def test_what_is_not_clean(log, tests, why):
    """A report, a failure, no test, no summary, or a summary that counts more than is shown."""
    outcome = sanitize.judge("racecheck", log, tests)
    assert not outcome.is_clean and "NOT CLEAN" in str(outcome) and why in str(outcome)


def test_only_writes_of_the_prefetch_are_of_the_discarded_word():
    """To it all threads write and none reads; whatever else races, it is not that."""
    [word] = sanitize.read_log(WORD).reports
    assert sanitize.is_discarded_word("racecheck", word)
    assert not sanitize.is_discarded_word("memcheck", word)
    others = [
        word.replace("and Write access", "and Read access"),
        word.replace(f"memory.cuh:{LAST - 2}", f"memory.cuh:{LAST + 1}"),
        word.replace(f"memory.cuh:{LAST - 2} [", f"memory.cuh:{FIRST - 1} ["),
        word.replace(f"memory.cuh:{LAST - 2}", f"row_dot.cuh:{LAST - 2}"),
        word.replace(f" in memory.cuh:{LAST - 2}", ""),
        word.replace(f" in memory.cuh:{LAST - 2} [", " ["),
        sanitize.read_log(RACE).reports[0],
    ]
    assert not any(sanitize.is_discarded_word("racecheck", report) for report in others)


def test_the_lines_are_those_of_the_prefetch():
    lines = (sanitize.ROOT / "kernels" / "memory.cuh").read_text().splitlines()[FIRST - 1 : LAST]
    assert "fetch_into_l1" in lines[0] and lines[-1] == "}" and sum("cp.async" in line for line in lines) == 1
    assert "__shared__ unsigned unused;" in "\n".join(lines)
    assert "\n".join(lines).count("unused") == 2, "nothing but its address is taken"


def test_kernels_with_line_numbers_name_the_prefetch_and_have_the_same_instructions(monkeypatch):
    """So that tools look at the code that is shipped."""
    pytest.importorskip("cupy.cuda.compiler", reason="CuPy's NVRTC bindings compile the kernels")
    import test_compile
    from plans import Shape, plan_of

    plan = plan_of("ffn_23", Shape(4104, 1007, "bfloat16"))
    plain, _ = test_compile.compile_for(plan, 90)
    options = test_compile.compiler_options
    monkeypatch.setattr(test_compile, "compiler_options", lambda plan: (*options(plan), "-lineinfo"))
    lined, _ = test_compile.compile_for(plan, 90)
    assert b"memory.cuh" in lined and b"memory.cuh" not in plain
    assert _section(lined, ".text.ffn_23") == _section(plain, ".text.ffn_23") != b""


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_controls_compile(tool):
    pytest.importorskip("cupy.cuda.compiler", reason="CuPy's NVRTC bindings compile the kernels")
    import test_compile
    from plans import Shape, plan_of

    code, _ = test_compile.compile_for(plan_of("ffn_4", Shape(64, 64, "bfloat16")), 90, sanitize.control_source(tool))
    assert _section(code, ".text.ffn_control")


def _section(elf: bytes, wanted: str) -> bytes:
    """A section of a 64-bit ELF file."""
    table, size, number, names = (int.from_bytes(elf[at : at + n], "little") for at, n in ((40, 8), (58, 2), (60, 2), (62, 2)))
    headers = [elf[table + i * size : table + (i + 1) * size] for i in range(number)]
    offset_of = [int.from_bytes(header[24:32], "little") for header in headers]
    for header, offset in zip(headers, offset_of, strict=True):
        at = offset_of[names] + int.from_bytes(header[:4], "little")
        if elf[at : elf.index(b"\0", at)].decode() == wanted:
            return elf[offset : offset + int.from_bytes(header[32:40], "little")]
    return b""


@pytest.mark.parametrize("tests", [sanitize.TESTS])
def test_the_selected_tests_exist(tests):
    for test in tests:
        file, name = test.split("::")
        assert f"def {name.split('[')[0]}(" in (sanitize.ROOT / "tests" / file).read_text(), test


def test_every_kernel_is_among_those_that_tools_look_at():
    for kernel in sanitize.ROOT.glob("kernels/*.cu"):
        assert kernel.stem.startswith(sanitize._KERNELS), kernel.stem


TOOL = """#!{python}
import json, pathlib, re, sys
arguments = sys.argv[1:]
log, tool, code = (arguments[arguments.index(word) + 1] for word in ("--log-file", "--tool", "-c"))
said = json.loads(pathlib.Path(__file__).with_suffix(".json").read_text())
is_control = "sanitize.control" in code
pathlib.Path(log).write_text(said["control" if is_control else "tests"][tool])
if not is_control and said["junit"]:
    pathlib.Path(re.search("--junitxml=([^']+)", code)[1]).write_text(said["junit"])
"""
CONTROLS = {"memcheck": INVALID, "racecheck": RACE + _race_summary(1), "initcheck": UNINITIALISED, "synccheck": BARRIER}


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """A program in the tool's place, that writes what it is told to."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(TOOL.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: str(program))
    clean = {tool: NO_RACE if tool == "racecheck" else CLEAN for tool in sanitize.TOOLS}

    def says(junit=_tests(30), control=CONTROLS, tests=clean):  # noqa: B008
        program.with_suffix(".json").write_text(json.dumps({"control": control, "tests": tests, "junit": junit}))

    return says


def _run(*arguments, jobs=1):
    done = CliRunner().invoke(sanitize.main, [*arguments, "--jobs", str(jobs)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    return done


def test_the_command_passes_where_all_tools_see_nothing(tool, tmp_path):
    tool()
    done = _run("--json", str(tmp_path / "found.json"))
    assert done.exit_code == 0, done.output
    assert [line.split(":")[:2] for line in done.output.splitlines()] == [[t, " clean"] for t in sanitize.TOOLS]
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(t["passed"], t["is_clean"]) for t in found["tools"]] == [(30, True)] * 4 and {"commit", "gpu"} <= found.keys()


def test_a_tool_is_run_again_by_itself(tool, tmp_path, monkeypatch):
    path = tmp_path / "found.json"
    tool()
    monkeypatch.setattr(sanitize, "commit_of_checkout", lambda: ("before", True))
    _run("--json", str(path))
    monkeypatch.setattr(sanitize, "commit_of_checkout", lambda: ("after", True))
    _run("--tool", "racecheck", "--json", str(path))
    found = json.loads(path.read_text())
    assert found["commit"] == "after" and len(found["tools"]) == len(sanitize.TOOLS)
    assert {t["tool"] for t in found["tools"] if t["commit"] == "after"} == {"racecheck"}


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"control": {**CONTROLS, "racecheck": NO_RACE}}, "racecheck: NOT CLEAN"),
        ({"control": {**CONTROLS, "racecheck": NEVER_STARTED}}, "does not report the control"),
        ({"tests": dict.fromkeys(sanitize.TOOLS, RACE + _race_summary(1))}, "add_other_half"),
        ({"junit": _tests(30, failures=2)}, "28 tests passed, 2 failed"),
        ({"junit": _tests(3, skipped=3)}, "no test passed"),
        ({"junit": ""}, "no test passed"),
        ({"tests": dict.fromkeys(sanitize.TOOLS, "")}, "did not run to its end"),
    ],
)
def test_the_command_fails(tool, said, why):
    """Also where the tool does not see the mistake that it is shown first."""
    tool(**said)
    done = _run("--tool", "racecheck")
    assert done.exit_code == 1 and why in done.output, done.output


def test_processes_divide_the_tests(tool, tmp_path):
    """Each with its own log, and what one reports counts."""
    tool()
    done = _run("--tool", "racecheck", "--json", str(tmp_path / "found.json"), jobs=3)
    assert done.exit_code == 0 and "90 tests passed" in done.output, done.output
    program = Path(sanitize.find_sanitizer())
    program.write_text(
        program.read_text() + f"if ', 1, 3)' in code: pathlib.Path(log).write_text({RACE + _race_summary(1)!r})\n"
    )
    done = _run("--tool", "racecheck", jobs=3)
    assert done.exit_code == 1 and "90 tests passed, 0 failed, 1 reports" in done.output, done.output
    program.write_text(program.read_text().replace("write_text(said", "write_text('' if ', 2, 3)' in code else said"))
    done = _run("--tool", "racecheck", jobs=3)
    assert done.exit_code == 1 and "60 tests passed" in done.output and "without a word" in done.output, done.output


def test_shares_are_all_tests():
    shares = []
    for number in range(3):
        shares.append([*range(10)])
        sanitize.Share(number, 3).pytest_collection_modifyitems(shares[-1])
    assert sorted(n for share in shares for n in share) == [*range(10)] and all(shares)


def test_the_command_fails_without_the_tool(monkeypatch):
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    done = _run()
    assert done.exit_code == 1 and "there is no compute-sanitizer: pip install" in done.output


def test_a_tool_that_hangs_is_ended(tool, tmp_path):
    tool()
    program = Path(sanitize.find_sanitizer())
    program.write_text(program.read_text() + "import time; is_control or time.sleep(600)\n")
    done = _run("--tool", "memcheck", "--limit", "1")
    assert done.exit_code == 1 and "it did not end within 1 s" in done.output
