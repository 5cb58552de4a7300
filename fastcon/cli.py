"""The command line: parses, calls, prints. The only module that knows click; heavy imports happen inside commands."""

from __future__ import annotations

import json
import sys
import tomllib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from fastcon import __version__, memory
from fastcon.errors import FastconError, Interrupted, UsageError

FEW = 10
"""Features are computed and kept of a whole set, for every draw and split to come, unless a probe needs less than 1 in 10."""
EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 75  # 75: EX_TEMPFAIL, run the same command again


class _Group(click.Group):
    """Prints fastcon's errors and warnings as one line each, and nothing else of them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.obj = list(args)  # results say which command made them
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        shown = warnings.showwarning
        warnings.showwarning = lambda message, *_, **__: _note(f"warning: {message}")
        try:
            return super().invoke(ctx)
        except Interrupted as error:
            click.echo(f"fastcon: {error}", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except FastconError as error:
            click.echo(f"fastcon: {error}", err=True)
            ctx.exit(EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR)
        except OSError as error:
            click.echo(
                f"fastcon: {error.filename or 'the system'}: {error.strerror or error}: free space or mend the "
                "permissions, then run the same command again",
                err=True,
            )
            ctx.exit(EXIT_ERROR)
        finally:
            warnings.showwarning = shown


def _from_file(ctx: click.Context, _: click.Parameter, path: str | None) -> None:
    if path is None:
        return
    try:
        values = tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise click.BadParameter(f"{path}: {error}") from error
    known = {name.lstrip("-"): p.name for p in ctx.command.params for name in p.opts}
    unknown = [key for key in values if key not in known]
    if unknown:
        raise click.BadParameter(f"{path}: {unknown[0]!r} is no option of {ctx.command.name}")
    ctx.default_map = {**(ctx.default_map or {}), **{known[key]: value for key, value in values.items()}}


def _options(*decorators: Callable) -> Callable:
    def apply(function: Callable) -> Callable:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def _option(*names: str, **settings: Any) -> Callable:
    if not settings.get("is_flag") and settings.get("default") is not None:
        settings.setdefault("show_default", True)
    return click.option(*names, **settings)


class _Pair(click.ParamType):
    name = "NAME=MODEL"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, equals, model = value.partition("=")
        if not (name and equals and model):
            self.fail(f"{value!r} is not NAME=MODEL, as birds=runs/birds", param, ctx)
        return name, model


_precision = _option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="What the network computes in; heads are always float32.",
)
_machine = _options(
    _option("--device", default="auto", help="cpu, cuda, cuda:1 … ; auto: a GPU if there is one."),
    _option("--loader", type=click.Choice(["dali", "torchvision"]), default="dali", help="Who decodes."),
    _option(
        "--threads",
        type=click.IntRange(1),
        default=None,
        help="Threads, to decode and to compute (default: one a core).",
    ),
)


def _writable(ctx: click.Context, param: click.Parameter, path: str | None) -> str | None:
    """Refuse a place for the result before hours of work rather than after."""
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise click.BadParameter(f"{path}: there is no folder {Path(path).absolute().parent}")
    return path


def _checked_split(ctx: click.Context, param: click.Parameter, text: str) -> str:
    from fastcon.splits import parse_split

    parse_split(text)
    return text


_common = _options(
    _option(
        "--config",
        type=click.Path(),
        is_eager=True,
        expose_value=False,
        callback=_from_file,
        help="TOML file with any of these options; flags win.",
    ),
    _option(
        "--json",
        "json_file",
        type=click.Path(dir_okay=False),
        default=None,
        callback=_writable,
        help="Also write the result to this file.",
    ),
)
_indexing = _options(
    _option("--trust-images", is_flag=True, help="Read headers only, do not decode every image once."),
    _option("--strict", is_flag=True, help="Stop if any image cannot be used, instead of leaving it out."),
)
_data = _options(
    _option("--train", "train_images", multiple=True, required=True, help="Labelled training IMAGES (repeatable)."),
    _option("--test", "test_images", multiple=True, help="Labelled test IMAGES."),
    _option(
        "--holdout",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        default=None,
        help="Instead of --test: this share of every class is kept aside as the test part.",
    ),
)


def _split(default: str) -> Callable:
    return _option(
        "--split",
        metavar="none|t|d",
        default=default,
        callback=_checked_split,
        help="All classes, one random half (t or d), or a part of one (t2/5).",
    )


def _mode(batch_norm: str, dropout: bool) -> Callable:
    return _options(
        _option(
            "--batch-norm",
            type=click.Choice(["auto", "running", "batch"]),
            default=batch_norm,
            help="Train on the running statistics, which stay as they are, or on each batch's; auto: running, if there are any.",
        ),
        _option(
            "--dropout/--no-dropout",
            default=dropout,
            show_default=True,
            help="With dropout and stochastic depth, where the network has them.",
        ),
    )


_task = _option("--task", default=None, help="What the task is called in reports (default: after the IMAGES).")
_split_seed = _option("--split-seed", type=click.IntRange(0), default=0, help="Seed of hold-out and class split.")
_dry_run = _option("--dry-run", is_flag=True, help="Print what would be done and what it would cost.")
_SEED = {"type": click.IntRange(0, 2**64 - 1), "default": 0}


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Many teachers, stored logits, one student: representation consolidation (arXiv 2107.08039).

    \b
    fastcon teach      --train birds/ --holdout 0.5 --split t --init MODEL --out runs/birds
    fastcon precompute proxy/ --store store --views 4 --generalist imagenet=MODEL --teacher birds=runs/birds
    fastcon train      --store store --out runs/student
    fastcon probe      runs/student runs/birds --train birds/ --holdout 0.5 --split d

    IMAGES is a folder (sub-folders are classes), tar shards ('proxy-{000..005}.tar'), a text file of paths, or
    torchvision:Flowers102?root=…&split=train. MODEL is torchvision:NAME[@WEIGHTS], timm:NAME[@pretrained],
    python:MODULE:FACTORY, a .safetensors file or the folder of a run; options follow a '?': ?size=64&mean=…&std=….
    """
    memory.keep_freed()


