"""`jef`: the door for people. Each command in a module of its own; heavy imports wait until one is called.

app            the command tree, options that all share, errors as sentences
daemon         run, actions, check
submitting     submit
jobs           list, show, history, watch
control        cancel, retry, resume
letters        dead-letters list, show, replay, drop
locks          locks list, acquire, release, run, history
holding        a command that runs as long as locks are held
workflow_definitions  workflows check, draw, schema
workflows      workflows start, list, show, history, cancel, retry
keeping        purge, schema
systemd        systemd install
definitions    definitions: users and topology as a file that the broker loads
table          the live table of jobs
lock_table     the table of locks
words          times, durations, locks and statuses as people write and read them
"""

from jef_daemon.cli.app import main

__all__ = ["main"]
