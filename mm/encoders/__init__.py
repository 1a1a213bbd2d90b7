"""Raw media to continuous features (`vision`, `speech`, `point`), and features to embeddings (`adapters`)."""
