"""What stands between the supervisor and a program: run as a script of its own, it imports nothing of ours.

`tie PARENT PROGRAM [ARGUMENT ...]` becomes the program, after asking the kernel to kill it when the supervisor dies.
`guard` reads `+GROUP` and `-GROUP` lines from its input and, when the input ends, kills the groups not taken back.

The first is a program and not a `preexec_fn`, which runs Python between fork and exec, where a lock that another thread
held at the fork is held for ever. It costs about 20 ms a start and no memory: the process id stays the program's.
The second is needed because the kernel's promise holds for a child alone and not for the children of that child.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(arguments: list[str]) -> int:
    """Become a program, or guard some."""
    match arguments:
        case ["tie", parent, *argv] if argv:
            return _tie(int(parent), argv)
        case ["guard"]:
            return _guard()
    return 2


def _tie(parent: int, argv: list[str]) -> int:
    """Return only if the program cannot be run: 127, with the reason on stderr."""
    for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):  # a program inherits what is ignored
        signal.signal(ignored_by_python, signal.SIG_DFL)
    if sys.platform == "linux":
        _die_with_parent()
    if os.getppid() != parent:  # it died before the kernel was asked
        return 1
    try:
        os.execvp(argv[0], argv)  # noqa: S606  this is what the program is for; nothing is expanded
    except OSError as error:
        sys.stderr.write(f"cannot run {argv[0]!r}: {error.strerror}\n")
        return 127


def _die_with_parent() -> None:
    """Linux: SIGKILL for this process when the thread that forked it ends. Survives exec, not fork."""
    try:
        import ctypes  # noqa: PLC0415  half of this program's start; the guard does without

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL.value, 0, 0, 0)
    except (ImportError, OSError, AttributeError):  # a Python built without it: the guard is left
        return


def _guard() -> int:
    """Outlive the supervisor, whatever kills it: its end of the pipe closes with it."""
    groups: set[int] = set()
    for line in sys.stdin:
        if line.startswith("+"):
            groups.add(int(line[1:]))
        else:
            groups.discard(int(line[1:]))
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # PermissionError: macOS, all of it zombies
            os.killpg(group, signal.SIGKILL)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
