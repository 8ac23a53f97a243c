"""The page without a browser: what it serves, to whom, and that users are not mixed."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import nibabel
import numpy as np
import pytest
import torch

from conftest import REPOSITORY, SPACING

pytest.importorskip("gradio", reason="needs the extra app")
pytest.importorskip("ipyniivue", reason="needs the extra app")

from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from diffusers_med3d.app import Settings, generate
from diffusers_med3d.app.server import bound, is_loopback
from diffusers_med3d.app.store import VolumeStore
from diffusers_med3d.app.work import load_pipeline
from diffusers_med3d.pipelines import MedDiffusion3DPipelineOutput
from serving import served

SETTINGS = {
    "class_label": "young",
    "conditions": "",
    "seed": 0,
    "steps": 2,
    "guidance": 1,
    "sampler": "as saved",
    "strength": 0.5,
    "fit": "refuse the scan",
}


@pytest.fixture
def temporary_folder(tmp_path, monkeypatch) -> Path:
    """Where the page puts its files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def no_network(monkeypatch) -> list:
    """Addresses elsewhere that this process tried to reach; every one is refused."""
    tried, connect = [], socket.socket.connect

    def only_here(self, address):
        if self.family != socket.AF_UNIX and not is_loopback(address[0]):
            tried.append(address)
            raise OSError(f"no network in this test: {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)
    return tried


@pytest.fixture
def address(tiny_pipeline_folder, temporary_folder, no_network):
    with served([tiny_pipeline_folder]) as address:
        yield address


def client_of(address: str) -> Client:
    return Client(address, verbose=False, download_files=False, httpx_kwargs={"timeout": 120})


def volume_at(address: str, shown: dict, folder: Path) -> nibabel.Nifti1Image:
    path = folder / f"{shown['url'].split('/')[-2]}.nii.gz"
    path.write_bytes(httpx.get(address + shown["url"], timeout=60).raise_for_status().content)
    return nibabel.load(path)


def files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


@pytest.mark.slow
def test_what_is_served_refers_to_no_other_server(address):
    page = httpx.get(address).text
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=[\"']([^\"']+)", page)
    assert loaded and "viewer/viewer.js" in page
    assert not [reference for reference in loaded if re.match(r"(https?:)?//", reference)]
    styles = [page, httpx.get(f"{address}/theme.css").text]
    styles += [httpx.get(f"{address}/{name}").text for name in loaded if name.endswith(".css")]
    for style in styles:
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style)
    assert "://" not in httpx.get(f"{address}/viewer/viewer.js").text
    assert "BSD" in httpx.get(f"{address}/viewer/niivue-licence.txt").text
    assert len(httpx.get(f"{address}/viewer/niivue.js").text) > 10**6


@pytest.mark.slow
def test_the_page_sends_nothing_elsewhere_and_names_no_folder(address, no_network, temporary_folder, tmp_path):
    config = httpx.get(f"{address}/config").json()
    assert config["analytics_enabled"] is False
    client = client_of(address)
    shown, scores = client.predict("tiny-pipeline", **SETTINGS, api_name="/generate")
    assert not no_network
    assert str(tmp_path) not in str(shown) and str(temporary_folder) not in str(config)
    assert "- refuses: cannot score this volume" in scores and "this reward takes no volume" in scores
    image = volume_at(address, shown, tmp_path)
    np.testing.assert_array_equal(image.affine, np.diag([*SPACING, 1]) + _offset())
    assert image.header["descrip"].item() == b"" and image.header["aux_file"].item() == b""


def _offset() -> np.ndarray:
    offset = np.zeros((4, 4))
    offset[:3, 3] = -SPACING[0] * 7.5
    return offset


