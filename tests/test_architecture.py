"""The import table of the house, and the laws that can be read from the source. A new module needs a row here."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TABLE = """
module                | may import of ours                                            | third party
----------------------|---------------------------------------------------------------|-----------------------------------
core                  | core                                                          |
core.bucketing        | core                                                          | mmh3
core.conditions       | core                                                          | re2
core.firsts           | core                                                          | numpy
core.kpis             | core                                                          | mmh3
core.latency          | core                                                          | numpy
core.schema           | core                                                          | pydantic
core.ruleschema       | core                                                          | pydantic
core.scalars          | core                                                          | pydantic
core.validation       | core                                                          | pydantic
core.vectorbins       | core                                                          | numpy
wire.answer           | core wire                                                     | google.protobuf
wire.requests         | core wire                                                     |
wire.shapes           | core wire                                                     | google.protobuf
wire.columns          | wire                                                          |
wire.outcomes         | core wire                                                     | google.protobuf
wire.replies          | core                                                          | envoy_data_plane
wire.generate         |                                                               | grpc_tools
transport             | transport                                                     |
transport.grpcio      | transport.listen                                              | grpc
transport.heads       | transport                                                     | hpack
address               |                                                               |
statefiles            |                                                               |
events                |                                                               |
watch                 |                                                               | watchfiles
settings              | address                                                       | pydantic pydantic_settings
datagrams             |                                                               |
metrics               | datagrams                                                     | statsd
modelsfile            | address                                                       | yaml
envoyadmin            | address                                                       | aiohttp
envoyfile             | core envoyfile address modelsfile statefiles                  | yaml
supervisor            | supervisor_child                                              |
supervisor_child      |                                                               |
flagyaml              | core                                                          | yaml
flagread              | core flagyaml statefiles                                      |
flagprint             | core                                                          | yaml
flagschema            | core                                                          |
flagtests             | core flagread flagyaml                                        | pydantic
flagfile              | core flagyaml statefiles watch                                |
flagcompiler          | core flagread flagyaml wire.replies                           |
receiver              | core wire.answer flagcompiler flagfile                        |
workers               | flagcompiler                                                  |
accesslog             | wire.outcomes transport.grpcio                                | grpc
answering             | core wire.answer metrics receiver                             |
controller            | core                                                          |
metricnames           |                                                               |
telemetry             | core                                                          |
cohorts               | core telemetry                                                |
requestmetrics        | core accesslog cohorts metricnames metrics telemetry          | prometheus_client
reconciling           | core envoyadmin                                               |
api                   |                                                               | aiohttp
apitoken              |                                                               | aiohttp
probe                 |                                                               |
outcomesapi           | api core                                                      | aiohttp
client                |                                                               |
explain               | core flagfile flagread                                        |
planning              | core explain flagfile flagread                                |
checking              | core flagfile flagread flagtests                              |
bench                 | bench envoyadmin envoyfile modelsfile settings supervisor     | yaml
bench.logsink         | accesslog wire.outcomes                                       |
bench.showing         | bench                                                         | rich
bench.command         | *                                                             | rich typer
traffic               | traffic                                                       |
traffic.digits        |                                                               | numpy
traffic.tally         | core                                                          |
traffic.labels        |                                                               | aiohttp
traffic.sending       | traffic                                                       | aiohttp
traffic.running       | traffic                                                       | aiohttp
traffic.showing       | statustable traffic                                           | rich
traffic.command       | *                                                             | rich typer
app                   | *                                                             | uvloop
serve                 | *                                                             |
control               | *                                                             | aiohttp
up                    | *                                                             | aiohttp
options               | *                                                             | pydantic typer
flagcommands          | *                                                             | pydantic typer
statustable           |                                                               | rich
show                  | *                                                             | aiohttp rich
cli                   | *                                                             | typer
"""
"""The row of the module itself, or of the nearest package above it, holds. `*` is everything."""

ROLES = {
    "app",
    "serve",
    "control",
    "up",
    "options",
    "flagcommands",
    "show",
    "cli",
    "__main__",
    "bench.command",
    "traffic.command",
}
"""Who wires: nothing but these may import them."""

CORE_STDLIB = {
    "array", "bisect", "collections", "dataclasses", "decimal", "difflib", "enum", "fractions", "functools", "hashlib",
    "ipaddress", "itertools", "math", "re", "types", "typing",
}  # fmt: skip
"""What the core may use of the standard library: nothing that touches a clock, a file, a socket or chance."""

CORE_EXCEPTIONS = {"core.scalars": {"datetime.date"}, "core.predictions": {"urllib.parse.unquote"}}
"""A date is a value, and decoding `%41` is arithmetic; that `datetime` asks the clock and `urllib` the net is why they
are named alone."""

BANNED_WORDS = {"util", "utils", "helper", "helpers", "manager", "handler", "handlers", "base", "impl"}


@dataclass(frozen=True)
class Import:
    """One import: by whom, of what (`a.b.c` with the imported name last for ours), at which line."""

    module: str
    target: str
    line: int
    at_import_time: bool

    def __str__(self) -> str:
        return f"extproc/{self.module.replace('.', '/')}.py:{self.line} imports {self.target}"


def source_files() -> dict[str, Path]:
    """Every module of extproc by its dotted name below it; generated ones are not ours to judge."""
    folder = ROOT / "extproc"
    files = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and not name.endswith("_pb2"):
            files[name] = path
    return files


FILES = source_files()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def under_type_checking(tree: ast.Module) -> set[int]:
    """The lines that only a type checker sees."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def imports_of(name: str) -> Iterator[Import]:
    """Every import of a module, inside functions too."""
    tree = TREES[name]
    typing_only = under_type_checking(tree)
    in_functions = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: imports are written whole here, not relative"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        now = node not in in_functions and node.lineno not in typing_only
        yield from (Import(name, target, node.lineno, now) for target in targets)


