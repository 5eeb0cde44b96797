#!/usr/bin/env bash
# The demo, from a fresh clone: convert a small trained MoE, load it, generate, compare.
#   scripts/demo.sh [arguments of `samoyeds demo`]
# PYTHON and TORCH_SPEC: see setup_env.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh

setup_env
exec "$VENV/bin/samoyeds" demo "$@"
