"""`python -m extproc` is `perch`."""

from extproc.cli import main

main()
