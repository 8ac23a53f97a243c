#!/bin/bash
# PPO fine-tuning on two nodes of 8 GPUs:
#   sbatch examples/slurm/ppo_two_nodes.sh                 # from the repository's folder, with its environment active
#   sbatch examples/slurm/ppo_two_nodes.sh --lora_rank 8   # more flags of ppo_finetune.py
# Submit it again to go on: it takes the newest whole checkpoint. Set the next three lines for your cluster.
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --ntasks-per-node=1
#SBATCH --signal=USR1@300
#SBATCH --job-name=ppo_two_nodes
#SBATCH --output=%x-%j.log
# USR1@300: 300 seconds before the time is up the training is asked to save a checkpoint and to end. Let it be longer
# than one rollout with its updates.
set -euo pipefail

gpus_per_node="${SLURM_GPUS_PER_NODE:-8}"
export GPUS="${gpus_per_node##*:}"  # "h100:8" is 8
read -r MAIN_ADDRESS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")  # the first line
export MAIN_ADDRESS
export MAIN_PORT="${MAIN_PORT:-29500}"
export OUTPUT_DIR="${OUTPUT_DIR:-outputs/ppo_two_nodes}"  # a folder that both nodes see

# Single quotes: SLURM_NODEID is known on each node only. The launcher has to ignore the signal, which would end it; the
# trainers that it starts inherit that and set handlers of their own.
srun --kill-on-bad-exit=1 bash -c 'trap "" USR1
exec accelerate launch \
    --config_file examples/accelerate_configs/two_nodes.yaml \
    --num_machines 2 --machine_rank "$SLURM_NODEID" --num_processes "$((2 * GPUS))" \
    --main_process_ip "$MAIN_ADDRESS" --main_process_port "$MAIN_PORT" \
    examples/ppo_finetune.py --resume_from_checkpoint latest --output_dir "$OUTPUT_DIR" --max_minutes inf \
    "$@"' ppo "$@"
