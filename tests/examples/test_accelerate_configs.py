"""examples/accelerate_configs: read by accelerate's own loader, and the ones that a CPU can run are run."""

import json
import os
import socket
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from conftest import EXAMPLES
from diffusers_med3d import MedDiffusion3DPipeline

CONFIGS = EXAMPLES / "accelerate_configs"
EXPECTED = {  # name: kind, processes, machines, precision
    "cpu": (DistributedType.NO, 1, 1, "no"),
    "one_gpu_bf16": (DistributedType.NO, 1, 1, "bf16"),
    "ddp": (DistributedType.MULTI_GPU, 4, 1, "bf16"),
    "fsdp2": (DistributedType.FSDP, 4, 1, "bf16"),
    "deepspeed_zero2": (DistributedType.DEEPSPEED, 4, 1, "bf16"),
    "two_nodes": (DistributedType.MULTI_GPU, 16, 2, "bf16"),
}


def path_of(name: str) -> str:
    return str(CONFIGS / f"{name}.yaml")


def test_every_configuration_is_in_the_table_above():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_a_configuration_without_unknown_keys(name):
    config = load_config_from_file(path_of(name))
    assert isinstance(config, ClusterConfig) and config.use_cpu == (name == "cpu")
    found = (config.distributed_type, config.num_processes, config.num_machines, config.mixed_precision)
    assert found == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_launch_takes_every_setting_from_the_file(name):
    arguments = launch_command_parser().parse_args(["--config_file", path_of(name), "script.py"])
    arguments = _validate_launch_command(arguments)[0]
    assert (arguments.num_processes, arguments.num_machines) == EXPECTED[name][1:3]
    assert arguments.mixed_precision == EXPECTED[name][3]
    assert arguments.multi_gpu == (name in ("ddp", "two_nodes"))
    assert (arguments.use_fsdp, arguments.use_deepspeed) == (name == "fsdp2", name == "deepspeed_zero2")
    if name == "deepspeed_zero2":
        assert (arguments.zero_stage, arguments.offload_optimizer_device) == (2, "none")


def test_the_fsdp_configuration_makes_an_fsdp2_plugin(monkeypatch):
    arguments = launch_command_parser().parse_args(["--config_file", path_of("fsdp2"), "script.py"])
    environment = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    for name, value in environment.items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is None
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)


WORKER = """
import os, runpy, sys
from pathlib import Path
from accelerate import PartialState

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
state = PartialState()
out = Path(sys.argv[sys.argv.index("--output_dir") + 1])
(out / f"rank-{state.process_index}").write_text(f"{state.num_processes} {state.backend} {state.local_process_index}")
state.destroy_process_group()
os._exit(0)  # while the interpreter shuts down, a thread of gloo that asks for the GIL would abort the process
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
@pytest.mark.long
def test_two_nodes_train_a_flow_generator_together(brains_folder, tiny_vae, tmp_path):
    """two_nodes.yaml as it is, but for addresses, one process a node, and gloo in place of GPUs; the world is two."""
    tiny_vae.save_pretrained(tmp_path / "vae")
    subjects = [f"sub-{i:02d}" for i in (1, 4, 6, 8)]
    split = {"train": subjects, "validation": ["sub-02"], "test": [], "folds": {"a": subjects[:2], "b": subjects[2:]}}
    (tmp_path / "split.json").write_text(json.dumps(split))
    (tmp_path / "worker.py").write_text(WORKER)
    out = tmp_path / "out"
    script = [str(tmp_path / "worker.py"), str(EXAMPLES / "train_diffusion.py"), "--prediction_type", "flow"]
    script += ["--data_dir", brains_folder, "--split_file", str(tmp_path / "split.json"), "--output_dir", str(out)]
    script += [
        "--volume_shape",
        "16",
        "16",
        "16",
        "--spacing",
        "12",
        "12",
        "12",
        "--autoencoder",
        str(tmp_path / "vae"),
    ]
    script += ["--channels", "8", "16", "--num_res_blocks", "1", "--num_head_channels", "8", "--norm_num_groups", "8"]
    script += ["--per_device_train_batch_size", "2", "--max_steps", "2", "--eval_samples", "0", "--copies", "1"]
    script += ["--logging_steps", "1", "--save_steps", "1", "--bf16", "false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path_of("two_nodes")]
    launch += ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    launch += ["--mixed_precision", "no"]
    nodes = [
        subprocess.Popen(
            [*launch, "--machine_rank", str(rank), *script], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [node.communicate(timeout=600)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(error[-2000:] for error in errors)
    assert [(out / f"rank-{rank}").read_text() for rank in range(2)] == ["2 gloo 0"] * 2
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2]
    pipeline = MedDiffusion3DPipeline.from_pretrained(out)
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert pipeline(num_samples=1, num_inference_steps=2).volumes.isfinite().all()
