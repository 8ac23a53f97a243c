"""diffusers_med3d.trainers.base: TRL's private base made to work for diffusers (docs/pitfalls.md, P12 to P17)."""

import dataclasses
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import trl.trainer.base_trainer
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import HfArgumentParser
from transformers.trainer_pt_utils import safe_globals
from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer

from conftest import REPOSITORY
from diffusers_med3d import viz
from diffusers_med3d.trainers.base import (
    COMPLETE_MARKER,
    Med3DConfig,
    Med3DTrainer,
    card_arguments,
    last_checkpoint,
    use_all_cores,
)
from diffusers_med3d.trainers.ddpo_config import DDPOConfig
from diffusers_med3d.utils.stopping import TrainingStopped


class Line(ModelMixin, ConfigMixin):
    """y = w . x + b: the smallest real diffusers model."""

    @register_to_config
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)[:, 0]


class LineTrainer(Med3DTrainer):
    """Least squares with some noise of its own, so that the random state counts."""

    noise = 0.1

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        target = inputs["y"] + self.noise * torch.randn_like(inputs["y"])
        return (model(inputs["x"]) - target).square().mean()

    def save_pretrained(self, folder):
        self.model.save_pretrained(folder)


def points(count: int = 24) -> list[dict[str, torch.Tensor]]:
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3
    return [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]


def make(output_dir: Path, cls: type[LineTrainer] = LineTrainer, **changes) -> LineTrainer:
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        **changes,
    }
    torch.manual_seed(7)
    return cls(model=Line(), args=Med3DConfig(output_dir=str(output_dir), **settings), train_dataset=points())


def weights(trainer: LineTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])


# --- TRL's private names ---


def test_trls_private_base_is_imported_at_one_place_only_and_within_a_version_range():
    sites = []
    for path in sorted((REPOSITORY / "src").rglob("*.py")) + sorted((REPOSITORY / "examples").glob("*.py")):
        if re.search(r"^\s*(from trl\.|import trl\b)", path.read_text(), re.MULTILINE):  # `from trl import` is public
            sites.append(path.relative_to(REPOSITORY).as_posix())
    assert sites == ["src/diffusers_med3d/trainers/base.py"]
    dependencies = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    (trl_range,) = [line for line in dependencies if re.match(r"trl\b", line)]
    assert re.fullmatch(r"trl>=1\.\d+,<1\.\d+", trl_range), trl_range


def test_trls_private_base_still_is_what_we_override():
    assert issubclass(_BaseTrainer, transformers.Trainer)
    assert issubclass(_BaseConfig, transformers.TrainingArguments)
    for name in ("_send_telemetry", "_save", "_save_checkpoint", "_load_from_checkpoint", "_load_best_model",
                 "_get_grad_norm", "_init_training_state"):  # fmt: skip
        assert name in vars(Med3DTrainer)
        assert any(name in vars(base) for base in _BaseTrainer.__mro__), f"{name} is gone: our override is never called"
    assert "loss_is_scaled_for_ga" in vars(_BaseTrainer)


def test_nothing_is_reported_to_trl_outside_ci_either(tmp_path, monkeypatch):
    monkeypatch.delenv("CI", raising=False)  # TRL sends nothing where CI is set, and would hide the mistake
    sent = []
    monkeypatch.setattr(trl.trainer.base_trainer, "send_telemetry", lambda *args, **kwargs: sent.append(kwargs))
    make(tmp_path).train()
    assert sent == []


# --- defaults per device ---


