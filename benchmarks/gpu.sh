#!/usr/bin/env bash
# `make gpu`: everything that a machine with an NVIDIA GPU can say, in one command and offline.
#
# Builds with CUDA, runs every test (the cuda and triton parity tests with them), compute-sanitizer on
# one case an op, then the benchmarks. Goes on after a failure, so that one run tells all; the exit
# code counts the failed steps. Needs torch, triton, nvcc, cmake, ninja, pybind11 and pytest-benchmark.
#
#   OUT     folder for the log and the JSON (default: gpu-results)
#   WHEELS  folder of wheels to install first, for what the machine lacks (pycocotools)
#   STEPS   of: build test sanitize bench (default: all)
#   BENCH   further arguments for the benchmarks, such as "-k b64" or "--no-compile"
set -u -o pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-results}
STEPS=${STEPS:-build test sanitize bench}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
: > "$OUT/log.txt"
failed=0

step() { # step NAME COMMAND...
  local name=$1 start=$SECONDS
  shift
  case " $STEPS " in *" ${name%%-*} "*) ;; *) return ;; esac
  echo "== $name: $*" | tee -a "$OUT/log.txt"
  if "$@" 2>&1 | tee -a "$OUT/log.txt" | tail -n "${LINES_SHOWN:-40}"; then
    echo "== $name: passed in $((SECONDS - start)) s" | tee -a "$OUT/log.txt"
  else
    failed=$((failed + 1))
    echo "== $name: FAILED after $((SECONDS - start)) s" | tee -a "$OUT/log.txt"
  fi
}

install() {
  if [ -n "${WHEELS:-}" ]; then
    $PYTHON -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl || return 1
  fi
  # The architecture of this GPU alone: a third of the compile time.
  local arch
  arch=$($PYTHON -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return 1
  KERNELPOSE_REQUIRE_CUDA=1 KERNELPOSE_CUDA_ARCHS="$arch" \
    $PYTHON -m pip install --quiet --no-deps --no-build-isolation --editable .
}

sanitize() {
  local tool status=0
  for tool in memcheck racecheck synccheck initcheck; do
    echo "-- $tool"
    # The caching allocator would hide what is out of bounds within its blocks.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --report-api-errors no $PYTHON -m tests.sanitize || status=1
  done
  return "$status"
}

step build install
step build-info $PYTHON -m kernelpose.info
# Not what needs no GPU: the emulator, the interpreter, ptxas, a build that fetches its tools.
step test $PYTHON -m pytest tests --full -q --ignore=tests/emulator --ignore=tests/triton \
  --ignore=tests/test_cuda_resources.py --ignore=tests/test_install.py
step sanitize sanitize
# shellcheck disable=SC2086 # BENCH is words
step bench $PYTHON -m pytest --benchmark --results="$OUT" -q ${BENCH:-}
echo "== $failed of the steps failed" | tee -a "$OUT/log.txt"
exit "$failed"