@main.command()
@click.argument("images", nargs=-1, required=True)
@_option("--store", required=True, help="Folder (or s3:// URL) of the store.")
@_option("--views", type=click.IntRange(1), required=True, help="Augmented views of every image.")
@_option("--generalist", type=_Pair(), default=None, help="The generalist: the student starts from it.")
@_option("--teacher", "teachers", type=_Pair(), multiple=True, help="A task-specific teacher (repeatable).")
@_option("--seed", **_SEED, help="Seed of crops, flips and order.")
@_option("--size", type=click.IntRange(8, 4096), default=224, help="Side of the views, in pixels.")
@_option(
    "--scale",
    type=click.FloatRange(0, 1, min_open=True),
    nargs=2,
    default=(0.08, 1.0),
    help="Range of the crop's area.",
)
@_option("--logits", default="float16", help="How logits are stored: float16, float32, uint8 or topK, as top32.")
@_option("--bake", is_flag=True, help="Keep every view as a JPEG in the store, to train without the photos.")
@_option("--bake-quality", type=click.IntRange(1, 100), default=None, help="JPEG quality of baked views (default: 90).")
@_option("--batch-size", type=click.IntRange(1), default=128, help="Images a batch.")
@_machine
@_precision
@_indexing
@_dry_run
@_common
def precompute(
    images: tuple[str, ...],
    store: str,
    views: int,
    generalist: tuple[str, str] | None,
    teachers: tuple[tuple[str, str], ...],
    seed: int,
    size: int,
    scale: tuple[float, float],
    logits: str,
    bake: bool,
    bake_quality: int | None,
    batch_size: int,
    device: str,
    precision: str,
    loader: str,
    threads: int | None,
    trust_images: bool,
    strict: bool,
    dry_run: bool,
    json_file: str | None,
) -> None:
    """Run every teacher once over augmented views of IMAGES and store its logits.

    Running it again resumes; more --views or another --teacher compute just those.

    \b
    fastcon precompute proxy/ --store store --views 4 --generalist imagenet=torchvision:resnet50@IMAGENET1K_V2 \\
        --teacher birds=runs/birds
    """
    if scale[0] > scale[1]:
        raise UsageError(f"--scale {scale[0]} {scale[1]}: the smaller share of the area comes first")
    if generalist is None and not teachers:
        raise UsageError("no teacher given: --generalist NAME=MODEL, --teacher NAME=MODEL, or both")
    if bake_quality and not bake:
        raise UsageError("--bake-quality says how to bake views: give --bake, too")
    from fastcon import models
    from fastcon import precompute as stage
    from fastcon.codec import codec
    from fastcon.store import Recipe, Store

    stored = codec(logits)
    chosen = models.choose_device(device)
    used = models.choose_precision(precision, chosen, training=False)
    settings = stage.Settings(batch_size, chosen, loader, threads, used, logits)
    recipe = Recipe(seed, size, scale, bake=(bake_quality or 90) if bake else None)
    named = ([generalist] if generalist else []) + list(teachers)
    stage.check_names([name for name, _ in named])
    loaded = [
        stage.Teacher(name, spec, models.load(spec, size=size), (name, spec) == generalist) for name, spec in named
    ]
    manifest = _index(images, trust_images, strict)
    rows = len(manifest) * views
    _note(f"{len(manifest):,} images x {views} views = {rows:,} rows; {_classes(loaded)}")
    if generalist is None and not _has_generalist(store):
        _note(
            "no generalist: the paper found (Table 4) that students without one lose on unrelated tasks what they gain "
            "on the related; --generalist can be added to this store later"
        )
    if dry_run:
        rate, baked = stage.measure(manifest, loaded, recipe, settings)
        width = round(baked + sum(stored.row_bytes(len(t.model.heads[0].classes)) for t in loaded))
        _finish(
            {
                "images": len(manifest),
                "rows": rows,
                "bytes": rows * width,
                "rows_per_second": rate,
                "seconds": rows / rate,
            },
            json_file,
            f"would store {_bytes(rows * width)} in about {_seconds(rows / rate)} ({rate:,.0f} rows/s here)",
        )
        return
    bar = _Bar("precompute", "rows")
    done = stage.precompute(store, manifest, loaded, recipe, views, settings, bar)
    bar.close()
    whole = Store(store)
    result = {
        "store": store,
        "images": len(manifest),
        "views": whole.views,
        "rows_computed": done,
        "seconds": bar.seconds,
        "rejects": manifest.rejects,
    }
    text = f"{done:,} rows computed in {_seconds(bar.seconds)}" if done else "every row is there: nothing to do"
    _finish(result, json_file, f"{store}: {text}; {_bytes(_size_of(store))} on disk")


