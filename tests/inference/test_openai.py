from __future__ import annotations

import math
import re
import socket
import subprocess
import sys
from contextlib import closing

import pytest

from fintune.errors import ModelError, ResourceError
from fintune.export.gguf.writer import write_gguf
from fintune.finqa.grammar import general
from fintune.finqa.parse import parse as parse_program
from fintune.inference.http_pool import COMMON_KEY, OWN_KEY, Endpoint
from fintune.inference.llama_cpp import LlamaCppEngine
from fintune.inference.openai import OpenAIEngine, is_endpoint, parse_endpoint
from fintune.inference.protocol import Decoding, sorted_by_prompt
from fintune.records import Message
from support.served import KEY, Scripted, Slow, llama_cpp_server, said
from support.synthetic import write_folder

pytest.importorskip("xllamacpp")

QUESTIONS = [f"{'the revenue ' * (number % 4)}in 20{number:02}" for number in range(7)]
CHATS = [[Message(role="user", content=question)] for question in QUESTIONS]
RENDERED = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS]
ONE = CHATS[:1]


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    write_folder(folder / "model", num_layers=2)
    write_gguf(folder / "model", {"F16": folder / "m.gguf"})
    return folder / "m.gguf"


@pytest.fixture(scope="module")
def url(gguf_file):
    with llama_cpp_server(gguf_file) as address:
        yield address


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.delenv(COMMON_KEY, raising=False)
    monkeypatch.setenv(OWN_KEY, KEY)


def engine(url, **options):
    return OpenAIEngine(parse_endpoint(url), **options)


def test_served_completions_equal_the_file_in_process(url, gguf_file):
    with closing(LlamaCppEngine(gguf_file, context_tokens=256, parallel=1)) as local:
        expected = sorted_by_prompt(local.generate(RENDERED, Decoding(12)))
    found = sorted_by_prompt(engine(url, parallel=1).chat(CHATS, Decoding(12)))
    for ours, served in zip(expected, found, strict=True):
        assert served.num_prompt_tokens == ours.num_prompt_tokens
        assert served.finish_reason == ours.finish_reason
        assert len(served.margins) == len(served.logprobs) == len(served.token_ids)
        # The interface leaves out tokens that end within a UTF-8 character, which random weights often write.
        left = iter(zip(ours.token_ids, ours.logprobs, ours.margins, strict=True))
        for token, logprob, margin in zip(served.token_ids, served.logprobs, served.margins, strict=True):
            same = next(each for each in left if each[0] == token)
            assert (logprob, margin) == pytest.approx(same[1:], abs=1e-3) or math.isnan(same[1])
    assert sum(len(each.token_ids) for each in found) > len(CHATS)


def test_fingerprint_of_llama_cpp_describes_the_weights(url):
    assert re.fullmatch(rf"{url}#\S+ [0-9a-f]{{64}}", engine(url).fingerprint())


LLAMA = {"id": "m", "owned_by": "llamacpp", "meta": {"n_params": 1000, "size": 2000, "n_ctx": 512}, "created": 1}
VLLM = {"id": "m", "owned_by": "vllm", "root": "/models/m", "created": 1}


def fingerprint_of(models):
    """The fingerprint after the address and the name."""
    with Scripted((200, said()), models=models) as served:
        address, _, rest = engine(f"{served.url}#m").fingerprint().partition(" ")
        assert address == f"{served.url}#m"
    return rest


def test_fingerprint_changes_with_the_weights():
    other_size = LLAMA | {"meta": {"n_params": 1000, "size": 1500}}
    other_folder = VLLM | {"root": "/models/n"}
    fingerprints = [fingerprint_of([entry]) for entry in (LLAMA, other_size, VLLM, other_folder)]
    assert len(set(fingerprints)) == 4 and "" not in fingerprints


def test_fingerprint_ignores_how_a_server_was_started():
    restarted = LLAMA | {"created": 2, "meta": LLAMA["meta"] | {"n_ctx": 1024}}
    assert fingerprint_of([restarted]) == fingerprint_of([LLAMA])
    assert fingerprint_of([VLLM | {"created": 2}]) == fingerprint_of([VLLM])


