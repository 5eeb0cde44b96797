"""Reports of calibrated checkpoints: tables, files, the model card."""

from __future__ import annotations

import builtins
import csv
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import convert, save_dense
from tiny_models import MIXTRAL

from samoyeds_hf.card import pruning_section, updated_card
from samoyeds_hf.directory import REPORT_FILE
from samoyeds_hf.errors import CheckpointError, SamoyedsError
from samoyeds_hf.pruning.calibration import Calibration
from samoyeds_hf.report import PatchReport, Skipped, WeightReport
from samoyeds_hf.report_files import read_report, report_command

DIGEST = "ab" * 32


def weight(layer: int, kind: str = "gate_up_proj", **changes: Any) -> WeightReport:
    tokens = (900 + layer, 17, 4000, 500)
    return replace(
        WeightReport(
            name=f"model.layers.{layer}.mlp.experts.{kind}",
            shape=(4, 192, 64),
            pattern="1:2:32",
            bytes_before=98_304,
            bytes_after=30_000,
            error=0.5 + layer / 100,
            output_error=0.125 + layer / 100,
            tokens=tokens,
            seconds=1.5,
            notes=("expert 1: only 17 calibration tokens, shrunk to the layer's",),
        ),
        **changes,
    )


@pytest.fixture
def report() -> PatchReport:
    calibration = Calibration("/home/me/novels.txt", 64, 512, 3, DIGEST).without_path()
    return PatchReport(
        weights=(weight(0), weight(0, "down_proj"), weight(10), weight(10, "down_proj")),
        skipped=(Skipped("model.layers.1.mlp.experts", "left dense by an override"),),
        method="admm",
        refine=True,
        recover="block",
        calibration=calibration.to_dict(),
    )


@pytest.fixture
def plain() -> PatchReport:
    """As without calibration."""
    weights = [
        weight(layer, output_error=None, tokens=(), seconds=None, notes=()) for layer in (0, 1)
    ]
    return PatchReport(tuple(weights), (), "magnitude")


# --- the table -----------------------------------------------------------------------------------


def test_table(report: PatchReport) -> None:
    lines = str(report).splitlines()
    assert lines[0].split("  ")[-1].strip() == "tokens min / median"
    assert lines[1].split()[-5:] == ["0.5000", "0.1250", "17", "/", "700"]
    assert lines[5].startswith("total: 4 weights")
    assert lines[5].split()[-5:] == ["0.5500", "0.1750", "17", "/", "700"]
    assert lines[6:9] == [
        "method: admm, refined, recovered by block",
        "calibration: 64 x 512 tokens of novels.txt, seed 3",
        "left dense: model.layers.1.mlp.experts: left dense by an override",
    ]
    assert lines[9].startswith("note: model.layers.0.mlp.experts.gate_up_proj: expert 1: only 17")
    assert len(lines) == 13


def test_table_without_calibration_has_no_columns_for_it(plain: PatchReport) -> None:
    assert str(plain).splitlines()[0].split()[-2:] == ["rel.", "error"]
    assert str(plain).splitlines()[-1] == "method: magnitude"
    assert plain.output_error is None
    assert plain.tokens is None


def test_many_notes_are_counted(report: PatchReport) -> None:
    noted = replace(report, weights=tuple(weight(layer) for layer in range(30)))
    notes = [line for line in str(noted).splitlines() if line.startswith("note: ")]
    assert len(notes) == 11
    assert notes[-1] == "note: 20 more in samoyeds_report.json"
    assert "- note: 10 more in samoyeds_report.json" in pruning_section(noted, "a", "b")


def test_averages_leave_out_what_was_not_measured() -> None:
    found = PatchReport((weight(0), weight(0, output_error=None, tokens=())), (), "admm")
    assert found.output_error == 0.125
    assert found.tokens == (17, 700)
    assert str(found).splitlines()[2].split()[-2:] == ["-", "-"]


def test_time_is_not_part_of_a_result(report: PatchReport) -> None:
    slower = replace(report, weights=tuple(replace(w, seconds=9.0) for w in report.weights))
    assert slower == report
    assert replace(report, refine=False) != report


# --- json ----------------------------------------------------------------------------------------


def test_json_is_read_again(report: PatchReport, plain: PatchReport, tmp_path: Path) -> None:
    for found in (report, plain, PatchReport((), (), "magnitude")):
        found.to_json(tmp_path / REPORT_FILE)
        assert read_report(tmp_path) == found
        assert [w.seconds for w in read_report(tmp_path).weights] == [
            w.seconds for w in found.weights
        ]
        assert str(read_report(tmp_path / REPORT_FILE)) == str(found)


