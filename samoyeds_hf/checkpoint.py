"""What a checkpoint must hold, checked on its headers before any of it is loaded.

Once a model has a quantizer, transformers fills what is missing with random weights and a warning;
with ``ignore_mismatched_sizes`` also what has another shape. Here both are errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from samoyeds_hf.errors import CheckpointError
from samoyeds_hf.experts import SparseModule
from samoyeds_hf.format import SUFFIXES, SparseWeight, validate
from samoyeds_hf.source import SourcePlan, plan_sources
from samoyeds_hf.stored import StoredTensor, read_headers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_dense(model: PreTrainedModel, files: list[Path], targets: set[str]) -> None:
    """Refuse a dense checkpoint that is incomplete or misshapen.

    Args:
        model: the dense model on meta.
        files: of the checkpoint.
        targets: names of the weights that become sparse.

    Raises:
        CheckpointError: names the tensor.
    """
    plan = plan_sources(model, _headers(files))
    _check_complete(model, plan, targets)
    _check_shapes(model, plan, targets)


def check_sparse(model: PreTrainedModel, files: list[Path]) -> None:
    """Refuse a sparse checkpoint that is incomplete or breaks the format.

    Reads all headers, and the contents of meta and index (an eighth of the sparse weights): what
    is out of range there would make a kernel read somewhere else.

    Raises:
        CheckpointError: a tensor is missing, or a file is damaged.
        FormatError: a shape, dtype, index or nibble; names tensor, place and value.
    """
    plan = plan_sources(model, _headers(files))
    modules = {name: m for name, m in model.named_modules() if isinstance(m, SparseModule)}
    sparse = {
        f"{name}.{weight}{suffix}"
        for name, module in modules.items()
        for weight in module.patterns
        for suffix in SUFFIXES
    }
    _check_complete(model, plan, sparse)
    for name, module in modules.items():
        for weight, pattern in module.patterns.items():
            stored = [
                _only_source(plan.targets[f"{name}.{weight}{suffix}"].sources)
                for suffix in SUFFIXES
            ]
            values = stored[0].on_meta()
            loaded = SparseWeight(values, stored[1].load(), stored[2].load())
            validate(loaded, pattern, module.dense_shape(weight), f"{name}.{weight}")
    _check_shapes(model, plan, sparse)


def _check_complete(model: PreTrainedModel, plan: SourcePlan, needed: set[str]) -> None:
    missing = [name for name in plan.missing if _is_whole(model) or name in needed]
    if missing:
        raise CheckpointError(
            f"A checkpoint must be complete, found {missing[0]} missing ({len(missing)} in all); "
            "download or convert it again."
        )


def _check_shapes(model: PreTrainedModel, plan: SourcePlan, needed: set[str]) -> None:
    for name, tensor in model.state_dict().items():
        target = plan.targets.get(name)
        # What is converted on the way and stays dense is left to transformers, which then stops.
        is_plain = target is not None and target.converter is None and _is_whole(model)
        if target is None or not (is_plain or name in needed):
            continue
        found = tuple(target.on_meta(model)[name].shape)
        if found != tuple(tensor.shape):
            raise CheckpointError(
                f"{name} must have shape {list(tensor.shape)}, found {list(found)}; the "
                "configuration and the weights do not belong together."
            )


def _is_whole(model: PreTrainedModel) -> bool:
    """Whether this class saved the checkpoint; another one may bring a head of its own."""
    return bool((model.config.architectures or [None])[0] == type(model).__name__)


def _only_source(sources: dict[str, list[StoredTensor]]) -> StoredTensor:
    ((stored,),) = sources.values()
    return stored


def _headers(files: list[Path]) -> dict[str, StoredTensor]:
    if not files or any(file.suffix != ".safetensors" for file in files):
        found = files[0].name if files else "no file"
        raise CheckpointError(
            f"Samoyeds loads from safetensors files, found {found}; save the model with "
            "save_pretrained first, or call patch_model on the loaded model."
        )
    return read_headers(files)
