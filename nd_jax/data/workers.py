"""Child processes that read data: never alive without the process they read for."""

from __future__ import annotations

import multiprocessing
import os
import threading


def stay_with_parent(index: int, count: int) -> None:
    """First thing in every worker, as Grain's ``worker_init_fn``: it ends at once when its parent does, however.

    Grain's own workers wait for room in their queue forever if the parent was killed. In a process group of its own a
    worker does not hear the Ctrl-C or the SIGTERM that is sent to the parent's whole group, so it goes on reading
    until the parent, which stops politely, is done with it.
    """
    os.setpgid(0, 0)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()  # returns when the pipe that only the parent holds open is closed
        os._exit(0)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()
