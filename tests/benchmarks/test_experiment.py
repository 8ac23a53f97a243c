"""The decisions of benchmarks/paper/reproduce_paper.py."""

import json
import math

import numpy as np
import pytest
import torch

from diffusers_med3d.evaluation import Figure, Report, VolumeSet
from diffusers_med3d.metrics import Interval, kid
from diffusers_med3d.utils.hashing import tensor_hash
from experiment import (
    PHASES,
    at_most,
    below_zero,
    best_of,
    claim_table,
    claims,
    coordinate_sweep,
    downstream_claims,
    equal_compute_steps,
    measure,
    open_test,
    over_seeds,
    selection_score,
)

GRID = {"learning_rate": [1e-5, 3e-5], "beta": [0.01, 0.04], "window": [2, 3]}


def test_the_sweep_varies_one_setting_at_a_time_and_keeps_the_best():
    calls = []

    def score(setting):
        calls.append(setting)
        return abs(setting["learning_rate"] - 3e-5) * 1e5 + setting["beta"] + setting["window"] / 100

    best, tried = coordinate_sweep(GRID, score)
    assert best == {"learning_rate": 3e-5, "beta": 0.01, "window": 2}
    assert [setting for setting, _ in tried] == calls and len(calls) == 4  # 1 + one more value of each
    assert calls[0] == {"learning_rate": 1e-5, "beta": 0.01, "window": 2}
    assert calls[2] == {"learning_rate": 3e-5, "beta": 0.04, "window": 2}  # from the best learning rate


def test_a_setting_that_narrows_the_samples_is_never_chosen():
    best, _ = coordinate_sweep(GRID, lambda setting: math.inf if setting["window"] == 2 else 1.0)
    assert best["window"] == 3
    with pytest.raises(ValueError, match="No setting may be chosen"):
        coordinate_sweep(GRID, lambda setting: math.inf)
    with pytest.raises(ValueError, match="no values for beta"):
        coordinate_sweep(GRID | {"beta": []}, lambda setting: 1.0)


def test_selection_takes_the_distance_unless_samples_are_too_much_alike():
    def score(similarity: float, of_base: float) -> float:
        base = {"kid": 0.5, "similarity": of_base, "similarity_of_scans": 0.75}
        return selection_score({"kid": 0.3, "similarity": similarity, "similarity_of_scans": 0.75}, base)

    assert score(0.81, of_base=0.80) == 0.3 and score(0.75, of_base=0.90) == 0.3
    assert score(0.83, of_base=0.80) == math.inf


def test_a_choice_looks_at_the_distance_and_at_how_much_alike_samples_of_a_class_are():
    def features(volumes):
        return volumes.flatten(1)[:, :5]

    scans = VolumeSet(torch.rand(8, 1, 16, 16, 16), [0] * 4 + [1] * 4, [f"sub-{i}" for i in range(8)])
    alike = VolumeSet(scans.volumes[:1].repeat(8, 1, 1, 1, 1), scans.labels, [f"seed-{i}" for i in range(8)])
    found = measure(alike, scans, features)
    assert found["similarity"] == pytest.approx(1, abs=1e-3) and found["similarity_of_scans"] < 0.9
    assert found["kid"] == kid(features(alike.volumes), features(scans.volumes)).value


def test_equal_compute_counts_what_a_run_spent_beside_its_updates():
    seconds = dict.fromkeys(PHASES, 0.0) | {"update": 40.0}
    # 300 transitions of 3 units each are 300 latents of pre-training; with a reference 4 units each
    assert equal_compute_steps(seconds, 300, batch_size=10, has_reference=False) == 30
    assert equal_compute_steps(seconds, 300, batch_size=10, has_reference=True) == 40
    assert equal_compute_steps(seconds | {"decode": 40.0}, 300, batch_size=10, has_reference=False) == 60
    with pytest.raises(ValueError, match="update above 0"):
        equal_compute_steps(dict.fromkeys(PHASES, 0.0), 300, 10, False)
    with pytest.raises(ValueError, match="rollout"):
        equal_compute_steps({"update": 3.0}, 300, 10, False)


def test_the_better_candidate_by_rewards_of_equal_weight_is_kept():
    rewards = torch.tensor([[[0.0, 10.0], [1.0, 10.0]], [[1.0, 30.0], [0.9, 0.0]], [[0.5, 0.0], [0.5, 1.0]]])
    assert best_of(rewards).tolist() == [1, 0, 1]
    # a reward on a hundred times the scale decides no more
    assert best_of(rewards * torch.tensor([100.0, 1.0])).tolist() == [1, 0, 1]


