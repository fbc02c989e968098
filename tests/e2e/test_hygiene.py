"""Units that are no persons: what everybody who looks at the status is told about them."""

import asyncio

import pytest


@pytest.mark.parametrize("shown", [False, True])
async def test_a_unit_that_is_no_person_raises_an_alert_with_its_share_and_its_name_only_where_that_is_configured(
    tools, shown
):
    environment = {"PERCH_SHOW_HEAVY_UNITS": "true"} if shown else {}
    with tools.running(tools.digits(), environment=environment) as system:
        async with tools.client_of(system) as client:

            async def some_traffic() -> dict:
                """A third of it by one unit, and one request without any."""
                # In turn, so that it is a third whenever serve counts.
                users = [user for i in range(100) for user in ("anonymous", f"user-{i}", f"user-{100 + i}")]
                await asyncio.gather(*(client.infer(user) for user in users), client.infer(""))
                return system.status()["flags"]["digits"]

            flag = await some_traffic()
            async with asyncio.timeout(60):
                while "heavy_unit" not in flag or ("unit" in flag["heavy_unit"]) is not shown:
                    flag = await some_traffic()
        line = "heavy unit: digits: one unit makes up 3"
        await asyncio.to_thread(tools.until, lambda: line in system.output, "the line that `perch up` passes on")
        output = system.output
    assert 0.25 < flag["heavy_unit"]["share"] < 0.4
    assert flag["heavy_unit"].get("unit") == ("anonymous" if shown else None)
    assert flag["decided"]["stable"]["NO_UNIT"] >= 1
    assert ("anonymous" in output) is False
