"""`python -m claydist`: the command line."""

from claydist.cli import main

main()
