# Sourced by the other scripts: `setup_env [extras]` makes .venv and exports VENV, its path.
#   PYTHON      interpreter, python3 unless set (3.10 or newer)
#   TORCH_SPEC  what pip installs first as torch, torch==2.13.0 unless set

stage() { printf '==> %s\n' "$*"; }

# setup_env            the package as a user has it
# setup_env dev,eval   with these extras; a later run without extras then installs nothing
setup_env() {
  local extras="${1:-}" python="${PYTHON:-python3}" torch="${TORCH_SPEC:-torch==2.13.0}" key found
  export VENV="$PWD/.venv"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    found="$("$python" --version 2>/dev/null)" || found="no such command"
    echo "samoyeds-hf needs Python 3.10 or newer, found '$python' ($found);" \
      "name another one: PYTHON=python3.12 $0" >&2
    return 1
  fi

  # a folder that was moved or an interpreter that changed needs a new environment
  key="$("$python" -c 'import sys; print(sys.version, sys.base_prefix)') $PWD"
  if [[ "$(cat "$VENV/.made-for" 2>/dev/null)" != "$key" ]]; then
    if [[ -e "$VENV" && ! -e "$VENV/.made-for" ]]; then
      echo "$0 makes its own .venv, found one that it did not make; move or delete $VENV" >&2
      return 1
    fi
    stage "environment: $("$python" --version) in .venv"
    mkdir -p "$VENV"
    echo "unfinished" >"$VENV/.made-for"
    rm -rf "$VENV"/.installed-* "$VENV"/*
    "$python" -m venv "$VENV"
    echo "$key" >"$VENV/.made-for"
  fi

  key="$(cat pyproject.toml - <<<"$torch" | cksum)"
  if [[ "$(cat "$VENV/.installed-${extras:-base}" 2>/dev/null)" == "$key" ]]; then return; fi
  rm -rf "$VENV"/.installed-* "$VENV/matrix"
  # torch by itself: a range, here or in a dependency, would take another and larger build
  stage "installing $torch"
  _pip install "$torch"
  stage "installing samoyeds-hf${extras:+ with $extras}"
  _pip install --editable ".${extras:+[$extras]}"
  echo "$key" | tee "$VENV/.installed-base" >"$VENV/.installed-${extras:-base}"
}

# setup_transformers VERSION: exports OVERLAY, an environment with that transformers release (and
# the huggingface_hub and tokenizers that it wants) in front of everything in .venv.
setup_transformers() {
  export OVERLAY="$VENV/matrix/$1"
  if [[ -e "$OVERLAY/.installed" ]]; then return; fi
  stage "installing transformers==$1"
  "$VENV/bin/python" -m venv --clear --without-pip "$OVERLAY"
  local purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
  # addsitedir, not a bare path: it also reads the editable install's .pth file
  echo "import site; site.addsitedir('$("$VENV/bin/python" -c "$purelib")')" \
    >"$("$OVERLAY/bin/python" -c "$purelib")/base.pth"
  "$OVERLAY/bin/python" -m pip install --disable-pip-version-check -qq "transformers==$1"
  touch "$OVERLAY/.installed"
}

_pip() { "$VENV/bin/python" -m pip --disable-pip-version-check -qq "$@"; }
