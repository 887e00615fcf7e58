"""A real llama.cpp server on loopback, and a small one that answers as it is told."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-test-of-the-key"


@contextmanager
def llama_cpp_server(path, *, context_tokens=256, parallel=2):
    """llama.cpp's own server in this process; yields the address of its OpenAI-compatible interface."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel = parallel
    params.n_ctx = context_tokens * parallel
    params.kv_unified = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.fit_params = params.warmup = params.ui = False
    params.cache_ram_mib = 0
    params.n_cache_reuse = 0
    params.verbosity = -1
    params.n_threads_http = 4
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [KEY]
    server = xllamacpp.Server(params)
    try:
        yield f"{server.listening_address}/v1"
    finally:
        del server


class Scripted:
    """Answers in the order of a script; what comes after repeats its last entry.

    Attributes:
        seen: (route, body, headers) of every request.
        script: What is still to be answered.
        models: Entries of ``/models``.
    """

    def __init__(self, *answers, models=None, seconds=0.0):
        self.seen = []
        self.script = list(answers)
        self.models = models
        served = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                listed = served.models and {"data": served.models}
                self._answer(404 if listed is None else 200, listed or {}, {})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                served.seen.append((self.path, body, dict(self.headers)))
                time.sleep(seconds)
                served.before_answering(body)
                script = served.script
                status, answer, *headers = script.pop(0) if len(script) > 1 else script[0]
                self._answer(status, answer, headers[0] if headers else {})

            def _answer(self, status, answer, headers):
                data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {"content-length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def before_answering(self, body):
        """Called with a request that was read."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Slow(Scripted):
    """Keeps back the answer to one question until told to go on."""

    def __init__(self, question):
        super().__init__((200, said()))
        self.question, self.go_on = question, threading.Event()

    def before_answering(self, body):
        if body["messages"][-1]["content"] == self.question:
            self.go_on.wait(60)


def said(text="add(1, 2)", **choice):
    """An answer of ``/chat/completions`` with nothing but what every server gives."""
    message = {"role": "assistant", "content": text}
    return {
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", **choice}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
    }
