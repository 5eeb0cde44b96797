"""The converter makes what ``patch_model`` and ``save_pretrained`` make, and never half of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import (
    CONFIG,
    INDEX,
    SINGLE,
    assert_same_checkpoint,
    convert,
    edit_tensors,
    files_in,
    headers,
    load_as_auto,
    patched,
    refused,
    save_dense,
)
from safetensors.torch import save_file
from test_hosts import HUB_CONFIG, hub_weights
from tiny_models import BY_NAME, FAMILIES, MIXTRAL, Family, ToyConfig, ToyModel, logits, make_toy
from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM

from samoyeds_hf import SamoyedsConfig
from samoyeds_hf.directory import REPORT_FILE
from samoyeds_hf.errors import UnsupportedModelError
from samoyeds_hf.plan import plan_conversion
from samoyeds_hf.source import Target
from samoyeds_hf.verify import check_checkpoint

by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
QWEN2, DEEPSEEK_V3 = BY_NAME["qwen2_moe"], BY_NAME["deepseek_v3"]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def assert_converts(
    source: Path, folder: Path, config: SamoyedsConfig = CONFIG, **settings: Any
) -> None:
    """The converter's output and report are those of loading, patching and saving."""
    report = convert(source, folder / "converted", config, **settings)
    expected = patched(source, folder / "patched", config)
    assert_same_checkpoint(folder / "converted", folder / "patched")
    assert report == expected


# --- the same as patch_model and save_pretrained ------------------------------------------------


@pytest.mark.roundtrip
@by_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_family(family: Family, dtype: torch.dtype, tmp_path: Path) -> None:
    source = save_dense(family, tmp_path / "dense", dtype, max_shard_size="100KB")
    assert_converts(source, tmp_path, shard_size=50_000)
    found, expected = (load_as_auto(tmp_path / name) for name in ("converted", "patched"))
    if dtype == torch.float32:
        assert relative(logits(found), logits(expected)) < 1e-5
    else:
        assert torch.equal(logits(found), logits(load_as_auto(tmp_path / "converted")))


SETTINGS = {
    "2:4": SamoyedsConfig("2:4"),
    "4:8:16": SamoyedsConfig("4:8:16"),
    "shared": SamoyedsConfig("1:2:32", modules=["experts", "shared_experts"]),
    "only shared": SamoyedsConfig("1:2:32", modules=["shared_experts"]),
    "overrides": SamoyedsConfig("1:2:32", overrides={r".*down_proj": "2:4"}),
    "a dense layer": SamoyedsConfig("1:2:32", overrides={r"model\.layers\.0\..*": "dense"}),
}


@pytest.mark.roundtrip
@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)
def test_settings(config: SamoyedsConfig, tmp_path: Path) -> None:
    source = save_dense(QWEN2, tmp_path / "dense")
    assert_converts(source, tmp_path, config)
    load_as_auto(tmp_path / "converted")


@pytest.mark.roundtrip
@pytest.mark.parametrize("layout", ["hub", "fused", "one file", "many files"])
@pytest.mark.parametrize("shard_size", [1, 20_000, 10**9], ids=["tiny", "small", "one"])
def test_shards_in_and_out(layout: str, shard_size: int, tmp_path: Path) -> None:
    size = "30KB" if layout == "many files" else "1GB"
    save_dense(
        MIXTRAL,
        tmp_path / "dense",
        max_shard_size=size,
        save_original_format=layout != "fused",
    )
    assert_converts(tmp_path / "dense", tmp_path, shard_size=shard_size)
    plan = plan_conversion(tmp_path / "dense", CONFIG, shard_size)
    files = {path.name for path in (tmp_path / "converted").glob("*.safetensors")}
    assert files == {shard.file for shard in plan.shards}
    if shard_size == 10**9:
        assert files == {SINGLE}
        assert not (tmp_path / "converted" / INDEX).exists()
    if shard_size == 1:  # values, meta and index of a weight stay together
        assert len(files) == len(plan.units)


@pytest.mark.roundtrip
@pytest.mark.parametrize("stored", ["embedding", "both", "head", "different"])
def test_tied_embeddings(stored: str, tmp_path: Path) -> None:
    family = Family("tied", "Mixtral", {**MIXTRAL.settings, "tie_word_embeddings": True})
    source = save_dense(family, tmp_path / "dense")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        if stored != "embedding":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (
                stored == "different"
            )
        if stored == "head":
            del tensors["model.embed_tokens.weight"]

    edit_tensors(source, edit)
    assert_converts(source, tmp_path)
    assert ("lm_head.weight" in headers(tmp_path / "converted")) == (stored == "different")
    found, expected = (load_as_auto(tmp_path / name) for name in ("converted", "patched"))
    assert torch.equal(found.lm_head.weight, expected.lm_head.weight)


