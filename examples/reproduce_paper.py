"""The whole experiment from prepared data: are fine-tuned volumes closer to unseen scans, as diverse, and of more use
to a classifier than those of the model before, and than what the same compute buys without RL?

    R="python examples/reproduce_paper.py --data_dir DATA --split_file split.json"
    $R --steps gate                                               # look first: is there something to gain?
    $R --budget try --output_dir outputs/try                      # the whole of it, small
    $R                                                            # the whole of it, judged on validation subjects
    $R --open_test --steps evaluate downstream report             # at the end, once

    step        what it does                                                              its result
    gate        real scans, round-trips, noise levels, full samples, damage, measured     gate.json
    sweep       learning rate, beta, window, group size on validation; freezes the best   frozen.json
    arms        both rewards with several seeds, each reward alone                        arms.json
    controls    pre-training goes on at equal compute; the base's best sampler settings   controls.json
    evaluate    all of them, and best of 2, against unseen scans: what can be claimed?    evaluate-<part>.json
    downstream  a classifier with and without generated scans                             downstream-<part>.json
    report      all tables, and a draft of the model card                                 report.md, brain-t1-ppo.md

A step's result is written last, so a run that was stopped goes on where it stopped. Trainings are the scripts of this
folder, each in a process of its own. The test subjects are read only with --open_test, and for one configuration only.
docs/experiment.md says why each choice was made.
"""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import HfArgumentParser

from diffusers_med3d import MedDiffusion3DPipeline, SliceReward, VolumeReward, evaluation, experiment, metrics
from diffusers_med3d.data import DataArguments, VolumeDataset, load_split
from diffusers_med3d.experiment import Setting
from diffusers_med3d.files import once, write_whole
from diffusers_med3d.hub import resolve
from diffusers_med3d.metrics import VolumeSet
from diffusers_med3d.trainers.base import use_all_cores
from diffusers_med3d.trainers.spectrum_data import fingerprint

EXAMPLES = Path(__file__).parent
BASE, CEILING = "pre-trained", "round-trip"
CONTINUED, BEST_OF_2, BEST_SAMPLER = "continued pre-training", "best of 2 by reward", "best guidance and steps"
ALONE = {"3D reward alone": "3d", "2D reward alone": "2d"}
SWEEP_SEED = 1000  # of none of the arms


