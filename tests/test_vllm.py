"""vLLM end to end, on its CPU backend: models that the plug-in patches write what transformers writes. `.ci/vllm` runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from importlib.metadata import entry_points  # noqa: E402

from pages import ROOT, python_blocks  # noqa: E402

from prosparse_cupy.engines import ffn as ffn_module  # noqa: E402
from prosparse_cupy.engines import mlp as mlp_module  # noqa: E402
from prosparse_cupy.engines import vllm as plugin  # noqa: E402
from prosparse_cupy.torch import register_fatrelu  # noqa: E402

PAGE = ROOT / "docs" / "engines.md"
PROMPTS = [[1, 5, 9, 13], [7, 7, 3], list(range(20, 40))]
TOKENS = 8
_WIDTHS: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
_HEADS = {"num_key_value_heads": 2, "head_dim": 64}


def _configs() -> dict[str, Any]:
    return {
        "relu": transformers.LlamaConfig(**_WIDTHS, **_HEADS, hidden_act="relu"),
        "fatrelu": transformers.LlamaConfig(**_WIDTHS, **_HEADS, hidden_act="fatrelu", hidden_act_param=0.5),
        "silu": transformers.LlamaConfig(**_WIDTHS, **_HEADS, hidden_act="silu"),
        "nemotron": transformers.NemotronConfig(**_WIDTHS, **_HEADS, hidden_act="relu2"),
        "arcee": transformers.ArceeConfig(**_WIDTHS, **_HEADS, hidden_act="relu2", mlp_bias=True),
        "persimmon": transformers.PersimmonConfig(**_WIDTHS, hidden_act="relu2"),
    }


_AS_MINICPM = {
    "architectures": ["MiniCPMForCausalLM"],
    "scale_emb": 1,
    "scale_depth": _WIDTHS["num_hidden_layers"] ** 0.5,
    "dim_model_base": _WIDTHS["hidden_size"],
}
"""A LLaMA as MiniCPM's code in vLLM computes it."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[list[int]]]]:
    """Small random models on disk, and what transformers writes with them."""
    register_fatrelu()
    made = {}
    for name, config in _configs().items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        written = []
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            y = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None
            )
            written.append(y[0, len(prompt) :].tolist())
        made[name] = folder, written
    return made


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM in this process, so that a test can look at its model; its cache of compiled code starts empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often an FFN went through the sparse operators, and how often it did not."""
    counts = {"_sparse": 0, "_dense": 0}
    for name in counts:
        was = getattr(ffn_module, name)

        def counted(*arguments: Any, _name: str = name, _was: Any = was) -> Any:
            counts[_name] += 1
            return _was(*arguments)

        monkeypatch.setattr(ffn_module, name, counted)
    return counts


SETTINGS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 2**26,
    "seed": 0,
}


class _Run:
    """What vLLM did with a model in this process."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        from vllm import LLM, SamplingParams
        from vllm.distributed import cleanup_dist_env_and_memory

        settings = {"enforce_eager": True, "distributed_executor_backend": "uni", **SETTINGS, **settings}
        llm = LLM(str(folder), **settings)
        try:
            (self.report,) = llm.apply_model(plugin.report_of)
            (self.first,) = llm.apply_model(_first_projections)
            sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
            written = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling, use_tqdm=False)
            self.tokens = [list(one.outputs[0].token_ids) for one in written]
        finally:
            del llm
            cleanup_dist_env_and_memory()


def _first_projections(model: Any) -> set[tuple[str, ...]]:
    return {module._prosparse.first for module in model.modules() if hasattr(module, "_prosparse")}


def test_vllm_finds_the_plugin() -> None:
    (found,) = entry_points(group="vllm.general_plugins", name="prosparse")
    assert found.load() is plugin.register


@pytest.mark.parametrize(
    ("name", "settings", "first", "formula"),
    [
        ("relu", {"model_impl": "transformers"}, "merged_proj_9_gate_proj_7_up_proj", "relu"),
        ("fatrelu", {"model_impl": "transformers"}, "", "fatrelu(0.5)"),
        ("fatrelu", {"hf_overrides": _AS_MINICPM}, "gate_up_proj", "fatrelu(0.5)"),
        ("nemotron", {"model_impl": "vllm"}, "up_proj", "relu2, no gate"),
        ("nemotron", {"model_impl": "transformers"}, "up_proj", "relu2, no gate"),
        ("arcee", {}, "up_proj", "relu2, no gate"),
        ("persimmon", {}, "dense_h_to_4h", "relu2, no gate"),
    ],
)
def test_greedy_tokens_are_those_of_transformers(
    name: str, settings: dict[str, Any], first: str, formula: str, models: Any, calls: dict[str, int]
) -> None:
    folder, written = models[name]
    run = _Run(folder, **settings)
    assert run.tokens == written
    assert [(layer.sparse, str(layer.formula), layer.reason) for layer in run.report.layers] == [(True, formula, "")] * 2
    assert not first or run.first == {(first,)}
    assert calls["_sparse"] >= 2 * (TOKENS - 1), "decoding did not go through the sparse operators"
    assert calls["_dense"] >= 2, "prefill did not go through torch's matrix products"


