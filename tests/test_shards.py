"""The streaming writer: the library's own files, whole or not at all."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import headers
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from samoyeds_hf import shards as module
from samoyeds_hf.errors import CheckpointError
from samoyeds_hf.shards import (
    ShardSpec,
    ShardWriter,
    TensorSpec,
    plan_shards,
    write_index,
    write_text,
)
from samoyeds_hf.stored import DTYPES, read_checkpoint, read_headers

FILE = "model.safetensors"


def random_tensors() -> dict[str, torch.Tensor]:
    """Every dtype a model may hold, with shapes that leave odd sizes behind."""
    rng = torch.Generator().manual_seed(0)
    return {
        "bytes": torch.randint(0, 255, (3, 5), generator=rng, dtype=torch.uint8),
        "half": torch.randn(3, 7, generator=rng).half(),
        "brain": torch.randn(5, 2, 3, generator=rng).bfloat16(),
        "single": torch.randn(9, generator=rng),
        "double": torch.randn(2, 2, generator=rng, dtype=torch.float64),
        "whole": torch.randint(-9, 9, (4,), generator=rng),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(1.5),
        "nothing": torch.zeros(0, 4),
        "special": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        'quoted "ümlaut" 雪': torch.ones(1, dtype=torch.int8),
    }


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Bits, not values: tells -0.0 from 0.0, and NaN equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def spec_of(tensors: dict[str, torch.Tensor], file: str = FILE) -> ShardSpec:
    return ShardSpec(
        file, tuple(TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items())
    )


def write(directory: Path, tensors: dict[str, torch.Tensor], file: str = FILE) -> None:
    with ShardWriter(directory, spec_of(tensors, file)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


# --- the file ---------------------------------------------------------------------------------


def test_same_content_as_the_library_writes(tmp_path: Path) -> None:
    tensors = random_tensors()
    write(tmp_path, tensors)
    library = tmp_path / "library"
    library.mkdir()
    save_file(tensors, library / FILE, metadata={"format": "pt"})
    ours, theirs = headers(tmp_path), headers(library)
    assert sorted(ours) == sorted(theirs) == sorted(tensors)
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape)
        assert tensor.data == theirs[name].data
    assert (tmp_path / FILE).stat().st_size == max(tensor.stop for tensor in ours.values())


def test_readable_by_the_library(tmp_path: Path) -> None:
    tensors = random_tensors()
    write(tmp_path, tensors)
    with safe_open(tmp_path / FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(tensors)
    for name, tensor in load_file(tmp_path / FILE).items():
        assert tensor.dtype == tensors[name].dtype
        assert tensor.shape == tensors[name].shape
        assert torch.equal(as_bytes(tensor), as_bytes(tensors[name]))


def test_every_tensor_is_aligned_and_nothing_overlaps(tmp_path: Path) -> None:
    write(tmp_path, random_tensors())
    found = sorted(headers(tmp_path).values(), key=lambda tensor: (tensor.start, tensor.stop))
    assert found[0].start % 8 == 0
    for tensor in found:
        assert tensor.start % DTYPES[tensor.dtype].itemsize == 0
    assert [t.start for t in found[1:]] == [t.stop for t in found[:-1]]  # no gap either


def test_rows_in_any_order(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5, 2, 3).bfloat16(), "b": torch.randn(5, 7)}
    with ShardWriter(tmp_path, spec_of(tensors)) as writer:
        for row in (3, 0, 4, 1, 2):
            writer.write("b", tensors["b"][row], row)
            writer.write("a", tensors["a"][row], row)
    for name, tensor in load_file(tmp_path / FILE).items():
        assert torch.equal(tensor, tensors[name])


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    expanded = torch.ones(1).expand(3)
    tensors = {"a": torch.randn(4, 6).t(), "b": torch.randn(8, 4)[::2], "c": expanded}
    write(tmp_path, tensors)
    for name, tensor in load_file(tmp_path / FILE).items():
        assert torch.equal(tensor, tensors[name])


def test_headers_are_read_back(tmp_path: Path) -> None:
    tensors = random_tensors()
    write(tmp_path, tensors)
    found = read_headers([tmp_path / FILE])
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()
    }
    assert torch.equal(found["brain"].load(), tensors["brain"])
    assert torch.equal(found["brain"].load_row(2), tensors["brain"][2:3])


def test_index(tmp_path: Path) -> None:
    one = {"b": torch.ones(2), "a": torch.ones(3)}
    two = {"c": torch.ones(4, dtype=torch.uint8)}
    specs = [spec_of(one, "model-1.safetensors"), spec_of(two, "model-2.safetensors")]
    write(tmp_path, one, "model-1.safetensors")
    write(tmp_path, two, "model-2.safetensors")
    write_index(tmp_path, specs)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 24
    assert list(index["weight_map"].items()) == [
        ("a", "model-1.safetensors"),
        ("b", "model-1.safetensors"),
        ("c", "model-2.safetensors"),
    ]
    assert set(read_checkpoint(tmp_path)) == {"a", "b", "c"}


def test_a_single_file_has_no_index(tmp_path: Path) -> None:
    write_index(tmp_path, [spec_of(random_tensors())])
    assert list(tmp_path.iterdir()) == []


# --- the plan ---------------------------------------------------------------------------------

sizes = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=12)


@given(sizes, st.integers(1, 30))
def test_plan(groups: list[list[int]], max_bytes: int) -> None:
    specs = [
        [TensorSpec(f"{g}.{t}", torch.uint8, (size,)) for t, size in enumerate(group)]
        for g, group in enumerate(groups)
    ]
    planned = plan_shards(specs, max_bytes)
    # Order is kept and nothing is lost.
    assert [t for shard in planned for t in shard.tensors] == [t for group in specs for t in group]
    home = {tensor.name: shard.file for shard in planned for tensor in shard.tensors}
    for group in specs:
        assert len({home[tensor.name] for tensor in group}) == 1
    for shard in planned:
        members = {tensor.name.split(".")[0] for tensor in shard.tensors}
        assert members
        assert shard.num_bytes <= max_bytes or len(members) == 1
    # No shard could have taken the first group of the next one.
    for shard, following in itertools.pairwise(planned):
        first = following.tensors[0].name.split(".")[0]
        added = sum(t.num_bytes for t in following.tensors if t.name.split(".")[0] == first)
        assert shard.num_bytes + added > max_bytes
    files = [shard.file for shard in planned]
    count = len(files)
    assert files == (
        [FILE]
        if count == 1
        else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    )


@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.integers(0, 5)), max_size=8))
def test_header_is_what_is_promised(entries: list[tuple[str, int]]) -> None:
    spec = ShardSpec(
        FILE, tuple(TensorSpec(f"t{i}", DTYPES[d], (n, 3)) for i, (d, n) in enumerate(entries))
    )
    head, offsets = spec.header()
    assert len(head) % 8 == 0
    assert int.from_bytes(head[:8], "little") == len(head) - 8
    content = json.loads(head[8:])
    for tensor in spec.tensors:
        start, stop = content[tensor.name]["data_offsets"]
        assert offsets[tensor.name] == len(head) + start
        assert stop - start == tensor.num_bytes
    del content["__metadata__"]
    assert max((v["data_offsets"][1] for v in content.values()), default=0) == spec.num_bytes


# --- whole or not at all ----------------------------------------------------------------------


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A directory with a finished shard, and an older file under the name that will be written."""
    write(tmp_path, {"old": torch.ones(7)}, "finished.safetensors")
    (tmp_path / FILE).write_bytes(b"as it was")
    return tmp_path


