"""Files replaced under a running Envoy."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from extproc.envoyfile import forwarded_headers, render_filter, render_runtime, version_of, write


async def test_a_newly_forwarded_header_reaches_perch_on_the_open_connection(edge):
    await edge.infer(x_tenant="acme")
    assert "x-tenant" not in edge.decider.seen[-1]
    text = render_filter(forwarded_headers(["x-test-cohort", "X-Tenant", "cookie:uid"]), edge.settings)
    assert write(edge.settings.files, {"ecds.yaml": text}) == ("ecds.yaml",)
    await edge.until(lambda: edge.filter_is(version_of(text)))

    async def is_shown():
        await edge.infer(x_tenant="acme", cookie="uid=7")
        return "x-tenant" in edge.decider.seen[-1]

    await edge.until(is_shown)  # Envoy's worker has it a moment later
    assert (edge.decider.seen[-1]["x-tenant"], edge.decider.seen[-1]["cookie"]) == (b"acme", b"uid=7")
    stats = await edge.admin.counters(r"^http\.edge\.downstream_cx_total$|^listener_manager\.listener_modified$")
    assert list(stats.values()) == [1, 0]


async def test_the_second_kill_switch_closes_one_model_and_opens_it_again(edge):
    write(edge.settings.files, {"rtds.yaml": render_runtime(edge.models, ["digits"])})
    await edge.until(lambda: edge.is_served_by("digits-stable-0"))
    assert (await edge.infer("words", x_test_cohort="canary")).by == "words-canary-0"
    write(edge.settings.files, {"rtds.yaml": render_runtime(edge.models)})
    await edge.until(lambda: edge.is_served_by("digits-canary-0"))


async def test_a_model_comes_and_goes_without_one_failed_request(edge, a_model, stranger):
    await stranger("letters-stable-0", edge.folder / "letters-stable-0.sock")
    with_letters = edge.files(models=(*edge.models, a_model("letters", canaries=0)))
    async with _traffic(edge) as statuses:
        assert write(edge.settings.files, with_letters) == ("cds.yaml", "rtds.yaml", "rds.yaml")
        await edge.until(lambda: edge.answers("letters", 200))
        write(edge.settings.files, edge.files(models=edge.models[:1]))
        await edge.until(lambda: edge.answers("letters", 404))
        await edge.until(lambda: edge.gone("words_canary"))
    assert set(statuses) == {200}


async def test_a_models_servers_are_exchanged_without_one_failed_request(edge, stranger):
    await stranger("new-stable", edge.folder / "new-stable.sock")
    await stranger("new-canary", edge.folder / "new-canary.sock")
    new = replace(edge.models[0], stable=("unix:new-stable.sock",), canary=("unix:new-canary.sock",))
    async with _traffic(edge) as statuses:
        assert write(edge.settings.files, edge.files(models=(new, edge.models[1]))) == ("cds.yaml",)
        await edge.until(lambda: edge.is_served_by("new-canary"))
        await edge.until(lambda: edge.is_served_by("new-stable", "stable"))  # the arms' clusters warm up on their own
    assert set(statuses) == {200}


@contextlib.asynccontextmanager
async def _traffic(edge) -> AsyncIterator[list[int]]:
    """Four clients that never stop asking; the statuses they got."""
    statuses: list[int] = []

    async def ask() -> None:
        while True:
            statuses.append((await edge.infer(x_test_cohort="canary")).status)

    clients = [asyncio.create_task(ask()) for _ in range(4)]
    await edge.until(lambda: statuses)
    yield statuses
    for client in clients:
        client.cancel()
    ends = await asyncio.gather(*clients, return_exceptions=True)
    assert {type(end) for end in ends} == {asyncio.CancelledError}


async def test_files_behind_a_swapped_symlink_are_taken_as_kubernetes_mounts_them(running, a_model):
    """A ConfigMap's files are links through `..data`, and only that link is renamed."""

    def through_links(edge) -> None:
        folder = edge.settings.files
        for name in (path.name for path in folder.iterdir()):
            (folder / "1").mkdir(exist_ok=True)
            (folder / name).rename(folder / "1" / name)
            (folder / name).symlink_to(f"..data/{name}")
        (folder / "..data").symlink_to("1")

    async with running([a_model("digits")], before_start=through_links) as edge:
        folder = edge.settings.files
        assert await edge.is_served_by("digits-canary-0")
        shutil.copytree(folder / "1", folder / "2")
        (folder / "2" / "rtds.yaml").write_text(render_runtime(edge.models, ["digits"]))
        (folder / "..data_tmp").symlink_to("2")
        (folder / "..data_tmp").rename(folder / "..data")
        await edge.until(lambda: edge.is_served_by("digits-stable-0"))


REJECTIONS = {
    "cds.yaml": r"^cluster_manager\.cds\.update_(rejected|failure)$",
    "lds.yaml": r"^listener_manager\.lds\.update_(rejected|failure)$",
    "rds.yaml": r"^http\.edge\.rds\.models\.update_(rejected|failure)$",
    "ecds.yaml": r"ext_proc\.update_(rejected|failure)$",
    "rtds.yaml": r"^runtime\.update_(rejected|failure)$",
}


@pytest.mark.parametrize("broken", ["resources: [", "resources: [{name: x}]\n"])
async def test_a_broken_file_keeps_the_last_good_one(edge, broken):
    for name, pattern in REJECTIONS.items():
        write(edge.settings.files, {name: broken})
        await edge.until(lambda pattern=pattern: edge.counted(pattern))
    assert (await edge.infer(x_test_cohort="canary")).by == "digits-canary-0"
    assert (await edge.infer("words")).by == "words-stable-0"
    write(edge.settings.files, edge.files(killed=["digits"]))
    await edge.until(lambda: edge.is_served_by("digits-stable-0"))


async def test_a_broken_filter_file_at_the_start_is_no_500(running, a_model):
    async with running([a_model("digits")], lambda files: files | {"ecds.yaml": "resources: ["}) as edge:
        assert (await edge.infer(x_test_cohort="canary", x_user_id="u7")).status == 200
        assert edge.decider.seen[-1]["x-user-id"] == b"u7"
        write(edge.settings.files, edge.files())
        await edge.until(lambda: edge.is_served_by("digits-canary-0"))
