from __future__ import annotations

import pytest

from fintune.errors import ResourceError
from fintune.util.memory import advice_on_memory, is_out_of_memory


def test_the_cpus_allocator_is_one_line_with_the_advice():
    torch = pytest.importorskip("torch")
    with (
        pytest.raises(ResourceError) as caught,
        advice_on_memory("set predict.batch_size=2", during="decoding"),
    ):
        torch.empty(10**15)
    told = str(caught.value)
    assert told.startswith("out of memory while decoding (DefaultCPUAllocator: can't allocate memory: you tried to ")
    assert told.endswith(": set predict.batch_size=2")
    assert "\n" not in told


def test_out_of_memory_error_has_one_line():
    torch = pytest.importorskip("torch")
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")
    with (
        pytest.raises(
            ResourceError, match=r"^out of memory \(CUDA out of memory\. Tried to allocate 2\.00 GiB\.\): less$"
        ),
        advice_on_memory(lambda: "less"),
    ):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] data. DefaultCPUAllocator: not enough memory: you tried"),
    ],
    ids=str,
)
def test_other_forms_are_known_too(error):
    assert is_out_of_memory(error)
    with pytest.raises(ResourceError, match=r"^out of memory.*: less$"), advice_on_memory("less"):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory"), KeyError("x")], ids=str)
def test_what_is_something_else_passes_and_asks_for_no_advice(error):
    def advice():
        raise AssertionError("asked for")

    with pytest.raises(type(error)) as caught, advice_on_memory(advice):
        raise error
    assert caught.value is error
