"""Whole models on a GPU, with their experts in the kernels: every family, every path in and out.

Two models that round differently may send a token to other experts, and then their logits have
nothing in common. So results are compared where the experts chosen are the same up to there, and
tokens where in addition the margin between the first two is larger than the error allowed.
Needs a CUDA device.
"""

from __future__ import annotations

import copy
import gc
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cuda_helpers import DEVICE, GPU, HALF_DTYPES, kernels, synchronize
from helpers import assert_as_good_as_dense, assert_same_bits
from tiny_models import (
    BY_NAME,
    FAMILIES,
    MIXTRAL,
    PATTERN,
    SIX_FAMILIES,
    Family,
    logits,
    make_toy,
    masked_twin,
    to_dtype,
    tokens,
)
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, MixtralConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import samoyeds_hf
from samoyeds_hf import SamoyedsConfig, SamoyedsExperts
from samoyeds_hf.experts import SamoyedsLinear, SparseModule

pytestmark = GPU

by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
by_six = pytest.mark.parametrize("family", SIX_FAMILIES, ids=lambda family: family.name)
CONFIG = SamoyedsConfig(PATTERN)
STEPS = 8  # tokens that are generated


@pytest.fixture(autouse=True)
def _ready() -> None:
    kernels()


def sparse_modules(model: nn.Module) -> list[SparseModule]:
    found = [module for module in model.modules() if isinstance(module, SparseModule)]
    assert found
    return found


def is_packed(model: nn.Module) -> bool:
    return all(module.is_packed for module in sparse_modules(model))


class Case(NamedTuple):
    """One family in four ways; all hold the same pruned weights."""

    on_cpu: PreTrainedModel  # sparse, canonical
    on_gpu: PreTrainedModel  # sparse, packed
    dense: PreTrainedModel  # on the GPU, in the same dtype
    exact: PreTrainedModel  # dense, on the CPU, in fp32


def make_case(
    family: Family, dtype: torch.dtype = torch.bfloat16, config: SamoyedsConfig = CONFIG
) -> Case:
    dense = family.make(dtype)
    on_cpu = copy.deepcopy(dense)
    samoyeds_hf.patch_model(on_cpu, config=config)
    twin = masked_twin(dense, on_cpu)
    exact = to_dtype(copy.deepcopy(twin), torch.float32)
    on_gpu = copy.deepcopy(on_cpu).to(DEVICE)
    assert is_packed(on_gpu)
    return Case(on_cpu, on_gpu, twin.to(DEVICE), exact)


# --- generate, step by step ------------------------------------------------------------------


class Recording(NamedTuple):
    """What a model generates for B prompts in S steps."""

    tokens: torch.Tensor  # [B, S]
    logits: torch.Tensor  # [B, S, vocabulary]  fp32
    routing: list[torch.Tensor]  # S times [B, ..]: the experts of all tokens of a step, sorted

    @property
    def margins(self) -> torch.Tensor:
        """``[B, S]``: how far the best token is ahead of the second; EOS cannot be chosen."""
        scores = self.logits.clone()
        scores[..., 2] = -torch.inf
        best = scores.topk(2, dim=-1).values
        return best[..., 0] - best[..., 1]


@contextmanager
def recorded_routing(model: PreTrainedModel, names: list[str]) -> Iterator[list[torch.Tensor]]:
    """The experts that each call of each experts module is given."""
    calls: list[torch.Tensor] = []

    def record(_: nn.Module, args: Any, kwargs: Any) -> None:
        given = [*args, *kwargs.values()]
        (index,) = (
            value for value in given if torch.is_tensor(value) and value.dtype == torch.int64
        )
        calls.append(index.cpu().sort(dim=-1).values)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(record, with_kwargs=True)
        for name in names
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def generate(model: PreTrainedModel, prompts: torch.Tensor, **settings: Any) -> Any:
    prompts = prompts.to(model.device)
    return model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )


