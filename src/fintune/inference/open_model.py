"""The only way to open a model for generation. The name decides the engine.

::

    builtin:NAME, OWNER/NAME, a folder    transformers, or vLLM on request
    FILE.gguf                             llama.cpp
    http(s)://HOST/v1#MODEL               any OpenAI-compatible server

    with open_model(ModelSpec("builtin:smollm2-135m")) as model:
        model.generate(["What is EBITDA?"])
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fintune.config import Config, ModelKind
from fintune.data.prepared import read_report
from fintune.errors import ArtifactError, ModelError
from fintune.inference.llama_server import check_gguf, is_gguf
from fintune.inference.openai import OpenAIEngine, is_endpoint, parse_endpoint
from fintune.inference.protocol import Decoding, Engine, PromptResult, sorted_by_prompt
from fintune.models import adapter as adapters
from fintune.models import chat_template as chat
from fintune.models import load as models
from fintune.models.folder import full_model_folder, model_fingerprint
from fintune.records import Message

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EngineName = Literal["transformers", "llama.cpp", "vllm", "openai"]
EngineChoice = Literal["auto", EngineName]
Messages = Sequence[Message]

FOUR_BIT_SUFFIX = "_4bit"
"""Suffix of the kinds of models whose weights are quantised to 4 bits while they load."""
LETTERS_PER_TOKEN = 2.5
"""Estimate for servers whose tokenizer is unknown. Finance pages have about 3, or 2.6 if every digit is a token."""


@dataclass(frozen=True)
class ModelSpec:
    """Which model to open, and how.

    Attributes:
        name: Folder, hub id, built-in model, GGUF file or ``URL#MODEL``.
        adapter: Folder of a PEFT adapter for it.
        engine: Engine to use; "auto" chooses it by the name.
        context_tokens: Longest prompt with its completion, in tokens.
        load_in_4bit: Whether to quantise the weights while they load (bitsandbytes).
        dtype: Type of the weights and the arithmetic in transformers and vLLM.
        batch_size: Number of completions decoded together, or of concurrent requests.
        timeout_seconds: Longest wait for one answer of a server.
        threads: CPU threads; all cores if None.
        revision: Hub revision of ``name`` and ``tokenizer``; ignored for local folders.
        trust_remote_code: Whether the model's own Python code may run.
        tokenizer: Model whose tokenizer and chat template are used; the model's own if None.
    """

    name: str
    adapter: Path | None = None
    engine: EngineChoice = "auto"
    context_tokens: int = 2144
    load_in_4bit: bool = False
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "float32"
    batch_size: int = 16
    timeout_seconds: float = 600.0
    threads: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    tokenizer: str | None = None

    @classmethod
    def from_options(
        cls,
        name: str,
        config: Config,
        *,
        adapter: Path | None = None,
        engine: EngineChoice = "auto",
        load_in_4bit: bool = False,
        tokenizer: str | None = None,
    ) -> ModelSpec:
        """Return the spec of any model with the options of a configuration."""
        return cls(
            name,
            adapter=adapter,
            engine=config.predict.engine if engine == "auto" else engine,
            context_tokens=config.prompt.max_length + config.predict.max_new_tokens,
            load_in_4bit=load_in_4bit,
            dtype=config.predict.dtype,
            batch_size=config.predict.batch_size,
            timeout_seconds=config.predict.timeout_seconds,
            threads=config.predict.threads,
            revision=config.model.revision if config.model.name in (name, tokenizer) else None,
            trust_remote_code=config.model.trust_remote_code,
            tokenizer=tokenizer,
        )

    @classmethod
    def from_config(cls, config: Config, kind: ModelKind, inputs: Mapping[str, Path]) -> ModelSpec:
        """Return the spec of one of a run's own models.

        ``inputs`` are the folders of the stages ``train``, ``merge`` or ``export``, as the kind needs them.
        """
        if kind == "endpoint":
            assert config.predict.endpoint is not None, "the options require it"
            return cls.from_options(config.predict.endpoint, config, engine="openai")
        folder_kind, is_4bit = kind.removesuffix(FOUR_BIT_SUFFIX), kind.endswith(FOUR_BIT_SUFFIX)
        if folder_kind not in ("base", "adapter", "merged"):
            gguf = inputs["export"] / f"{config.run.name}-{kind}.gguf"
            return cls.from_options(str(gguf), config, engine="llama.cpp")
        name, adapter = config.model.name, None
        if folder_kind == "merged":
            name = str(inputs["merge"])
        elif folder_kind == "adapter":
            whole = full_model_folder(inputs["train"])
            name, adapter = (name, inputs["train"] / "adapter") if whole is None else (str(whole), None)
        # All models of a run are prompted with the tokenizer of the base, as training was.
        return cls.from_options(name, config, adapter=adapter, load_in_4bit=is_4bit, tokenizer=config.model.name)

    @property
    def thinking(self) -> bool:
        """Whether the model is asked in thinking mode: it lies in a run whose answers mostly had thoughts."""
        path = self.adapter or Path(self.name).expanduser().absolute()
        for folder in (path, *path.parents)[:4]:
            if (folder / "prepare" / "report.json").is_file():
                with contextlib.suppress(ArtifactError):  # of another version
                    return read_report(folder / "prepare").trains_thoughts
        return False

    @property
    def engine_name(self) -> EngineName:
        """The engine for this model, without loading anything.

        Raises:
            ModelError: The requested engine, the adapter or 4-bit loading does not suit this kind of model.
        """
        path = Path(self.name).expanduser()
        kind: EngineName = "transformers"
        if is_endpoint(self.name):
            kind = "openai"
        elif path.suffix.lower() == ".gguf" or is_gguf(path):
            kind = "llama.cpp"
        if kind != "transformers":
            what = "a GGUF file" if kind == "llama.cpp" else "an address"
            if self.adapter is not None:
                hint = "merge and export it first"
                if kind == "openai":
                    hint = "name the adapter as the server does: URL#NAME"
                raise ModelError(f"{self.name} is {what}, which takes no adapter", hint=hint)
            if self.load_in_4bit:
                raise ModelError(f"{self.name} is {what}, which cannot be loaded in 4 bits", hint="leave that out")
        if self.engine in ("auto", kind):
            return kind
        if kind == "transformers" and self.engine == "vllm":
            return "vllm"
        needs = {"llama.cpp": "a GGUF file", "openai": "an address such as http://127.0.0.1:8080/v1#MODEL"}
        raise ModelError(
            f"the engine {self.engine} cannot run {self.name}",
            hint=f"it needs {needs.get(self.engine, 'a Hugging Face folder')}, or leave the engine to auto",
        )

    @property
    def can_load_in_4bit(self) -> bool:
        """Whether less memory would suffice with ``load_in_4bit``, which is off now."""
        return self.engine_name in ("transformers", "vllm") and not self.load_in_4bit


@dataclass(frozen=True)
class _Backend:
    """A loaded model behind a :class:`LanguageModel`; its methods are explained there."""

    complete: Callable[[Sequence[Messages], Decoding, Collection[int]], Iterator[PromptResult]]
    complete_rendered: Callable[[Sequence[str], Decoding, Collection[int]], Iterator[PromptResult]] | None
    count_tokens: Callable[[Messages], int]
    count_text_tokens: Callable[[str], int]
    close: Callable[[], None]


class LanguageModel:
    """An opened model, from :func:`open_model`. Use it as a context manager, or call :meth:`close`.

    Attributes:
        engine: Name of the engine that runs it.
        fingerprint: Identifies the model's content in manifests and prediction logs.
    """

    def __init__(self, engine: EngineName, fingerprint: str, start: Callable[[], _Backend]) -> None:
        self.engine, self.fingerprint = engine, fingerprint
        self._start = start
        self._started: _Backend | None = None

    def load(self) -> _Backend:
        """Load the weights, if they are not loaded. The first completion or count does it, too."""
        if self._started is None:
            self._started = self._start()
        return self._started

    def generate(
        self,
        prompts: Sequence[str | Messages],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Return one answer for each prompt, in the order of the prompts.

        Args:
            prompts: Questions of a user, or conversations (:class:`fintune.records.Message`) up to the user's last
                turn. The model's chat template renders them.
            max_new_tokens: Limit for each answer in tokens.
            temperature: 0 takes the most probable tokens; above 0, tokens are sampled.
            top_p: Tokens are sampled from the most probable ones that together have this probability.
            seed: The same prompts with the same seed give the same answers.

        Raises:
            ModelError: A prompt does not fit the context, or the model cannot be loaded.
            ResourceError: A package, the memory or the server is missing.
        """
        conversations = [
            [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt for prompt in prompts
        ]
        decoding = Decoding(max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        return [completion.text for completion in sorted_by_prompt(self.complete(conversations, decoding))]

    def complete(
        self, conversations: Sequence[Messages], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[PromptResult]:
        """Complete conversations, rendered by the model's own chat template; see :meth:`.protocol.Engine.generate`."""
        return self.load().complete(conversations, decoding, done)

    def complete_rendered(
        self, prompts: Sequence[str], decoding: Decoding, done: Collection[int] = ()
    ) -> Iterator[PromptResult]:
        """Complete prompts that a chat template rendered; see :meth:`.protocol.Engine.generate`.

        Raises:
            ModelError: The model is served; a server renders conversations itself.
        """
        complete = self.load().complete_rendered
        if complete is None:
            raise ModelError("a server renders conversations itself", hint="use complete()")
        return complete(prompts, decoding, done)

    def count_tokens(self, conversation: Messages) -> int:
        """Return the number of tokens of the rendered conversation, generation prompt included."""
        return self.load().count_tokens(conversation)

    def count_text_tokens(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return self.load().count_text_tokens(text)

    def close(self) -> None:
        """Release the model."""
        if self._started is not None:
            self._started.close()
        self._started = None
        gc.collect()

    def __enter__(self) -> LanguageModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_model(spec: ModelSpec) -> LanguageModel:
    """Open a model. Names and adapters are checked at once; weights are loaded for the first completion.

    Raises:
        ModelError: The model cannot be used, or its adapter was trained on another model.
        ResourceError: A package, the hub or a server is missing.
    """
    engine = spec.engine_name
    if engine == "openai":
        return _open_served(spec)
    if engine == "llama.cpp":
        return _open_gguf(spec)
    if spec.adapter is not None:
        adapters.check_base_name(spec.name, spec.adapter)
    folder = models.fetch(spec.name, revision=spec.revision)
    if spec.adapter is not None:
        adapters.check_adapter_base(folder.path, spec.adapter, name=spec.name)
    with_tokenizer = folder if spec.tokenizer is None else models.fetch(spec.tokenizer, revision=spec.revision)
    tokenizer = models.load_tokenizer(with_tokenizer, trust_remote_code=spec.trust_remote_code)
    parts = [folder.path] if spec.adapter is None else [folder.path, spec.adapter]
    fingerprint = " ".join([*map(model_fingerprint, parts), *(["4bit"] if spec.load_in_4bit else [])])
    start = _start_vllm if engine == "vllm" else _start_transformers
    return LanguageModel(
        engine, fingerprint, lambda: _with_tokenizer(start(spec, folder, tokenizer), tokenizer, spec.thinking)
    )


def wrap_model(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int
) -> LanguageModel:
    """Return a model that is loaded already, such as the one in training, as a :class:`LanguageModel`."""
    from fintune.inference.transformers_engine import TransformersEngine

    engine = TransformersEngine(model, tokenizer, batch_size)
    return LanguageModel("transformers", "", lambda: _with_tokenizer(engine, tokenizer))


def _with_tokenizer(engine: Engine, tokenizer: PreTrainedTokenizerBase, thinking: bool = False) -> _Backend:
    """Return an engine whose prompts are rendered with a tokenizer's chat template."""
    return _Backend(
        complete=lambda conversations, decoding, done: engine.generate(
            [chat.render(tokenizer, turns, thinking=thinking) for turns in conversations], decoding, done
        ),
        complete_rendered=engine.generate,
        count_tokens=lambda conversation: len(chat.encode_prompt(tokenizer, conversation, thinking=thinking)),
        count_text_tokens=lambda text: len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids),
        close=engine.close,
    )


def _start_transformers(spec: ModelSpec, folder: models.ModelFolder, tokenizer: PreTrainedTokenizerBase) -> Engine:
    import torch

    from fintune.inference.transformers_engine import TransformersEngine

    torch.set_num_threads(spec.threads or os.cpu_count() or 1)
    model: PreTrainedModel | PeftModel = models.load_model(
        folder,
        dtype=spec.dtype,
        quantization="nf4" if spec.load_in_4bit else "none",
        trust_remote_code=spec.trust_remote_code,
    )
    if spec.adapter is not None:
        model = adapters.load_adapter(model, spec.adapter)
    return TransformersEngine(model.eval(), tokenizer, spec.batch_size)


def _start_vllm(spec: ModelSpec, folder: models.ModelFolder, tokenizer: PreTrainedTokenizerBase) -> Engine:
    from fintune.inference.vllm_engine import VllmEngine

    return VllmEngine(
        folder.path,
        tokenizer,
        adapter=spec.adapter,
        context_tokens=spec.context_tokens,
        dtype=spec.dtype,
        load_in_4bit=spec.load_in_4bit,
        trust_remote_code=spec.trust_remote_code,
    )


def _open_gguf(spec: ModelSpec) -> LanguageModel:
    """Open a GGUF file with its own tokenizer and chat template."""
    path = Path(spec.name).expanduser()
    check_gguf(path)
    stat, thinking = path.stat(), spec.thinking

    def start() -> _Backend:
        from fintune.inference.llama_cpp import LlamaCppEngine

        engine = LlamaCppEngine(path, context_tokens=spec.context_tokens, threads=spec.threads or os.cpu_count() or 1)
        return _Backend(
            complete=lambda conversations, decoding, done: engine.generate(
                [engine.render(turns, thinking=thinking) for turns in conversations], decoding, done
            ),
            complete_rendered=engine.generate,
            count_tokens=lambda conversation: len(engine.tokenise([engine.render(conversation, thinking=thinking)])[0]),
            count_text_tokens=lambda text: len(engine.tokenise([text])[0]),
            close=engine.close,
        )

    return LanguageModel("llama.cpp", f"{path.name} {stat.st_size} {stat.st_mtime_ns}", start)


def _open_served(spec: ModelSpec) -> LanguageModel:
    """Open a model of a server. Its tokenizer is unknown, so lengths are estimates."""
    engine = OpenAIEngine(parse_endpoint(spec.name), parallel=spec.batch_size, timeout_seconds=spec.timeout_seconds)

    def count_text_tokens(text: str) -> int:
        return -int(-len(text) // LETTERS_PER_TOKEN)

    backend = _Backend(
        complete=engine.chat,
        complete_rendered=None,
        count_tokens=lambda conversation: sum(count_text_tokens(turn.content) + 8 for turn in conversation),
        count_text_tokens=count_text_tokens,
        close=engine.close,
    )
    model = LanguageModel("openai", engine.fingerprint(), lambda: backend)
    model.load()  # so that `close` closes the connections
    return model
