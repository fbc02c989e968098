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
                users = ["anonymous"] * 100 + [f"user-{i}" for i in range(200)]
                await asyncio.gather(*(client.infer(user) for user in users), client.infer(""))
                return system.status()["flags"]["digits"]

            flag = await some_traffic()
            for _ in range(60):
                if "heavy_unit" in flag and ("unit" in flag["heavy_unit"]) is shown:
                    break
                flag = await some_traffic()
        output = system.output
    assert 0.25 < flag["heavy_unit"]["share"] < 0.4
    assert flag["heavy_unit"].get("unit") == ("anonymous" if shown else None)
    assert flag["decided"]["stable"]["NO_UNIT"] >= 1
    assert "heavy unit: digits: one unit makes up 3" in output
    assert ("anonymous" in output) is False
