"""PERCH_* environment variables as one frozen value, read once. Nothing else reads the environment."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from extproc.address import parse_address


class Settings(BaseSettings):
    """Every setting of every command; options on the command line come before these, these before the defaults."""

    model_config = SettingsConfigDict(env_prefix="PERCH_", frozen=True, extra="ignore", env_ignore_empty=True)

    flags: Path = Field(Path("flags/flags.yaml"), description="the flag file; its folder is watched")
    models: Path = Field(Path("envoy/models.yaml"), description="the models that Envoy serves")
    state: Path = Field(Path("state"), description="folder of what programs write")
    listen: str = Field("unix:/run/perch/ext_proc.sock", description="where `serve` listens: unix:PATH or HOST:PORT")
    ext_proc: str | None = Field(
        None, description="where Envoy finds every `serve`, with commas between; listen and workers if unset"
    )
    workers: int = Field(1, ge=1, le=64, description="processes of `serve`, one address each")
    transport: Literal["fast", "grpcio"] = Field("fast", description="ext_proc transport: fast, or grpcio as reference")
    control_listen: str = Field("127.0.0.1:8900", description="where the control API listens")
    token: str | None = Field(None, min_length=16, description="whoever writes to the control API must show it")
    token_file: Path | None = Field(None, description="file with that token, read at the start; an empty one is none")
    envoy_listen: str = Field("127.0.0.1:10000", description="where Envoy listens for clients")
    envoy_threads: int = Field(1, ge=1, le=256, description="threads of Envoy that take requests")
    envoy_admin: str = Field("127.0.0.1:9901", description="Envoy's admin interface: HOST:PORT or unix:PATH")
    access_log: str = Field("unix:/run/perch/als.sock", description="where Envoy sends its access log")
    counters: Path | None = Field(None, description="control's socket for what serve counts; none if unset")
    show_heavy_units: bool = Field(False, description="name a unit that makes up an unusual share of the traffic")
    xds: Path | None = Field(None, description="folder of Envoy's files that `control` keeps current; none if unset")
    run: Path = Field(Path("/run/perch"), description="folder that relative socket paths of models.yaml belong to")
    statsd: str | None = Field(None, description="StatsD address HOST:PORT or unix:PATH; none if unset")
    statsd_tags: Literal["dogstatsd", "influx", "graphite", "none"] = Field(
        "dogstatsd", description="dogstatsd, influx, graphite or none"
    )
    force_token: str | None = Field(None, min_length=16, description="testers' token for x-force-cohort")
    show_cohort: bool = Field(True, description="x-model-cohort in responses to clients")
    show_version: bool = Field(True, description="x-model-version in responses to clients")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="debug, info, warning, error")
    events: Path | None = Field(None, description="datagram socket that `up` listens at; set by `up`")
    drain_s: float = Field(5.0, ge=0, description="seconds that requests under way are given at SIGTERM")

    @field_validator("listen", "control_listen", "envoy_listen", "envoy_admin", "access_log", "statsd")
    @classmethod
    def _is_an_address(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            parse_address(value, port_zero=info.field_name != "statsd")
        return value

    @field_validator("ext_proc")
    @classmethod
    def _are_addresses(cls, value: str | None) -> str | None:
        for address in () if value is None else value.split(","):
            parse_address(address.strip())
        return value


def environment(**perch: str) -> Mapping[str, str]:
    """The environment for a process of ours: what we were given, with the PERCH_ variables named here on top."""
    return {**os.environ, **{f"PERCH_{name.upper()}": value for name, value in perch.items()}}
