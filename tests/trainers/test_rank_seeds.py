"""Two real processes (gloo) draw random numbers of their own, share the order of the data, and resume exactly.

See docs/pitfalls.md, 16.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

WORKER = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from test_base_trainer import LineTrainer, make, weights

class Recording(LineTrainer):
    # noise from torch's global generator, as stages 1 and 2 draw their crops, noise and timesteps
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        noise = torch.randn_like(inputs["y"])
        self.seen.append({"data": inputs["x"][:, 0].tolist(), "noise": noise.tolist()})
        return (model(inputs["x"]) - inputs["y"] - self.noise * noise).square().mean()

output, runs = Path(sys.argv[1]), []
for checkpoint in (None, str(output / "checkpoint-2")):
    trainer = make(output, Recording, max_steps=5, save_strategy="steps", save_steps=2, save_total_limit=3)
    trainer.seen = []
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.accelerator.wait_for_everyone()
    runs.append({"seen": trainer.seen, "weights": weights(trainer).tolist()})
answer = {"world": dist.get_world_size(), "runs": runs}
(output / f"rank-{dist.get_rank()}.json").write_text(json.dumps(answer))
dist.destroy_process_group()
os._exit(0)  # while the interpreter shuts down, a thread of gloo that asks for the GIL would abort the process
"""


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_draw_different_noise_for_different_data_and_repeat_it_when_resumed(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "worker.py"), str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / "run" / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [rank["world"] for rank in ranks] == [2, 2]
    first, second = (torch.tensor([step["noise"] for step in rank["runs"][0]["seen"]]) for rank in ranks)  # (5, 4)
    assert first.shape == second.shape == (5, 4)
    assert not torch.isclose(first[:, :, None], second[:, None, :]).any()
    epoch = [value for rank in ranks for step in rank["runs"][0]["seen"][:3] for value in step["data"]]
    assert len(epoch) == len(set(epoch)) == 24, "the processes do not share out one order of the data"
    for rank in ranks:
        whole, resumed = rank["runs"]
        assert resumed["seen"] == whole["seen"][2:]
        assert resumed["weights"] == whole["weights"]
    assert ranks[0]["runs"][0]["weights"] == ranks[1]["runs"][0]["weights"]
