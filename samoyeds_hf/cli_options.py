"""Options that several commands of ``samoyeds`` share, and what is made of them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samoyeds_hf.errors import ConfigError

if TYPE_CHECKING:
    from samoyeds_hf.config import SamoyedsConfig
    from samoyeds_hf.plan import ConversionPlan

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

Source = Annotated[str, typer.Argument(metavar="SRC", help="Model directory, or an id of the Hub.")]
Pattern = Annotated[str | None, typer.Option(help="N:M:V, or 2:4.  [default: 1:2:64]")]
Method = Annotated[
    str | None,
    typer.Option(
        help="How weights are chosen: magnitude, or with --calibration wanda, sparsegpt, admm, "
        "best.  [default: magnitude]"
    ),
]
Refine = Annotated[
    bool | None,
    typer.Option("--refine/--no-refine", help="Least squares on the kept weights, after METHOD."),
]
Asymmetric = Annotated[
    bool | None,
    typer.Option(
        "--asymmetric/--symmetric",
        help="Prune each layer towards what the dense model makes of the same text.",
    ),
]
Permute = Annotated[
    bool | None,
    typer.Option("--permute/--no-permute", help="Reorder each expert's neurons to suit PATTERN."),
]
Budget = Annotated[
    float | None,
    typer.Option(
        help="Share of the experts' weights to drop, such as 0.75: each weight's pattern is then "
        "chosen by measured error, with the V of --pattern."
    ),
]
Candidates = Annotated[
    str | None,
    typer.Option(
        help="With --budget: the patterns to choose from, with commas. 1:2:64,3:4:64,2:4 have "
        "fast kernels.  [default: from 1:4:V to 2:4]"
    ),
]
Recover = Annotated[
    str | None,
    typer.Option(help="Train the kept weights after pruning: block (each layer) or distill."),
]
CalibrationText = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Text that methods learn from: a file (text, .jsonl), a directory, a data set of the "
        "Hub, or python-stdlib.",
    ),
]
Samples = Annotated[
    int | None, typer.Option(min=1, help="Sequences of calibration.  [default: 128]")
]
SequenceLength = Annotated[
    int | None, typer.Option(min=2, help="Tokens of a sequence.  [default: 2048]")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Order of documents.  [default: 0]")]
Device = Annotated[
    str | None, typer.Option(help="cuda, cuda:1, cpu, ...  [default: the GPU, where there is one]")
]
Recipe = Annotated[
    str | None,
    typer.Option(help="YAML file with all settings, or the name of a bundled recipe."),
]
ShardSize = Annotated[str, typer.Option(help="Largest size of an output file.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace DST once the new checkpoint is complete.")
]


def parse_size(text: str) -> int:
    """Bytes of "5GB" (powers of 1000, as the Hub counts).

    Raises:
        ConfigError: not a positive number with B, KB, MB, GB or TB.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    num_bytes = int(float(match.group(1)) * _UNITS[match.group(2)]) if match else 0
    if num_bytes <= 0:
        raise ConfigError(f"A size is written like '5GB' or '500MB', found {text!r}.")
    return num_bytes


def is_first_process() -> bool:
    """Whether this is the one of several, started by torchrun, that speaks."""
    return os.environ.get("RANK", "0") == "0"


def calibration_options(
    data: str | None, samples: int | None, sequence_length: int | None, seed: int | None
) -> dict[str, Any]:
    """The options that were given, as fields of a Calibration."""
    given = {"data": data, "samples": samples, "sequence_length": sequence_length, "seed": seed}
    return {key: value for key, value in given.items() if value is not None}


def make_config(
    settings: Mapping[str, Any], calibration: dict[str, Any], recipe: str | None
) -> SamoyedsConfig:
    """Single settings, or a recipe; the data of a recipe is what its user has.

    Raises:
        ConfigError: both, a value that cannot be, or options of calibration without any text.
    """
    from samoyeds_hf.config import SamoyedsConfig
    from samoyeds_hf.resources import recipe_path

    given = {key: value for key, value in settings.items() if value is not None}
    if recipe is not None and given:
        raise ConfigError(
            f"Give --recipe or the single settings, found both --recipe and --{next(iter(given))}; "
            "put the setting into the recipe."
        )
    if recipe is None:
        config = SamoyedsConfig(**given)
    else:
        config = SamoyedsConfig.from_recipe(recipe_path(recipe))
    if not calibration:
        return config
    old = {} if config.calibration is None else config.calibration.to_dict()
    old.pop("sha256", None)  # of other tokens
    if "data" not in old | calibration:
        raise ConfigError(
            f"--{next(iter(calibration)).replace('_', '-')} goes with --calibration, found none; "
            "name the text."
        )
    return config.replace(calibration=old | calibration)


def print_plan(plan: ConversionPlan, device: str | None) -> int:
    """A plan, and what calibration and distillation will need, of which time is measured here and
    now. Returns the bytes of disk that the output does not show.
    """
    from samoyeds_hf.convert_layers import pick_device
    from samoyeds_hf.pruning.calibration import Calibration
    from samoyeds_hf.pruning.cost import estimate, estimate_distillation
    from samoyeds_hf.pruning.distill_settings import DistillSettings
    from samoyeds_hf.pruning.layer import PruneSettings

    print(plan)
    config = plan.config
    text = config.calibration or Calibration("text that is still to be named")
    if config.is_calibrated:
        num_tokens = text.samples * text.sequence_length
        print(estimate(plan, PruneSettings.of(config), num_tokens, pick_device(device)))
    if config.recover != "distill":
        return 0
    shape = (text.samples, text.sequence_length)
    cost = estimate_distillation(plan, DistillSettings(), *shape, pick_device(device))
    print(cost)
    return cost.disk_bytes