def test_a_plain_config_trains_on_this_machine_and_moves_every_parameter(tmp_path):
    trainer = LineTrainer(
        model=Line(),
        args=Med3DConfig(output_dir=str(tmp_path), max_steps=2, save_strategy="no", report_to="none"),
        train_dataset=points(),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])] == []
    args = trainer.args
    assert args.bf16 == (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    assert (args.gradient_checkpointing, args.remove_unused_columns) == (False, False)
    assert Med3DConfig(output_dir=str(tmp_path), bf16=False).bf16 is False


def test_bf16_stays_off_where_the_device_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert Med3DConfig(output_dir=str(tmp_path)).bf16 is False


def test_a_launch_on_the_cpu_stays_there_beside_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # what `accelerate launch --cpu` sets
    args = Med3DConfig(output_dir=str(tmp_path), report_to="none")
    assert args.use_cpu and args.device.type == "cpu" and args.bf16 is False


def test_one_process_that_sees_several_gpus_takes_one(tmp_path, monkeypatch):
    monkeypatch.setattr(Med3DConfig, "_setup_devices", property(lambda self: torch.device("cpu")))
    monkeypatch.setattr(Med3DConfig, "_n_gpu", 4, raising=False)
    assert Med3DConfig(output_dir=str(tmp_path), report_to="none").n_gpu == 1


def test_bf16_gradients_of_convolutions_on_two_voxels_are_no_garbage(tmp_path):
    # oneDNN's are uninitialised memory on CPUs with AMX
    model = torch.nn.Sequential(torch.nn.Conv3d(16, 16, 3, padding=1), torch.nn.Conv3d(16, 16, 3, padding=1))
    x = torch.randn(4, 16, 2, 2, 2)
    exact = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    args = Med3DConfig(output_dir=str(tmp_path), bf16=True, report_to="none")
    trainer = LineTrainer(model=model, args=args, train_dataset=points())
    with trainer.accelerator.autocast():
        small, large = model(x), model(torch.randn(1, 16, 3, 3, 3))
    assert (small.dtype, large.dtype) == (torch.float32, torch.bfloat16)
    for _ in range(5):
        with trainer.accelerator.autocast():
            loss = model(x).sum()
        for mine, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), exact, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3)


def test_gradient_checkpointing_is_switched_on_in_the_model_itself(tiny_unet, tmp_path):
    args = Med3DConfig(output_dir=str(tmp_path), gradient_checkpointing=True, report_to="none")
    assert not tiny_unet.is_gradient_checkpointing
    LineTrainer(model=tiny_unet, args=args, train_dataset=points())
    assert tiny_unet.is_gradient_checkpointing


@pytest.mark.filterwarnings("error:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("flag", ["gradient_checkpointing", "activation_checkpointing"])
def test_gradient_checkpointing_trains_under_either_of_its_names_without_a_warning(flag, tmp_path):
    if flag not in {field.name for field in dataclasses.fields(transformers.TrainingArguments)}:
        pytest.skip(f"this version of transformers does not know {flag}")

    class Checkpointable(Line):
        _supports_gradient_checkpointing = True
        gradient_checkpointing = False

    args = Med3DConfig(output_dir=str(tmp_path), max_steps=1, save_strategy="no", report_to="none", **{flag: True})
    trainer = LineTrainer(model=Checkpointable(), args=args, train_dataset=points())
    trainer.train()
    assert trainer.model.gradient_checkpointing and trainer.state.global_step == 1


def test_every_field_is_a_flag_with_a_help_text():
    parser = HfArgumentParser([Med3DConfig])
    (args,) = parser.parse_args_into_dataclasses(["--bf16", "false", "--ema_decay", "0.5", "--report_to", "none"])
    assert (args.bf16, args.ema_decay, args.report_to) == (False, 0.5, [])
    own = set(Med3DConfig.__annotations__)
    helps = {action.dest: action.help for action in parser._actions}
    assert [name for name in own if not helps.get(name)] == []
    assert "'latest'" in helps["resume_from_checkpoint"]
    assert "--ema_decay" in parser.format_help()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"hub_strategy": "checkpoint"}, "hub_strategy must be 'end'"),
        ({"save_total_limit": 1}, "save_total_limit must be at least 2, got 1"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"max_minutes": 0.0}, "max_minutes must be positive, got 0.0"),
        ({"max_skipped_steps": -1}, "max_skipped_steps must be at least 0, got -1"),
        ({"max_minutes": float("nan")}, "max_minutes must be a number, got nan"),
        ({"picture_steps": 2.5}, "picture_steps must be a whole number, got 2.5"),
        ({"picture_steps": "2"}, "picture_steps must be a whole number, got '2'"),
        ({"bf16": "no"}, "bf16 must be True or False, got 'no'"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps must be a whole number, got 1.5"),
        ({"learning_rate": -1e-3}, "learning_rate must be at least 0, got -0.001"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number, got nan"),
        ({"learning_rate": float("inf")}, "learning_rate must be finite and at least 0, got inf"),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1 to count in epochs, got 0"),
        ({"max_steps": -5}, "max_steps must be at least 1, or -1 to count in epochs, got -5"),
    ],
)
def test_settings_that_would_lose_or_leak_work_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        Med3DConfig(output_dir=str(tmp_path), **settings)