@pytest.mark.slow
def test_fifty_requests_at_once_are_served_in_turn_and_none_is_mixed_up(address, tiny_pipeline_folder, tmp_path):
    clients = [client_of(address) for _ in range(5)]
    jobs = {
        seed: clients[seed % 5].submit("tiny-pipeline", **SETTINGS | {"seed": seed}, api_name="/generate")
        for seed in range(50)
    }
    pipeline = load_pipeline(tiny_pipeline_folder)
    addresses = set()
    for seed, job in jobs.items():
        shown, _ = job.result(timeout=300)
        addresses.add(shown["url"])
        assert shown["file_name"] == f"tiny-pipeline-young-seed{seed}.nii.gz"
        if seed % 5 == 0:
            wanted = generate(pipeline, Settings("young", seed=seed, num_inference_steps=2)).volumes[0, 0]
            found = torch.from_numpy(volume_at(address, shown, tmp_path).get_fdata(dtype=np.float32))
            torch.testing.assert_close(found, wanted)
    assert len(addresses) == 50


@pytest.mark.slow
def test_requests_beyond_the_queue_are_refused_with_a_sentence(tiny_pipeline_folder, temporary_folder):
    with served([tiny_pipeline_folder], max_queue=2) as address:
        client = client_of(address)
        asked = SETTINGS | {"steps": 200}
        jobs = [client.submit("tiny-pipeline", **asked, api_name="/generate") for _ in range(8)]
        with ThreadPoolExecutor(8) as threads:
            errors = [one for one in threads.map(lambda job: job.exception(timeout=300), jobs) if one is not None]
    assert 0 < len(errors) < 8
    assert all("queue" in str(error).lower() and "full" in str(error).lower() for error in errors), errors


@pytest.mark.slow
def test_scans_stay_with_who_sent_them_and_their_files_are_deleted(address, temporary_folder, tmp_path, tiny_volumes):
    clients = [client_of(address) for _ in range(3)]
    for i, client in enumerate(clients):
        affine = np.diag([*SPACING, 1.0])
        affine[:3, 3] = [-90, -90, -90 + 1000 * i]
        image = nibabel.Nifti1Image((1000 * tiny_volumes[i, 0].numpy()).astype(np.int16), affine)
        nibabel.save(image, tmp_path / f"Jane-Doe-{i}.nii.gz")
        client.predict(handle_file(tmp_path / f"Jane-Doe-{i}.nii.gz"), api_name="/scan")
        client.predict(handle_file(tmp_path / f"Jane-Doe-{i}.nii.gz"), api_name="/score_scan")
    assert files_in(temporary_folder) == []
    for i, client in enumerate(clients):
        shown, _ = client.predict("tiny-pipeline", SETTINGS["fit"], api_name="/score")
        assert "Jane" not in str(shown)
        assert volume_at(address, shown, tmp_path).affine[2, 3] == pytest.approx(-90 + 1000 * i, abs=13)
        made, _ = client.predict("tiny-pipeline", **SETTINGS, api_name="/generate")
        assert volume_at(address, made, tmp_path).affine[2, 3] == pytest.approx(-90 + 1000 * i, abs=13)
    with pytest.raises(AppError, match="no scan to score"):
        client_of(address).predict("tiny-pipeline", SETTINGS["fit"], api_name="/score")


def saved(path: Path, voxels: torch.Tensor) -> Path:
    nibabel.save(nibabel.Nifti1Image(voxels.numpy(), np.diag([*SPACING, 1.0])), path)
    return path


@pytest.mark.slow
def test_a_scan_to_score_is_not_what_volumes_start_from(address, tmp_path, tiny_volumes):
    client, path = client_of(address), saved(tmp_path / "scan.nii.gz", tiny_volumes[0, 0])
    client.predict(handle_file(path), api_name="/score_scan")
    made, _ = client.predict("tiny-pipeline", **SETTINGS, api_name="/generate")
    assert "strength" not in made["file_name"]
    client.predict(handle_file(path), api_name="/scan")
    made, _ = client.predict("tiny-pipeline", **SETTINGS, api_name="/generate")
    assert "strength" in made["file_name"]
    client.predict(api_name="/remove_scan")
    made, _ = client.predict("tiny-pipeline", **SETTINGS, api_name="/generate")
    assert "strength" not in made["file_name"]


