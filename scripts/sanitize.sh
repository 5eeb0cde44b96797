#!/usr/bin/env bash
# compute-sanitizer over a small run of every kernel (tests/sanitize_kernels.cu); needs a GPU.
#   scripts/sanitize.sh [memcheck] [racecheck] [initcheck] [synccheck]
# Without names: the first three.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
tools=("$@")
if [[ ${#tools[@]} -eq 0 ]]; then tools=(memcheck racecheck initcheck); fi

find_tool() {
  local name="$1" folder
  for folder in "${CUDA_HOME:+$CUDA_HOME/bin}" "$(dirname "$(command -v "$name" || echo /)")" \
    /usr/local/cuda/bin; do
    if [[ -x "$folder/$name" ]]; then
      echo "$folder/$name"
      return
    fi
  done
  echo "scripts/sanitize.sh needs $name, found none in CUDA_HOME, PATH, /usr/local/cuda" >&2
  return 1
}

nvcc="$(find_tool nvcc)"
sanitizer="$(find_tool compute-sanitizer)"
library="$(PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "$python" -c '
from samoyeds_hf import library
found = library.load()
if found is None:
    raise SystemExit(f"scripts/sanitize.sh needs the kernels: {library.unavailable_reason()}")
print(found.path)')"

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
driver="$folder/sanitize_kernels"
ln -s "$(realpath "$library")" "$folder/libsamoyeds.so" # the name that it is looked for by
"$nvcc" -std=c++17 -O1 -Ikernels/include tests/sanitize_kernels.cu "$folder/libsamoyeds.so" \
  -Xlinker -rpath -Xlinker "$folder" -o "$driver"

echo "== without a sanitizer"
"$driver"
"$driver" --forbidden
"$driver" --wide

# Freshly guarded memory behind every allocation; older sanitizers do not know the option.
options="$("$sanitizer" --help)"
padding=()
if [[ "$options" == *--padding* ]]; then padding=(--padding 4096); fi

status=0
run() {
  local start=$SECONDS
  echo "== $*"
  "$sanitizer" --error-exitcode 1 --tool "$@" || status=1
  echo "== $((SECONDS - start)) s"
}
for tool in "${tools[@]}"; do
  case "$tool" in
    memcheck)
      run memcheck "${padding[@]}" "$driver"
      # NOTE: racecheck would rightly complain here: two rows of a damaged index may be the same.
      run memcheck "${padding[@]}" "$driver" --forbidden
      run memcheck "${padding[@]}" "$driver" --wide
      ;;
    # NOTE: of wide tiles, where slots are filled again, it reports as many hazards as it counts, most
    # likely none: run 85 of the kernel's log.
    racecheck) run racecheck "$driver" ;;
    *)
      run "$tool" "$driver"
      run "$tool" "$driver" --wide
      ;;
  esac
done
exit "$status"
