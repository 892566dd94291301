"""The process under the sanitizers, LIBRARY, see run.py. Imports numpy alone.

Reads requests from standard input, each a line of JSON: the files of the calls, of their results
and of what goes wrong, and the seconds they may take. Answers each by a fork of its own, which has
the library loaded already, and writes how that exited.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def load(path: str) -> Callable[[str], Callable[..., Any]]:
    """Functions by name, of a Python extension module or of a plain library."""
    name, *suffix = Path(path).name.split(".")
    if suffix != ["so"]:
        sys.setdlopenflags(os.RTLD_LAZY)  # functions that nobody calls may be missing
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return lambda function: getattr(module, function)
    library = ctypes.CDLL(path)

    def call(function: str) -> Callable[..., Any]:
        kinds = {int: ctypes.c_int64, float: ctypes.c_float}
        return lambda *args: library[function](*(kinds[type(a)](a) for a in args))

    return call


class DeviceMemory:
    """A copy of an array, aligned as cudaMalloc does, between redzones of the sanitizer."""

    def __init__(self, array: np.ndarray) -> None:
        libc = ctypes.CDLL(None)  # finds the sanitizer's allocator first
        self.array = array
        address = ctypes.c_void_p()
        size = ctypes.c_size_t(array.nbytes)
        if libc.posix_memalign(ctypes.byref(address), ctypes.c_size_t(256), size) != 0:
            raise MemoryError(f"no room for an array of shape {array.shape}")
        assert address.value is not None
        self.address = address.value
        ctypes.memmove(self.address, array.ctypes.data, array.nbytes)

    def contents(self) -> np.ndarray:
        result = np.empty_like(self.array)
        ctypes.memmove(result.ctypes.data, self.address, result.nbytes)
        return result


def each(function: Callable[[Any], Any], given: Any) -> Any:
    """Of one argument, or of each in a list."""
    return [each(function, g) for g in given] if isinstance(given, list) else function(given)


def answer(functions: Callable[[str], Callable[..., Any]], given: str, results_file: str) -> None:
    results = []
    for name, args, settings in pickle.loads(Path(given).read_bytes()):
        passed = each(lambda a: DeviceMemory(a) if isinstance(a, np.ndarray) else a, list(args))
        os.environ.update(settings)
        value = functions(name)(*each(lambda a: getattr(a, "address", a), passed))
        for setting in settings:
            del os.environ[setting]
        after = each(lambda a: a.contents() if isinstance(a, DeviceMemory) else a, passed)
        results.append((value, after))
    Path(results_file).write_bytes(pickle.dumps(results))


def main() -> None:
    (library,) = sys.argv[1:]
    functions = load(library)
    for line in sys.stdin:
        given, results, report, seconds = json.loads(line)
        process = os.fork()
        if process == 0:
            os.dup2(os.open(report, os.O_WRONLY | os.O_CREAT), 2)
            signal.alarm(seconds)
            answer(functions, given, results)
            os._exit(0)  # an exception leaves the loop, and the process, as well
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
