"""`jef`: the door for people. Each command in a module of its own; heavy imports wait until one is called.

app            the command tree, options that all share, errors as sentences
daemon         run, actions, check
jobs           submit, list, show, history, watch
letters        dead-letters list, show, replay, drop
keeping        purge, schema
table          the live table of jobs
words          times, durations and statuses as people read them
"""

from jef_daemon.cli.app import main

__all__ = ["main"]