@main.command()
@_option("--store", required=True, help="The store that precompute made.")
@_option("--out", required=True, help="Folder of the run.")
@_option("--images", multiple=True, help="Where the images are now (default: where they were).")
@_option("--student", default=None, help="MODEL to start from (default: the store's generalist).")
@_option(
    "--method",
    type=click.Choice(["consolidate", "traditional", "soft-label"]),
    default="consolidate",
    help="All heads; the teachers' alone; the generalist's alone.",
)
@_option("--heads", default=None, help="NAME,… of the teachers to use (default: all).")
@_option(
    "--views", type=click.IntRange(1), default=None, help="Use the first so many views of the store (default: all)."
)
@_option("--balance", default="1:1", help="OLD:NEW weight of the generalist against the teachers.")
@_option("--temperature", type=click.FloatRange(0, min_open=True), default=2.0, help="T of the softmax.")
@_option("--labels", is_flag=True, help="Add a supervised head where the proxy has classes.")
@_option("--epochs", type=click.IntRange(1), default=40, help="Passes over the images.")
@_option("--batch-size", type=click.IntRange(1), default=32, help="Images a step.")
@_option("--lr-backbone", type=click.FloatRange(0), default=0.001, help="Learning rate of the backbone.")
@_option("--lr-heads", type=click.FloatRange(0), default=0.01, help="Learning rate of the heads.")
@_option("--momentum", type=click.FloatRange(0, 1), default=0.9, help="Momentum of SGD.")
@_option("--weight-decay", type=click.FloatRange(0), default=1e-4, help="Weight decay.")
@_mode("auto", dropout=False)
@_option("--seed", **_SEED, help="Seed of new heads and of the order.")
@_option(
    "--lanes", type=click.IntRange(1), default=None, help="Runs that a batch is drawn from (default: 8, 4, 2 or 1)."
)
@_option(
    "--compile",
    "compile_",
    type=click.Choice(["none", "default", "graphs"]),
    default="none",
    help="torch.compile; graphs: with CUDA graphs, for small batches on a GPU.",
)
@_option("--exact-pixels", is_flag=True, help="Refuse images that decode to any other pixel than recorded.")
@_option("--log-every", type=click.IntRange(1), default=100, help="Steps between rows of metrics.jsonl.")
@_option("--checkpoint-minutes", type=click.FloatRange(0), default=5.0, help="Time between checkpoints.")
@_option("--tensorboard", is_flag=True, help="Write TensorBoard events too (extra).")
@_machine
@_indexing
@_precision
@_dry_run
@_common
def train(
    store: str,
    out: str,
    images: tuple[str, ...],
    student: str | None,
    method: str,
    heads: str | None,
    views: int | None,
    balance: str,
    temperature: float,
    labels: bool,
    epochs: int,
    batch_size: int,
    lr_backbone: float,
    lr_heads: float,
    momentum: float,
    weight_decay: float,
    batch_norm: str,
    dropout: bool,
    seed: int,
    lanes: int | None,
    compile_: str,
    exact_pixels: bool,
    log_every: int,
    checkpoint_minutes: float,
    tensorboard: bool,
    device: str,
    precision: str,
    loader: str,
    threads: int | None,
    trust_images: bool,
    strict: bool,
    dry_run: bool,
    json_file: str | None,
) -> None:
    """Train a student on the stored logits of all teachers. Running it again resumes.

    \b
    fastcon train --store store --out runs/student
    fastcon train --store store --out runs/related --balance 1:3 --epochs 10
    """
    from fastcon import objective
    from fastcon import train as stage
    from fastcon.loader import Schedule
    from fastcon.store import Store

    options = stage.Options(
        method=method,
        heads=tuple(heads.split(",")) if heads else (),
        views=views,
        student=student,
        balance=objective.parse_balance(balance),
        temperature=temperature,
        labels=labels,
        epochs=epochs,
        batch_size=batch_size,
        lr_backbone=lr_backbone,
        lr_heads=lr_heads,
        momentum=momentum,
        weight_decay=weight_decay,
        batch_norm=batch_norm,
        dropout=dropout,
        seed=seed,
        lanes=lanes,
        precision=precision,
    )
    machine = stage.Machine(
        device, loader, threads, compile_, exact_pixels, log_every, checkpoint_minutes * 60, tensorboard=tensorboard
    )
    opened = Store(store)
    if dry_run:
        names = objective.choose_heads(method, list(opened.teachers), opened.generalist, options.heads)
        lambdas = dict(zip(names, objective.head_weights(names, opened.generalist, options.balance), strict=True))
        schedule = Schedule(opened.rows, views or opened.views, opened.recipe.chunk_rows, batch_size, lanes or 1, seed)
        width = sum(opened.logit_bytes(name) for name in names)
        cost: dict[str, Any] = {
            "steps": schedule.steps * epochs,
            "images_left_out": schedule.left_out,
            "logit_bytes_read": schedule.steps * epochs * batch_size * width,
            "weights": lambdas,
        }
        heads_line = ", ".join(f"{name} (weight {value:.3g})" for name, value in lambdas.items())
        _finish(
            cost,
            json_file,
            f"would train {cost['steps']:,} steps of {batch_size}, reading {_bytes(cost['logit_bytes_read'])} of logits: "
            f"{heads_line}",
        )
        return
    baked = opened.recipe.bake is not None and not images and not labels
    manifest = None if baked else _index(images or opened.record["images"]["sources"], trust_images, strict)
    bar = _Bar("train", "steps")
    row = stage.train(store, out, options, machine, manifest, say=_note, progress=bar)
    bar.close()
    heads_line = "; ".join(
        f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in head.items())
        for name, head in row["heads"].items()
    )
    _finish({"out": out, "seconds": bar.seconds, **row}, json_file, f"{out}: loss {row['loss']:.4f} ({heads_line})")
    if bar.seconds > 60:
        from fastcon.info import describe

        for line in describe(out)[1].splitlines():
            if line.startswith(("  time:", "  to be faster:")):
                _note(line.strip())


