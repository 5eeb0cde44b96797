"""Samoyeds as a quantisation method of transformers: ``quant_method: "samoyeds"``.

One registered quantizer serves every path: it replaces the experts on meta before weights are
loaded. A dense checkpoint is pruned weight by weight while it loads; a converted one is checked,
headers and contents, before any of it can reach a kernel.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from samoyeds_hf.checkpoint import check_dense, check_sparse
from samoyeds_hf.compress import compress
from samoyeds_hf.config import QUANT_METHOD, SamoyedsConfig
from samoyeds_hf.environment import announce_path
from samoyeds_hf.errors import (
    CalibrationError,
    CheckpointError,
    SamoyedsError,
    UnsupportedModelError,
)
from samoyeds_hf.experts import SparseModule, build_sparse, pack_model
from samoyeds_hf.format import SUFFIXES
from samoyeds_hf.models import FUSED
from samoyeds_hf.patch import unpatch_model
from samoyeds_hf.report import PatchReport, WeightReport
from samoyeds_hf.selection import Selection, select

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EXPERT_SHARDING = "grouped_gemm"  # transformers' name for "split dimension 0 over the ranks"


class SamoyedsHfQuantizer(HfQuantizer):
    """Loads dense checkpoints as sparse models, and sparse checkpoints as they are."""

    requires_calibration = False
    quantization_config: SamoyedsConfig

    def __init__(self, quantization_config: SamoyedsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.selection: Selection | None = None
        self.reports: list[WeightReport] = []
        self.error: SamoyedsError | None = None  # the first one while weights were pruned

    @property
    def report(self) -> PatchReport:
        """What was pruned while loading; empty for a checkpoint that was already sparse."""
        skipped = self.selection.skipped if self.selection else ()
        provenance = self.quantization_config.provenance()
        return PatchReport(tuple(self.reports), skipped, **provenance)

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse to prune while offloading to disk: dense weights would be written there."""
        if (
            not self.pre_quantized
            and isinstance(device_map, dict)
            and "disk" in device_map.values()
        ):
            raise UnsupportedModelError(
                "Pruning while loading needs memory for the sparse model, found a device_map with "
                "'disk'; convert the checkpoint with 'samoyeds convert' and load that."
            )

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        _refuse_tensor_parallel(model)
        selection = select(model, self.quantization_config)
        files = [Path(file) for file in checkpoint_files or ()]
        if not self.pre_quantized:
            _refuse_calibrated(self.quantization_config)
            check_dense(model, files, set(selection.targets))
        for assignment in selection.assignments:
            dense = model.get_submodule(assignment.site.name)
            model.set_submodule(assignment.site.name, build_sparse(dense, assignment.patterns))
        if self.pre_quantized:
            with torch.device("cpu"):  # models are built under torch.device("meta")
                check_sparse(model, files)
        self.selection = selection
        # transformers calls this for its plans from 5.21 on. NOTE: the plan in the configuration,
        # which older releases offer to change, would be saved with the model.
        self.update_parallel_plan(model, getattr(model, "_ep_plan", None) or {})
        return model

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Whether this is a dense weight that becomes sparse while it loads."""
        if self.pre_quantized or self.selection is None:
            return False
        return param_name in self.selection.targets

    def get_quantize_ops(self) -> ConversionOps:
        """The last step of a weight's conversion: prune and encode."""
        return SamoyedsEncode(self)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        if self.error is not None:
            raise self.error
        _refuse_tensor_parallel(model)
        for module in model.modules():
            if isinstance(module, SparseModule):
                module.requires_grad_(False)
        pack_model(model)
        # save_pretrained writes the number into the index of a sharded checkpoint; the files of a
        # model must not depend on where it ran.
        vars(model)["num_parameters"] = partial(count_parameters, model)
        # Sparse weights have no counterpart in the Hub's per-expert names, so saving reverts
        # nothing and writes the model's own names.
        model._weight_conversions = []
        announce_path()
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> Any:
        unpatch_model(model)
        model.hf_quantizer = self  # the caller removes it
        return model.to(dtype) if dtype is not None else model

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Meta and index are split over the ranks like their values; changes the plan in place.

        Sparse shared experts are held whole by every rank; the tensor-parallel rules around them
        would cut into blocks.
        """
        whole = {
            re.sub(r"\.\d+(?=\.|$)", ".*", assignment.site.group)
            for assignment in (self.selection.assignments if self.selection else ())
            if assignment.site.kind != FUSED
        }
        for key in [key for key in plan if any(key.startswith(f"{group}.") for group in whole)]:
            del plan[key]
        plan.update(_with_companions(plan))

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No gradient reaches the weights."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The operators have fakes, so ``generate`` may compile."""
        return True


