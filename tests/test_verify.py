"""``check`` finds every damage and says where; ``export-dense`` writes what any engine reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import (
    SINGLE,
    contents,
    convert,
    edit_json,
    edit_tensors,
    files_in,
    headers,
    load_as_auto,
    poke,
    refused,
    save_dense,
)
from safetensors.torch import save_file
from test_hosts import HUB_CONFIG, hub_weights
from tiny_models import BY_NAME, FAMILIES, MIXTRAL, Family, logits, tokens

import samoyeds_hf
from samoyeds_hf import SamoyedsConfig
from samoyeds_hf.directory import REPORT_FILE
from samoyeds_hf.errors import (
    CheckpointError,
    ConfigError,
    FormatError,
    PatternError,
    SamoyedsError,
)
from samoyeds_hf.verify import CheckReport, check_checkpoint, export_dense

by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
EVERYTHING = SamoyedsConfig(
    "4:8:16",  # several Sub-Rows a block, so that the order of an index can be wrong
    modules=["experts", "shared_experts"],
    overrides={r".*down_proj": "2:4"},
)
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
SHARED = "model.layers.0.mlp.shared_expert.up_proj.weight"


def check(directory: Path, against: Path | None = None) -> CheckReport:
    return check_checkpoint(directory, against, progress=False)


def errors_of(report: CheckReport) -> dict[str, float | None]:
    return {name: error for name, *_, error in report.rows}


def export(directory: Path, destination: Path, **settings: object) -> Path:
    return export_dense(directory, destination, **{"progress": False, **settings})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense checkpoint with shared experts, and all of it made sparse, in one file."""
    folder = tmp_path_factory.mktemp("made")
    save_dense(BY_NAME["qwen2_moe"], folder / "dense")
    convert(folder / "dense", folder / "sparse", EVERYTHING)
    return folder / "dense", folder / "sparse"


@pytest.fixture
def sparse(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made[1], tmp_path / "sparse"))


# --- check: what is good ------------------------------------------------------------------------


@pytest.mark.roundtrip
@by_family
def test_good(family: Family, tmp_path: Path) -> None:
    dense = save_dense(family, tmp_path / "dense", max_shard_size="100KB")
    report = convert(dense, tmp_path / "sparse", shard_size=50_000)
    found = check(tmp_path / "sparse", dense)
    assert errors_of(found) == {weight.name: weight.error for weight in report.weights}
    assert found.changed == ()
    assert found.num_copied == len(headers(tmp_path / "sparse")) - 3 * len(found.rows)
    assert str(found).endswith("and equal the source's.")


def test_good_with_everything(made: tuple[Path, Path]) -> None:
    dense, directory = made
    found = check(directory, dense)
    stored = json.loads((directory / REPORT_FILE).read_text())
    assert errors_of(found) == {weight["name"]: weight["error"] for weight in stored["weights"]}
    assert {name: pattern for name, _, pattern, _ in found.rows} == {
        weight["name"]: weight["pattern"] for weight in stored["weights"]
    }
    assert {pattern for _, _, pattern, _ in found.rows} == {"2:4", "4:8:16"}
    assert found.changed == ()


def test_without_a_source(made: tuple[Path, Path]) -> None:
    found = check(made[1])
    assert all(error is None for *_, error in found.rows)
    assert "error" not in str(found)
    assert f"{len(found.rows)} sparse weights are valid" in str(found)


def test_a_fused_source_gives_the_same_errors(made: tuple[Path, Path], tmp_path: Path) -> None:
    load_as_auto(made[0]).save_pretrained(tmp_path / "fused", save_original_format=False)
    assert check(made[1], tmp_path / "fused") == check(made[1], made[0])


def test_a_source_in_another_dtype(tmp_path: Path) -> None:
    """The errors are those of the weights as they are loaded."""
    family = Family("single", "Mixtral", {**MIXTRAL.settings, "dtype": torch.bfloat16})
    dense = save_dense(family, tmp_path / "dense", torch.float32)
    edit_json(dense / "config.json", dtype="bfloat16")
    report = convert(dense, tmp_path / "sparse")
    assert headers(dense)["lm_head.weight"].dtype == "F32"
    assert headers(tmp_path / "sparse")["lm_head.weight"].dtype == "BF16"
    found = check(tmp_path / "sparse", dense)
    assert errors_of(found) == {weight.name: weight.error for weight in report.weights}
    assert found.changed == ()