def record(
    model: PreTrainedModel, prompts: torch.Tensor, names: list[str] | tuple = ()
) -> Recording:
    """Generates eagerly and watches the experts of these names."""
    with recorded_routing(model, list(names)) as calls:
        out = generate(model, prompts)
    batch = prompts.shape[0]
    steps = [
        torch.cat([call.view(batch, -1) for call in calls[step * len(names) :][: len(names)]], 1)
        for step in range(STEPS if names else 0)
    ]
    assert len(calls) == STEPS * len(names)
    return _recording(out, prompts, steps)


def _recording(out: Any, prompts: torch.Tensor, routing: list[torch.Tensor]) -> Recording:
    scores = torch.stack([step.float().cpu() for step in out.logits], dim=1)
    return Recording(out.sequences[:, prompts.shape[1] :].cpu(), scores, routing)


def comparable(one: Recording, other: Recording) -> torch.Tensor:
    """``[B, S]``: until here both saw the same tokens and sent them to the same experts."""
    same = torch.ones_like(one.tokens, dtype=torch.bool)
    same[:, 1:] = one.tokens[:, :-1] == other.tokens[:, :-1]
    for step, (left, right) in enumerate(zip(one.routing, other.routing, strict=True)):
        same[:, step] &= (left == right).all(dim=1)
    return same.cumprod(dim=1).bool()


def check_generation(case: Case) -> None:
    """Logits within twice the error of dense torch, and the tokens of fp32 where they are safe."""
    names = [
        name for name, module in case.on_gpu.named_modules() if isinstance(module, SamoyedsExperts)
    ]
    prompts = tokens(batch=32, length=4)
    ours, dense, exact = (
        record(model, prompts, names) for model in (case.on_gpu, case.dense, case.exact)
    )
    assert ours.logits.isfinite().all()
    with_dense, with_ours = comparable(dense, exact), comparable(ours, exact)
    for steps in (with_dense, with_ours):
        assert steps.float().mean() > 0.2, "too few steps to compare"
    dense_error = (dense.logits - exact.logits).abs().amax(dim=-1)[with_dense].max()
    rounding = torch.finfo(case.on_gpu.dtype).eps * exact.logits.abs().max()
    allowed = 2 * dense_error + rounding
    found = (ours.logits - exact.logits).abs().amax(dim=-1)[with_ours].max()
    assert found <= allowed, f"error {found:.3g}, allowed {allowed:.3g}"
    # Both logits may be off by what is allowed.
    is_safe = with_ours & (exact.margins > 2 * allowed)
    assert torch.equal(ours.tokens[is_safe], exact.tokens[is_safe])


def assert_same_where_clear(found: Recording, expected: Recording) -> None:
    """The same tokens up to the first step whose margin is within a few roundings."""
    is_clear = expected.margins > 0.03 * expected.logits.abs().max()
    until = is_clear.cumprod(dim=1).bool()
    assert until.sum() >= expected.tokens.shape[0] // 2, "too few steps to compare"
    assert torch.equal(found.tokens[until], expected.tokens[until])


@by_family
def test_generation_of_every_family(family: Family) -> None:
    check_generation(make_case(family))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2", "minimax_m3"])
def test_generation_in_fp16(name: str) -> None:
    check_generation(make_case(BY_NAME[name], torch.float16))


@pytest.mark.parametrize("pattern", ["2:4", "3:4:32", "1:2:16", "4:8:32", "2:2:32"])
def test_generation_with_other_patterns(pattern: str) -> None:
    check_generation(make_case(MIXTRAL, config=SamoyedsConfig(pattern)))


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_shared_experts(name: str) -> None:
    """SamoyedsLinear runs on the same kernels, with one expert."""
    config = SamoyedsConfig(PATTERN, modules=["experts", "shared_experts"])
    case = make_case(BY_NAME[name], config=config)
    assert any(isinstance(module, SamoyedsLinear) for module in sparse_modules(case.on_gpu))
    check_generation(case)