@pytest.mark.parametrize("models", [None, [{"id": "m", "owned_by": "library", "root": "x", "meta": {"size": 1}}]])
def test_fingerprint_of_other_servers_is_address_and_name(models):
    assert fingerprint_of(models) == ""


def test_concurrent_completions_keep_their_prompts(url):
    together = sorted_by_prompt(engine(url, parallel=4).chat(CHATS * 3, Decoding(3)))
    alone = sorted_by_prompt(engine(url, parallel=1).chat(CHATS, Decoding(3)))
    assert [each.num_prompt_tokens for each in together] == [each.num_prompt_tokens for each in alone] * 3
    assert len({each.num_prompt_tokens for each in alone}) > 1


def test_quick_answer_does_not_wait_for_slow_one():
    with Slow(QUESTIONS[1]) as served:
        answers = engine(f"{served.url}#m", parallel=2).chat(CHATS, Decoding(2), done=(0, 3))
        quick = [next(answers).prompt_index for _ in range(4)]
        served.go_on.set()
        assert sorted(quick) == [2, 4, 5, 6]
        assert [each.prompt_index for each in answers] == [1]
    asked = [body["messages"][0]["content"] for _, body, _ in served.seen]
    assert sorted(asked) == sorted(QUESTIONS[place] for place in (1, 2, 4, 5, 6))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ModelError])
