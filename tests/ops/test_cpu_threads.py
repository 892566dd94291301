"""The CPU kernels' own threads, which they use where no OpenMP runtime is loaded."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from kernelpose import _native

SCRIPT = """
import array, ctypes, importlib.util, resource, threading

spec = importlib.util.spec_from_file_location("kernelpose._C", {core!r})
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
assert core.cpu_threads_by() == "std::thread", core.cpu_threads_by()

batch, height, width, heads, head_dim = 4, 8, 8, 2, 8
tokens, channels = batch * height * width, heads * head_dim
shape = (batch, height, width, heads, head_dim, 4, 4, 0, 0, False, False, 0.5)
qkv = array.array("f", [(i * 37 % 101) / 50 - 1 for i in range(tokens * 3 * channels)])

def forward(threads):
    out = array.array("f", [float("nan")]) * (tokens * channels)
    lse = array.array("f", [float("nan")]) * (tokens * heads)
    addresses = [x.buffer_info()[0] for x in (qkv, out, lse)]
    core.cpu_window_attention_forward(addresses[0], 0, *addresses[1:], shape, 0, threads)
    return out.tobytes(), lse.tobytes()

alone = forward(1)
assert forward(3) == alone
# Room for two more threads' stacks, and that there is no more is seen.
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + 2 * min(resource.getrlimit(resource.RLIMIT_STACK)[0], 8 << 20) + (4 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
leave, started = threading.Event(), []
try:
    for _ in range(7):
        started.append(threading.Thread(target=leave.wait))
        started[-1].start()
except RuntimeError:
    print("refused", end=" ")
    started.pop()
leave.set()
for thread in started:
    thread.join()
assert forward(8) == alone
print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_threads_that_the_system_refuses_are_done_without(run_python: Any) -> None:
    """A refused thread is an exception, which must not pass the threads that already run."""
    assert _native.core is not None, _native.import_error
    script = SCRIPT.format(core=_native.core.__file__)
    assert run_python(script).strip() == "refused done"
