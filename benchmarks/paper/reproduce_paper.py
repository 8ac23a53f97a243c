"""The whole experiment from prepared data: are fine-tuned volumes closer to unseen scans, as diverse, and of more use
to a classifier than those of the model before, and than what the same compute buys without RL?

    R="python benchmarks/paper/reproduce_paper.py --data_dir DATA --split_file split.json"
    $R --steps breakdown                                          # look first: where does the distance come from?
    $R --budget try --output_dir outputs/try                      # the whole of it, small
    $R                                                            # the whole of it, judged on validation subjects
    $R --open_test --steps evaluate downstream report             # at the end, once

    step        what it does                                                             its result
    breakdown   is autoencoder, generator or reward to be worked on?                     breakdown.json
    sweep       learning rate, beta, window, group size on validation; freezes the best  frozen.json
    arms        both rewards with several seeds, each reward alone, two other rewards    arms/
    continued   control: pre-training goes on at equal compute                           continued.json
    sampler     control: the base's best guidance and steps on validation                sampler.json
    evaluate    what is there, and best of 3, against unseen scans: what can be claimed? evaluate-<part>.json
    downstream  a classifier with and without generated scans                            downstream-<part>.json
    report      all tables, and a draft of the model card                                report.md, brain-t1-ppo.md

Without a sweep, one value for each of its settings freezes them by hand; arms and seeds may come one at a time, and the
report tells what was not run:

    S="$R --learning_rates 1e-4 --betas 0.01 --windows 2 --group_sizes 8 --rl_steps 150"
    $S --steps arms --arms both --seeds 0                         # the seed that is carried on
    $S --steps arms --arms 3d 2d
    $S --steps arms --arms both --seeds 1 2
    $S --steps continued sampler evaluate downstream report

Rewards that follow the generator (witness rewards) are compared with trained ones, which stay as they are:

    $R --reward_funcs outputs/witness-3d outputs/witness-2d --arms both 3d 2d other \\
        --other_reward_funcs brain-t1-reward-3d brain-t1-reward-2d

A result is written last and a training goes on from its last checkpoint, so what was killed is started again with the
same command. A result is made again when what it was made from has changed (a further seed, more samples); a training
with another setting under the same name is refused. Trainings are the scripts of this folder, each in a process of its
own. The test subjects are read only with --open_test, and for one configuration only. docs/experiments/protocol.md says
why each choice was made.
"""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

import experiment
from diffusers_med3d import MedDiffusion3DPipeline, metrics
from diffusers_med3d.data import DataArguments, VolumeDataset, load_split, settings_of
from diffusers_med3d.data.training_subjects import read_training_subjects, refuse_seen_subjects
from diffusers_med3d.evaluation import VolumeSet, write_report
from diffusers_med3d.evaluation import evaluate as measure_sets
from diffusers_med3d.evaluation import sampling as evaluation
from diffusers_med3d.evaluation.breakdown import breakdown as break_down
from diffusers_med3d.evaluation.breakdown import scan_versions, write_breakdown
from diffusers_med3d.hub.resolve import resolve
from diffusers_med3d.rewards.learned import LearnedReward
from diffusers_med3d.rewards.loading import DEFAULT_REWARDS, load_reward
from diffusers_med3d.rl.reward_calls import reward_names
from diffusers_med3d.trainers.base import use_all_cores
from diffusers_med3d.trainers.ddpo_config import EPSILON
from diffusers_med3d.utils.arguments import ScriptParser
from diffusers_med3d.utils.checks import check_least
from diffusers_med3d.utils.files import once, write_json, write_whole
from diffusers_med3d.utils.hashing import json_hash, pipeline_hash, tensor_hash
from experiment import Setting

EXAMPLES = Path(__file__).parents[2] / "examples"
BASE, CEILING = "pre-trained", "round-trip"
CONTINUED, BEST_SAMPLER = "continued pre-training", "best guidance and steps"
BOTH = "both rewards, seed "
ARMS = ("both", "3d", "2d", "other")
SINGLE = {"3D reward alone": "3d", "2D reward alone": "2d", "other rewards": "other"}
SWEEP_SEED = 1000  # of none of the arms


