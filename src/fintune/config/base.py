"""The base class of all option sections, and two marks that a field may carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo


def neutral(default: Any, *, advanced: bool = False, **limits: Any) -> Any:
    """Declare a field that cannot change any result, such as a number of threads."""
    return Field(default, json_schema_extra={"neutral": True, "advanced": advanced}, **limits)


def advanced(default: Any, **limits: Any) -> Any:
    """Declare a field that few users set; docs/options.md lists it in a table of its own."""
    return Field(default, json_schema_extra={"advanced": True}, **limits)


def is_neutral(field: FieldInfo) -> bool:
    """Whether the field was declared with :func:`neutral`."""
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("neutral"))


def is_advanced(field: FieldInfo) -> bool:
    """Whether the field is marked as advanced."""
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("advanced"))


class Options(BaseModel):
    """Base of all sections: frozen, refuses unknown keys and infinite numbers, expands ``~`` in paths.

    The string below a field describes it in docs/options.md.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        if not isinstance(value, Path):
            return value
        try:
            return value.expanduser()
        except RuntimeError:
            raise ValueError(f"{value}: there is no such home folder; write the path in full") from None
