"""Private names of other libraries that we use or override: each must still be there, with the arguments we rely on."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from conftest import REPOSITORY

SOURCES = REPOSITORY / "src" / "diffusers_med3d"

PRIVATE = {
    "argparse.ArgumentParser._actions": "utils/arguments.py lists the fields of a script in its help",
    "argparse.ArgumentParser._get_values": "utils/arguments.py parses the values of a YAML file",
    "accelerate.state.GradientState._set_sync_gradients": "trainers/ddpo.py synchronizes once per update",
    "diffusers.DDPMScheduler._threshold_sample": "rl/transition.py clips as the scheduler does",
    "diffusers.DDIMScheduler._threshold_sample": "rl/transition.py clips as the scheduler does",
    "diffusers.DiffusionPipeline._execution_device": "pipelines/med_diffusion_3d.py draws noise there",
    "diffusers.ModelMixin._keep_in_fp32_modules": "models/vq_model.py keeps its codebook in float32",
    "diffusers.ModelMixin._supports_gradient_checkpointing": "all networks switch it on",
    "diffusers.loaders.lora_base.LoraBaseMixin._lora_loadable_modules": "pipelines/lora.py names the UNet",
    "diffusers.pipelines.pipeline_loading_utils.LOADABLE_CLASSES": "__init__.py makes diffusers find our classes",
    "peft.tuners.lora.LoraLayer._disable_adapters": "trainers/lora.py switches adapters off for the reference",
    "torch.cpu._is_amx_tile_supported": "trainers/base.py chooses bfloat16",
    "torch.cpu._is_avx512_bf16_supported": "trainers/base.py chooses bfloat16",
    "torch.nn.Conv3d._conv_forward": "models/convolution.py and trainers/base.py compute small convolutions",
    "torch.nn.Module._apply": "models/vq_model.py keeps its counts where the codebook is",
    "torch.nn.Module._modules": "models/slabs.py asks whether an upsampling is learned",
    "torch.nn.Module._parameters": "trainers/sharding.py exchanges parameters for whole ones",
    "transformers.Trainer._get_grad_norm": "trainers/base.py skips steps that are not finite",
    "transformers.Trainer._get_output_dir": "trainers/base.py marks whole checkpoints",
    "transformers.Trainer._init_training_state": "trainers/base.py finds the best checkpoint of a moved run",
    "transformers.Trainer._load_best_model": "trainers/base.py loads raw weights and their average",
    "transformers.Trainer._load_from_checkpoint": "trainers/base.py refuses damaged checkpoints",
    "transformers.Trainer._load_optimizer_and_scheduler": "trainers/base.py loads the average under DeepSpeed",
    "transformers.Trainer._save": "trainers/base.py saves components",
    "transformers.Trainer._save_checkpoint": "trainers/base.py marks whole checkpoints",
    "transformers.TrainingArguments._n_gpu": "trainers/base.py trains on one device per process",
    "transformers.integrations.TensorBoardCallback._init_summary_writer": "trainers/base.py adds layouts",
    "trl.trainer.base_config._BaseConfig": "Med3DConfig extends it",
    "trl.trainer.base_trainer._BaseTrainer": "Med3DTrainer extends it",
    "trl.trainer.base_trainer._BaseTrainer._name": "model cards name the trainer",
    "trl.trainer.base_trainer._BaseTrainer._send_telemetry": "trainers/base.py switches telemetry off",
    "trl.trainer.base_trainer._BaseTrainer._tag_names": "model cards carry the tags",
}
"""Where each is, and what stops working without it."""

ASSIGNED = {"_actions", "_disable_adapters", "_modules", "_n_gpu", "_parameters"}
"""Attributes of instances: looked for in the source of their class."""

DOCUMENTED = {"_asdict", "_fields", "_make", "_replace"}
"""Of named tuples: not private in spite of their names."""

ARGUMENTS = {
    "transformers.Trainer._get_grad_norm": ["self", "model", "grad_norm"],
    "transformers.Trainer._get_output_dir": ["self", "trial"],
    "transformers.Trainer._init_training_state": [
        "self", "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial",
    ],
    "transformers.Trainer._load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "transformers.Trainer._load_optimizer_and_scheduler": ["self", "checkpoint"],
    "transformers.Trainer._save": ["self", "output_dir", "state_dict"],
    "transformers.Trainer._save_checkpoint": ["self", "model", "trial"],
    "trl.trainer.base_trainer._BaseTrainer._send_telemetry": ["self"],
    "torch.nn.Conv3d._conv_forward": ["self", "input", "weight", "bias"],
}  # fmt: skip


def found(path: str) -> object:
    """The object of a dotted path; LookupError where a part of it is gone."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for i, name in enumerate(parts[length:], length):
            if i == len(parts) - 1 and name in ASSIGNED and name in inspect.getsource(owner):
                return None
            if not hasattr(owner, name):
                raise LookupError(f"{'.'.join(parts[:i])} has no {name}")
            owner = getattr(owner, name)
        return owner
    raise LookupError(f"there is no {parts[0]}")


