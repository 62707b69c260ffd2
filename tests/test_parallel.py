"""Tensor parallelism: two processes, each with a shard, against one; on the CPU over gloo, on two GPUs over NCCL."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason='the extra "torch" brings it')
transformers = pytest.importorskip("transformers", reason='the extra "hf" brings it')
pytest.importorskip("transformers.distributed.tensor_parallel", reason="this transformers splits models in another way")
import ranks_parallel  # noqa: E402
from ranks import RankError, Ranks, ranks  # noqa: E402

from prosparse_cupy.torch import generate, measure_sparsity, patch_model  # noqa: E402
from prosparse_cupy.torch.parallel import rows_of  # noqa: E402
from prosparse_cupy.torch.peers import among_zeros  # noqa: E402

FOLDER = str(Path(__file__).parent / "data" / "relu-lm")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 156,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "pad_token_id": None,
    "hidden_act": "relu",
}
IDS = [[(7 * i * i + 3 * i + s) % 200 for i in range(24)] for s in (1, 2)]


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def two(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    if request.param == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("fewer than two GPUs")
    with ranks(2, request.param) as group:
        yield group


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A function that saves a random model, and where it did."""
    made: dict[str, str] = {}

    def save(dtype: str, kind: str = "Llama", **changes: Any) -> str:
        key = f"{kind}-{dtype}-{sorted(changes.items())}"
        if key not in made:
            torch.manual_seed(0)
            config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.mul_(3)
            made[key] = str(tmp_path_factory.mktemp("model"))
            model.save_pretrained(made[key])
        return made[key]

    yield save


def _one_process(path: str, dtype: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()


def _close(found: Any, expected: Any, dtype: str) -> None:
    tolerance = {"float32": 2e-5, "bfloat16": 3e-2}[dtype]
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {}),
        ("float32", {"linears": False}),
        ("float32", {"example": True, "batch_invariant": False}),
        ("bfloat16", {}),
        ("bfloat16", {"compress": True}),
        ("bfloat16", {"compress": True, "linears": False}),
    ],
)
def test_a_model_that_transformers_has_split(two, folder, dtype, options):
    path = folder(dtype)
    model = _one_process(path, dtype)
    ids = torch.tensor(IDS)
    with torch.no_grad():
        expected = {"one token": model(ids[:1, :1]).logits, "eight": model(ids[:1, :8]).logits, "many": model(ids).logits}
    found = two.run(ranks_parallel.patched, path, dtype, IDS, options)
    for of_rank in found:
        assert of_rank["sparse"] == [True, True] and of_rank["parallel"], of_rank["reasons"]
        assert of_rank["decoding"] == [True] * (9 if options.get("linears", True) else 0)
        for name, logits in expected.items():
            _close(of_rank[name], logits, dtype)
        for fact in ("state is kept", "unpatched", "modules", "forwards", "contiguous"):
            assert of_rank[fact], fact
        assert not of_rank["warnings"]
        assert all((most < 8) == ("example" in options) for most in of_rank["most tokens"])
    for name in ("text", "two texts", "sampled", "guessed", "one token", "many"):
        assert _equal(found[0][name], found[1][name]), name
    assert found[0]["guessed"] == found[0]["text"]
    if dtype == "float32":
        own = model.generate(ids[:1, :8], max_new_tokens=20, do_sample=False)
        assert found[0]["text"] == own.tolist()
        assert found[0]["two texts"] == model.generate(ids[:, :8], max_new_tokens=12, do_sample=False).tolist()
    if not options.get("linears", True) and dtype == "bfloat16":
        return
    assert found[0]["sampled"][0][:8] == IDS[0][:8] and len(found[0]["sampled"][0]) == 20


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_the_small_model_writes_the_same_text(two):
    """Greedy tokens of one process, dense and patched, and of two."""
    model = _one_process(FOLDER, "float32")
    ids = [list(b"def parse_args("), list(b"class Shape(Nam")]
    vocabulary = model.config.vocab_size
    ids = [[token % vocabulary for token in text] for text in ids]
    dense = model.generate(torch.tensor(ids[:1])[:, :8], max_new_tokens=20, do_sample=False).tolist()
    patch_model(model)
    assert generate(model, torch.tensor(ids[:1])[:, :8], max_new_tokens=20, do_sample=False).tolist() == dense
    for of_rank in two.run(ranks_parallel.patched, FOLDER, "float32", ids, {}):
        assert all(of_rank["sparse"]) and of_rank["text"] == dense and not of_rank["warnings"]


