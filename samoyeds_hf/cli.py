"""The command ``samoyeds``: from the plan of a conversion to what its result is worth."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from samoyeds_hf.cli_options import (
    Asymmetric,
    Budget,
    CalibrationText,
    Candidates,
    Device,
    Method,
    Overwrite,
    Pattern,
    Permute,
    Recipe,
    Recover,
    Refine,
    Samples,
    Seed,
    SequenceLength,
    ShardSize,
    Source,
    calibration_options,
    is_first_process,
    make_config,
    parse_size,
    print_plan,
)
from samoyeds_hf.cli_recover import recover
from samoyeds_hf.errors import ConfigError, SamoyedsError

app = typer.Typer(
    name="samoyeds",
    help="Make Mixture-of-Experts checkpoints sparse, check them and measure them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # markup would read N:M:V as an emoji and [default: ...] as a style
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command; an error of the user's ends in one sentence and exit code 1, Ctrl-C in 130.

    A command line that cannot be parsed ends in exit code 2.
    """
    try:
        app(prog_name="samoyeds")
    except (SamoyedsError, OSError) as error:  # an OSError says which file or address
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


@app.command()
def plan(
    source: Source,
    pattern: Pattern = None,
    method: Method = None,
    refine: Refine = None,
    asymmetric: Asymmetric = None,
    permute: Permute = None,
    recover: Recover = None,
    calibration: CalibrationText = None,
    samples: Samples = None,
    sequence_length: SequenceLength = None,
    seed: Seed = None,
    device: Device = None,
    recipe: Recipe = None,
    shard_size: ShardSize = "5GB",
    destination: Annotated[
        Path | None, typer.Option("--dst", help="Also check that the output fits there.")
    ] = None,
) -> None:
    """Print sizes, peak memory and disk need; write nothing.

    Of a repository of the Hub only the configuration and the headers are read.
    """
    from samoyeds_hf.plan import plan_conversion

    config = make_config(
        {
            "pattern": pattern,
            "method": method,
            "refine": refine,
            "asymmetric": asymmetric,
            "permute": permute,
            "recover": recover,
        },
        calibration_options(calibration, samples, sequence_length, seed),
        recipe,
    )
    found = plan_conversion(source, config, parse_size(shard_size))
    more = print_plan(found, device)
    found.check_disk(destination or Path.cwd(), more)


@app.command()
def convert(
    source: Source,
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Directory to make.")],
    pattern: Pattern = None,
    method: Method = None,
    refine: Refine = None,
    asymmetric: Asymmetric = None,
    permute: Permute = None,
    recover: Recover = None,
    budget: Budget = None,
    candidates: Candidates = None,
    calibration: CalibrationText = None,
    samples: Samples = None,
    sequence_length: SequenceLength = None,
    seed: Seed = None,
    device: Device = None,
    recipe: Recipe = None,
    shard_size: ShardSize = "5GB",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted conversion, if any.")
    ] = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
    ] = False,
) -> None:
    """Prune and encode the experts of a checkpoint on disk.

    Memory: one expert at a time; with --calibration two decoder layers and what `samoyeds plan`
    says. DST appears when it is complete.
    """
    from samoyeds_hf.budget import with_budget
    from samoyeds_hf.convert import convert_checkpoint
    from samoyeds_hf.convert_layers import require_calibration
    from samoyeds_hf.directory import check_destination
    from samoyeds_hf.plan import plan_conversion

    config = make_config(
        {
            "pattern": pattern,
            "method": method,
            "refine": refine,
            "asymmetric": asymmetric,
            "permute": permute,
            "recover": recover,
        },
        calibration_options(calibration, samples, sequence_length, seed),
        recipe,
    )
    if candidates is not None and budget is None:
        raise ConfigError("--candidates goes with --budget, found none; add it.")
    if dry_run:
        if config.is_calibrated:
            require_calibration(config)
        found = plan_conversion(source, config, parse_size(shard_size))
        check_destination(found.source, destination, overwrite)
        more = print_plan(found, device)
        found.check_disk(destination, more)
        return
    try:
        if budget is not None:
            config = with_budget(
                source,
                config,
                budget,
                candidates=candidates.split(",") if candidates else None,
                destination=destination if resume else None,
                device=device,
            )
        report = convert_checkpoint(
            source,
            destination,
            config,
            shard_size=parse_size(shard_size),
            resume=resume,
            overwrite=overwrite,
            device=device,
        )
    except KeyboardInterrupt:
        print("stopped; the same command with --resume continues.", file=sys.stderr)
        raise typer.Exit(130) from None
    if is_first_process():
        print(report)
        print(f"written: {destination}")


