"""The commands. `main(argv)` of each parses flags, makes one call and returns an exit status."""
