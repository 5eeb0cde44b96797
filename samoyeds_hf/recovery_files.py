"""What a distilled checkpoint is made from and how it is written; see :mod:`samoyeds_hf.recovery`.

The same files and tensors as in the sparse checkpoint: values of what was trained, the rest byte
for byte.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import samoyeds_hf
from samoyeds_hf.card import updated_card
from samoyeds_hf.compress import matrices_of
from samoyeds_hf.config import SamoyedsConfig
from samoyeds_hf.convert_layers import read_calibration
from samoyeds_hf.directory import DISTILLATION_KEY, REPORT_FILE
from samoyeds_hf.errors import CheckpointError, UnsupportedModelError
from samoyeds_hf.format import encode
from samoyeds_hf.hub import resolve_source
from samoyeds_hf.metrics import relative
from samoyeds_hf.pruning.distill_settings import NOT_KEPT, DistillReport, DistillSettings
from samoyeds_hf.report import PatchReport, WeightReport
from samoyeds_hf.report_files import read_distillation, read_report
from samoyeds_hf.shards import ShardSpec, ShardWriter, TensorSpec, disk_errors, write_text
from samoyeds_hf.skeleton import read_config
from samoyeds_hf.stored import INDEX_FILE, StoredTensor, checkpoint_files, read_checkpoint
from samoyeds_hf.verify import SparseCheckpoint, _open_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from samoyeds_hf.pattern import SparsityPattern
    from samoyeds_hf.pruning.calibration import Calibration, CalibrationData

LOG_FILE = "samoyeds_distillation.csv"
_CONFIG_KEY = "quantization_config"
_HEADING = "## How it was distilled"


@dataclass(frozen=True)
class RecoveryWork:
    """What goes in, all checked."""

    checkpoint: SparseCheckpoint
    stored: dict[str, StoredTensor]  # of the sparse checkpoint
    config: SamoyedsConfig
    dense: Path
    base: str  # what the card calls the dense model
    data: CalibrationData
    calibration: Calibration  # with the sum of the tokens, without a path
    settings: DistillSettings

    @classmethod
    def prepare(
        cls,
        sparse: str | Path,
        dense: str | Path,
        calibration: Calibration,
        settings: DistillSettings,
    ) -> RecoveryWork:
        """Read configurations, headers and the text; see :func:`recover_checkpoint`.

        Raises:
            SamoyedsError: a subclass; checkpoints that do not go together, or unusable text.
        """
        checkpoint = SparseCheckpoint.open(sparse)
        config = SamoyedsConfig.from_dict(read_config(checkpoint.directory)[_CONFIG_KEY])
        directory = resolve_source(dense)
        _open_source(directory, checkpoint.model)
        if settings.train == "all":
            _check_plain(checkpoint)
        data = read_calibration(
            config.replace(calibration=calibration.to_dict()), checkpoint.directory
        )
        return cls(
            checkpoint=checkpoint,
            stored=read_checkpoint(checkpoint.directory),
            config=config,
            dense=directory,
            base=directory.resolve().name if Path(dense).exists() else str(dense),
            data=data,
            calibration=replace(calibration.without_path(), sha256=data.sha256),
            settings=settings,
        )

    def shards(self) -> list[ShardSpec]:
        """Those of the sparse checkpoint."""
        return [
            ShardSpec(
                file.name,
                tuple(
                    TensorSpec(tensor.name, tensor.dtype, tensor.shape)
                    for tensor in self.stored.values()
                    if tensor.file == file
                ),
            )
            for file in checkpoint_files(self.checkpoint.directory)
        ]

    def fingerprint(self) -> dict[str, Any]:
        """What the result depends on."""
        return {
            "sparse checkpoint": _digest_files(self.checkpoint.directory),
            "dense checkpoint": _digest_files(self.dense),
            "calibration": self.calibration.to_dict(),
            "training": asdict(self.settings),
            "version of samoyeds-hf": samoyeds_hf.__version__,
        }


def _digest_files(directory: Path) -> str:
    files = [directory / "config.json", *checkpoint_files(directory)]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _check_plain(checkpoint: SparseCheckpoint) -> None:
    """Everything else can only be written back where it is stored as the model has it."""
    for name, target in checkpoint.targets.items():
        if target.converter is not None:
            raise UnsupportedModelError(
                f"train='all' needs every tensor stored under its own name, found {name} made of "
                f"several in {checkpoint.directory}; load and save the checkpoint first, or use "
                "train='experts'."
            )


@torch.no_grad()
def write_shards(
    directory: Path,
    work: RecoveryWork,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    masks: Mapping[str, torch.Tensor],
) -> list[WeightReport]:
    """All tensors: values of what was trained, the others byte for byte."""
    checkpoint = work.checkpoint
    sparse = {checkpoint.stored(name)[0].name: name for name in checkpoint.patterns}
    plain = _trained_whole(work, student)
    reports = {}
    for shard in work.shards():
        with ShardWriter(directory, shard) as writer:
            for spec in shard.tensors:
                if spec.name in sparse:
                    name = sparse[spec.name]
                    dense = teacher.get_parameter(name)
                    weight, pattern = student.get_parameter(name), checkpoint.patterns[name]
                    error = _write_values(writer, spec, weight, masks[name], dense, pattern)
                    reports[name] = _row(work, name, weight.shape, error)
                elif spec.name in plain:
                    writer.write(spec.name, plain[spec.name].to(spec.dtype))
                else:
                    writer.write(spec.name, work.stored[spec.name].load())
    return [reports[name] for name in checkpoint.patterns]


def _write_values(
    writer: ShardWriter,
    spec: TensorSpec,
    weight: torch.Tensor,  # [E, m, k] or [m, k]  trained
    mask: torch.Tensor,
    dense: torch.Tensor,
    pattern: SparsityPattern,
) -> float:
    """Encode and write the values, a matrix at a time; their relative error."""
    lost = norm = 0.0
    matrices = (matrices_of(tensor) for tensor in (weight, mask, dense))
    for row, (kept, chosen, original) in enumerate(zip(*matrices, strict=True)):
        rounded = kept.to(spec.dtype)
        lost += float((original.double() - rounded).square().sum())
        norm += float(original.double().square().sum())
        values = encode(rounded.cpu(), chosen, pattern, spec.name).values
        writer.write(spec.name, values, None if weight.ndim == 2 else row)
    return relative(lost, norm)


def _row(work: RecoveryWork, name: str, shape: torch.Size, error: float) -> WeightReport:
    stored = work.checkpoint.stored(name)
    return WeightReport(
        name=name,
        shape=tuple(shape),
        pattern=str(work.checkpoint.patterns[name]),
        bytes_before=shape.numel() * stored[0].dtype.itemsize,
        bytes_after=sum(part.num_bytes for part in stored),
        error=error,
    )


def _trained_whole(work: RecoveryWork, student: PreTrainedModel) -> dict[str, torch.Tensor]:
    """By stored name, what has no mask and was trained; tied weights under all their names."""
    if work.settings.train != "all":
        return {}
    found = {}
    for name, weight in student.named_parameters(remove_duplicate=False):
        target = work.checkpoint.targets.get(name)
        if target is not None and name not in work.checkpoint.patterns:
            ((stored,),) = target.sources.values()
            found[stored.name] = weight
    return found


def write_companions(
    directory: Path, work: RecoveryWork, rows: list[WeightReport], result: DistillReport
) -> None:
    """Everything beside the shards; the configuration last, it makes the directory loadable."""
    source = work.checkpoint.directory
    with disk_errors(directory):
        if (source / INDEX_FILE).is_file():
            shutil.copyfile(source / INDEX_FILE, directory / INDEX_FILE)
    found = {name: (t.dtype, t.shape) for name, t in read_checkpoint(directory).items()}
    if found != {name: (t.dtype, t.shape) for name, t in work.stored.items()}:
        raise CheckpointError(
            f"The shards in {directory} must be those of {source}, found others; start again with "
            "--overwrite."
        )
    config = work.config.replace(recover="distill")
    report = _new_report(source, rows, config, work.settings.train == "all")
    details = {
        "settings": asdict(work.settings),
        "calibration": work.calibration.to_dict(),
        "result": asdict(result),
    }
    content = json.dumps({**report.to_dict(), DISTILLATION_KEY: details}, indent=1)
    write_text(directory / REPORT_FILE, content + "\n")
    _write_card(directory, work, report, result)
    content = json.dumps({**read_config(source), _CONFIG_KEY: config.to_dict()}, indent=2)
    write_text(directory / "config.json", content + "\n")


def _new_report(
    source: Path, rows: list[WeightReport], config: SamoyedsConfig, trains_all: bool
) -> PatchReport:
    """What the sparse checkpoint's report says, with the new errors; those of outputs are past."""
    if not (source / REPORT_FILE).exists():  # written by save_pretrained
        trained = "all" if trains_all else None
        return PatchReport(tuple(rows), (), trained=trained, **config.provenance())
    old = read_report(source)
    trained = "all" if trains_all else old.trained
    by_name = {weight.name: weight for weight in old.weights}
    weights = tuple(
        replace(by_name.get(row.name, row), error=row.error, output_error=None) for row in rows
    )
    return replace(old, weights=weights, recover=config.recover, trained=trained)


