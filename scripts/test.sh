#!/usr/bin/env bash
# Run the tests in the project's own .venv; arguments go to pytest, such as -m slow.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
# A process for each core, but not more than the tests of a large machine can feed.
exec pytest -n auto --maxprocesses=8 --dist=worksteal "$@"
