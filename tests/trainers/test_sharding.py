"""A network that FSDP2 has divided between two real processes (gloo) is saved whole."""

import json
import os
import subprocess
import sys

import pytest
import torch

from diffusers_med3d import MedDiffusion3DPipeline

WORKER = """
import json, os, sys
from pathlib import Path
import datasets, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from diffusers_med3d import DDPOConfig, DDPOTrainer, MedDiffusion3DPipeline

out = Path(sys.argv[2])
trainer = DDPOTrainer(
    MedDiffusion3DPipeline.from_pretrained(sys.argv[1]),
    lambda volumes, **conditions: volumes.mean((1, 2, 3, 4)),
    DDPOConfig(str(out), num_generations=2, per_device_train_batch_size=2, ema_decay=0.0, report_to="none", bf16=False),
    [{"class_label": 0}],
)
# accelerate divides networks on GPUs only, so this is done by hand as its plugin does it
fully_shard(trainer.model, mesh=init_device_mesh("cpu", (2,)))
trainer.is_fsdp_enabled = True
options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
trainer._save(str(out), state_dict=get_model_state_dict(trainer.model, options=options))
share = sum(p.to_local().numel() for p in trainer.model.parameters())
report = {"share": share, "kind": type(trainer.model).__name__}
x = torch.zeros(1, 4, 4, 4, 4)
report["answer"] = trainer.model(x, 5, torch.tensor([0])).sample.flatten()[:9].tolist()  # still divided, still working
(out / f"rank-{dist.get_rank()}.json").write_text(json.dumps(report))
dist.barrier()
os._exit(0)  # while the interpreter shuts down, a thread of gloo that asks for the GIL would abort the process
"""


@pytest.mark.slow
def test_a_divided_network_is_saved_as_a_pipeline_that_loads(tiny_pipeline, tiny_pipeline_folder, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "worker.py"), tiny_pipeline_folder, str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = MedDiffusion3DPipeline.from_pretrained(out).unet.state_dict()
    expected = tiny_pipeline.unet.state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)
    reports = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(2)]
    whole = sum(p.numel() for p in tiny_pipeline.unet.parameters())
    assert sum(report["share"] for report in reports) == whole and all(report["share"] < whole for report in reports)
    assert reports[0]["kind"] == "FSDPDiffusionUNet3D" and reports[0]["answer"] == reports[1]["answer"]
