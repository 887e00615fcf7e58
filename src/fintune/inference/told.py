"""What a server tells about the model behind a name, so that another model under the same name is told from it.

llama.cpp's describes the weights in ``meta`` of ``/models`` (parameters, bytes, type) and names its file, template and
build in ``/props``, which lies beside ``/v1``; vLLM's names the folder in ``root``. Others tell nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from fintune.inference.endpoint import Connection

_PROPS = ("model_path", "build_info", "chat_template")
_NOT_THE_MODEL = ("n_ctx",)
"""Parts of ``meta`` that say how the server was started."""


def told_by(connection: Connection, entry: Mapping[str, Any]) -> str:
    """A hash of what the server tells about a model; "" where it tells nothing.

    Args:
        connection: The server.
        entry: The model's entry in ``/models``; empty where there is none.

    Raises:
        ResourceError: The server cannot be reached, or stays too busy.
    """
    owner = entry.get("owned_by")
    facts: dict[str, Any] = {}
    if owner == "llamacpp":
        meta, props = entry.get("meta"), connection.get_beside("/props")
        if isinstance(meta, dict):
            facts |= {"meta": {name: value for name, value in meta.items() if name not in _NOT_THE_MODEL}}
        if isinstance(props, dict):
            facts |= {name: props[name] for name in _PROPS if props.get(name)}
    elif owner == "vllm" and entry.get("root"):
        facts |= {"root": entry["root"]}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest() if facts else ""
