"""Registration with nothing imported: fresh processes in which the package is installed.

Installed means a folder on the path with the package and its metadata, entry points included;
test_packaging.py checks that the wheel has the same ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BY_NAME, PATTERN, logits, tokens

import samoyeds_hf
from samoyeds_hf import SamoyedsConfig

pytestmark = pytest.mark.roundtrip

PACKAGE = Path(samoyeds_hf.__file__).parent
ENTRY_POINTS = "[torch.backends]\nsamoyeds_hf = samoyeds_hf.autoload:autoload\n"
FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v3")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages with this one in it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "samoyeds_hf").symlink_to(PACKAGE)
    metadata = (
        folder / f"samoyeds_hf-{version('samoyeds-hf') if _is_installed() else '0'}.dist-info"
    )
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: samoyeds-hf\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


def _is_installed() -> bool:
    try:
        version("samoyeds-hf")
    except ModuleNotFoundError:
        return False
    return True


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sparse checkpoints, and what each must answer."""
    folder = tmp_path_factory.mktemp("models")
    paths = {}
    for name in FAMILIES:
        config = SamoyedsConfig(PATTERN, modules=["experts", "shared_experts"])
        model = BY_NAME[name].make()
        samoyeds_hf.patch_model(model, config=config)
        model.save_pretrained(folder / name)
        torch.save(logits(model), folder / name / "logits.pt")
        paths[name] = folder / name
    model = BY_NAME["mixtral"].make()
    samoyeds_hf.patch_model(model, "2:4")  # no row is dropped: only the columns tell
    model.save_pretrained(folder / "two_of_four")
    torch.save(logits(model), folder / "two_of_four" / "logits.pt")
    paths["two_of_four"] = folder / "two_of_four"
    torch.save(tokens(), folder / "tokens.pt")
    return paths


def run(
    code: str, site: Path | None, *args: Any, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with a PYTHONPATH of that folder alone."""
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("SAMOYEDS", "PYTHONPATH"))
    }
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**inherited, "PYTHONPATH": str(site or ""), **environment},
        cwd=site or "/",
        capture_output=True,
        text=True,
    )


def check(code: str, site: Path | None, *args: Any, **environment: str) -> str:
    """The same, which must succeed; its output."""
    done = run(code, site, *args, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Loads every folder given and prints, as JSON, "same", "other" or the error for each.
LOAD = """
import json, pathlib, sys, torch
from transformers import AutoModelForCausalLM
def outcome(folder):
    try:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # aligned as the expected ones were
    with torch.no_grad():
        found = model(torch.load(folder.parent / "tokens.pt"), use_cache=False).logits
    return "same" if torch.equal(found, torch.load(folder / "logits.pt")) else "other"
print(json.dumps({name: outcome(pathlib.Path(name)) for name in sys.argv[1:]}))
"""


def outcomes(
    code: str, site: Path | None, models: dict[str, Path], **environment: str
) -> list[str]:
    printed = check(code, site, *models.values(), **environment)
    return list(json.loads(printed.splitlines()[-1]).values())


def test_from_pretrained_needs_no_import(site: Path, models: dict[str, Path]) -> None:
    assert outcomes(LOAD, site, models) == ["same"] * len(models)


def test_turned_off_stops_with_an_error(site: Path, models: dict[str, Path]) -> None:
    """Plain transformers must stop at the shapes, never run on experts it made up."""
    for outcome in outcomes(LOAD, site, models, SAMOYEDS_HF_AUTOLOAD="0"):
        assert outcome.startswith("RuntimeError")
        assert "ignore_mismatched_sizes" in outcome
    # An import of the user's own still registers.
    imported = outcomes("import samoyeds_hf\n" + LOAD, site, models, SAMOYEDS_HF_AUTOLOAD="0")
    assert imported == ["same"] * len(models)


def test_without_the_package_stops_with_an_error(models: dict[str, Path]) -> None:
    hidden = "import sys; sys.modules['samoyeds_hf'] = None\n"
    # torch's own variable, so that an installed copy's entry point is not looked for either
    for outcome in outcomes(hidden + LOAD, None, models, TORCH_DEVICE_BACKEND_AUTOLOAD="0"):
        assert outcome.startswith("RuntimeError")
        assert "ignore_mismatched_sizes" in outcome


def test_import_is_light_and_silent(site: Path) -> None:
    code = (
        "import samoyeds_hf, sys\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'patch_model' in dir(samoyeds_hf)\n"
    )
    done = run(code, site)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_torch_stays_light(site: Path) -> None:
    code = (
        "import sys, torch\n"
        "ours = sorted(name for name in sys.modules if name.startswith('samoyeds_hf'))\n"
        "assert ours == ['samoyeds_hf', 'samoyeds_hf.autoload'], ours\n"
        "assert 'transformers' not in sys.modules\n"
    )
    done = run(code, site)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


REGISTERED = (
    "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
    "from transformers import AutoConfig\n"
    "assert 'samoyeds' in AUTO_QUANTIZER_MAPPING\n"
    "assert AutoConfig.for_model('deepseek').model_type == 'deepseek'\n"
)


@pytest.mark.parametrize(
    ("code", "environment"),
    [
        # transformers' modules import torch while they run: torch calls us in the middle of them
        ("from transformers.quantizers.auto import AutoHfQuantizer", {}),
        ("from transformers import AutoConfig; AutoConfig.for_model('deepseek')", {}),
        ("import samoyeds_hf, torch, transformers", {}),
        ("import samoyeds_hf.hf", {}),
        (
            "from transformers import AutoModelForCausalLM, AutoConfig, AutoTokenizer\n"
            "import transformers.quantizers.auto, samoyeds_hf",
            {"SAMOYEDS_HF_AUTOLOAD": "0"},
        ),
        (
            "import torch, transformers.quantizers.auto, samoyeds_hf, samoyeds_hf.autoload\n"
            "samoyeds_hf.autoload.arm(); samoyeds_hf.autoload.arm()",
            {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        ),
    ],
    ids=[
        "quantizers first",
        "AutoConfig alone",
        "samoyeds_hf first",
        "a submodule",
        "turned off, then imported last",
        "armed three times",
    ],
)
def test_order_of_imports(code: str, environment: dict[str, str], site: Path) -> None:
    check(f"{code}\n{REGISTERED}", site, **environment)


def test_hooked_modules_keep_their_source(site: Path) -> None:
    code = (
        "import inspect, torch, transformers.quantizers.auto as auto\n"
        "assert 'AutoHfQuantizer' in inspect.getsource(auto)\n"
        "assert 'class AutoHfQuantizer' in inspect.getsource(auto.AutoHfQuantizer)\n"
        "assert auto.__spec__.origin == auto.__file__\n"
    )
    check(code, site)
