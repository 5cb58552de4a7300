"""teach, probe, rank, finetune, evaluate."""

from __future__ import annotations

from typing import Any

import click

from fastcon.cli.group import main
from fastcon.cli.options import common, group
from fastcon.cli.output import Bar, counted, finish, indexer, note
from fastcon.data.options import Indexing, Task
from fastcon.machine import Machine
from fastcon.transfer.options import FinetuneOptions, ProbeOptions, TuneOptions


@main.command()
@group("task", Task, split="t")
@click.option("--init", required=True, help="MODEL to start from.")
@click.option("--out", required=True, help="Folder of the run.")
@group("options", TuneOptions)
@group("machine", Machine)
@group("indexing", Indexing)
@common
def teach(
    task: Task,
    init: str,
    out: str,
    options: TuneOptions,
    machine: Machine,
    indexing: Indexing,
    json_file: str | None,
) -> None:
    """Fine-tune a MODEL into a task-specific teacher. Running it again resumes; the run is a MODEL.

    \b
    fastcon teach --train birds/ --holdout 0.5 --split t --init torchvision:resnet50@IMAGENET1K_V2 --out runs/birds
    """
    from fastcon.transfer import finetune as stage

    train, test = _parts(task, indexing, machine)
    bar = Bar("teach", "steps")
    result = stage.teach(init, train, test, out, options, machine, task.record(), say=note, progress=bar)
    bar.close()
    finish(
        {"out": out, "seconds": bar.seconds, **result},
        json_file,
        f"{out}: {result['accuracy']:.2%} of {result['test_images']:,} test images (learning rate {result['lr']:g})",
    )


@main.command()
@click.argument("backbones", nargs=-1, required=True)
@group("task", Task)
@group("options", ProbeOptions)
@group("machine", Machine)
@group("indexing", Indexing)
@common
def probe(
    backbones: tuple[str, ...],
    task: Task,
    options: ProbeOptions,
    machine: Machine,
    indexing: Indexing,
    json_file: str | None,
) -> None:
    """Few-shot linear SVM accuracy of the frozen features of each BACKBONE (a MODEL).

    \b
    fastcon probe runs/student runs/birds --train birds/ --holdout 0.5 --split d
    fastcon probe torchvision:resnet50@IMAGENET1K_V2 --train flowers/train --test flowers/test --trials 20
    """
    from fastcon.transfer.probe import probe as stage

    def show(row: dict[str, Any]) -> None:
        accuracy, ci95, std, trials = row["accuracy"], row["ci95"], row["std"], len(row["accuracies"])
        click.echo(f"{row['backbone']}: {accuracy:.2%} ± {ci95:.2%} (std {std:.2%}, {trials} trials)")

    finish(stage(backbones, task, options, machine, indexer(indexing), Bar, note, show), json_file)


@main.command()
@click.argument("models", nargs=-1, required=True)
@group("task", Task)
@click.option(
    "--top",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="So many are probed, those with the best LogME.",
)
@group("options", ProbeOptions)
@group("machine", Machine)
@group("indexing", Indexing)
@common
def rank(
    models: tuple[str, ...],
    task: Task,
    top: int,
    options: ProbeOptions,
    machine: Machine,
    indexing: Indexing,
    json_file: str | None,
) -> None:
    """Which of many MODELS to take for a task: all by LogME, which trains nothing, and the best of them by their probe.

    \b
    fastcon rank runs/* --train birds/ --holdout 0.5 --top 5 --trials 10
    """
    from fastcon.transfer.rank import rank as stage

    found = stage(models, task, options, machine, indexer(indexing), top, Bar, note)
    lines = []
    for place, row in enumerate(found["results"], 1):
        probed = f"{row['accuracy']:.2%} ± {row['ci95']:.2%}" if "accuracy" in row else "not probed"
        lines.append(f"{place:3}. {row['backbone']}: {probed}, LogME {row['logme']:.4f}")
    if found["agreement"] is not None:
        lines.append(f"LogME and the probes agree by a Kendall tau of {found['agreement']:.2f}")
    finish(found, json_file, "\n".join(lines))


