"""What each process of a group does in `test_parallel.py`."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import time
import warnings
import weakref
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import prosparse_cupy.torch as psct
from prosparse_cupy.families import MLPFamily
from prosparse_cupy.formula import Formula
from prosparse_cupy.torch import parallel as of_parallel
from prosparse_cupy.torch import patch
from prosparse_cupy.torch.mlp import SparseGatedMLP, SparseMLP
from prosparse_cupy.torch.sparsity import SparsityMeter


def _loaded(path: str, dtype: str, is_aligned: bool = True) -> Any:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of `tp_plan`, which newer versions take in a config
        model = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", dtype=getattr(torch, dtype)).eval()
    with torch.inference_mode(False):
        for parameter in model.parameters() if is_aligned else ():  # those of a file may lie at any multiple of eight bytes
            of_parallel.set_local(parameter, of_parallel.local_of(parameter).detach().clone())
    return model


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Whole tensors, of which every process must ask at once."""
    state = model.state_dict()
    return {name: (v.full_tensor() if of_parallel.is_split(v) else v).cpu().clone() for name, v in state.items()}


def _is_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _with_example(options: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """Options of `patch_model`, whose example, if they have one, are these tokens."""
    return {**options, "example": ids[:1]} if "example" in options else options


@torch.no_grad()
def patched(path: str, dtype: str, ids: list[list[int]], options: dict[str, Any]) -> dict[str, Any]:
    """A model that transformers has split: patched, asked, and unpatched."""
    model = _loaded(path, dtype)
    text = torch.tensor(ids, device=model.device)
    layers = [layer.mlp for layer in model.model.layers]
    projections = [getattr(mlp, name) for mlp in layers for name in ("gate_proj", "up_proj", "down_proj")]
    forwards = [p.__dict__["forward"] for p in projections]
    before, state = model(text).logits, _state(model)
    report = psct.patch_model(model, **_with_example(options, text))
    found: dict[str, Any] = {
        "most tokens": [layer.most_tokens for layer in report.layers],
        "sparse": [layer.sparse for layer in report.layers],
        "reasons": [layer.reason for layer in report.layers],
        "decoding": [matrix.decoding for matrix in report.matrices],
        "parallel": all(isinstance(layer.mlp, SparseMLP) and layer.mlp.parallel is not None for layer in model.model.layers),
        "one token": model(text[:1, :1]).logits.cpu(),
        "eight": model(text[:1, :8]).logits.cpu(),
        "many": model(text).logits.cpu(),
        "state is kept": _is_same(_state(model), state),
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found["text"] = psct.generate(model, text[:1, :8], max_new_tokens=20, do_sample=False).tolist()
        found["two texts"] = psct.generate(model, text[:, :8], max_new_tokens=12, do_sample=False).tolist()
        torch.manual_seed(dist.get_rank())
        found["sampled"] = psct.generate(model, text[:1, :8], max_new_tokens=12, do_sample=True).tolist()
        found["guessed"] = psct.generate(
            model, text[:1, :8], max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3
        ).tolist()
    found["warnings"] = [str(w.message) for w in caught if str(w.message).startswith("generate:")]
    psct.unpatch_model(model)
    found["unpatched"] = torch.equal(model(text).logits, before) and _is_same(_state(model), state)
    found["modules"] = all(layer.mlp is mlp for layer, mlp in zip(model.model.layers, layers, strict=True)) and all(
        getattr(mlp, name) is p
        for mlp, group in zip(layers, zip(*[iter(projections)] * 3, strict=True), strict=True)
        for name, p in zip(("gate_proj", "up_proj", "down_proj"), group, strict=True)
    )
    found["forwards"] = all(p.__dict__["forward"] is f for p, f in zip(projections, forwards, strict=True))
    found["contiguous"] = all(of_parallel.local_of(p.weight).is_contiguous() for p in projections)
    return found


def written_in_time(path: str, ids: list[list[int]]) -> tuple[list[list[int]], list[str]]:
    model = _loaded(path, "float32")
    psct.patch_model(model)
    text = torch.tensor(ids[:1], device=model.device)[:, :8]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = psct.generate(model, text, max_new_tokens=6, do_sample=False, max_time=1000.0)
    return found.tolist(), [str(w.message) for w in caught if str(w.message).startswith("generate:")]


def patched_otherwise(path: str, options: dict[str, Any]) -> None:
    psct.patch_model(_loaded(path, "bfloat16"), **options)


def patched_but_one_fails(path: str) -> list[bool]:
    """The second layer of the last process raises; whether anything has been left changed."""
    model, before = _loaded(path, "float32"), patch._why_not_replaced
    calls = []

    def failing(*arguments: Any) -> str:
        calls.append(1)
        if len(calls) == 2 and dist.get_rank() == dist.get_world_size() - 1:
            raise torch.OutOfMemoryError("no memory, says the test")
        return before(*arguments)

    patch._why_not_replaced = failing
    try:
        psct.patch_model(model)
    except Exception as error:
        assert not any(isinstance(m, SparseMLP) for m in model.modules())
        raise error
    finally:
        patch._why_not_replaced = before
    return []


def patched_but_one_refuses(path: str) -> tuple[list[bool], list[str]]:
    """The first layer of the last process has a hook."""
    model = _loaded(path, "float32")
    if dist.get_rank() == dist.get_world_size() - 1:
        model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: None)
    report = psct.patch_model(model, linears=False)
    return [layer.sparse for layer in report.layers], [layer.reason for layer in report.layers]


@torch.no_grad()
def measured(path: str, ids: list[list[int]], patches: bool) -> tuple[list[float], list[tuple[float, ...]], list[int], str]:
    model = _loaded(path, "float32")
    if patches:
        psct.patch_model(model)
    with SparsityMeter(model) as meter:
        for token in ids[0]:
            model(torch.tensor([[token]], device=model.device))
        model(torch.tensor(ids, device=model.device))
    report = meter.report()
    return [x.active for x in report.layers], [x.ranks for x in report.layers], [x.neurons for x in report.layers], str(report)


def _whole(d_model: int, d_ff: int, dtype: str, kind: str) -> SparseMLP:
    torch.manual_seed(0)
    torch.set_default_device(_device())
    try:
        return _made(d_model, d_ff, dtype, kind)
    finally:
        torch.set_default_device("cpu")


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _made(d_model: int, d_ff: int, dtype: str, kind: str) -> SparseMLP:
    if kind in ("gated", "compressed"):
        mlp = SparseGatedMLP(d_model, d_ff, 0.05, dtype=getattr(torch, dtype))
        if kind == "compressed":
            for name in ("gate_proj", "up_proj", "down_proj"):
                weight = getattr(mlp, name).weight
                setattr(mlp, name, psct.CompressedLinear(weight, transposed=name == "down_proj"))
        return mlp
    module = nn.Module()
    module.up_proj, module.down_proj = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
    return SparseMLP.of(module.to(getattr(torch, dtype)), MLPFamily("two matrices"), Formula(0.0, "relu2", gated=False))


def patched_where_mlps_are_whole(path: str, ids: list[list[int]]) -> tuple[list[bool], bool, bool, Tensor]:
    """Only attention is split."""
    from transformers import LlamaConfig

    before = LlamaConfig.base_model_tp_plan
    LlamaConfig.base_model_tp_plan = {name: style for name, style in before.items() if "mlp" not in name}
    try:
        model = _loaded(path, "float32")
    finally:
        LlamaConfig.base_model_tp_plan = before
    report = psct.patch_model(model)
    mlps = [layer.mlp for layer in model.model.layers]
    text = psct.generate(model, torch.tensor(ids[:1], device=model.device)[:, :8], max_new_tokens=8, do_sample=False).cpu()
    whole = all(isinstance(mlp, SparseMLP) and mlp.parallel is None for mlp in mlps)
    return [layer.sparse for layer in report.layers], whole, of_parallel.parallel_of(model) is not None, text


@torch.no_grad()
def sharded(d_model: int, d_ff: int, dtype: str, kind: str, tokens: list[int]) -> dict[str, Any]:
    """A whole module, and its shards over all processes, of the same inputs."""
    whole = _whole(d_model, d_ff, dtype, kind)
    before = copy.deepcopy(whole.state_dict())
    shard = whole.shard(dist.group.WORLD)
    assert all(torch.equal(v, before[n]) for n, v in whole.state_dict().items()) and whole.parallel is None
    generator = torch.Generator().manual_seed(1)
    found: dict[str, Any] = {"d_ff": shard.d_ff, "type": type(shard).__name__, "whole": [], "shards": [], "exact": []}
    for n in tokens:
        x = torch.randn(1, n, d_model, generator=generator).to(_device(), getattr(torch, dtype))
        found["whole"].append(whole(x).float().cpu())
        found["shards"].append(shard(x).float().cpu())
        found["exact"].append(whole.double()(x.double()).cpu() if kind == "gated" else found["whole"][-1].double())
        whole.to(getattr(torch, dtype)) if kind == "gated" else None
    part = shard.partial(x.reshape(-1, d_model)[:1].flatten())
    assert part is not None and part.dtype == torch.float32
    found["sum"] = shard.parallel.sum(part.clone()).cpu()
    found["one"] = shard(x.reshape(-1, d_model)[:1].flatten()).float().cpu()
    found["copied"] = torch.equal(copy.deepcopy(shard)(x), shard(x))
    return found


def shard_of(d_ff: int, ranks: int | None = None, again: bool = False, others: int = 0) -> None:
    group = dist.group.WORLD if ranks is None else dist.new_group(list(range(ranks)))
    mlp = _whole(8, d_ff + others * dist.get_rank(), "float32", "gated")
    shard = mlp.shard(group)
    if again:
        shard.shard(group)


def shard_is_pickled() -> None:
    pickle.dumps(_whole(8, 9, "float32", "gated").shard(dist.group.WORLD))


def shard_outlives_its_group() -> tuple[bool, str]:
    """Whether a destroyed group is gone though a shard is there, and what calling the shard then says."""
    group = dist.new_group()
    shard, x = _whole(8, 9, "float32", "gated").shard(group), torch.randn(1, 8, device=_device())
    with torch.no_grad():
        shard(x)
    seen = weakref.ref(group)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    try:
        shard(x)
    except RuntimeError as error:
        return seen() is None, str(error)
    return seen() is None, ""


def shard_with_gradients() -> None:
    _whole(8, 9, "float32", "gated").shard(dist.group.WORLD)(torch.randn(20, 8, requires_grad=True, device=_device()))


def compiled() -> bool:
    """A shard in a program that torch compiles."""
    with torch.no_grad():
        shard, x = _whole(64, 45, "bfloat16", "gated").shard(dist.group.WORLD), torch.randn(1, 64, device=_device()).bfloat16()
        own = torch.compile(shard, fullgraph=True, backend="aot_eager")(x)
        return torch.equal(own, shard(x))


def benchmarked() -> list[dict[str, Any]]:
    """`benchmarks parallel` on a small model."""
    from dataclasses import asdict

    from torch.distributed.device_mesh import init_device_mesh

    from benchmarks import parallel
    from prosparse_cupy.models import Model

    mesh, told = init_device_mesh(_device(), (dist.get_world_size(),)), list[str]()
    model = parallel.split_model(Model("small", 256, 690, 2, 0.0, 0.9), "small", mesh)
    return [asdict(row) for row in parallel.measure_parallel(model, "small", mesh.size(), 2, told.append, 64)]


@torch.inference_mode()
def compiled_layers(path: str, options: dict[str, Any] | None, sequences: int = 1) -> bool:
    """Whether a step whose layers torch traces whole, all-reduces among it, gives the logits of one that is not.

    Both are taken before inductor, which fuses and so rounds otherwise.
    """
    import types

    from prosparse_cupy.torch import step as steps

    model = _loaded(path, "bfloat16", is_aligned=options is not None)
    if options is not None:
        psct.patch_model(model, **_with_example(options, torch.arange(1, 30, device=model.device)[None]))
    step = psct.prepare_generation(model, 64, batch_size=sequences)
    step.position.fill_(5)
    step.token.fill_(7)
    layers = step._twin.get_decoder().layers
    steps._let_layers_run(layers, step._layers, step._cache, steps._forward_of)
    with torch.inference_mode():
        expected = step._outputs().clone()
    own = types.FunctionType(steps._forward_of.__code__.replace(), steps._forward_of.__globals__, "layer")
    traced = torch.compile(own, fullgraph=True, dynamic=False, backend="aot_eager")
    steps._let_layers_run(layers, step._layers, step._cache, traced)
    with torch.inference_mode(), steps._recompiling():
        return torch.equal(step._outputs(), expected) and not any(of_parallel.is_split(p) for p in layers.parameters())


@torch.no_grad()
def parts_of_projections(path: str) -> list[bool]:
    """Whether what a step calls in the place of each projection gives its bits, for one token and for several."""
    from prosparse_cupy.torch.linears import LinearShard, known_sharding

    model, found = _loaded(path, "bfloat16"), []
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear) or (sharding := known_sharding(linear)) is None:
            continue
        inputs = linear.in_features // (sharding.parallel.size if sharding.style == "rowwise" else 1)
        part = LinearShard(linear, sharding)
        for tokens in (1, 5):
            torch.manual_seed(len(name) + (dist.get_rank() if sharding.style == "rowwise" else 0))
            x = torch.randn(1, tokens, inputs).to(model.device, torch.bfloat16)
            found.append(torch.equal(part(x), linear(x)))
    return found


