"""The process under the sanitizers: LIBRARY CALLS RESULTS, see run.py. Imports numpy alone."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pickle
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


def main() -> None:
    library, given, answer = sys.argv[1:]
    functions = load(library)
    results = []
    for name, args, settings in pickle.loads(Path(given).read_bytes()):
        passed = each(lambda a: DeviceMemory(a) if isinstance(a, np.ndarray) else a, list(args))
        os.environ.update(settings)
        value = functions(name)(*each(lambda a: getattr(a, "address", a), passed))
        for setting in settings:
            del os.environ[setting]
        after = each(lambda a: a.contents() if isinstance(a, DeviceMemory) else a, passed)
        results.append((value, after))
    Path(answer).write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main()
