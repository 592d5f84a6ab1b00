"""The command line, and modules that only it uses."""