@main.command()
@click.argument("backbones", nargs=-1, required=True)
@_data
@_split(default="none")
@_split_seed
@_task
@_option(
    "--shots",
    type=click.IntRange(1),
    default=None,
    help="Training images a class in each trial, by default 5; of a multi-label task images in all, by default 1000.",
)
@_option("--full", is_flag=True, help="Train once on all images instead.")
@_option("--trials", type=click.IntRange(1), default=None, help="Draws of training images (default: 50).")
@_option("--folds", type=click.IntRange(2), default=5, help="Cross-validation folds that choose C.")
@_option("--c-grid", default="0.001,0.01,0.1,1,10,100,1000", help="Values of C.")
@_option(
    "--solver", type=click.Choice(["auto", "batched", "sklearn", "cuml"]), default="auto", help="Who solves the SVMs."
)
@_option(
    "--scale-features", type=click.Choice(["none", "l2"]), default="none", help="Scaling of features (the paper: none)."
)
@_option("--size", type=click.IntRange(8, 4096), default=None, help="Input size (default: the backbones').")
@_option("--batch-size", type=click.IntRange(1), default=128, help="Images a batch.")
@_option("--seed", **_SEED, help="Seed of draws and folds: the same for every backbone.")
@_machine
@_precision
@_indexing
@_common
def probe(
    backbones: tuple[str, ...],
    train_images: tuple[str, ...],
    test_images: tuple[str, ...],
    holdout: float | None,
    split: str,
    split_seed: int,
    task: str | None,
    shots: int | None,
    full: bool,
    trials: int | None,
    folds: int,
    c_grid: str,
    solver: str,
    scale_features: str,
    size: int | None,
    batch_size: int,
    seed: int,
    device: str,
    precision: str,
    loader: str,
    threads: int | None,
    trust_images: bool,
    strict: bool,
    json_file: str | None,
) -> None:
    """Few-shot linear SVM accuracy of the frozen features of each BACKBONE (a MODEL).

    \b
    fastcon probe runs/student runs/birds --train birds/ --holdout 0.5 --split d
    fastcon probe torchvision:resnet50@IMAGENET1K_V2 --train flowers/train --test flowers/test --trials 20
    """
    from fastcon import models, splits
    from fastcon import probe as stage
    from fastcon.features import features
    from fastcon.precompute import Settings
    from fastcon.run import origin

    if full and (shots is not None or trials is not None):
        raise UsageError("--full trains once on all images: leave out --shots and --trials")
    grid = _floats(c_grid, "--c-grid")
    chosen = models.choose_device(device)
    used = models.choose_precision(precision, chosen, training=False)
    settings = Settings(batch_size, chosen, loader, threads, used)
    train_set, test_set = _labelled(train_images, test_images, holdout, split, split_seed, trust_images, strict)
    per_trial = None if full else shots or (splits.MULTI_LABEL_SHOTS if train_set.multi_label else splits.SHOTS)
    count = 1 if full else trials or stage.TRIALS
    loaded = [models.load(spec) for spec in backbones]
    side = size or _common_size(backbones, [model.size for model in loaded])
    _note(f"{len(train_set.classes)} classes, {len(train_set):,} training and {len(test_set):,} test images, {side} px")
    train_images_in_all = len(train_set)
    if per_trial is not None:
        touched = splits.drawn(train_set, per_trial, seed, count)
        train_set = splits.alone(touched) if FEW * len(touched) < len(train_set.manifest) else train_set
    test_set = splits.alone(test_set) if FEW * len(test_set) < len(test_set.manifest) else test_set
    rows = []
    for spec, model in zip(backbones, loaded, strict=True):
        model.on(settings.device)
        bar = _Bar(f"features {spec}", "images")
        arrays = [
            _scaled(features(model, part.manifest, settings, side, bar)[part.indices], scale_features)
            for part in (train_set, test_set)
        ]
        bar.close()
        bar = _Bar(f"probe {spec}", "trials")
        result = stage.few_shot(
            arrays[0],
            train_set.labels,
            arrays[1],
            test_set.labels,
            shots=per_trial,
            trials=count,
            c_grid=grid,
            folds=folds,
            solver=solver,
            seed=seed,
            ids=train_set.ids,
            classes=len(train_set.classes),
            device=str(chosen),
            threads=threads,
            progress=bar,
        )
        bar.close()
        rows.append(
            {
                "backbone": spec,
                **origin(spec),
                "accuracy": result.mean,
                "std": result.std,
                "ci95": result.ci95,
                "accuracies": result.accuracies,
                "chosen_c": result.chosen_c,
                "duality_gaps": result.gaps,
                "seconds": bar.seconds,
                "per_class": {
                    name: None if value != value else value  # NaN, for a class without test images, is no JSON
                    for name, value in zip(train_set.classes, result.per_class, strict=True)
                },
            }
        )
        click.echo(
            f"{spec}: {result.mean:.2%} ± {result.ci95:.2%} (std {result.std:.2%}, {len(result.accuracies)} trials)"
        )
    _finish(
        {
            "command": "probe",
            "backbones": list(backbones),
            **_data_record(train_images, test_images, holdout, split, split_seed, task),
            "seed": seed,
            "shots": per_trial,
            "trials": count,
            "folds": folds,
            "c_grid": grid,
            "solver": solver,
            "scale_features": scale_features,
            "size": side,
            "classes": len(train_set.classes),
            "multi_label": train_set.multi_label,
            "train_images": train_images_in_all,
            "test_images": len(test_set),
            "results": rows,
        },
        json_file,
    )


_tuning = _options(
    _option("--out", required=True, help="Folder of the run."),
    _option("--lr-grid", default="0.001,0.01,0.1", help="Learning rates; a held-out tenth chooses."),
    _option("--batch-size", type=click.IntRange(1), default=32, help="Images a step."),
    _option("--size", type=click.IntRange(8, 4096), default=None, help="Input size (default: the MODEL's)."),
    _option(
        "--scale",
        type=click.FloatRange(0, 1, min_open=True),
        nargs=2,
        default=(0.08, 1.0),
        help="Range of the crop's area.",
    ),
    _mode("batch", dropout=True),
)


