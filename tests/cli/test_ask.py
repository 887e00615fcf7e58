from __future__ import annotations

import gzip
import json

import pytest

from fintune.finqa.parse import parse
from fintune.report.answer_text import describe_confidence
from inference.test_vllm_engine import make_adapter
from support.command import fintune
from support.example_run import records
from support.served import Scripted, said
from support.tiny import make_tiny_model
from support.tiny_gguf import make_tiny_gguf

PAGE = 'in millions,2019,2018\nnet revenue,"5,829","5,735"\nshares,12,10\n'
QUESTION = "what was the percentage change in net revenue from 2018 to 2019?"


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.csv"
    path.write_text(PAGE)
    return path


def asked(page, program, *words, question=QUESTION):
    with Scripted((200, said(program))) as served:
        done = fintune("ask", f"{served.url}#m", "--page", page, question, *words)
    return done, served.seen[0][1] if served.seen else {}


def test_ask_prints_steps_and_cells(page):
    done, request = asked(page, "subtract(5829, 5735), divide(#0, 5735)")
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines() == [
        "0.01639  (1.639 %)",
        "program subtract(5829, 5735), divide(#0, 5735)",
        "  #0 subtract(5829, 5735) = 94",
        "       5829  net revenue, 2019: 5829",
        "       5735  net revenue, 2018: 5735",
        "  #1 divide(#0, 5735) = 0.01639",
        "       5735  net revenue, 2018: 5735",
        "confidence not known",
    ]
    assert request["messages"][-1]["content"].endswith(
        f"net revenue | 2019: 5829 | 2018: 5735\nshares | 2019: 12 | 2018: 10\n\nQuestion: {QUESTION}"
    )


def test_ask_reads_text_beside_the_table(page, tmp_path):
    (tmp_path / "note.txt").write_text("The company grew. It had 77 employees.")
    done, _ = asked(page, "multiply(77, 12)", "--text", tmp_path / "note.txt")
    assert "77  It had 77 employees." in done.out
    assert done.out.startswith("924")


def test_ask_refuses_truncated_text(page, tmp_path):
    packed = gzip.compress(b"".join(b"In %d it had %d employees.\n" % (k, k * k) for k in range(9000)))
    for data, why in ((packed[:-99], "truncated gzip file"), (packed[:-8] + bytes(8), "damaged gzip file")):
        (tmp_path / "note.txt.gz").write_bytes(data)
        done, request = asked(page, "multiply(77, 12)", "--text", tmp_path / "note.txt.gz")
        assert (done.status, done.out, request) == (2, "", {})
        assert f"note.txt.gz: {why}" in done.err
        assert "copy or download it again" in done.err


@pytest.mark.parametrize(
    ("question", "where"),
    [(QUESTION, "is not on the page"), ("and if it grew by 999?", "is in the question, but not on the page")],
)
def test_ask_marks_ungrounded_numbers(page, question, where):
    done, _ = asked(page, "add(5829, 999)", question=question)
    assert done.status == 0
    assert done.out.startswith("6828  ungrounded\n")
    assert f"999 {where}" in done.out


def test_ask_marks_an_answer_of_constants(page):
    done, _ = asked(page, "add(const_m1, const_m1), multiply(#0, const_100)")
    assert done.out.startswith("-200  ungrounded\n")
    assert "  ungrounded the program uses only constants, and no number of the page\n" in done.out
    found = json.loads(asked(page, "add(const_m1, const_m1)", "--json")[0].out)
    assert (found["answer"], found["grounded"]) == (-2.0, False)
    assert "ungrounded" not in asked(page, "divide(5829, const_100)")[0].out


def test_ask_decimal_separator(tmp_path):
    page = tmp_path / "page.csv"
    page.write_text("name;2023\nrevenue;1.250\n")
    assert "page.csv: row 2 (revenue), column 2 (2023): 1.250 can be" in asked(page, "add(1, 2)")[0].err
    assert "revenue, 2023: 1250\n" in asked(page, "add(1250, const_1)", "--decimal", "comma")[0].out


