"""Making a loaded model sparse with a method that looks at data: layer by layer, in place."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from samoyeds_hf.compress import matrices_of
from samoyeds_hf.errors import CalibrationError
from samoyeds_hf.format import SparseWeight, encode
from samoyeds_hf.patch import put_sparse
from samoyeds_hf.pruning.calibration import load_calibration
from samoyeds_hf.pruning.layer import PruneSettings
from samoyeds_hf.pruning.walk import LayerResult, prune_model
from samoyeds_hf.report import WeightReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from samoyeds_hf.config import SamoyedsConfig
    from samoyeds_hf.pattern import SparsityPattern
    from samoyeds_hf.selection import Selection


def patch_calibrated(
    model: PreTrainedModel,
    selection: Selection,
    config: SamoyedsConfig,
    calibration: torch.Tensor | PreTrainedTokenizerBase | None,
) -> tuple[list[WeightReport], SamoyedsConfig]:
    """Prune, encode and replace; the reports, and the configuration with what was read.

    Raises:
        CalibrationError: no data, or data that cannot be used.
        UnsupportedModelError: a decoder that cannot run layer by layer.
    """
    tokens, config = _tokens(model, config, calibration)
    reports: list[WeightReport] = []

    def make_sparse(result: LayerResult) -> None:
        pruned = {weight.name: weight for weight in result.weights}
        for assignment in selection.assignments:
            stored = {}
            for weight, pattern in assignment.patterns.items():
                name = f"{assignment.site.name}.{weight}"
                if name not in pruned:
                    continue
                dense = model.get_parameter(name)
                stored[weight] = encode_masked(dense, pruned[name].mask, pattern, name)
                num_bytes = dense.numel() * dense.element_size()
                row = (name, tuple(dense.shape), str(pattern), num_bytes, stored[weight].num_bytes)
                reports.append(pruned[name].report(*row))
            if stored:
                put_sparse(model, assignment, stored)

    prune_model(model, selection.targets, tokens, PruneSettings.of(config), on_layer=make_sparse)
    order = list(selection.targets)
    return sorted(reports, key=lambda report: order.index(report.name)), config


def encode_masked(
    weight: torch.Tensor,  # [..., m, k], zero outside the mask
    mask: torch.Tensor,  # [..., m, k] bool
    pattern: SparsityPattern,
    name: str,
) -> SparseWeight:
    """Encode a weight that is pruned already, a matrix at a time."""
    pairs = zip(matrices_of(weight), matrices_of(mask), strict=True)
    stored = [encode(kept, chosen, pattern, name) for kept, chosen in pairs]
    lead = weight.shape[:-2]
    return SparseWeight(
        *(torch.stack(parts).view(*lead, *parts[0].shape) for parts in zip(*stored, strict=True))
    )


def _tokens(
    model: PreTrainedModel,
    config: SamoyedsConfig,
    calibration: torch.Tensor | PreTrainedTokenizerBase | None,
) -> tuple[torch.Tensor, SamoyedsConfig]:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(calibration, torch.Tensor):
        if calibration.ndim != 2 or calibration.dtype != torch.int64 or not calibration.numel():
            raise CalibrationError(
                "Calibration tokens must be [sequences, length] int64, found "
                f"{calibration.dtype} {list(calibration.shape)}; cut the text into windows."
            )
        if limit is not None and calibration.shape[1] > limit:
            raise CalibrationError(
                f"Calibration sequences must fit the model's max_position_embeddings, {limit} "
                f"tokens, found {calibration.shape[1]}; use shorter ones."
            )
        return calibration, config.replace(calibration=None)
    if calibration is None or config.calibration is None:
        raise CalibrationError(
            f"Method {config.method!r} needs calibration data, found none; pass tokens as "
            "calibration=, or a tokenizer and SamoyedsConfig(calibration={'data': ...})."
        )
    data = load_calibration(config.calibration, calibration, max_position_embeddings=limit)
    stored = replace(config.calibration.without_path(), sha256=data.sha256)
    return data.tokens, config.replace(calibration=stored.to_dict())
