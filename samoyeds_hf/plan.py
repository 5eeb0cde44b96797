"""What a conversion will read, make and write: decided on headers, before anything is written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from samoyeds_hf.config import SamoyedsConfig
from samoyeds_hf.directory import partial_of
from samoyeds_hf.errors import CheckpointError
from samoyeds_hf.format import SUFFIXES, VALUE_DTYPES, stored_shapes
from samoyeds_hf.hub import open_source
from samoyeds_hf.pattern import SparsityPattern
from samoyeds_hf.pruning.decoder import Decoder
from samoyeds_hf.report import format_bytes, format_table
from samoyeds_hf.selection import Selection, select
from samoyeds_hf.shards import ShardSpec, TensorSpec, plan_shards
from samoyeds_hf.skeleton import load_config, meta_model
from samoyeds_hf.source import Target, loaded_dtypes, plan_sources, tied_names
from samoyeds_hf.stored import StoredTensor, first_floating_dtype, read_checkpoint

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

    @property
    def num_bytes_read(self) -> int:
        """Bytes of the stored tensors."""
        return sum(stored.num_bytes for stored in self._sources)

    @property
    def is_cast(self) -> bool:
        """Whether the model's dtype is another one than the source's."""
        dtypes = {spec.dtype for spec in self.outputs.values()}
        return dtypes != {stored.dtype for stored in self._sources}

    @property
    def _sources(self) -> list[StoredTensor]:
        return [stored for parts in self.target.sources.values() for stored in parts]


@dataclass(frozen=True)
class ConversionPlan:
    """Everything about a conversion but the data. ``str`` is the table that users see."""

    source: Path
    config: SamoyedsConfig
    model_config: PreTrainedConfig
    model: PreTrainedModel  # dense, on meta
    selection: Selection
    units: tuple[Unit, ...]
    shards: tuple[ShardSpec, ...]
    unused: tuple[str, ...]  # tensors of the source that the model does not have

    @property
    def patterns(self) -> dict[str, SparsityPattern]:
        """Pattern of each dense weight that becomes sparse."""
        return self.selection.targets

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
        read, made = unit.num_bytes_read, unit.num_bytes
        (spec, *_) = unit.outputs.values()
        if spec.name in self.patterns and len(spec.shape) == 3 and unit.target.is_by_expert:
            # One expert: its parts as read, joined, in its new dtype; mask, values, meta, index.
            return (2 * read + made * (2 if unit.is_cast else 1)) // spec.shape[0]
        cast = made if unit.is_cast else 0
        if spec.name in self.patterns:
            # All experts, or one Linear: the same, in one piece.
            return 3 * read + cast + made
        # Its parts as read, merged and joined.
        return read * (1 if unit.target.converter is None else 3) + cast

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
        text += [f"left dense: {skip.name}: {skip.reason}" for skip in self.selection.skipped]
        if self.unused:
            text.append(
                f"dropped: {len(self.unused)} tensors that the model does not have, such as "
                f"{self.unused[0]}"
            )
        return "\n".join(text)

    def check_disk(self, destination: Path, more: int = 0) -> None:
        """Refuse if the output, and ``more`` bytes, do not fit on the disk of ``destination``.

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
        if free < self.disk_need + more:
            raise CheckpointError(
                f"{destination} needs {format_bytes(self.disk_need + more)} of disk, found "
                f"{format_bytes(free)} free; make room or choose another disk."
            )


def plan_conversion(source: str | Path, config: SamoyedsConfig, shard_size: int) -> ConversionPlan:
    """Read configuration and headers of a dense checkpoint and decide everything.

    Args:
        source: a model directory, or a repository of the Hub, of which no weights are downloaded.
        config: what to make sparse.
        shard_size: bytes of a shard, at most, unless a single weight is larger.

    Raises:
        CheckpointError: incomplete, damaged, or already quantised.
        PatternError: a weight that the pattern does not divide.
        UnsupportedModelError: no class in transformers, or experts that are not supported.
    """
    directory, tensors = open_source(source)
    model_config = load_config(directory)
    if tensors is None:
        tensors = read_checkpoint(directory)
    dtype = model_config.dtype or first_floating_dtype(list(tensors.values()))
    model = meta_model(model_config, dtype)
    selection = select(model, config)
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
    patterns = selection.targets
    breaks: set[int] = set()
    if config.is_calibrated:
        units, breaks = _by_layer(units, Decoder.find(model, patterns))
    # A unit is written at once, so what it makes lies in one shard.
    groups = [
        [out for spec in unit.outputs.values() for out in outputs_of(spec, patterns)]
        for unit in units
    ]
    return ConversionPlan(
        source=directory,
        config=config,
        model_config=model_config,
        model=model,
        selection=selection,
        units=units,
        shards=tuple(plan_shards(groups, shard_size, breaks)),
        unused=tuple(sources.unused),
    )


def _by_layer(units: Sequence[Unit], decoder: Decoder) -> tuple[tuple[Unit, ...], set[int]]:
    """Units in the order in which layers are pruned, and where layers begin: each has own shards.

    A layer is then written, and done, before the next one is read.
    """

    def layer_of(unit: Unit) -> int:
        index = decoder.layer_of(next(iter(unit.outputs)))
        return -1 if index is None else index

    ordered = tuple(sorted(units, key=layer_of))
    layers = [layer_of(unit) for unit in ordered]
    return ordered, {i for i in range(1, len(layers)) if layers[i] != layers[i - 1]}


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
