"""The command ``samoyeds recover``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def recover(
    sparse: Annotated[Path, typer.Argument(metavar="SPARSE", help="Sparse checkpoint.")],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make.")],
    against: Annotated[
        str, typer.Option(help="The dense checkpoint that it was made from, or an id of the Hub.")
    ],
    calibration: Annotated[
        str,
        typer.Option(
            help="Text to train on: a file (text, .jsonl), a directory, a data set of the Hub, or "
            "python-stdlib."
        ),
    ],
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences of it.  [default: steps x batch size, each once]"),
    ] = None,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 2048,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of the optimizer.  [default: 1200]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences of a step.  [default: 2]")
    ] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences at a time, for memory.  [default: all]")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="The peak, for weights with 1024 inputs.  [default: 0.001]"),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of both softmaxes.  [default: 1.0]")
    ] = None,
    hidden_weight: Annotated[
        float | None,
        typer.Option(help="Of the error of the hidden states beside the KL.  [default: 30.0]"),
    ] = None,
    held_back: Annotated[
        float | None,
        typer.Option(
            help="Share of the sequences that only measure; unless they get nearer, the pruned "
            "weights stay. 0: none.  [default: 0.0625]"
        ),
    ] = None,
    backtrack: Annotated[
        bool | None,
        typer.Option(
            "--backtrack/--no-backtrack",
            help="Start again with a lower learning rate where those sequences say that the first "
            "quarter or half of the steps did harm.  [default: backtrack]",
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(help="all weights, or experts: what was pruned.  [default: all]"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Order of documents and of sequences.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cuda, cpu, ...  [default: the GPU, where there is one]")
    ] = None,
    cuda_graph: Annotated[
        bool,
        typer.Option(
            "--cuda-graph",
            help="Record the passes of a step and launch them at once; both models on one GPU. For "
            "small models, which would leave it idle.",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run, if any.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT once the new checkpoint is complete.")
    ] = False,
) -> None:
    """Distill a sparse checkpoint from its dense original.

    Masks hold. Memory: both models whole, and 20 bytes for each weight that is trained. OUT appears
    when it is complete; it holds the losses as samoyeds_distillation.csv.
    """
    from samoyeds_hf.pruning.calibration import Calibration
    from samoyeds_hf.pruning.distill_settings import DistillSettings
    from samoyeds_hf.recovery import recover_checkpoint

    given = {
        "steps": steps,
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "learning_rate": learning_rate,
        "temperature": temperature,
        "hidden_weight": hidden_weight,
        "held_back": held_back,
        "backtrack": backtrack,
        "train": train,
    }
    settings = DistillSettings(**{k: v for k, v in given.items() if v is not None}, seed=seed)  # type: ignore[arg-type]
    data = Calibration(
        calibration, samples or settings.steps * settings.batch_size, sequence_length, seed
    )
    try:
        report = recover_checkpoint(
            sparse,
            against,
            destination,
            data,
            settings,
            resume=resume,
            overwrite=overwrite,
            device=device,
            cuda_graph=cuda_graph,
        )
    except KeyboardInterrupt:
        print("stopped; the same command with --resume continues.", file=sys.stderr)
        raise typer.Exit(130) from None
    print(report)
    print(f"written: {destination}")
