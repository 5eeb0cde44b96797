"""Train a small mixture-of-experts language model on the source of the Python standard library.

    python scripts/train_tiny_moe.py out-dir                       # Mixtral class, wants a GPU
    python scripts/train_tiny_moe.py out-dir --family qwen2_moe    # with a shared expert
    python scripts/train_tiny_moe.py out-dir --steps 2 --layers 1 --batch 1   # seconds, on a CPU

Master weights and AdamW are fp32; on a GPU forward and backward run in bf16. The checkpoint is
chosen by the validation split, the held-out split is measured once, on what is saved.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from samoyeds_hf.corpus import perplexity, python_files, read_texts, token_stream

CONTEXT = 1024  # tokens; the model's limit and the length it is trained at
NUM_EVALS = 25  # looks at the validation split, spread evenly over the run
WARMUP = 0.03  # part of the run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line; the defaults are the recipe of tests/assets/tiny-moe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--family", choices=("mixtral", "qwen2_moe"), default="mixtral")
    parser.add_argument("--root", type=Path, help="standard library; default: the running one")
    parser.add_argument("--steps", type=int, default=3459)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end the schedule earlier")
    parser.add_argument("--batch", type=int, default=16, help=f"windows of {CONTEXT} tokens a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.0, help="0.1 lost over 7 epochs")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256, help="also the experts' intermediate")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-tokens", type=int, default=10**9, help="at most, for perplexities")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: every string has tokens and decodes to itself."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return Tokenizer(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_config(args: argparse.Namespace, tokenizer: Tokenizer) -> PreTrainedConfig:
    """8 experts, top-2, heads of 64, two query heads per key head."""
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": args.hidden,
        "intermediate_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": args.hidden // 128,
        "num_experts_per_tok": 2,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": True,
        "router_aux_loss_coef": 0.01,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if args.family == "mixtral":
        shape |= {"num_local_experts": 8, "head_dim": 64}
    else:
        shape |= {
            "num_experts": 8,
            "norm_topk_prob": True,
            "moe_intermediate_size": args.hidden,
            "shared_expert_intermediate_size": args.hidden,
        }
    return AutoConfig.for_model(args.family, **shape)


def add_dropout(model: PreTrainedModel, rate: float) -> None:
    """Dropout on what each layer adds to the residual stream; the model classes have none there."""

    def hook(module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(output, rate, module.training)

    for name, module in model.named_modules():
        if name.endswith((".o_proj", ".experts", ".shared_expert")):
            module.register_forward_hook(hook)


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(progress: float) -> float:
    """Linear warmup, then cosine to zero: factor of the peak at `progress` in 0..1."""
    if progress < WARMUP:
        return progress / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


def train(
    model: PreTrainedModel,
    stream: torch.Tensor,
    validate: Callable[[], float],
    args: argparse.Namespace,
) -> int:
    """Train on random windows of `stream` [n]; leaves the best validated weights in the model.

    Returns the number of steps done.
    """
    compute_dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    optimizer = make_optimizer(model, args)
    generator = torch.Generator().manual_seed(args.seed)
    offsets = torch.arange(CONTEXT, device=stream.device)
    best, best_state, evals = math.inf, None, 0
    start = time.monotonic()
    for step in range(1, args.steps + 1):
        minutes = (time.monotonic() - start) / 60
        progress = max(step / args.steps, minutes / args.minutes)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(min(progress, 1.0))
        first = torch.randint(len(stream) - CONTEXT + 1, (args.batch, 1), generator=generator)
        ids = stream[first.to(stream.device) + offsets]  # [batch, CONTEXT]
        weights = {name: p.to(compute_dtype) for name, p in model.named_parameters()}
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False, "output_router_logits": True}
        loss = functional_call(model, weights, kwargs=inputs).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if progress * NUM_EVALS >= evals + 1 or step == args.steps:
            evals = int(progress * NUM_EVALS)
            ppl = validate()
            print(f"step {step:6d}  {minutes:5.2f} min  loss {loss.item():.3f}  val {ppl:.3f}")
            if ppl < best or best_state is None:
                best, best_state = ppl, copy.deepcopy(model.state_dict())
        if progress >= 1:
            break
    if best_state is not None:
        model.load_state_dict(best_state)
    return step


def model_card(args: argparse.Namespace, model: PreTrainedModel, run: dict[str, Any]) -> str:
    """README.md of the saved directory."""
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    library = args.root.name if args.root else "python{}.{}".format(*sys.version_info)
    return f"""---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
library_name: transformers
pipeline_tag: text-generation
---
# A tiny {args.family} that writes Python

A test asset, not a product: {model.num_parameters() / 1e6:.1f} M parameters, {args.layers} layers,
8 experts of which 2 run per token, hidden = intermediate = {args.hidden}, bf16, context {CONTEXT},
byte-level BPE of {model.config.vocab_size} tokens.

Text: the `.py` files of the Python standard library ({library}), split by file as
`samoyeds_hf.corpus.python_files` says. They are copyright of the Python Software Foundation and
others, under the PSF License Version 2 (some files carry their own permissive notice).

    python scripts/train_tiny_moe.py OUT {run["command"]}

{run["steps"]} steps of {args.batch} x {CONTEXT} tokens ({run["tokens"] / 1e6:.1f} M tokens,
{run["epochs"]:.1f} times the training text) in {run["minutes"]:.1f} minutes on {device};
transformers {transformers.__version__}, torch {torch.__version__},
tokenizers {tokenizers.__version__}.

| split | perplexity, windows of 512 |
|---|---|
| validation (chose the checkpoint) | {run["validation"]:.3f} |
| held out | {run["heldout"]:.3f} |
"""


def main(argv: list[str] | None = None) -> None:
    """Train, choose by validation, save, measure on the held-out files."""
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    texts = {
        split: read_texts(python_files(split, args.root))
        for split in ("train", "validation", "heldout")
    }
    tokenizer = train_tokenizer(texts["train"], args.vocab)
    stream = token_stream(tokenizer, texts["train"]).to(args.device)
    config = make_config(args, tokenizer)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(args.device).train()
    shipped = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(args.device)
    if args.dropout:
        add_dropout(model, args.dropout)
    print(f"{args.family}: {model.num_parameters():,} parameters, {len(stream):,} training tokens")

    def measure(split: str) -> float:
        shipped.load_state_dict(model.state_dict())  # rounds to bf16: measure what is saved
        return perplexity(shipped, tokenizer, texts[split], max_tokens=args.eval_tokens)

    start = time.monotonic()
    steps = train(model, stream, lambda: measure("validation"), args)
    tokens = steps * args.batch * CONTEXT
    run = {
        "command": " ".join(f"--{k} {getattr(args, k)}" for k in ("family", "batch", "lr", "seed"))
        + f" --weight-decay {args.weight_decay} --dropout {args.dropout} --steps {steps}",
        "steps": steps,
        "tokens": tokens,
        "epochs": tokens / len(stream),
        "minutes": (time.monotonic() - start) / 60,
        "validation": measure("validation"),
        "heldout": measure("heldout"),
    }
    shipped.save_pretrained(args.out, max_shard_size="14MB")
    tokenizer.save_pretrained(args.out)
    (args.out / "README.md").write_text(model_card(args, shipped, run), encoding="utf-8")
    print(f"validation {run['validation']:.3f}  heldout {run['heldout']:.3f}  in {args.out}")


if __name__ == "__main__":
    main()