def test_experts_that_are_a_list_of_modules() -> None:
    """The fallback: every Linear of every expert by itself."""
    dense = make_toy().bfloat16()
    sparse = copy.deepcopy(dense)
    samoyeds_hf.patch_model(sparse, config=SamoyedsConfig(PATTERN, strict=False))
    exact = masked_twin(dense, sparse)
    expected = exact.float()(tokens()).logits
    twin = masked_twin(dense, sparse).to(DEVICE)
    sparse.to(DEVICE)
    assert is_packed(sparse)
    ids = tokens().to(DEVICE)
    with torch.no_grad():
        ours, in_dtype = sparse(ids).logits.cpu(), twin(ids).logits.cpu()
    assert_as_good_as_dense(ours, in_dtype, expected.double())


@by_six
def test_fp32_tokens_equal_the_cpu(family: Family) -> None:
    """The plain path, on both."""
    model = family.make()
    samoyeds_hf.patch_model(model, config=CONFIG)
    prompts = tokens(batch=4, length=7)
    expected = record(model, prompts)
    model.to(DEVICE)
    assert not any(module.is_packed for module in sparse_modules(model))
    found = record(model, prompts)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-3, atol=1e-3)


# --- the experts of every family -------------------------------------------------------------


@by_family
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=["bf16", "fp16"])
def test_experts_of_every_family(family: Family, dtype: torch.dtype) -> None:
    """With gates of their own, and with what other ranks own marked by E and a weight of zero."""
    model = family.make(dtype).to(DEVICE)
    samoyeds_hf.patch_model(model, config=CONFIG)
    assert is_packed(model)
    rng = torch.Generator().manual_seed(0)
    for module in sparse_modules(model):
        assert isinstance(module, SamoyedsExperts)
        assert module.has_fused_gate != (family.name in ("gemma4", "minimax_m3", "hy_v4"))
        experts = module.num_experts
        hidden = torch.randn(65, module.hidden_dim, generator=rng).to(dtype)
        index = torch.randint(0, experts + 1, (65, 3), generator=rng)
        weights = torch.rand(65, 3, generator=rng).masked_fill(index == experts, 0).to(dtype)
        dense = module.to_dense()
        here = index.clamp(max=experts - 1)  # the same with weight zero, for who has no mark
        with torch.no_grad():
            ours = module(hidden.to(DEVICE), index.to(DEVICE), weights.to(DEVICE)).cpu()
            in_dtype = dense(hidden.to(DEVICE), here.to(DEVICE), weights.to(DEVICE)).cpu()
            exact_module = copy.deepcopy(dense).cpu().float()
            exact = exact_module(hidden.float(), here, weights.float())
        assert_as_good_as_dense(ours, in_dtype, exact.double(), family.name)


def test_a_router_in_fp32_and_activations_in_another_dtype() -> None:
    """fp32 activations beside bf16 experts come back in fp32."""
    model = MIXTRAL.make(torch.bfloat16).to(DEVICE)
    samoyeds_hf.patch_model(model, config=CONFIG)
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(9, 64, device=DEVICE)
    index = torch.randint(0, 4, (9, 2), device=DEVICE)
    weights = torch.rand(9, 2, device=DEVICE)
    out = experts(hidden, index, weights)
    assert out.dtype == torch.float32
    assert torch.equal(out, experts(hidden.bfloat16(), index, weights).float())


# --- packing, moving, saving -----------------------------------------------------------------


