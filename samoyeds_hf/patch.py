"""Make a loaded model sparse, and dense again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from samoyeds_hf.compress import compress, matrices_of
from samoyeds_hf.config import SamoyedsConfig
from samoyeds_hf.errors import CalibrationError, ConfigError, UnsupportedModelError
from samoyeds_hf.experts import SparseModule, build_sparse
from samoyeds_hf.format import VALUE_DTYPES, SparseWeight
from samoyeds_hf.pattern import SparsityPattern
from samoyeds_hf.report import PatchReport, WeightReport
from samoyeds_hf.resources import recipe_path
from samoyeds_hf.selection import Assignment, select

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def patch_model(
    model: PreTrainedModel,
    pattern: str | SparsityPattern | None = None,
    *,
    config: SamoyedsConfig | str | Path | None = None,
    strict: bool | None = None,
    calibration: torch.Tensor | PreTrainedTokenizerBase | None = None,
) -> PatchReport:
    """Prune and encode the experts of a loaded model in place, one weight at a time.

    Afterwards ``generate`` and ``save_pretrained`` work as before; a saved model loads with
    ``from_pretrained``. Everything is checked before the first module is replaced. With a method
    that looks at data it goes layer by layer; should data turn out unusable on the way (an input
    that is not finite), the layers before are sparse already. ``recover="block"`` also trains what
    is not pruned in a layer, which :func:`unpatch_model` does not undo.

    Args:
        model: a model of transformers with its weights in memory, on any device.
        pattern: shortcut for ``SamoyedsConfig(pattern)``; the default is "1:2:64".
        config: all settings, or a recipe: a YAML file, or the name of a bundled one.
        strict: overrides ``config.strict``.
        calibration: for methods other than magnitude: tokens ``[N, S]`` int64 without padding, or
            the model's tokenizer, to read what ``config.calibration`` names.

    Raises:
        CalibrationError: a method that needs data without any, or data that cannot be used.
        ConfigError: both pattern and config, or an override that matches nothing.
        PatternError: a weight that the pattern does not divide.
        UnsupportedModelError: no MoE layer, an unsupported one, an already quantised model, or
            weights that are not in memory.
    """
    if pattern is not None and config is not None:
        raise ConfigError("Give pattern or config, found both; put the pattern into the config.")
    if config is None:
        config = SamoyedsConfig(*(() if pattern is None else (pattern,)))
    elif not isinstance(config, SamoyedsConfig):
        config = SamoyedsConfig.from_recipe(recipe_path(config))
    if strict is not None:
        config = SamoyedsConfig(**{**config.to_dict(), "strict": strict})
    _check_calibration(config, calibration)
    _check_patchable(model)
    selection = select(model, config)
    for name in selection.targets:
        _check_weight(name, model.get_parameter(name))
    if config.is_calibrated:
        from samoyeds_hf.patch_layers import patch_calibrated

        reports, config = patch_calibrated(model, selection, config, calibration)
    else:
        reports = []
        for assignment in selection.assignments:
            reports += _make_sparse(model, assignment, config.method)
    _mark_quantized(model, config)
    trained = config.trains_beside
    return PatchReport(tuple(reports), selection.skipped, trained=trained, **config.provenance())


def unpatch_model(model: PreTrainedModel) -> None:
    """Put dense modules back, with the pruned weights; the model is an ordinary one again.

    Raises:
        UnsupportedModelError: the model holds no sparse module, or its weights are offloaded.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, SparseModule)]
    if not names:
        raise UnsupportedModelError(
            "unpatch_model needs a sparse model, found no Samoyeds module; call patch_model first."
        )
    for name in names:
        if any(parameter.is_meta for parameter in model.get_submodule(name).parameters()):
            raise UnsupportedModelError(
                f"unpatch_model needs the weights in memory, found {name} offloaded; load the "
                "model without offload, or use 'samoyeds export-dense'."
            )
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, SparseModule):
            _replace(model, name, module.to_dense())
    vars(model).pop("num_parameters", None)  # the sparse model's own, see hf.py
    model.hf_quantizer.remove_quantization_config(model)
    for submodule in model.modules():
        if hasattr(submodule, "config") and hasattr(submodule.config, "_is_quantized"):
            del submodule.config._is_quantized
    model._weight_conversions = None  # saved again under the names of the Hub


