"""The models that bench_models.py leaves out: none may be slower than its plain form.

Of the largest ones a single image, which takes a CPU seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import kernelpose
from benchmarks import bench_models
from benchmarks.bench_models import SUBJECTS, model_subject
from benchmarks.rows import Row
from benchmarks.setup import parameters

MOST_GMACS = 20  # of an image, for a batch of eight
OTHERS = {
    info.name: (model_subject(info.name), batches)
    for info in kernelpose.list_models()
    if (
        batches := tuple(
            batch
            for batch in ((1, 8) if info.gmacs <= MOST_GMACS else (1,))
            if batch not in SUBJECTS.get(info.name, (None, ()))[1]
        )
    )
}


@pytest.mark.parametrize(("subject", "batch", "dtype"), parameters(OTHERS))
def bench_other_model(
    subject: bench_models.Subject,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    compiles: bool,
    record: Callable[[Row], None],
    benchmark: Any,
    request: pytest.FixtureRequest,
) -> None:
    fixtures = (device, compiles, record, benchmark, request)
    bench_models.bench_model(subject, batch, dtype, *fixtures)