def state_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def assert_same_state(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    """The same canonical tensors under the same names, wherever the models lie."""
    left, right = state_of(found), state_of(expected)
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


def files_in(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


@by_family
def test_patching_on_the_gpu(family: Family, tmp_path: Path) -> None:
    """Packed at once, and saved as the very files that the CPU saves."""
    on_cpu = family.make(torch.bfloat16)
    on_gpu = copy.deepcopy(on_cpu).to(DEVICE)
    for model in (on_cpu, on_gpu):
        samoyeds_hf.patch_model(model, config=CONFIG)
    assert is_packed(on_gpu)
    assert not any(module.is_packed for module in sparse_modules(on_cpu))
    assert_same_state(on_gpu, on_cpu)
    on_cpu.save_pretrained(tmp_path / "cpu")
    on_gpu.save_pretrained(tmp_path / "gpu")
    assert is_packed(on_gpu)
    assert files_in(tmp_path / "gpu") == files_in(tmp_path / "cpu")


def test_saving_in_shards(tmp_path: Path) -> None:
    case = make_case(MIXTRAL)
    case.on_cpu.save_pretrained(tmp_path / "cpu", max_shard_size="50KB")
    case.on_gpu.save_pretrained(tmp_path / "gpu", max_shard_size="50KB")
    assert len(files_in(tmp_path / "gpu")) > 4
    assert files_in(tmp_path / "gpu") == files_in(tmp_path / "cpu")


@by_six
def test_loading_onto_the_gpu(family: Family, tmp_path: Path) -> None:
    dense = family.make(torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    sparse = copy.deepcopy(dense)
    samoyeds_hf.patch_model(sparse, config=CONFIG)
    sparse.save_pretrained(tmp_path / "sparse")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", device_map=DEVICE)
    pruned = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=CONFIG, device_map=DEVICE
    )
    for model in (loaded, pruned):
        assert is_packed(model)
        assert not any(
            p.requires_grad for module in sparse_modules(model) for p in module.parameters()
        )
        assert_same_state(model, sparse)
        assert logits(model, tokens().to(DEVICE)).isfinite().all()
    pruned.save_pretrained(tmp_path / "again")
    again = files_in(tmp_path / "again")
    assert again["model.safetensors"] == (tmp_path / "sparse" / "model.safetensors").read_bytes()


def test_moving_there_and_back() -> None:
    case = make_case(MIXTRAL)
    model, ids = case.on_gpu, tokens()
    there = logits(model, ids.to(DEVICE))
    model.cpu()
    assert not any(module.is_packed for module in sparse_modules(model))
    assert_same_state(model, case.on_cpu)
    assert torch.equal(logits(model, ids), logits(case.on_cpu, ids))
    model.to(DEVICE)
    assert is_packed(model)
    assert_same_bits(logits(model, ids.to(DEVICE)), there)
    model.to(DEVICE)  # nothing to do: packed weights stay where graphs have seen them
    addresses = [p.data_ptr() for module in sparse_modules(model) for p in module.parameters()]
    model.to(DEVICE)
    assert addresses == [p.data_ptr() for m in sparse_modules(model) for p in m.parameters()]


def test_experts_of_another_dtype() -> None:
    """Kernels follow to fp16; fp32 is for the plain path."""
    experts = make_case(MIXTRAL).on_gpu.model.layers[0].mlp.experts
    hidden = torch.randn(33, 64, device=DEVICE)
    routing = torch.randint(0, 4, (33, 2), device=DEVICE), torch.rand(33, 2, device=DEVICE)
    before = experts(hidden.bfloat16(), *routing)
    experts.to(torch.float16)
    assert experts.is_packed
    assert {parameter.dtype for parameter in experts.parameters()} == {torch.float16}
    half = experts(hidden.half(), *routing)
    experts.to(torch.float32)
    assert not experts.is_packed
    exact = experts(hidden, *routing)
    for found in (before, half):
        atol = 2 * torch.finfo(found.dtype).eps * exact.abs().max().item()
        torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=atol)


def test_copies_and_pickles() -> None:
    model = make_case(MIXTRAL).on_gpu
    ids = tokens().to(DEVICE)
    expected = logits(model, ids)
    twin = copy.deepcopy(model)
    assert is_packed(twin)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (twin, loaded):
        assert_same_bits(logits(other, ids), expected)
    with torch.no_grad():
        for module in sparse_modules(twin):
            for parameter in module.parameters():
                parameter.zero_()
    assert_same_bits(logits(model, ids), expected)  # nothing is shared


def test_a_state_dict_goes_in_and_out() -> None:
    model = make_case(MIXTRAL).on_gpu
    ids = tokens().to(DEVICE)
    expected, state = logits(model, ids), state_of(model)
    other = MIXTRAL.make(torch.bfloat16, seed=1).to(DEVICE)
    samoyeds_hf.patch_model(other, config=CONFIG)
    other.load_state_dict(state)
    assert is_packed(other)
    assert_same_bits(logits(other, ids), expected)


def test_a_damaged_state_dict_is_refused() -> None:
    """Neither index nor meta that break the format come near a kernel."""
    model = make_case(MIXTRAL).on_gpu
    name = "model.layers.1.mlp.experts.down_proj"
    expected = state_of(model)
    for suffix, byte in (("_index", 7), ("_meta", 0)):
        damaged = {**expected, name + suffix: expected[name + suffix].clone()}
        damaged[name + suffix][2, 3, 1] = byte
        with pytest.raises((RuntimeError, ValueError), match="damaged"):
            model.load_state_dict(damaged)


def test_unpatching() -> None:
    case = make_case(MIXTRAL)
    samoyeds_hf.unpatch_model(case.on_gpu)
    assert_same_state(case.on_gpu, case.dense)


# --- memory ----------------------------------------------------------------------------------


def test_memory_while_loading_and_patching(tmp_path: Path) -> None:
    """Layer by layer: never twice the model. 0.7 GB dense, 0.2 GB sparse."""
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=8,
        max_position_embeddings=128,
    )
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dense_bytes = _bytes_of(model)
    _reset_peak()
    samoyeds_hf.patch_model(model, "1:2:128")
    synchronize()
    sparse_bytes = _bytes_of(model)
    assert is_packed(model)
    # 0.5 + 0.0625 + 0.004 of a kept half, experts being most of the model
    assert sparse_bytes < 0.35 * dense_bytes
    assert torch.cuda.max_memory_allocated() < 1.5 * dense_bytes
    model.save_pretrained(tmp_path)
    del model
    _reset_peak()
    before = torch.cuda.memory_allocated()
    reserved = torch.cuda.memory_reserved()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=DEVICE)
    synchronize()
    assert is_packed(loaded)
    held = torch.cuda.memory_allocated() - before
    assert held < 1.1 * _bytes_of(loaded)
    assert torch.cuda.max_memory_allocated() - before < 1.5 * held
    assert torch.cuda.max_memory_reserved() - reserved < 2 * held


