from __future__ import annotations

import math
import re
import socket
import subprocess
import sys

import pytest

from fintune.errors import ModelError, ResourceError
from fintune.export.gguf.writer import write_gguf
from fintune.finqa.grammar import general
from fintune.finqa.parse import parse as parse_program
from fintune.inference import told
from fintune.inference.endpoint import COMMON_KEY, OWN_KEY, Endpoint, is_endpoint, parse
from fintune.inference.llama_cpp import LlamaCppEngine
from fintune.inference.openai import OpenAIEngine
from fintune.inference.protocol import Decoding, in_order
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
    return OpenAIEngine(parse(url), **options)


def test_a_served_model_completes_as_the_same_file_in_this_process(url, gguf_file):
    with LlamaCppEngine(gguf_file, context_tokens=256, parallel=1) as local:
        wanted = in_order(local.generate(RENDERED, Decoding(12)))
    found = in_order(engine(url, parallel=1).chat(CHATS, Decoding(12)))
    for ours, served in zip(wanted, found, strict=True):
        assert served.num_prompt_tokens == ours.num_prompt_tokens
        assert served.finish_reason == ours.finish_reason
        assert len(served.margins) == len(served.logprobs) == len(served.token_ids)
        # The interface leaves out tokens that end within a UTF-8 character, which random weights often write.
        left = iter(zip(ours.token_ids, ours.logprobs, ours.margins, strict=True))
        for token, logprob, margin in zip(served.token_ids, served.logprobs, served.margins, strict=True):
            same = next(each for each in left if each[0] == token)
            assert (logprob, margin) == pytest.approx(same[1:], abs=1e-3) or math.isnan(same[1])
    assert sum(len(each.token_ids) for each in found) > len(CHATS)


def test_llama_cpp_tells_its_weights_its_file_and_its_template(url, gguf_file, monkeypatch):
    hashed = []
    monkeypatch.setattr(told.json, "dumps", lambda facts, **_: hashed.append(facts) or "")
    assert re.fullmatch(rf"{url}#\S+ [0-9a-f]{{64}}", engine(url).fingerprint())
    (facts,) = hashed
    assert facts["model_path"] == str(gguf_file)
    assert facts["meta"]["n_params"] > 0
    assert facts["build_info"]
    assert "add_generation_prompt" in facts["chat_template"]
    assert "n_ctx" not in facts["meta"]


def test_completions_belong_to_their_prompts_whatever_is_in_flight(url):
    together = in_order(engine(url, parallel=4).chat(CHATS * 3, Decoding(3)))
    alone = in_order(engine(url, parallel=1).chat(CHATS, Decoding(3)))
    assert [each.num_prompt_tokens for each in together] == [each.num_prompt_tokens for each in alone] * 3
    assert len({each.num_prompt_tokens for each in alone}) > 1


def test_a_quick_answer_does_not_wait_for_a_slow_one_and_what_is_done_is_not_asked():
    with Slow(QUESTIONS[1]) as served:
        answers = engine(f"{served.url}#m", parallel=2).chat(CHATS, Decoding(2), done=(0, 3))
        quick = [next(answers).place for _ in range(4)]
        served.go_on.set()
        assert sorted(quick) == [2, 4, 5, 6]
        assert [each.place for each in answers] == [1]
    asked = [body["messages"][0]["content"] for _, body, _ in served.seen]
    assert sorted(asked) == sorted(QUESTIONS[place] for place in (1, 2, 4, 5, 6))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ModelError])
