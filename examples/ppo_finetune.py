"""Fine-tune a 3D generator with PPO against rewards, and compare the same samples before and after.

    accelerate launch examples/ppo_finetune.py              # brain-t1 and its two rewards: no data, no network
    accelerate launch examples/ppo_finetune.py --reward_funcs brain-t1-reward-3d my_rewards.py:symmetry
    accelerate launch examples/ppo_finetune.py --resume_from_checkpoint latest

A reward of your own is a function f(volumes, **conditions) that returns one number per volume, or None for a volume
that it cannot score; volumes is float32 (B, C, X, Y, Z) in [0, 1].

Into --output_dir go the fine-tuned pipeline, its model card with the table that is printed at the end, a reward curve
and a before/after picture (figures/), TensorBoard logs (runs/), checkpoints, and results.json.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig
from transformers import ProgressCallback

from diffusers_med3d import DDPOConfig, DDPOTrainer, MedDiffusion3DPipeline
from diffusers_med3d.data.training_subjects import TRAINING_SUBJECTS, training_subjects_file
from diffusers_med3d.pipelines.conditions import rows_to_sample
from diffusers_med3d.rewards.loading import default_rewards
from diffusers_med3d.trainers.base import use_all_cores
from diffusers_med3d.trainers.ddpo_report import RewardProgress, compare, log_pictures, table
from diffusers_med3d.utils.arguments import ScriptParser, refused_in_one_line
from diffusers_med3d.utils.files import write_whole
from diffusers_med3d.utils.stopping import stopped_in_one_line


@dataclass
class ScriptArguments:
    """What is fine-tuned, and by which rewards."""

    model_name_or_path: str = field(default="brain-t1", metadata={"help": "Generator: bundled name, folder or Hub id."})
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards: bundled name, folder or Hub id of a reward model, file.py:function or "
            "package.module:function. Not set: the two bundled ones, for brain-t1 and brain-t1-ppo only."
        },
    )
    conditions: str | None = field(
        default=None,
        metadata={
            "help": 'JSON file of columns, such as {"class_label": ["ct", "mri"], "age": [0.2, 0.7]}: one row per '
            "condition to fine-tune under. Not set: one row per class."
        },
    )
    lora_rank: int = field(default=0, metadata={"help": "Rank of LoRA adapters; 0 fine-tunes all weights."})
    eval_volumes: int = field(
        default=16, metadata={"help": "Volumes per class (or row of --conditions) in the comparison."}
    )
    eval_seed: int = field(
        default=1_000_003, metadata={"help": "Seed of the comparison; training never uses its noise."}
    )


@dataclass
class TenMinutesConfig(DDPOConfig):
    """DDPOConfig, with defaults that fill ten minutes on two CPU cores."""

    output_dir: str = field(default="outputs/ppo_finetune", metadata={"help": "Where everything is written."})
    max_steps: int = field(default=54, metadata={"help": "Optimizer steps."})
    max_minutes: float | None = field(
        default=10.0,
        metadata={"help": "Fine-tuning stops before so many minutes are over, however slow the processor; inf: never."},
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    eval_num_inference_steps: int = field(default=10, metadata={"help": "Denoising steps in evaluation."})
    picture_steps: int = field(
        default=3,
        metadata={"help": "Optimizer steps between two pictures of the same samples: the film's frames."},
    )
    save_steps: float = field(default=18, metadata={"help": "Optimizer steps between two checkpoints."})


def main() -> None:
    """Load, compare before, fine-tune, compare after, save."""
    use_all_cores()
    script, args = ScriptParser(ScriptArguments, TenMinutesConfig, description=__doc__).parse()
    with refused_in_one_line():
        pipeline = MedDiffusion3DPipeline.from_pretrained(script.model_name_or_path)
        conditions = rows_to_sample(pipeline, script.conditions)
        trainer = DDPOTrainer(
            model=pipeline,
            reward_funcs=script.reward_funcs or default_rewards(script.model_name_or_path),
            args=args,
            train_dataset=conditions,
            peft_config=LoraConfig(r=script.lora_rank, lora_alpha=2 * script.lora_rank) if script.lora_rank else None,
        )
        checkpoint = trainer.checkpoint_to_resume(args.resume_from_checkpoint)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(RewardProgress)

    # A resumed run starts from the generator too: its checkpoint is read by `train`
    seconds, start = {}, time.perf_counter()
    before = trainer.sample_and_score(conditions, script.eval_volumes, script.eval_seed, "Evaluation before")
    seconds["evaluation before"] = time.perf_counter() - start
    with stopped_in_one_line():
        trainer.train(resume_from_checkpoint=checkpoint)
    start = time.perf_counter()
    after = trainer.sample_and_score(conditions, script.eval_volumes, script.eval_seed, "Evaluation after")
    seconds["evaluation after"] = time.perf_counter() - start

    trainer.save_model()
    if trainer.is_world_process_zero():
        known = training_subjects_file(script.model_name_or_path)
        if known is not None:  # fine-tuning reads no scan: what the generator has seen is what it was made from
            write_whole(Path(args.output_dir) / TRAINING_SUBJECTS, known.read_text())
        results = compare(trainer, before, after, seconds)
        summary = table(results)
        log_pictures(trainer, before, after)
        trainer.card_notes += (
            f"\n\nBase: `{Path(script.model_name_or_path).name}`. Same {results['volumes']} fresh seeds before and "
            f"after, {args.eval_num_inference_steps} steps without noise; mean and 95 % interval, differences paired. "
            "KL and clip fraction: mean of the last 10 log entries of training.\n\n"
            f"{summary}\n\n"
            "![before and after](figures/before_after.png)\n\n![reward](figures/reward_curve.png)"
        )
        trainer.create_model_card()
        write_whole(Path(args.output_dir) / "results.json", json.dumps(results, indent=2))
        print(f"\n{summary}\n\nPipeline, card, pictures and logs: {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub()  # once more: now with the table and the pictures
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
