#!/usr/bin/env bash
# Sets up the environment and runs the whole test suite. usage: ./launcher/test.sh [pytest options]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launcher/environment.sh"
prepare_environment "$root" test
cd "$root"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python -m pytest "$@"
