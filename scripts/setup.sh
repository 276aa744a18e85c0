# Sourced by quickstart.sh and test.sh: a .venv with this package in it. Usage: . setup.sh [EXTRAS]
# Needs Python 3.11 or newer and a package index; does nothing twice.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/python ]; then
  for python in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$python" -m venv .venv
      break
    fi
  done
  [ -x .venv/bin/python ] || { echo "nanojaxgpt needs Python 3.11 or newer" >&2; exit 2; }
fi
# What was installed for these files is not installed again.
stamp=".venv/installed-$(cat setup.cfg pyproject.toml | cksum | cut -d' ' -f1)-${1:-plain}"
if [ ! -e "$stamp" ]; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${1:+[$1]}"
  touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
