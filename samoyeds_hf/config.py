"""What to make sparse and how: :class:`SamoyedsConfig`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import yaml
from transformers.utils.quantization_config import QuantizationConfigMixin

from samoyeds_hf.errors import ConfigError
from samoyeds_hf.format import FORMAT_VERSION
from samoyeds_hf.pattern import SparsityPattern
from samoyeds_hf.pruning.calibration import Calibration

QUANT_METHOD = "samoyeds"
MODULE_KINDS = ("experts", "shared_experts")
RECOVERIES = ("block", "distill")
DENSE = "dense"


# {regex: pattern or "dense"}, or the same as pairs
Overrides: TypeAlias = Mapping[str, str | SparsityPattern] | Iterable[Sequence[str]]


class SamoyedsConfig(QuantizationConfigMixin):
    """How a model is made sparse; the ``quantization_config`` of its ``config.json``. Read-only.

    Args:
        pattern: ``"N:M:V"`` or ``"2:4"``, or a :class:`SparsityPattern`.
        method: how weights are chosen, a name in :data:`samoyeds_hf.pruning.METHODS`.
        refine: least squares on the chosen weights after the method.
        asymmetric: prune each layer towards what the dense model makes of the same tokens, so that
            it makes up for errors of the layers before it, down also for those that attention and
            routing add to the residual stream; ``best`` always does.
        permute: reorder the neurons of each expert before it is pruned, to suit the pattern; the
            function of the dense model stays, the order of its weights does not.
        budget: the share of weights that ``--budget`` was asked to drop; what it chose is in
            ``overrides``.
        recover: training after pruning, with the mask held: ``"block"``, all of each layer against
            the dense one, ``"distill"``, the whole model against the dense one, or None.
        calibration: the text that methods other than magnitude learn from, or a mapping with the
            fields of :class:`~samoyeds_hf.pruning.calibration.Calibration`.
        modules: what becomes sparse, of ``"experts"`` and ``"shared_experts"``.
        overrides: ``{regex: pattern or "dense"}``. The first regex that matches the whole name of
            a projection (``model.layers.0.mlp.experts.down_proj``) or of its module
            (``model.layers.0.mlp.experts``) wins; ``"dense"`` only goes with whole modules. One
            that matches nothing is an error when the model is patched. ``config.json`` has them
            as a list of pairs.
        strict: refuse a model if any of its experts cannot run on the fast path. ``False`` runs
            ``ModuleList`` experts one Linear at a time and leaves what is unknown dense.
        format_version: version of the stored tensors, see :mod:`samoyeds_hf.format`.

    Raises:
        ConfigError: an unknown key or value, or a newer format version.
        PatternError: a pattern that does not exist.
    """

    pattern: SparsityPattern
    method: str
    refine: bool
    asymmetric: bool
    permute: bool
    budget: float | None
    recover: str | None
    calibration: Calibration | None
    modules: tuple[str, ...]
    overrides: Mapping[str, SparsityPattern | None]
    strict: bool
    format_version: int

    def __init__(
        self,
        pattern: str | SparsityPattern = "1:2:64",
        method: str = "magnitude",
        modules: Iterable[str] = ("experts",),
        overrides: Overrides | None = None,
        strict: bool = True,
        format_version: int = FORMAT_VERSION,
        refine: bool = False,
        asymmetric: bool = False,
        permute: bool = False,
        budget: float | None = None,
        recover: str | None = None,
        calibration: Calibration | Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        method_in_json = unknown.pop("quant_method", QUANT_METHOD)
        if method_in_json != QUANT_METHOD:
            raise ConfigError(
                f"quant_method must be {QUANT_METHOD!r}, found {method_in_json!r}; this is the "
                "configuration of another quantisation."
            )
        if unknown:
            raise ConfigError(_unknown_keys_message(unknown))
        _check_version(format_version)
        self.__dict__.update(
            quant_method=QUANT_METHOD,
            pattern=SparsityPattern.parse(pattern),
            method=_check_method(method),
            refine=_check_bool("refine", refine),
            asymmetric=_check_bool("asymmetric", asymmetric),
            permute=_check_bool("permute", permute),
            budget=_check_budget(budget),
            recover=_check_recover(recover),
            calibration=_check_calibration(calibration),
            modules=_check_modules(modules),
            overrides=MappingProxyType(_parse_overrides(overrides or {})),
            strict=_check_bool("strict", strict),
            format_version=format_version,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"SamoyedsConfig is read-only: make a new one to change {name!r}.")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SamoyedsConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.to_json_string())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_dict, (self.to_dict(),)  # a MappingProxyType cannot be pickled

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The configuration in a ``config.json``; unknown keys raise ConfigError."""
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def from_recipe(cls, path: str | Path) -> SamoyedsConfig:
        """Read a YAML recipe: a mapping with this class's arguments as keys.

        Raises:
            ConfigError: no such file, no mapping, an unknown key or a bad value.
        """
        try:
            content = yaml.load(Path(path).read_text(encoding="utf-8"), _RecipeLoader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(
                f"A recipe must be a readable YAML file, found {path} ({error}); "
                "see configs/recipes/ for examples."
            ) from error
        if not isinstance(content, dict):
            raise ConfigError(
                f"A recipe must be a mapping such as 'pattern: 1:2:64', found "
                f"{type(content).__name__} in {path}; see configs/recipes/ for examples."
            )
        return cls(**{str(key): value for key, value in content.items()})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: what ``config.json`` holds. Overrides become pairs, to keep their order."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "pattern": str(self.pattern),
            "method": self.method,
            "refine": self.refine,
            "asymmetric": self.asymmetric,
            "permute": self.permute,
            "budget": self.budget,
            "recover": self.recover,
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "modules": list(self.modules),
            # NOTE: transformers sorts the keys of config.json, and the first match wins.
            "overrides": [
                [regex, DENSE if pattern is None else str(pattern)]
                for regex, pattern in self.overrides.items()
            ],
            "strict": self.strict,
        }

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def replace(self, **changes: Any) -> SamoyedsConfig:
        """A copy with other values; overrides and calibration are given as to the class."""
        return SamoyedsConfig(**{**self.to_dict(), **changes})

    def provenance(self) -> dict[str, Any]:
        """How weights were chosen, as a report says it; data without this machine's paths."""
        data = None if self.calibration is None else self.calibration.without_path().to_dict()
        return {
            "method": self.method,
            "refine": self.refine,
            "asymmetric": self.asymmetric,
            "permute": self.permute,
            "recover": self.recover,
            "calibration": data,
        }

    @property
    def trains_beside(self) -> str | None:
        """What ``recover`` trains beside the pruned weights while they are pruned, for a report.

        "layers": all weights of layers with pruned ones.
        """
        return "layers" if self.recover == "block" else None

    @property
    def is_calibrated(self) -> bool:
        """Whether weights are chosen, or changed, layer by layer by what data shows."""
        from samoyeds_hf.pruning import METHODS

        is_trained = self.recover == "block"
        sees_data = METHODS[self.method].needs_calibration
        return sees_data or self.refine or self.asymmetric or self.permute or is_trained

    def overrides_for(self, *names: str) -> list[str]:
        """The overrides whose regex matches all of one of the names; the first one wins."""
        return [
            regex for regex in self.overrides if any(re.fullmatch(regex, name) for name in names)
        ]


