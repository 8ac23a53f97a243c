"""Exported pipelines: the same volumes where diffusers_med3d is not installed, and code that follows the sources."""

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import HfApi
from safetensors.torch import load_file

from conftest import awaken, run_example
from diffusers_med3d import (
    AutoencoderKL3D,
    AutoencoderKLMaisi3D,
    DiffusionUNet3D,
    DiffusionUNetMaisi3D,
    MedDiffusion3DPipeline,
    SliceRewardModel,
    VolumeRewardModel,
    VQModel3D,
)
from diffusers_med3d.cards import missing, pictures, sections
from diffusers_med3d.export import export_standalone, standalone_source
from diffusers_med3d.hub import publish

CARDS = Path(__file__).parents[1] / "model_cards"
NETWORKS = [
    AutoencoderKL3D,
    AutoencoderKLMaisi3D,
    DiffusionUNet3D,
    DiffusionUNetMaisi3D,
    SliceRewardModel,
    VolumeRewardModel,
    VQModel3D,
]

WITHOUT_THE_PACKAGE = """
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffusers_med3d":
            raise ModuleNotFoundError(f"No module named {name!r}")


sys.meta_path.insert(0, Blocked())
try:
    import diffusers_med3d
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package can be imported")

import huggingface_hub
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

torch.set_num_threads(1)
folder, target, *sources = sys.argv[1:]
volumes = {}


def call(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    return pipe(class_labels=["young", "old"], num_inference_steps=3, guidance_scale=2.0, generator=generator)


for source in sources:
    place, _, revision = source.partition("@")
    pipe = DiffusionPipeline.from_pretrained(place, revision=revision or None, trust_remote_code=True)
    out = call(pipe)
    volumes[source] = out.volumes
    volumes[source + " again"] = pipe(volumes=out.volumes, strength=0.0, num_inference_steps=3).volumes
    out.save_nifti(folder)
    for method in (pipe.save_pretrained, pipe.push_to_hub):
        try:
            method("anywhere")
        except NotImplementedError as refusal:
            assert "install diffusers-med3d" in str(refusal)
        else:
            raise SystemExit("an exported pipeline was saved")
    import shutil
    shutil.rmtree(folder)
place, revision = sources[-1].split("@")
huggingface_hub.snapshot_download(place, revision=revision)
huggingface_hub.constants.HF_HUB_OFFLINE = True
try:
    DiffusionPipeline.from_pretrained(place, revision=revision, trust_remote_code=True)
except huggingface_hub.errors.OfflineModeIsEnabled:
    pass
else:
    raise SystemExit("diffusers loads code offline from the cache now; docs/publishing.md says that it does not")
folder = huggingface_hub.snapshot_download(place, revision=revision)
volumes["offline"] = call(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)).volumes
try:
    DiffusionPipeline.from_pretrained(sources[0])
except ValueError as refusal:
    assert "trust_remote_code" in str(refusal)
else:
    raise SystemExit("code was run that nobody trusted")
assert not any(name.startswith("diffusers_med3d") for name in sys.modules)
save_file(volumes, target)
"""


