"""Reads `envoy/models.yaml`: which models Envoy serves, and where. Every problem at once, each with its place."""

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from extproc.address import Address, AddressError, TcpAddress, UnixAddress, parse_address

ARMS = ("stable", "canary")
_KEYS = ("prefix", *ARMS, "warm", "deadline_s", "min_healthy", "predictions", "artifacts")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_PATH = re.compile(r"/[A-Za-z0-9._~!$&'()*+,;=:@/-]*")
_DEADLINE_MAX_S = 3600.0
_MIN_HEALTHY_MAX = 1000
PREDICTIONS = ("auto", "labels", "numbers", "vector")


@dataclass(frozen=True, slots=True)
class Model:
    """One model behind the listener.

    `prefix` starts and ends with `/`. `stable` and `canary` are addresses as written (relative `unix:` paths are
    servers that perch starts). `warm` is the health check's path. `deadline_s` is the whole answer's deadline in
    seconds, `min_healthy` the number of ready canary servers the warm gate asks for. `artifacts` maps an arm to the
    folder its servers load, absolute. `predictions` says what the model's predictions are: one of PREDICTIONS.
    """

    name: str
    prefix: str
    stable: tuple[str, ...]
    canary: tuple[str, ...]
    warm: str
    deadline_s: float = 15.0
    min_healthy: int = 1
    artifacts: Mapping[str, Path] | None = None
    predictions: str = "auto"


class ModelsFileError(Exception):
    """The file cannot be used. `problems` holds them all, each `file:line:column: path: what and what to write`."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def load_models(path: Path) -> tuple[Model, ...]:
    """The models of the file in its order; raises ModelsFileError with every problem found."""
    report = _Report(path, [])
    root = _compose(path, report)
    models = tuple(_models(root, report)) if root is not None else ()
    if not models and not report.problems:
        report.add(root, "", "names no model; write for example digits: {prefix: /v2/models/digits/, stable: [...]}")
    if report.problems:
        raise ModelsFileError(report.in_order())
    return models


def cluster_names(model: Model) -> tuple[str, ...]:
    """Envoy's clusters of the model: stable, and with a canary its own and the composite of both."""
    stable, canary = f"{model.name}_stable", f"{model.name}_canary"
    return (stable, canary, f"{model.name}_canary_or_stable") if model.canary else (stable,)


@dataclass(frozen=True, slots=True)
class _Report:
    """Collects problems with their places."""

    path: Path
    problems: list[tuple[int, int, str]]

    def add(self, node: yaml.Node | None, where: str, what: str) -> None:
        mark = node.start_mark if node is not None else None
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        self.at(line, column, f"{where}: {what}" if where else what)

    def at(self, line: int, column: int, text: str) -> None:
        self.problems.append((line, column, text))

    def in_order(self) -> list[str]:
        return [f"{self.path}:{line}:{column}: {text}" for line, column, text in sorted(self.problems)]


def _compose(path: Path, report: _Report) -> yaml.Node | None:
    try:
        text = path.read_bytes().decode()
        return yaml.compose(text, Loader=yaml.CSafeLoader)
    except OSError as problem:
        report.at(1, 1, f"cannot be read: {problem.strerror}")
    except UnicodeDecodeError as problem:
        report.at(1, 1, f"byte {problem.start} is not UTF-8; save the file as UTF-8")
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        report.at(line, column, f"not YAML: {getattr(problem, 'problem', None) or ' '.join(str(problem).split())}")
    return None


def _models(root: yaml.Node, report: _Report) -> Iterator[Model]:
    """Every model that can be read, then what only shows between models."""
    entries = _mapping(root, "", report)
    read: list[tuple[yaml.Node, Model]] = []
    for name, (key, node) in entries.items():
        if not _NAME.fullmatch(name):
            report.add(
                key,
                name,
                "is no model name; write lower-case letters, digits, - and _, at most 64, a letter or digit first",
            )
            continue
        fields = _mapping(node, name, report)
        model = _ModelReader(name, fields, node, report).read() if isinstance(node, yaml.MappingNode) else None
        if model is not None:
            read.append((key, model))
    _check_between(read, report)
    return iter([model for _, model in read])


