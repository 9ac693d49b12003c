"""For every test: signals as a terminal would have them, and no clock: a busy machine fails nothing."""

import signal

from hypothesis import settings

settings.register_profile("project", deadline=None)
settings.load_profile("project")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the tests in the background ignores SIGINT, Dagster gives SIGTERM the same treatment, and child
    # processes inherit it: then nothing that the tests start could be ended.
    signal.signal(signal.SIGINT, signal.default_int_handler)
