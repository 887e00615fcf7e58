"""fintune: raw financial pages in, a measured and quantised language model out."""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fintune.config.load import load_config
    from fintune.evaluation.scoring import score_predictions as score
    from fintune.inference.run_models import open_model_by_name as open_model
    from fintune.pipeline.runner import run

__all__ = ["__version__", "load_config", "open_model", "run", "score"]

__version__ = "0.1.0"

_LAZY = {
    "load_config": ("fintune.config.load", "load_config"),
    "open_model": ("fintune.inference.run_models", "open_model_by_name"),
    "run": ("fintune.pipeline.runner", "run"),
    "score": ("fintune.evaluation.scoring", "score_predictions"),
}
"""Public functions by name, each with its module and its name there. They are imported at the first use."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)


# When bitsandbytes is imported (by PEFT, too) it warns that it cannot fetch an optional kernel from the hub; it has its
# own for the processor. Whatever else its logger says is heard.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward from kernels-community" not in str(record.msg)
)
