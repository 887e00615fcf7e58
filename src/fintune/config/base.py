"""What every section of options has in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo


def neutral(default: Any, description: str, **limits: Any) -> Any:
    """A field that cannot change any result."""
    return Field(default, description=description, json_schema_extra={"neutral": True}, **limits)


def is_neutral(field: FieldInfo) -> bool:
    """Whether the field was declared with :func:`neutral`."""
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("neutral"))


class Options(BaseModel):
    """Base of all sections: frozen, an unknown key is an error, no number is infinite, ``~`` is the home folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _home(cls, value: Any) -> Any:
        if not isinstance(value, Path):
            return value
        try:
            return value.expanduser()
        except RuntimeError:
            raise ValueError(f"{value}: there is no such home folder; write the path in full") from None
