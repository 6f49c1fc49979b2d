"""Other libraries' faces over the Bridge: ``lmbridge.compat.lmdeploy`` for LMDeploy's ``pipeline``.

Rule: what is here uses the Bridge's public names only, and nothing of lmbridge knows what is here.
"""