class _RecipeLoader(yaml.SafeLoader):
    """YAML without base 60, in which an unquoted 1:2:32 would be the number 3752."""


_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if not tag.endswith((":int", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789")
)


def _unknown_keys_message(unknown: Mapping[str, Any]) -> str:
    known = ["pattern", "method", "refine", "asymmetric", "permute", "budget", "recover"]
    known += ["calibration", "modules", "overrides", "strict", "format_version"]
    hints = [
        f"{key!r} (did you mean {close[0]!r}?)" if close else repr(key)
        for key in sorted(unknown)
        for close in [difflib.get_close_matches(key, known, n=1)]
    ]
    return f"A Samoyeds configuration knows the keys {known}, found {', '.join(hints)}; remove it."


def _check_version(version: Any) -> None:
    if type(version) is not int or version < 1:
        raise ConfigError(f"format_version must be a positive integer, found {version!r}.")
    if version > FORMAT_VERSION:
        raise ConfigError(
            f"This package reads format version {FORMAT_VERSION} and older, found version "
            f"{version}; upgrade samoyeds-hf."
        )


def _check_method(method: Any) -> str:
    from samoyeds_hf.pruning import METHODS

    if not isinstance(method, str) or method not in METHODS:
        raise ConfigError(f"method must be one of {sorted(METHODS)}, found {method!r}.")
    return str(method)


def _check_budget(budget: Any) -> float | None:
    if budget is None:
        return None
    from samoyeds_hf.pruning.budget import check_budget

    check_budget(budget)
    return float(budget)


def _check_recover(recover: Any) -> str | None:
    if recover is not None and recover not in RECOVERIES:
        raise ConfigError(f"recover must be one of {list(RECOVERIES)} or null, found {recover!r}.")
    return None if recover is None else str(recover)


def _check_calibration(calibration: Any) -> Calibration | None:
    if calibration is None or isinstance(calibration, Calibration):
        return calibration
    return Calibration.from_dict(calibration)


def _check_modules(modules: Any) -> tuple[str, ...]:
    found = [modules] if isinstance(modules, str) else modules
    is_list = isinstance(found, Iterable) and not isinstance(found, Mapping)
    found = list(found) if is_list else []
    if not found or any(kind not in MODULE_KINDS for kind in found):
        raise ConfigError(f"modules must be some of {list(MODULE_KINDS)}, found {modules!r}.")
    return tuple(kind for kind in MODULE_KINDS if kind in found)


def _check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, found {value!r}.")
    return value


def _parse_overrides(overrides: Any) -> dict[str, SparsityPattern | None]:
    pairs = list(overrides.items()) if isinstance(overrides, Mapping) else overrides
    is_list = isinstance(pairs, list | tuple)
    if not is_list or any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in pairs):
        raise ConfigError(f"overrides must map regex to pattern or {DENSE!r}, found {overrides!r}.")
    parsed: dict[str, SparsityPattern | None] = {}
    for regex, value in pairs:
        if not isinstance(regex, str):
            raise ConfigError(f"An override's key must be a regular expression, found {regex!r}.")
        if regex in parsed:
            raise ConfigError(f"An override must be given once, found {regex!r} twice; remove one.")
        try:
            re.compile(regex)
        except re.error as error:
            raise ConfigError(
                f"An override's key must be a regular expression, found {regex!r} ({error})."
            ) from error
        parsed[regex] = None if value in (DENSE, None) else SparsityPattern.parse(value)
    return parsed
