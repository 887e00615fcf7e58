"""A model as a user names it, opened in the engine that its name decides, to answer conversations.

::

    builtin:NAME, OWNER/NAME, a folder    transformers, or vLLM where that is asked for
    FILE.gguf                             llama.cpp
    http(s)://HOST/v1#MODEL               any OpenAI-compatible server

A run's steps know their engine themselves; this is for models that are named one by one, as in ``fintune ask``.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from fintune.config import Config
from fintune.errors import ModelError
from fintune.inference.endpoint import is_endpoint, parse
from fintune.inference.protocol import Answered, Decoding, Engine
from fintune.models import adapter as adapters
from fintune.models import chat_template as chat
from fintune.models import load as models
from fintune.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fintune.inference.llama_cpp import LlamaCppEngine
    from fintune.inference.openai import OpenAIEngine

EngineName = Literal["transformers", "llama.cpp", "vllm", "openai"]
AskedEngine = Literal["auto", EngineName]
Precision = Literal["auto", "bfloat16", "float16", "float32"]
Conversation = Sequence[Message]

CHARACTERS_PER_TOKEN = 2.5
"""For servers whose tokenizer is not known. Finance pages have about 3, or 2.6 where every digit is a token."""


@dataclass(frozen=True)
class Named:
    """What is to be opened, and how.

    Attributes:
        name: Folder, hub id, built-in model, GGUF file or ``URL#MODEL``.
        adapter: Folder of a PEFT adapter for it.
        engine: "auto" goes by the name.
        context_tokens: Longest prompt with its completion.
        load_in_4bit: Quantise the weights while they load (bitsandbytes).
        precision: Arithmetic of transformers and vLLM.
        batch_size: Prompts decoded together; requests in flight.
        timeout_seconds: Longest wait for one answer of a server.
        threads: CPU threads; all cores where None.
        revision: Of a hub model.
        trust_remote_code: Whether the model's own Python code may run.
    """

    name: str
    adapter: Path | None = None
    engine: AskedEngine = "auto"
    context_tokens: int = 2144
    load_in_4bit: bool = False
    precision: Precision = "float32"
    batch_size: int = 16
    timeout_seconds: float = 600.0
    threads: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def with_options(
        cls,
        name: str,
        config: Config,
        *,
        adapter: Path | None = None,
        engine: AskedEngine = "auto",
        load_in_4bit: bool = False,
    ) -> Named:
        """A model with the options of a run, for which it need not be the run's own."""
        return cls(
            name,
            adapter=adapter,
            engine=config.predict.engine if engine == "auto" else engine,
            context_tokens=config.prompt.max_length + config.predict.max_new_tokens,
            load_in_4bit=load_in_4bit,
            precision=config.predict.dtype,
            batch_size=config.predict.batch_size,
            timeout_seconds=config.predict.timeout_seconds,
            threads=config.predict.threads,
            revision=config.model.revision if name == config.model.name else None,
            trust_remote_code=config.model.trust_remote_code,
        )


