"""What lies on disk: files, boxes, tables, the manifest."""
