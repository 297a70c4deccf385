"""A run's log when the disk is full."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from d2o.training import logging
from d2o.training.logging import RunLog


def test_a_full_disk_is_raised_by_the_next_write_and_not_printed_by_a_thread(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # pytest's own, which is put back
    log = RunLog(tmp_path, 0, 0)
    writer = log.board._get_file_writer().event_writer._async_writer

    def full(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer._writer.write = full
    with pytest.raises(OSError, match="No space left"):
        for i in range(1000):
            log.write(i, i, loss=1.0)
            log.sync()
    writer._worker.join(10)
    assert "Traceback" not in capfd.readouterr().err


def test_other_threads_say_what_went_wrong(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(logging, "_print_traceback", threading.__excepthook__)
    RunLog(tmp_path, 0, 0)

    def fail():
        raise OSError("of another thread")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert "of another thread" in capfd.readouterr().err
