"""TRL's trainer base made to work for diffusers models: the one place that touches TRL's private names.

What stays as in ``transformers.Trainer``: the loop, gradient accumulation, distributed training, checkpoints, resuming,
callbacks, pushing to the Hub. What is adapted here: no telemetry, precision and checkpointing defaults per device,
exponential moving average of the weights, checkpoints that are known to be whole, and saving what ``from_pretrained``
reads instead of a pickle of the training arguments.
"""

import copy
import dataclasses
import importlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import broadcast_object_list, parse_flag_from_env, set_seed
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from huggingface_hub import CommitInfo
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.integrations.integration_utils import default_logdir
from transformers.trainer_callback import TrainerControl, TrainerState
from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer

from .. import viz
from ..data import VolumeDataset
from ..hub import cards
from ..hub.publish import model_files, publish
from ..utils.checks import check_least, checked_fields
from ..utils.stopping import SignalWatch, TrainingStopped, is_lost_process, lost_process_named
from ..utils.wrappers import unwrapped
from .checkpoints import (
    COMPLETE_MARKER,
    checkpoints,
    compare_with_run,
    damage,
    keep_newest,
    last_checkpoint,
    mark_whole,
    save_run,
    tidy_after_kill,
)
from .sharding import load_weights, whole_weights

_CHECKPOINTING = {"activation_checkpointing", "gradient_checkpointing"} & {
    f.name for f in dataclasses.fields(_BaseConfig)
}
"""What transformers calls gradient checkpointing: newer versions have both names and warn of the second."""

_ALWAYS_IN_CARD = ("max_steps", "per_device_train_batch_size", "learning_rate", "seed")
_IN_CARD = (
    *_ALWAYS_IN_CARD,
    *("gradient_accumulation_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16"),
    *("load_best_model_at_end", "metric_for_best_model"),
)
"""Arguments of transformers that shape the weights. The others stay out of model cards: they may hold local paths or
secrets, or say where and how often something is written."""

EMA_FILE = "ema.safetensors"

_MAY_CHANGE = {
    *("max_steps", "max_minutes", "picture_steps", "max_skipped_steps", "load_best_model_at_end"),
    *("metric_for_best_model", "num_generations_eval", "eval_num_inference_steps", "eval_samples"),
    *("eval_inference_steps", "sample_every", "patience", "decode_batch_size", "decode_num_splits"),
    *("offload_trajectories", "reward_timeout", "max_failed_rollouts"),
}
"""Arguments that a resumed run may have others of: how long it trains, and what does not reach the weights."""

_TIMINGS = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
"""What an evaluation logs that is no figure of the model."""


def bf16_is_fast(on_gpu: bool) -> bool:
    """Whether this device computes in bfloat16 natively: CUDA since Ampere, CPUs with AMX or AVX512-BF16."""
    if on_gpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def keep_small_convolutions_exact(model: nn.Module, args: "Med3DConfig") -> None:
    """In a CPU's autocast, let 3D convolutions whose first spatial side is shorter than the kernel stay in float32.

    On CPUs with AMX, oneDNN's bfloat16 weight gradient is uninitialised memory there (torch 2.13: kernel 3, padding 1,
    2 voxels), up to 1e37 and now and then NaN.
    """
    if not args.bf16 or args.device.type != "cpu":
        return
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module._conv_forward = partial(_convolve, module._conv_forward)  # type: ignore[method-assign]


