"""Dense checkpoint in, sparse checkpoint out: streamed, resumable, never half a result.

The output grows in ``DST.partial`` and becomes DST by one rename at the very end, so DST is at any
moment what it was before or complete. Each shard is written under a temporary name, synced and
renamed; ``conversion.json`` beside the shards records which are done and what they were made from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import samoyeds_hf
from samoyeds_hf.card import write_card
from samoyeds_hf.compress import compress_matrix
from samoyeds_hf.config import SamoyedsConfig
from samoyeds_hf.directory import (
    REPORT_FILE,
    STATE_FILE,
    check_destination,
    copy_companions,
    growing_directory,
)
from samoyeds_hf.errors import CheckpointError
from samoyeds_hf.format import SUFFIXES
from samoyeds_hf.hub import resolve_source
from samoyeds_hf.metrics import relative
from samoyeds_hf.plan import ConversionPlan, Unit, plan_conversion
from samoyeds_hf.report import PatchReport, WeightReport
from samoyeds_hf.shards import ShardSpec, ShardWriter, disk_errors, write_index, write_text
from samoyeds_hf.stored import read_checkpoint

DEFAULT_SHARD_SIZE = 5 * 10**9


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    config: SamoyedsConfig | None = None,
    *,
    shard_size: int = DEFAULT_SHARD_SIZE,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> PatchReport:
    """Prune and encode a checkpoint from disk to disk, one expert at a time.

    The result holds the same tensors, byte for byte, as ``patch_model`` and ``save_pretrained``.

    Args:
        source: a model directory with safetensors, or a repository of the Hub.
        destination: directory to make.
        config: what to make sparse and how; None is the default pattern.
        shard_size: bytes of an output shard, at most, unless a single weight is larger.
        resume: continue an interrupted conversion, if there is one.
        overwrite: replace an existing checkpoint, once the new one is complete.
        progress: show a progress bar on stderr.

    Raises:
        SamoyedsError: a subclass; nothing that existed before is lost.
    """
    destination = Path(destination)
    config = config or SamoyedsConfig()
    plan = plan_conversion(source, config, shard_size)
    check_destination(plan.source, destination, overwrite)
    plan.check_disk(destination)
    if not Path(source).exists():  # only now: a download may take hours
        plan = plan_conversion(resolve_source(source), config, shard_size)
    with growing_directory(
        plan.source, destination, resume=resume, overwrite=overwrite
    ) as directory:
        state = _State.open(directory, plan, shard_size)
        _convert_shards(plan, directory, state, progress)
        return _finish(plan, directory, str(source), state)


class _State:
    """Which shards are done, and a fingerprint of what they were made from."""

    def __init__(self, path: Path, fingerprint: dict[str, Any]) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.done: dict[str, list[dict[str, Any]]] = {}  # shard -> its reports

    @classmethod
    def open(cls, directory: Path, plan: ConversionPlan, shard_size: int) -> _State:
        """A new state, or the one found, if it is of the same source and settings."""
        state = cls(directory / STATE_FILE, _fingerprint(plan, shard_size))
        if not state.path.exists():
            state.save()
            return state
        try:
            found = json.loads(state.path.read_text(encoding="utf-8"))
            different = [
                k for k, v in state.fingerprint.items() if found["fingerprint"].get(k) != v
            ]
            state.done = found["done"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{state.path} must say what was converted, found it unreadable ({error!r}); start "
                "again with --overwrite."
            ) from error
        if different:
            raise CheckpointError(
                f"--resume must continue the same conversion, found another {different[0]} than in "
                f"{state.path}; start again with --overwrite."
            )
        return state

    def finish(self, shard: ShardSpec, reports: list[WeightReport]) -> None:
        self.done[shard.file] = [asdict(report) for report in reports]
        self.save()

    def save(self) -> None:
        content = {"fingerprint": self.fingerprint, "done": self.done}
        write_text(self.path, json.dumps(content, indent=1) + "\n")


def _fingerprint(plan: ConversionPlan, shard_size: int) -> dict[str, Any]:
    files = sorted({s.file for u in plan.units for v in u.target.sources.values() for s in v})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(json.dumps(stats).encode())
    digest.update((plan.source / "config.json").read_bytes())
    return {
        "source": digest.hexdigest(),
        "recipe": plan.config.to_dict(),
        "shard size": shard_size,
        "version of samoyeds-hf": samoyeds_hf.__version__,
    }


def _convert_shards(plan: ConversionPlan, directory: Path, state: _State, progress: bool) -> None:
    left = [s for s in plan.shards if s.file not in state.done or not (directory / s.file).exists()]
    work = {shard.file: plan.units_in(shard) for shard in left}
    total = plan.bytes_before
    with tqdm(
        total=total,
        initial=total - sum(unit.num_bytes for units in work.values() for unit in units),
        unit="B",
        unit_scale=True,
        disable=not progress,
        desc="converting",
    ) as bar:
        for shard in left:
            reports: list[WeightReport] = []
            with ShardWriter(directory, shard) as writer:
                for unit in work[shard.file]:
                    bar.set_postfix_str(unit.target.name.removeprefix("model."), refresh=False)
                    reports += convert_unit(plan, unit, writer, bar)
            state.finish(shard, reports)


@torch.no_grad()
def convert_unit(
    plan: ConversionPlan, unit: Unit, writer: ShardWriter, bar: Any
) -> list[WeightReport]:
    """Load, prune, encode and write one unit; an expert at a time where its sources allow."""
    reports = []
    names = list(unit.outputs)
    if len(names) == 1 and names[0] in plan.patterns and unit.target.is_by_expert:
        spec = unit.outputs[names[0]]
        if len(spec.shape) == 3:
            load = partial(unit.target.load_matrix, plan.model)
            return [_write_sparse(plan, unit, names[0], load, writer, bar)]
    for name, tensor in unit.target.load(plan.model).items():
        if name not in unit.outputs:
            continue
        spec = unit.outputs[name]
        if name in plan.patterns:
            flat = tensor.reshape(-1, *spec.shape[-2:])
            reports.append(_write_sparse(plan, unit, name, flat.__getitem__, writer, bar))
        else:
            writer.write(name, tensor.to(spec.dtype))
            bar.update(spec.num_bytes)
    return reports


def _write_sparse(
    plan: ConversionPlan,
    unit: Unit,
    name: str,
    load: Callable[[int], torch.Tensor],  # matrix [m, k] by position
    writer: ShardWriter,
    bar: Any,
) -> WeightReport:
    spec, pattern = unit.outputs[name], plan.patterns[name]
    error = norm = 0.0
    bytes_after = 0
    rows: list[int | None] = [None] if len(spec.shape) == 2 else list(range(spec.shape[0]))
    for row in rows:
        matrix = load(row or 0).to(spec.dtype)
        place = name if row is None else f"{name}[{row}]"
        sparse, squared, total = compress_matrix(matrix, pattern, plan.config.method, place)
        for suffix, tensor in zip(SUFFIXES, sparse, strict=True):
            writer.write(name + suffix, tensor, row)
        error, norm = error + squared, norm + total
        bytes_after += sparse.num_bytes
        bar.update(matrix.numel() * matrix.element_size())
        del matrix, sparse  # before the next one is loaded
    return WeightReport(
        name, spec.shape, str(pattern), spec.num_bytes, bytes_after, relative(error, norm)
    )


def _finish(plan: ConversionPlan, directory: Path, source: str, state: _State) -> PatchReport:
    """Everything beside the shards; the configuration last, it makes the directory loadable."""
    by_name = {
        entry["name"]: WeightReport(**{**entry, "shape": tuple(entry["shape"])})
        for entries in state.done.values()
        for entry in entries
    }
    ordered = tuple(by_name[name] for name in plan.patterns)
    report = PatchReport(ordered, plan.selection.skipped, plan.config.method)
    write_index(directory, plan.shards)
    found = {name: (t.dtype, t.shape) for name, t in read_checkpoint(directory).items()}
    wanted = {t.name: (t.dtype, t.shape) for shard in plan.shards for t in shard.tensors}
    if found != wanted:
        raise CheckpointError(
            f"The shards in {directory} must be those of the plan, found others; start again with "
            "--overwrite."
        )
    copy_companions(plan.source, directory)
    write_text(directory / REPORT_FILE, json.dumps(report.to_dict(), indent=1) + "\n")
    write_card(directory, plan, report, source)
    with disk_errors(directory):
        plan.model_config.dtype = plan.model.dtype
        plan.model_config.architectures = [type(plan.model).__name__]
        plan.model_config.quantization_config = plan.config.to_dict()
        plan.model_config.save_pretrained(directory)
    return report
