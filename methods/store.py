"""What a client keeps between rounds."""

import os
from pathlib import Path

from safetensors.torch import load_file, save_file

from methods.base import State
from utils import read_json, write_json


class Kept:
    """What one client has kept of earlier rounds, by name, as files in `folder`.

    Tensors are in a folder of the client's own, so that a look for them takes as long with
    10,000 clients as with one. Not in Flower's state of a client, which would not outlive
    the run's process. A run that goes on after a stop may do a round again: what that round
    has left is of no use to it.
    """

    def __init__(self, folder: Path, partition: int, server_round: int) -> None:
        self.folder, self.partition, self.number = folder, partition, server_round

    def load(self, name: str) -> State | None:
        """What was saved last before this round, or None."""
        earlier = [file for file in self._files(name) if file[0] < self.number]
        return load_file(max(earlier)[1]) if earlier else None

    def save(self, name: str, state: State) -> None:
        """Keep this of the round, and what the client's two rounds before it have kept.

        A run may go on from the older of its two checkpoints, two rounds back.
        """
        self._own.mkdir(parents=True, exist_ok=True)
        file = self._own / f"{name}-{self.number:06d}.safetensors"
        save_file(state, temporary := file.with_suffix(".tmp"))
        os.replace(temporary, file)
        for _, old in sorted(self._files(name))[:-3]:
            old.unlink()

    def listed(self, name: str) -> list[float]:
        """What has been enlisted, in all rounds and in those that were done again."""
        path = self._list(name)
        return read_json(path) if path.exists() else []

    def enlist(self, name: str, value: float) -> None:
        """Write this down beside what is listed, for good: it is on the disk thereafter."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._list(name), [*self.listed(name), value])

    def _list(self, name: str) -> Path:
        return self.folder / f"{self.partition}-{name}.json"

    @property
    def _own(self) -> Path:
        return self.folder / str(self.partition)

    def _files(self, name: str) -> list[tuple[int, Path]]:
        files = self._own.glob(f"{name}-*.safetensors")
        return [(int(file.stem.rpartition("-")[2]), file) for file in files]
