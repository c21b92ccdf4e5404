"""All Dagster definitions, one concept per module."""
