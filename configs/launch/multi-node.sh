#!/bin/bash
# Several machines: the same command on each of them, naming how many they are and one where they meet.
#
#     NODES=4 MEET=node1:29500 configs/launch/multi-node.sh configs/llama-1b.toml --run.dir /shared/runs/llama
#
# run.dir, the text and data.cache_dir are on a disk that all of them mount. The machine that is named under MEET runs
# this too, and keeps the ranks' store: when it is gone, all end. RUN_ID tells several runs at one place apart.
set -eu
exec torchrun --nnodes "$NODES" --nproc_per_node "${GPUS:-gpu}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$MEET" --rdzv-id "${RUN_ID:-minillm}" train.py "$@"
