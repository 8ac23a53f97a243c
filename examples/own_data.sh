#!/usr/bin/env bash
# All stages on a data set of your own: prepare, autoencoder, generator, folds, rewards, fine-tuning, evaluation.
#
#   examples/own_data.sh                                     # on made-up brains, nothing is downloaded
#   LAYOUT=oasis1 INPUT=path/to/OASIS-1 examples/own_data.sh
#   STEPS_PERCENT=1000 OUTPUT=outputs/better examples/own_data.sh
#
# The default is small, so that all stages run in less than an hour on two CPU cores; its samples are poor. Ten times as
# many steps (STEPS_PERCENT=1000) are a beginning for real work. Every stage is resumable: a script that was stopped goes
# on with the stage that has no result yet.
set -euo pipefail
cd "$(dirname "$0")/.."

LAYOUT="${LAYOUT:-phantom}"
OUTPUT="${OUTPUT:-outputs/own_data}"
STEPS_PERCENT="${STEPS_PERCENT:-100}"
PREPARE_FLAGS="${PREPARE_FLAGS:-}"
DATA="$OUTPUT/data"
# Sizes of a trial on two cores; leave them out for real work
if [ "$LAYOUT" = phantom ]; then PREPARE_FLAGS="--num_subjects 40 --spacing 5 5 5 $PREPARE_FLAGS"; fi

steps() { echo $(($1 * STEPS_PERCENT / 100)); }
# done_before FILE COMMAND...: runs the command unless FILE is there, and says how long it took
done_before() {
  local result="$1" began="$SECONDS"
  shift
  if [ -e "$result" ]; then
    echo "== there already: $result"
    return
  fi
  echo "== $*"
  "$@"
  echo "== $((SECONDS - began)) s"
}
scans=(--data_dir "$DATA" --split_file "$DATA/split.json")
training=(--report_to none --resume_from_checkpoint latest) # a second call goes on where the first was stopped

input=()
if [ "$LAYOUT" != phantom ]; then input=(--input "$INPUT"); fi
# shellcheck disable=SC2086
done_before "$DATA/dataset.json" python examples/prepare_dataset.py \
  --layout "$LAYOUT" "${input[@]}" --output "$DATA" $PREPARE_FLAGS

done_before "$OUTPUT/autoencoder/config.json" accelerate launch examples/train_autoencoder.py "${scans[@]}" "${training[@]}" \
  --output_dir "$OUTPUT/autoencoder" --channels 8 16 32 --latent_channels 8 --crop_size 16 \
  --max_steps "$(steps 400)" --adversarial_weight 0 --eval_steps 200 --save_steps 200

for part in train a b; do
  name=generator
  if [ "$part" != train ]; then name="generator-$part"; fi
  done_before "$OUTPUT/$name/model_index.json" accelerate launch examples/train_diffusion.py "${scans[@]}" "${training[@]}" \
    --autoencoder "$OUTPUT/autoencoder" --output_dir "$OUTPUT/$name" --part "$part" \
    --channels 16 32 --num_head_channels 16 --max_steps "$(steps 400)" --eval_steps 400 --save_steps 200
done

for architecture in 3d 2d; do
  done_before "$OUTPUT/reward-$architecture/config.json" accelerate launch examples/train_reward.py "${scans[@]}" \
    "${training[@]}" --architecture "$architecture" --model_name_or_path "$OUTPUT/generator" \
    --fold_a_model "$OUTPUT/generator-a" --fold_b_model "$OUTPUT/generator-b" --spectrum_dir "$OUTPUT/spectrum" \
    --output_dir "$OUTPUT/reward-$architecture" --spectrum_steps 10 --max_steps "$(steps 150)" --save_steps 75
done

done_before "$OUTPUT/fine-tuned/model_index.json" accelerate launch examples/ppo_finetune.py "${training[@]}" \
  --model_name_or_path "$OUTPUT/generator" --reward_funcs "$OUTPUT/reward-3d" "$OUTPUT/reward-2d" \
  --output_dir "$OUTPUT/fine-tuned" --max_steps "$(steps 16)" --save_steps 8

done_before "$OUTPUT/evaluation/report.md" accelerate launch examples/evaluate.py "${scans[@]}" \
  --model_name_or_path "$OUTPUT/generator" "$OUTPUT/fine-tuned" --reference_part test \
  --num_samples 16 --num_inference_steps 20 --output_dir "$OUTPUT/evaluation"

echo "== $SECONDS s in all; the figures are in $OUTPUT/evaluation/report.md, the data set's in $DATA/report.html"