def test_what_processes_may_end_apart_is_left_to_transformers(two, folder):
    path = folder("float32")
    own = _one_process(path, "float32").generate(torch.tensor(IDS[:1])[:, :8], max_new_tokens=6, do_sample=False)
    for text, (warning,) in two.run(ranks_parallel.written_in_time, path, IDS):
        assert text == own.tolist() and "a MaxTimeCriteria, which each process" in warning


def test_families_without_a_gate(two, folder):
    path = folder("float32", "Nemotron", hidden_act="relu2", intermediate_size=160)
    model, ids = _one_process(path, "float32"), torch.tensor(IDS)
    if not getattr(model, "tp_plan", None):
        pytest.skip("this transformers does not split Nemotron")
    with torch.no_grad():
        expected = model(ids).logits
    for of_rank in two.run(ranks_parallel.measured, path, IDS, True):
        assert 0 < of_rank[0][0] < 1 and len(of_rank[1][0]) == 2
    assert expected.isfinite().all()


def test_whole_mlps_of_a_model_that_is_split_elsewhere(two, folder):
    path = folder("float32")
    own = _one_process(path, "float32").generate(torch.tensor(IDS[:1])[:, :8], max_new_tokens=8, do_sample=False)
    for sparse, whole, split, text in two.run(ranks_parallel.patched_where_mlps_are_whole, path, IDS):
        assert sparse == [True, True]
        assert whole
        assert split
        assert text.tolist() == own.tolist()


def test_what_one_process_refuses_all_leave_dense(two, folder):
    for sparse, reasons in two.run(ranks_parallel.patched_but_one_refuses, folder("float32")):
        assert sparse == [False, True]
        assert "(rank 1 of 2)" in reasons[0] and not reasons[1]


def test_what_one_process_fails_in_all_fail_in(two, folder):
    with pytest.raises(RankError) as raised:
        two.run(ranks_parallel.patched_but_one_fails, folder("float32"))
    first, last = raised.value.errors
    assert first.startswith("RuntimeError: rank 1 of 2 failed, so all stop: OutOfMemoryError: no memory, says the test")
    assert last == "OutOfMemoryError: no memory, says the test"


@pytest.mark.parametrize(
    ("one", "other", "name"),
    [
        ({"compress": True}, {}, "compress"),
        ({"threshold": 0.1}, {}, "threshold"),
        ({"example": torch.tensor([[1, 2, 3]])}, {}, "the shape of example"),
        ({"example": torch.tensor([[1, 2, 3]])}, {"example": torch.tensor([[1, 2, 4]])}, "the checksum of example"),
    ],
    ids=["compress", "threshold", "no example", "another example"],
)
def test_calls_that_differ_are_refused(two, folder, one, other, name):
    with pytest.raises(RankError) as raised:
        two.run(ranks_parallel.patched_otherwise, folder("bfloat16"), each=[(one,), (other,)])
    for error in raised.value.errors:
        assert error.startswith(f"ValueError: patch_model: {name} must be the same in all processes of the group, got rank 0: ")


def test_a_wrong_argument_of_one_process_is_told_to_all(two, folder):
    with pytest.raises(RankError) as raised:
        two.run(ranks_parallel.patched_otherwise, folder("bfloat16"), each=[({"threshold": -1.0},), ({},)])
    assert "threshold" in raised.value.errors[0] and "rank 0 of 2 failed" in raised.value.errors[1]