class Answerer(Protocol):
    """An opened model.

    Attributes:
        engine: Which engine runs it.
        fingerprint: What tells it from other models.
    """

    engine: EngineName
    fingerprint: str

    def count(self, conversation: Conversation) -> int:
        """Tokens of the rendered conversation, generation prompt included."""
        ...

    def count_text(self, text: str) -> int:
        """Tokens of a text."""
        ...

    def complete(
        self, conversations: Sequence[Conversation], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[Answered]:
        """Completions as :meth:`fintune.inference.protocol.Engine.generate` gives them."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


def engine_of(named: Named) -> EngineName:
    """The engine for a model, without loading anything.

    Raises:
        ModelError: The engine that was asked for, or the adapter, does not go with this kind of model.
    """
    path = Path(named.name).expanduser()
    kind: EngineName = "transformers"
    if is_endpoint(named.name):
        kind = "openai"
    elif path.suffix.lower() == ".gguf" or _is_gguf(path):
        kind = "llama.cpp"
    if kind != "transformers":
        what = "a GGUF file" if kind == "llama.cpp" else "an address"
        if named.adapter is not None:
            hint = (
                "merge and export it first" if kind == "llama.cpp" else "name the adapter as the server does: URL#NAME"
            )
            raise ModelError(f"{named.name} is {what}, which takes no adapter", hint=hint)
        if named.load_in_4bit:
            raise ModelError(f"{named.name} is {what}, which is not loaded in 4 bits", hint="leave that out")
    if named.engine in ("auto", kind):
        return kind
    if kind == "transformers" and named.engine == "vllm":
        return "vllm"
    needs = {"llama.cpp": "a GGUF file", "openai": "an address such as http://127.0.0.1:8080/v1#MODEL"}
    raise ModelError(
        f"the engine {named.engine} cannot run {named.name}",
        hint=f"it needs {needs.get(named.engine, 'a Hugging Face folder')}, or leave the engine to auto",
    )


def open_model(named: Named) -> Answerer:
    """Load a model, or connect to it.

    Raises:
        ModelError: It cannot be used, or its adapter was trained on another.
        ResourceError: A package, the hub or a server is missing.
    """
    engine = engine_of(named)
    if engine == "openai":
        return _Served(named)
    if engine == "llama.cpp":
        return _GgufFile(named)
    return _Folder(named, engine)


class _Folder:
    """A Hugging Face folder, in transformers or vLLM."""

    def __init__(self, named: Named, engine: EngineName) -> None:
        self.engine = engine
        if named.adapter is not None:
            adapters.check_base_name(named.name, named.adapter)
        ref = models.fetch(named.name, revision=named.revision)
        if named.adapter is not None:
            adapters.check_adapter_base(ref.path, named.adapter, name=named.name)
        self._tokenizer = models.load_tokenizer(ref, trust_remote_code=named.trust_remote_code)
        parts = [ref.path] if named.adapter is None else [ref.path, named.adapter]
        self.fingerprint = " ".join([*map(models.model_fingerprint, parts), *(["4bit"] if named.load_in_4bit else [])])
        opened = _in_vllm if engine == "vllm" else _in_transformers
        self._engine = opened(named, ref, self._tokenizer)

    def count(self, conversation: Conversation) -> int:
        return len(chat.encode_prompt(self._tokenizer, conversation))

    def count_text(self, text: str) -> int:
        return len(self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def complete(
        self, conversations: Sequence[Conversation], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[Answered]:
        return self._engine.generate([chat.render(self._tokenizer, turns) for turns in conversations], decoding, done)

    def close(self) -> None:
        self._engine.close()
        gc.collect()


class _GgufFile:
    """A GGUF file with the tokenizer and the chat template that stand in it."""

    engine: EngineName = "llama.cpp"

    def __init__(self, named: Named) -> None:
        from fintune.inference.llama_cpp import LlamaCppEngine

        path = Path(named.name).expanduser()
        self._engine: LlamaCppEngine = LlamaCppEngine(
            path, context_tokens=named.context_tokens, threads=named.threads or os.cpu_count() or 1
        )
        stat = path.stat()
        self.fingerprint = f"{path.name} {stat.st_size} {stat.st_mtime_ns}"

    def count(self, conversation: Conversation) -> int:
        return self.count_text(self._engine.render(conversation))

    def count_text(self, text: str) -> int:
        return len(self._engine.tokenise([text])[0])

    def complete(
        self, conversations: Sequence[Conversation], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[Answered]:
        return self._engine.generate([self._engine.render(turns) for turns in conversations], decoding, done)

    def close(self) -> None:
        self._engine.close()


class _Served:
    """A model behind an address; its tokenizer is not known, so lengths are estimates."""

    engine: EngineName = "openai"

    def __init__(self, named: Named) -> None:
        from fintune.inference.openai import OpenAIEngine

        self._engine: OpenAIEngine = OpenAIEngine(
            parse(named.name), parallel=named.batch_size, timeout_seconds=named.timeout_seconds
        )
        self.fingerprint = hashlib.sha256(self._engine.fingerprint().encode()).hexdigest()

    def count(self, conversation: Conversation) -> int:
        return sum(self.count_text(turn.content) + 8 for turn in conversation)

    def count_text(self, text: str) -> int:
        return -int(-len(text) // CHARACTERS_PER_TOKEN)

    def complete(
        self, conversations: Sequence[Conversation], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[Answered]:
        return self._engine.chat(conversations, decoding, done)

    def close(self) -> None:
        self._engine.close()


def _in_transformers(named: Named, ref: models.ModelFolder, tokenizer: PreTrainedTokenizerBase) -> Engine:
    import torch

    from fintune.inference.transformers_engine import TransformersEngine
    from fintune.util.console import quiet_libraries

    torch.set_num_threads(named.threads or os.cpu_count() or 1)
    model = models.load_model(
        ref,
        dtype=named.precision,
        quantization="nf4" if named.load_in_4bit else "none",
        trust_remote_code=named.trust_remote_code,
    )
    if named.adapter is not None:
        with quiet_libraries():
            model = adapters.load_adapter(model, named.adapter)
    return TransformersEngine(model.eval(), tokenizer, named.batch_size)


def _in_vllm(named: Named, ref: models.ModelFolder, tokenizer: PreTrainedTokenizerBase) -> Engine:
    from fintune.inference.vllm_engine import VllmEngine

    return VllmEngine(
        ref.path,
        tokenizer,
        adapter=named.adapter,
        context_tokens=named.context_tokens,
        dtype=named.precision,
        load_in_4bit=named.load_in_4bit,
        trust_remote_code=named.trust_remote_code,
    )


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False
