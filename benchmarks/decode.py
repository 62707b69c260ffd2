"""Whole models: tokens a second of greedy decoding at batch 1, dense and patched, and where the time goes."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch._inductor.config
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, StaticCache

from prosparse_cupy.device import cupy
from prosparse_cupy.formula import Formula
from prosparse_cupy.models import Model
from prosparse_cupy.numerics import within_contract
from prosparse_cupy.testing import synthetic, truth
from prosparse_cupy.testing.dense import Dense
from prosparse_cupy.testing.layers import Layers
from prosparse_cupy.testing.measure import OURS
from prosparse_cupy.testing.timing import Times, graph_clock, interleave, summarise
from prosparse_cupy.testing.torch_dense import capture
from prosparse_cupy.torch import SparsityMeter, patch_model, register_fatrelu, unpatch_model
from prosparse_cupy.torch.mlp import PROJECTIONS
from prosparse_cupy.torch.patch import gated_mlps

from .conditions import Yardsticks
from .measure import GRAPH as METHOD
from .measure import Setting, measure
from .results import DecodeRow

CONTEXTS = (512, 128)
"""Positions of the static cache: attention reads all of them at every step. Where the time goes is told for the first."""
GRAPH, COMPILED = "CUDA graph", "compiled"
_NAMES = {"plain": "sparse", "bf12": "compressed"}
"""How the steps of a patched model are called, by the format of its FFNs' weights."""
_PROMPT = 32
_NEW_TOKENS = 16
_TEXT = (
    "A language model reads all of its weights for every token that it writes. Where an activation is zero, the weights that "
    "it would be multiplied with need not be read, and the result is the same to the last digit that matters."
)
_HEAD_SIZE = 128
_DENSEST, _SPARSEST = 1.6, 0.4  # active share of the first and the last layer, in terms of the average
_LEAST_SHARE, _MOST_SHARE = 1e-4, 0.45  # of tokens that a neuron is active for: a normal gate needs less than half