@dataclass
class ExperimentArguments:
    """What is fine-tuned, and which steps run."""

    model_name_or_path: str = field(
        default="brain-t1", metadata={"help": "Generator to fine-tune: bundled name or folder."}
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: list(DEFAULT_REWARDS),
        metadata={"help": "The 3D and the 2D reward: bundled names, folders or Hub ids of reward models."},
    )
    other_reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Control: two other rewards in their place, for --arms other."}
    )
    output_dir: str = field(default="outputs/experiment", metadata={"help": "Where everything is written."})
    steps: list[str] = field(
        default_factory=lambda: list(STEPS),
        metadata={"help": "Any of: breakdown sweep arms continued sampler evaluate downstream report."},
    )
    arms: list[str] = field(
        default_factory=lambda: ["both", "3d", "2d"],
        metadata={"help": "Arms that the step of that name trains (both, 3d, 2d, other); finished ones stay."},
    )
    open_test: bool = field(
        default=False, metadata={"help": "Judge on the test subjects instead of the validation subjects. Once."}
    )
    launcher: str = field(
        default=f"{sys.executable} -m accelerate.commands.launch",
        metadata={"help": "How trainings are started, such as 'accelerate launch --multi_gpu --num_processes 4'."},
    )
    extractors: list[str] = field(
        default_factory=lambda: ["efficientnet-lite0", "haar-scattering-3d"],
        metadata={"help": "Features of the distances. The first also chooses on validation, the others never choose."},
    )
    rl_flags: str = field(default="", metadata={"help": "Further flags of every fine-tuning, as '--lora_rank 16'."})
    continued_flags: str = field(
        default="", metadata={"help": "Further flags of continued pre-training: what the base was trained with."}
    )

    def __post_init__(self) -> None:
        for what, given, known in (("steps", self.steps, STEPS), ("arms", self.arms, ARMS)):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise ValueError(f"unknown {what} {unknown}, expected some of {list(known)}.")
        if len(self.reward_funcs) != 2 or len(self.other_reward_funcs) not in (0, 2):
            found = f"{self.reward_funcs} and {self.other_reward_funcs}"
            raise ValueError(f"--reward_funcs and --other_reward_funcs take a 3D and a 2D reward, got {found}.")
        if "other" in self.arms and not self.other_reward_funcs:
            raise ValueError("--arms other needs the two rewards of --other_reward_funcs.")


@dataclass
class Budget:
    """How much is spent. --budget try, cpu or gpu sets all of it, every other flag a part."""

    budget: str = field(default="cpu", metadata={"help": "Preset of what follows.", "choices": ["try", "cpu", "gpu"]})
    rl_steps: int = field(default=300, metadata={"help": "Optimizer steps of fine-tuning in every arm."})
    sweep_steps: int = field(default=100, metadata={"help": "The same in the sweep."})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the main arm; the very first is carried on."}
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-4, 2e-4, 5e-5], metadata={"help": "Tried in the sweep; the first is the start."}
    )
    betas: list[float] = field(default_factory=lambda: [0.01, 0.04], metadata={"help": "Likewise: weight of the KL."})
    loss_type: str = field(
        default="ddpo", metadata={"help": "Objective of every fine-tuning.", "choices": list(EPSILON)}
    )
    windows: list[int] = field(
        default_factory=lambda: [2, 3], metadata={"help": "Likewise: stochastic steps (with awm: random times)."}
    )
    group_sizes: list[int] = field(default_factory=lambda: [8, 16], metadata={"help": "Likewise: samples of a group."})
    batch_size: int = field(default=8, metadata={"help": "Samples per step, in fine-tuning and pre-training."})
    continued_learning_rates: list[float] = field(
        default_factory=lambda: [1e-4, 4e-5], metadata={"help": "Tried when pre-training goes on."}
    )
    guidance_scales: list[float] = field(
        default_factory=lambda: [1.0, 1.5, 2.0, 3.0], metadata={"help": "Tried with the base; all else has the first."}
    )
    sampling_steps: list[int] = field(
        default_factory=lambda: [50, 25, 100], metadata={"help": "Tried with the base; all else has the first."}
    )
    best_of: int = field(default=3, metadata={"help": "Control: samples of the base of which the rewards keep one."})
    num_samples: int = field(default=96, metadata={"help": "Volumes of each model that are judged."})
    num_synthetic: int = field(default=64, metadata={"help": "Volumes per class for the classifier."})
    classifier_seeds: int = field(default=10, metadata={"help": "Classifiers per arm."})
    classifier_steps: int = field(default=100, metadata={"help": "Optimizer steps of a classifier."})
    real_per_class: list[int] = field(default_factory=lambda: [5, 10, 20], metadata={"help": "Real scans per class."})

    def __post_init__(self) -> None:
        names = ("rl_steps", "sweep_steps", "batch_size", "num_synthetic", "classifier_seeds", "classifier_steps")
        check_least(vars(self), dict.fromkeys(names, 1) | {"best_of": 2, "num_samples": 2})
        for name, value in vars(self).items():
            if value == []:
                raise ValueError(f"--{name} needs at least one value.")


