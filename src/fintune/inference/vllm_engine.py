"""vLLM in this process, with a LoRA adapter where there is one (optional extra ``fintune[vllm]``, CUDA).

This engine is written against vLLM's documented offline interface of 0.11 and later: ``LLM`` and its ``LLMEngine``
(``LLM.generate`` would return nothing before everything is done), ``SamplingParams``, ``StructuredOutputsParams``,
``LoRARequest``, token-id prompts and ``RequestOutput``.

**It was not run**: vLLM cannot be installed on the machines that this package is developed on. The tests use a stand-in
with exactly the documented names, arguments and limits. The following is known from the documentation alone: weights
load and fit the memory, the speed, llguidance as vLLM's backend takes the Lark form of the grammar (the function that
it calls, ``llguidance.grammar_from``, does), and seeds repeat draws.

With a grammar, vLLM masks the logits before it reads log-probabilities. Margins, log-probabilities and the confidence
of a single completion are then those among the allowed tokens, unlike in the other engines.

What vLLM does not support is refused before it loads anything: DoRA, ranks above 512, and whole trained layers
(``modules_to_save``).
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fintune.errors import ModelError, PromptError, ResourceError
from fintune.inference.prefix_cache import group_by_prefix
from fintune.inference.protocol import Completion, Decoding, PromptResult
from fintune.models import chat_template as chat
from fintune.models.adapter import check_is_adapter
from fintune.util.files import read_json
from fintune.util.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's ``max_lora_rank`` accepts."""

_MAX_MARGIN_NATS = 104.0
"""Margin if the grammar allows a single token: that of a float32 probability of 0, which JSON can write."""


class VllmEngine:
    """A Hugging Face folder in vLLM.

    Args:
        tokenizer: Prompts are sent as token ids, so no BOS is added.
        context_tokens: Longest prompt with its completion, in tokens.
        seed: Seed of vLLM itself; sampled completions have their own seeds.

    Raises:
        ResourceError: vLLM is not installed, or the model does not fit its memory.
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
        # The number identifies the adapter in vLLM; 0 means no adapter.
        self._lora = None if adapter is None else LoRARequest("adapter", 1, str(adapter.resolve()))
        try:
            self._llm: Any = vllm.LLM(
                model=str(path),
                dtype=dtype,
                max_model_len=context_tokens,
                seed=seed,
                trust_remote_code=trust_remote_code,
                enable_prefix_caching=True,
                # Ignore the model's own sampling defaults (generation_config.json).
                generation_config="vllm",
                structured_outputs_config={"backend": "guidance"},
                **options,
            )
        except (ValueError, OSError, NotImplementedError) as error:
            raise ModelError(f"{path}: vLLM cannot load it ({first_line(error)})") from error
        except RuntimeError as error:
            raise ResourceError(f"{path}: vLLM cannot start ({first_line(error)})") from error

    def generate(
        self, prompts: Sequence[str], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[PromptResult]:
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
        return self._run(rows, decoding, [index for index in range(len(rows)) if index not in done])

    def close(self) -> None:
        """Release the memory."""
        self._llm = None
        gc.collect()

    def _ids(self, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _run(self, rows: Sequence[list[int]], decoding: Decoding, indices: Sequence[int]) -> Iterator[PromptResult]:
        engine: Any = self._llm.llm_engine
        # Questions about a page follow each other, so vLLM computes the page once.
        groups = group_by_prefix([rows[index] for index in indices])
        pending: dict[str, tuple[int, int]] = {}
        for index in (indices[member] for group in groups for member in group):
            for candidate in range(decoding.num_candidates):
                name = str(len(pending))
                params = self._params(decoding, rows[index], index, candidate)
                engine.add_request(name, {"prompt_token_ids": rows[index]}, params, lora_request=self._lora)
                pending[name] = index, candidate
        completions: dict[int, dict[int, Completion]] = defaultdict(dict)
        try:
            started = time.monotonic()
            while pending:
                ended = [output for output in engine.step() if output.finished]
                seconds = (time.monotonic() - started) / max(len(ended), 1)
                for output in ended:
                    index, candidate = pending.pop(output.request_id)
                    completions[index][candidate] = _completion(output, seconds)
                    if len(completions[index]) == decoding.num_candidates:
                        candidates = completions.pop(index)
                        yield PromptResult(index, tuple(candidates[number] for number in sorted(candidates)))
                if ended:
                    started = time.monotonic()
        finally:
            if pending:  # the consumer has stopped reading
                engine.abort_request([*pending])

    def _params(self, decoding: Decoding, row: Sequence[int], index: int, candidate: int) -> Any:
        is_greedy = decoding.is_greedy(candidate)
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        constraint = None
        if decoding.grammars is not None:
            constraint = StructuredOutputsParams(grammar=decoding.grammars[index].lark())
        return self._vllm.SamplingParams(
            max_tokens=decoding.max_new_tokens,
            temperature=0.0 if is_greedy else decoding.temperature,
            top_p=1.0 if is_greedy else decoding.top_p,
            seed=None if is_greedy else decoding.server_seed(str(list(row)), candidate),
            stop_token_ids=self._stop_ids,
            logprobs=2,
            skip_special_tokens=True,
            spaces_between_special_tokens=False,
            structured_outputs=constraint,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


def _rank(adapter: Path) -> int:
    """Return the smallest ``max_lora_rank`` for an adapter.

    Raises:
        ModelError: There is no adapter, or vLLM cannot use it.
    """
    check_is_adapter(adapter)
    config = read_json(adapter / "adapter_config.json", ModelError)
    ranks = [int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())]
    unsupported = (
        "it is a DoRA adapter"
        if config.get("use_dora")
        else "it holds whole trained layers (modules_to_save)"
        if config.get("modules_to_save")
        else f"its rank is above {RANKS[-1]}"
        if max(ranks) > RANKS[-1]
        else None
    )
    if unsupported:
        raise ModelError(
            f"{adapter}: vLLM cannot use this adapter: {unsupported}",
            hint="merge it, or use predict.engine=transformers",
        )
    return next(rank for rank in RANKS if rank >= max(ranks))


def _completion(output: Any, seconds: float) -> Completion:
    """Convert a ``RequestOutput`` that has one ``CompletionOutput``."""
    (generated,) = output.outputs
    steps: Sequence[Mapping[int, Any]] = generated.logprobs or ()
    return Completion(
        token_ids=tuple(generated.token_ids),
        text=generated.text,
        finish_reason="length" if generated.finish_reason == "length" else "stop",
        margins=tuple(map(_margin, steps)) or (0.0,) * len(generated.token_ids),
        num_prompt_tokens=len(output.prompt_token_ids),
        seconds=seconds,
        logprobs=tuple(
            float(step[token].logprob) for token, step in zip(generated.token_ids, steps, strict=bool(steps))
        ),
    )


def _margin(step: Mapping[int, Any]) -> float:
    # vLLM reports the two best tokens, and the chosen token if it is neither.
    best = sorted((float(entry.logprob) for entry in step.values()), reverse=True)[:2]
    return min(best[0] - best[1], _MAX_MARGIN_NATS) if len(best) == 2 else 0.0
