"""Check a sparse checkpoint on disk, and write it as an ordinary dense one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from samoyeds_hf.config import QUANT_METHOD, SamoyedsConfig
from samoyeds_hf.directory import REPORT_FILE, copy_companions, growing_directory
from samoyeds_hf.errors import CheckpointError, UnsupportedModelError
from samoyeds_hf.experts import build_sparse
from samoyeds_hf.format import SUFFIXES, SparseWeight, decode, validate
from samoyeds_hf.metrics import relative, squared_error
from samoyeds_hf.pattern import SparsityPattern
from samoyeds_hf.pruning.decoder import Decoder
from samoyeds_hf.report import format_table
from samoyeds_hf.report_files import read_distillation, read_report
from samoyeds_hf.selection import select
from samoyeds_hf.shards import ShardWriter, TensorSpec, disk_errors, plan_shards, write_index
from samoyeds_hf.skeleton import load_config, meta_model, read_config
from samoyeds_hf.source import Target, original_names, plan_sources
from samoyeds_hf.stored import StoredTensor, first_floating_dtype, read_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class SparseCheckpoint:
    """A sparse checkpoint on disk, its headers read and complete."""

    directory: Path
    model_config: PreTrainedConfig  # without quantization_config
    model: PreTrainedModel  # dense, on meta
    patterns: dict[str, SparsityPattern]  # of each sparse weight
    targets: dict[str, Target]  # by tensor of the sparse model

    @classmethod
    def open(cls, directory: str | Path) -> SparseCheckpoint:
        """Read configuration and headers.

        Raises:
            CheckpointError: not a sparse checkpoint, incomplete or damaged.
            ConfigError: a configuration of a newer format version.
        """
        directory = Path(directory)
        model_config, config = _read_configs(directory)
        tensors = read_checkpoint(directory)
        dtype = model_config.dtype or first_floating_dtype(list(tensors.values()))
        model, sparse = meta_model(model_config, dtype), meta_model(model_config, dtype)
        selection = select(sparse, config)
        for assignment in selection.assignments:
            name = assignment.site.name
            dense = sparse.get_submodule(name)
            sparse.set_submodule(name, build_sparse(dense, assignment.patterns))
        sources = plan_sources(sparse, tensors)
        if sources.missing:
            raise CheckpointError(
                f"A sparse checkpoint must be complete, found {sources.missing[0]} missing "
                f"({len(sources.missing)} in all); convert the model again."
            )
        return cls(directory, model_config, model, selection.targets, sources.targets)

    def stored(self, name: str) -> tuple[StoredTensor, ...]:
        """The stored values, meta and index of a sparse weight, not loaded."""
        parts = (self.targets[name + suffix].sources.values() for suffix in SUFFIXES)
        return tuple(stored for ((stored,),) in parts)

    def matrices(self, name: str) -> Iterator[torch.Tensor]:
        """The dense matrices ``[m, k]`` of a sparse weight, decoded one at a time."""
        parts, pattern = self.stored(name), self.patterns[name]
        if len(parts[0].shape) == 2:
            yield decode(SparseWeight(*(part.load() for part in parts)), pattern)
            return
        for position in range(parts[0].shape[0]):
            yield decode(SparseWeight(*(part.load_row(position)[0] for part in parts)), pattern)

    def dense_names(self) -> list[str]:
        """Tensors of the dense model that the checkpoint stands for."""
        companions = {name + suffix for name in self.patterns for suffix in SUFFIXES[1:]}
        return [name for name in self.targets if name not in companions]


@dataclass(frozen=True)
class CheckReport:
    """What ``samoyeds check`` found; ``str`` is a table."""

    directory: str
    rows: tuple[tuple[str, str, str, float | None], ...]  # name, shape, pattern, error
    num_copied: int
    changed: tuple[str, ...]  # tensors that should equal the source's and do not
    trained: int = 0  # how many others do not, as recovery trained more than the sparse weights

    def __str__(self) -> str:
        head: tuple[str, ...] = ("weight", "dense shape", "pattern")
        compared = any(error is not None for *_, error in self.rows)
        if compared:
            head = (*head, "rel. error")
        table = format_table(head, [_row(row, compared) for row in self.rows])
        lines = [table, f"{self.directory}: {len(self.rows)} sparse weights are valid, "]
        lines[-1] += f"{self.num_copied} other tensors are readable"
        if compared:
            lines[-1] += (
                f", {len(self.changed)} of them differ from the source: {', '.join(self.changed)}"
                if self.changed
                else f", {self.trained} of them trained"
                if self.trained
                else " and equal the source's"
            )
        return "\n".join(lines) + "."


def check_checkpoint(
    directory: str | Path, against: str | Path | None = None, *, progress: bool = True
) -> CheckReport:
    """Read all of a sparse checkpoint and validate it; compare it with its source if given.

    Raises:
        FormatError: names the tensor, the place and the value that breaks the format.
        CheckpointError: incomplete or damaged, its report among it, or the source is of another
            model.
    """
    checkpoint = SparseCheckpoint.open(directory)
    source = None if against is None else _open_source(Path(against), checkpoint.model)
    expected = checkpoint.model.state_dict()
    rows, changed, num_copied = [], [], 0
    for name in tqdm(checkpoint.dense_names(), desc="checking", disable=not progress):
        shape = tuple(expected[name].shape)
        if name in checkpoint.patterns:
            pattern = checkpoint.patterns[name]
            loaded = SparseWeight(*(part.load() for part in checkpoint.stored(name)))
            validate(loaded, pattern, shape, name)
            error = None if source is None else _relative_error(checkpoint, name, loaded, source)
            rows.append((name, "x".join(map(str, shape)), str(pattern), error))
            continue
        tensor = checkpoint.targets[name].load(checkpoint.model)[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{name} must have shape {list(shape)}, found {list(tensor.shape)}; convert the "
                "model again."
            )
        num_copied += 1
        if source is not None and name in source:
            original = source[name].load(checkpoint.model)[name].to(tensor.dtype)
            if not torch.equal(_bits(original), _bits(tensor)):
                changed.append(name)
    trained = _trained(checkpoint).intersection(changed)
    changed = [name for name in changed if name not in trained]
    return CheckReport(str(directory), tuple(rows), num_copied, tuple(changed), len(trained))


def _trained(checkpoint: SparseCheckpoint) -> set[str]:
    """What recovery may have trained beside the sparse weights: parameters, never buffers."""
    if not (checkpoint.directory / REPORT_FILE).is_file():  # written by save_pretrained
        return set()
    trained = read_report(checkpoint.directory).trained
    distilled = read_distillation(checkpoint.directory).get("settings", {})
    names = {name for name, _ in checkpoint.model.named_parameters(remove_duplicate=False)}
    if trained == "all" or distilled.get("train") == "all":
        return names
    if trained != "layers":
        return set()
    decoder = Decoder.find(checkpoint.model, checkpoint.patterns)
    pruned = {decoder.layer_of(name) for name in checkpoint.patterns}
    return {name for name in names if decoder.layer_of(name) in pruned}


def export_dense(
    directory: str | Path,
    destination: str | Path,
    *,
    shard_size: int = 5 * 10**9,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write a sparse checkpoint as a dense one, zeros in place, under the Hub's tensor names.

    Memory: one fused weight and its parts.

    Raises:
        CheckpointError: see :class:`SparseCheckpoint`; or the destination exists or is full.
        UnsupportedModelError: the model's weights cannot be renamed one at a time.
    """
    checkpoint = SparseCheckpoint.open(directory)
    destination = Path(destination)
    names = checkpoint.dense_names()
    expected = checkpoint.model.state_dict()
    empty = {name: expected[name].to(_dtype_of(checkpoint, name)) for name in names}
    groups = {name: original_names(checkpoint.model, {name: empty[name]}) for name in names}
    if set().union(*groups.values()) != set(original_names(checkpoint.model, empty)):
        raise UnsupportedModelError(
            f"Weights must be renamed one at a time, found that those of "
            f"{type(checkpoint.model).__name__} cannot; load the checkpoint, call unpatch_model "
            "and save_pretrained."
        )
    shards = plan_shards(
        [[TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in g.items()] for g in groups.values()],
        shard_size,
    )
    home = {tensor.name: shard for shard in shards for tensor in shard.tensors}
    with (
        growing_directory(
            checkpoint.directory, destination, resume=None, overwrite=overwrite
        ) as partial,
        tqdm(total=len(names), desc="exporting", disable=not progress) as bar,
    ):
        for shard in shards:
            with ShardWriter(partial, shard) as writer:
                for name in names:
                    if home[next(iter(groups[name]))] is shard:
                        for original, tensor in _dense_tensors(checkpoint, name).items():
                            writer.write(original, tensor)
                        bar.update()
        write_index(partial, shards)
        copy_companions(checkpoint.directory, partial)
        with disk_errors(partial):
            checkpoint.model_config.save_pretrained(partial)
    return destination


