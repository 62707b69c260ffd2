"""Whole models split over the GPUs of one host by transformers: tokens a second, and what adding the parts costs.

Every process of ``torchrun`` runs this. Models of one GPU, to compare with, are measured by the first process while the others
wait. Weights are random, and made where they lie: no checkpoint is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.distributed import tensor_parallel as hf

from prosparse_cupy.models import Model
from prosparse_cupy.testing.timing import Times
from prosparse_cupy.torch import (
    SparsityMeter,
    generate,
    patch_model,
    prepare_generation,
    release_generation,
    unpatch_model,
)
from prosparse_cupy.torch.parallel import Split, local_of
from prosparse_cupy.torch.step import Step

from .batches import last_positions
from .decode import (
    CONTEXT,
    GENERATE,
    STEP,
    _kernel_times,
    calibrate,
    config_of,
    free_memory,
    shares,
    times_on_the_host,
)
from .results import DecodeRow

KV_HEADS = {"70B": 8}
"""Of models with fewer heads of keys and values than of queries."""
WEIGHTS = ("unpatched", "plain", "bf12")
_PROMPT, _LAST = 32, 16
_FARTHEST = 0.03  # of logits' norm: what bfloat16 leaves of a model of 80 layers


@torch.no_grad()
def split_model(record: Model, label: str, mesh: Any) -> Any:
    """A model as `decode.random_model` makes it, of which every process of a mesh has its part."""
    config = config_of(replace(record, threshold=record.threshold or 0.01))
    config.num_key_value_heads = KV_HEADS.get(label, config.num_key_value_heads)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    _split(model, mesh)
    device = torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    generator = torch.Generator(device).manual_seed(1 + mesh.get_local_rank())
    for name, module in list(model.named_modules()):
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[leaf] = _filled(parameter, device, generator, is_norm=parameter.dim() == 1)
        if name.endswith("rotary_emb"):
            model.set_submodule(name, type(module)(config).to(device))
    model._tp_size = mesh.size()
    calibrate(model, shares(record), record.threshold or 0.01, seed=mesh.get_local_rank())
    return model


def _split(model: Any, mesh: Any) -> None:
    """Have transformers split a model without weights, as `from_pretrained` does."""
    if hasattr(model, "_expand_parallel_plan"):
        hf.apply_tensor_parallelism(model, mesh, model._expand_parallel_plan(dict(model.tp_plan)))
    else:
        hf.apply_tensor_parallelism(model, mesh)


def _filled(parameter: Any, device: torch.device, generator: torch.Generator, is_norm: bool) -> nn.Parameter:
    """A parameter with random values where it had none; the same in all processes where it is whole."""
    split = Split.of(parameter)
    local = torch.empty(local_of(parameter).shape, dtype=parameter.dtype, device=device)
    if is_norm:
        local.fill_(1)
    else:
        local.normal_(0, 0.02, generator=torch.Generator(device).manual_seed(0) if split is None else generator)
    return nn.Parameter(local if split is None else split.of_local(local), requires_grad=False)


@torch.inference_mode()
def measure_parallel(
    model: Any, label: str, gpus: int, repeats: int, tell: Callable[[str], None], context: int = CONTEXT
) -> Iterator[DecodeRow]:
    """Rows of a model on so many GPUs: our step and `generate`, unpatched, patched, and in 12 bits.

    How often something is run does not depend on its times, which are not the same in all processes.
    """
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    prompt = torch.randint(1, model.config.vocab_size, (1, _PROMPT), generator=torch.Generator().manual_seed(0))
    prompt = prompt.to(model.device)
    dense, dense_us = model(prompt[:, :1]).logits.double(), 0.0
    facts: dict[str, Any] = {"sparsity": 0.0, "error": 0.0, "checked": True}
    for weights in WEIGHTS:
        if weights != "unpatched":
            tell(f"{weights}: patching")
            unpatch_model(model)
            report = patch_model(model, compress=weights == "bf12")
            error = ((model(prompt[:, :1]).logits.double() - dense).norm() / dense.norm()).item()
            is_sparse = len(report.sparse) == len(report.layers)
            facts = {"sparsity": _sparsity(model, prompt), "error": error, "checked": error <= _FARTHEST and is_sparse}
        tell(f"{weights}: step and generate")
        _free(model)
        step = prepare_generation(model, context)
        times = times_on_the_host(partial(last_positions, step, context), _LAST, repeats, model.device)
        dense_us = dense_us or times.median
        known = {"weights": weights, "gpus": gpus, "context": context, "dense_us": dense_us, "dense_error": 0.0, **facts}
        yield _row(model, label, STEP, times, **known, **_kernels(model, step, context), prepare_s=step.seconds)
        new, texts = context - _PROMPT, max(2, repeats // 8)
        call = partial(generate, model, prompt, do_sample=False)
        times = times_on_the_host(partial(call, max_new_tokens=new), new, texts, model.device)
        first = times_on_the_host(partial(call, max_new_tokens=1), 1, texts, model.device)
        yield _row(model, label, GENERATE, times, **known, peak_MiB=_peak(model), first_token_ms=first.median / 1000)
        release_generation(model)
        del step, call  # which would keep these weights beside the next ones


def _row(model: Any, label: str, variant: str, times: Times, **known: Any) -> DecodeRow:
    config = model.config
    dims = {"d_model": config.hidden_size, "d_ff": config.intermediate_size, "n_layers": config.num_hidden_layers}
    known |= {"time_us": times.median, "p10_us": times.p10, "p90_us": times.p90, "noisy": times.is_noisy}
    return DecodeRow(op="decode", variant=variant, model=label, dtype="bfloat16", **dims, **known)


def _kernels(model: Any, step: Step, context: int) -> dict[str, float]:
    if model.device.type != "cuda":
        return {}
    return {kind: us / _LAST for kind, us in _kernel_times(partial(last_positions, step, context)).items()}


def _sparsity(model: Any, prompt: torch.Tensor) -> float:
    with SparsityMeter(model) as meter:
        model(prompt)
    return meter.report().sparsity


def _free(model: Any) -> None:
    if model.device.type == "cuda":
        free_memory()
        torch.cuda.reset_peak_memory_stats()


def _peak(model: Any) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if model.device.type == "cuda" else math.nan