def random_prompt(model: nn.Module) -> torch.Tensor:
    """Token ids for a model that has learnt nothing."""
    ids = torch.randint(1, model.config.vocab_size, (1, _PROMPT), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


def random_model(record: Model) -> nn.Module:
    """A LLaMA of these dims with random weights in bfloat16 on the GPU, each layer as sparse as `shares` says."""
    register_fatrelu()
    config = LlamaConfig(
        hidden_size=record.d_model,
        intermediate_size=record.d_ff,
        num_hidden_layers=record.n_layers,
        num_attention_heads=record.d_model // _HEAD_SIZE,
        num_key_value_heads=record.d_model // _HEAD_SIZE,
        hidden_act="fatrelu",
        hidden_act_param=record.threshold,
        max_position_embeddings=4096,
        attn_implementation="sdpa",
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    calibrate(model, shares(record), record.threshold)
    return model


def shares(record: Model) -> np.ndarray:
    """Average share of active neurons by layer, falling from the first to the last as in trained models."""
    return (1 - record.sparsity) * np.linspace(_DENSEST, _SPARSEST, record.n_layers)


@torch.no_grad()
def calibrate(model: nn.Module, layer_shares: np.ndarray, threshold: float, seed: int = 0) -> None:
    """Scale the rows of every `gate_proj` so that a layer has this share of active neurons, some far more often than others.

    A token enters the FFN with norm sqrt(d_model), so a gate with random weights of standard deviation s is normal with
    standard deviation s * sqrt(d_model), and active with probability P where that is threshold / quantile(1 - P).
    """
    rng = np.random.default_rng(seed)
    model.get_input_embeddings().weight.normal_(0, 1)  # the residual stream's scale, so that the norm's epsilon does not count
    for (_, mlp), share in zip(gated_mlps(model), layer_shares, strict=True):
        weight = mlp.gate_proj.weight
        active = torch.as_tensor(_neuron_shares(share, weight.shape[0], rng), dtype=torch.float32, device=weight.device)
        spread = threshold / torch.special.ndtri(1 - active)
        weight.normal_(0, weight.shape[1] ** -0.5)
        weight.mul_(spread[:, None])


def _neuron_shares(share: float, d_ff: int, rng: np.random.Generator) -> np.ndarray:
    """How often each neuron is active: hot and cold ones, `share` on average."""
    popular = synthetic.popularity(d_ff, rng)
    scale = share / popular.mean()
    for _ in range(50):  # clipping takes from the hot ones what the others must have more
        clipped = np.clip(scale * popular, _LEAST_SHARE, _MOST_SHARE)
        scale *= share / clipped.mean()
    return clipped


class _NoAttention(nn.Module):
    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return hidden_states, None


@contextmanager
def _without(model: nn.Module, part: str) -> Iterator[None]:
    """The model with its FFNs, or its attentions, handing on what they get."""
    decoder_layers = model.get_decoder().layers
    removed = [getattr(layer, part) for layer in decoder_layers]
    for layer in decoder_layers:
        setattr(layer, part, nn.Identity() if part == "mlp" else _NoAttention())
    try:
        yield
    finally:
        for layer, module in zip(decoder_layers, removed, strict=True):
            setattr(layer, part, module)


def step_graph(model: nn.Module, prompt: torch.Tensor, context: int, compiled: bool = False) -> Callable[[], None]:
    """Prefill, then one greedy step as a CUDA graph: each replay decodes one more token into a static cache.

    Where the cache is full, decoding goes on behind the prompt again.
    """
    cache = StaticCache(config=model.config, max_cache_len=context)
    token = model(prompt, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
    forward = _compiled(model.forward) if compiled else model

    def step() -> None:
        token.copy_(forward(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True))

    replay_step = capture([step], runs_before=3)
    start = prompt.shape[1]
    positions = itertools.cycle(range(start, context))

    def replay(holds: Any = (token, step)) -> None:  # a graph keeps neither what was allocated before it nor its kernels
        if next(positions) == start:
            for layer in cache.layers:
                layer.cumulative_length.fill_(start)
        replay_step()

    return replay


def _compiled(forward: Callable) -> Callable:
    """By inductor, its kernels launched programmatically as ours are, where this torch can."""
    options = {"triton.enable_pdl": True} if hasattr(torch._inductor.config.triton, "enable_pdl") else None
    return torch.compile(forward, fullgraph=True, dynamic=False, options=options)


def _graphs(model: nn.Module, prompt: torch.Tensor, name: str, contexts: Sequence[int]) -> dict[str, Callable[[], None]]:
    """Steps of every kind: as they are, compiled, and with parts left out."""
    graphs = {}
    for context in contexts:
        graphs[f"{name} {context}"] = step_graph(model, prompt, context)
        graphs[f"{name} {context} {COMPILED}"] = step_graph(model, prompt, context, compiled=True)
    for part in ("mlp", "self_attn"):
        with _without(model, part):
            graphs[f"{name} without {part}"] = step_graph(model, prompt, contexts[0])
    return graphs


def _parts(times: dict[str, Times], name: str, context: int) -> tuple[float, float, float]:
    """Milliseconds that a step takes less without its FFNs, without its attentions, and the rest."""
    step = times[f"{name} {context}"].median
    ffn, attention = (step - times[f"{name} without {part}"].median for part in ("mlp", "self_attn"))
    return ffn * 1e-3, attention * 1e-3, (step - ffn - attention) * 1e-3


@torch.inference_mode()
def measure_model(
    model: nn.Module,
    prompt: torch.Tensor,
    label: str,
    dense: Dense,
    yard: Yardsticks,
    repeats: int,
    tell: Callable[[str], None],
    contexts: Sequence[int] = CONTEXTS,
) -> list[DecodeRow]:
    """Rows of one unpatched model, which is patched in the end: a step in a CUDA graph, compiled or not, and `generate`."""
    tell("dense graphs")
    graphs = _graphs(model, prompt, "dense", contexts)
    # The graphs read weights where they are, wherever patching and compressing lay them.
    kept = [getattr(mlp, name).weight.data for _, mlp in gated_mlps(model) for name in PROJECTIONS]
    report = patch_model(model)
    if len(report.sparse) < len(report.layers):
        raise ValueError(f"{label} was not patched whole:\n{report}")
    tell("patched graphs")
    graphs |= _graphs(model, prompt, "sparse", contexts)
    kept += [mlp.down_proj.weight.data for _, mlp in gated_mlps(model)]
    tell("compressed graphs")
    unpatch_model(model)
    patch_model(model, compress=True)
    graphs |= _graphs(model, prompt, "compressed", contexts)
    tell("steps")
    times = interleave(graphs, graph_clock, dict.fromkeys(graphs, 1), repeats)
    del graphs, kept
    free_memory()
    unpatch_model(model)
    patch_model(model)
    tell("generate")
    eager = _generate_times(model, prompt, rounds=repeats // 2)
    sparsity, errors = _sparsity_and_errors(model, prompt)
    config, threshold = model.config, report.layers[0].threshold
    record = Model(label, config.hidden_size, config.intermediate_size, config.num_hidden_layers, threshold, sparsity)
    tell("SparseFFN by itself")
    operator_us = {weights: _operator_us(record, weights, dense, yard, repeats) for weights in _NAMES}

    epsilon = float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps)
    common = {
        "op": "decode",
        "model": label,
        "d_model": record.d_model,
        "d_ff": record.d_ff,
        "n_layers": record.n_layers,
        "dtype": "bfloat16",
        "sparsity": sparsity,
        "error": max(e for e, _ in errors),
        "dense_error": max(d for _, d in errors),
        "checked": all(within_contract(e, d, epsilon) for e, d in errors),
    }
    rows = []
    for context in contexts:
        as_is = times[f"dense {context}"]
        fastest = min(times[f"dense {context} {COMPILED}"], as_is)
        for weights, name in _NAMES.items():
            split = _split(times, name, context, operator_us[weights]) if context == contexts[0] else {}
            of = {"context": context, "weights": weights, **common}
            rows.append(DecodeRow(variant=GRAPH, **_times_of(times[f"{name} {context}"], as_is), **split, **of))
            compiled = _times_of(times[f"{name} {context} {COMPILED}"], fastest)
            rows.append(DecodeRow(variant=f"{COMPILED}, {GRAPH}", **compiled, **of))
    rows.append(
        DecodeRow(variant="generate()", context=_PROMPT + _NEW_TOKENS, **_times_of(eager["sparse"], eager["dense"]), **common)
    )
    return rows


def _times_of(ours: Times, dense: Times) -> dict[str, Any]:
    """A row's times, µs a token."""
    noisy = ours.is_noisy or dense.is_noisy
    return {"time_us": ours.median, "p10_us": ours.p10, "p90_us": ours.p90, "dense_us": dense.median, "noisy": noisy}


def _split(times: dict[str, Times], name: str, context: int, operator_us: float) -> dict[str, float]:
    """Where a step's time goes, patched and dense."""
    names = ("ffn_ms", "attention_ms", "rest_ms")
    ours, dense = (_parts(times, kind, context) for kind in (name, "dense"))
    return {
        **dict(zip(names, ours, strict=True)),
        **{f"dense_{name}": ms for name, ms in zip(names, dense, strict=True)},
        "operator_us": operator_us,
    }


def _generate_times(model: nn.Module, prompt: torch.Tensor, rounds: int) -> dict[str, Times]:
    """Microseconds a token of eager `generate` on a patched model, its own MLPs and those of before in turns; with prefill."""
    sparse = dict(gated_mlps(model))
    mlps = {"dense": {name: mlp.replaced for name, mlp in sparse.items()}, "sparse": sparse}
    samples: dict[str, list[float]] = {kind: [] for kind in mlps}
    for turn in range(rounds + 1):
        for kind in sorted(mlps, reverse=bool(turn % 2)):  # who goes first changes: the host's pace drifts
            for name, module in mlps[kind].items():
                model.set_submodule(name, module)
            torch.cuda.synchronize()
            start = time.perf_counter()
            model.generate(prompt, max_new_tokens=_NEW_TOKENS, min_new_tokens=_NEW_TOKENS, do_sample=False)
            torch.cuda.synchronize()
            if turn:  # the first one warms up
                samples[kind].append((time.perf_counter() - start) * 1e6 / _NEW_TOKENS)
    for name, module in sparse.items():
        model.set_submodule(name, module)
    return {kind: summarise(np.array(values)) for kind, values in samples.items()}


def _sparsity_and_errors(model: nn.Module, prompt: torch.Tensor) -> tuple[float, list[tuple[float, float]]]:
    """Average sparsity of decoded tokens, and each layer's error on one of them: the patched MLP's and the dense path's."""
    with SparsityMeter(model) as meter:
        cache = StaticCache(config=model.config, max_cache_len=CONTEXTS[0])
        token = model(prompt, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        meter.reset()
        for _ in range(_NEW_TOKENS):
            token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        sparsity = meter.report().sparsity
    inputs: dict[str, torch.Tensor] = {}
    mlps = dict(gated_mlps(model))
    hooks = [
        mlp.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0].clone()}))
        for name, mlp in mlps.items()
    ]
    model(token, past_key_values=cache)
    for hook in hooks:
        hook.remove()
    return sparsity, [_errors_of(mlp, inputs[name]) for name, mlp in mlps.items()]


