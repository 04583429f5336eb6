#!/usr/bin/env bash
# Measures on one GPU what docs/benchmarks.md lacks: under eight minutes, without network.
#
#     tools/accelerator_day.sh OUT               # a folder; each result is in it as soon as it is there
#     tools/accelerator_day.sh --rehearse OUT    # the same steps on the CPU, at tiny sizes
#
# Each step has a time limit. OUT/results.jsonl has a line for each, failed ones too, OUT/NAME.log what it printed, and
# OUT/table.md the table; it is written again after every step, so that it is there when time runs out.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

device=cuda slack=1
if [[ ${1:-} == --rehearse ]]; then device=cpu slack=4; shift; fi
out=${1:?usage: tools/accelerator_day.sh [--rehearse] OUT}
mkdir -p "$out" || exit 1
: > "$out/results.jsonl"

step() {  # step NAME SECONDS COMMAND...
    local name=$1 limit=$(($2 * slack)) begun=$SECONDS status
    shift 2
    timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1
    status=$?
    python -m tools.accelerator_table --step "$name" --status "$status" --seconds "$((SECONDS - begun))" "$out" -- "$@"
    echo "$name: exit status $status after $((SECONDS - begun)) s"
}

if [[ $device == cuda ]]; then
    big=(--body 8b --device cuda --dtype bfloat16) marker=gpu chosen=gpu numbers=1000 launch=nccl
    decode=(--problems 64 --naive-problems 2 --attempts 2 --greedy 2)
    update=(--canvases 64 --naive-canvases 4 --batch 4096)
    sweep=(--rows 128 --length 64 --forwards 8192 16384 32768 65536 --chunks 25 26 27 28 29)
    loss=(--width 4096 --vocabulary 126464 --loss-rows 16 --tokens 128 --loss-chunks 23 24 25 26 27)
else
    big=(--body tiny --device cpu --dtype float32) marker="not slow" chosen=gradients numbers=5 launch=gloo
    decode=(--vocabulary 30 --problems 2 --naive-problems 1 --attempts 1 --length 8 --block 4 --greedy 1)
    update=(--vocabulary 30 --tokens 14 --canvases 4 --naive-canvases 2 --batch 28)
    sweep=(--vocabulary 30 --rows 2 --length 8 --forwards 64 1024 --chunks 8 10)
    loss=(--width 8 --vocabulary 30 --loss-rows 2 --tokens 4 --loss-chunks 8 10)
fi

step matmul 30 python -m tools.accelerator_steps matmul "${big[@]}"
step decode 75 python -m tools.bench_decode "${big[@]}" "${decode[@]}"
step update 90 python -m tools.bench_update "${big[@]}" "${update[@]}" --only ours "ours, same canvases" published body
step tests 50 python -m pytest -q -n 0 -m "$marker" -k "$chosen" tests/test_accelerator.py
step forwards 60 python -m tools.accelerator_steps forwards "${big[@]}" "${sweep[@]}"
step graphs 70 python -m tools.accelerator_steps graphs "${big[@]}" "${sweep[@]}"
step loss 30 python -m tools.accelerator_steps loss "${big[@]}" "${loss[@]}"
step optimizer 20 python -m tools.bench_optim --device "$device" --millions "$numbers" --repeats 3
step 4bit 20 python -m tools.accelerator_steps 4bit "${big[@]}"
step "$launch" 30 env RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29517 \
    python -m tools.accelerator_steps collectives "${big[@]}" --backend "$launch"
cat "$out/table.md"