def assert_untouched(directory: Path) -> None:
    assert sorted(path.name for path in directory.iterdir()) == ["finished.safetensors", FILE]
    assert (directory / FILE).read_bytes() == b"as it was"
    assert torch.equal(load_file(directory / "finished.safetensors")["old"], torch.ones(7))


def test_an_error_inside_leaves_nothing(earlier: Path) -> None:
    def run() -> None:
        with ShardWriter(earlier, spec_of(random_tensors())) as writer:
            writer.write("single", random_tensors()["single"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert_untouched(earlier)


def test_the_name_appears_at_the_end(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, spec_of({"a": torch.ones(3)})) as writer:
        writer.write("a", torch.ones(3))
        assert [path.name for path in tmp_path.iterdir()] == [FILE + ".tmp"]
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_an_unfinished_tensor_is_refused(rows: int, earlier: Path) -> None:
    def run() -> None:
        with ShardWriter(earlier, spec_of({"a": torch.ones(3, 2), "b": torch.ones(1)})) as writer:
            writer.write("b", torch.ones(1))
            for row in range(rows):
                writer.write("a", torch.ones(2), row)

    with pytest.raises(CheckpointError, match=r"^a must be written whole"):
        run()
    assert_untouched(earlier)


@pytest.mark.parametrize(
    "tensor", [torch.ones(3, 3), torch.ones(2, 3).bfloat16(), torch.ones(6)], ids=str
)
def test_another_tensor_than_planned_is_refused(tensor: torch.Tensor, earlier: Path) -> None:
    def run() -> None:
        with ShardWriter(earlier, spec_of({"a": torch.ones(2, 3)})) as writer:
            writer.write("a", tensor)

    with pytest.raises(CheckpointError, match=r"^a was planned as torch.float32 "):
        run()
    assert_untouched(earlier)


def no_space(*args: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def after(calls: int, function: Callable[..., int]) -> Callable[..., int]:
    """``function`` for so many calls, then a full disk."""
    left = [calls]

    def limited(*args: int) -> int:
        left[0] -= 1
        return function(*args) if left[0] >= 0 else no_space()

    return limited


@pytest.mark.parametrize("calls", [0, 1, 4])
def test_disk_full_while_writing(
    calls: int, earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.os, "pwrite", after(calls, os.pwrite))
    with pytest.raises(CheckpointError, match="room for it, found No space left"):
        write(earlier, random_tensors())
    assert_untouched(earlier)


@pytest.mark.parametrize("function", ["posix_fallocate", "fsync", "replace", "open"])
def test_disk_full_before_or_after(
    function: str, earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        context.setattr(module.os, function, no_space, raising=False)
        with pytest.raises(CheckpointError, match=r"room for it, found No space left .*--resume"):
            write(earlier, random_tensors())
    assert_untouched(earlier)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel may write less than it was given."""
    whole = os.pwrite
    monkeypatch.setattr(module.os, "pwrite", lambda file, data, at: whole(file, data[:5], at))
    tensors = {"a": torch.randn(33), "b": torch.randn(4, 3).bfloat16()}
    write(tmp_path, tensors)
    for name, tensor in load_file(tmp_path / FILE).items():
        assert torch.equal(tensor, tensors[name])


def test_without_fallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.delattr(module.os, "posix_fallocate", raising=False)
    write(tmp_path, {"a": torch.ones(100)})
    assert torch.equal(load_file(tmp_path / FILE)["a"], torch.ones(100))


def test_text_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_text(path, "one")
    with monkeypatch.context() as context:
        context.setattr(module.os, "fsync", no_space)
        with pytest.raises(CheckpointError, match="No space left"):
            write_text(path, "two")
    assert path.read_text() == "one"
    write_text(path, "three")
    assert path.read_text() == "three"
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]


def test_a_real_limit_on_the_size_of_files(earlier: Path) -> None:
    """Not a stand-in for os functions: the kernel refuses, as it does where a quota is used up."""
    code = f"""
import resource, signal, torch
from pathlib import Path
from samoyeds_hf.errors import CheckpointError
from samoyeds_hf.shards import ShardSpec, ShardWriter, TensorSpec
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
spec = ShardSpec({FILE!r}, (TensorSpec("a", torch.float32, (100_000,)),))
try:
    with ShardWriter(Path({str(earlier)!r}), spec) as writer:
        writer.write("a", torch.ones(100_000))
except CheckpointError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "must be writable on a disk with room for it, found File too large" in run.stdout
    assert_untouched(earlier)


def test_a_real_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except OSError as error:
        pytest.skip(f"no mount: {error}")
    if mounted.returncode:
        pytest.skip(f"no right to mount a tmpfs: {mounted.stderr.strip()}")
    try:
        write(disk, {"old": torch.ones(7)}, "finished.safetensors")
        (disk / FILE).write_bytes(b"as it was")
        with pytest.raises(CheckpointError, match="No space left"):
            write(disk, {"a": torch.ones(100_000)})
        assert_untouched(disk)
        write(disk, {"a": torch.ones(1000)})  # there is room for this
        assert torch.equal(load_file(disk / FILE)["a"], torch.ones(1000))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