def test_bfloat16_passes_the_same_checks(models: Any) -> None:
    for name, settings in (("nemotron", {}), ("relu", {"model_impl": "transformers"})):
        run = _Run(models[name][0], **{**settings, "dtype": "bfloat16"})
        assert len(run.report.sparse) == 2, run.report


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("silu", {}),
        ("silu", {"model_impl": "transformers"}),
        ("relu", {"model_impl": "transformers", "enable_lora": True}),
    ],
)
def test_other_models_are_not_touched(name: str, settings: dict[str, Any], models: Any, calls: dict[str, int]) -> None:
    folder, written = models[name]
    run = _Run(folder, **settings)
    assert (run.tokens, run.report, run.first) == (written, None, set())
    assert calls == {"_sparse": 0, "_dense": 0}


def test_code_that_differs_from_its_config_stays_dense(models: Any, calls: dict[str, int]) -> None:
    run = _Run(models["silu"][0], hf_overrides={"mlp_hidden_act": "relu2"})  # LLaMA's code does not read this key
    assert run.tokens == models["silu"][1]
    assert run.first == set()


def test_compiled_code_has_the_operator_and_is_kept_apart(
    models: Any, calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, written = models["nemotron"]
    for _ in range(2):  # the second finds the code of the first
        calls.update(_sparse=0, _dense=0)
        assert _Run(folder, enforce_eager=False).tokens == written
        assert calls["_sparse"] >= 2 * (TOKENS - 1)
    monkeypatch.setattr(plugin, "_sparsify", lambda model, config: None)
    calls.update(_sparse=0, _dense=0)
    assert _Run(folder, enforce_eager=False).tokens == written
    assert calls == {"_sparse": 0, "_dense": 0}, "a model left alone ran the code of another"


_SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from prosparse_cupy.engines.vllm import report_of

if __name__ == "__main__":
    folder, prompts, settings, sampling = map(json.loads, sys.argv[1:])
    llm = LLM(folder, **settings)
    reports = llm.apply_model(report_of)
    written = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], SamplingParams(**sampling), use_tqdm=False)
    sparse = [None if report is None else len(report.sparse) for report in reports]
    print("RESULT", json.dumps([[list(one.outputs[0].token_ids) for one in written], sparse]))
"""


def _in_own_processes(folder: Path, tmp_path: Path, environment: dict[str, str], **settings: Any) -> Any:
    """Tokens and numbers of sparse layers of each worker, of vLLM with processes of its own."""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    sampling = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
    arguments = (str(folder), PROMPTS, {**SETTINGS, "enforce_eager": True, **settings}, sampling)
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", **environment}
    command = [sys.executable, str(script), *map(json.dumps, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    result = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    assert result is not None, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return json.loads(result.removeprefix("RESULT "))


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="each of two workers needs a core")
@pytest.mark.parametrize(("name", "settings"), [("relu", {"model_impl": "transformers"}), ("arcee", {})])
def test_two_workers_share_each_layer(name: str, settings: dict[str, Any], models: Any, tmp_path: Path) -> None:
    folder, written = models[name]
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    assert _in_own_processes(folder, tmp_path, cores, tensor_parallel_size=2, **settings) == [written, [2, 2]]


def test_one_variable_switches_it_off(models: Any, tmp_path: Path) -> None:
    folder, written = models["nemotron"]
    assert _in_own_processes(folder, tmp_path, {plugin.SWITCH: "0"}) == [written, [None]]


@pytest.mark.skipif(not PAGE.is_file(), reason="needs the source tree")
def test_the_pages_example_runs_as_it_stands(tmp_path: Path) -> None:
    """With all that vLLM does by default: processes of its own, compiled code."""
    (block,) = (block for block in python_blocks(PAGE) if "needs vLLM" in block.before)
    script = tmp_path / "example.py"
    script.write_text(block.code)
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "prosparse: 4 of 4 FFNs decode sparsely: relu" in done.stdout + done.stderr
    assert "def main(self" in done.stdout


def test_what_is_compared_is_tried(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of these tests would tell: a formula with another threshold writes something else."""
    folder, written = models["relu"]
    plan = mlp_module._plan
    monkeypatch.setattr(mlp_module, "_plan", lambda *arguments: plan(*arguments)._replace(threshold=1.0))
    monkeypatch.setattr(mlp_module, "why_outside_the_contract", lambda *arguments: "")
    assert _Run(folder, model_impl="transformers").tokens != written
