"""Models of finished runs, and :func:`fintune.open_model`: ``runs/NAME`` in place of a model's name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fintune.errors import ArtifactError, ModelError
from fintune.inference.open_model import EngineChoice, LanguageModel, ModelSpec, open_model
from fintune.manifest import Slot
from fintune.models.folder import adapter_base_name


def open_model_by_name(
    name: str | Path,
    *,
    adapter: str | Path | None = None,
    engine: EngineChoice = "auto",
    context_tokens: int = 4096,
    load_in_4bit: bool = False,
) -> LanguageModel:
    """Open a model for generation. Available as ``fintune.open_model``.

    ::

        with fintune.open_model("runs/demo") as model:
            print(model.generate(["What is EBITDA?"])[0])

    Args:
        name: A model folder, a hub id, ``builtin:smollm2-135m``, a GGUF file, the address of an OpenAI-compatible
            server (``http://127.0.0.1:8080/v1#MODEL``), or a run's folder: its last GGUF file, or its merged model.
        adapter: Folder of a PEFT adapter for the model.
        engine: "transformers", "vllm", "llama.cpp" or "openai"; "auto" chooses it by the name.
        context_tokens: Longest prompt with its answer, in tokens, for llama.cpp and vLLM.
        load_in_4bit: Whether to quantise the weights of a folder while they load (bitsandbytes).

    Raises:
        ModelError: The model cannot be used, or the adapter was trained on another model.
        ArtifactError: The run has no merged or exported model.
        ResourceError: A package, the hub or a server is missing.
    """
    spec = ModelSpec(
        str(name),
        adapter=None if adapter is None else Path(adapter),
        engine=engine,
        context_tokens=context_tokens,
        load_in_4bit=load_in_4bit,
    )
    folder = Path(name).expanduser()
    if is_run_folder(folder):
        spec = replace(spec, name=str(find_run_model(folder)))
    return open_model(spec)


def is_run_folder(folder: Path) -> bool:
    """Whether a folder is a run, and not a model.

    Raises:
        ModelError: The folder holds an adapter.
    """
    if not folder.is_dir() or (folder / "config.json").is_file():
        return False
    if (folder / "adapter_config.json").is_file():
        base = adapter_base_name(folder)
        raise ModelError(f"{folder} holds an adapter, not a model", hint=f"name its base: {base} --adapter {folder}")
    has_adapter = (folder / "train" / "adapter" / "adapter_config.json").is_file()
    return has_adapter or Slot(folder, "prepare").manifest() is not None


def find_run_model(run: Path) -> Path:
    """Return a run's last GGUF file, or its merged folder if nothing was exported.

    Raises:
        ArtifactError: The run has no merged or exported model, or its GGUF file is missing.
    """
    if Slot(run, "export").manifest() is not None:
        return exported_gguf(run)
    if (run / "merge" / "config.json").is_file():
        return run / "merge"
    adapter = run / "train" / "adapter"
    hint = "fintune run CONFIG makes one"
    if (adapter / "adapter_config.json").is_file():
        hint = f"name the adapter and its base: {adapter_base_name(adapter)} --adapter {adapter}"
    raise ArtifactError(f"{run} holds no merged or exported model", hint=hint)


def exported_gguf(run: Path, kind: str | None = None) -> Path:
    """Return a GGUF file of a run.

    Args:
        run: The run's folder.
        kind: Type of the file, such as "Q4_K_M"; None for the last of ``export.types``.

    Raises:
        ArtifactError: The export is not finished, does not have this type, or its file is missing.
    """
    manifest = Slot(run, "export").manifest()
    if manifest is None:
        raise ArtifactError(f"{run} holds no finished export", hint="make it first: fintune run CONFIG --only export")
    sizes = manifest.facts.get("file_bytes")
    kinds = list(sizes) if isinstance(sizes, dict) else []
    if kind is not None and kind.upper() not in kinds:
        raise ArtifactError(f"{run}/export holds no {kind}", hint=f"it has {', '.join(kinds)}")
    kind = kinds[-1] if kind is None else kind.upper()
    names = [name for name in manifest.outputs if name.endswith(f"-{kind}.gguf")]
    if not names or not (run / "export" / names[0]).is_file():
        raise ArtifactError(
            f"{run}/export has lost its {kind} file", hint="rerun it: fintune run CONFIG --only export --redo export"
        )
    return run / "export" / names[0]