def test_json_is_strict_where_nothing_was_measured(tmp_path: Path) -> None:
    PatchReport((weight(0, error=math.nan),), (), "magnitude").to_json(tmp_path / "a.json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert content["weights"][0]["error"] is None
    assert math.isnan(read_report(tmp_path / "a.json").weights[0].error)


def test_reports_of_other_versions_are_read(plain: PatchReport, tmp_path: Path) -> None:
    content = plain.to_dict()
    old = {key: content[key] for key in ("weights", "skipped", "method")}
    for entry in old["weights"]:
        for name in ("output_error", "tokens", "seconds", "notes"):
            del entry[name]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert read_report(tmp_path / "old.json") == plain
    new = {**plain.to_dict(), "colour": "red"}
    new["weights"] = [{**entry, "colour": "red"} for entry in new["weights"]]
    (tmp_path / "new.json").write_text(json.dumps(new))
    assert read_report(tmp_path / "new.json") == plain


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '"a"',
        '{"weights": 3, "skipped": [], "method": "a"}',
        '{"weights": [{"name": "a"}], "skipped": [], "method": "a"}',
        '{"weights": [], "skipped": [{}], "method": "a"}',
        '{"weights": [], "skipped": []}',
        '{"weights": [], "skipped": [], "method": "a", "calibration": {"data": "a"}}',
        '{"weights": [], "skipped": [], "method": "a", "calibration": 3}',
    ],
)
def test_what_is_no_report_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / REPORT_FILE).write_text(content)
    with pytest.raises(CheckpointError, match="must be a report as the conversion wrote it"):
        read_report(tmp_path)


def test_a_directory_without_a_report(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"found No such file or directory for .*report\.json"
    ):
        read_report(tmp_path)
    with pytest.raises(CheckpointError, match="No such file or directory"):
        read_report(tmp_path / "nothing")


# --- csv -----------------------------------------------------------------------------------------