PRESETS: dict[str, dict[str, Any]] = {
    "try": dict(
        rl_steps=24, sweep_steps=6, seeds=[0], learning_rates=[1e-4, 2e-4], betas=[0.01], windows=[2], group_sizes=[8],
        continued_learning_rates=[1e-4], guidance_scales=[1.0, 2.0], sampling_steps=[20], num_samples=24,
        num_synthetic=16, classifier_seeds=3,
    ),
    "cpu": {},
    "gpu": dict(
        rl_steps=1500, sweep_steps=300, seeds=[0, 1, 2, 3, 4], learning_rates=[1e-4, 2e-4, 5e-5, 2e-5],
        betas=[0.01, 0.04, 0.0025], group_sizes=[16, 32], batch_size=16, num_samples=240, num_synthetic=256,
        classifier_seeds=20,
    ),
}  # fmt: skip


class Candidate(NamedTuple):
    """A model and how it is sampled; of `draws` samples from different noise the rewards keep one."""

    model: str
    guidance_scale: float
    num_inference_steps: int
    draws: int = 1

    @property
    def name(self) -> str:
        return f"{Path(self.model).name}-g{self.guidance_scale:g}-s{self.num_inference_steps}"


def flags(values: Mapping[str, Any]) -> list[str]:
    """Values by name as command line flags."""
    words: list[str] = []
    for name, value in values.items():
        words += [] if value in (None, []) else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def refuse_other(found: Mapping[str, Any], asked: Mapping[str, Any], what: str) -> None:
    """Refuse to go on with something that was begun with other settings (ValueError with both)."""
    other = {name: (found.get(name), value) for name, value in asked.items() if found.get(name) != value}
    if other:
        raise ValueError(f"{what} with other settings (found, asked for): {other}; use another --output_dir.")


