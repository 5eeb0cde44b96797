"""Reading a checkpoint on disk, through transformers' own conversion tables.

The tables say how the tensors of the Hub (one an expert) become the model's (all experts in one).
They are semi-private, so this file is the only one that touches them. A file is opened for one
tensor at a time, because what is read of a mapped file counts as memory used until it is unmapped.
"""

from __future__ import annotations

import re
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from samoyeds_hf.errors import CheckpointError
from samoyeds_hf.stored import StoredTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Target:
    """A tensor of the model and the stored tensors that it is made from."""

    name: str
    sources: dict[str, list[StoredTensor]] = field(default_factory=lambda: defaultdict(list))
    converter: WeightConverter | None = None

    @property
    def is_here(self) -> bool:
        """Whether its sources are on this disk; of a repository of the Hub they need not be."""
        return all(s.file.is_file() for stored in self.sources.values() for s in stored)

    def load(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Load and convert: the tensors of the model by name (several where one is split)."""
        return self._convert(model, {k: [s.load() for s in v] for k, v in self.sources.items()})

    def on_meta(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The same without data: names and shapes as they will be.

        Raises:
            CheckpointError: the sources do not go together, as where one expert is missing.
        """
        parts = {k: [s.on_meta() for s in v] for k, v in self.sources.items()}
        try:
            return self._convert(model, parts)
        except (RuntimeError, ValueError, LookupError) as error:
            found = ", ".join(f"{len(v)} x {k}" for k, v in self.sources.items())
            raise CheckpointError(
                f"{self.name} must be made of tensors that go together, found {found} "
                f"({str(error).splitlines()[0]}); download the checkpoint again."
            ) from error

    def load_matrix(self, model: PreTrainedModel, position: int) -> torch.Tensor:
        """One expert's matrix ``[m, k]``; reads just its sources where the conversion allows."""
        if self.converter is None:
            ((stored,),) = self.sources.values()
            return stored.load_row(position)[0]
        if not self.is_by_expert:
            return self.load(model)[self.name][position].clone()
        one = {pattern: [stored[position].load()] for pattern, stored in self.sources.items()}
        return self._convert(model, one)[self.name][0]

    @property
    def is_by_expert(self) -> bool:
        """Whether expert e of the result depends on nothing but the e-th of each source."""
        if self.converter is None:
            return True
        merge, *others = self.converter.operations
        return (
            isinstance(merge, MergeModulelist)
            and merge.dim == 0
            and len({len(stored) for stored in self.sources.values()}) == 1
            and all(
                (isinstance(op, Concatenate) and op.dim > 0)
                or (isinstance(op, Transpose) and min(op.dim0, op.dim1) > 0)
                for op in others
            )
        )

    def _convert(
        self, model: PreTrainedModel, tensors: dict[str, list[torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        if self.converter is None:
            ((tensor,),) = tensors.values()
            return {self.name: tensor}
        converter = deepcopy(self.converter)
        for pattern, parts in tensors.items():
            for stored, tensor in zip(self.sources[pattern], parts, strict=False):
                converter.add_tensor(self.name, stored.name, pattern, tensor)
        converted = converter.convert(self.name, model=model, config=model.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in converted.items()}


@dataclass
class SourcePlan:
    """Which stored tensors make which tensor of the model."""

    targets: dict[str, Target]
    unused: list[str]  # stored tensors that the model does not have
    missing: list[str]  # tensors of the model that nothing makes


def plan_sources(model: PreTrainedModel, tensors: dict[str, StoredTensor]) -> SourcePlan:
    """Match stored tensors with a model's, as ``from_pretrained`` does.

    Args:
        model: on meta or not; only names are read.
        tensors: of the checkpoint, by name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
    expected, prefix = model.state_dict(), model.base_model_prefix
    targets: dict[str, Target] = {}
    unused = []
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = key, None
        if name not in expected:
            unused.append(key)
            continue
        target = targets.setdefault(name, Target(name))
        if pattern is not None:
            target.converter = by_pattern[pattern]
        target.sources[pattern or key].append(tensors[key])
    # Of tied weights one is enough, under either name.
    for name, base in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if name in targets and base not in targets:
            targets[base] = replace(targets.pop(name), name=base)
    return SourcePlan(targets, unused, _missing(model, targets))


def _missing(model: PreTrainedModel, targets: dict[str, Target]) -> list[str]:
    made = set(targets)
    for target in targets.values():
        if target.converter is not None and len(target.converter.target_patterns) > 1:
            made.update(target.on_meta(model))
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    ignored = [re.compile(key) for key in model._keys_to_ignore_on_load_missing or []]
    return [
        name
        for name in model.state_dict()
        if name not in made and name not in tied and not any(p.search(name) for p in ignored)
    ]


def loaded_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype in which ``from_pretrained(dtype=...)`` would hold each tensor of the model."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype) or {}
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    if plan:
        expression, by_group, _ = build_glob_alternation(list(plan))
        for name in dtypes:
            match = expression.search(name)
            if match is not None and dtypes[name].is_floating_point:
                dtypes[name] = plan[by_group[match.lastgroup]]
    return dtypes


def tied_names(model: PreTrainedModel, targets: dict[str, Target]) -> set[str]:
    """Tensors that are not stored, because another one has the same values.

    A checkpoint may hold both, with different values; then transformers does not tie them. Of one
    that is not downloaded yet that is not known.
    """
    return {
        name
        for name, base in (getattr(model, "all_tied_weights_keys", None) or {}).items()
        if name not in targets
        or not (targets[name].is_here and targets[base].is_here)
        or torch.equal(targets[name].load(model)[name], targets[base].load(model)[base])
    }


def original_names(
    model: PreTrainedModel, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Tensors of the model under the names (and splits) of the Hub, as save_pretrained writes."""
    from transformers.core_model_loading import revert_weight_conversion

    reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(tensors))
    return reverted
