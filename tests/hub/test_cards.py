"""Cards: what every card must have, the cards of the bundled checkpoints, and snippets that run."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard

from conftest import REPOSITORY, VOLUME_SHAPE, run_example
from diffusers_med3d import MedDiffusion3DPipeline, VolumeRewardModel
from diffusers_med3d.hub import cards
from diffusers_med3d.hub.cards import NOT_FOR_CLINICAL_USE, SECTIONS, Card, Figure, for_hub, missing, sections
from diffusers_med3d.hub.resolve import bundled_names

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
def test_the_snippet_of_a_models_card_runs(kind, tiny_vae, tiny_vq, tmp_path):
    reward = VolumeRewardModel(channels=(8, 8), norm_num_groups=4, num_members=1)
    {"reward": reward, "vae": tiny_vae, "vq": tiny_vq}[kind].save_pretrained(tmp_path / "saved")
    scope: dict[str, object] = {}
    exec(snippet(str(cards.of_folder(tmp_path / "saved", str(tmp_path / "saved")).render())), scope)
    shape = scope["scores"].shape if kind == "reward" else scope["again"].shape
    assert shape == ((1,) if kind == "reward" else (1, 1, 64, 64, 64))


def test_a_folder_that_holds_nothing_has_no_card(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither model_index.json nor config.json"):
        cards.of_folder(tmp_path, "x")


# --- the cards of the bundled checkpoints ---


SOURCES = sorted((CARDS / "sources").glob("*.toml"))


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
    assert capsys.readouterr().out.split() == [f"{source.stem}.md" for source in SOURCES] != []
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
