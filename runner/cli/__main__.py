"""`python -m runner.cli`: the command `hm`."""

from runner.cli import main

main()