@torch.no_grad()
def weights_go_with_the_step(path: str) -> bool:
    """Whether a weight that the model has dropped is gone with a step's modules, before any collection."""
    from prosparse_cupy.torch import step as steps

    model = _loaded(path, "bfloat16")
    gc.collect()
    gc.disable()
    try:
        twin = steps._twin(model)
        linear = twin.get_decoder().layers[0].mlp.up_proj
        assert type(linear).__name__ == "LinearShard", type(linear)
        projection = model.model.layers[0].mlp.up_proj
        weight = weakref.ref(projection._parameters.pop("weight"))
        del twin, linear
        return weight() is None
    finally:
        gc.enable()


@torch.no_grad()
def uneven(path: str, ids: list[list[int]], options: dict[str, Any]) -> dict[str, Any]:
    """Shards of different sizes, of which operators may take one and not the other; a hook that one process has."""
    model = _loaded(path, "bfloat16")
    text = torch.tensor(ids, device=model.device)
    psct.patch_model(model, **options)
    found = {"one": model(text[:1, :1]).logits.cpu(), "many": model(text).logits.cpu()}
    found["text"] = psct.generate(model, text[:1, :8], max_new_tokens=6, do_sample=False).tolist()
    if dist.get_rank() == 0:
        model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: None)
    found["hooked"], found["hooked many"] = model(text[:1, :1]).logits.cpu(), model(text).logits.cpu()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found["hooked text"] = psct.generate(model, text[:1, :8], max_new_tokens=6, do_sample=False).tolist()
    found["warnings"] = [str(w.message) for w in caught if str(w.message).startswith("generate:")]
    return found


