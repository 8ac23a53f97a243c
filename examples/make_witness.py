"""Make a witness reward of your scans: it needs no training, only the features of a reward model and your scans.

    python examples/make_witness.py --data_dir DATA --split_file split.json --model_name_or_path outputs/generator \\
        --extractor outputs/reward-2d --output_dir outputs/witness-2d

A sample scores high where scans are common and samples are rare. PPO fine-tuning adds the samples of every rollout, so
that the reward follows the generator: ppo_finetune.py --reward_funcs outputs/witness-2d. The reward holds features of
the training scans and of --num_samples samples of the generator, and no scans.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from diffusers_med3d import MedDiffusion3DPipeline, WitnessRewardModel
from diffusers_med3d.data import DataArguments, VolumeDataset, check_same_settings, settings_of
from diffusers_med3d.evaluation import sample_volumes
from diffusers_med3d.models.witness import HAAR, KERNELS
from diffusers_med3d.rewards.learned import LearnedReward
from diffusers_med3d.rewards.loading import load_reward
from diffusers_med3d.rewards.witness import WitnessReward
from diffusers_med3d.trainers.base import use_all_cores
from diffusers_med3d.utils.arguments import ScriptParser, refused_in_one_line


@dataclass
class WitnessArguments:
    """Features of what, and of which samples."""

    model_name_or_path: str = field(
        default="brain-t1", metadata={"help": "Generator to be fine-tuned: bundled name, folder or Hub id."}
    )
    extractor: str = field(
        default="brain-t1-reward-2d",
        metadata={"help": "Reward model whose features are compared (bundled name, folder or Hub id), or haar."},
    )
    kernel: str = field(
        default="gaussian",
        metadata={"help": "gaussian (bandwidth: median distance of scans) or cubic (KID's).", "choices": KERNELS},
    )
    num_samples: int = field(default=48, metadata={"help": "Samples of the generator that the buffer starts with."})
    num_inference_steps: int = field(default=25, metadata={"help": "Denoising steps of these samples."})
    buffer_size: int = field(default=256, metadata={"help": "Samples that are remembered during fine-tuning."})
    batch_size: int = field(default=8, metadata={"help": "Volumes at a time."})
    seed: int = field(default=1000, metadata={"help": "Seed of the samples."})
    output_dir: str = field(default="outputs/witness", metadata={"help": "Where reward and samples go."})

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_inference_steps", "buffer_size", "batch_size"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {vars(self)[name]}.")


def main() -> None:
    """Sample, take features, save."""
    args, data = ScriptParser(WitnessArguments, DataArguments, description=__doc__).parse()
    use_all_cores()
    output, device = Path(args.output_dir), "cuda" if torch.cuda.is_available() else "cpu"
    with refused_in_one_line():
        pipeline = MedDiffusion3DPipeline.from_pretrained(args.model_name_or_path).to(device)
        known, extractor = settings_of(pipeline), HAAR
        if args.extractor != HAAR:
            reward = load_reward(args.extractor)
            if not isinstance(reward, LearnedReward) or isinstance(reward, WitnessReward):
                raise ValueError(f"--extractor must be a trained reward model or {HAAR!r}, got {args.extractor!r}.")
            extractor = reward.to(device).model
            names = (f"the extractor {args.extractor}", f"the generator {args.model_name_or_path}")
            check_same_settings(settings_of(extractor), known, names, reward.same_settings)
        data.adopt(known, f"the generator {args.model_name_or_path}")
        scans = VolumeDataset.from_arguments(data, "train")
        labels = [item["class_label"] for item in scans]
        asked = [labels[i % len(labels)] for i in range(args.num_samples)]
        samples = sample_volumes(
            pipeline,
            asked,
            output / "samples",
            data,
            args.num_inference_steps,
            seeds=[args.seed],
            batch_size=args.batch_size,
            like=scans,
        )
        volumes = scans.stack()
        model = WitnessRewardModel.of_scans(
            extractor,
            volumes,
            samples.volumes,
            args.batch_size,
            kernel=args.kernel,
            buffer_size=args.buffer_size,
            data_settings=known.to_dict(),
        )
    model.save_pretrained(output)
    score = WitnessReward(model, args.batch_size)
    print(f"{output}: features of {len(scans)} training scans and {args.num_samples} samples")
    print(
        f"mean score of those scans {score(volumes).mean():.4f}, of those samples {score(samples.volumes).mean():.4f}"
    )


if __name__ == "__main__":
    main()