app.command()(recover)


@app.command()
def check(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Sparse checkpoint.")],
    against: Annotated[
        Path | None, typer.Option(help="Its dense source: also report the error per weight.")
    ] = None,
) -> None:
    """Read a sparse checkpoint whole and validate it.

    Exit code 1 if it is damaged, or if a tensor that was only copied differs from --against.
    """
    from samoyeds_hf.verify import check_checkpoint

    report = check_checkpoint(directory, against)
    print(report)
    if report.changed:
        raise typer.Exit(1)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Sparse checkpoint.")],
    csv: Annotated[Path | None, typer.Option(help="Write it as CSV, a row per weight.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write it as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw errors by layer: .png, .svg.")] = None,
) -> None:
    """Print how a checkpoint was made sparse.

    For each weight its errors, the calibration tokens of its experts, and time.
    """
    from samoyeds_hf.report_files import report_command

    report_command(directory, csv=csv, json=json, plot=plot)


@app.command("export-dense")
def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Sparse checkpoint.")],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make.")],
    shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Write a sparse checkpoint as a dense one, zeros in place.

    It is an ordinary checkpoint that plain transformers and other engines load.
    """
    from samoyeds_hf.verify import export_dense

    export_dense(directory, destination, shard_size=parse_size(shard_size), overwrite=overwrite)
    print(f"written: {destination}")


@app.command("eval")
def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Model to measure.")],
    tasks: Annotated[str, typer.Option(help="Tasks or groups of lm-eval, with commas.")],
    against: Annotated[Path | None, typer.Option(help="Dense model beside it.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Directory with more tasks.")] = None,
    limit: Annotated[int | None, typer.Option(help="First samples of each task only.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in the prompt.")] = None,
    batch_size: Annotated[str, typer.Option(help="A number, or 'auto'.")] = "1",
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu, ...")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    seed: Annotated[int | None, typer.Option(help="Of samples and few-shot examples.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
) -> None:
    """Run lm-eval on a model, and on its dense original beside it."""
    from samoyeds_hf.evaluate import run

    run(
        directory,
        tasks,
        output=output,
        against=against,
        include_path=include_path,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=int(batch_size) if batch_size.isdigit() else batch_size,
        device=device,
        dtype=dtype,
        seed=seed,
    )


@app.command()
def env(
    build: Annotated[
        bool,
        typer.Option("--build", help="First build the CUDA kernels, which the first use does."),
    ] = False,
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help="With --build: 80, 86, 89, 90a or ptx; repeatable.  [default: of the GPUs here]"
        ),
    ] = None,
    heuristics: Annotated[
        bool, typer.Option("--heuristics", help="Only print how the kernels are chosen.")
    ] = False,
) -> None:
    """Print versions, GPU, and which path the experts take."""
    from samoyeds_hf import environment, library

    if arch and not build:
        raise ConfigError("--arch says what to build, found no --build; add it.")
    if build:
        library.build_ahead(arch or ())
    print(environment.heuristics() if heuristics else environment.describe())


@app.command()
def demo(
    pattern: Annotated[str, typer.Option(help="Shown beside 2:4.")] = "1:2:64",
    model: Annotated[
        Path | None, typer.Option(help="A dense model of Python text.  [default: bundled]")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens to measure on.")] = 20_000,
    method: Annotated[str, typer.Option(help="How weights are chosen.")] = "best",
    samples: Annotated[int, typer.Option(min=1, help="Sequences to calibrate on.")] = 64,
) -> None:
    """Prune a small trained model, load it and compare.

    Each one is loaded in a fresh process; perplexity is on Python files that it was not trained on.
    """
    from samoyeds_hf.demo import run_demo

    run_demo(pattern, model, max_tokens=tokens, method=method, samples=samples)


if __name__ == "__main__":
    main()
