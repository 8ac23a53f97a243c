"""Cards: what every card must have, the cards of the bundled checkpoints, and snippets that run."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from conftest import REPOSITORY, VOLUME_SHAPE, run_example
from diffusers_med3d import AutoencoderKL3D, MedDiffusion3DPipeline, VolumeRewardModel
from diffusers_med3d.hub import cards
from diffusers_med3d.hub.cards import NOT_FOR_CLINICAL_USE, SECTIONS, Card, Figure, for_hub, missing, sections
from diffusers_med3d.hub.origin import inherited_license, license_of
from diffusers_med3d.hub.resolve import CHECKPOINTS, bundled_names

CARDS = REPOSITORY / "model_cards"
FIGURE = Figure("kid", "KID, extractor X", 0.25, floor=0.01, error=0.05, note="12 samples")


def card(**changes) -> Card:
    return dataclasses.replace(
        Card("tiny", what="A toy.", use="```python\nimport torch\n```", figures=[FIGURE]), **changes
    )


def snippet(text: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", sections(text)["Use"], re.DOTALL)
    return code


# --- any card ---


def test_metadata_and_results_are_what_the_hub_reads():
    made = card(license="cc-by-sa-3.0", base_model="org/base", datasets=["ixi"], tags=["mri"]).render()
    data = ModelCard(str(made)).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("cc-by-sa-3.0", "diffusers", cards.GENERATION)
    assert (data.base_model, data.datasets) == ("org/base", ["ixi"])
    assert data.tags == ["diffusers-med3d", "medical-imaging", "3d", "mri"]
    (result,) = data.eval_results
    assert (data.model_name, result.metric_type, result.metric_value) == ("tiny", "kid", 0.25)
    assert "model-index:" in str(made)


def test_every_card_has_all_sections_in_order_and_the_warning_first():
    text = str(card().render())
    assert tuple(sections(text)) == SECTIONS and missing(text) == []
    assert sections(text)["Not for clinical use"] == NOT_FOR_CLINICAL_USE
    assert "| KID, extractor X | 0.25 ± 0.05 | 0.01 |" in sections(text)["Evaluation"]
    assert "Not done" in sections(text)["Memorisation audit"]


@pytest.mark.parametrize(
    ("old", "new", "lack"),
    [
        ("license: other\n", "", "metadata license"),
        ("pipeline_tag: unconditional-image-generation\n", "", "metadata pipeline_tag"),
        ("## Training command", "### Training command", "section 'Training command'"),
        ("Do not use either", "Use it", "the clinical warning"),
        ("```python", "```", "a snippet"),
        ("A toy.", "", "section 'What it is'"),
    ],
)
def test_what_a_card_lacks_is_named(old, new, lack):
    text = str(card().render())
    assert old in text
    assert any(lack in found for found in missing(text.replace(old, new)))


def test_headings_in_code_are_no_sections():
    text = str(card(training="```bash\n## not a heading\ntrain\n```").render())
    assert "train" in sections(text)["Training command"] and missing(text) == []


def test_names_become_hub_ids_where_a_card_is_published():
    text = str(card(use='```python\nX.from_pretrained("a-b")\n```', what="See [a](a.md).", base_model="a").render())
    there = for_hub(text, "org", ["a", "a-b"])
    assert 'from_pretrained("org/a-b")' in there and "(https://huggingface.co/org/a)" in there
    assert ModelCard(there).data.base_model == "org/a" and missing(there) == []
    assert sections(there)["Evaluation"] == sections(text)["Evaluation"]


# --- cards of saved folders: the snippet runs as it stands ---


def test_the_snippet_of_a_pipelines_card_runs(tiny_pipeline, tmp_path, monkeypatch):
    tiny_pipeline.save_pretrained(tmp_path / "saved")
    made = cards.of_folder(tmp_path / "saved", str(tmp_path / "saved"))
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(snippet(str(made.render())), scope)
    assert scope["out"].volumes.shape == (2, 1, *VOLUME_SHAPE)
    assert len(list((tmp_path / "samples").iterdir())) == 2


@pytest.mark.parametrize("kind", ["reward", "vae", "vq"])
@pytest.mark.parametrize("volume_shape", [None, (16, 24, 16)])
def test_the_snippet_of_a_models_card_runs_on_the_size_it_was_trained_on(
    kind, volume_shape, tiny_vae, tiny_vq, tmp_path
):
    reward = VolumeRewardModel(channels=(8, 8), norm_num_groups=4, num_members=1)
    {"reward": reward, "vae": tiny_vae, "vq": tiny_vq}[kind].save_pretrained(tmp_path / "saved")
    text = str(cards.of_folder(tmp_path / "saved", str(tmp_path / "saved"), volume_shape).render())
    assert "pip install diffusers-med3d" in text and (volume_shape is None) != ("16 x 24 x 16 voxels" in text)
    scope: dict[str, object] = {}
    exec(snippet(text), scope)
    assert scope["volumes"].shape[2:] == (volume_shape or ((16,) * 3 if kind == "reward" else (32,) * 3))
    assert scope["scores"].shape == (1,) if kind == "reward" else scope["again"].shape == scope["volumes"].shape


def test_the_size_in_a_models_card_is_that_of_its_atlas_or_its_data_settings(tiny_vae, tmp_path):
    tiny_vae.set_latent_statistics(torch.zeros(4), torch.ones(4), torch.zeros(4, 6, 4, 4))
    tiny_vae.save_pretrained(tmp_path)
    assert "torch.rand(1, 1, 24, 16, 16)" in cards.of_folder(tmp_path, "x").use
    config = json.loads((tmp_path / "config.json").read_text())
    config["data_settings"] = {"volume_shape": [16, 16, 8], "spacing": [2.0, 2.0, 4.0]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = cards.of_folder(tmp_path, "x")
    assert "torch.rand(1, 1, 16, 16, 8)" in made.use and "16 x 16 x 8 voxels of 2 x 2 x 4 mm, RAS axes" in made.what


# --- licences ---


def test_a_licence_comes_from_the_card_beside_the_weights_or_from_what_they_were_made_from(
    tiny_pipeline_folder, tiny_vae, tmp_path
):
    assert license_of("brain-t1") == license_of(str(CHECKPOINTS / "brain-t1" / "vae")) == "cc-by-sa-3.0"
    assert license_of(tiny_pipeline_folder) is None and license_of("") is None
    Path(tiny_pipeline_folder, "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    assert license_of(tiny_pipeline_folder) == license_of(f"{tiny_pipeline_folder}/vae") == "mit"
    loaded = AutoencoderKL3D.from_pretrained(tiny_pipeline_folder, subfolder="vae")
    assert inherited_license(object(), tiny_vae, loaded) == "mit"
    loaded.save_pretrained(tmp_path / "again")
    assert inherited_license(loaded) == "mit"  # saving does not make it forget
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "config.json").write_text('{"_name_or_path": "brain-t1"}')
    assert license_of(str(tmp_path / "made")) == "cc-by-sa-3.0"


def test_a_folder_that_holds_nothing_has_no_card(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither model_index.json nor config.json"):
        cards.of_folder(tmp_path, "x")


# --- the cards of the bundled checkpoints ---


SOURCES = sorted((CARDS / "sources").glob("*.toml"))
PROGRESS = sorted((CARDS / "sources").glob("*.progress.json"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_card_is_what_its_source_makes(source):
    made = str(cards.from_source(source).render()) + "\n"
    assert made == (CARDS / f"{source.stem}.md").read_text(), "run: python examples/make_cards.py"


@pytest.mark.parametrize("name", bundled_names())
def test_the_card_of_a_bundled_checkpoint_is_complete(name):
    text = (CARDS / f"{name}.md").read_text()
    assert missing(text) == []
    data, found = ModelCard(text).data, sections(text)
    assert data.license == "cc-by-sa-3.0" and data.datasets == ["ixi"] and data.eval_results
    assert "CC BY-SA 3.0" in found["Data and licence"] and "accelerate launch examples/" in found["Training command"]
    assert "floor" in found["Evaluation"] and f'from_pretrained("{name}")' in snippet(text)
    assert "```bibtex" in found["Citation"]
    for picture in cards.pictures(text):
        assert (CARDS / picture).is_file(), picture


@pytest.mark.slow
@pytest.mark.parametrize("name", bundled_names())
def test_the_snippet_of_a_bundled_checkpoint_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.sub(r"num_inference_steps=\d+", "num_inference_steps=1", snippet((CARDS / f"{name}.md").read_text()))
    scope: dict[str, object] = {}
    exec(code, scope)
    if "pipe" in scope:
        assert isinstance(scope["pipe"], MedDiffusion3DPipeline) and list((tmp_path / "samples").iterdir())
    else:
        assert torch.isfinite(scope["scores"]).all()


def test_cards_are_made_again_from_their_sources(tmp_path, monkeypatch, capsys):
    shutil.copytree(CARDS / "sources", tmp_path / "sources")
    run_example(monkeypatch, "make_cards.py", "--cards_dir", tmp_path)
    curves = [f"{path.name.removesuffix('.progress.json')}-training.png" for path in PROGRESS]
    assert capsys.readouterr().out.split() == [*(f"{source.stem}.md" for source in SOURCES), *curves]
    assert SOURCES and curves and all((tmp_path / name).is_file() for name in curves)
    for source in SOURCES:
        assert (tmp_path / f"{source.stem}.md").read_bytes() == (CARDS / f"{source.stem}.md").read_bytes()


@pytest.mark.parametrize(
    ("source", "figures", "reason"),
    [
        ("licence = 'x'\n", [], "unknown keys \\['licence'\\], missing keys"),
        (None, [], "holds no figures"),
    ],
)
def test_a_source_that_cannot_be_a_card_is_refused(tmp_path, source, figures, reason):
    name = bundled_names()[0]
    text = source or (CARDS / "sources" / f"{name}.toml").read_text()
    (tmp_path / "x.toml").write_text(text)
    (tmp_path / "x.report.json").write_text(json.dumps({"figures": figures}))
    with pytest.raises(ValueError, match=reason):
        cards.from_source(tmp_path / "x.toml")
