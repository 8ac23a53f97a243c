"""Same seed, data, versions and device: the same bytes of samples, rewards, metrics and updates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import SPLIT

WORKER = """
import hashlib, json, sys
from pathlib import Path
import torch
from diffusers_med3d import DDPOConfig, DDPOTrainer, MedDiffusion3DPipeline, SliceRewardModel, VolumeRewardModel
from diffusers_med3d import SliceReward, VolumeReward, evaluation
from diffusers_med3d.data import DataArguments, VolumeDataset
from diffusers_med3d.metrics import ScatteringFeatures
from diffusers_med3d.metrics.features import NamedExtractor

torch.set_num_threads(1)
base, brains, split, out = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
MedDiffusion3DPipeline.from_pretrained(base).save_pretrained(out / "pipeline")
pipeline = MedDiffusion3DPipeline.from_pretrained(out / "pipeline")
data = DataArguments(brains, split, [16] * 3, [12.0] * 3)
scans = [evaluation.volume_set(VolumeDataset.from_arguments(data, part)) for part in ("validation", "train")]
labels = evaluation.sampling.matched_labels(scans[0].labels, 9)
samples = evaluation.sample_volumes(pipeline, labels, out / "samples", data, num_inference_steps=3, eta=1.0)
files = [path.read_bytes() for path in sorted((out / "samples").glob("*.nii.gz"))]

torch.manual_seed(0)
rewards = [VolumeReward(VolumeRewardModel(channels=(8, 8), norm_num_groups=4, num_members=1).eval()),
           SliceReward(SliceRewardModel(channels=(8, 8), norm_num_groups=4, num_members=1).eval())]
scores = [reward(samples.volumes).tolist() for reward in rewards]

coarse = NamedExtractor(lambda volumes: torch.nn.functional.avg_pool3d(volumes, 4).flatten(1), "coarse")
report = evaluation.evaluate({"mine": samples}, *scans, [coarse], (12.0,) * 3, num_resamples=50)

args = DDPOConfig(output_dir=str(out / "ppo"), max_steps=2, per_device_train_batch_size=3, num_generations=3,
                  steps_per_generation=2, num_inference_steps=3, report_to="none", disable_tqdm=True, bf16=False,
                  eval_num_inference_steps=2)
trainer = DDPOTrainer(pipeline, rewards, args, [{"class_label": 0}, {"class_label": 1}])
trainer.train()
trainer.save_model()
weights = (out / "ppo" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
logs = [{k: v for k, v in row.items() if "seconds" not in k and "runtime" not in k and "per_second" not in k}
        for row in trainer.state.log_history]

def digest(what):
    return hashlib.sha256(what if isinstance(what, bytes) else json.dumps(what).encode()).hexdigest()

parts = {"samples": [digest(file) for file in files], "rewards": scores, "metrics": digest(report.to_dict()),
         "weights": digest(weights), "logs": logs, "count": len(files)}
(out / "answer.json").write_text(json.dumps(parts))
"""


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_in_turn_give_the_same_bytes(tiny_pipeline_folder, brains_folder, tmp_path):
    """Each saves and loads the generator first, the second what the first saved; Python's hashes differ."""
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    answers, base = [], Path(tiny_pipeline_folder)
    for seed in ("1", "2"):
        out = tmp_path / seed
        paths = os.pathsep.join(sys.path)
        environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, tmp_path / "worker.py", base, brains_folder, tmp_path / "split.json", out]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        answers.append(json.loads((out / "answer.json").read_text()))
        base = out / "pipeline"
    assert answers[0]["count"] == 9 and answers[0]["rewards"][0][0] != answers[0]["rewards"][0][1]
    for part, value in answers[0].items():
        assert value == answers[1][part], part
