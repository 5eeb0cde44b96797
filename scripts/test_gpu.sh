#!/usr/bin/env bash
# The tests that need a GPU, with the running python3 and what it has: nothing is installed.
#   scripts/test_gpu.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
if ! "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "scripts/test_gpu.sh needs a torch that sees a CUDA GPU, found none with '$python';" \
    "scripts/test.sh runs everything else" >&2
  exit 1
fi
# A kernel that never ends is a failure, not a slow host: the traceback names its test.
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m pytest -q -m gpu \
  -o faulthandler_timeout=120 "$@"