@pytest.mark.roundtrip
def test_source_of_mixed_dtypes(tmp_path: Path) -> None:
    source = save_dense(DEEPSEEK_V3, tmp_path / "dense")

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for number, (name, tensor) in enumerate(sorted(tensors.items())):
            tensors[name] = tensor.to((torch.float16, torch.float32, torch.bfloat16)[number % 3])

    edit_tensors(source, mix)
    assert_converts(source, tmp_path)
    stored = headers(tmp_path / "converted")
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == "F32"
    assert stored["model.layers.1.mlp.experts.down_proj"].dtype == "BF16"


@pytest.mark.roundtrip
def test_extra_tensors_are_dropped_and_reported(tmp_path: Path) -> None:
    source = save_dense(DEEPSEEK_V3, tmp_path / "dense")
    extra = "model.layers.2.eh_proj.weight"  # multi-token prediction
    edit_tensors(source, lambda t: t.update({extra: torch.ones(3)}))
    plan = plan_conversion(source, CONFIG, 10**9)
    assert plan.unused == (extra,)
    assert f"dropped: 1 tensors that the model does not have, such as {extra}" in str(plan)
    assert_converts(source, tmp_path)
    assert extra not in headers(tmp_path / "converted")


@pytest.mark.roundtrip
def test_deepseek_moe_of_the_hub(tmp_path: Path) -> None:
    """A model that transformers does not know: its host's names, the Hub's config and tensors."""
    source = tmp_path / "dense"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(HUB_CONFIG))
    save_file(hub_weights(HUB_CONFIG), source / SINGLE, metadata={"format": "pt"})
    assert_converts(source, tmp_path, SamoyedsConfig("1:2:16"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "converted").config.model_type == (
        "deepseek"
    )


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with its experts in a ModuleList, known to transformers for one test."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", dict(CONFIG_MAPPING._extra_content))
    mapping = AutoModelForCausalLM._model_mapping
    monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
    AutoConfig.register(ToyConfig.model_type, ToyConfig)
    AutoModelForCausalLM.register(ToyConfig, ToyModel)
    make_toy().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_experts_in_a_list(toy: Path, tmp_path: Path) -> None:
    config = SamoyedsConfig("1:2:32", strict=False, modules=["experts", "shared_experts"])
    assert_converts(toy, tmp_path, config)
    strict = SamoyedsConfig("1:2:32")
    refused(
        UnsupportedModelError,
        "layers.0.experts",
        "strict=False",
        call=lambda: convert(toy, tmp_path / "strict", strict),
    )
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_experts_that_cannot_be_read_one_by_one(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No family of today is like that; then a fused weight is loaded whole."""
    source = save_dense(MIXTRAL, tmp_path / "dense", save_original_format=layout == "hub")
    by_expert = plan_conversion(source, CONFIG, 10**9).peak_memory
    monkeypatch.setattr(Target, "is_by_expert", property(lambda target: False))
    assert plan_conversion(source, CONFIG, 10**9).peak_memory > by_expert
    assert_converts(source, tmp_path)
    report = check_checkpoint(tmp_path / "converted", source, progress=False)
    stored = json.loads((tmp_path / "converted" / REPORT_FILE).read_text())["weights"]
    for name, *_, error in report.rows:
        assert error == pytest.approx(next(w["error"] for w in stored if w["name"] == name))


# --- what comes along -------------------------------------------------------------------------

README = """\
---
license: other
license_name: tiny-licence
tags: [of, the, source]
---
# The source's own card
"""


@pytest.fixture
def furnished(tmp_path: Path) -> Path:
    """A checkpoint with all that lies in a repository of the Hub."""
    source = save_dense(MIXTRAL, tmp_path / "dense")
    kept = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "NOTICE")
    for name in (*kept, "spiece.model", "generation_config.json"):
        (source / name).write_text(f'{{"content of": "{name}"}}')
    (source / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.5}')
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("tools")
    for name in ("modeling_x.py", "pytorch_model.bin", "model.gguf", ".gitattributes"):
        (source / name).write_text("not this")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    (source / "original").mkdir()
    (source / "original" / "consolidated.pth").write_text("not this")
    (source / "README.md").write_text(README)
    return source


def test_companions(furnished: Path, tmp_path: Path) -> None:
    convert(furnished, tmp_path / "out")
    found = files_in(tmp_path / "out")
    copied = {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE",
        "NOTICE",
        "spiece.model",
        "generation_config.json",
        "additional_chat_templates/tools.jinja",
    }
    assert set(found) == {*copied, SINGLE, "config.json", "README.md", REPORT_FILE}
    for name in copied:
        assert found[name] == (furnished / name).read_bytes()
    assert load_as_auto(tmp_path / "out").generation_config.temperature == 0.5


def test_model_card(furnished: Path, tmp_path: Path) -> None:
    report = convert(furnished, tmp_path / "out")
    _, front, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["license"] == "other"
    assert card["license_name"] == "tiny-licence"
    assert card["library_name"] == "transformers"
    assert "samoyeds" in card["tags"]
    assert "The source's own card" not in body
    assert "import samoyeds_hf" in body
    assert "**1:2:32** (25.0% of the weights are kept) with the method `magnitude`" in body
    assert f"{report.error:.4f} on average" in body


@pytest.mark.parametrize(
    "readme", ["", "no front matter", "---\n[broken\n---\n", "---\n- 1\n---\n"]
)
def test_model_card_without_a_licence(readme: str, tmp_path: Path) -> None:
    source = save_dense(MIXTRAL, tmp_path / "dense")
    (source / "README.md").write_text(readme)
    convert(source, tmp_path / "out")
    card = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])
    assert "license" not in card


def test_report(tmp_path: Path) -> None:
    source = save_dense(QWEN2, tmp_path / "dense")
    config = SamoyedsConfig("1:2:32", overrides={r"model\.layers\.0\..*": "dense"})
    report = convert(source, tmp_path / "out", config, shard_size=30_000)
    stored = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert stored == json.loads(json.dumps(report.to_dict()))
    assert [weight["name"] for weight in stored["weights"]] == [
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    ]
    assert stored["skipped"] == [
        {"name": "model.layers.0.mlp.experts", "reason": "dense by override"}
    ]
    found = headers(tmp_path / "out")
    for weight in stored["weights"]:
        parts = [found[weight["name"] + suffix] for suffix in ("", "_meta", "_index")]
        assert weight["bytes_after"] == sum(len(part.data) for part in parts)


# --- the plan's numbers -------------------------------------------------------------------------


@by_family
def test_plan_tells_the_sizes_of_the_files(family: Family, tmp_path: Path) -> None:
    source = save_dense(family, tmp_path / "dense")
    plan = plan_conversion(source, CONFIG, 50_000)
    convert(source, tmp_path / "out", shard_size=50_000)
    before = sum(len(tensor.data) for tensor in headers(source).values())
    after = sum(len(tensor.data) for tensor in headers(tmp_path / "out").values())
    assert (plan.bytes_before, plan.bytes_after) == (before, after)
    files = (tmp_path / "out").glob("*.safetensors")
    assert plan.disk_need == sum(file.stat().st_size for file in files)
    text = str(plan)
    assert "model.layers.1" in text
    assert f"{after / before:.3f}" in text


MEASURE = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
import samoyeds_hf
from samoyeds_hf.convert import convert_checkpoint
from samoyeds_hf.plan import plan_conversion
from samoyeds_hf.source import Target
from samoyeds_hf.verify import check_checkpoint
def peak():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
source, warm, out = map(Path, sys.argv[1:4])
config = samoyeds_hf.SamoyedsConfig("1:2:64")
convert_checkpoint(warm, out / "warm", config, progress=False)  # imports what is needed
plan = plan_conversion(source, config, 10**9)
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = peak()
convert_checkpoint(source, out / "large", config, progress=False)
print(json.dumps([peak() - before, plan.peak_memory]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("layout", ["hub", "fused"])
@pytest.mark.slow
def test_peak_memory_is_what_the_plan_says(layout: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 1}
    large = Family("large", "Mixtral", {**MIXTRAL.settings, **sizes, "num_local_experts": 16})
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = MixtralForCausalLM(large.make_config())
    finally:
        torch.set_default_dtype(torch.float32)
    fused = model.model.layers[0].mlp.experts.gate_up_proj
    num_bytes = fused.numel() * fused.element_size()
    model.save_pretrained(tmp_path / "large", save_original_format=layout == "hub")
    save_dense(MIXTRAL, tmp_path / "warm")
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / n) for n in ("large", "warm", "o"))]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    used, estimate = json.loads(run.stdout.splitlines()[-1])
    slack = 24 * 10**6  # chunks of a fixed size, and what the allocator keeps
    assert used <= estimate + slack
    assert used < num_bytes  # one fused tensor would not fit, let alone two
