"""What a conversion will read, make and write: decided on headers, before anything is written."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from samoyeds_hf.config import QUANT_METHOD, SamoyedsConfig, SparsityPattern
from samoyeds_hf.directory import partial_of
from samoyeds_hf.errors import CheckpointError, UnsupportedModelError
from samoyeds_hf.format import SUFFIXES, VALUE_DTYPES, stored_shapes
from samoyeds_hf.patch import PatchPlan, plan_model
from samoyeds_hf.report import format_bytes, format_table
from samoyeds_hf.shards import ShardSpec, TensorSpec, plan_shards
from samoyeds_hf.source import (
    Target,
    first_floating_dtype,
    loaded_dtypes,
    plan_sources,
    read_checkpoint,
    tied_names,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_LAYER = re.compile(r"^(.*?\blayers\.\d+)\.")


@dataclass(frozen=True)
class Unit:
    """The smallest piece of work: one conversion of the source, and the tensors it makes."""

    target: Target
    outputs: dict[str, TensorSpec]  # of the dense model, by name

    @property
    def num_bytes(self) -> int:
        """Bytes of the dense tensors."""
        return sum(spec.num_bytes for spec in self.outputs.values())


@dataclass(frozen=True)
class ConversionPlan:
    """Everything about a conversion but the data. ``str`` is the table that users see."""

    source: Path
    config: SamoyedsConfig
    model_config: PreTrainedConfig
    model: PreTrainedModel  # dense, on meta
    patch: PatchPlan
    units: tuple[Unit, ...]
    shards: tuple[ShardSpec, ...]
    unused: tuple[str, ...]  # tensors of the source that the model does not have

    @property
    def patterns(self) -> dict[str, SparsityPattern]:
        """Pattern of each dense weight that becomes sparse."""
        return self.patch.targets()

    @property
    def bytes_before(self) -> int:
        """Bytes of the model's tensors when dense."""
        return sum(unit.num_bytes for unit in self.units)

    @property
    def bytes_after(self) -> int:
        """Bytes of the output's tensors."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def disk_need(self) -> int:
        """Bytes of the output with its headers."""
        return sum(len(shard.header()[0]) + shard.num_bytes for shard in self.shards)

    @property
    def peak_memory(self) -> int:
        """Bytes of tensors alive at once, at most; Python and torch come on top (about 0.5 GB)."""
        return max(self._memory_of(unit) for unit in self.units)

    def units_in(self, shard: ShardSpec) -> list[Unit]:
        """The work that fills a shard."""
        names = {tensor.name for tensor in shard.tensors}
        return [unit for unit in self.units if names.issuperset(unit.outputs)]

    def _memory_of(self, unit: Unit) -> int:
        sparse = [spec for name, spec in unit.outputs.items() if name in self.patterns]
        if not sparse:
            return unit.num_bytes * (1 if unit.target.converter is None else 3)
        matrix = sparse[0].num_bytes
        if len(sparse[0].shape) == 3 and unit.target.is_by_expert:
            matrix //= sparse[0].shape[0]
            # Its parts as read, the joined matrix, its mask, and values, meta and index.
            return matrix * 3
        # The conversion needs all experts at once: parts, merged, joined; then one matrix at work.
        return unit.num_bytes * 3

    def __str__(self) -> str:
        rows: dict[str, list[int]] = {}
        for unit in self.units:
            for name, spec in unit.outputs.items():
                match = _LAYER.match(name)
                sizes = rows.setdefault(match.group(1) if match else "other", [0, 0])
                sizes[0] += spec.num_bytes
                sizes[1] += sum(out.num_bytes for out in outputs_of(spec, self.patterns))
        total = (self.bytes_before, self.bytes_after)
        lines = [
            (name, format_bytes(before), format_bytes(after), f"{after / before:.3f}")
            for name, (before, after) in [*rows.items(), ("total", total)]
        ]
        text = [
            format_table(("layer", "before", "after", "ratio"), lines),
            f"pattern {self.config.pattern}, method {self.config.method}: "
            f"{len(self.patterns)} weights become sparse, {len(self.shards)} shard(s)",
            f"peak memory {format_bytes(self.peak_memory)} of tensors, disk need "
            f"{format_bytes(self.disk_need)}",
        ]
        text += [f"left dense: {skip.name}: {skip.reason}" for skip in self.patch.skipped]
        if self.unused:
            text.append(
                f"dropped: {len(self.unused)} tensors that the model does not have, such as "
                f"{self.unused[0]}"
            )
        return "\n".join(text)

    def check_disk(self, destination: Path) -> None:
        """Refuse if the output does not fit on the disk of ``destination``.

        What an earlier run left of these shards is taken over, or deleted first.

        Raises:
            CheckpointError: names the room needed and found.
        """
        partial = partial_of(destination)
        free = sum(
            (partial / shard.file).stat().st_size
            for shard in self.shards
            if (partial / shard.file).exists()
        )
        parent = partial.parent
        while not parent.exists():
            parent = parent.parent
        free += shutil.disk_usage(parent).free
        if free < self.disk_need:
            raise CheckpointError(
                f"{destination} needs {format_bytes(self.disk_need)} of disk, found "
                f"{format_bytes(free)} free; make room or choose another disk."
            )


def plan_conversion(source: Path, config: SamoyedsConfig, shard_size: int) -> ConversionPlan:
    """Read configuration and headers of a dense checkpoint and decide everything.

    Args:
        source: a local model directory.
        config: what to make sparse.
        shard_size: bytes of a shard, at most, unless a single weight is larger.

    Raises:
        CheckpointError: incomplete, damaged, or already quantised.
        PatternError: a weight that the pattern does not divide.
        UnsupportedModelError: no class in transformers, or experts that are not supported.
    """
    model_config = load_config(source)
    tensors = read_checkpoint(source)
    dtype = model_config.dtype or first_floating_dtype(list(tensors.values()))
    model = meta_model(model_config, dtype)
    patch = plan_model(model, config)
    sources = plan_sources(model, tensors)
    if sources.missing:
        raise CheckpointError(
            f"The checkpoint must hold every weight of {type(model).__name__}, found "
            f"{sources.missing[0]} missing ({len(sources.missing)} in all); download it again."
        )
    dtypes = loaded_dtypes(model, dtype)
    tied = tied_names(model, sources.targets)
    units = tuple(
        unit
        for target in sources.targets.values()
        if (unit := _plan_unit(target, model, dtypes, tied)) is not None
    )
    patterns = patch.targets()
    # A unit is written at once, so what it makes lies in one shard.
    groups = [
        [out for spec in unit.outputs.values() for out in outputs_of(spec, patterns)]
        for unit in units
    ]
    return ConversionPlan(
        source=source,
        config=config,
        model_config=model_config,
        model=model,
        patch=patch,
        units=units,
        shards=tuple(plan_shards(groups, shard_size)),
        unused=tuple(sources.unused),
    )


def outputs_of(spec: TensorSpec, patterns: dict[str, SparsityPattern]) -> list[TensorSpec]:
    """The stored tensors for a dense one: itself, or values, meta and index."""
    if spec.name not in patterns:
        return [spec]
    shapes = stored_shapes(spec.shape, patterns[spec.name])
    dtypes = (spec.dtype, torch.uint8, torch.uint8)
    return [
        TensorSpec(spec.name + suffix, dtype, shape)
        for suffix, dtype, shape in zip(SUFFIXES, dtypes, shapes, strict=True)
    ]


def load_config(source: Path, *, sparse: bool = False) -> PreTrainedConfig:
    """The configuration of a dense model, or of one that is known to be ``sparse``.

    Raises:
        CheckpointError: none there, unreadable, or of a model that is already quantised.
        UnsupportedModelError: a model type that transformers does not know.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    content = read_config(source)
    quantization = content.get("quantization_config")
    if quantization is None:
        quantization = (content.get("text_config") or {}).get("quantization_config")
    if quantization is not None and not sparse:
        method = quantization.get("quant_method")
        way_out = (
            "use its dense original, or 'samoyeds export-dense'"
            if method == QUANT_METHOD
            else "dequantise it first (load it with dequantize=True, save it in bf16)"
        )
        raise CheckpointError(
            f"The source must be dense, found one quantised with {method!r} in {source}; {way_out}."
        )
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"The model type must be known to transformers, found "
            f"{content.get('model_type')!r} ({str(error).splitlines()[0]})."
        ) from error
    except StrictDataclassError as error:
        raise CheckpointError(
            f"{source / 'config.json'} must fit its model type, found: "
            f"{' '.join(str(error).split())}; download it again."
        ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """The ``config.json`` of a model directory, as it is.

    Raises:
        CheckpointError: none there, or no JSON object.
    """
    path = directory / "config.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"A model directory needs a readable config.json, found none in {directory} ({error})."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"A config.json must be a JSON object, found {content!r} in {path}.")
    return content


def meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model that a configuration describes, without weights.

    Raises:
        UnsupportedModelError: transformers has no class for it.
    """
    import transformers

    architecture = (config.architectures or [None])[0]
    model_class = getattr(transformers, architecture or "", None)
    if model_class is None:
        mapping = transformers.AutoModelForCausalLM._model_mapping
        if type(config) not in mapping:
            raise UnsupportedModelError(
                f"The architecture must be one of transformers', found {architecture!r}; custom "
                "code is not run."
            )
        model_class = mapping[type(config)]
    with torch.device("meta"):
        model: PreTrainedModel = model_class._from_config(config, dtype=dtype)
    return model


def _plan_unit(
    target: Target,
    model: PreTrainedModel,
    dtypes: dict[str, torch.dtype],
    tied: set[str],
) -> Unit | None:
    """Names and shapes that a conversion makes, by running it without data."""
    made = target.on_meta(model)
    expected = model.state_dict()
    outputs = {}
    for name, tensor in made.items():
        if name in tied:
            continue  # stored once, under the name that it is tied to
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{name} must have shape {list(expected[name].shape)}, found {list(tensor.shape)}; "
                "the configuration and the weights do not belong together."
            )
        if tensor.dtype.is_floating_point and tensor.dtype not in (*VALUE_DTYPES, torch.float64):
            raise CheckpointError(
                f"{name} must be bf16, fp16 or fp32, found {tensor.dtype}; dequantise the "
                "checkpoint first."
            )
        outputs[name] = TensorSpec(name, dtypes[name], tuple(tensor.shape))
    return Unit(target, outputs) if outputs else None