def test_a_reward_that_differs_between_classes_weighs_no_less_within_them():
    rewards = torch.tensor([[[0.0, 1.0], [1.0, 0.5]], [[0.0, 1.0], [1.0, 0.5]], [[0.0, 1.0], [0.4, 0.0]]])
    of_classes = torch.tensor([[50.0, 0.0], [0.0, 0.0], [-50.0, 0.0]])[:, None]
    assert best_of(rewards + of_classes).tolist() == best_of(rewards).tolist() == [1, 1, 0]


def test_networks_of_other_weights_have_other_hashes():
    network = torch.nn.Linear(2, 2)
    before = tensor_hash(network.state_dict().items())
    assert before == tensor_hash(network.state_dict().items())
    network.bias.data[0] += 1
    assert before != tensor_hash(network.state_dict().items())


def test_the_test_subjects_are_opened_for_one_protocol_only(tmp_path):
    marker = tmp_path / "opened.json"
    open_test(marker, {"seeds": [0, 1], "learning_rate": 1e-5})
    written = marker.read_text()
    open_test(marker, {"learning_rate": 1e-5, "seeds": [0, 1]})  # to finish a run that was stopped
    with pytest.raises(ValueError, match="opened on .* with another configuration"):
        open_test(marker, {"seeds": [0, 1], "learning_rate": 2e-5})
    assert marker.read_text() == written and set(json.loads(written)) == {"protocol", "opened"}


def test_an_interval_over_runs_spans_how_much_the_runs_differ():
    same = np.zeros(4001)
    draws = {"a": same - 1.0, "b": same, "c": same + 1.0}
    mean = over_seeds(draws, ["a", "b", "c"])
    assert mean[0] == pytest.approx(0) and mean[1:].std() == pytest.approx(math.sqrt(2 / 3) / math.sqrt(3), rel=0.05)
    assert np.array_equal(over_seeds(draws, ["c"]), draws["c"])


def test_the_answer_is_yes_only_where_the_interval_is_clear_of_zero():
    assert below_zero(Interval(-1, -2, -0.1)) == "yes"
    assert below_zero(Interval(-1, -2, 0.1)) == "not shown"
    assert below_zero(Interval(1, 0.1, 2)) == "no"
    assert below_zero(Interval(-1)) == "not shown"


def test_a_limit_is_kept_only_where_the_interval_is_within_it():
    assert at_most(Interval(0.01, 0.0, 0.02), 0.02) == "yes"
    assert at_most(Interval(0.01, 0.0, 0.03), 0.02) == "not shown"
    assert at_most(Interval(0.04, 0.03, 0.05), 0.02) == "no"
    assert at_most(Interval(0.01), 0.02) == "not shown"


def report(
    after: list[float], alone: float, similarity: float = 0.79, copies: float = 0.04, detail: float = 0.7
) -> Report:
    """Figures of known value; all sets of a figure move together from resample to resample, as paired ones do."""
    common = np.concatenate([[0.0], 0.05 * np.random.default_rng(0).standard_normal(500)])
    spread = np.concatenate([[0.0], 0.01 * np.random.default_rng(1).standard_normal(500)])

    def figure(name: str, extractor: str, values: dict[str, float], size: float = 1.0) -> Figure:
        draws = {one: value + common + i * size * spread for i, (one, value) in enumerate(values.items())}
        return Figure(name, extractor, "lower", "floor", {}, {}, {}, draws)

    runs = {f"run {i}": value for i, value in enumerate(after)}
    scans = {"reference": 0.0, "floor": 0.0}
    distances = scans | {"base": 1.0, **runs, "3D only": alone, "best of 2": 0.95, "round-trip": 0.1}
    fine = {"reference": 1.0, "base": 0.4, **dict.fromkeys(runs, detail), "round-trip": 0.8}
    alike = {"reference": 0.75, "base": 0.79, **dict.fromkeys(runs, similarity)}
    flagged = {"reference": 0.05, "base": 0.05, **dict.fromkeys(runs, copies)}
    figures = [
        figure("KID tri-planar", "net-2d, 8 slices", distances),
        figure("KID axial", "net-2d, 8 slices", dict.fromkeys(distances, 9.0)),  # a part, not the mean: never judged
        figure("high-frequency power less noise, scans = 1", "", fine),
        figure("MS-SSIM, mean of pairs", "", alike, 0.1),
        figure("copies flagged", "", flagged, 0.1),
    ]
    return Report(figures, {}, [], {}, {}, ["base", *runs])


