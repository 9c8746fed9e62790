#!/bin/bash
# One machine, a process for each of its GPUs.
#
#     configs/launch/one-node.sh configs/llama-1b.toml --run.dir runs/llama
#
# When a process dies torchrun starts all of them again, up to three times, and the run goes on from its last
# checkpoint. Ctrl-C, or SIGTERM, saves and ends; the same command with --run.resume auto goes on.
set -eu
exec torchrun --nproc_per_node "${GPUS:-gpu}" --max-restarts 3 train.py "$@"
