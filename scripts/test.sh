#!/usr/bin/env bash
# Checks and tests, as CI runs them, on a machine with nothing but Python and without a GPU.
#   scripts/test.sh [--matrix] [pytest arguments]
#   --matrix  also the Hugging Face round trips on the oldest transformers that works, but slow ones
# PYTHON and TORCH_SPEC: see setup_env.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh

older_transformers=()
if [[ "${1:-}" == --matrix ]]; then
  older_transformers=(5.13.1)
  shift
fi

setup_env dev,eval
# beside the checks, which take one core; what goes wrong here is tried again, and told, below
for version in ${older_transformers[@]+"${older_transformers[@]}"}; do
  (setup_transformers "$version") >/dev/null 2>&1 &
done
scripts/check.sh
wait

# one thread a worker: threads of several workers on the same cores slow each other down
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# tests bring their own models; one that reaches for the Hub is a mistake
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
cores="$(getconf _NPROCESSORS_ONLN)"
workers=$((cores < 8 ? cores : 8))

# run_tests PYTHON MARKERS [pytest arguments]
run_tests() {
  local python="$1" markers="$2"
  shift 2
  stage "pytest -m '$markers': $("$python" -c '
import platform
from importlib.metadata import version
packages = ("torch", "transformers", "huggingface_hub", "tokenizers")
print("Python", platform.python_version(), *(f"{name} {version(name)}" for name in packages))')"
  "$python" -m pytest -q -n "$workers" -m "$markers" "$@"
}

run_tests "$VENV/bin/python" "not gpu" "$@"
for version in ${older_transformers[@]+"${older_transformers[@]}"}; do
  setup_transformers "$version"
  run_tests "$OVERLAY/bin/python" "roundtrip and not gpu and not slow" "$@"
done