@main.command()
@_data
@_split(default="t")
@_split_seed
@_task
@_option("--init", required=True, help="MODEL to start from.")
@_tuning
@_option("--epochs", type=click.IntRange(1), default=120, help="Passes over the training images.")
@_option("--head", default="task", help="Name of the head.")
@_option("--seed", **_SEED, help="Seed of views, order and the new head.")
@_machine
@_precision
@_indexing
@_common
def teach(init: str, out: str, size: int | None, json_file: str | None, **given: Any) -> None:
    """Fine-tune a MODEL into a task-specific teacher. Running it again resumes; the run is a MODEL.

    \b
    fastcon teach --train birds/ --holdout 0.5 --split t --init torchvision:resnet50@IMAGENET1K_V2 --out runs/birds
    """
    from fastcon import finetune as stage

    train_set, test_set, options, settings, data = _fine_tuning(**given)
    bar = _Bar("teach", "steps")
    result = stage.teach(init, train_set, test_set, out, options, settings, size, data, say=_note, progress=bar)
    bar.close()
    _finish(
        {"out": out, "seconds": bar.seconds, **result},
        json_file,
        f"{out}: {result['accuracy']:.2%} of {result['test_images']:,} test images (learning rate {result['lr']:g})",
    )


@main.command()
@click.argument("backbone")
@_data
@_split(default="none")
@_split_seed
@_task
@_tuning
@_option(
    "--shots",
    type=click.IntRange(1),
    default=None,
    help="Training images a class (multi-label: in all) in each trial; default: all images, once.",
)
@_option("--trials", type=click.IntRange(1), default=None, help="Draws of --shots (default: 5).")
@_option("--epochs", type=click.IntRange(1), default=50, help="Passes over the training images.")
@_option("--seed", **_SEED, help="Seed of draws, views, order and the new head.")
@_machine
@_precision
@_indexing
@_common
def finetune(
    backbone: str,
    out: str,
    size: int | None,
    shots: int | None,
    trials: int | None,
    json_file: str | None,
    **given: Any,
) -> None:
    """Accuracy of a BACKBONE (a MODEL) fine-tuned on a downstream task. Running it again resumes.

    \b
    fastcon finetune runs/student --train birds/ --holdout 0.5 --split d --out runs/student-on-birds
    fastcon finetune runs/student --train birds/ --holdout 0.5 --split d --shots 5 --out runs/student-on-few-birds
    """
    from fastcon import finetune as stage
    from fastcon.run import origin

    if trials is not None and shots is None:
        raise UsageError("--trials counts draws of --shots images a class: give --shots, too")
    train_set, test_set, options, settings, data = _fine_tuning(**given, milestones=stage.DOWNSTREAM)
    count = 1 if shots is None else trials or 5
    bar = _Bar("finetune", "steps")
    result = stage.finetune(
        backbone, train_set, test_set, out, options, settings, size, data, shots, count, say=_note, progress=bar
    )
    bar.close()
    _finish(
        {
            "command": "finetune",
            "backbone": backbone,
            **origin(backbone),
            **data,
            "seed": options.seed,
            "shots": shots,
            "trials": count,
            "epochs": options.epochs,
            "lr_grid": list(options.lr_grid),
            "seconds": bar.seconds,
            **result,
        },
        json_file,
        f"{backbone}: {result['accuracy']:.2%} ± {result['ci95']:.2%} ({_count(count, 'trial')}), fine-tuned on "
        f"{result['train_images']:,} images of {result['classes']} classes",
    )


@main.command()
@click.argument("model")
@_option("--head", default=None, help="Which head (default: the first).")
@_option("--test", "test_images", multiple=True, required=True, help="Labelled IMAGES (repeatable).")
@_option(
    "--holdout",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=None,
    help="Only the share of every class that training kept aside.",
)
@_split(default="none")
@_split_seed
@_task
@_option("--size", type=click.IntRange(8, 4096), default=None, help="Input size (default: the MODEL's).")
@_option("--batch-size", type=click.IntRange(1), default=128, help="Images a batch.")
@_machine
@_precision
@_indexing
@_common
def evaluate(
    model: str,
    head: str | None,
    test_images: tuple[str, ...],
    holdout: float | None,
    split: str,
    split_seed: int,
    task: str | None,
    size: int | None,
    batch_size: int,
    device: str,
    precision: str,
    loader: str,
    threads: int | None,
    trust_images: bool,
    strict: bool,
    json_file: str | None,
) -> None:
    """Accuracy of a head on its own task (upstream accuracy); classes are matched by name.

    \b
    fastcon evaluate runs/student --head birds --test birds/ --holdout 0.5 --split t
    """
    from fastcon import finetune, models, splits
    from fastcon.precompute import Settings
    from fastcon.run import origin, task_name

    chosen = models.choose_device(device)
    used = models.choose_precision(precision, chosen, training=False)
    settings = Settings(batch_size, chosen, loader, threads, used)
    loaded = models.load(model)
    loaded.set_size(size or loaded.size)
    manifest = _index(test_images, trust_images, strict)
    _, test = splits.labelled(manifest, manifest if holdout is None else None, holdout, split, split_seed)
    name = head or loaded.heads[0].name
    value = finetune.accuracy(loaded, name, test, settings)
    _finish(
        {
            "command": "evaluate",
            "model": model,
            **origin(model),
            "head": name,
            "task": task or (name if name != "task" else task_name(list(test_images))),
            "accuracy": value,
            "test_images": len(test),
            "classes": len(test.classes),
        },
        json_file,
        f"{model}, head {name}: {value:.2%} of {len(test):,} images in {len(test.classes)} classes",
    )


