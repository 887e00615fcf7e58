"""Compile the fused layers' Triton kernels for an H100 or H200 as a training step launches them, without a GPU.

Run by ``tests/training/fused/test_triton_compile.py`` in a process of its own: Triton's interpreter, which the other
tests use, accepts what its compiler refuses. Prints a line for each kernel and variant of its arguments.
"""

from __future__ import annotations

import sys
from collections import Counter
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fintune.training.fused import kernels_torch, kernels_triton, launch_triton
from fintune.training.fused.model import FusedModel
from training.fused.test_layers import loss_of_layers, make

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}
STEPS = (
    ("llama", {}),
    ("llama", {"dora": True}),
    ("llama", {"lora_dropout": 0.1}),
    ("qwen2", {}),
    ("qwen2", {"dora": True}),
    ("qwen3", {}),
    ("qwen3", {"dora": True}),
    ("qwen3", {"targets": ["q_proj", "down_proj"]}),
)


class Compiler:
    """Stands for a kernel: a launch compiles it for the launch's arguments and computes nothing."""

    def __init__(self, kernel, seen):
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, _grid):
        def launch(*args, num_warps=4, num_stages=3, **constants):
            values = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
            signature = {name: self.type_of(name, values[name], constants) for name in self.kernel.arg_names}
            fixed = {
                (at,): values[name] for at, name in enumerate(self.kernel.arg_names) if signature[name] == "constexpr"
            }
            key = (self.kernel.fn.__name__, tuple(signature.values()), tuple(fixed.values()))
            if not self.seen[key]:
                source = ASTSource(self.kernel, signature, fixed)
                options = {"num_warps": num_warps, "num_stages": num_stages}
                triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
                sys.stdout.write(" ".join([self.kernel.fn.__name__, *signature.values()]) + "\n")
            self.seen[key] += 1

        return launch

    @staticmethod
    def type_of(name, value, constants):
        if value is None or name in constants:
            return "constexpr"
        if isinstance(value, torch.Tensor):
            return "*" + TYPES[value.dtype]
        return "i32" if isinstance(value, int) else "fp32"


def main():
    seen = Counter()
    names = [name for name in vars(kernels_triton) if name.endswith("_program")]
    launch_triton.kernels_triton = SimpleNamespace(
        **{name: Compiler(getattr(kernels_triton, name), seen) for name in names}
    )
    kernels_torch.kernels_for = lambda _tensor: launch_triton
    for family, options in STEPS:
        for dtype in (torch.float32, torch.bfloat16):
            model = FusedModel(make(family, dtype=dtype, **options), dtype=dtype)
            loss_of_layers(model).mean.backward()


if __name__ == "__main__":
    sys.exit(main())