def _write_card(
    directory: Path, work: RecoveryWork, report: PatchReport, result: DistillReport
) -> None:
    readme = work.checkpoint.directory / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    text, _, _ = text.partition(_HEADING)  # of an earlier distillation
    name, settings, data = directory.name.removesuffix(".partial"), work.settings, work.calibration
    what = "the pruned weights" if settings.train == "experts" else "all weights"
    lines = [
        _HEADING,
        "",
        f"- trained: {what}, masks held, towards the logits of `{work.base}`",
        f"- data: {data.samples} x {data.sequence_length} tokens of {data.data}, seed {data.seed}",
        f"- sha256 of its tokens: `{data.sha256}`",
        f"- {settings.steps} steps of {settings.batch_size} sequences, learning rate "
        f"{result.rates}, temperature {settings.temperature:g}, hidden states weighed "
        f"{settings.hidden_weight:g}, seed {settings.seed}",
        f"- KL to `{work.base}` on that data: {result.first:.4f} in the first tenth of the steps, "
        f"{result.last:.4f} in the last (nats a token; each step in `{LOG_FILE}`)",
    ]
    if result.before is not None and result.after is not None:
        said = "" if result.kept else f": {NOT_KEPT}"
        lines.append(f"- on sequences held back {result.held_back}{said}")
    card = updated_card(text, report, name, work.base).strip()
    write_text(directory / "README.md", card + "\n\n" + "\n".join(lines) + "\n")


def read_result(directory: Path) -> DistillReport:
    """What the report of a distilled checkpoint says about the training."""
    result = read_distillation(directory)["result"]
    return DistillReport(**{**result, "trials": tuple(result.get("trials", ()))})
