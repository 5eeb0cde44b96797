"""The part of a conversion that looks at data: layer by layer, each written when it is pruned.

After each layer the hidden states that the next one gets are kept beside the shards, so that a
conversion that was stopped goes on with that layer and gives the same bytes.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from samoyeds_hf.compress import matrices_of
from samoyeds_hf.errors import CalibrationError, CheckpointError
from samoyeds_hf.format import SUFFIXES, encode
from samoyeds_hf.pruning.calibration import Calibration, CalibrationData, load_calibration
from samoyeds_hf.pruning.layer import PruneSettings
from samoyeds_hf.pruning.streamed import StreamedLayers
from samoyeds_hf.pruning.team import Team
from samoyeds_hf.pruning.training import CsvLog
from samoyeds_hf.pruning.walk import LayerResult, Walk
from samoyeds_hf.shards import ShardSpec, ShardWriter, TensorSpec

BLOCK_LOG_FILE = "samoyeds_block.csv"  # losses of --recover block
_CHECKSUMS = "checksums"  # beside the hidden states

if TYPE_CHECKING:
    from samoyeds_hf.config import SamoyedsConfig
    from samoyeds_hf.conversion_state import ConversionState
    from samoyeds_hf.pattern import SparsityPattern
    from samoyeds_hf.plan import ConversionPlan
    from samoyeds_hf.report import WeightReport


@dataclass(frozen=True)
class LayerWork:
    """What a calibrated conversion needs beside its plan."""

    data: CalibrationData
    device: torch.device
    settings: PruneSettings
    team: Team

    @classmethod
    def prepare(cls, plan: ConversionPlan, device: str | torch.device | None) -> LayerWork:
        """Read the calibration data.

        Raises:
            CalibrationError: none named, unreadable, too little, or no tokenizer to read it with.
        """
        team = Team.current()
        return cls(
            data=read_calibration(plan.config, plan.source),
            team=team,
            device=team.device() if team.size > 1 else pick_device(device),
            settings=PruneSettings.of(plan.config),
        )

    def settle(self, plan: ConversionPlan) -> ConversionPlan:
        """The plan with what was read in its configuration, and without this machine's paths."""
        calibration = require_calibration(plan.config)
        stored = replace(calibration.without_path(), sha256=self.data.sha256)
        return replace(plan, config=plan.config.replace(calibration=stored.to_dict()))


