"""``convex-head``: bench, fit, evaluate, report, leaderboard, doctor.

Results go to stdout, progress and errors to stderr; exit codes are in :mod:`convex_head.cli_common`. Heavy imports
wait until a command runs, so that --help is quick.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from convex_head.cli_common import (
    EXIT_CODES,
    FAILED,
    DataDir,
    Debug,
    EpsCurve,
    Json,
    OneLineErrors,
    Quiet,
    Seed,
    command_line,
    guarded,
)
from convex_head.cli_leaderboard import leaderboard
from convex_head.console import json_out, messages, printable, results, waiting

app = typer.Typer(
    name="convex-head",
    cls=OneLineErrors,
    help="Swap a network's last layers for a certified convex robust head; measure robustness honestly.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(leaderboard, name="leaderboard")


@app.command(epilog=EXIT_CODES)
@guarded
def bench(
    out: Annotated[Path, typer.Option(help="Folder of records, backbones and page.")] = Path("runs/bench"),
    eps: Annotated[str, typer.Option(help="Linf radius in pixel units: 0.1, 8/255.")] = "0.1",
    eps_curve: EpsCurve = None,
    n_ex: Annotated[int, typer.Option("--n-ex", "--n_ex", help="Points of the test split.")] = 150,
    seed: Seed = 0,
    training: Annotated[
        list[str] | None, typer.Option(help="Backbone recipe, repeatable: standard, sam, pgd_at, trades.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes; 0 takes one for each CPU core.")] = 0,
    quick: Annotated[bool, typer.Option(help="Seconds: two rows, few points, one attack.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The main job: small backbones on digits, their own, a linear and the convex head, under AutoAttack."""
    from convex_head.baselines import RECIPES
    from convex_head.bench import BENCH_RECIPES, BenchSettings
    from convex_head.bench_console import run_on_console
    from convex_head.errors import InputError
    from convex_head.threat import ThreatModel

    for radius in (eps, *_radii(eps_curve)):
        ThreatModel("Linf", radius)  # before the first of the rows can fail of it
    if n_ex < 1 or jobs < 0:
        raise InputError(f"--n-ex is at least 1 and --jobs at least 0; found {n_ex} and {jobs}.")
    recipes = tuple(training or BENCH_RECIPES)
    if unknown := sorted(set(recipes) - set(RECIPES)):
        raise InputError(f"--training is one of {', '.join(sorted(RECIPES))}; found {', '.join(unknown)}.")
    settings = BenchSettings(eps=eps, eps_curve=_radii(eps_curve), n=n_ex, seed=seed, recipes=recipes)
    settings = settings.quick() if quick else settings
    complete = run_on_console(settings, out, jobs=jobs or _cores(), as_json=as_json, quiet=quiet, debug=debug)
    if not complete:
        raise typer.Exit(FAILED)


