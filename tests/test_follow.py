"""Asymmetric calibration: pruning towards what the dense model does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import contents, save_dense
from tiny_models import MIXTRAL, PATTERN, tokens
from transformers import AutoModelForCausalLM

from samoyeds_hf import SamoyedsConfig, resources
from samoyeds_hf.conversion_state import ConversionState
from samoyeds_hf.convert import convert_checkpoint
from samoyeds_hf.corpus import python_files, read_texts, token_stream
from samoyeds_hf.pattern import SparsityPattern
from samoyeds_hf.pruning.calibration import CalibrationData
from samoyeds_hf.pruning.follow import DAMPING, CrossMoments, follow_dense
from samoyeds_hf.pruning.layer import PruneSettings
from samoyeds_hf.pruning.moments import Hessian, SecondMoments
from samoyeds_hf.pruning.walk import prune_model
from samoyeds_hf.selection import select

CPU = torch.device("cpu")
E, ROWS, K = 3, 5, 8


def gather(
    counts: tuple[int, ...], drift: float
) -> tuple[CrossMoments, Hessian, list[tuple[torch.Tensor, ...]]]:
    """Moments of random tokens in two batches, and the tokens themselves."""
    generator = torch.Generator().manual_seed(0)
    cross, moments, seen = CrossMoments(E, K, CPU), SecondMoments(E, K), []
    for expert, count in enumerate(counts):
        x = torch.randn(count, K, generator=generator)
        z = x + drift * torch.randn(count, K, generator=generator)
        g = torch.rand(count, generator=generator)
        for part in (slice(0, count // 2), slice(count // 2, count)):
            cross.add(expert, x[part], z[part], g[part])
            moments.add(expert, x[part], g[part])
        seen.append((x, z, g))
    return cross, moments.shrunk(shrinkage=0.0), seen


def weight() -> torch.Tensor:
    return torch.randn(E, ROWS, K, generator=torch.Generator().manual_seed(1))


def test_it_is_damped_least_squares() -> None:
    cross, hessian, seen = gather((40, 200, 90), drift=0.5)
    found, notes = follow_dense(weight(), cross, hessian)
    assert notes == [(), (), ()]
    for expert, (x, z, g) in enumerate(seen):
        h, c = (torch.zeros(K, K, dtype=torch.float64) for _ in range(2))
        for t in range(len(x)):
            for i in range(K):
                for j in range(K):
                    h[i, j] += g[t] ** 2 * x[t, i] * x[t, j] / len(x)
                    c[i, j] += g[t] ** 2 * (z[t, i] - x[t, i]) * x[t, j] / len(x)
        h += DAMPING * h.diag().diag()
        dense = weight()[expert]
        expected = dense.double()
        expected = expected + expected @ c @ torch.linalg.inv(h)
        torch.testing.assert_close(found[expert].double(), expected, rtol=1e-4, atol=1e-4)

        losses = [
            float((g.unsqueeze(1) * (z @ dense.T - x @ w.T)).square().sum())
            for w in (found[expert], dense)
        ]
        assert losses[0] < losses[1]


def test_the_same_inputs_leave_the_weights() -> None:
    cross, hessian, _ = gather((40, 3, 90), drift=0.0)
    found, _ = follow_dense(weight(), cross, hessian)
    assert torch.equal(found, weight())


def test_an_expert_without_tokens_stays() -> None:
    cross, hessian, _ = gather((40, 0, 90), drift=0.5)
    found, notes = follow_dense(weight(), cross, hessian)
    assert torch.equal(found[1], weight()[1])
    assert not torch.equal(found[0], weight()[0])
    assert notes[1] == ()


def test_moments_that_cannot_be_factored_leave_the_weights_and_say_so() -> None:
    cross, hessian, _ = gather((40, 40, 90), drift=0.5)
    hessian.matrix[0] = -torch.eye(K)
    found, notes = follow_dense(weight(), cross, hessian)
    assert torch.equal(found[0], weight()[0])
    assert notes == [("its inputs in the dense model could not be followed",), (), ()]
    assert bool(found.isfinite().all())


def test_a_trained_model_ends_nearer_to_the_dense_one() -> None:
    from transformers import AutoTokenizer

    path = resources.demo_model()
    stream = token_stream(
        AutoTokenizer.from_pretrained(path), read_texts(python_files("validation"))[:12]
    )
    calibration, held_out = stream[: 16 * 128].view(16, 128), stream[-4 * 128 :].view(4, 128)
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    patterns = select(dense, SamoyedsConfig("1:2:64")).targets
    with torch.no_grad():
        wanted = dense(held_out).logits.log_softmax(-1)
    found = {}
    for asymmetric in (False, True):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        settings = PruneSettings("wanda", refine=True, asymmetric=asymmetric)
        pruned = prune_model(model, patterns, calibration, settings)
        for weight in pruned:
            kept = model.get_parameter(weight.name) != 0
            assert not bool((kept & ~weight.mask).any())
            assert weight.mask.float().mean() == SparsityPattern.parse("1:2:64").density
        with torch.no_grad():
            logits = model(held_out).logits.log_softmax(-1)
        found[asymmetric] = float((wanted.exp() * (wanted - logits)).sum(-1).mean())
    assert found[True] < 0.9 * found[False]


@pytest.mark.parametrize("stop", [1])
def test_a_conversion_goes_on_with_both_streams(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = save_dense(MIXTRAL, tmp_path / "dense")
    config = SamoyedsConfig(
        PATTERN, "wanda", asymmetric=True, calibration={"data": "x", "samples": 40}
    )
    data = CalibrationData(tokens(40, 17), "0" * 64, "a test")
    monkeypatch.setattr("samoyeds_hf.convert_layers.read_calibration", lambda *_: data)
    convert_checkpoint(dense, tmp_path / "whole", config, progress=False)
    finish = ConversionState.finish

    def fail(self: ConversionState, reports: object, next_layer: int | None = None) -> None:
        finish(self, reports, next_layer)  # type: ignore[arg-type]
        if next_layer == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ConversionState, "finish", fail)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(dense, tmp_path / "stopped", config, progress=False)
    convert_checkpoint(dense, tmp_path / "stopped", config, resume=True, progress=False)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
