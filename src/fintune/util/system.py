"""What a manifest records about the machine, and what its figures are called."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "fintune",
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "tokenizers",
    "gguf",
    "libggml-python",
    "xllamacpp",
)
"""Packages whose versions a manifest records."""


def versions() -> dict[str, str]:
    """Installed versions of Python and of :data:`PACKAGES`."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the checkout that this package runs from, ``+`` behind it where files differ; None elsewhere."""
    here = Path(__file__).resolve().parent
    git = shutil.which("git")
    if git is None or not any((parent / ".git").exists() for parent in here.parents):
        return None

    def ask(*words: str) -> str:
        done = subprocess.run([git, "-C", str(here), *words], capture_output=True, text=True, check=False)  # noqa: S603
        return done.stdout.strip() if done.returncode == 0 else ""

    head = ask("rev-parse", "--short=12", "HEAD")
    return head + ("+" if ask("status", "--porcelain", "--untracked-files=no") else "") if head else None


def machine() -> dict[str, str]:
    """Processor, cores, memory and GPU, for the manifest. The host's name is nobody's business."""
    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count() or 0),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory_gib"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f}"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def settle_environment() -> None:
    """What torch reads from the environment when it is imported; what the user has set there stays."""
    _share_cores()
    _grow_gpu_segments()


def _grow_gpu_segments() -> None:
    """Let the GPU's allocator grow what it holds by pages, so that idle blocks of one size serve another.

    Training a 14B model in 4 bits on a card of 24 GiB it then holds 1.2 GiB beside the 21.7 in use; without, all that
    there is. Windows lacks this, and under WSL some drivers fail at the first allocation (pytorch issue 192330).
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is what torch before 2.9 reads
    if sys.platform == "linux" and "microsoft" not in platform.release().lower() and not set(names) & set(os.environ):
        os.environ |= dict.fromkeys(names, "expandable_segments:True")


def _share_cores() -> None:
    """Let threads that wait for each other sleep after a short while.

    libgomp lets them spin for about a millisecond at each of a model's many small steps. While another program uses
    one of two cores that made the steps 10 to 30 times slower; with 1000 turns they take 1.8 times as long, and no
    longer than before where nothing else runs (two cores, torch 2.13).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def release_memory() -> None:
    """Give back what a finished stage no longer uses: cycles of Python, free blocks of glibc, the GPU's cache.

    glibc keeps freed blocks below 32 MB: after training the built-in model, 5 GB of them stayed with the process while
    the next stages loaded their models beside them.
    """
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def reset_peak_memory() -> None:
    """Start the peak of :func:`peak_memory_bytes` anew where the kernel allows it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_memory_bytes() -> int:
    """Largest resident memory of this process since the last reset (Linux) or its start (elsewhere)."""
    told = _told_by_kernel("VmHWM")
    if told is not None:
        return told
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory_bytes() -> int:
    """Memory of this process now; its peak where the system does not say."""
    told = _told_by_kernel("VmRSS")
    return peak_memory_bytes() if told is None else told


def _told_by_kernel(name: str) -> int | None:
    """Bytes of a line of Linux's account of this process."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def duration(seconds: float) -> str:
    """Seconds for people, ``4 min 5 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def size(num_bytes: float) -> str:
    """Bytes for people, ``1.3 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        digits = 0 if unit in {"B", "kB"} or round(num_bytes, 1) >= 100 else 1
        if round(num_bytes, digits) < 1000:
            return f"{num_bytes:.{digits}f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.{0 if num_bytes >= 100 else 1}f} TB"
