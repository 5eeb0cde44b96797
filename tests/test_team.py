"""Several processes that prune one model give what one alone gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import files_in, save_dense
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import BY_NAME, PATTERN, tokens

from samoyeds_hf import SamoyedsConfig
from samoyeds_hf.convert import convert_checkpoint
from samoyeds_hf.pruning.calibration import CalibrationData
from samoyeds_hf.pruning.team import Team

# The models here have no tokenizer: tokens come from the test.
WORKER = """\
import sys
import torch.distributed as dist
from samoyeds_hf import SamoyedsConfig, convert_layers
from samoyeds_hf.convert import convert_checkpoint
from samoyeds_hf.pruning.team import Team
from test_team import CONFIG, data, fail_at
convert_layers.read_calibration = data
team = Team.current()
assert team.size == 2
if sys.argv[3] != "-":
    fail_at(int(sys.argv[3]))
report = convert_checkpoint(
    sys.argv[1], sys.argv[2], CONFIG, resume=True, shard_size=10**5, progress=False
)
assert len(report.weights) == 10, len(report.weights)
dist.destroy_process_group()
"""

CONFIG = SamoyedsConfig(
    PATTERN,
    "wanda",
    refine=True,
    asymmetric=True,
    modules=["experts", "shared_experts"],
    calibration={"data": "test", "samples": 40, "sequence_length": 17},
)


def data(*_: object) -> CalibrationData:
    return CalibrationData(tokens(40, 17), "0" * 64, "a test")


def fail_at(layer: int) -> None:
    """The leading process dies before it writes a layer."""
    from samoyeds_hf import convert_layers

    write = convert_layers._write_layer

    def die(plan: object, shard: object, result: object, *rest: object) -> object:
        if result.index == layer:  # type: ignore[attr-defined]
            raise SystemExit(7)
        return write(plan, shard, result, *rest)  # type: ignore[arg-type]

    convert_layers._write_layer = die  # type: ignore[assignment]


def run_two(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(str(arguments[1])).with_name("worker.py")
    script.write_text(WORKER)
    paths = filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
    return subprocess.run(
        [*command, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


@given(st.integers(0, 300), st.integers(1, 9))
def test_shares_are_all_experts_once_in_order(count: int, size: int) -> None:
    shares = [Team(rank, size).share(count) for rank in range(size)]
    assert [expert for share in shares for expert in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_is_a_team() -> None:
    team = Team()
    assert team.leads
    assert team.share(7) == range(7)
    mine = torch.arange(6.0).view(3, 2)
    team.exchange(mine)
    assert torch.equal(mine, torch.arange(6.0).view(3, 2))
    assert team.gather("x") == ["x"]
    assert team.follow(3) == 3


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 5 experts over 2 processes, and shared experts, which one of them prunes
    dense = save_dense(BY_NAME["qwen2_moe"], tmp_path / "dense")
    monkeypatch.setattr("samoyeds_hf.convert_layers.read_calibration", data)
    convert_checkpoint(dense, tmp_path / "one" / "sparse", CONFIG, shard_size=10**5, progress=False)
    (tmp_path / "two").mkdir()
    done = run_two(dense, tmp_path / "two" / "sparse", 1)
    assert done.returncode != 0
    half = files_in(tmp_path / "two" / "sparse.partial")
    assert half is not None
    assert "hidden-before-00001.bin" in half
    done = run_two(dense, tmp_path / "two" / "sparse", "-")
    assert done.returncode == 0, done.stderr
    one, two = files_in(tmp_path / "one" / "sparse"), files_in(tmp_path / "two" / "sparse")
    assert one is not None
    assert two is not None
    assert set(one) == set(two)
    for name in one:  # the report tells the time that each weight took
        assert one[name] == two[name] or name == "samoyeds_report.json", name
