"""Whole models: tokens a second of greedy decoding at batch 1, dense and patched, and where the time goes."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch._inductor.config
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import ArceeConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, StaticCache

from prosparse_cupy.device import cupy
from prosparse_cupy.formula import ACTIVATIONS, FATRELU, said_by
from prosparse_cupy.models import Model
from prosparse_cupy.numerics import within_contract
from prosparse_cupy.testing import synthetic, truth
from prosparse_cupy.testing.timing import Times, graph_clock, interleave, summarise
from prosparse_cupy.testing.torch_dense import capture
from prosparse_cupy.torch import (
    CompressedLinear,
    SparseMLP,
    SparsityMeter,
    generate,
    patch_model,
    prepare_generation,
    register_fatrelu,
    release_generation,
    unpatch_model,
)
from prosparse_cupy.torch.families import mlps
from prosparse_cupy.torch.parallel import local_of
from prosparse_cupy.torch.step import Step, cache_name

from .conditions import Yardsticks
from .results import DecodeRow

CONTEXT = 512
"""Tokens of prompt and answer, and of the cache."""
EAGER, STATIC = "transformers' generate()", "transformers' generate(), static cache"
COMPILED, STEP, GENERATE = "compiled step", "step", "generate()"
"""A step of the whole model by torch.compile in a CUDA graph; the step of our `generate`, and `generate` as called."""
_LAST = 16  # positions of the context that steps are timed on
_PROFILED = 8  # steps
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
    """A LLaMA of these dims with random weights in bfloat16 on the GPU, each layer as sparse as `shares` says.

    One whose record has no sparsity has SiLU, and one without a gate is an Arcee of AFM-4.5B's attention. Random weights leave
    half of squared ReLU's neurons at zero, so more of them come from a threshold, which `measure_model` is given too.
    """
    config = config_of(record)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if record.sparsity > 0:
        calibrate(model, shares(record), record.threshold)
    return model


def config_of(record: Model) -> Any:
    """The config of such a model."""
    register_fatrelu()
    has_zeros = record.sparsity > 0
    dims = {
        "hidden_size": record.d_model,
        "intermediate_size": record.d_ff,
        "num_hidden_layers": record.n_layers,
        "num_attention_heads": record.d_model // _HEAD_SIZE,
        "num_key_value_heads": record.d_model // _HEAD_SIZE,
        "max_position_embeddings": 4096,
        "attn_implementation": "sdpa",
    }
    if not record.gated:
        more = {"num_key_value_heads": 4, "vocab_size": 128_004, "bos_token_id": 1, "eos_token_id": 2}
        return ArceeConfig(**dims | more, hidden_act=record.activation)
    if has_zeros:
        return LlamaConfig(**dims, hidden_act="fatrelu", hidden_act_param=record.threshold)
    return LlamaConfig(**dims, hidden_act="silu")


def shares(record: Model) -> np.ndarray:
    """Average share of active neurons by layer, falling from the first to the last as in trained models."""
    return (1 - record.sparsity) * np.linspace(_DENSEST, _SPARSEST, record.n_layers)


@torch.no_grad()
def calibrate(model: nn.Module, layer_shares: np.ndarray, threshold: float, seed: int = 0) -> None:
    """Scale the rows of every gate so that a layer has this share of active neurons, some far more often than others.

    Without a gate these are the rows of the up-projection.

    A token enters the FFN with norm sqrt(d_model), so a gate with random weights of standard deviation s is normal with
    standard deviation s * sqrt(d_model), and active with probability P where that is threshold / quantile(1 - P).
    """
    rng = np.random.default_rng(seed)
    local_of(model.get_input_embeddings().weight).normal_(
        0, 1
    )  # the residual stream's scale, so that the norm's epsilon does not count
    for (_, mlp, family), share in zip(mlps(model), layer_shares, strict=True):
        weight = local_of(getattr(mlp, family.gate or family.up).weight)
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


def compiled_step(model: nn.Module, prompt: torch.Tensor, context: int) -> Callable[[], None]:
    """What transformers and torch offer: prefill, then one greedy step, compiled as a whole, as a CUDA graph.

    Each replay decodes one more token into a static cache. Where the cache is full, decoding goes on behind the prompt again.
    """
    cache = StaticCache(config=model.config, max_cache_len=context)
    keywords = {cache_name(model): cache}
    token = model(prompt, **keywords).logits[:, -1].argmax(-1, keepdim=True)
    forward = torch.compile(model.forward, fullgraph=True, dynamic=False, options=_with_programmatic_launches())

    def step() -> None:
        token.copy_(forward(token, **keywords).logits[:, -1].argmax(-1, keepdim=True))

    replay_step = capture([step], runs_before=3)
    start = prompt.shape[1]
    positions = itertools.cycle(range(start, context))

    def replay(holds: Any = (token, step)) -> None:  # a graph keeps neither what was allocated before it nor its kernels
        if next(positions) == start:
            for layer in cache.layers:
                layer.cumulative_length.fill_(start)
        replay_step()

    return replay


def _with_programmatic_launches() -> dict[str, Any] | None:
    return {"triton.enable_pdl": True} if hasattr(torch._inductor.config.triton, "enable_pdl") else None


def _our_step(step: Step, context: int) -> Callable[[], None]:
    """`generate`'s step, over and over on the last positions of the context, where it takes longest."""
    positions = itertools.cycle(range(context - _LAST, context))

    def replay() -> None:
        if next(positions) == context - _LAST:
            step.position.fill_(context - _LAST)
        step.run()

    return replay


