"""The server of the page: Gradio's page, NiiVue, and the volumes of the sessions that are open."""

import os
import signal
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, PlainTextResponse, Response

from .niivue import niivue_licence, niivue_module
from .page import build_page
from .store import VolumeStore
from .work import MAX_UPLOAD_BYTES, Reward

HERE = Path(__file__).parent
HEAD = '<script type="module" src="viewer/viewer.js"></script>'
FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]  # of the reader's machine; none is fetched
MONO_FONTS = ["ui-monospace", "Consolas", "monospace"]
CLOSING_SECONDS = 2  # pages that are open when the server stops are not waited for longer


def is_loopback(server_name: str) -> bool:
    """Whether an address can only be reached from this machine."""
    try:
        return ip_address(server_name).is_loopback
    except ValueError:
        return server_name == "localhost"


@contextmanager
def app_of(
    models: Sequence[str],
    rewards: Sequence[Reward],
    server_name: str = "127.0.0.1",
    server_port: int = 7860,
    max_queue: int = 100,
) -> Iterator[FastAPI]:
    """The web application; its uploads and volumes are deleted on leaving.

    Args:
        models: generators that can be chosen. Where other machines reach the server, only these.
        rewards: what volumes are scored with.
        max_queue: requests that may wait; more are refused with a sentence.
    """
    with tempfile.TemporaryDirectory(prefix="med3d-app-") as temporary:
        folder = Path(temporary)
        os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
        store = VolumeStore(folder / "volumes")
        page = build_page(models, rewards, store, any_model=is_loopback(server_name))
        page.queue(max_size=max_queue, default_concurrency_limit=1)
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        _add_viewer(app)
        _add_volumes(app, store)
        mounted = gr.mount_gradio_app(
            app,
            page,
            path="/",
            server_name=server_name,
            server_port=server_port,
            footer_links=["api"],
            run_history=False,
            show_error=False,
            max_file_size=MAX_UPLOAD_BYTES,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            theme=gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=MONO_FONTS),
            css=(HERE / "page.css").read_text(encoding="utf-8"),
            head=HEAD,
        )
        try:
            yield mounted
        finally:
            store.close()


def serve(
    models: Sequence[str],
    rewards: Sequence[Reward],
    server_name: str = "127.0.0.1",
    server_port: int = 7860,
    max_queue: int = 100,
) -> None:
    """Serve the page until the process is interrupted; see `app_of`.

    Raises:
        OSError: the address cannot be used, such as a port that another program has.
    """
    with bound(server_name, server_port) as listener:
        port = listener.getsockname()[1]
        with app_of(models, rewards, server_name, port, max_queue) as app:
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=CLOSING_SECONDS)
            print(f"The page is at http://{server_name}:{port} (Ctrl+C stops it).", flush=True)
            # uvicorn raises again the signal that stopped it, which would end the process before files are deleted
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            with suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[listener])


def bound(server_name: str, server_port: int) -> socket.socket:
    try:
        return socket.create_server((server_name, server_port))
    except OSError as error:
        raise OSError(
            f"cannot listen on {server_name}, port {server_port} ({error.strerror}); choose another with --server_port."
        ) from error


def _add_viewer(app: FastAPI) -> None:
    module, licence = niivue_module(), niivue_licence()
    own = (HERE / "viewer.js").read_text(encoding="utf-8")

    @app.get("/viewer/niivue.js")
    def niivue() -> Response:
        return Response(module, media_type="text/javascript", headers={"Cache-Control": "max-age=3600"})

    @app.get("/viewer/niivue-licence.txt")
    def niivue_terms() -> Response:
        return PlainTextResponse(licence)

    @app.get("/viewer/viewer.js")
    def viewer() -> Response:
        return Response(own, media_type="text/javascript", headers={"Cache-Control": "no-cache"})


def _add_volumes(app: FastAPI, store: VolumeStore) -> None:
    @app.get("/volumes/{token}/{file_name}")
    def volume(token: str, file_name: str) -> Response:
        path = store.path(token, file_name)
        if path is None:
            raise HTTPException(404, "This volume is deleted; generate it again.")
        return FileResponse(path, media_type="application/gzip", headers={"Cache-Control": "no-store"})
