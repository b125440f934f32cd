#!/usr/bin/env bash
# Spends ten minutes on a GPU, first on what golden/gpu/README.md lists as not measured. Every stage has its own limit and
# none stops another; results lie in OUT as soon as they are made, so that a kill loses nothing.
# usage: tests/benchmarks/gpu.sh          SECONDS_ALL=575 for all of it; OUT=runs/benchmarks; TINY=1 tries it on a CPU
# Without a network: packages that the machine lacks, as wheels in .whl/ at the root, are taken from there.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
all=${SECONDS_ALL:-575} out=${OUT:-runs/benchmarks} python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$out"
exec > >(tee -a "$out/log.txt") 2>&1

stage() { # NAME MOST_SECONDS COMMAND...
  local name=$1 most=$2 left=$((all - SECONDS))
  shift 2
  ((most < left)) || most=$left
  if ((most < 10)); then
    echo "== $name: not begun, $left s are left"
    return
  fi
  echo "== $name: at most $most s of $left"
  timeout -k 5 "$most" "$@"
  echo "== $name: exit code $?, $SECONDS s in all"
}
gpu() { # NAME MOST_SECONDS OPTIONS...
  local name=$1 most=$2 left=$((all - SECONDS))
  shift 2
  ((most < left)) || most=$left
  stage "$name" "$most" "$python" tests/benchmarks/gpu.py ${TINY:+--tiny} --out "$out" --seconds $((most - 5)) "$@"
}

nvidia-smi
"$python" --version
if [ -d .whl ]; then
  stage "install wheels" 60 "$python" -m pip install -q --no-index --no-deps --upgrade --target .whl/site .whl/*.whl
  PYTHONPATH=$PWD:$PWD/.whl/site
fi
gpu "one step" 65 --exactly "4096 full"
gpu "FSDP2 compiled, float8, ZeRO-3, a save" 270 --exactly "4096 selective compile" \
  "4096 selective compile single float8" "4096 full zero3" save
stage "tests/gpu" 150 "$python" -m pytest tests/gpu -q -n 8 -p no:cacheprovider --timeout 120 --tb=short -rfs
gpu "the other parts" "$all" --again