def _times(replay: Callable[[], None], repeats: int) -> Times:
    return interleave({"step": replay}, graph_clock, {"step": 1}, repeats)["step"]


def _generate_times(call: Callable[[], Any], tokens: int, rounds: int) -> Times:
    """Microseconds a token of a call that writes so many, prefill and all."""
    samples = []
    for turn in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if turn:  # the first one warms up
            samples.append((time.perf_counter() - start) * 1e6 / tokens)
    return summarise(np.array(samples))


def times_on_the_host(call: Callable[[], Any], steps: int, repeats: int, device: torch.device) -> Times:
    """Microseconds a step of a call that runs so many, by the host's clock; the first call warms up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    samples = []
    for turn in range(repeats + 1):
        wait()
        start = time.perf_counter()
        call()
        wait()
        if turn:
            samples.append((time.perf_counter() - start) * 1e6 / steps)
    return summarise(samples)


_KINDS = (  # what a kernel is for, by a part of its name; those of cuBLAS, NCCL and of torch among them
    ("all_reduce_us", ("nccl", "all_reduce", "allreduce")),
    ("sparse_ffn_us", ("ffn_123", "ffn_23", "ffn_4")),
    ("attention_us", ("attend", "fmha", "flash", "cudnn", "attention")),
    ("matrices_us", ("ffn_1", "gemv", "gemm", "cutlass", "splitk", "nvjet", "xmma")),
)


def _kernel_times(replay: Callable[[], None]) -> dict[str, float]:
    """Microseconds that a token's kernels take, summed by what they are for."""
    replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(_PROFILED):
            replay()
        torch.cuda.synchronize()
    sums = dict.fromkeys((*(kind for kind, _ in _KINDS), "small_us"), 0.0)
    for kernel in profiler.key_averages():
        # Kernels that inductor fuses are named after the operators that they stand between.
        name = "" if kernel.key.startswith("triton_") else kernel.key.lower()
        kind = next((kind for kind, parts in _KINDS if any(part in name for part in parts)), "small_us")
        sums[kind] += kernel.self_device_time_total / _PROFILED
    return sums


def _bytes_of_a_token(model: nn.Module, sparsity: float, context: int) -> int:
    """What a token must read: every matrix once, of sparse FFNs only active rows, and the keys and values before it."""
    total = 0
    for _, module in model.named_modules():
        if isinstance(module, (nn.Linear, CompressedLinear)):
            total += module.packed.nbytes if isinstance(module, CompressedLinear) else module.weight.nbytes
    for _, mlp, _ in mlps(model):
        if isinstance(mlp, SparseMLP):
            for linear in (mlp.up_proj, mlp.down_proj) if mlp.family.gated else (mlp.down_proj,):
                whole = linear.packed.nbytes if isinstance(linear, CompressedLinear) else linear.weight.nbytes
                total -= round(sparsity * whole)
    config = model.config
    heads, head_dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    return total + 2 * config.num_hidden_layers * heads * head_dim * 2 * context


@torch.inference_mode()
def measure_model(
    model: nn.Module,
    prompt: torch.Tensor,
    label: str,
    yard: Yardsticks,
    repeats: int,
    tell: Callable[[str], None],
    context: int = CONTEXT,
    threshold: float | None = None,
) -> list[DecodeRow]:
    """Rows of one unpatched model, which is patched and compressed in turn: steps, and what users call.

    `threshold` is one by hand, as for `patch_model`.
    """
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    has_zeros = said_by(model.config)[0] in (*ACTIVATIONS, FATRELU)
    facts: dict[str, Any] = {"sparsity": 0.0, "error": 0.0, "dense_error": 0.0, "checked": True}
    if has_zeros:
        tell("sparsity and errors")
        patch_model(model, threshold)
        facts = _sparsity_and_errors(model, prompt)
        unpatch_model(model)
    rows = _Rows(model, prompt, label, facts, yard, repeats, tell, context)
    rows.add_compiled()
    if has_zeros:
        rows.add_transformers("unpatched")
    for weights in ("plain", "bf12"):
        tell(f"{weights}: patching")
        unpatch_model(model)
        patch_model(model, threshold, compress=weights == "bf12")
        if has_zeros and weights == "plain":
            rows.add_transformers(weights)
        rows.add_ours(weights)
    return rows.found


