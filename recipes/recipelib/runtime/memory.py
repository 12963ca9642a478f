"""Measures the memory that training takes in this process."""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager


def gib(size: float) -> str:
    """Bytes in GiB, with two digits and without the unit."""
    return f"{size / 2**30:.2f}"


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


class MemoryMeter:
    """The memory that training takes beyond what the process held when the meter was made.

    Make it before the model is loaded, and let what is measured run while it is `sampling`. On a
    GPU it reports `torch.cuda.max_memory_allocated` over all devices of this process.

    On CPU a thread samples the counterpart of that figure: the resident memory less what glibc's
    heap holds free. Aligned blocks, such as torch's, leave free holes in the heap that may add up
    to more than what is in use; their size depends on everything allocated before. (With the
    environment variable MALLOC_MMAP_THRESHOLD_=1000000 there are no holes, at the price of speed.)
    A free block that was never written was not resident either, so this figure can be too small.
    The heap's own count of what is in use, plus the mapped file pages, is therefore sampled too,
    and the larger of the two peaks is reported. The thread lives from `restart` to `stop`, or until
    nothing refers to the meter any more.
    """

    def __init__(self) -> None:
        import psutil
        import torch  # noqa: F401, whose own size is none of the training's

        self._process = psutil.Process()
        try:
            self._mallinfo = ctypes.CDLL(None).mallinfo2
            self._mallinfo.restype = _Mallinfo
        except (AttributeError, OSError, TypeError):  # no glibc, or one before 2.33
            self._mallinfo = _Mallinfo
        self._peak = self._start = self._now()
        self._stopped: threading.Event | None = None  # where a thread samples

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """A context whose peak counts; the thread ends with it, however that is."""
        self.restart()
        try:
            yield
        finally:
            self.stop()

    def restart(self) -> None:
        """Sample from now on, and forget the peak so far; peaks count from the level at which the
        meter was made.
        """
        import torch

        if torch.cuda.is_available() and torch.cuda.is_initialized():
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
        self._peak = self._start
        if self._stopped is None:
            self._stopped = threading.Event()
            watched = (weakref.ref(self), self._stopped)
            threading.Thread(target=_watch, args=watched, name="memory meter", daemon=True).start()

    def _now(self) -> list[int]:
        """Bytes: resident less free in the heap; in use in the heap plus mapped; resident."""
        process, heap = self._process.memory_info(), self._mallinfo()
        used = heap.uordblks + heap.hblkhd + getattr(process, "shared", 0)
        return [process.rss - heap.fordblks, used, process.rss]

    def _sample(self) -> None:
        self._peak = [*map(max, self._peak, self._now())]

    def stop(self) -> int:
        """End the sampling, if there is any, and return the peak in bytes."""
        import torch

        if self._stopped is not None:
            self._stopped.set()
            self._stopped = None
            self._sample()
        if torch.cuda.is_available():
            return sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
        return max(self._peak[0] - self._start[0], self._peak[1] - self._start[1])

    @property
    def resident(self) -> int:
        """The peak of the resident memory in bytes, the heap's holes included."""
        return self._peak[2] - self._start[2]


def _watch(meter: weakref.ref[MemoryMeter], stopped: threading.Event) -> None:
    """Sample until the meter is stopped or gone."""
    pause = 0.05
    while not stopped.wait(pause):
        start = time.thread_time()
        if (there := meter()) is None:
            return
        there._sample()
        del there
        # glibc walks through all holes, which takes some milliseconds: sampling gets a hundredth of
        # the time.
        pause = max(0.05, 100 * (time.thread_time() - start))