def _errors_of(mlp: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """‖out - float64‖ / ‖float64‖ of a patched MLP's sparse path and of its dense one."""
    w_gate, w_up, w_down_t, token = map(
        cupy().from_dlpack, (mlp.gate_proj.weight.data, mlp.up_proj.weight.data, mlp.down_proj.weight.data.t(), x.reshape(-1))
    )
    gate = truth.rounded(truth.dot(w_gate, token), token)
    on = Formula(mlp.threshold).active(truth.to_numpy(gate))
    wanted = truth.down(truth.rounded(truth.up(gate, w_up, token, on), token), w_down_t)
    outputs = mlp(x), mlp(x.expand(1, 2, -1))[:, :1]
    sparse, dense = (truth.relative_error(cupy().from_dlpack(out.detach().reshape(-1)), wanted) for out in outputs)
    return sparse, dense


def _operator_us(record: Model, weights: str, dense: Dense, yard: Yardsticks, repeats: int) -> float:
    """Microseconds of `SparseFFN` by itself at these dims and this sparsity, as `ffn` and `sweep` measure it."""
    setting = Setting("SparseFFN", record, record.name, "bfloat16", "hot", record.sparsity, weights)
    (row,) = (r for r in measure(Layers(record, "bfloat16", dense), setting, dense, yard, METHOD, repeats) if r.variant == OURS)
    if not row.checked:
        raise ValueError(f"SparseFFN failed its check at the dims of {record.name}")
    return row.time_us


def free_memory() -> None:
    """Give back what a model and its compiled steps held."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    cupy().get_default_memory_pool().free_all_blocks()


def load(folder: Path, trust_remote_code: bool) -> tuple[nn.Module, torch.Tensor]:
    """A checkpoint on the GPU, in bfloat16, and the first tokens of a text for it."""
    register_fatrelu()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, trust_remote_code=trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    ids = tokenizer(_TEXT, return_tensors="pt").input_ids[:, :_PROMPT]
    return model.to("cuda").eval(), ids.to("cuda")
