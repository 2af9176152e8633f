"""What every test needs: Ctrl-C that works."""

import signal

# A runner that was started in the background of a shell ignores Ctrl-C, and so would every process that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
