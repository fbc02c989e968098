"""Regenerates the projection protos: `make protos`. A test compares the committed files with what this writes."""

import sys
from importlib.resources import files
from pathlib import Path

HERE = Path(__file__).parent
PROTOS = tuple(sorted(HERE.glob("*.proto")))


def generate(into: Path) -> None:
    """Writes `*_pb2.py` and `*_pb2.pyi` for every .proto beside this file. Raises SystemExit where protoc refuses."""
    from grpc_tools import protoc  # noqa: PLC0415  only developers have it

    include = str(files("grpc_tools") / "_proto")
    arguments = [f"-I{HERE}", f"-I{include}", f"--python_out={into}", f"--pyi_out={into}", *map(str, PROTOS)]
    status = protoc.main(["protoc", *arguments])
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