@pytest.mark.slow
def test_a_bad_upload_gives_one_sentence_and_leaves_no_scan(address, tmp_path, temporary_folder, tiny_volumes):
    client = client_of(address)
    client.predict(handle_file(saved(tmp_path / "scan.nii.gz", tiny_volumes[0, 0])), api_name="/score_scan")
    (tmp_path / "bad.nii.gz").write_bytes(b"no scan")
    said = client.predict(handle_file(tmp_path / "bad.nii.gz"), api_name="/score_scan")
    assert "bad.nii.gz cannot be read as NIfTI: it is damaged or no NIfTI file." in said
    assert files_in(temporary_folder) == []
    with pytest.raises(AppError, match="no scan to score"):
        client.predict("tiny-pipeline", SETTINGS["fit"], api_name="/score")


@pytest.mark.slow
def test_where_others_reach_the_page_they_choose_from_its_checkpoints_only(tiny_pipeline_folder, temporary_folder):
    with served([tiny_pipeline_folder], server_name="0.0.0.0") as address:
        client = client_of(address)
        with pytest.raises(AppError, match="brain-t1 is not in the list of choices: \\['tiny-pipeline'\\]"):
            client.predict("brain-t1", **SETTINGS, api_name="/generate")


@pytest.mark.parametrize(
    ("name", "here"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("192.0.2.1", False), ("a.b", False)],
)
def test_which_addresses_only_this_machine_reaches(name, here):
    assert is_loopback(name) is here


def test_volumes_of_a_session_are_deleted_with_it(tmp_path):
    store = VolumeStore(tmp_path)
    output = MedDiffusion3DPipelineOutput(torch.rand(1, 1, 4, 4, 4), np.eye(4), (1.0, 1.0, 1.0))
    first, second = store.add("a", output, "sample"), store.add("b", output, "sample")
    assert first != second and store.path(*first.split("/")[2:]).name == "sample.nii.gz"
    store.forget("a")
    assert store.path(*first.split("/")[2:]) is None and store.path(*second.split("/")[2:]) is not None
    assert store.path("..", "conftest.py") is None


def test_a_server_that_stops_writes_no_more_volumes(tmp_path):
    store = VolumeStore(tmp_path)
    store.close()
    with pytest.raises(ValueError, match="the server is stopping"):
        store.add("a", MedDiffusion3DPipelineOutput(torch.rand(1, 1, 4, 4, 4), np.eye(4), (1.0, 1.0, 1.0)), "sample")
    assert not list(tmp_path.iterdir())


def test_volumes_of_a_session_that_fell_silent_are_deleted(tmp_path):
    store = VolumeStore(tmp_path)
    output = MedDiffusion3DPipelineOutput(torch.rand(1, 1, 4, 4, 4), np.eye(4), (1.0, 1.0, 1.0))
    url = store.add("silent", output, "sample")
    os.utime(tmp_path / url.split("/")[2], (0, 0))
    store.add("talking", output, "sample")
    assert store.path(*url.split("/")[2:]) is None


@pytest.mark.slow
def test_the_script_serves_on_this_machine_only_and_leaves_nothing_behind(tiny_pipeline_folder, tmp_path):
    (tmp_path / "temporary").mkdir()
    flags = ["--model_name_or_path", tiny_pipeline_folder, "--server_port", "0"]
    script = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "examples" / "app.py"), *flags],
        env=os.environ | {"TMPDIR": str(tmp_path / "temporary")},
        stdout=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(240, script.kill)
    watchdog.start()
    try:
        line = next(line for line in script.stdout if "page is at" in line)
        port = int(re.search(r"http://127\.0\.0\.1:(\d+) ", line).group(1))
        assert httpx.get(f"http://127.0.0.1:{port}").status_code == 200
        listening = [
            row.split()[1]
            for table in ("tcp", "tcp6")
            for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
            if row.split()[1].endswith(f":{port:04X}") and row.split()[3] == "0A"
        ]
        assert listening == [f"0100007F:{port:04X}"]
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=60) == 0
    finally:
        watchdog.cancel()
        script.kill()
    assert not [path for path in (tmp_path / "temporary").iterdir() if path.name.startswith("med3d-app-")]


def test_a_port_that_is_taken_is_refused_with_its_number():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"port {port} .* choose another with --server_port"):
            bound("127.0.0.1", port)
