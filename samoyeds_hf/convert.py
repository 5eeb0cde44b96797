"""Dense checkpoint in, sparse checkpoint out: streamed, resumable, never half a result.

The output grows in ``DST.partial`` and becomes DST by one rename at the very end, so DST is at any
moment what it was before or complete. Each shard is written under a temporary name, synced and
renamed; ``conversion.json`` beside the shards records which are done and what they were made from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from samoyeds_hf.card import write_card
from samoyeds_hf.compress import compress_matrix
from samoyeds_hf.config import SamoyedsConfig
from samoyeds_hf.conversion_state import ConversionState
from samoyeds_hf.convert_layers import (
    LayerWork,
    check_calibration,
    convert_layers,
    help_convert_layers,
    hidden_bytes,
    require_calibration,
)
from samoyeds_hf.directory import (
    REPORT_FILE,
    check_destination,
    copy_companions,
    growing_directory,
    partial_of,
    pruned_of,
)
from samoyeds_hf.errors import CheckpointError
from samoyeds_hf.format import SUFFIXES
from samoyeds_hf.hub import resolve_source
from samoyeds_hf.metrics import relative
from samoyeds_hf.plan import ConversionPlan, Unit, plan_conversion
from samoyeds_hf.pruning.recover import BLOCK_RECOVERY
from samoyeds_hf.report import PatchReport, WeightReport
from samoyeds_hf.report_files import read_report
from samoyeds_hf.shards import ShardWriter, disk_errors, write_index, write_text
from samoyeds_hf.skeleton import read_config
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
    device: str | torch.device | None = None,
) -> PatchReport:
    """Prune and encode a checkpoint from disk to disk.

    Without calibration one expert at a time, and on the CPU; the result then holds the same
    tensors, byte for byte, as ``patch_model`` and ``save_pretrained``. With calibration one decoder
    layer at a time.

    Args:
        source: a model directory with safetensors, or a repository of the Hub.
        destination: directory to make.
        config: what to make sparse and how; None is the default pattern.
        shard_size: bytes of an output shard, at most, unless a single weight is larger.
        resume: continue an interrupted conversion, if there is one.
        overwrite: replace an existing checkpoint, once the new one is complete.
        progress: show a progress bar on stderr.
        device: where a method with calibration computes; None is the GPU, where there is one.

    Raises:
        SamoyedsError: a subclass; nothing that existed before is lost.
    """
    destination = Path(destination)
    config = config or SamoyedsConfig()
    check_calibration(config)
    if config.recover == "distill":
        options = {"shard_size": shard_size, "progress": progress, "device": device}
        return _convert_and_distill(source, destination, config, resume, overwrite, options)
    plan = plan_conversion(source, config, shard_size)
    check_destination(plan.source, destination, overwrite)
    plan.check_disk(destination)
    if not Path(source).exists():  # only now: a download may take hours
        plan = plan_conversion(resolve_source(source), config, shard_size)
    work = LayerWork.prepare(plan, device) if config.is_calibrated else None
    if work is not None:
        plan = work.settle(plan)
        plan.check_disk(destination, hidden_bytes(plan, work))
        if not work.team.leads:
            help_convert_layers(plan, partial_of(destination), work)
            work.team.gather(None)  # until the checkpoint is there
            return read_report(destination)
    with growing_directory(
        plan.source, destination, resume=resume, overwrite=overwrite
    ) as directory:
        more = {} if work is None else {"device": work.device.type}
        if config.recover == "block":
            more["block recovery"] = BLOCK_RECOVERY
        state = ConversionState.open(directory, plan, shard_size, more)
        _convert_shards(plan, directory, state, work, progress)
        report = _finish(plan, directory, str(source), state)
    if work is not None:
        work.team.gather(None)
    return report


def _convert_and_distill(
    source: str | Path,
    destination: Path,
    config: SamoyedsConfig,
    resume: bool,
    overwrite: bool,
    options: dict[str, Any],
) -> PatchReport:
    """Prune to ``DST.pruned``, then distill that to DST on the same text."""
    from samoyeds_hf.recovery import recover_checkpoint

    pruned, calibration = pruned_of(destination), require_calibration(config)
    dense = resolve_source(source)
    check_destination(dense, destination, overwrite)
    kept = config.calibration if config.replace(recover=None).is_calibrated else None
    first = config.replace(recover=None, calibration=None if kept is None else kept.to_dict())
    if not (resume and _is_pruned_as(pruned, first)):
        convert_checkpoint(dense, pruned, first, resume=resume, overwrite=overwrite, **options)
    recover_checkpoint(
        pruned,
        source,
        destination,
        calibration,
        resume=resume,
        overwrite=overwrite,
        device=options["device"],
        progress=options["progress"],
    )
    with disk_errors(pruned):
        shutil.rmtree(pruned)
    return read_report(destination)


def _is_pruned_as(directory: Path, config: SamoyedsConfig) -> bool:
    """Whether an earlier run left a whole checkpoint of this configuration."""
    if not (directory / "config.json").is_file():
        return False
    found = SamoyedsConfig.from_dict(read_config(directory)["quantization_config"])
    if found.calibration is not None:
        found = found.replace(calibration={**found.calibration.to_dict(), "sha256": None})
    wanted = config.to_dict() | {"calibration": config.provenance()["calibration"]}
    if found.to_dict() != wanted:
        raise CheckpointError(
            f"--resume must continue the same conversion, found another recipe in {directory}; "
            "start again with --overwrite."
        )
    return True


def _convert_shards(
    plan: ConversionPlan,
    directory: Path,
    state: ConversionState,
    work: LayerWork | None,
    progress: bool,
) -> None:
    left = state.left(plan.shards)
    total = plan.bytes_before
    with tqdm(
        total=total,
        initial=total - sum(unit.num_bytes for shard in left for unit in plan.units_in(shard)),
        unit="B",
        unit_scale=True,
        disable=not progress,
        desc="converting",
    ) as bar:
        if work is not None:
            convert_layers(plan, directory, state, work, bar)
        for shard in state.left(plan.shards):
            reports: list[WeightReport] = []
            with ShardWriter(directory, shard) as writer:
                for unit in plan.units_in(shard):
                    bar.set_postfix_str(unit.target.name.removeprefix("model."), refresh=False)
                    reports += convert_unit(plan, unit, writer, bar)
            state.finish({shard.file: reports})


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


def _finish(
    plan: ConversionPlan, directory: Path, source: str, state: ConversionState
) -> PatchReport:
    """Everything beside the shards; the configuration last, it makes the directory loadable."""
    by_name = {
        entry["name"]: WeightReport.from_dict(entry)
        for entries in state.done.values()
        for entry in entries
    }
    ordered = tuple(by_name[name] for name in plan.patterns)
    report = PatchReport(
        ordered,
        plan.selection.skipped,
        trained=plan.config.trains_beside,
        **plan.config.provenance(),
    )
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