@dataclass
class ExperimentArguments:
    """What is fine-tuned, and which steps run."""

    base: str = field(default="brain-t1", metadata={"help": "Generator to fine-tune: bundled name or folder."})
    volume_reward: str = field(default="brain-t1-reward-3d", metadata={"help": "3D reward."})
    slice_reward: str = field(default="brain-t1-reward-2d", metadata={"help": "2D reward."})
    output_dir: str = field(default="outputs/experiment", metadata={"help": "Where everything is written."})
    steps: list[str] = field(
        default_factory=lambda: list(STEPS),
        metadata={"help": "Any of: gate sweep arms controls evaluate downstream report."},
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


@dataclass
class Budget:
    """How much is spent. --budget try, cpu or gpu sets all of it, every other flag a part."""

    budget: str = field(default="cpu", metadata={"help": "Preset of what follows.", "choices": ["try", "cpu", "gpu"]})
    rl_steps: int = field(default=300, metadata={"help": "Optimizer steps of fine-tuning in every arm."})
    sweep_steps: int = field(default=100, metadata={"help": "The same in the sweep."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the main arm."})
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-5, 2e-5, 5e-6], metadata={"help": "Tried in the sweep; the first is the start."}
    )
    betas: list[float] = field(default_factory=lambda: [0.01, 0.04], metadata={"help": "Likewise: weight of the KL."})
    windows: list[int] = field(default_factory=lambda: [2, 3], metadata={"help": "Likewise: stochastic steps."})
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
    num_samples: int = field(default=96, metadata={"help": "Volumes of each model that are judged."})
    num_synthetic: int = field(default=64, metadata={"help": "Volumes per class for the classifier."})
    classifier_seeds: int = field(default=10, metadata={"help": "Classifiers per arm."})
    classifier_steps: int = field(default=100, metadata={"help": "Optimizer steps of a classifier."})
    real_per_class: list[int] = field(default_factory=lambda: [5, 10, 20], metadata={"help": "Real scans per class."})


PRESETS: dict[str, dict[str, Any]] = {
    "try": dict(
        rl_steps=24, sweep_steps=6, seeds=[0], learning_rates=[1e-5, 2e-5], betas=[0.01], windows=[2], group_sizes=[8],
        continued_learning_rates=[1e-4], guidance_scales=[1.0, 2.0], sampling_steps=[20], num_samples=24,
        num_synthetic=16, classifier_seeds=3,
    ),
    "cpu": {},
    "gpu": dict(
        rl_steps=1500, sweep_steps=300, seeds=[0, 1, 2, 3, 4], learning_rates=[1e-5, 2e-5, 5e-6, 4e-5],
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


def flags(arguments: Any) -> list[str]:
    """A dataclass of arguments as command line flags."""
    words: list[str] = []
    for name, value in asdict(arguments).items():
        words += [] if value is None else [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


class Experiment:
    """Where things are, and the operations that the steps are made of."""

    def __init__(self, data: DataArguments, args: ExperimentArguments, budget: Budget) -> None:
        self.data, self.args, self.budget, self.root = data, args, budget, Path(args.output_dir)
        self.part = "test" if args.open_test else "validation"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._scans: dict[str, VolumeSet] = {}
        places = ("data_dir", "split_file", "output_dir", "steps", "open_test", "launcher")
        setting = {k: v for k, v in (asdict(data) | asdict(args) | asdict(budget)).items() if k not in places}
        setting |= {"split": experiment.content_hash(load_split(data.split_file)), "weights": fingerprint(self.base)}
        found = once(self.root / "setting.json", lambda: setting)
        if found != setting:
            other = sorted(name for name in setting if found.get(name) != setting[name])
            raise ValueError(
                f"{self.root} holds an experiment with other {', '.join(other)}; use another --output_dir."
            )

    @cached_property
    def base(self) -> MedDiffusion3DPipeline:
        return self.pipeline(self.args.base)

    @cached_property
    def extractors(self) -> list[metrics.Extractor]:
        return [metrics.extractor(name, self.device) for name in self.args.extractors]

    @cached_property
    def rewards(self) -> list[VolumeReward | SliceReward]:
        three = VolumeReward.from_pretrained(self.args.volume_reward).to(self.device)
        return [three, SliceReward.from_pretrained(self.args.slice_reward).to(self.device)]

    def pipeline(self, model: str) -> MedDiffusion3DPipeline:
        """A generator with the base's scheduler, ready to sample."""
        given = {} if model == self.args.base else {"scheduler": self.base.scheduler}
        return MedDiffusion3DPipeline.from_pretrained(model, **given).to(self.device)

    def scans(self, part: str) -> VolumeSet:
        """Scans of a part of the split; those of the test subjects only when they were opened."""
        if part == "test" and not self.args.open_test:
            raise ValueError("The test subjects are read with --open_test only.")
        if part not in self._scans:
            self._scans[part] = evaluation.volume_set(VolumeDataset.from_arguments(self.data, part))
        return self._scans[part]

    def result(self, name: str) -> Any:
        """What an earlier step found."""
        path = self.root / f"{name}.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: run the step that writes it first (see --help).")
        return json.loads(path.read_text())

    def usual(self, model: str, draws: int = 1) -> Candidate:
        """A model sampled as everything is that does not say otherwise."""
        return Candidate(model, self.budget.guidance_scales[0], self.budget.sampling_steps[0], draws)

    def run(self, script: str, name: str, words: list[str], setting: dict[str, Any], launcher: str = "") -> str:
        """A script of this folder in a process of its own, unless it was finished earlier; gives its folder.

        Args:
            script: file name.
            name: of the folder.
            words: flags that say where things are.
            setting: flag -> value or values, of what makes a difference; other values than a finished run's are
                refused.
            launcher: instead of --launcher.
        """
        folder = self.root / name
        setting = {flag: " ".join(map(str, v)) if isinstance(v, list) else str(v) for flag, v in setting.items()}

        def launch() -> dict[str, str]:
            command = [
                *shlex.split(launcher or self.args.launcher),
                str(EXAMPLES / script),
                "--output_dir",
                str(folder),
                *words,
            ]
            for flag, value in setting.items():
                command += [f"--{flag}", *value.split()]
            print(f"{name}: {shlex.join(command[command.index(str(EXAMPLES / script)) :])}", flush=True)
            subprocess.run(command, check=True)
            return setting

        if once(folder / "done.json", launch) != setting:
            raise ValueError(f"{folder} was made with other settings than {setting}; use another --output_dir.")
        for checkpoint in folder.glob("checkpoint-*"):  # only a run that goes on needs them
            shutil.rmtree(checkpoint)
        return str(folder)

    def fine_tune(self, name: str, setting: Setting, steps: int, seed: int, rewards: str = "3d 2d") -> str:
        """RL from the base with one or both rewards; a rollout has one group of every class."""
        samples = len(self.data.class_names) * setting["group_size"]
        if samples % self.budget.batch_size:
            raise ValueError(f"batch_size {self.budget.batch_size} must divide the {samples} samples of a rollout.")
        words = ["--pipeline", self.args.base, "--resume_from_checkpoint", "latest", *shlex.split(self.args.rl_flags)]
        words += ["--volume_reward", self.args.volume_reward if "3d" in rewards else ""]
        words += ["--slice_reward", self.args.slice_reward if "2d" in rewards else ""]
        chosen = {
            "learning_rate": setting["learning_rate"],
            "beta": setting["beta"],
            "sde_window_size": setting["window"],
            "num_generations": setting["group_size"],
            "per_device_train_batch_size": self.budget.batch_size,
            "steps_per_generation": samples // self.budget.batch_size,
            "max_steps": steps,
            "seed": seed,
            "eval_volumes": 2,
        }
        return self.run("ppo_finetune.py", name, words, chosen)

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
        scores = [torch.stack([reward(one.volumes) for reward in self.rewards], dim=1) for one in drawn]  # each (N, 2)
        kept = experiment.best_of(torch.stack(scores, dim=1)).tolist()
        volumes = torch.stack([drawn[k].volumes[row] for row, k in enumerate(kept)])
        return VolumeSet(volumes, drawn[0].labels, drawn[0].subjects)

    def round_trips(self, part: str) -> VolumeSet:
        """What the autoencoder leaves of a part's scans: no generator behind it comes closer to them."""
        scans = self.scans(part)
        with torch.no_grad():
            volumes = self.base.decode(self.base.encode(scans.volumes.to(self.device))).cpu()
        names = [f"{row:04d} {subject}" for row, subject in enumerate(scans.subjects)]
        folder = self.root / "samples" / part / "round-trip"
        read = evaluation.reload_volumes(volumes, scans.labels, names, folder, self.data, self.base.affine())
        return VolumeSet(read.volumes, read.labels, scans.subjects)

    def judge(self, candidate: Candidate) -> dict[str, float]:
        """What choices are made by: KID to the validation scans, and how much alike the samples of a class are."""
        return once(
            self.root / "judged" / f"{candidate.name}.json",
            lambda: experiment.measure(
                self.sample(candidate, "validation"), self.scans("validation"), self.extractors[0]
            ),
        )

    def score(self, candidate: Candidate) -> float:
        """What a choice minimises."""
        return experiment.selection_score(self.judge(candidate), self.judge(self.usual(self.args.base)))

    def candidates(self) -> dict[str, Candidate]:
        """Everything that is compared, the base first."""
        controls, arms = self.result("controls"), self.result("arms")
        return {
            BASE: self.usual(self.args.base),
            **{name: self.usual(folder) for name, folder in arms.items()},
            CONTINUED: self.usual(controls["continued"]),
            BEST_OF_2: self.usual(self.args.base, draws=2),
            BEST_SAMPLER: Candidate(self.args.base, controls["guidance_scale"], controls["num_inference_steps"]),
        }

    def open(self) -> None:
        """Before test subjects are read: refuses a second configuration."""
        if self.part == "test":
            models = {name: fingerprint(self.pipeline(one.model)) for name, one in self.candidates().items()}
            protocol = {"setting": self.result("setting"), "frozen": self.result("frozen"), "models": models}
            experiment.open_test(self.root / "test-opened.json", protocol)


# ------------------------------------------------------------------------------------------------------- the steps


def gate(e: Experiment) -> dict[str, Any]:
    """Is there a gap, and is it the generator's to close rather than the decoder's?"""
    scans, spacing = e.scans("validation"), e.data.spacing
    steps = e.budget.sampling_steps[0]
    versions = evaluation.gate_versions(e.base, scans, e.root / "gate" / "volumes", e.data, num_inference_steps=steps)
    report, verdict = evaluation.gate(versions, scans, e.scans("train"), e.extractors, spacing)
    settings = {"generator": Path(e.args.base).name, "num_inference_steps": steps, "part": "validation"}
    evaluation.write_report(report, e.root / "gate", {"scans": scans, **versions}, spacing, settings, "Gate before RL")
    if not all(one["passes"] for one in verdict):
        print("THE GATE SAYS NO: mend the base or its decoder before spending compute on RL (gate/report.md).")
    return {"verdict": verdict, "table": report.table()}


def sweep(e: Experiment) -> dict[str, Any]:
    """Chooses the setting of RL on the validation subjects; what this returns is frozen."""
    grid = {
        "learning_rate": e.budget.learning_rates,
        "beta": e.budget.betas,
        "window": e.budget.windows,
        "group_size": e.budget.group_sizes,
    }

    def score(setting: Setting) -> float:
        name = "-".join(f"{key}-{value:g}" for key, value in setting.items())
        return e.score(e.usual(e.fine_tune(f"sweep/{name}", setting, e.budget.sweep_steps, SWEEP_SEED)))

    best, tried = experiment.coordinate_sweep(grid, score)
    return {
        "setting": best,
        "tried": [{**setting, "score": own if own < float("inf") else "too much alike"} for setting, own in tried],
        "base": e.score(e.usual(e.args.base)),
    }


def arms(e: Experiment) -> dict[str, str]:
    """Both rewards with every seed, then each alone with the first; name -> folder."""
    setting, budget = e.result("frozen")["setting"], e.budget
    both = {
        f"both rewards, seed {seed}": e.fine_tune(f"arms/both-{seed}", setting, budget.rl_steps, seed)
        for seed in budget.seeds
    }
    return both | {
        name: e.fine_tune(f"arms/{reward}", setting, budget.rl_steps, budget.seeds[0], reward)
        for name, reward in ALONE.items()
    }


def controls(e: Experiment) -> dict[str, Any]:
    """What the same compute buys without RL, and what the base's own sampler can do; chosen on validation as RL was."""
    setting, budget = e.result("frozen")["setting"], e.budget
    main_run = json.loads((e.root / "arms" / f"both-{budget.seeds[0]}" / "results.json").read_text())
    transitions = budget.rl_steps * budget.batch_size * setting["window"]
    steps = experiment.equal_compute_steps(main_run["seconds"], transitions, budget.batch_size, setting["beta"] > 0)
    words = [*flags(e.data), "--autoencoder", e.args.base, "--autoencoder_subfolder", "vae"]
    words += ["--init_from", resolve(e.args.base), "--resume_from_checkpoint", "latest", "--eval_samples", "0"]
    words += ["--channel_names", *(e.base.config.channel_names or [])] if e.base.config.channel_names else []
    continued = [
        e.run(
            "train_diffusion.py",
            f"controls/continued-{rate:g}",
            words,
            {
                "learning_rate": rate,
                "per_device_train_batch_size": budget.batch_size,
                "max_steps": steps,
                "warmup_steps": min(100, steps // 10),
            },
        )
        for rate in budget.continued_learning_rates
    ]
    grid = {"guidance_scale": budget.guidance_scales, "num_inference_steps": budget.sampling_steps}
    best, tried = experiment.coordinate_sweep(grid, lambda one: e.judge(Candidate(e.args.base, **one))["kid"])
    return {
        "continued": min(continued, key=lambda folder: e.judge(e.usual(folder))["kid"]),
        "continued_steps": steps,
        **best,
        "tried": [{**one, "kid": own} for one, own in tried],
    }


def evaluate(e: Experiment) -> dict[str, Any]:
    """All models against scans that no training saw, and which of the wanted claims the figures carry."""
    e.open()
    scans, spacing = e.scans(e.part), e.data.spacing
    sets = {name: e.sample(one, e.part) for name, one in e.candidates().items()}
    ceiling = e.round_trips(e.part)
    report = metrics.evaluate({**sets, CEILING: ceiling}, scans, e.scans("train"), e.extractors, spacing)
    settings = {"part": e.part, **e.result("frozen")["setting"], "rl_steps": e.budget.rl_steps}
    evaluation.write_report(report, e.root / f"evaluate-{e.part}", {"scans": scans, **sets}, spacing, settings)
    both = [name for name in sets if name.startswith("both rewards")]
    found = experiment.claims(report, BASE, both, list(ALONE), [CONTINUED, BEST_OF_2, BEST_SAMPLER], CEILING)
    return {"claims": experiment.claim_table(found), "table": report.table(), "figures": report.to_dict()["figures"]}


def downstream(e: Experiment) -> dict[str, Any]:
    """A classifier of young and old with the base's volumes, and with those of the main arm's first seed."""
    e.open()
    budget, usual = e.budget, e.usual(e.args.base)
    words = [*flags(e.data), "--before", e.args.base, "--after", str(e.root / "arms" / f"both-{budget.seeds[0]}")]
    setting = {
        "part": e.part,
        "num_synthetic": budget.num_synthetic,
        "num_inference_steps": usual.num_inference_steps,
        "guidance_scale": usual.guidance_scale,
        "seeds": budget.classifier_seeds,
        "steps": budget.classifier_steps,
        "real_per_class": budget.real_per_class,
    }
    folder = Path(e.run("downstream_classification.py", f"downstream-{e.part}", words, setting, sys.executable))
    found = experiment.downstream_claims(json.loads((folder / "report.json").read_text())["results"])
    claims = experiment.claim_table(found) if found else "The classifier decides with 10 real scans per class only."
    return {"claims": claims, "table": (folder / "report.md").read_text()}


def report(e: Experiment) -> str:
    """All that is there so far as Markdown, and the draft of a model card for the main arm's first seed."""
    frozen, part = e.result("frozen"), e.part
    judged, classified = e.result(f"evaluate-{part}"), e.result(f"downstream-{part}")
    tried = experiment.table(frozen["tried"])
    chosen = ", ".join(f"{name} {value:g}" for name, value in frozen["setting"].items())
    proof = [
        f"Judged on the {part} subjects; paired 95 % bootstrap intervals over subjects, samples and seeds. 'not shown' "
        "means that the interval holds zero.",
        judged["claims"],
        classified["claims"],
        "Controls: pre-training went on for as much compute as RL took; of two samples the rewards kept one; guidance "
        "and steps of the base were chosen on validation.",
    ]
    parts = {
        "What was wanted, and what was found": "\n\n".join(proof),
        "Gate before RL": experiment.table(e.result("gate")["verdict"]),
        "Sweep on validation": f"Frozen: {chosen}. The base scores {frozen['base']:.4g}.\n\n{tried}",
        "The base's own sampler on validation": experiment.table(e.result("controls")["tried"]),
        "All figures": f"{judged['table']}\n\n![samples](evaluate-{part}/report-views.png)",
        "Classifier": f"{classified['table']}\n\n![differences](downstream-{part}/downstream.png)",
    }
    text = "\n\n".join(f"## {heading}\n\n{body}" for heading, body in parts.items())
    write_whole(e.root / "report.md", f"# The experiment\n\n{text}\n")

    name = f"both rewards, seed {e.budget.seeds[0]}"
    training = f"`python examples/reproduce_paper.py --budget {e.budget.budget}`: {chosen}; {e.budget.rl_steps} steps."
    card = experiment.draft_card(
        e.result("arms")[name], "brain-t1-ppo", Path(e.args.base).name, training, "\n\n".join(proof),
        judged["figures"], name, part,
    )  # fmt: skip
    write_whole(e.root / "brain-t1-ppo.md", f"{card.render()}\n")
    return text


STEPS = {step.__name__: step for step in (gate, sweep, arms, controls, evaluate, downstream, report)}


def main() -> None:
    """Run the steps asked for, in the order of the experiment; finished ones are only read."""
    parser = HfArgumentParser([DataArguments, ExperimentArguments, Budget])
    parser.set_defaults(**PRESETS[parser.parse_args().budget])
    data, args, budget = parser.parse_args_into_dataclasses()
    unknown = [name for name in args.steps if name not in STEPS]
    if unknown:
        raise ValueError(f"Unknown steps {unknown}, expected some of {list(STEPS)}.")
    use_all_cores()
    e = Experiment(data, args, budget)
    files = {"sweep": "frozen", "evaluate": f"evaluate-{e.part}", "downstream": f"downstream-{e.part}"}
    for name, step in STEPS.items():
        if name == "report" and name in args.steps:
            print(f"\n{step(e)}\n\nReport and model card: {e.root}")
        elif name in args.steps:
            print(f"=== {name}", flush=True)
            found = once(e.root / f"{files.get(name, name)}.json", lambda step=step: step(e))
            print(
                found["claims"] if "claims" in found else json.dumps(found.get("verdict", found), indent=1), flush=True
            )


if __name__ == "__main__":
    main()
