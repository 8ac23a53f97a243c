"""Stage 3: train a reward model on the spectrum that the generator itself makes.

    accelerate launch examples/train_reward.py --kind 3d --data_dir DATA --split_file split.json \
        --generator_a outputs/generator-a --generator_b outputs/generator-b --output_dir outputs/reward-3d

Two generators, each trained on one fold of the training subjects, make the spectrum of the other fold's subjects: no
scan is denoised by a network that may know it by heart. Give the same --spectrum_dir to the runs with --kind 3d and 2d.
The generator that will be fine-tuned (--generator) adds full samples: a reward knows the faults that it has seen.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import HfArgumentParser, set_seed

from diffusers_med3d.data import DataArguments, VolumeDataset
from diffusers_med3d.data.training_subjects import read_training_subjects
from diffusers_med3d.models.reward import SliceRewardModel, VolumeRewardModel
from diffusers_med3d.pipelines.med_diffusion_3d import MedDiffusion3DPipeline
from diffusers_med3d.rewards.spectrum import FULL_SAMPLE
from diffusers_med3d.rewards.spectrum_dataset import SpectrumDataset, build_spectrum
from diffusers_med3d.trainers.base import checkpoint_to_resume
from diffusers_med3d.trainers.reward import RewardModelConfig, RewardModelTrainer


@dataclass
class RewardArguments:
    """The network and its spectrum."""

    generator_a: str = field(metadata={"help": "Pipeline trained on fold a; makes the spectrum of fold b."})
    generator_b: str | None = field(
        default=None,
        metadata={"help": "Pipeline trained on fold b; makes the spectrum of fold a. Not set: fold b alone is used."},
    )
    generator: str | None = field(
        default=None,
        metadata={
            "help": "Pipeline that will be fine-tuned, trained on both folds, say: adds a full sample per training "
            "scan (of its class; no scan is denoised) and makes the spectrum of validation in place of generator_a."
        },
    )
    init_from: str | None = field(
        default=None,
        metadata={"help": "Reward model (folder, bundled name or Hub id) to go on from, in place of a new network."},
    )
    kind: str = field(
        default="3d", metadata={"help": "3d (VolumeRewardModel) or 2d (SliceRewardModel).", "choices": ["3d", "2d"]}
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
        default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
        metadata={"help": "Noise levels: 0 is the autoencoder round-trip, 1 a full sample of the same class."},
    )
    levels_per_subject: int = field(
        default=6, metadata={"help": "Levels per training subject: first and last, others drawn. Validation has all."}
    )
    spectrum_steps: int = field(default=20, metadata={"help": "Denoising steps of a full sample of the spectrum."})
    spectrum_batch_size: int = field(default=16, metadata={"help": "Scans at a time when the spectrum is made."})


def build(args: RewardArguments, in_channels: int) -> VolumeRewardModel | SliceRewardModel:
    """The network that the arguments describe, or the one to go on from."""
    if args.init_from:
        return (SliceRewardModel if args.kind == "2d" else VolumeRewardModel).from_pretrained(args.init_from)
    common = {
        "in_channels": in_channels,
        "channels": args.channels,
        "norm_num_groups": args.norm_num_groups,
        "num_members": args.num_members,
        "compare_sides": args.compare_sides,
    }
    if args.kind == "2d":
        return SliceRewardModel(num_slices=args.num_slices, **common)
    return VolumeRewardModel(**common)


def spectra(
    data: DataArguments, reward: RewardArguments, args: RewardModelConfig, share: tuple[int, int] = (0, 1)
) -> tuple[SpectrumDataset, SpectrumDataset]:
    """Spectra of training and validation.

    Each fold's is made by the generator of the other, with a full sample per scan by the generator to be fine-tuned;
    that of validation by the latter, or without one by that of fold a.
    """
    root = Path(reward.spectrum_dir or Path(args.output_dir) / "spectrum")

    @cache
    def scans(part: str) -> VolumeDataset:
        return VolumeDataset.from_arguments(data, part)

    @cache
    def pipeline(generator: str) -> MedDiffusion3DPipeline:
        return MedDiffusion3DPipeline.from_pretrained(generator).to(args.device)

    def make(part: str, generator: str, name: str, strengths: list[float], levels: int | None) -> list[Path]:
        return build_spectrum(
            pipeline(generator),
            scans(part),
            read_training_subjects(generator),
            root / f"{part}-by-generator{name}",
            strengths,
            reward.spectrum_steps,
            levels,
            reward.spectrum_batch_size,
            args.seed,
            share,
        )

    folds = {"b": (reward.generator_a, "-a")}
    if reward.generator_b is not None:
        folds["a"] = (reward.generator_b, "-b")
    train, more = [], []
    for part, (generator, name) in folds.items():
        train += make(part, generator, name, reward.strengths, reward.levels_per_subject)
        if reward.generator:
            more += make(part, reward.generator, "", [FULL_SAMPLE], None)
    judge, name = (reward.generator, "") if reward.generator else (reward.generator_a, "-a")
    validation = make("validation", judge, name, reward.strengths, None)
    return SpectrumDataset(train, more), SpectrumDataset(validation)


def main() -> None:
    """Make the spectrum, train, evaluate, save."""
    parser = HfArgumentParser([DataArguments, RewardArguments, RewardModelConfig])
    data, reward, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    in_channels = MedDiffusion3DPipeline.from_pretrained(reward.generator_a).vae.config.in_channels
    model = build(reward, in_channels)
    # Too small a grid is refused now, before hours of making the spectrum
    model.check_input(torch.zeros(1, in_channels, *data.volume_shape))
    if args.world_size > 1:
        spectra(data, reward, args, (args.process_index, args.world_size))
        PartialState().wait_for_everyone()
    with args.main_process_first(desc="making the spectrum"):  # all of it, or on a node's own disk what is not there
        train, validation = spectra(data, reward, args)
    trainer = RewardModelTrainer(model=model, args=args, train_dataset=train, eval_dataset=validation)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(args))
    results = trainer.evaluate()
    trainer.save_model()
    print("\n".join(f"{name} {value:.4f}" for name, value in results.items()))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
