"""Models that transformers does not know: DeepSeek-MoE against its architecture in plain loops."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from samoyeds_hf import hosts
from samoyeds_hf.errors import UnsupportedModelError

# config.json of deepseek-ai/deepseek-moe-16b-base, key by key, with small sizes. The integer
# `rope_theta`, the null `rope_scaling` and `auto_map` are the Hub's.
HUB_CONFIG = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "model_type": "deepseek",
    "moe_intermediate_size": 16,
    "moe_layer_freq": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 96,
}
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"  # noqa: RUF001

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    for register in (hosts.register_configs, hosts.register_models, hosts.register_tokenizers):
        register()
        register()  # again: idempotent


def is_sparse(config: dict, layer: int) -> bool:
    return layer >= config["first_k_dense_replace"] and layer % config["moe_layer_freq"] == 0


def hub_weights(config: dict) -> Weights:
    """Random weights under the Hub's names: a tensor for each matrix of each expert."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    weights: Weights = {}

    def add(name: str, *shape: int) -> None:
        scale = 1.0 if len(shape) == 1 else 1.5 / math.sqrt(shape[-1])
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) * scale

    def add_mlp(name: str, width: int) -> None:
        add(f"{name}.gate_proj", width, hidden)
        add(f"{name}.up_proj", width, hidden)
        add(f"{name}.down_proj", hidden, width)

    add("model.embed_tokens", config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name in "qkvo":
            heads = config["num_key_value_heads" if name in "kv" else "num_attention_heads"]
            width = heads * head
            add(
                f"{layer}.self_attn.{name}_proj",
                *((hidden, width) if name == "o" else (width, hidden)),
            )
            if config["attention_bias"]:
                size = hidden if name == "o" else width
                weights[f"{layer}.self_attn.{name}_proj.bias"] = torch.randn(
                    size, generator=generator
                )
        add(f"{layer}.input_layernorm", hidden)
        add(f"{layer}.post_attention_layernorm", hidden)
        if is_sparse(config, i):
            width = config["moe_intermediate_size"]
            add(f"{layer}.mlp.gate", config["n_routed_experts"], hidden)
            for e in range(config["n_routed_experts"]):
                add_mlp(f"{layer}.mlp.experts.{e}", width)
            add_mlp(f"{layer}.mlp.shared_experts", width * config["n_shared_experts"])
        else:
            add_mlp(f"{layer}.mlp", config["intermediate_size"])
    add("model.norm", hidden)
    add("lm_head", config["vocab_size"], hidden)
    return weights


def write_hub_directory(path: Path, **changes: object) -> tuple[dict, Weights]:
    config = {**HUB_CONFIG, **changes}
    weights = hub_weights(config)
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    for name in ("configuration_deepseek", "modeling_deepseek"):
        # What the Hub ships here cannot run on transformers 5; this must not even be tried.
        (path / f"{name}.py").write_text("raise SystemExit('remote code was executed')\n")
    return config, weights


# --- the original architecture, one token, one head, one expert at a time ----------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def mlp(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    gate = w[f"{name}.gate_proj.weight"] @ x
    up = w[f"{name}.up_proj.weight"] @ x
    return w[f"{name}.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)


def moe(config: dict, w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    scores = torch.softmax(w[f"{name}.gate.weight"] @ x, dim=0)  # over all experts, then the top K
    chosen = sorted(range(len(scores)), key=lambda e: -scores[e].item())
    chosen = chosen[: config["num_experts_per_tok"]]
    total = sum(scores[e] for e in chosen) + 1e-20 if config["norm_topk_prob"] else 1.0
    out = mlp(w, f"{name}.shared_experts", x)
    for e in chosen:
        out = out + scores[e] / total * mlp(w, f"{name}.experts.{e}", x)
    return out


def rotate(config: dict, x: torch.Tensor, position: int) -> torch.Tensor:
    scaling = config["rope_scaling"] or {"factor": 1.0}
    half, out = len(x) // 2, x.clone()
    for i in range(half):
        angle = position / scaling["factor"] / config["rope_theta"] ** (2 * i / len(x))
        cos, sin = math.cos(angle), math.sin(angle)
        out[i] = x[i] * cos - x[i + half] * sin
        out[i + half] = x[i + half] * cos + x[i] * sin
    return out


def attention(config: dict, w: Weights, name: str, xs: list[torch.Tensor]) -> list[torch.Tensor]:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]

    def project(x: torch.Tensor, which: str) -> torch.Tensor:
        out = w[f"{name}.{which}_proj.weight"] @ x
        return out + w[f"{name}.{which}_proj.bias"] if config["attention_bias"] else out

    q = [project(x, "q").view(heads, -1) for x in xs]
    k = [project(x, "k").view(kv_heads, -1) for x in xs]
    v = [project(x, "v").view(kv_heads, -1) for x in xs]
    outs = []
    for t in range(len(xs)):
        parts = []
        for h in range(heads):
            g = h // (heads // kv_heads)
            query = rotate(config, q[t][h], t)
            past = range(t + 1)
            logits = [query @ rotate(config, k[s][g], s) / math.sqrt(len(query)) for s in past]
            probs = torch.softmax(torch.stack(logits), dim=0)
            parts.append(sum(probs[s] * v[s][g] for s in past))
        outs.append(project(torch.cat(parts), "o"))
    return outs


def reference_logits(config: dict, weights: Weights, ids: list[int]) -> torch.Tensor:
    """Logits [S, vocab] in fp64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    eps = config["rms_norm_eps"]
    xs = [w["model.embed_tokens.weight"][i] for i in ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        norm = w[f"{layer}.input_layernorm.weight"]
        mixed = attention(config, w, f"{layer}.self_attn", [rms_norm(x, norm, eps) for x in xs])
        xs = [x + y for x, y in zip(xs, mixed, strict=True)]
        norm = w[f"{layer}.post_attention_layernorm.weight"]
        for t, x in enumerate(xs):
            y = rms_norm(x, norm, eps)
            sparse = is_sparse(config, i)
            xs[t] = x + (moe(config, w, f"{layer}.mlp", y) if sparse else mlp(w, f"{layer}.mlp", y))
    norm = w["model.norm.weight"]
    return torch.stack([w["lm_head.weight"] @ rms_norm(x, norm, eps) for x in xs])


# --- loading ------------------------------------------------------------------------------------


@pytest.mark.roundtrip
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="hub"),
        pytest.param({"norm_topk_prob": True}, id="normalised-weights"),
        pytest.param({"moe_layer_freq": 2, "num_hidden_layers": 4}, id="every-second-layer"),
        pytest.param({"first_k_dense_replace": 0, "num_key_value_heads": 2}, id="all-moe-gqa"),
        pytest.param({"attention_bias": True}, id="attention-bias"),
        pytest.param({"rope_scaling": {"type": "linear", "factor": 2}}, id="linear-rope"),
        pytest.param({"attention_dropout": 0, "aux_loss_alpha": 0}, id="integers-for-floats"),
    ],
)
def test_logits_equal_the_original_architecture(tmp_path: Path, changes: dict) -> None:
    from transformers import AutoModelForCausalLM

    config, weights = write_hub_directory(tmp_path, **changes)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(2, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    for row in range(2):
        expected = reference_logits(config, weights, ids[row].tolist())
        error = (logits[row].double() - expected).norm() / expected.norm()
        assert error < 1e-5, f"relative error {error:.1e}"


@pytest.mark.roundtrip
def test_generate_save_reload(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    source, again = tmp_path / "hub", tmp_path / "again"
    source.mkdir()
    config, weights = write_hub_directory(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    assert type(model).__module__ == "samoyeds_hf.hosts.deepseek"
    ids = torch.randint(2, 96, (2, 5), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    # The first new token is what the reference would choose.
    expected = reference_logits(config, weights, ids[0].tolist())[-1]
    expected[config["eos_token_id"]] = -math.inf
    assert cached[0, 5] == expected.argmax()

    model.save_pretrained(again)
    saved = load_file(again / "model.safetensors")
    assert saved.keys() == weights.keys(), "the Hub's names, one tensor per expert"
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
    saved_config = json.loads((again / "config.json").read_text())
    assert saved_config["model_type"] == "deepseek"
    assert saved_config["architectures"] == ["DeepseekForCausalLM"]
    assert "auto_map" not in saved_config, "the code it names is not saved with the model"
    reloaded = AutoModelForCausalLM.from_pretrained(again)
    assert reloaded.config.to_dict().keys() == model.config.to_dict().keys()
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=ids).logits, model(input_ids=ids).logits)
        base = AutoModel.from_pretrained(source)
        assert type(base).__name__ == "DeepseekModel"
        hidden = model.model(input_ids=ids).last_hidden_state
        assert torch.equal(base(input_ids=ids).last_hidden_state, hidden)


@pytest.mark.roundtrip
def test_trains(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_hub_directory(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    ids = torch.arange(2, 14)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.roundtrip
@pytest.mark.parametrize("trust", [None, False, True])
def test_remote_code_is_neither_asked_for_nor_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust: bool | None
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    def ask(prompt: str = "") -> str:
        raise AssertionError(prompt)

    monkeypatch.setattr("builtins.input", ask)
    write_hub_directory(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=trust)
    assert type(config).__module__ == "samoyeds_hf.hosts.deepseek_config"
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
    assert type(model).__module__ == "samoyeds_hf.hosts.deepseek"


@pytest.mark.roundtrip
def test_experts_are_the_common_class(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    write_hub_directory(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    experts = model.model.layers[1].mlp.experts
    assert experts.gate_up_proj.shape == (8, 32, 32)
    assert experts.down_proj.shape == (8, 32, 16)
    assert hasattr(experts, "_apply_gate")
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        assert experts.config._experts_implementation == implementation
    assert not hasattr(model.model.layers[0].mlp, "experts")


# --- configuration ------------------------------------------------------------------------------


@pytest.mark.roundtrip
def test_original_defaults() -> None:
    """A config.json may leave out whatever equals a default of the original class."""
    from transformers import AutoConfig

    config = AutoConfig.for_model("deepseek")
    found = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "bos_token_id")}
    assert found == {"vocab_size": 102400, "hidden_size": 4096, "bos_token_id": 100000}
    assert config.mlp_layer_types == ["dense"] * 30
    assert type(config.rope_parameters["rope_theta"]) is float


@pytest.mark.roundtrip
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func 'softmax', found 'sigmoid'"),
        ({"topk_method": "group_limited_greedy"}, "topk_method 'greedy', found 'group"),
        ({"routed_scaling_factor": 16}, "routed_scaling_factor 1.0, found 16.0"),
        ({"mlp_bias": True}, "mlp_bias False, found True"),
        ({"n_shared_experts": None}, "n_shared_experts 1 or more, found None"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 1 to 8, found 9"),
        ({"moe_layer_freq": 0}, "moe_layer_freq 1 or more, found 0"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "default, linear, dynamic, found 'yarn'",
        ),
    ],
)
def test_what_the_host_cannot_honour_is_refused(
    tmp_path: Path, changes: dict, message: str
) -> None:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps({**HUB_CONFIG, **changes}))
    with pytest.raises(UnsupportedModelError, match="model type 'deepseek' is hosted") as refusal:
        AutoConfig.from_pretrained(tmp_path)
    assert message in str(refusal.value)


# --- registration -------------------------------------------------------------------------------


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    # An installed package would register before the code that says when.
    environment = {**os.environ, "SAMOYEDS_HF_AUTOLOAD": "0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The import hooks call each function the moment its module of transformers was executed.
ARM = "import samoyeds_hf"
USES = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
"""
THEN = """
for loaded in sys.modules:
    assert not loaded.endswith(("ation_deepseek_ocr2", "modeling_deepseek_ocr2")), loaded
    assert not loaded.startswith("samoyeds_hf.hosts.deepseek"), loaded
config = AutoConfig.for_model("deepseek")
assert "samoyeds_hf.hosts.deepseek" not in sys.modules  # a tokenizer needs no model class
assert type(config) in AutoModelForCausalLM._model_mapping
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
model_class = AutoModelForCausalLM._model_mapping[type(config)]
print(TOKENIZER_MAPPING_NAMES["deepseek"], model_class.__name__)
"""


@pytest.mark.roundtrip
@pytest.mark.parametrize(
    "code",
    [
        pytest.param(ARM + USES + THEN, id="while-transformers-is-half-imported"),
        pytest.param(USES + ARM + THEN, id="after-transformers"),
    ],
)
def test_registering_imports_no_model_code(code: str) -> None:
    assert run_python(code).endswith("DeclaredBosTokenizer DeepseekForCausalLM")


@pytest.mark.roundtrip
def test_a_type_of_somebody_else_stays_in_place() -> None:
    code = """
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
class Theirs(PreTrainedConfig):
    model_type = "deepseek"
AutoConfig.register("deepseek", Theirs)
from samoyeds_hf.hosts import register_configs
register_configs()
assert CONFIG_MAPPING["deepseek"] is Theirs
CONFIG_MAPPING._extra_content.clear()
CONFIG_MAPPING_NAMES["deepseek"] = "LlamaConfig"  # as if a release shipped its own
CONFIG_MAPPING._modules["deepseek"] = __import__("transformers")
register_configs()
assert CONFIG_MAPPING["deepseek"].__name__ == "LlamaConfig"
del CONFIG_MAPPING_NAMES["deepseek"]
register_configs()
assert CONFIG_MAPPING["deepseek"].__name__ == "DeepseekConfig"
AutoConfig.register("deepseek", Theirs)  # a later registration wins, without an error
assert CONFIG_MAPPING["deepseek"] is Theirs
"""
    run_python(code)


# --- tokenizer ----------------------------------------------------------------------------------


def write_hub_tokenizer(path: Path, add_bos_token: bool) -> None:
    """A byte-level tokenizer.json under the class name that the Hub gives it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["one small test of words"], trainer)
    tokenizer.save(str(path / "tokenizer.json"))

    def added(content: str) -> dict:
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": content, **flags}

    config = {
        "add_bos_token": add_bos_token,
        "add_eos_token": False,
        "bos_token": added(BOS),
        "clean_up_tokenization_spaces": False,
        "eos_token": added(EOS),
        "legacy": True,
        "model_max_length": 16384,
        "pad_token": added(EOS),
        "sp_model_kwargs": {},
        "unk_token": None,
        "tokenizer_class": "LlamaTokenizerFast",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text(json.dumps(HUB_CONFIG))


@pytest.mark.roundtrip
@pytest.mark.parametrize("add_bos_token", [True, False])
def test_tokenizer_keeps_spaces_and_first_token(tmp_path: Path, add_bos_token: bool) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    write_hub_tokenizer(tmp_path, add_bos_token)
    text = "words of one small\n test"
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(text)["input_ids"] == ([0] if add_bos_token else []) + plain
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == plain
    assert tokenizer.decode(plain) == text
    assert type(tokenizer).__name__ == "TokenizersBackend"

    again = tmp_path / "again"
    tokenizer.save_pretrained(again)
    (again / "config.json").write_text(json.dumps(HUB_CONFIG))
    assert AutoTokenizer.from_pretrained(again)(text) == tokenizer(text)
    asked = AutoTokenizer.from_pretrained(tmp_path, add_bos_token=False)
    assert asked(text)["input_ids"] == plain
