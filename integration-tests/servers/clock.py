"""An event loop whose timers must go on after a restore, wherever the monotonic clock then stands.

    GET /check         ticks of a periodic timer go on; the monotonic clock never went back; a far timer has not fired
    GET /sleep?ms=N    answers after N ms of the loop's own time, and says how long it took by the wall clock
"""

import asyncio
import json
import signal
import sys
import threading
import time
import urllib.parse

from serving import arguments

PERIOD_SECONDS = 0.05
# Longer than any test, and shorter than what a wrong clock would add.
FAR_SECONDS = 3600


class Clock:
    def __init__(self):
        self.ticks = 0
        self.thread_ticks = 0
        self.far_fired = False
        self.went_back = 0.0
        self.last = time.monotonic()
        self.loop = asyncio.get_running_loop()
        self.loop.call_later(FAR_SECONDS, self.far)
        self.tick()
        threading.Thread(target=self.wait_on_condition, daemon=True).start()

    def far(self):
        self.far_fired = True

    def tick(self):
        now = time.monotonic()
        self.went_back = max(self.went_back, self.last - now)
        self.last = now
        self.ticks += 1
        self.loop.call_later(PERIOD_SECONDS, self.tick)

    def wait_on_condition(self):
        """A thread that waits with a deadline, which the C library hands to the kernel as an absolute time."""
        condition = threading.Condition()
        with condition:
            while True:
                condition.wait(PERIOD_SECONDS)
                self.thread_ticks += 1

    async def more(self, read, seconds=5.0):
        """Whether a counter grows. Waited for by the wall clock, since the loop's own is what is looked at."""
        before, end = read(), time.time() + seconds
        while read() == before:
            if time.time() > end:
                return False
            await asyncio.sleep(0)
        return True

    async def check(self, query):
        parts = {
            "loop_timer": "ok" if await self.more(lambda: self.ticks) else "the loop's timer no longer ticks",
            "thread_timer": "ok" if await self.more(lambda: self.thread_ticks) else "the thread's timer no longer ticks",
            "far_timer": "ok" if not self.far_fired else f"a timer of {FAR_SECONDS} s has fired",
            "monotonic": "ok" if self.went_back == 0 else f"the monotonic clock went back by {self.went_back} s",
        }
        ok = all(part == "ok" for part in parts.values())
        seen = {"ticks": self.ticks, "thread_ticks": self.thread_ticks, "monotonic": time.monotonic()}
        return (200 if ok else 500), {"ok": ok, "parts": parts, "seen": seen}

    async def sleep(self, query):
        milliseconds = float(query["ms"])
        began = time.time()
        await asyncio.sleep(milliseconds / 1000)
        return 200, {"asked_ms": milliseconds, "took_ms": (time.time() - began) * 1000}

    async def healthz(self, query):
        return 200, {"ready": True}

    async def answer(self, reader, writer):
        """HTTP as far as tests speak it: one GET after another, no bodies."""
        try:
            while line := await reader.readline():
                while (await reader.readline()).strip():
                    pass
                url = urllib.parse.urlsplit(line.split()[1].decode())
                function = {"/check": self.check, "/sleep": self.sleep, "/healthz": self.healthz}.get(url.path)
                query = dict(urllib.parse.parse_qsl(url.query))
                status, value = await function(query) if function else (404, {"error": f"no {url.path}"})
                text = json.dumps(value).encode()
                writer.write(b"HTTP/1.1 %d -\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (status, len(text), text))
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


async def main():
    options = arguments(__doc__.splitlines()[0]).parse_args()
    # The first process of a namespace is not ended by a signal that it does not handle.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, sys.exit)
    server = await asyncio.start_server(Clock().answer, options.host, options.port)
    print(f"listening on {options.host}:{options.port}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
