"""The guard's own subcommands of `undertow`. Each module offers `add_parser(subparsers)`."""
