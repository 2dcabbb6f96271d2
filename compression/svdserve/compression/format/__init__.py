"""The checkpoint on disk: schema, layouts, codecs, reader, writer, checks; see FORMAT.md."""
