"""Let nbmake fill the jupyter-cache, so that the book runs no chapter a second time."""

import copy
from datetime import datetime
from pathlib import Path


def pytest_addoption(parser):
    parser.addoption("--nb-cache", help="jupyter-cache folder to fill from nbmake runs")


def pytest_configure(config):
    path = config.getoption("--nb-cache")
    if not path:
        return
    import fcntl  # where Jupyter runs chapters for CI; Windows has none

    from jupyter_cache import get_cache
    from jupyter_cache.base import CacheBundleIn
    from nbmake.nb_run import NotebookRun

    run = NotebookRun.execute

    def execute(self):
        result = run(self)
        if result.error is None:
            nb = copy.deepcopy(result.nb)
            # nbmake notes times in the cells' metadata, which the cache's key includes.
            seconds = sum(_seconds(c.metadata.pop("execution", {})) for c in nb.cells)
            bundle = CacheBundleIn(
                nb, str(self.filename), data={"execution_seconds": seconds}
            )
            Path(path).mkdir(parents=True, exist_ok=True)
            with open(Path(path, "lock"), "w") as lock:  # one worker at a time writes
                fcntl.flock(lock, fcntl.LOCK_EX)
                get_cache(path).cache_notebook_bundle(
                    bundle, check_validity=False, overwrite=True
                )
        return result

    NotebookRun.execute = execute


def _seconds(times):
    try:
        start = times["iopub.execute_input"]
        end = times["shell.execute_reply"]
    except KeyError:
        return 0.0
    start, end = (datetime.fromisoformat(t) for t in (start, end))
    return (end - start).total_seconds()
