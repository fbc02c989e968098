"""Envoy's configuration: models.yaml and settings in, the files Envoy reads out; written, validated, started.

`render` is pure apart from reading the templates in `envoy/`. `write` replaces files under a live Envoy. `validate`
asks the real Envoy.
"""

from extproc.envoyfile.output import version_of
from extproc.envoyfile.render import render, render_filter, render_runtime
from extproc.envoyfile.settings import DEFAULT_FORWARDED, EnvoyFileError, EnvoySettings, forwarded_headers
from extproc.envoyfile.template import template_folder
from extproc.envoyfile.validate import envoy_binary, envoy_command, validate
from extproc.envoyfile.write import await_files, write

__all__ = [
    "DEFAULT_FORWARDED",
    "EnvoyFileError",
    "EnvoySettings",
    "await_files",
    "envoy_binary",
    "envoy_command",
    "forwarded_headers",
    "render",
    "render_filter",
    "render_runtime",
    "template_folder",
    "validate",
    "version_of",
    "write",
]
