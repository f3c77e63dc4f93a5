"""Builds the CPU kernels with the package, so that nobody waits for them at a first call.

The rest of the package stands in `pyproject.toml`.  Where there is no `g++`, or for a processor
other than the one that it was installed on, the library is built when it is first needed, as in a
checkout.  QGRAPH_KERNELS=0 leaves it out: of a wheel that is to go to other machines.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


class Build(build_py):
    """Copies the package, and builds the library beside its sources."""

    def run(self) -> None:
        super().run()
        folder = Path(self.build_lib) / "qgraph" / "kernels" / "cpu" / "built"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier build
        wanted = sys.platform == "linux" and os.environ.get("QGRAPH_KERNELS") != "0"
        if self.editable_mode or not wanted:
            return
        spec = importlib.util.spec_from_file_location(
            "building", HERE / "qgraph" / "kernels" / "cpu" / "building.py"
        )
        building = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(building)
        try:
            building.install(folder)
        except (OSError, subprocess.CalledProcessError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            self.announce(f"the CPU kernels are built when they are first needed: {error}", 3)


setup(cmdclass={"build_py": Build})
