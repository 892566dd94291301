#!/usr/bin/env bash
# `make gpu`: everything that a machine with an NVIDIA GPU can say, in one command and offline.
#
# Builds with CUDA, runs every test (the cuda and triton parity tests with them), compute-sanitizer on
# one case an op, then the benchmarks. Goes on after a failure, so that one run tells all; ends with
# a summary, and exits with 1 if a step failed. Needs torch, triton, nvcc, cmake, ninja, pybind11 and
# pytest-benchmark.
#
#   OUT     folder for the log and the JSON (default: gpu-results)
#   WHEELS  folder of wheels to install first, for what the machine lacks (pycocotools)
#   STEPS   of: build test sanitize bench, or one sanitizer tool as in sanitize-memcheck
#           (default: build test sanitize bench)
#   TEST    further arguments for the tests, such as "tests/ops -k cuda" (default: all)
#   BENCH   further arguments for the benchmarks, such as "-k b64" or "--no-compile"; by default
#           the models of bench_zoo.py are left out, which take long
set -u -o pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-results}
STEPS=${STEPS:-build test sanitize bench}
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 # so that the log of a run that is cut off holds all that was said
TOOLS="memcheck racecheck synccheck initcheck"
for name in $STEPS; do
  case "$name" in
    build | test | sanitize | bench) continue ;;
  esac
  case " $TOOLS " in *" ${name#sanitize-} "*) [ "$name" != "${name#sanitize-}" ] && continue ;; esac
  echo "STEPS holds '$name'; expected build, test, sanitize, sanitize-<tool> or bench." >&2
  exit 2
done
mkdir -p "$OUT"
: > "$OUT/log.txt"
summary=()
failed=0

step() { # step NAME COMMAND...
  local name=$1 start=$SECONDS verdict=passed
  shift
  case " $STEPS " in *" ${name%%-*} "* | *" $name "*) ;; *) return ;; esac
  echo "== $name: $*" | tee -a "$OUT/log.txt"
  "$@" 2>&1 | tee -a "$OUT/log.txt" || { verdict=FAILED failed=1; }
  summary+=("== $name: $verdict after $((SECONDS - start)) s")
  echo "${summary[-1]}" | tee -a "$OUT/log.txt"
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

sanitize() { # sanitize TOOL
  # The caching allocator would hide what is out of bounds within its blocks.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 \
    --report-api-errors no $PYTHON -m tests.sanitize
}

step build install
step build-info $PYTHON -m kernelpose.info
# Not what needs no GPU: the emulator, ptxas, a build that fetches its tools.
# shellcheck disable=SC2086 # TEST and BENCH are words
step test $PYTHON -m pytest ${TEST:-tests} --full -q --ignore=tests/emulator \
  --ignore=tests/triton/test_aot.py --ignore=tests/test_cuda_resources.py \
  --ignore=tests/test_install.py
for tool in $TOOLS; do step "sanitize-$tool" sanitize "$tool"; done
# shellcheck disable=SC2086
step bench $PYTHON -m pytest --benchmark --results="$OUT" -q ${BENCH:---ignore=benchmarks/bench_zoo.py}
printf '%s\n' "${summary[@]}" | tee -a "$OUT/log.txt"
exit "$failed"
