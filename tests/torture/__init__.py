"""Kills every command at random moments and at its file-system events, fills the disk, damages every kind of file, and
counts what broke."""