def _convolve(inner: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[-3] >= weight.shape[-3]:
        return inner(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return inner(x.float(), weight.float(), None if bias is None else bias.float())


@dataclass
class Med3DConfig(_BaseConfig):
    """Training arguments of every stage: ``transformers.TrainingArguments`` with the defaults below changed.

    ``bf16`` is on where the device computes in it natively, ``gradient_checkpointing`` is off, logs go to TensorBoard,
    ``save_total_limit`` is 2 so that a whole checkpoint is left when a run is killed while it writes the next.
    """

    output_dir: str = field(default="outputs", metadata={"help": "Where checkpoints, the model, logs and pictures go."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Autocast to bfloat16. Not set: on where the device computes in it natively."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass, block by block, to save memory."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: batches are our own."})
    report_to: str = field(
        default="tensorboard",
        metadata={"help": "Where logs and pictures go: tensorboard, wandb, trackio, none. Others get the logs alone."},
    )
    picture_steps: int = field(
        default=100,
        metadata={
            "help": "Optimizer steps between two pictures of the same samples or scans, by which a run can be watched "
            "like a film: they go to report_to and, one file each, to output_dir/film. 0 makes none."
        },
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints that are kept; the oldest are deleted. At least 2."}
    )
    hub_strategy: str = field(default="end", metadata={"help": "Only 'end': what is pushed is the finished model."})
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "Decay of the exponential moving average of the weights that evaluation and saving use; 0 is off."
        },
    )
    max_minutes: float | None = field(
        default=None,
        metadata={
            "help": "Stop, with a checkpoint, where another step (PPO: another rollout and its updates) as long as the "
            "longest so far would end after this many minutes of training. --resume_from_checkpoint latest goes on, "
            "with as many again. Not set: no limit."
        },
    )

    max_skipped_steps: int = field(
        default=10,
        metadata={
            "help": "Optimizer steps in a row that are skipped because loss or gradient is NaN or infinite, before the "
            "run stops. A skipped step changes no weight and is counted in the logs as skipped_steps."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a checkpoint to go on from, or 'latest': the newest whole one of output_dir, if any."
        },
    )
    ddp_timeout: int = field(
        default=24 * 3600,
        metadata={
            "help": "Seconds that processes on GPUs wait for one that encodes scans or makes a spectrum for all; on "
            "CPUs it is torch's half an hour."
        },
    )
    weights_license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the weights, for the model card: the Hub's identifier, such as cc-by-sa-3.0. Not set: "
            "that of the model which training starts from, where it is known, else 'other'."
        },
    )

    def __post_init__(self) -> None:
        batches = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        inherited = dict.fromkeys((*batches, "max_steps"), int) | {"learning_rate": float}
        for name, value in checked_fields(self, inherited).items():
            setattr(self, name, value)
        least = dict.fromkeys(batches, 1) | dict.fromkeys(("learning_rate", "picture_steps", "max_skipped_steps"), 0)
        check_least(vars(self), least)
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps must be at least 1, or -1 to count in epochs, got {self.max_steps}.")
        if not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"):
            self.use_cpu = True  # also after `accelerate launch --cpu`, of which transformers knows nothing
        if "activation_checkpointing" in _CHECKPOINTING and vars(self)["activation_checkpointing"] is None:
            self.activation_checkpointing = self.gradient_checkpointing
        if self.bf16 is None:
            self.bf16 = not self.fp16 and bf16_is_fast(on_gpu=not self.use_cpu)
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: batches are our own, no columns of a dataset.")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}.")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max_minutes must be positive, got {self.max_minutes}.")
        if self.hub_strategy != "end":
            raise ValueError(f"hub_strategy must be 'end' (checkpoints hold local state), got {self.hub_strategy!r}.")
        if self.save_total_limit is not None and self.save_total_limit < 2:
            raise ValueError(
                f"save_total_limit must be at least 2, got {self.save_total_limit}: a killed save needs the other."
            )
        super().__post_init__()
        if self.n_gpu > 1:
            self._n_gpu = 1  # one process, one GPU: transformers would use nn.DataParallel, without autocast


class _EMACallback(TrainerCallback):
    """Moves the average after every optimizer step that was not skipped."""

    def __init__(self, trainer: "Med3DTrainer", ema: EMAModel, parameters: list[nn.Parameter]) -> None:
        self.trainer, self.ema, self.parameters = trainer, ema, parameters

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.ema.to(args.device)  # DeepSpeed places the weights only now

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        if not self.trainer.step_is_skipped:
            self.ema.step(self.parameters)


