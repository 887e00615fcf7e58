"""What a manifest records about the machine, and what torch reads from the environment."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

PACKAGES = (
    *("fintune", "torch", "transformers", "peft", "trl", "datasets"),
    *("tokenizers", "gguf", "libggml-python", "xllamacpp"),
)
"""Packages whose versions a manifest records."""


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of those of :data:`PACKAGES` that are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def checkout_commit() -> str | None:
    """Return the commit of the checkout that this package runs from, or None outside a checkout.

    A ``+`` follows it if tracked files differ from the commit.
    """
    here = Path(__file__).resolve().parent
    git = shutil.which("git")
    if git is None or not any((parent / ".git").exists() for parent in here.parents):
        return None

    def ask_git(*arguments: str) -> str:
        done = subprocess.run([git, "-C", str(here), *arguments], capture_output=True, text=True, check=False)  # noqa: S603
        return done.stdout.strip() if done.returncode == 0 else ""

    head = ask_git("rev-parse", "--short=12", "HEAD")
    return head + ("+" if ask_git("status", "--porcelain", "--untracked-files=no") else "") if head else None


def machine_facts() -> dict[str, str]:
    """Return processor, cores, memory and GPU, for the manifest. The host's name is deliberately not recorded."""
    processor = platform.processor() or "unknown"
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor,
        "cores": str(os.cpu_count() or 0),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory_gib"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f}"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def configure_environment() -> None:
    """Set the variables that torch reads when it is imported. What the user has set stays."""
    # libgomp lets waiting threads spin for about a millisecond at each of a model's many small steps. If another
    # program uses one of two cores, the steps become 10 to 30 times slower; with 1000 turns, 1.8 times (torch 2.13).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # The GPU's allocator may grow its segments by pages, so that idle blocks of one size serve another: for a 14B model
    # in 4 bits on 24 GiB it holds 1.2 GiB beside the 21.7 in use, and else all of the card. Windows lacks this, and
    # under WSL some drivers fail at the first allocation (pytorch issue 192330).
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch before 2.9 reads the second
    if sys.platform == "linux" and "microsoft" not in platform.release().lower() and not set(names) & set(os.environ):
        os.environ |= dict.fromkeys(names, "expandable_segments:True")
