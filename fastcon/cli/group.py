"""The `fastcon` command: its help, and how errors, warnings and signals end a command."""

from __future__ import annotations

import warnings
from typing import Any

import click

from fastcon import __version__
from fastcon.cli import output
from fastcon.cli.output import flags, note
from fastcon.errors import FastconError, Interrupted, UsageError
from fastcon.machine import keep_freed_memory, rank
from fastcon.ranks import Told

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 75  # 75: EX_TEMPFAIL, run the same command again


class _Group(click.Group):
    """Prints fastcon's errors and warnings as one line each, and nothing more."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.obj = list(args)  # results say which command made them
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        shown = warnings.showwarning
        warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
        try:
            return super().invoke(ctx)
        except Interrupted as error:
            if rank()[0] == 0:  # torchrun's others were stopped with it
                click.echo(f"fastcon: {error}", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except Told:
            ctx.exit(EXIT_ERROR)
        except FastconError as error:
            click.echo(f"fastcon: {flags(str(error))}", err=True)
            ctx.exit(EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR)
        except BrokenPipeError:  # the reader of the output has closed it: click ends silently
            raise
        except OSError as error:
            click.echo(
                f"fastcon: {error.filename or 'the system'}: {error.strerror or error}: free space or mend the "
                "permissions, then run the same command again",
                err=True,
            )
            ctx.exit(EXIT_ERROR)
        finally:
            warnings.showwarning = shown


RANKED = ("precompute", "train", "teach", "finetune", "probe", "rank", "evaluate")
"""Commands that torchrun's processes may share."""


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
    command = click.get_current_context().invoked_subcommand
    if rank()[1] > 1 and command not in RANKED:
        raise (Told if rank()[0] else UsageError)(f"{command} runs in one process: start it without torchrun")
    output.quiet = rank()[0] > 0 and command != "precompute"  # of which each makes parts of its own
    keep_freed_memory()