# --- check: every damage ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [8, 9, 255])
def test_index_out_of_range(value: int, sparse: Path) -> None:
    poke(sparse, f"{GATE_UP}_index", (3, 7, 2), bytes([value]))
    refused(
        FormatError,
        f"{GATE_UP}_index[3, 7, 2] must be below M=8, found {value};",
        call=lambda: check(sparse),
    )


@pytest.mark.parametrize("step", [0, -1])
def test_index_not_ascending(step: int, sparse: Path) -> None:
    stored = headers(sparse)[f"{GATE_UP}_index"]
    columns = stored.shape[-1]
    before = stored.data[(2 * stored.shape[1] + 5) * columns + 3]  # [2, 5, 3], slot 1 of a block
    value = before + step
    poke(sparse, stored_name := f"{GATE_UP}_index", (2, 6, 3), bytes([value]))
    refused(
        FormatError,
        f"{stored_name}[2, 6, 3] must be above the slot before it, found {value} after {before};",
        call=lambda: check(sparse),
    )


@pytest.mark.parametrize("nibble", sorted(set(range(16)) - {4, 8, 9, 12, 13, 14}))
@pytest.mark.parametrize("half", ["low", "high"])
def test_not_a_nibble(nibble: int, half: str, sparse: Path) -> None:
    value = nibble | 4 << 4 if half == "low" else 4 | nibble << 4
    poke(sparse, f"{GATE_UP}_meta", (4, 95, 7), bytes([value]))
    refused(
        FormatError,
        f"{GATE_UP}_meta[4, 95, 7] must hold two nibbles of",
        f"found {value:#04x};",
        call=lambda: check(sparse),
    )


def test_a_linear_of_a_shared_expert(sparse: Path) -> None:
    poke(sparse, f"{SHARED}_index", (5, 1), b"\x10")
    refused(FormatError, f"{SHARED}_index[5, 1]", "found 16", call=lambda: check(sparse))


WRONG_TENSORS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], list[str]]] = {
    "values with a row too few": (
        GATE_UP,
        lambda t: t[:, 1:],
        ["shape [5, 96, 32]", "95"],
    ),
    "values of all rows": (GATE_UP, lambda t: t.repeat(1, 2, 1), ["must have shape", "192"]),
    "values of an expert too few": (GATE_UP, lambda t: t[1:], ["must have shape", "[4, 96, 32]"]),
    "values as integers": (GATE_UP, lambda t: t.view(torch.int16), ["must have dtype", "int16"]),
    "meta transposed": (f"{GATE_UP}_meta", lambda t: t.mT.contiguous(), ["must have shape"]),
    "meta of another V": (f"{GATE_UP}_index", lambda t: t[..., :2], ["must have shape", "4:8:16"]),
    "meta as int8": (f"{GATE_UP}_meta", lambda t: t.view(torch.int8), ["must have dtype", "int8"]),
    "index as int64": (f"{GATE_UP}_index", lambda t: t.long(), ["must have dtype", "int64"]),
    "values of a Linear": (SHARED, lambda t: t[:-1], ["must have shape"]),
    "an untouched tensor": ("model.norm.weight", lambda t: t[:-1], ["must have shape [64]"]),
}