def test_ask_without_page_hints_at_serve():
    done = fintune("ask", "acme/base", "hello?")
    assert done.status == 2
    assert "To chat without a page: fintune serve acme/base" in done.err


@pytest.mark.parametrize(
    ("confidence", "told"), [(1e-21, "< 0.01 %"), (0.002, "0.2 %"), (0.416, "42 %"), (1.0, "100 %")]
)
def test_ask_shows_a_small_confidence(confidence, told):
    assert describe_confidence(confidence, [], None)[0] == told


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("It grew a lot.", "the model wrote text, not a program: It grew a lot."),
        ("The net revenue (in millions) " + 9 * "rose, ", "the model wrote text, not a program: The net revenue"),
        ("42", "the model wrote text, not a program: 42"),
        ("foo(1, 2)", "token 1, 'foo(', is not an operation"),
        ("subtract(5829, x)", "step 1: 'x' is not a number"),
        ("subtract, 5829, 5735)", "step 1: no '(' after the operation"),
    ],
)
def test_ask_without_program_gives_the_reason(page, text, reason):
    done, _ = asked(page, text)
    assert done.out.startswith(f"no answer  {reason}")
    assert max(map(len, done.out.splitlines()[:1])) < 140
    if "not a program" in reason:
        assert "program none" in done.out, "the text is not repeated as a program"
    assert done.status == 1


def test_ask_truncated_completion_names_the_limit(page, tiny_model):
    done = fintune("ask", tiny_model, "--page", page, QUESTION, "predict.max_new_tokens=3")
    assert done.err.endswith("fintune: the completion was cut off at predict.max_new_tokens=3\n")


def test_ask_json(page):
    done, _ = asked(page, "table_sum(shares, none), add(#0, 999)", "--json")
    found = json.loads(done.out)
    assert (found["answer"], found["grounded"], found["ungrounded_operands"]) == (1021.0, False, ["999"])
    assert [cell["text"] for cell in found["cells"]] == ["12", "10"]
    assert found["steps"][0]["operands"][0]["value"] == [12.0, 10.0]
    assert found["engine"] == "openai"
    none = json.loads(asked(page, "no", "--json")[0].out)
    assert (none["answer"], none["grounded"]) == (None, False)
    assert none["reason"]


@pytest.mark.parametrize(
    ("program", "value"), [("multiply(#0, #0)", "inf"), ("multiply(#0, #0), subtract(#1, #1)", "nan")]
)
def test_ask_infinite_result_is_no_answer(tmp_path, program, value):
    page = tmp_path / "page.csv"
    page.write_text(f"a,2019\nb,1{'0' * 160}\n")
    program = f"table_max(b, none), {program}"
    done, _ = asked(page, program, "--json")
    found = json.loads(done.out, parse_constant=pytest.fail)
    assert (found["answer"], found["grounded"]) == (None, False)
    assert found["reason"] == f"the result is not a finite number: {value}"
    assert found["steps"][-1]["value"] == value
    assert asked(page, program)[0].out.startswith(f"no answer  the result is not a finite number: {value}\n")


def test_ask_runs_a_folder_in_transformers(page, tiny_model):
    done = fintune("ask", tiny_model, "--page", page, QUESTION, "--json", "predict.max_new_tokens=3")
    assert done.status == int(json.loads(done.out)["answer"] is None)
    assert json.loads(done.out)["engine"] == "transformers"


