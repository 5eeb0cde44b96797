"""What is installed, and which path the experts would take here."""

from __future__ import annotations

import logging
import os
import platform
import sys
import threading
from importlib import metadata

import samoyeds_hf
from samoyeds_hf import library
from samoyeds_hf.errors import KernelError
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
_KERNELS = "CUDA kernels (bf16, fp16); plain torch for fp32 and on the CPU"
_PLAIN_TORCH = "plain torch, one expert at a time: right on every device, slower than dense"

_not_announced = threading.Lock()


def execution_path() -> str:
    """Which implementation of ``torch.ops.samoyeds`` runs here, and why not the kernels.

    Builds nothing: kernels that the first use would build are not there yet.
    """
    decision = library.decide(may_build=False)
    if decision.library is not None:
        return _KERNELS
    return f"{_PLAIN_TORCH} ({_first_line(decision.reason)})"


def announce_path() -> None:
    """Say once a process which path runs, when a sparse model has been made or loaded.

    This is a first use: kernels that can be built are built now.
    """
    library.decide()
    if _not_announced.acquire(blocking=False):  # and never released
        message = "samoyeds_hf: experts run in %s."
        logging.getLogger("samoyeds_hf").warning(message, execution_path())


def describe() -> str:
    """The table of ``samoyeds env``."""
    rows = [
        ("samoyeds-hf", samoyeds_hf.__version__),
        ("format version", str(_format_version())),
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("platform", platform.platform()),
        *((name, _version(name)) for name in _PACKAGES),
        ("GPU", _gpu()),
        ("kernel library", _kernel_library()),
        ("experts run in", _execution_path_or_error()),
        ("autoload", _autoload()),
    ]
    return format_table(("", "found"), [(name, value) for name, value in rows], right=False)


def heuristics() -> str:
    """The rules that choose between kernels, as a table.

    Raises:
        KernelError: there is no kernel library here.
    """
    found = library.load(without_gpu=True)
    if found is None:
        raise KernelError(
            "The table of heuristics is the kernel library's, found none here; "
            "`samoyeds env --build` makes one."
        )
    return found.heuristics


def _execution_path_or_error() -> str:
    """The table is what a user looks at when a library cannot be used: it must not end in that."""
    try:
        return execution_path()
    except KernelError as error:
        return f"nothing: {_first_line(str(error))}"


def _kernel_library() -> str:
    try:
        # Of several in the cache, the one that this process would use.
        found = library.decide(may_build=False).library or library.load(without_gpu=True)
    except KernelError as error:
        return f"none: {_first_line(str(error))}"
    if found is None:
        return f"none: {_first_line(library.decide(may_build=False).reason)}"
    return f"{found.path} ({found.build_info}; layout {found.layout})"


def _first_line(text: str | None) -> str:
    """Of a reason, as part of a sentence; the rest is the end of a compiler's log."""
    return (text or "").partition("\n")[0].rstrip(".")


def _format_version() -> int:
    from samoyeds_hf.format import FORMAT_VERSION

    return FORMAT_VERSION


def _version(name: str) -> str:
    if name == "torch":
        import torch

        return str(torch.__version__)  # says which build it is, as the wheel's metadata does not
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
