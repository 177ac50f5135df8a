"""One file a command: its options, and what it does with them (read, call a pure module, write)."""
