"""The command line, one file per subcommand. Torch is imported inside the commands, never at the top of a
module."""
