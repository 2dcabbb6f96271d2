"""What everything stands on: errors, the machine, memory, files, permissions."""
