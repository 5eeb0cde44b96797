"""Settings shared by all tests."""

import pytest
import torch
from command import Done, Run
from hypothesis import settings

from samoyeds_hf import cli

# Examples are fixed, so that a failure can be made again; times vary on a shared machine.
settings.register_profile("samoyeds", derandomize=True, deadline=None, database=None)
settings.load_profile("samoyeds")

# Tests use tiny tensors and run side by side: more threads would only wait for each other.
torch.set_num_threads(1)


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
