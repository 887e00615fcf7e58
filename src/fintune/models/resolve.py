"""What a model's name means, and how its files come to this machine. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fintune.errors import ModelError, ResourceError
from fintune.models import builtin
from fintune.models.folder import MODEL_FILES, check_model_folder, licence_of
from fintune.util.hub_errors import quiet_hub


@dataclass(frozen=True)
class ModelRef:
    """A model that was named and found, or is still on the hub.

    Attributes:
        name: As the user wrote it.
        path: Local folder; None until ``fetch`` brought it there.
        base_name: Short name for reports and file names.
        licence: SPDX-like name, or None where not known.
        revision: Hub revision asked for, or None.
    """

    name: str
    path: Path | None
    base_name: str
    licence: str | None = None
    revision: str | None = None


def resolve(name: str, *, revision: str | None = None) -> ModelRef:
    """Finds out what a model's name means, without loading or downloading anything.

    Args:
        name: ``builtin:NAME``, a local folder, or a hub id (``OWNER/NAME``).
        revision: Branch, tag or commit on the hub.

    Raises:
        ModelError: No such folder or built-in, an incomplete folder, or a name that is none of the three.
    """
    if name.startswith(builtin.PREFIX):
        spec = builtin.describe(name)
        return ModelRef(name, builtin.cached(name), name.removeprefix(builtin.PREFIX), spec.licence)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        check_model_folder(folder)
        return ModelRef(name, folder, folder.resolve().name, licence_of(folder))
    if folder.is_file():
        raise ModelError(f"{name} is a file", hint="a folder in Hugging Face form is needed here")
    if name.lower() in builtin.BUILTIN:
        raise ModelError(f"no folder {name}", hint=f"did you mean {builtin.PREFIX}{name.lower()}?")
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name, re.ASCII) or name.endswith(".gguf"):
        raise ModelError(
            f"no folder {name}", hint="name an existing model folder, a hub id OWNER/NAME, or builtin:NAME"
        )
    return ModelRef(name, None, name.rpartition("/")[2], revision=revision)


def fetch(ref: ModelRef) -> ModelRef:
    """The same model with its files in a local folder, downloaded where they are not there yet.

    From the hub come only configuration, tokenizer and safetensors files.

    Raises:
        ModelError: Unknown, gated or incomplete model.
        ResourceError: The hub cannot be reached and the model is not in its local cache.
    """
    if ref.path is not None:
        return ref
    if ref.name.startswith(builtin.PREFIX):
        return replace(ref, path=builtin.ensure(ref.name))
    from huggingface_hub import snapshot_download

    with _told_plainly(ref):
        folder = Path(
            snapshot_download(ref.name, revision=ref.revision, allow_patterns=[*MODEL_FILES, "README.md", "LICENSE*"])
        )
    check_model_folder(folder)
    return replace(ref, path=folder, licence=licence_of(folder))


def fetch_config(name: str, *, revision: str | None = None) -> ModelRef:
    """A model with at least its ``config.json`` in a local folder: no weights, no tokenizer; from the hub nothing else.

    Args:
        name: As for :func:`resolve`.
        revision: Branch, tag or commit on the hub.

    Raises:
        ModelError: Unknown or gated model, or one without a configuration.
        ResourceError: The hub cannot be reached and the file is not in its local cache.
    """
    folder = Path(name).expanduser()
    if name and (folder / "config.json").is_file():
        return ModelRef(name, folder, folder.resolve().name, licence_of(folder))
    ref = resolve(name, revision=revision)
    if ref.path is not None or ref.name.startswith(builtin.PREFIX):
        return fetch(ref)
    from huggingface_hub import hf_hub_download

    with _told_plainly(ref), quiet_hub():
        return replace(ref, path=Path(hf_hub_download(ref.name, "config.json", revision=ref.revision)).parent)


@contextmanager
def _told_plainly(ref: ModelRef) -> Iterator[None]:
    """The hub's refusals in a line each.

    Raises:
        ModelError: Unknown, gated or incomplete model.
        ResourceError: The hub cannot be reached.
    """
    from huggingface_hub import errors

    what = f"{ref.name}, revision {ref.revision}" if ref.revision else ref.name
    try:
        yield
    except errors.GatedRepoError as error:
        hint = "accept its licence on its page and log in with `hf auth login`"
        raise ModelError(f"the hub gives {what} only to those who accepted its licence", hint=hint) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"the hub has no revision {ref.revision} of {ref.name}") from error
    except errors.RepositoryNotFoundError as error:
        hint = "check the spelling; for a private model log in with `hf auth login`"
        raise ModelError(
            f"there is no folder {ref.name} here and no model of that name on the hub", hint=hint
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        hint = "a model in Hugging Face form is needed here"
        raise ModelError(f"{what} on the hub has no config.json", hint=hint) from error
    except (errors.HfHubHTTPError, OSError) as error:
        # The first sentence; what follows is advice for users of the library.
        reason = str(error).strip().splitlines()[0].split(". ")[0][:200] if str(error).strip() else type(error).__name__
        raise ResourceError(
            f"there is no folder {ref.name} here; taken for a hub id, {what} cannot be fetched: the hub cannot be "
            f"reached and the model is not in the local hub cache ({reason})",
            hint="check the path, or connect once, or name builtin:smollm2-135m",
        ) from error
