"""Registration without an import.

transformers has no plug-in mechanism, torch has one: the entry point group ``torch.backends`` runs
at ``import torch``. There :func:`autoload` arms a hook on the import of four modules of
transformers, and nothing else happens until one of them is loaded. So ``from_pretrained`` and
programs like ``lm_eval`` open a sparse checkpoint with the package installed and nothing imported.

``SAMOYEDS_HF_AUTOLOAD=0`` turns it off; ``import samoyeds_hf`` still registers.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

OPT_OUT = "SAMOYEDS_HF_AUTOLOAD"

# Module of transformers -> what to call once it is loaded.
_HOOKS = {
    "transformers.quantizers.auto": ("samoyeds_hf.hf", "register"),
    "transformers.models.auto.configuration_auto": ("samoyeds_hf.hosts", "register_configs"),
    "transformers.models.auto.modeling_auto": ("samoyeds_hf.hosts", "register_models"),
    "transformers.models.auto.tokenization_auto": ("samoyeds_hf.hosts", "register_tokenizers"),
}


def autoload() -> None:
    """The entry point that torch calls; honours the opt-out variable."""
    if os.environ.get(OPT_OUT, "1") != "0":
        arm()
    elif not _is_armed():
        # As if torch had not imported us: an import of the user's own is to run __init__ and arm.
        for name in (__name__, __package__):
            sys.modules.pop(name, None)


def is_torch_importing() -> bool:
    """Whether ``import torch`` is under way: then it is torch that imports this package."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def arm() -> None:
    """Register now with what is loaded of transformers, and later with what comes. Idempotent."""
    if not _is_armed():
        sys.meta_path.insert(0, _AfterImport())
    for name in _HOOKS:
        # A module that is still running may be the one that imports torch, which called us.
        if name in sys.modules and not _is_postponed(name):
            _call(name)


def _is_armed() -> bool:
    return any(isinstance(finder, _AfterImport) for finder in sys.meta_path)


def _call(name: str) -> None:
    home, function = _HOOKS[name]
    if not _is_postponed(home):
        getattr(importlib.import_module(home), function)()


def _call_or_warn(name: str) -> None:
    try:
        _call(name)
    except Exception as error:
        # NOTE: raising here would break transformers for programs that never use this package.
        warnings.warn(
            f"samoyeds_hf could not register with transformers, so sparse checkpoints will not "
            f"load: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )


def _is_postponed(name: str) -> bool:
    """Whether a module is being executed right now; if so, all is done when that is over."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if not getattr(spec, "_initializing", False):
        return False
    if type(spec) is ModuleSpec:
        spec.__class__ = _RunningSpec
    return True


class _AfterImport(MetaPathFinder):
    """Wraps the loader of the hooked modules, and finds nothing itself."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """The real spec with a loader that calls us back; None for every other module."""
        if fullname not in _HOOKS:
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None and spec.loader is not None:
                    spec.loader = _CallingLoader(spec.loader, fullname)
                    return spec
        return None


class _RunningSpec(ModuleSpec):
    """The spec of a module that is being executed; importlib tells it when that is over."""

    @property
    def _initializing(self) -> bool:
        return True

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__class__ = ModuleSpec  # type: ignore[assignment]
        vars(self)["_initializing"] = value
        if self.name in sys.modules:  # else it failed
            for name in _HOOKS:
                if name in sys.modules and not _is_postponed(name):
                    _call_or_warn(name)


class _CallingLoader(Loader):
    def __init__(self, loader: Loader, name: str) -> None:
        self.loader = loader
        self.name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _call_or_warn(self.name)

    def __getattr__(self, name: str) -> object:
        # Tools ask a loader for its source, file name or resources.
        return getattr(self.loader, name)