@main.command()
@click.argument("store")
@_option("--rows", type=click.IntRange(0), default=256, help="Rows a teacher to compute again.")
@_option("--images", multiple=True, help="Where the images are now (default: where they were).")
@_option("--repair", is_flag=True, help="Compute damaged chunks again.")
@_machine
@_indexing
@_common
def verify(
    store: str,
    rows: int,
    images: tuple[str, ...],
    repair: bool,
    device: str,
    loader: str,
    threads: int | None,
    trust_images: bool,
    strict: bool,
    json_file: str | None,
) -> None:
    """Check a STORE: checksums, digests and recipe in full, and a sample of rows computed again.

    \b
    fastcon verify store --rows 1000
    """
    from fastcon import models
    from fastcon.precompute import Settings
    from fastcon.store import Store
    from fastcon.verify import verify as stage

    settings = Settings(128, models.choose_device(device), loader, threads)
    manifest = _index(images or Store(store).record["images"]["sources"], trust_images, strict)
    checks = stage(store, manifest, rows, settings, repair)
    width = max(len(check.what) for check in checks)
    for check in checks:
        click.echo(f"{'ok    ' if check.passed else 'FAILED'}  {check.what:{width}}  {check.seen}")
    failed = [check for check in checks if not check.passed]
    _finish({"store": store, "passed": not failed, "checks": [vars(check) for check in checks]}, json_file)
    if failed:
        raise FastconError(
            f"{store}: {len(failed)} of {len(checks)} checks failed, first {failed[0].what}: {failed[0].seen}"
        )


@main.command()
@click.argument("path")
@_common
def info(path: str, json_file: str | None) -> None:
    """What a STORE or a RUN is, in a screen.

    \b
    fastcon info store
    """
    from fastcon.info import describe

    facts, text = describe(path)
    _finish(facts, json_file, text)


@main.command()
@click.argument("results", nargs=-1)
@_option("--out", required=True, help="Folder for the page, its tables and figures.")
@_option("--generalist", default=None, help="Which representation is the generalist that others are compared with.")
@_option("--related", multiple=True, help="TEACHER=TASK that counts as related, besides the teacher's own.")
@_option("--threshold", type=click.FloatRange(0), default=1.5, help="Points within which the tally says ≈.")
@_option("--title", default="fastcon report", help="Title of the page.")
@_option("--views", default=None, help="STORE of which sample views are shown, with what the teachers say of them.")
@_common
def report(
    results: tuple[str, ...],
    out: str,
    generalist: str | None,
    related: tuple[str, ...],
    threshold: float,
    title: str,
    views: str | None,
    json_file: str | None,
) -> None:
    """Tables, tally and figures of RESULTS on one page, OUT/index.html.

    RESULTS: JSON of probe, finetune and evaluate, RUN folders (learning curves, cost), CSV tables of accuracies in percent.

    \b
    fastcon report birds.json flowers.json runs/student --out report
    fastcon report benchmarks/paper/table4.csv --out report
    fastcon report --views store --out report
    """
    from fastcon.report import write_report

    facts = write_report(results, out, generalist, related, threshold, views, title, say=click.echo)
    _finish(facts, json_file, f"{out}/index.html")


@main.command()
@click.argument("first")
@click.argument("second", required=False)
@_option("--out", required=True, help="Folder for pairs.csv and sheet.png.")
@_option("--distance", type=click.IntRange(0, 32), default=10, help="Bits of 64 in which hashes may differ.")
@_option("--threads", type=click.IntRange(1), default=None, help="Decoding threads (default: one a core).")
@_indexing
@_common
def dedup(
    first: str,
    second: str | None,
    out: str,
    distance: int,
    threads: int | None,
    trust_images: bool,
    strict: bool,
    json_file: str | None,
) -> None:
    """Near-duplicate images between two IMAGES, or within one: resized, recompressed, cropped a little, brightened.

    \b
    fastcon dedup proxy/ birds/ --out duplicates
    """
    import csv
    import io

    from fastcon import dedup as stage
    from fastcon.checkpoint import write_atomically

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    sets = [_index((source,), trust_images, strict) for source in (first, second) if source is not None]
    prints = []
    for source, manifest in zip((first, second), sets, strict=False):
        bar = _Bar(f"hash {source}", "images")
        prints.append(stage.fingerprints(manifest, threads, bar))
        bar.close()
    bar = _Bar("compare", "images")
    pairs = stage.near_duplicates(prints[0], prints[1] if second else None, distance, threads, bar)
    bar.close()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["first", "second", "bits", "correlation"])
    writer.writerows([sets[0].name(p.first), sets[-1].name(p.second), p.bits, f"{p.correlation:.3f}"] for p in pairs)
    write_atomically(folder / "pairs.csv", text.getvalue().encode(errors="surrogateescape"))
    write_atomically(folder / "sheet.png", stage.contact_sheet(prints[0], prints[-1], pairs))
    images = " and ".join(f"{len(manifest):,}" for manifest in sets)
    _finish(
        {"images": [len(m) for m in sets], "pairs": len(pairs)},
        json_file,
        f"{len(pairs)} near-duplicate pairs among {images} images: {out}/pairs.csv, {out}/sheet.png",
    )


