#!/usr/bin/env bash
# What wants a GPU, in parts: the tests marked gpu, the benchmarks, the arms of the presets gpu and gpu-20.
#
#     recipes/on_gpu.sh OUT tests 300m 1b 8b-head small scratch weights knowledge both
#     recipes/on_gpu.sh OUT small-20 scratch-20 weights-20 knowledge-20 both-20      # of preset gpu-20
#     recipes/on_gpu.sh OUT tokens-20      # the same at 2, 5, 10 and 20 tokens per parameter
#     recipes/on_gpu.sh OUT teacher        # of preset gpu-teacher: a better teacher, seeds 0, 1 and 2
#
# Hardware: one data-centre GPU. Seconds on one H200: tests 40, 300m 70 and 8b-head 32 (with limits of 45 and 25), teacher
# 640 without scratch. A benchmark begins no new round after 100 s. Not measured: 1b, the other arms (a compiled arm begins
# with 30 to 45 of compilation). A part that fails does not stop the next. OUT gets a log of each part, how long it took
# (parts.log), the benchmarks' JSON and the comparison's results; what is done is kept, so parts may be spread over calls.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "$1") && mkdir -p "$out"
export PYTHONUNBUFFERED=1

arms() { python recipes/ki_plus_growth.py --preset "$1" --out "$out/$1" --arms "$2"; }

# Side by side: so small a model leaves the GPU idle between its kernels. What is shared is read and cut into tokens once.
teacher() {
    local seeds=(0 1 2)
    python recipes/ki_plus_growth.py --preset gpu-teacher --out "$out/gpu-teacher-0" --arms none || return
    for seed in "${seeds[@]:1}"; do
        mkdir -p "$out/gpu-teacher-$seed" && cp -rn "$out"/gpu-teacher-0/text-* "$out/gpu-teacher-$seed/"
    done
    for seed in "${seeds[@]}"; do
        python recipes/ki_plus_growth.py --preset gpu-teacher --out "$out/gpu-teacher-$seed" --seed "$seed" &
    done
    wait
}

part() {
    case $1 in
        tests) python -m pytest -m gpu -q ;;
        300m | 1b | 8b-head) python recipes/bench_ki.py --sizes "$1" --limit 100 --out "$out/bench-$1.json" ;;
        small) arms gpu none ;;
        small-20) arms gpu-20 none ;;
        teacher) teacher ;;
        tokens-20) python recipes/tokens_per_parameter.py --preset gpu-20 --out "$out/gpu-20" ;;
        *-20) arms gpu-20 "${1%-20}" ;;
        *) arms gpu "$1" ;;
    esac
}

for name in "${@:2}"; do
    start=$SECONDS
    part "$name" 2>&1 | tee "$out/$name.log"
    echo "$name: exit code ${PIPESTATUS[0]}, $((SECONDS - start)) s" | tee -a "$out/parts.log"
done