def _make_sparse(model: nn.Module, assignment: Assignment, method: str) -> list[WeightReport]:
    """Put the sparse module in place of one dense module."""
    dense, reports = model.get_submodule(assignment.site.name), []
    stored = {}
    for weight, pattern in assignment.patterns.items():
        name = f"{assignment.site.name}.{weight}"
        stored[weight], report = compress(dense.get_parameter(weight), pattern, method, name)
        reports.append(report)
    del dense  # its weights are freed before packing needs memory
    put_sparse(model, assignment, stored)
    return reports


def put_sparse(
    model: nn.Module, assignment: Assignment, stored: Mapping[str, SparseWeight]
) -> None:
    """Put a sparse module with these weights in place of the dense one."""
    name = assignment.site.name
    sparse = build_sparse(model.get_submodule(name), assignment.patterns)
    for weight, tensors in stored.items():
        sparse.store(weight, tensors)
    _replace(model, name, sparse)
    sparse.pack_()


def _check_calibration(config: SamoyedsConfig, calibration: object) -> None:
    """Refuse data that nothing would look at, and training that needs more than one model."""
    if config.recover == "distill":
        raise ConfigError(
            "patch_model prunes one model, found recover='distill', which needs the dense one "
            "beside it; use 'samoyeds convert --recover distill' or 'samoyeds recover'."
        )
    if not config.is_calibrated and (calibration is not None or config.calibration is not None):
        raise CalibrationError(
            f"Calibration data goes with a method that looks at it, found {config.method!r}, which "
            "does not; choose another method, or leave the data out."
        )


def _check_patchable(model: Any) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"patch_model needs a model of transformers, found {type(model).__name__}."
        )
    if getattr(model, "_device_mesh", None) is not None:
        raise UnsupportedModelError(
            "patch_model needs whole weights, found a model split over ranks; pass "
            "quantization_config=SamoyedsConfig(...) to from_pretrained, or convert the checkpoint."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        method = model.hf_quantizer.quantization_config.quant_method
        method = getattr(method, "value", method)  # an enum in transformers' own configurations
        way_out = (
            "call unpatch_model first"
            if method == "samoyeds"
            else "load its dense original instead"
        )
        raise UnsupportedModelError(
            f"patch_model needs a dense model, found one quantised with {method!r}; {way_out}."
        )


def _check_weight(name: str, weight: torch.Tensor) -> None:
    if weight.is_meta:
        raise UnsupportedModelError(
            f"patch_model needs the weights in memory, found {name} offloaded or on meta; pass "
            "quantization_config=SamoyedsConfig(...) to from_pretrained, or convert the checkpoint."
        )
    if weight.dtype not in VALUE_DTYPES:
        raise UnsupportedModelError(
            f"{name} must be bf16, fp16 or fp32, found {weight.dtype}; load the model in one of "
            "these."
        )
    if not all(bool(torch.isfinite(matrix).all()) for matrix in matrices_of(weight)):
        raise UnsupportedModelError(
            f"{name} must be finite to be pruned, found NaN or infinity; check the source "
            "checkpoint."
        )


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Swap a submodule; hooks on the old one, accelerate's and users', move to the new one."""
    old = model.get_submodule(name)
    hook = getattr(old, "_hf_hook", None)
    model.set_submodule(name, module.train(old.training))
    for hooks in _HOOKS:
        setattr(module, hooks, getattr(old, hooks))  # the same dict: handles still remove theirs
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(module, hook)


def _mark_quantized(model: PreTrainedModel, config: SamoyedsConfig) -> None:
    from samoyeds_hf.hf import SamoyedsHfQuantizer

    quantizer = SamoyedsHfQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    quantizer.postprocess_model(model)
