"""Distillation of a sparse checkpoint: read with its masks, trained, written with the same masks.

DST has the same files and tensors as the sparse checkpoint, of which only the values of what was
trained differ. It grows in ``DST.partial``, where the state of the training lies too, and becomes
DST by one rename at the very end.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from samoyeds_hf.convert_layers import pick_device
from samoyeds_hf.directory import STATE_FILE, check_destination, copy_companions, growing_directory
from samoyeds_hf.errors import CheckpointError
from samoyeds_hf.format import SparseWeight, decode, validate
from samoyeds_hf.pruning.distill import distill
from samoyeds_hf.pruning.distill_settings import DistillReport, DistillSettings
from samoyeds_hf.pruning.masks import kept_mask
from samoyeds_hf.pruning.recorded import check_recordable
from samoyeds_hf.pruning.training import CsvLog
from samoyeds_hf.recovery_files import (
    LOG_FILE,
    RecoveryWork,
    read_result,
    write_companions,
    write_shards,
)
from samoyeds_hf.shards import disk_errors, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from samoyeds_hf.pruning.calibration import Calibration

_TRAINING_FILE = "distillation.pt"


def recover_checkpoint(
    sparse: str | Path,
    dense: str | Path,
    destination: str | Path,
    calibration: Calibration,
    settings: DistillSettings | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    save_minutes: float = 5.0,
    progress: bool = True,
    cuda_graph: bool = False,
) -> DistillReport:
    """Distill a sparse checkpoint from its dense original, to a sparse checkpoint like it.

    Both models are held in memory whole, in bf16 on a GPU and in fp32 on a CPU; for the bytes see
    :mod:`samoyeds_hf.pruning.distill`. All losses are in ``samoyeds_distillation.csv``.

    Args:
        sparse: a sparse checkpoint.
        dense: the checkpoint that it was made from, a directory or a repository of the Hub.
        destination: directory to make.
        calibration: the text to train on.
        settings: how; None is the default.
        resume: continue an interrupted run, if there is one.
        overwrite: replace an existing checkpoint, once the new one is complete.
        device: where to compute; None is the GPU, where there is one.
        save_minutes: between two states of the training on disk.
        progress: show a progress bar on stderr.
        cuda_graph: as :func:`samoyeds_hf.pruning.distill.distill`.

    Raises:
        SamoyedsError: a subclass; nothing that existed before is lost.
    """
    destination, device = Path(destination), pick_device(device)
    if cuda_graph:
        check_recordable([device], settings or DistillSettings())
    check_destination(Path(sparse), destination, overwrite)
    work = RecoveryWork.prepare(sparse, dense, calibration, settings or DistillSettings())
    check_destination(work.dense, destination, overwrite)
    source = work.checkpoint.directory
    with growing_directory(source, destination, resume=resume, overwrite=overwrite) as directory:
        _begin(directory, work)
        if not (directory / "config.json").exists():  # else it only lacks its name
            student, teacher, masks = _load_models(work, device)
            report = distill(
                student,
                teacher,
                work.data.tokens,
                masks,
                work.settings,
                state=directory / _TRAINING_FILE,
                log=CsvLog(directory / LOG_FILE),
                save_minutes=save_minutes,
                progress=progress,
                cuda_graph=cuda_graph,
            )
            rows = write_shards(directory, work, student, teacher, masks)
            write_companions(directory, work, rows, report)
        with disk_errors(directory):
            (directory / _TRAINING_FILE).unlink(missing_ok=True)
        return read_result(directory)


def _begin(directory: Path, work: RecoveryWork) -> None:
    """Note what goes in, or refuse to go on with something else."""
    path, fingerprint = directory / STATE_FILE, work.fingerprint()
    if not path.exists():
        copy_companions(work.checkpoint.directory, directory)
        write_text(path, json.dumps({"fingerprint": fingerprint}, indent=1) + "\n")
        return
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8"))["fingerprint"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} must say what is distilled, found it unreadable ({error!r}); start again with "
            "--overwrite."
        ) from error
    if different := [key for key, value in fingerprint.items() if found.get(key) != value]:
        raise CheckpointError(
            f"--resume must continue the same distillation, found another {different[0]} than in "
            f"{path}; start again with --overwrite."
        )


@torch.no_grad()
def _load_models(
    work: RecoveryWork, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedModel, dict[str, torch.Tensor]]:
    """Student and teacher on the device; the masks, from meta and index, on the CPU.

    The student is a copy of the teacher that is filled tensor by tensor. NOTE: from_pretrained
    would make it sparse first, and build kernels that are not needed.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    checkpoint = work.checkpoint
    teacher = type(checkpoint.model).from_pretrained(work.dense, dtype=dtype).to(device)
    student = copy.deepcopy(teacher)
    tensors = student.state_dict()  # the student's own memory
    masks = {}
    for name in checkpoint.dense_names():
        if name in checkpoint.patterns:
            stored = SparseWeight(*(part.load() for part in checkpoint.stored(name)))
            validate(stored, checkpoint.patterns[name], tensors[name].shape, name)
            masks[name] = kept_mask(stored, checkpoint.patterns[name])
            tensors[name].copy_(decode(stored, checkpoint.patterns[name]))
            continue
        for key, tensor in checkpoint.targets[name].load(checkpoint.model).items():
            if tensor.shape != tensors[key].shape:
                raise CheckpointError(
                    f"{key} must have shape {list(tensors[key].shape)}, found "
                    f"{list(tensor.shape)}; convert the model again."
                )
            tensors[key].copy_(tensor)
    return student, teacher, masks
