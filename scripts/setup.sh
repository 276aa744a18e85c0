# Sourced by quickstart.sh and test.sh: a .venv with this package in it. Usage: . setup.sh [EXTRAS]
#
# Takes the newest Python from 3.12 on, for which jax still makes releases, else 3.11. Needs a
# package index; does nothing twice. PYTHON=3.12 or PYTHON=/usr/bin/python3 names another one, VENV
# another folder, and PIP_CONSTRAINT, pip's own variable, a file of versions to keep to.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}

# Prints the Pythons to try, best first. Those of pyenv are named by their paths too: its
# `python3.13` on PATH may only say that the command is not found.
pythons() {
  local version
  for version in ${PYTHON:-3.14 3.13 3.12 3 3.11}; do
    case $version in
      3*) echo "python$version"
          { ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/$version.*/bin/python3 || true; } \
            2>/dev/null | sort -rV ;;
      *) echo "$version" ;;
    esac
  done
}

if [ ! -x "$venv/bin/python" ]; then
  while read -r python; do
    # A Python without ensurepip, as some distributions ship it, can't make an environment.
    if "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$python" -m venv "$venv"
      break
    fi
  done < <(pythons)
  [ -x "$venv/bin/python" ] || { echo "nanojaxgpt needs Python 3.11 or newer" >&2; exit 2; }
fi
# What was installed for these files is not installed again.
files=(setup.cfg pyproject.toml ${PIP_CONSTRAINT:+"$PIP_CONSTRAINT"})
stamp="$venv/installed-$(cat "${files[@]}" | cksum | cut -d' ' -f1)-${1:-plain}"
if [ ! -e "$stamp" ]; then
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".${1:+[$1]}"
  touch "$stamp"
fi
PATH="$(cd "$venv/bin" && pwd):$PATH"
export PATH
