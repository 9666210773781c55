"""OpenTelemetry, where an operator wants it: `[tracing] enabled`. Nothing here is imported otherwise.

daemon      puts these together for a daemon
spans       what was committed and confirmed → spans, made when they end
export      spans → a collector, in the background
executor    the live side: the current span while an executor works, in any process
recorded    a span as facts, and the table of those that the daemon makes
"""
