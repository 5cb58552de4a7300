"""`python -m fastcon` is the command `fastcon`."""

from fastcon.cli import main

main()
