"""Workflows: finished stage → next request. `definition` and `plan` say what is to be done, `law` what follows.

Pure but for `loading` (files) and `coordinator` (the role): what is decided, is decided inside a transaction of
the ledger (`ledger.workflows`), as for locks.
"""
