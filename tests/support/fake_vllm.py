"""vLLM's offline interface as documented for 0.11 and later, over a transformers model: names, arguments, limits.

Nothing of vLLM's speed or memory is in it. What it refuses, vLLM refuses.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass
class StructuredOutputsParams:
    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None

    def __post_init__(self):
        given = [self.json, self.regex, self.choice, self.grammar, self.json_object, self.structural_tag]
        if sum(each is not None for each in given) != 1:
            raise ValueError("You must use one kind of structured outputs constraint")


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self):
        if not 0 < self.top_p <= 1 or self.temperature < 0 or self.max_tokens < 1:
            raise ValueError("sampling parameters out of range")


@dataclass(frozen=True)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str
    long_lora_max_len: int | None = None
    base_model_name: str | None = None

    def __post_init__(self):
        if self.lora_int_id < 1 or not self.lora_path:
            raise ValueError("id must be > 0, path must be given")


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


class LLMEngine:
    """What ``LLM`` holds: requests go in, a step gives those that ended, of which the last begun may be the first."""

    def __init__(self, llm):
        self._llm, self._waiting = llm, []
        self.calls, self.aborted = [], []

    def add_request(self, request_id, prompt, params, arrival_time=None, lora_request=None, **_):
        if not isinstance(request_id, str):
            raise TypeError(f"request_id must be a string, got {type(request_id)}")
        if lora_request is not None:
            self._llm._adapt(lora_request)
        self.calls.append((prompt, params))
        self._waiting.append((request_id, prompt, params))

    def has_unfinished_requests(self):
        return bool(self._waiting)

    def step(self):
        begun, self._waiting = self._waiting[:2], self._waiting[2:]
        done = [
            RequestOutput(name, None, prompt["prompt_token_ids"], [self._llm._complete(prompt, params)])
            for name, prompt, params in reversed(begun)
        ]
        assert all(params.output_kind is RequestOutputKind.FINAL_ONLY for _, _, params in begun)
        return done

    def abort_request(self, request_ids):
        self.aborted += request_ids
        self._waiting = [each for each in self._waiting if each[0] not in request_ids]


@dataclass
class LLM:
    """Every argument is one of ``vllm.LLM`` or of its ``EngineArgs``; another is an error."""

    model: str
    tokenizer: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    seed: int = 0
    trust_remote_code: bool = False
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    enable_prefix_caching: bool | None = None
    generation_config: str = "auto"
    structured_outputs_config: dict[str, Any] | None = None
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16
    llm_engine: LLMEngine = field(init=False)

    def __post_init__(self):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if self.max_lora_rank not in (1, 8, 16, 32, 64, 128, 256, 320, 512):
            raise ValueError(f"max_lora_rank: {self.max_lora_rank}")
        self._tokenizer = AutoTokenizer.from_pretrained(self.model)
        self._model = AutoModelForCausalLM.from_pretrained(self.model).eval()
        if self.max_model_len > self._model.config.max_position_embeddings:
            raise ValueError(f"max_model_len ({self.max_model_len}) is greater than the derived one\nand so on")
        self._adapted = False
        self.llm_engine = LLMEngine(self)

    def _adapt(self, request):
        from peft import PeftModel

        from fintune.models.adapter import quiet_peft

        if not self.enable_lora:
            raise ValueError("Got lora_request but LoRA is not enabled!")
        config = json.loads((Path(request.lora_path) / "adapter_config.json").read_text())
        if config.get("use_dora") or config.get("modules_to_save"):
            raise ValueError("vLLM does not yet support DoRA.")
        if config["r"] > self.max_lora_rank:
            raise ValueError(f"LoRA rank {config['r']} is greater than max_lora_rank {self.max_lora_rank}.")
        if not self._adapted:
            with quiet_peft():
                self._model = PeftModel.from_pretrained(self._model, request.lora_path).eval()
            self._adapted = True

    def _complete(self, prompt, params):
        import torch

        ids, made, steps, reason = list(prompt["prompt_token_ids"]), [], [], "length"
        draw = torch.Generator().manual_seed(params.seed) if params.seed is not None else None
        stops = {*(params.stop_token_ids or ()), self._tokenizer.eos_token_id}
        while len(made) < params.max_tokens:
            with torch.inference_mode():
                row = self._model(torch.tensor([ids + made])).logits[0, -1].float().log_softmax(-1)
            best = row.topk(params.logprobs)
            token = int(best.indices[0])
            if params.temperature > 0:
                token = int(torch.multinomial((row / params.temperature).softmax(-1), 1, generator=draw))
            ranked = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            found = {each: Logprob(value, rank) for rank, (each, value) in enumerate(ranked, 1)}
            found.setdefault(token, Logprob(float(row[token])))
            made.append(token)
            steps.append(found)
            if token in stops:
                reason = "stop"
                break
        text = self._tokenizer.decode(made, skip_special_tokens=params.skip_special_tokens)
        return CompletionOutput(0, text, made, None, steps, reason)


def install(monkeypatch):
    """Put it where ``import vllm`` finds it; returns the module."""
    root, lora, request, sampling = (
        ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request", "vllm.sampling_params")
    )
    root.LLM, root.SamplingParams = LLM, SamplingParams
    request.LoRARequest = LoRARequest
    sampling.SamplingParams, sampling.StructuredOutputsParams = SamplingParams, StructuredOutputsParams
    sampling.RequestOutputKind = RequestOutputKind
    root.lora, lora.request, root.sampling_params = lora, request, sampling
    for module in (root, lora, request, sampling):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return root
