"""`python -m kernelpose ...` is `kernelpose ...`."""

from __future__ import annotations

import sys

from kernelpose.cli import main

sys.exit(main())