def test_who_stops_does_not_wait_for_what_is_in_flight(stop):
    """In a process of its own, whose end waits for no request either."""
    code = (
        "import sys, threading\n"
        "from fintune.inference.endpoint import parse\n"
        "from fintune.inference.openai import OpenAIEngine\n"
        "from fintune.inference.protocol import Decoding\n"
        "from fintune.errors import ModelError\n"
        "from fintune.records import Message\n"
        "engine = OpenAIEngine(parse(sys.argv[1]), parallel=2)\n"
        "chats = [[Message(role='user', content=name)] for name in ('slow', 'quick', 'third', 'last')]\n"
        "answers = engine.chat(chats, Decoding(1))\n"
        "print(next(answers).place, flush=True)\n"
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


def test_a_grammar_leaves_only_programs(url):
    decoding = Decoding(200, grammars=(general(),) * len(CHATS))
    for each in in_order(engine(url).chat(CHATS, decoding)):
        assert each.finish_reason == "length" or parse_program(each.text)


def test_draws_repeat_with_their_seed_and_differ_between_candidates(url):
    def draw(seed):
        decoding = Decoding(8, temperature=2.0, top_p=0.9, seed=seed, num_candidates=3, greedy_first=True)
        return [each.text for each in in_order(engine(url, parallel=1).chat(CHATS, decoding))]

    first, greedy = draw(1), [each.text for each in in_order(engine(url, parallel=1).chat(CHATS, Decoding(8)))]
    assert len(first) == 3 * len(CHATS)
    assert first == draw(1) != draw(2)
    assert first[::3] == greedy
    assert first[1::3] != first[2::3]


def test_a_conversation_longer_than_the_context_is_named(url):
    long = [Message(role="user", content="the revenue " * 200)]
    with pytest.raises(ModelError, match=r"prompt 2: .*\(HTTP 400\): request \(\d+ tokens\) exceeds the available"):
        in_order(engine(url).chat([*ONE, long], Decoding(2)))


def test_a_consumer_may_stop_early(url):
    served = engine(url)
    completions = served.chat(CHATS * 3, Decoding(20))
    next(completions)
    completions.close()
    assert len(in_order(served.chat(CHATS[:2], Decoding(2)))) == 2
    served.close()


def test_a_model_that_is_not_served_is_refused_with_what_is(url):
    with pytest.raises(ModelError, match=r"does not serve other: it serves .*m\.gguf"):
        engine(f"{url}#other")


@pytest.mark.parametrize(
    ("own", "common", "hint"),
    [("wrong-key", "", OWN_KEY), ("", "wrong-key", COMMON_KEY), ("", "", f"set the environment variable {OWN_KEY}")],
)
def test_a_refused_key_is_one_line_without_the_key(url, monkeypatch, own, common, hint):
    monkeypatch.setenv(OWN_KEY, own)
    monkeypatch.setenv(COMMON_KEY, common)
    with pytest.raises(ResourceError, match=r"refuses the key \(HTTP 401\)") as caught:
        in_order(engine(url).chat(ONE, Decoding(1)))
    assert hint in str(caught.value)
    assert "wrong-key" not in str(caught.value)


def test_a_key_for_other_programs_is_not_sent_where_it_can_be_read(monkeypatch):
    from fintune.inference import endpoint

    monkeypatch.delenv(OWN_KEY)
    monkeypatch.setenv(COMMON_KEY, "common")
    keys = {url: endpoint._key(parse(url)) for url in ("http://gpu:8000/v1", "https://gpu/v1", "http://[::1]:80/v1")}
    assert list(keys.values()) == [("", True), ("common", False), ("common", False)]
    monkeypatch.setenv(OWN_KEY, "own")
    assert endpoint._key(parse("http://gpu:8000/v1")) == ("own", False)


def test_nothing_listening_is_one_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ResourceError, match=rf"http://127.0.0.1:{port}/v1 refuses the connection: start the server"):
        engine(f"http://127.0.0.1:{port}/v1")


def test_an_unknown_host_is_one_line():
    with pytest.raises(ResourceError, match=r"http://no-such-host\.invalid/v1 has a host that is not known"):
        engine("http://no-such-host.invalid/v1")


def test_an_answer_that_does_not_come_is_one_line():
    with (
        Scripted((200, said()), seconds=1) as served,
        pytest.raises(ResourceError, match=r"no answer in 0\.2 seconds: raise predict\.timeout_seconds, or lower"),
    ):
        in_order(engine(f"{served.url}#m", timeout_seconds=0.2).chat(ONE, Decoding(1)))


def test_a_busy_server_is_asked_again():
    busy = (503, {"error": {"message": "Loading model"}}, {"retry-after": "0"})
    with Scripted(busy, (429, "slow down", {"retry-after": "0"}), (200, said())) as served:
        (found,) = in_order(engine(f"{served.url}#m").chat(ONE, Decoding(1)))
        assert len(served.seen) == 3
    assert found.text == "add(1, 2)"


def test_a_server_that_stays_busy_is_one_line():
    busy = (429, {"error": {"message": "quota of today is used"}}, {"retry-after": "0"})
    with (
        Scripted(busy) as served,
        pytest.raises(ResourceError, match=r"stays too busy \(HTTP 429: quota of today is used\)"),
    ):
        in_order(engine(f"{served.url}#m", retries=1).chat(ONE, Decoding(1)))