class Experiment:
    """Where things are, and the operations that the steps are made of."""

    def __init__(self, data: DataArguments, args: ExperimentArguments, budget: Budget) -> None:
        self.data, self.args, self.budget, self.root = data, args, budget, Path(args.output_dir)
        self.part = "test" if args.open_test else "validation"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._scans: dict[str, VolumeSet] = {}
        self._weights: dict[str, str] = {}
        split = load_split(data.split_file)
        refuse_seen_subjects(
            split["validation"] + split["test"], read_training_subjects(args.model_name_or_path), "the base"
        )
        data.adopt(settings_of(self.base), f"the generator {args.model_name_or_path}")
        setting = {name: value for name, value in asdict(data).items() if name not in ("data_dir", "split_file")}
        setting |= {"split": json_hash(split), "base": pipeline_hash(self.base)}
        setting |= {name: tensor_hash(reward.model.state_dict().items()) for name, reward in self.rewards.items()}
        self.setting = once(self.root / "setting.json", lambda: setting)
        refuse_other(self.setting, setting, f"{self.root} holds an experiment")

    @cached_property
    def base(self) -> MedDiffusion3DPipeline:
        return self.pipeline(self.args.model_name_or_path)

    @cached_property
    def extractors(self) -> list[metrics.Extractor]:
        return [metrics.extractor(name, self.device) for name in self.args.extractors]

    @cached_property
    def rewards(self) -> dict[str, LearnedReward]:
        """The 3D and the 2D reward by the names that fine-tuning logs them under."""
        found = [load_reward(one) for one in self.args.reward_funcs]
        if not all(isinstance(one, LearnedReward) for one in found):
            raise ValueError(f"--reward_funcs takes a 3D and a 2D reward model, got {self.args.reward_funcs}.")
        return dict(zip(reward_names(found), [one.to(self.device) for one in found], strict=True))

    @property
    def grid(self) -> dict[str, list[float | int]]:
        """What the sweep tries; one value each leaves it nothing to do."""
        budget = self.budget
        return {
            "learning_rate": budget.learning_rates,
            "beta": budget.betas,
            "window": budget.windows,
            "group_size": budget.group_sizes,
        }

    @cached_property
    def frozen(self) -> dict[str, Any]:
        """What all arms share, from the sweep or by hand; other flags than these are refused."""
        path, budget = self.root / "frozen.json", self.budget
        if not path.is_file() and any(len(values) > 1 for values in self.grid.values()):
            raise FileNotFoundError(
                f"{path} is missing: run the sweep, or freeze by hand with one value for each of --learning_rates, "
                "--betas, --windows and --group_sizes."
            )
        found = once(path, lambda: self.freeze(*experiment.coordinate_sweep(self.grid, lambda setting: 0.0)))
        asked = {name: vars(budget)[name] for name in ("rl_steps", "batch_size", "loss_type")}
        asked |= {"rl_flags": self.args.rl_flags}
        asked |= {name: values[0] for name, values in self.grid.items() if len(values) == 1}
        refuse_other(found | found["setting"], asked, f"{path} was made")
        return found

    def freeze(self, best: Setting, tried: list[tuple[Setting, float]]) -> dict[str, Any]:
        """Content of frozen.json. `first_seed` is the one that is carried on, fixed before anything is seen."""
        swept = [{**one, "score": own if own < float("inf") else "too much alike"} for one, own in tried]
        budget = self.budget
        return {
            "setting": best,
            "rl_steps": budget.rl_steps,
            "batch_size": budget.batch_size,
            "loss_type": budget.loss_type,
            "rl_flags": self.args.rl_flags,
            "first_seed": budget.seeds[0],
            "tried": swept if len(swept) > 1 else [],
        }

    def pipeline(self, model: str) -> MedDiffusion3DPipeline:
        """A generator with the base's scheduler, ready to sample."""
        given = {} if model == self.args.model_name_or_path else {"scheduler": self.base.scheduler}
        return MedDiffusion3DPipeline.from_pretrained(model, **given).to(self.device)

    def weights(self, model: str) -> str:
        """Fingerprint of a generator: what was made from other weights under the same name is made again."""
        if model not in self._weights:
            self._weights[model] = pipeline_hash(self.pipeline(model))
        return self._weights[model]

    def scans(self, part: str) -> VolumeSet:
        """Scans of a part of the split; those of the test subjects only when they were opened."""
        if part == "test" and not self.args.open_test:
            raise ValueError("The test subjects are read with --open_test only.")
        if part not in self._scans:
            self._scans[part] = evaluation.volume_set(VolumeDataset.from_arguments(self.data, part))
        return self._scans[part]

    def found(self, name: str, what: str = "found") -> Any:
        """What an earlier step found (or was "made from"), None where it has not run."""
        path = self.root / f"{name}.json"
        return json.loads(path.read_text())[what] if path.is_file() else None

    def result(self, name: str, made_from: dict[str, Any], make: Callable[[], Any]) -> Any:
        """What `make()` finds, on disk; made again where it was made from something else."""
        if self.found(name, "made from") != made_from:
            write_json(self.root / f"{name}.json", {"made from": made_from, "found": make()})
        return self.found(name)

    def folder(self, name: str) -> str:
        """Where a finished training is."""
        if not (self.root / name / "done").is_file():
            raise FileNotFoundError(f"{self.root / name} holds no finished training: run the step that makes it first.")
        return str(self.root / name)

    def finished(self) -> dict[str, str]:
        """The arms whose training is finished, the seed that is carried on first; name -> folder."""
        folders = [path.parent for path in (self.root / "arms").glob("*/done")]
        seeds = sorted(int(path.name[5:]) for path in folders if path.name.startswith("both-"))
        seeds.sort(key=lambda seed: seed != self.frozen["first_seed"])
        arms = {f"{BOTH}{seed}": f"both-{seed}" for seed in seeds}
        arms |= {name: arm for name, arm in SINGLE.items() if self.root / "arms" / arm in folders}
        return {name: self.folder(f"arms/{one}") for name, one in arms.items()}

    @property
    def carried_on(self) -> str:
        """Folder of the main arm's first seed."""
        return self.folder(f"arms/both-{self.frozen['first_seed']}")

    @property
    def chosen(self) -> str:
        """Name of the control without training: of several samples the rewards keep one."""
        return f"best of {self.budget.best_of} by reward"

    def usual(self, model: str, draws: int = 1) -> Candidate:
        """A model sampled as everything is that does not say otherwise."""
        return Candidate(model, self.budget.guidance_scales[0], self.budget.sampling_steps[0], draws)

    def launch(self, script: str, folder: Path, words: list[str], launcher: str) -> None:
        """A script of this folder in a process of its own."""
        words = ["--output_dir", str(folder), *words]
        print(f"{folder.relative_to(self.root)}: {script} {shlex.join(words)}", flush=True)
        subprocess.run([*shlex.split(launcher), str(EXAMPLES / script), *words], check=True)

    def train(self, script: str, name: str, words: list[str], setting: dict[str, Any]) -> str:
        """A training, unless it was finished earlier; gives its folder.

        Args:
            script: file name.
            name: of the folder.
            words: flags that say where things are.
            setting: flag -> value, of what makes a difference; other values than those the training was begun with are
                refused.
        """
        folder = self.root / name
        refuse_other(once(folder / "setting.json", lambda: setting), setting, f"{folder} was begun")
        if not (folder / "done").is_file():
            own = {flag: value for flag, value in setting.items() if flag != "flags"}
            words = [*words, "--resume_from_checkpoint", "latest", *flags(own), *shlex.split(setting["flags"])]
            self.launch(script, folder, words, self.args.launcher)
            (folder / "done").touch()
        for checkpoint in folder.glob("checkpoint-*"):  # only a run that goes on needs them
            shutil.rmtree(checkpoint)
        return str(folder)

    def fine_tune(self, name: str, setting: Setting, steps: int, seed: int, arm: str = "both") -> str:
        """RL from the base with the rewards of an arm; a rollout has one group of every class."""
        samples = len(self.data.class_names) * setting["group_size"]
        if samples % self.budget.batch_size:
            raise ValueError(f"batch_size {self.budget.batch_size} must divide the {samples} samples of a rollout.")
        three, two = self.args.reward_funcs
        rewards = {"both": [three, two], "3d": [three], "2d": [two], "other": self.args.other_reward_funcs}[arm]
        words = ["--model_name_or_path", self.args.model_name_or_path, "--eval_volumes", "2"]
        words += ["--reward_funcs", *rewards]
        chosen = {
            "learning_rate": setting["learning_rate"],
            "beta": setting["beta"],
            "loss_type": self.budget.loss_type,
            "sde_window_size" if self.budget.loss_type == "ddpo" else "forward_times": setting["window"],
            "num_generations": setting["group_size"],
            "per_device_train_batch_size": self.budget.batch_size,
            "steps_per_generation": samples // self.budget.batch_size,
            "max_steps": steps,
            "max_minutes": "inf",
            "seed": seed,
            "flags": self.args.rl_flags,
        }
        return self.train("ppo_finetune.py", name, words, chosen)

    def sample(self, candidate: Candidate, part: str) -> VolumeSet:
        """Volumes of the class mix of a part's scans, from the same noise for every model."""
        labels = evaluation.matched_labels(self.scans(part).labels, self.budget.num_samples)
        drawn = [
            evaluation.sample_volumes(
                self.pipeline(candidate.model),
                labels,
                self.root / "samples" / part / candidate.name,
                self.data,
                candidate.num_inference_steps,
                candidate.guidance_scale,
                seeds=[seed],
                batch_size=self.budget.batch_size,
            )
            for seed in range(candidate.draws)
        ]
        if candidate.draws == 1:
            return drawn[0]
        rewards = self.rewards.values()
        scores = [torch.stack([reward(one.volumes) for reward in rewards], dim=1) for one in drawn]  # each (N, 2)
        kept = experiment.best_of(torch.stack(scores, dim=1)).tolist()
        volumes = torch.stack([drawn[k].volumes[row] for row, k in enumerate(kept)])
        return VolumeSet(volumes, drawn[0].labels, drawn[0].subjects)

    def round_trips(self, part: str) -> VolumeSet:
        """What the autoencoder leaves of a part's scans: no generator behind it comes closer to them."""
        scans = self.scans(part)
        with torch.no_grad():
            volumes = self.base.decode_latents(self.base.encode_latents(scans.volumes.to(self.device))).cpu()
        names = [f"{row:04d} {subject}" for row, subject in enumerate(scans.subjects)]
        folder = self.root / "samples" / part / "round-trip"
        read = evaluation.reload_volumes(volumes, scans.labels, names, folder, self.data, self.base.affine())
        return VolumeSet(read.volumes, read.labels, scans.subjects)

    def judge(self, candidate: Candidate) -> dict[str, float]:
        """What choices are made by: KID to the validation scans, and how much alike the samples of a class are."""
        scans, extractor = self.scans("validation"), self.extractors[0]
        return self.result(
            f"judged/{candidate.name}",
            {
                "samples": self.budget.num_samples,
                "extractor": self.args.extractors[0],
                "weights": self.weights(candidate.model),
            },
            lambda: experiment.measure(self.sample(candidate, "validation"), scans, extractor),
        )

    def score(self, candidate: Candidate) -> float:
        """What a choice minimises."""
        return experiment.selection_score(self.judge(candidate), self.judge(self.usual(self.args.model_name_or_path)))

    def candidates(self) -> dict[str, Candidate]:
        """Everything that is there to be compared, the base first."""
        continued, sampler = self.found("continued"), self.found("sampler")
        found = {BASE: self.usual(self.args.model_name_or_path)}
        found |= {name: self.usual(folder) for name, folder in self.finished().items()}
        if continued:
            found[CONTINUED] = self.usual(self.folder(continued["best"]))
        found[self.chosen] = self.usual(self.args.model_name_or_path, draws=self.budget.best_of)
        if sampler:
            best = sampler["best"]
            found[BEST_SAMPLER] = Candidate(
                self.args.model_name_or_path, best["guidance_scale"], best["num_inference_steps"]
            )
        return found

    def configuration(self) -> dict[str, Any]:
        """All that the final figures depend on."""
        names = ("num_samples", "num_synthetic", "classifier_seeds", "classifier_steps", "real_per_class")
        candidates = self.candidates().items()
        compared = {name: [one.name, one.draws, self.weights(one.model)] for name, one in candidates}
        return {"compared": compared, "extractors": self.args.extractors} | {n: vars(self.budget)[n] for n in names}

    def open(self) -> None:
        """Before test subjects are read: refuses a second configuration."""
        if self.part == "test":
            protocol = {"setting": self.setting, "frozen": self.frozen} | self.configuration()
            experiment.open_test(self.root / "test-opened.json", protocol)


