#!/usr/bin/env bash
# Run the tests in the project's own .venv; arguments go to pytest (-m slow: those that take minutes).
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
# A process for each core, but not more than the tests of a large machine can feed.
exec pytest -n auto --maxprocesses=8 --dist=worksteal "$@"
