"""Where a source is: a local directory, or a repository of the Hub, read no further than needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from samoyeds_hf.errors import CheckpointError
from samoyeds_hf.stored import StoredTensor, checkpoint_files, torch_dtype

_FOR_A_PLAN = ["config.json", "*.index.json"]
_NOT_NEEDED = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.py"]
_NOT_NEEDED += ["original/*", "consolidated*"]  # the same weights once more


def resolve_source(source: str | Path) -> Path:
    """A local directory as it is; a repository of the Hub is downloaded into the cache.

    Raises:
        CheckpointError: neither.
    """
    if Path(source).exists():
        return Path(source)
    from huggingface_hub import snapshot_download

    name = _repository(source)
    with _hub_errors(name):
        return Path(snapshot_download(name, ignore_patterns=_NOT_NEEDED))


def open_source(source: str | Path) -> tuple[Path, dict[str, StoredTensor] | None]:
    """A source for a plan: of a repository, the configuration and the headers of the weights.

    Returns:
        The directory, and the tensors by name where the weights are not in it.

    Raises:
        CheckpointError: neither a directory nor a reachable repository with safetensors.
    """
    if Path(source).exists():
        return Path(source), None
    from huggingface_hub import get_safetensors_metadata, snapshot_download

    name = _repository(source)
    with _hub_errors(name):
        directory = Path(snapshot_download(name, allow_patterns=_FOR_A_PLAN))
    try:
        checkpoint_files(directory)
        return directory, None  # an earlier download
    except CheckpointError:
        pass
    with _hub_errors(name):
        # The name of a snapshot is its commit: both calls see the same files.
        files = get_safetensors_metadata(name, revision=directory.name).files_metadata
    return directory, {
        tensor: StoredTensor(
            tensor,
            directory / file,
            torch_dtype(tensor, info.dtype, directory / file),
            tuple(info.shape),
        )
        for file, content in files.items()
        for tensor, info in content.tensors.items()
    }


def _repository(source: str | Path) -> str:
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"The source must be a model directory or a Hub id such as 'org/name', found no "
            f"{name!r}; check the path."
        )
    return name


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a sentence."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        NotASafetensorsRepoError,
        SafetensorsParsingError,
    )

    # The base class of every network error, of httpx or httpx2 as huggingface_hub has it.
    network_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        yield
    except NotASafetensorsRepoError as error:
        raise CheckpointError(
            f"{name!r} must hold safetensors under the names that save_pretrained gives, found "
            "none; load it and save it with save_pretrained first."
        ) from error
    except (network_error, HFValidationError, SafetensorsParsingError, OSError) as error:
        first = next(iter(str(error).splitlines()), "").rstrip(".")
        raise CheckpointError(
            f"{name!r} must be a directory or a reachable repository of the Hub, found neither "
            f"({type(error).__name__}: {first}); check the name, the network, and 'hf auth login' "
            "for a repository that is not public."
        ) from error
