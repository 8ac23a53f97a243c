"""Two processes (gloo) of which one fails, and what two processes must agree on: docs/reliability.md."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
LOST = "TrainingStopped: Another process of this run has ended, and this one cannot go on without it"


def environment() -> dict[str, str]:
    paths = [HERE, HERE.parent, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_VISIBLE_DEVICES": "",
    }


def pairs(folder: Path, *cases: str) -> dict[str, dict]:
    command = [sys.executable, str(HERE / "two_ranks.py"), str(folder), *cases]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("pairs")
    ended = pairs(folder, "killed", "agree")
    agreed = [folder / "agree" / f"agreed-{rank}.json" for rank in range(2)]
    assert all(path.is_file() for path in agreed), ended["agree"]["said"]
    return ended | {"agreed": [json.loads(path.read_text()) for path in agreed]}


def test_a_process_ends_by_itself_when_the_other_is_killed(found):
    killed = found["killed"]
    assert killed["codes"] == [1, -signal.SIGKILL] and killed["apart"] < 180, killed
    assert LOST in killed["said"][0] and killed["checkpoints"] == {"checkpoint-2": None}


@pytest.mark.long
def test_a_process_ends_by_itself_whatever_the_other_fails_at(tmp_path):
    """A training step, one or the other file of a checkpoint, an evaluation, a log, a reward."""
    reasons = {  # case: process that fails, what it says
        "random_state": (1, "checkpoint-4 could not be written ([Errno 28] No space left on device)"),
        "step": (1, "ValueError: the data of this step are broken"),
        "weights_file": (0, "checkpoint-4 could not be written ([Errno 28] No space left on device)"),
        "evaluation": (0, "ValueError: the picture cannot be drawn"),
        "log": (0, "ValueError: the tracker does not answer"),
        "reward": (1, "ValueError: Reward 'short' gave shape (1,) for 2 volumes"),
    }
    for case, ended in pairs(tmp_path, *reasons).items():
        rank, reason = reasons[case]
        assert 0 not in ended["codes"] and ended["apart"] < 180, (case, ended)
        assert reason in ended["said"][rank], (case, ended["said"][rank])
        saved = ended["checkpoints"]
        if case in ("random_state", "step", "weights_file"):
            assert saved["checkpoint-2"] is None and saved.get("checkpoint-4", "gone"), (case, saved)
        if case == "random_state":  # not blamed on the disk of the process that saved its part
            assert LOST in ended["said"][0] and "could not be written" not in ended["said"][0]


LAUNCHED = """
import sys
from pathlib import Path
from two_ranks import step
from diffusers_med3d.utils.stopping import stopped_in_one_line

with stopped_in_one_line():
    step(Path(sys.argv[1]))
"""


@pytest.mark.long
def test_a_launcher_ends_with_the_first_error(tmp_path):
    (tmp_path / "script.py").write_text(LAUNCHED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    start = time.monotonic()
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path / "run")],
        env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 1 and time.monotonic() - start < 300
    assert "ValueError: the data of this step are broken" in done.stderr
    assert "rank      : 1" in done.stderr.split("Root Cause")[1]


def test_two_processes_skip_a_step_that_is_not_finite_in_one(found):
    first, second = (agreed["not finite"] for agreed in found["agreed"])
    assert first == second and first["skipped"] == [0, 1, 0, 0]


def test_two_processes_stop_at_the_same_step_after_a_signal_to_one(found):
    first, second = (agreed["signal"] for agreed in found["agreed"])
    assert first == second == {"code": 128 + signal.SIGTERM, "step": 3, "saved": ["checkpoint-3", "checkpoint-2"]}


def test_two_processes_go_on_together_with_a_reward_that_fails_in_one(found):
    first, second = (agreed["reward"] for agreed in found["agreed"])
    assert first["unscored"] == [0.5, 0.5] and first["weights"] == second["weights"]
    assert first["scored"] == second["scored"] == 1  # of which the second process made none


@pytest.mark.parametrize(("case", "count", "steps"), [("uneven", 25, 8), ("one point", 1, 2)])
def test_two_processes_make_as_many_steps_where_the_data_do_not_divide(found, case, count, steps):
    first, second = (agreed[case] for agreed in found["agreed"])
    assert first["steps"] == second["steps"] == steps and first["weights"] == second["weights"]
    for epoch in (slice(0, steps // 2), slice(steps // 2, steps)):
        assert len({x for rank in (first, second) for batch in rank["seen"][epoch] for x in batch}) == count
