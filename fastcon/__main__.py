"""`python -m fastcon` is the command `fastcon`."""

from fastcon.cli.main import main

main()
