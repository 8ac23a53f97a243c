"""Runs that are killed, asked to stop, moved, or out of disk: docs/reliability.md."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusers_med3d.trainers.base import COMPLETE_MARKER, last_checkpoint
from diffusers_med3d.trainers.checkpoints import checkpoints, damage, keep_newest, mark_whole
from test_base_trainer import Line, LineTrainer, Worsening, make, weights

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
STAGES = ["line", "autoencoder", "diffusion", "reward", "ddpo", "ddpo_synced", "ddpo_lora"]
SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "ema_decay": 0.9}


def kill(mode: str, stage: str, folder: Path, brains: str) -> dict:
    paths = [HERE, HERE.parent, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "killing.py"), mode, stage, str(folder), brains]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr[-3000:]}


@pytest.mark.slow
@pytest.mark.long
def test_a_run_killed_at_any_write_goes_on_to_the_same_bytes(tmp_path, brains_folder):
    found = kill("every_write", "line", tmp_path, brains_folder)
    assert found["problems"] == {}, found
    assert found["points"] > 50 and {"half of the tensors", "half of the pickle", "os.rename"} <= set(found["kinds"])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_three_times_at_random_goes_on_to_the_same_bytes(tmp_path, brains_folder, stage):
    found = kill("random", stage, tmp_path, brains_folder)
    assert found["problems"] == {} and found["killed"] == 3, found


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["line", pytest.param("ddpo_synced", marks=pytest.mark.long)])
def test_a_full_disk_is_named_and_the_older_checkpoint_goes_on_to_the_same_bytes(tmp_path, brains_folder, stage):
    found = kill("disk", stage, tmp_path, brains_folder)
    assert found["code"] == 7 and found["left"] == ["checkpoint-2"] and found["problems"] == [], found
    for part in ("TrainingStopped: ", "checkpoint-4 could not be written", "MB are free there", "make room and go on"):
        assert part in found["message"]
    assert "\n" not in found["message"]


# Checkpoints that are damaged


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "bit": (lambda folder: flipped(folder / "model.safetensors"), "model.safetensors is not what was saved"),
    "short": (lambda folder: os.truncate(folder / "optimizer.pt", 50), "optimizer.pt has 50 bytes instead of"),
    "gone": (lambda folder: (folder / "ema.safetensors").unlink(), "ema.safetensors is missing"),
    "marker": (lambda folder: (folder / COMPLETE_MARKER).write_text("[1"), "'complete' cannot be read"),
    "kind": (lambda folder: (folder / COMPLETE_MARKER).write_text('{"a": 1}'), "'complete' cannot be read"),
    "size": (lambda folder: (folder / COMPLETE_MARKER).write_text('{"a": [Infinity, 0]}'), "'complete' cannot be read"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(tmp_path, how):
    make(tmp_path, **SAVING).train()
    harm, message = DAMAGE[how]
    harm(tmp_path / "checkpoint-6")
    again = make(tmp_path, **SAVING)
    with pytest.warns(UserWarning, match=f"checkpoint-6 is passed over: .*{message}"):
        again.train(resume_from_checkpoint="latest")
    losses = [row["step"] for row in again.state.log_history if "loss" in row]
    assert losses == [1, 2, 3, 4, 5, 6] and damage(tmp_path / "checkpoint-6") is None  # 5 and 6 anew
    with pytest.raises(ValueError, match=f"checkpoint-4 is no whole checkpoint: .*{message}"):
        harm(tmp_path / "checkpoint-4")
        make(tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_where_all_are_damaged_nothing_starts_from_the_beginning_without_a_word(tmp_path):
    make(tmp_path, **SAVING).train()
    for folder in checkpoints(tmp_path):
        flipped(folder / "model.safetensors")
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="no checkpoint to resume from: checkpoint-6 .*Delete"),
    ):
        make(tmp_path, **SAVING).train(resume_from_checkpoint="latest")


def test_a_checkpoint_of_an_earlier_version_has_an_empty_marker_and_is_whole(tmp_path):
    make(tmp_path, **SAVING).train()
    (tmp_path / "checkpoint-6" / COMPLETE_MARKER).write_text("")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")


def test_folders_that_are_no_checkpoints_are_left_alone(tmp_path):
    make(tmp_path, **SAVING).train()
    (tmp_path / "figures").mkdir(exist_ok=True)
    (tmp_path / "figures" / ".samples.png.123.tmp").write_text("half of a picture")  # of a run that was killed
    for name in ("checkpoint-best", "checkpoint-6-copy", "checkpoint-", "my-checkpoint-9"):
        shutil.copytree(tmp_path / "checkpoint-4", tmp_path / name)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    make(tmp_path, **{**SAVING, "max_steps": 8}).train(resume_from_checkpoint="latest")
    assert (tmp_path / "checkpoint-best").is_dir() and (tmp_path / "checkpoint-6-copy").is_dir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-6"]
    assert not list(tmp_path.rglob("*.tmp"))


def whole(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "a").write_text(str(step))
    mark_whole(path)
    return path


def test_the_limit_counts_whole_checkpoints_only_and_keeps_the_best(tmp_path):
    for step in (2, 4, 6):
        whole(tmp_path, step)
    (tmp_path / "checkpoint-8").mkdir()  # cut off
    keep_newest(tmp_path, 2, None, whole(tmp_path, 5))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-5"]
    for step in (2, 4):
        whole(tmp_path, step)
    keep_newest(tmp_path, 2, "elsewhere/checkpoint-2", tmp_path / "checkpoint-6")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-2"]
    whole(tmp_path, 8)
    keep_newest(tmp_path, None, None, tmp_path / "checkpoint-8")
    assert len(checkpoints(tmp_path)) == 3


def test_the_older_checkpoint_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    seen = []

    class Watching(LineTrainer):
        def _save_extras(self, folder):
            seen.append([path.name for path in checkpoints(tmp_path) if damage(path) is None])
            super()._save_extras(folder)

    make(tmp_path, Watching, **SAVING).train()
    assert seen == [[], ["checkpoint-2"], ["checkpoint-4", "checkpoint-2"]]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-4"]


# Runs that were moved


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_run_that_was_moved_goes_on_and_finds_its_best_checkpoint(tmp_path, how):
    best = {**SAVING, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    finished = make(tmp_path / "old", Worsening, **best)
    finished.train()
    finished.save_model()
    (shutil.move if how == "moved" else shutil.copytree)(tmp_path / "old", tmp_path / "new")
    again = make(tmp_path / "new", Worsening, **best)
    again.train(resume_from_checkpoint="latest")
    assert torch.equal(weights(again), weights(finished))
    longer = make(tmp_path / "new", Worsening, **{**best, "max_steps": 8})
    longer.train(resume_from_checkpoint="latest")
    assert longer.state.best_model_checkpoint == str(tmp_path / "new" / "checkpoint-2")
    assert torch.equal(weights(longer), weights(finished))
    loaded = torch.cat([p.flatten() for p in Line.from_pretrained(tmp_path / "new").parameters()])
    with finished.ema_weights():
        assert torch.equal(loaded, weights(finished))


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("round_steps", [1, 2])
def test_a_signal_saves_and_ends_the_run_with_a_line_that_says_how_to_go_on(tmp_path, capsys, number, round_steps):
    class Signalled(LineTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 2:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), signal.SIGTERM)  # what a batch system sends next
            return super().training_step(*args, **kwargs)

    Signalled.round_steps = round_steps
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    complete = make(tmp_path / "whole", max_steps=6, ema_decay=0.9)
    complete.train()
    first = make(tmp_path / "parts", Signalled, max_steps=6, ema_decay=0.9)
    with pytest.raises(SystemExit) as ended:
        first.train()
    step = 3 if round_steps == 1 else 4
    assert ended.value.code == 128 + number and first.state.global_step == step
    expected = (
        f"Stopped by {number.name} after step {step} of 6, saved as checkpoint-{step} in {tmp_path}/parts; go on "
    )
    assert capsys.readouterr().err.splitlines()[-1] == f"{expected}with --resume_from_checkpoint latest."
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == handlers
    second = make(tmp_path / "parts", max_steps=6, ema_decay=0.9)
    second.train(resume_from_checkpoint="latest")
    assert torch.equal(weights(second), weights(complete))


def test_a_second_ctrl_c_interrupts_at_once(tmp_path):
    class Impatient(LineTrainer):
        def training_step(self, *args, **kwargs):
            os.kill(os.getpid(), signal.SIGINT)
            return super().training_step(*args, **kwargs)

    Impatient.round_steps = 100
    before = signal.getsignal(signal.SIGINT)  # ignored, where pytest itself runs in the background
    trainer = make(tmp_path, Impatient)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1 and signal.getsignal(signal.SIGINT) is before
