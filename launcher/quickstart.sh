#!/usr/bin/env bash
# Fine-tunes SmolLM2-135M-Instruct with NEFTune on the built-in instructions, evaluates and exports
# it, and shows what was learned. Run again, it resumes, or says that it is done.
# usage: ./launcher/quickstart.sh [key=value ...]     NPROC=N: processes (default: all GPUs, or 2)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launcher/environment.sh"
prepare_environment "$root" quickstart

model="${XDG_CACHE_HOME:-$HOME/.cache}/neftune_dist/smollm2-135m-instruct"
run_dir=
slug=
for word in "$@"; do
  case $word in
    run_dir=*) run_dir=${word#run_dir=} ;;
    *) slug+="-$(printf %s "$word" | tr -c 'A-Za-z0-9' '-')" ;;
  esac
done
# Other settings are another run.
run_dir=${run_dir:-"$root/runs/quickstart$slug"}
words=("$root/configs/quickstart.yaml" "model.name_or_path=$model" "$@" "run_dir=$run_dir")

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
nproc=${NPROC:-$((gpus > 0 ? gpus : 2))}
# One thread a process where the cores are shared out; more where there are more.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}

python "$root/launcher/smollm2.py" "$model"
neftune-dist prepare "${words[@]}"
neftune-dist launch "${words[@]}" --processes "$nproc"

before="$run_dir/evaluation_before.json"
after="$run_dir/evaluation_after.json"
answers=(--answers 100 --max-new-tokens 32) # twice the longest built-in answer
export OMP_NUM_THREADS=$cores
[ -e "$before" ] ||
  neftune-dist evaluate "$run_dir" --model "$model" "${answers[@]}" --output "$before"
if [ ! -e "$after" ] || [ "$run_dir/checkpoints/latest" -nt "$after" ]; then
  neftune-dist export "$run_dir"
  neftune-dist evaluate "$run_dir" "${answers[@]}" --output "$after"
fi
python "$root/launcher/summary.py" "$run_dir" "$0${*:+ $*}"
