"""The pages of docs/: their examples run as they stand, their links lead somewhere, and the API reference is whole."""

from __future__ import annotations

import ast
import gc
import inspect
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from checks import assert_no_worse_than_vendor
from gpu_arrays import OnTorch
from pages import ROOT, Block, anchors, blocks, python_blocks, relative_links

import prosparse_cupy
from prosparse_cupy import compat, reference

DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
pytestmark = pytest.mark.skipif(not DOCS, reason="needs the source tree")


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _with_blocks_for(kind: str) -> list[Path]:
    return [page for page in DOCS if any(block.needs == kind for block in python_blocks(page))]


def _run(page: Path, kind: str) -> dict:
    """The namespace after the page's blocks of this kind, in order."""
    names: dict = {}
    for block in python_blocks(page):
        if block.needs == kind:
            block.run(names)
    return names


def test_every_block_says_what_it_is():
    for page in PAGES:
        for block in blocks(page):
            assert block.language in ("", "bash", "python", "bibtex"), f"{_name(page)}:{block.line}: {block.language}"
            if block.needs == "gpu" or '"cuda"' not in block.code:
                continue
            assert "torch.cuda.is_available()" in block.code, f"{_name(page)}:{block.line}: say that it needs a CUDA GPU"


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=_name)
def test_blocks_compile_and_name_what_there_is(page):
    """Also of those that only a GPU runs."""
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "psc":
                assert node.attr in prosparse_cupy.__all__
            if isinstance(node, ast.ImportFrom) and node.module == "prosparse_cupy.torch":
                assert {name.name for name in node.names} <= set(_public_torch_names())


@pytest.mark.parametrize("page", _with_blocks_for("numpy"), ids=_name)
def test_blocks_run_on_numpy(page):
    _run(page, "numpy")


@pytest.mark.parametrize("page", _with_blocks_for("torch"), ids=_name)
def test_blocks_run_with_torch(page, monkeypatch):
    pytest.importorskip("transformers", reason='the extra "hf" brings it')
    monkeypatch.chdir(ROOT)
    _run(page, "torch")


@pytest.mark.parametrize("page", _with_blocks_for("torchrun"), ids=_name)
def test_blocks_run_in_two_processes(page, tmp_path):
    """As their first lines say, over gloo."""
    pytest.importorskip("transformers.distributed.tensor_parallel", reason="this transformers splits models in another way")
    for block in python_blocks(page):
        if block.needs != "torchrun":
            continue
        said = re.match(r"# (?P<file>\w+\.py): torchrun (?P<options>.*) (?P=file)\n", block.code)
        assert said, f"{_name(page)}:{block.line}: its first line must say how to run it"
        file = tmp_path / said["file"]
        file.write_text(block.code, encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", *said["options"].split(), str(file)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("page", _with_blocks_for("gpu"), ids=_name)
def test_blocks_run_on_a_gpu(page, torch):
    _run(page, "gpu")


def _printing() -> list[tuple[Block, Block]]:
    """Python blocks with what they print in the block after them."""
    return [pair for page in PAGES for pair in pairwise(blocks(page)) if (pair[0].language, pair[1].language) == ("python", "")]


@pytest.mark.parametrize(("block", "printed"), _printing(), ids=lambda block: f"{_name(block.page)}:{block.line}")
def test_blocks_print_what_the_page_shows(block, printed, capsys):
    block.run({})
    assert capsys.readouterr().out == printed.code


def test_operators_by_themselves_give_the_whole_ffn():
    names = _run(ROOT / "docs" / "operators.md", "numpy")
    np.testing.assert_array_equal(names["y"], names["same"])
    np.testing.assert_array_equal(names["res"], names["x1"])


@pytest.mark.gpu
def test_the_captured_ffn_is_right(torch):
    gc.collect()  # a graph that another test left would spoil the capture, were it collected meanwhile
    names, to = _run(ROOT / "docs" / "operators.md", "gpu"), OnTorch()
    w_gate, w_up, w_down, x, y = (names[name] for name in ("w_gate", "w_up", "w_down", "x", "y"))
    gate = torch.mv(w_gate, x)
    s = torch.where(gate >= 0.01, gate, 0)
    dense = torch.mv(w_down, s * torch.mv(w_up, x))
    exact = w_down.double() @ (s.double() * (w_up.double() @ x.double())).to(x.dtype).double()
    torch.cuda.synchronize()
    assert_no_worse_than_vendor(to.get(y), to.get(dense), exact.cpu().numpy())


def test_commands_exist(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])  # last: the installed package goes before the checkout's
    from benchmarks import cli as benchmarks
    from prosparse_cupy import cli

    shell = "\n".join(block.code for page in PAGES for block in blocks(page) if block.language == "bash")
    for command, commands in (("prosparse-cupy", cli.main.commands), ("python -m benchmarks", benchmarks.main.commands)):
        named = set(re.findall(rf"(?:^|&& ){command} ([a-z]+)", shell, re.MULTILINE))
        assert named and named <= set(commands)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_relative_links_lead_somewhere(page):
    for link in relative_links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{_name(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{_name(page)}: {link}: {_name(target.resolve())} has no such heading"


def _public_names() -> set[str]:
    names = {f"prosparse_cupy.{name}" for name in prosparse_cupy.__all__}
    names |= {f"prosparse_cupy.torch.{name}" for name in _public_torch_names()}
    for module in (getattr(compat, name) for name in compat.__all__):
        names |= {f"{module.__name__}.{name}" for name, f in vars(module).items() if _is_public_function(module, name, f)}
    return names


def _public_torch_names() -> list[str]:
    """`prosparse_cupy.torch.__all__` as its file has it: importing it would need torch."""
    text = (ROOT / "prosparse_cupy" / "torch" / "__init__.py").read_text(encoding="utf-8")
    listed = re.search(r"^__all__ = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    return re.findall(r'"(\w+)"', listed[1])


def _is_public_function(module, name: str, value) -> bool:
    return inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")


def test_the_api_reference_has_every_public_name():
    listed = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(listed) == len(set(listed))
    missing = _public_names() - set(listed)
    assert not missing, f"docs/api.md lacks {sorted(missing)}"


def test_functions_of_the_reference_are_documented():
    for name, value in vars(reference).items():
        if _is_public_function(reference, name, value):
            assert value.__doc__, f"reference.{name} would be missing from docs/api.md"


def test_the_site_has_every_page():
    listed = re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    outside = ["index.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
    assert sorted(listed) == sorted([*outside, *(page.relative_to(ROOT / "docs").as_posix() for page in DOCS)])


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocstrings", reason='the extra "docs" brings it')
    pytest.importorskip("material", reason='the extra "docs" brings it')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        for image in re.findall(r'<img [^>]*src="([^":]+)"', page.read_text(encoding="utf-8")):
            assert page.name == "404.html" or (page.parent / image).is_file(), f"{page.relative_to(tmp_path)}: {image}"
    assert "prosparse_cupy.torch.patch_model" in (tmp_path / "api" / "index.html").read_text(encoding="utf-8")


def test_the_citation_is_of_this_version_and_of_the_paper():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {prosparse_cupy.__version__}\n" in text
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    paper, number = re.search(r'ProSparse authors: .*?"(.*?)", arXiv ([\d.]+)', readme).groups()
    assert f'title: "{paper}"' in text and number in text
