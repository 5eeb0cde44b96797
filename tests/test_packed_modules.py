"""Modules on packed weights: everything but the kernels sees canonical tensors.

No GPU is needed: emulated_kernels serves the CPU.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import emulated_kernels
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from packaging import version
from tiny_models import BY_NAME, FAMILIES, MIXTRAL, PATTERN, logits, make_toy, same_state
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import samoyeds_hf
from samoyeds_hf import SamoyedsConfig, packed
from samoyeds_hf.errors import KernelError
from samoyeds_hf.experts import SparseModule

pytestmark = pytest.mark.roundtrip

BF16 = torch.bfloat16
CONFIG = SamoyedsConfig(PATTERN, modules=["experts", "shared_experts"], strict=False)


class Both(NamedTuple):
    """The same sparse model twice."""

    canonical: PreTrainedModel
    packed: PreTrainedModel


def sparse(name: str) -> PreTrainedModel:
    model = make_toy().to(BF16) if name == "toy" else BY_NAME[name].make(BF16)
    samoyeds_hf.patch_model(model, config=CONFIG)
    return model


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The CPU is a device that kernels serve, until this is undone."""
    emulated_kernels.install(monkeypatch)
    return monkeypatch


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Both:
    canonical = sparse("mixtral")
    assert not any(module.is_packed for module in modules_of(canonical))
    emulated_kernels.install(monkeypatch)
    return Both(canonical, sparse("mixtral"))


def modules_of(model: nn.Module) -> list[SparseModule]:
    return [module for module in model.modules() if isinstance(module, SparseModule)]


def is_packed(model: nn.Module) -> bool:
    states = {module.is_packed for module in modules_of(model)}
    assert len(states) == 1
    return states.pop()


