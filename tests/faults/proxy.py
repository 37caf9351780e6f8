"""A proxy on loopback in front of an S3 server. It spoils a share of the calls."""

import asyncio
import contextlib
import random
import threading
from collections import Counter
from collections.abc import Iterator

import aiohttp
from aiohttp import web
from yarl import URL

KINDS = ("500", "503", "slow", "cut before", "cut after")
"""500, 503: the answer, without asking the store. slow: a late answer. cut before, cut after: the connection breaks
before the store hears of the call, or after it has done the work, so that only its answer is lost."""
SLOW_SECONDS = 3.0
_NOT_PASSED_ON = {"connection", "transfer-encoding", "expect", "keep-alive"}


class FaultyProxy:
    """Passes most calls on to `upstream`. `calls` counts all by method, `injected` the faults by kind."""

    def __init__(self, upstream: str, kinds: tuple[str, ...], share: float, rng: random.Random) -> None:
        self.upstream, self.kinds, self.share, self.rng = upstream, kinds, share, rng
        self.injected: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.url = ""

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        kind = self.rng.choice(self.kinds) if self.rng.random() < self.share else ""
        self.calls[request.method] += 1
        if kind:
            self.injected[kind] += 1
        body = await request.read()
        if kind in ("500", "503"):
            code = "InternalError" if kind == "500" else "SlowDown"
            return web.Response(status=int(kind), text=f"<Error><Code>{code}</Code></Error>", content_type="text/xml")
        if kind == "cut before":
            return self._cut(request)
        if kind == "slow":
            await asyncio.sleep(SLOW_SECONDS)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _NOT_PASSED_ON}
        url = URL(self.upstream + request.raw_path, encoded=True)
        async with self._session.request(
            request.method, url, headers=headers, data=body or None, allow_redirects=False
        ) as answer:
            data = await answer.read()
            if kind == "cut after":
                return self._cut(request)
            passed = [(name, value) for name, value in answer.headers.items() if name.lower() not in _NOT_PASSED_ON]
            response = web.StreamResponse(status=answer.status, reason=answer.reason)
            response.headers.extend(passed)
            await response.prepare(request)
            if request.method != "HEAD":
                await response.write(data)
            await response.write_eof()
            return response

    def _cut(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        raise asyncio.CancelledError

    async def _serve(self, started: threading.Event, ended: asyncio.Event) -> None:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None)
        async with aiohttp.ClientSession(
            auto_decompress=False, connector=aiohttp.TCPConnector(limit=0, force_close=True)
        ) as self._session:
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            host, port = runner.addresses[0][:2]
            self.url = f"http://{host}:{port}"
            started.set()
            await ended.wait()
            await runner.cleanup()


@contextlib.contextmanager
def faulty_proxy(upstream: str, kinds: tuple[str, ...], share: float, rng: random.Random) -> Iterator[FaultyProxy]:
    """The proxy, served from its own thread for the time of the context."""
    proxy, loop, started, ended = (
        FaultyProxy(upstream, kinds, share, rng),
        asyncio.new_event_loop(),
        threading.Event(),
        asyncio.Event(),
    )
    thread = threading.Thread(target=lambda: loop.run_until_complete(proxy._serve(started, ended)), daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(30)
        loop.close()
