"""Traces longer than memory: written piece by piece, mapped from their file, counted in pieces."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, threading, time
from pathlib import Path
import torch
from moe_lab import RouterConfig, RoutingTrace
from moe_lab.study import Document, TraceInfo, write_trace

LAYERS, TOP_K, EXPERTS, PART = 32, 2, 64, 2**16
parts, path = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)

def megabytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024

def pieces():
    for i in range(parts):
        ids_LTK = torch.randint(0, EXPERTS, (LAYERS, PART, TOP_K), dtype=torch.uint8)
        document = Document(f"part {i}", "any", "", 0, PART)
        info = TraceInfo("long", "", "", {}, RouterConfig(), EXPERTS, TOP_K, tuple(range(LAYERS)), (document,))
        zero_T, position_T = torch.zeros(PART, dtype=torch.int32), torch.arange(PART, dtype=torch.int32)
        yield RoutingTrace(info, ids_LTK, None, None, None, zero_T, position_T, torch.ones(PART, dtype=torch.bool))

peak = 0

def watch():
    global peak
    while True:
        peak = max(peak, megabytes())
        time.sleep(0.002)

before = megabytes()
threading.Thread(target=watch, daemon=True).start()
write_trace(path, pieces())
written, peak = peak - before, 0
trace = RoutingTrace.load(path)
total = int(trace.counts_LE.sum())
assert trace.num_tokens == parts * PART
assert total == parts * PART * LAYERS * TOP_K
print(written, peak - before)
"""


def grown(parts, path):
    """Most megabytes of own memory, above those of the imports, while writing, and while loading and counting."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(parts), str(path)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent, timeout=1000,
    )  # fmt: skip
    return [float(number) for number in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads its own memory from /proc")
@pytest.mark.parametrize(
    "parts", [pytest.param(8, marks=pytest.mark.slow), pytest.param(153, marks=pytest.mark.soak)], ids=["0.5M", "10M"]
)
def test_memory_does_not_grow_with_the_trace(parts, tmp_path):
    # One part of ids is 4 MB; half a million tokens' ids are 33 MB and ten million's 640 MB.
    written, counted = grown(parts, tmp_path / "long.safetensors")
    assert written < 80
    assert counted < 80
