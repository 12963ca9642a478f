"""The meter says what training took, and nothing of what was there before."""

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from recipelib.runtime import memory
from recipelib.runtime.memory import MemoryMeter

MIB = 2**20
ROOT = Path(__file__).resolve().parents[3]

PEAK = """
import time
import numpy as np
from recipelib.runtime.memory import MemoryMeter
before = np.ones(200 * 2**20, dtype=np.uint8)
meter = MemoryMeter()
meter.restart()
during = np.ones(150 * 2**20, dtype=np.uint8)
time.sleep(0.5)
del during
print(meter.stop(), meter.resident, len(before))
"""


def test_memory_counts_the_peak_after_the_start_though_it_was_freed():
    # In a process of its own: what others allocated before may be given back meanwhile.
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", PEAK],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    peak, resident, _ = map(int, done.stdout.split())
    assert 140 * MIB < peak < 200 * MIB
    assert 140 * MIB < resident < 200 * MIB


def test_memory_from_before_the_start_does_not_count_and_the_thread_ends():
    np.ones(200 * MIB, dtype=np.uint8).sum()
    threads = set(threading.enumerate())
    meter = MemoryMeter()
    assert set(threading.enumerate()) == threads
    with suppress(ZeroDivisionError), meter.sampling():
        (started,) = set(threading.enumerate()) - threads
        assert started.daemon
        time.sleep(0.1)
        raise ZeroDivisionError
    assert 0 <= meter.stop() < 100 * MIB
    started.join(timeout=2)
    assert not started.is_alive()


def test_the_thread_ends_with_a_meter_that_nobody_stops():
    threads = set(threading.enumerate())
    meter = MemoryMeter()
    meter.restart()
    (started,) = set(threading.enumerate()) - threads
    del meter
    started.join(timeout=5)
    assert not started.is_alive()


def test_after_a_restart_only_the_later_peak_counts_above_the_first_start():
    meter = MemoryMeter()
    meter.restart()
    kept = np.ones(60 * MIB, dtype=np.uint8)
    early = np.ones(150 * MIB, dtype=np.uint8)
    time.sleep(0.5)
    del early
    meter.restart()
    assert 50 * MIB < meter.stop() < 110 * MIB
    assert len(kept) == 60 * MIB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")
def test_holes_in_the_heap_are_resident_but_not_in_use():
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "recipes")!r})
import ctypes, torch
ctypes.CDLL(None).mallopt(-3, 2**30)  # all blocks in the heap
from recipelib.runtime.memory import MemoryMeter
meter = MemoryMeter()
blocks = [torch.ones(2**18) for _ in range(400)]  # a MiB each
for index in range(0, 399):
    if index % 4:
        blocks[index] = None  # the kept ones stand between the holes
meter.restart()
print(meter.stop(), meter.resident)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    used, resident = map(int, done.stdout.split())
    assert 390 * MIB < resident < 440 * MIB
    assert 95 * MIB < used < 140 * MIB


def test_without_glibc_the_resident_memory_counts(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    meter = MemoryMeter()
    meter.restart()
    block = np.ones(150 * MIB, dtype=np.uint8)
    assert 140 * MIB < meter.stop() < 200 * MIB
    assert len(block) == 150 * MIB
