"""For every test: signals as a terminal would have them."""

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the tests in the background ignores SIGINT, Dagster gives SIGTERM the same treatment, and child
    # processes inherit it: then nothing that the tests start could be ended.
    signal.signal(signal.SIGINT, signal.default_int_handler)
