"""Tools that every other folder uses: errors, files, memory, precision, registries, permissions."""
