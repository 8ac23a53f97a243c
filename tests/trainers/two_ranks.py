"""Pairs of processes of which one fails, for test_two_ranks.py: python two_ranks.py FOLDER CASE...

One process imports everything and forks the pairs, as in killing.py; no launcher watches them, so that what one process
does when the other is gone is its own doing. Prints one JSON line: case -> how both ended.
"""

import json
import os
import signal
import socket
import sys
import time
import warnings
from pathlib import Path

import datasets
import torch
from transformers import TrainerCallback

from diffusers_med3d import DDPOConfig, DDPOTrainer
from diffusers_med3d.trainers.checkpoints import checkpoints, damage
from killing import pipeline
from test_base_trainer import LineTrainer, make, points, weights

LIMIT = 180.0
"""Seconds after the end of one process at which the other is taken to hang."""


def own_rank() -> int:
    return int(os.environ["RANK"])


# One process fails


class FailingStep(LineTrainer):
    def compute_loss(self, *args, **kwargs):
        if own_rank() == 1 and self.state.global_step == 2:
            raise ValueError("the data of this step are broken")
        return super().compute_loss(*args, **kwargs)


class KilledStep(LineTrainer):
    def compute_loss(self, *args, **kwargs):
        if own_rank() == 1 and self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().compute_loss(*args, **kwargs)


class FailingRandomState(LineTrainer):
    def _save_rng_state(self, output_dir):
        if own_rank() == 1 and self.state.global_step == 4:
            raise OSError(28, "No space left on device")
        super()._save_rng_state(output_dir)


class FailingWeights(LineTrainer):
    def _save(self, output_dir=None, state_dict=None):
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device")
        super()._save(output_dir, state_dict)


class FailingEvaluation(LineTrainer):
    def evaluate(self, *args, **kwargs):
        if self.is_world_process_zero():
            raise ValueError("the picture cannot be drawn")
        return self.conclude_evaluation({"eval_loss": 1.0})


class FailingLog(TrainerCallback):
    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step == 2:
            raise ValueError("the tracker does not answer")


SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}


def step(folder: Path) -> None:
    make(folder, FailingStep, **SAVING).train()


def killed(folder: Path) -> None:
    make(folder, KilledStep, **SAVING).train()


def random_state(folder: Path) -> None:
    make(folder, FailingRandomState, **SAVING).train()


def weights_file(folder: Path) -> None:
    make(folder, FailingWeights, **SAVING).train()


def evaluation(folder: Path) -> None:
    trainer = make(folder, FailingEvaluation)
    trainer.evaluate()


def log(folder: Path) -> None:
    trainer = make(folder)
    trainer.add_callback(FailingLog())
    trainer.train()


def ddpo(folder: Path, reward) -> DDPOTrainer:
    args = DDPOConfig(
        output_dir=str(folder), per_device_train_batch_size=2, num_generations=4, steps_per_generation=1,
        num_inference_steps=3, max_steps=2,
        report_to="none", disable_tqdm=True, bf16=False, save_strategy="no", picture_steps=0, logging_steps=1,
        eval_num_inference_steps=2,
    )  # fmt: skip
    return DDPOTrainer(pipeline(), reward, args, datasets.Dataset.from_dict({"class_label": [0]}))


def reward(folder: Path) -> None:
    def short(volumes, **_):
        return [0.5] * (len(volumes) - own_rank())

    ddpo(folder, short).train()


FAILING = {one.__name__: one for one in (step, killed, random_state, weights_file, evaluation, log, reward)}


# Nothing fails: what both must agree on


class OneNaN(LineTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss + torch.nan if own_rank() == 1 and self.state.global_step == 1 else loss


class OneSignal(LineTrainer):
    def compute_loss(self, *args, **kwargs):
        if own_rank() == 1 and self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().compute_loss(*args, **kwargs)


class Counting(LineTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        self.seen.append(inputs["x"][:, 0].tolist())
        return super().compute_loss(model, inputs, **kwargs)


def uneven(folder: Path, count: int) -> dict:
    """Two epochs of `count` points in batches of four."""
    trainer = make(folder, Counting, max_steps=-1, num_train_epochs=2)
    trainer.train_dataset, trainer.seen = points(count), []
    trainer.train()
    return {"steps": trainer.state.global_step, "seen": trainer.seen, "weights": weights(trainer).tolist()}


def not_finite(folder: Path) -> dict:
    trainer = make(folder, OneNaN)
    trainer.train()
    skipped = [row.get("skipped_steps", 0) for row in trainer.state.log_history if "loss" in row]
    return {"skipped": skipped, "weights": weights(trainer).tolist()}


def one_signal(folder: Path) -> dict:
    trainer = make(folder, OneSignal, **SAVING)
    try:
        trainer.train()
    except SystemExit as error:
        return {"code": error.code, "step": trainer.state.global_step, "saved": [p.name for p in checkpoints(folder)]}
    return {}


def one_reward(folder: Path) -> dict:
    def failing(volumes, **_):
        if own_rank() == 1:
            raise ValueError("no scorer here")
        return volumes.flatten(1).mean(1)

    trainer = ddpo(folder, failing)
    trainer.train()
    logs = [row["rewards/failing/unscored"] for row in trainer.state.log_history if "loss" in row]
    scored = trainer.sample_and_score(trainer.eval_dataset)  # one sample: the second process has none of its own
    return {"unscored": logs, "weights": weights(trainer).tolist(), "scored": scored.volumes.shape[0]}


def agree(folder: Path) -> None:
    found = {
        "uneven": uneven(folder / "uneven", 25),
        "one point": uneven(folder / "one", 1),
        "not finite": not_finite(folder / "nan"),
        "signal": one_signal(folder / "signal"),
        "reward": one_reward(folder / "reward"),
    }
    (folder / f"agreed-{own_rank()}.json").write_text(json.dumps(found))


# Pairs


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def fork(case, folder: Path, rank: int, port: int) -> int:
    """A process that ends as a script does: what it raises goes through Python's own end of a program."""
    pid = os.fork()
    if pid:
        return pid
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in where.items()}
    os.dup2(os.open(folder / f"rank-{rank}.txt", os.O_CREAT | os.O_WRONLY), 2)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    case(folder)
    os._exit(0)  # while the interpreter shuts down, a thread of gloo that asks for the GIL would abort the process


def pair(case, folder: Path) -> dict:
    """How both processes of a case ended."""
    folder.mkdir(parents=True)
    port = free_port()
    running = {fork(case, folder, rank, port): rank for rank in range(2)}
    codes: dict[int, int] = {}
    first, apart = None, 0.0
    while running:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
                apart = 0.0 if first is None else time.monotonic() - first
                first = first or time.monotonic()
        if first is not None and time.monotonic() - first > LIMIT:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    said = [(folder / f"rank-{rank}.txt").read_text() for rank in range(2)]
    left = {path.name: damage(path) for path in checkpoints(folder)}
    return {"codes": [codes[rank] for rank in range(2)], "apart": apart, "said": said, "checkpoints": left}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    print(json.dumps({name: pair((FAILING | {"agree": agree})[name], folder / name) for name in names}))
