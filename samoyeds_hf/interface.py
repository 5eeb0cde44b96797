"""The C interface of the kernel library through ctypes: a mirror of kernels/include/samoyeds/api.h.

tests/test_library.py compares the two.
"""

from __future__ import annotations

import ctypes
import struct
from ctypes import POINTER, Structure, c_char_p, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

from samoyeds_hf.errors import KernelError

ABI_VERSION = 2


class Weight(Structure):
    """SamoyedsWeight: a dense weight ``[num_experts, rows, cols]`` in fragment order."""

    _fields_ = (
        ("packed", c_void_p),
        ("num_bytes", c_int64),
        ("num_experts", c_int64),
        ("rows", c_int64),
        ("cols", c_int64),
        ("n", c_int64),
        ("m", c_int64),
        ("v", c_int64),
        ("dtype", c_int64),
        ("is_gate_up", c_int64),
    )


class Routing(Structure):
    """SamoyedsRouting: which experts each token chose, and their weights."""

    _fields_ = (
        ("top_k_index", c_void_p),
        ("top_k_weights", c_void_p),
        ("weights_dtype", c_int64),
        ("num_tokens", c_int64),
        ("top_k", c_int64),
    )


class Plan(Structure):
    """SamoyedsPlan: how one product runs."""

    _fields_ = (
        ("m_frags", c_int64),
        ("n_frags", c_int64),
        ("warps_m", c_int64),
        ("warps_n", c_int64),
        ("warps_k", c_int64),
        ("stages", c_int64),
        ("blocks_per_sm", c_int64),
        ("splits", c_int64),
        ("cluster", c_int64),
    )


class Launch(Structure):
    """SamoyedsLaunch: device, stream, workspace and, for tests and benchmarks, plans."""

    _fields_ = (
        ("device", c_int64),
        ("stream", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_int64),
        ("plan", POINTER(Plan)),
        ("down_plan", POINTER(Plan)),
    )


_LAUNCH, _WEIGHT, _ROUTING = POINTER(Launch), POINTER(Weight), POINTER(Routing)
SIGNATURES: dict[str, tuple[Any, ...]] = {  # result, then arguments
    "samoyeds_abi_version": (c_int,),
    "samoyeds_last_error": (c_char_p,),
    "samoyeds_build_info": (c_char_p,),
    "samoyeds_layout": (c_char_p,),
    "samoyeds_heuristics": (c_char_p,),
    "samoyeds_prepare": (c_int, c_int64),
    "samoyeds_packed_bytes": (c_int64, _WEIGHT),
    "samoyeds_pack": (c_int, _LAUNCH, _WEIGHT, c_void_p, c_void_p, c_void_p),
    "samoyeds_unpack": (c_int, _LAUNCH, _WEIGHT, c_void_p, c_void_p, c_void_p),
    "samoyeds_choose_plan": (c_int, c_int64, _WEIGHT, c_int64, c_int64, c_int64, POINTER(Plan)),
    "samoyeds_workspace_bytes": (c_int64, _LAUNCH, _ROUTING, _WEIGHT, _WEIGHT),
    "samoyeds_moe_mlp": (c_int, _LAUNCH, _ROUTING, _WEIGHT, _WEIGHT, c_void_p, c_void_p),
    "samoyeds_moe_up": (c_int, _LAUNCH, _ROUTING, _WEIGHT, c_void_p, c_void_p),
    "samoyeds_moe_down": (c_int, _LAUNCH, _ROUTING, _WEIGHT, c_void_p, c_void_p),
    "samoyeds_linear_workspace_bytes": (c_int64, _LAUNCH, _WEIGHT, c_int64),
    "samoyeds_linear": (c_int, _LAUNCH, _WEIGHT, c_void_p, c_int64, c_void_p),
    "samoyeds_max_tiles": (c_int64, _ROUTING, c_int64, c_int64),
    "samoyeds_route": (c_int, _LAUNCH, _ROUTING, c_int64, c_int64, c_void_p, c_void_p, c_void_p),
}


class KernelLibrary:
    """A loaded libsamoyeds whose interface is the one this module knows.

    Attributes:
        path: of the file.
        handle: the functions of api.h, with their types.
        layout: name and version of the fragment order.
        build_info: architectures and CUDA version.

    Raises:
        KernelError: no such file, damaged, or of another version.
    """

    def __init__(self, path: Path) -> None:
        _check_whole(path)
        try:
            self.handle = ctypes.CDLL(str(path))
            version = self.handle.samoyeds_abi_version()
            if version == ABI_VERSION:
                for name, (result, *arguments) in SIGNATURES.items():
                    function = getattr(self.handle, name)
                    function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:  # AttributeError: a function is missing
            raise KernelError(
                f"A kernel library must load and have every function, found one that does not "
                f"({error}); remove {path} and run `samoyeds env --build`."
            ) from error
        if version != ABI_VERSION:
            raise KernelError(
                f"This samoyeds-hf calls interface version {ABI_VERSION} of the kernel library, "
                f"found version {version} at {path}; remove it and run `samoyeds env --build`."
            )
        self.path = path
        self.layout: str = self.handle.samoyeds_layout().decode()
        self.build_info: str = self.handle.samoyeds_build_info().decode()

    @property
    def heuristics(self) -> str:
        """The rules that choose between kernels, each with its measurement, as a table."""
        text: str = self.handle.samoyeds_heuristics().decode()
        return text

    def check(self, status: int) -> None:
        """Turn a status other than SAMOYEDS_OK into an error.

        Raises:
            KernelError: with the library's own text of what it required and found.
        """
        if status != 0:
            raise KernelError(self.handle.samoyeds_last_error().decode(errors="replace"))


def _check_whole(path: Path) -> None:
    """Refuse a file that ends early: the loader would map it, and the process die of SIGBUS."""
    try:
        with path.open("rb") as file:
            head, size = file.read(64), path.stat().st_size
    except OSError as error:
        raise KernelError(
            f"A kernel library must be a file that can be read, found {error}; correct the path "
            "in SAMOYEDS_HF_LIBRARY."
        ) from error
    if len(head) == 64 and head[:4] == b"\x7fELF":
        (sections,) = struct.unpack_from("<Q", head, 0x28)  # the linker writes that table last
        entry_size, entries = struct.unpack_from("<HH", head, 0x3A)
        if size >= sections + entry_size * entries:
            return
    raise KernelError(
        f"A kernel library must be a whole ELF file, found a damaged one of {size} bytes; remove "
        f"{path} and run `samoyeds env --build`."
    )
