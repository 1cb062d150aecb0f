#!/usr/bin/env bash
# makes the virtual environment if it is missing and passes the tests; arguments go to pytest: bash tests/run.sh -k reward
set -euo pipefail
cd "$(dirname "$0")/.."
bash speedrun.sh --install-only
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
.venv/bin/python -m pytest -q -n 2 --dist loadfile tests "$@"
