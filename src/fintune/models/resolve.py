"""Resolve a model's name, and fetch its files into a local folder. Needs no torch.

::

    folder = fetch("builtin:smollm2-135m")      # or a local folder, or a hub id OWNER/NAME
    folder.path                                 # always a local folder with weights and tokenizer
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fintune.config import Config
from fintune.errors import ModelError, ResourceError
from fintune.models import builtin
from fintune.models.folder import MODEL_FILES, check_model_folder, stated_licence
from fintune.util.hub import offline_unless_resolved, quiet_hub


@dataclass(frozen=True)
class ModelName:
    """A model's name that was checked. Its files may still be on the hub.

    Attributes:
        name: The name as the user wrote it.
        base_name: Short name for reports and file names.
        local_path: Folder with its files; None for a model that was not fetched yet.
        licence: SPDX-like name; None if it is not known.
        revision: Hub revision to fetch; None takes the default branch.
    """

    name: str
    base_name: str
    local_path: Path | None = None
    licence: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class ModelFolder:
    """A model whose files are in the local folder ``path``, in Hugging Face form. The rest is as in ModelName."""

    name: str
    path: Path
    base_name: str
    licence: str | None = None


def resolve(name: str, *, revision: str | None = None) -> ModelName:
    """Check a model's name, without loading or downloading anything.

    Args:
        name: ``builtin:NAME``, a local folder, or a hub id (``OWNER/NAME``).
        revision: Branch, tag or commit on the hub.

    Raises:
        ModelError: There is no such folder or built-in model, the folder is incomplete, or the name is none of the
            three.
    """
    if name.startswith(builtin.PREFIX):
        spec = builtin.describe(name)
        return ModelName(name, name.removeprefix(builtin.PREFIX), builtin.cached(name), spec.licence)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        check_model_folder(folder)
        return ModelName(name, folder.resolve().name, folder, stated_licence(folder))
    if folder.is_file():
        raise ModelError(f"{name} is a file", hint="give a model folder in Hugging Face form")
    if name.lower() in builtin.BUILTIN:
        raise ModelError(f"there is no folder {name}", hint=f"did you mean {builtin.PREFIX}{name.lower()}?")
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name, re.ASCII) or name.endswith(".gguf"):
        raise ModelError(
            f"there is no folder {name}", hint="give an existing model folder, a hub id OWNER/NAME, or builtin:NAME"
        )
    return ModelName(name, name.rpartition("/")[2], revision=revision)


def fetch(model: str | ModelName, *, revision: str | None = None) -> ModelFolder:
    """Fetch a model's files into a local folder. Files that are already there are not downloaded again.

    From the hub, only configuration, tokenizer and safetensors files are downloaded.

    Args:
        model: A name as for :func:`resolve`, or what :func:`resolve` returned.
        revision: Branch, tag or commit on the hub; ignored for a resolved name.

    Raises:
        ModelError: The model is unknown, gated or incomplete.
        ResourceError: The hub cannot be reached and the model is not in its local cache.
    """
    if isinstance(model, str):
        model = resolve(model, revision=revision)
    path, licence = model.local_path, model.licence
    if path is None and model.name.startswith(builtin.PREFIX):
        path = builtin.ensure(model.name)
    elif path is None:
        from huggingface_hub import snapshot_download

        patterns = [*MODEL_FILES, "README.md", "LICENSE*"]
        with _explain_hub_errors(model), offline_unless_resolved():
            path = Path(snapshot_download(model.name, revision=model.revision, allow_patterns=patterns))
        check_model_folder(path)
        licence = stated_licence(path)
    return ModelFolder(model.name, path, model.base_name, licence)


def fetch_base(config: Config) -> ModelFolder:
    """Fetch the base model of a run, ``model.name`` at ``model.revision``; errors as for :func:`fetch`."""
    return fetch(config.model.name, revision=config.model.revision)


def fetch_config(name: str, *, revision: str | None = None) -> Path:
    """Return a local folder that holds at least the model's ``config.json``. From the hub, nothing else is fetched.

    Args:
        name: As for :func:`resolve`.
        revision: Branch, tag or commit on the hub.

    Raises:
        ModelError: The model is unknown or gated, or has no configuration.
        ResourceError: The hub cannot be reached and the file is not in its local cache.
    """
    folder = Path(name).expanduser()
    if name and (folder / "config.json").is_file():
        return folder
    model = resolve(name, revision=revision)
    if model.local_path is not None or name.startswith(builtin.PREFIX):
        return fetch(model).path
    from huggingface_hub import hf_hub_download

    with _explain_hub_errors(model), offline_unless_resolved(), quiet_hub():
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent


@contextmanager
def _explain_hub_errors(model: ModelName) -> Iterator[None]:
    from huggingface_hub import errors

    what = f"{model.name}, revision {model.revision}" if model.revision else model.name
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"the hub gives {what} only to those who accepted its licence",
            hint="accept the licence on the model's page and log in with `hf auth login`",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"the hub has no revision {model.revision} of {model.name}") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no folder {model.name} here and no model of that name on the hub",
            hint="check the spelling; for a private model, log in with `hf auth login`",
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise ModelError(f"{what} on the hub has no config.json", hint="give a model in Hugging Face form") from error
    except (errors.HfHubHTTPError, OSError) as error:
        # The first sentence of the message. The rest is advice for users of the library.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0][:200]
        raise ResourceError(
            f"there is no folder {model.name} here; taken for a hub id, {what} cannot be fetched: the hub cannot be "
            f"reached and the model is not in the local hub cache ({reason})",
            hint="check the path, or connect once, or use builtin:smollm2-135m",
        ) from error
