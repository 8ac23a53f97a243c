"""Settings of a data set: said once, read by every stage, and refused where two sources contradict each other."""

import json

import pytest

from diffusers_med3d.data import (
    DataArguments,
    DataSettings,
    VolumeDataset,
    check_same_settings,
    make_split,
    read_settings,
    save_split,
    settings_of,
    write_settings,
)

SAID = DataSettings(volume_shape=[40, 56, 40], spacing=[1.0] * 3, label_column="grade", class_names=["LGG", "HGG"])


def arguments(folder, split="", **flags) -> DataArguments:
    return DataArguments(str(folder), str(split), **flags)


def test_settings_come_back_from_their_file(tmp_path):
    write_settings(SAID, tmp_path)
    assert read_settings(tmp_path) == SAID
    assert read_settings(tmp_path / "elsewhere") == DataSettings()


def test_what_no_flag_says_comes_from_the_data_set(tmp_path):
    write_settings(SAID, tmp_path)
    args = arguments(tmp_path)
    assert (args.volume_shape, args.spacing) == ([40, 56, 40], [1.0] * 3)
    assert (args.label_column, args.class_names, args.class_edges) == ("grade", ["LGG", "HGG"], [])
    assert args.notes == []


def test_a_flag_that_contradicts_the_data_set_is_refused_with_both_values(tmp_path):
    write_settings(SAID, tmp_path)
    assert arguments(tmp_path, spacing=[1, 1, 1]).spacing == [1.0] * 3
    with pytest.raises(ValueError, match=r"spacing is \[1.0, 1.0, 1.0\] by .*dataset.json, but \[2.0, .* by the flags"):
        arguments(tmp_path, spacing=[2.0] * 3)


def test_the_split_keeps_what_it_was_made_with(tmp_path):
    made = arguments(tmp_path, label_column="grade", class_names=["LGG", "HGG"], spacing=[2.0] * 3)
    save_split(
        make_split({str(i): i % 2 for i in range(8)}, [1, 1], [1, 1]), tmp_path / "s.json", made.settings_for_split()
    )
    args = arguments(tmp_path, tmp_path / "s.json")
    assert (args.label_column, args.class_names, args.spacing) == ("grade", ["LGG", "HGG"], [2.0] * 3)
    assert args.volume_shape == [64] * 3 and "volume_shape [64, 64, 64]" in args.notes[0]
    write_settings(SAID, tmp_path)
    with pytest.raises(ValueError, match=r"spacing is .* by .*s.json, but \[1.0, 1.0, 1.0\] by .*dataset.json"):
        arguments(tmp_path, tmp_path / "s.json")


def test_defaults_are_taken_last_and_printed_once(tmp_path, capsys):
    args = arguments(tmp_path / "nothing here")
    assert (args.volume_shape, args.spacing, args.class_edges) == ([64] * 3, [3.0] * 3, [35.0, 60.0])
    args.say_defaults()
    args.say_defaults()
    assert capsys.readouterr().out.count("volume_shape [64, 64, 64] and spacing [3.0, 3.0, 3.0]") == 1


def test_a_model_fills_what_nothing_else_says_and_is_refused_where_it_says_another(tmp_path, tiny_pipeline):
    args = arguments(tmp_path)
    args.adopt(settings_of(tiny_pipeline), "the pipeline")
    assert (args.volume_shape, args.spacing) == ([16] * 3, [12.0] * 3)
    with pytest.raises(ValueError, match=r"volume_shape is \[16, 16, 16\] by the pipeline, but \[24, .* by the flags"):
        arguments(tmp_path, volume_shape=[24] * 3).adopt(settings_of(tiny_pipeline), "the pipeline")


def test_settings_that_contradict_each_other_are_named():
    with pytest.raises(
        ValueError, match=r"spacing is \[2.0, 2.0, 2.0\] by the reward, but \[1.0, 1.0, 1.0\] by the gen"
    ):
        check_same_settings(SAID, DataSettings(spacing=[2, 2, 2]), ("the generator", "the reward"))
    check_same_settings(SAID, DataSettings(), ("the generator", "an old reward"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"voxel_size": [1, 1, 1]}', r"dataset.json holds \['voxel_size'\], which are no settings; known are"),
        ('{"spacing": [1, 1]}', "dataset.json: spacing must be three positive numbers"),
        ('{"spacing": [1, 1, ', "dataset.json is no JSON"),
        ('{"class_names": ["a", "b"], "class_edges": [1, 2]}', "2 classes need 1 class_edges"),
        ('{"orientation": "LPS"}', "orientation must be 'RAS'"),
    ],
)
def test_a_settings_file_with_a_mistake_is_named(tmp_path, text, message):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path)


def test_the_volumes_know_what_they_were_read_with(brains_folder, tmp_path):
    (tmp_path / "images").symlink_to(f"{brains_folder}/images")
    (tmp_path / "metadata.csv").write_text(open(f"{brains_folder}/metadata.csv").read())
    write_settings(
        DataSettings(volume_shape=[16] * 3, spacing=[12.0] * 3, class_names=["low", "high"], class_edges=[50]), tmp_path
    )
    dataset = VolumeDataset(tmp_path, ["sub-01", "sub-06"])
    assert dataset[0]["volume"].shape == (1, 16, 16, 16)
    assert {item["subject"]: item["class_label"] for item in dataset} == {"sub-01": 0, "sub-06": 1}
    assert json.loads(json.dumps(dataset.settings.to_dict()))["spacing"] == [12.0] * 3
    with pytest.raises(ValueError, match="spacing is .* by dataset.json, but .* by the arguments"):
        VolumeDataset(tmp_path, ["sub-01"], spacing=[6.0] * 3)


# --- the split ---


def test_a_split_that_leaves_validation_or_a_fold_empty_is_refused():
    people = {str(i): i % 2 for i in range(6)}
    with pytest.raises(ValueError, match="no subject is left for validation"):
        make_split(people, [1, 1], [0, 0])
    with pytest.raises(ValueError, match="no subject is left for fold a and fold b"):
        make_split(people, [2, 2], [1, 1])
    split = make_split({str(i): i % 3 for i in range(9)}, [1, 1, 1], [1, 1, 1])  # one of each class is left
    assert (len(split["folds"]["a"]), len(split["folds"]["b"])) == (2, 1)
