"""The command line: one file a verb, and the one place where a mistake becomes one line."""
