"""An engine with vLLM's command line that can be killed: all it says comes from the witness, which can't.

    python engine.py serve MODEL --uds PATH --witness PORT [any flag of vLLM's]

The standard library alone: it starts as fast as a program can.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--uds", required=True)
    parser.add_argument("--witness", type=int, required=True)
    args, _ = parser.parse_known_args()

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", args.witness)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))

    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await asyncio.start_unix_server(on_connection, args.uds)
    await stop.wait()


if __name__ == "__main__":
    asyncio.run(main())
