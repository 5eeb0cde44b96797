"""Make a loaded model sparse, and dense again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from samoyeds_hf.config import SamoyedsConfig, SparsityPattern
from samoyeds_hf.errors import ConfigError, UnsupportedModelError
from samoyeds_hf.experts import SamoyedsExperts, SamoyedsLinear, SparseModule
from samoyeds_hf.format import VALUE_DTYPES, SparseWeight, encode
from samoyeds_hf.metrics import relative, squared_error
from samoyeds_hf.models import FUSED, LISTED, SHARED, Site, survey
from samoyeds_hf.pruning import METHODS
from samoyeds_hf.report import PatchReport, Skipped, WeightReport
from samoyeds_hf.resources import recipe_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What each of SamoyedsConfig.modules covers.
_KINDS_OF = {"experts": (FUSED, LISTED), "shared_experts": (SHARED,)}


@dataclass(frozen=True)
class Assignment:
    """A site and the pattern of each of its weights."""

    site: Site
    patterns: Mapping[str, SparsityPattern]


@dataclass(frozen=True)
class PatchPlan:
    """What becomes sparse with which pattern, and what does not and why."""

    assignments: tuple[Assignment, ...]
    skipped: tuple[Skipped, ...]

    def targets(self) -> dict[str, SparsityPattern]:
        """Pattern by the full name of each dense weight that becomes sparse."""
        return {
            f"{assignment.site.name}.{weight}": pattern
            for assignment in self.assignments
            for weight, pattern in assignment.patterns.items()
        }


def patch_model(
    model: PreTrainedModel,
    pattern: str | SparsityPattern | None = None,
    *,
    config: SamoyedsConfig | str | Path | None = None,
    strict: bool | None = None,
) -> PatchReport:
    """Prune and encode the experts of a loaded model in place, one weight at a time.

    Afterwards ``generate`` and ``save_pretrained`` work as before; a saved model loads with
    ``from_pretrained``. Everything is checked before the first module is replaced.

    Args:
        model: a model of transformers with its weights in memory, on any device.
        pattern: shortcut for ``SamoyedsConfig(pattern)``; the default is "1:2:64".
        config: all settings, or a recipe: a YAML file, or the name of a bundled one.
        strict: overrides ``config.strict``.

    Raises:
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
    _check_patchable(model)
    plan = plan_model(model, config)
    for name in plan.targets():
        _check_weight(name, model.get_parameter(name))
    reports = []
    for assignment in plan.assignments:
        dense = model.get_submodule(assignment.site.name)
        sparse = build_sparse(dense, assignment)
        for weight, assigned in assignment.patterns.items():
            name = f"{assignment.site.name}.{weight}"
            stored, report = compress(dense.get_parameter(weight), assigned, config.method, name)
            sparse.store(weight, stored)
            reports.append(report)
        _replace(model, assignment.site.name, sparse)
    _mark_quantized(model, config)
    return PatchReport(tuple(reports), plan.skipped, config.method)


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
    model.hf_quantizer.remove_quantization_config(model)
    for submodule in model.modules():
        if hasattr(submodule, "config") and hasattr(submodule.config, "_is_quantized"):
            del submodule.config._is_quantized
    model._weight_conversions = None  # saved again under the names of the Hub


def plan_model(model: nn.Module, config: SamoyedsConfig) -> PatchPlan:
    """Decide for every expert of a model (which may be on meta), or refuse.

    Raises:
        ConfigError: an override that matches nothing, or makes half a module dense.
        PatternError: a weight that the pattern does not divide.
        UnsupportedModelError: nothing to do, or a module that strict mode does not accept.
    """
    found = survey(model)
    kinds = [kind for module in config.modules for kind in _KINDS_OF[module]]
    sites = [site for site in found.sites if site.kind in kinds]
    refusals = [refusal for refusal in found.refusals if refusal.kind in kinds]
    refused = [Skipped(refusal.name, refusal.reason) for refusal in refusals]
    if config.strict:
        listed = {site.group: None for site in sites if site.kind == LISTED}
        refused += [
            Skipped(group, "a ModuleList of experts runs one Linear at a time, which is slow")
            for group in listed
        ]
        if refused:
            raise UnsupportedModelError(
                f"Every expert must be supported, found {len(refused)} that are not, first "
                f"{refused[0].name}: {refused[0].reason}; strict=False makes sparse what can be "
                "and leaves the rest dense."
            )
    if not sites:
        raise UnsupportedModelError(_nothing_found_message(model, config, refused))
    used: set[str] = set()
    assignments, skipped = [], list(refused)
    for site in sites:
        patterns = _patterns_for(site, config, used)
        if patterns is None:
            skipped.append(Skipped(site.name, "dense by override"))
            continue
        for weight, pattern in patterns.items():
            name = f"{site.name}.{weight}"
            *_, rows, k = model.get_parameter(name).shape
            pattern.check_fits(rows, k, name)
        assignments.append(Assignment(site, patterns))
    if unused := [regex for regex in config.overrides if regex not in used]:
        raise ConfigError(
            f"Every override must match a module, found {unused[0]!r} that matches none; names "
            f"are matched whole and look like {sites[0].name!r}."
        )
    if not assignments:
        raise UnsupportedModelError(
            "At least one module must become sparse, found all dense by overrides; remove one."
        )
    return PatchPlan(tuple(assignments), tuple(skipped))


