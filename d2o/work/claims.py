"""Claims where there are no locks: an object `claims/<file>.json` that names its worker and is written anew while the
worker lives.

A worker writes its claim, waits `settle` seconds and reads it back: the last writer has it. That makes double work
rare, not impossible; it must do no harm. A claim that was not renewed for `expiry` seconds is void. Its age is the
object's own modification time by the store's clock (measured once, with an object of our own), so that the clocks of
the machines do not matter; where a file system tells no times, the time written in the claim counts, by this machine's
clock. Either way a claim is void, too, when this worker has watched it for `expiry` seconds and saw no change.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time

from d2o.work.objects import Objects

CLAIMS = "claims"


class Claims:
    """This worker's claims in a folder; it renews them every `beat` seconds in a thread. Times in seconds. Threads may
    share it."""

    def __init__(self, objects: Objects, beat: float, expiry: float, settle: float):
        self.objects, self.beat, self.expiry, self.settle = objects, beat, expiry, settle
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._held: dict[str, bool] = {}  # what we have or try to get; True: won, to be renewed
        self._lock = threading.Lock()
        self._heart: threading.Thread | None = None
        self._seen: dict[str, tuple[bytes, float]] = {}  # others' claims, and since when they have been so
        self._ahead: float | None = None  # the store's clock minus ours

    def claim(self, name: str) -> Held | None:
        """The claim, or None: another worker (or thread) has it."""
        with self._lock:
            if name in self._held:
                return None
            self._held[name] = False
        won = False
        try:
            won = self._win(name)
        finally:
            with self._lock:
                if won:
                    self._held[name] = True
                    if self._heart is None:
                        self._heart = threading.Thread(target=self._renew, name="claims", daemon=True)
                        self._heart.start()
                else:
                    del self._held[name]
        return Held(self, name) if won else None

    def release(self, name: str) -> None:
        with self._lock:
            self._held.pop(name, None)
            with contextlib.suppress(Exception):  # then it expires
                if self._is_ours(name):
                    self.objects.remove(_file(name))

    def clear(self) -> None:
        """Remove everybody's claims: all is finished."""
        for name in self.objects.ls(CLAIMS):
            self.objects.remove(f"{CLAIMS}/{name}")
        self.objects.remove_folder(CLAIMS)

    def _win(self, name: str) -> bool:
        data = self.objects.read(_file(name))
        if data is not None and self._holds(name, data):
            return False
        self._write(name)
        time.sleep(self.settle)
        return self._is_ours(name)

    def _holds(self, name: str, data: bytes) -> bool:
        """Whether another worker's claim with that content keeps us out."""
        if _owner(data) == self.worker:  # we released it, but could not remove it
            return False
        before, since = self._seen.get(name, (b"", 0.0))
        if before != data:
            self._seen[name] = (data, time.monotonic())
        elif time.monotonic() - since > self.expiry:
            return False
        written = self.objects.modified(_file(name))
        if written is not None:
            return self._store_time() - written <= self.expiry
        try:
            return time.time() - float(json.loads(data)["time"]) <= self.expiry
        except (ValueError, KeyError, TypeError):
            return True  # damaged: nobody will renew it

    def _renew(self) -> None:
        """Write our claims anew until there are none."""
        while True:
            time.sleep(self.beat)
            with self._lock:
                if not self._held:
                    self._heart = None
                    return
                for name in [name for name, won in self._held.items() if won]:
                    with contextlib.suppress(Exception):  # the network may come back before the claim expires
                        if self._is_ours(name):
                            self._write(name)
                        else:  # we were too slow, and another worker makes the same file
                            self._held[name] = False

    def _write(self, name: str) -> None:
        self.objects.put(_file(name), json.dumps({"worker": self.worker, "time": time.time()}).encode())

    def _is_ours(self, name: str) -> bool:
        return _owner(self.objects.read(_file(name)) or b"") == self.worker

    def _store_time(self) -> float:
        """Now, by the store's clock."""
        if self._ahead is None:
            probe = f"{CLAIMS}/clock-{self.worker}.json"
            self.objects.put(probe, b"{}")
            written = self.objects.modified(probe)
            self._ahead = 0.0 if written is None else written - time.time()
            self.objects.remove(probe)
        return time.time() + self._ahead


class Held:
    """A claim that this worker has."""

    def __init__(self, claims: Claims, name: str):
        self.claims, self.name = claims, name

    def release(self) -> None:
        self.claims.release(self.name)


def _file(name: str) -> str:
    return f"{CLAIMS}/{name}.json"


def _owner(data: bytes) -> str | None:
    try:
        return json.loads(data)["worker"]
    except (ValueError, KeyError, TypeError):
        return None
