#!/usr/bin/env bash
# What wants a GPU, in parts of under ten minutes each: the tests marked gpu, the benchmark, the arms of preset gpu.
#
#     recipes/on_gpu.sh OUT tests bench small scratch weights knowledge both
#
# Hardware: one data-centre GPU. Time: not measured. A part that fails does not stop the next. OUT gets a log of each
# part, the benchmark's JSON and the comparison's results; what is done is kept, so parts may be spread over calls.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "$1") && mkdir -p "$out"
export PYTHONUNBUFFERED=1

part() {
    case $1 in
        tests) python -m pytest -m gpu -q ;;
        bench)
            python recipes/bench_ki.py --sizes 300m --out "$out/bench-300m.json"
            python recipes/bench_ki.py --sizes 1b --out "$out/bench-1b.json"
            ;;
        small) python recipes/ki_plus_growth.py --preset gpu --out "$out" --arms none ;;
        *) python recipes/ki_plus_growth.py --preset gpu --out "$out" --arms "$1" ;;
    esac
}

for name in "${@:2}"; do
    start=$SECONDS
    part "$name" 2>&1 | tee "$out/$name.log"
    echo "$name: exit code ${PIPESTATUS[0]}, $((SECONDS - start)) s" | tee -a "$out/parts.log"
done
