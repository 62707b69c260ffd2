"""What the package never does, in its text and while it runs: fetch, start programs, unpickle, or make code of data.

Its one program is the text of its own kernels, which NVRTC compiles. `SECURITY.md` says so to users.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import prosparse_cupy

PACKAGE = Path(prosparse_cupy.__file__).resolve().parent
ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

MODULES = {
    *(
        "asyncio",
        "ftplib",
        "http",
        "httpx",
        "huggingface_hub",
        "requests",
        "smtplib",
        "socket",
        "socketserver",
        "urllib",
        "urllib3",
    ),
    *("cloudpickle", "code", "codeop", "dill", "joblib", "marshal", "multiprocessing", "pickle", "pty", "runpy", "shelve"),
    *("subprocess", "webbrowser", "xmlrpc"),
}
CALLS = {
    *("__import__", "compile", "eval", "exec", "import_module", "execfile", "loads", "system", "popen", "posix_spawn"),
    *(
        "execv",
        "execve",
        "execl",
        "execvp",
        "spawnv",
        "fork",
        "forkpty",
        "from_pretrained",
        "load_file",
        "load_state_dict_from_url",
    ),
    *("load_inline", "set_submodule_from_code", "RawModule", "RawKernel", "ElementwiseKernel", "ReductionKernel"),
    *("CDLL", "fromfile", "memmap", "snapshot_download", "hf_hub_download", "urlopen", "urlretrieve"),
}

ALLOWED = {
    ("checkpoint.py", "loads"): "json.loads of a checkpoint's JSON files",
    ("measured.py", "loads"): "json.loads of a measured table",
    (
        "compiler.py",
        "RawModule",
    ): "NVRTC, of the package's own kernels and of defines that are whole numbers and names of its own",
    ("driver.py", "CDLL"): "NVIDIA's driver, libcuda.so.1, and the C library of this process",
    ("device.py", "import_module"): 'of "cupy", by that name',
    ("torch/loading.py", "from_pretrained"): "of a folder that has a manifest, never of a name on a hub",
    ("torch/commandline.py", "from_pretrained"): "of a folder that is there, which the command line has checked",
}
"""A file and what it calls there, with the reason why it may."""


def _name(node: ast.expr) -> str:
    """The last name of what is called."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def findings(tree: ast.AST) -> set[str]:
    """Modules and functions of the lists above that a source imports or calls; a `load` of torch, NumPy or pickle."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in MODULES}
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in MODULES:
            found.add(node.module)
        elif isinstance(node, ast.Call):
            name = _name(node.func)
            owner = _name(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            is_builtin = isinstance(node.func, ast.Name) or owner == "builtins"
            if name in CALLS and (is_builtin or name not in ("compile", "eval", "exec")):  # no re.compile, no model.eval
                found.add(name)
            if name == "load" and owner in ("torch", "np", "numpy", "pickle", "cupy"):
                found.add(f"{owner}.load")
            found |= {"trust_remote_code=True" for k in node.keywords if k.arg == "trust_remote_code" and _is_true(k.value)}
    return found


def _is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and bool(node.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import socket", "socket"),
        ("from urllib.request import urlopen", "urllib.request"),
        ("def f():\n    import pickle", "pickle"),
        ("os.system('ls')", "system"),
        ("eval(text)", "eval"),
        ("compile(text, '', 'exec')", "compile"),
        ("torch.load(file)", "torch.load"),
        ("np.load(file)", "np.load"),
        ("Auto.from_pretrained('some/name')", "from_pretrained"),
        ("load(folder, trust_remote_code=True)", "trust_remote_code=True"),
        ("importlib.import_module(name)", "import_module"),
    ],
)
def test_the_search_finds(text, found):
    assert findings(ast.parse(text)) == {found}


@pytest.mark.parametrize(
    "text",
    [
        "import re\nre.compile('a')",
        "model.to(device).eval()",
        "from .compiler import load\nload(problem)",
        "session.execute(x)",
        "load(folder, trust_remote_code=trust)",
    ],
)
def test_the_search_leaves_alone_what_is_harmless(text):
    assert findings(ast.parse(text)) == set()


def test_the_package_calls_nothing_that_fetches_starts_or_unpickles():
    assert len(SOURCES) > 50
    found = {
        (source.relative_to(PACKAGE).as_posix(), name)
        for source in SOURCES
        for name in findings(ast.parse(source.read_text(encoding="utf-8")))
    }
    assert found == set(ALLOWED), f"new: {sorted(found - set(ALLOWED))}, gone: {sorted(set(ALLOWED) - found)}"


def test_no_text_of_the_package_names_a_host():
    """No address that a program could ask; the schema of a page is none."""
    for source in SOURCES:
        text = source.read_text(encoding="utf-8")
        assert not re.search(r"\b(?:https?|ftp|ssh|git)://", text), source


# While it runs

WATCHED = """
import os, sys

