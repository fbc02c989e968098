"""What ext_proc costs, as `perch bench` measures it: `make bench ARGS=transport`.

With options of its own: `python -m bench.transport --rounds 9 --access-log`.
"""

import sys

from extproc.cli import app


def main() -> None:
    """`perch bench` with the options given here."""
    app(["bench", *sys.argv[1:]], standalone_mode=False)


if __name__ == "__main__":
    main()