@pytest.mark.parametrize("path", PRIVATE)
def test_a_private_name_that_is_used_is_where_it_was(path):
    try:
        function = found(path)
    except LookupError as error:
        pytest.fail(f"{error}; it was moved or removed, but {PRIVATE[path]}: change that and this table.")
    if path in ARGUMENTS:
        there = list(inspect.signature(function).parameters)
        assert there == ARGUMENTS[path], f"{path} takes {there}, but {PRIVATE[path]} for {ARGUMENTS[path]}."


def syntax_trees() -> dict[str, ast.Module]:
    return {path.relative_to(SOURCES).as_posix(): ast.parse(path.read_text()) for path in SOURCES.rglob("*.py")}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_every_private_name_of_others_is_in_the_table():
    """Of others are those that no module of ours defines, and those that a class of ours overrides."""
    ours, used = set(), {}
    for place, tree in syntax_trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
            elif isinstance(node, ast.Attribute) and is_private(node.attr):
                if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
                    ours.add(node.attr)
                else:
                    used.setdefault(node.attr, place)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                used.update({alias.name: place for alias in node.names if is_private(alias.name)})
    known = {path.rpartition(".")[2] for path in PRIVATE}
    missing = {name: place for name, place in used.items() if name not in ours | known | DOCUMENTED}
    assert not missing, f"private names of others that tests/test_private_names.py does not know: {missing}"


def test_every_private_name_that_a_class_overrides_is_in_the_table():
    import diffusers_med3d

    modules = [f"diffusers_med3d.{folder}" for folder in ("models", "pipelines", "schedulers", "trainers")]
    classes = {value for name in modules for value in _classes_of(Path(diffusers_med3d.__file__).parent, name)}
    missing = {}
    for one in classes:
        for name in filter(is_private, vars(one)):
            owner = next((base for base in one.__mro__[1:] if name in vars(base)), None)
            foreign = owner is not None and owner.__module__.split(".")[0] not in ("diffusers_med3d", "typing")
            if foreign and name not in {path.rpartition(".")[2] for path in PRIVATE}:
                missing[f"{one.__name__}.{name}"] = f"{owner.__module__}.{owner.__qualname__}"
    assert len(classes) > 30 and not missing, missing


def _classes_of(package: Path, module: str) -> set[type]:
    folder = package / module.partition(".")[2]
    found = set()
    for path in folder.glob("*.py"):
        name = module if path.stem == "__init__" else f"{module}.{path.stem}"
        values = vars(importlib.import_module(name)).values()
        found |= {value for value in values if inspect.isclass(value) and value.__module__ == name}
    return found


LIBRARIES = ("accelerate", "datasets", "diffusers", "huggingface_hub", "monai", "peft", "torch", "transformers", "trl")


def foreign_imports() -> list[tuple[str, str, str]]:
    """(file, module, name) of all that is imported by name from below the top of a library, lazily or not."""
    return sorted(
        (place, node.module, alias.name)
        for place, tree in syntax_trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] in LIBRARIES
        for alias in node.names
        if "." in node.module
    )


@pytest.mark.slow
def test_every_name_that_is_imported_from_inside_a_library_is_where_it_was():
    imports, moved = foreign_imports(), []
    for place, module, name in imports:
        try:
            found(f"{module}.{name}")
        except LookupError as error:
            moved.append(f"{error}, which {place} imports")
    assert len(imports) > 50 and not moved, f"moved or removed: {'; '.join(moved)}."
