"""Stage 2: pre-train the latent diffusion model on an autoencoder's latents.

    accelerate launch examples/train_diffusion.py --data_dir DATA --split_file split.json \\
        --autoencoder outputs/autoencoder --output_dir outputs/diffusion

The two folds that the rewards need: ``--part a`` and ``--part b``. Away from a worse generator, at the end:
``--init_from outputs/diffusion --autoguide WORSE``.
"""

from dataclasses import dataclass, field

from diffusers import AutoModel
from transformers import set_seed

import diffusers_med3d  # noqa: F401  (registers the classes with diffusers)
from diffusers_med3d import DiffusionUNet3D, MedDiffusion3DPipeline
from diffusers_med3d.data import DataArguments, VolumeDataset, settings_of
from diffusers_med3d.data.training_subjects import read_training_subjects
from diffusers_med3d.hub.resolve import resolve
from diffusers_med3d.trainers.base import use_all_cores
from diffusers_med3d.trainers.diffusion import LatentDiffusionConfig, LatentDiffusionTrainer, default_scheduler
from diffusers_med3d.utils.arguments import ScriptParser, refused_in_one_line
from diffusers_med3d.utils.stopping import stopped_in_one_line


@dataclass
class ModelArguments:
    """The network and what it is trained on."""

    autoencoder: str = field(metadata={"help": "Folder of the trained autoencoder, or Hub id."})
    autoencoder_subfolder: str | None = field(
        default=None, metadata={"help": "Subfolder, such as vae when --autoencoder is a whole pipeline."}
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Pipeline (also one from MONAI) whose UNet training starts from, with its classes, channel names "
            "and noise schedule; --prediction_type, --shift and what shapes the network then do nothing. Not set: "
            "random weights."
        },
    )
    autoguide: str | None = field(
        default=None,
        metadata={
            "help": "Pipeline of the same latents that is worse than that of --init_from (smaller, trained less): "
            "training moves the network away from it (autoguidance) instead of towards the data."
        },
    )
    part: str = field(
        default="train",
        metadata={
            "help": "Part of the split to train on: train, or its fold a or b.",
            "choices": ["train", "a", "b"],
        },
    )
    prediction_type: str = field(
        default="v_prediction",
        metadata={
            "help": "What the network predicts. sample converges faster when the network is narrow for its latents: it "
            "need not hand the noise of every latent channel through. flow makes a rectified flow.",
            "choices": ["v_prediction", "sample", "epsilon", "flow"],
        },
    )
    shift: float = field(
        default=1.0, metadata={"help": "Of a flow: above 1 it is trained and sampled more where there is more noise."}
    )
    channel_names: list[str] | None = field(
        default=None, metadata={"help": "One name per image channel, such as t1, for the pipeline's config."}
    )
    channels: list[int] = field(default_factory=lambda: [32, 64, 128], metadata={"help": "Channels per level."})
    num_res_blocks: int = field(default=2, metadata={"help": "Residual blocks per level."})
    num_head_channels: int = field(default=32, metadata={"help": "Channels of an attention head (last level)."})
    norm_num_groups: int = field(
        default=4,
        metadata={"help": "Groups of GroupNorm. Groups of few channels lose how strong a feature is."},
    )
    sample_skip: bool = field(
        default=True,
        metadata={
            "help": "Add the noisy latent to the prediction, each channel times a learned function of the timestep, so "
            "that a network that is narrow for its latents need not hand their noise through its layers."
        },
    )
    sample_gate: bool = field(
        default=True,
        metadata={"help": "The same once more, by a factor that the network also makes differ from place to place."},
    )
    num_modes: int = field(
        default=16,
        metadata={
            "help": "Principal components of the training latents that the network knows; 0 for scans that do not lie "
            "in one frame or differ in size."
        },
    )
    position_maps: bool = field(
        default=False,
        metadata={"help": "A learned value per channel and place, for registered scans: where in the body it is."},
    )
    precondition: bool = field(
        default=False,
        metadata={"help": "Of a flow: input and output of the layers have unit variance at every time and place."},
    )
    jittered_copies: bool = field(
        default=False, metadata={"help": "Train on the copies that examples/prepare_dataset.py wrote, too."}
    )

    def __post_init__(self) -> None:
        if self.autoguide and not self.init_from:
            raise ValueError("--autoguide needs --init_from: a network that has learned nothing has nowhere to go.")
        if self.precondition and self.prediction_type != "flow":
            raise ValueError(f"--precondition needs --prediction_type flow, got {self.prediction_type}.")


def build(model: ModelArguments, data: DataArguments) -> MedDiffusion3DPipeline:
    """The pipeline that the arguments describe: the autoencoder, and a new network or the one to go on from."""
    autoencoder = AutoModel.from_pretrained(resolve(model.autoencoder), subfolder=model.autoencoder_subfolder)
    data.adopt(settings_of(autoencoder), f"the autoencoder {model.autoencoder}")
    if model.init_from:
        start = MedDiffusion3DPipeline.from_pretrained(model.init_from)
        data.adopt(settings_of(start), f"the generator {model.init_from}")
        unet, scheduler, class_names = start.unet, start.scheduler, start.config.class_names
        model.channel_names = model.channel_names or start.config.channel_names
    else:
        unet = DiffusionUNet3D(
            in_channels=autoencoder.latent_channels,
            out_channels=autoencoder.latent_channels,
            channels=model.channels,
            num_res_blocks=model.num_res_blocks,
            attention_levels=[False] * (len(model.channels) - 1) + [True],
            num_head_channels=model.num_head_channels,
            norm_num_groups=model.norm_num_groups,
            num_class_embeds=len(data.class_names) + 1 if data.class_names else None,
            sample_skip=model.sample_skip,
            sample_gate=model.sample_gate,
            num_modes=model.num_modes,
            mode_shape=autoencoder.latent_shape(data.volume_shape) if model.num_modes else None,
            position_shape=autoencoder.latent_shape(data.volume_shape) if model.position_maps else None,
            precondition=model.precondition,
        )
        scheduler, class_names = default_scheduler(model.prediction_type, model.shift), data.class_names or None
    return MedDiffusion3DPipeline(
        vae=autoencoder,
        unet=unet,
        scheduler=scheduler,
        volume_shape=data.volume_shape,
        spacing=data.spacing,
        class_names=class_names,
        channel_names=model.channel_names or data.settings.channel_names,
        intensity=data.settings.intensity,
    )


def main() -> None:
    """Read, encode, train, evaluate, save."""
    use_all_cores()
    model, data, args = ScriptParser(ModelArguments, DataArguments, LatentDiffusionConfig, description=__doc__).parse()
    set_seed(args.seed)
    with refused_in_one_line():
        trainer = LatentDiffusionTrainer(
            model=build(model, data),
            args=args,
            train_dataset=VolumeDataset.from_arguments(data, model.part, model.jittered_copies),
            eval_dataset=VolumeDataset.from_arguments(data, "validation"),
            guide=MedDiffusion3DPipeline.from_pretrained(model.autoguide) if model.autoguide else None,
            earlier_subjects=set().union(
                *(read_training_subjects(seen) for seen in (model.init_from, model.autoguide) if seen)
            ),
        )
        checkpoint = trainer.checkpoint_to_resume(args.resume_from_checkpoint)
    with stopped_in_one_line():
        trainer.train(resume_from_checkpoint=checkpoint)
    print(trainer.evaluate())
    trainer.save_model()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
