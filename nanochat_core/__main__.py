"""`python -m nanochat_core` is the `nanochat` command."""

from nanochat_core.cli.main import main

if __name__ == "__main__":
    main()