@pytest.mark.parametrize("patches", [True, False])
def test_the_meter_tells_the_share_of_each_process(two, folder, patches):
    path = folder("float32")
    model = _one_process(path, "float32")
    found = two.run(ranks_parallel.measured, path, IDS, patches)
    assert found[0] == found[1]
    active, by_rank, neurons, text = found[0]
    assert neurons == [156, 156] and "active by rank" in text
    expected = measure_sparsity(model, torch.tensor(IDS))
    for share, (a, b), layer in zip(active, by_rank, expected.layers, strict=True):
        assert share == pytest.approx((a + b) / 2) and a != b
        assert share == pytest.approx(layer.active, abs=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["gated", "not gated", "compressed"])
def test_shards_of_a_module(two, kind, dtype):
    if kind == "compressed" and dtype == "float32":
        pytest.skip("compressed weights are bfloat16")
    found = two.run(ranks_parallel.sharded, 64, 45, dtype, kind, [1, 3, 8, 20])
    assert [of_rank["d_ff"] for of_rank in found] == [23, 22]
    for of_rank in found:
        assert of_rank["copied"] and of_rank["type"] == ("SparseMLP" if kind == "not gated" else "SparseGatedMLP")
        for whole, shards, exact in zip(of_rank["whole"], of_rank["shards"], of_rank["exact"], strict=True):
            _close(shards, whole, dtype)
            error, own = (shards.double() - exact).norm(), (whole.double() - exact).norm()
            assert error <= 2 * own + torch.finfo(getattr(torch, dtype)).eps * exact.norm()
        if kind != "not gated":  # which has a bias
            assert torch.equal(of_rank["sum"].to(getattr(torch, dtype)).float(), of_rank["one"])
    assert all(torch.equal(a, b) for a, b in zip(found[0]["shards"], found[1]["shards"], strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1,), "shard: 2 processes are more than its 1 neurons: use a smaller group (rank 0 of 2)"),
        ((9, None, True), "shard: this is a shard already (rank 0 of 2)"),
        ((9, None, False, 1), "shard: d_ff must be the same in all processes of the group, got rank 0: 9, rank 1: 10"),
    ],
)
def test_what_cannot_be_a_shard(two, arguments, message):
    with pytest.raises(RankError) as raised:
        two.run(ranks_parallel.shard_of, *arguments)
    assert raised.value.errors == [f"ValueError: {message}"] * 2


def test_a_shard_belongs_to_its_process(two):
    with pytest.raises(RankError, match="a shard belongs to the process group of this process"):
        two.run(ranks_parallel.shard_is_pickled)
    with pytest.raises(RankError, match="a shard is for inference"):
        two.run(ranks_parallel.shard_with_gradients)


def test_a_destroyed_group_is_not_kept(two):
    """Its threads would live on until the interpreter is taken apart, and abort the process there."""
    for gone, said in two.run(ranks_parallel.shard_outlives_its_group):
        assert gone and "destroyed" in said


def test_a_shard_in_a_compiled_program(two):
    assert two.run(ranks_parallel.compiled) == [True, True]


@pytest.mark.parametrize(("act", "d_ff"), [("silu", 47), ("relu", 47), ("relu", 156)])
@pytest.mark.parametrize("compress", [False, True])
def test_processes_add_alike_whatever_each_takes(two, folder, act, d_ff, compress):
    """The operators refuse 23 inputs and take 24; one process has a hook: the sums are of float32 all the same."""
    path = folder("bfloat16", hidden_act=act, intermediate_size=d_ff)
    model, ids = _one_process(path, "bfloat16"), torch.tensor(IDS)
    with torch.no_grad():
        expected = {"one": model(ids[:1, :1]).logits, "many": model(ids).logits}
    first, last = two.run(ranks_parallel.uneven, path, IDS, {"compress": compress})
    for name in ("one", "many", "hooked", "hooked many", "text", "hooked text"):
        assert _equal(first[name], last[name]), name
    for name, logits in expected.items():
        _close(first[name], logits, "bfloat16")
        _close(first[{"one": "hooked"}.get(name, "hooked many")], logits, "bfloat16")
    for of_rank in (first, last):
        assert len(of_rank["warnings"]) == 1 and "has hooks" in of_rank["warnings"][0]
    assert "(rank 0 of 2)" in last["warnings"][0]


