"""Convert published MONAI and NVIDIA generators to pipelines. docs/monai.md has a command for every published model.

    python examples/convert_monai_bundle.py --bundle MONAI/brats_mri_generative_diffusion --estimate_from DATA \\
        --output_dir brats
    python examples/convert_monai_bundle.py --config_files network.json scheduler.json \\
        --autoencoder_weights autoencoder.pt --unet_weights unet.pt --scale_factor 0.92 --volume_shape 64 64 64 \\
        --spacing 3 3 3 --output_dir mine
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_med3d.conversion import BundleConfig, convert_bundle, read_bundle
from diffusers_med3d.conversion.definitions import bundle_config_files
from diffusers_med3d.data import read_scans
from diffusers_med3d.data.volumes import prepare
from diffusers_med3d.utils.arguments import ScriptParser, refused_in_one_line
from diffusers_med3d.utils.files import whole_folder

BUNDLE_PARTS = ["configs/*.json", "configs/*.yaml", "configs/*.yml", "models/*"]


@dataclass
class ConvertArguments:
    """What to convert, and what its files do not say."""

    output_dir: str = field(metadata={"help": "Folder to write; it must not exist."})
    bundle: str | None = field(default=None, metadata={"help": "Bundle folder, or Hub id 'org/name'."})
    config_files: list[str] = field(
        default_factory=list,
        metadata={"help": "Config files (JSON, YAML) with the definitions; they count before those of the bundle."},
    )
    autoencoder_weights: str | None = field(default=None, metadata={"help": "Default: what the config names."})
    unet_weights: str | None = field(default=None, metadata={"help": "Default: what the config names."})
    scale_factor: float | None = field(
        default=None, metadata={"help": "What latents were multiplied with in training. Default: what the files hold."}
    )
    estimate_from: str | None = field(
        default=None,
        metadata={
            "help": "Folder of scans (niftifolder) to estimate the scale factor from instead; larger scans are cropped."
        },
    )
    volume_shape: list[int] = field(default_factory=list, metadata={"help": "X Y Z in voxels. Default: the config's."})
    spacing: list[float] = field(default_factory=list, metadata={"help": "X Y Z in mm. Default: the config's."})
    class_names: str | None = field(
        default=None, metadata={"help": "JSON file {name: index} of classes, such as MAISI's modality_mapping.json."}
    )
    condition_names: list[str] = field(
        default_factory=list, metadata={"help": "Names of the numbers of the cross-attention. Default: the config's."}
    )
    intensity: str = field(default="[0, 1]", metadata={"help": "In words, what 0 and 1 stand for."})


def weights_file(given: str | None, folder: Path | None, names: Sequence[str], option: str) -> Path:
    """The one weights file that was given, or that the config names and the bundle holds."""
    if given is not None:
        return Path(given)
    found = [path for name in names for path in sorted(folder.rglob(name))] if folder is not None else []
    if len(found) != 1:
        raise ValueError(
            f"the config names {list(names) or 'no weights'}, of which {len(found)} were found; give --{option}."
        )
    return found[0]


def prepared_scans(folder: str, volume_shape: Sequence[int], spacing: Sequence[float]) -> Iterator[Tensor]:
    """Scans of a folder, prepared one after the other; what a larger scan has outside the grid is left out."""
    for row in tqdm(read_scans(folder), desc="encoding scans", unit="scan"):
        yield prepare(row["nifti"]["path"], volume_shape=volume_shape, spacing=spacing, fit="crop").as_tensor()


def read_definitions(args: ConvertArguments) -> tuple[BundleConfig, Path | None]:
    """What the files say of the networks, and the folder of the bundle, None without one."""
    if Path(args.output_dir).exists():
        raise FileExistsError(f"{args.output_dir} exists already; give a folder that does not.")
    folder, files = None, list(args.config_files)
    if args.bundle is not None:
        local = os.path.isdir(args.bundle)
        folder = Path(args.bundle if local else snapshot_download(args.bundle, allow_patterns=BUNDLE_PARTS))
        files += [str(file) for file in bundle_config_files(folder)]
    if not files:
        raise ValueError("give --bundle or --config_files: without definitions of its networks weights mean nothing.")
    return read_bundle(files), folder


def main() -> None:
    """Read, convert, write."""
    (args,) = ScriptParser(ConvertArguments, description=__doc__).parse()
    with refused_in_one_line():
        config, folder = read_definitions(args)
        names = None if args.class_names is None else json.loads(Path(args.class_names).read_text())
        pipeline, left_out = convert_bundle(
            config,
            weights_file(args.autoencoder_weights, folder, config.autoencoder_files, "autoencoder_weights"),
            weights_file(args.unet_weights, folder, config.unet_files, "unet_weights"),
            scale_factor=args.scale_factor,
            read_volumes=args.estimate_from
            and (lambda shape, spacing: prepared_scans(args.estimate_from, shape, spacing)),
            volume_shape=args.volume_shape or None,
            spacing=args.spacing or None,
            class_names=names,
            context_names=args.condition_names or None,
            intensity=args.intensity,
        )
    with whole_folder(args.output_dir) as written:
        pipeline.save_pretrained(written)
    print(f"scale factor {1 / pipeline.vae.config.latents_std[0]:.6g}")
    print(f"{len(left_out)} tensors that the network never applied were left out")
    print(f"wrote {args.output_dir}")


if __name__ == "__main__":
    main()
