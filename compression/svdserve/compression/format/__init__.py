"""What lies on disk: schema, factors, reader, writer, checks. FORMAT.md says it in prose."""
