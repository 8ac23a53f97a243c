"""Stage 3: train a reward model on the noise spectrum that the generator itself makes.

    accelerate launch examples/train_reward.py --architecture 3d --data_dir DATA --split_file split.json \\
        --fold_a_model outputs/generator-a --fold_b_model outputs/generator-b \\
        --model_name_or_path outputs/generator --output_dir outputs/reward-3d

Two generators, each trained on one fold of the training subjects, make the spectrum of the other fold's subjects: no
scan is denoised by a network that may know it by heart. Give the same --spectrum_dir to the runs with --architecture 3d
and 2d. The generator that will be fine-tuned adds full samples, so that the reward has seen its faults.

Without the two it makes the whole spectrum itself, in a third of the work. That is right for a generator that has
learned no scan by heart; a warning says where it has.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import set_seed

from diffusers_med3d import MedDiffusion3DPipeline
from diffusers_med3d.data import DataArguments, VolumeDataset, settings_of
from diffusers_med3d.hub.origin import license_of
from diffusers_med3d.models.reward import SliceRewardModel, VolumeRewardModel
from diffusers_med3d.rewards.spectrum import STRENGTHS, check_strengths
from diffusers_med3d.rewards.spectrum_dataset import build_fold_spectra
from diffusers_med3d.trainers.base import use_all_cores
from diffusers_med3d.trainers.reward import RewardModelConfig, RewardModelTrainer
from diffusers_med3d.utils.arguments import ScriptParser, refused_in_one_line
from diffusers_med3d.utils.stopping import stopped_in_one_line


@dataclass
class RewardArguments:
    """The network and its spectrum."""

    fold_a_model: str | None = field(
        default=None,
        metadata={
            "help": "Generator trained on fold a; makes the spectrum of fold b. Not set: --model_name_or_path makes "
            "that of all training scans."
        },
    )
    fold_b_model: str | None = field(
        default=None, metadata={"help": "Generator trained on fold b, for fold a. Not set: fold b alone is used."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Generator that will be fine-tuned: adds a full sample per training scan and makes the spectrum of "
            "validation in place of --fold_a_model, or all of it where that is not set."
        },
    )
    init_from: str | None = field(
        default=None,
        metadata={"help": "Reward model (folder, bundled name or Hub id) to go on from, in place of a new network."},
    )
    architecture: str = field(
        default="3d", metadata={"help": "VolumeRewardModel (3d) or SliceRewardModel (2d).", "choices": ["3d", "2d"]}
    )
    channels: list[int] = field(
        default_factory=lambda: [16, 32, 64, 96], metadata={"help": "Channels per level; the side is halved at each."}
    )
    norm_num_groups: int = field(default=8, metadata={"help": "Groups of GroupNorm."})
    num_members: int = field(default=2, metadata={"help": "Networks of the ensemble."})
    compare_sides: bool = field(
        default=True,
        metadata={"help": "Show the networks the left-right difference; off for anatomy without symmetry."},
    )
    num_slices: int = field(default=8, metadata={"help": "Slices per axis (2d)."})
    spectrum_dir: str | None = field(
        default=None, metadata={"help": "Cache of the spectrum; output_dir/spectrum if unset."}
    )
    strengths: list[float] = field(
        default_factory=lambda: list(STRENGTHS),
        metadata={"help": "Noise levels: 0 is the autoencoder round-trip, 1 a full sample of the same class."},
    )
    levels_per_subject: int = field(
        default=6, metadata={"help": "Levels per training subject: first and last, others drawn. Validation has all."}
    )
    spectrum_steps: int = field(default=20, metadata={"help": "Denoising steps of a full sample of the spectrum."})
    spectrum_batch_size: int = field(default=16, metadata={"help": "Scans at a time when the spectrum is made."})

    def __post_init__(self) -> None:
        if self.fold_a_model is None and (self.fold_b_model or not self.model_name_or_path):
            raise ValueError("give --fold_a_model, or --model_name_or_path without --fold_b_model.")
        check_strengths(self.strengths, self.spectrum_steps)


def build(args: RewardArguments, in_channels: int) -> VolumeRewardModel | SliceRewardModel:
    """The network that the arguments describe, or the one to go on from."""
    if args.init_from:
        return (SliceRewardModel if args.architecture == "2d" else VolumeRewardModel).from_pretrained(args.init_from)
    common = {
        "in_channels": in_channels,
        "channels": args.channels,
        "norm_num_groups": args.norm_num_groups,
        "num_members": args.num_members,
        "compare_sides": args.compare_sides,
    }
    if args.architecture == "2d":
        return SliceRewardModel(num_slices=args.num_slices, **common)
    return VolumeRewardModel(**common)


def main() -> None:
    """Make the spectrum, train, evaluate, save."""
    use_all_cores()
    reward, data, args = ScriptParser(RewardArguments, DataArguments, RewardModelConfig, description=__doc__).parse()
    set_seed(args.seed)
    with refused_in_one_line():
        for name in (reward.fold_a_model, reward.fold_b_model, reward.model_name_or_path):
            if name is not None:
                generator = MedDiffusion3DPipeline.from_pretrained(name)
                data.adopt(settings_of(generator), f"the generator {name}")
        in_channels = generator.vae.config.in_channels
        model = build(reward, in_channels)
        model.register_to_config(data_settings=data.settings.to_dict())
        # Too small a grid is refused now, before hours of making the spectrum
        model.check_input(torch.zeros(1, in_channels, *data.volume_shape))
        parts = ["b"] if reward.fold_a_model else ["train"]
        parts += ["validation", *(["a"] if reward.fold_b_model else [])]
        scans = {part: VolumeDataset.from_arguments(data, part) for part in parts}
    spectrum = {
        "scans": scans,
        "fold_a_model": reward.fold_a_model,
        "fold_b_model": reward.fold_b_model,
        "model": reward.model_name_or_path,
        "folder": reward.spectrum_dir or Path(args.output_dir) / "spectrum",
        "strengths": reward.strengths,
        "levels_per_subject": reward.levels_per_subject,
        "num_inference_steps": reward.spectrum_steps,
        "batch_size": reward.spectrum_batch_size,
        "seed": args.seed,
        "device": args.device,
    }
    with refused_in_one_line():  # a generator that has seen the scans, a spectrum that was made with other settings
        if args.world_size > 1:
            build_fold_spectra(**spectrum, share=(args.process_index, args.world_size))
            PartialState().wait_for_everyone()
        with args.main_process_first(desc="making the spectrum"):  # all of it, or what a node's own disk lacks
            train, validation = build_fold_spectra(**spectrum)
    trainer = RewardModelTrainer(model=model, args=args, train_dataset=train, eval_dataset=validation)
    # it is trained on what that generator makes
    trainer.inherited_license = license_of(reward.fold_a_model or reward.model_name_or_path)
    with refused_in_one_line():
        checkpoint = trainer.checkpoint_to_resume(args.resume_from_checkpoint)
    with stopped_in_one_line():
        trainer.train(resume_from_checkpoint=checkpoint)
    results = trainer.evaluate()
    trainer.save_model()
    print("\n".join(f"{name} {value:.4f}" for name, value in results.items()))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
