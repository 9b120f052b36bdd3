"""Names and bytes on disk become modules: strict readers, snapshots, the catalog."""
