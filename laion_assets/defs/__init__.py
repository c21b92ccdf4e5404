"""Everything Dagster: one concept a module."""
