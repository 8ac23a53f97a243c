"""Training whose state FSDP2 or DeepSpeed divides between two real processes (gloo) on a CPU.

accelerate divides networks on accelerators only, so the worker tells it that this machine has some; all that follows is
what runs on GPUs: accelerate's own plugin, torch's `fully_shard`, transformers' saving and loading.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import SPACING, VOLUME_SHAPE, write_brains

WORKER = """
import os, sys
from pathlib import Path
import datasets, torch
from accelerate.state import DistributedType, PartialState
from peft import LoraConfig
from diffusers_med3d import (
    DDPOConfig, DDPOTrainer, LatentDiffusionConfig, LatentDiffusionTrainer, MedDiffusion3DPipeline,
)
from diffusers_med3d.data import VolumeDataset

base, brains, out, engine, kind, ema, resume = sys.argv[1:]
torch.set_num_threads(1)
settings = dict(
    output_dir=out, max_steps=4, learning_rate=1e-3, save_strategy="steps", save_steps=2, eval_strategy="steps",
    eval_steps=2, report_to="none", disable_tqdm=True, bf16=False, use_cpu=True, picture_steps=2,
    ema_decay=float(ema),
)
if engine.startswith("zero"):
    sizes = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    settings["deepspeed"] = dict.fromkeys(sizes, "auto") | {
        "zero_optimization": {"stage": int(engine[-1])}, "zero_allow_untested_optimizer": True,
    }
if kind in ("stage 2", "muon", "broken"):
    args = LatentDiffusionConfig(
        per_device_train_batch_size=2, eval_samples=0, muon=kind == "muon", **settings
    )
else:
    args = DDPOConfig(
        per_device_train_batch_size=3, steps_per_generation=2, gradient_accumulation_steps=2, num_generations=4,
        num_inference_steps=4, eval_num_inference_steps=2, loss_type="awm" if kind == "awm" else "ddpo",
        num_iterations=1, sync_ref_model=kind == "full", ref_model_sync_steps=1, **settings,
    )
if kind == "broken":
    args.eval_strategy, args.picture_steps = "no", 0
args.device  # starts the processes' group
if engine == "fsdp2":
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
pipeline = MedDiffusion3DPipeline.from_pretrained(base)
if kind == "broken":
    next(pipeline.unet.parameters()).data.fill_(torch.nan)
if kind in ("stage 2", "muon", "broken"):
    scans = VolumeDataset(
        brains, ["sub-01", "sub-02", "sub-03", "sub-04"], volume_shape=SHAPE, spacing=SPACING,
        class_names=["young", "middle", "old"], label_column="age", class_edges=[35, 60],
    )
    trainer = LatentDiffusionTrainer(pipeline, args, train_dataset=scans, eval_dataset=scans)
else:
    trainer = DDPOTrainer(
        pipeline, lambda volumes, **conditions: volumes.mean((1, 2, 3, 4)), args,
        datasets.Dataset.from_dict({"class_label": [0, 1, 2]}),
        peft_config=LoraConfig(r=2) if kind == "lora" else None,
    )
trainer.train(resume_from_checkpoint="latest" if resume == "resume" else None)
trainer.save_model()
own = sum(getattr(p, "to_local", lambda: p)().numel() for p in trainer.model.parameters())
Path(out, f"own-{trainer.args.process_index}").write_text(str(own))
trainer.accelerator.end_training()
os._exit(0)  # while the interpreter shuts down, a thread of gloo that asks for the GIL would abort the process
"""
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
}  # what `accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml` sets, but for bfloat16


def start(
    tmp_path: Path, base: str, out: Path, engine: str, kind: str, ema: float, resume: str = ""
) -> subprocess.CompletedProcess:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.replace("SHAPE", repr(VOLUME_SHAPE), 1).replace("SPACING", repr(SPACING)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    command += [base, str(tmp_path / "brains"), str(out), engine, kind, str(ema), resume]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment |= FSDP if engine == "fsdp2" else {"DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def run(tmp_path: Path, base: str, out: Path, *settings) -> dict[str, torch.Tensor]:
    """Weights of the generator that two processes save."""
    done = start(tmp_path, base, out, *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.long
@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        *(("fsdp2", kind) for kind in ("full", "lora", "stage 2", "muon")),
        *(("zero2", kind) for kind in ("full", "stage 2")),
    ],
)
def test_a_divided_training_is_resumed_bit_for_bit_and_ends_like_one_that_is_not(
    engine, kind, tiny_pipeline_folder, tmp_path
):
    if engine == "zero2":
        pytest.importorskip("deepspeed")
    write_brains(tmp_path / "brains")
    ema = 0.0 if engine == "fsdp2" else 0.5  # an average is refused where the weights are divided
    whole = run(tmp_path, tiny_pipeline_folder, tmp_path / "whole", engine, kind, ema)
    count = sum(tensor.numel() for tensor in whole.values())
    own = [int((tmp_path / "whole" / f"own-{rank}").read_text()) for rank in range(2)]
    if engine == "fsdp2":
        assert max(own) < 0.8 * sum(own) and (kind == "lora" or sum(own) == count)  # each holds its part
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    resumed = run(tmp_path, tiny_pipeline_folder, tmp_path / "resumed", engine, kind, ema, "resume")
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
    logs = [json.loads((tmp_path / n / "trainer_state.json").read_text())["log_history"] for n in ("whole", "resumed")]
    assert [row.get("loss") for row in logs[0]] == [row.get("loss") for row in logs[1]]
    plain = load_file(Path(tiny_pipeline_folder) / "unet" / "diffusion_pytorch_model.safetensors")
    undivided = run(tmp_path, tiny_pipeline_folder, tmp_path / "undivided", "ddp", kind, ema)
    moved = sum((undivided[name] - plain[name]).square().sum() for name in plain).sqrt()
    differs = sum((undivided[name] - whole[name]).square().sum() for name in plain).sqrt()
    assert differs < 0.1 * moved


@pytest.mark.long
@pytest.mark.parametrize(
    ("engine", "kind", "message"),
    [
        ("zero3", "stage 2", "ZeRO stage must be at most 2, got 3"),
        ("zero2", "broken", "not finite"),
    ],
)
def test_deepspeed_stops_where_it_cannot_go_on(engine, kind, message, tiny_pipeline_folder, tmp_path):
    pytest.importorskip("deepspeed")
    write_brains(tmp_path / "brains")
    done = start(tmp_path, tiny_pipeline_folder, tmp_path / "out", engine, kind, 0.0)
    assert done.returncode != 0 and message in done.stderr