def metered_in_one(path: str, ids: list[list[int]]) -> list[list[list[int]]]:
    """A process whose step changes alone: all make another."""
    model = _loaded(path, "float32")
    psct.patch_model(model)
    text, found = torch.tensor(ids[:1], device=model.device)[:, :8], []
    for on in (False, True, False):
        own = dist.get_rank() == 0 and on
        for mlp in [layer.mlp for layer in model.model.layers]:
            mlp.counts = torch.zeros(2, dtype=torch.int64, device=model.device) if own else None
        found.append(psct.generate(model, text, max_new_tokens=8, do_sample=False).tolist())
    return found


def without_memory_in_one(path: str, ids: list[list[int]]) -> Any:
    """The last process has no memory for a second step, then has."""
    from prosparse_cupy.torch.step import Step

    model = _loaded(path, "float32")
    psct.patch_model(model)
    text = torch.tensor(ids, device=model.device)[:, :8]
    psct.generate(model, text[:1], max_new_tokens=4, do_sample=False)
    allocate, failures = Step._allocate, []

    def failing(self: Any, *arguments: Any) -> None:
        if dist.get_rank() == 1 and not failures:
            failures.append(1)
            raise MemoryError("none left, says the test")
        allocate(self, *arguments)

    Step._allocate = failing
    try:
        return psct.generate(model, text, max_new_tokens=4, do_sample=False).tolist()
    finally:
        Step._allocate = allocate


