"""The page: its controls, and which of `Events` each of them calls."""

from collections.abc import Sequence

import gradio as gr

from ..pipelines.conditions import condition_names
from .events import FITS, FROM_NOISE, Events, about
from .store import VolumeStore
from .work import (
    LARGEST_SEED,
    Reward,
    class_choices,
    sampler_choices,
)

TITLE = "diffusers-med3d"
INTRODUCTION = f"""# {TITLE}
Generate 3D volumes, turn them, compare two checkpoints, score a scan.
**Never for clinical use**: generated volumes show no real person, and scores are no diagnosis."""
CONDITIONS_HELP = "The network's further conditions, as a JSON object."
VIEWER_HELP = """Drag a rendering to turn it, click in a plane to move the crosshair, scroll to go through the slices.
L, R, A, P, S and I are left, right, anterior, posterior, superior and inferior."""
SCORES_HELP = """A higher reward means that the reward model takes the volume for more real. The bundled rewards know
only brain-extracted T1 scans like those that `brain-t1` was trained on. Sharpness is no reward: it is about 2.1 for
those scans."""
SHOW = "(result) => window.med3d.show(result)"  # in viewer.js
MODEL_QUEUE = {"concurrency_limit": 1, "concurrency_id": "model"}  # the networks are shared, and so is the processor


def build_page(
    models: Sequence[str], rewards: Sequence[Reward], store: VolumeStore, any_model: bool = True
) -> gr.Blocks:
    """Return the page.

    Args:
        models: generators that can be chosen; the page opens with the first, which is loaded now.
        rewards: what volumes are scored with.
        store: where volumes go that the browser shows.
        any_model: whether folders of this machine and Hub ids may be typed in besides.

    Raises:
        ValueError, OSError: a first generator that cannot be loaded.
    """
    events = Events(models, rewards, store, any_model)
    names = list(events.models)
    first = events.pipeline(names[0])
    typed_in = "A bundled name, a folder or a Hub id." if any_model else "One of this page's checkpoints."
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(INTRODUCTION)
        scan = gr.State(None)
        score_scan = gr.State(None)
        with gr.Row(elem_classes="med3d-columns"):
            with gr.Column(scale=1, min_width=280):
                model = gr.Dropdown(
                    names, value=names[0], label="Checkpoint", info=typed_in, allow_custom_value=any_model
                )
                facts = gr.Markdown(about(first), elem_classes="med3d-note")
                classes = class_choices(first)
                label = gr.Dropdown(
                    classes, value=classes[0] if classes else None, label="Class", visible=bool(classes)
                )
                conditions = gr.Textbox(label="Conditions", info=CONDITIONS_HELP, visible=bool(condition_names(first)))
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED, min_width=120)
                    samplers = sampler_choices(first)
                    sampler = gr.Dropdown(samplers, value=samplers[0], label="Sampler", min_width=120)
                steps = gr.Slider(1, 200, 20, step=1, label="Denoising steps")
                guidance = gr.Slider(0, 10, 1, step=0.1, label="Guidance", info="1 is off.")
                upload = _upload("Start from a scan (NIfTI, optional)")
                scan_facts = gr.Markdown(elem_classes="med3d-note")
                with gr.Group(visible=False) as with_scan:
                    strength = gr.Slider(
                        0, 1, 0.5, step=0.01, label="Strength", info="0 keeps the scan, 1 keeps nothing of it."
                    )
                    fit = _fit()
                    remove = gr.Button("Start from noise again")
            with gr.Column(scale=3, min_width=480):
                settings = [label, conditions, seed, steps, guidance, sampler, scan, strength, fit]
                with gr.Tab("Generate"):
                    make = gr.Button("Generate", variant="primary")
                    made, made_view, made_scores = _result("generate")
                with gr.Tab("Compare"):
                    with gr.Row(equal_height=True):
                        other = gr.Dropdown(
                            names,
                            value=names[1] if len(names) > 1 else None,
                            label="Checkpoint to compare with",
                            info=FROM_NOISE,
                            allow_custom_value=any_model,
                            scale=2,
                        )
                        make_both = gr.Button("Compare", variant="primary", scale=1)
                    with gr.Row():
                        with gr.Column(min_width=320):
                            left, left_view = _viewer("left")
                        with gr.Column(min_width=320):
                            right, right_view = _viewer("right")
                    both_scores = gr.Markdown()
                with gr.Tab("Score a scan"):
                    score_upload = _upload("Scan to score (NIfTI)")
                    score_facts = gr.Markdown(elem_classes="med3d-note")
                    score_fit = _fit()
                    make_scores = gr.Button("Score the uploaded scan", variant="primary")
                    scored, scored_view, scan_scores = _result("score")
                gr.Markdown(f"{VIEWER_HELP}\n\n{SCORES_HELP}", elem_classes="med3d-note")

        model.change(events.choose, model, [label, conditions, sampler, facts], api_name="checkpoint", **MODEL_QUEUE)
        start = [scan, scan_facts]
        needing = [with_scan, other]
        upload.upload(events.take_start, upload, [*start, upload, *needing], api_name="scan", concurrency_limit=1)
        remove.click(events.remove_start, None, [*start, *needing], api_name="remove_scan")
        score_upload.upload(
            events.take_scan,
            score_upload,
            [score_scan, score_facts, score_upload],
            api_name="score_scan",
            concurrency_limit=1,
        )
        make.click(
            events.generate,
            [model, *settings],
            [made, made_scores],
            show_progress_on=made_view,
            api_name="generate",
            **MODEL_QUEUE,
        ).success(None, made, js=SHOW)
        both = make_both.click(
            events.compare,
            [model, other, *settings],
            [left, right, both_scores],
            show_progress_on=left_view,
            api_name="compare",
            **MODEL_QUEUE,
        )
        both.success(None, left, js=SHOW)
        both.success(None, right, js=SHOW)
        make_scores.click(
            events.score,
            [model, score_scan, score_fit],
            [scored, scan_scores],
            show_progress_on=scored_view,
            api_name="score",
            **MODEL_QUEUE,
        ).success(None, scored, js=SHOW)
        page.unload(events.close)
    return page


def _viewer(slot: str) -> tuple[gr.JSON, gr.HTML]:
    """A hidden component with what viewer.js needs to know of a volume, and the place where it shows it."""
    return gr.JSON(visible="hidden"), gr.HTML(f'<div class="med3d-viewer" data-slot="{slot}"></div>')


def _upload(label: str) -> gr.File:
    return gr.File(label=label, file_types=[".nii", ".gz"], height=150)


def _fit() -> gr.Radio:
    return gr.Radio(list(FITS), value=next(iter(FITS)), label="If the scan is larger than the checkpoint's grid")


def _result(slot: str) -> tuple[gr.JSON, gr.HTML, gr.Markdown]:
    return *_viewer(slot), gr.Markdown()