@main.command()
@click.argument("backbone")
@group("task", Task)
@click.option("--out", required=True, help="Folder of the run.")
@group("options", FinetuneOptions, leave=("head",))
@group("machine", Machine)
@group("indexing", Indexing)
@common
def finetune(
    backbone: str,
    task: Task,
    out: str,
    options: FinetuneOptions,
    machine: Machine,
    indexing: Indexing,
    json_file: str | None,
) -> None:
    """Accuracy of a BACKBONE (a MODEL) fine-tuned on a downstream task. Running it again resumes.

    \b
    fastcon finetune runs/student --train birds/ --holdout 0.5 --split d --out runs/student-on-birds
    fastcon finetune runs/student --train birds/ --holdout 0.5 --split d --shots 5 --out runs/student-on-few-birds
    """
    from fastcon.models.origin import origin
    from fastcon.transfer import finetune as stage

    train, test = _parts(task, indexing, machine)
    bar = Bar("finetune", "steps")
    result = stage.finetune(backbone, train, test, out, options, machine, task.record(), say=note, progress=bar)
    bar.close()
    record = {
        "command": "finetune",
        "backbone": backbone,
        **origin(backbone),
        **task.record(),
        "seed": options.seed,
        "shots": options.shots,
        "trials": options.draws,
        "epochs": options.epochs,
        "lr_grid": list(options.lr_grid),
        "seconds": bar.seconds,
        **result,
    }
    finish(
        record,
        json_file,
        f"{backbone}: {result['accuracy']:.2%} ± {result['ci95']:.2%} ({counted(options.draws, 'trial')}), "
        f"fine-tuned on {result['train_images']:,} images of {result['classes']} classes",
    )


@main.command()
@click.argument("model")
@click.option("--head", default=None, help="Which head (default: the first).")
@group("task", Task, leave=("train",))
@click.option("--size", type=click.IntRange(8, 4096), default=None, help="Input size (default: the MODEL's).")
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True, help="Images per batch.")
@group("machine", Machine)
@group("indexing", Indexing)
@common
def evaluate(
    model: str,
    head: str | None,
    task: Task,
    size: int | None,
    batch_size: int,
    machine: Machine,
    indexing: Indexing,
    json_file: str | None,
) -> None:
    """Accuracy of a head on its own task (upstream accuracy); classes are matched by name.

    With --holdout only the part of --test that training kept aside is looked at.

    \b
    fastcon evaluate runs/student --head birds --test birds/ --holdout 0.5 --split t
    """
    from fastcon.models.load import load
    from fastcon.models.origin import origin
    from fastcon.ranks import join
    from fastcon.transfer.finetune import accuracy

    if not task.test:
        raise click.UsageError("Missing option '--test'.")
    ranks = join(machine.target)
    with ranks.agreeing(in_turn=True):
        loaded = load(model)
        loaded.set_size(size or loaded.size)
        test = task.held_out(indexer(indexing))
        name = head or loaded.heads[0].name
        loaded.head_index(name)
    value = accuracy(loaded, name, test, machine, batch_size, ranks)
    record = {
        "command": "evaluate",
        "model": model,
        **origin(model),
        "architecture": loaded.architecture,
        "head": name,
        "task": task.name if task.task or name == "task" else name,
        "split": task.split,
        "split_seed": task.split_seed,
        "accuracy": value,
        "test_images": len(test),
        "classes": len(test.classes),
    }
    finish(
        record,
        json_file,
        f"{model}, head {name}: {value:.2%} of {len(test):,} images in {len(test.classes)} classes",
    )


def _parts(task: Task, indexing: Indexing, machine: Machine) -> tuple[Any, Any]:
    from fastcon.ranks import join

    ranks = join(machine.target)
    with ranks.agreeing(in_turn=True):
        train, test = task.parts(indexer(indexing))
    note(f"{len(train.classes)} classes, {len(train):,} training and {len(test):,} test images")
    return train, test
