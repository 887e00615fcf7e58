"""vLLM in this process, with a LoRA adapter where there is one (optional extra ``fintune[vllm]``, CUDA).

Written against vLLM's documented offline interface of 0.11 and later: ``LLM`` and the ``LLMEngine`` in it (its
``generate`` would give nothing before all is done), ``SamplingParams``, ``StructuredOutputsParams``, ``LoRARequest``,
token-id prompts, ``RequestOutput``. **It was not run**: vLLM cannot be
installed on the machines that this package is developed on. The tests run it against a stand-in which has exactly the
documented names, arguments and limits. So known from the documentation alone are: that weights load and fit the memory,
speed, that llguidance as vLLM's backend takes the Lark form of the grammar (the function that it calls,
``llguidance.grammar_from``, does), and that seeds repeat draws.

Under a grammar vLLM masks the logits before it reads log-probabilities, so that margins, log-probabilities and with
them the confidence of a single completion are then those among the allowed tokens, unlike in the other engines.

What vLLM cannot do is refused before it loads anything: DoRA, ranks above 512, trained layers besides the adapter.
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.errors import ModelError, PromptError, ResourceError
from fintune.inference.prefixes import families
from fintune.inference.protocol import Answered, Completion, Decoding
from fintune.models import chat_template as chat
from fintune.util.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's ``max_lora_rank`` takes."""

_SHUT_OUT_NATS = 104.0
"""Margin where the grammar allows a single token: that of a probability of 0 in 32 bits, which JSON can write."""


