"""Kills training runs and resumes them, for test_killed.py and tests/slow/kills.py.

    python killing.py {every_write,random,disk} STAGE FOLDER BRAINS

One process imports everything and forks the runs, so that hundreds of them take no longer than their training. A
fault point is a call that creates, writes, renames or deletes something in the folder of the run; files of tensors
have a second one, at which half of the file is there. Prints one JSON line.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import datasets
import safetensors.torch
import torch
from peft import LoraConfig

import conftest
from diffusers_med3d import AutoencoderKL3D, DDPOConfig, DDPOTrainer
from diffusers_med3d.data import VolumeDataset
from diffusers_med3d.trainers.base import last_checkpoint
from diffusers_med3d.trainers.checkpoints import checkpoints, damage
from test_autoencoder_trainer import make as make_autoencoder
from test_base_trainer import make as make_line
from test_diffusion_trainer import make as make_diffusion
from test_reward_trainer import RewardModelTrainer, tiny_model, toy_spectrum
from test_reward_trainer import config as reward_config

TIMES = ("runtime", "per_second", "seconds/", "total_flos")


class Faults:
    """Counts the fault points of a run and kills the process at one of them."""

    def __init__(self, folder: Path, kill_at: int | None) -> None:
        self.folder, self.kill_at, self.seen = str(folder), kill_at, []
        sys.addaudithook(self.audit)
        self.tensors, self.save = safetensors.torch.serialize_file, torch.save
        safetensors.torch.serialize_file = self.serialize_file
        torch.save = self.torch_save

    def hit(self, what: str, path: object, half: bool = False) -> None:
        if not isinstance(path, str | bytes | os.PathLike) or not os.fsdecode(path).startswith(self.folder):
            return
        self.seen.append(what)
        if len(self.seen) == self.kill_at:
            if half:
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            self.hit("open", args[0])
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            self.hit(event, args[0])

    def serialize_file(self, tensors, filename, *args, **kwargs):
        self.hit("tensors", filename)
        self.tensors(tensors, filename, *args, **kwargs)
        self.hit("half of the tensors", filename, half=True)

    def torch_save(self, value, path, *args, **kwargs):
        self.hit("pickle", path)
        self.save(value, path, *args, **kwargs)
        self.hit("half of the pickle", path, half=True)


def raw(fixture: object) -> Callable:
    """The function that a pytest fixture was made of."""
    return fixture._fixture_function


def pipeline():
    return raw(conftest.tiny_pipeline)(
        raw(conftest.tiny_vae)(), raw(conftest.tiny_unet)(), raw(conftest.tiny_scheduler)()
    )


def scans(brains: Path) -> VolumeDataset:
    return VolumeDataset(brains, conftest.SPLIT["train"], volume_shape=[16] * 3, spacing=[12.0] * 3)


OPTIONS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "save_total_limit": 2}


def line(folder: Path, brains: Path):
    return make_line(folder, ema_decay=0.9, **OPTIONS)


def autoencoder(folder: Path, brains: Path):
    torch.manual_seed(1)
    model = AutoencoderKL3D(channels=(4, 8, 8), latent_channels=2, norm_num_groups=4)
    return make_autoencoder(folder, model, scans(brains), **OPTIONS, adversarial_start=2)


def diffusion(folder: Path, brains: Path):
    return make_diffusion(folder, pipeline(), scans(brains), ema_decay=0.9, muon=True, **OPTIONS)


def reward(folder: Path, brains: Path):
    torch.set_num_threads(1)
    spectrum = toy_spectrum(folder.parent.parent / "spectrum", 4)
    return RewardModelTrainer(tiny_model(), reward_config(folder, **OPTIONS, ema_decay=0.9), spectrum)


def ddpo(folder: Path, brains: Path, lora: LoraConfig | None = None, **more):
    args = DDPOConfig(
        output_dir=str(folder), per_device_train_batch_size=3, num_generations=3, steps_per_generation=2,
        num_inference_steps=3, eval_num_inference_steps=2, report_to="none", disable_tqdm=True, bf16=False,
        ema_decay=0.5, lr_scheduler_type="linear", **OPTIONS, **more,
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"class_label": [0, 1]})
    rewards = [lambda volumes, **_: volumes.flatten(1).mean(1), lambda volumes, **_: volumes.flatten(1).std(1)]
    return DDPOTrainer(pipeline(), rewards, args, rows, peft_config=lora)


def ddpo_synced(folder: Path, brains: Path):
    return ddpo(folder, brains, sync_ref_model=True, ref_model_sync_steps=3)


def ddpo_lora(folder: Path, brains: Path):
    return ddpo(folder, brains, LoraConfig(r=2, lora_alpha=4))


STAGES = {one.__name__: one for one in (line, autoencoder, diffusion, reward, ddpo, ddpo_synced, ddpo_lora)}


def run(make: Callable, folder: Path, brains: Path, kill_at: int | None = None, count: Path | None = None) -> None:
    """A run from the command line: train, or go on from the newest whole checkpoint, and save the model."""
    torch.set_num_threads(1)
    trainer = make(folder, brains)
    faults = Faults(folder, kill_at)
    if last_checkpoint(folder) is not None:
        torch.rand(os.urandom(1)[0])  # what is resumed does not depend on what a new process draws
    with open(os.devnull, "w") as nowhere:
        sys.stdout = nowhere
        trainer.train(resume_from_checkpoint="latest")
        trainer.save_model()
    if count is not None:
        count.write_text(json.dumps(faults.seen))


def forked(function: Callable, *args, wait: float | None = None) -> int:
    """Exit code of a function in a fork, negative for a signal; with `wait`, SIGKILL comes after so many seconds."""
    pid = os.fork()
    if pid == 0:
        try:
            warnings.simplefilter("ignore")
            function(*args)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if wait is not None:
        time.sleep(wait)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def values(state: object) -> object:
    """Contents of a pickle, whose bytes depend on which equal strings are one object, and loading changes that."""
    if isinstance(state, dict):
        return [(key, values(value)) for key, value in state.items()]
    if isinstance(state, list | tuple):
        return [values(value) for value in state]
    return (str(state.dtype), state.shape, state.numpy().tobytes()) if isinstance(state, torch.Tensor) else state


def contents(folder: Path) -> dict[str, object]:
    """Everything of a finished run that must be equal: the files of its last checkpoint, logs, the model."""
    last = checkpoints(folder)[0]
    found: dict[str, object] = {"checkpoint": last.name, "kept": str(sorted(p.name for p in checkpoints(folder)))}
    for path in sorted([*last.iterdir(), *(p for p in folder.rglob("*") if last not in p.parents)]):
        if path.is_dir() or "checkpoint-" in str(path.parent.relative_to(folder)) and path.parent != last:
            continue
        name = path.relative_to(folder).as_posix()
        if path.name == "trainer_state.json":
            state = json.loads(path.read_text())
            logs = [row for row in state["log_history"] if "train_loss" not in row]  # a summary since the last start
            rows = [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in logs]
            found[name] = json.dumps([rows, state["global_step"], state["epoch"]])
        elif path.name in ("optimizer.pt", "scheduler.pt"):
            found[name] = values(torch.load(path))
        elif path.name != "complete" and path.suffix != ".png":
            found[name] = path.read_bytes()
    return found


def differing(first: dict, second: dict) -> list[str]:
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def finish(make: Callable, folder: Path, brains: Path, whole: dict) -> list[str]:
    """What is wrong after a kill and a resumption."""
    wrong = [f"{p.name} is marked whole, but {damage(p)}" for p in checkpoints(folder)
             if (p / "complete").exists() and damage(p)]  # fmt: skip
    code = forked(run, make, folder, brains)
    return [*wrong, f"resuming ended with {code}"] if code else [*wrong, *differing(whole, contents(folder))]


def every_write(stage: str, folder: Path, brains: Path) -> dict:
    """Kill a run at every fault point and resume each."""
    make, whole_folder = STAGES[stage], folder / "whole" / "run"
    assert forked(run, make, whole_folder, brains, None, folder / "count.json") == 0
    whole, seen = contents(whole_folder), json.loads((folder / "count.json").read_text())
    problems = {}
    for n, what in enumerate(seen, 1):
        part = folder / "part" / "run"
        shutil.rmtree(part, ignore_errors=True)
        code = forked(run, make, part, brains, n)
        if code != -signal.SIGKILL:
            problems[f"{n} {what}"] = [f"was not killed but ended with {code}"]
        elif wrong := finish(make, part, brains, whole):
            problems[f"{n} {what}"] = wrong
    return {"points": len(seen), "kinds": sorted(set(seen)), "problems": problems}


def at_random(stage: str, folder: Path, brains: Path, kills: int = 3) -> dict:
    """Kill runs at random moments, `kills` times in all, and resume each run until it ends.

    A run that ends before its next kill is compared, and another one is begun.
    """
    make, whole_folder, part = STAGES[stage], folder / "whole" / "run", folder / "part" / "run"
    start = time.monotonic()
    assert forked(run, make, whole_folder, brains) == 0
    duration, whole = time.monotonic() - start, contents(whole_folder)
    killed, runs, problems = 0, 0, {}
    while killed < kills and not problems:
        shutil.rmtree(part, ignore_errors=True)
        runs, before = runs + 1, killed
        while killed < kills and forked(run, make, part, brains, wait=random.uniform(0.1, 0.9) * duration) < 0:
            killed += 1
        if wrong := finish(make, part, brains, whole):
            problems[f"run {runs}, killed {killed - before} times"] = wrong
    return {"killed": killed, "runs": runs, "problems": problems}


def disk_full(stage: str, folder: Path, brains: Path) -> dict:
    """Let every file over a limit fail, as a full disk does, after the first checkpoint; then make room and resume."""
    make, whole_folder, part = STAGES[stage], folder / "whole" / "run", folder / "part" / "run"
    assert forked(run, make, whole_folder, brains) == 0
    whole = contents(whole_folder)

    def starved() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails with EFBIG instead
        saves, honest = [], torch.save

        def save(*args, **kwargs):
            saves.append(args)
            if len(saves) > 4:  # in the second checkpoint
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
            honest(*args, **kwargs)

        torch.save = save
        trainer = make(part, brains)
        try:
            trainer.train(resume_from_checkpoint="latest")
        except RuntimeError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            (folder / "message.txt").write_text(f"{type(error).__name__}: {error}")
            os._exit(7)

    code = forked(starved)
    message = (folder / "message.txt").read_text() if code == 7 else ""
    left = [p.name for p in checkpoints(part) if damage(p) is None]
    return {"code": code, "message": message, "left": left, "problems": finish(make, part, brains, whole)}


if __name__ == "__main__":
    mode, stage, folder, brains = sys.argv[1:5]
    function = {"every_write": every_write, "random": at_random, "disk": disk_full}[mode]
    print(json.dumps(function(stage, Path(folder), Path(brains))))
