"""Other inference servers, each set up to serve the bare classifier as well as it can.

A file here runs in its server's own environment, beside ``classifier.py``; ``loadtest.rivals`` starts them. Settings
come by the environment: ``BENCH_MODEL`` is the graph, ``BENCH_PORT`` the port, ``BENCH_WORKERS`` the processes that
compute, ``BENCH_THREADS`` the threads of each one's computation, ``BENCH_BATCH`` the largest batch, 1 for none,
``BENCH_WAIT_SECONDS`` how long one is waited for, and of LitServe ``BENCH_FAST_QUEUE`` 1 for its queue on ZeroMQ and
``BENCH_API_SERVERS`` the processes that speak HTTP.
"""
