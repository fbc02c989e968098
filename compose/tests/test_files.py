"""What the files say, read as Docker Compose and Prometheus read them. Nothing is started."""

import json
import re
from pathlib import Path

import pytest
import yaml

COMPOSE = Path(__file__).parents[1]
SERVICES = {"control", "envoy", "extproc-1", "extproc-2", "model-canary", "model-stable"}
BOTH = ("compose.yaml", "compose.observability.yaml")


@pytest.fixture
def project(unstarted):
    """The project as Docker Compose sees it, defaults filled in, by its files; refused with what is wrong."""

    def read(*files, check=True, **settings):
        given = [f"--file={COMPOSE / name}" if isinstance(name, str) else f"--file={name}" for name in files]
        text = unstarted(*given, "config", "--format", "json", check=check, **settings)
        return json.loads(text) if check else text

    return read


@pytest.mark.parametrize("files", [BOTH[:1], BOTH], ids=["alone", "with the overlay"])
def test_docker_compose_takes_the_files_by_the_schema_of_the_specification(project, files):
    assert set(project(*files)["services"]) >= SERVICES


def test_docker_compose_refuses_what_the_schema_does_not_know(project, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    text = (COMPOSE / "compose.yaml").read_text()
    wrong.write_text(text.replace("read_only: true", "read_only: true\n  podman_only: true"))
    assert "podman_only is not allowed" in project(wrong, check=False)


@pytest.mark.parametrize("files", [BOTH[:1], BOTH], ids=["alone", "with the overlay"])
def test_every_container_is_confined(project, files):
    for name, service in project(*files)["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert int(service["user"].partition(":")[0]) > 0, name
        limits = service["deploy"]["resources"]["limits"]
        assert float(limits["cpus"]) > 0, name
        assert int(limits["memory"]) > 0, name
        assert service["restart"] == "unless-stopped", name


def test_only_the_listener_is_published_to_others(project):
    published = {
        (name, port["target"], port.get("host_ip"))
        for name, service in project(*BOTH)["services"].items()
        for port in service.get("ports", ())
    }
    assert published == {("envoy", 10000, None), ("control", 8900, "127.0.0.1"), ("prometheus", 9090, "127.0.0.1")}


def test_envoy_cannot_write_its_files_and_nobody_the_flags(project):
    services = project(BOTH[0])["services"]
    writers = {
        (name, volume["target"])
        for name, service in services.items()
        for volume in service.get("volumes", ())
        if not volume.get("read_only")
    }
    assert {name for name, target in writers if target == "/var/lib/envoy"} == {"control"}
    assert {target for _, target in writers} == {"/run/perch", "/var/lib/perch", "/var/lib/envoy"}


def test_every_setting_in_the_example_is_one_that_the_files_use_with_the_default_that_it_names(project):
    used = {}
    for name in BOTH:
        used.update(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", (COMPOSE / name).read_text()))
    example = (COMPOSE / ".env.example").read_text()
    assert dict(re.findall(r"^#?([A-Z_]+)=(.*)$", example, re.MULTILINE)) == used


def test_the_model_names_are_services_with_servers_behind_them(project):
    services = project(BOTH[0])["services"]
    for model in yaml.safe_load((COMPOSE / "models.yaml").read_text()).values():
        for address in (*model["stable"], *model["canary"]):
            service = services[address.partition(":")[0]]
            assert service["deploy"]["replicas"] == 2
            assert f"0.0.0.0:{address.partition(':')[2]}" in service["command"]


def test_prometheus_takes_its_configuration_and_the_alerts_fire_when_they_should(promtool):
    assert "SUCCESS" in promtool("check", "config", COMPOSE / "prometheus.yml")
    assert "SUCCESS" in promtool("test", "rules", COMPOSE / "tests" / "alerts.yml")


def test_every_alert_is_explained_to_operators():
    alerts = [rule["alert"] for rule in yaml.safe_load((COMPOSE / "alerts.yml").read_text())["groups"][0]["rules"]]
    page = (COMPOSE / "README.md").read_text()
    assert [name for name in alerts if f"`{name}`" not in page] == []
