"""Samoyeds-HF: dual-side structured sparsity for the Mixture-of-Experts models of Transformers.

Importing the package is cheap: it loads neither torch nor transformers, touches no GPU and prints
nothing. It only arms the registration (:mod:`samoyeds_hf.autoload`), so that ``from_pretrained``
knows the quantisation method ``samoyeds`` as soon as transformers is there.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from samoyeds_hf import autoload

if TYPE_CHECKING:
    from samoyeds_hf.config import SamoyedsConfig as SamoyedsConfig
    from samoyeds_hf.errors import SamoyedsError as SamoyedsError
    from samoyeds_hf.experts import SamoyedsExperts as SamoyedsExperts
    from samoyeds_hf.experts import SamoyedsLinear as SamoyedsLinear
    from samoyeds_hf.format import decode as decode
    from samoyeds_hf.format import encode as encode
    from samoyeds_hf.format import validate as validate
    from samoyeds_hf.patch import patch_model as patch_model
    from samoyeds_hf.patch import unpatch_model as unpatch_model
    from samoyeds_hf.pattern import SparsityPattern as SparsityPattern
    from samoyeds_hf.report import PatchReport as PatchReport

__version__ = "0.1.0"

_HOME_OF = {
    "SparsityPattern": "pattern",
    "SamoyedsConfig": "config",
    "SamoyedsError": "errors",
    "SamoyedsExperts": "experts",
    "SamoyedsLinear": "experts",
    "encode": "format",
    "decode": "format",
    "validate": "format",
    "patch_model": "patch",
    "unpatch_model": "patch",
    "PatchReport": "report",
}

__all__ = [
    "PatchReport",
    "SamoyedsConfig",
    "SamoyedsError",
    "SamoyedsExperts",
    "SamoyedsLinear",
    "SparsityPattern",
    "__version__",
    "decode",
    "encode",
    "patch_model",
    "unpatch_model",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'samoyeds_hf' has no attribute {name!r}")
    return getattr(import_module(f"samoyeds_hf.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__


if not autoload.is_torch_importing():  # else the entry point decides, which may be turned off
    autoload.arm()