def patched_but_one_cannot_pack(path: str) -> None:
    model, before = _loaded(path, "float32"), patch.made_sparse

    def failing(mlp: Any, family: Any, formula: Any, parallel: Any = None, *others: Any, **more: Any) -> Any:
        if parallel is not None and dist.get_rank() == 1:
            raise torch.OutOfMemoryError("no room, says the test")
        return before(mlp, family, formula, parallel, *others, **more)

    patch.made_sparse = failing
    try:
        psct.patch_model(model)
    finally:
        patch.made_sparse = before


def loaded_again(path: str, other: str, ids: list[list[int]]) -> dict[str, Any]:
    """State dicts into models that are patched, plain and compressed; and what needs gradients stays so."""
    found: dict[str, Any] = {}
    donor = _loaded(other, "bfloat16")
    text = torch.tensor(ids, device=donor.device)
    for name, options in (("plain", {}), ("compressed", {"compress": True})):
        model = _loaded(path, "bfloat16")
        needs = {n: p.requires_grad for n, p in model.named_parameters()}
        psct.patch_model(model, **options)
        with torch.no_grad():
            state = {n: t.clone() for n, t in donor.state_dict().items()}
            model.load_state_dict(state, assign=name == "plain")
            found[name] = [(model(t).logits - donor(t).logits).norm().item() for t in (text[:1, :1], text)]
            model.load_state_dict(model.state_dict())
        if name == "compressed":
            try:
                model(inputs_embeds=torch.randn(1, 3, 64, dtype=torch.bfloat16, device=model.device, requires_grad=True))
            except RuntimeError as error:
                found["gradients"] = str(error)
        psct.unpatch_model(model)
        found[f"{name} needs"] = {n: p.requires_grad for n, p in model.named_parameters()} == needs
    found["size"] = donor(text).logits.norm().item()
    return found


