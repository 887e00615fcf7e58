r"""How long predicting takes: the batched engine against a loop that asks one question after another.

    python bench/predict_speed.py --finqa ../shared/finqa --model runs/demo/merge --num 64 --out bench/results/X.json
    python bench/predict_speed.py --finqa ../shared/finqa --random 3b --piece 883 --loop-num 64 --batch-size 256 \
        --out bench/results/FILE.json

The loop is what a script without an engine does: transformers' own ``generate``, greedy, with one prompt at a time.
Both ways have the same model in memory, the same precision and the same prompts: FinQA's dev questions, whole pages in
a shuffled order, so that any number of them shares pages as all 883 do (299 pages; `fintune predict` asks the questions
about a page one behind the other, too). ``--random`` builds a model of a true shape
with random weights and a tokenizer of the questions' own text, so that nothing is fetched; it never ends a completion,
so that both ways write ``--new-tokens`` for every question (the mean gold program has about 25).

The questions are measured in pieces, both ways on each piece in turn, and which goes first alternates; --out is written
after every piece, and the same command goes on from there. So the ratio holds on a busy machine, too, where processor
seconds (of one thread: several wait for each other) say more than the wall time. With --loop-num the loop asks only so
many questions of a piece, evenly spread, and its time is scaled up.

``--also general page`` decodes within a grammar; the time includes making the grammars. ``--dump FILE`` writes the
engine's completions. ``--against FILE`` compares them with those of another version of the package: a completion that
differs is a near-tie if the margin where it first differs is below 0.25 nats.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from shapes import SIZES

MAX_LENGTH = 2048
VOCABULARY = 8000
"""Of the tokenizer that is trained on the questions' text."""
NEAR_TIE_NATS = 0.25


def main() -> None:
    """Measure piece by piece, write and print."""
    given = arguments()
    result = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {"pieces": []}
    asked = {
        "model": given.model if given.random is None else f"random weights, the shape of {given.random}",
        "num_questions": given.num,
        "loop_questions_a_piece": given.loop_num,
        "batch_size": given.batch_size,
        "new_tokens": given.new_tokens,
        "dtype": given.dtype,
        "threads": given.threads,
    }
    if result["pieces"] and result["asked"] != asked:
        raise SystemExit(f"{given.out} holds figures of {result['asked']}; remove it, or ask the same")
    records = questions(given.finqa, given.num)
    done = sum(piece["num_questions"] for piece in result["pieces"])
    model, tokenizer = opened(given, records)
    prompts = rendered(tokenizer, records)
    given.records = dict(zip(prompts, records, strict=True))
    started = time.monotonic()
    for way in WAYS.values():
        way(model, tokenizer, prompts[:2], given)  # what is set up once is nobody's time
    for name in given.also:
        ALSO[name](model, tokenizer, prompts[:64], given)
    while done < len(prompts) and (not result["pieces"] or time.monotonic() - started < 60 * given.minutes):
        part = prompts[done : done + given.piece]
        result["pieces"].append(measured(model, tokenizer, part, given, flip=len(result["pieces"]) % 2 == 1))
        done += len(part)
        result |= {"what": __doc__.splitlines()[0], "asked": asked, **totals(result["pieces"]), **surroundings()}
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(result["pieces"][-1]), file=sys.stderr)
    print(json.dumps({key: value for key, value in result.items() if key != "pieces"}, indent=1))