def test_numpys_numbers_are_taken_as_pythons(tmp_path):
    settings = {"max_steps": np.int64(2), "picture_steps": np.int32(3), "learning_rate": np.float32(0.5)}
    args = Med3DConfig(output_dir=str(tmp_path), **settings, bf16=np.bool_(False), max_minutes=np.inf)
    found = [args.max_steps, args.picture_steps, args.learning_rate, args.bf16, args.max_minutes]
    assert found == [2, 3, 0.5, False, float("inf")]
    assert [type(value) for value in found] == [int, int, float, bool, float]


@pytest.mark.slow
def test_accumulated_small_batches_train_like_one_large_batch(tmp_path):
    class Open(Line):
        # with labels in the batch, Trainer would take the loss for scaled (docs/pitfalls.md, P13)
        def forward(self, x, **kwargs):
            return super().forward(x)

    class Exact(LineTrainer):
        noise = 0.0

        def __init__(self, model, train_dataset, **kwargs):
            super().__init__(Open(), train_dataset=[{**p, "labels": p["y"]} for p in train_dataset], **kwargs)

    settings = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 3, "lr_scheduler_type": "constant"}
    large = make(tmp_path / "a", Exact, per_device_train_batch_size=8, **settings)
    small = make(tmp_path / "b", Exact, per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    start = weights(large)
    assert torch.equal(start, weights(small))
    large.train()
    small.train()
    assert (weights(large) - start).abs().min() > 1e-3
    assert torch.allclose(weights(large), weights(small), atol=1e-6)  # plain gradient descent: no scale is forgiven
    losses = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (large, small)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# --- logs and pictures ---


@pytest.mark.slow
def test_tensorboard_starts_on_a_diffusers_model_and_receives_figures(tmp_path):
    class Drawing(LineTrainer):
        def training_step(self, *args, **kwargs):
            self.log_figure("curve", viz.curves({"x": ([0, 1], [0.0, 1.0])}))
            return super().training_step(*args, **kwargs)

    trainer = make(tmp_path, Drawing, report_to="tensorboard", max_steps=2)
    trainer.log_figure("before", viz.curves({"x": ([0, 1], [0.0, 1.0])}))  # no writer yet: the file alone
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["before.png", "curve.png"]
    assert imread(tmp_path / "figures" / "curve.png").ndim == 3
    (events,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    record = EventAccumulator(str(events))
    record.Reload()
    assert "train/loss" in record.Tags()["scalars"]
    assert record.Tags()["images"] == ["curve"]


class Watched(LineTrainer):
    """Draws its weights, and random numbers of its own."""

    def film_figures(self):
        torch.randn(3, generator=torch.Generator().manual_seed(0))
        values = weights(self).tolist()
        return {"weights": viz.curves({"w": (list(range(len(values))), values)})}


@pytest.mark.slow
def test_a_run_is_watched_by_the_same_picture_every_few_steps_and_is_not_changed_by_it(tmp_path):
    watched = make(tmp_path / "a", Watched, report_to="tensorboard", picture_steps=2, ema_decay=0.5)
    watched.train()
    frames = sorted((tmp_path / "a" / "film").iterdir())
    assert [frame.name for frame in frames] == [f"weights-00000{step}.png" for step in (0, 2, 4)]
    assert len({frame.read_bytes() for frame in frames}) == 3
    (events,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    record = EventAccumulator(str(events), size_guidance={"images": 0})
    record.Reload()
    assert [image.step for image in record.Images("weights")] == [0, 2, 4]
    unwatched = make(tmp_path / "b", Watched, picture_steps=0, ema_decay=0.5)
    unwatched.train()
    assert torch.equal(weights(watched), weights(unwatched)) and not (tmp_path / "b" / "film").exists()
    with pytest.raises(ValueError, match="picture_steps must be at least 0"):
        Med3DConfig(output_dir=str(tmp_path), picture_steps=-1)


@pytest.mark.slow
def test_weights_and_biases_gets_every_picture(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    make(tmp_path / "out", Watched, report_to="wandb", picture_steps=2).train()
    wandb.finish()
    sent = sorted(path.name for path in tmp_path.rglob("media/images/weights_*.png"))
    assert len(sent) == 3, sent


@pytest.mark.slow
def test_trackio_gets_every_picture(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    make(tmp_path / "out", Watched, report_to="trackio", picture_steps=2).train()
    assert len(list((tmp_path / "trackio").rglob("media/**/*.png"))) == 3


# --- average of the weights ---


def test_the_average_follows_the_weights_and_is_what_is_evaluated_and_saved(tmp_path):
    trainer = make(tmp_path, ema_decay=0.9, max_steps=3)
    history = [weights(trainer)]
    original = trainer.ema.step

    def spy(parameters):
        history.append(weights(trainer))
        original(parameters)

    trainer.ema.step = spy
    trainer.train()
    expected = history[0]
    for step, raw in enumerate(history[1:], start=1):
        # diffusers' warm-up: decay = min(0.9, (1 + n) / (10 + n)) with n = updates done before this one
        decay = 0.0 if step == 1 else min(0.9, step / (9 + step))
        expected = decay * expected + (1 - decay) * raw
    average = torch.cat([p.flatten() for p in trainer.ema.shadow_params])
    assert torch.allclose(average, expected, atol=1e-6)
    raw = weights(trainer)
    with trainer.ema_weights():
        assert torch.equal(weights(trainer), average)
        with trainer.ema_weights():  # evaluation inside saving
            assert torch.equal(weights(trainer), average)
        assert torch.equal(weights(trainer), average)
    assert torch.equal(weights(trainer), raw) and not torch.equal(raw, average)
    trainer.save_model()
    saved = torch.cat([p.flatten() for p in Line.from_pretrained(tmp_path).parameters()])
    assert torch.equal(saved, average)
    assert torch.equal(weights(trainer), raw)


def test_the_trained_weights_come_back_when_evaluation_fails(tmp_path):
    trainer = make(tmp_path, ema_decay=0.9)
    trainer.train()
    raw = weights(trainer)
    with pytest.raises(RuntimeError, match="broken"), trainer.ema_weights():
        raise RuntimeError("broken")
    assert torch.equal(weights(trainer), raw)


# --- saving and resuming ---


@pytest.mark.slow
def test_a_resumed_run_repeats_the_uninterrupted_one_exactly(tmp_path):
    settings = {"ema_decay": 0.9, "save_strategy": "steps", "save_steps": 5, "max_steps": 10}
    whole = make(tmp_path / "whole", **settings)
    whole.train()

    class Killed(LineTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 5:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    first = make(tmp_path / "parts", Killed, **settings)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    torch.manual_seed(99)  # nothing may depend on what the new process happened to draw
    second = make(tmp_path / "parts", **settings)
    second.train(resume_from_checkpoint=last_checkpoint(tmp_path / "parts"))
    assert second.state.global_step == 10
    assert torch.equal(weights(second), weights(whole))
    for mine, theirs in zip(second.ema.shadow_params, whole.ema.shadow_params, strict=True):
        assert torch.equal(mine, theirs)
    assert second.ema.optimization_step == whole.ema.optimization_step == 10
    mine, theirs = (trainer.optimizer.state_dict()["state"] for trainer in (second, whole))
    assert torch.equal(mine[0]["exp_avg_sq"], theirs[0]["exp_avg_sq"])


@pytest.mark.slow
def test_a_run_out_of_time_stops_at_the_end_of_a_round_and_goes_on_as_if_it_had_not(tmp_path):
    class Slow(LineTrainer):
        round_steps = 2

        def training_step(self, *args, **kwargs):
            time.sleep(0.2)
            return super().training_step(*args, **kwargs)

    settings = {"max_steps": 10, "ema_decay": 0.9}
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    first = make(tmp_path / "parts", Slow, max_minutes=1.1 / 60, **settings)  # two rounds of 0.4 s, no third
    first.train()
    assert first.state.global_step == 4
    second = make(tmp_path / "parts", max_minutes=1.0, **settings)
    second.train(resume_from_checkpoint=last_checkpoint(tmp_path / "parts"))
    assert second.state.global_step == 10 and torch.equal(weights(second), weights(whole))


def test_a_finished_run_that_is_resumed_is_loaded_and_not_trained_on(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "ema_decay": 0.9}
    finished = make(tmp_path, **settings)
    finished.train()
    again = make(tmp_path, **settings)
    again.model.linear.weight.data.zero_()
    again.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    assert again.state.global_step == 4
    assert torch.equal(weights(again), weights(finished))
    assert all(torch.equal(a, b) for a, b in zip(again.ema.shadow_params, finished.ema.shadow_params, strict=True))


class Worsening(LineTrainer):
    def __init__(self, **kwargs):
        super().__init__(eval_dataset=points(), **kwargs)

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": float(self.state.global_step)}
        self.log(metrics)
        return metrics


def test_a_finished_run_that_is_resumed_has_its_best_weights_where_it_ended_with_them(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "ema_decay": 0.9}
    finished = make(tmp_path, Worsening, load_best_model_at_end=True, **settings)
    finished.train()
    again, last = (make(tmp_path, Worsening, load_best_model_at_end=best, **settings) for best in (True, False))
    for trainer in (again, last):
        trainer.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    assert torch.equal(weights(again), weights(finished)) and not torch.equal(weights(last), weights(finished))
    assert all(torch.equal(a, b) for a, b in zip(again.ema.shadow_params, finished.ema.shadow_params, strict=True))


class Exploding(LineTrainer):
    """Loss times `factor` from step 2 to `until`; with `gradient_only` the gradient alone is not finite."""

    factor, until, gradient_only = torch.nan, 4, False

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if not 2 <= self.state.global_step < self.until:
            return loss
        if self.gradient_only:
            return loss + (0.0 * self.model.linear.weight.sum()).sqrt()  # 0, of slope infinity times 0
        return loss * self.factor


@pytest.mark.parametrize("factor", [torch.nan, torch.inf, "gradient"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_whose_loss_or_gradient_is_not_finite_changes_nothing_and_is_counted(tmp_path, factor, accumulation):
    seen = []

    class Watched(Exploding):
        gradient_only = factor == "gradient"

        def training_step(self, *args, **kwargs):
            if self.state.global_step == len(seen):
                moments = [state["exp_avg"].clone() for state in self.optimizer.state.values()]
                seen.append(torch.cat([weights(self), *(m.flatten() for m in moments), *self.average()]))
            return super().training_step(*args, **kwargs)

        def average(self):
            return [p.flatten().clone() for p in self.ema.shadow_params]

    Watched.factor = 1.0 if factor == "gradient" else factor
    trainer = make(tmp_path, Watched, max_steps=6, ema_decay=0.5, gradient_accumulation_steps=accumulation)
    trainer.train()
    assert torch.equal(seen[2], seen[3]) and torch.equal(seen[2], seen[4])  # steps 2 and 3 were skipped
    assert not torch.equal(seen[4], seen[5]) and weights(trainer).isfinite().all()
    skipped = {row["step"]: row["skipped_steps"] for row in trainer.state.log_history if "skipped_steps" in row}
    assert skipped == {3: 1, 4: 1} and trainer.state.global_step == 6


def test_a_run_whose_losses_stay_not_finite_stops_in_one_sentence(tmp_path):
    trainer = make(tmp_path, Exploding, max_steps=9, max_skipped_steps=1)
    message = "not finite 2 times in a row after 3 optimizer steps .max_skipped_steps=1.*or lower learning_rate"
    with pytest.raises(TrainingStopped, match=message):
        trainer.train()
    assert weights(trainer).isfinite().all()


@pytest.mark.slow
def test_a_checkpoint_that_was_cut_off_is_passed_over_and_refused(tmp_path):
    trainer = make(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    assert last_checkpoint(tmp_path).endswith("checkpoint-4")
    (tmp_path / "checkpoint-4" / COMPLETE_MARKER).unlink()
    assert last_checkpoint(tmp_path).endswith("checkpoint-2")
    with pytest.raises(ValueError, match="checkpoint-4 is no whole checkpoint"):
        make(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    resumed = make(tmp_path, save_strategy="no")
    resumed.train(resume_from_checkpoint="latest")
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3, 4]
    fresh = make(tmp_path / "new", save_strategy="no")
    with pytest.raises(ValueError, match="new holds no whole checkpoint to resume from"):
        fresh.train(resume_from_checkpoint=True)
    fresh.train(resume_from_checkpoint="latest")  # where there is none yet, from the start
    assert fresh.state.global_step == 4


def test_the_marker_is_the_last_file_of_a_checkpoint(tmp_path):
    make(tmp_path, save_strategy="steps", save_steps=4, ema_decay=0.9).train()
    folder = tmp_path / "checkpoint-4"
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert max(times, key=times.get) == COMPLETE_MARKER
    assert {"model.safetensors", "ema.safetensors", "optimizer.pt", "trainer_state.json"} <= set(times)


def test_no_pickle_and_no_local_path_leaves_the_machine(tmp_path):
    trainer = make(tmp_path / "secret-place", save_strategy="steps", save_steps=2, ema_decay=0.9)
    trainer.train()
    trainer.save_model()
    output = tmp_path / "secret-place"
    assert list(output.rglob("training_args.bin")) == []
    published = [path for path in output.iterdir() if path.is_file()]
    assert sorted(path.name for path in published) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "trainer_state.json",
    ]
    for path in published:
        assert str(tmp_path).encode() not in path.read_bytes(), path
    local = [*output.rglob("*.pt"), *output.rglob("*.pth")]
    assert local != []
    with safe_globals():  # NumPy's random state; what stays on the machine loads without running code either
        for path in local:
            torch.load(path, weights_only=True)


def test_the_card_lists_what_was_changed_and_nothing_private(tmp_path):
    trainer = make(tmp_path, hub_token="hf_secret", learning_rate=0.0625, weights_license="cc-by-sa-3.0")
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "| learning_rate | 0.0625 |" in card and "license: cc-by-sa-3.0" in card and "4 optimizer steps" in card
    assert "hf_secret" not in card and str(tmp_path) not in card and "weight_decay" not in card
    table = dict(re.findall(r"^\| (\w+) \| (.+) \|$", card, re.MULTILINE))
    assert table["max_steps"] == "4" and table["seed"] == "42"  # even where they are the defaults
    for name in ("use_cpu", "accelerator_config", "report_to", "logging_steps", "debug", "activation_checkpointing"):
        assert name not in table


def test_a_card_shows_lists_and_choices_only_where_they_were_changed(tmp_path):
    def listed(**changes):
        return card_arguments(DDPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False, **changes))

    plain = listed()
    assert {"max_steps", "per_device_train_batch_size", "learning_rate", "seed"} <= set(plain)
    assert not {"lr_scheduler_type", "reward_weights", "eta", "beta"} & set(plain)
    changed = listed(lr_scheduler_type="cosine", reward_weights=[1.0, 0.5], eta=0.5)
    assert set(changed) - set(plain) == {"lr_scheduler_type", "reward_weights", "eta"}
    assert changed["lr_scheduler_type"] == "cosine" and changed["reward_weights"] == [1.0, 0.5]


# --- threads and processes ---


THREADS = """
import os, torch
from diffusers_med3d.trainers.base import Med3DConfig, use_all_cores
Med3DConfig(output_dir="unused")
before = torch.get_num_threads()
use_all_cores()
print("threads", before, torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS"))
"""


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return {**kept, "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": "", **changes}


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: one thread is all of them")
def test_a_run_started_by_accelerate_launch_uses_all_cores(tmp_path):
    (tmp_path / "threads.py").write_text(THREADS)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(tmp_path / "threads.py")]
    answer = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    before, after, variable = re.search(r"threads (\d+) (\d+) (\w+)", answer.stdout).groups()
    assert (before, variable) == ("1", "1"), "accelerate no longer sets OMP_NUM_THREADS=1; use_all_cores may go"
    assert int(after) == len(os.sched_getaffinity(0))


def test_one_thread_that_the_user_asked_for_stays_one(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        use_all_cores()
        assert torch.get_num_threads() == 1
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        monkeypatch.setenv("WORLD_SIZE", "2")  # two processes share the cores already
        use_all_cores()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


TWO_PROCESSES = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
from test_base_trainer import make, weights
output = Path(sys.argv[1])
trainer = make(output, max_steps=3, save_strategy="steps", save_steps=3, ema_decay=0.5)
assert dist.get_world_size() == 2 and trainer.args.world_size == 2, trainer.args.world_size
trainer.train()
trainer.save_model()
trainer.accelerator.wait_for_everyone()
mine = torch.cat([weights(trainer), *(p.flatten() for p in trainer.ema.shadow_params)])
both = [torch.zeros_like(mine) for _ in range(2)]
dist.all_gather(both, mine)
assert torch.equal(*both), both
if trainer.is_world_process_zero():
    torch.save(weights(trainer), output / "weights.pt")
(output / f"rank-{dist.get_rank()}").touch()
dist.destroy_process_group()
os._exit(0)  # while the interpreter shuts down, a thread of gloo that asks for the GIL would abort the process
"""


@pytest.mark.slow
def test_two_processes_train_and_save_without_waiting_for_each_other_forever(tmp_path):
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "two.py"), str(tmp_path / "run")]
    env = environment(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path))
    answer = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert {"rank-0", "rank-1", "README.md"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-3")
    trained = torch.load(tmp_path / "run" / "weights.pt", weights_only=True)
    assert not torch.equal(trained, weights(make(tmp_path / "alone")))


def test_a_checkpoint_of_another_network_is_refused_before_training_with_both_shapes(tmp_path):
    make(tmp_path, save_strategy="steps", save_steps=4).train()
    other = make(tmp_path, save_strategy="no")
    other.model.add_module("wider", torch.nn.Linear(3, 5))
    with pytest.raises(ValueError, match="checkpoint-4 is of another network: wider.bias has shape None there"):
        other.checkpoint_to_resume("latest")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is no whole checkpoint: it has no file 'complete'"):
        make(tmp_path).checkpoint_to_resume(str(tmp_path / "empty"))


def test_a_new_run_is_not_begun_beside_the_checkpoints_of_another(tmp_path):
    first = make(tmp_path, save_strategy="steps", save_steps=2)
    first.train()
    first.train()  # a second time in the same process: its own
    with pytest.raises(ValueError, match="holds checkpoint-4 of an earlier run: go on with it .*, give another --outp"):
        make(tmp_path, save_strategy="steps", save_steps=2).train()
    for name in ("checkpoint-2", "checkpoint-4"):
        (tmp_path / name / "complete").unlink()  # killed before its first checkpoint was whole: a fresh start
    make(tmp_path, save_strategy="steps", save_steps=2).train()


@pytest.mark.parametrize("nowhere", ["", "nowhere"])
def test_a_folder_that_is_not_there_is_no_checkpoint(tmp_path, nowhere):
    with pytest.raises(ValueError, match=f"there is no folder '{nowhere}'"):
        make(tmp_path).train(resume_from_checkpoint=nowhere)


def test_an_average_that_the_checkpoint_does_not_hold_is_named(tmp_path):
    make(tmp_path, save_strategy="steps", save_steps=2, max_steps=2, ema_decay=0.0).train()
    with (
        pytest.warns(UserWarning, match="ema_decay"),
        pytest.raises(ValueError, match="no average of the weights .ema.safetensors.: it was saved with ema_decay 0"),
    ):
        make(tmp_path, ema_decay=0.9).train(resume_from_checkpoint="latest")