def shards_of_groups(d_ff: int) -> list[int]:
    """By no group, which is all processes, by a mesh, and by what is none."""
    from torch.distributed.device_mesh import init_device_mesh

    mlp = _whole(8, d_ff, "float32", "gated")
    sizes = [mlp.shard(None).d_ff, mlp.shard(init_device_mesh(_device(), (dist.get_world_size(),))).d_ff]
    mlp.shard("all")
    return sizes


def written(path: str, ids: list[list[int]]) -> tuple[list[bool], list[list[int]]]:
    model = _loaded(path, "float32")
    report = psct.patch_model(model)
    text = psct.generate(model, torch.tensor(ids[:1], device=model.device)[:, :8], max_new_tokens=6, do_sample=False)
    return [layer.sparse for layer in report.layers], text.tolist()


def _holders(held: Any, depth: int = 4) -> list[str]:
    """What refers to an object, and to that in turn, by their types and the names that they know it by."""
    found, front, seen = list[str](), [held], {id(held)}
    for level in range(depth):
        behind = []
        for of in front:
            for by in gc.get_referrers(of):
                if id(by) in seen or isinstance(by, FrameType) or by is front or by is behind:
                    continue
                seen.add(id(by))
                names = [str(key) for key, value in by.items() if value is of] if isinstance(by, dict) else []
                found.append(f"{level}: {type(by).__module__}.{type(by).__qualname__} {', '.join(names)}"[:120])
                behind.append(by)
        front = behind[:20]
    return found[:60]


