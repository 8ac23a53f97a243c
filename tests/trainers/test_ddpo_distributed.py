"""Two real processes (gloo): same advantages as one, saving does not hang."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = """
import json, os, sys
from pathlib import Path
import datasets, torch
from diffusers_med3d import DDPOConfig, DDPOTrainer, MedDiffusion3DPipeline

torch.set_num_threads(1)
base, out, batches, kind = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
lora, awm = kind == "lora", kind == "awm"

def brightness(volumes, class_label):
    return [float(v.mean()) + 0.01 * c for v, c in zip(volumes, class_label)]

def some_missing(volumes, **conditions):
    return [None if v.std() > 0.312 else float(v.std()) for v in volumes]

class Novelty:
    mean = torch.zeros(1, 16, 16, 16)

    def __call__(self, volumes, **conditions):
        return (volumes - self.mean).square().flatten(1).mean(1)

    def update(self, volumes, class_label):
        assert len(class_label) == len(volumes) == 12
        weights = torch.arange(1.0, 13).view(-1, 1, 1, 1, 1)  # the order of the samples counts
        self.mean = 0.5 * self.mean + 0.5 * (volumes * weights / weights.sum()).sum(0)

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]

novelty = Novelty()
peft_config = None
if lora:
    from peft import LoraConfig
    peft_config = LoraConfig(r=2)
trainer = DDPOTrainer(
    model=MedDiffusion3DPipeline.from_pretrained(base),
    reward_funcs=[brightness, novelty if kind == "stateful" else some_missing],
    args=DDPOConfig(
        output_dir=str(out), max_steps=2, per_device_train_batch_size=3, steps_per_generation=batches,
        gradient_accumulation_steps=batches, num_generations=4, num_inference_steps=8,
        loss_type="awm" if awm else "ddpo",
        eval_num_inference_steps=2, learning_rate=1e-3, ema_decay=0.5, report_to="none", disable_tqdm=True, bf16=False,
        picture_steps=0,
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=2, gradient_checkpointing=lora,
    ),
    train_dataset=datasets.Dataset.from_dict({"class_label": [0, 1, 2]}),
    peft_config=peft_config,
)
history = []
generate = trainer._generate
def record(model, index):
    chunks = generate(model, index)
    own = torch.cat([chunk.advantages for chunk in chunks])
    paths = [chunk.trajectory for chunk in chunks]
    states = torch.cat([(path.final if awm else path.next_states[0]).flatten(1)[:, :5] for path in paths])
    steps = torch.tensor([paths[0].timesteps if awm else paths[0].steps])
    history.append({
        "advantages": trainer.accelerator.gather(own).tolist(), "states": trainer.accelerator.gather(states).tolist(),
        "windows": trainer.accelerator.gather(steps).tolist(),
    })
    return chunks
trainer._generate = record
trainer.train()
scored = trainer.sample_and_score(trainer.eval_dataset, 3)  # 9 samples: the second process has one too few
trainer.save_model()
trainer.save_pretrained(out / "again")
state = trainer.accelerator.gather(novelty.mean[0, 8][None]).tolist()
if trainer.is_world_process_zero():
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = {n: p.detach().flatten()[:3].tolist() for n, p in trainer.model.named_parameters() if p.requires_grad}
    (out / "result.json").write_text(json.dumps({
        "world": trainer.accelerator.num_processes, "history": history, "logs": logs, "weights": weights,
        "state": state,
        "scored": [scored.volumes.flatten(1)[:, ::101].tolist(), scored.labels.tolist(), scored.rewards.tolist()],
    }))
trainer.accelerator.end_training()
os._exit(0)  # while the interpreter shuts down, a thread of gloo that asks for the GIL would abort the process
"""


def run(folder: Path, base: str, processes: int, batches: int, kind: str = "full") -> dict:
    script = folder / "worker.py"
    script.write_text(WORKER)
    out = folder / f"out-{processes}"
    launcher = [sys.executable]
    if processes > 1:  # `accelerate launch --cpu --num_processes 2` would run one process (docs/pitfalls.md, P15)
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # gloo, also beside a GPU
    command = [*launcher, str(script), base, str(out), str(batches), kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "result.json").read_text())


LONG = [pytest.param(kind, marks=pytest.mark.long) for kind in ("lora", "awm", "stateful")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", *LONG])
def test_two_processes_have_the_advantages_of_one(tiny_pipeline_folder, tmp_path, kind):
    """Pitfalls 15 to 17: 12 samples as 1 process x 4 batches or 2 x 2; noise by sample, one window, saving returns."""
    one = run(tmp_path, tiny_pipeline_folder, 1, 4, kind)
    two = run(tmp_path, tiny_pipeline_folder, 2, 2, kind)
    assert (one["world"], two["world"]) == (1, 2)
    for ours, theirs in zip(one["history"], two["history"], strict=True):
        assert ours["windows"] * 2 == theirs["windows"]  # of every process
        advantages = torch.tensor(ours["advantages"])
        assert advantages.shape == (12,) and advantages.abs().max() > 0.1
    first, second = one["history"][0], two["history"][0]  # before any update: sums in another order come later
    torch.testing.assert_close(torch.tensor(first["states"]), torch.tensor(second["states"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(first["advantages"]), torch.tensor(second["advantages"]), rtol=0, atol=1e-6)
    states = torch.tensor(second["states"])
    assert (states[:6] - states[6:]).abs().max() > 0.1  # the second process draws noise of its own
    for key in ("rewards/brightness/mean", "rewards/unscored", "loss", "kl", "grad_norm"):
        assert one["logs"][0][key] == pytest.approx(two["logs"][0][key], rel=1e-3, abs=1e-7)
    for name, values in one["weights"].items():
        torch.testing.assert_close(torch.tensor(values), torch.tensor(two["weights"][name]), rtol=1e-2, atol=2e-3)
    # volumes, labels, rewards: all in every process
    for ours, theirs in zip(one["scored"], two["scored"], strict=True):
        ours, theirs = torch.tensor(ours), torch.tensor(theirs)
        assert len(ours) == len(theirs) == 9
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2, equal_nan=True)
    states = torch.tensor(two["state"])
    assert torch.equal(states[0], states[1])
    torch.testing.assert_close(states[:1], torch.tensor(one["state"]), rtol=0, atol=1e-4)
    folder = tmp_path / "out-2"
    assert (folder / "model_index.json").is_file() and (folder / "again" / "model_index.json").is_file()
    assert (folder / "checkpoint-2" / "complete").is_file()
