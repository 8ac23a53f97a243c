"""Files of the sessions that are open: each volume under a name that cannot be guessed, deleted with its session."""

import secrets
import shutil
import time
from pathlib import Path
from threading import Lock

from ..pipelines import MedDiffusion3DPipelineOutput

KEPT_SECONDS = 3600  # of a session that never said it was closed


class VolumeStore:
    """Volumes that were made, as NIfTI files below one folder.

    Args:
        folder: where they go; its owner deletes it at the end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._of_session: dict[str, list[Path]] = {}
        self._closed = False
        self._lock = Lock()

    def add(self, session: str, output: MedDiffusion3DPipelineOutput, name: str) -> str:
        """Write the one volume of an output, with its affine; returns its address on the server."""
        own = self.folder / secrets.token_urlsafe(16)
        with self._lock:
            if self._closed:
                raise ValueError("the server is stopping.")
            (written,) = output.save_nifti(own, prefix=name)
            path = written.rename(own / f"{name}.nii.gz")
            self._of_session.setdefault(session, []).append(own)
        self._delete_old()
        return f"/volumes/{own.name}/{path.name}"

    def path(self, token: str, file_name: str) -> Path | None:
        """The file of an address, None where there is none (any more)."""
        path = self.folder / token / file_name
        return path if path.resolve().is_relative_to(self.folder.resolve()) and path.is_file() else None

    def forget(self, session: str) -> None:
        """Delete what a session made."""
        with self._lock:
            folders = self._of_session.pop(session, [])
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Take no more volumes, so that the folder can be deleted while a request is still worked on."""
        with self._lock:
            self._closed = True

    def _delete_old(self) -> None:
        """Delete volumes of sessions of which nothing was heard: their last one is an hour old."""
        oldest = time.time() - KEPT_SECONDS
        with self._lock:
            folders = {session: [one for one in own if one.is_dir()] for session, own in self._of_session.items()}
        for session, own in folders.items():
            if not own or max(folder.stat().st_mtime for folder in own) < oldest:
                self.forget(session)