def volumes_of(pipeline: MedDiffusion3DPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    made = pipeline(class_labels=["young", "old"], num_inference_steps=3, guidance_scale=2.0, generator=generator)
    return made.volumes, pipeline(volumes=made.volumes, strength=0.0, num_inference_steps=3).volumes


@pytest.fixture
def like_brain_t1(tiny_pipeline) -> MedDiffusion3DPipeline:
    """With what the bundled generator has: atlas, principal components, skip and gate."""
    vae = tiny_pipeline.vae
    vae.set_latent_statistics(torch.zeros(4), torch.ones(4), torch.randn(4, 4, 4, 4))
    config = {name: value for name, value in tiny_pipeline.unet.config.items() if not name.startswith("_")}
    options = {"sample_skip": True, "sample_gate": True, "num_modes": 2, "mode_shape": (4, 4, 4)}
    unet = awaken(DiffusionUNet3D(**config | options))
    unet.set_modes(torch.randn(5, 4, 4, 4, 4))
    tiny_pipeline.register_modules(unet=unet)
    return tiny_pipeline


@pytest.fixture
def tiny_maisi(tiny_scheduler) -> MedDiffusion3DPipeline:
    vae = AutoencoderKLMaisi3D(
        channels=(4, 4, 4), latent_channels=4, num_res_blocks=(1, 1, 1), norm_num_groups=2, num_splits=2,
        latents_mean=[0.0] * 4, latents_std=[0.9] * 4,
    )  # fmt: skip
    unet = DiffusionUNetMaisi3D(
        channels=(8, 16), num_res_blocks=1, attention_levels=(False, True), num_head_channels=8, norm_num_groups=8,
        num_class_embeds=4,
    )  # fmt: skip
    names = {"young": 1, "old": 3}
    pipeline = MedDiffusion3DPipeline(awaken(vae), awaken(unet), tiny_scheduler, (16, 32, 16), class_names=names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_an_exported_pipeline_gives_the_same_volumes_where_the_package_is_not_installed(
    hub, like_brain_t1, tiny_maisi, tiny_vq, tiny_unet, tmp_path, monkeypatch
):
    """From folders, and a flow with a VQ autoencoder from a branch on the Hub, which is then loaded offline too."""
    flow = MedDiffusion3DPipeline(
        tiny_vq, tiny_unet, FlowMatchEulerDiscreteScheduler(), (16, 16, 16), class_names=("young", "x", "old")
    )
    flow.set_progress_bar_config(disable=True)
    export_standalone(like_brain_t1, tmp_path / "kl", "org/kl")
    export_standalone(tiny_maisi, tmp_path / "maisi", "org/maisi")
    flow.save_pretrained(tmp_path / "flow")
    run_example(
        monkeypatch, "export_standalone.py", "--pipeline", tmp_path / "flow", "--output_dir", tmp_path / "exported",
        "--dtype", "float32", "--push_to", "org/flow", "--card", CARDS / "brain-t1.md",
    )  # fmt: skip
    there = hub.files("org/flow", "standalone")
    assert {"unet/diffusionunet3d.py", *pictures(CARDS.joinpath("brain-t1.md").read_text())} <= there
    assert hub.files("org/flow") == set()
    card = hub.read("org/flow", "README.md", "standalone").decode()
    assert missing(card) == [] and 'revision="standalone"' in sections(card)["Use"]

    modules = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    sources = [str(tmp_path / "kl"), str(tmp_path / "maisi"), "org/flow@standalone"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, tmp_path / "nifti", tmp_path / "out.safetensors", *sources],
        env=os.environ | hub.environment | modules,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    there = load_file(tmp_path / "out.safetensors")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for source, pipeline in zip(sources, (like_brain_t1, tiny_maisi, flow), strict=True):
            for found, expected in zip((source, source + " again"), volumes_of(pipeline), strict=True):
                assert torch.equal(there[found], expected), found
        assert torch.equal(there["offline"], there["org/flow@standalone"])
    finally:
        torch.set_num_threads(threads)
    assert "Expected types" not in done.stderr


def test_an_export_names_its_code_and_says_how_it_is_used(tiny_pipeline, tmp_path):
    files = export_standalone(tiny_pipeline, tmp_path / "kl", "org/kl")
    assert {"pipeline.py", "vae/autoencoderkl3d.py", "unet/diffusionunet3d.py", "requirements.txt"} <= set(files)
    index = json.loads((tmp_path / "kl" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "MedDiffusion3DPipeline"]
    assert index["vae"] == ["autoencoderkl3d", "AutoencoderKL3D"]
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    card = (tmp_path / "kl" / "README.md").read_text()
    assert missing(card) == [] and "trust_remote_code=True" in sections(card)["Use"]
    assert "diffusers_med3d" not in sections(card)["Use"]
    needed = (tmp_path / "kl" / "requirements.txt").read_text().split("\n")
    packages = {re.match(r"[\w-]+", line).group() for line in needed if line}
    assert packages >= {"torch", "monai", "diffusers", "einops", "nibabel"} and "torch" not in needed  # with a version
    assert not any("med3d" in line or line.startswith("peft") for line in needed)


@pytest.mark.parametrize("root", [*NETWORKS, MedDiffusion3DPipeline])
def test_an_exported_file_imports_nothing_of_the_package_and_runs_alone(root, monkeypatch):
    text = standalone_source(root)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and not node.module.startswith("diffusers_med3d")
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("diffusers_med3d") for alias in node.names)
    module = ModuleType("exported_alone")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(text, "exported_alone.py", "exec"), module.__dict__)
    exported = getattr(module, root.__name__)
    own = {name for name in vars(root) if not name.startswith("__")}
    assert own - {"_auto_class"} <= set(vars(exported)) | {"save_pretrained", "push_to_hub"}
    assert exported is not root and list(inspect.signature(exported).parameters) == list(
        inspect.signature(root).parameters
    )


@pytest.mark.parametrize("root", [DiffusionUNet3D, AutoencoderKL3D, VQModel3D])
def test_exported_code_is_the_code_of_the_sources(root):
    text = standalone_source(root)
    for method in (root.__init__, root.forward) if root is DiffusionUNet3D else (root.__init__, root.encode):
        assert inspect.getsource(inspect.unwrap(method)) in text


# --- what cannot be cut out is refused ---


def toy_package(folder: Path, monkeypatch, **modules: str) -> str:
    """A package of plain classes; its name, new every time."""
    name = f"toy_{folder.name.replace('-', '_')}"
    (folder / name).mkdir()
    for module, text in {"__init__": "", **modules}.items():
        (folder / name / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    return name


def exported(name: str) -> str:
    return standalone_source(importlib.import_module(f"{name}.main").Root)


def test_definitions_come_in_the_order_in_which_they_need_each_other_with_their_comments(tmp_path, monkeypatch):
    root = "class Root(Base):\n    size = math.ceil(LIMIT) + ONE\n"
    main = f"import math\nfrom .other import LIMIT, ONE, Base\n\nUNUSED = 1\n\n\n{root}"
    base = "def unused():\n    pass\n\n\nclass Base:\n    pass\n"
    other = f'# why three\nLIMIT = 2.5\n"""Says what it is."""\nONE, TWO = 1, 2\n\n\n{base}'
    name = toy_package(tmp_path, monkeypatch, main=main, other=other)
    text = exported(name)
    assert '# why three\nLIMIT = 2.5\n"""Says what it is."""' in text
    assert "UNUSED" not in text and "unused" not in text
    scope: dict[str, object] = {}
    exec(text, scope)
    assert scope["Root"].size == 4 and scope["Root"].__mro__[1] is scope["Base"]


@pytest.mark.parametrize(
    ("main", "other", "reason"),
    [
        (
            "from .other import help_\n\n\ndef _check():\n    pass\n\n\nclass Root:\n    a = help_\n    b = _check\n",
            "def _check():\n    pass\n\n\ndef help_():\n    _check()\n",
            "one file cannot hold both",
        ),
        (
            "from . import other\n\n\nclass Root:\n    a = other.VALUE\n",
            "VALUE = 1\n",
            "uses the module 'other'",
        ),
        (
            "class Root:\n    def f(self):\n        from .other import VALUE\n        return VALUE\n",
            "VALUE = 1\n",
            "inside a function",
        ),
        (
            "from .other import VALUE as V\n\n\nclass Root:\n    a = V\n",
            "VALUE = 1\n",
            "needs one name",
        ),
        (
            "from math import sin as f\nfrom .other import g\n\n\nclass Root:\n    a = f\n    b = g\n",
            "from math import cos as f\n\n\ndef g():\n    return f(1)\n",
            "means",
        ),
    ],
    ids=["two definitions of a name", "a module", "an import in a function", "another name", "two imports of a name"],
)  # fmt: skip
def test_sources_that_cannot_be_cut_out_are_refused(tmp_path, monkeypatch, main, other, reason):
    name = toy_package(tmp_path, monkeypatch, main=main, other=other)
    with pytest.raises(ValueError, match=reason):
        exported(name)


def test_a_network_that_a_pipeline_uses_for_more_than_its_type_is_refused(tmp_path, monkeypatch):
    main = (
        "from diffusers import DiffusionPipeline\nfrom .other import Net\n\n\n"
        "class Root(DiffusionPipeline):\n    def f(self, x: Net):\n        return {use}\n"
    )
    other = "from diffusers import ModelMixin\n\n\nclass Net(ModelMixin):\n    pass\n"
    name = toy_package(tmp_path, monkeypatch, main=main.format(use="isinstance(x, Net)"), other=other)
    scope: dict[str, object] = {"__name__": "toy"}
    exec(exported(name), scope)
    net = importlib.import_module(f"{name}.other").Net
    assert scope["Root"].f(None, net()) is True and scope["Root"].f(None, 1) is False
    (tmp_path / "second").mkdir()
    name = toy_package(tmp_path / "second", monkeypatch, main=main.format(use="Net()"), other=other)
    with pytest.raises(ValueError, match="for more than its type"):
        exported(name)


def test_a_folder_that_holds_something_is_not_overwritten_and_a_failed_export_leaves_nothing(tiny_pipeline, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        export_standalone(tiny_pipeline, tmp_path / "full", "org/x")
    with pytest.raises(ValueError, match="no section 'Use'"):
        export_standalone(tiny_pipeline, tmp_path / "new", "org/x", card="# A card without sections\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_exported_files_pass_the_door_of_the_hub(hub, tiny_pipeline, tmp_path):
    files = export_standalone(tiny_pipeline, tmp_path / "kl", "org/kl")
    HfApi().create_repo("org/kl")
    publish(tmp_path / "kl", "org/kl", files)
    assert hub.files("org/kl") == set(files)
