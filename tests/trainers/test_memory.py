"""What decoding and keeping a rollout take at most, measured at torch's allocator (docs/pitfalls.md, 24)."""

from collections.abc import Callable

import pytest
import torch
from torch.autograd import profiler

from diffusers_med3d.rl import rollout
from test_ddpo_trainer import make_trainer

SHAPE = (4, 4, 8, 8, 8)
STATE = 4 * 4 * 8**3 * 4  # bytes of one state of the batch


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes that were allocated at once while ``function`` ran, beyond those before it."""
    with profiler.profile(profile_memory=True) as record:
        kept = function()
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del kept
    return most


def test_the_measure_counts_what_lives_at_once():
    def three_in_turn():
        for _ in range(3):
            torch.ones(10_000) + 1  # two of 40 kB at a time

    assert peak_bytes(three_in_turn) == pytest.approx(80_000, rel=0.05)


@pytest.mark.slow
def test_a_small_decode_batch_size_decodes_a_rollout_in_less_memory(tiny_pipeline, tmp_path):
    latents = torch.randn(96, 4, 4, 4, 4)  # many: a convolution's workspace of 4 MB is there for one sample too
    peaks = []
    for size in (1, 96):
        trainer = make_trainer(tiny_pipeline, tmp_path, decode_batch_size=size)
        trainer.decode(latents)
        peaks.append(peak_bytes(lambda: trainer.decode(latents)))  # noqa: B023
    assert peaks[0] < 0.5 * peaks[1]


def rollout_peak(scheduler, steps: int, window: range, storage: str | None = None) -> int:
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(i) for i in range(SHAPE[0])]
    initial = torch.randn(SHAPE)

    def run():
        with torch.no_grad():
            return rollout(lambda x, t: 0.1 * x, scheduler, initial, generators, window, tuple(window), 1.0, storage)

    run()
    return peak_bytes(run)


def test_a_rollout_keeps_the_states_of_its_window_and_no_others(tiny_scheduler):
    short, long = (rollout_peak(tiny_scheduler, steps, range(1, 3)) for steps in (5, 40))
    assert long < short + STATE, "memory grows with steps that are not trained"
    everything = rollout_peak(tiny_scheduler, 40, range(0, 38))
    assert everything > short + 60 * STATE  # 36 more steps, each a state and the next


def test_an_offloaded_trajectory_is_not_kept_where_it_was_made(tiny_scheduler):
    window = range(0, 20)
    kept = rollout_peak(tiny_scheduler, 22, window)
    offloaded = rollout_peak(tiny_scheduler, 22, window, "meta")  # a device without memory stands for another one
    assert kept - offloaded > 2 * len(window) * STATE
    assert offloaded < 12 * STATE
