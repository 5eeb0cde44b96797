"""The kernel library of this machine: compiled once, kept in a cache.

The library of one state of the sources, one CUDA and one set of architectures has a folder::

    <cache>/kernels/<hash of the sources>/cuda13.0-x86_64-90a/
        libsamoyeds.so   appears complete, by a rename
        lock             held by the process that builds; the others wait for it
        build-*/         of a build that runs, or was killed: the next one removes it
        failed.log       of a build that failed: not tried again without being asked

``<cache>`` is SAMOYEDS_HF_CACHE, else ``samoyeds_hf`` below XDG_CACHE_HOME or ``~/.cache``.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from samoyeds_hf.errors import BuildError
from samoyeds_hf.resources import kernels_dir
from samoyeds_hf.toolchain import LIBRARY_NAME, Toolchain, compile_library, last_lines

CACHE_VARIABLE = "SAMOYEDS_HF_CACHE"
FAILED_LOG = "failed.log"
_ALL = "all"  # the architectures that a wheel ships


def cache_dir() -> Path:
    """The folder of all that this package keeps on the machine."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "samoyeds_hf")


def find_built(architectures: Sequence[str], toolchain: Toolchain | None) -> Path | None:
    """A library in the cache that holds these architectures (none: whichever there is).

    With a toolchain one that its CUDA built; without one of any CUDA, the newest first.
    """
    found = []
    cuda = toolchain.cuda if toolchain else "*"
    folders = f"cuda{cuda}-{platform.machine()}-*"
    for path in _folder_of_sources().glob(f"{folders}/{LIBRARY_NAME}"):
        version, _, label = path.parent.name.removeprefix("cuda").split("-", 2)
        if label == _ALL or set(architectures) <= set(label.split("+")):
            found.append(([int(part) for part in version.split(".")], label == _ALL, path))
    return max(found)[-1] if found else None


def build(
    toolchain: Toolchain,
    architectures: Sequence[str],
    is_good: Callable[[Path], bool],
    retry: bool = False,
) -> Path:
    """The library in the cache, built now unless it is there; one process at a time builds it.

    Args:
        toolchain: of ``find_toolchain``.
        architectures: names of ``toolchain.ARCHITECTURES``; empty: all that a wheel ships.
        is_good: whether a library that is there can be used; it is built again otherwise.
        retry: also where a build has failed before.

    Raises:
        BuildError: a compiler failed, now or earlier (the message names the log), or the cache
            cannot be written.
    """
    folder = _folder_of(toolchain, architectures)
    library = folder / LIBRARY_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if library.is_file() and is_good(library):
                return library
            if not retry:
                check_not_failed(toolchain, architectures)
            _build_in(folder, toolchain, architectures)
    except OSError as error:
        raise BuildError(
            f"The CUDA kernels are built in a cache that can be written, found {error}; name "
            f"another folder by {CACHE_VARIABLE}."
        ) from error
    return library


def check_not_failed(toolchain: Toolchain, architectures: Sequence[str]) -> None:
    """Raise BuildError where an earlier build failed, which would only fail again."""
    log = _folder_of(toolchain, architectures) / FAILED_LOG
    if log.is_file():
        raise BuildError(
            f"The CUDA kernels could not be built when it was tried before (log: {log}); correct "
            "what it says and run `samoyeds env --build`."
        )


def _build_in(folder: Path, toolchain: Toolchain, architectures: Sequence[str]) -> None:
    for left_over in folder.glob("build-*"):  # of a build that was killed: we hold the lock
        shutil.rmtree(left_over, ignore_errors=True)
    start = time.monotonic()
    _say(
        f"building the CUDA kernels for {', '.join(architectures) or 'all architectures'} with "
        f"CUDA {toolchain.cuda}, once for this machine; this takes one to five minutes ..."
    )
    work = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    try:
        made = compile_library(
            toolchain, kernels_dir(), architectures, work, log=work / "build.log"
        )
        _sync(made)
        made.replace(folder / LIBRARY_NAME)
        _sync(folder)
        (folder / FAILED_LOG).unlink(missing_ok=True)
    except BuildError as error:
        kept = (work / "build.log").replace(folder / FAILED_LOG)
        raise BuildError(
            f"{error} (log: {kept}); correct what it says and run `samoyeds env --build`. "
            f"It ends:\n{last_lines(kept)}"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _say(f"kernels built in {time.monotonic() - start:.0f} s: {folder / LIBRARY_NAME}")


def _folder_of(toolchain: Toolchain, architectures: Sequence[str]) -> Path:
    label = "+".join(architectures) or _ALL
    return _folder_of_sources() / f"cuda{toolchain.cuda}-{platform.machine()}-{label}"


def _folder_of_sources() -> Path:
    """The folder of all libraries made of these sources."""
    sources = kernels_dir()
    files = [sources / "CMakeLists.txt", sources / "exports.map"]
    files += [path for part in ("include", "src") for path in (sources / part).rglob("*")]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(sources)} {len(content)}\n".encode() + content)
    return cache_dir() / "kernels" / digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # POSIX only, as the build is

    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process is building the CUDA kernels; waiting for it ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _say(text: str) -> None:
    print(f"samoyeds_hf: {text}", file=sys.stderr, flush=True)
