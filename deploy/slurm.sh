#!/bin/bash
# Two hosts of four GPUs: sbatch deploy/slurm.sh "a lighthouse at dusk"
#SBATCH --job-name=distri
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=00:30:00
#SBATCH --output=distri-%j.log
set -euo pipefail

prompt=${1:?the prompt is required}
output=${2:-$SLURM_SUBMIT_DIR/distri-$SLURM_JOB_ID.png}   # on a file system that all hosts see
first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=$((SLURM_JOB_NUM_NODES * 4))

# The interface between the hosts; without it NCCL and gloo may choose another.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-eth0}
export GLOO_SOCKET_IFNAME=$NCCL_SOCKET_IFNAME
export OMP_NUM_THREADS=4

# One agent a host starts that host's ranks; after a fault they go on from the last checkpoint.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node 4 \
    --max-restarts 3 \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$first_host:29400" \
    -m distri run --model sdxl --gpus "$gpus" --prompt "$prompt" --elastic -o "$output"