def read_calibration(config: SamoyedsConfig, source: Path) -> CalibrationData:
    """The tokens that a configuration asks for, by the tokenizer of a model directory.

    Raises:
        CalibrationError: none named, unreadable, too little, or no tokenizer to read it with.
    """
    from transformers import AutoConfig, AutoTokenizer

    calibration = require_calibration(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever a damaged file makes tokenizers raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CalibrationError(
            f"Calibration needs the model's tokenizer, found none in {source} ({reason}); put its "
            "files beside the weights."
        ) from error
    text = AutoConfig.from_pretrained(source).get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    return load_calibration(calibration, tokenizer, max_position_embeddings=limit)


def hidden_bytes(plan: ConversionPlan, work: LayerWork) -> int:
    """Bytes of the hidden states kept on disk, of which there are two for a moment."""
    width = plan.model_config.get_text_config().hidden_size * plan.model.dtype.itemsize
    streams = 2 if work.settings.follows_dense else 1
    return 2 * streams * work.data.tokens.numel() * int(width)


def require_calibration(config: SamoyedsConfig) -> Calibration:
    """The calibration of a configuration that needs one.

    Raises:
        CalibrationError: it has none.
    """
    if config.calibration is None:
        what = f"Method {config.method!r}" + " with --refine" * config.refine
        if config.recover is not None:
            what = f"--recover {config.recover}"
        raise CalibrationError(
            f"{what} needs calibration data, found none; name some with --calibration (a text "
            "file, a .jsonl file, a directory or a data set of the Hub)."
        )
    return config.calibration


def check_calibration(config: SamoyedsConfig) -> None:
    """Refuse a configuration that names no data and needs some, or names some for nothing.

    Raises:
        CalibrationError: either.
    """
    if config.is_calibrated or config.recover is not None:
        require_calibration(config)
    elif config.calibration is not None:
        raise CalibrationError(
            f"Calibration data goes with a method that looks at it, found {config.method!r}, which "
            "does not; choose another method, --refine or --asymmetric, or leave the data out."
        )


def pick_device(device: str | torch.device | None) -> torch.device:
    """A device as given; by default the GPU, where there is one.

    Raises:
        CalibrationError: no such device here.
    """
    if device is None or str(device) == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        found = torch.ones(1, device=device)
        if found.device.type == "meta":
            raise RuntimeError("it holds no data")
    except (RuntimeError, AssertionError) as error:
        raise CalibrationError(
            f"The device must be one of this machine, found {str(device)!r} "
            f"({str(error).splitlines()[0]}); use cpu, cuda or cuda:1."
        ) from error
    return found.device


def convert_layers(
    plan: ConversionPlan, directory: Path, state: ConversionState, work: LayerWork, bar: Any
) -> None:
    """Prune and write every layer that is not done; ``bar`` counts bytes of dense tensors."""
    layers = StreamedLayers(plan, work.device)
    shards = _shards_by_layer(plan, layers)
    walk = _walk_from(_first_unfinished(shards, state), plan, directory, work, layers)
    walk.log = CsvLog(directory / BLOCK_LOG_FILE)
    _drop_hidden(directory, walk.next)
    for result in walk:
        bar.set_postfix_str(_summary(result), refresh=False)
        reports = {}
        for shard in shards[result.index]:
            with ShardWriter(directory, shard) as writer:
                reports[shard.file] = _write_layer(plan, shard, result, writer, bar)
        if walk.next <= walk.last:
            _save_hidden(directory, walk)
        state.finish(reports, walk.next)
        _drop_hidden(directory, walk.next)


def help_convert_layers(plan: ConversionPlan, directory: Path, work: LayerWork) -> None:
    """This process's share of :func:`convert_layers`, which another one leads; writes nothing."""
    for _ in _walk_from(None, plan, directory, work, StreamedLayers(plan, work.device)):
        pass


def _walk_from(
    layer: int | None,  # None: as the leading process says
    plan: ConversionPlan,
    directory: Path,
    work: LayerWork,
    layers: StreamedLayers,
) -> Walk:
    """A walk that goes on with a layer."""
    walk = Walk(layers, plan.patterns, work.data.tokens, work.settings, work.team)
    start = int(work.team.follow(layer))
    if start > walk.last:
        walk.resume(start, [])
    elif start:
        _resume(walk, directory, start)
    return walk


def _shards_by_layer(plan: ConversionPlan, layers: StreamedLayers) -> Mapping[int, list[ShardSpec]]:
    """The shards of each layer that the walk goes through."""
    by_layer: dict[int, list[ShardSpec]] = defaultdict(list)
    for shard in plan.shards:
        index = layers.decoder.layer_of(shard.tensors[0].name)
        if index is not None:
            by_layer[index].append(shard)
    return by_layer


def _first_unfinished(shards: Mapping[int, list[ShardSpec]], state: ConversionState) -> int:
    """The layer to go on with. One whose shards were lost is redone, with all that follow."""
    for index in range(state.next_layer):
        if state.left(shards[index]):
            return 0
    return state.next_layer


def _write_layer(
    plan: ConversionPlan, shard: ShardSpec, result: LayerResult, writer: ShardWriter, bar: Any
) -> list[WeightReport]:
    pruned = {weight.name: weight for weight in result.weights}
    tensors = result.layer.state_dict(prefix=f"{result.path}.", keep_vars=True)
    reports = []
    for unit in plan.units_in(shard):
        for name, spec in unit.outputs.items():
            tensor = tensors[name].detach()
            if name in pruned:
                pattern = plan.patterns[name]
                num_bytes = _write_sparse(tensor, pruned[name].mask, pattern, name, writer)
                row = (name, spec.shape, str(pattern), spec.num_bytes, num_bytes)
                reports.append(pruned[name].report(*row))
            else:
                writer.write(name, tensor)
        bar.update(unit.num_bytes)
    return reports


def _write_sparse(
    weight: torch.Tensor,  # [E, m, k] or [m, k], zero outside the mask
    mask: torch.Tensor,
    pattern: SparsityPattern,
    name: str,
    writer: ShardWriter,
) -> int:
    """Encode and write, a matrix at a time; the bytes."""
    num_bytes = 0
    for row, (kept, chosen) in enumerate(zip(matrices_of(weight), matrices_of(mask), strict=True)):
        sparse = encode(kept, chosen, pattern, name)
        for suffix, tensor in zip(SUFFIXES, sparse, strict=True):
            writer.write(name + suffix, tensor, row if weight.ndim == 3 else None)
        num_bytes += sparse.num_bytes
    return num_bytes


def _summary(result: LayerResult) -> str:
    if not result.weights:
        return f"layer {result.index}"
    worst = max(result.weights, key=lambda weight: weight.error)
    short = worst.name.removeprefix(f"{result.path}.")
    return f"layer {result.index}, output error at most {worst.error:.4f} ({short})"


def _hidden_file(directory: Path, index: int) -> Path:
    return directory / f"hidden-before-{index:05d}.bin"  # no suffix that looks like weights


def _save_hidden(directory: Path, walk: Walk) -> None:
    """Keep what the next layer gets, in the pruned model and, where it is followed, the dense."""
    tensors = {f"hidden.{i:06d}": tensor for i, tensor in enumerate(walk.hidden)}
    tensors |= {f"dense.{i:06d}": tensor for i, tensor in enumerate(walk.dense or ())}
    tensors[_CHECKSUMS] = _checksums(tensors)
    specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    shard = ShardSpec(_hidden_file(directory, walk.next).name, tuple(specs))
    with ShardWriter(directory, shard) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def _checksums(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """CRC-32 of each tensor, by name, ``[n]`` int64: nothing else would show a flipped bit."""
    ordered = (tensors[name].contiguous().view(torch.uint8) for name in sorted(tensors))
    return torch.tensor([zlib.crc32(tensor.numpy().data) for tensor in ordered])


def _drop_hidden(directory: Path, index: int) -> None:
    """Delete the inputs of layers before one; a run that was killed may have left some."""
    first_needed = _hidden_file(directory, index).name
    for path in directory.glob("hidden-before-*"):
        if path.name < first_needed:
            path.unlink()


def _resume(walk: Walk, directory: Path, index: int) -> None:
    """Go on with a layer and what was kept for it; of as many tokens as the walk's own."""
    path = _hidden_file(directory, index)
    try:
        found = load_file(path)
        if not torch.equal(found.pop(_CHECKSUMS), _checksums(found)):
            raise ValueError("its checksums do not fit")
        hidden, dense = (
            [found[key] for key in sorted(found) if key.startswith(prefix)]
            for prefix in ("hidden.", "dense.")
        )
        expected = [tensor.shape[:2] for tensor in walk.hidden]
        for batches in (hidden, dense) if dense else (hidden,):
            if [tensor.shape[:2] for tensor in batches] != expected:
                raise ValueError("those of other tokens")
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise CheckpointError(
            f"{path} must hold the hidden states to go on with, found it damaged ({error}); "
            "start again with --overwrite."
        ) from error
    walk.resume(index, hidden, dense or None)
