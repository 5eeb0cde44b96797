"""The model card (README.md with front matter) of a converted checkpoint."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

import samoyeds_hf
from samoyeds_hf.pattern import SparsityPattern
from samoyeds_hf.report import format_bytes, shortened
from samoyeds_hf.shards import write_text

if TYPE_CHECKING:
    from samoyeds_hf.plan import ConversionPlan
    from samoyeds_hf.report import PatchReport

_TITLE = "# {name}, made sparse with Samoyeds"
_BODY = """\
{title}

```python
import samoyeds_hf  # not needed where samoyeds-hf is installed and autoload is on
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Install the loader with `pip install samoyeds-hf`. Without it transformers stops with a size
mismatch on the expert weights; that is intended.

## What was done

The weights of the Mixture-of-Experts layers of `{base}` were pruned to the pattern
**{pattern}** ({density:.1%} of the weights are kept) with the method `{method}` and stored in the
Samoyeds format, version {version}, by samoyeds-hf {package}.

| | dense | sparse |
|---|---|---|
| pruned weights | {weights_before} | {weights_after} |
| whole model | {before} | {after} |

{section}"""

_HEADING = "## How it was pruned"
_RECOVERIES = {
    "block": "trained, whole layers one by one, towards the dense model's",
    "distill": "distilled from the dense model",
}
_MOST_NOTES = 20
_CAVEAT = """\
These numbers, per weight in `samoyeds_report.json`, say nothing about the quality of the model's
answers: measure that with `samoyeds eval {name} --tasks ... --against {base}`.
"""


def write_card(directory: Path, plan: ConversionPlan, report: PatchReport, source: str) -> None:
    """Write README.md: base model, licence, what was done, how to load it."""
    base = source if not Path(source).exists() else Path(source).resolve().name
    name = directory.name.removesuffix(".partial")
    front = {"library_name": "transformers", "tags": ["samoyeds", "moe", "sparse"]}
    if not Path(source).exists():
        front["base_model"] = source
    front.update(_licence(plan.source / "README.md"))
    body = _BODY.format(
        title=_TITLE.format(name=name),
        name=name,
        base=base,
        pattern=", ".join(dict.fromkeys(weight.pattern for weight in report.weights)),
        density=_density(report),
        method=plan.config.method,
        version=plan.config.format_version,
        package=samoyeds_hf.__version__,
        weights_before=format_bytes(report.bytes_before),
        weights_after=format_bytes(report.bytes_after),
        before=format_bytes(plan.bytes_before),
        after=format_bytes(plan.bytes_after),
        section=pruning_section(report, name, base),
    )
    header = yaml.safe_dump(front, sort_keys=False)
    write_text(directory / "README.md", f"---\n{header}---\n\n{body.rstrip()}\n")


def _density(report: PatchReport) -> float:
    """Share of the pruned weights' elements that is kept."""
    sizes = [math.prod(weight.shape) for weight in report.weights]
    kept = [
        size * SparsityPattern.parse(weight.pattern).density
        for size, weight in zip(sizes, report.weights, strict=True)
    ]
    return sum(kept) / sum(sizes)


def updated_card(text: str, report: PatchReport, name: str, base: str) -> str:
    """A card that :func:`write_card` wrote, for a checkpoint made from that one with its masks.

    The name and the section of :func:`pruning_section` change; a card without them gets the section
    at its end.

    Args:
        text: of the card.
        report: of the new checkpoint.
        name: of the new checkpoint.
        base: the dense model.
    """
    title = re.search(_TITLE.format(name="(.+)"), text, re.MULTILINE)
    if title is not None:
        text = text.replace(title[0], _TITLE.format(name=name))
        text = text.replace(f'from_pretrained("{title[1]}")', f'from_pretrained("{name}")')
    before, _, section = text.partition(_HEADING)
    _, heading, after = section.partition("\n## ")
    new = pruning_section(report, name, base).rstrip()
    return f"{before.rstrip()}\n\n{new}\n{heading}{after}"


def pruning_section(report: PatchReport, name: str, base: str) -> str:
    """The part of a card that follows from the report: settings, data, errors, what was left.

    Args:
        report: of the checkpoint.
        name: of the checkpoint, as in the command that measures it.
        base: the dense model.
    """
    lines = [f"- method: {_method(report)}"]
    patterns = Counter(weight.pattern for weight in report.weights)
    if len(patterns) > 1:
        total = len(report.weights)
        found = ", ".join(f"`{p}` for {n} of {total} weights" for p, n in patterns.items())
        lines.append(f"- patterns: {found}")
    if report.calibration is not None:
        digest = report.calibration.get("sha256")
        lines.append(f"- calibration: {report.describe_calibration()}")
        lines += [f"- sha256 of the calibration tokens: `{digest}`"] if digest else []
    if report.tokens is not None:
        fewest, middle = report.tokens
        lines.append(f"- calibration tokens of an expert: {fewest} at least, {middle:.0f} median")
    worst = max((weight.error for weight in report.weights), default=0.0)
    lines.append(
        f"- relative Frobenius error of the weights: {report.error:.4f} on average, {worst:.4f} at "
        "most"
    )
    outputs = [w.output_error for w in report.weights if w.output_error is not None]
    if outputs:
        mean = sum(outputs) / len(outputs)
        lines.append(
            f"- relative squared error of the outputs on the calibration data: {mean:.4f} on "
            f"average, {max(outputs):.4f} at most"
        )
    lines += [f"- left dense: `{skip.name}`: {skip.reason}" for skip in report.skipped]
    lines += [f"- note: {note}" for note in shortened(report.notes, _MOST_NOTES)]
    return "\n".join([_HEADING, "", *lines, "", _CAVEAT.format(name=name, base=base)])


def _method(report: PatchReport) -> str:
    words = [f"`{report.method}`"]
    if report.refine:
        words.append("refined by least squares on the weights that are kept")
    if report.asymmetric or report.method == "best":
        words.append("each layer towards what the dense model makes of the same text")
    if report.permute:
        words.append("the neurons of each expert in another order than the dense model's")
    if report.recover is not None:
        words.append(f"then {_RECOVERIES[report.recover]} with the mask held (`{report.recover}`)")
    return ", ".join(words)


def _licence(readme: Path) -> dict[str, str]:
    """The licence that the source's own card names."""
    try:
        _, front, _ = readme.read_text(encoding="utf-8").split("---\n", 2)
        content = yaml.safe_load(front)
        return {key: str(content[key]) for key in ("license", "license_name") if key in content}
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}
