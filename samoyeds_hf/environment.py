"""What is installed, and which path the experts would take here."""

from __future__ import annotations

import logging
import os
import platform
import sys
from functools import lru_cache
from importlib import metadata

import samoyeds_hf
from samoyeds_hf.report import format_table

_PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "accelerate",
    "tokenizers",
    "lm_eval",
)
_PLAIN_TORCH = "plain torch, one expert at a time: right on every device, slower than dense"


def execution_path() -> str:
    """Which implementation of ``torch.ops.samoyeds`` runs here; this release has but one."""
    return _PLAIN_TORCH


@lru_cache(maxsize=1)
def announce_path() -> None:
    """Say once a process which path runs, when a sparse model has been made or loaded."""
    logging.getLogger("samoyeds_hf").warning("samoyeds_hf: experts run in %s.", execution_path())


def describe() -> str:
    """The table of ``samoyeds env``."""
    rows = [
        ("samoyeds-hf", samoyeds_hf.__version__),
        ("format version", str(_format_version())),
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("platform", platform.platform()),
        *((name, _version(name)) for name in _PACKAGES),
        ("GPU", _gpu()),
        ("kernel library", "none: this release has no compiled kernels"),
        ("experts run in", execution_path()),
        ("autoload", _autoload()),
    ]
    return format_table(("", "found"), [(name, value) for name, value in rows], right=False)


def _format_version() -> int:
    from samoyeds_hf.format import FORMAT_VERSION

    return FORMAT_VERSION


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    found = []
    for device in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(device)
        found.append(
            f"{properties.name} (sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 1e9:.0f} GB)"
        )
    return ", ".join(found)


def _autoload() -> str:
    from samoyeds_hf.autoload import OPT_OUT

    installed = any(
        entry.name == "samoyeds_hf" for entry in metadata.entry_points(group="torch.backends")
    )
    if not installed:
        return "off: samoyeds-hf is not installed here, so it must be imported"
    if os.environ.get(OPT_OUT, "1") == "0":
        return f"off by {OPT_OUT}=0"
    return f"on ({OPT_OUT}=0 turns it off)"