def test_a_key_that_a_server_repeats_is_not_told():
    with (
        Scripted((400, {"error": {"message": f"bad request of\n{KEY}"}})) as served,
        pytest.raises(ModelError, match=r"prompt 1: .* refuses the request \(HTTP 400\): bad request of \*\*\*$"),
    ):
        in_order(engine(f"{served.url}#m").chat(ONE, Decoding(1)))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {"error": {"message": 'model "m" not found, try pulling it first'}}), "not found, try pulling it"),
        ((404, "<html>"), r"does not answer as an OpenAI-compatible server does \(HTTP 404\)"),
        ((200, "<html>"), r"does not answer as an OpenAI-compatible server does \(HTTP 200\)"),
        ((200, {"choices": []}), "answers otherwise than an OpenAI-compatible server does"),
        ((307, {}, {"location": "http://127.0.0.1:1/v1/chat/completions"}), r"sends elsewhere \(HTTP 307\)"),
    ],
)
def test_a_server_of_another_kind_is_one_line(answer, message):
    with Scripted(answer) as served, pytest.raises((ModelError, ResourceError), match=message) as caught:
        in_order(engine(f"{served.url}#m").chat(ONE, Decoding(1)))
    assert "\n" not in str(caught.value)


def test_a_plain_server_is_asked_with_nothing_but_the_common_interface():
    ollama = [{"id": "llama3:latest", "owned_by": "library"}]
    with Scripted((200, said()), models=ollama) as served:
        served_engine = engine(f"{served.url}#llama3")
        (found,) = in_order(served_engine.chat(ONE, Decoding(5, temperature=0.5, top_p=0.9)))
        (route, body, headers) = served.seen[0]
        with pytest.raises(ModelError, match="no server that is known to take a grammar"):
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


def test_a_vllm_server_gives_ids_and_takes_the_grammar_in_its_words():
    models = [{"id": "org/m", "owned_by": "vllm"}, {"id": "adapter", "owned_by": "vllm"}]
    steps = [
        {"token": token, "logprob": own, "top_logprobs": [{"token": token, "logprob": own}, {"logprob": other}]}
        for token, own, other in (("add", -0.5, -2.0), ("(", -1.0, -1.5))
    ]
    choice = {"message": {"content": "add"}, "token_ids": [4, 5], "finish_reason": "length"}
    answer = {"choices": [choice | {"logprobs": {"content": steps}}], "usage": {"prompt_tokens": 3}}
    with Scripted((200, answer), models=models) as served:
        (found,) = in_order(engine(f"{served.url}#adapter").chat(ONE, Decoding(2, grammars=(general(),))))
        (route, body, _) = served.seen[0]
        with pytest.raises(ModelError, match="serves org/m, adapter: name one"):
            engine(served.url)
    assert (route, body["model"]) == ("/v1/chat/completions", "adapter")
    assert body["structured_outputs"]["grammar"].startswith("root ::=")
    assert (body["top_k"], body["repetition_penalty"]) == (0, 1.0)
    assert (found.token_ids, found.finish_reason, found.num_prompt_tokens) == ((4, 5), "length", 3)
    assert found.margins == pytest.approx((1.5, 0.5))
    assert math.fsum(found.logprobs) == pytest.approx(-1.5)


def test_a_probability_of_0_is_no_reason_to_stop():
    steps = [{"id": 4, "logprob": None, "top_logprobs": [{"logprob": -0.5}, {"logprob": None}]}]
    with Scripted((200, said(logprobs={"content": steps}))) as served:
        (found,) = in_order(engine(f"{served.url}#m").chat(ONE, Decoding(1)))
    assert (found.logprobs, found.margins) == ((-104.0,), (103.5,))


def test_addresses_are_told_from_folders_and_hub_ids():
    assert parse("https://host:8000/v1/#org/model") == Endpoint("https://host:8000/v1", "org/model")
    assert parse("http://127.0.0.1:8080/v1") == Endpoint("http://127.0.0.1:8080/v1", None)
    assert not any(map(is_endpoint, ("org/model", "builtin:x", "./http", "m.gguf")))


@pytest.mark.parametrize("reference", ["http://", "http://host:port/v1", "https://:8000/v1#m"])
def test_an_address_without_a_host_is_refused(reference):
    with pytest.raises(ModelError, match="is no address of a server"):
        parse(reference)


def test_a_password_in_an_address_is_refused_and_not_told():
    with pytest.raises(ModelError, match="comes with a password") as caught:
        parse("https://me:secret@host/v1#m")
    assert "secret" not in str(caught.value)
