"""`make bench`: every bench in turn, or those named: `make bench ARGS="decision reload"`."""

import importlib
import pkgutil
import sys

import bench


def main() -> None:
    """Runs the benches that were named, or all."""
    known = sorted(module.name for module in pkgutil.iter_modules(bench.__path__) if not module.name.startswith("_"))
    wanted = sys.argv[1:] or known
    for name in wanted:
        if name not in known:
            raise SystemExit(f"there is no bench {name}; there are {', '.join(known)}")
        print(f"== {name}", flush=True)
        importlib.import_module(f"bench.{name}").main()


if __name__ == "__main__":
    main()