# ------------------------------------------------------------------------------------------------------- the steps


def breakdown(e: Experiment) -> str:
    """Is the base's autoencoder, the base itself or a reward to be worked on?"""
    base = e.usual(e.args.model_name_or_path)

    def make() -> dict[str, Any]:
        scans, samples, folder = e.scans("validation"), e.sample(base, "validation"), e.root / "breakdown"
        versions = scan_versions(
            e.base, scans, folder / "versions" / base.name, e.data, num_inference_steps=base.num_inference_steps,
            guidance_scale=base.guidance_scale, batch_size=e.budget.batch_size,
        )  # fmt: skip
        scores = {name: reward(samples.volumes).tolist() for name, reward in e.rewards.items()}
        spaces = dict(zip(e.args.extractors, e.extractors, strict=True))
        found = break_down(versions, samples, scores, scans, e.scans("train"), spaces)
        settings = {"model": BASE, "num_inference_steps": base.num_inference_steps, "part": "validation"}
        write_breakdown(found, folder, settings, "Where the base's distance to scans comes from")
        return {"headline": found.headline, "table": found.table()}

    made_from = {"samples": e.budget.num_samples, "extractors": e.args.extractors}
    made_from |= {"sampler": [base.guidance_scale, base.num_inference_steps]}
    return e.result("breakdown", made_from, make)["headline"]