def files_in(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


# --- what a packed model is ------------------------------------------------------------------

WITH_TOY = [family.name for family in FAMILIES] + ["toy"]


@pytest.mark.parametrize("name", WITH_TOY)
def test_logits_and_tensors_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    canonical = sparse(name)
    emulated_kernels.install(monkeypatch)
    model = sparse(name)
    assert is_packed(model)
    assert torch.equal(logits(model), logits(canonical))
    assert same_state(model, canonical)  # names, their order, dtypes and bits
    assert list(model.state_dict()) == list(canonical.state_dict())


def test_parameters(both: Both) -> None:
    for module, other in zip(modules_of(both.packed), modules_of(both.canonical), strict=True):
        parameters = dict(module.named_parameters())
        assert sorted(parameters) == ["down_proj", "gate_up_proj"]
        for name, tensor in parameters.items():
            assert not tensor.requires_grad
            assert (tensor.dtype, tensor.dim(), tensor.shape[0]) == (BF16, 2, 4)
            for part, expected in zip(module.stored(name), other.stored(name), strict=True):
                assert torch.equal(part, expected)
    assert both.packed.dtype == BF16
    assert both.packed.num_parameters() == both.canonical.num_parameters()
    embeddings = {"exclude_embeddings": True}
    assert both.packed.num_parameters(**embeddings) == both.canonical.num_parameters(**embeddings)
    assert both.packed.num_parameters(True) == both.canonical.num_parameters(True)
    held = sum(p.numel() * p.element_size() for p in both.packed.parameters())
    assert both.packed.get_memory_footprint(return_buffers=False) == held
    assert "SamoyedsExperts(4 experts, H=64, I=128, 1:2 × V=32, packed)" in str(both.packed)
    assert "packed" not in str(both.canonical)


def test_one_weight_at_a_time(kernels: pytest.MonkeyPatch) -> None:
    """When a weight is packed, the one before it has no canonical tensors any more; and back."""
    module = modules_of(sparse("mixtral"))[0]
    seen: dict[str, list[Any]] = {"pack": [], "unpack": []}

    def watch(name: str) -> None:
        function = getattr(packed, name)

        def watched(source: Any, spec: Any) -> Any:
            assert [ref() for ref in seen[name]] == [None] * len(seen[name])
            first = source[0] if isinstance(source, tuple) else module.get_parameter("gate_up_proj")
            if isinstance(source, tuple) or spec.is_gate_up:
                seen[name].append(weakref.ref(first))
            del first
            return function(source, spec)

        kernels.setattr(packed, name, watched)

    watch("pack")
    watch("unpack")
    module.unpack_()
    assert not module.is_packed
    assert module.pack_() is None
    assert len(seen["pack"]) == 2
    assert len(seen["unpack"]) == 1


def test_compile_without_graph_break(both: Both) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(both.packed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(both.canonical))
    experts = torch.compile(
        modules_of(both.packed)[0], fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for tokens in (3, 5, 4):
        hidden = torch.randn(tokens, 64).to(BF16)
        routing = (torch.randint(0, 5, (tokens, 2)), torch.rand(tokens, 2))
        expected = modules_of(both.canonical)[0](hidden, *routing)
        assert torch.equal(experts(hidden, *routing), expected)


def test_cuda_graphs_of_compile_do_not_copy_the_weights(both: Both) -> None:
    """Parameters are marked as staying where they are; else each replay would copy them."""
    static = {}

    def backend(graph: Any, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                marks = node.meta.get("tensor_dict", {})
                static[node.name] = "_dynamo_static_input_type" in marks
        return graph.forward

    torch._dynamo.reset()
    experts = torch.compile(modules_of(both.packed)[0], fullgraph=True, backend=backend)
    experts(torch.randn(3, 64).to(BF16), torch.randint(0, 4, (3, 2)), torch.rand(3, 2))
    assert sum(static.values()) == 2
    assert all(is_static == ("proj" in name) for name, is_static in static.items())


@pytest.mark.parametrize("name", ["minimax_m3", "toy"])
def test_compile_own_gate_and_linear(name: str, kernels: pytest.MonkeyPatch) -> None:
    model = sparse(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model))


# --- save and load ---------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"max_shard_size": "30KB"}], ids=["one file", "shards"])
def test_saves_the_same_files(both: Both, settings: dict[str, Any], tmp_path: Path) -> None:
    both.canonical.save_pretrained(tmp_path / "canonical", **settings)
    addresses = [parameter.data_ptr() for parameter in both.packed.parameters()]
    both.packed.save_pretrained(tmp_path / "packed", **settings)
    assert files_in(tmp_path / "packed") == files_in(tmp_path / "canonical")
    assert is_packed(both.packed)  # as it was: CUDA graphs hold its addresses
    assert [parameter.data_ptr() for parameter in both.packed.parameters()] == addresses


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "minimax_m3"])
def test_from_pretrained_packs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    BY_NAME[name].make(BF16).save_pretrained(tmp_path / "dense")
    canonical = sparse(name)
    canonical.save_pretrained(tmp_path / "sparse")
    emulated_kernels.install(monkeypatch)
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "sparse"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=CONFIG),
    ):
        assert is_packed(model)
        assert same_state(model, canonical)
        assert torch.equal(logits(model.eval()), logits(canonical))
        model.save_pretrained(tmp_path / "again", max_shard_size="30KB")
        canonical.save_pretrained(tmp_path / "expected", max_shard_size="30KB")
        assert files_in(tmp_path / "again") == files_in(tmp_path / "expected")
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32)
    assert not is_packed(full)


def test_load_state_dict(both: Both) -> None:
    other = BY_NAME["mixtral"].make(BF16, seed=1)
    samoyeds_hf.patch_model(other, config=CONFIG)
    assert is_packed(other)
    assert not same_state(other, both.canonical)
    other.load_state_dict(both.canonical.state_dict())
    assert is_packed(other)
    assert same_state(other, both.canonical)
    assert torch.equal(logits(other), logits(both.canonical))
    # what it gives it takes, and in the canonical state too
    both.canonical.load_state_dict(other.state_dict())
    other.load_state_dict(copy.deepcopy(both.canonical.state_dict()), assign=True)
    assert is_packed(other)
    assert same_state(other, both.canonical)


def test_load_state_dict_names_what_is_missing(both: Both) -> None:
    state = both.canonical.state_dict()
    gone = "model.layers.0.mlp.experts.down_proj_meta"
    del state[gone]
    state["model.layers.1.mlp.experts.extra"] = torch.ones(1)
    found = both.packed.load_state_dict(state, strict=False)
    assert found.missing_keys == [gone]
    assert found.unexpected_keys == ["model.layers.1.mlp.experts.extra"]
    assert same_state(both.packed, both.canonical)
    with pytest.raises(RuntimeError, match=r"Missing key.*down_proj_meta"):
        both.packed.load_state_dict(state)
    state = both.canonical.state_dict()
    state[gone] = state[gone][:3]
    with pytest.raises(RuntimeError, match=r"size mismatch for .*down_proj_meta"):
        both.packed.load_state_dict(state)
    assert is_packed(both.packed)