def test_stop_does_not_wait_for_requests_in_flight(stop):
    """Runs in another process, whose exit must not wait for a request either."""
    code = (
        "import sys, threading\n"
        "from fintune.inference.openai import OpenAIEngine, parse_endpoint\n"
        "from fintune.inference.protocol import Decoding\n"
        "from fintune.errors import ModelError\n"
        "from fintune.records import Message\n"
        "engine = OpenAIEngine(parse_endpoint(sys.argv[1]), parallel=2)\n"
        "chats = [[Message(role='user', content=name)] for name in ('slow', 'quick', 'third', 'last')]\n"
        "answers = engine.chat(chats, Decoding(1))\n"
        "print(next(answers).prompt_index, flush=True)\n"
        "try:\n"
        f"    answers.throw({stop.__name__}('stop'))\n"
        f"except {stop.__name__}:\n"
        "    engine.close()\n"
        "    print('stopped', flush=True)\n"
    )
    with Slow("slow") as served:
        command = [sys.executable, "-c", code, f"{served.url}#m"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        assert not served.go_on.is_set()
        served.go_on.set()
    assert (done.stdout.split(), done.returncode) == (["1", "stopped"], 0), done.stderr


def test_grammar_allows_only_programs(url):
    decoding = Decoding(200, grammars=(general(),) * len(CHATS))
    for each in sorted_by_prompt(engine(url).chat(CHATS, decoding)):
        assert each.finish_reason == "length" or parse_program(each.text)


def test_sampling_repeats_with_its_seed(url):
    def draw(seed):
        decoding = Decoding(8, temperature=2.0, top_p=0.9, seed=seed, num_candidates=3, greedy_first=True)
        return [each.text for each in sorted_by_prompt(engine(url, parallel=1).chat(CHATS, decoding))]

    first, greedy = draw(1), [each.text for each in sorted_by_prompt(engine(url, parallel=1).chat(CHATS, Decoding(8)))]
    assert len(first) == 3 * len(CHATS)
    assert first == draw(1) != draw(2)
    assert first[::3] == greedy
    assert first[1::3] != first[2::3]


def test_long_conversation_is_named(url):
    long = [Message(role="user", content="the revenue " * 200)]
    with pytest.raises(ModelError, match=r"prompt 2: .*\(HTTP 400\): request \(\d+ tokens\) exceeds the available"):
        sorted_by_prompt(engine(url).chat([*ONE, long], Decoding(2)))


def test_consumer_may_stop_early(url):
    served = engine(url)
    completions = served.chat(CHATS * 3, Decoding(20))
    next(completions)
    completions.close()
    assert len(sorted_by_prompt(served.chat(CHATS[:2], Decoding(2)))) == 2
    served.close()


def test_unknown_model_lists_served_models(url):
    with pytest.raises(ModelError, match=r"does not serve other: it serves .*m\.gguf"):
        engine(f"{url}#other")


@pytest.mark.parametrize(
    ("own", "common", "hint"),
    [("wrong-key", "", OWN_KEY), ("", "wrong-key", COMMON_KEY), ("", "", f"set the environment variable {OWN_KEY}")],
)
def test_refused_key_is_not_printed(url, monkeypatch, own, common, hint):
    monkeypatch.setenv(OWN_KEY, own)
    monkeypatch.setenv(COMMON_KEY, common)
    with pytest.raises(ResourceError, match=r"refuses the key \(HTTP 401\)") as caught:
        sorted_by_prompt(engine(url).chat(ONE, Decoding(1)))
    assert hint in str(caught.value)
    assert "wrong-key" not in str(caught.value)


def test_common_key_is_not_sent_over_plain_http(monkeypatch):
    monkeypatch.delenv(OWN_KEY)
    monkeypatch.setenv(COMMON_KEY, "common")
    urls = ("http://gpu:8000/v1", "https://gpu/v1", "http://[::1]:80/v1")
    assert [Endpoint(url).api_key() for url in urls] == [("", True), ("common", False), ("common", False)]
    monkeypatch.setenv(OWN_KEY, "own")
    assert Endpoint("http://gpu:8000/v1").api_key() == ("own", False)


def test_certificate_failure_is_one_line(monkeypatch):
    with Scripted((200, said())) as served, pytest.raises(ResourceError, match=r"TLS") as caught:
        engine(f"https{served.url.removeprefix('http')}#m")
    assert caught.value.hint


def test_proxy_failure_is_one_line(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(ResourceError, match=r"http://no-such-host\.invalid/v1"):
        engine("http://no-such-host.invalid/v1")


def test_refused_connection_is_one_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ResourceError, match=rf"http://127.0.0.1:{port}/v1 refuses the connection: start the server"):
        engine(f"http://127.0.0.1:{port}/v1")


def test_unknown_host_is_one_line():
    with pytest.raises(ResourceError, match=r"http://no-such-host\.invalid/v1 has an unknown host"):
        engine("http://no-such-host.invalid/v1")


def test_timeout_is_one_line():
    with (
        Scripted((200, said()), seconds=1) as served,
        pytest.raises(ResourceError, match=r"no answer in 0\.2 seconds: raise predict\.timeout_seconds, or lower"),
    ):
        sorted_by_prompt(engine(f"{served.url}#m", timeout_seconds=0.2).chat(ONE, Decoding(1)))


def test_busy_server_is_retried():
    busy = (503, {"error": {"message": "Loading model"}}, {"retry-after": "0"})
    with Scripted(busy, (429, "slow down", {"retry-after": "0"}), (200, said())) as served:
        (found,) = sorted_by_prompt(engine(f"{served.url}#m").chat(ONE, Decoding(1)))
        assert len(served.seen) == 3
    assert found.text == "add(1, 2)"


def test_server_that_stays_busy_is_one_line():
    busy = (429, {"error": {"message": "quota of today is used"}}, {"retry-after": "0"})
    with (
        Scripted(busy) as served,
        pytest.raises(ResourceError, match=r"stays too busy \(HTTP 429: quota of today is used\)"),
    ):
        sorted_by_prompt(engine(f"{served.url}#m", retries=1).chat(ONE, Decoding(1)))


def test_key_in_server_message_is_masked():
    with (
        Scripted((400, {"error": {"message": f"bad request of\n{KEY}"}})) as served,
        pytest.raises(ModelError, match=r"prompt 1: .* refuses the request \(HTTP 400\): bad request of \*\*\*$"),
    ):
        sorted_by_prompt(engine(f"{served.url}#m").chat(ONE, Decoding(1)))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {"error": {"message": 'model "m" not found, try pulling it first'}}), "not found, try pulling it"),
        ((404, "<html>"), r"does not answer as an OpenAI-compatible server does \(HTTP 404\)"),
        ((200, "<html>"), r"does not answer as an OpenAI-compatible server does \(HTTP 200\)"),
        ((200, {"choices": []}), "does not answer as an OpenAI-compatible server does"),
        ((307, {}, {"location": "http://127.0.0.1:1/v1/chat/completions"}), r"HTTP 307"),
    ],
)
def test_other_kind_of_server_is_one_line(answer, message):
    with Scripted(answer) as served, pytest.raises((ModelError, ResourceError), match=message) as caught:
        sorted_by_prompt(engine(f"{served.url}#m").chat(ONE, Decoding(1)))
    assert "\n" not in str(caught.value)


