"""Our websocket client against an independent server (aiohttp's)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from aiohttp import WSMsgType, web

from dev.websocket import WebSocket

SIZES = [0, 1, 125, 126, 127, 65535, 65536, 300_000]


async def talk(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    for size in SIZES:
        await socket.send_bytes(b"\x00" * size)  # a preview: to be skipped
        await socket.ping(b"are you there")
        await socket.send_str("é" * size)
    # The client answers pings while it reads; aiohttp would hide them unless autoping is off.
    await socket.close()
    return socket


async def ask(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse(autoping=False)
    await socket.prepare(request)
    await socket.ping(b"abcdef")
    await socket.send_str("read me")
    answer = await socket.receive()
    assert answer.type == WSMsgType.PONG
    await socket.send_str(answer.data.decode())
    await socket.close()
    return socket


@pytest.fixture
def peer() -> Iterator[int]:
    loop = asyncio.new_event_loop()
    app = web.Application()
    app.add_routes([web.get("/talk", talk), web.get("/ask", ask)])
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield runner.addresses[0][1]
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def test_messages_of_every_length_arrive_whole_and_previews_are_skipped(peer: int) -> None:
    socket = WebSocket("127.0.0.1", peer, "/talk", timeout=10)
    received = [socket.receive() for _ in SIZES]
    assert received == ["é" * size for size in SIZES]
    assert socket.receive() is None
    socket.close()


def test_a_ping_is_answered_with_its_own_payload(peer: int) -> None:
    socket = WebSocket("127.0.0.1", peer, "/ask", timeout=10)
    assert [socket.receive(), socket.receive()] == ["read me", "abcdef"]
    socket.close()


def test_a_server_that_is_no_websocket_is_an_error(peer: int) -> None:
    with pytest.raises(ConnectionError, match="404"):
        WebSocket("127.0.0.1", peer, "/nothing-here", timeout=10)