def test_a_step_that_one_process_makes_again_all_make_again(two, folder):
    path = folder("float32")
    own = _one_process(path, "float32").generate(torch.tensor(IDS[:1])[:, :8], max_new_tokens=8, do_sample=False).tolist()
    assert two.run(ranks_parallel.metered_in_one, path, IDS) == [[own] * 3] * 2


def test_memory_that_one_process_lacks_all_free(two, folder):
    path = folder("float32")
    own = _one_process(path, "float32").generate(torch.tensor(IDS)[:, :8], max_new_tokens=4, do_sample=False).tolist()
    assert two.run(ranks_parallel.without_memory_in_one, path, IDS) == [own] * 2


def test_a_layout_that_one_process_cannot_make_no_process_has(two, folder):
    with pytest.raises(RankError) as raised:
        two.run(ranks_parallel.patched_but_one_cannot_pack, folder("float32"))
    assert all("no room, says the test" in error for error in raised.value.errors)


def test_states_are_loaded_into_patched_models(two, folder):
    other = folder("bfloat16", rms_norm_eps=1e-5)  # other numbers
    for found in two.run(ranks_parallel.loaded_again, folder("bfloat16"), other, IDS):
        for name in ("plain", "compressed"):
            assert all(distance <= 0.03 * found["size"] for distance in found[name]), (name, found)
            assert found[f"{name} needs"]
        assert "is for inference" in found["gradients"]


def test_groups_that_a_shard_may_be_of(two):
    with pytest.raises(RankError) as raised:
        two.run(ranks_parallel.shards_of_groups, 9)
    for error in raised.value.errors:
        assert error.startswith("TypeError: group must be a torch.distributed.ProcessGroup") and "got 'all'" in error


@pytest.mark.parametrize("kind", ["Qwen3", "Mistral", "Arcee"])
def test_other_models_that_transformers_splits(two, folder, kind):
    path = folder("float32", kind, **({"hidden_act": "relu2"} if kind == "Arcee" else {}))
    own = _one_process(path, "float32").generate(torch.tensor(IDS[:1])[:, :8], max_new_tokens=6, do_sample=False).tolist()
    assert two.run(ranks_parallel.written, path, IDS) == [([True, True], own)] * 2


@pytest.mark.parametrize("options", [None, {}, {"compress": True}, {"linears": False}])
def test_layers_of_a_step_are_traced_whole(two, folder, options):
    assert two.run(ranks_parallel.compiled_layers, folder("bfloat16"), options) == [True, True]


def test_layers_that_are_too_dense_for_several_tokens_are_traced_whole(two, folder):
    options = {"example": True, "batch_invariant": False}
    assert two.run(ranks_parallel.compiled_layers, folder("bfloat16"), options, 6) == [True, True]


def test_parts_of_projections_give_the_bits_of_their_projections(two, folder):
    path = folder("bfloat16", attention_bias=True, mlp_bias=True)
    assert two.run(ranks_parallel.parts_of_projections, path) == [[True] * 30] * 2


def test_steps_add_through_memory_that_gpus_share(two, folder):
    """And hand it on; in two processes on the CPU, torch.distributed adds."""
    found = two.run(ranks_parallel.sums_of_steps, folder("float32"), IDS)
    on_gpus = two.backend == "nccl"
    for of_rank in found:
        assert len(of_rank["adding"]) == 4 and all(is_peer == on_gpus for is_peer in of_rank["adding"])
        # One for all four steps, or none where a model before this one has left some.
        assert of_rank["made"] <= on_gpus, f"{of_rank['made']} made; held: {of_rank['held']}"
        assert of_rank["is base"]
        assert all(text == found[0]["texts"][0] for text in of_rank["texts"])


