"""What a failure of torch's own means: memory is short, or a device is broken. torch has many names for both."""

import torch

_SHORT = (
    "can't allocate memory",
    " error: out of memory",  # CUDA's and HIP's
    "BLAS_STATUS_ALLOC_FAILED",  # of cuBLAS and hipBLAS
    "MPS backend out of memory",
    "UR_RESULT_ERROR_OUT_OF_",  # Intel's: DEVICE_MEMORY, HOST_MEMORY, RESOURCES
)
_REFUSED = ("CUDA error", "HIP error", "UR_RESULT_ERROR")
"""Both in the text of a RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory for what was to be computed, on the device or beside it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SHORT)


def is_of_the_device(error: BaseException) -> bool:
    """Whether a GPU refused, for another reason than memory. It may compute on, or never again: see `Span.computes`."""
    is_its_own = isinstance(error, torch.AcceleratorError) or any(text in str(error) for text in _REFUSED)
    return isinstance(error, RuntimeError) and is_its_own and not is_out_of_memory(error)


def is_of_the_machine(error: BaseException) -> bool:
    """Whether memory or a device failed, whatever was to be computed."""
    return is_out_of_memory(error) or is_of_the_device(error)