@app.command(epilog=EXIT_CODES)
@guarded
def fit(
    data: Annotated[str, typer.Argument(help=".npz with features and labels, or .npy of features (see --labels).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Head file to write.")] = Path("head.safetensors"),
    labels: Annotated[Path | None, typer.Option(help=".npy of labels, for a .npy of features.")] = None,
    radius: Annotated[float, typer.Option(help="Feature radius, in standardised units.")] = 0.5,
    reg: Annotated[float, typer.Option(help="Regularisation weight.")] = 1e-2,
    loss: Annotated[str, typer.Option(help="crammer_singer, multi_margin or one_vs_rest.")] = "crammer_singer",
    activation: Annotated[str, typer.Option(help="polynomial, relu or gated_relu.")] = "polynomial",
    patterns: Annotated[int | None, typer.Option(help="relu, gated_relu: random sign patterns.")] = None,
    slack: Annotated[float | None, typer.Option(help="relu: weight of violated constraints; inf: hard.")] = None,
    ball: Annotated[str, typer.Option(help="l2, or linf for relu and gated_relu.")] = "l2",
    solver: Annotated[str, typer.Option(help="auto, or a solver of the activation.")] = "auto",
    tol: Annotated[float, typer.Option(help="Relative duality gap to reach.")] = 1e-2,
    max_seconds: Annotated[float | None, typer.Option(help="Time limit; the honest gap is kept.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="File to keep progress in and to go on from.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Leave the features of a .npy on disk.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a convex robust head on features, to global optimality, and write it to a file.

    Under torchrun every process takes its share of the rows, and the first one writes the head.
    """
    from convex_head.feature_files import read_features
    from convex_head.fit_progress import fit_progress
    from convex_head.head import ConvexRobustHead
    from convex_head.shards import processes

    settings: dict[str, Any] = {"activation": activation, "patterns": patterns, "slack": slack, "ball": ball}
    with processes() as (rank, count):
        x, y, classes = read_features(Path(data), labels, stream=stream, part=(rank, count))
        head = ConvexRobustHead(x.shape[1], classes, radius=radius, reg=reg, loss=loss, **settings)
        with fit_progress(messages(quiet=quiet or rank > 0), tol, max_seconds) as callback:
            head.fit(
                x,
                y,
                solver=solver,
                tol=tol,
                max_seconds=max_seconds,
                seed=seed,
                progress=False,
                callback=callback,
                checkpoint=checkpoint,
                distributed=count > 1,
            )
    if rank:
        return
    head.save(out)
    result = head.result_
    assert result is not None
    facts = {
        "head": os.fspath(out),
        "status": result.status.value,
        "objective": result.primal,
        "lower_bound": result.dual,
        "gap": result.gap,
        "neurons": result.neurons,
        "seconds": result.seconds,
    }
    if as_json:
        json_out(facts)
    else:
        for key, value in facts.items():
            shown = f"{value:.6g}" if isinstance(value, float) else value
            results().print(f"{key:12} {shown}", markup=False)
    if not result.converged:
        raise typer.Exit(FAILED)


@app.command(epilog=EXIT_CODES)
@guarded
def evaluate(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            "--model", "--model_name", "--model-name", help="module:factory, torchvision:, timm: or robustbench:name."
        ),
    ],
    dataset: Annotated[str, typer.Option(help="Name of the dataset.")] = "cifar10",
    threat_model: Annotated[
        str, typer.Option("--threat-model", "--threat_model", "--norm", help="Linf, L2, L1.")
    ] = "Linf",
    eps: Annotated[str, typer.Option(help="8/255, 0.031, 0.5.")] = "8/255",
    eps_curve: EpsCurve = None,
    attack: Annotated[
        list[str] | None, typer.Option(help="Name, repeatable; settings in brackets: 'torchattacks:PGD(steps=20)'.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="File of weights; read with weights_only.")] = None,
    pretrained: Annotated[bool, typer.Option(help="Let torchvision or timm download weights.")] = False,
    head: Annotated[Path | None, typer.Option(help="Head file that replaces the classifier.")] = None,
    at: Annotated[str | None, typer.Option(help="Node where the head goes; default: the classifier.")] = None,
    n_ex: Annotated[int | None, typer.Option("--n-ex", "--n_ex", help="Points; default: all.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch_size")] = 128,
    data_dir: DataDir = None,
    model_dir: Annotated[str, typer.Option("--model-dir", "--model_dir", help="RobustBench's weights.")] = "models",
    seed: Seed = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:0.")] = None,
    state: Annotated[Path | None, typer.Option(help="File to keep progress in and to go on from.")] = None,
    examples: Annotated[int, typer.Option(help="Points whose clean and attacked pictures go into the record.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Record to write.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Clean and robust accuracy of any model; exit code 1 if the record is flagged.

    Under torchrun the processes share the batches, and the first one writes the record: that of a single process.
    """
    import dataclasses
    import warnings

    from convex_head.certificate_check import certificate_facts
    from convex_head.data import load_dataset
    from convex_head.eps_curve import evaluate_curve
    from convex_head.errors import EvaluationWarning
    from convex_head.evaluate import evaluate as run_attacks
    from convex_head.examples import adversarial_examples
    from convex_head.head import ConvexRobustHead
    from convex_head.model_specs import build_model
    from convex_head.report.terminal import footnotes, results_table
    from convex_head.shards import processes
    from convex_head.splice import replace_head
    from convex_head.threat import ThreatModel

    console, threat = messages(quiet=quiet), ThreatModel(threat_model, eps)
    with waiting(console, "loading data and model"):
        points = load_dataset(dataset, split="test", data_dir=data_dir, n=n_ex)
        net: Any = build_model(
            model,
            num_classes=points.num_classes,
            checkpoint=checkpoint,
            pretrained=pretrained,
            dataset=dataset,
            threat=threat,
            model_dir=model_dir,
        )
    metadata: dict[str, Any] = {"backbone": model}
    if head is not None:
        fitted = ConvexRobustHead.load(head)
        net = replace_head(net, fitted, at=at, example_input=points.images[:2])
        metadata |= {"head": "convex", **certificate_facts(fitted)}
    with processes(device or "cpu") as (rank, count), warnings.catch_warnings():
        warnings.simplefilter("ignore", EvaluationWarning)  # the footnotes say it
        settings: dict[str, Any] = {
            "attacks": tuple(attack or ("autoattack",)),
            "batch_size": batch_size,
            "seed": seed,
            "state": state,
            "device": device,
            "progress": not quiet and rank == 0,
            "distributed": count > 1,
            "name": model if head is None else f"{model} + {head.name}",
            "dataset_name": dataset,
            "command": command_line(context),
            "metadata": metadata,
        }
        if eps_curve is None:
            record = run_attacks(net, points, threat, **settings)
        else:
            record = evaluate_curve(net, points, threat, _radii(eps_curve), **settings)
    if rank:
        return
    if examples:
        with waiting(console, "pictures"):
            pictures = adversarial_examples(net, points, threat, examples, seed=seed, batch_size=batch_size)
        record = dataclasses.replace(record, metadata={**record.metadata, "examples": pictures})
    if out is not None:
        record.save(out)
    if as_json:
        json_out(record.to_dict())
    else:
        out_console = results()
        out_console.print(results_table([record], "", {}, width=out_console.width))
        for line in footnotes([record]):
            console.print(printable(line), style="dim", markup=False)
        if out is not None:
            console.print(f"wrote {out}", markup=False)
    if record.flags:
        raise typer.Exit(FAILED)


@app.command(epilog=EXIT_CODES)
@guarded
def report(
    records: Annotated[list[Path], typer.Argument(help="Records of 'convex-head evaluate' or 'bench'.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="report.html, report.pdf, or report.tex for a table.")],
    title: Annotated[str, typer.Option(help="Heading of HTML and PDF.")] = "Robustness evaluation",
    pictures: Annotated[bool, typer.Option(help="Show the adversarial examples that records carry.")] = True,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Table, curves and pictures of records for an appendix, as one HTML or PDF file, or a LaTeX table (booktabs)."""
    from convex_head.errors import InputError
    from convex_head.records import EvalRecord
    from convex_head.report import render_latex, render_report, write_pdf

    if out.suffix not in (".html", ".pdf", ".tex"):
        raise InputError(f"--out ends in .html, .pdf or .tex; found {out}. Choose one of these.")
    loaded = [EvalRecord.load(path) for path in records]
    with waiting(messages(quiet=quiet), f"writing {out.name}"):
        if out.suffix == ".pdf":
            write_pdf(loaded, out, title=title, pictures=pictures)
        else:
            latex = out.suffix == ".tex"
            text = render_latex(loaded) if latex else render_report(loaded, title=title, pictures=pictures)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text, encoding="utf-8")
    if as_json:
        flagged = [record.name for record in loaded if record.flags]
        json_out({"written": os.fspath(out), "records": [record.name for record in loaded], "flagged": flagged})
    messages(quiet=quiet or as_json).print(f"wrote {out}", markup=False)


@app.command(epilog=EXIT_CODES)
@guarded
def doctor(as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """What is installed, what is broken upstream, and the remedy; exit code 1 if the core does not work."""
    from convex_head.doctor import examine, findings_table

    with waiting(messages(quiet=quiet), "importing what is installed"):
        findings = examine()
    if as_json:
        json_out([finding.to_dict() for finding in findings])
    else:
        results().print(findings_table(findings))
    if any(finding.state == "broken" and finding.needed for finding in findings):
        raise typer.Exit(FAILED)


def _radii(text: str | None) -> tuple[str, ...]:
    """ "1/255, 2/255" as ("1/255", "2/255")."""
    return () if text is None else tuple(part.strip() for part in text.split(","))


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    """Entry point of the console script."""
    app()