def test_what_one_process_cannot_compile_no_process_compiles(two, folder):
    found = two.run(ranks_parallel.compiled_in_one, folder("float32"), IDS)
    assert [is_compiled for is_compiled, *_ in found] == [False, False] and found[0][1] == found[1][1]
    assert [len(warned) for *_, warned in found] == [0, two.backend == "nccl"]


def test_groups_that_no_kernel_adds_for(two):
    for reason, is_right in two.run(ranks_parallel.of_a_group_of_one, 8, 9):
        assert "2 to 8 GPUs, not of 1" in reason and is_right


def test_memory_is_taken_again_where_all_have_left_it(two):
    found = two.run(ranks_parallel.memories, [100, 200, 50, 200, 200, 300])
    assert found[0] == found[1]
    assert [number for number, *_ in found[0]] == [1, 2, 1, 3, 3, 4] and all(fits for *_, fits in found[0])
    assert [cleared for _, cleared, _ in found[0]] == [0, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_what_is_gathered_by_a_sum_is_what_each_process_has(size, dtype):
    """To the bit, but for what is in a NaN."""
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 2.0**-130, -(2.0**-149), 1.5], dtype=torch.float32)
    parts = [torch.cat([special.roll(r), torch.randn(5)]).to(getattr(torch, dtype)).view(1, 1, -1) for r in range(size)]
    total = torch.zeros(1, 1, 13 * size) * -1
    for rank, part in enumerate(parts):
        total = total + among_zeros(part, rank, size)
    found, expected = total.to(parts[0].dtype), torch.cat(parts, -1)
    as_bits = torch.int16 if found.element_size() == 2 else torch.int32
    numbers = ~expected.isnan()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.view(as_bits)[numbers], expected.view(as_bits)[numbers])


@pytest.mark.parametrize("where", ["streamer", "sampling", "prefill", "making the step", "measuring", "transformers' loop"])
@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def test_a_process_that_fails_while_the_others_add(folder, tmp_path, backend, where):
    """The others fail too, with its message; over gloo once it has ended."""
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("fewer than two GPUs")
    with ranks(2, backend) as two, contextlib.suppress(RankError) if backend == "gloo" else contextlib.nullcontext():
        two.run(ranks_parallel.fails_in_one, folder("float32"), IDS, where, str(tmp_path))
    answers = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    (first, seconds, again, heard, text), (last, _, again_of_last, *_) = answers
    is_streamers = where in ("streamer", "sampling", "transformers' loop")
    own = "ValueError: no, says the test" if is_streamers else "OutOfMemoryError: no memory, says the test"
    assert last == (f"FailedAlone: {own}" if where == "making the step" else own)
    assert first == f"RuntimeError: rank 1 of 2 failed, so all stop: {own}"
    assert seconds < 30
    if where != "sampling":
        assert heard == text[: len(heard)]
    if backend == "nccl":
        assert all(f"{own} (the process group has been aborted since" in text for text in (again, again_of_last))


def test_weights_go_with_the_step(two, folder):
    assert two.run(ranks_parallel.weights_go_with_the_step, folder("bfloat16")) == [True, True]


def test_the_benchmark_measures_a_small_model(two):
    first, last = two.run(ranks_parallel.benchmarked)
    ours = [(variant, weights) for weights in ("unpatched", "plain", "bf12") for variant in ("step", "generate()")]
    for rows in (first, last):
        assert [(row["variant"], row["weights"]) for row in rows] == ours
        assert all(row["checked"] and row["gpus"] == 2 and row["time_us"] > 0 for row in rows)
        assert all(row["first_token_ms"] > 0 for row in rows[1::2])
        assert all(abs(row["sparsity"] - 0.9) < 0.05 for row in rows[2:]) and rows[2]["error"] < 0.03
    assert [row["error"] for row in first] == [row["error"] for row in last]


@pytest.mark.parametrize(("size", "number"), [(1, 7), (2, 7), (3, 10), (8, 8), (5, 11008)])
def test_rows_cover_all_neurons_once(size, number):
    parts = [rows_of(rank, size, number) for rank in range(size)]
    assert [n for part in parts for n in range(number)[part]] == list(range(number))
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) - min(lengths) <= 1
