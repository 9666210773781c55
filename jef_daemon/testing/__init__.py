"""For tests, of the daemon itself and of executors. Production never imports it."""
