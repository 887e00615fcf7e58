"""Which results of a run are pushed to the Hugging Face hub, and where."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from fintune.config.base import Options, advanced, neutral

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,94}[A-Za-z0-9]|[A-Za-z0-9]", re.ASCII)

Published = Literal["adapter", "merged", "gguf"]


def is_hub_name(name: str) -> bool:
    """Whether a name is valid for a repository of the hub: ``OWNER/NAME`` or ``NAME``."""
    parts = name.split("/")
    fits = len(parts) <= 2 and len(name) <= 96 and not any(pair in name for pair in ("--", ".."))
    return fits and all(_REPO.fullmatch(part) is not None for part in parts)


class PublishOptions(Options):
    """Pushing results to the Hugging Face hub. Nothing is pushed unless `repo_id` is set."""

    repo_id: str | None = Field(
        None,
        description="Repository: `OWNER/NAME`, or `NAME` for one of yours. It is created if it does not exist. If this "
        "is set, `fintune run` ends with a push. The token comes from `hf auth login` or HF_TOKEN.",
    )
    artifacts: Annotated[tuple[Published, ...], Field(min_length=1)] = Field(
        ("adapter",),
        description="What is pushed: `adapter` (PEFT), `merged` (the 16-bit folder), `gguf` (the files of "
        "`export.types` and the Modelfile). If `merged` is pushed, the adapter goes to the folder `adapter/`.",
    )
    private: bool = Field(
        True, description="Make the repository private. A repository that is already public is then refused."
    )
    branch: str = advanced(
        "main", "Branch; it is created if it does not exist.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
    )
    base_model: str | None = advanced(
        None,
        "Hub id of the base model, if `model.name` is a folder. The card and the adapter's configuration name it.",
    )
    license: str | None = Field(
        None,
        description="License of the result as a hub identifier such as `apache-2.0` (default: what base model and data "
        "require). Rejected if it permits uses that the data licenses forbid.",
    )
    each_epoch: bool = neutral(
        False,
        "Also push the adapter after every epoch, in the background. If a push fails, training continues.",
    )

    @field_validator("repo_id", "base_model")
    @classmethod
    def _check_name(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        if not is_hub_name(value):
            raise ValueError(f"publish.{info.field_name}: {value!r} is not a valid hub name; write OWNER/NAME")
        return value

    @field_validator("artifacts")
    @classmethod
    def _check_artifacts(cls, value: tuple[Published, ...]) -> tuple[Published, ...]:
        if len(set(value)) < len(value):
            raise ValueError("publish.artifacts names something twice; once is enough")
        return value

    @model_validator(mode="after")
    def _check_repository(self) -> PublishOptions:
        if self.each_epoch and not self.repo_id:
            raise ValueError("publish.each_epoch needs a repository; set publish.repo_id")
        return self

    @property
    def adapter_folder(self) -> str:
        """Folder of the adapter in the repository: its root, unless the merged model is there.

        transformers would apply an adapter beside a model on top of it, and so a second time.
        """
        return "adapter" if "merged" in self.artifacts else ""

    def unsupported_reason(self, kind: str, source: str) -> str | None:
        """Return why an artifact cannot be published and what to do, or None.

        Args:
            kind: ``adapter.kind``.
            source: ``export.source``.
        """
        if not self.repo_id:
            return None
        if kind == "full" and ("adapter" in self.artifacts or self.each_epoch):
            option = "publish.each_epoch" if self.each_epoch else "publish.artifacts: adapter"
            return (
                f"{option} pushes an adapter, and adapter.kind: full has none; set publish.artifacts to merged or gguf"
            )
        if source == "adapter" and "merged" in self.artifacts:
            return "publish.artifacts: merged needs the merged folder, which export.source: adapter does not write"
        return None
