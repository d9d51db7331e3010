"""How does a wheel hold Tandem? As one package, `tandem`, with the rooms inside it: nothing of the
name of `data` or `model` is to lie in site-packages. All else of the package is in setup.cfg.
"""

import pathlib
import shutil

import setuptools
from setuptools.command.build_py import build_py


class OnePackage(build_py):
  """Builds what setup.cfg lists, then moves all of it into tandem/. An editable install is the
  repository as it stands.
  """

  def run(self):
    super().run()
    if self.editable_mode:
      return
    root = pathlib.Path(self.build_lib)
    for path in sorted(root.iterdir()):
      if path.name != 'tandem':
        target = root / 'tandem' / path.name
        if target.is_dir():
          shutil.rmtree(target)
        shutil.move(path, target)


setuptools.setup(cmdclass={'build_py': OnePackage})
