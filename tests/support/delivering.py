"""A replica that delivers until it is killed: ``python -m tests.support.delivering DATABASE_URL``."""

import asyncio
import sys

from controller.flows.deliver import Deliverer
from controller.settings import DatabaseSettings
from controller.store.database import Database


async def main(url: str) -> None:
    await Deliverer(await Database.open(DatabaseSettings(url=url))).run()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
