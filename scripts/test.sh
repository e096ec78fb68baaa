#!/usr/bin/env bash
# Everything that must hold: environment, lint, all tests. Arguments go to pytest (scripts/test.sh -k checkpoint).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

ruff check .
ruff format --check .
# Each file on one of the workers, so that its fixtures (trained runs, servers) are made once; in tests/conftest.py's order.
python -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder --durations 10 "$@"
