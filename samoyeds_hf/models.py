"""Which modules of a model are experts, and why others are not.

Recognised by structure, never by a list of classes: most MoE models of transformers hold the same
fused experts module, declared by ``use_experts_implementation``.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field

from torch import nn

FUSED = "experts"
SHARED = "shared_experts"
LISTED = "expert_list"  # experts in a ModuleList or ModuleDict: the slow fallback

_FUSED_WEIGHTS = ("gate_up_proj", "down_proj")
_MLP_LAYOUTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_NO_GATED_MLP = "without gate_proj/up_proj/down_proj or w1/w3/w2 Linears free of bias"
# What the decorator declares about a module, and the only value that the format knows.
_REQUIRED_FLAGS = {
    "has_gate": True,
    "is_concatenated": True,
    "is_transposed": False,
    "has_bias": False,
}
_REASON_OF_FLAG = {
    "has_gate": "its experts have no gate",
    "is_concatenated": "its gate and up rows are interleaved",
    "is_transposed": "its weights are stored transposed",
    "has_bias": "its experts have a bias",
}


@dataclass(frozen=True)
class Site:
    """One module that can be replaced, and the weights in it."""

    name: str  # path of the module in the model
    kind: str  # FUSED, SHARED or LISTED
    weights: tuple[str, ...]  # names of its parameters that become sparse
    group: str  # path of the experts or the shared expert that it is a part of


@dataclass(frozen=True)
class Refusal:
    """A module that looks like experts and is not supported."""

    name: str
    reason: str
    kind: str = FUSED  # or SHARED

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass
class Survey:
    """What was found in a model."""

    sites: list[Site] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    _decided: set[str] = field(default_factory=set)  # paths below which nothing is looked at

    def add(self, found: Site | Refusal) -> None:
        """Note a decision; it holds for everything below that path too."""
        if isinstance(found, Site):
            self.sites.append(found)
            self._decided.add(found.group)
        else:
            self.refusals.append(found)
            self._decided.add(found.name)

    def covers(self, name: str) -> bool:
        """Whether a module lies below a path that is decided, or on it."""
        parts = name.split(".")
        return any(".".join(parts[:end]) in self._decided for end in range(1, len(parts) + 1))


def survey(model: nn.Module) -> Survey:
    """Find every expert of a model, its shared experts, and what cannot be supported."""
    found = Survey()
    for name, module in model.named_modules():
        if found.covers(name):
            continue
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            _survey_list(model, name, module, found)
        elif _looks_like_experts(module):
            reason = _why_not_fused(module)
            if reason is None:
                found.add(Site(name, FUSED, _FUSED_WEIGHTS, group=name))
                _survey_shared(model, name, found)
            else:
                found.add(Refusal(name, f"{type(module).__name__}: {reason}"))
    return found


def reads_intermediate(weight: str) -> bool:
    """Whether a weight, by full name, is the second product of its expert: down_proj or w2."""
    parts = weight.split(".")
    return parts[-1 if parts[-1] != "weight" else -2] in {layout[-1] for layout in _MLP_LAYOUTS}


def _looks_like_experts(module: nn.Module) -> bool:
    """Weights of three dimensions by an expert's name, or in a class that says so."""
    stacked = [name for name, weight in module.named_parameters(recurse=False) if weight.dim() == 3]
    named = any(re.search(r"(gate|up|down)_(up_)?proj", name) for name in stacked)
    return bool(stacked) and (named or "expert" in type(module).__name__.lower())


def _why_not_fused(module: nn.Module) -> str | None:
    """None if this is the fused experts module of the common class, else why not."""
    missing = [
        flag for flag in ("has_gate", "has_bias", "is_transposed") if not hasattr(module, flag)
    ]
    if missing or not hasattr(module, "_apply_gate"):
        return "it is not declared with use_experts_implementation, so its weight layout is unknown"
    for flag, required in _REQUIRED_FLAGS.items():
        if getattr(module, flag, required) != required:
            return _REASON_OF_FLAG[flag]
    unknown = sorted(
        name
        for name, value in vars(module).items()
        if re.match(r"(has|is)_", name) and name not in _REQUIRED_FLAGS and value
    )
    if unknown:
        return f"it declares {unknown[0]}={getattr(module, unknown[0])!r}, which is not known here"
    return _why_wrong_weights(module)


def _why_wrong_weights(module: nn.Module) -> str | None:
    weights = dict(module.named_parameters())
    extra = sorted(set(weights) - set(_FUSED_WEIGHTS)) + [
        name for name, _ in module.named_buffers()
    ]
    if extra or set(weights) != set(_FUSED_WEIGHTS):
        return f"it holds {sorted(weights)} and not just gate_up_proj and down_proj"
    gate_up, down = (tuple(weights[name].shape) for name in _FUSED_WEIGHTS)
    if gate_up != (down[0], 2 * down[2], down[1]):
        return (
            f"gate_up_proj {list(gate_up)} and down_proj {list(down)} are not [E,2I,H] and [E,H,I]"
        )
    arguments = [
        name for name in inspect.signature(type(module).forward).parameters if name != "self"
    ]
    if len(arguments) != 3:
        return f"its forward takes {arguments} and not (hidden_states, top_k_index, top_k_weights)"
    return None


def _survey_shared(model: nn.Module, experts: str, found: Survey) -> None:
    """A shared expert is a sibling of the experts, called so, with a gated MLP of Linears."""
    block = experts.rpartition(".")[0]
    for child, module in model.get_submodule(block).named_children():
        # A Linear called so (shared_expert_gate) weighs the shared expert and is none.
        if "shared" not in child or isinstance(module, nn.Linear):
            continue
        path = f"{block}.{child}" if block else child
        names = _mlp_linears(module)
        if names is None:
            reason = f"{type(module).__name__}: a shared expert {_NO_GATED_MLP}"
            found.add(Refusal(path, reason, SHARED))
        for name in names or ():
            found.add(Site(f"{path}.{name}", SHARED, ("weight",), group=path))


def _survey_list(
    model: nn.Module, name: str, experts: nn.ModuleList | nn.ModuleDict, found: Survey
) -> None:
    """Experts in a list or dict; it is called experts, or its members are."""
    members = dict(experts.named_children())
    called_so = name.rpartition(".")[2] == "experts" or all(
        "expert" in type(member).__name__.lower() for member in members.values()
    )
    if not members or not called_so:
        return
    layouts = {key: _mlp_linears(member) for key, member in members.items()}
    if not all(layouts.values()):
        kind = type(next(iter(members.values()))).__name__
        found.add(Refusal(name, f"{kind}: a list of experts {_NO_GATED_MLP}"))
        return
    for key, names in layouts.items():
        for linear in names or ():
            found.add(Site(f"{name}.{key}.{linear}", LISTED, ("weight",), group=name))
    _survey_shared(model, name, found)


def _mlp_linears(module: nn.Module) -> tuple[str, ...] | None:
    """Names of the three Linears of a gated MLP, or None."""
    children = dict(module.named_children())
    for layout in _MLP_LAYOUTS:
        linears = [children.get(name) for name in layout]
        if all(type(linear) is nn.Linear and linear.bias is None for linear in linears):
            return layout
    return None
