"""Stage 2: pre-train the latent diffusion model on an autoencoder's latents.

    accelerate launch examples/train_diffusion.py --data_dir DATA --split_file split.json \\
        --autoencoder outputs/autoencoder --output_dir outputs/diffusion

The two folds that the rewards need: ``--part a`` and ``--part b``.
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
    part: str = field(
        default="train",
        metadata={
            "help": "Part of the split to train on: train, or its fold a or b.",
            "choices": ["train", "a", "b"],
        },
    )
    prediction_type: str = field(
        default="flow",
        metadata={
            "help": "What the network predicts: flow is the velocity of a rectified flow, the others belong to a "
            "variance-preserving diffusion.",
            "choices": ["flow", "v_prediction", "sample", "epsilon"],
        },
    )
    shift: float = field(
        default=1.0, metadata={"help": "Of a flow: above 1 it is trained and sampled more where there is more noise."}
    )
    channel_names: list[str] | None = field(
        default=None, metadata={"help": "One name per image channel, such as t1, for the pipeline's config."}
    )
    channels: list[int] = field(default_factory=lambda: [80, 144], metadata={"help": "Channels per level."})
    num_res_blocks: int = field(default=1, metadata={"help": "Residual blocks per level."})
    num_head_channels: int = field(
        default=48, metadata={"help": "Channels of an attention head; the last of --channels must be a multiple."}
    )
    norm_num_groups: int = field(
        default=4,
        metadata={"help": "Groups of GroupNorm. Groups of few channels lose how strong a feature is."},
    )
    position_maps: bool | None = field(
        default=None,
        metadata={
            "help": "A learned value per channel and place: where in the body it is. Not set: for registered scans "
            "(--registration, which prepare_dataset.py writes), because in others a place means nothing."
        },
    )
    precondition: bool | None = field(
        default=None,
        metadata={
            "help": "Input and output of the layers have unit variance at every time, with position maps at every "
            "place too. Not set: for a flow, which alone can have it."
        },
    )
    jittered_copies: bool = field(
        default=False, metadata={"help": "Train on the copies that examples/prepare_dataset.py wrote, too."}
    )

    def __post_init__(self) -> None:
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
        registered = data.registration is not None
        position_maps = registered if model.position_maps is None else model.position_maps
        unet = DiffusionUNet3D(
            in_channels=autoencoder.latent_channels,
            out_channels=autoencoder.latent_channels,
            channels=model.channels,
            num_res_blocks=model.num_res_blocks,
            attention_levels=[False] * (len(model.channels) - 1) + [True],
            num_head_channels=model.num_head_channels,
            norm_num_groups=model.norm_num_groups,
            num_class_embeds=len(data.class_names) + 1 if data.class_names else None,
            position_shape=autoencoder.latent_shape(data.volume_shape) if position_maps else None,
            precondition=model.prediction_type == "flow" if model.precondition is None else model.precondition,
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
            earlier_subjects=read_training_subjects(model.init_from) if model.init_from else (),
        )
        checkpoint = trainer.checkpoint_to_resume(args.resume_from_checkpoint)
    with stopped_in_one_line():
        trainer.train(resume_from_checkpoint=checkpoint)
    print(trainer.evaluate())
    trainer.save_model()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
