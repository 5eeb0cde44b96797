"""Calibrated conversion from disk to disk: what the same model becomes that is pruned in memory."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import (
    LENGTH,
    SAMPLES,
    SHARD_SIZE,
    calibrated,
    letters_tokenizer,
    save_source,
    tokens_of,
    write_text,
)
from checkpoints import (
    SINGLE,
    assert_same_checkpoint,
    contents,
    convert,
    edit_json,
    edit_tensors,
    files_in,
    headers,
    load_as_auto,
    refused,
)
from safetensors.torch import save_file
from test_hosts import HUB_CONFIG, hub_weights
from tiny_models import (
    BY_NAME,
    MIXTRAL,
    PATTERN,
    SIX_FAMILIES,
    Family,
    ToyConfig,
    ToyModel,
    logits,
    make_toy,
)
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import samoyeds_hf
from samoyeds_hf import PatchReport, SamoyedsConfig
from samoyeds_hf import convert as conversion
from samoyeds_hf.directory import REPORT_FILE
from samoyeds_hf.errors import CalibrationError, CheckpointError, UnsupportedModelError
from samoyeds_hf.plan import plan_conversion
from samoyeds_hf.pruning.layer import PruneSettings
from samoyeds_hf.pruning.streamed import StreamedLayers
from samoyeds_hf.pruning.walk import Walk
from samoyeds_hf.verify import check_checkpoint

pytest_plugins = ("layerwise",)
pytestmark = pytest.mark.usefixtures("still")


def patched(
    source: Path, destination: Path, config: SamoyedsConfig, data: Any = None
) -> PatchReport:
    """What the converter must make: load everything, prune it, save it."""
    model = load_as_auto(source)
    data = letters_tokenizer() if data is None else data
    report = samoyeds_hf.patch_model(model, config=config, calibration=data)
    model.save_pretrained(destination)
    return report


def assert_converts(source: Path, folder: Path, config: SamoyedsConfig, **settings: Any) -> None:
    """Output and report are those of loading, pruning in memory, and saving."""
    report = convert(source, folder / "converted", config, **settings)
    expected = patched(source, folder / "patched", config)
    assert_same_checkpoint(folder / "converted", folder / "patched")
    assert report == expected
    check_checkpoint(folder / "converted", source, progress=False)


# --- the same as pruning in memory --------------------------------------------------------------


@pytest.mark.roundtrip
@pytest.mark.parametrize("family", SIX_FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_family(family: Family, dtype: torch.dtype, text: Path, tmp_path: Path) -> None:
    source = save_source(family, tmp_path / "dense", dtype, max_shard_size="100KB")
    assert_converts(source, tmp_path, calibrated(text, "sparsegpt"), shard_size=50_000)
    model = load_as_auto(tmp_path / "converted")
    other = load_as_auto(tmp_path / "patched")
    assert torch.isfinite(logits(model)).all()
    assert torch.equal(logits(model), logits(other))


METHODS = {
    "magnitude, refined": {"method": "magnitude", "refine": True},
    "wanda": {"method": "wanda"},
    "wanda, refined": {"method": "wanda", "refine": True},
    "admm": {"method": "admm"},
    "best": {"method": "best"},
    "asymmetric": {"method": "sparsegpt", "asymmetric": True},
}


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_methods(settings: dict[str, Any], text: Path, source: Path, tmp_path: Path) -> None:
    assert_converts(source, tmp_path, calibrated(text, **settings))


BOTH = ["experts", "shared_experts"]
SETTINGS: dict[str, dict[str, Any]] = {
    "2:4": {"pattern": "2:4"},
    "4:8:16": {"pattern": "4:8:16"},
    "shared": {"modules": BOTH},
    "only shared": {"modules": BOTH[1:]},
    "overrides": {"overrides": {r".*down_proj": "2:4"}},
    "first layer dense": {"overrides": {r"model\.layers\.0\..*": "dense"}},
    "last layer dense": {"overrides": {r"model\.layers\.1\..*": "dense"}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings(settings: dict[str, Any], text: Path, tmp_path: Path) -> None:
    source = save_source(BY_NAME["qwen2_moe"], tmp_path / "dense")
    assert_converts(source, tmp_path, calibrated(text, **settings))
    load_as_auto(tmp_path / "converted")


def test_tokens_instead_of_text(source: Path, text: Path, tmp_path: Path) -> None:
    """The same tensors; where the tokens come from is then not known."""
    config = calibrated(text)
    convert(source, tmp_path / "converted", config)
    report = patched(source, tmp_path / "patched", config, tokens_of(text))
    assert contents(tmp_path / "converted") == contents(tmp_path / "patched")
    assert report.calibration is None
    stored = json.loads((tmp_path / "patched" / "config.json").read_text())
    assert stored["quantization_config"]["calibration"] is None


def test_tied_embeddings(text: Path, tmp_path: Path) -> None:
    family = Family("tied", "Mixtral", {**MIXTRAL.settings, "tie_word_embeddings": True})
    assert_converts(save_source(family, tmp_path / "dense"), tmp_path, calibrated(text))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_source_in_another_dtype(dtype: str, text: Path, tmp_path: Path) -> None:
    source = save_source(MIXTRAL, tmp_path / "dense", torch.float32)
    edit_json(source / "config.json", dtype=dtype)
    assert_converts(source, tmp_path, calibrated(text))
    stored = {t.dtype for t in headers(tmp_path / "converted").values()}
    assert stored == {"BF16" if dtype == "bfloat16" else "F16", "U8"}


def test_a_source_of_fused_weights(text: Path, tmp_path: Path) -> None:
    source = save_source(MIXTRAL, tmp_path / "dense", save_original_format=False)
    assert_converts(source, tmp_path, calibrated(text))


def test_a_model_of_our_own_from_the_hub(text: Path, tmp_path: Path) -> None:
    source = tmp_path / "dense"
    source.mkdir()
    config = {**HUB_CONFIG, "vocab_size": 128}
    (source / "config.json").write_text(json.dumps(config))
    save_file(hub_weights(config), source / SINGLE, metadata={"format": "pt"})
    letters_tokenizer().save_pretrained(source)
    assert_converts(source, tmp_path, calibrated(text, pattern="1:2:16", modules=BOTH))


def test_experts_in_a_list(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    models = AutoModelForCausalLM._model_mapping
    for mapping in (CONFIG_MAPPING, models):  # known to transformers for this test
        monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
    AutoConfig.register(ToyConfig.model_type, ToyConfig)
    AutoModelForCausalLM.register(ToyConfig, ToyModel)
    make_toy().save_pretrained(tmp_path / "dense")
    letters_tokenizer().save_pretrained(tmp_path / "dense")
    assert_converts(tmp_path / "dense", tmp_path, calibrated(text, strict=False, modules=BOTH))


def test_layers_that_cannot_run_alone(text: Path, tmp_path: Path) -> None:
    source = save_source(BY_NAME["hy_v4"], tmp_path / "dense")
    refused(
        UnsupportedModelError,
        "use method 'magnitude'",
        call=lambda: convert(source, tmp_path / "out", calibrated(text)),
        kept=source,
    )
    assert not (tmp_path / "out").exists()


# --- a layer at a time --------------------------------------------------------------------------


def layer_of(tensor: str) -> int | None:
    match = re.match(r"model\.layers\.(\d+)\.", tensor)
    return None if match is None else int(match[1])


@pytest.mark.parametrize("shard_size", [1, 20_000, 10**9], ids=["tiny", "small", "large"])
def test_shards_hold_one_layer_each(
    shard_size: int, source: Path, text: Path, finished: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(source, out, calibrated(text), shard_size=shard_size)
    by_file: dict[str, set[int | None]] = {}
    for name, stored in headers(out).items():
        by_file.setdefault(stored.file.name, set()).add(layer_of(name))
    assert all(len(layers) == 1 for layers in by_file.values()), by_file
    in_order = [layers for _, layers in sorted(by_file.items())]
    numbers = [-1 if index is None else index for (index,) in in_order]
    assert numbers == sorted(numbers)
    assert set(numbers) == {-1, 0, 1, 2}
    if shard_size == 10**9:
        assert numbers == [-1, 0, 1, 2]
    else:  # a layer takes several files
        assert min(numbers.count(number) for number in (0, 1, 2)) > 1
    whole = tmp_path / "whole"
    whole.mkdir()
    for name, data in finished.items():
        (whole / name).write_bytes(data)
    assert contents(out) == contents(whole)


def test_only_one_layer_is_in_memory(source: Path, text: Path) -> None:
    plan = plan_conversion(source, calibrated(text), SHARD_SIZE)
    layers = StreamedLayers(plan, torch.device("cpu"))
    model = layers.decoder.model

    def held() -> set[int | None]:
        return {layer_of(name) for name, p in model.named_parameters() if not p.is_meta}

    assert held() == set()
    layers.open()
    assert held() == {None}
    assert model.get_parameter("lm_head.weight").is_meta
    layers.close()
    assert held() == set()
    walk = Walk(layers, plan.patterns, tokens_of(text), PruneSettings("wanda"))
    for result in walk:
        assert held() == {result.index}
        whole = result.layer.state_dict()
        assert all(not tensor.is_meta for tensor in whole.values())
    assert held() == set()


def test_layers_behind_the_last_sparse_one_are_copied(source: Path, tmp_path: Path) -> None:
    """The walk ends early; what it does not reach is written all the same."""
    text = write_text(tmp_path / "text.txt")
    config = calibrated(text, overrides={r"model\.layers\.[12]\..*": "dense"})
    report = convert(source, tmp_path / "out", config, shard_size=SHARD_SIZE)
    assert {layer_of(weight.name) for weight in report.weights} == {0}
    assert_converts(source, tmp_path, config)


# --- what a checkpoint says of itself -----------------------------------------------------------


def assert_no_path(directory: Path, *paths: Path) -> None:
    """No file but weights holds the path of a file or directory of this machine."""
    for name, data in (files_in(directory) or {}).items():
        if not name.endswith(".safetensors"):
            for path in paths:
                assert str(path).encode() not in data, f"{name} holds {path}"


def test_report_card_and_configuration(tmp_path: Path) -> None:
    text = write_text(tmp_path / "my text.txt")
    source = save_source(MIXTRAL, tmp_path / "dense")
    out = tmp_path / "out"
    report = convert(source, out, calibrated(text, "admm", refine=True))
    calibration = {
        "data": "my text.txt",
        "samples": SAMPLES,
        "sequence_length": LENGTH,
        "seed": 0,
        "sha256": report.calibration["sha256"] if report.calibration else None,
    }
    assert report.calibration == calibration
    assert re.fullmatch("[0-9a-f]{64}", calibration["sha256"])
    assert PatchReport.from_dict(json.loads((out / REPORT_FILE).read_text())) == report
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    assert stored["calibration"] == calibration
    assert (stored["method"], stored["refine"], stored["recover"]) == ("admm", True, None)
    for weight in report.weights:
        assert weight.output_error is not None
        assert 0 < weight.output_error < 1
        assert sum(weight.tokens) == SAMPLES * LENGTH * 2
        assert len(weight.notes) == 4  # too few tokens for each expert
    card = (out / "README.md").read_text()
    assert "- method: `admm`, refined by least squares on the weights that are kept" in card
    assert f"- calibration: {SAMPLES} x {LENGTH} tokens of my text.txt, seed 0" in card
    assert f"`{calibration['sha256']}`" in card
    assert f"- calibration tokens of an expert: {min(report.weights[0].tokens)} at least" in card
    assert "- relative squared error of the outputs on the calibration data: " in card
    assert f"expert 0: only {report.weights[0].tokens[0]} calibration tokens" in card
    assert "(`recover`)" not in card
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"] == [3, 4, 5]
    assert {path.name for path in out.iterdir() if path.suffix not in (".json",)} == {
        "README.md",
        *(file.name for file in out.glob("*.safetensors")),
    }
    assert_no_path(out, tmp_path, source, text)


@pytest.mark.parametrize("kind", ["relative", "directory", "lines"])
def test_no_path_of_this_machine(
    kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "secret place"
    place.mkdir()
    file = write_text(place / "letters.txt")
    data = {"relative": Path("secret place/letters.txt"), "directory": place}.get(kind, file)
    if kind == "lines":
        data = place / "rows.jsonl"
        data.write_text(json.dumps({"text": file.read_text()}) + "\n")
    monkeypatch.chdir(tmp_path)
    convert(source, tmp_path / "out", calibrated(data))
    patched(source, tmp_path / "patched", calibrated(data))
    for out in ("out", "patched"):
        parent = Path("secret place/") if kind == "directory" else Path("secret place")
        paths = [tmp_path] if kind == "directory" else [tmp_path, parent]
        assert_no_path(tmp_path / out, *paths)
        stored = json.loads((tmp_path / out / "config.json").read_text())
        assert stored["quantization_config"]["calibration"]["data"] == data.name


def test_no_path_of_data_that_is_not_read(source: Path, text: Path, tmp_path: Path) -> None:
    """Calibration without a method that looks at data: refused, or not in the checkpoint."""
    try:
        convert(source, tmp_path / "out", calibrated(text, "magnitude"))
    except samoyeds_hf.errors.SamoyedsError:
        return
    assert_no_path(tmp_path / "out", text.parent)


def test_the_progress_bar_names_layers_and_ends(
    source: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conversion, "tqdm", partial(tqdm, mininterval=0))
    convert(source, tmp_path / "out", calibrated(text), progress=True)
    shown = capsys.readouterr().err
    assert "100%" in shown.splitlines()[-1]
    assert re.search(r"layer 2, output error at most 0\.\d{4} \(mlp\.experts\.", shown)


# --- what goes wrong ----------------------------------------------------------------------------


def test_no_calibration_at_all(source: Path, tmp_path: Path) -> None:
    for settings, what in (
        ({"method": "wanda"}, "Method 'wanda' needs calibration data, found none"),
        ({"method": "best"}, "Method 'best' needs calibration data, found none"),
        ({"refine": True}, "needs calibration data, found none"),
    ):
        config = SamoyedsConfig(PATTERN, **settings)
        refused(
            CalibrationError,
            what,
            "name some with --calibration",
            call=lambda config=config: convert(source, tmp_path / "out", config),
        )
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, "{}", "not json", '{"added_tokens": [], "model": 1}'])
def test_a_source_without_a_tokenizer(
    content: str | None, own: Path, text: Path, tmp_path: Path
) -> None:
    for file in own.glob("*token*"):
        file.unlink()
    if content is not None:
        (own / "tokenizer.json").write_text(content)
    refused(
        CalibrationError,
        "Calibration needs the model's tokenizer, found none in",
        "put its files beside the weights",
        call=lambda: convert(own, tmp_path / "out", calibrated(text)),
    )
    assert {path.name for path in tmp_path.iterdir()} == {"own"}


def test_a_tokenizer_with_more_tokens_than_the_model(text: Path, tmp_path: Path) -> None:
    family = Family("few", "Mixtral", {**MIXTRAL.settings, "vocab_size": 64})
    source = save_source(family, tmp_path / "dense")
    refused(
        CalibrationError,
        "in the model's vocabulary, 0 to 63, found",
        "use the model's own tokenizer",
        call=lambda: convert(source, tmp_path / "out", calibrated(text)),
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"data": "/nowhere/text.txt"}, ["found no '/nowhere/text.txt'"]),
        ({"samples": 100}, ["needs 1200 tokens, found 402"]),
        ({"samples": 1, "sequence_length": 129}, ["max_position_embeddings, 128 tokens"]),
        ({"sha256": "0" * 64}, ["must have the sha256 000"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_data_that_cannot_be_used(
    change: dict[str, Any], parts: list[str], source: Path, text: Path, tmp_path: Path
) -> None:
    data = {"data": str(text), "samples": SAMPLES, "sequence_length": LENGTH, **change}
    refused(
        CalibrationError,
        *parts,
        call=lambda: convert(source, tmp_path / "out", calibrated(text, calibration=data)),
    )
    assert list(tmp_path.iterdir()) == []  # known before anything is written


def test_sequences_as_long_as_the_context(source: Path, text: Path, tmp_path: Path) -> None:
    data = {"data": str(text), "samples": 1, "sequence_length": 128}
    report = convert(source, tmp_path / "out", calibrated(text, calibration=data))
    assert sum(report.weights[0].tokens) == 128 * 2


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_here(device: str, source: Path, text: Path, tmp_path: Path) -> None:
    refused(
        CalibrationError,
        f"one of this machine, found '{device}'",
        call=lambda: convert(source, tmp_path / "out", calibrated(text), device=device),
    )
    assert list(tmp_path.iterdir()) == []


FAULTS = {
    "an expert's weight": (
        "model.layers.1.block_sparse_moe.experts.1.w2.weight",
        CheckpointError,
        ["model.layers.1.mlp.experts.down_proj must be finite", "matrix 1"],
    ),
    "what experts get": (
        "model.layers.1.self_attn.v_proj.weight",
        CalibrationError,
        ["Inputs must be finite", "found NaN or infinity"],
    ),
    "an embedding": (
        "model.embed_tokens.weight",
        CalibrationError,
        ["Inputs must be finite", "found NaN or infinity"],
    ),
}


@pytest.mark.parametrize(("name", "error", "parts"), FAULTS.values(), ids=FAULTS)
def test_values_that_are_not_finite(
    name: str, error: Any, parts: list[str], own: Path, text: Path, tmp_path: Path
) -> None:
    edit_tensors(own, lambda tensors: tensors[name].view(-1)[:].fill_(float("nan")))
    refused(error, *parts, call=lambda: convert(own, tmp_path / "out", calibrated(text)))
    assert not (tmp_path / "out").exists()
    done = json.loads((tmp_path / "out.partial" / "conversion.json").read_text())
    assert done["next_layer"] == (0 if "embed" in name else 1)  # what was fine is kept


def test_an_expert_that_no_token_reaches(text: Path, tmp_path: Path) -> None:
    settings = {**MIXTRAL.settings, "num_experts_per_tok": 1}
    model = Family("top1", "Mixtral", settings).make(torch.bfloat16)
    for block in model.model.layers:  # a score below that of expert 0 or of expert 1
        gate = block.mlp.gate.weight.data
        gate[1], gate[3] = -gate[0], 0
    model.save_pretrained(tmp_path / "dense")
    letters_tokenizer().save_pretrained(tmp_path / "dense")
    report = convert(tmp_path / "dense", tmp_path / "out", calibrated(text, "sparsegpt"))
    assert [weight.tokens[3] for weight in report.weights] == [0, 0, 0, 0]
    notes = [note for note in report.notes if "no calibration token reached this expert" in note]
    assert len(notes) == 4
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- calibration tokens of an expert: 0 at least" in card
    assert "expert 3: no calibration token reached this expert" in card
    assert torch.isfinite(logits(load_as_auto(tmp_path / "out"))).all()
