"""Every shape of configuration boots."""

from dataclasses import replace
from pathlib import Path

from extproc.envoyfile import template_folder
from extproc.modelsfile import load_models


async def test_every_envoy_file_of_the_repository_boots(running):
    used = {
        "bootstrap.yaml",
        "clusters.yaml",
        "ext_proc.yaml",
        "listener.yaml",
        "models.yaml",
        "routes.yaml",
        "runtime.yaml",
    }
    assert {path.name for path in template_folder().iterdir()} == used
    settings = {"canary_log": Path("canary.jsonl"), "statsd": "127.0.0.1:9", "concurrency": 2}
    async with running(load_models(template_folder() / "models.yaml"), **settings) as edge:
        assert (await edge.infer(x_test_cohort="canary")).headers["x-model-cohort"] == "canary"
        assert (await edge.infer()).headers["x-model-cohort"] == "stable"
        log = (edge.folder / "envoy.log").read_text()
        assert "deprecated" not in log.lower()
        assert "[error]" not in log


async def test_hosts_may_be_names_and_addresses(running, a_model, stranger):
    (_, name_port), (_, address_port) = await stranger("by-name"), await stranger("by-address")
    model = replace(a_model("digits"), stable=(f"localhost:{name_port}",), canary=(f"127.0.0.1:{address_port}",))
    async with running([model]) as edge:
        assert (await edge.infer()).by == "by-name"
        assert (await edge.infer(x_test_cohort="canary")).by == "by-address"
        addresses = {host.address for host in await edge.admin.hosts() if host.model}
        assert addresses == {f"127.0.0.1:{port}" for port in (name_port, address_port)}