def arguments() -> argparse.Namespace:
    """What is asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--finqa", type=Path, required=True, help="folder of dev.json.gz, and train.json.gz")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="builtin:smollm2-135m", help="folder, hub id or built-in model")
    which.add_argument("--random", choices=("3b", "tiny"), help="a model of this shape, made here")
    parser.add_argument("--num", type=int, default=883, help="questions")
    parser.add_argument("--piece", type=int, default=16, help="questions of a piece")
    parser.add_argument("--loop-num", type=int, help="questions of a piece that the loop asks; all where empty")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no piece after so many")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64, help="of a completion at most")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--also", nargs="*", choices=ALSO, default=[], help="grammars, timed on the whole piece")
    parser.add_argument("--dump", type=Path, help="JSON file for the engine's completions")
    parser.add_argument("--against", type=Path, help="completions of --dump to compare with")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, or to go on with")
    return parser.parse_args()


def questions(finqa: Path, num: int) -> list[Any]:
    """Records of whole pages, in an order that is always the same."""
    from fintune.inference.prefix_cache import page_order
    from fintune.records import FinQARecord

    rows = json.loads(gzip.decompress((finqa / "dev.json.gz").read_bytes()))
    if num > len(rows):
        rows += json.loads(gzip.decompress((finqa / "train.json.gz").read_bytes()))[: num - len(rows)]
    records = [FinQARecord.model_validate(row) for row in rows]
    random.Random(17).shuffle(records)  # noqa: S311 - an order, no secret
    return [records[at] for at in page_order(records)][:num]


def rendered(tokenizer: Any, records: list[Any]) -> list[str]:
    """The prompts of a run."""
    from fintune.config import PromptOptions
    from fintune.data.tokenize_finqa import FinqaEncoder
    from fintune.models import chat_template as chat

    encoder = FinqaEncoder(tokenizer, system=PromptOptions().system, max_length=MAX_LENGTH)
    return [chat.render(tokenizer, encoder.encode(record).example.messages) for record in records]


def opened(given: argparse.Namespace, records: list[Any]) -> tuple[Any, Any]:
    """Model and tokenizer."""
    import torch

    from fintune.models import load as models

    torch.set_num_threads(given.threads)
    if given.random is not None:
        return made(given, records)
    ref = models.fetch(given.model)
    return models.load_model(ref, dtype=given.dtype).eval(), models.load_tokenizer(ref)


def made(given: argparse.Namespace, records: list[Any]) -> tuple[Any, Any]:
    """A random Llama on the first GPU, and a tokenizer of single digits trained on the pages."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(kinds.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    texts = (" ".join((*each.pre_text, *each.post_text, each.qa.question)) for each in records)
    bpe.train_from_iterator(texts, trainer)
    turn = "'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'"
    template = "{% for m in messages %}{{ " + turn + " }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=special[1], eos_token=special[2], pad_token=special[0], chat_template=template
    )
    sizes = SIZES[given.random]
    config = LlamaConfig(
        **sizes | {"vocab_size": max(sizes["vocab_size"], VOCABULARY)},
        max_position_embeddings=4 * MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=1,
    )
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        torch.manual_seed(17)
        torch.set_default_dtype(getattr(torch, given.dtype))
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    return model.eval(), tokenizer


def one_by_one(model: Any, tokenizer: Any, prompts: list[str], given: argparse.Namespace) -> list[tuple[int, ...]]:
    """Transformers' generate, a prompt at a time."""
    import torch

    from fintune.models import chat_template as chat

    found = []
    options = {"do_sample": False, "eos_token_id": list(chat.end_of_turn_ids(tokenizer))}
    options |= {"max_new_tokens": given.new_tokens, "pad_token_id": tokenizer.pad_token_id}
    for prompt in prompts:
        inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            out = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
        found.append(tuple(out[0, inputs["input_ids"].shape[1] :].tolist()))
    return found


def batched(
    model: Any, tokenizer: Any, prompts: list[str], given: argparse.Namespace, constrain: str = "none"
) -> list[tuple[int, ...]]:
    """This package's engine, free or within a grammar."""
    from fintune.config import PredictOptions
    from fintune.inference.decoding_strategies import make_grammars
    from fintune.inference.protocol import Decoding, sorted_by_prompt
    from fintune.inference.transformers_engine import TransformersEngine

    grammars = make_grammars(PredictOptions(constrain=constrain), [given.records[prompt] for prompt in prompts])
    engine = TransformersEngine(model, tokenizer, given.batch_size)
    completions = sorted_by_prompt(engine.generate(prompts, Decoding(given.new_tokens, grammars=grammars)))
    engine.close()
    if constrain == "none":
        given.completions = completions
    return [each.token_ids for each in completions]


