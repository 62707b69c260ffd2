"""Whole models: tokens a second of greedy decoding at batch 1, dense and patched, and where the time goes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from prosparse_cupy import synthetic
from prosparse_cupy._dense import Dense
from prosparse_cupy._gpu import cupy
from prosparse_cupy.models import Model
from prosparse_cupy.torch import SparsityMeter, patch_model, register_fatrelu, unpatch_model
from prosparse_cupy.torch.patch import gated_mlps

from . import layers as exact
from .conditions import Yardsticks
from .layers import Layers
from .measure import GRAPH, OURS, Setting, graph_clock, measure
from .results import DecodeRow
from .stats import Times, interleave, summarise

CONTEXT = 512
"""Positions of the static cache: attention reads all of them at every step."""
_PROMPT = 32
_NEW_TOKENS = 32
_HEAD_SIZE = 128
_DENSEST, _SPARSEST = 1.6, 0.4  # active share of the first and the last layer, in terms of the average
_LEAST_SHARE, _MOST_SHARE = 1e-4, 0.45  # of tokens that a neuron is active for: a normal gate needs less than half


@dataclass(frozen=True)
class Parts:
    """Milliseconds a token, and where they go: what a step takes less without the FFNs, and without the attentions."""

    step: Times
    ffn_ms: float
    attention_ms: float

    @property
    def rest_ms(self) -> float:
        return self.step.median * 1e-3 - self.ffn_ms - self.attention_ms


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


def step_graph(model: nn.Module, prompt: torch.Tensor, compiled: bool = False) -> Callable[[], object]:
    """Prefill, then one greedy step as a CUDA graph: each replay decodes one more token into a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
    token = model(prompt, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
    forward = torch.compile(model.forward, fullgraph=True, dynamic=False) if compiled else model

    def step() -> None:
        token.copy_(forward(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(holds: tuple[Any, ...] = (token, cache)) -> None:  # a graph does not keep what was allocated before it
        graph.replay()

    return replay


def _graphs(model: nn.Module, prompt: torch.Tensor, name: str) -> dict[str, Callable[[], object]]:
    graphs = {name: step_graph(model, prompt), f"{name} compiled": step_graph(model, prompt, compiled=True)}
    torch.compiler.reset()
    for part in ("mlp", "self_attn"):
        with _without(model, part):
            graphs[f"{name} without {part}"] = step_graph(model, prompt)
    return graphs


def _parts(times: dict[str, Times], name: str) -> Parts:
    step = times[name]
    ffn, attention = (step.median - times[f"{name} without {part}"].median for part in ("mlp", "self_attn"))
    return Parts(step, ffn * 1e-3, attention * 1e-3)


@torch.inference_mode()
def measure_model(
    model: nn.Module, label: str, dense: Dense, yard: Yardsticks, repeats: int, tell: Callable[[str], None]
) -> list[DecodeRow]:
    """Rows of one model: a step in a CUDA graph, and `generate` as it is. The model comes and goes unpatched."""
    prompt = torch.randint(1, model.config.vocab_size, (1, _PROMPT), generator=torch.Generator().manual_seed(0)).to(
        model.device
    )
    tell("dense graphs")
    graphs = _graphs(model, prompt, "dense")
    kept = [mlp.down_proj.weight.data for _, mlp in gated_mlps(model)]  # the dense graph reads them where they are
    report = patch_model(model)
    if len(report.sparse) < len(report.layers):
        raise ValueError(f"{label} was not patched whole:\n{report}")
    tell("patched graphs")
    graphs |= _graphs(model, prompt, "sparse")
    tell("steps")
    times = interleave(graphs, graph_clock, dict.fromkeys(graphs, 1), repeats)
    sparsity, errors = _sparsity_and_errors(model, prompt)
    del graphs, kept
    unpatch_model(model)
    tell("generate")
    eager = _generate_times(model, prompt, rounds=max(2, repeats // 10))

    config = model.config
    record = Model(
        label, config.hidden_size, config.intermediate_size, config.num_hidden_layers, report.layers[0].threshold, sparsity
    )
    tell("SparseFFN by itself")
    operator = _operator(record, dense, yard, repeats)
    parts = {name: _parts(times, name) for name in ("dense", "sparse")}
    epsilon = float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps)
    row = DecodeRow(
        op="decode",
        variant="CUDA graph",
        model=label,
        d_model=record.d_model,
        d_ff=record.d_ff,
        n_layers=record.n_layers,
        dtype="bfloat16",
        context=CONTEXT,
        sparsity=sparsity,
        time_us=parts["sparse"].step.median,
        p10_us=parts["sparse"].step.p10,
        p90_us=parts["sparse"].step.p90,
        dense_us=parts["dense"].step.median,
        ffn_ms=parts["sparse"].ffn_ms,
        attention_ms=parts["sparse"].attention_ms,
        rest_ms=parts["sparse"].rest_ms,
        dense_ffn_ms=parts["dense"].ffn_ms,
        dense_attention_ms=parts["dense"].attention_ms,
        dense_rest_ms=parts["dense"].rest_ms,
        operator_us=operator,
        error=max(e for e, _ in errors),
        dense_error=max(d for _, d in errors),
        checked=all(e <= 2 * d + epsilon for e, d in errors),
        noisy=any(t.is_noisy for t in times.values()),
    )
    nothing = dict.fromkeys(
        ("ffn_ms", "attention_ms", "rest_ms", "dense_ffn_ms", "dense_attention_ms", "dense_rest_ms", "operator_us"),
        float("nan"),
    )
    as_is = replace(
        row,
        variant="generate()",
        time_us=eager["sparse"].median,
        p10_us=eager["sparse"].p10,
        p90_us=eager["sparse"].p90,
        dense_us=eager["dense"].median,
        noisy=any(t.is_noisy for t in eager.values()),
        **nothing,
    )
    return [row, as_is]


def _generate_times(model: nn.Module, prompt: torch.Tensor, rounds: int) -> dict[str, Times]:
    """Microseconds a token of eager `generate`, patched and unpatched in turns, prefill included."""
    samples: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(rounds):
        for name in samples:
            if name == "sparse":
                patch_model(model)
            for counted in (False, True, True):
                torch.cuda.synchronize()
                start = time.perf_counter()
                model.generate(prompt, max_new_tokens=_NEW_TOKENS, min_new_tokens=_NEW_TOKENS, do_sample=False)
                torch.cuda.synchronize()
                if counted:
                    samples[name].append((time.perf_counter() - start) * 1e6 / _NEW_TOKENS)
        unpatch_model(model)
    return {name: summarise(np.array(values)) for name, values in samples.items()}


def _sparsity_and_errors(model: nn.Module, prompt: torch.Tensor) -> tuple[float, list[tuple[float, float]]]:
    """Average sparsity of decoded tokens, and each layer's error on one of them: the patched MLP's and the dense path's."""
    with SparsityMeter(model) as meter:
        cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
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
    gate = cupy().asarray(exact._dot(w_gate, token)).astype(token.dtype)
    on = cupy().asnumpy(gate.astype(np.float32)) >= np.float32(mlp.threshold)
    wanted = exact._down(cupy().asarray(exact._x1(gate, w_up, token, on)).astype(token.dtype), w_down_t)
    outputs = mlp(x), mlp(x.expand(1, 2, -1))[:, :1]
    norm = float(np.linalg.norm(wanted)) or 1.0
    sparse, dense = (float(np.linalg.norm(out.double().cpu().numpy().ravel() - wanted)) / norm for out in outputs)
    return sparse, dense


def _operator(record: Model, dense: Dense, yard: Yardsticks, repeats: int) -> float:
    """Microseconds of `SparseFFN` by itself at these dims and this sparsity, as `ffn` and `sweep` measure it."""
    setting = Setting("SparseFFN", record, record.name, "bfloat16", "hot", record.sparsity)
    (row,) = (r for r in measure(Layers(record, "bfloat16", dense), setting, dense, yard, GRAPH, repeats) if r.variant == OURS)
    if not row.checked:
        raise ValueError(f"SparseFFN failed its check at the dims of {record.name}")
    return row.time_us


def free_memory() -> None:
    """Give back what a model held."""
    gc.collect()
    torch.cuda.empty_cache()
    cupy().get_default_memory_pool().free_all_blocks()


def load(folder: Path) -> nn.Module:
    """A checkpoint on the GPU, in bfloat16."""
    register_fatrelu()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("cuda").eval()
