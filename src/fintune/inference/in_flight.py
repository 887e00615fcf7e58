"""Requests beside each other, in threads that nobody waits for: who stops early stops at once.

The threads of ``concurrent.futures`` are joined when the interpreter ends, so that Ctrl-C would wait for the slowest
answer; a server may take minutes for one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

Body = Mapping[str, Any]
Answer = dict[str, Any]


class InFlight:
    """Sends what is submitted, the earliest first.

    Args:
        post: Sends a request and waits for its answer; called by several threads.
        parallel: Requests at a time.
    """

    def __init__(self, post: Callable[[Body], Answer], parallel: int) -> None:
        self._post = post
        self._parallel = parallel
        self._left: SimpleQueue[tuple[Future[Answer], Body] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, body: Body) -> Future[Answer]:
        """Queue a request; what sending it raises is raised by the future's ``result``."""
        future: Future[Answer] = Future()
        self._left.put((future, body))
        if len(self._threads) < self._parallel:
            thread = threading.Thread(target=self._work, name="fintune-request", daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def close(self) -> None:
        """Send nothing more. What is in flight ends by itself, unheard, or with the process."""
        try:
            while (job := self._left.get_nowait()) is not None:
                job[0].cancel()
        except Empty:
            pass
        for _ in self._threads:
            self._left.put(None)

    def _work(self) -> None:
        while (job := self._left.get()) is not None:
            future, body = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                answer = self._post(body)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(answer)