def _holders_of(reference: Any) -> list[str]:
    """Of what a weak reference may still find, which nobody holds on to behind this call."""
    held = reference()
    return [] if held is None else _holders(held)


def sums_of_steps(path: str, ids: list[list[int]]) -> dict[str, Any]:
    """Who adds in the steps of a model, how often memory for that was made, a text of each step, and what holds those that are
    released."""
    from prosparse_cupy.torch import step as steps
    from prosparse_cupy.torch.peers import PeerParallel

    model = _loaded(path, "float32")
    psct.patch_model(model)
    parallel, made = of_parallel.parallel_of(model), steps._twin
    gc.collect()  # steps of models before this one, whose memory is the same group's
    before = parallel.shared_memories
    text, adding = torch.tensor(ids[:1], device=model.device)[:, :8], list[bool]()

    def watched(*arguments: Any) -> Any:
        twin = made(*arguments)
        modules = [*twin.modules()]
        own = [m.parallel for m in modules if isinstance(m, SparseMLP)]
        own += [m._sharding.parallel for m in modules if "_sharding" in m.__dict__ and m._sharding is not None]
        adding.append(len(own) > 4 and all(isinstance(p, PeerParallel) for p in own))
        released.extend(weakref.ref(p) for p in own[:1])
        return twin

    steps._twin = watched
    released = list[Any]()
    found: dict[str, Any] = {"texts": [], "held": []}
    try:
        for _ in range(4):
            found["texts"].append(psct.generate(model, text, max_new_tokens=12, do_sample=False).tolist())
            psct.release_generation(model)
            gc.collect()
            found["held"].append([_holders_of(of) for of in released if of() not in (None, parallel)])
    finally:
        steps._twin = made
    is_base = all(type(m.parallel) is of_parallel.TensorParallel for m in model.modules() if isinstance(m, SparseMLP))
    return {**found, "adding": adding, "made": parallel.shared_memories - before, "is base": is_base}


def compiled_in_one(path: str, ids: list[list[int]]) -> tuple[bool, list[list[int]], list[str]]:
    """torch.compile fails in the last process: no process has a compiled step."""
    from prosparse_cupy.torch import step as steps

    model = _loaded(path, "float32")
    psct.patch_model(model)
    made = steps._compiled

    def failing(*_: Any) -> Any:
        raise RuntimeError("no compiler, says the test")

    if dist.get_rank() == dist.get_world_size() - 1:
        steps._compiled = failing
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            is_compiled = psct.prepare_generation(model, 64).is_compiled
        finally:
            steps._compiled = made
        text = torch.tensor(ids[:1], device=model.device)[:, :8]
        written = psct.generate(model, text, max_new_tokens=12, do_sample=False).tolist()
    return is_compiled, written, [str(w.message) for w in caught if str(w.message).startswith("generate:")]


@torch.no_grad()
def of_a_group_of_one(d_model: int, d_ff: int) -> tuple[str, bool]:
    """Why its GPUs do not add by themselves, and whether its sums are right all the same."""
    from prosparse_cupy.torch.peers import PeerParallel

    group = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    parallel, x = of_parallel.parallel_of_group(group), torch.randn(3, device=_device())
    try:
        PeerParallel(parallel, torch.device(_device(), torch.cuda.current_device() if _device() == "cuda" else 0), 8)
    except OSError as error:
        return str(error), torch.equal(parallel.sum(x.clone()), x)
    return "", False