def _mapping(node: yaml.Node, where: str, report: _Report) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """Key text to (key node, value node); duplicates and wrong shapes are reported."""
    if not isinstance(node, yaml.MappingNode):
        report.add(node, where, f"must be a mapping, not {_kind(node)}")
        return {}
    entries: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            report.add(key, where, "a key must be one word")
        elif key.value in entries:
            first = entries[key.value][0].start_mark.line + 1
            report.add(key, _join(where, key.value), f"is written twice (first in line {first}); keep one")
        else:
            entries[key.value] = (key, value)
    return entries


@dataclass(frozen=True, slots=True)
class _ModelReader:
    """Reads the fields of one model; a field with a problem is reported and left at its default."""

    name: str
    fields: Mapping[str, tuple[yaml.Node, yaml.Node]]
    node: yaml.Node
    report: _Report

    def read(self) -> Model | None:
        before = len(self.report.problems)
        self._unknown_keys()
        prefix = self._prefix()
        stable, canary = self._addresses("stable"), self._addresses("canary")
        self._check_arms(stable, canary)
        warm = self._path("warm", default=f"{prefix}ready")
        deadline_s = self._number("deadline_s", 15.0, 0.001, _DEADLINE_MAX_S)
        min_healthy = self._number("min_healthy", 1, 1, _MIN_HEALTHY_MAX)
        self._check_min_healthy(int(min_healthy), canary)
        predictions = self._predictions()
        artifacts = self._artifacts()
        if len(self.report.problems) > before:
            return None
        return Model(
            name=self.name,
            prefix=prefix,
            stable=tuple(stable),
            canary=tuple(canary),
            warm=warm,
            deadline_s=float(deadline_s),
            min_healthy=int(min_healthy),
            artifacts=artifacts,
            predictions=predictions,
        )

    def _add(self, key: str, what: str, node: yaml.Node | None = None) -> None:
        place = node or (self.fields[key][1] if key in self.fields else self.node)
        self.report.add(place, _join(self.name, key), what)

    def _unknown_keys(self) -> None:
        for key, (node, _) in self.fields.items():
            if key not in _KEYS:
                near = difflib.get_close_matches(key, _KEYS, 1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(_KEYS)}"
                self._add(key, f"unknown key; {hint}", node)

    def _prefix(self) -> str:
        if "prefix" not in self.fields:
            self._add("prefix", f"is missing; write for example prefix: /v2/models/{self.name}/")
        prefix = self._path("prefix", default="/")
        if not prefix.endswith("/"):
            self._add("prefix", f"must end with /; write {prefix}/")
        elif prefix.startswith(("/v2/health/", "/livez/")):
            self._add(
                "prefix", "lies under /v2/health/ or /livez/, which belong to the servers themselves; write another"
            )
        return prefix

    def _path(self, key: str, default: str) -> str:
        if key not in self.fields:
            return default
        text = self._text(self.fields[key][1], key)
        if text is None:
            return default
        if not text.startswith("/"):
            self._add(key, f"must start with /; write /{text}")
        elif not _PATH.fullmatch(text) or "//" in text or {".", ".."} & set(text.split("/")):
            self._add(key, f"{text!r} is no plain path; write one without //, /../, ?, #, % and blanks")
        else:
            return text
        return default

    def _text(self, node: yaml.Node, key: str) -> str | None:
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str":
            return str(node.value)
        self._add(key, f"must be text, not {_kind(node)}; put it in quotes if it is meant", node)
        return None

    def _number(self, key: str, default: float, low: float, high: float) -> float:
        if key not in self.fields:
            return default
        node = self.fields[key][1]
        whole = isinstance(default, int)
        tags = ("int",) if whole else ("int", "float")
        value = yaml.safe_load(node.value) if isinstance(node, yaml.ScalarNode) else None
        if node.tag.rpartition(":")[2] in tags and isinstance(value, int | float) and math.isfinite(value):
            if low <= value <= high:
                return value
            self._add(
                key,
                f"{node.value} is out of range; write {'a whole' if whole else 'a'} number from {low:g} to {high:g}",
            )
        else:
            self._add(key, f"must be {'a whole' if whole else 'a'} number from {low:g} to {high:g}, not {_kind(node)}")
        return default

    def _addresses(self, arm: str) -> dict[str, Address]:
        """Address as written to its parsed form, in order."""
        if arm not in self.fields:
            if arm == "stable":
                self._add(arm, "is missing; write at least one address, for example [127.0.0.1:8000]")
            return {}
        node = self.fields[arm][1]
        if not isinstance(node, yaml.SequenceNode):
            self._add(arm, f"must be a list of addresses, not {_kind(node)}; write [HOST:PORT, ...]")
            return {}
        if not node.value and arm == "stable":
            self._add(arm, "is empty; stable serves everybody when the canary does not, so write at least one address")
        found: dict[str, Address] = {}
        for item in node.value:
            text = self._text(item, arm)
            if text is None:
                continue
            try:
                address = parse_address(text)
            except AddressError as problem:
                self._add(arm, str(problem), item)
                continue
            if address in found.values():
                self._add(arm, f"{text} is listed twice; write each server once", item)
            found[text] = address
        self._check_mixture(arm, found)
        return found

    def _check_mixture(self, arm: str, found: Mapping[str, Address]) -> None:
        names = [text for text, address in found.items() if isinstance(address, TcpAddress) and address.is_name]
        sockets = [text for text, address in found.items() if isinstance(address, UnixAddress)]
        if names and sockets:
            what = f"Envoy cannot resolve names and use sockets in one cluster: {names[0]} and {sockets[0]}"
            self._add(arm, f"{what}; write only one kind, or an IP address for the name")

    def _check_arms(self, stable: Mapping[str, Address], canary: Mapping[str, Address]) -> None:
        for text, address in canary.items():
            if address in stable.values():
                self._add("canary", f"{text} is also a stable server; a server belongs to one arm")

    def _check_min_healthy(self, min_healthy: int, canary: Mapping[str, Address]) -> None:
        may_grow = any(isinstance(address, TcpAddress) and address.is_name for address in canary.values())
        if canary and not may_grow and min_healthy > len(canary):
            self._add("min_healthy", f"{min_healthy} servers can never be ready, canary lists {len(canary)}")

    def _predictions(self) -> str:
        """What kind of predictions the model makes."""
        if "predictions" not in self.fields:
            return "auto"
        text = self._text(self.fields["predictions"][1], "predictions")
        if text is not None and text not in PREDICTIONS:
            self._add("predictions", f"{text!r} is none of {', '.join(PREDICTIONS)}")
        return text or "auto"

    def _artifacts(self) -> dict[str, Path] | None:
        if "artifacts" not in self.fields:
            return None
        found: dict[str, Path] = {}
        for arm, (key, node) in _mapping(self.fields["artifacts"][1], f"{self.name}.artifacts", self.report).items():
            if arm not in ARMS:
                self._add("artifacts", f"{arm} is no arm; write stable or canary", key)
                continue
            text = self._text(node, "artifacts")
            if text:
                found[arm] = (self.report.path.absolute().parent / text).resolve()
            elif text is not None:
                self._add("artifacts", f"{arm} is empty; write a folder", node)
        return found