class _Rows:
    """The rows of one model, as it is patched in turn."""

    def __init__(
        self,
        model: nn.Module,
        prompt: torch.Tensor,
        label: str,
        facts: dict[str, Any],
        yard: Yardsticks,
        repeats: int,
        tell: Callable[[str], None],
        context: int,
    ) -> None:
        self.found: list[DecodeRow] = []
        self._model, self._prompt, self._tell, self._context = model, prompt, tell, context
        self._repeats, self._rounds = repeats, max(2, repeats // 16)
        self._yard, self._facts = yard, facts
        self._dense_us: dict[str, float] = {}
        """Of the unpatched model, by variant."""
        config = model.config
        self._model_of_row = {
            "op": "decode",
            "model": label,
            "d_model": config.hidden_size,
            "d_ff": config.intermediate_size,
            "n_layers": config.num_hidden_layers,
            "dtype": "bfloat16",
        }

    def add_compiled(self) -> None:
        """The unpatched model's step, compiled whole by torch."""
        self._tell("unpatched: compiled step")
        replay = compiled_step(self._model, self._prompt, self._context)
        kinds = _kernel_times(replay)
        self._add(COMPILED, "unpatched", COMPILED, _times(replay, self._repeats), **kinds, floor_us=self._floor_us())
        del replay
        free_memory()

    def add_transformers(self, weights: str) -> None:
        """What transformers' own `generate` gives, as it is and with a static cache, for which it compiles the step."""
        self._tell(f"{weights}: transformers' generate")
        new = self._context - self._prompt.shape[1]
        call = partial(self._model.generate, self._prompt, do_sample=False)
        few = _generate_times(partial(call, max_new_tokens=_NEW_TOKENS), _NEW_TOKENS, 2 * self._rounds)
        self._add(EAGER, weights, EAGER, few)
        static = partial(call, max_new_tokens=new, cache_implementation="static")
        self._add(STATIC, weights, STATIC, _generate_times(static, new, self._rounds))
        free_memory()

    def add_ours(self, weights: str) -> None:
        """`generate` and its step."""
        self._tell(f"{weights}: step and generate")
        free_memory()
        torch.cuda.reset_peak_memory_stats()
        step = prepare_generation(self._model, self._context)
        replay = _our_step(step, self._context)
        known = {**_kernel_times(replay), "floor_us": self._floor_us(), "prepare_s": step.seconds}
        self._add(STEP, weights, COMPILED, _times(replay, self._repeats), **known)
        new = self._context - self._prompt.shape[1]
        call = partial(generate, self._model, self._prompt, max_new_tokens=new, do_sample=False)
        times = _generate_times(call, new, self._rounds)
        self._add(GENERATE, weights, COMPILED, times, peak_MiB=torch.cuda.max_memory_allocated() / 2**20)
        release_generation(self._model)

    def _floor_us(self) -> float:
        return _bytes_of_a_token(self._model, self._facts["sparsity"], self._context) / self._yard.read_peak

    def _add(self, variant: str, weights: str, beside: str, times: Times, **more: Any) -> None:
        if weights == "unpatched":
            self._dense_us[variant] = times.median
        known = {"time_us": times.median, "p10_us": times.p10, "p90_us": times.p90, "noisy": times.is_noisy}
        known |= {"dense_us": self._dense_us[beside], "context": self._context, "weights": weights}
        self.found.append(DecodeRow(variant=variant, **self._model_of_row, **known, **self._facts, **more))


def _sparsity_and_errors(model: nn.Module, prompt: torch.Tensor) -> dict[str, Any]:
    """Average sparsity of decoded tokens, and on one of them the largest error of a layer: patched MLP and dense path."""
    with SparsityMeter(model) as meter:
        cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
        token = model(prompt, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        meter.reset()
        for _ in range(_NEW_TOKENS):
            token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        sparsity = meter.report().sparsity
    inputs: dict[str, torch.Tensor] = {}
    found = {name: mlp for name, mlp, _ in mlps(model)}
    hooks = [
        mlp.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0].clone()}))
        for name, mlp in found.items()
    ]
    model(token, past_key_values=cache)
    for hook in hooks:
        hook.remove()
    errors = [_errors_of(mlp, inputs[name]) for name, mlp in found.items()]
    epsilon = float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps)
    return {
        "sparsity": sparsity,
        "error": max(e for e, _ in errors),
        "dense_error": max(d for _, d in errors),
        "checked": all(within_contract(e, d, epsilon) for e, d in errors),
    }


def _errors_of(mlp: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """‖out - float64‖ / ‖float64‖ of a patched MLP's sparse path and of its dense one."""
    formula = mlp.formula
    first = mlp.gate_proj if formula.gated else mlp.up_proj
    w_first, w_up, w_down_t, token = map(
        cupy().from_dlpack, (first.weight.data, mlp.up_proj.weight.data, mlp.down_proj.weight.data.t(), x.reshape(-1))
    )
    gate = truth.rounded(truth.dot(w_first, token), token)
    on = formula.active(truth.to_numpy(gate))
    if formula.gated:
        x1 = truth.up(gate, w_up, token, on, activation=formula.activation)
    else:
        x1 = truth.half(gate, formula.activation, on)
    wanted = truth.down(truth.rounded(x1, token), w_down_t)
    outputs = mlp(x), mlp(x.expand(1, 2, -1))[:, :1]
    sparse, dense = (truth.relative_error(cupy().from_dlpack(out.detach().reshape(-1)), wanted) for out in outputs)
    return sparse, dense


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
