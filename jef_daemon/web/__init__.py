"""The HTTP port: health, metrics, updates of async jobs, commands of operators.

    server      the listener, inside the daemon's event loop
    app         which address does what
    receiving   bodies and tokens: what is refused before anything is done
    health      whether the parts work, each with its word

Imported only where `http_port` is set. It sees the daemon through the `Doors` that the assembly hands it.
"""
