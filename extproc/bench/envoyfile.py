"""The one Envoy of a bench: perch's own configuration, once per path, with Envoy's direct response as the model.

Everything that a request meets is what perch ships: the listener, the routes, the filter, the clusters of perch with
their health checks. A path differs from the others in its filter, the server behind it, and its access log.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from extproc.envoyfile import EnvoySettings, forwarded_headers, render
from extproc.modelsfile import Model

Tree = Any
_EXT_PROC = "envoy.filters.http.ext_proc"


@dataclass(frozen=True, slots=True)
class Way:
    """One path through Envoy: `server` names the ext_proc server behind it, None for no filter at all."""

    name: str
    server: str | None
    logged: bool = False


def bootstrap(ways: Iterable[Way], models: Mapping[str, Model], headers: Iterable[str], folder: Path) -> str:
    """The text of a bootstrap with a listener for each way, on a port that Envoy chooses.

    Servers listen at `folder/NAME.sock`, the access log service at `folder/log.sock`; `headers` are the ones that the
    flags look at.
    """
    settings = EnvoySettings(
        run_dir=folder, ext_proc=("unix:ext_proc.sock",), access_log="unix:log.sock", listen="127.0.0.1:0"
    )
    files = render(list(models.values()), settings, forwarded_headers(headers))
    shipped = {name: yaml.load(text, Loader=yaml.CSafeLoader) for name, text in files.items()}
    clusters = {cluster["name"]: _untyped(cluster) for cluster in shipped["cds.yaml"]["resources"]}
    ways = list(ways)
    names = list(dict.fromkeys(way.server for way in ways if way.server is not None))
    runtime = shipped["bootstrap.yaml"]["layered_runtime"]["layers"][:1]  # without the kill switch, which is a file
    tree = {
        "node": shipped["bootstrap.yaml"]["node"],
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}},
        "layered_runtime": {"layers": runtime},
        "overload_manager": shipped["bootstrap.yaml"]["overload_manager"],
        "static_resources": {
            "listeners": [_listener(way, shipped) for way in ways],
            "clusters": [_cluster(clusters["perch"], name, folder) for name in names] + [clusters["perch_als"]],
        },
    }
    return yaml.dump(tree, Dumper=_NoAliases, sort_keys=False)


class _NoAliases(yaml.CSafeDumper):
    """Envoy reads aliases, but people read this file when something is wrong."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  the library's signature
        return True


def _untyped(resource: Tree) -> Tree:
    return {key: value for key, value in resource.items() if key != "@type"}


def _cluster(perch: Tree, name: str, folder: Path) -> Tree:
    address = {"pipe": {"path": str(folder / f"{name}.sock")}}
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": address}}]}]
    return {**perch, "name": name, "load_assignment": {"cluster_name": name, "endpoints": endpoints}}


def _listener(way: Way, shipped: Mapping[str, Tree]) -> Tree:
    listener = _untyped(deepcopy(shipped["lds.yaml"]["resources"][0]))
    listener["name"] = way.name
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    manager["stat_prefix"] = way.name
    if not way.logged:
        manager.pop("access_log", None)
    del manager["rds"]
    manager["route_config"] = _routes(shipped["rds.yaml"]["resources"][0], filtered=way.server is not None)
    rest = [one for one in manager["http_filters"] if one["name"] != _EXT_PROC]
    if way.server is not None:
        filter_ = deepcopy(_untyped(shipped["ecds.yaml"]["resources"][0]))
        filter_["typed_config"]["grpc_service"]["envoy_grpc"]["cluster_name"] = way.server
        rest.insert(0, filter_)
    manager["http_filters"] = rest
    return listener


def _routes(configuration: Tree, *, filtered: bool) -> Tree:
    """The shipped routes; where one would go to a cluster, Envoy answers itself with the route's name."""
    configuration = _untyped(deepcopy(configuration))
    for route in configuration["virtual_hosts"][0]["routes"]:
        if not filtered:
            route.pop("typed_per_filter_config", None)
        if route.pop("route", None) is not None:
            route["direct_response"] = {"status": 200, "body": {"inline_string": route["name"]}}
    return configuration
