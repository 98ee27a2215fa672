"""DuckDB opens wherever Python runs, in a notebook too."""

import subprocess
import sys

# What DuckDB takes for a Jupyter kernel; without ipywidgets it then refuses every word about its bar.
IN_A_KERNEL = """
import sys, tempfile, types
from pathlib import Path

class Shell:
    config = {"IPKernelApp": {}}

sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython"].get_ipython = Shell
sys.modules["ipywidgets"] = None
"""
REFUSED = """
import duckdb
try:
    duckdb.connect().execute("SET enable_progress_bar = false")
except duckdb.InvalidInputException as error:
    print("ipywidgets" in str(error))
"""
OPENED = """
from hstu_rec.data.database import database
with tempfile.TemporaryDirectory() as folder, database(Path(folder)) as connection:
    print(connection.execute("SELECT 6 * 7, current_setting('enable_progress_bar')").fetchall())
"""


def printed(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_events_are_prepared_in_a_notebook_without_widgets() -> None:
    assert printed(IN_A_KERNEL + REFUSED) == "True\n"
    assert printed(IN_A_KERNEL + OPENED) == "[(42, False)]\n"
