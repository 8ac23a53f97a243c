"""One process of the suite `processes`: python -m torch.distributed.run ... processes_worker.py FOLDER SIZE REPEATS.

The first iteration is the one whose advantages and weights are compared, the last one runs under torch's
profiler, and those between are timed.
"""

import json
import os
import sys
from pathlib import Path

import datasets
import torch
from measure import Settings, Times, now
from safetensors.torch import save_file
from torch.profiler import profile
from transformers import TrainerCallback

from diffusers_med3d import DDPOConfig, DDPOTrainer, VolumeReward
from suites.networks import make_pipeline, make_reward

SAMPLES, BATCH, GENERATIONS, STEPS, WINDOW = 4, 2, 2, 4, 2
LEARNING_RATE = 1e-5


class _Recorder(TrainerCallback):
    """Times of the iterations, tensors of the first, profile of the last."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.trainer: DDPOTrainer | None = None
        self.state: dict[str, torch.Tensor] = {}
        self.times: list[Times] = []
        self.profiler = profile()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 0:
            self.before = {name: value.detach().clone() for name, value in self.trainer.model.named_parameters()}
        if state.global_step == self.repeats + 1:
            self.profiler.start()
        self.start = now(args.device.type)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 1:
            weights = {name: value.detach() for name, value in self.trainer.model.named_parameters()}
            self.moved = max((weights[name] - self.before[name]).abs().max().item() for name in weights)
            self.state["weights"] = torch.cat([value.flatten() for value in weights.values()]).cpu()
            own = torch.cat([chunk.advantages for chunk in self.trainer._chunks])
            self.state["advantages"] = self.trainer.accelerator.gather(own).cpu()
            return
        taken = now(args.device.type) - self.start
        if state.global_step < self.repeats + 2:
            self.times.append(taken)
        else:
            self.profiler.stop()
            self.profiled = taken.wall


def main() -> None:
    """Run, and let the first process write."""
    folder, size, repeats = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    recorder = _Recorder(repeats)
    batches = SAMPLES // BATCH // int(os.environ["WORLD_SIZE"])
    args = DDPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        num_generations=GENERATIONS,
        steps_per_generation=batches,
        gradient_accumulation_steps=batches,
        num_inference_steps=STEPS,
        sde_window_size=WINDOW,
        max_steps=repeats + 2,
        learning_rate=LEARNING_RATE,
        bf16=False,
        save_strategy="no",
        picture_steps=0,
        report_to="none",
        disable_tqdm=True,
    )
    settings = Settings(args.device.type, size=size)
    trainer = DDPOTrainer(
        model=make_pipeline(settings),
        # the reward's batches are the same in one process and in two
        reward_funcs=[VolumeReward(make_reward(settings), batch_size=BATCH)],
        args=args,
        train_dataset=datasets.Dataset.from_dict({"number": [0, 1]}),
        callbacks=[recorder],
    )
    recorder.trainer = trainer
    trainer.train()
    if trainer.is_world_process_zero():
        talk = [event for event in recorder.profiler.events() if event.name.startswith(("gloo:", "nccl:"))]
        report = {
            "wall": [times.wall for times in recorder.times],
            "processor": [times.processor for times in recorder.times],
            "profiled": recorder.profiled,
            "communication": sum(event.time_range.elapsed_us() for event in talk) / 1e6,
            "learning_rate": LEARNING_RATE,
            "largest_step": recorder.moved,
        }
        save_file(recorder.state, folder / "state.safetensors")
        (folder / "report.json").write_text(json.dumps(report))
    trainer.accelerator.end_training()
    sys.stdout.flush()
    os._exit(0)  # while the interpreter shuts down, a thread of gloo that asks for the GIL would abort the process


if __name__ == "__main__":
    main()