def build_sparse(dense: nn.Module, assignment: Assignment) -> SparseModule:
    """The sparse module for a site, still without weights (on meta)."""
    if assignment.site.kind == FUSED:
        return SamoyedsExperts(dense, assignment.patterns)
    if not isinstance(dense, nn.Linear):
        raise UnsupportedModelError(
            f"{assignment.site.name} must be a Linear, found {type(dense).__name__}."
        )
    return SamoyedsLinear(dense, assignment.patterns)


def compress(
    weight: torch.Tensor,  # [..., m, k]
    pattern: SparsityPattern,
    method: str,
    name: str,
) -> tuple[SparseWeight, WeightReport]:
    """Prune and encode one weight, a matrix at a time so that temporaries stay small."""
    stored: list[SparseWeight] = []
    error = norm = 0.0
    for dense in _matrices(weight):
        sparse, squared, total = compress_matrix(dense, pattern, method, name)
        stored.append(sparse)
        error, norm = error + squared, norm + total
    # One matrix keeps its two dimensions; several are stacked as they were.
    lead = weight.shape[:-2]
    joined = SparseWeight(
        *(torch.stack(parts).view(*lead, *parts[0].shape) for parts in zip(*stored, strict=True))
    )
    report = WeightReport(
        name=name,
        shape=tuple(weight.shape),
        pattern=str(pattern),
        bytes_before=weight.numel() * weight.element_size(),
        bytes_after=joined.num_bytes,
        error=relative(error, norm),
    )
    return joined, report


def compress_matrix(
    dense: torch.Tensor,  # [m, k]
    pattern: SparsityPattern,
    method: str,
    name: str,
) -> tuple[SparseWeight, float, float]:
    """Prune and encode one matrix; also its squared error and squared norm."""
    mask = METHODS[method](dense, pattern, name)
    sparse = encode(dense, mask, pattern, name)
    return sparse, *squared_error(dense, sparse, pattern)


def _matrices(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from weight.detach().reshape(-1, *weight.shape[-2:])


def _patterns_for(
    site: Site, config: SamoyedsConfig, used: set[str]
) -> dict[str, SparsityPattern] | None:
    """Pattern of each weight of a site, or None if it stays dense; notes the overrides used."""
    patterns: dict[str, SparsityPattern | None] = {}
    for weight in site.weights:
        names = (f"{site.name}.{weight}", site.name, site.group)
        matches = [regex for name in names if (regex := config.override_for(name)) is not None]
        used.update(matches)
        patterns[weight] = config.overrides[matches[0]] if matches else config.pattern
    sparse = {name: pattern for name, pattern in patterns.items() if pattern is not None}
    if sparse and len(sparse) < len(patterns):
        raise ConfigError(
            f"'dense' goes with a whole module, found it for only a part of {site.name}; match "
            "the module's name instead."
        )
    return sparse or None


def _nothing_found_message(model: nn.Module, config: SamoyedsConfig, refused: list[Skipped]) -> str:
    what = " or ".join(config.modules)
    found = f"; {refused[0].name}: {refused[0].reason}" if refused else ""
    return (
        f"The model needs MoE layers with {what}, found none in {type(model).__name__}{found}; "
        "see the support matrix in the README."
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
    if not all(bool(torch.isfinite(matrix).all()) for matrix in _matrices(weight)):
        raise UnsupportedModelError(
            f"{name} must be finite to be pruned, found NaN or infinity; check the source "
            "checkpoint."
        )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Swap a submodule; an accelerate hook on the old one moves to the new one."""
    old = model.get_submodule(name)
    hook = getattr(old, "_hf_hook", None)
    model.set_submodule(name, module.train(old.training))
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
