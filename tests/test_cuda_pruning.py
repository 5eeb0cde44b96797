"""Calibrated pruning on a GPU: what the CPU gives, in bounded memory. Needs a CUDA device."""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from checkpoints import contents
from tiny_models import BY_NAME, PATTERN, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

import samoyeds_hf
from samoyeds_hf import SamoyedsConfig, resources
from samoyeds_hf.convert import convert_checkpoint
from samoyeds_hf.corpus import perplexity, python_files, read_texts, token_stream
from samoyeds_hf.errors import CalibrationError
from samoyeds_hf.pattern import SparsityPattern
from samoyeds_hf.pruning import METHODS, SecondMoments, prune_experts
from samoyeds_hf.pruning.distill import distill
from samoyeds_hf.pruning.distill_settings import DistillSettings
from samoyeds_hf.pruning.masks import kept_masks
from samoyeds_hf.pruning.masters import Masters
from samoyeds_hf.pruning.recorded import RecordedPasses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TINY_MOE = resources.demo_model()
CALIBRATION = {"data": "python-stdlib", "samples": 24, "sequence_length": 256}


def config(method: str = "best", **settings: object) -> SamoyedsConfig:
    return SamoyedsConfig("1:2:64", method, calibration=CALIBRATION, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "magnitude"])
@pytest.mark.parametrize("pattern", ["1:2:32", "2:4", "3:4:64"])
def test_methods_find_errors_as_small_as_on_the_cpu(method: str, pattern: str) -> None:
    torch.manual_seed(0)
    moments = SecondMoments(3, 256)
    mixing = torch.randn(256, 256) / 16
    for expert in range(3):
        moments.add(expert, torch.randn(600, 256) @ mixing + 0.1 * torch.randn(600, 256))
    moments.tokens[2] = 0  # one that no token reached
    weight = (torch.randn(3, 64, 256) / 16).to(torch.bfloat16)
    chosen = SparsityPattern.parse(pattern)
    on_cpu = prune_experts(weight, chosen, moments.shrunk(), method=method, refine=True)
    on_gpu = SecondMoments(3, 256, device="cuda")
    on_gpu.sums.copy_(moments.sums)
    on_gpu.tokens = moments.tokens
    found = prune_experts(weight.cuda(), chosen, on_gpu.shrunk(), method=method, refine=True)
    assert found.mask.float().mean() == chosen.density
    assert bool((found.weight[~found.mask] == 0).all())
    # other orders of summation choose other masks here and there, none better than the other
    torch.testing.assert_close(found.error.cpu(), on_cpu.error, rtol=0.03, atol=1e-6)


KILLED = """\
import os, signal, sys
from samoyeds_hf.conversion_state import ConversionState
from samoyeds_hf.convert import convert_checkpoint
from test_cuda_pruning import TINY_MOE, config
finish = ConversionState.finish
def die(self, *rest):
    finish(self, *rest)
    if self.next_layer == 3:
        os.kill(os.getpid(), signal.SIGKILL)
ConversionState.finish = die
convert_checkpoint(TINY_MOE, sys.argv[1], config("wanda", refine=True), progress=False)
"""


def heldout(model: torch.nn.Module) -> float:
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE)
    return perplexity(model, tokenizer, read_texts(python_files("heldout")), max_tokens=20_000)


def test_a_conversion_is_as_good_as_on_the_cpu(tmp_path: Path) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        convert_checkpoint(TINY_MOE, tmp_path / device, config(), progress=False, device=device)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / device, device_map="cuda")
        found[device] = heldout(model)
    assert found["cuda"] == pytest.approx(found["cpu"], rel=0.03)


def test_perplexity_through_the_kernels_is_the_masked_dense_models() -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, device_map="cuda")
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE)
    stream = token_stream(tokenizer, read_texts(python_files("train"))[:40])
    calibration = stream[: 24 * 256].view(24, 256)
    samoyeds_hf.patch_model(model, config=config(), calibration=calibration)
    sparse = heldout(model)
    reference = copy.deepcopy(model)
    samoyeds_hf.unpatch_model(reference)
    dense = heldout(reference)
    exact = heldout(reference.float())
    noise = abs(math.log(dense / exact))
    assert abs(math.log(sparse / exact)) <= 2 * noise + 0.002


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("train", ["all", "experts"])
def test_recorded_passes_are_those_that_run_one_by_one(name: str, train: str) -> None:
    teacher = BY_NAME[name].make(torch.bfloat16).cuda()
    student = copy.deepcopy(teacher)
    samoyeds_hf.patch_model(student, pattern=PATTERN)
    masks = kept_masks(student)
    samoyeds_hf.unpatch_model(student)
    text = tokens(batch=10, length=12)
    # 12 steps: some before the recording, then each batch twice
    settings = DistillSettings(
        steps=12, batch_size=2, learning_rate=1e-3, held_back=0.0, train=train
    )
    rows: dict[bool, list[Mapping[str, float]]] = {False: [], True: []}
    for cuda_graph, found in rows.items():
        trained = copy.deepcopy(student)
        distill(trained, teacher, text, masks, settings, log=found.append, cuda_graph=cuda_graph)
        for weight_name, mask in masks.items():
            weight = trained.get_parameter(weight_name)
            assert not weight[~mask].any()
            assert not torch.equal(weight, student.get_parameter(weight_name))
    for column in ("loss", "hidden_error", "gradient_norm"):
        plain, recorded = ([row[column] for row in rows[key]] for key in (False, True))
        assert recorded == pytest.approx(plain, rel=0.03)  # sums in other orders, in bf16
        assert len(set(recorded)) == 12


def test_passes_that_wait_for_the_gpu_are_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(4, device="cuda"))
    passes = RecordedPasses(
        lambda ids: ids.sum() * weight.sum().item(), Masters({"w": weight}, {}), weight.device
    )
    text = tokens().cuda()
    for _ in range(3):
        assert passes(text) == 4 * text.sum()
    with pytest.raises(CalibrationError, match="passes that do not wait for the GPU"):
        passes(text)
    assert weight.sum() == 4  # the GPU goes on


def test_a_killed_conversion_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    convert_checkpoint(TINY_MOE, whole, config("wanda", refine=True), progress=False)
    here, path = str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(stopped)],
        env={**os.environ, "PYTHONPATH": f"{here}:{path}"},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    convert_checkpoint(TINY_MOE, stopped, config("wanda", refine=True), progress=False, resume=True)
    assert contents(stopped) == contents(whole)
