"""What of a run goes to the Hugging Face hub, and where."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from fintune.config.base import Options, neutral

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,94}[A-Za-z0-9]|[A-Za-z0-9]", re.ASCII)

Published = Literal["adapter", "merged", "gguf"]


def is_hub_name(name: str) -> bool:
    """Whether a repository of the hub may be called so: ``OWNER/NAME`` or ``NAME``."""
    parts = name.split("/")
    fits = len(parts) <= 2 and len(name) <= 96 and not any(pair in name for pair in ("--", ".."))
    return fits and all(_REPO.fullmatch(part) is not None for part in parts)


class PublishOptions(Options):
    """Pushing results to the Hugging Face hub; nothing is pushed where `repo_id` is empty."""

    repo_id: str | None = Field(
        None,
        description="Repository, `OWNER/NAME`, or `NAME` for one of yours. Made where there is none. With it, "
        "`fintune run` ends with a push; the token is that of `hf auth login` or HF_TOKEN.",
    )
    artifacts: Annotated[tuple[Published, ...], Field(min_length=1)] = Field(
        ("adapter",),
        description="What is pushed: `adapter` (PEFT), `merged` (the 16-bit folder), `gguf` (the files of "
        "`export.types` and the Modelfile). Beside `merged` the adapter lies in `adapter/`.",
    )
    private: bool = Field(
        True, description="Only you can read it. A repository that everybody can read already is then refused."
    )
    branch: str = Field(
        "main", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Branch; made where there is none."
    )
    base_model: str | None = Field(
        None,
        description="Hub id of the base model, where `model.name` is a folder; the card and the adapter's "
        "configuration name it.",
    )
    license: str | None = Field(
        None,
        description="Licence of the result in the hub's form, as `apache-2.0`; where empty, the card says what base "
        "model and data ask for. None that allows what the data forbid is taken.",
    )
    each_epoch: bool = neutral(
        False,
        "Push the adapter behind every epoch of training, too, in the background; a failure is told and "
        "training goes on.",
    )

    @field_validator("repo_id", "base_model")
    @classmethod
    def _is_a_name(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        if not is_hub_name(value):
            raise ValueError(f"publish.{info.field_name}: {value!r} is no name on the hub; write OWNER/NAME")
        return value

    @field_validator("artifacts")
    @classmethod
    def _named_once(cls, value: tuple[Published, ...]) -> tuple[Published, ...]:
        if len(set(value)) < len(value):
            raise ValueError("publish.artifacts names something twice; once is enough")
        return value

    @model_validator(mode="after")
    def _somewhere(self) -> PublishOptions:
        if self.each_epoch and not self.repo_id:
            raise ValueError("publish.each_epoch needs a place to push to; set publish.repo_id")
        return self

    @property
    def adapter_folder(self) -> str:
        """Where the adapter lies in the repository: at its root, unless the merged model is there.

        transformers would put an adapter beside a model on top of it, and so a second time.
        """
        return "adapter" if "merged" in self.artifacts else ""

    def obstacle(self, kind: str, source: str) -> str | None:
        """What is asked for and never made, with what to do.

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
