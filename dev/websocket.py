"""The client's side of RFC 6455, as much of it as a local ComfyUI server needs."""

from __future__ import annotations

import base64
import os
import socket
import struct

TEXT, CLOSE, PING, PONG = 0x1, 0x8, 0x9, 0xA


class WebSocket:
    """One connection; `receive` hands out whole text messages."""

    def __init__(self, host: str, port: int, path: str, timeout: float) -> None:
        """Connect and shake hands.

        Raises:
            ConnectionError: when the server does not agree to the protocol.
        """
        self._socket = socket.create_connection((host, port), timeout)
        self._file = self._socket.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode()
        request = (
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        self._socket.sendall(request.encode())
        status = self._file.readline()
        if b" 101 " not in status:
            self.close()
            raise ConnectionError(f"the server refused the websocket: {status.decode().strip()}")
        while self._file.readline() not in (b"\r\n", b""):
            pass

    def receive(self) -> str | None:
        """The next text message, None once the server has closed; binary previews are skipped.

        Raises:
            TimeoutError: when nothing arrives for the connection's timeout.
        """
        message = bytearray()
        kind = 0
        while True:
            final, opcode, payload = self._frame()
            if opcode == CLOSE:
                return None
            if opcode == PING:
                self._send(PONG, payload)
            if opcode >= CLOSE:
                continue  # control frames may come between the pieces of a message
            kind = opcode or kind  # 0 continues the message
            message += payload
            if final:
                if kind == TEXT:
                    return message.decode("utf-8")
                message.clear()

    def _frame(self) -> tuple[bool, int, bytes]:
        first, second = self._exactly(2)
        length = second & 0x7F
        if length == 126:
            (length,) = struct.unpack(">H", self._exactly(2))
        elif length == 127:
            (length,) = struct.unpack(">Q", self._exactly(8))
        return bool(first & 0x80), first & 0x0F, self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise ConnectionError("the server went away")
        return data

    def _send(self, opcode: int, payload: bytes) -> None:
        # What a client sends is masked; control payloads are at most 125 bytes.
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
        self._socket.sendall(bytes([0x80 | opcode, 0x80 | len(payload)]) + mask + masked)

    def close(self) -> None:
        """Drop the connection."""
        self._file.close()
        self._socket.close()
