"""Settings and fixtures that tests share."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from command import Done, Run
from cuda_helpers import random_seed
from hypothesis import settings
from tiny_models import PATTERN, Family, masked_twin

import samoyeds_hf
from samoyeds_hf import cli

# Examples are fixed, so that a failure can be made again; times vary on a shared machine.
settings.register_profile("samoyeds", derandomize=True, deadline=None, database=None)
settings.load_profile("samoyeds")

# Tests use tiny tensors and run side by side: more threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture
def seed() -> int:
    """Of a GPU test's random numbers."""
    return random_seed()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``main()`` in this process, as the installed command calls it."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr("sys.argv", ["samoyeds", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert isinstance(stop.value.code, int)
        return Done(stop.value.code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], SimpleNamespace]:
    """A family's dense and sparse model in memory and on disk; made once."""
    made: dict[str, SimpleNamespace] = {}

    def get(family: Family) -> SimpleNamespace:
        if family.name not in made:
            folder = tmp_path_factory.mktemp(family.name)
            dense, sparse = family.make(), family.make()
            dense.save_pretrained(folder / "dense")
            samoyeds_hf.patch_model(sparse, PATTERN)
            sparse.save_pretrained(folder / "sparse")
            made[family.name] = SimpleNamespace(
                dense=dense,
                sparse=sparse,
                twin=masked_twin(dense, sparse),
                dense_dir=folder / "dense",
                sparse_dir=folder / "sparse",
            )
        return made[family.name]

    return get