@main.command()
@click.argument("what", type=click.Choice(["kernel", "store", "loader", "train", "probe"]))
@_option(
    "--images",
    multiple=True,
    help="Photos for loader and train (default: rendered ones); labelled IMAGES for probe, each a task (repeatable).",
)
@_option("--backbone", default=None, help="For probe: the MODEL whose features of --images are used too.")
@_option("--store", default=None, help="For store: a store with float logits, whose codecs are compared.")
@_option("--device", default="auto", help="cpu, cuda, cuda:1 … ; auto: a GPU if there is one.")
@_common
def bench(
    what: str, images: tuple[str, ...], backbone: str | None, store: str | None, device: str, json_file: str | None
) -> None:
    """Time fastcon against what a user would pick instead, on the same input, interleaved in one run.

    --json gets the list of rows. From a checkout, a record with hardware and versions goes to benchmarks/results, too.

    \b
    fastcon bench loader --json loader.json
    fastcon bench store --store store
    """
    import importlib

    takes = {"--images": ("loader", "train", "probe"), "--backbone": ("probe",), "--store": ("store",)}
    takes |= {"--device": ("kernel", "loader", "train", "probe")}
    given = {"--images": images, "--backbone": backbone, "--store": store}
    given |= {"--device": None if device == "auto" else device}
    for name, benchmarks in takes.items():
        if given[name] and what not in benchmarks:
            raise UsageError(f"{name} is for {', '.join(benchmarks)}, not for bench {what}")
    from fastcon import bench as stage
    from fastcon import models
    from fastcon.checkpoint import write_atomically

    if what == "probe" and bool(images) != bool(backbone):
        raise UsageError("bench probe takes --images and --backbone together: features of one by the other")
    options: dict[str, Any] = {"images": images} if what in takes["--images"] else {}
    if what == "probe":
        options["backbone"] = backbone
    if what == "store":
        options["logits_of"] = store
    if what in takes["--device"]:
        options["device"] = models.choose_device(device)
    rows = importlib.import_module(f"fastcon.bench.{what}").bench(_note, **options)
    for row in rows:
        click.echo(
            f"{row['name']} ({row.get('case', row['n'])}): {_figure(row['ours'])} against {_figure(row['theirs'])} "
            f"{row['unit']}, ratio {row['ratio']:.2f}"
        )
    folder = stage.results_folder()
    if folder is not None:
        folder.mkdir(exist_ok=True)
        data = json.dumps(stage.record(rows), indent=2) + "\n"
        write_atomically(folder / f"{what}-{rows[0]['device']}.json", data.encode())
    _finish(rows, json_file)


@main.command()
@click.argument("file", required=False)
@click.argument("snakemake", nargs=-1, type=click.UNPROCESSED)
@_option("--overlay", "overlays", multiple=True, help="Study FILE whose values replace the study's (repeatable).")
@_option(
    "--data", "data_folder", default=None, help="Folder where each data set lies under its name (fastcon data list)."
)
@_option("--out", default=None, help="Folder for everything the study makes.")
@_option("--device", default="auto", help="For the estimate of --dry-run: cpu, cuda …")
@_option("--dry-run", is_flag=True, help="Print the commands, what they need, and what they would cost.")
@_common
def study(
    file: str | None,
    snakemake: tuple[str, ...],
    overlays: tuple[str, ...],
    data_folder: str | None,
    out: str | None,
    device: str,
    dry_run: bool,
    json_file: str | None,
) -> None:
    """Run a study FILE (TOML), or one of those that come with fastcon: all commands of an experiment, once each.

    Without FILE: lists them. Running it again resumes. What follows -- goes to Snakemake, which runs the commands.

    \b
    fastcon study
    fastcon study table4 --dry-run
    fastcon study table4 --overlay small --out studies/small
    fastcon study table4 --data /data --out studies/table4 -- --executor slurm --jobs 20
    """
    from fastcon import models
    from fastcon import study as stage

    if file is None:
        names = stage.shipped()
        _finish({"studies": names}, json_file, "\n".join(f"{name:10} {title}" for name, title in names.items()))
        return
    if not dry_run and out is None:
        raise UsageError("a study needs --out FOLDER (or --dry-run)")
    planned = stage.load(file, overlays, data_folder)
    for job in planned.jobs:
        main.commands[job.command[0]].make_context(job.command[0], list(job.command[1:]), resilient_parsing=False)
    if dry_run:
        facts, text = stage.describe(planned, models.choose_device(device), _note)
        _finish(facts, json_file, text)
        return
    missing = next(
        (word for job in planned.jobs for word in job.command if word.startswith("data:") and "=DATA/" in word), ""
    )
    if missing:
        raise UsageError(f"the study needs the data set {missing.partition('?')[0]}: give its folder with --data")
    facts = stage.run(planned, str(out), snakemake, _note)
    _finish(facts, json_file, facts["report"])


@main.command()
@click.argument("action", type=click.Choice(["list"]))
@_common
def data(action: str, json_file: str | None) -> None:
    """The named data sets: what they are, where a user gets them, what must lie under `root` of data:NAME?root=….

    \b
    fastcon data list
    """
    from fastcon.datasets import DATASETS

    facts = {
        name: {key: getattr(known, key) for key in ("title", "classes", "parts", "train", "test", "where", "files")}
        for name, known in DATASETS.items()
    }
    lines = []
    for name, known in DATASETS.items():
        parts = ", ".join(f"{part} {count:,}" for part, count in known.parts.items())
        lines.append(f"{name}: {known.title}; {known.classes:,} classes; images: {parts}")
        lines += [f"    from  {known.where}", f"    files {known.files}"]
    _finish(facts, json_file, "\n".join(lines))


