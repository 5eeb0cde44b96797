"""The plain torch path on a GPU: right, and safe inside CUDA graphs. Needs a CUDA device.

It serves fp32, which the kernels do not; test_cuda_models.py is about bf16 and fp16.
"""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import samoyeds_hf
from samoyeds_hf.format import decode, encode, validate
from samoyeds_hf.pruning.magnitude import magnitude_mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PATTERN = samoyeds_hf.SparsityPattern.parse("1:2:32")


def tiny(dtype: torch.dtype = torch.float32) -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=5,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return MixtralForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_encoding_on_the_gpu_gives_the_bytes_of_the_cpu(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 64, 128).to(dtype)
    mask = magnitude_mask(weight, PATTERN, "w")
    mask_gpu = magnitude_mask(weight.cuda(), PATTERN, "w")
    assert torch.equal(mask, mask_gpu.cpu())
    stored, stored_gpu = encode(weight, mask, PATTERN), encode(weight.cuda(), mask_gpu, PATTERN)
    validate(stored_gpu, PATTERN, weight.shape)
    for ours, theirs in zip(stored, stored_gpu, strict=True):
        assert torch.equal(ours, theirs.cpu())
    assert torch.equal(decode(stored_gpu, PATTERN).cpu(), decode(stored, PATTERN))


@pytest.mark.parametrize("num_tokens", [0, 1, 65])  # nothing, decode, more than one of everything
def test_the_layer_equals_the_cpu(num_tokens: int) -> None:
    model = tiny()
    samoyeds_hf.patch_model(model, config=samoyeds_hf.SamoyedsConfig(PATTERN))
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(num_tokens, 64)
    index = torch.randint(0, 6, (num_tokens, 2))  # 5 is the mark of expert parallel
    weights = torch.rand(num_tokens, 2)
    expected = experts(hidden, index, weights)
    found = experts.cuda()(hidden.cuda(), index.cuda(), weights.cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_captured_graph_repeats_the_eager_result() -> None:
    model = tiny().cuda()
    samoyeds_hf.patch_model(model, config=samoyeds_hf.SamoyedsConfig(PATTERN))
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(7, 64, device="cuda")
    index = torch.randint(0, 6, (7, 2), device="cuda")
    weights = torch.rand(7, 2, device="cuda")
    eager = experts(hidden, index, weights)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        experts(hidden, index, weights)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = experts(hidden, index, weights)
    for seed in range(3):  # other tokens and other experts through the same graph
        torch.manual_seed(seed)
        hidden.copy_(torch.randn(7, 64))
        index.copy_(torch.randint(0, 6, (7, 2)))
        eager = experts(hidden, index, weights)
        captured.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(captured, eager, rtol=1e-5, atol=1e-6)


def test_generate_on_the_gpu_equals_the_cpu() -> None:
    model = tiny()
    samoyeds_hf.patch_model(model, config=samoyeds_hf.SamoyedsConfig(PATTERN))
    prompt = torch.randint(2, 128, (2, 9))
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    expected = model.generate(prompt, **settings)
    model.cuda()
    settings["attention_mask"] = settings["attention_mask"].cuda()
    assert torch.equal(model.generate(prompt.cuda(), **settings).cpu(), expected)
    # A static cache on CUDA makes generate() compile with CUDA graphs.
    static = model.generate(prompt.cuda(), **settings, cache_implementation="static")
    assert torch.equal(static.cpu(), expected)
