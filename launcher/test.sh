#!/usr/bin/env bash
# Sets up the environment and runs the whole test suite. usage: ./launcher/test.sh [pytest options]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launcher/environment.sh"
prepare_environment "$root" test
cd "$root"
workers=$(($(env -u OMP_NUM_THREADS nproc) + 1)) # nproc counts by that variable where it is set
# Threads of several processes that wait for each other on few cores would only use them up.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# A cache of its own: torch's default one may hold blocks compiled by another torch, for another
# processor, or by a run that was killed meanwhile.
TORCHINDUCTOR_CACHE_DIR=$(mktemp -d)
export TORCHINDUCTOR_CACHE_DIR
trap 'rm -rf "$TORCHINDUCTOR_CACHE_DIR"' EXIT
# Tests mostly wait for processes, so one more worker than cores. Tests of one file share fixtures, so
# they stay on one worker.
python -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