ALLOWED_PROGRAMS = {allowed}
PACKAGE = {package!r}
bad = []


def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request", "pickle.find_class",
                 "os.exec", "os.posix_spawn", "os.system", "os.fork", "os.forkpty", "pty.spawn"):
        bad.append((event, repr(arguments)[:200]))
    elif event == "subprocess.Popen":
        command = [os.path.basename(str(part)) if i == 0 else str(part) for i, part in enumerate(arguments[1])]
        if command not in ALLOWED_PROGRAMS:
            bad.append((event, repr(command)))
    elif event in ("compile", "exec") and is_ours(sys._getframe(1), event, arguments):
        bad.append((event, repr(arguments)[:200]))


def is_ours(frame, event, arguments):
    # Whether a line of the package itself made code of a text. Modules that it imports are executed too, by importlib's frames.
    name = frame.f_code.co_filename
    if event == "exec" and os.path.isfile(arguments[0].co_filename):
        return False  # a module's own file
    return name.startswith(PACKAGE)


sys.addaudithook(watch)
{code}
print("RAN")
for event in bad:
    print("NOT ALLOWED", *event)
sys.exit(bool(bad))
"""

# Programs that libraries start, none of which is asked for by this package's own code.
PROGRAMS = {
    ("ldconfig", "-p"): "cuda-pathfinder, which CuPy imports, looks for libdl with ctypes.util.find_library",
    ("uname", "-p"): "platform.platform() of Python, in doctor",
}

NUMPY = """
import numpy as np, prosparse_cupy as psc
w = np.ones((8, 16), np.float32)
psc.sparse_ffn(np.ones(16, np.float32), w, w, w)
psc.compress(np.ones((8, 16), np.float32).astype("bfloat16")).decompress()
"""

DOCTOR = """
from prosparse_cupy import cli
try:
    cli.main(["doctor"])
except SystemExit as error:
    assert error.code in (0, 1)  # 1 where something is missing, a GPU for instance
"""

MODEL = """
from pathlib import Path
import torch, transformers
import prosparse_cupy.torch as pt
from prosparse_cupy import cli
from prosparse_cupy.packed import compress_checkpoint

config = transformers.LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
    hidden_act="relu", pad_token_id=0,
)
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
ids = torch.ones((1, 4), dtype=torch.int64)
pt.patch_model(model, compress=True)
pt.generate(model, ids, max_new_tokens=3)
pt.unpatch_model(model)
model.save_pretrained("plain")
compress_checkpoint(Path("plain"), Path("small"))
pt.generate(pt.load_compressed("small", "cpu"), ids, max_new_tokens=3)
try:
    cli.main(["generate", "--model", "plain", "--prompt", "hello"])
except SystemExit as error:
    assert error.code in (0, 1)  # it has no tokenizer: transformers says so, or in earlier versions makes one up
"""


def _watched(code: str, folder: Path, programs=tuple(PROGRAMS)) -> str:
    """What a process reports that ran this with a hook on Python's audit events; its output if there was nothing."""
    text = WATCHED.format(allowed=[list(p) for p in programs], package=f"{PACKAGE}{os.sep}", code=code)
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=False, cwd=folder, env=environment, timeout=600
    )
    assert "RAN" in done.stdout.splitlines() and "Traceback" not in done.stderr, done.stderr
    return "\n".join(line for line in done.stdout.splitlines() if line.startswith("NOT ALLOWED"))


@pytest.mark.parametrize(
    ("code", "reported"),
    [
        ("import subprocess; subprocess.run(['true'])", "subprocess.Popen"),
        ("import socket; s = socket.socket(); s.settimeout(0.1); s.connect_ex(('127.0.0.1', 9))", "socket.connect"),
        ("import pickle, os; pickle.loads(pickle.dumps(os.getcwd))", "pickle.find_class"),
        ("import os; os.system('true')", "os.system"),
        ("c = compile('eval(\"1\")', PACKAGE + 'none.py', 'exec'); exec(c)", "compile"),
    ],
)
def test_the_watch_reports(code, reported, tmp_path):
    assert reported in _watched(code, tmp_path)


@pytest.mark.parametrize("code", [NUMPY, DOCTOR], ids=["numpy", "doctor"])
def test_nothing_is_fetched_started_or_unpickled(code, tmp_path):
    assert _watched(code, tmp_path) == ""


def test_nothing_is_fetched_started_or_unpickled_with_models(tmp_path):
    pytest.importorskip("torch", reason='the extra "torch" brings it')
    pytest.importorskip("transformers", reason='the extra "hf" brings it')
    assert _watched(MODEL, tmp_path) == ""
    assert json.loads((tmp_path / "small" / "prosparse.json").read_text())["weights"]
