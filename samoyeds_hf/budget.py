"""``--budget``: patterns for each weight of a checkpoint, chosen by what they cost the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from samoyeds_hf.config import SamoyedsConfig
from samoyeds_hf.convert_layers import LayerWork, require_calibration
from samoyeds_hf.directory import STATE_FILE, partial_of
from samoyeds_hf.errors import CheckpointError
from samoyeds_hf.hub import resolve_source
from samoyeds_hf.pattern import SparsityPattern
from samoyeds_hf.plan import plan_conversion
from samoyeds_hf.pruning.budget import budget_overrides, check_budget
from samoyeds_hf.pruning.streamed import StreamedLayers


def with_budget(
    source: str | Path,
    config: SamoyedsConfig,
    budget: float,
    *,
    candidates: Sequence[str | SparsityPattern] | None = None,
    destination: Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> SamoyedsConfig:
    """A configuration whose overrides drop a share of the experts' weights where it costs least.

    Goes through the dense model once, layer by layer, and prunes each weight on trial; see
    :mod:`samoyeds_hf.pruning.budget`. What the configuration's own overrides set stays as it is
    and is not counted.

    Args:
        source: a dense checkpoint, or a repository of the Hub.
        config: method, calibration, and a pattern, whose V the candidates have.
        budget: share of weights that is dropped, at least: 0.75.
        candidates: patterns to choose from; by default five with the V of the configuration's,
            of which only (1,2,V), (3,4,V) and 2:4 have fast kernels.
        destination: of a conversion that may have begun; what was chosen for it is chosen again.
        device: where to compute; None is the GPU, where there is one.
        progress: show a progress bar on stderr.

    Raises:
        SamoyedsError: a subclass.
    """
    check_budget(budget)
    require_calibration(config)
    own = config.to_dict()["overrides"]
    if destination is not None and (found := _chosen_before(destination, budget)) is not None:
        return config.replace(overrides=found, budget=budget)
    plan = plan_conversion(resolve_source(source), config, 10**12)
    work = LayerWork.prepare(plan, device)
    layers = StreamedLayers(plan, work.device)
    patterns = {
        f"{site.name}.{weight}": pattern
        for site, by_weight in ((a.site, a.patterns) for a in plan.selection.assignments)
        for weight, pattern in by_weight.items()
        if not config.overrides_for(f"{site.name}.{weight}", site.name, site.group)
    }
    chosen = None if candidates is None else [SparsityPattern.parse(text) for text in candidates]
    with tqdm(
        total=len(layers.decoder.layers), disable=not progress, desc="measuring", unit="layer"
    ) as bar:

        def advance(_layer: int) -> None:
            bar.update()

        overrides = budget_overrides(
            layers,
            patterns,
            work.data.tokens,
            work.settings,
            budget,
            chosen,
            team=work.team,
            on_layer=advance,
        )
    return config.replace(overrides=[*own, *overrides.items()], budget=budget)


def _chosen_before(destination: Path, budget: float) -> list[list[str]] | None:
    """The overrides of a conversion that was stopped, whose measuring is not done again."""
    path = partial_of(destination) / STATE_FILE
    if not path.exists():
        return None
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]["recipe"]
        overrides = [[str(regex), str(pattern)] for regex, pattern in recipe["overrides"]]
        found = recipe["budget"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} must say what was converted, found it unreadable ({error!r}); start again "
            "with --overwrite."
        ) from error
    if found != budget:
        raise CheckpointError(
            f"--resume must continue the same conversion, found a budget of {found} in {path}; "
            "start again with --overwrite."
        )
    return overrides
