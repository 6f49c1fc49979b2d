"""Other libraries' APIs over the Bridge: ``lmbridge.compat.lmdeploy`` is LMDeploy's ``pipeline``.

Rule: uses only the Bridge's public names; the rest of lmbridge does not know this package.
"""