def count_parameters(model: PreTrainedModel, only_trainable: bool = False, **kwargs: Any) -> int:
    """``model.num_parameters()``, which counts canonical tensors also where weights are packed."""
    total: int = type(model).num_parameters(model, only_trainable, **kwargs)
    sparse = [module for module in model.modules() if isinstance(module, SparseModule)]
    return total if only_trainable else total + sum(module.num_uncounted for module in sparse)


class SamoyedsEncode(ConversionOps):
    """Turns a dense weight into values, meta and index while a checkpoint loads."""

    def __init__(self, quantizer: SamoyedsHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """``{name: dense}`` to ``{name, name_meta, name_index}``."""
        selection = self.quantizer.selection
        encoded: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            dense = value[0] if isinstance(value, list) else value
            target = full_layer_name if len(input_dict) == 1 else name
            if selection is None or target not in selection.targets:
                encoded[name] = dense
                continue
            method = self.quantizer.quantization_config.method
            try:
                _check_converted(model, target, dense)
                stored, report = compress(dense, selection.targets[target], method, target)
            except SamoyedsError as error:
                # Raised here, transformers would bury it in a log and raise one of its own.
                self.quantizer.error = self.quantizer.error or error
                continue
            self.quantizer.reports.append(report)
            encoded.update({target + suffix: t for suffix, t in zip(SUFFIXES, stored, strict=True)})
        return encoded


def _check_converted(model: PreTrainedModel, name: str, dense: torch.Tensor) -> None:
    """Refuse what transformers turned the wrong way.

    Its conversion of Qwen3-VL-MoE asks the model's parameter whether to transpose, and finds a
    sparse one there. Only the first dimension may differ: expert parallel splits it.
    """
    module, _, weight = name.rpartition(".")
    expected = model.get_submodule(module).dense_shape(weight)
    if dense.shape[-2:] != expected[-2:]:
        raise CheckpointError(
            f"{name} must have shape {list(expected)}, found {list(dense.shape)} after conversion; "
            "load the dense model and call patch_model, or use 'samoyeds convert'."
        )


def _with_companions(plan: dict[str, str]) -> dict[str, str]:
    """A parallel plan with an entry for the meta and index of every expert weight in it."""
    return {
        key + suffix: style
        for key, style in plan.items()
        for suffix in (SUFFIXES if style == _EXPERT_SHARDING else ("",))
    }


def _refuse_calibrated(config: SamoyedsConfig) -> None:
    """While weights are loaded there is no model yet that data could go through."""
    if config.is_calibrated or config.recover is not None or config.calibration is not None:
        raise CalibrationError(
            f"Pruning while loading sees no data, found method {config.method!r}, which needs "
            "some, or recovery, or data that is named; convert the checkpoint with 'samoyeds "
            "convert --calibration', or load the dense model and call patch_model(..., "
            "calibration=...)."
        )


def _refuse_tensor_parallel(model: PreTrainedModel) -> None:
    """Splitting inside an expert would tear blocks apart; whole experts can be split."""
    distributed = getattr(model.config, "distributed_config", None)
    # Older releases take tp_plan="auto" without a configuration; then only the model tells, later.
    tp_size = getattr(distributed, "tp_size", None) or getattr(model, "_tp_size", None) or 1
    if tp_size > 1 and not getattr(distributed, "enable_expert_parallel", False):
        raise UnsupportedModelError(
            f"Sparse experts are split by expert, found tensor parallel over {tp_size} ranks; use "
            "DistributedConfig with expert parallel."
        )


def register() -> None:
    """Make the method known to transformers; calling it again changes nothing."""
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
    )

    known = AUTO_QUANTIZER_MAPPING.get(QUANT_METHOD, SamoyedsHfQuantizer)
    if known is not SamoyedsHfQuantizer:
        raise SamoyedsError(
            f"The quantisation method {QUANT_METHOD!r} must be this package's, found {known}; "
            "remove the other package."
        )
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = SamoyedsHfQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = SamoyedsConfig
