#!/usr/bin/env bash
# Train a small GPT on Python's own standard library, and print what it writes. About 3 minutes.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" plots
nanojaxgpt train --config=experiments/quickstart.py --run=runs/quickstart
nanojaxgpt sample runs/quickstart
echo
echo "loss curve: $PWD/runs/quickstart/loss.png"