@pytest.fixture
def html(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(
        "<html><body><p>The company grew.</p><table><tr><td>in millions</td><td>2019</td><td>2018</td></tr>"
        "<tr><td>net revenue</td><td>$ 5,829</td><td>(5,735)</td></tr></table><p>It had 77 employees.</p></body></html>"
    )
    return path


@pytest.fixture
def markdown(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(
        "The company grew.\n\n| in millions | 2019 | 2018 |\n|---|---|---|\n| net revenue | 5,829 | (5,735) |\n"
    )
    return path


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "page.json"
    rows = [each.model_dump(mode="json") for each in records(2)]
    path.write_text(json.dumps(rows[0]))
    return path


@pytest.mark.parametrize(
    ("kind", "constrain"), [("page", "general"), ("html", "page"), ("markdown", "page"), ("record", "page")]
)
def test_ask_constrained_always_gives_a_program(request, tiny_model, kind, constrain):
    file = request.getfixturevalue(kind)
    words = ["--page", file, QUESTION, "--constrain", constrain, "--json", "predict.max_new_tokens=12"]
    found = json.loads(fintune("ask", tiny_model, *words).out)
    assert parse(found["program"])
    assert 0 < found["confidence"] <= 1
    operands = [each for step in found["steps"] for each in step["operands"]]
    if constrain == "page":
        assert all(each["from"] != "elsewhere" or each["text"] in QUESTION for each in operands)


def test_ask_reports_the_vote(page, tiny_model):
    several = ["--strategy", "vote", "--num-candidates", "4", "--constrain", "page", "predict.max_new_tokens=40"]
    words = ["ask", tiny_model, "--page", page, QUESTION, *several]
    found = json.loads(fintune(*words, "--json").out)
    same = sum(each["result"] is not None and each["result"] == found["answer"] for each in found["candidates"])
    assert len(found["candidates"]) == 4
    assert found["confidence"] == same / 4
    assert fintune(*words).out.splitlines()[-1] == f"confidence {25 * same} %  {same} of 4 candidates have this result"


def test_ask_runs_a_gguf_file_in_llama_cpp(page, tiny_model, tmp_path):
    words = ["--constrain", "page", "--strategy", "execution_guided", "--num-candidates", "2"]
    limits = ["prompt.max_length=300", "predict.max_new_tokens=12"]
    file = make_tiny_gguf(tiny_model, tmp_path / "m.gguf")
    done = fintune("ask", file, "--page", page, QUESTION, *words, *limits, "--json")
    found = json.loads(done.out)
    assert (found["engine"], len(found["candidates"])) == ("llama.cpp", 2)
    assert parse(found["program"])


def test_ask_reports_lines_that_did_not_fit(page, tmp_path, tiny_model):
    (tmp_path / "note.txt").write_text("\n".join(f"Sentence number {n} is of no interest." for n in range(40)))
    words = ["--text", tmp_path / "note.txt", "predict.max_new_tokens=2", "prompt.max_length=300"]
    done = fintune("ask", tiny_model, "--page", page, QUESTION, *words)
    assert done.status in (0, 1)
    assert "sentences and rows did not fit prompt.max_length" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL", "--page", "none.csv"], "none.csv: no such file"),
        (["MODEL", "--page", "PAGE", "--engine", "openai"], "the engine openai cannot run"),
        (["MODEL", "--page", "PAGE", "--engine", "other"], "'other' is not one of"),
        (["MODEL", "--page", "PAGE", "--adapter", "DIR"], "holds no adapter"),
        (["m.gguf", "--page", "PAGE", "--adapter", "DIR"], "m.gguf is a GGUF file, which takes no adapter"),
        (["m.gguf", "--page", "PAGE", "--engine", "transformers"], "the engine transformers cannot run m.gguf"),
        (["m.gguf", "--page", "PAGE"], "m.gguf: no such file"),
        (["DIR", "--page", "PAGE"], "holds no config.json"),
        (["MODEL", "--page", "PAGE", "prompt.max_length=64"], "the question alone needs"),
        (["http://127.0.0.1:9/v1", "--page", "PAGE", "--load-in-4bit"], "4 bits"),
        (["MODEL"], "--page"),
        (["MODEL", "--page", "PAGE", "--strategy", "vote"], "needs several candidates"),
        (["MODEL", "--page", "PAGE", "--num-candidates", "3"], "is not read with predict.strategy: greedy"),
        (["MODEL", "--page", "PAGE", "--constrain", "some"], "'some' is not one of"),
        (["http://127.0.0.1:9/v1", "--page", "PAGE", "--constrain", "general"], "127.0.0.1:9"),
        (["MODEL", "--page", "PROSE"], "holds no table"),
        (["MODEL", "--page", "PAGE", "prompt.max_length=5000", "--text", "LONG"], "reads at most 4096"),
        (["MODEL", "--page", "PAGE", "--adapter", "OTHER"], "was trained on"),
    ],
)
def test_ask_error_is_one_line(page, tiny_model, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dir").mkdir()
    (tmp_path / "prose.md").write_text("The company grew.")
    (tmp_path / "long.txt").write_text("The company grew by 9999. " * 400)
    files = {"PROSE": "prose.md", "LONG": "long.txt", "OTHER": str(tmp_path / "other")}
    if "OTHER" in words:
        make_adapter(make_tiny_model(tmp_path / "wide", hidden_size=128), tmp_path / "other")
    places = files | {"MODEL": str(tiny_model), "PAGE": str(page), "DIR": str(tmp_path / "dir")}
    first, *rest = (places.get(word, word) for word in words)
    done = fintune("ask", first, QUESTION, *rest)
    assert done.status == 2
    assert message in done.err
    assert done.err.count("\n") == 1


def test_ask_names_a_page_longer_than_the_context(tiny_model, page, tmp_path):
    (tmp_path / "note.txt").write_text("The company grew. " * 1500)
    done = fintune(
        "ask", tiny_model, "--page", page, "--text", tmp_path / "note.txt", QUESTION, "prompt.max_length=9000"
    )
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "the page with its question has " in done.err
    assert "reads at most 4096: lower prompt.max_length" in done.err


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["--strategy", "vote", "--num-candidates", "6"], "set predict.batch_size=3, or add --load-in-4bit, or lower"),
        ([], "): add --load-in-4bit, or lower prompt.max_length (now 2048)"),
    ],
)
def test_ask_out_of_memory_is_one_line(tiny_model, page, monkeypatch, words, advice):
    from fintune.inference.transformers_engine import TransformersEngine

    torch = pytest.importorskip("torch")
    monkeypatch.setattr(TransformersEngine, "_prefill", lambda *_: torch.empty(10**15))
    done = fintune("ask", tiny_model, "--page", page, QUESTION, *words)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert f"out of memory while asking {tiny_model} (DefaultCPUAllocator: can't allocate memory" in done.err
    assert advice in done.err