@pytest.mark.parametrize(
    ("suffix", "value", "message"),
    [
        ("_meta", 0x44 + 1, r"down_proj_meta\[0, 0, 0\] must hold two nibbles .* found 0x45"),
        ("_index", 2, r"down_proj_index\[0, 0, 0\] must be below M=2, found 2"),
    ],
)
def test_load_state_dict_refuses_damage(both: Both, suffix: str, value: int, message: str) -> None:
    """Nothing that a kernel could not read safely comes in this way either."""
    for model in both:
        state = {name: tensor.clone() for name, tensor in both.canonical.state_dict().items()}
        state["model.layers.1.mlp.experts.down_proj" + suffix].view(-1)[0] = value
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state)
        after = model.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)


# --- moves, casts and copies -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_cast(both: Both, dtype: torch.dtype) -> None:
    for model in both:
        model.to(dtype)
    assert is_packed(both.packed) == (dtype == torch.float16)
    assert same_state(both.packed, both.canonical)
    for model in both:
        model.to(BF16)
    assert is_packed(both.packed)
    assert same_state(both.packed, both.canonical)


def test_moves(both: Both) -> None:
    addresses = [parameter.data_ptr() for parameter in both.packed.parameters()]
    for unchanged in (both.packed.to("cpu"), both.packed.to(BF16), both.packed.bfloat16()):
        assert [parameter.data_ptr() for parameter in unchanged.parameters()] == addresses
    experts = modules_of(both.packed)[0]
    assert not copy.deepcopy(experts).to("meta").is_packed
    state = experts.to_empty(device="meta").state_dict()
    expected = modules_of(both.canonical)[0].state_dict()
    assert list(state) == list(expected)
    assert all(state[name].is_meta for name in state)
    assert all(state[name].shape == expected[name].shape for name in state)


def test_moves_reach_what_is_not_packed(both: Both) -> None:
    """Packed weights that need not change keep nothing else of their module from it."""
    experts = modules_of(both.packed)[0]
    address = experts.get_parameter("gate_up_proj").data_ptr()
    values, meta, index = experts.stored("down_proj")
    experts.store("down_proj", packed.SparseWeight(values.float(), meta, index))
    experts.add_module("adapter", nn.Linear(2, 2))
    experts.to(BF16)
    assert experts.get_parameter("adapter.weight").dtype == BF16
    assert experts.is_packed
    assert experts.get_parameter("gate_up_proj").data_ptr() == address
    del experts._modules["adapter"]
    assert same_state(both.packed, both.canonical)


def test_in_place_changes_reach_the_values(both: Both) -> None:
    """Who writes into every tensor of a module writes into canonical ones."""
    for model in both:
        modules_of(model)[0]._apply(lambda tensor: tensor.data.mul_(2))
    for name in ("gate_up_proj", "down_proj"):
        ours, expected = (modules_of(model)[0].stored(name) for model in both)
        assert torch.equal(ours.values, expected.values)


def test_deepcopy(both: Both) -> None:
    twin = copy.deepcopy(both.packed)
    assert is_packed(twin)
    assert torch.equal(logits(twin), logits(both.canonical))
    samoyeds_hf.unpatch_model(twin)  # the copy only
    assert is_packed(both.packed)
    twin = copy.deepcopy(both.packed)
    assert twin.num_parameters() == both.canonical.num_parameters()
    modules_of(twin)[0].to(torch.float32)
    assert is_packed(both.packed)


def save_and_load(model: PreTrainedModel) -> PreTrainedModel:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: PreTrainedModel = torch.load(buffer, weights_only=False)
    return loaded


def by_pickle(model: PreTrainedModel) -> PreTrainedModel:
    loaded: PreTrainedModel = pickle.loads(pickle.dumps(model))
    return loaded


@pytest.mark.parametrize("transport", [by_pickle, save_and_load])
def test_pickle(both: Both, transport: Any) -> None:
    twin = transport(both.packed)
    assert is_packed(twin)
    assert is_packed(both.packed)
    assert same_state(twin, both.canonical)
    assert torch.equal(logits(twin), logits(both.canonical))