class _SignalCallback(TrainerCallback):
    """Stops training with a checkpoint after a signal to any of the processes."""

    def __init__(self, trainer: "Med3DTrainer") -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.trainer.round_steps:
            return
        if self.trainer.in_any_process(self.trainer.signals.received is not None):
            control.should_training_stop = control.should_save = True


class _TimeLimitCallback(TrainerCallback):
    """Stops training before ``max_minutes`` are over; the first process decides for all."""

    def __init__(self, trainer: "Med3DTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.end = time.perf_counter() + 60 * args.max_minutes
        self.last, self.longest = time.perf_counter(), 0.0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.trainer.round_steps:
            return
        now = time.perf_counter()
        self.longest, self.last = max(self.longest, now - self.last), now
        if broadcast_object_list([now + self.longest > self.end])[0]:
            control.should_training_stop = control.should_save = True


class _SeedCallback(TrainerCallback):
    """Gives every process but the first random numbers of its own: with one seed all would draw the same noise.

    The order of the data comes from ``data_seed`` and stays common; checkpoints hold the random state of each process.
    """

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if args.process_index > 0:
            set_seed(args.seed, device_specific=True)


class _PictureCallback(TrainerCallback):
    """Has pictures made at the start of training and every ``picture_steps`` optimizer steps."""

    def __init__(self, trainer: "Med3DTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 0:
            self.trainer.log_film()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % args.picture_steps == 0:
            self.trainer.log_film()


class _TensorBoardCallback(TensorBoardCallback):
    """Writes of the arguments what a model card lists, no paths and no secrets, and nothing of the model."""

    logging_dir: str | None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        if self.logging_dir is None:
            self.logging_dir = os.path.join(args.output_dir, default_logdir())
        if self.tb_writer is None:
            self._init_summary_writer(args)
        self.tb_writer.add_text("args", json.dumps(card_arguments(args), indent=1, default=str))


class Med3DTrainer(_BaseTrainer):
    """Base of the trainers of all stages.

    Args:
        model: module whose parameters that require a gradient are trained.
        args: training arguments.
        kwargs: as in ``transformers.Trainer``.

    Subclasses give ``compute_loss`` and ``save_pretrained(folder)``, which writes what ``from_pretrained`` reads.
    """

    control: TrainerControl
    loss_is_scaled_for_ga = False
    round_steps = 1
    """Optimizer steps between two states that a checkpoint can hold."""
    card_notes = ""
    """Markdown that the model card starts with: results, pictures."""
    card_data = ""
    """Markdown that says what the model was trained on, for the model card: never names, ids or paths."""
    card_volume_shape: Sequence[int] | None = None
    """Size (X, Y, Z) of the volumes that the model was trained on, for the model card."""
    card_base_model = ""
    """Bundled name or Hub id of what is fine-tuned, for the model card."""
    inherited_license: str | None = None
    """Licence of what training starts from; ``weights_license`` overrides it."""
    _name = "Med3D"
    _tag_names = ["diffusers-med3d"]

    def __init__(self, model: nn.Module, args: Med3DConfig, **kwargs) -> None:
        model = unwrapped(model)  # a compiled one: whose checkpoints no other could load; `torch_compile` compiles
        if args.gradient_checkpointing:
            for module in model.modules():
                if isinstance(module, ModelMixin):
                    module.enable_gradient_checkpointing()
            for name in _CHECKPOINTING:
                setattr(args, name, False)  # done; Trainer would call methods that diffusers models lack
        if args.world_size > 1 and args.data_seed is None:
            args.data_seed = args.seed
        keep_small_convolutions_exact(model, args)
        super().__init__(model=model, args=args, **kwargs)
        if self.is_fsdp_enabled and args.ema_decay > 0:  # it would average the weights of the start, and be saved
            raise ValueError(
                f"ema_decay must be 0 under FSDP, got {args.ema_decay}: FSDP replaces the parameters that are averaged."
            )
        deepspeed = self.accelerator.state.deepspeed_plugin
        if deepspeed is not None and deepspeed.zero_stage > 2:
            raise ValueError(
                f"DeepSpeed's ZeRO stage must be at most 2, got {deepspeed.zero_stage}: nothing here gathers weights "
                "that it divides. For a network that does not fit on one GPU use FSDP2."
            )
        if any(isinstance(callback, TensorBoardCallback) for callback in self.callback_handler.callbacks):
            self.remove_callback(TensorBoardCallback)
            self.add_callback(_TensorBoardCallback())
        self.add_callback(_SeedCallback())
        self.add_callback(_SignalCallback(self))
        if args.picture_steps > 0:
            self.add_callback(_PictureCallback(self))
        if args.max_minutes is not None:
            self.add_callback(_TimeLimitCallback(self))
        self.origin: dict[str, Any] = {}
        """What a run is of, besides its arguments: a resumed one must have the same."""
        self._parts: dict[str, list[Tensor]] = {}
        self.signals = SignalWatch()
        self.step_is_skipped = False
        self._loss_is_finite = True
        self._skipped_in_a_row = self._skipped_since_log = 0
        self.ema: EMAModel | None = None
        self.ema_parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if args.ema_decay > 0:
            self.ema = EMAModel(self.ema_parameters, decay=args.ema_decay)
            self.add_callback(_EMACallback(self, self.ema, self.ema_parameters))

    def _send_telemetry(self) -> None:
        """Nothing about anybody's scans leaves the machine."""

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside, the model holds the averaged weights; afterwards the trained ones again."""
        if self.ema is None or self.ema.temp_stored_params is not None:  # off, or inside already
            yield
            return
        self.ema.store(self.ema_parameters)
        self.ema.copy_to(self.ema_parameters)
        try:
            yield
        finally:
            self.ema.restore(self.ema_parameters)

    def training_step(self, *args, **kwargs) -> Tensor:
        """As in transformers, whose logs hide a loss that is not finite; here its optimizer step is skipped."""
        loss = super().training_step(*args, **kwargs)
        self.note_loss(loss)
        return loss

    def note_loss(self, loss: Tensor) -> None:
        """Remember whether the losses of this optimizer step are finite."""
        self._loss_is_finite &= bool(loss.isfinite())

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        """As in transformers, which calls it right before the optimizer's step; drops gradients that are not finite.

        Optimizers leave parameters without a gradient as they are, and their moments too.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        scaled = self.accelerator.scaler is not None  # fp16: its scaler skips steps by itself, and often at the start
        finite = scaled or norm is None or math.isfinite(norm)
        self.step_is_skipped = self.in_any_process(not (finite and self._loss_is_finite))
        self._loss_is_finite = True
        if not self.step_is_skipped:
            self._skipped_in_a_row = 0
            return norm
        self._skipped_in_a_row += 1
        self._skipped_since_log += 1
        if self._skipped_in_a_row > self.args.max_skipped_steps or self.is_deepspeed_enabled:
            raise TrainingStopped(
                f"Loss or gradient was not finite {self._skipped_in_a_row} times in a row after "
                f"{self.state.global_step} optimizer steps (max_skipped_steps={self.args.max_skipped_steps}). The logs "
                "of skipped_steps, grad_norm and of the parts of the loss show when it began: resume from before that, "
                "or lower learning_rate."
            )
        for parameter in model.parameters():
            parameter.grad = None
        return norm

    def in_any_process(self, flag: bool) -> bool:
        """Return whether ``flag`` is true in any process; the same in all of them."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)) > 0)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what ``from_pretrained`` reads, with the averaged weights.

        Where FSDP has divided the network between processes, call `save_model` in all of them instead: it gathers the
        weights first.
        """
        raise NotImplementedError

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, tags=None) -> None:
        """Write ``output_dir/README.md``: what was trained, the last figures, arguments that are not the defaults."""
        if not self.is_world_process_zero():
            return
        folder, name = Path(self.args.output_dir), model_name or Path(self.args.output_dir).name
        if (folder / "model_index.json").is_file() or (folder / "config.json").is_file():
            card = cards.of_folder(folder, self.hub_model_id or _for_snippet(folder), self.card_volume_shape)
        else:
            card = cards.Card(name, what="The model has not been saved yet.", use="")
        evaluations = [row for row in self.state.log_history if any(key.startswith("eval_") for key in row)]
        measured = evaluations[-1] if evaluations else {}
        card.name = name
        card.license = self.args.weights_license or self.inherited_license or "other"
        card.base_model = self.card_base_model
        card.tags = [*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])]
        card.datasets = [dataset_name] if dataset_name else []
        named = f"Data: {dataset_name}." if dataset_name else ""
        of_base = "" if self.args.weights_license or not self.inherited_license else ", that of the model it comes from"
        licence = f"Licence of the weights: {card.license}{of_base}."
        card.data = " ".join(filter(None, (named, self.card_data, licence)))
        card.training = "\n".join(
            [
                f"Trained with `diffusers_med3d.{type(self).__name__}`, {self.state.global_step} optimizer steps.",
                *["", "| argument | value |", "|---|---|"],
                *(f"| {name} | {value} |" for name, value in card_arguments(self.args).items()),
            ]
        )
        card.figures = [
            cards.Figure(key.removeprefix("eval_"), key.removeprefix("eval_"), value, floor="not measured")
            for key, value in measured.items()
            if key.startswith("eval_") and key not in _TIMINGS and math.isfinite(value)
        ]
        card.evaluation = self.card_notes
        card.write(folder)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """As ``transformers.Trainer.push_to_hub``, but of ``output_dir`` only what ``from_pretrained`` reads, the card
        and the pictures that the card shows are uploaded: no checkpoints, optimizer states, caches, logs or names of
        subjects.

        Args:
            commit_message, blocking, token, revision, private: as in transformers.
            kwargs: for ``create_model_card``.

        Raises:
            ValueError: a file that would be uploaded holds a local path or a token; nothing is uploaded then.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            if private is not None:  # newer versions of transformers take it in init_hf_repo
                self.args.hub_private_repo = private
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**{"model_name": self.hub_model_id.split("/")[-1], **kwargs})
        return publish(
            self.args.output_dir,
            self.hub_model_id,
            model_files(self.args.output_dir),
            token=token,
            commit_message=commit_message,
            revision=self.args.hub_revision if revision is None else revision,
            run_as_future=not blocking,
        )

    def record_part(self, name: str, value: Tensor) -> None:
        """Keep a part of the loss, a scalar; the next log shows its mean since the last."""
        self._parts.setdefault(name, []).append(value.detach())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss since the last log."""
        if "loss" in logs:
            logs |= {name: torch.stack(values).nanmean().item() for name, values in self._parts.items()}
            self._parts.clear()
            if self._skipped_since_log:
                logs["skipped_steps"] = self._skipped_since_log
                self._skipped_since_log = 0
        super().log(logs, start_time)

    def conclude_evaluation(self, results: dict[str, float]) -> dict[str, float]:
        """Log what an evaluation found and tell the callbacks: in all processes what the first one found, because they
        decide by it whether to save, together."""
        results = broadcast_object_list([results])[0]
        self.log(results)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, results)
        return results

    def film_figures(self) -> dict[str, Figure]:
        """Name -> picture of what the model does now with the same noise or the same scans every time.

        Called in all processes with the averaged weights, without gradients. It draws no random numbers but from
        generators of its own, so that a run with pictures repeats one without them. Subclasses override it.
        """
        return {}

    @property
    def film_title(self) -> str:
        """What stands over a picture of the film."""
        return f"step {self.state.global_step}"

    @torch.no_grad()
    def log_film(self) -> None:
        """Log ``film_figures`` and keep each as ``output_dir/film/<name>-<step>.png``, for `write_film`."""
        self.model.eval()
        with self.ema_weights(), self.accelerator.autocast():
            drawn = self.film_figures()
        for name, figure in drawn.items():
            if self.is_world_process_zero():
                frame = f"{name}-{self.state.global_step:06d}.png"
                viz.save(figure, Path(self.args.output_dir) / "film" / frame)
            self.log_figure(name, figure)

    def log_figure(self, name: str, figure: Figure) -> None:
        """Write a picture to ``output_dir/figures/<name>.png`` and log it at the current step, on the main process.

        TensorBoard, Weights & Biases and trackio keep every step of a name, so that it can be looked through. They get
        pictures while their run is open: from the start of training.
        """
        if not self.is_world_process_zero():
            return
        path = viz.save(figure, Path(self.args.output_dir) / "figures" / f"{name}.png")
        step = self.state.global_step
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, _TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_figure(name, figure, step)
                callback.tb_writer.flush()
            elif isinstance(callback, WandbCallback | TrackioCallback):
                tracker = importlib.import_module("wandb" if isinstance(callback, WandbCallback) else "trackio")
                run = tracker.run if isinstance(callback, WandbCallback) else tracker.context_vars.current_run.get()
                if run is not None:
                    tracker.log({name: tracker.Image(str(path)), "train/global_step": step})

    # Saving and resuming. Raw weights go into checkpoints, components into output_dir.

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if folder.resolve() == Path(self.args.output_dir).resolve():
            divided = self.is_fsdp_enabled and state_dict is not None
            with self.ema_weights(), whole_weights(self.model, state_dict or {}) if divided else nullcontext():
                self.save_pretrained(folder)
            log = copy.copy(self.state)  # for `evaluate.py --report`
            log.best_model_checkpoint = None  # a local path
            log.save_to_json(str(folder / "trainer_state.json"))
            self.create_model_card()
            return
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        tensors = {name: tensor.contiguous().clone() for name, tensor in state_dict.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """As in transformers, but older checkpoints are deleted only when this one is whole."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / COMPLETE_MARKER).unlink(missing_ok=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self._save_extras(folder)
            self.accelerator.wait_for_everyone()  # every process writes the state of its random numbers
            if self.args.should_save:
                mark_whole(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            if is_lost_process(error):  # not the disk; the folder has no marker and passes for no checkpoint
                raise
            if self.args.should_save:  # else another process may be writing there
                shutil.rmtree(folder, ignore_errors=True)
            free = shutil.disk_usage(folder.parent).free / 1e6
            raise TrainingStopped(
                f"{folder} could not be written ({error}); {free:.0f} MB are free there. Older checkpoints are as they "
                "were: make room and go on with --resume_from_checkpoint latest."
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            keep_newest(folder.parent, limit, self.state.best_model_checkpoint, folder)

    def _save_extras(self, folder: Path) -> None:
        """Write what a checkpoint holds besides what transformers writes."""
        save_run(folder, self.origin, _shaping_arguments(self.args))
        if self.ema is not None:
            shadow = {str(i): tensor.contiguous() for i, tensor in enumerate(self.ema.shadow_params)}
            shadow["optimization_step"] = torch.tensor(self.ema.optimization_step)
            save_file(shadow, folder / EMA_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        reason = damage(folder)
        if reason is not None:
            raise ValueError(f"{folder} is no whole checkpoint: {reason}.")
        model = self.model if model is None else model
        load_weights(model, load_file(folder / "model.safetensors"))
        self._load_extras(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled:  # it has read the weights by itself
            self._load_extras(Path(checkpoint))

    def _load_extras(self, folder: Path) -> None:
        """Read what `_save_extras` has written."""
        if self.ema is not None:
            if not (folder / EMA_FILE).is_file():
                raise ValueError(
                    f"{folder} holds no average of the weights ({EMA_FILE}): it was saved with ema_decay 0, got "
                    f"{self.args.ema_decay}."
                )
            shadow = load_file(folder / EMA_FILE)
            self.ema.optimization_step = int(shadow.pop("optimization_step"))
            for i, tensor in enumerate(self.ema.shadow_params):
                tensor.copy_(shadow[str(i)])

    def checkpoint_to_resume(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The folder of the checkpoint that ``train`` would go on from, None for a fresh start.

        Args:
            resume_from_checkpoint: as ``train`` takes it.

        Raises:
            ValueError: True, and there is no whole checkpoint; a folder that is none, or one of another network, of
                another generator at the start or of other rewards; a fresh start where an earlier run has left
                checkpoints, which a later resumption would take for its own.
        """
        if resume_from_checkpoint in (None, False):
            self._refuse_used_folder()
            return None
        if resume_from_checkpoint in ("latest", True):
            found = last_checkpoint(self.args.output_dir)
            if found is None and resume_from_checkpoint is True:
                raise ValueError(f"{self.args.output_dir} holds no whole checkpoint to resume from.")
            resume_from_checkpoint = found
        elif isinstance(resume_from_checkpoint, str) and not (
            resume_from_checkpoint and Path(resume_from_checkpoint).is_dir()
        ):
            raise ValueError(
                "resume_from_checkpoint must be 'latest' or the folder of a checkpoint, such as "
                f"{self.args.output_dir}/checkpoint-10; there is no folder {resume_from_checkpoint!r}."
            )
        elif isinstance(resume_from_checkpoint, str) and (reason := damage(resume_from_checkpoint)) is not None:
            raise ValueError(f"{resume_from_checkpoint} is no whole checkpoint: {reason}.")
        if not isinstance(resume_from_checkpoint, str):
            return None
        weights = Path(resume_from_checkpoint) / "model.safetensors"
        if weights.is_file():
            with safe_open(weights, "pt") as file:
                there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            here = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
            for name in sorted(there.keys() | here.keys()):
                if there.get(name) != here.get(name):
                    raise ValueError(
                        f"{resume_from_checkpoint} is of another network: {name} has shape {there.get(name)} there and "
                        f"{here.get(name)} here. Give the flags of the network that it was begun with, or another "
                        "--output_dir."
                    )
        compare_with_run(resume_from_checkpoint, self.origin, _shaping_arguments(self.args))
        return resume_from_checkpoint

    def _refuse_used_folder(self) -> None:
        """Refuse to begin anew beside the checkpoints of an earlier run."""
        if self.state.global_step:  # `train` is called a second time: the checkpoints are this run's
            return
        for folder in checkpoints(self.args.output_dir):
            if damage(folder) is None:
                raise ValueError(
                    f"{self.args.output_dir} holds {folder.name} of an earlier run: go on with it "
                    "(--resume_from_checkpoint latest), give another --output_dir, or delete it."
                )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As ``transformers.Trainer.train``; a finished run that is resumed only loads what it ended with.

        Args:
            resume_from_checkpoint: folder of a checkpoint; "latest" for the newest whole one in ``output_dir``, or a
                fresh start where there is none; True for the same, where there must be one.
            kwargs: as in transformers.

        Raises:
            ValueError: see ``checkpoint_to_resume``.
        """
        use_all_cores()
        resume_from_checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / "trainer_state.json"))
            if self.args.should_save:
                tidy_after_kill(resume_from_checkpoint, self.args.save_total_limit, state.best_model_checkpoint)
            if 0 < self.args.max_steps <= state.global_step:
                self.state = state
                best = _beside(resume_from_checkpoint, state.best_model_checkpoint)
                self._load_from_checkpoint(
                    best if self.args.load_best_model_at_end and best else resume_from_checkpoint
                )
                return None
        with self.signals, lost_process_named():
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.in_any_process(self.signals.received is not None):
            self._exit_after_signal()
        return result

    def _exit_after_signal(self) -> NoReturn:
        """End the process as a shell expects it, 128 plus the number of the signal, with what to do next."""
        received = self.signals.received or signal.SIGTERM
        if self.is_world_process_zero():
            print(
                f"Stopped by {received.name} after step {self.state.global_step} of {self.state.max_steps}, saved as "
                f"checkpoint-{self.state.global_step} in {self.args.output_dir}; go on with --resume_from_checkpoint "
                "latest.",
                file=sys.stderr,
            )
        raise SystemExit(128 + received)

    def _init_training_state(self, max_steps, update_steps, num_epochs, resume_from_checkpoint, trial):
        """As in transformers, and the best checkpoint of a run that was moved is found where it is now."""
        found = super()._init_training_state(max_steps, update_steps, num_epochs, resume_from_checkpoint, trial)
        if resume_from_checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / "trainer_state.json"))
            self.state.best_model_checkpoint = _beside(resume_from_checkpoint, state.best_model_checkpoint)
        return found

    def _load_best_model(self) -> None:
        """With ``load_best_model_at_end``: raw weights and their average, from the best checkpoint."""
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _beside(checkpoint: str, other: str | None) -> str | None:
    """A checkpoint that was known by its path at that time, as it lies beside ``checkpoint`` now; None if it is not."""
    found = None if other is None else Path(checkpoint).parent / Path(other).name
    return str(found) if found is not None and found.is_dir() else None


def _for_snippet(folder: Path) -> str:
    """How a snippet names a folder: relative to where the run was started, and never by an absolute path."""
    folder = folder.resolve()
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else folder.name


def describe_volumes(volumes: VolumeDataset, validation: VolumeDataset | None) -> str:
    """Numbers of scans and subjects and their grid in a sentence, for a model card."""
    subjects = len({item["subject"] for item in volumes})
    volume = volumes[0]["volume"]
    shape, spacing = (" x ".join(f"{v:g}" for v in values) for values in (volume.shape[1:], volume.pixdim))
    held_out = f"; {len(validation)} scans of other subjects for validation" if validation is not None else ""
    return (
        f"Trained on {len(volumes)} scans of {subjects} subjects, brought to {shape} voxels of {spacing} mm, RAS axes, "
        f"intensities in [0, 1]{held_out}."
    )


def card_arguments(args: Med3DConfig) -> dict[str, Any]:
    """Arguments that a model card lists: all of our own and those in ``_IN_CARD`` that are not the default."""
    inherited = {entry.name for entry in dataclasses.fields(_BaseConfig)}
    kept = {}
    for entry in dataclasses.fields(args):
        if entry.name == "weights_license" or (entry.name in inherited and entry.name not in _IN_CARD):
            continue
        value = vars(args)[entry.name]
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        if entry.name in _ALWAYS_IN_CARD or value != default:
            kept[entry.name] = value.value if isinstance(value, Enum) else value
    return kept


def _shaping_arguments(args: Med3DConfig) -> dict[str, Any]:
    """Arguments that are not the default and shape the weights, as JSON keeps them."""
    kept = {name: value for name, value in card_arguments(args).items() if name not in _MAY_CHANGE}
    text = json.dumps(kept, default=str)
    return json.loads(text, parse_constant=str)  # NaN and infinity as text


def use_all_cores() -> None:
    """``accelerate launch`` sets OMP_NUM_THREADS=1 on a CPU; a single process takes all cores it may run on.

    ``train`` calls this; a script that computes before (a spectrum, latents) calls it at its start.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) == 1
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and not torch.cuda.is_available():
        torch.set_num_threads(len(os.sched_getaffinity(0)))
