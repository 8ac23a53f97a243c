"""Stage 1: train the autoencoder.

accelerate launch examples/train_autoencoder.py --data_dir DATA --split_file split.json --output_dir outputs/autoencoder
accelerate launch examples/train_autoencoder.py --architecture vq ...
accelerate launch examples/train_autoencoder.py --init_from outputs/generator/vae --decoder_only true ...
"""

from dataclasses import dataclass, field

from transformers import set_seed

from diffusers_med3d.data import DataArguments, VolumeDataset
from diffusers_med3d.models import AutoencoderKL3D, VQModel3D
from diffusers_med3d.models.haar import haar_init_
from diffusers_med3d.trainers.autoencoder import AutoencoderConfig, AutoencoderTrainer
from diffusers_med3d.trainers.base import use_all_cores
from diffusers_med3d.utils.arguments import ScriptParser, refused_in_one_line
from diffusers_med3d.utils.stopping import stopped_in_one_line


@dataclass
class ModelArguments:
    """The network."""

    architecture: str = field(
        default="kl", metadata={"help": "AutoencoderKL3D (kl) or VQModel3D (vq).", "choices": ["kl", "vq"]}
    )
    channels: list[int] = field(
        default_factory=lambda: [16, 32, 64],
        metadata={"help": "Channels per level. kl halves the side between levels, vq at every level."},
    )
    latent_channels: int = field(default=16, metadata={"help": "Channels of the latent space."})
    num_res_blocks: int = field(default=1, metadata={"help": "Residual blocks per level."})
    norm_num_groups: int = field(
        default=1,
        metadata={
            "help": "Groups of GroupNorm (kl). With one, the channels keep their ratio, so absolute intensity survives "
            "the normalisation and a network trained on crops fits whole volumes."
        },
    )
    use_convtranspose: bool = field(
        default=True, metadata={"help": "Upsample with transposed convolutions (kl): finer detail at less compute."}
    )
    haar_init: bool = field(
        default=True,
        metadata={"help": "Start as a truncated Haar transform (kl): fine detail is there from the first step."},
    )
    init_from: str | None = field(
        default=None,
        metadata={"help": "Folder of an autoencoder that training goes on from; flags of the network do nothing then."},
    )
    num_embeddings: int = field(default=512, metadata={"help": "Codebook size (vq)."})
    codebook_decay: float = field(
        default=0.9,
        metadata={"help": "Decay of the codebook's moving average (vq). At 0.99 it lags behind the encoder early on."},
    )


def build(args: ModelArguments, in_channels: int) -> AutoencoderKL3D | VQModel3D:
    """The network that the arguments describe."""
    if args.init_from:
        return (VQModel3D if args.architecture == "vq" else AutoencoderKL3D).from_pretrained(args.init_from)
    if args.architecture == "vq":
        return VQModel3D(
            in_channels=in_channels,
            out_channels=in_channels,
            channels=args.channels,
            num_res_layers=args.num_res_blocks,
            num_res_channels=args.channels,
            num_embeddings=args.num_embeddings,
            embedding_dim=args.latent_channels,
            decay=args.codebook_decay,
        )
    autoencoder = AutoencoderKL3D(
        in_channels=in_channels,
        out_channels=in_channels,
        channels=args.channels,
        latent_channels=args.latent_channels,
        num_res_blocks=args.num_res_blocks,
        attention_levels=[False] * len(args.channels),
        norm_num_groups=args.norm_num_groups,
        use_convtranspose=args.use_convtranspose,
    )
    return haar_init_(autoencoder) if args.haar_init else autoencoder


def main() -> None:
    """Read, train, evaluate, save."""
    use_all_cores()
    model, data, args = ScriptParser(ModelArguments, DataArguments, AutoencoderConfig, description=__doc__).parse()
    set_seed(args.seed)
    with refused_in_one_line():
        scans = VolumeDataset.from_arguments(data, "train")
        print(scans.report())
        trainer = AutoencoderTrainer(
            model=build(model, in_channels=len(scans[0]["volume"])),
            args=args,
            train_dataset=scans,
            eval_dataset=VolumeDataset.from_arguments(data, "validation"),
        )
        checkpoint = trainer.checkpoint_to_resume(args.resume_from_checkpoint)
    with stopped_in_one_line():
        trainer.train(resume_from_checkpoint=checkpoint)
    print(trainer.evaluate())
    trainer.save_model()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