def test_pickle_is_canonical(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without kernels, or with others, reads it."""
    data = pickle.dumps(both.packed)
    monkeypatch.undo()
    twin = pickle.loads(data)
    assert not is_packed(twin)
    assert same_state(twin, both.canonical)
    assert torch.equal(logits(twin), logits(both.canonical))


def test_unpatch(both: Both) -> None:
    for model in both:
        samoyeds_hf.unpatch_model(model)
        assert "num_parameters" not in vars(model)
    assert same_state(both.packed, both.canonical)
    assert not modules_of(both.packed)


def test_store_replaces_a_packed_weight(both: Both) -> None:
    module = modules_of(both.packed)[0]
    stored = module.stored("down_proj")
    halved = stored._replace(values=stored.values / 2)
    module.store("down_proj", halved)
    assert not module.is_packed  # one of two is
    found = module.stored("down_proj")
    assert torch.equal(found.values, halved.values)
    hidden, routing = torch.randn(3, 64).to(BF16), (torch.zeros(3, 1, dtype=torch.long),)
    mixed = module(hidden, *routing, torch.ones(3, 1))
    state = module.state_dict()
    assert module.pack_() is None
    assert torch.equal(module(hidden, *routing, torch.ones(3, 1)), mixed)
    again = module.state_dict()
    assert list(again) == list(state)
    assert all(torch.equal(again[name], state[name]) for name in state)


# --- what is not packed ----------------------------------------------------------------------


def test_full_precision_is_not_packed(kernels: pytest.MonkeyPatch) -> None:
    model = MIXTRAL.make()
    samoyeds_hf.patch_model(model, PATTERN)
    assert not is_packed(model)
    assert modules_of(model)[0].pack_() == "the weights are torch.float32"


def test_offloaded_modules_are_not_packed(both: Both, tmp_path: Path) -> None:
    both.packed.save_pretrained(tmp_path / "sparse")
    device_map = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu"
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "sparse",
        device_map={**device_map, "model.layers.1": "disk"},
        offload_folder=tmp_path / "offload",
    )
    first, second = modules_of(model)
    assert first.is_packed
    assert not second.is_packed
    assert torch.equal(logits(model.eval()), logits(both.canonical))
    assert not second.is_packed
    model.save_pretrained(tmp_path / "again")
    both.canonical.save_pretrained(tmp_path / "canonical")
    saved, expected = (files_in(tmp_path / name) for name in ("again", "canonical"))
    assert saved["model.safetensors"] == expected["model.safetensors"]


def test_accelerate_hooks(kernels: pytest.MonkeyPatch) -> None:
    """One that only moves inputs changes nothing; one that offloads keeps a module canonical."""
    module = modules_of(sparse("mixtral"))[0]
    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    module.unpack_()
    assert module.pack_() is None
    remove_hook_from_module(module)
    module.unpack_()
    module._hf_hook = AlignDevicesHook(execution_device="cpu", offload=True)
    assert module.pack_() == "accelerate offloads the weights"
    assert not module.is_packed


def test_tensors_of_unknown_kind_are_not_packed(kernels: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = modules_of(sparse("mixtral"))[0]
    module.unpack_()
    with FakeTensorMode() as mode:
        for key, parameter in list(module._parameters.items()):
            assert parameter is not None
            module._parameters[key] = nn.Parameter(mode.from_tensor(parameter), False)
        reason = module.pack_()
    assert reason is not None
    assert reason.startswith("a weight is a Fake")


def test_packed_bytes_off_the_gpu_are_not_read(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved by hand, or by accelerate, past .to(): an error and no garbage."""
    monkeypatch.undo()  # the library's own functions
    with pytest.raises(KernelError, match="read on a CUDA device, found it on cpu"):
        both.packed.state_dict()


# --- more than one process -------------------------------------------------------------------


@pytest.mark.slow
def test_expert_parallel(tmp_path: Path) -> None:
    """Each rank packs its own experts; their canonical tensors are still split over the ranks."""
    if version.parse(transformers.__version__) < version.parse("5.16"):
        pytest.skip("DistributedConfig shards experts from transformers 5.16 on")
    expected = {name: sparse(name) for name in ("mixtral", "deepseek_v3")}
    for name, model in expected.items():
        model.save_pretrained(tmp_path / name)
    directories = [str(tmp_path / name) for name in expected]
    worker = Path(__file__).with_name("parallel_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(worker), "packed", str(tmp_path / "result.json"), *directories],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = json.loads((tmp_path / "result.json").read_text())
    for directory, model in zip(directories, expected.values(), strict=True):
        report = reports[directory]
        assert "error" not in report, report["error"]
        assert [report[key] for key in ("packed", "split", "same state")] == [True] * 3
        found = torch.tensor(report["logits"])
        torch.testing.assert_close(found, logits(model).float(), rtol=0.05, atol=0.05)
