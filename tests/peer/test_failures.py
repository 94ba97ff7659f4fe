"""What failures of torch's own mean, in the words of each kind of device."""

import pytest
import torch

from peer.span.failures import is_of_the_device, is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        torch.AcceleratorError("HIP error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB)"),
        RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
    ids=str,
)
def test_memory_is_short(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_of_the_device(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`"),
        RuntimeError("HIP error: unspecified launch failure"),
        RuntimeError("level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)"),
    ],
    ids=str,
)
def test_the_device_refuses(error: Exception) -> None:
    assert is_of_the_device(error)
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("shape"), ValueError("CUDA error"), TypeError("out of memory")])
def test_a_failure_of_the_code_is_neither(error: Exception) -> None:
    assert not is_of_the_device(error)
    assert not is_out_of_memory(error)
