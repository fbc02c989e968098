"""Renders Envoy's configuration from the models, the settings and the templates in `envoy/`.

The same input gives the same bytes. Envoy reads `bootstrap.yaml` once; the other files are xDS resources it watches,
so replacing one by a rename takes effect without a restart, and a broken one keeps the last good.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from extproc.address import Address, AddressError, TcpAddress, UnixAddress, parse_address
from extproc.envoyfile.output import to_resources, to_text
from extproc.envoyfile.settings import DEFAULT_FORWARDED, EnvoyFileError, EnvoySettings
from extproc.envoyfile.template import Tree, fill, load_template
from extproc.envoyfile.write import WRITE_ORDER
from extproc.modelsfile import Model

_EXT_PROC = "envoy.filters.http.ext_proc"


def render(
    models: Sequence[Model],
    settings: EnvoySettings,
    forwarded: Collection[str] = DEFAULT_FORWARDED,
    killed: Collection[str] = (),
) -> dict[str, str]:
    """File name to YAML text, in WRITE_ORDER. `killed` names the models whose second kill switch is thrown.

    Raises EnvoyFileError when an address cannot be used; Envoy's own opinion is `validate`'s business.
    """
    if not models:
        raise EnvoyFileError("there is no model to render; name one in models.yaml")
    files = {
        "bootstrap.yaml": to_text(_bootstrap(settings), "envoy/bootstrap.yaml"),
        "cds.yaml": to_resources(_clusters(models, settings), "envoy/clusters.yaml"),
        "rtds.yaml": render_runtime(models, killed),
        "ecds.yaml": render_filter(forwarded, settings),
        "rds.yaml": to_resources([_routes(models, settings)], "envoy/routes.yaml"),
        "lds.yaml": to_resources([_listener(settings)], "envoy/listener.yaml"),
    }
    return {name: files[name] for name in WRITE_ORDER}


def render_filter(forwarded: Collection[str], settings: EnvoySettings) -> str:
    """ecds.yaml alone: the ext_proc filter, forwarding `forwarded`. Its `version_info` changes with its content."""
    resource = {
        "@type": "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
        "name": _EXT_PROC,
        "typed_config": _ext_proc(forwarded, settings),
    }
    return to_resources([resource], "envoy/ext_proc.yaml")


def render_runtime(models: Sequence[Model], killed: Collection[str] = ()) -> str:
    """rtds.yaml alone: 0 for every model in `killed`, 100 for the others."""
    unknown = sorted(set(killed) - {model.name for model in models})
    if unknown:
        raise EnvoyFileError(f"no model is named {unknown[0]}; models are {', '.join(m.name for m in models)}")
    share = {f"perch.{model.name}.canary_pct": 0 if model.name in killed else 100 for model in models}
    return to_resources([fill(load_template("runtime.yaml"), {"canary_pct": share})], "envoy/runtime.yaml")


def _bootstrap(settings: EnvoySettings) -> Tree:
    folder = settings.files
    paths = {f"{kind}_path": str(folder / f"{kind}.yaml") for kind in ("cds", "lds", "rtds")}
    statsd = settings.statsd
    return fill(
        load_template("bootstrap.yaml"),
        paths
        | {
            "files_dir": str(folder),
            "node_id": settings.node_id,
            "node_cluster": settings.node_cluster,
            "admin": _address(settings.admin, settings, "admin", port_zero=True).envoy(),
            "statsd": _statsd(statsd, settings) if statsd else None,
        },
    )


def _statsd(text: str, settings: EnvoySettings) -> Tree:
    address = _address(text, settings, "statsd")
    if isinstance(address, UnixAddress):
        return address.envoy()
    if address.is_name:
        raise EnvoyFileError(f"statsd: Envoy does not resolve {address.host!r} here; write its IP address")
    return address.envoy("UDP")


def _listener(settings: EnvoySettings) -> Tree:
    folder = settings.files
    log = settings.canary_log
    hide_version = not settings.show_version
    return fill(
        load_template("listener.yaml"),
        {
            "listen": _address(settings.listen, settings, "listen", port_zero=True).envoy(),
            "files_dir": str(folder),
            "ecds_path": str(folder / "ecds.yaml"),
            "rds_path": str(folder / "rds.yaml"),
            "strip_force_cohort": not settings.force_token,
            "hide_version": hide_version,
            "version_format": "%DYNAMIC_METADATA(perch.response:model_version)%"
            if hide_version
            else "%RESP(x-model-version)%",
            "canary_log": str(settings.run_dir.absolute() / log) if log else None,
            "logged_headers": [name.lower() for name in settings.logged_headers],
            "default_ext_proc": _ext_proc(DEFAULT_FORWARDED, settings),
        },
    )


def _ext_proc(forwarded: Collection[str], settings: EnvoySettings) -> Tree:
    patterns = [{"exact": name} for name in sorted({name.lower() for name in forwarded})]
    addresses = [_address(text, settings, "ext_proc") for text in settings.ext_proc]
    several = len(addresses) > 1 or any(isinstance(one, TcpAddress) and one.is_name for one in addresses)
    return fill(load_template("ext_proc.yaml"), {"forwarded": patterns, "several_servers": several})


def _routes(models: Sequence[Model], settings: EnvoySettings) -> Tree:
    template = load_template("routes.yaml")
    routes = fill(template["first"], {"first_model": models[0].name})
    for model in sorted(models, key=lambda one: (-len(one.prefix), one.prefix)):
        routes += fill(template["model"], _route_values(model, models[0].name))
    routes += template["last"]
    hidden = None if settings.show_cohort else ["x-model-cohort"]
    values = {"routes": routes, "show_cohort": settings.show_cohort, "hidden_headers": hidden}
    return fill(template["configuration"], values)


def _route_values(model: Model, first_model: str) -> dict[str, Tree]:
    health = [r"versions/[^/]+(/ready)?", "ready"]
    if model.warm.startswith(model.prefix):
        health.append(re.escape(model.warm.removeprefix(model.prefix)))
    itself = re.escape(model.prefix.rstrip("/"))
    return {
        "first_model": first_model,
        "model": model.name,
        "prefix": model.prefix,
        "has_canary": bool(model.canary),
        "deadline": _duration(model.deadline_s),
        "idle": _duration(model.deadline_s + 5),
        "health_regex": f"{itself}(/({'|'.join(dict.fromkeys(health))}))?",
    }


def _clusters(models: Sequence[Model], settings: EnvoySettings) -> list[Tree]:
    template = load_template("clusters.yaml")
    if not settings.ext_proc:
        raise EnvoyFileError("ext_proc: name at least one address of a perch worker")
    own = {"perch": settings.ext_proc, "perch_als": (settings.access_log,)}
    clusters = [fill(template[name], _cluster_values(addresses, settings, name)) for name, addresses in own.items()]
    for model in models:
        for arm, addresses in {"stable": model.stable, "canary": model.canary}.items():
            if addresses:
                metadata = {"filter_metadata": {"perch": {"model": model.name, "served": arm}}}
                values = _cluster_values(addresses, settings, f"{model.name}.{arm}", metadata)
                clusters.append(fill(template[arm], values | {"model": model.name, "warm": model.warm}))
        if model.canary:
            clusters.append(fill(template["canary_or_stable"], {"model": model.name}))
    return clusters


def _cluster_values(
    addresses: Iterable[str], settings: EnvoySettings, where: str, metadata: Tree = None
) -> dict[str, Tree]:
    """Type and endpoints of a cluster: resolved as soon as one host is a name, which excludes sockets."""
    parsed = [_address(text, settings, where) for text in addresses]
    names = any(isinstance(address, TcpAddress) and address.is_name for address in parsed)
    if names and any(isinstance(address, UnixAddress) for address in parsed):
        raise EnvoyFileError(f"{where}: Envoy cannot resolve names and use sockets in one cluster; write one kind")
    endpoints: list[dict[str, Any]] = [{"endpoint": {"address": address.envoy()}} for address in parsed]
    if metadata is not None:
        endpoints = [endpoint | {"metadata": metadata} for endpoint in endpoints]
    return {"type": None if names else "STATIC", "dns": names, "endpoints": endpoints}


def _address(text: str, settings: EnvoySettings, where: str, *, port_zero: bool = False) -> Address:
    try:
        address = parse_address(text, port_zero=port_zero)
        return address.joined(settings.run_dir.absolute()) if isinstance(address, UnixAddress) else address
    except AddressError as problem:
        raise EnvoyFileError(f"{where}: {problem}") from None


def _duration(seconds: float) -> str:
    return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