@main.command()
@_option("--out", default="demo", help="Folder for everything it makes.")
@_common
def demo(out: str, json_file: str | None) -> None:
    """The whole story on images that fastcon renders itself: teachers, store, students, probes, table and figure.

    \b
    fastcon demo --out demo
    """
    import tempfile

    from fastcon.demo import run

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"

        def command(args: list[str]) -> dict[str, Any]:
            result.unlink(missing_ok=True)
            code = main.main([*args, "--json", str(result)], standalone_mode=False)
            if code:
                raise SystemExit(code)  # its one line is printed already
            return json.loads(result.read_text())

        _finish(run(out, command, click.echo), json_file)


def _labelled(
    train: tuple[str, ...],
    test: tuple[str, ...],
    holdout: float | None,
    split: str,
    split_seed: int,
    trust: bool,
    strict: bool,
) -> Any:
    from fastcon import splits

    if bool(test) == (holdout is not None):
        raise UsageError("give the test part either as --test IMAGES or as --holdout FRACTION of --train")
    train_set = _index(train, trust, strict)
    test_set = _index(test, trust, strict) if test else None
    return splits.labelled(train_set, test_set, holdout, split, split_seed)


def _fine_tuning(
    train_images: tuple[str, ...],
    test_images: tuple[str, ...],
    holdout: float | None,
    split: str,
    split_seed: int,
    task: str | None,
    device: str,
    loader: str,
    threads: int | None,
    trust_images: bool,
    strict: bool,
    lr_grid: str,
    **hyperparameters: Any,
) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
    """Of teach and finetune: training and test images, finetune.Options, Settings, and the record of the data."""
    from fastcon import finetune, models
    from fastcon.precompute import Settings

    options = finetune.Options(lr_grid=tuple(_floats(lr_grid, "--lr-grid")), **hyperparameters)
    chosen = models.choose_device(device)
    used = models.choose_precision(options.precision, chosen, training=False)
    parts = _labelled(train_images, test_images, holdout, split, split_seed, trust_images, strict)
    _note(f"{len(parts[0].classes)} classes, {len(parts[0]):,} training and {len(parts[1]):,} test images")
    data = _data_record(train_images, test_images, holdout, split, split_seed, task)
    return *parts, options, Settings(128, chosen, loader, threads, used), data


def _data_record(
    train: tuple[str, ...],
    test: tuple[str, ...],
    holdout: float | None,
    split: str,
    split_seed: int,
    task: str | None,
) -> dict[str, Any]:
    from fastcon.run import task_name

    return {
        "task": task or task_name(list(train)),
        "train": list(train),
        "test": list(test),
        "holdout": holdout,
        "split": split,
        "split_seed": split_seed,
    }


def _index(images: Sequence[str], trust: bool, strict: bool) -> Any:
    from fastcon.manifest import index

    bar = _Bar("index", "images")
    manifest = index(images, trust=trust, strict=strict, progress=bar)
    bar.close()
    if manifest.rejects:
        name, reason = manifest.rejects[0]
        _note(f"{len(manifest.rejects)} images left out, first {name!r}: {reason} (--strict refuses them)")
    return manifest


class _Bar:
    """Progress(done, total): a bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, what: str, unit: str) -> None:
        import time

        self._what, self._unit, self._clock = what, unit, time.monotonic
        self._bar: Any = None
        self._start = self._said = time.monotonic()
        self.seconds = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        if sys.stderr.isatty():
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=total, desc=self._what, unit=f" {self._unit}", leave=False)
            self._bar.n = done
            self._bar.update(0)
        elif now - self._said > 20:
            self._said = now
            click.echo(f"{self._what}: {done:,} of {total:,} {self._unit}, {now - self._start:.0f} s", err=True)

    def close(self) -> None:
        self.seconds = self._clock() - self._start
        if self._bar is not None:
            self._bar.close()


def _note(line: str) -> None:
    click.echo(f"fastcon: {line}", err=True)


def _finish(result: Any, json_file: str | None, text: str = "") -> None:
    if text:
        click.echo(text)
    if json_file:
        from fastcon.checkpoint import write_atomically

        if isinstance(result, dict):
            result = result | {"argv": _made_by(click.get_current_context().find_root().obj)}
        write_atomically(Path(json_file), (json.dumps(result, indent=2) + "\n").encode())


def _made_by(argv: list[str]) -> list[str]:
    """The command without its --json FILE, so that equal commands are equal wherever their results go."""
    kept, words = [], iter(argv)
    for word in words:
        if word == "--json":
            next(words)
        elif not word.startswith("--json="):
            kept.append(word)
    return kept


def _floats(text: str, option: str) -> list[float]:
    try:
        values = [float(part) for part in str(text).split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r} is not numbers with commas between them, as 0.01,0.1") from None
    if not all(0 < value < float("inf") for value in values):
        raise UsageError(f"{option} {text}: every value must be above 0")
    return values


def _common_size(backbones: tuple[str, ...], sizes: list[int]) -> int:
    if len(set(sizes)) > 1:
        pairs = ", ".join(f"{spec}: {size}" for spec, size in zip(backbones, sizes, strict=True))
        raise UsageError(f"the backbones name different input sizes ({pairs}): choose one with --size")
    return sizes[0]


def _scaled(features: Any, how: str) -> Any:
    import numpy as np

    if how == "none":
        return features
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _has_generalist(path: str) -> bool:
    from fastcon.store import Store

    try:
        return Store(path).generalist is not None
    except FastconError:
        return False


def _classes(teachers: list[Any]) -> str:
    return ", ".join(f"{t.name} ({len(t.model.heads[0].classes)} classes)" for t in teachers)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _size_of(path: str) -> int:
    return 0 if "://" in path else sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _seconds(count: float) -> str:
    return f"{count:.0f} s" if count < 120 else f"{count / 60:.1f} min" if count < 7200 else f"{count / 3600:.1f} h"