@torch.no_grad()
def memories(sizes: list[int]) -> list[Any]:
    """Numbers of the memories that are taken for so many bytes, each left again; on the CPU, where none is made."""
    from prosparse_cupy.torch import peers as of_peers

    class Memory:
        def __init__(self, number: int, nbytes: int, device: int, rank: int, tell: Any) -> None:
            assert len({*tell(number)}) == 1
            self.number, self.nbytes, self.device, self.cleared = number, nbytes, device, 0

        def clear(self, tell: Any) -> None:
            assert len({*tell(self.number)}) == 1
            self.cleared += 1

    parallel, device = of_parallel.TensorParallel(dist.group.WORLD), torch.device("cuda", 0)
    made, waited = of_peers.peers.SharedMemory, of_peers.capture.synchronize
    of_peers.peers.SharedMemory, of_peers.capture.synchronize = Memory, lambda _: None
    try:
        found = []
        for turn, nbytes in enumerate(sizes):
            memory = of_peers._taken(parallel, device, nbytes)
            found.append((memory.number, memory.cleared, memory.nbytes >= nbytes))
            if turn != 1 or dist.get_rank() == 0:  # one process still has its second one
                parallel.idle_memory.append(memory)
        return found
    finally:
        of_peers.peers.SharedMemory, of_peers.capture.synchronize = made, waited


class _Failing:
    """A streamer that does not get further than the third token."""

    def __init__(self) -> None:
        self.calls = 0

    def put(self, _: Any) -> None:
        self.calls += 1
        if self.calls == 4:  # the prompt is the first
            raise ValueError("no, says the test")

    def end(self) -> None:
        raise AssertionError("the text is too short for the test")


def fails_in_one(path: str, ids: list[list[int]], where: str, answers: str) -> None:
    """A call that the last process fails in: what it ends with, after how long, what the next one does, and what was heard.

    The answers go to files, since over gloo the last process ends, which is all that gloo notices.
    """
    from prosparse_cupy.torch import failures, runner
    from prosparse_cupy.torch import step as steps

    model, is_last = _loaded(path, "float32"), dist.get_rank() == dist.get_world_size() - 1
    psct.patch_model(model)
    text = torch.tensor(ids[:1], device=model.device)[:, :8]
    before, heard = psct.generate(model, text, max_new_tokens=24, do_sample=False), list[Any]()
    forward, in_step, options = runner.forward, steps.forward, {}

    def failing(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory, says the test")

    if is_last and where == "prefill":
        runner.forward = failing
    if where == "making the step":
        psct.release_generation(model)
        failures._SECONDS_OF_COMPILING = 1.0
        steps.forward = failing if is_last else in_step
    if where == "measuring" and is_last:
        model.register_forward_hook(failing)
    if where == "transformers' loop":
        options = {"output_scores": True, "return_dict_in_generate": True}
    streamer: Any = _Failing() if is_last else _Heard(heard)
    start, error = time.perf_counter(), ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            if where == "measuring":
                psct.measure_sparsity(model, text)
            else:
                psct.generate(model, text, max_new_tokens=24, do_sample=where == "sampling", streamer=streamer, **options)
    except Exception as raised:
        error, kept = f"{type(raised).__name__}: {raised}", raised  # with its frames, and the graphs that they hold
        assert kept.__traceback__ is not None
    finally:
        runner.forward, steps.forward = forward, in_step
    seconds, again = time.perf_counter() - start, ""
    if dist.get_backend() == "nccl":
        try:
            psct.generate(model, text, max_new_tokens=4)
        except RuntimeError as raised:
            again = str(raised)
    found = error, seconds, again, heard, before[0, 8:].tolist()
    Path(answers, f"{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    if is_last and dist.get_backend() == "gloo":
        os._exit(1)


class _Heard:
    """A streamer that keeps the tokens, without the prompt."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens, self._is_prompt = tokens, True

    def put(self, tokens: Any) -> None:
        self._tokens += [] if self._is_prompt else tokens.flatten().tolist()
        self._is_prompt = False

    def end(self) -> None:
        pass
