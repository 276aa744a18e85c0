#!/usr/bin/env bash
# Run the tests in the project's own .venv; arguments go to pytest (-m slow: those that take minutes).
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
exec pytest "$@"