IMPORTS = [one for name in FILES for one in imports_of(name)]


def our_module(target: str) -> str | None:
    """The module of ours that an import names (`extproc.core.flags.Flag` is core.flags), None for anything else."""
    package, _, rest = target.partition(".")
    if package != "extproc":
        return None
    while rest and rest not in FILES and not rest.endswith("_pb2"):
        rest = rest.rpartition(".")[0]
    return rest


@functools.cache
def rows() -> dict[str, tuple[set[str], set[str]]]:
    """Module -> what it may import of ours, and of others."""
    cells = [[cell.strip() for cell in line.split("|")] for line in TABLE.strip().splitlines()[2:]]
    return {module: (set(ours.split()), set(third.split())) for module, ours, third in cells}


def row_of(module: str) -> str | None:
    """The most specific row for a module."""
    name = module
    while name and name not in rows():
        name = name.rpartition(".")[0]
    return name or None


def within(name: str, allowed: set[str]) -> bool:
    """Whether a dotted name is one of these or lies below one."""
    return "*" in allowed or any(name == one or name.startswith(f"{one}.") for one in allowed)


def test_every_module_has_a_row_and_every_row_a_module():
    empty = {"__main__", "wire", "transport"}  # nothing in them, or one line
    assert {name for name in FILES if row_of(name) is None} <= empty
    assert {row for row in rows() if row not in FILES} == set()


def test_nobody_imports_of_ours_what_the_table_does_not_allow():
    wrong = []
    for one in IMPORTS:
        ours, row = our_module(one.target), row_of(one.module)
        if ours and row is not None and ours != one.module and not within(ours, rows()[row][0]):
            wrong.append(str(one))
    assert wrong == []


def test_nobody_imports_a_library_that_the_table_does_not_allow():
    wrong = []
    for one in IMPORTS:
        top = one.target.partition(".")[0]
        row = row_of(one.module)
        if top in sys.stdlib_module_names or top == "extproc":
            continue
        if row is None or not within(one.target, rows()[row][1]):
            wrong.append(str(one))
    assert wrong == []


def test_no_row_allows_a_library_that_nobody_there_uses():
    for row, (_, third) in rows().items():
        used = [one.target for one in IMPORTS if row_of(one.module) == row]
        assert {name for name in third if not any(within(target, {name}) for target in used)} == set(), row


def test_only_those_who_wire_know_those_who_wire():
    wrong = [
        str(one)
        for one in IMPORTS
        if one.module not in ROLES and our_module(one.target) in ROLES
    ]  # fmt: skip
    assert wrong == []


def test_the_core_uses_nothing_of_the_standard_library_that_could_touch_the_world():
    wrong = []
    for one in IMPORTS:
        top = one.target.partition(".")[0]
        if not within(one.module, {"core"}) or top not in sys.stdlib_module_names or top in CORE_STDLIB:
            continue
        if one.target not in CORE_EXCEPTIONS.get(one.module, set()):
            wrong.append(str(one))
    assert wrong == []


@pytest.mark.parametrize("name", [name for name in FILES if within(name, {"core"})])
def test_the_core_calls_no_builtin_that_could_touch_the_world(name):
    banned = {"open", "print", "input", "eval", "exec", "compile", "__import__", "breakpoint", "globals", "id", "hash"}
    called = {
        f"{name}:{node.lineno}: {node.func.id}"
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in banned
    }
    assert called == set()
    clock = {
        f"{name}:{node.lineno}: {node.func.attr}"
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in {"today", "now", "utcnow", "monotonic", "perf_counter"}
    }
    assert clock == set()


def test_modules_do_not_import_each_other_in_circles():
    graph: dict[str, set[str]] = {name: set() for name in FILES}
    for one in IMPORTS:
        ours = our_module(one.target)
        if one.at_import_time and ours and ours != one.module and ours in FILES:
            graph[one.module].add(ours)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def words(name: str) -> set[str]:
    """`HTTPServerThing` and `http_server_thing` as lower-case words."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)}


def test_no_module_and_no_class_has_a_name_that_says_nothing():
    classes = {
        f"{name}.{node.name}": words(node.name)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    modules = {name: words(name) for name in FILES}
    assert {name for name, found in (classes | modules).items() if found & BANNED_WORDS} == set()


def test_only_the_settings_read_the_environment():
    ways = {"environ", "environb", "getenv", "getenvb"}
    readers = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in ways)
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and any(one.name in ways for one in node.names))
    }
    assert readers <= {"settings"}


def test_the_model_servers_know_of_extproc_only_the_metrics():
    known = set()
    for path in (ROOT / "model_servers").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "extproc":
                known.update(f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Import):
                known.update(alias.name for alias in node.names if alias.name.split(".")[0] == "extproc")
    assert {name for name in known if not within(name, {"extproc.metrics"})} == set()


def test_a_worker_of_serve_loads_no_schema_and_no_message_classes():
    """They are most of perch's memory, and belong to the flag compiler."""
    heavy = ("envoy_data_plane", "betterproto2", "extproc.core.schema", "aiohttp", "typer", "numpy")
    code = f"import sys, extproc.serve; print([name for name in {heavy!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
