"""`make bench`: every bench in turn, or those named: `make bench ARGS="decision reload"`."""

import importlib
import pkgutil
import sys

import bench

ONLY_NAMED = {"fuzz", "instructions"}
"""Not for a run of everything: the first goes on for a million inputs, the second needs valgrind."""


def main() -> None:
    """Runs the benches that were named, or all that measure."""
    known = sorted(module.name for module in pkgutil.iter_modules(bench.__path__) if not module.name.startswith("_"))
    wanted = sys.argv[1:] or [name for name in known if name not in ONLY_NAMED]
    for name in wanted:
        if name not in known:
            raise SystemExit(f"there is no bench {name}; there are {', '.join(known)}")
        print(f"== {name}", flush=True)
        sys.argv = [name]  # what follows the name here is another bench, not an option of this one
        importlib.import_module(f"bench.{name}").main()


if __name__ == "__main__":
    main()
