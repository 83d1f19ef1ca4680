"""What the commands do, one file each. Imported only when a command runs."""
