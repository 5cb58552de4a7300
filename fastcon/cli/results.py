"""info, export, report, bench, study, demo."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from fastcon.cli.group import main
from fastcon.cli.options import common
from fastcon.cli.output import finish, note
from fastcon.errors import UsageError


@main.command()
@click.argument("path")
@common
def info(path: str, json_file: str | None) -> None:
    """Describe a STORE or a RUN on one screen.

    \b
    fastcon info store
    """
    from fastcon.info import describe

    facts, text = describe(path)
    finish(facts, json_file, text)


@main.command()
@click.argument("run")
@click.option("--out", required=True, help="Folder for the files.")
@click.option("--head", default=None, help="The head that the state dict gets (default: the first).")
@click.option(
    "--onnx/--no-onnx", default=True, show_default=True, help="Write ONNX and check it with ONNX Runtime (extra)."
)
@click.option(
    "--results", multiple=True, help="RESULTS whose accuracies of this run the model card shows (repeatable)."
)
@click.option("--licence", "--license", default=None, help="Licence of the weights, for the model card.")
@common
def export(
    run: str,
    out: str,
    head: str | None,
    onnx: bool,
    results: tuple[str, ...],
    licence: str | None,
    json_file: str | None,
) -> None:
    """Write a RUN of train or teach as files that work without fastcon: ONNX, a state dict, and a model card.

    \b
    fastcon export runs/student --results birds.json --out exported
    """
    from fastcon.export import export as stage

    facts = stage(run, out, head, onnx, results, licence, note)
    finish(facts, json_file, f"{out}/README.md")


@main.command()
@click.argument("results", nargs=-1)
@click.option("--out", required=True, help="Folder for the page, its tables and figures.")
@click.option("--generalist", default=None, help="The representation that others are compared with.")
@click.option("--related", multiple=True, help="TEACHER=TASK that counts as related, besides the teacher's own.")
@click.option("--best", multiple=True, help="NAME=LABEL,LABEL,… one row more: the best of these on its related tasks.")
@click.option(
    "--reference", "references", multiple=True, help="Published table to stand beside ours: CSV, or table2 … table6."
)
@click.option(
    "--threshold",
    type=click.FloatRange(0),
    default=1.5,
    show_default=True,
    help="Points within which the tally says ≈.",
)
@click.option("--title", default="fastcon report", show_default=True, help="Title of the page.")
@click.option(
    "--views", default=None, help="STORE of which sample views are shown, with what the teachers say of them."
)
@click.option("--relate", default=None, help="STORE whose teachers are compared: heat map, domains.")
@common
def report(
    results: tuple[str, ...],
    out: str,
    generalist: str | None,
    related: tuple[str, ...],
    best: tuple[str, ...],
    references: tuple[str, ...],
    threshold: float,
    title: str,
    views: str | None,
    relate: str | None,
    json_file: str | None,
) -> None:
    """Tables, tally and figures of RESULTS on one page, OUT/index.html.

    RESULTS: JSON of probe, finetune and evaluate, RUN folders (learning curves, cost), CSV tables of accuracies in percent,
    and the paper's own: table2, table4, table5, table6. Runs that differ in seeds alone make one row.

    \b
    fastcon report birds.json flowers.json runs/student --out report
    fastcon report table4 --out report
    fastcon report studies/table4/jobs/*.json --reference table4 --out report
    fastcon report --views store --out report
    """
    from fastcon.report import write_report

    facts = write_report(
        results, out, generalist, related, best, references, threshold, views, relate, title, say=click.echo
    )
    finish(facts, json_file, f"{out}/index.html")


@main.command()
@click.argument("store")
@click.option("--rows", type=click.IntRange(16), default=2048, show_default=True, help="Rows to compare at most.")
@common
def relate(store: str, rows: int, json_file: str | None) -> None:
    """How alike the teachers of a STORE are, which domains they form, and what the proxy does not cover.

    From the stored logits alone: no model is run. `fastcon report --relate STORE` draws it.

    \b
    fastcon relate store
    """
    from fastcon.distill.relate import relate as stage
    from fastcon.report.relations import text

    found = stage(store, rows)
    finish(found.json(), json_file, text(found))


@main.command()
@click.argument(
    "what", type=click.Choice(["kernel", "store", "loader", "train", "probe", "probe_full", "growth", "start"])
)
@click.option(
    "--images",
    multiple=True,
    help="Photos for loader and train (default: rendered ones); labelled IMAGES for probe, each a task (repeatable).",
)
@click.option("--backbone", default=None, help="For probe: the MODEL whose features of --images are used too.")
@click.option("--store", default=None, help="For store: a store with float logits, whose codecs are compared.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 … ; auto: a GPU if there is one.")
@common
def bench(
    what: str, images: tuple[str, ...], backbone: str | None, store: str | None, device: str, json_file: str | None
) -> None:
    """Time fastcon against what a user would pick instead, on the same input, interleaved in one run.

    --json gets the list of rows. From a checkout, a record with hardware and versions goes to benchmarks/results, too.

    \b
    fastcon bench loader --json loader.json
    fastcon bench store --store store
    """
    from fastcon import bench as stage

    given = {"images": images, "backbone": backbone, "store": store, "device": None if device == "auto" else device}
    rows = stage.run(what, note, {name: value for name, value in given.items() if value})
    for row in rows:
        ours, theirs = _figure(row["ours"]), _figure(row["theirs"])
        case = f"{row['name']} ({row.get('case', row['n'])})"
        click.echo(f"{case}: {ours} against {theirs} {row['unit']}, ratio {row['ratio']:.2f}")
    stage.keep(what, rows)
    finish(rows, json_file)


@main.command()
@click.argument("file", required=False)
@click.argument("snakemake", nargs=-1, type=click.UNPROCESSED)
@click.option("--overlay", "overlays", multiple=True, help="Study FILE whose values replace the study's (repeatable).")
@click.option(
    "--data", "data_folder", default=None, help="Folder where each data set lies under its name (fastcon data list)."
)
@click.option("--only", multiple=True, help="A part of the study, with what it needs (repeatable).")
@click.option("--out", default=None, help="Folder for everything the study makes.")
@click.option("--device", default="auto", show_default=True, help="For the estimate of --dry-run: cpu, cuda …")
@click.option(
    "--rate",
    type=(click.FloatRange(0, min_open=True), click.FloatRange(0, min_open=True)),
    default=None,
    metavar="FORWARD TRAINED",
    help="For the estimate: images/s of the generalist on another machine, forward and in training.",
)
@click.option("--dry-run", is_flag=True, help="Print the commands, what they need, and what they would cost.")
@common
def study(
    file: str | None,
    snakemake: tuple[str, ...],
    overlays: tuple[str, ...],
    data_folder: str | None,
    only: tuple[str, ...],
    out: str | None,
    device: str,
    rate: tuple[float, float] | None,
    dry_run: bool,
    json_file: str | None,
) -> None:
    """Run a study FILE (TOML), one of those that come with fastcon, or a part of one: all commands of it, once each.

    Without FILE: lists them. Parts of a study run into one folder share what they have in common. Running it again resumes. What follows -- goes to Snakemake, which runs the commands.

    \b
    fastcon study
    fastcon study paper --dry-run --rate 2500 800
    fastcon study table4 --overlay small --out studies/small
    fastcon study paper --only table2 --only fig5a --data /data --out studies/paper
    fastcon study table4 --data /data --out studies/table4 -- --executor slurm --jobs 20
    """
    from fastcon import study as stage
    from fastcon.machine import choose_device

    if file is None:
        names = stage.shipped()
        finish({"studies": names}, json_file, "\n".join(f"{name:10} {title}" for name, title in names.items()))
        return
    if not dry_run and out is None:
        raise UsageError("a study needs --out FOLDER (or --dry-run)")
    planned = stage.load(file, overlays, data_folder, only)
    for job in planned.jobs:  # a wrong option fails now, not after hours
        main.commands[job.command[0]].make_context(job.command[0], list(job.command[1:]), resilient_parsing=False)
    if dry_run:
        facts, text = stage.describe(planned, choose_device(device), note, rate)
        finish(facts, json_file, text)
        return
    if planned.missing_data:
        raise UsageError(f"the study needs the data set {planned.missing_data}: give its folder with --data")
    facts = stage.run(planned, str(out), snakemake, note)
    finish(facts, json_file, facts["report"])


@main.command()
@click.option("--out", default="demo", show_default=True, help="Folder for everything it makes.")
@common
def demo(out: str, json_file: str | None) -> None:
    """The whole pipeline on images that fastcon renders itself: teachers, store, students, probes, table and figure.

    \b
    fastcon demo --out demo
    """
    from fastcon.demo import run

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"

        def command(args: list[str]) -> dict[str, Any]:
            result.unlink(missing_ok=True)
            code = main.main([*args, "--json", str(result)], standalone_mode=False)
            if code:
                raise SystemExit(code)  # its error line is printed already
            return json.loads(result.read_text())

        finish(run(out, command, click.echo), json_file)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
