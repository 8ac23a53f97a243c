"""The classifier protocol, and examples/downstream_classification.py as a process of its own."""

import json
import math
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from conftest import EXAMPLES
from diffusers_med3d.evaluation.downstream import (
    ARMS,
    CONTRASTS,
    Arm,
    ClassifierSettings,
    classification_figures,
    draw_real,
    estimates,
    prepare,
    run_arm,
    shuffle_labels,
)
from diffusers_med3d.metrics import bootstrap_weights
from diffusers_med3d.utils.files import once

EXAMPLE = EXAMPLES / "downstream_classification.py"
QUICK = ClassifierSettings(steps=40, batch_size=8, downsample=1, learning_rate=5e-3)
SPLIT = {
    "train": ["sub-01", "sub-03", "sub-04", "sub-06"],
    "validation": ["sub-02", "sub-05", "sub-07"],
    "test": ["sub-08"],
    "folds": {"a": ["sub-01", "sub-06"], "b": ["sub-03", "sub-04"]},
}


SUBJECTS = [f"sub-{i:02d}" for i in range(16)]


def blobs(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(2 * count, 1, 8, 8, 8) with a bright (class 1) or dim (class 0) middle, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(2).repeat_interleave(count)
    volumes = 0.1 * torch.rand(len(labels), 1, 8, 8, 8, generator=generator)
    volumes[:, :, 2:6, 2:6, 2:6] += 0.2 + 0.5 * labels.view(-1, 1, 1, 1, 1)
    return volumes, labels


def test_figures_agree_with_other_ways_to_compute_them():
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    logits = torch.randn(3, 7, generator=generator).round(decimals=1)
    logits[0, 4] = logits[0, 0]  # a tie counts half
    figures = {name: value[0] for name, value in classification_figures(logits, labels).items()}
    for s, own in enumerate(logits):
        statistic = mannwhitneyu(own[labels == 1], own[labels == 0]).statistic
        assert figures["AUC"][s].item() == pytest.approx(statistic / 12)
        probability = own.double().sigmoid()
        truth = torch.where(labels == 1, probability, 1 - probability)
        assert figures["log-loss"][s].item() == pytest.approx(-truth.log().mean().item())
        said = own > 0
        tp, fp = int((said & (labels == 1)).sum()), int((said & (labels == 0)).sum())
        recall = tp / 3
        assert figures["balanced accuracy"][s].item() == pytest.approx((recall + 1 - fp / 4) / 2)
        precision = tp / (tp + fp) if tp + fp else 0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
        assert figures["F1"][s].item() == pytest.approx(f1)


def test_a_weight_of_two_is_the_subject_twice():
    logits, labels = torch.randn(2, 5), torch.tensor([0, 1, 0, 1, 1])
    weighted = classification_figures(logits, labels, torch.tensor([[2.0, 1, 0, 3, 1]]))
    rows = [0, 0, 1, 3, 3, 3, 4]
    repeated = classification_figures(logits[:, rows], labels[rows])
    for name in weighted:
        assert torch.allclose(weighted[name], repeated[name])


def test_figures_of_one_class_alone_are_refused():
    with pytest.raises(ValueError, match="Both classes"):
        classification_figures(torch.zeros(1, 3), torch.ones(3))


def test_intervals_span_subjects_and_seeds():
    """With one seed that is as good as another the interval is the subjects', and the other way round."""
    labels = torch.arange(2).repeat_interleave(6)
    by_subject = torch.randn(1, 12).repeat(5, 1)  # all seeds alike
    by_seed = torch.where(labels == 1, 1.0, -1.0) * torch.tensor([[-1.0], [0.5], [1], [2], [3]])  # all subjects alike
    fixed = torch.where(labels == 1, 1.0, -1.0).repeat(5, 1)
    for logits, varies in ((by_subject, True), (by_seed, True), (fixed, False)):
        arms, _ = estimates({"real only": logits}, labels, SUBJECTS[:12], repeats=300)
        found = arms["real only"]["log-loss"]
        assert found.low - 1e-9 <= found.value <= found.high + 1e-9 and (found.high - found.low > 0.05) == varies
    sd = classification_figures(by_seed, labels)["log-loss"].std(correction=0).item() / math.sqrt(5)
    found = estimates({"real only": by_seed}, labels, SUBJECTS[:12], repeats=4000)[0]["real only"]["log-loss"]
    assert found.high - found.low == pytest.approx(2 * 1.96 * sd, rel=0.15)


def test_differences_are_paired():
    """Two arms that vary much from seed to seed, but alike: their difference is far better known than either."""
    labels = torch.arange(2).repeat_interleave(8)
    sign = torch.where(labels == 1, 1.0, -1.0)
    common = sign * 0.5 + torch.randn(6, 16) + torch.randn(6, 1)
    own = {"real only": common, "real + after RL": common + 0.1 * sign}
    arms, contrasts = estimates(own, labels, SUBJECTS, repeats=500)
    assert set(contrasts) == {"after - real"}
    difference = contrasts["after - real"]["log-loss"]
    assert difference.high < 0  # lower log-loss, beyond doubt
    assert difference.high - difference.low < 0.3 * (
        arms["real only"]["log-loss"].high - arms["real only"]["log-loss"].low
    )
    expected = arms["real + after RL"]["log-loss"].value - arms["real only"]["log-loss"].value
    assert difference.value == pytest.approx(expected)


def test_a_resample_is_the_figure_of_the_subjects_and_seeds_that_were_drawn():
    labels, repeats = torch.arange(2).repeat_interleave(4), 6
    subjects = ["a", "a", *SUBJECTS[:6]]  # one subject has two scans, drawn together
    own = {arm: torch.randn(3, 8) for arm in ("real only", "real + after RL")}
    arms, contrasts = estimates(own, labels, subjects, repeats=repeats, seed=5)
    of_subjects = bootstrap_weights(subjects, labels.tolist(), repeats, 5).astype(int)
    of_seeds = bootstrap_weights([f"seed {s}" for s in range(3)], [0] * 3, repeats, 5).astype(int)
    drawn: dict[str, list[dict[str, float]]] = {arm: [] for arm in own}
    for rows, seeds in zip(of_subjects, of_seeds, strict=True):
        scans = [i for i, count in enumerate(rows) for _ in range(count)]
        for arm, logits in own.items():
            chosen = torch.stack([logits[s] for s, count in enumerate(seeds) for _ in range(count)])
            truth, values = labels[scans].numpy(), chosen[:, scans].double().numpy()
            losses = np.log1p(np.exp(np.where(truth == 1, -values, values)))
            won = [mannwhitneyu(v[truth == 1], v[truth == 0]).statistic for v in values]
            pairs = (truth == 1).sum() * (truth == 0).sum()
            drawn[arm].append({"log-loss": losses.mean(), "AUC": np.mean(won) / pairs})
    for name in ("log-loss", "AUC"):
        both = np.array([[one[name] for one in drawn[arm]] for arm in own])  # (2, 1 + R)
        found = (*(arms[arm][name] for arm in own), contrasts["after - real"][name])
        for interval, (value, *resamples) in zip(found, (both[0], both[1], both[1] - both[0]), strict=True):
            expected = (value, *np.percentile(resamples, [2.5, 97.5]))
            assert (interval.value, interval.low, interval.high) == pytest.approx(expected, rel=1e-6)


def test_every_contrast_names_arms_and_compares_as_much_as_it_takes_away():
    for signs in CONTRASTS.values():
        assert signs.keys() <= ARMS.keys() and sum(signs.values()) == 0


def test_fewer_real_scans_are_among_the_more_and_seeds_differ():
    labels = [0, 1, 2, 0, 1, 0, 1, 0, 1, 1]
    few, many = draw_real(labels, 2, seed=3), draw_real(labels, 4, seed=3)
    assert set(few) <= set(many) and len(set(many)) == 8
    assert [labels[row] for row in many] == [0] * 4 + [1] * 4
    assert any(draw_real(labels, 2, seed) != few for seed in range(5))
    with pytest.raises(ValueError, match="5 real scans of class 0 were asked for, there are 4"):
        draw_real(labels, 5, seed=0)


def test_shuffled_labels_are_as_many_of_each_class_in_another_order():
    labels = torch.arange(2).repeat_interleave(20)
    shuffled = shuffle_labels(labels, seed=0)
    assert shuffled.sum() == 20 and 5 < int((shuffled != labels).sum()) < 35


@pytest.mark.slow
def test_a_classifier_learns_from_labels_and_not_from_shuffled_ones():
    real, unseen = blobs(6, seed=0), blobs(5, seed=1)
    synthetic = {"after": blobs(20, seed=2)}

    def log_loss(arm: Arm) -> float:
        logits = torch.tensor([run_arm(arm, real, synthetic, unseen[0], 3, QUICK, seed=0)])
        return classification_figures(logits, unseen[1])["log-loss"].item()

    assert log_loss(Arm(True)) < 0.4
    assert log_loss(Arm(False, "after")) < 0.4
    assert log_loss(Arm(False, "after", shuffled=True)) > 0.5


def test_a_seed_gives_the_same_classifier_whatever_was_drawn_before():
    real, unseen = blobs(3, seed=0), blobs(2, seed=1)[0]
    settings = ClassifierSettings(steps=2, batch_size=4, downsample=1)
    first = run_arm(Arm(True), real, {}, unseen, 2, settings, seed=5)
    torch.randn(7)
    state = torch.get_rng_state()
    assert run_arm(Arm(True), real, {}, unseen, 2, settings, seed=5) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert run_arm(Arm(True), real, {}, unseen, 2, settings, seed=6) != first


def test_volumes_are_averaged_and_too_small_ones_refused():
    small = prepare(torch.arange(16.0**3).view(1, 1, 16, 16, 16), ClassifierSettings(downsample=2))
    assert small.shape == (1, 1, 8, 8, 8)
    assert small[0, 0, 0, 0, 0].item() == (0 + 1 + 16 + 17 + 256 + 257 + 272 + 273) / 8
    with pytest.raises(ValueError, match=r"needs 8 voxels a side; \(16, 16, 16\) downsampled by 4 leaves \(4, 4, 4\)"):
        prepare(torch.zeros(1, 1, 16, 16, 16), ClassifierSettings(downsample=4))
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        ClassifierSettings(batch_size=6)


def test_a_result_is_made_once_and_never_half_written(tmp_path):
    path = tmp_path / "deep" / "result.json"
    assert once(path, lambda: [1, 2]) == [1, 2] and once(path, lambda: pytest.fail("made again")) == [1, 2]

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        once(tmp_path / "other.json", interrupted)
    with pytest.raises(ValueError, match="not JSON compliant"):
        once(tmp_path / "other.json", lambda: float("nan"))
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


@pytest.mark.slow
def test_the_example_reports_resumes_and_refuses_another_trial(
    tiny_pipeline, tiny_pipeline_folder, brains_folder, tmp_path, monkeypatch, capsys
):
    with torch.no_grad():
        tiny_pipeline.unet.out[2].conv.bias += 0.1
    tiny_pipeline.save_pretrained(tmp_path / "after")
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    out = tmp_path / "out"
    command = [str(EXAMPLE), "--data_dir", brains_folder, "--split_file", str(tmp_path / "split.json")]
    command += ["--model_name_or_path", tiny_pipeline_folder, str(tmp_path / "after"), "--output_dir", str(out)]
    command += ["--volume_shape", "16", "16", "16", "--spacing", "12", "12", "12", "--num_synthetic", "2"]
    command += ["--num_inference_steps", "2", "--real_per_class", "1", "--batch_size", "4", "--repeats", "50"]

    def launch(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [*command, *flags])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        return capsys.readouterr().out

    launch("--seeds", "1", "--steps", "2")
    answers = sorted((out / "classifiers").iterdir())
    assert len(answers) == len(ARMS)
    answers[0].write_text("[5.0, -5.0]")  # made earlier, so it is not made again
    answers[1].unlink()  # as if the run had been stopped before this one
    printed = launch("--seeds", "2", "--steps", "2")
    assert len(list((out / "classifiers").iterdir())) == 2 * len(ARMS) and answers[0].read_text() == "[5.0, -5.0]"
    report = json.loads((out / "report.json").read_text())
    assert report["setting"]["part"] == "validation" and report["setting"]["unseen_subjects"] == ["sub-02", "sub-07"]
    arms = report["results"]["1"]["arms"]
    assert set(arms) == set(ARMS) and set(report["results"]["1"]["differences"]) == set(CONTRASTS)
    assert all(low - 1e-9 <= value <= high + 1e-9 for own in arms.values() for value, low, high in own.values())
    text = (out / "report.md").read_text()
    assert "1 + 1 unseen validation scans, 2 seeds" in text and "labels of all training scans" in text
    assert text.strip() in printed and (out / "downstream.png").is_file() and str(tmp_path) not in text

    for flags, changed in ((("--steps", "3"), "classifier"), (("--steps", "2", "--antialias", "true"), "antialias")):
        with pytest.raises(ValueError, match=rf"results of another trial \(other {changed}\)"):
            launch("--seeds", "2", *flags)

    corrected = shutil.copytree(brains_folder, tmp_path / "corrected") / "metadata.csv"
    rows = corrected.read_text()
    corrected.write_text(rows.replace("sub-01,22.5", "sub-01,62").replace("sub-06,62", "sub-06,22.5"))
    assert corrected.read_text() != rows
    with pytest.raises(ValueError, match=r"results of another trial \(other training_labels\)"):
        launch("--seeds", "2", "--steps", "2", "--data_dir", str(corrected.parent))

    # what could not be trained or judged is refused before anything is sampled
    shutil.rmtree(out)
    (tmp_path / "after" / "training_subjects.json").write_text('["sub-01", "sub-07"]')
    for flags, message in (
        (("--real_per_class", "1", "3"), "3 real scans of class 1 were asked for, there are 1"),
        (("--seeds", "0"), "seeds must be at least 1, got 0"),
        (("--downsample", "4"), "needs 8 voxels a side"),
        ((), "subjects were in the training set of 'after', the first is 'sub-07'"),
    ):
        with pytest.raises(SystemExit) as refusal:
            launch(*flags)
        assert message in str(refusal.value) + capsys.readouterr().err
    assert not out.exists()
