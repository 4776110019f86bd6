from importlib.util import find_spec

# `make test-tunix` fails where nothing is collected, as where Tunix is missing.
collect_ignore_glob = [] if find_spec("tunix") else ["test_*.py"]