WAYS = {"loop": one_by_one, "engine": batched}
ALSO = {name: partial(batched, constrain=name) for name in ("general", "page")}
"""The engine within grammars."""


def measured(
    model: Any, tokenizer: Any, prompts: list[str], given: argparse.Namespace, *, flip: bool
) -> dict[str, Any]:
    """One piece, both ways."""
    num_loop = min(given.loop_num or len(prompts), len(prompts))
    places = [at * len(prompts) // num_loop for at in range(num_loop)]
    piece: dict[str, Any] = {"num_questions": len(prompts), "num_loop_questions": num_loop}
    tokens = {}
    for name in sorted(WAYS, reverse=flip):
        asked = [prompts[at] for at in places] if name == "loop" else prompts
        wall, processor = time.perf_counter(), time.process_time()
        tokens[name] = WAYS[name](model, tokenizer, asked, given)
        scale = len(prompts) / len(asked)
        piece[name] = {
            "seconds": round((time.perf_counter() - wall) * scale, 3),
            "processor_seconds": round((time.process_time() - processor) * scale, 3),
            "num_tokens": sum(map(len, tokens[name])),
        }
    piece |= compared(given)
    for name in given.also:
        started = time.perf_counter()
        tokens[name] = ALSO[name](model, tokenizer, prompts, given)
        seconds = round(time.perf_counter() - started, 3)
        piece[name] = {"seconds": seconds, "num_tokens": sum(map(len, tokens[name]))}
    same = sum(tokens["engine"][at] == loop for at, loop in zip(places, tokens["loop"], strict=True))
    return piece | {"num_same_completions": same, "num_prompt_tokens": sum(map(len, tokenizer(prompts)["input_ids"]))}


def compared(given: argparse.Namespace) -> dict[str, Any]:
    """Write the engine's completions, and compare them with those of another version."""
    rows = [(each.token_ids, [round(margin, 4) for margin in each.margins]) for each in given.completions]
    if given.dump is not None:
        given.dump.write_text(json.dumps(rows), encoding="utf-8")
    if given.against is None:
        return {}
    found = {"same": 0, "near_ties": 0, "others": 0}
    for (ids, margins), (old_ids, _) in zip(rows, json.loads(given.against.read_text(encoding="utf-8")), strict=True):
        at = next((at for at, pair in enumerate(zip(ids, old_ids, strict=False)) if pair[0] != pair[1]), None)
        found["same" if at is None else "near_ties" if margins[at] < NEAR_TIE_NATS else "others"] += 1
    return {"against_the_other_version": found}


def totals(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """All pieces together."""
    keys = ("num_questions", "num_loop_questions", "num_same_completions", "num_prompt_tokens")
    found: dict[str, Any] = {f"total_{key}": sum(piece[key] for piece in pieces) for key in keys}
    for unit in ("seconds", "processor_seconds"):
        loop, engine = (sum(piece[name][unit] for piece in pieces) for name in ("loop", "engine"))
        each = sorted(piece["loop"][unit] / piece["engine"][unit] for piece in pieces)
        found[unit] = {
            "loop": round(loop, 2),
            "engine": round(engine, 2),
            "ratio": round(loop / engine, 2),
            "ratio_of_pieces": [round(each[0], 2), round(each[-1], 2)],
        }
    return found


def surroundings() -> dict[str, Any]:
    """What the figures hold for."""
    from fintune.util.system import checkout_commit, installed_versions, machine_facts

    return {"machine": machine_facts(), "versions": installed_versions(), "commit": checkout_commit()}


if __name__ == "__main__":
    main()
