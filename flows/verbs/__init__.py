"""One file for each family of verbs; `flows/cli.py` names them all."""
