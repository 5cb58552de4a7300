"""What the ranks of test_ranks.py run, under torchrun: ranked.py CALLS, a JSON list of the arguments of `fastcon.train`, or
of the words of a command.

Each rank prints one JSON line a call: what it was told, how many steps it took, the last row of metrics or the error; of a
command what it printed, and its exit code.
"die": [rank, step] kills a rank with SIGKILL at a step, "stop": [rank, step] sends it SIGTERM; "only": {rank: arguments that
it alone gets}. Among the words of teach or finetune "stop@4" sends rank 1 SIGTERM at the fourth step.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from click.testing import CliRunner

import fastcon
from fastcon.cli.main import main
from fastcon.errors import FastconError
from fastcon.machine import rank
from fastcon.ranks import Told


def run(call: dict | list) -> None:
    number, said = rank()[0], []
    if isinstance(call, list):
        from fastcon.transfer import finetune

        stop = [int(word.partition("@")[2]) for word in call if word.startswith("stop@")]
        real_rate, seen = finetune.set_rate, []

        def stopping(*args):
            seen.append(1)
            if [len(seen)] == stop and number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return real_rate(*args)

        finetune.set_rate = stopping
        told = CliRunner().invoke(main, [word for word in call if not word.startswith("stop@")])
        finetune.set_rate = real_rate
        line = {"rank": number, "output": told.output, "code": told.exit_code, "error": repr(told.exception)}
        os.write(1, f"{json.dumps(line)}\n".encode())
        return
    ends = {signal.SIGKILL: call.pop("die", None), signal.SIGTERM: call.pop("stop", None)}
    mine = call.pop("only", {}).get(str(number), {})

    def say(line: str) -> None:
        said.append(line)

    from fastcon.distill import train as module

    real = module.set_rate
    steps = []

    def at_step(*args):
        steps.append(1)
        for kind, place in ends.items():
            if place == [number, len(steps)]:
                os.kill(os.getpid(), kind)
        return real(*args)

    module.set_rate = at_step
    try:
        told = {"row": fastcon.train(**{**call, **mine}, say=say)}
    except FastconError as error:
        told = {"error": str(error), "quiet": isinstance(error, Told)}
    finally:
        module.set_rate = real
    line = json.dumps({"rank": number, "said": said, "steps": len(steps), **told})
    os.write(1, f"{line}\n".encode())  # at once, so that lines of several ranks do not mix


if __name__ == "__main__":
    for call in json.loads(sys.argv[1]):
        run(call)