class VllmEngine:
    """A Hugging Face folder in vLLM.

    Args:
        path: The folder.
        tokenizer: Its tokenizer; prompts are given as token ids, so that no BOS is added.
        adapter: Folder of a LoRA adapter in PEFT format.
        context_tokens: Longest prompt with its completion, in tokens.
        dtype: Arithmetic: "auto", "float32", "bfloat16" or "float16".
        load_in_4bit: Quantise the weights with bitsandbytes while they load.
        trust_remote_code: Whether the model's own Python code may run.
        seed: Of vLLM itself; draws have seeds of their own.

    Raises:
        ResourceError: vLLM is not installed, or has no room for the model.
        ModelError: vLLM does not know the model, or cannot use the adapter.
    """

    def __init__(
        self,
        path: Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        adapter: Path | None = None,
        context_tokens: int = 2048,
        dtype: str = "auto",
        load_in_4bit: bool = False,
        trust_remote_code: bool = False,
        seed: int = 0,
    ) -> None:
        self.name = "vllm"
        self.context_tokens = context_tokens
        self._tokenizer = tokenizer
        self._stop_ids = list(chat.end_of_turn_ids(tokenizer))
        options: dict[str, Any] = {}
        if adapter is not None:
            options = {"enable_lora": True, "max_loras": 1, "max_lora_rank": _rank(adapter)}
        if load_in_4bit:
            options["quantization"] = "bitsandbytes"
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise ResourceError(
                "vLLM is not installed", hint='pip install "fintune[vllm]" on a CUDA machine'
            ) from error
        self._vllm = vllm
        # The number is vLLM's own name for the adapter; 0 is none.
        self._lora = None if adapter is None else LoRARequest("adapter", 1, str(adapter.resolve()))
        try:
            self._llm: Any = vllm.LLM(
                model=str(path),
                dtype=dtype,
                max_model_len=context_tokens,
                seed=seed,
                trust_remote_code=trust_remote_code,
                enable_prefix_caching=True,
                # The model's own sampling defaults (generation_config.json) decide nothing.
                generation_config="vllm",
                structured_outputs_config={"backend": "guidance"},
                **options,
            )
        except (ValueError, OSError, NotImplementedError) as error:
            raise ModelError(f"{path}: vLLM cannot load it ({first_line(error)})") from error
        except RuntimeError as error:
            raise ResourceError(f"{path}: vLLM cannot start ({first_line(error)})") from error

    def generate(self, prompts: Sequence[str], decoding: Decoding, done: Collection[int] = ()) -> Iterator[Answered]:
        """Complete prompts; see :class:`fintune.inference.protocol.Engine`.

        Raises:
            ModelError: A prompt is empty, or does not fit the context with its completion.
        """
        rows = [self._ids(prompt) for prompt in prompts]
        for number, row in enumerate(rows, 1):
            if not row or len(row) + decoding.max_new_tokens > self.context_tokens:
                raise PromptError(
                    number,
                    f" has {len(row)} tokens, with {decoding.max_new_tokens} new ones it does not fit "
                    f"the context of {self.context_tokens}",
                    hint="lower prompt.max_length",
                )
        return self._run(rows, decoding, [place for place in range(len(rows)) if place not in done])

    def close(self) -> None:
        """Give the memory back."""
        self._llm = None
        gc.collect()

    def _ids(self, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _run(self, rows: Sequence[list[int]], decoding: Decoding, asked: Sequence[int]) -> Iterator[Answered]:
        engine: Any = self._llm.llm_engine
        # Questions on a page one behind the other: vLLM then computes the page once.
        order = [asked[at] for family in families([rows[place] for place in asked]) for at in family]
        waiting: dict[str, tuple[int, int]] = {}
        for place in order:
            for number in range(decoding.num_candidates):
                name = str(len(waiting))
                params = self._params(decoding, rows[place], place, number)
                engine.add_request(name, {"prompt_token_ids": rows[place]}, params, lora_request=self._lora)
                waiting[name] = place, number
        found: dict[int, dict[int, Completion]] = defaultdict(dict)
        try:
            began = time.monotonic()
            while waiting:
                ended = [each for each in engine.step() if each.finished]
                seconds = (time.monotonic() - began) / max(len(ended), 1)
                for output in ended:
                    place, number = waiting.pop(output.request_id)
                    found[place][number] = _completion(output, seconds)
                    if len(found[place]) == decoding.num_candidates:
                        yield Answered(place, tuple(one for _, one in sorted(found.pop(place).items())))
                if ended:
                    began = time.monotonic()
        finally:
            if waiting:  # whoever asked has stopped reading
                engine.abort_request([*waiting])

    def _params(self, decoding: Decoding, row: Sequence[int], at: int, number: int) -> Any:
        greedy = decoding.temperature == 0 or (decoding.greedy_first and number == 0)
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        constraint = None
        if decoding.grammars is not None:
            constraint = StructuredOutputsParams(grammar=decoding.grammars[at].lark())
        return self._vllm.SamplingParams(
            max_tokens=decoding.max_new_tokens,
            temperature=0.0 if greedy else decoding.temperature,
            top_p=1.0 if greedy else decoding.top_p,
            seed=None if greedy else _seed(decoding.seed, row, number),
            stop_token_ids=self._stop_ids,
            logprobs=2,
            skip_special_tokens=True,
            spaces_between_special_tokens=False,
            structured_outputs=constraint,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


def _rank(adapter: Path) -> int:
    """The least ``max_lora_rank`` that has room for an adapter.

    Raises:
        ModelError: No adapter, or one that vLLM cannot use.
    """
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{adapter} holds no adapter ({first_line(error)})", hint="give a folder in PEFT format"
        ) from None
    ranks = [int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())]
    obstacle = (
        "it is a DoRA adapter"
        if config.get("use_dora")
        else "it holds whole trained layers (modules_to_save)"
        if config.get("modules_to_save")
        else f"its rank is above {RANKS[-1]}"
        if max(ranks) > RANKS[-1]
        else None
    )
    if obstacle:
        raise ModelError(
            f"{adapter}: vLLM cannot use this adapter: {obstacle}",
            hint="merge it, or use predict.engine=transformers",
        )
    return next(rank for rank in RANKS if rank >= max(ranks))


def _completion(output: Any, seconds: float) -> Completion:
    """What stands in a ``RequestOutput`` with one ``CompletionOutput``."""
    (done,) = output.outputs
    steps: Sequence[Mapping[int, Any]] = done.logprobs or ()
    return Completion(
        token_ids=tuple(done.token_ids),
        text=done.text,
        finish_reason="length" if done.finish_reason == "length" else "stop",
        margins=tuple(map(_margin, steps)) or (0.0,) * len(done.token_ids),
        num_prompt_tokens=len(output.prompt_token_ids),
        seconds=seconds,
        logprobs=tuple(float(step[token].logprob) for token, step in zip(done.token_ids, steps, strict=bool(steps))),
    )


def _margin(step: Mapping[int, Any]) -> float:
    # The two best, and the token that was taken where it is neither of them.
    best = sorted((float(each.logprob) for each in step.values()), reverse=True)[:2]
    return min(best[0] - best[1], _SHUT_OUT_NATS) if len(best) == 2 else 0.0


def _seed(seed: int, row: Sequence[int], number: int) -> int:
    """A seed for one candidate: prompts do not share their draws, and a resumed run goes on with the same ones."""
    digest = hashlib.blake2b(f"{seed}\0{number}\0{list(row)}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