@pytest.mark.parametrize("case", WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_wrong_shape_or_dtype(
    case: tuple[str, Callable[[torch.Tensor], torch.Tensor], list[str]], sparse: Path
) -> None:
    name, change, parts = case
    edit_tensors(sparse, lambda t: t.update({name: change(t[name]).contiguous()}))
    refused(SamoyedsError, name, *parts, call=lambda: check(sparse))


@pytest.mark.parametrize("suffix", ["", "_meta", "_index"])
def test_missing_tensor(suffix: str, sparse: Path) -> None:
    edit_tensors(sparse, lambda t: t.pop(f"{GATE_UP}{suffix}"))
    refused(CheckpointError, f"{GATE_UP}{suffix} missing", call=lambda: check(sparse))


@pytest.mark.parametrize(
    ("pattern", "error", "part"),
    [
        ("1:2:6", PatternError, "V must be a positive multiple of 4"),
        ("3:2:16", PatternError, "1 <= N <= M"),
        ("4:8:48", PatternError, "V must divide the in features"),
        ("4:7:16", PatternError, "M must divide the out features"),
        ("4:8:32", FormatError, "gate_up_proj_index must have shape"),
        ("2:4:16", FormatError, "_index"),
        ("1:2", PatternError, "N:M:V"),
    ],
)
def test_a_pattern_that_the_tensors_do_not_have(
    pattern: str, error: type[SamoyedsError], part: str, sparse: Path
) -> None:
    path = sparse / "config.json"
    quantization = json.loads(path.read_text())["quantization_config"]
    edit_json(path, quantization_config={**quantization, "pattern": pattern})
    refused(error, part, call=lambda: check(sparse))


@pytest.mark.parametrize(
    ("changes", "part"),
    [({"format_version": 2}, "upgrade samoyeds-hf"), ({"patterns": "1:2:16"}, "did you mean")],
)
def test_a_configuration_that_is_not_known(
    changes: dict[str, object], part: str, sparse: Path
) -> None:
    path = sparse / "config.json"
    quantization = json.loads(path.read_text())["quantization_config"]
    edit_json(path, quantization_config={**quantization, **changes})
    refused(ConfigError, part, call=lambda: check(sparse))


def test_cut_short(sparse: Path) -> None:
    os.truncate(sparse / SINGLE, (sparse / SINGLE).stat().st_size - 1)
    refused(CheckpointError, SINGLE, "bytes that are not", call=lambda: check(sparse))


def test_not_a_sparse_checkpoint(made: tuple[Path, Path], tmp_path: Path) -> None:
    refused(CheckpointError, "quant_method 'samoyeds'", call=lambda: check(made[0]))
    refused(CheckpointError, "config.json", call=lambda: check(tmp_path / "nowhere"))


# --- check against the source -------------------------------------------------------------------


def test_a_changed_untouched_tensor(made: tuple[Path, Path], sparse: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    poke(sparse, name, (3, 5), b"\x12\x34")
    found = check(sparse, made[0])
    assert found.changed == (name,)
    assert f"1 of them differ from the source: {name}" in str(found)


def test_a_changed_sign_of_zero_counts(made: tuple[Path, Path], sparse: Path) -> None:
    name = "model.norm.weight"
    dense = Path(shutil.copytree(made[0], sparse.parent / "dense"))
    edit_tensors(dense, lambda t: t[name].zero_())
    edit_tensors(sparse, lambda t: t[name].zero_().neg_())
    assert check(sparse, dense).changed == (name,)


def test_another_value_shows_in_the_error(made: tuple[Path, Path], sparse: Path) -> None:
    poke(sparse, GATE_UP, (0, 0, 0), b"\x80\x44")  # 1024
    changed, whole = errors_of(check(sparse, made[0])), errors_of(check(made[1], made[0]))
    assert {name for name in whole if changed[name] != whole[name]} == {GATE_UP}
    assert (changed[GATE_UP] or 0) > 10


def test_against_another_model(made: tuple[Path, Path], tmp_path: Path) -> None:
    other = save_dense(MIXTRAL, tmp_path / "mixtral")
    refused(
        CheckpointError, "dense checkpoint of the same model", call=lambda: check(made[1], other)
    )
    settings = {**BY_NAME["qwen2_moe"].settings, "moe_intermediate_size": 64}
    save_dense(Family("narrow", "Qwen2Moe", settings), tmp_path / "narrow")
    refused(
        CheckpointError,
        "dense checkpoint of the same model",
        "model.layers.0.mlp.experts.",
        call=lambda: check(made[1], tmp_path / "narrow"),
    )
    refused(CheckpointError, "must be dense", call=lambda: check(made[1], made[1]))


# --- export-dense -----------------------------------------------------------------------------


@pytest.mark.roundtrip
@by_family
def test_export_equals_unpatching(family: Family, tmp_path: Path) -> None:
    """The same files as by hand, the Hub's names, and the way back to the same sparse weights."""
    dense, directory = save_dense(family, tmp_path / "dense"), tmp_path / "sparse"
    convert(dense, directory)
    export(directory, tmp_path / "exported", shard_size=60_000)
    model = load_as_auto(directory)
    samoyeds_hf.unpatch_model(model)
    model.save_pretrained(tmp_path / "unpatched")
    exported = contents(tmp_path / "exported")
    assert exported == contents(tmp_path / "unpatched")
    assert {n: (t.dtype, t.shape) for n, t in headers(dense).items()} == {
        name: (dtype, shape) for name, (dtype, shape, _) in exported.items()
    }
    configs = [
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("exported", "dense")
    ]
    assert configs[0] == configs[1]
    assert len(list((tmp_path / "exported").glob("*.safetensors"))) > 1
    convert(tmp_path / "exported", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(directory)


PLAIN = """
import sys
sys.modules["samoyeds_hf"] = None  # as if it were not installed
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids, *directories = sys.argv[1:]
ids = torch.load(ids)
for directory in directories:
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        torch.save(model.eval()(ids, use_cache=False).logits, directory + "/logits.pt")
"""


@pytest.mark.roundtrip
def test_export_loads_without_the_package(tmp_path: Path) -> None:
    names = ["mixtral", "qwen2_moe", "deepseek_v3", "gemma4"]
    for name in names:
        dense = save_dense(BY_NAME[name], tmp_path / name / "dense", torch.float32)
        convert(dense, tmp_path / name / "sparse")
        export(tmp_path / name / "sparse", tmp_path / name / "exported")
    torch.save(tokens(), tmp_path / "ids.pt")
    exported = [str(tmp_path / name / "exported") for name in names]
    subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path / "ids.pt"), *exported],
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},  # entry points of packages
        check=True,
        capture_output=True,
    )
    for name in names:
        found = torch.load(tmp_path / name / "exported" / "logits.pt")
        sparse = load_as_auto(tmp_path / name / "sparse")
        expected = logits(sparse)
        assert float((found - expected).norm() / expected.norm()) < 1e-5
        samoyeds_hf.unpatch_model(sparse)
        torch.testing.assert_close(found, logits(sparse), rtol=1e-6, atol=1e-6)


