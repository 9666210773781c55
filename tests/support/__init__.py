"""What tests share: a foreign client, a daemon process, executors to run."""
