"""The server's subcommands of `undertow`. Each module offers `add_parser(subparsers)`."""