def _bytes_of(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _reset_peak() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


# --- offload, compilation, batching ----------------------------------------------------------


@pytest.mark.parametrize("elsewhere", ["cpu", "disk"])
def test_offload(elsewhere: str, tmp_path: Path) -> None:
    """A layer whose weights accelerate moves in and out is not packed; the others are."""
    case = make_case(MIXTRAL)
    case.on_gpu.save_pretrained(tmp_path / "sparse")
    device_map: dict[str, Any] = dict.fromkeys(
        ("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb", "model.layers.0"), 0
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "sparse",
        device_map={**device_map, "model.layers.1": elsewhere},
        offload_folder=tmp_path / "offload",
    )
    layers = model.model.layers
    assert layers[0].mlp.experts.is_packed
    assert not layers[1].mlp.experts.is_packed
    check_generation(case._replace(on_gpu=model))


@by_six
def test_compiles_without_graph_break(family: Family) -> None:
    model = make_case(family).on_gpu
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = tokens().to(DEVICE)
    expected = logits(model, ids)
    atol = 0.02 * expected.abs().max().item()
    torch.testing.assert_close(logits(compiled, ids), expected, rtol=0.02, atol=atol)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_generation_with_a_static_cache_and_graphs(name: str) -> None:
    """generate() then compiles decoding with mode="reduce-overhead": CUDA graphs."""
    model = make_case(BY_NAME[name]).on_gpu
    prompts = tokens(batch=16, length=7)
    torch._dynamo.reset()
    settings = {"cache_implementation": "static"}
    eager = generate(model, prompts, **settings, disable_compile=True)
    assert getattr(model, "_compiled_call", None) is None
    # Inductor otherwise rounds less often than eager torch does between two operations.
    with torch._inductor.config.patch(emulate_precision_casts=True):
        for _ in range(2):  # recorded, then replayed
            compiled = generate(model, prompts, **settings)
            found, expected = (_recording(out, prompts, []) for out in (compiled, eager))
            assert_same_where_clear(found, expected)
    assert model._compiled_call is not None
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_continuous_batching(name: str) -> None:
    model = make_case(BY_NAME[name]).on_gpu
    alone = copy.deepcopy(model)
    model.set_attn_implementation("paged|sdpa")
    prompts = [tokens(1, 4 + seed, seed=seed)[0] for seed in range(6)]
    settings = GenerationConfig(max_new_tokens=STEPS, do_sample=False, eos_token_id=-1)
    # The default takes most of the GPU's memory for its cache.
    small = ContinuousBatchingConfig(num_blocks=16, block_size=16, max_batch_tokens=64)
    batched = model.generate_batch(
        [prompt.tolist() for prompt in prompts],
        settings,
        continuous_batching_config=small,
        progress_bar=False,
    )
    results = torch.tensor([result.generated_tokens for result in batched.values()])
    assert results.shape == (len(prompts), STEPS)
    each = [record(alone, prompt[None]) for prompt in prompts]
    expected = Recording(*(torch.cat(parts) for parts in list(zip(*each, strict=True))[:2]), [])
    assert_same_where_clear(expected._replace(tokens=results), expected)


@torch.no_grad()
def test_a_captured_block_follows_its_inputs() -> None:
    """torch.cuda.graph around router and experts, as serving engines do."""
    block = make_case(MIXTRAL).on_gpu.model.layers[0].mlp
    rng = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(2, 9, 64, generator=rng, device=DEVICE).bfloat16()

    def run() -> torch.Tensor:
        out = block(hidden)
        return out[0] if isinstance(out, tuple) else out

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(5):
        hidden.copy_(torch.randn(hidden.shape, generator=rng, device=DEVICE))
        captured.fill_(float("nan"))
        graph.replay()
        assert_same_bits(captured, run())


# --- without kernels -------------------------------------------------------------------------

WITHOUT_KERNELS = """
import sys
import torch
from transformers import AutoModelForCausalLM
from samoyeds_hf.environment import execution_path
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map=sys.argv[3])
experts = model.model.layers[0].mlp.experts
arguments = torch.load(sys.argv[2])
with torch.no_grad():
    out = experts(*(tensor.to(sys.argv[3]) for tensor in arguments)).cpu()
torch.save((out, experts.is_packed, execution_path()), sys.argv[2])
"""


def test_kernels_can_be_turned_off(tmp_path: Path) -> None:
    """SAMOYEDS_HF_KERNELS=0: the plain path on the same GPU, as good."""
    case = make_case(MIXTRAL)
    case.on_gpu.save_pretrained(tmp_path / "sparse")
    arguments = (
        torch.randn(65, 64).bfloat16(),
        torch.randint(0, 4, (65, 2)),
        torch.rand(65, 2).bfloat16(),
    )
    torch.save(arguments, tmp_path / "tensors.pt")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            WITHOUT_KERNELS,
            tmp_path / "sparse",
            tmp_path / "tensors.pt",
            DEVICE,
        ],
        env={**os.environ, "SAMOYEDS_HF_KERNELS": "0"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plain, was_packed, path = torch.load(tmp_path / "tensors.pt")
    assert not was_packed
    assert "plain torch" in path
    assert "SAMOYEDS_HF_KERNELS=0" in path
    on_gpu = [tensor.to(DEVICE) for tensor in arguments]
    with torch.no_grad():
        ours = case.on_gpu.model.layers[0].mlp.experts(*on_gpu).cpu()
        dense = case.dense.model.layers[0].mlp.experts(*on_gpu).cpu()
        exact = case.exact.model.layers[0].mlp.experts(
            arguments[0].float(), arguments[1], arguments[2].float()
        )
    for found in (plain, ours):
        assert_as_good_as_dense(found, dense, exact.double())
