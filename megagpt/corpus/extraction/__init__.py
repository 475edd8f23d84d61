"""Raw records to documents."""
