"""Requests that two servers could read in two ways, or that no server should read, each as raw bytes."""

from __future__ import annotations

import contextlib
import socket
from urllib.parse import urlsplit

PATIENCE = 30.0
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""What is asked for where a server takes the rest of a request for another."""


def head(*lines: str, method: str = "POST", version: str = "1.1", host: str = "Host: localhost") -> bytes:
    """The head of a request with these lines."""
    first = f"{method} /asked HTTP/{version}"
    return "\r\n".join([first, *([host] if host else []), *lines, "", ""]).encode("latin-1")


def chunk(size: str, data: bytes = b"hello") -> bytes:
    """One chunk with its size as written, and the end of the body."""
    return head("Transfer-Encoding: chunked") + size.encode() + b"\r\n" + data + b"\r\n0\r\n\r\n"


SHAPES: dict[str, bytes] = {
    "two lengths": head("Content-Length: 5", "Content-Length: 50") + b"hello" + HIDDEN,
    "two equal lengths": head("Content-Length: 5", "Content-Length: 5") + b"hello",
    "a list of lengths": head("Content-Length: 5, 50") + b"hello" + HIDDEN,
    "a negative length": head("Content-Length: -5") + b"hello",
    "a length with a sign": head("Content-Length: +5") + b"hello",
    "a length with an underscore": head("Content-Length: 1_0") + b"0123456789",
    "a hexadecimal length": head("Content-Length: 0x5") + b"hello",
    "a length of nothing": head("Content-Length:") + HIDDEN,
    "a length and chunks": head("Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n" + HIDDEN,
    "chunks twice": head("Transfer-Encoding: chunked", "Transfer-Encoding: identity") + b"0\r\n\r\n" + HIDDEN,
    "chunks that are not last": head("Transfer-Encoding: chunked, identity") + b"0\r\n\r\n" + HIDDEN,
    "an unknown encoding": head("Transfer-Encoding: xchunked") + b"0\r\n\r\n" + HIDDEN,
    "an empty encoding": head("Transfer-Encoding:") + HIDDEN,
    "an encoding of nothing": head("Transfer-Encoding: ,") + HIDDEN,
    "chunked twice over": head("Transfer-Encoding: chunked, chunked") + b"0\r\n\r\n" + HIDDEN,
    "a line feed in a chunk's size": chunk("5\n"),
    "a line feed in a chunk's extension": chunk("5;a\n"),
    "another version": b"GET /asked HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "no version": b"GET /asked\r\nHost: localhost\r\n\r\n",
    "an address without end": b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a length of 5,000 digits": head("Content-Length: " + "1" * 5000),
    "65,000 spaces": head("X:" + " " * 65_000 + "\0", method="GET"),
    "60,000 digits": b"GET http://" + b"1" * 60_000 + b" X\r\nHost: localhost\r\n\r\n",
    "chunks of HTTP/1.0": head("Transfer-Encoding: chunked", "Connection: keep-alive", version="1.0")
    + b"0\r\n\r\n"
    + HIDDEN,
    "a space before the colon": head("Content-Length : 5") + b"hello",
    "a folded line": head("X-Long: a", " b"),
    "a line end of its own kind": head("X-One: a\nContent-Length: 5") + b"hello",
    "a zero byte": head("X-Zero: a\0b"),
    "a chunk of fifteen f's": head("Transfer-Encoding: chunked") + b"f" * 15 + b"\r\n" + b"x" * 300_000,
    "a chunk with a sign": chunk("+5"),
    "a chunk with an underscore": chunk("0_5"),
    "a negative chunk": chunk("-5"),
    "a chunk that is longer than it says": chunk("3"),
    "no host": head(method="GET", host=""),
    "two hosts": head("Host: evil.example", method="GET"),
    "a head without end": head(method="GET")[:-2] + b"X-Long: " + b"x" * 200_000,
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n",
}
"""Each by what is wrong with it."""


def answers(url: str, sent: bytes) -> list[int]:
    """The statuses of what is answered until the server closes the connection, which a last request asks for."""
    target = urlsplit(url)
    received = b""
    with socket.create_connection((str(target.hostname), target.port or 80), PATIENCE) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(sent)
            client.sendall(b"GET /last HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while part := client.recv(65536):
                received += part
    return [int(line.split(b" ")[1]) for line in received.split(b"\r\n") if line.startswith(b"HTTP/1.")]
