"""examples/slurm: the script as bash runs it, with stand-ins for SLURM's programs and for accelerate."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from conftest import EXAMPLES
from diffusers_med3d.utils.arguments import ScriptParser

SCRIPT = EXAMPLES / "slurm" / "ppo_two_nodes.sh"
USR1 = 1 << 9  # signal 10 in the mask of /proc
STAND_INS = {
    "scontrol": 'printf "first\\nsecond\\n"',
    "srun": 'while [[ "$1" == --* ]]; do shift; done; for node in 0 1; do SLURM_NODEID=$node "$@"; done',
    "accelerate": 'grep SigIgn /proc/$$/status; printf "%s\\n" "$@" end-of-call',
}


def launches(folder: Path, *flags: str) -> list[tuple[bool, list[str]]]:
    """For each node whether the launcher ignores USR1, and its arguments."""
    for program, body in STAND_INS.items():
        (folder / program).write_text(f"#!/bin/bash\n{body}\n")
        (folder / program).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-2]"}
    environment["SLURM_GPUS_PER_NODE"] = "h100:4"
    done = subprocess.run(
        ["bash", str(SCRIPT), *flags], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    calls = []
    for call in done.stdout.split("end-of-call\n")[:-1]:
        signals, *arguments = call.splitlines()
        calls.append((bool(int(signals.split()[1], 16) & USR1), arguments))
    return calls


def test_each_node_launches_the_fine_tuning_with_its_rank_and_the_flags_of_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    calls = launches(tmp_path, "--reward_funcs", "my rewards.py:f", "--lora_rank", "8")
    assert len(calls) == 2
    for rank, (ignores, call) in enumerate(calls):
        assert ignores, "the launcher would die of the signal that asks its trainers for a checkpoint"
        assert call[0] == "launch"
        arguments = _validate_launch_command(launch_command_parser().parse_args(call[1:]))[0]
        assert (int(arguments.machine_rank), arguments.num_machines, arguments.num_processes) == (rank, 2, 8)
        assert (arguments.main_process_ip, arguments.main_process_port) == ("first", 29500)
        assert arguments.multi_gpu and arguments.mixed_precision == "bf16"
        classes = runpy.run_path(arguments.training_script, run_name="ppo_finetune")
        monkeypatch.setattr(
            sys, "argv", [arguments.training_script, *arguments.training_script_args, "--bf16", "false"]
        )
        script, args = ScriptParser(classes["ScriptArguments"], classes["TenMinutesConfig"]).parse()
        assert (script.reward_funcs, script.lora_rank) == (["my rewards.py:f"], 8)
        assert (args.resume_from_checkpoint, args.max_minutes) == ("latest", float("inf"))


def test_slurm_asks_for_a_checkpoint_five_minutes_before_the_end():
    assert "#SBATCH --signal=USR1@300" in SCRIPT.read_text().splitlines()  # without B: to the processes of the step
