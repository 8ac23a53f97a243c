"""The Hub both ways, with huggingface_hub's own client, over HTTP to a server on loopback (tests/minihub.py)."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, ConfigMixin, DiffusionPipeline
from diffusers.utils.hub_utils import PushToHubMixin
from huggingface_hub import HfApi, ModelCard, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from peft import LoraConfig
from safetensors.torch import save_file

import test_autoencoder_trainer as stage_1
import test_ddpo_trainer as stage_4
import test_diffusion_trainer as stage_2
import test_reward_trainer as stage_3
from conftest import EXAMPLES, SPACING, VOLUME_SHAPE, run_example
from diffusers_med3d import (
    AutoencoderKL3D,
    AutoencoderKLMaisi3D,
    DiffusionUNet3D,
    DiffusionUNetMaisi3D,
    MedDiffusion3DPipeline,
    SliceReward,
    SliceRewardModel,
    VolumeReward,
    VolumeRewardModel,
    VQModel3D,
    viz,
)
from diffusers_med3d.data import DataArguments, VolumeDataset
from diffusers_med3d.data.training_subjects import read_training_subjects
from diffusers_med3d.evaluation.sampling import check_unseen
from diffusers_med3d.hub.cards import NO_AUDIT, NOT_FOR_CLINICAL_USE, missing, of_folder, sections
from diffusers_med3d.hub.origin import public_name
from diffusers_med3d.hub.publish import PublishMixin, check_publishable, model_files, publish
from diffusers_med3d.hub.resolve import bundled_names, resolve
from diffusers_med3d.trainers.reward import RewardModelTrainer

PIPELINE_FILES = {
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}
MODEL_FILES = {"README.md", "config.json", "diffusion_pytorch_model.safetensors"}


def sample(pipeline: DiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(class_labels=["young", "old"], num_inference_steps=2, generator=torch.manual_seed(5)).volumes


def tiny_reward(kind: type = VolumeRewardModel) -> VolumeRewardModel | SliceRewardModel:
    return kind(channels=(8, 8), norm_num_groups=4, num_members=1).eval()


def with_moved_weights(pipeline: MedDiffusion3DPipeline) -> MedDiffusion3DPipeline:
    with torch.no_grad():
        pipeline.unet.conv_in.conv.weight.add_(0.5)
    return pipeline


# --- there and back ---


@pytest.mark.slow
def test_a_pushed_pipeline_has_our_card_and_loads_in_every_way(hub, tiny_pipeline):
    tiny_pipeline.push_to_hub("tiny")
    assert hub.files("tester/tiny") == PIPELINE_FILES
    card = hub.read("tester/tiny", "README.md").decode()
    assert missing(card) == [] and NOT_FOR_CLINICAL_USE in card
    assert "16 x 16 x 16 voxels" in card and "young, middle, old" in card and '"tester/tiny"' in card
    for loader in (MedDiffusion3DPipeline, DiffusionPipeline):
        loaded = loader.from_pretrained("tester/tiny")
        assert type(loaded) is MedDiffusion3DPipeline
        assert torch.equal(sample(loaded), sample(tiny_pipeline))
    assert type(AutoencoderKL3D.from_pretrained("tester/tiny", subfolder="vae")) is AutoencoderKL3D
    assert type(AutoModel.from_pretrained("tester/tiny", subfolder="unet")) is DiffusionUNet3D


def test_saving_with_push_to_hub_publishes_the_same_and_nothing_else_in_the_folder(hub, tiny_pipeline, tmp_path):
    folder = tmp_path / "run"
    (folder / "runs").mkdir(parents=True)
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "runs" / "events.out.tfevents.1.host").write_text("log")
    tiny_pipeline.save_pretrained(folder, push_to_hub=True, repo_id="tester/saved")
    assert hub.files("tester/saved") == PIPELINE_FILES
    assert NOT_FOR_CLINICAL_USE in hub.read("tester/saved", "README.md").decode()


@pytest.mark.slow
def test_what_was_loaded_from_a_folder_does_not_tell_the_folder_on_the_hub(hub, tiny_pipeline_folder, tmp_path):
    MedDiffusion3DPipeline.from_pretrained(tiny_pipeline_folder).push_to_hub("tiny")
    DiffusionUNet3D.from_pretrained(tiny_pipeline_folder, subfolder="unet").push_to_hub("unet")
    texts = [hub.read("tester/tiny", name) for name in PIPELINE_FILES if name.endswith((".json", ".md"))]
    texts += [hub.read("tester/unet", name) for name in ("config.json", "README.md")]
    assert not any(str(tmp_path).encode() in text or b"tiny-pipeline/" in text for text in texts)


@pytest.mark.parametrize(
    ("kind", "reward"), [(VolumeRewardModel, VolumeReward), (SliceRewardModel, SliceReward)], ids=["3d", "2d"]
)
def test_a_reward_model_goes_to_the_hub_and_back_as_a_reward(hub, tiny_volumes, kind, reward):
    model = tiny_reward(kind)
    model.push_to_hub("org/reward")
    assert hub.files("org/reward") == MODEL_FILES
    assert missing(hub.read("org/reward", "README.md").decode()) == []
    loaded = reward.from_pretrained("org/reward", token=hub.token)
    assert torch.equal(loaded(tiny_volumes), reward(model)(tiny_volumes))
    assert type(AutoModel.from_pretrained("org/reward")) is kind


def test_a_generator_on_the_hub_says_what_it_was_trained_on_and_one_that_does_not_is_refused(hub, tiny_pipeline):
    tiny_pipeline.push_to_hub("org/tiny", token=hub.token)
    with pytest.raises(FileNotFoundError, match="org/tiny has no training_subjects.json"):
        read_training_subjects("org/tiny")
    check_unseen("org/tiny", ["sub-01"])  # nobody can tell
    HfApi().upload_file(path_or_fileobj=b'["sub-01"]', path_in_repo="training_subjects.json", repo_id="org/tiny")
    assert read_training_subjects("org/tiny") == {"sub-01"}
    with pytest.raises(ValueError, match="1 of 2 subjects were in the training set of 'tiny'"):
        check_unseen("org/tiny", ["sub-01", "sub-02"])


def test_an_autoencoder_alone_gets_a_card_too(hub, tiny_vae):
    tiny_vae.push_to_hub("vae")
    assert missing(hub.read("tester/vae", "README.md").decode()) == []


@pytest.mark.slow
def test_a_card_that_somebody_wrote_on_the_hub_is_kept_if_it_has_the_warning(hub, tiny_pipeline):
    tiny_pipeline.push_to_hub("tiny")
    mine = hub.read("tester/tiny", "README.md").decode() + "\nMeasured by hand.\n"
    api = HfApi()
    api.upload_file(path_or_fileobj=mine.encode(), path_in_repo="README.md", repo_id="tester/tiny")
    tiny_pipeline.push_to_hub("tiny")
    assert "Measured by hand." in hub.read("tester/tiny", "README.md").decode()
    api.upload_file(path_or_fileobj=b"# bare", path_in_repo="README.md", repo_id="tester/tiny")
    tiny_pipeline.push_to_hub("tiny")
    assert NOT_FOR_CLINICAL_USE in hub.read("tester/tiny", "README.md").decode()


@pytest.fixture
def folder_with_card(tiny_pipeline, tmp_path) -> Path:
    """A saved pipeline with a card and pictures beside it, as a trainer leaves it."""
    folder = tmp_path / "mine"
    tiny_pipeline.save_pretrained(folder)
    made = of_folder(folder, "outputs/mine")
    made.license, made.evaluation = "cc-by-4.0", "| reward | 0.7 |\n\n![samples](figures/samples.png)"
    made.write(folder)
    (folder / "figures").mkdir()
    (folder / "figures" / "samples.png").write_bytes(b"picture")
    (folder / "figures" / "other.png").write_bytes(b"not in the card")
    return folder


def test_the_card_beside_a_pipeline_travels_with_its_pictures(hub, folder_with_card):
    pipeline = MedDiffusion3DPipeline.from_pretrained(folder_with_card)
    for push in (
        lambda: pipeline.push_to_hub("tester/pushed"),
        lambda: pipeline.save_pretrained(folder_with_card, push_to_hub=True, repo_id="tester/pushed"),
    ):
        push()
        assert hub.files("tester/pushed") == PIPELINE_FILES | {"figures/samples.png"}
        card = hub.read("tester/pushed", "README.md").decode()
        assert "| reward | 0.7 |" in card and ModelCard(card).data.license == "cc-by-4.0"
        assert 'from_pretrained("tester/pushed")' in card and "outputs/mine" not in card


def test_the_card_beside_a_pipeline_does_not_travel_with_other_weights(hub, folder_with_card):
    with_moved_weights(MedDiffusion3DPipeline.from_pretrained(folder_with_card)).push_to_hub("changed")
    assert hub.files("tester/changed") == PIPELINE_FILES
    card = hub.read("tester/changed", "README.md").decode()
    assert "0.7" not in card and ModelCard(card).data.license == "cc-by-4.0"


@pytest.mark.slow
def test_a_generator_without_a_search_for_copies_is_published_with_a_warning(
    hub, folder_with_card, tiny_vae, tmp_path, monkeypatch
):
    unknown = "Nobody has looked whether samples of tester/mine are copies of training scans: run `python examples/eval"
    pipeline = MedDiffusion3DPipeline.from_pretrained(folder_with_card)
    with pytest.warns(UserWarning, match=unknown):
        pipeline.push_to_hub("tester/mine")
    dry = ("--model_name_or_path", folder_with_card, "--namespace", "tester", "--dry_run")
    with pytest.warns(UserWarning, match=unknown):
        run_example(monkeypatch, "push_to_hub.py", *dry)
    card = folder_with_card / "README.md"
    card.write_text(card.read_text().replace(NO_AUDIT, "None of 24 samples is flagged as a copy."))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        MedDiffusion3DPipeline.from_pretrained(folder_with_card).push_to_hub("tester/mine")
        run_example(monkeypatch, "push_to_hub.py", *dry)
        tiny_vae.push_to_hub("tester/vae")  # makes no samples
    assert "None of 24 samples" in hub.read("tester/mine", "README.md").decode()


def test_a_card_without_the_warning_gets_it(hub, tiny_vae, tmp_path):
    tiny_vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\nMeasured by hand.\n")
    AutoencoderKL3D.from_pretrained(tmp_path / "vae").push_to_hub("vae")
    card = hub.read("tester/vae", "README.md").decode()
    assert NOT_FOR_CLINICAL_USE in card and "Measured by hand." in card and ModelCard(card).data.license == "mit"


@pytest.mark.slow
def test_a_trainer_pushes_its_last_card_with_table_and_pictures(hub, tiny_pipeline_folder, tmp_path):
    pipeline = MedDiffusion3DPipeline.from_pretrained(tiny_pipeline_folder)
    trainer = stage_4.make_trainer(pipeline, tmp_path / "tuned", push_to_hub=True)
    trainer.save_model()  # pushes too, with the card of now
    trainer.log_figure("before_after", viz.curves({"reward": ([1, 2], [0.1, 0.2])}))
    trainer.card_notes += "\n\n| reward | 0.1 | 0.2 |\n\n![before and after](figures/before_after.png)"
    trainer.push_to_hub()
    assert hub.files("tester/tuned") == PIPELINE_FILES | {"figures/before_after.png"}
    assert "| reward | 0.1 | 0.2 |" in hub.read("tester/tuned", "README.md").decode()


@pytest.mark.slow
def test_a_licence_on_the_hub_is_inherited(hub, folder_with_card, tmp_path):
    MedDiffusion3DPipeline.from_pretrained(folder_with_card).push_to_hub("base")
    trainer = stage_4.make_trainer(MedDiffusion3DPipeline.from_pretrained("tester/base"), tmp_path / "tuned")
    trainer.push_to_hub()
    assert ModelCard(hub.read("tester/tuned", "README.md").decode()).data.license == "cc-by-4.0"


def test_the_private_method_that_every_push_of_diffusers_ends_in_is_still_there():
    theirs = inspect.signature(PushToHubMixin._upload_folder).parameters
    assert list(theirs) == list(inspect.signature(PublishMixin._upload_folder).parameters)
    networks = (DiffusionUNet3D, DiffusionUNetMaisi3D, AutoencoderKL3D, AutoencoderKLMaisi3D, VQModel3D)
    for kind in (MedDiffusion3DPipeline, *networks, VolumeRewardModel, SliceRewardModel):
        assert kind._upload_folder is PublishMixin._upload_folder, kind
        assert kind.save_config is PublishMixin.save_config, kind
        assert PublishMixin in kind.__mro__[: kind.__mro__.index(ConfigMixin)], kind  # its to_json_string comes first


# --- revisions, tokens, what is not there ---


@pytest.mark.slow
def test_a_revision_is_a_tag_a_branch_or_a_commit(hub, tiny_pipeline):
    first = tiny_pipeline.push_to_hub("tiny").oid
    before = sample(tiny_pipeline)
    api = HfApi()
    api.create_tag("tester/tiny", tag="v1")
    api.create_branch("tester/tiny", branch="old")
    with_moved_weights(tiny_pipeline).push_to_hub("tiny")
    after = sample(tiny_pipeline)
    assert not torch.equal(before, after)
    for revision in ("v1", "old", first):
        assert torch.equal(sample(MedDiffusion3DPipeline.from_pretrained("tester/tiny", revision=revision)), before)
    assert torch.equal(sample(MedDiffusion3DPipeline.from_pretrained("tester/tiny")), after)


@pytest.mark.slow
def test_a_private_repository_opens_to_its_token_alone(hub, tiny_pipeline, monkeypatch):
    tiny_pipeline.push_to_hub("org/secret", private=True)
    tiny_reward().push_to_hub("org/secret-reward", private=True)
    assert hub.repos["model", "org/secret"].private
    monkeypatch.delenv("HF_TOKEN")
    for token in (None, "hf_wrong"):
        with pytest.raises(OSError, match="org/secret") as refusal:
            MedDiffusion3DPipeline.from_pretrained("org/secret", token=token)
        assert "401" in f"{refusal.value} {refusal.value.__cause__}"
        with pytest.raises(OSError, match="org/secret-reward"):
            VolumeReward.from_pretrained("org/secret-reward", token=token)
    assert not Path(hub.cache, "models--org--secret", "snapshots").exists()
    for token in (hub.reader, hub.token):
        assert torch.equal(
            sample(MedDiffusion3DPipeline.from_pretrained("org/secret", token=token)), sample(tiny_pipeline)
        )
        VolumeReward.from_pretrained("org/secret-reward", token=token)


def test_nothing_is_pushed_without_the_right_to_write(hub, tiny_pipeline):
    for token, status in (("hf_wrong", "401"), (hub.reader, "403")):
        with pytest.raises(HfHubHTTPError, match=status):
            tiny_pipeline.push_to_hub("tiny", token=token)
    assert hub.repos == {}


@pytest.mark.slow
def test_a_missing_repository_and_a_missing_revision_are_named(hub, tiny_pipeline):
    with pytest.raises(OSError, match="org/nowhere") as refusal:
        MedDiffusion3DPipeline.from_pretrained("org/nowhere")
    assert isinstance(refusal.value.__cause__, RepositoryNotFoundError)
    with pytest.raises(OSError, match="org/nowhere"):
        VolumeReward.from_pretrained("org/nowhere")
    tiny_pipeline.push_to_hub("tiny")
    with pytest.raises(OSError, match="tester/tiny|v9"):
        MedDiffusion3DPipeline.from_pretrained("tester/tiny", revision="v9")


# --- connections that break ---


@pytest.mark.slow
def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub, tiny_pipeline, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # 10 MB, of which the last, partial one is lost
    tiny_pipeline.push_to_hub("tiny")
    sha = hub.sha("tester/tiny", "unet/diffusion_pytorch_model.safetensors")
    hub.cuts[sha] = 5000
    loaded = MedDiffusion3DPipeline.from_pretrained("tester/tiny")
    assert hub.downloads(sha) == [f"GET /_cdn/{sha}", f"GET /_cdn/{sha} bytes=5000-"]
    assert torch.equal(sample(loaded), sample(tiny_pipeline))


@pytest.mark.slow
def test_after_a_failed_download_only_what_is_missing_is_fetched(hub, tiny_pipeline):
    tiny_pipeline.push_to_hub("tiny")
    unet, vae = (hub.sha("tester/tiny", f"{part}/diffusion_pytorch_model.safetensors") for part in ("unet", "vae"))
    hub.broken.add(unet)
    with pytest.raises(HfHubHTTPError, match="500"):
        MedDiffusion3DPipeline.from_pretrained("tester/tiny")
    assert list(Path(hub.cache).rglob("*.incomplete")) == []
    fetched = len(hub.downloads(vae))
    hub.broken.clear()
    assert torch.equal(sample(MedDiffusion3DPipeline.from_pretrained("tester/tiny")), sample(tiny_pipeline))
    assert fetched == len(hub.downloads(vae)) == 1


@pytest.mark.slow
def test_with_a_warm_cache_everything_loads_offline(hub, tiny_pipeline, tiny_volumes, monkeypatch):
    model = tiny_reward()
    tiny_pipeline.push_to_hub("tiny")
    model.push_to_hub("reward")
    MedDiffusion3DPipeline.from_pretrained("tester/tiny")
    VolumeReward.from_pretrained("tester/reward")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.log)
    assert torch.equal(sample(MedDiffusion3DPipeline.from_pretrained("tester/tiny")), sample(tiny_pipeline))
    assert type(DiffusionPipeline.from_pretrained("tester/tiny", local_files_only=True)) is MedDiffusion3DPipeline
    reward = VolumeReward.from_pretrained("tester/reward")
    assert torch.equal(reward(tiny_volumes), VolumeReward(model)(tiny_volumes))
    with pytest.raises(OSError, match="tester/other"):
        MedDiffusion3DPipeline.from_pretrained("tester/other")
    assert len(hub.log) == asked


@pytest.mark.slow
def test_with_a_warm_cache_everything_loads_when_the_hub_cannot_be_reached(hub, tiny_pipeline):
    tiny_pipeline.push_to_hub("tiny")
    tiny_reward().push_to_hub("reward")
    MedDiffusion3DPipeline.from_pretrained("tester/tiny")
    VolumeReward.from_pretrained("tester/reward")
    hub.server.shutdown()
    hub.server.server_close()
    assert torch.equal(sample(MedDiffusion3DPipeline.from_pretrained("tester/tiny")), sample(tiny_pipeline))
    VolumeReward.from_pretrained("tester/reward")


@pytest.mark.slow
def test_hf_download_fetches_a_folder_that_loads(hub, tiny_pipeline, tmp_path):
    tiny_pipeline.push_to_hub("tiny")
    command = [Path(sys.executable).parent / "hf", "download", "tester/tiny", "--local-dir", tmp_path / "downloaded"]
    done = subprocess.run(command, env=os.environ | hub.environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = MedDiffusion3DPipeline.from_pretrained(tmp_path / "downloaded")
    assert torch.equal(sample(loaded), sample(tiny_pipeline))
    assert (tmp_path / "downloaded" / "README.md").is_file()


# --- trainers ---


@pytest.fixture
def scans(brains_folder) -> VolumeDataset:
    args = DataArguments(brains_folder, "unused.json", volume_shape=list(VOLUME_SHAPE), spacing=list(SPACING))
    return VolumeDataset(brains_folder, ["sub-01", "sub-04"], **args.reading())


def trainer_of(stage: str, folder: Path, scans: VolumeDataset, pipeline: MedDiffusion3DPipeline):
    """A trainer of each stage, not trained."""
    if stage == "autoencoder":
        return stage_1.make(folder, stage_1.kl_model(), scans)
    if stage == "generator":
        return stage_2.make(folder, pipeline, scans)
    if stage == "reward":
        spectrum = stage_3.toy_spectrum(folder / "spectrum", 2)
        return RewardModelTrainer(model=tiny_reward(), args=stage_3.config(folder), train_dataset=spectrum)
    adapters = LoraConfig(r=2, target_modules=["to_q", "to_v"]) if stage == "fine-tuning with LoRA" else None
    return stage_4.make_trainer(pipeline, folder, peft_config=adapters)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("autoencoder", MODEL_FILES),
        ("generator", PIPELINE_FILES),
        ("reward", MODEL_FILES),
        ("fine-tuning", PIPELINE_FILES),
        ("fine-tuning with LoRA", PIPELINE_FILES | {"pytorch_lora_weights.safetensors"}),
    ],
)
def test_the_trainer_of_every_stage_publishes_what_loads_and_its_card_alone(
    hub, scans, tiny_pipeline, tmp_path, stage, expected
):
    folder = tmp_path / "secret-place"
    trainer = trainer_of(stage, folder, scans, tiny_pipeline)
    # what a run leaves beside the model
    for name in ("training_args.bin", "checkpoint-2/optimizer.pt", "checkpoint-2/model.safetensors", "cache/scan.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"local")
    trainer.push_to_hub(private=True)
    assert trainer.hub_model_id == "tester/secret-place" and hub.repos["model", "tester/secret-place"].private
    assert hub.files("tester/secret-place") == expected
    for name in expected:
        assert str(tmp_path).encode() not in hub.read("tester/secret-place", name), name
    card = hub.read("tester/secret-place", "README.md").decode()
    assert missing(card) == [] and type(trainer).__name__ in sections(card)["Training command"]
    assert 'from_pretrained("tester/secret-place")' in sections(card)["Use"]
    loaded = (AutoModel if expected == MODEL_FILES else DiffusionPipeline).from_pretrained("tester/secret-place")
    if stage == "fine-tuning with LoRA":
        loaded.load_lora_weights("tester/secret-place", adapter_name="tuned")
        assert loaded.get_active_adapters() == ["tuned"]


@pytest.mark.slow
def test_a_fine_tuned_pipeline_names_its_base(hub, tiny_pipeline, tiny_pipeline_folder, tmp_path):
    tiny_pipeline.push_to_hub("tiny")
    for source, base in (("tester/tiny", "tester/tiny"), (tiny_pipeline_folder, None)):
        trainer = stage_4.make_trainer(MedDiffusion3DPipeline.from_pretrained(source), tmp_path / "tuned")
        trainer.push_to_hub()
        assert ModelCard(hub.read("tester/tuned", "README.md").decode()).data.base_model == base
    bundled = DiffusionUNet3D.from_pretrained(resolve("brain-t1"), subfolder="unet")
    bundled.register_to_config(_name_or_path=resolve("brain-t1"))
    assert public_name(bundled) == "brain-t1"


def test_a_trainer_pushes_to_the_branch_and_under_the_token_that_it_is_told(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    HfApi(token=hub.token).create_repo("org/named")
    HfApi(token=hub.token).create_branch("org/named", branch="trial")
    spectrum = stage_3.toy_spectrum(tmp_path / "spectrum", 2)
    args = stage_3.config(tmp_path / "out", hub_model_id="org/named")
    trainer = RewardModelTrainer(model=tiny_reward(), args=args, train_dataset=spectrum)
    future = trainer.push_to_hub(revision="trial", token=hub.token, blocking=False, commit_message="half way")
    future.result(timeout=60)
    assert hub.files("org/named", "trial") == MODEL_FILES and hub.files("org/named") == set()
    assert hub.repos["model", "org/named"].resolve("trial")["title"] == "half way"


# --- what must stay ---


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", '{"_name_or_path": "/data/me/model"}', "holds the local path '/data/me/model'"),
        ("README.md", "Trained on `/mnt/hospital/scans/`.", "local path '/mnt/hospital/scans/'"),
        ("README.md", "C:\\Users\\me\\scans", "local path 'C:"),
        ("README.md", "token hf_abcdefghijklmnopqrstuvwxyz", "a Hub token"),
        ("training_args.bin", "x", "training_args.bin is none of"),
        ("optimizer.pt", "x", "optimizer.pt is none of"),
        ("scan.nii.gz", "x", "scan.nii.gz is none of"),
    ],
)
def test_local_things_are_refused_before_anything_is_uploaded(hub, tmp_path, name, content, reason):
    HfApi().create_repo("tester/x")
    (tmp_path / name).write_text(content)
    (tmp_path / "fine.json").write_text('{"source": "https://example.org/a/b", "sides": "X/f, Y/f", "id": "org/name"}')
    with pytest.raises(ValueError, match="Nothing was uploaded") as refusal:
        publish(tmp_path, "tester/x", ["fine.json", name])
    assert reason in str(refusal.value) and "fine.json" not in str(refusal.value)
    assert hub.files("tester/x") == set()
    check_publishable(tmp_path, ["fine.json"])


def test_local_paths_in_the_metadata_of_weights_are_found(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"config": '{"base": "/data/me/base"}'})
    with pytest.raises(ValueError, match="a.safetensors holds the local path '/data/me/base'"):
        check_publishable(tmp_path, ["a.safetensors"])


def test_pickled_weights_are_not_pushed(hub, tiny_pipeline):
    with pytest.raises(ValueError, match="is a pickle"):
        tiny_pipeline.unet.push_to_hub("unet", safe_serialization=False)
    assert hub.files("tester/unet") == set()


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no saved pipeline or model"):
        model_files(tmp_path)


# --- examples/push_to_hub.py ---


def test_the_dry_run_shows_every_bundled_checkpoint_with_its_card_and_asks_nobody(hub, monkeypatch, capsys):
    run_example(monkeypatch, "push_to_hub.py", "--namespace", "org", "--dry_run")
    out = capsys.readouterr().out
    for name in bundled_names():
        assert f"org/{name}" in out
    assert out.count("README.md") == len(bundled_names()) and "cc-by-sa-3.0" in out and "nothing was uploaded" in out
    assert hub.repos == {} and hub.log == []


def test_one_command_publishes_a_bundled_checkpoint_with_card_pictures_and_tag(hub, monkeypatch, capsys, tiny_volumes):
    name = "brain-t1-reward-2d"
    run_example(
        monkeypatch, "push_to_hub.py", "--namespace", "org", "--model_name_or_path", name, "--tag", "v0", "--private"
    )
    assert hub.files(f"org/{name}") >= MODEL_FILES and hub.repos["model", f"org/{name}"].private
    card = hub.read(f"org/{name}", "README.md", "v0").decode()
    assert missing(card) == [] and f'from_pretrained("org/{name}")' in card and ".md)" not in card
    volumes = torch.nn.functional.interpolate(tiny_volumes, size=(64, 64, 64))
    from_hub, bundled = SliceReward.from_pretrained(f"org/{name}"), SliceReward.from_pretrained(name)
    assert torch.equal(from_hub(volumes), bundled(volumes))


def test_a_checkpoint_whose_card_lacks_something_is_not_published(hub, monkeypatch, tmp_path):
    shutil.copytree(EXAMPLES.parent / "model_cards", tmp_path / "cards")
    path = tmp_path / "cards" / "brain-t1-reward-2d.md"
    path.write_text(path.read_text().replace("## Memorisation audit", "## Something else"))
    with pytest.raises(SystemExit, match="section 'Memorisation audit'"):
        run_example(monkeypatch, "push_to_hub.py", "--namespace", "org", "--cards_dir", tmp_path / "cards")
    assert hub.repos == {}


@pytest.mark.slow
def test_a_folder_of_ones_own_is_published_with_a_card_and_without_what_else_lies_in_it(
    hub, monkeypatch, tmp_path, tiny_pipeline_folder, tiny_vae
):
    folder = Path(tiny_pipeline_folder)
    (folder / "training_subjects.json").write_text('["sub-01"]')
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "model.safetensors").write_bytes(b"large")
    tiny_vae.save_pretrained(tmp_path / "vae")
    run_example(monkeypatch, "push_to_hub.py", "--namespace", "org", "--model_name_or_path", folder, tmp_path / "vae")
    assert hub.files("org/tiny-pipeline") >= PIPELINE_FILES and hub.files("org/vae") >= MODEL_FILES
    assert not {"training_subjects.json", "checkpoint-1/model.safetensors"} & hub.files("org/tiny-pipeline")
    card = hub.read("org/tiny-pipeline", "README.md").decode()
    assert missing(card) == [] and 'from_pretrained("org/tiny-pipeline")' in card
    run_example(monkeypatch, "push_to_hub.py", "--repo_id", "org/other", "--model_name_or_path", folder)
    assert 'from_pretrained("org/other")' in hub.read("org/other", "README.md").decode()
    with pytest.raises(SystemExit, match="holds no saved pipeline or model"):
        run_example(monkeypatch, "push_to_hub.py", "--repo_id", "org/no", "--model_name_or_path", tmp_path)


def test_snapshots_hold_what_was_pushed_byte_for_byte(hub, tiny_pipeline, tmp_path):
    tiny_pipeline.push_to_hub("tiny")
    tiny_pipeline.save_pretrained(tmp_path / "saved")
    snapshot = Path(snapshot_download("tester/tiny"))
    for name in PIPELINE_FILES - {"README.md"}:
        assert (snapshot / name).read_bytes() == (tmp_path / "saved" / name).read_bytes(), name
    assert json.loads((snapshot / "model_index.json").read_text())["_class_name"] == "MedDiffusion3DPipeline"
