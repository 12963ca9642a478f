#!/usr/bin/env bash
# A recipe on several machines that ssh reaches without a password, where there is no scheduler.
#
#   bash accelerate_configs/ssh.sh "10.0.0.1 10.0.0.2" 8 recipes/lora_sft.py --template sst2
#
# First the machines, number 0 by the address that the others reach, then the GPUs of each, then the
# recipe and its options. From the repository's root; the same path on all machines has the
# repository and the environment with accelerate, and --output_dir is on a disk that all see. If one
# machine fails, or this script is ended, all end.
set -euo pipefail

read -ra machines <<<"$1"
gpus=$2
shift 2

started=()
trap 'kill "${started[@]}" 2>/dev/null || true' EXIT
for rank in "${!machines[@]}"; do
  words=("$(command -v accelerate)" launch
    --config_file "${CONFIG:-accelerate_configs/multi_node.yaml}"
    --num_machines "${#machines[@]}" --num_processes "$((${#machines[@]} * gpus))"
    --machine_rank "$rank" --main_process_ip "${machines[0]}" --main_process_port 29500
    "$@")
  # With a terminal (-tt) what runs there ends with the connection.
  ssh -tt "${machines[$rank]}" "cd $(printf %q "$PWD") && $(printf '%q ' "${words[@]}")" </dev/null &
  started+=($!)
done
for _ in "${started[@]}"; do
  wait -n
done
