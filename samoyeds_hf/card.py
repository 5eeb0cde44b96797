"""The model card (README.md with front matter) of a converted checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import yaml

import samoyeds_hf
from samoyeds_hf.report import format_bytes
from samoyeds_hf.shards import write_text

if TYPE_CHECKING:
    from samoyeds_hf.plan import ConversionPlan
    from samoyeds_hf.report import PatchReport

_BODY = """\
# {name}, made sparse with Samoyeds

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
**{pattern}** ({density:.0%} of the weights are kept) with the method `{method}` and stored in the
Samoyeds format, version {version}, by samoyeds-hf {package}.

| | dense | sparse |
|---|---|---|
| pruned weights | {weights_before} | {weights_after} |
| whole model | {before} | {after} |

Relative Frobenius error of the pruned weights: {error:.4f} on average, {worst:.4f} at most (per
weight in `samoyeds_report.json`). This says nothing about the quality of the model's answers:
measure that with `samoyeds eval {name} --tasks ... --against {base}`.

{skipped}"""


def write_card(directory: Path, plan: ConversionPlan, report: PatchReport, source: str) -> None:
    """Write README.md: base model, licence, what was done, how to load it."""
    base = source if not Path(source).exists() else Path(source).resolve().name
    name = directory.name.removesuffix(".partial")
    front = {"library_name": "transformers", "tags": ["samoyeds", "moe", "sparse"]}
    if not Path(source).exists():
        front["base_model"] = source
    front.update(_licence(plan.source / "README.md"))
    skipped = "\n".join(f"- left dense: `{s.name}`: {s.reason}" for s in report.skipped)
    body = _BODY.format(
        name=name,
        base=base,
        pattern=plan.config.pattern,
        density=plan.config.pattern.density,
        method=plan.config.method,
        version=plan.config.format_version,
        package=samoyeds_hf.__version__,
        weights_before=format_bytes(report.bytes_before),
        weights_after=format_bytes(report.bytes_after),
        before=format_bytes(plan.bytes_before),
        after=format_bytes(plan.bytes_after),
        error=report.error,
        worst=max(weight.error for weight in report.weights),
        skipped=skipped,
    )
    header = yaml.safe_dump(front, sort_keys=False)
    write_text(directory / "README.md", f"---\n{header}---\n\n{body.rstrip()}\n")


def _licence(readme: Path) -> dict[str, str]:
    """The licence that the source's own card names."""
    try:
        _, front, _ = readme.read_text(encoding="utf-8").split("---\n", 2)
        content = yaml.safe_load(front)
        return {key: str(content[key]) for key in ("license", "license_name") if key in content}
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}
