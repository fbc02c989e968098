"""An access log service that reads every entry and keeps none: `python -m extproc.bench.logsink unix:PATH`."""

import asyncio
import signal
import sys
import time

from extproc.accesslog import AccessLogService, StreamInfo
from extproc.wire.outcomes import Batch


def drop(_batch: Batch, _stream: StreamInfo) -> None:
    """Nothing: what the log costs Envoy and its reader is measured, not what is made of it."""


async def serve(listen: str) -> None:
    """Until SIGTERM."""
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    service = AccessLogService(drop, time.monotonic)
    await service.start(listen)
    await ended.wait()
    await service.stop(0.0)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