def answers(found: list) -> dict[str, str]:
    return {claim.wanted: claim.answer for claim in found}


def test_claims_hold_where_the_figures_say_so():
    names = ["run 0", "run 1", "run 2"]
    found = claims(report([0.5, 0.5, 0.5], alone=0.7), "base", names, ["3D only"], ["best of 2"], "round-trip")
    assert set(answers(found).values()) == {"yes"} and len(found) == 8
    values = {claim.wanted: claim.found.value for claim in found}
    assert values["KID tri-planar (net-2d): excess at least 15 % below that of base"] == pytest.approx(0.5, abs=0.01)
    assert values["at least half of the attainable gap in high-frequency power closed"] == pytest.approx(0.75, abs=0.01)
    table = claim_table(found)
    assert table.count("| yes |") == 8 and "| wanted |" in table


def test_where_no_sample_is_flagged_the_draw_of_the_resamples_does_not_decide():
    names = ["run 0", "run 1", "run 2"]
    for seed in range(20):
        found = report([0.5] * 3, 0.7)
        flagged = next(figure for figure in found.figures if figure.name == "copies flagged")
        scans = np.random.default_rng(seed).binomial(40, 0.05, 1001) / 40
        scans[0] = 0.05  # two of forty
        flagged.draws.update({"reference": scans} | dict.fromkeys(names, np.zeros(1001)))
        for figure in found.figures:
            figure.draws.update({one: np.resize(draws, 1001) for one, draws in figure.draws.items()})
        claimed = answers(claims(found, "base", names, [], [], "round-trip"))
        assert claimed["no more samples flagged as copies than unseen scans"] == "yes", seed


def test_claims_fail_where_the_figures_do():
    names = ["run 0", "run 1", "run 2"]
    little = answers(claims(report([0.9] * 3, 0.7), "base", names, ["3D only"], ["best of 2"], "round-trip"))
    assert little["KID tri-planar (net-2d): excess at least 15 % below that of base"] == "no"
    assert little["KID tri-planar (net-2d): both rewards below 3D only"] == "no"
    unsteady = answers(claims(report([0.2, 0.2, 1.5], 0.7), "base", names, ["3D only"], [], "round-trip"))
    assert unsteady["KID tri-planar (net-2d): below base with every seed (the worst of 3)"] == "no"
    assert unsteady["KID tri-planar (net-2d): both rewards below 3D only"] == "not shown"
    narrow = report([0.5] * 3, 0.7, similarity=0.83, copies=0.1)
    found = answers(claims(narrow, "base", names, [], [], "round-trip"))
    assert found["no more samples flagged as copies than unseen scans"] == "no"
    assert found["MS-SSIM between samples at most 0.02 further from that between scans than before"] == "no"


def test_detail_counts_as_distance_to_that_of_scans_and_only_where_the_decoder_leaves_a_gap():
    wanted = "at least half of the attainable gap in high-frequency power closed"

    def closed(detail: float, ceiling: str = "round-trip") -> str:
        return answers(claims(report([0.5], 0.7, detail=detail), "base", ["run 0"], [], [], ceiling))[wanted]

    assert closed(0.7) == "yes" and closed(0.5) == "no"
    assert closed(1.5) == "no"  # more than the scans have by nearly as much as the base had less
    assert closed(0.7, ceiling="base") == "nothing to close"


def test_what_was_not_run_is_said_to_be_missing():
    found = claims(report([0.5], alone=0.7), "base", ["run 0"], ["3D only", "2D only"], ["best of 2"], "round-trip")
    assert answers(found)["KID tri-planar (net-2d): both rewards below 2D only"] == "not run"
    assert answers(found)["KID tri-planar (net-2d): both rewards below 3D only"] == "yes"
    assert "| KID tri-planar (net-2d): both rewards below 2D only |  | not run |" in claim_table(found)


def test_the_classifier_is_judged_on_log_loss_at_ten_scans_per_class():
    differences = {
        "before - real": {"log-loss": [-0.1, -0.2, -0.05]},
        "after - before": {"log-loss": [-0.01, -0.1, 0.1]},
        "after - before, beyond shuffled": {"log-loss": [0.2, 0.1, 0.3]},
    }
    found = downstream_claims({"5": {}, "10": {"differences": differences}})
    assert [claim.answer for claim in found] == ["yes", "not shown", "no"]
    assert downstream_claims({"5": {}}) == []
