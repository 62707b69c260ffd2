"""The plug-in of vLLM, which it finds as the entry point `prosparse` of the group ``vllm.general_plugins``.

vLLM calls `register` in each of its processes. That only notes what is to happen when vLLM imports its model loader, so it is
free where no model is loaded. Then it wraps two functions of the loader: before a model is made, FATReLU becomes known to
transformers; once its weights are loaded, and before vLLM packs them, `mlp.sparsify` has its FFNs decode sparsely. A model
whose config names no activation that leaves zeros is not touched.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .imports import when_imported

if TYPE_CHECKING:
    from ..torch.patch import PatchReport

SWITCH = "PROSPARSE_VLLM"
"""The environment variable: 0 leaves all models as they are, 1 is the default."""
_LOADER = "vllm.model_executor.model_loader.utils"
_KEY = "prosparse"

logger = logging.getLogger("vllm.prosparse")  # vLLM shows the loggers below its own


def register() -> None:
    """Have vLLM's models decode sparsely where their FFNs leave zeros: vLLM's entry point, which may be called again.

    Raises
    ------
    ValueError
        The environment variable PROSPARSE_VLLM is neither 0 nor 1.
    """
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise ValueError(f"{SWITCH} must be 0 or 1, got {switch!r:.40}: 0 leaves models as they are, 1 is the default")
    if switch == "1":
        when_imported(_LOADER, _wrap)


def report_of(model: Any) -> PatchReport | None:
    """What was done with the FFNs of a model that vLLM has loaded, or None if it was not touched.

    Examples
    --------
    >>> llm.apply_model(report_of)
    """
    report: PatchReport | None = getattr(model, "_prosparse_report", None)
    return report


def _wrap(loader: Any) -> None:
    """Wrap the loader's functions, also where other modules have imported them."""
    if getattr(loader, "_prosparse", False):
        return
    loader._prosparse = True
    made, processed = loader.initialize_model, loader.process_weights_after_loading

    @wraps(made)
    def initialize_model(vllm_config: Any, *arguments: Any, **keywords: Any) -> Any:
        _know_fatrelu(keywords.get("model_config") or vllm_config.model_config)
        return made(vllm_config, *arguments, **keywords)

    @wraps(processed)
    def process_weights_after_loading(model: Any, model_config: Any, *arguments: Any, **keywords: Any) -> Any:
        _sparsify(model, model_config)
        return processed(model, model_config, *arguments, **keywords)

    for function, new in (
        ("initialize_model", initialize_model),
        ("process_weights_after_loading", process_weights_after_loading),
    ):
        old: Any = getattr(loader, function)
        for name, module in list(sys.modules.items()):
            if name.startswith("vllm.") and isinstance(module, ModuleType) and vars(module).get(function) is old:
                setattr(module, function, new)


def _know_fatrelu(model_config: Any) -> None:
    """Have transformers know FATReLU if a config names it, for models that transformers' code makes."""
    from ..formula import FATRELU, said_by

    if said_by(model_config.hf_text_config)[0] == FATRELU:
        from ..torch import register_fatrelu

        register_fatrelu()


def _sparsify(model: Any, model_config: Any) -> None:
    from .mlp import names_zeros, sparsify

    if not names_zeros(model_config.hf_config):
        return
    if reason := _why_untouched():
        logger.info("prosparse: the FFNs stay dense: %s", reason)
        return
    report = sparsify(model, model_config.hf_config, _engine())
    model._prosparse_report = report
    _mark_compiled_code(report)
    _log(report)


def _why_untouched() -> str:
    """Why vLLM's settings leave no room for sparse FFNs, or nothing."""
    import vllm.envs as envs
    from vllm.config import get_current_vllm_config_or_none
    from vllm.model_executor.offloader.base import NoopOffloader, get_offloader

    config = get_current_vllm_config_or_none()
    if config is None or not isinstance(config.additional_config, dict):
        return "vLLM's additional_config is no dict, so compiled code could be taken for that of other layers"
    if config.lora_config is not None:
        return "LoRA adapters are on"
    if envs.VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT is on, and few tokens would have other bits than many"
    if not isinstance(get_offloader(), NoopOffloader):
        return "weights are offloaded"
    return ""


def _engine() -> Any:
    from vllm.distributed import tensor_model_parallel_all_reduce
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.layers.linear import LinearBase

    from .mlp import Engine

    return Engine(LinearBase, CustomOp, _why_dense, tensor_model_parallel_all_reduce, _keep)


def _keep(layer: Any) -> None:
    """Have vLLM not pack a weight for oneDNN, as it does on the CPU with all others."""
    layer._cpu_skip_gemm_dispatch = True


def _why_dense(layer: Any, is_down: bool) -> str:
    """Why a projection's weight cannot be read as it is, or nothing."""
    from vllm.model_executor.layers.linear import (
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        ReplicatedLinear,
        RowParallelLinear,
        UnquantizedLinearMethod,
    )

    kinds = {RowParallelLinear} if is_down else {ColumnParallelLinear, MergedColumnParallelLinear}
    if type(layer) not in {*kinds, ReplicatedLinear}:
        return f"a {type(layer).__name__}"
    if type(layer.quant_method) is not UnquantizedLinearMethod:
        return f"its weight is quantised ({type(layer.quant_method).__name__})"
    if layer.bias is not None and layer.skip_bias_add:
        return "its bias is added elsewhere"
    if getattr(layer, "gather_output", False) or not getattr(layer, "input_is_parallel", True):
        return "its input or output is not sharded as its weight"
    return ""


def _mark_compiled_code(report: PatchReport) -> None:
    """Have vLLM keep compiled code of these layers apart from that of others, and from that of a model left alone.

    vLLM finds compiled code by a hash of its settings, of which `additional_config` is one, before it traces the model.
    """
    from vllm.config import get_current_vllm_config

    if not report.sparse:
        return
    settings = get_current_vllm_config().additional_config
    said = repr([settings.get(_KEY), *((layer.name, str(layer.formula)) for layer in report.sparse)])
    settings[_KEY] = hashlib.sha256(said.encode()).hexdigest()


def _log(report: PatchReport) -> None:
    sparse, layers = report.sparse, report.layers
    if not layers:
        logger.info("prosparse: the FFNs stay dense: none is of a family that is known")
        return
    kinds = ", ".join(sorted({str(layer.formula) for layer in sparse}))
    logger.info("prosparse: %d of %d FFNs decode sparsely%s", len(sparse), len(layers), f": {kinds}" if kinds else "")
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        if not layer.sparse:
            reasons.setdefault(layer.reason, []).append(layer.name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 1} others" if len(names) > 1 else ""
        logger.info("prosparse: %s%s stay dense: %s", names[0], more, reason)
