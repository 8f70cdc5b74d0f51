#!/bin/sh
# `make gpu`: the library built, tested and raced on a machine with a GPU, in under 9 minutes.
#
#     PYTHON=python3 OUT=FOLDER [COMMIT=ID] sh benchmarks/gpu.sh TEST_FILE...
#
# For a rented machine, where torch, triton, pytest, pytest-benchmark and nvcc are there and the
# internet is not: everything runs from the checkout as it lies there, and nothing is installed.
# Every part runs even if an earlier one failed, and the exit status says whether one did. OUT gets
# gpu.md, which says how each part went, a log a part, and <gpu>.json and <gpu>.png.
set -u

BUILT=100 TESTED=250 MEASURED=420 RACED=475 SANITIZED=530 # by these seconds a part is ended
LOG_BYTES=200000

started=$(date +%s)
rows=
failed=0

left() { # the seconds until SECOND of this run
  echo $(($1 - $(date +%s) + started))
}

report() {
  {
    echo "# make gpu"
    echo
    echo "$(date -u +%Y-%m-%dT%H:%M:%SZ), commit ${COMMIT:-${commit:-unknown}}"
    echo
    echo "| part | result | seconds |"
    echo "|---|---|---|"
    printf '%b' "$rows"
    echo
    echo '```text'
    cat "$OUT/gpu.info"
    echo '```'
  } >"$OUT/gpu.partial"
  mv "$OUT/gpu.partial" "$OUT/gpu.md"
}

part() { # NAME SECOND COMMAND...: its log, and a row of the report
  name=$1 limit=$(left "$2") began=$(date +%s)
  shift 2
  echo "== $name"
  log="$OUT/gpu-$name.txt"
  # In the background, so that the trap can end it; timeout ends what it has started, too.
  timeout --kill-after=15 "$limit" "$@" >"$log" 2>&1 &
  running=$!
  wait "$running"
  status=$?
  running=
  tail -c "$LOG_BYTES" "$log" >"$log.partial"
  mv "$log.partial" "$log"
  tail -n 20 "$log"
  case $status in
    0) result=passed ;;
    124 | 137) result="**not done within $limit s**" ;;
    *) result="**failed, exit status $status**" ;;
  esac
  [ "$status" -eq 0 ] || failed=1
  rows="$rows| $name | $result | $(($(date +%s) - began)) |\n"
  report
}

running=
trap '[ -z "$running" ] || kill "$running"; exit 130' INT TERM

"$PYTHON" -c "import torch, sys
torch.cuda.is_available() or sys.exit('make gpu needs a CUDA GPU, and torch sees none here')" ||
  exit 1
mkdir -p "$OUT" || exit 1
commit=$(git rev-parse HEAD 2>/dev/null) || commit=

echo "not built" >"$OUT/gpu.info"
part build $BUILT env JEPA_FAST_BUILD=cuda "$PYTHON" -m jepa_fast.cli build
"$PYTHON" -m jepa_fast.cli info >"$OUT/gpu.info" 2>&1
# Triton compiles a thousand kernels for the tests: too many for one process.
workers=
"$PYTHON" -c "import xdist" 2>/dev/null && workers="-n auto --maxprocesses 8"
# shellcheck disable=SC2086  # several words, or none
part tests $TESTED "$PYTHON" -m pytest -q $workers -m tier3 "$@"
part bench $RACED "$PYTHON" -m jepa_fast.cli bench --device cuda --output "$OUT" \
  --budget "$(left $MEASURED)" --check-floors --allow-dirty ${COMMIT:+--commit "$COMMIT"}
if command -v compute-sanitizer >/dev/null; then
  # In this process alone, and with memory of its own for each tensor: within the large pieces that
  # torch's allocator cuts up, an access beside a tensor is none outside of memory.
  part sanitizer $SANITIZED env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --error-exitcode 1 "$PYTHON" -m pytest -q -m tier3 \
    -k "strides or beside" "$@"
else
  rows="$rows| sanitizer | left out: there is no compute-sanitizer | 0 |\n"
  report
fi
rm "$OUT/gpu.info"
cat "$OUT/gpu.md"
exit $failed