def test_export_of_everything(made: tuple[Path, Path], tmp_path: Path) -> None:
    dense, directory = made
    export(directory, tmp_path / "exported")
    assert headers(tmp_path / "exported").keys() == headers(dense).keys()
    convert(tmp_path / "exported", tmp_path / "again", EVERYTHING)
    assert contents(tmp_path / "again") == contents(directory)
    assert not (tmp_path / "exported" / REPORT_FILE).exists()


def test_export_of_a_tied_model(tmp_path: Path) -> None:
    family = Family("tied", "Mixtral", {**MIXTRAL.settings, "tie_word_embeddings": True})
    dense = save_dense(family, tmp_path / "dense")
    convert(dense, tmp_path / "sparse")
    export(tmp_path / "sparse", tmp_path / "exported")
    assert headers(tmp_path / "exported").keys() == headers(dense).keys()


def test_export_of_deepseek_moe(tmp_path: Path) -> None:
    """The Hub's own names come back, for the model's own code or another engine."""
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(json.dumps(HUB_CONFIG))
    save_file(hub_weights(HUB_CONFIG), tmp_path / "dense" / SINGLE, metadata={"format": "pt"})
    convert(tmp_path / "dense", tmp_path / "sparse", SamoyedsConfig("1:2:16"))
    export(tmp_path / "sparse", tmp_path / "exported")
    assert headers(tmp_path / "exported").keys() == headers(tmp_path / "dense").keys()


def test_export_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    dense, directory = made
    refused(CheckpointError, "quant_method", call=lambda: export(dense, tmp_path / "out"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    refused(
        CheckpointError,
        "must be new",
        call=lambda: export(directory, tmp_path / "out"),
        kept=tmp_path,
    )
    refused(
        CheckpointError,
        "checkpoints only",
        call=lambda: export(directory, tmp_path / "out", overwrite=True),
        kept=tmp_path,
    )
    refused(
        CheckpointError,
        "must not hold the source",
        call=lambda: export(directory, directory, overwrite=True),
        kept=directory,
    )


def test_export_again_after_an_interruption(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be continued, and what is left of it is in nobody's way."""

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("samoyeds_hf.verify.copy_companions", stop)
        with pytest.raises(KeyboardInterrupt):
            export(made[1], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    export(made[1], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert set(files_in(tmp_path / "out") or {}) == {
        SINGLE,
        "config.json",
        "generation_config.json",
    }
