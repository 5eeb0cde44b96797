#!/usr/bin/env bash
# compute-sanitizer over a small run of every kernel (tests/sanitize_kernels.cu); needs a GPU.
#   scripts/sanitize.sh [memcheck] [racecheck] [initcheck] [synccheck]
# Without names: the first three. For racecheck the kernels are built once more, in a minute or two,
# as it takes some signals between warps for races (kernels/README.md); SAMOYEDS_RACECHECK_LIBRARY
# names a library that was built so.
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
found="$(PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "$python" -c '
import torch
from samoyeds_hf import library
from samoyeds_hf.toolchain import ARCHITECTURES, architectures_for
found = library.load()
if found is None:
    raise SystemExit(f"scripts/sanitize.sh needs the kernels: {library.unavailable_reason()}")
(name,) = architectures_for([torch.cuda.get_device_capability()])
print(found.path, ARCHITECTURES[name], sep="\n")')"
{ read -r library && read -r architecture; } <<<"$found"

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
driver="$folder/library/sanitize_kernels" racecheck_driver="$folder/racecheck/sanitize_kernels"
build_driver() { # of a library, which lies beside it
  mkdir "$2" && ln -s "$(realpath "$1")" "$2/libsamoyeds.so"
  "$nvcc" -std=c++17 -O1 -Ikernels/include tests/sanitize_kernels.cu "$2/libsamoyeds.so" \
    -Xlinker -rpath -Xlinker "$2" -o "$2/sanitize_kernels"
}
build_driver "$library" "$folder/library"

echo "== without a sanitizer"
"$driver"
"$driver" --forbidden
"$driver" --wide

# Freshly guarded memory behind every allocation; older sanitizers do not know the option.
options="$("$sanitizer" --help)"
padding=()
if [[ "$options" == *--padding* ]]; then padding=(--padding 4096); fi

build_racecheck_driver() {
  local library="${SAMOYEDS_RACECHECK_LIBRARY:-$folder/build/libsamoyeds.so}"
  if [[ -z "${SAMOYEDS_RACECHECK_LIBRARY:-}" ]]; then
    echo "== kernels for racecheck"
    {
      cmake -S kernels -B "$folder/build" -DCMAKE_CUDA_COMPILER="$nvcc" -DSAMOYEDS_RACECHECK=ON \
        -DCMAKE_CUDA_ARCHITECTURES="$architecture" &&
        cmake --build "$folder/build" --parallel
    } >"$folder/build.log" 2>&1 || {
      tail -n 20 "$folder/build.log" >&2
      return 1
    }
  fi
  build_driver "$library" "$folder/racecheck"
}

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
    racecheck)
      build_racecheck_driver
      run racecheck "$racecheck_driver"
      run racecheck "$racecheck_driver" --wide
      ;;
    *)
      run "$tool" "$driver"
      run "$tool" "$driver" --wide
      ;;
  esac
done
exit "$status"
