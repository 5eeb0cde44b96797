"""Which weights of a model become sparse, with which pattern, and which stay dense and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from samoyeds_hf.config import SamoyedsConfig
from samoyeds_hf.errors import ConfigError, UnsupportedModelError
from samoyeds_hf.models import FUSED, LISTED, SHARED, Site, survey
from samoyeds_hf.pattern import SparsityPattern
from samoyeds_hf.report import Skipped

# What each of SamoyedsConfig.modules covers.
_KINDS_OF = {"experts": (FUSED, LISTED), "shared_experts": (SHARED,)}


@dataclass(frozen=True)
class Assignment:
    """A site and the pattern of each of its weights."""

    site: Site
    patterns: Mapping[str, SparsityPattern]


@dataclass(frozen=True)
class Selection:
    """What becomes sparse with which pattern, and what does not and why."""

    assignments: tuple[Assignment, ...]
    skipped: tuple[Skipped, ...]

    @cached_property
    def targets(self) -> dict[str, SparsityPattern]:
        """Pattern by the full name of each dense weight that becomes sparse."""
        return {
            f"{assignment.site.name}.{weight}": pattern
            for assignment in self.assignments
            for weight, pattern in assignment.patterns.items()
        }


def select(model: nn.Module, config: SamoyedsConfig) -> Selection:
    """Decide for every expert of a model (which may be on meta), or refuse.

    Raises:
        ConfigError: an override that matches nothing, or makes half a module dense.
        PatternError: a weight that the pattern does not divide.
        UnsupportedModelError: nothing to do, or a module that strict mode does not accept.
    """
    found = survey(model)
    kinds = [kind for module in config.modules for kind in _KINDS_OF[module]]
    sites = [site for site in found.sites if site.kind in kinds]
    refusals = [refusal for refusal in found.refusals if refusal.kind in kinds]
    refused = [Skipped(refusal.name, refusal.reason) for refusal in refusals]
    if config.strict:
        listed = {site.group: None for site in sites if site.kind == LISTED}
        refused += [
            Skipped(group, "a ModuleList of experts runs one Linear at a time, which is slow")
            for group in listed
        ]
        if refused:
            raise UnsupportedModelError(
                f"Every expert must be supported, found {len(refused)} that are not, first "
                f"{refused[0].name}: {refused[0].reason}; strict=False makes sparse what can be "
                "and leaves the rest dense."
            )
    if not sites:
        raise UnsupportedModelError(_nothing_found_message(model, config, refused))
    used: set[str] = set()
    assignments, skipped = [], list(refused)
    for site in sites:
        patterns = _patterns_for(site, config, used)
        if patterns is None:
            skipped.append(Skipped(site.name, "dense by override"))
            continue
        for weight, pattern in patterns.items():
            name = f"{site.name}.{weight}"
            *_, rows, k = model.get_parameter(name).shape
            pattern.check_fits(rows, k, name)
        assignments.append(Assignment(site, patterns))
    if unused := [regex for regex in config.overrides if regex not in used]:
        raise ConfigError(
            f"Every override must match a module, found {unused[0]!r} that matches none; names "
            f"are matched whole and look like {sites[0].name!r}."
        )
    if not assignments:
        raise UnsupportedModelError(
            "At least one module must become sparse, found all dense by overrides; remove one."
        )
    return Selection(tuple(assignments), tuple(skipped))


def _patterns_for(
    site: Site, config: SamoyedsConfig, used: set[str]
) -> dict[str, SparsityPattern] | None:
    """Pattern of each weight of a site, or None if it stays dense; notes the overrides used."""
    patterns: dict[str, SparsityPattern | None] = {}
    for weight in site.weights:
        names = (f"{site.name}.{weight}", site.name, site.group)
        matches = config.overrides_for(*names)
        used.update(matches)
        patterns[weight] = config.overrides[matches[0]] if matches else config.pattern
    sparse = {name: pattern for name, pattern in patterns.items() if pattern is not None}
    if sparse and len(sparse) < len(patterns):
        raise ConfigError(
            f"'dense' goes with a whole module, found it for only a part of {site.name}; match "
            "the module's name instead."
        )
    return sparse or None


def _nothing_found_message(model: nn.Module, config: SamoyedsConfig, refused: list[Skipped]) -> str:
    what = " or ".join(config.modules)
    found = f"; {refused[0].name}: {refused[0].reason}" if refused else ""
    return (
        f"The model needs MoE layers with {what}, found none in {type(model).__name__}{found}; "
        "see the support matrix in the README."
    )
