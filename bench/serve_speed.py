"""How many answers `fintune serve` gives to 50 clients, beside llama.cpp's own server with the same settings.

    python bench/serve_speed.py --model runs/demo/export/demo-Q4_K_M.gguf --out bench/results/serve_speed_cpu.json

The servers take turns, each in a process of its own: llama.cpp's server as the package xllamacpp starts it, and the
same server behind fintune's limits (`fintune.inference.http_front`). Each client sends its next question when it has an
answer. An answer counts if it is whole. The result has the answers a second of each turn, and every error by its name.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

WAYS = ("llama.cpp", "fintune")
CONTEXT_TOKENS, NUM_TOKENS = 1024, 6


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60, help="length of a turn")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each server")
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, given.model, given.parallel, given.threads)
    result = compare(given)
    text = json.dumps(result, indent=2) + "\n"
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    print(text, end="")


def serve(way: str, model: Path, parallel: int, threads: int) -> None:
    """Serve, print the address, and wait for the end of standard input."""
    from fintune.inference.llama_server import LlamaServer, server_params, start_server

    if way == "fintune":
        server: Any = LlamaServer(model, port=0, context_tokens=CONTEXT_TOKENS, threads=threads, parallel=parallel)
        url = server.url
    else:
        params = server_params(model, context_tokens=CONTEXT_TOKENS, threads=threads, parallel=parallel)
        params.hostnames, params.port = ["127.0.0.1"], 0
        server = start_server(params, model)
        url = f"{server.listening_address}/v1"
    print(url, flush=True)
    sys.stdin.read()
    os._exit(0)


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Let the servers take turns, the order reversed in every other round."""
    from importlib.metadata import version

    from fintune.util.system import checkout_commit, machine_facts

    turns: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(given.rounds):
        for way in WAYS[:: -1 if number % 2 else 1]:
            options = ("--model", given.model, "--parallel", given.parallel, "--threads", given.threads)
            command = [sys.executable, __file__, "--serve", way, *map(str, options)]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                url = process.stdout.readline().strip()
                turns[way].append(asyncio.run(ask(url, given.clients, given.seconds)))
                process.kill()
    rates = {way: statistics.mean(turn["answers_per_second"] for turn in turns[way]) for way in WAYS}
    return {
        "clients": given.clients,
        "seconds": given.seconds,
        "parallel": given.parallel,
        "threads": given.threads,
        "tokens_per_answer": NUM_TOKENS,
        "turns": turns,
        "mean_answers_per_second": {way: round(rate, 2) for way, rate in rates.items()},
        "fintune_to_llama_cpp": round(rates["fintune"] / rates["llama.cpp"], 3) if rates["llama.cpp"] else None,
        "xllamacpp": version("xllamacpp"),
        "commit": checkout_commit(),
        "machine": machine_facts(),
    }


async def ask(url: str, num_clients: int, seconds: float) -> dict[str, Any]:
    """Let clients ask for some seconds; questions that are open at the end are not counted."""
    import httpx

    waits: list[float] = []
    errors: Counter[str] = Counter()

    async def client(number: int) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=600) as session:
            for count in range(10**9):
                body = {
                    "messages": [{"role": "user", "content": f"What is the sum of {number} and {count}?"}],
                    "temperature": 0,
                    "max_tokens": NUM_TOKENS,
                    "ignore_eos": True,
                }
                started = time.monotonic()
                try:
                    answer = await session.post(f"{url}/chat/completions", json=body)
                    whole = answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == NUM_TOKENS
                    error = "" if whole else f"HTTP {answer.status_code}"
                except httpx.HTTPError as problem:
                    error = type(problem).__name__
                if error:
                    errors[error] += 1
                else:
                    waits.append(time.monotonic() - started)

    clients = [asyncio.create_task(client(number)) for number in range(num_clients)]
    await asyncio.sleep(seconds)
    num_answers = len(waits)
    for task in clients:
        task.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    return {
        "answers": num_answers,
        "answers_per_second": round(num_answers / seconds, 2),
        "median_seconds": round(statistics.median(waits), 3) if waits else None,
        "errors": dict(errors),
    }


if __name__ == "__main__":
    main()
