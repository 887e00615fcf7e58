"""Limits in front of llama.cpp's server, with a small server in its place that records what reaches it."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from fintune.inference import http_front
from fintune.inference.http_front import HttpFront

CHAT = "/v1/chat/completions"
CLIENT = httpx.Client(verify=False, trust_env=False, timeout=20)


class Backend(ThreadingHTTPServer):
    """Answers with what it was sent; a POST with "wait" is answered after ``release``."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[bytes] = []
        self.keys: list[str | None] = []
        self.waiting, self.release, self.left = threading.Semaphore(0), threading.Event(), threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Backend

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.keys.append(self.headers["authorization"])
        self.server.bodies.append(body)
        self.send_response(200)
        self.end_headers()
        if b"wait" in body:
            self.server.waiting.release()
            if not self.server.release.is_set() and self.connection.recv(1) == b"":
                self.server.left.set()
        self.wfile.write(b"pong")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def backend():
    server = Backend()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def open_front(backend):
    with ExitStack() as stack:

        def start(key: str | None = None) -> str:
            listening = socket.create_server(("127.0.0.1", 0))
            address = ("127.0.0.1", backend.server_address[1])
            front = HttpFront(listening, address, "inner", key=key, parallel=1, max_body_bytes=100_000)
            stack.callback(front.close)
            return f"http://127.0.0.1:{listening.getsockname()[1]}"

        yield start


def connect(url: str, sent: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20)
    connection.sendall(sent)
    return connection


def answer_to(url: str, sent: bytes) -> bytes:
    with connect(url, sent) as connection:
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


@pytest.mark.parametrize(
    "beginning", [b"", b"POST / HTTP/1.1\r\nHost: 127", b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"]
)
def test_unfinished_requests_do_not_stop_health(open_front, beginning):
    url = open_front()
    with ExitStack() as stack:
        for _ in range(http_front._MAX_CONNECTIONS + 50):
            stack.enter_context(connect(url, beginning))
        assert CLIENT.get(f"{url}/health").text == "pong"


@pytest.mark.parametrize("name", ["_HEAD_SECONDS", "_BODY_SECONDS"])
def test_unfinished_requests_end_in_time(open_front, monkeypatch, name):
    monkeypatch.setattr(http_front, name, 0.1)
    head = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\n"
    assert answer_to(open_front(), head if name == "_HEAD_SECONDS" else head + b"\r\nabc").startswith(b"HTTP/1.1 408")


def test_health_does_not_wait_for_answers(open_front, backend):
    url = open_front()
    waiting = b'{"wait": 1}'
    sent = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (
        CHAT.encode(),
        len(waiting),
        waiting,
    )
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(connect(url, sent))
        assert backend.waiting.acquire(timeout=20) and backend.waiting.acquire(timeout=20)
        assert CLIENT.get(f"{url}/health").text == "pong"
        assert len(backend.bodies) == 3  # two for the model at a time, and the health
    assert backend.left.wait(20)  # who leaves is not computed further


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost", None, 200),
        ("[::1]:99", "http://localhost:3000", 200),
        ("evil.example", None, 403),
        ("127.0.0.1.evil.example:8080", None, 403),
        ("", None, 403),
        ("127.0.0.1", "http://evil.example", 403),
        ("127.0.0.1", "null", 403),
        ("127.0.0.1", "http://[", 403),
    ],
)
def test_host_and_origin_without_a_key(open_front, backend, host, origin, status):
    headers = {"host": host} | ({"origin": origin} if origin else {})
    assert CLIENT.post(open_front() + CHAT, json={}, headers=headers).status_code == status
    assert len(backend.bodies) == (status == 200)


def test_key_is_checked_and_not_passed_on(open_front, backend):
    url = open_front("outer")
    for headers in ({}, {"authorization": "Bearer oute"}, {"authorization": "Bearer outer2"}, {"x-api-key": "é"}):
        encoded = {name: value.encode() for name, value in headers.items()}
        assert CLIENT.get(f"{url}/v1/models", headers=encoded).status_code == 401
    assert CLIENT.get(f"{url}/health").status_code == 200
    for headers in ({"authorization": "Bearer outer", "host": "any.example"}, {"x-api-key": "outer"}):
        assert CLIENT.get(f"{url}/v1/models", headers=headers).text == "pong"
    assert backend.keys == ["Bearer inner"] * 3


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b'"' + b"a" * 100_000 + b'"', "more than 100,000 bytes"),
        (b"[" * 90_000, "no JSON"),
        (b"\xff", "no JSON"),
        (b"[]", "no JSON object"),
        (b'{"top_logprobs": 1000000000}', "top_logprobs is at most 20"),
        (b'{"n_probs": 1e999}', "n_probs is at most 20"),
        (b'{"samplers": [%s]}' % b",".join([b'"min_p"'] * 99), "samplers has at most 32"),
        (b'{"prompt": [%s]}' % b",".join([b'"a"'] * 999), "at most 128 prompts"),
    ],
)
def test_bodies_that_are_refused(open_front, backend, body, problem):
    url = open_front()
    for content in (body, iter([body])):  # with a length, and in chunks
        answer = CLIENT.post(url + CHAT, content=content)
        assert answer.status_code in (400, 413) and problem in answer.json()["error"]["message"]
    assert not backend.bodies


@pytest.mark.parametrize("sent", [b"\0\1\2\r\n\r\n", b"GET / HTTP/1.1\r\nX: %s\r\n\r\n" % (b"x" * 99_999)])
def test_broken_heads_are_refused(open_front, sent):
    assert answer_to(open_front(), sent).startswith(b"HTTP/1.1 400")


def test_whole_requests_pass_unchanged(open_front, backend):
    body = {"prompt": list(range(5_000)), "n_probs": 20, "text": "é\0"}
    for content in (json.dumps(body).encode(), iter([json.dumps(body).encode()])):
        assert CLIENT.post(open_front() + "/completion", content=content).text == "pong"
    assert [json.loads(found) for found in backend.bodies] == [body, body]
