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

# Without the paper's penalty on repetitions: the right answers repeat what was asked about.
answers=(evaluate.max_instructions=100 evaluate.max_new_tokens=32 evaluate.repetition_penalty=1)
before="$run_dir/evaluations/before"
after="$run_dir/evaluations/$(cat "$run_dir/checkpoints/latest")"
export OMP_NUM_THREADS=$cores
done_in() { grep -qs '"exact_match"' "$1/summary.json"; }
done_in "$before" ||
  neftune-dist evaluate "$run_dir" --model "$model" --output "$before" "${answers[@]}"
done_in "$after" || neftune-dist evaluate "$run_dir" "${answers[@]}"
[ "$run_dir/export" -nt "$run_dir/checkpoints/latest" ] || neftune-dist export "$run_dir"
python "$root/launcher/summary.py" "$run_dir" "$after" "$0${*:+ $*}"
