"""The commands of `asd-rt`, one module each: `add_arguments(parser)` and `execute(args) -> Outcome`."""