def sweep(e: Experiment) -> str:
    """Chooses the setting of RL on the validation subjects, and freezes it; a grid of one point needs no run."""

    def score(setting: Setting) -> float:
        name = "-".join(f"{key}-{value:g}" for key, value in setting.items())
        return e.score(e.usual(e.fine_tune(f"sweep/{name}", setting, e.budget.sweep_steps, SWEEP_SEED)))

    if any(len(values) > 1 for values in e.grid.values()):
        once(e.root / "frozen.json", lambda: e.freeze(*experiment.coordinate_sweep(e.grid, score)))
    return json.dumps(e.frozen, indent=1)


def arms(e: Experiment) -> str:
    """Both rewards with every seed; each reward alone, and other rewards, with the seed that is carried on."""
    frozen = e.frozen
    for arm in e.args.arms:
        for seed in e.budget.seeds if arm == "both" else [frozen["first_seed"]]:
            name = f"arms/both-{seed}" if arm == "both" else f"arms/{arm}"
            e.fine_tune(name, frozen["setting"], frozen["rl_steps"], seed, arm)
    return "finished: " + "; ".join(e.finished())


def continued(e: Experiment) -> str:
    """Control: what the compute of one arm buys when pre-training goes on; its learning rate is chosen as RL's was."""
    frozen, budget = e.frozen, e.budget
    main_run = json.loads(Path(e.carried_on, "results.json").read_text())
    transitions = frozen["rl_steps"] * frozen["batch_size"] * frozen["setting"]["window"]
    steps = experiment.equal_compute_steps(
        main_run["seconds"], transitions, frozen["batch_size"], frozen["setting"]["beta"] > 0
    )
    words = [*flags(asdict(e.data)), "--autoencoder", e.args.model_name_or_path, "--autoencoder_subfolder", "vae"]
    words += ["--init_from", resolve(e.args.model_name_or_path), "--eval_samples", "0"]
    setting = {
        "per_device_train_batch_size": frozen["batch_size"],
        "max_steps": steps,
        "warmup_steps": min(100, steps // 10),
        "flags": e.args.continued_flags,
    }

    def make() -> dict[str, Any]:
        names = {rate: f"controls/continued-{rate:g}" for rate in budget.continued_learning_rates}
        folders = {
            rate: e.train("train_diffusion.py", name, words, {"learning_rate": rate} | setting)
            for rate, name in names.items()
        }
        tried = {rate: e.judge(e.usual(folder))["kid"] for rate, folder in folders.items() if len(folders) > 1}
        best = min(tried, key=tried.get) if tried else budget.continued_learning_rates[0]
        return {"best": names[best], "tried": [{"learning_rate": rate, "kid": kid} for rate, kid in tried.items()]}

    made_from = {"rates": budget.continued_learning_rates, "samples": budget.num_samples, **setting}
    made_from |= {"extractor": e.args.extractors[0], "sampler": [budget.guidance_scales[0], budget.sampling_steps[0]]}
    return f"{e.result('continued', made_from, make)['best']}, {steps} steps"


def sampler(e: Experiment) -> str:
    """Control: what the base's own guidance and number of steps can do, chosen on validation."""
    grid = {"guidance_scale": e.budget.guidance_scales, "num_inference_steps": e.budget.sampling_steps}
    if all(len(values) == 1 for values in grid.values()):
        return "Nothing to choose from: one of --guidance_scales and one of --sampling_steps."

    def make() -> dict[str, Any]:
        best, tried = experiment.coordinate_sweep(
            grid, lambda one: e.judge(Candidate(e.args.model_name_or_path, **one))["kid"]
        )
        return {"best": best, "tried": [{**one, "kid": own} for one, own in tried]}

    made_from = {**grid, "samples": e.budget.num_samples, "extractor": e.args.extractors[0]}
    return experiment.table(e.result("sampler", made_from, make)["tried"])


def evaluate(e: Experiment) -> str:
    """All models that are there against scans that no training saw, and which of the claims the figures carry."""
    e.open()

    def make() -> dict[str, Any]:
        scans, spacing = e.scans(e.part), e.data.spacing
        sets = {name: e.sample(one, e.part) for name, one in e.candidates().items()}
        models = {**sets, CEILING: e.round_trips(e.part)}
        report = measure_sets(models, scans, e.scans("train"), e.extractors, spacing)
        settings = {"part": e.part, **e.frozen["setting"], "rl_steps": e.frozen["rl_steps"]}
        write_report(report, e.root / f"evaluate-{e.part}", {"scans": scans, **sets}, spacing, settings)
        both = [name for name in sets if name.startswith(BOTH)]
        controls = [CONTINUED, e.chosen, BEST_SAMPLER]
        claims = experiment.claims(report, BASE, both, list(SINGLE), controls, CEILING) if both else []
        table = experiment.claim_table(claims) if claims else "Both rewards: not run."
        return {"claims": table, "table": report.table(), "figures": report.to_dict()["figures"]}

    return e.result(f"evaluate-{e.part}", e.configuration(), make)["claims"]


def downstream(e: Experiment) -> str:
    """A classifier of young and old with the base's volumes, and with those of the main arm's first seed."""
    e.open()
    budget, usual, folder = e.budget, e.usual(e.args.model_name_or_path), e.root / f"downstream-{e.part}"
    setting = {
        "part": e.part,
        "num_synthetic": budget.num_synthetic,
        "num_inference_steps": usual.num_inference_steps,
        "guidance_scale": usual.guidance_scale,
        "seeds": budget.classifier_seeds,
        "steps": budget.classifier_steps,
        "real_per_class": budget.real_per_class,
    }

    def make() -> dict[str, Any]:
        words = [*flags(asdict(e.data)), "--model_name_or_path", e.args.model_name_or_path, e.carried_on]
        words += flags(setting)
        e.launch("downstream_classification.py", folder, words, sys.executable)
        found = experiment.downstream_claims(json.loads((folder / "report.json").read_text())["results"])
        claims = experiment.claim_table(found) if found else "The classifier decides with 10 real scans per class only."
        return {"claims": claims, "table": (folder / "report.md").read_text()}

    made_from = setting | {"weights": [e.weights(e.args.model_name_or_path), e.weights(e.carried_on)]}
    return e.result(f"downstream-{e.part}", made_from, make)["claims"]


def report(e: Experiment) -> str:
    """All that is there so far as Markdown, and the draft of a model card for the main arm's first seed."""
    frozen, part, arms = e.frozen, e.part, e.finished()
    names = ("breakdown", "continued", "sampler", f"evaluate-{part}", f"downstream-{part}")
    broken_down, went_on, sampled, judged, classified = (e.found(name) for name in names)
    missing = [name for name in (f"{BOTH}{frozen['first_seed']}", *SINGLE) if name not in arms]
    results = (broken_down, went_on, sampled, judged, classified)
    missing += [name for name, one in zip(names, results, strict=True) if not one]
    if judged and e.found(names[3], "made from")["compared"] != e.configuration()["compared"]:
        missing.append("evaluate with all that is there now")
    chosen = ", ".join(f"{name} {value:g}" for name, value in frozen["setting"].items())
    swept = experiment.table(frozen["tried"]) if frozen["tried"] else "Not swept: frozen by hand."
    proof = [
        f"Judged on the {part} subjects; paired 95 % bootstrap intervals over subjects, samples and seeds. 'not shown' "
        "means that the interval does not decide.",
        *(one["claims"] for one in (judged, classified) if one),
        "Controls, as far as they were run: pre-training goes on for as much compute as RL took; of several samples "
        "the rewards keep one; guidance and steps of the base are chosen on validation.",
    ]
    parts = {
        "What was wanted, and what was found": "\n\n".join(proof),
        "What was run": f"{'; '.join(arms) or 'no arm'}: {frozen['rl_steps']} steps each. "
        + (f"Not run: {'; '.join(missing)}." if missing else "Nothing is missing."),
        "Where the distance comes from": broken_down and f"{broken_down['headline']}\n\n{broken_down['table']}",
        "Sweep on validation": f"Frozen: {chosen}.\n\n{swept}",
        "Continued pre-training on validation": went_on and experiment.table(went_on["tried"] or [went_on]),
        "The base's own sampler on validation": sampled and experiment.table(sampled["tried"]),
        "All figures": judged and f"{judged['table']}\n\n![samples](evaluate-{part}/report-views.png)",
        "Classifier": classified and f"{classified['table']}\n\n![differences](downstream-{part}/downstream.png)",
    }
    text = "\n\n".join(f"## {heading}\n\n{body or 'Not run.'}" for heading, body in parts.items())
    write_whole(e.root / "report.md", f"# The experiment\n\n{text}\n")

    name = f"{BOTH}{frozen['first_seed']}"
    if judged and name in judged["figures"][0]["sets"]:
        training = (
            f"`benchmarks/paper/reproduce_paper.py`: {chosen}; {frozen['rl_steps']} steps {frozen['rl_flags']}".rstrip()
        )
        card = experiment.draft_card(
            arms[name], "brain-t1-ppo", Path(e.args.model_name_or_path).name, f"{training}.", "\n\n".join(proof),
            judged["figures"], name, part,
        )  # fmt: skip
        write_whole(e.root / "brain-t1-ppo.md", f"{card.render()}\n")
    return f"{text}\n\nReport: {e.root}"


STEPS = {step.__name__: step for step in (breakdown, sweep, arms, continued, sampler, evaluate, downstream, report)}


def main() -> None:
    """Run the steps asked for, in the order of the experiment."""
    groups = (ExperimentArguments, Budget, DataArguments)
    _, budget, _ = ScriptParser(*groups, description=__doc__).parse()
    parser = ScriptParser(*groups, description=__doc__)
    parser.set_defaults(**PRESETS[budget.budget])
    args, budget, data = parser.parse()
    use_all_cores()
    e = Experiment(data, args, budget)
    for name, step in STEPS.items():
        if name in args.steps:
            print(f"=== {name}", flush=True)
            print(step(e), flush=True)


if __name__ == "__main__":
    main()
