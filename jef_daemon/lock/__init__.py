"""Locks: which jobs may run at the same time. Everybody negotiates through the queue `jef.locks`.

    state       what is stored: grants, waiters, the reads and the changes of the store; pure
    requests    what can be asked and what is answered, the limits; pure
    draft       the law of the queue, and the changes of one decision before they are stored; pure
    protocol    `decide`: (state, request, now) → changes, replies; pure
    acquiring   what it does with an acquire;  leases: what keeps a lease alive, and what its end does; pure

The pure part reads no clock and does no I/O; the lock service, the daemon's client and the tests share it.
`docs/models` proves its rules in a formal model.
"""
