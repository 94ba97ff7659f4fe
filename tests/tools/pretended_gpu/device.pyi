"""The pretended GPUs, cuda:0 and cuda:1, as a test sees them. `tests.tools.device_library` compiles `device.cpp`."""

from collections.abc import Callable

def launches() -> int:
    """Operations since the last `reset`: on a GPU, each would launch a kernel or more."""

def operations() -> dict[str, int]:
    """Operation -> how often it ran. Copies are called "copy", "copy to the device", "copy to the host"."""

def waits() -> dict[str, int]:
    """Operation -> how often the host would have waited in it for the device."""

def note_wait(name: str) -> None:
    """Count a wait that Python's side of PyTorch would have done."""

def on_operation(callback: Callable[[str], object] | None) -> None:
    """Call `callback`, on the thread that asks for it, with each operation; it may raise. None: call nobody."""

def on_wait(callback: Callable[[str], object] | None) -> None:
    """Call `callback`, on the thread that waits, with each wait's operation; it may raise. None: call nobody."""

def bytes_now(index: int = 0) -> int:
    """Bytes that are taken on `cuda:index`."""

def bytes_most(index: int = 0) -> int:
    """The most that has been taken since the last `reset`."""

def bytes_limit(index: int = 0) -> int:
    """What `limit` has set."""

def limit(size: int, index: int = 0) -> None:
    """Let `cuda:index` have `size` bytes; what is taken stays. More raises `torch.OutOfMemoryError`."""

def current_device() -> int:
    """The index of this thread's current device."""

def reset() -> None:
    """Forget what was counted, on both devices; what is taken now is the most again."""
