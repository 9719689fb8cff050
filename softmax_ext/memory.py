"""What is kept of the memory of large CPU results."""

from __future__ import annotations

from dataclasses import dataclass

from softmax_ext._loader import load

_C = load()


@dataclass(frozen=True)
class MemoryStats:
    """What is kept of the memory of freed CPU results of 32 MB and more, for the next ones.

    Attributes:
        kept_bytes: bytes kept. The operating system has leave to take them.
        kept_blocks: blocks they are in, one for each result; 16 at most.
        limit_bytes: the most that is kept: 512 MB, or what the environment variable
            SOFTMAX_EXT_KEEP_MB says; 0 while the address space of the process is limited
            (RLIMIT_AS, RLIMIT_DATA).
    """

    kept_bytes: int
    kept_blocks: int
    limit_bytes: int


def memory_stats() -> MemoryStats:
    """What is kept of the memory of large CPU results. May be called from any thread.

    Example:
        >>> stats = memory_stats()
        >>> stats.kept_bytes <= stats.limit_bytes
        True
    """
    return MemoryStats(*_C.memory_stats())


def empty_cache() -> None:
    """Gives the memory that is kept of large CPU results back to the operating system.

    As torch.cuda.empty_cache for a GPU's: no tensor changes, and the next large results have new
    memory. May be called from any thread.

    Example:
        >>> empty_cache()
        >>> memory_stats().kept_blocks
        0
    """
    _C.empty_cache()
