#!/usr/bin/env bash
# Trains on this node under torchrun: all visible GPUs, or NPROC processes; starts again after a
# failure, from the newest checkpoint. Ctrl-C saves and stops; the same command goes on from there.
# usage: ./launcher/torchrun.sh CONFIG [key=value ...] [--max-restarts N]     NPROC=N: processes
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The environment that quickstart.sh and test.sh make, where there is one; else the caller's own.
[ ! -d "$root/.venv" ] || PATH="$root/.venv/bin:$PATH"
if ! command -v neftune-dist >/dev/null; then
  echo "neftune-dist: not installed; run launcher/test.sh, or pip install -e $root, first." >&2
  exit 2
fi
exec neftune-dist launch --processes "${NPROC:-0}" "$@"
