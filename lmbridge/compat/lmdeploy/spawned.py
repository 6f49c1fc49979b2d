"""The main module of a process that a script under ``lmbridge run`` spawns: the script again, on the drop-in.

Rule: run only by multiprocessing, in place of the script, which would import LMDeploy itself or fail.
"""

from lmbridge.compat.lmdeploy.script import run_again as _run_again

_run_again(globals())