def _read_configs(directory: Path) -> tuple[PreTrainedConfig, SamoyedsConfig]:
    quantization = read_config(directory).get("quantization_config") or {}
    if quantization.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"A sparse checkpoint has quant_method {QUANT_METHOD!r} in its config.json, found "
            f"{quantization.get('quant_method')!r} in {directory}; convert it first."
        )
    config = SamoyedsConfig.from_dict(quantization)
    model_config = load_config(directory, sparse=True)
    del model_config.quantization_config
    return model_config, config


def _open_source(source: Path, model: PreTrainedModel) -> dict[str, Target]:
    load_config(source)  # refuses what is not dense
    plan = plan_sources(model, read_checkpoint(source))
    if plan.missing:
        raise CheckpointError(
            f"--against must be a dense checkpoint of the same model, found {plan.missing[0]} "
            f"missing in {source}."
        )
    expected = model.state_dict()
    for target in plan.targets.values():
        for name, tensor in target.on_meta(model).items():
            if tensor.shape != expected[name].shape:
                raise CheckpointError(
                    f"--against must be a dense checkpoint of the same model, found {name} of "
                    f"shape {list(tensor.shape)} in {source}, and not {list(expected[name].shape)}."
                )
    return plan.targets


def _relative_error(
    checkpoint: SparseCheckpoint, name: str, stored: SparseWeight, source: dict[str, Target]
) -> float:
    target, pattern = source[name], checkpoint.patterns[name]
    dtype = stored.values.dtype
    if stored.values.dim() == 2 or not target.is_by_expert:
        whole = target.load(checkpoint.model)[name].to(dtype)
        parts = SparseWeight(*(tensor.reshape(-1, tensor.shape[-1]) for tensor in stored))
        return relative(*squared_error(whole.reshape(-1, whole.shape[-1]), parts, pattern))
    error = norm = 0.0
    for position in range(stored.values.shape[0]):
        dense = target.load_matrix(checkpoint.model, position).to(dtype)
        one = SparseWeight(*(tensor[position] for tensor in stored))
        squared, total = squared_error(dense, one, pattern)
        error, norm = error + squared, norm + total
        del dense  # before the next one is loaded
    return relative(error, norm)


def _dense_tensors(checkpoint: SparseCheckpoint, name: str) -> dict[str, torch.Tensor]:
    if name not in checkpoint.patterns:
        tensor = checkpoint.targets[name].load(checkpoint.model)[name]
    else:
        shape = checkpoint.model.state_dict()[name].shape
        tensor = torch.empty(shape, dtype=_dtype_of(checkpoint, name))
        flat = tensor.view(-1, *shape[-2:])
        for position, matrix in enumerate(checkpoint.matrices(name)):
            flat[position] = matrix
    return original_names(checkpoint.model, {name: tensor})


def _dtype_of(checkpoint: SparseCheckpoint, name: str) -> torch.dtype:
    ((stored, *_), *_) = checkpoint.targets[name].sources.values()
    dtype: torch.dtype = stored.dtype
    return dtype


def _row(row: tuple[str, str, str, float | None], compared: bool) -> tuple[str, ...]:
    *cells, error = row
    return (*cells, f"{error:.4f}") if compared else tuple(cells)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