def _check_between(read: list[tuple[yaml.Node, Model]], report: _Report) -> None:
    """What only shows between models: equal prefixes, one socket for two servers, equal cluster names."""
    prefixes: dict[str, str] = {}
    sockets: dict[str, str] = {}
    clusters: dict[str, str] = {}
    for key, model in read:
        owner = prefixes.setdefault(model.prefix, model.name)
        if owner != model.name:
            report.add(key, f"{model.name}.prefix", f"{model.prefix} is {owner}'s; give each model its own")
        for socket in own_sockets(model):
            owner = sockets.setdefault(socket, model.name)
            if owner != model.name:
                report.add(key, model.name, f"{socket} is {owner}'s; perch starts one server per socket, name another")
        for cluster in cluster_names(model):
            owner = clusters.setdefault(cluster, model.name)
            if owner != model.name:
                report.add(key, model.name, f"its cluster {cluster} would be {owner}'s; rename the model")


def own_sockets(model: Model) -> tuple[str, ...]:
    """Addresses of the model whose servers perch starts itself: relative `unix:` paths, stable first."""
    return tuple(
        text for text in model.stable + model.canary if text.startswith("unix:") and not text.startswith("unix:/")
    )


def _kind(node: yaml.Node) -> str:
    match node:
        case yaml.MappingNode():
            return "a mapping"
        case yaml.SequenceNode():
            return "a list"
        case _ if node.tag.endswith(":null"):
            return "nothing"
        case _:
            return repr(node.value)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
