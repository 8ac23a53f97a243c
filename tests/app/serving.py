"""The page on a free port of this machine, in a thread, with tiny generators and a reward that is a function."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import uvicorn

from diffusers_med3d.app.server import app_of, bound
from diffusers_med3d.app.work import Reward

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
]


def brightness(volumes: torch.Tensor, **conditions) -> torch.Tensor:
    return volumes.flatten(1).mean(1)


def refuses(volumes: torch.Tensor, **conditions) -> torch.Tensor:
    raise RuntimeError("this reward takes no volume")


REWARDS = [Reward("brightness", brightness), Reward("refuses", refuses)]


@contextmanager
def served(
    models: Sequence[str],
    server_name: str = "127.0.0.1",
    max_queue: int = 100,
    rewards: Sequence[Reward] = REWARDS,
) -> Iterator[str]:
    """Address of the running page; it is stopped, and its files are deleted, on leaving."""
    with bound("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with app_of(models, rewards, server_name, port, max_queue) as app:
            server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            try:
                deadline = time.monotonic() + 60
                while not server.started and time.monotonic() < deadline:
                    time.sleep(0.05)
                yield f"http://127.0.0.1:{port}"
            finally:
                server.should_exit = True
                thread.join()