def test_csv(report: PatchReport, tmp_path: Path) -> None:
    report.to_csv(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [w.name for w in report.weights]
    assert rows[0] == {
        "name": "model.layers.0.mlp.experts.gate_up_proj",
        "shape": "4x192x64",
        "pattern": "1:2:32",
        "bytes_before": "98304",
        "bytes_after": "30000",
        "error": "0.5",
        "output_error": "0.125",
        "tokens_min": "17",
        "tokens_median": "700.0",
        "tokens_max": "4000",
        "seconds": "1.5",
        "notes": "expert 1: only 17 calibration tokens, shrunk to the layer's",
    }


def test_csv_cells_are_empty_where_nothing_was_measured(tmp_path: Path) -> None:
    bare = weight(0, error=math.nan, output_error=None, tokens=(), seconds=None, notes=())
    PatchReport((bare,), (), "magnitude").to_csv(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().splitlines()[1] == (
        "model.layers.0.mlp.experts.gate_up_proj,4x192x64,1:2:32,98304,30000,,,,,,,"
    )


@pytest.mark.parametrize("method", ["to_csv", "to_json"])
def test_a_file_that_cannot_be_written(method: str, report: PatchReport, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be writable"):
        getattr(report, method)(tmp_path / "missing" / "a")


# --- the plot ------------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure that is written, for a look at its lines."""
    figure = pytest.importorskip("matplotlib.figure")
    written: list[Any] = []
    savefig = figure.Figure.savefig

    def keep(self: Any, *args: Any, **kwargs: Any) -> None:
        written.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(figure.Figure, "savefig", keep)
    return written


def drawn(figure: Any) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Points by panel and line."""
    return {
        axis.get_ylabel(): {
            line.get_label(): [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]
            for line in axis.lines
        }
        for axis in figure.axes
    }


def test_plot(report: PatchReport, figures: list[Any], tmp_path: Path) -> None:
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")):
        report.plot(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    panels = drawn(figures[0])
    assert list(panels) == [
        "error of the outputs",
        "error of the weights",
        "tokens of an expert",
        "seconds",
    ]
    gate_up, down = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
    assert panels["error of the outputs"] == {
        gate_up: [(0, 0.125), (10, 0.225)],
        down: [(0, 0.125), (10, 0.225)],
    }
    assert panels["error of the weights"][down] == [(0, 0.5), (10, 0.6)]
    assert panels["tokens of an expert"][f"fewest, {down}"] == [(0, 17), (10, 17)]
    assert panels["tokens of an expert"][f"median, {gate_up}"] == [(0, 700), (10, 705)]
    assert panels["seconds"][gate_up] == [(0, 1.5), (10, 1.5)]
    title = figures[0].get_suptitle()
    assert "admm, refined, recovered by block" in title
    assert "64 x 512 tokens of novels.txt, seed 3" in title


def test_plot_without_calibration(plain: PatchReport, figures: list[Any], tmp_path: Path) -> None:
    plain.plot(tmp_path / "a.png")
    assert list(drawn(figures[0])) == ["error of the weights"]


def test_experts_that_are_weights_of_their_own_count_together(
    figures: list[Any], tmp_path: Path
) -> None:
    names = [f"model.layers.2.mlp.experts.{expert}.w1" for expert in range(3)]
    names += ["model.layers.2.mlp.shared_experts.up_proj", "lm_head"]
    weights = [
        weight(0, name=name, error=0.1 * i, tokens=(10 * i + 1,), seconds=i)
        for i, name in enumerate(names)
    ]
    PatchReport(tuple(weights), (), "wanda").plot(tmp_path / "a.png")
    panels = drawn(figures[0])
    assert panels["error of the weights"] == {
        "mlp.experts.w1": [(2, pytest.approx(0.1))],
        "mlp.shared_experts.up_proj": [(2, pytest.approx(0.3))],
        "lm_head": [(0, pytest.approx(0.4))],
    }
    assert panels["tokens of an expert"]["fewest, mlp.experts.w1"] == [(2, 1)]
    assert panels["tokens of an expert"]["median, mlp.experts.w1"] == [(2, 11)]
    assert panels["seconds"]["mlp.experts.w1"] == [(2, 3)]


@pytest.mark.parametrize("name", ["a.txt", "a.xyz", "missing/a.png"])
def test_a_plot_that_cannot_be_written(name: str, report: PatchReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(SamoyedsError, match=r"must be a \.png, \.svg or \.pdf file in an existing"):
        report.plot(tmp_path / name)


def test_a_plot_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(SamoyedsError, match="at least one weight"):
        PatchReport((), (), "magnitude").plot(tmp_path / "a.png")


def test_a_plot_without_matplotlib(
    report: PatchReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    import_module = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return import_module(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(SamoyedsError, match=r"pip install 'samoyeds-hf\[plots\]'"):
        report.plot(tmp_path / "a.png")


# --- the command ---------------------------------------------------------------------------------


def test_command_on_a_converted_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = convert(save_dense(MIXTRAL, tmp_path / "dense"), tmp_path / "out")
    capsys.readouterr()
    files = {kind: tmp_path / f"a.{kind}" for kind in ("csv", "json")}
    assert report_command(tmp_path / "out", **files) == report
    written = "".join(f"written: {path}\n" for path in files.values())
    assert capsys.readouterr().out == f"{report}\n{written}"
    assert files["json"].read_text() == (tmp_path / "out" / REPORT_FILE).read_text()
    assert len(files["csv"].read_text().splitlines()) == 1 + len(report.weights)


def test_command_draws(report: PatchReport, figures: list[Any], tmp_path: Path) -> None:
    report.to_json(tmp_path / REPORT_FILE)
    report_command(tmp_path, plot=tmp_path / "a.png")
    assert len(figures) == 1
    assert not (tmp_path / "a.csv").exists()


# --- the card ------------------------------------------------------------------------------------


def test_card_says_how_a_calibrated_checkpoint_was_made(report: PatchReport) -> None:
    section = pruning_section(report, "mine", "org/dense")
    assert section.splitlines()[2:-3] == [
        "- method: `admm`, refined by least squares on the weights that are kept, then trained, "
        "whole layers one by one, towards the dense model's with the mask held (`block`)",
        "- calibration: 64 x 512 tokens of novels.txt, seed 3",
        f"- sha256 of the calibration tokens: `{DIGEST}`",
        "- calibration tokens of an expert: 17 at least, 700 median",
        "- relative Frobenius error of the weights: 0.5500 on average, 0.6000 at most",
        "- relative squared error of the outputs on the calibration data: 0.1750 on average, "
        "0.2250 at most",
        "- left dense: `model.layers.1.mlp.experts`: left dense by an override",
        *(f"- note: {note}" for note in report.notes),
    ]
    assert "samoyeds eval mine --tasks ... --against org/dense" in section
    assert "/home/me" not in section


def test_card_without_calibration_does_not_mention_it(plain: PatchReport) -> None:
    assert "calibration" not in pruning_section(plain, "mine", "dense")


def test_card_names_patterns_that_differ(plain: PatchReport) -> None:
    assert "- patterns" not in pruning_section(plain, "mine", "dense")
    mixed = (*plain.weights, weight(2, pattern="2:4"))
    section = pruning_section(replace(plain, weights=mixed), "mine", "dense")
    assert "- patterns: `1:2:32` for 2 of 3 weights, `2:4` for 1 of 3 weights" in section


def test_card_of_a_checkpoint_made_from_another(report: PatchReport, tmp_path: Path) -> None:
    convert(save_dense(MIXTRAL, tmp_path / "dense"), tmp_path / "old")
    text = (tmp_path / "old" / "README.md").read_text()
    new = updated_card(text, replace(report, recover="distill"), "new", "dense")
    assert new.count("## How it was pruned") == new.count("## What was done") == 1
    assert yaml.safe_load(new.split("---\n")[1]) == yaml.safe_load(text.split("---\n")[1])
    assert "distilled from the dense model with the mask held (`distill`)" in new
    assert "# new, made sparse with Samoyeds\n" in new
    assert 'AutoModelForCausalLM.from_pretrained("new")' in new
    assert "old" not in new.replace("threshold", "")
    assert updated_card(new, replace(report, recover="distill"), "new", "dense") == new
    followed = new + "\n## Licence\n\nMine.\n"
    again = updated_card(followed, report, "new", "dense")
    assert again.endswith("\n## Licence\n\nMine.\n")
    assert "(`block`)" in again
    assert "(`distill`)" not in again
    assert updated_card("My own card.", report, "new", "dense").startswith(
        "My own card.\n\n## How it was pruned\n"
    )
