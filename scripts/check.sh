#!/usr/bin/env bash
# The static checks, all or the named ones: scripts/check.sh [ruff|format|mypy|clang-format|typos]...
# Needs the environment of scripts/test.sh, which runs them all; pre-commit runs them one by one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin="$PWD/.venv/bin"

check() {
  printf '==> %s\n' "$1"
  case "$1" in
    ruff) "$bin/ruff" check --quiet . ;;
    format) "$bin/ruff" format --check --quiet . ;;
    mypy) "$bin/mypy" --no-error-summary ;;
    clang-format)
      find kernels -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.hpp' -o -name '*.h' |
        xargs "$bin/clang-format" --dry-run -Werror
      ;;
    typos) "$bin/typos" ;;
    *)
      echo "unknown check '$1'; there are: ruff format mypy clang-format typos" >&2
      return 2
      ;;
  esac
}

for name in "${@:-all}"; do
  if [[ "$name" == all ]]; then
    for each in ruff format typos clang-format mypy; do check "$each"; done
  else
    check "$name"
  fi
done
