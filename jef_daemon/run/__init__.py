"""A queued job → a slot → an executor → its outcome.

catalogue   which actions this daemon serves, and how
forking     where the processes for executors come from
probe       looks at executors from a process of its own, before the daemon trusts them
worker      ROLE: claims, runs, records
attempt     one that runs here, and how it comes to its end
inputs      what an executor is given for a call
progress    many reports, few notifications
boundary    calls `execute` and turns whatever happens into an event
isolation   a warm pool of processes for what may block or crash
guardian    nothing that was started here outlives the daemon
"""