def test_plain_server_gets_common_options_only():
    ollama = [{"id": "llama3:latest", "owned_by": "library"}]
    with Scripted((200, said()), models=ollama) as served:
        served_engine = engine(f"{served.url}#llama3")
        (found,) = sorted_by_prompt(served_engine.chat(ONE, Decoding(5, temperature=0.5, top_p=0.9)))
        (route, body, headers) = served.seen[0]
        with pytest.raises(ModelError, match="grammar"):
            served_engine.chat(ONE, Decoding(5, grammars=(general(),)))
    assert route == "/v1/chat/completions"
    assert headers["authorization"] == f"Bearer {KEY}"
    assert body.pop("messages") == [{"role": "user", "content": QUESTIONS[0]}]
    assert body.pop("seed") < 2**31
    assert body == {
        "model": "llama3",
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    assert (found.token_ids, found.margins, found.logprobs, found.num_prompt_tokens) == ((), (), (), 7)


def test_vllm_server_returns_ids_and_takes_grammar():
    models = [{"id": "org/m", "owned_by": "vllm"}, {"id": "adapter", "owned_by": "vllm"}]
    steps = [
        {"token": token, "logprob": own, "top_logprobs": [{"token": token, "logprob": own}, {"logprob": other}]}
        for token, own, other in (("add", -0.5, -2.0), ("(", -1.0, -1.5))
    ]
    choice = {"message": {"content": "add"}, "token_ids": [4, 5], "finish_reason": "length"}
    answer = {"choices": [choice | {"logprobs": {"content": steps}}], "usage": {"prompt_tokens": 3}}
    with Scripted((200, answer), models=models) as served:
        (found,) = sorted_by_prompt(engine(f"{served.url}#adapter").chat(ONE, Decoding(2, grammars=(general(),))))
        (route, body, _) = served.seen[0]
        with pytest.raises(ModelError, match="serves org/m, adapter: name one"):
            engine(served.url)
    assert (route, body["model"]) == ("/v1/chat/completions", "adapter")
    assert body["structured_outputs"]["grammar"].startswith("root ::=")
    assert (body["top_k"], body["repetition_penalty"]) == (0, 1.0)
    assert (found.token_ids, found.finish_reason, found.num_prompt_tokens) == ((4, 5), "length", 3)
    assert found.margins == pytest.approx((1.5, 0.5))
    assert math.fsum(found.logprobs) == pytest.approx(-1.5)


def test_null_logprob_is_a_probability_of_zero():
    steps = [{"id": 4, "logprob": None, "top_logprobs": [{"logprob": -0.5}, {"logprob": None}]}]
    with Scripted((200, said(logprobs={"content": steps}))) as served:
        (found,) = sorted_by_prompt(engine(f"{served.url}#m").chat(ONE, Decoding(1)))
    assert (found.logprobs, found.margins) == ((-104.0,), (103.5,))


def test_parse_endpoint():
    assert parse_endpoint("https://host:8000/v1/#org/model") == Endpoint("https://host:8000/v1", "org/model")
    assert parse_endpoint("http://127.0.0.1:8080/v1") == Endpoint("http://127.0.0.1:8080/v1", None)
    assert not any(map(is_endpoint, ("org/model", "builtin:x", "./http", "m.gguf")))


@pytest.mark.parametrize("reference", ["http://", "http://host:port/v1", "https://:8000/v1#m"])
def test_parse_endpoint_without_host(reference):
    with pytest.raises(ModelError, match="is not an address of a server"):
        parse_endpoint(reference)


def test_parse_endpoint_with_password_hides_it():
    with pytest.raises(ModelError, match="password") as caught:
        parse_endpoint("https://me:secret@host/v1#m")
    assert "secret" not in str(caught.value)
