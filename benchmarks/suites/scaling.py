"""Whether time and memory grow in proportion to voxels, samples and steps."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import Row, Settings, peak_bytes, repeated, timed

from suites.networks import make_pipeline, side

LINEAR = 1.15


@torch.no_grad()
def rows(settings: Settings) -> Iterator[Row]:
    """What eight times the work takes, over eight times what one takes; `sizes` has what 1, 2, 4 and 8 times take."""
    yield from _growth(settings, "voxels of a decode", partial(_decode, settings))
    yield from _growth(settings, "samples", lambda times: partial(_sample, make_pipeline(settings), 2 * times, 1))
    yield from _growth(settings, "steps", lambda times: partial(_sample, make_pipeline(settings), 2, times))


def _decode(settings: Settings, times: int) -> Callable[[], object]:
    pipeline = make_pipeline(settings)
    x, y, z = pipeline.vae.latent_shape([side(settings)] * 3)
    latents = torch.randn(1, pipeline.vae.latent_channels, x * times, y, z, device=settings.device)
    return partial(pipeline.vae.decode_latents, latents)


def _sample(pipeline, samples: int, steps: int) -> None:
    pipeline(num_samples=samples, num_inference_steps=steps)


def _growth(settings: Settings, what: str, work: Callable[[int], Callable[[], object]]) -> Iterator[Row]:
    sizes = (1, 2, 4, 8)
    calls = {times: work(times) for times in sizes}
    calls[1]()  # warm up
    found = [
        {times: timed(call, settings.device).on(settings.device) for times, call in calls.items()}
        for _ in repeated(settings)
    ]
    best = {times: min(one[times] for one in found) for times in sizes}
    peaks = {times: peak_bytes(call, settings.device) / 2**30 for times, call in calls.items()}
    for kind, unit, values, bar in (("time", "s", best, LINEAR), ("peak memory", "GiB", peaks, LINEAR)):
        yield Row(
            "scaling",
            f"{kind} of 8 times the {what}",
            "8 times that of one",
            unit,
            values[8],
            8 * values[1],
            values[8] / (8 * values[1]),
            repeats=settings.repeats,
            bar=bar,
            sizes={str(times): value for times, value in values.items()},
        )