def test_page_shows_how_files_are_read(tmp_path):
    (tmp_path / "good.html").write_text(
        "<p>Debt by year.</p><table><tr><td>(in millions)</td><td colspan=2>2021</td></tr>"
        "<tr><td>Loans</td><td>$</td><td>1,250*</td></tr></table>"
    )
    (tmp_path / "bad.md").write_text("| a | 2021 |\n|---|---|\n| b | 5 | 7 |\n")
    done = fintune("page", tmp_path / "good.html", tmp_path / "bad.md", "--json")
    good, bad = map(json.loads, done.out.splitlines())
    assert done.status == 2
    assert good["table"] == [["(in millions)", "2021"], ["Loans", "$ 1250"]]
    assert (good["pre_text"], good["units"]) == (["Debt by year."], ["(in millions)"])
    assert good["notes"] == ["footnote marks were left out: *"]
    assert bad["error"].endswith(
        r"has 3 cells where the header has 2: write a bar inside a cell as \| and leave no cell out"
    )
    done = fintune("page", tmp_path / "good.html")
    assert done.out.splitlines()[1:] == [
        "Debt by year.",
        "(in millions) | 2021",
        "Loans | $ 1250",
        "unit: (in millions)",
        "note: footnote marks were left out: *",
    ]


def test_ask_prints_the_notes_of_its_page(tmp_path):
    page = tmp_path / "page.html"
    row = "<table><tr><td></td><td>2021</td></tr><tr><td>{}</td><td>{}</td></tr></table>"
    page.write_text(f"<p>Debt.</p>{row.format('Loans', '15†')}<p>Cost.</p>{row.format('Rent', '25')}")
    done, _ = asked(page, "add(15, 15)", question="what were the loans?")
    assert "Loans, 2021: 15" in done.out
    assert "page.html: table 1 of 2 was read, under 'Debt.'; --table N reads another" in done.err
    assert "footnote marks were left out: †" in done.err
    done, _ = asked(page, "add(25, 25)", "--table", "2", question="what were the loans?")
    assert "Rent, 2021: 25" in done.out
