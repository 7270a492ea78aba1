"""A replica of Ray Serve that ends with its engine; imports Ray."""

from __future__ import annotations

import asyncio
import logging
import os

from ray.llm._internal.serve.core.server.llm_server import LLMServer

logger = logging.getLogger("ray.serve")
EVERY_SECONDS = 0.05


class ReplicaServer(LLMServer):
    """Ray Serve's server of one engine, whose process ends soon after the engine has died.

    Ray Serve asks after a replica's health every ten seconds and gives up after three bad answers.
    Until then one without an engine fails every request at once, looks idle, and is sent most.
    """

    async def start(self) -> None:
        """As Ray Serve does, and watch the engine from then on."""
        await super().start()
        self._watch = asyncio.create_task(self._end_with_engine())

    async def _end_with_engine(self) -> None:
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            try:
                await self.check_health()
            except Exception as error:
                logger.error("The engine of this replica died (%s), so it ends: see its log", error)
                os._exit(1)
